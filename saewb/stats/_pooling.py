"""Blocks of a matrix as one number each: the strongest entry, with its sign, or the mean.

Entries that are not defined count for nothing; a block that has no other is nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.stats._entries import Entries, diagonal

TILE = 2**22  # entries made at a time, unless one row of blocks has more


def strongest(tile: Float[Tensor, "rows cols"], step: int) -> Float[Tensor, "blocks_r blocks_c"]:
    """Of each block of `step * step` the entry with the largest magnitude.

    Example:
        >>> strongest(torch.tensor([[0.1, -0.5, 0.2], [0.3, 0.0, torch.nan]]), 2)
        tensor([[-0.5000,  0.2000]])
    """
    found = _strongest(tile, step)
    bad = found.isnan().any(0).nonzero()[:, 0]
    if len(bad):  # once more, for the columns concerned
        first, last = int(bad[0]), int(bad[-1]) + 1
        part = tile[:, first * step : last * step]
        missing = -_reduced(-part.isnan().float(), step, torch.amax, pad=-1.0)  # 1: all are
        found[:, first:last] = torch.where(missing > 0, torch.nan, _strongest(part.nan_to_num(0), step))
    return found


def _strongest(tile: Tensor, step: int) -> Tensor:
    high, low = (_reduced(tile, step, f) for f in (torch.amax, torch.amin))
    return torch.where(high >= -low, high, low)


def _reduced(tile: Tensor, step: int, reduce: Callable[[Tensor, int], Tensor], pad: float = 0.0) -> Tensor:
    rows, cols = tile.shape
    if rows % step or cols % step:
        tile = torch.nn.functional.pad(tile, (0, -cols % step, 0, -rows % step), value=pad)
    by_row = reduce(tile.unflatten(0, (-1, step)), 1)
    return reduce(by_row.unflatten(1, (-1, step)), 2)


def sums(tile: Float[Tensor, "rows cols"], step: int) -> tuple[Tensor, Tensor]:
    """Of each block, the sum of what is defined, and how many that is."""
    known = (~tile.isnan()).float()
    return _reduced(tile.nan_to_num(0), step, torch.sum), _reduced(known, step, torch.sum)


def bands(
    entries: Entries, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int, *, half: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """The matrix a band of whole blocks at a time: first row, first column, entries, those of the diagonal as nan.

    Args:
        entries: of the matrix.
        rows: features, in the order wanted.
        cols: likewise.
        step: of a block.
        half: rows and columns are the same: leave out columns before the band, which are there already, turned round.
    """
    high = step * max(1, TILE // (step * max(1, len(cols))))
    for first in range(0, len(rows), high):
        some, left = rows[first : first + high], first if half else 0
        tile = entries.tile(some, cols[left:])
        if entries.same:
            at, to = diagonal(some, cols[left:], entries.shape[1])
            tile[at, to] = torch.nan
        yield first, left, tile
