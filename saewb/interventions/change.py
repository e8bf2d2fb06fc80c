"""A change of some latents of one SAE, at one place of one model: what happens there in a forward pass.

1. The read point gives x, the write point the activation that stands there (the same tensor for an SAE).
2. The latents named, and only those, are encoded from x: or taken from the SAE where it is attached.
3. The activation moves by `decode(latents + change) - decode(latents)` where the mask says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions import splice
from saewb.models import hook_points
from saewb.sae.activation_functions import denormalized
from saewb.sae.sae import SAE

How = Literal["add", "clamp", "scale"]


@dataclass(eq=False)
class Change:
    """What happens to the latents of one SAE."""

    sae: nn.Module
    read: hook_points.Point
    write: hook_points.Point
    place: str  # where it writes, as the user named it
    latents: list[int]
    values: list[float]
    how: How
    mask: Callable[[Tensor], Tensor | None]  # of an activation: `[batch or 1, pos, 1]`, True where latents change
    first_layer: int = 0  # at which the pass under way starts
    fired: bool = False
    x: Tensor | None = None  # what a transcoder read in this pass

    def install(self) -> list[hook_points.Hook]:
        """Put it on the model; the hooks to take off again."""
        apart = self._reads and self.read.module is not self.write.module
        added = [self.read.add(self._on_read)] if apart else []
        return [*added, self.write.add(self._on_write)]

    @property
    def _reads(self) -> bool:
        """Whether the change depends on what the SAE reads."""
        return self.how != "add" or getattr(self.sae.cfg, "normalization", "none") != "none"

    def begin(self, first_layer: int) -> None:
        """A pass is announced."""
        self.first_layer, self.fired, self.x = first_layer, False, None

    def check_continues(self, cached_tokens: int) -> None:
        """The pass goes on from so many cached tokens: can it?"""
        if cached_tokens and self.how != "add" and getattr(self.sae, "looks_back", False):
            what = f"{self.sae!r} looks at earlier tokens, and this pass has them in its cache only."
            raise ValueError(explain(what, fix="model.generate(..., use_past_kv_cache=False)"))

    def check_fired(self) -> None:
        """A whole pass is over: did it have its effect?"""
        if not self.fired and not self._is_early(self.write):
            what = f"{self.write.name!r} did not fire in a whole forward pass: steering had no effect."
            raise ValueError(explain(what, want="a point that this model computes"))

    def _is_early(self, point: hook_points.Point) -> bool:
        return point.layer is not None and point.layer < self.first_layer

    def _on_read(self, activation: Tensor) -> None:
        if not self._is_early(self.read):
            self.x = activation.clone()

    def _on_write(self, activation: Tensor) -> Tensor | None:
        if self._is_early(self.write):
            return None
        self.fired = True
        target = splice.flat(self.sae, activation, self.sae.cfg.d_out, self.write.name)
        source = activation if self.x is None else self.x
        if self._reads and self.x is None and self.read.module is not self.write.module:
            what = f"{self.read.name!r} did not fire before {self.write.name!r}: the transcoder has nothing to read."
            raise ValueError(explain(what, want="a read point that the model computes before the write point"))
        moved = self._moved(source, target.shape)
        mask = self.mask(activation)
        moved = moved if mask is None else torch.where(mask, moved, torch.zeros_like(moved))
        return splice.unflat(self.sae, (target + moved).to(activation.dtype), activation)

    def _moved(self, source: Tensor, shape: torch.Size) -> Tensor:
        """`decode(latents + change) - decode(latents)`, `[batch, pos, d_out]`."""
        values = torch.tensor(self.values, dtype=self.sae.dtype, device=self.sae.device)
        x = splice.flat(self.sae, source, self.sae.cfg.d_in, self.read.name) if self._reads else None
        if self.how == "add":
            change = values.expand(*shape[:-1], len(values))
        else:
            a = self._activations(x)
            change = values - a if self.how == "clamp" else (values - 1) * a
        return decoded_change(self.sae, change, self.latents, x)

    def _activations(self, x: Tensor) -> Tensor:
        attached = splice.top(self.write)
        if attached is not None and attached.sae is self.sae and attached.fired:
            return attached.latents()[..., self.latents]
        return self.sae.encode(x, latents=self.latents)

    def __str__(self) -> str:
        values = ", ".join(f"{i}: {v:g}" for i, v in zip(self.latents[:6], self.values[:6], strict=True))
        more = f" and {len(self.latents) - 6} more" if len(self.latents) > 6 else ""
        return f"{self.how} {values}{more} at {self.place}"


def decoded_change(
    sae: nn.Module, change: Float[Tensor, "*batch n"], latents: list[int], x: Float[Tensor, "*batch d_in"] | None
) -> Float[Tensor, "*batch d_out"]:
    """What the output moves by when these latents change: `decode(latents + change) - decode(latents)`.

    Args:
        sae: any of the SAE classes; all decode linearly.
        change: per latent of `latents`, in latent units.
        latents: which, each once.
        x: the input; only needed where the output is scaled by it (`cfg.normalization`).

    Returns:
        In the model's units.
    """
    if isinstance(sae, SAE):
        moved = change @ sae.W_dec[latents]
        if sae.cfg.normalization == "none":
            return moved
        x = x.to(sae.dtype)
        return denormalized(moved, x, sae.cfg.normalization) - denormalized(
            torch.zeros_like(moved), x, sae.cfg.normalization
        )
    dense = change.new_zeros(*change.shape[:-1], sae.cfg.d_sae)
    x = change.new_zeros(*change.shape[:-1], sae.cfg.d_in) if x is None else x
    return sae.decode(dense.index_add(-1, torch.tensor(latents, device=change.device), change), x) - sae.decode(
        dense, x
    )
