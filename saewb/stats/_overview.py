"""A large matrix to look at: any window of it at once, as cells, and the whole of it looked through once.

1. A window that is small is exact: its entries are made.
2. A larger one is of cells of 2, 4, 8, ... entries a side: their strongest entry, if they are few enough to be made or
   have been looked through; else their mean, which products of sums give without making any entry.
3. `scan` looks through all entries once, a band at a time, and keeps the strongest of each block, the strongest pairs
   and the sums that make the statistics. It may stop between bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.stats._best import Best
from saewb.stats._entries import Entries, block_sums
from saewb.stats._pooling import bands, strongest, sums
from saewb.stats.correlation import CorrelationStats

Window = tuple[int, int, int, int]  # row0, row1, col0, col1: places in the order
Cells = Literal["strongest", "mean"]

QUICK = 2.0**29  # multiplications made while one waits: under 100 ms on one free core
_SIDE = 4096  # blocks a side that a scan keeps at most: 67 MB, and a third more for coarser ones


@dataclass(frozen=True, eq=False)
class View:
    """A window of a matrix, as cells."""

    values: Float[Tensor, "cells_r cells_c"]  # nan: nothing in the cell is defined; on the CPU
    window: Window  # what the cells are of: places in the order
    step: int  # entries a side of a cell, a power of 2; 1: the values are entries
    cells: str  # "exact", "strongest" or "mean"
    is_final: bool  # False: as good as can be had at once; a finer or truer one takes `Overview.refined`, or the scan

    @cached_property
    def scale(self) -> float:
        """A magnitude that few cells pass (the largest 0.5 %), two digits: for colors."""
        size = self.values.abs().flatten().nan_to_num(-1)
        n = len(size) - int((size < 0).sum())
        # The k-th largest: sorting all, as a quantile does, takes longer than making the cells.
        return max(1e-6, float(f"{size.topk(max(1, n // 200)).values[-1].item():.2g}")) if n else 1.0

    def levels(self, scale: float) -> bytes:
        """A byte per cell, row by row: 0 not defined, else 1..255 for -scale..scale, 128 for 0."""
        level = (self.values / scale).clamp(-1, 1).mul(127).round().add(128)
        return level.nan_to_num(0).to(torch.uint8).numpy().tobytes()

    def differs(self, other: View) -> float:
        """Root mean square of the difference from a view of the same cells, of what is defined in both; else nan."""
        between = (self.values - other.values).double()
        return between[~between.isnan()].square().mean().sqrt().item()


@dataclass(frozen=True)
class Pair:
    """Two features and the entry that is theirs."""

    row: int  # a feature
    col: int  # another, or one of the other set
    value: float


@final
class Overview:
    """A matrix in an order of its rows and columns. Made by `MatrixView.overview`.

    Memory, whatever the size: 90 MB for blocks, 50 MB for a band (or that of one row of blocks), and for sums of the
    factors a 16th of them at 65,536 features; the means of a dense matrix or of counts take 180 MB more.
    """

    def __init__(self, entries: Entries, rows: Int[Tensor, " n"], cols: Int[Tensor, " m"], n_pairs: int = 100) -> None:
        self._entries = entries
        self.rows, self.cols = rows, cols
        self._at = rows.to(entries.device), cols.to(entries.device)
        self.step = _power(max(len(rows), len(cols)), _SIDE)  # of the blocks that the scan keeps
        self.done_frac = 0.0  # of the scan
        self.pairs: list[Pair] = []  # the strongest off the diagonal, each once; of what has been looked through
        self._n_pairs = n_pairs
        self._partial: Tensor | None = None  # blocks of what has been looked through
        self._strongest: dict[int, Tensor] = {}  # by step
        self._means: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums = torch.zeros(3, dtype=torch.float64)  # of squares, of entries, of ones
        self._factor_sums: tuple[Tensor, ...] | None = None

    @property
    def stats(self) -> CorrelationStats | None:
        """Of all entries that are defined, off the diagonal; None before the scan has ended."""
        square, total, n = self._sums.tolist()
        if self.done_frac < 1 or n == 0:
            return None
        return CorrelationStats(math.sqrt(square / n), total / n, len(self.rows))

    @torch.no_grad()
    def view(self, window: Window, pixels: int, cells: Cells = "strongest") -> View:
        """A window as at most `pixels` cells a side (and one at the edge), at once: if need be of coarser cells.

        Args:
            window: places in the order, from and to.
            pixels: cells a side, at most.
            cells: what a cell that is not one entry shows.
        """
        window, step = self._aligned(window, pixels)
        if step == 1:
            return self._made(window, 1, "exact")
        if (kept := self._kept(window, step, cells)) is not None:
            return kept
        if self._entries.cost(self._at[0][window[0] : window[1]], self._at[1][window[2] : window[3]]) <= QUICK:
            return self._made(window, step, cells)
        if cells == "strongest" and (coarse := self._kept(window, self.step, cells)) is not None:
            return replace(coarse, is_final=False)
        return self._quick_means(window, step, cells)

    @torch.no_grad()
    def refined(self, window: Window, pixels: int, cells: Cells = "strongest") -> View:
        """The same, made of all its entries however long that takes."""
        window, step = self._aligned(window, pixels)
        kept = None if step == 1 else self._kept(window, step, cells)
        return kept or self._made(window, step, "exact" if step == 1 else cells)

    @torch.no_grad()
    def scan(self) -> Iterator[float]:
        """Look through all entries, of which each is made once; gives the fraction done, after each band.

        Half of a symmetric matrix is enough. A scan that was given up is begun anew.
        """
        entries, half = self._entries, self._entries.same
        if self.done_frac == 1:
            return
        shape = tuple(-(-len(x) // self.step) for x in self._at)
        self._partial = torch.full(shape, torch.nan)
        means = None if entries.factors() is not None else (torch.zeros(shape), torch.zeros(shape))
        self._sums.zero_()
        best = Best(self._n_pairs, half)
        seen, total = 0.0, len(self.rows) * len(self.cols) / (2 if half else 1)
        for first, left, tile in bands(entries, *self._at, self.step, half=half):
            best.add(tile, self._keep(means, first, left, tile), first, left)
            self._count(tile, len(tile) if half else 0)
            seen += tile.numel() - (len(tile) ** 2 / 2 if half else 0)
            pairs = zip(self.rows[best.row].tolist(), self.cols[best.col].tolist(), best.value.tolist(), strict=True)
            self.pairs, self.done_frac = [Pair(*pair) for pair in pairs], min(0.999, seen / total)
            yield self.done_frac
        self._strongest = _coarser(self.step, self._partial, lambda x: strongest(x, 2))
        if means is not None:
            levels = [_coarser(self.step, x, lambda x: sums(x, 2)[0]) for x in means]
            self._means = {step: (levels[0][step], levels[1][step]) for step in levels[0]}
        self.done_frac = 1.0
        yield 1.0

    # -- windows -----------------------------------------------------------------------------------------------------

    def _aligned(self, window: Window, pixels: int) -> tuple[Window, int]:
        """Widened to whole cells, so that a cell has the same entries wherever one looks from."""
        r0, r1, c0, c1 = window
        step = _power(max(r1 - r0, c1 - c0), pixels)
        return self._whole((r0, r1, c0, c1), step), step

    def _whole(self, window: Window, step: int) -> Window:
        r0, r1, c0, c1 = window
        ends = (min(-(-r1 // step) * step, len(self.rows)), min(-(-c1 // step) * step, len(self.cols)))
        return r0 // step * step, ends[0], c0 // step * step, ends[1]

    def _made(self, window: Window, step: int, cells: str) -> View:
        rows, cols = self._at[0][window[0] : window[1]], self._at[1][window[2] : window[3]]
        return View(pooled(self._entries, rows, cols, step, cells), window, step, cells, True)

    def _kept(self, window: Window, step: int, cells: str) -> View | None:
        """From what the scan has kept, if it has."""
        window, part = self._whole(window, step), _blocks(window, step)
        if cells == "strongest" and step in self._strongest:
            return View(self._strongest[step][part].clone(), window, step, cells, True)
        if cells == "mean" and step in self._means:
            total, count = (x[part] for x in self._means[step])
            return View(_ratio(total, count), window, step, cells, True)
        return None

    def _quick_means(self, window: Window, step: int, wanted: Cells) -> View:
        """Means at once, of coarser cells where finer ones would take long."""
        if self._entries.factors() is not None and step >= self.step:
            return View(self._by_sums(window, step), window, step, "mean", wanted == "mean")
        fine, (n_r, n_c) = step, (window[1] - window[0], window[3] - window[2])
        while step < max(n_r, n_c) and self._entries.means_cost(n_r, n_c, step) > QUICK:
            step *= 2
        window = self._whole(window, step if step < max(n_r, n_c) else fine)
        rows, cols = self._at[0][window[0] : window[1]], self._at[1][window[2] : window[3]]
        if step >= max(n_r, n_c) or (values := self._entries.means(rows, cols, step)) is None:
            return self._so_far(window, fine)
        return View(values.cpu(), window, step, "mean", wanted == "mean" and step == fine)

    def _so_far(self, window: Window, step: int) -> View:
        """What has been looked through of it, nan elsewhere: for what has no quick means."""
        step = max(step, self.step)
        window = self._whole(window, step)
        part = _blocks(window, self.step)
        found = self._partial[part] if self._partial is not None else torch.full(_size(part), torch.nan)
        return View(strongest(found, step // self.step), window, step, "strongest", False)

    def _by_sums(self, window: Window, step: int) -> Tensor:
        """Means of blocks that are whole blocks of `self.step`, by sums of the factors over these, made once."""
        if self._factor_sums is None:
            a, b = self._entries.factors()
            own = a.square().sum(1, keepdim=True)
            parts = (block_sums(x, at, self.step) for x, at in zip((a, b, own), (*self._at, self._at[0]), strict=True))
            self._factor_sums = tuple(x.double() if k == 2 else x for k, pair in enumerate(parts) for x in pair)
        times = step // self.step
        a, n_a, b, n_b, own, _ = self._factor_sums
        rows, cols = _blocks(window, self.step)
        a, n_a, own, b, n_b = (_added(x, times) for x in (a[rows], n_a[rows], own[rows], b[cols], n_b[cols]))
        total, count = (a @ b.T).double(), n_a[:, None] * n_b
        if self._entries.same:
            at = torch.arange(len(a), device=a.device)
            to = at + window[0] // step - window[2] // step
            at, to = (x[(to >= 0) & (to < len(b))] for x in (at, to))
            total[at, to] -= own[at, 0]
            count[at, to] -= n_a[at]
        return _ratio(total, count).float().cpu()

    # -- the scan ----------------------------------------------------------------------------------------------------

    def _keep(self, means: tuple[Tensor, Tensor] | None, first: int, left: int, tile: Tensor) -> Tensor:
        """The blocks of a band, put at their place, and at the place across the diagonal."""
        made = strongest(tile, self.step).cpu()
        tables = [(self._partial, made)]
        if means is not None:
            tables += [(table, x.cpu()) for table, x in zip(means, sums(tile, self.step), strict=True)]
        rows, cols = slice(first // self.step, first // self.step + len(made)), slice(left // self.step, None)
        for table, x in tables:
            table[rows, cols] = x
            if self._entries.same:
                table[cols, rows] = x.T
        return made

    def _count(self, tile: Tensor, own: int) -> None:
        """Add to the sums; `own` columns of a symmetric matrix' band have each pair twice already."""
        for part, times in ((tile[:, :own], 1), (tile[:, own:], 2 if self._entries.same else 1)):
            n, norm, total = float(part.numel()), torch.linalg.vector_norm(part, dim=1), part.sum(1)
            if bool(total.isnan().any()):
                n, part = n - float(part.isnan().sum()), part.nan_to_num(0)
                norm, total = torch.linalg.vector_norm(part, dim=1), part.sum(1)
            added = norm.double().square().sum().item(), total.double().sum().item(), n
            self._sums += times * torch.tensor(added, dtype=torch.float64)


