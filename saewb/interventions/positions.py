"""Which positions of a text an intervention means, also while it is being generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

import torch
from jaxtyping import Bool
from torch import Tensor

from saewb.errors import explain

Positions = Union[int, slice, Sequence[int], Tensor, None]


@dataclass(frozen=True, eq=False)
class Where:
    """Which positions of a text are meant."""

    positions: Positions

    def mask(self, shape: torch.Size, cached: int | None) -> Bool[Tensor, "_ pos"] | None:
        """`[batch or 1, pos]`, on the CPU; None for all of them."""
        if self.positions is None:
            return None
        if isinstance(self.positions, Tensor):
            return self._given(shape)
        if cached is None:
            what = "positions= at a point that fires before the model tells where in the text it is."
            raise ValueError(explain(what, want="positions=None, or a mask of the pass"))
        at = torch.arange(cached, cached + shape[1])
        if isinstance(self.positions, slice):
            start, stop, step = (self.positions.start or 0), self.positions.stop, self.positions.step or 1
            return ((at >= start) & (at < (stop if stop is not None else at[-1] + 1)) & ((at - start) % step == 0))[
                None
            ]
        return torch.isin(at, torch.tensor(self.positions))[None]

    def _given(self, shape: torch.Size) -> Tensor:
        mask = self.positions[None] if self.positions.ndim == 1 else self.positions
        if tuple(mask.shape) not in (tuple(shape), (1, shape[1])):
            what = f"positions has shape {tuple(self.positions.shape)}, the activation [batch, pos] = {tuple(shape)}."
            raise ValueError(explain(what, want="a mask of this very pass; in generation a slice or list of positions"))
        return mask


def where(positions: object) -> Where:
    """What a caller's `positions=` means.

    Raises:
        ValueError: for positions counted from the end.
    """
    if isinstance(positions, Tensor) and positions.dtype != torch.bool:
        positions = positions.flatten().tolist()
    if positions is None or isinstance(positions, Tensor):
        return Where(positions)
    if isinstance(positions, slice):
        ends = (positions.start, positions.stop, positions.step)
        if any(end is not None and end < (i == 2) for i, end in enumerate(ends)):
            raise ValueError(
                explain(f"got positions={positions!r}.", want="0 or more, counted from the start of the text")
            )
        return Where(positions)
    found = [positions] if isinstance(positions, int) else [int(i) for i in positions]
    if any(i < 0 for i in found):
        raise ValueError(_from_the_end(positions))
    return Where(found)


def _from_the_end(positions: object) -> str:
    what = f"got positions={positions!r}."
    return explain(what, want="0 or more, counted from the start of the text: generation moves its end")
