"""Steer a model by changing latents of an SAE, which need not be attached: add, clamp, scale, ablate.

At the SAE's write point the activation moves by the decoded change of latents, and by nothing else:

    activation  <-  activation + decode(latents + change) - decode(latents)  =  activation + sum_i change_i W_dec[i]

so the SAE's error stays in place, and a change of 0 is the model itself.

1. The read point gives x, the write point the activation (the same tensor for an SAE).
2. Only the latents to change are encoded from x, none at all to add; where the SAE is attached, its latents are taken.
3. The activation moves where the mask of token positions is True. Positions count from the start of each text: in
   generation with a KV cache a pass begins at the cache's offset, in a batch a text begins after its padding.
4. With `when=`, it moves only at tokens on which certain latents fire; they are encoded from the activation at their
   own read point, as it is before this steering.
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
from saewb.fingerprint import sae_digest, tensors_digest
from saewb.interventions.base import ActiveIntervention, check_kv_cache, mask_special_tokens
from saewb.interventions.site import Site, check_is_sae
from saewb.interventions.splice import active_splice
from saewb.models import forward, hook_points
from saewb.models.tokenizer import special_ids
from saewb.sae.sae import SAE

How = Literal["add", "clamp", "scale"]
Positions = Union[int, slice, Sequence[int], Sequence[bool], Tensor, None]
Value = Union[float, Sequence[Union[float, None]], Tensor]
"""Value of a latent: a number, or one for each row of the batch, None leaving a row as it is."""
When = Union[int, Sequence[int], Mapping[Any, Any], None]


def steer(
    model: nn.Module,
    sae: nn.Module | Mapping[nn.Module, Mapping[int, Value]],
    latents: Mapping[int, Value] | None = None,
    *,
    how: How = "add",
    positions: Positions = None,
    when: When = None,
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
            (the bundled SAE's strongest latents reach about 5 to 30). A value may be a list, one for each row of the
            batch, to run several strengths in one pass; None leaves a row as it is: `{12: [None, 4.0, 8.0]}`.
        how: meaning of the values, see above; the same for all of them.
        positions: where: None everywhere; a position, a slice or a list of positions, counted from the start of the
            text, generated tokens included, padding before it not; or a mask of booleans, `[pos]` or `[batch, pos]`, of
            the one pass it is meant for.
        when: steer only at tokens on which a latent fires (activation above 0): latents of the same SAE, `when=40`; or
            of others, `{other: 40}`, `{other: [40, 41]}`, or with thresholds `{other: {40: 2.5}}`. Of several latents
            one is enough. They are read in the same pass, so a new token is judged by its own activation, with a cache
            of keys and values or without; their read point must come before the write point, or be it.
        skip_special_tokens: leave these tokens alone: True for the tokenizer's BOS, EOS, PAD and the like, or ids.
        hook: read point, instead of `sae.cfg.hook`; for one SAE.
        hook_out: write point, instead of `sae.cfg.hook_out`; for one SAE.

    Returns:
        A Steering: `.detach()`, and a context manager.

    Raises:
        ValueError: for a latent the SAE does not have, a value that is not finite, an unknown or switched-off point,
            negative positions; in the forward pass for what does not fit, a point that is never reached, or one of
            `when` that is reached too late.
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
        >>> with saewb.steer(model, sae, {748: 8.0}, when={sae: {972: 1.5}}) as steering:
        ...     logits = model("The city is on a river")
        >>> steering
        Steering(detached: add 748: 8 at blocks.2.hook_resid_post when 972 > 1.5)
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
    conditions = _conditions(model, when, None if isinstance(sae, Mapping) else changes[0].site)
    where = TokenPositions.of(positions), special_ids(model, skip_special_tokens), conditions
    steering = Steering(model, changes, *where)
    steering._activate()
    return steering


def ablate(
    model: nn.Module,
    sae: nn.Module | Mapping[nn.Module, int | Sequence[int] | Tensor],
    latents: int | Sequence[int] | Tensor | None = None,
    *,
    positions: Positions = None,
    when: When = None,
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
        when: as for `steer`.
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
        when=when,
        skip_special_tokens=skip_special_tokens,
        hook=hook,
        hook_out=hook_out,
    )


class Steering(ActiveIntervention):
    """Changed latents on a model, until `detach` or the end of the `with` block: the result of `saewb.steer`."""

    steers = True
    _how_to_repeat = "with saewb.steer(model, sae, {12: 8.0}):"

    def __init__(
        self,
        model: nn.Module,
        changes: list[LatentChange],
        positions: TokenPositions,
        special: tuple[int, ...],
        conditions: list[Condition],
    ) -> None:
        super().__init__(model)
        self._changes, self._positions, self._special, self._conditions = changes, positions, special, conditions
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
            [sae_digest(c.sae), c.site.read.name, c.site.write.name, c.latents, c.values, c.how]
            + ([] if c.directions is None else [tensors_digest({"directions": c.directions})])
            for c in self._changes
        ]
        conditions = [[sae_digest(c.sae), c.site.read.name, c.latents, c.thresholds] for c in self._conditions]
        return [changes, self._positions.content(), list(self._special), *([conditions] if conditions else [])]

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        when = f" when {' or '.join(map(str, self._conditions))}" if self._conditions else ""
        return f"Steering({state}: {'; '.join(map(str, self._changes))}{when})"

    def _install(self) -> None:
        self._hooks += [hook_points.Hook(condition.site.read, condition.on_read) for condition in self._conditions]
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
        for part in (*self._conditions, *self._changes):
            part.before_forward(first_layer)

    def _at_first_block(self, kv_cache_offset: int, n_padding: Tensor | None) -> None:
        self._kv_cache_offset, self._n_padding = kv_cache_offset, n_padding
        for change in self._changes:
            if change.how != "add":
                check_kv_cache(change.sae, kv_cache_offset)
        for condition in self._conditions:
            check_kv_cache(condition.sae, kv_cache_offset)

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
        if self._conditions:
            fires = torch.stack([condition.fires(activation) for condition in self._conditions]).any(0)
            mask = fires if mask is None else mask & fires
        return None if mask is None else mask[..., None]


@dataclass(eq=False)
class Condition:
    """Latents of one SAE, one of which must fire on a token for the token to be steered."""

    site: Site
    latents: list[int]
    """Indices, each once."""
    thresholds: list[float]
    """One per latent: it fires if its activation is larger."""
    first_layer: int = 0
    """Block at which the current pass starts."""
    fired: Tensor | None = None
    """At which tokens of the current pass, `[batch, pos]`; None before the read point is reached."""

    @property
    def sae(self) -> nn.Module:
        """SAE of the latents."""
        return self.site.sae

    def before_forward(self, first_layer: int) -> None:
        """Forget the last pass."""
        self.first_layer, self.fired = first_layer, None

    def on_read(self, activation: Tensor) -> None:
        """Hook on the read point."""
        if self.site.read.is_before(self.first_layer):
            return
        acts = latents_at(self.site, self.site.read_input(activation), self.latents)
        self.fired = (acts > acts.new_tensor(self.thresholds)).any(-1)

    def fires(self, activation: Tensor) -> Bool[Tensor, "batch pos"]:
        """Mask of the tokens of an activation at a write point.

        Raises:
            ValueError: if the read point has not been reached in this pass.
        """
        if self.fired is None:
            what = f"when=: {self.site.read.name!r} did not fire before the point that is steered."
            raise ValueError(explain(what, want="a latent that the model computes before that point"))
        return self.fired.to(activation.device)

    def __str__(self) -> str:
        pairs = zip(self.latents[:6], self.thresholds[:6], strict=True)
        more = f" or {len(self.latents) - 6} more" if len(self.latents) > 6 else ""
        return " or ".join(f"{i} > {threshold:g}" for i, threshold in pairs) + more


def latents_at(site: Site, x: Float[Tensor, "batch pos d_in"], latents: list[int]) -> Float[Tensor, "batch pos n"]:
    """Activations of some latents on an input; where the same SAE is attached, those of the attachment."""
    splice = active_splice(site.write)
    if splice is not None and splice.sae is site.sae and splice.fired:
        return splice.latents()[..., latents]
    return site.sae.encode(x, latents=latents)


@dataclass(eq=False)
class LatentChange:
    """Hooks that move the activation at one SAE's write point by a change of some of its latents."""

    site: Site
    latents: list[int]
    """Indices of the latents to change; each once, but with `directions` as often as there are of them."""
    values: list[float | list[float | None]]
    """One per latent; `how` says what they mean. A list has one for each row of the batch, None where it stays."""
    how: How
    directions: Float[Tensor, "n d_out"] | None = None
    """Written in place of the latents' decoder directions, one each; None for those."""
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
        values = self._values(shape[0])
        x = self.site.read_input(activation) if self.needs_input else None
        if self.how == "add":
            change = values.expand(*shape[:-1], len(self.latents))
        else:
            acts = latents_at(self.site, x, self.latents)
            change = values - acts if self.how == "clamp" else (values - 1) * acts
        change = torch.where(values.isnan(), torch.zeros_like(change), change)
        if self.directions is None:
            return decode_change(self.sae, change, self.latents, x)
        return _along(self.sae, change, self.directions, x)

    def _values(self, n_rows: int) -> Float[Tensor, "_ 1 n"]:
        """Values by row of the batch, or of all rows; nan where a row stays as it is.

        Raises:
            ValueError: if the batch has another number of rows.
        """
        columns = [[math.nan if v is None else v for v in (x if isinstance(x, list) else [x])] for x in self.values]
        n = max(map(len, columns))
        if n not in (1, n_rows):
            what = f"values for {n} rows, the batch has {n_rows}."
            raise ValueError(explain(what, want="one value for each row of the batch, or one number for all"))
        rows = [column * (n // len(column)) for column in columns]
        return torch.tensor(rows, dtype=self.sae.dtype, device=self.sae.device).T[:, None]

    def __str__(self) -> str:
        values = ", ".join(f"{i}: {_text(v)}" for i, v in zip(self.latents[:6], self.values[:6], strict=True))
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
        return _along(sae, change, sae.W_dec[latents], x)
    dense = change.new_zeros(*change.shape[:-1], sae.cfg.d_sae)
    x = change.new_zeros(*change.shape[:-1], sae.cfg.d_in) if x is None else x
    changed = dense.index_add(-1, torch.tensor(latents, device=change.device), change)
    return sae.decode(changed, x) - sae.decode(dense, x)


def _along(sae: Any, change: Tensor, directions: Tensor, x: Tensor | None) -> Tensor:
    """Shift of the output along directions in the SAE's units."""
    with torch.autocast(sae.device.type, enabled=False):
        shift = change @ directions
    if sae.cfg.normalization == "none":
        return shift
    return sae.denormalize(shift, x) - sae.denormalize(torch.zeros_like(shift), x)


def steer_rows(
    model: nn.Module,
    change: LatentChange,
    *,
    positions: Positions = None,
    skip_special_tokens: bool | Sequence[int] = False,
    when: When = None,
) -> Steering:
    """Steer the rows of a batch along directions of their own: `steer`, for controls that replace a latent's direction.

    Args:
        model: as for `steer`.
        change: not used before; its `directions` are written where its latents would be.
        positions: as for `steer`.
        skip_special_tokens: as for `steer`.
        when: as for `steer`.
    """
    conditions = _conditions(model, when, change.site)
    where = TokenPositions.of(positions), special_ids(model, skip_special_tokens), conditions
    steering = Steering(model, [change], *where)
    steering._activate()
    return steering


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


def _text(value: float | list[float | None]) -> str:
    if not isinstance(value, list):
        return f"{value:g}"
    shown = ", ".join("-" if v is None else f"{v:g}" for v in value[:4])
    return f"[{shown}{', ...' if len(value) > 4 else ''}]"


def _check_values(sae: nn.Module, latents: object) -> tuple[list[int], list[float | list[float | None]]]:
    """Check latents and their values, and return them as lists."""
    if not isinstance(latents, Mapping) or not latents:
        what = f"steer got latents={latents!r}."
        want = "{latent: value}, with at least one"
        raise TypeError(explain(what, want=want, fix="saewb.steer(model, sae, {12: 8.0})"))
    indices = [index_of(latent, "latent", sae.cfg.d_sae, of=sae) for latent in latents]
    if len(set(indices)) < len(indices):
        raise ValueError(explain(f"steer got latents={list(latents)!r}.", want="each latent once"))
    values = [_check_value(value) for value in latents.values()]
    if len(counts := {len(value) for value in values if isinstance(value, list)}) > 1:
        raise ValueError(explain(f"steer got values for {sorted(counts)} rows.", want="as many for each latent"))
    return indices, values


def _check_value(value: Any) -> float | list[float | None]:
    is_list = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1
    rows = [None if v is None else float(v) for v in value] if is_list else [float(value)]
    if wrong := [v for v in rows if v is not None and not math.isfinite(v)]:
        raise ValueError(explain(f"steer got the value {wrong[0]}.", want="finite numbers"))
    if not rows:
        raise ValueError(explain("steer got no value.", want="a number, or one for each row of the batch"))
    return rows if is_list else rows[0]


def _conditions(model: nn.Module, when: Any, site: Site | None) -> list[Condition]:
    """Resolve the `when` argument of a caller, whose one SAE is at `site`.

    Raises:
        ValueError: for latents without an SAE, none, one that does not exist, or a threshold that is not finite.
    """
    if when is None:
        return []
    if not isinstance(when, Mapping):
        if site is None:
            what, fix = f"steer got several SAEs and when={when!r}.", "when={sae: 40}"
            raise ValueError(explain(what, want="the SAE of that latent too", fix=fix))
        when = {site.sae: when}
    conditions = []
    for sae, latents in when.items():
        at = site if site is not None and sae is site.sae else Site.of(model, sae, writable=False)
        thresholds = dict(latents) if isinstance(latents, Mapping) else None
        values = list(thresholds) if thresholds is not None else latents
        indices = indices_of(values, "when", sae.cfg.d_sae, of=sae).tolist()
        above = [0.0] * len(indices) if thresholds is None else [float(v) for v in thresholds.values()]
        if not indices or not all(map(math.isfinite, above)):
            what, fix = f"steer got when={latents!r}.", "when={sae: {40: 2.5}}"
            raise ValueError(explain(what, want="at least one latent, and finite thresholds", fix=fix))
        conditions.append(Condition(at, indices, above))
    return conditions
