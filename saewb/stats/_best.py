"""The strongest entries of a matrix that is looked through a band at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Best:
    """The k entries of largest magnitude so far; of a symmetric matrix each pair once."""

    def __init__(self, k: int, half: bool) -> None:
        self._k, self._half = k, half
        self.value = torch.zeros(0)
        self.row, self.col = (torch.zeros(0, dtype=torch.long) for _ in range(2))  # places in the order

    def add(
        self, tile: Float[Tensor, "rows cols"], blocks: Float[Tensor, "blocks_r blocks_c"], first: int, left: int
    ) -> None:
        """Those of a band that begins at row `first` and column `left`, with the strongest entry of each of its blocks.

        Only blocks whose strongest entry is strong enough are looked into: k of them, or as many on each side of the
        diagonal, have all k entries.
        """
        step = -(-len(tile) // len(blocks))
        size = blocks.abs().nan_to_num(-1).flatten()
        least = float(self.value[-1].abs()) if len(self.value) == self._k else 1e-12
        size, place = size.topk(min(self._k * (2 if self._half else 1), len(size)))
        place = place[size >= least]
        if len(place) == 0:
            return
        value, row, col = _looked_into(tile, place // blocks.shape[1], place % blocks.shape[1], step)
        row, col = row + first, col + left
        kept = (value.abs() >= least) & ((row < col) if self._half else True)
        self.value = torch.cat([self.value, value[kept]])
        self.row, self.col = torch.cat([self.row, row[kept]]), torch.cat([self.col, col[kept]])
        order = self.value.abs().argsort(descending=True, stable=True)[: self._k]
        self.value, self.row, self.col = self.value[order], self.row[order], self.col[order]


def _looked_into(
    tile: Tensor, i: Int[Tensor, " some"], j: Int[Tensor, " some"], step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of some blocks, with their rows and columns; nan where a block goes over the edge."""
    within = torch.arange(step, device=i.device)
    row = (i[:, None] * step + within)[:, :, None].expand(-1, -1, step).flatten()
    col = (j[:, None] * step + within)[:, None, :].expand(-1, step, -1).flatten()
    inside = (row < tile.shape[0]) & (col < tile.shape[1])
    row, col = row[inside], col[inside]
    return tile[row.to(tile.device), col.to(tile.device)].cpu(), row, col
