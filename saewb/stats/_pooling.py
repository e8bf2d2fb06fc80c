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
    found = _strongest(_reduced(tile, step, torch.amax), _reduced(tile, step, torch.amin))
    row, col = found.isnan().nonzero(as_tuple=True)
    if len(row):  # once more, for the blocks concerned: those of the diagonal, of features without entries
        blocks = _whole(tile, step, torch.nan).unflatten(1, (-1, step)).unflatten(0, (-1, step))[row, :, col].flatten(1)
        filled = blocks.nan_to_num(0)
        value = _strongest(filled.amax(1), filled.amin(1))
        found[row, col] = torch.where(blocks.isnan().all(1), torch.nan, value)
    return found


def _strongest(high: Tensor, low: Tensor) -> Tensor:
    return torch.where(high >= -low, high, low)


def _reduced(tile: Tensor, step: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    by_row = reduce(_whole(tile, step, 0.0).unflatten(0, (-1, step)), 1)
    return reduce(by_row.unflatten(1, (-1, step)), 2)


def _whole(tile: Tensor, step: int, pad: float) -> Tensor:
    """Widened to whole blocks."""
    rows, cols = tile.shape
    if not (rows % step or cols % step):
        return tile
    return torch.nn.functional.pad(tile, (0, -cols % step, 0, -rows % step), value=pad)


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