def pooled(
    entries: Entries, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int, cells: str
) -> Float[Tensor, "cells_r cells_c"]:
    """See `MatrixView.pooled`."""
    if step == 1:
        return entries.tile(rows, cols).cpu()
    if cells == "mean" and (means := entries.means(rows, cols, step)) is not None:
        return means.cpu()
    tiles = (tile for _, _, tile in bands(entries, rows, cols, step))
    made = [strongest(x, step) if cells == "strongest" else _ratio(*sums(x, step)) for x in tiles]
    return torch.cat(made).cpu()


def _power(span: int, cells: int) -> int:
    """The smallest power of 2 that makes at most `cells` of `span`."""
    return 1 << max(0, math.ceil(math.log2(max(1, span) / cells)))


def _blocks(window: Window, step: int) -> tuple[slice, slice]:
    r0, r1, c0, c1 = window
    return slice(r0 // step, -(-r1 // step)), slice(c0 // step, -(-c1 // step))


def _size(part: tuple[slice, slice]) -> tuple[int, int]:
    return part[0].stop - part[0].start, part[1].stop - part[1].start


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count, torch.nan)


def _added(x: Tensor, times: int) -> Tensor:
    """Sums of so many rows each."""
    short = -len(x) % times
    x = torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short else x
    return x.unflatten(0, (-1, times)).sum(1)


def _coarser(step: int, values: Tensor, halve) -> dict[int, Tensor]:
    """By step: these, and of twice the step, and so on, down to 64 cells a side."""
    levels = {step: values}
    while max(values.shape) > 64:
        step, values = 2 * step, halve(values)
        levels[step] = values
    return levels
