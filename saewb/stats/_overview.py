"""Pooled views of a large matrix: any window as cells without delay, and a scan of all entries.

1. A small window is exact: its entries are computed.
2. A larger one is pooled into cells of 2, 4, 8, ... entries per side: by their strongest entry, if they are few enough
   to compute or have been scanned; else by their mean, which dot products of sums give without computing an entry.
3. `scan` computes every entry once, a band at a time, and keeps the strongest entry of each cell, the strongest pairs
   and the sums behind the statistics. It may stop between bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.metrics import float64
from saewb.stats._entries import Entries, Factors, FactorSums, diagonal, ratio
from saewb.stats.correlation import CorrelationStats

Window = tuple[int, int, int, int]
"""row0, row1, col0, col1: positions in the order."""
Cells = Literal["strongest", "mean"]

BAND_ENTRIES = 2**22  # entries computed at a time, unless one row of cells has more
INTERACTIVE_COST = 2.0**29  # that `view` spends: about 100 ms on one free core
MAX_CELLS = 4096  # per side, that a scan keeps: 67 MB, and a third more for coarser ones


@dataclass(frozen=True, eq=False)
class View:
    """A window of a matrix, pooled into cells."""

    values: Float[Tensor, "cells_r cells_c"]
    """Values of the cells, on the CPU; nan where nothing in the cell is defined."""
    window: Window
    """Positions in the order that the cells cover."""
    step: int
    """Entries per side of a cell, a power of 2; 1 if the values are entries."""
    cells: str
    """"exact", "strongest" or "mean"."""
    is_final: bool
    """False if `Overview.refined` or the scan gives finer cells, or the kind of cells that was requested."""

    @cached_property
    def scale(self) -> float:
        """Magnitude that 0.5 % of the cells exceed, in two digits: for colors."""
        size = self.values.abs().flatten().nan_to_num(-1)
        n = len(size) - int((size < 0).sum())
        # The k-th largest: sorting all, as a quantile does, takes longer than pooling the cells.
        return max(1e-6, float(f"{size.topk(max(1, n // 200)).values[-1].item():.2g}")) if n else 1.0

    def levels(self, scale: float) -> bytes:
        """One byte per cell, row by row: 0 undefined, else 1..255 for -scale..scale, 128 for 0."""
        level = (self.values / scale).clamp(-1, 1).mul(127).round().add(128)
        return level.nan_to_num(0).to(torch.uint8).numpy().tobytes()

    def differs(self, other: View) -> float:
        """Root mean square difference from a view of the same cells, where both are defined; nan if nowhere."""
        difference = (self.values - other.values).double()
        return difference[~difference.isnan()].square().mean().sqrt().item()


@dataclass(frozen=True)
class Pair:
    """Two features and their entry."""

    row: int
    """Feature of the row."""
    col: int
    """Feature of the column."""
    value: float
    """Entry, -1..1."""


@final
class Overview:
    """A matrix with its rows and columns in an order, as pooled cells. Created by `MatrixView.overview`.

    Memory, whatever the size: 90 MB for cells, 50 MB for a band (or that of one row of cells), and for sums of the
    factors a 16th of them at 65,536 features; the means of a dense, counted or sparse matrix take 180 MB more.
    """

    def __init__(self, entries: Entries, rows: Int[Tensor, " n"], cols: Int[Tensor, " m"], n_pairs: int = 100) -> None:
        self._entries = entries
        self.rows, self.cols = rows, cols
        self._rows, self._cols = rows.to(entries.device), cols.to(entries.device)
        self.step = _power_of_2(max(len(rows), len(cols)), MAX_CELLS)
        """Entries per side of the cells that the scan keeps."""
        self.done_frac = 0.0
        """Fraction of the entries that has been scanned."""
        self.pairs: list[Pair] = []
        """Strongest pairs off the diagonal, each once, of the entries scanned so far."""
        self._n_pairs = n_pairs
        self._cells: Tensor | None = None  # strongest entries of the cells scanned so far
        self._levels: dict[tuple[str, int], Tensor] = {}  # after the scan, by kind of cells and step
        self._sums = torch.zeros(3, dtype=torch.float64)  # of squares, of entries; number of entries

    @property
    def stats(self) -> CorrelationStats | None:
        """Statistics of all defined entries off the diagonal; None before the scan has ended."""
        square, total, n = self._sums.tolist()
        if self.done_frac < 1 or n == 0:
            return None
        return CorrelationStats(math.sqrt(square / n), total / n, len(self.rows))

    @torch.no_grad()
    def view(self, window: Window, pixels: int, cells: Cells = "strongest") -> View:
        """Pool a window into at most `pixels` cells per side (and one at the edge), without delay.

        Where that many cells would take long, the view has coarser ones and is not final.

        Args:
            window: positions in the order, first and end.
            pixels: cells per side, at most.
            cells: what a cell of several entries shows.
        """
        window, step = self._align(window, pixels)
        if step > 1 and (level := self._level(window, step, cells)) is not None:
            return level
        if step == 1 or self._entries.block_cost(*self._features(window)) <= INTERACTIVE_COST:
            return self._pool(window, step, cells)
        if cells == "strongest" and (level := self._level(window, self.step, cells)) is not None:
            return replace(level, is_final=False)
        return self._pool_means(window, step, cells)

    @torch.no_grad()
    def refined(self, window: Window, pixels: int, cells: Cells = "strongest") -> View:
        """Pool a window from all of its entries, however long that takes."""
        window, step = self._align(window, pixels)
        return (self._level(window, step, cells) if step > 1 else None) or self._pool(window, step, cells)

    @torch.no_grad()
    def scan(self) -> Iterator[float]:
        """Compute all entries, each once; yields the fraction done, after each band.

        Half of a symmetric matrix is enough. A scan that was abandoned starts anew.
        """
        entries, half = self._entries, self._entries.same
        if self.done_frac == 1:
            return
        shape = -(-len(self.rows) // self.step), -(-len(self.cols) // self.step)
        self._cells = torch.full(shape, torch.nan)
        means = () if isinstance(entries, Factors) else (torch.zeros(shape), torch.zeros(shape))  # sums and counts
        self._sums.zero_()
        self._top = (torch.zeros(0), *torch.zeros(2, 0, dtype=torch.long))
        n_done, total = 0.0, len(self.rows) * len(self.cols) / (2 if half else 1)
        for row0, col0, band in _bands(entries, self._rows, self._cols, self.step, half=half):
            pooled = pool_strongest(band, self.step)
            self._add_pairs(band, pooled, row0, col0)
            self._store(self._cells, pooled, row0, col0)
            for table, sums in zip(means, _pool_sums(band, self.step) if means else (), strict=True):
                self._store(table, sums, row0, col0)
            self._add_sums(band, len(band) if half else 0)
            n_done += band.numel() - (len(band) ** 2 / 2 if half else 0)
            self.done_frac = min(0.999, n_done / total)
            yield self.done_frac
        self._set_levels(*means)
        self.done_frac = 1.0
        yield 1.0

    # -- windows -----------------------------------------------------------------------------------------------------

    def _align(self, window: Window, pixels: int) -> tuple[Window, int]:
        """Widen to whole cells, so that a cell has the same entries in every window; and the step."""
        r0, r1, c0, c1 = window
        step = _power_of_2(max(r1 - r0, c1 - c0), pixels)
        return self._widen(window, step), step

    def _widen(self, window: Window, step: int) -> Window:
        r0, r1, c0, c1 = window
        ends = (min(-(-r1 // step) * step, len(self.rows)), min(-(-c1 // step) * step, len(self.cols)))
        return r0 // step * step, ends[0], c0 // step * step, ends[1]

    def _features(self, window: Window) -> tuple[Tensor, Tensor]:
        return self._rows[window[0] : window[1]], self._cols[window[2] : window[3]]

    def _pool(self, window: Window, step: int, cells: str) -> View:
        if step > 1 and cells == "mean" and self._entries.n_terms is not None:
            values = self._means(window, step).cpu()
        else:
            values = pool(self._entries, *self._features(window), step, cells)
        return View(values, window, step, "exact" if step == 1 else cells, True)

    def _level(self, window: Window, step: int, cells: str) -> View | None:
        """Cells kept by the scan, if there are any of this kind and step."""
        if (level := self._levels.get((cells, step))) is None:
            return None
        window = self._widen(window, step)
        return View(level[_cell_slices(window, step)].clone(), window, step, cells, True)

    def _pool_means(self, window: Window, step: int, cells: Cells) -> View:
        """Means of cells, of coarser ones where finer ones would take long; scanned cells if there are no means."""
        entries, fine, (n_r, n_c) = self._entries, step, (window[1] - window[0], window[3] - window[2])
        span = max(n_r, n_c)
        if entries.n_terms is not None:
            while step < span and entries.n_terms * (-(-n_r // step)) * (-(-n_c // step)) > INTERACTIVE_COST:
                step *= 2
            if step < span:
                window = self._widen(window, step)
                return View(self._means(window, step).cpu(), window, step, "mean", cells == "mean" and step == fine)
        step = max(fine, self.step)
        window = self._widen(window, step)
        if self._cells is None:
            values = torch.full([part.stop - part.start for part in _cell_slices(window, step)], torch.nan)
        else:
            values = pool_strongest(self._cells[_cell_slices(window, self.step)], step // self.step)
        return View(values, window, step, "strongest", False)

    def _means(self, window: Window, step: int) -> Tensor:
        if step < self.step or not isinstance(self._entries, Factors):
            return self._entries.means(*self._features(window), step)
        return self._factor_sums.means(*_cell_slices(window, self.step), step // self.step)

    @cached_property
    def _factor_sums(self) -> FactorSums:
        """Sums over the cells of the scan."""
        return self._entries.cell_sums(self._rows, self._cols, self.step)

    # -- the scan ----------------------------------------------------------------------------------------------------

    def _store(self, table: Tensor, cells: Tensor, row0: int, col0: int) -> None:
        """Write the cells of a band to a table, and mirrored for a symmetric matrix."""
        rows, cols = slice(row0 // self.step, row0 // self.step + len(cells)), slice(col0 // self.step, None)
        table[rows, cols] = cells.cpu()
        if self._entries.same:
            table[cols, rows] = cells.cpu().T

    def _add_pairs(self, band: Tensor, strongest: Tensor, row0: int, col0: int) -> None:
        """Merge the strongest entries of a band into `pairs`; `strongest` has the strongest entry of its cells."""
        half, step, size = self._entries.same, self.step, strongest.abs().nan_to_num(-1)
        # The k strongest cells (of a pair on both sides of the diagonal, 2k) have k entries as strong as the weakest.
        k, least = self._n_pairs * (2 if half else 1), size.new_tensor(1e-12)
        if k < size.numel():
            least = torch.maximum(least, size.flatten().topk(k).values[-1])
        if len(self._top[0]) == self._n_pairs:
            least = torch.maximum(least, self._top[0][-1].abs().to(least.device))
        i, j = (size >= least).nonzero(as_tuple=True)
        cells = _cells_at(band, step, i, j)
        cell, row, col = (cells.abs() >= least).nonzero(as_tuple=True)
        value, row, col = cells[cell, row, col], row + i[cell] * step + row0, col + j[cell] * step + col0
        mask = row < col if half else slice(None)
        top = [torch.cat([x, y[mask].cpu()]) for x, y in zip(self._top, (value, row, col), strict=True)]
        order = top[0].abs().argsort(descending=True, stable=True)[: self._n_pairs]
        value, row, col = self._top = tuple(x[order] for x in top)
        pairs = zip(self.rows[row].tolist(), self.cols[col].tolist(), value.tolist(), strict=True)
        self.pairs = [Pair(*pair) for pair in pairs]

    def _add_sums(self, band: Tensor, n_square: int) -> None:
        """Add a band to the sums; its first `n_square` columns hold each pair of a symmetric matrix twice."""
        for part, weight in ((band[:, :n_square], 1), (band[:, n_square:], 2 if self._entries.same else 1)):
            n, norm, total = float(part.numel()), torch.linalg.vector_norm(part, dim=1), part.sum(1)
            if bool(total.isnan().any()):
                n, part = n - float(part.isnan().sum()), part.nan_to_num(0)
                norm, total = torch.linalg.vector_norm(part, dim=1), part.sum(1)
            sums = float64(norm).square().sum().item(), float64(total).sum().item(), n
            self._sums += weight * torch.tensor(sums, dtype=torch.float64)

    def _set_levels(self, total: Tensor | None = None, n: Tensor | None = None) -> None:
        """Keep the scanned cells, and coarser levels down to 64 cells per side."""
        step, strongest = self.step, self._cells
        while True:
            self._levels["strongest", step] = strongest
            if total is not None:
                self._levels["mean", step] = ratio(total, n)
            if max(strongest.shape) <= 64:
                return
            step, strongest = 2 * step, pool_strongest(strongest, 2)
            if total is not None:
                total, n = (_pool_sums(x, 2)[0] for x in (total, n))


# -- pooling -----------------------------------------------------------------------------------------------------------


def pool(
    entries: Entries, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int, cells: str
) -> Float[Tensor, "cells_r cells_c"]:
    """Pool a block into cells, as `MatrixView.pooled` documents."""
    if step == 1:
        return entries.block(rows, cols).cpu()
    if cells == "mean" and (means := entries.means(rows, cols, step)) is not None:
        return means.cpu()
    bands = (band for _, _, band in _bands(entries, rows, cols, step))
    return torch.cat(
        [pool_strongest(x, step) if cells == "strongest" else ratio(*_pool_sums(x, step)) for x in bands]
    ).cpu()


def pool_strongest(x: Float[Tensor, "rows cols"], step: int) -> Float[Tensor, "cells_r cells_c"]:
    """The entry of largest magnitude in each cell of `step * step`; nan only where nothing is defined.

    Example:
        >>> pool_strongest(torch.tensor([[0.1, -0.5, 0.2], [0.3, 0.0, torch.nan]]), 2)
        tensor([[-0.5000,  0.2000]])
    """
    if step == 1:
        return x.clone()
    pooled = _strongest(_reduce(x, step, torch.amax), _reduce(x, step, torch.amin))
    row, col = pooled.isnan().nonzero(as_tuple=True)
    if len(row):  # again for the cells with undefined entries: few, mostly on the diagonal
        cells = _cells_at(x, step, row, col).flatten(1)
        filled = cells.nan_to_num(0)
        value = _strongest(filled.amax(1), filled.amin(1))
        pooled[row, col] = torch.where(cells.isnan().all(1), torch.nan, value)
    return pooled


def _strongest(high: Tensor, low: Tensor) -> Tensor:
    return torch.where(high >= -low, high, low)


def _pool_sums(x: Float[Tensor, "rows cols"], step: int) -> tuple[Tensor, Tensor]:
    """Per cell the sum of the defined entries, and their number."""
    return _reduce(x.nan_to_num(0), step, torch.sum), _reduce((~x.isnan()).float(), step, torch.sum)


def _reduce(x: Tensor, step: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    by_row = reduce(_pad(x, step, 0.0).unflatten(0, (-1, step)), 1)
    return reduce(by_row.unflatten(1, (-1, step)), 2)


def _cells_at(x: Tensor, step: int, i: Int[Tensor, " n"], j: Int[Tensor, " n"]) -> Float[Tensor, "n step step"]:
    """Entries of selected cells; nan beyond the edge."""
    return _pad(x, step, torch.nan).unflatten(1, (-1, step)).unflatten(0, (-1, step))[i, :, j]


def _pad(x: Tensor, step: int, value: float) -> Tensor:
    """Pad to whole cells."""
    rows, cols = x.shape
    if not (rows % step or cols % step):
        return x
    return torch.nn.functional.pad(x, (0, -cols % step, 0, -rows % step), value=value)


def _bands(
    entries: Entries, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int, *, half: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """Compute bands of whole cells: first row, first column, and entries with nan on the diagonal.

    Args:
        entries: source of the matrix.
        rows: features, in order.
        cols: features, in order.
        step: entries per side of a cell.
        half: skip columns before the band's rows, which earlier bands of a symmetric matrix cover.
    """
    height = step * max(1, BAND_ENTRIES // (step * max(1, len(cols))))
    for row0 in range(0, len(rows), height):
        part, col0 = rows[row0 : row0 + height], row0 if half else 0
        band = entries.block(part, cols[col0:])
        if entries.same:
            band[diagonal(part, cols[col0:], entries.shape[1])] = torch.nan
        yield row0, col0, band


def _power_of_2(span: int, cells: int) -> int:
    """Smallest power of 2 that divides `span` into at most `cells` cells."""
    return 1 << max(0, math.ceil(math.log2(max(1, span) / cells)))


def _cell_slices(window: Window, step: int) -> tuple[slice, slice]:
    r0, r1, c0, c1 = window
    return slice(r0 // step, -(-r1 // step)), slice(c0 // step, -(-c1 // step))
