"""Change a model by an SAE's latents, without putting the SAE into it: steer, clamp, scale, ablate.

At the point the SAE writes to, the activation moves by what the change of latents is worth, and by nothing else:

    activation  <-  activation + decode(latents + change) - decode(latents)  =  activation + sum_i change_i W_dec[i]

so what the SAE gets wrong stays as it is, and a change of 0 is the model itself. Only the latents named are encoded
(none at all to add), in generation too, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions.base import OnModel
from saewb.interventions.change import Change, How
from saewb.interventions.positions import Positions, Where, where
from saewb.interventions.site import places, points
from saewb.models import forward, hook_points
from saewb.models.tokenizer import special_ids, special_mask


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
    """Run the model with some latents changed, until `detach`: by their decoder rows, in the units of activations.

        add:    latent i  <-  a_i + value          (v W_dec[i] is added, wherever the latent is on or off)
        clamp:  latent i  <-  value                (0 ablates it)
        scale:  latent i  <-  value * a_i          (acts where the latent is active)

    Works like `open`, as `saewb.attach` does: at once, and until the `with` block ends or `detach()` is called; in
    `run_with_cache`, `run_with_hooks`, and in `generate`, with a cache of keys and values or without. `a_i` is what the
    SAE makes of the activation it reads; where the same SAE is attached at that point (attached before), it is the
    latent of the attachment, after hooks on it. Hooks run in the order they were added: two steerings at one point
    follow one another, the second seeing what the first has made.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        sae: whose latents; or several SAEs with what to do with each, `{sae: {latent: value}}`.
        latents: `{latent: value}`. The unit is that of the latent: with unit decoder rows, a length in the model's
            units (the embedded SAE's strongest latents reach about 5 to 30).
        how: what a value means, see above; one for all of them.
        positions: where: None everywhere; a position, a slice or a list of positions, counted from the start of the
            text, generated tokens included; or a mask, `[pos]` or `[batch, pos]`, of the one pass it is meant for.
        skip_special_tokens: leave these tokens alone: True for the tokenizer's BOS, EOS, PAD and the like, or ids.
        hook: where the SAE reads, instead of `sae.cfg.hook`; for one SAE.
        hook_out: where it writes, instead of `sae.cfg.hook_out`; for one SAE.

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
    wanted = dict(sae) if isinstance(sae, Mapping) else {sae: latents}
    if isinstance(sae, Mapping) and (latents is not None or hook is not None or hook_out is not None):
        what = "steer got several SAEs together with latents=, hook= or hook_out=."
        raise ValueError(explain(what, fix="saewb.steer(model, {sae_a: {12: 4.0}, sae_b: {7: -2.0}})"))
    if how not in get_args(How):
        raise ValueError(explain(f"steer got how={how!r}.", want="one of " + ", ".join(map(repr, get_args(How)))))
    steering = Steering(model, where(positions), special_ids(model, skip_special_tokens))
    steering._changes = [_change(model, *one, how, hook, hook_out, steering._mask) for one in wanted.items()]
    steering._install()
    return steering


def ablate(
    model: nn.Module,
    sae: nn.Module | Mapping[nn.Module, Sequence[int]],
    latents: int | Sequence[int] | None = None,
    *,
    positions: Positions = None,
    skip_special_tokens: bool | Sequence[int] = False,
    hook: str | None = None,
    hook_out: str | None = None,
) -> Steering:
    """Run the model without these latents, until `detach`: each a_i W_dec[i] is taken away, all else stays.

    `saewb.steer(..., how="clamp")` with values of 0; everything said there holds.

    Args:
        model: as for `steer`.
        sae: whose latents; or several SAEs with the latents of each, `{sae: [latents]}`.
        latents: their indices, one or several.
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
    several = sae if isinstance(sae, Mapping) else {sae: latents}
    zeros = {one: dict.fromkeys(_listed(chosen), 0.0) for one, chosen in several.items()}
    if not isinstance(sae, Mapping):
        return steer(
            model,
            sae,
            zeros[sae],
            how="clamp",
            positions=positions,
            skip_special_tokens=skip_special_tokens,
            hook=hook,
            hook_out=hook_out,
        )
    return steer(model, zeros, how="clamp", positions=positions, skip_special_tokens=skip_special_tokens)


class Steering(OnModel):
    """Changed latents on a model, until `detach` or the end of the `with` block. Made by `saewb.steer`."""

    _again = "with saewb.steer(model, sae, {12: 8.0}):"

    def __init__(self, model: nn.Module, positions: Where, special: tuple[int, ...]) -> None:
        super().__init__(model)
        self._positions, self._special = positions, special
        self._changes: list[Change] = []
        self._hooks: list[hook_points.Hook] = []
        self._tokens: Tensor | None = None
        self._cached: int | None = None  # tokens of the text before this pass; None before that is known

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        return f"Steering({state}: {'; '.join(map(str, self._changes))})"

    def _put_on(self) -> None:
        for change in self._changes:
            self._hooks += change.install()

    def _take_off(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _announce(self, tokens: Tensor | None) -> None:
        self._tokens, self._cached = tokens, None
        first = forward.first_layer(self._model())
        for hook in self._hooks:
            if not hook.is_on:  # someone called reset_hooks(including_permanent=True)
                hook.restore()
        for change in self._changes:
            change.begin(first)

    def _begin(self, cached_tokens: int) -> None:
        self._cached = cached_tokens
        for change in self._changes:
            change.check_continues(cached_tokens)

    def _end(self) -> None:
        for change in self._changes:
            change.check_fired()

    def _mask(self, activation: Tensor) -> Tensor | None:
        """`[batch or 1, pos, 1]`, True where latents change; None everywhere."""
        shape, device = activation.shape[:2], activation.device
        mask = self._positions.mask(shape, self._cached)
        mask = None if mask is None else mask.to(device)
        if self._special:
            if self._tokens is None or self._tokens.shape != shape:
                seen = "no token ids" if self._tokens is None else f"token ids of shape {tuple(self._tokens.shape)}"
                what = f"skip_special_tokens: the model got {seen}, the activation has shape {tuple(activation.shape)}."
                raise ValueError(explain(what, want="one token id for each position", fix="skip_special_tokens=False"))
            plain = ~special_mask(self._tokens.to(device), self._special)
            mask = plain if mask is None else mask & plain
        return None if mask is None else mask[..., None]


def _change(
    model: nn.Module,
    sae: nn.Module,
    latents: object,
    how: How,
    hook: str | None,
    hook_out: str | None,
    mask: Callable[[Tensor], Tensor | None],
) -> Change:
    if not (isinstance(sae, nn.Module) and hasattr(sae, "encode") and hasattr(sae, "cfg")):
        raise TypeError(explain(f"steer got {type(sae).__name__} as an SAE.", fix="sae = saewb.load_sae(...)"))
    source, target = places(sae, hook, hook_out)
    if not isinstance(latents, Mapping) or not latents:
        what = f"steer got latents={latents!r}."
        raise TypeError(
            explain(what, want="{latent: value}, with at least one", fix="saewb.steer(model, sae, {12: 8.0})")
        )
    numbers = [_latent(sae, i) for i in latents]
    values = [float(value) for value in latents.values()]
    if wrong := [v for v in values if v != v or abs(v) == float("inf")]:
        raise ValueError(explain(f"steer got the value {wrong[0]}.", want="finite numbers"))
    return Change(sae, *points(model, source, target), target, numbers, values, how, mask)


def _listed(latents: object) -> list[int]:
    if isinstance(latents, int):
        return [latents]
    if latents is None or isinstance(latents, (str, bytes)) or len(latents) == 0:
        what = f"ablate got latents={latents!r}."
        raise TypeError(explain(what, want="a latent, or a list of them", fix="saewb.ablate(model, sae, [12, 40])"))
    return [int(i) for i in latents]


def _latent(sae: nn.Module, i: object) -> int:
    if isinstance(i, bool) or int(i) != i or not 0 <= int(i) < sae.cfg.d_sae:
        raise ValueError(explain(f"{sae!r} has no latent {i!r}.", want=f"0 to {sae.cfg.d_sae - 1}"))
    return int(i)
