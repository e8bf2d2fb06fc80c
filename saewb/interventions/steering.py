"""Steer a model by changing latents of an SAE, which need not be attached: add, clamp, scale, ablate.

At the SAE's write point the activation moves by the decoded change of latents, and by nothing else:

    activation  <-  activation + decode(latents + change) - decode(latents)  =  activation + sum_i change_i W_dec[i]

so the SAE's error stays in place, and a change of 0 is the model itself.

1. The read point gives x, the write point the activation (the same tensor for an SAE).
2. Only the latents to change are encoded from x, none at all to add; where the SAE is attached, its latents are taken.
3. The activation moves where the mask of token positions is True. Positions count from the start of each text: in
   generation with a KV cache a pass begins at the cache's offset, in a batch a text begins after its padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._indices import as_tensor, index_of, index_slice, indices_of
from saewb.errors import explain
from saewb.fingerprint import sae_digest
from saewb.interventions.base import ActiveIntervention, check_kv_cache, mask_special_tokens
from saewb.interventions.site import Site, check_is_sae
from saewb.interventions.splice import active_splice
from saewb.models import forward, hook_points
from saewb.models.tokenizer import special_ids
from saewb.sae.sae import SAE

How = Literal["add", "clamp", "scale"]
Positions = Union[int, slice, Sequence[int], Sequence[bool], Tensor, None]


def steer(
    model: nn.Module,
    sae: nn.Module | Mapping[nn.Module, Mapping[int, float]],
    latents: Mapping[int, float] | None = None,
    *,
    how: How = "add",
    positions: Positions = None,
    skip_special_tokens: bool | Sequence[int] = False,
    hook: str | None = None,
    hook_out: str | None = None,
) -> Steering:
    """Run the model with some latents changed, along their decoder directions, until `detach`.

        add:    latent i  <-  a_i + value          (v W_dec[i] is added, wherever the latent is on or off)
        clamp:  latent i  <-  value                (0 ablates it)
        scale:  latent i  <-  value * a_i          (acts where the latent is active)

    Works like `open`, as `saewb.attach` does: at once, and until the `with` block ends or `detach()` is called; in
    `run_with_cache`, `run_with_hooks`, and in `generate`, with a cache of keys and values or without. `a_i` is the
    activation of the latent on the SAE's input; where the same SAE was attached at that point before, it is the latent
    of the attachment, after hooks on it. Hooks run in the order they were added: of two steerings at one point the
    second acts on the result of the first.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        sae: SAE whose latents change; or several with the change of each, `{sae: {latent: value}}`.
        latents: `{latent: value}`, in units of the activation: with unit decoder rows, a length in the model's units
            (the bundled SAE's strongest latents reach about 5 to 30).
        how: meaning of the values, see above; the same for all of them.
        positions: where: None everywhere; a position, a slice or a list of positions, counted from the start of the
            text, generated tokens included, padding before it not; or a mask of booleans, `[pos]` or `[batch, pos]`, of
            the one pass it is meant for.
        skip_special_tokens: leave these tokens alone: True for the tokenizer's BOS, EOS, PAD and the like, or ids.
        hook: read point, instead of `sae.cfg.hook`; for one SAE.
        hook_out: write point, instead of `sae.cfg.hook_out`; for one SAE.

    Returns:
        A Steering: `.detach()`, and a context manager.

    Raises:
        ValueError: for a latent the SAE does not have, a value that is not finite, an unknown or switched-off point,
            negative positions; in the forward pass for what does not fit, or a point that is never reached.
        TypeError: if `latents` is no mapping, or `model` has no hook points.

    References:
        Templeton et al. 2024, "Scaling Monosemanticity" (clamping); Turner et al. 2023, arXiv:2308.10248 (adding).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> with saewb.steer(model, sae, {748: 8.0}) as steering:
        ...     text = model.generate("It is", max_new_tokens=5, do_sample=False, verbose=False)
        >>> steering
        Steering(detached: add 748: 8 at blocks.2.hook_resid_post)
    """
    values_of = dict(sae) if isinstance(sae, Mapping) else {sae: latents}
    if isinstance(sae, Mapping) and (latents is not None or hook is not None or hook_out is not None):
        what = "steer got several SAEs together with latents=, hook= or hook_out=."
        raise ValueError(explain(what, fix="saewb.steer(model, {sae_a: {12: 4.0}, sae_b: {7: -2.0}})"))
    if how not in get_args(How):
        raise ValueError(explain(f"steer got how={how!r}.", want="one of " + ", ".join(map(repr, get_args(How)))))
    changes = []
    for one, values in values_of.items():
        site = Site.of(model, one, hook, hook_out)
        changes.append(LatentChange(site, *_check_values(one, values), how))
    steering = Steering(model, changes, TokenPositions.of(positions), special_ids(model, skip_special_tokens))
    steering._activate()
    return steering


def ablate(
    model: nn.Module,
    sae: nn.Module | Mapping[nn.Module, int | Sequence[int] | Tensor],
    latents: int | Sequence[int] | Tensor | None = None,
    *,
    positions: Positions = None,
    skip_special_tokens: bool | Sequence[int] = False,
    hook: str | None = None,
    hook_out: str | None = None,
) -> Steering:
    """Run the model without these latents, until `detach`: each a_i W_dec[i] is subtracted, all else stays.

    Short for `saewb.steer(..., how="clamp")` with values of 0, and like it in everything else.

    Args:
        model: as for `steer`.
        sae: SAE whose latents are ablated; or several with the latents of each, `{sae: [latents]}`.
        latents: indices of latents, one or several; or a mask of all latents, as `index.density > 0.3`.
        positions: as for `steer`.
        skip_special_tokens: as for `steer`.
        hook: as for `steer`.
        hook_out: as for `steer`.

    Returns:
        A Steering: `.detach()`, and a context manager.

    Raises:
        ValueError: as `steer`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> with saewb.ablate(model, sae, [748, 4]):
        ...     logits = model("The family is found in Brazil")
    """
    latents_of = sae if isinstance(sae, Mapping) else {sae: latents}
    zeros = {}
    for one, indices in latents_of.items():
        check_is_sae(one)
        zeros[one] = dict.fromkeys(indices_of(indices, "latents", one.cfg.d_sae, of=one).tolist(), 0.0)
        if not zeros[one]:
            fix = "saewb.ablate(model, sae, [12, 40])"
            raise ValueError(explain(f"ablate got latents={indices!r}.", want="at least one", fix=fix))
    several = isinstance(sae, Mapping)
    return steer(
        model,
        zeros if several else sae,
        None if several else zeros[sae],
        how="clamp",
        positions=positions,
        skip_special_tokens=skip_special_tokens,
        hook=hook,
        hook_out=hook_out,
    )


class Steering(ActiveIntervention):
    """Changed latents on a model, until `detach` or the end of the `with` block: the result of `saewb.steer`."""

    steers = True
    _how_to_repeat = "with saewb.steer(model, sae, {12: 8.0}):"

    def __init__(
        self, model: nn.Module, changes: list[LatentChange], positions: TokenPositions, special: tuple[int, ...]
    ) -> None:
        super().__init__(model)
        self._changes, self._positions, self._special = changes, positions, special
        self._hooks: list[hook_points.Hook] = []
        self._tokens: Tensor | None = None
        self._kv_cache_offset: int | None = None  # tokens of the text before this pass; None until the first block
        self._n_padding: Tensor | None = None  # of each row, before its text

    @property
    def written(self) -> tuple[hook_points.HookPoint, ...]:
        """Points at which the activation moves."""
        return tuple(change.site.write for change in self._changes)

    def content(self) -> list[Any]:
        """Digests of the SAEs, their points, the changes of latents, and at which tokens."""
        changes = [
            [sae_digest(c.sae), c.site.read.name, c.site.write.name, c.latents, c.values, c.how] for c in self._changes
        ]
        return [changes, self._positions.content(), list(self._special)]

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        return f"Steering({state}: {'; '.join(map(str, self._changes))})"

    def _install(self) -> None:
        for change in self._changes:
            self._hooks += change.hooks(self._mask)
        for hook in self._hooks:
            hook.install()

    def _remove(self) -> None:
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks.clear()
        for change in self._changes:
            change.mask = None  # it refers to this object: break the cycle

    def _before_forward(self, tokens: Tensor | None) -> None:
        self._tokens, self._kv_cache_offset, self._n_padding = tokens, None, None
        first_layer = forward.first_layer(self._model())
        for hook in self._hooks:
            if not hook.is_on:  # someone called reset_hooks(including_permanent=True)
                hook.install()
        for change in self._changes:
            change.before_forward(first_layer)

    def _at_first_block(self, kv_cache_offset: int, n_padding: Tensor | None) -> None:
        self._kv_cache_offset, self._n_padding = kv_cache_offset, n_padding
        for change in self._changes:
            if change.how != "add":
                check_kv_cache(change.sae, kv_cache_offset)

    def _after_forward(self) -> None:
        for change in self._changes:
            change.after_forward()

    def _mask(self, activation: Tensor) -> Bool[Tensor, "_ pos 1"] | None:
        """Where latents change, `[batch or 1, pos, 1]`; None everywhere."""
        mask = self._positions.mask(activation.shape[:2], self._kv_cache_offset, self._n_padding)
        mask = None if mask is None else mask.to(activation.device)
        if self._special:
            plain = ~mask_special_tokens(activation, self._tokens, self._special)
            mask = plain if mask is None else mask & plain
        return None if mask is None else mask[..., None]


@dataclass(eq=False)
class LatentChange:
    """Hooks that move the activation at one SAE's write point by a change of some of its latents."""

    site: Site
    latents: list[int]
    """Indices of the latents to change, each once."""
    values: list[float]
    """One per latent; `how` says what they mean."""
    how: How
    mask: Callable[[Tensor], Tensor | None] | None = None
    """Mask of an activation, `[batch or 1, pos, 1]`: True where latents change; None for everywhere."""
    first_layer: int = 0
    """Block at which the current pass starts."""
    fired: bool = False
    x: Tensor | None = None
    """Activation that a transcoder read in the current pass."""

    @property
    def sae(self) -> nn.Module:
        """SAE whose latents change."""
        return self.site.sae

    @property
    def needs_input(self) -> bool:
        """Whether the change depends on what the SAE reads."""
        return self.how != "add" or self.sae.cfg.normalization != "none"

    def hooks(self, mask: Callable[[Tensor], Tensor | None]) -> list[hook_points.Hook]:
        """Its hooks, not installed yet."""
        self.mask, writing = mask, hook_points.Hook(self.site.write, self._on_write)
        if not self.needs_input or self.site.is_one_point:
            return [writing]
        return [hook_points.Hook(self.site.read, self._on_read), writing]

    def before_forward(self, first_layer: int) -> None:
        """Forget the last pass."""
        self.first_layer, self.fired, self.x = first_layer, False, None

    def after_forward(self) -> None:
        """Check that the change had its effect in a whole pass."""
        if not self.fired and not self.site.write.is_before(self.first_layer):
            what = f"{self.site.write.name!r} did not fire in a whole forward pass: steering had no effect."
            raise ValueError(explain(what, want="a point that this model computes"))

    def _on_read(self, activation: Tensor) -> None:
        if not self.site.read.is_before(self.first_layer):
            self.x = activation.clone()

    def _on_write(self, activation: Tensor) -> Tensor | None:
        if self.site.write.is_before(self.first_layer):
            return None
        self.fired = True
        target = self.site.read_target(activation)
        if self.needs_input and self.x is None and not self.site.is_one_point:
            read, write = self.site.read.name, self.site.write.name
            what = f"{read!r} did not fire before {write!r}: the transcoder has nothing to read."
            raise ValueError(explain(what, want="a read point that the model computes before the write point"))
        shift = self._shift(activation if self.x is None else self.x, target.shape)
        mask = self.mask(activation)
        shift = shift if mask is None else torch.where(mask, shift, torch.zeros_like(shift))
        return self.site.write_output((target + shift).to(activation.dtype), activation)

    def _shift(self, activation: Tensor, shape: torch.Size) -> Float[Tensor, "batch pos d_out"]:
        """`decode(latents + change) - decode(latents)`."""
        values = torch.tensor(self.values, dtype=self.sae.dtype, device=self.sae.device)
        x = self.site.read_input(activation) if self.needs_input else None
        if self.how == "add":
            change = values.expand(*shape[:-1], len(values))
        else:
            acts = self._acts(x)
            change = values - acts if self.how == "clamp" else (values - 1) * acts
        return decode_change(self.sae, change, self.latents, x)

    def _acts(self, x: Tensor) -> Float[Tensor, "batch pos n"]:
        splice = active_splice(self.site.write)
        if splice is not None and splice.sae is self.sae and splice.fired:
            return splice.latents()[..., self.latents]
        return self.sae.encode(x, latents=self.latents)

    def __str__(self) -> str:
        values = ", ".join(f"{i}: {v:g}" for i, v in zip(self.latents[:6], self.values[:6], strict=True))
        more = f" and {len(self.latents) - 6} more" if len(self.latents) > 6 else ""
        return f"{self.how} {values}{more} at {self.site.hook_name_out}"


def decode_change(
    sae: nn.Module, change: Float[Tensor, "*batch n"], latents: list[int], x: Float[Tensor, "*batch d_in"] | None
) -> Float[Tensor, "*batch d_out"]:
    """Shift of the output when these latents change: `decode(latents + change) - decode(latents)`.

    Args:
        sae: any of the SAE classes; all decode linearly.
        change: of each of `latents`, in units of its activation.
        latents: indices, each once.
        x: the input; only needed where it scales the output (`cfg.normalization`).

    Returns:
        In the model's units.
    """
    if isinstance(sae, SAE):
        with torch.autocast(sae.device.type, enabled=False):
            shift = change @ sae.W_dec[latents]
        if sae.cfg.normalization == "none":
            return shift
        return sae.denormalize(shift, x) - sae.denormalize(torch.zeros_like(shift), x)
    dense = change.new_zeros(*change.shape[:-1], sae.cfg.d_sae)
    x = change.new_zeros(*change.shape[:-1], sae.cfg.d_in) if x is None else x
    changed = dense.index_add(-1, torch.tensor(latents, device=change.device), change)
    return sae.decode(changed, x) - sae.decode(dense, x)


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Token positions of a text, resolved to a mask of each pass, also during generation with a KV cache."""

    positions: slice | list[int] | Tensor | None
    """Counted from the start of the text; a bool tensor is the mask of one pass; None means all."""

    @classmethod
    def of(cls, positions: object) -> TokenPositions:
        """Resolve the `positions` argument of a caller.

        Raises:
            ValueError: for positions counted from the end, or that are not whole.
            TypeError: for anything that is no position.
        """
        if positions is None:
            return cls(None)
        if isinstance(positions, slice):
            resolved = index_slice(positions, "positions")
            start, stop, step = resolved.start, resolved.stop, resolved.step
            is_ahead = min(start or 0, stop or 0) >= 0 and (step is None or step >= 1)
        else:
            array = as_tensor(positions, "positions")
            if array.dtype == torch.bool:
                return cls(array)
            resolved = indices_of(array, "positions").tolist()
            is_ahead = min(resolved, default=0) >= 0
        if not is_ahead:
            want = "0 or more, counted from the start of the text: generation moves its end"
            raise ValueError(explain(f"got positions={positions!r}.", want=want))
        return cls(resolved)

    def content(self) -> Any:
        """Plain values."""
        return self.positions.tolist() if isinstance(self.positions, Tensor) else str(self.positions)

    def mask(
        self, shape: torch.Size, kv_cache_offset: int | None, n_padding: Int[Tensor, " batch"] | None = None
    ) -> Bool[Tensor, "_ pos"] | None:
        """Mask of a pass over `shape` = (batch, pos) tokens.

        Args:
            shape: of the activation.
            kv_cache_offset: how many tokens of the text came before this pass; None if not known yet.
            n_padding: tokens before the text of each row; positions count from the text.

        Returns:
            `[batch or 1, pos]`, True at the positions; None for all of them.

        Raises:
            ValueError: if a mask does not fit the pass; if the KV-cache offset is needed and not known yet.
        """
        if self.positions is None:
            return None
        if isinstance(self.positions, Tensor):
            mask = self.positions[None] if self.positions.ndim == 1 else self.positions
            if tuple(mask.shape) not in (tuple(shape), (1, shape[1])):
                got = tuple(self.positions.shape)
                what = f"positions has shape {got}, the activation [batch, pos] = {tuple(shape)}."
                want = "a mask of this very pass; in generation a slice or list of positions"
                raise ValueError(explain(what, want=want))
            return mask
        if kv_cache_offset is None:
            what = "positions= at a point that fires before the model tells where in the text it is."
            raise ValueError(explain(what, want="positions=None, or a mask of the pass"))
        device = None if n_padding is None else n_padding.device
        position = torch.arange(kv_cache_offset, kv_cache_offset + shape[1], device=device)[None]
        position = position if n_padding is None else position - n_padding[:, None]
        if isinstance(self.positions, slice):
            start, step = self.positions.start or 0, self.positions.step or 1
            stop = kv_cache_offset + shape[1] if self.positions.stop is None else self.positions.stop
            return (position >= start) & (position < stop) & ((position - start) % step == 0)
        return torch.isin(position, torch.tensor(self.positions, dtype=torch.int64, device=device))


def _check_values(sae: nn.Module, latents: object) -> tuple[list[int], list[float]]:
    """Check latents and their values, and return them as lists."""
    if not isinstance(latents, Mapping) or not latents:
        what = f"steer got latents={latents!r}."
        want = "{latent: value}, with at least one"
        raise TypeError(explain(what, want=want, fix="saewb.steer(model, sae, {12: 8.0})"))
    indices = [index_of(latent, "latent", sae.cfg.d_sae, of=sae) for latent in latents]
    if len(set(indices)) < len(indices):
        raise ValueError(explain(f"steer got latents={list(latents)!r}.", want="each latent once"))
    values = [float(value) for value in latents.values()]
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise ValueError(explain(f"steer got the value {wrong[0]}.", want="finite numbers"))
    return indices, values
