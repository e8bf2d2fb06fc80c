"""Superposition of directions: cosines between all pairs of them, exactly, in bounded memory.

1. Directions are scaled to length 1, once.
2. A tile of rows at a time is multiplied with all directions.
3. Each row is reduced to its largest |cos|, its percentiles, its nearest neighbors and its counts per bin, each pair
   once; then the tile is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._display import html_table, text_table
from saewb.errors import explain
from saewb.kernels.precision import multiply_into
from saewb.metrics import float64, widest_float

if TYPE_CHECKING:
    import pandas as pd

MAX_BYTES = 2**28
_CHUNK = 2**18  # cosines per thread at a time: with its copies they stay in its share of the cache
_TILE = 2**23  # cosines multiplied at a time, if these are at least `_ROWS` rows
_SERIAL = 2**15 - 1  # elements that torch processes without starting threads
_ROWS = 128  # with fewer, reading all directions from memory costs more than multiplying them


@torch.no_grad()
def superposition(
    directions: Float[Tensor, "n d"] | nn.Module,
    percentiles: Sequence[float | int] = (95, 99),
    *,
    neighbors: int = 5,
    bins: int = 200,
    max_bytes: int = MAX_BYTES,
) -> Superposition:
    """Measure the overlap of directions by the cosine of every pair: max 0 is orthogonal, 1 is one direction twice.

        cos[i, j] = u_i . u_j,    u = directions / ||directions||      (a direction of length 0 has cosine 0)

    Per direction over all others: the largest |cos|, percentiles of |cos| (interpolated linearly, as numpy does), the
    nearest others. Over all pairs, each once: mean |cos|, root mean square, histogram. Exact: no pair is left out or
    sampled, and products are in float32 (float64 if the directions are). In d dimensions the root mean square cannot
    be below sqrt((n - d) / (d (n - 1))), the Welch bound, which random directions nearly reach.

    Memory beyond the directions, a copy of them of length 1 and the result is at most `max_bytes`, whatever n: 262,144
    directions never take n * n. Time grows with n * n * d: for 16,384 directions in 576 dimensions it is about that of
    `directions @ directions.T` on a CPU.

    Args:
        directions: one per row, of any length; or an SAE, for its decoder directions (`sae.W_dec`). The encoder
            directions are `sae.W_enc.T`.
        percentiles: 0..100, of |cos| between a direction and all others.
        neighbors: how many nearest directions to report for each; fewer if there are not as many.
        bins: of the histogram over -1..1, equally wide; at most 1,000.
        max_bytes: of working memory.

    Returns:
        A Superposition, on the CPU: prints as a table, `to_frame()` for pandas.

    Raises:
        ValueError: for fewer than two directions, values that are not finite, or an argument out of its range.

    References:
        Elhage et al. 2022, "Toy models of superposition". Welch 1974 (bound).

    Example:
        >>> overlap = superposition(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]))
        >>> overlap.max_abs_cos.tolist(), overlap.nearest[:, 0].tolist(), round(overlap.mean_abs_cos, 6)
        ([1.0, 0.0, 1.0], [2, 0, 0], 0.333333)
    """
    unit = _unit(_matrix(directions))
    n = len(unit)
    options = _Options(n, tuple(percentiles), min(neighbors, n - 1), bins)
    _check(options, neighbors)
    return _summarize(_RowStats.cat(_tiles(unit, options, max_bytes), n), options, unit)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Superposition:
    """Overlap statistics of directions: prints as a table; `to_frame()` has a row per direction.

    |cos| is the absolute cosine, 0..1, between two different directions.
    """

    n_features: int
    """Number of directions."""
    d: int
    """Number of dimensions."""
    max_abs_cos: Float[Tensor, " n"]
    """Largest |cos| of each direction with another."""
    percentile_abs_cos: Mapping[float | int, Float[Tensor, " n"]]
    """Percentiles of |cos| of each direction with all others."""
    nearest: Int[Tensor, "n neighbors"]
    """Directions with the largest |cos|, per direction, the nearest first."""
    nearest_cos: Float[Tensor, "n neighbors"]
    """Cosines with `nearest`."""
    mean_max_abs_cos: float
    """Mean over directions of `max_abs_cos`."""
    mean_percentile_abs_cos: Mapping[float | int, float]
    """Means over directions of `percentile_abs_cos`."""
    mean_abs_cos: float
    """Mean |cos| over pairs."""
    rms_cos: float
    """Root mean square cosine over pairs."""
    welch_bound: float
    """Smallest `rms_cos` that n directions in d dimensions can have."""
    effective_dim: float
    """1..d: (sum of eigenvalues)² / sum of their squares, of the sum of u u^T."""
    n_zero: int
    """Directions of length 0, whose cosines count as 0."""
    histogram: Int[Tensor, " bins"]
    """Number of pairs per bin of the cosine."""
    bin_edges: Float[Tensor, " edges"]
    """Edges of the histogram's bins, -1..1; a bin includes its lower edge, the last one both."""

    def figures(self) -> dict[str, float | int]:
        """All scalar statistics by name: `pd.DataFrame({"a": a.figures(), "b": b.figures()}).T` compares two.

        `mean_p95_abs_cos` is `mean_percentile_abs_cos[95]`, and likewise for each percentile.
        """
        first = ("n_features", "d", "mean_max_abs_cos")
        last = ("mean_abs_cos", "rms_cos", "welch_bound", "effective_dim", "n_zero")
        by_p = {f"mean_p{p:g}_abs_cos": v for p, v in self.mean_percentile_abs_cos.items()}
        return {n: getattr(self, n) for n in first} | by_p | {n: getattr(self, n) for n in last}

    def to_frame(self) -> pd.DataFrame:
        """One row per direction: its largest |cos|, percentiles, nearest direction and the cosine with it."""
        import pandas as pd

        columns = {
            "max_abs_cos": self.max_abs_cos,
            **{f"p{p:g}_abs_cos": column for p, column in self.percentile_abs_cos.items()},
            "nearest": self.nearest[:, 0],
            "nearest_cos": self.nearest_cos[:, 0],
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()}).rename_axis("feature")

    def __repr__(self) -> str:
        figures = f"mean_max_abs_cos={self.mean_max_abs_cos:.4g}, mean_abs_cos={self.mean_abs_cos:.4g}"
        return f"Superposition({self.n_features:,} features in {self.d:,} dimensions, {figures}, ...)"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows())

    def _title(self) -> str:
        return f"{self.n_features:,} features in {self.d:,} dimensions"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [("mean_max_abs_cos", self.mean_max_abs_cos, "|cos| with the nearest other, mean over features")]
        for p, value in self.mean_percentile_abs_cos.items():
            rows.append((f"mean p{p:g}", value, f"percentile {p:g} of |cos| with all others, mean over features"))
        rows += [
            ("mean_abs_cos", self.mean_abs_cos, "mean over pairs"),
            ("rms_cos", self.rms_cos, f"root mean square over pairs; no less than {self.welch_bound:.4g} fits"),
            ("max_abs_cos", self.max_abs_cos.max().item(), "of the closest pair"),
        ]
        spread = f"of {self.d:,} that the features spread over evenly"
        dims = ("effective_dim", f"{self.effective_dim:.4g}", "dimensions", spread)
        return [*((name, f"{value:.4g}", "0..1", meaning) for name, value, meaning in rows), dims]


# -- tiles ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """Which statistics of each row of cosines to compute."""

    n: int
    """Directions."""
    percentiles: tuple[float | int, ...]
    """0..100."""
    neighbors: int
    """Per direction, 1..n-1."""
    bins: int
    """Bins of the histogram."""

    def ranks(self) -> list[tuple[int, int, float]]:
        """Per percentile, the ranks of the two order statistics it lies between, and the weight of the higher one.

        Ranks in n numbers, the first of which is a -1 that stands for the direction itself.
        """
        ranks = [p / 100 * (self.n - 2) for p in self.percentiles]
        return [(int(r) + 1, min(int(r) + 1, self.n - 2) + 1, r - int(r)) for r in ranks]


@dataclass(frozen=True, eq=False)
class _RowStats:
    """Statistics of some rows of cosines."""

    largest: Float[Tensor, "rows neighbors"]
    """Largest |cos|, descending."""
    nearest: Int[Tensor, "rows neighbors"]
    """Directions with the largest |cos|; of equal ones the lowest index first."""
    signed: Float[Tensor, "rows neighbors"]
    """Cosines with `nearest`."""
    percentiles: Float[Tensor, "rows percentiles"]
    """Percentiles of |cos|."""
    total: Float[Tensor, " rows"]
    """Sum of |cos| over the others."""
    counts: Int[Tensor, " bins"]
    """Histogram of cosines with later directions."""

    @classmethod
    def cat(cls, parts: Iterable[_RowStats], n: int) -> _RowStats:
        """Concatenate parts to n rows; each part is released once it is copied."""
        whole, start = None, 0
        for part in parts:
            per_row = {f.name: getattr(part, f.name) for f in fields(cls)}
            counts = per_row.pop("counts")
            if whole is None:
                empty = {name: x.new_empty(n, *x.shape[1:]) for name, x in per_row.items()}
                whole = cls(**empty, counts=torch.zeros_like(counts))
            for name, x in per_row.items():
                getattr(whole, name)[start : start + len(x)] = x
            whole.counts.add_(counts)
            start += len(part.total)
        return whole


def _tiles(unit: Float[Tensor, "n d"], options: _Options, max_bytes: int) -> Iterator[_RowStats]:
    """Statistics of all rows, a tile at a time, within `max_bytes` of working memory."""
    row = unit.element_size() * options.n
    if unit.device.type != "cpu":
        rows = _tile_rows(options.n, max_bytes, 3 * row + 32 * options.n)  # memory of sorting with indices
        yield from (
            _by_sorting(unit, start, min(start + rows, options.n), options) for start in range(0, options.n, rows)
        )
        return
    chunk_bytes = _chunk_bytes(options, unit.element_size())
    workers = max(1, min(torch.get_num_threads(), max_bytes // 2 // chunk_bytes))
    rows = _tile_rows(options.n, max_bytes, 2 * row, workers * chunk_bytes)  # twice: the product may be copied
    tile = torch.empty(rows, options.n, dtype=unit.dtype)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, options.n, rows):
            cosines = multiply_into(tile[: min(rows, options.n - start)], unit[start : start + rows], unit).numpy()
            yield from pool.map(lambda chunk: _by_selecting(*chunk, options), _chunks(cosines, start))


def _tile_rows(n: int, max_bytes: int, per_row: int, fixed: int = 0) -> int:
    rows = (max_bytes - fixed) // per_row
    if rows < 1:
        want = f"at least {fixed + per_row:,} for {n:,} directions"
        raise ValueError(explain(f"superposition got max_bytes={max_bytes:,}.", want=want))
    return int(min(rows, max(_ROWS, _TILE // n), n))


def _chunk_rows(n: int) -> int:
    return max(1, min(n, _CHUNK // n))


def _chunk_bytes(options: _Options, size: int) -> int:
    """Bytes per thread: absolute values twice, masks or bins, the nearest, and positions in a row."""
    n, k = options.n, options.neighbors
    return _chunk_rows(n) * ((2 * size + 2) * n + (2 * size + 32) * k) + 9 * n


def _chunks(cosines: np.ndarray, start: int) -> Iterable[tuple[np.ndarray, int]]:
    step = _chunk_rows(cosines.shape[1])
    return ((cosines[at : at + step], start + at) for at in range(0, len(cosines), step))


# -- on the CPU: selection, in numpy, which releases the interpreter lock and selects with vector instructions ----


def _by_selecting(cosines: np.ndarray, first: int, options: _Options) -> _RowStats:
    """Statistics of rows `first` onwards, by selection."""
    m, n = cosines.shape
    work = np.empty_like(cosines)
    counts = _counts(cosines, first, options.bins, work)
    size = np.abs(cosines)
    size[np.arange(m), first + np.arange(m)] = -1.0  # the direction itself, below all others
    total = size.sum(1).astype(np.float64) + 1
    ranks, cut = options.ranks(), n - options.neighbors
    stats = _order_statistics(size, {cut, *(rank for low, high, _ in ranks for rank in (low, high))}, work)
    columns = [stats[low] + (stats[high] - stats[low]) * size.dtype.type(share) for low, high, share in ranks]
    nearest = _nearest(size, stats[cut], options.neighbors)
    signed = np.take_along_axis(cosines, nearest, axis=1)
    percentiles = np.stack(columns, 1) if columns else np.empty((m, 0), size.dtype)
    return _RowStats(*map(torch.from_numpy, (np.abs(signed), nearest, signed, percentiles, total, counts)))


def _order_statistics(size: np.ndarray, ranks: set[int], work: np.ndarray) -> dict[int, np.ndarray]:
    """Order statistics of each row by ascending rank: one partition, then a sort of the part above it."""
    low = min(ranks)
    np.copyto(work, size)
    work.partition(low, axis=1)
    work[:, low:].sort(axis=1)
    return {rank: work[:, rank].copy() for rank in ranks}


def _nearest(size: np.ndarray, kth: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, of equal ones the first; `kth` has the k-th largest values."""
    m, n = size.shape
    hit = size >= kth[:, None]
    if np.count_nonzero(hit) > m * k:  # several values equal the k-th: drop the last ones
        for row, n_extra in enumerate(np.count_nonzero(hit, axis=1) - k):
            if n_extra:
                hit[row, np.flatnonzero(size[row] == kth[row])[-n_extra:]] = False
    column = (np.flatnonzero(hit) % n).reshape(m, k)
    order = np.argsort(-np.take_along_axis(size, column, axis=1), axis=1, kind="stable")
    return np.take_along_axis(column, order, axis=1)


def _counts(cosines: np.ndarray, first: int, bins: int, work: np.ndarray) -> np.ndarray:
    """Cosines with later directions, by bin of equal width over -1..1; bins hold their lower edge."""
    m = len(cosines)
    near = cosines[:, first : first + m][np.triu_indices(m, 1)]
    return _binned(near, bins, work) + _binned(cosines[:, first + m :], bins, work)


def _binned(values: np.ndarray, bins: int, work: np.ndarray) -> np.ndarray:
    half = values.dtype.type(bins / 2)
    scaled = np.multiply(values, half, out=work.ravel()[: values.size].reshape(values.shape))
    scaled += half
    # Rounding may put a cosine slightly outside -1..1: values below 0 are cut to 0, those above go to bin `bins`.
    bin_of = torch.from_numpy(scaled.astype(np.int16).ravel())
    # torch counts small integers without widening them, as numpy would; in parts, so that it starts no threads.
    counts = sum(torch.bincount(part, minlength=bins + 1) for part in bin_of.split(_SERIAL)).numpy()
    counts[bins - 1] += counts[bins]
    return counts[:bins]


# -- on other devices: sorting, which is fast there --------------------------------------------------------------------


def _by_sorting(unit: Tensor, start: int, stop: int, options: _Options) -> _RowStats:
    cosines = unit[start:stop] @ unit.T
    later = torch.ones_like(cosines, dtype=torch.bool).triu_(start + 1)
    bin_of = ((cosines + 1) * (options.bins / 2)).long().clamp_(0, options.bins - 1)
    counts = torch.zeros(options.bins, dtype=torch.long, device=unit.device)
    counts.index_add_(0, bin_of.flatten(), later.flatten().long())
    ordered = cosines.abs()
    ordered.diagonal(start).fill_(-1.0)
    total = float64(ordered.sum(1, dtype=widest_float(unit.device))) + 1
    # Stable and descending, so that of equal ones the lowest index comes first.
    ordered, places = ordered.sort(dim=1, descending=True, stable=True)
    k, last = options.neighbors, options.n - 1
    columns = [torch.lerp(ordered[:, last - low], ordered[:, last - high], f) for low, high, f in options.ranks()]
    percentiles = torch.stack(columns, 1) if columns else ordered[:, :0]
    nearest = places[:, :k].clone()
    signed = cosines.gather(1, nearest)
    return _RowStats(*(t.cpu() for t in (ordered[:, :k].clone(), nearest, signed, percentiles, total, counts)))


# -- checks and sums -----------------------------------------------------------------------------------------


def _summarize(rows: _RowStats, options: _Options, unit: Float[Tensor, "n d"]) -> Superposition:
    """Statistics of all pairs from those of the rows."""
    n, d = unit.shape
    n_pairs = math.comb(n, 2)
    trace, square, off_diagonal, n_zero = _moments(unit)
    largest = rows.largest[:, 0].clamp(max=1)
    by_p = dict(zip(options.percentiles, rows.percentiles.clamp(max=1).unbind(1), strict=True))
    return Superposition(
        n_features=n,
        d=d,
        max_abs_cos=largest,
        percentile_abs_cos=by_p,
        nearest=rows.nearest,
        nearest_cos=rows.signed.clamp(-1, 1),
        mean_max_abs_cos=largest.double().mean().item(),
        mean_percentile_abs_cos={p: column.double().mean().item() for p, column in by_p.items()},
        mean_abs_cos=rows.total.sum().item() / 2 / n_pairs,
        rms_cos=math.sqrt(off_diagonal / 2 / n_pairs),
        welch_bound=math.sqrt(max(0, n - d) / (d * (n - 1))),
        effective_dim=trace**2 / square if trace else 0.0,
        n_zero=n_zero,
        histogram=rows.counts,
        bin_edges=torch.linspace(-1, 1, options.bins + 1, dtype=torch.float64),
    )


def _matrix(directions: Tensor | nn.Module) -> Tensor:
    rows = getattr(directions, "W_dec", None) if isinstance(directions, nn.Module) else directions
    if not isinstance(rows, Tensor):
        what = f"superposition got a {type(directions).__name__}."
        raise TypeError(explain(what, want="a tensor [n, d] or an SAE", fix="superposition(sae.W_dec)"))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(explain(f"directions have shape {tuple(rows.shape)}.", want="[n, d], one direction per row"))
    if len(rows) < 2:
        # SAELens' sentence, which code may look for
        what = f"Need at least 2 features to compute superposition stats, got {len(rows)}."
        raise ValueError(explain(what, want="directions [n, d] with n >= 2"))
    return rows.detach()


def _unit(directions: Tensor) -> Tensor:
    """Rows scaled to length 1 (zero rows stay); by the largest entry first, so that no length overflows or vanishes."""
    x = directions if directions.dtype == torch.float64 else directions.float()
    largest = x.abs().amax(1, keepdim=True)
    if not bool(largest.isfinite().all()):
        bad = (~largest[:, 0].isfinite()).nonzero()[:, 0].tolist()
        what = f"{len(bad)} of {len(x)} directions are not finite: {', '.join(map(str, bad[:5]))}."
        raise ValueError(explain(what, want="numbers"))
    x = x / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1))


def _check(options: _Options, neighbors: int) -> None:
    if not all(0 <= p <= 100 for p in options.percentiles):
        raise ValueError(explain(f"superposition got percentiles={options.percentiles}.", want="numbers in 0..100"))
    if neighbors < 1:
        raise ValueError(explain(f"superposition got neighbors={neighbors}.", want="at least 1"))
    if not 1 <= options.bins <= 1000:
        raise ValueError(explain(f"superposition got bins={options.bins}.", want="1..1000"))


def _moments(unit: Float[Tensor, "n d"]) -> tuple[float, float, float, int]:
    """Sum of ||u||², of cos² over ordered pairs with and without the diagonal, and the number of zero directions."""
    n, d = unit.shape
    # cos² from the d by d matrix: ||U U^T||² = ||U^T U||². Many more directions than dimensions cannot be orthogonal
    # (Welch), so that nothing cancels in the difference below and blocks need not be float64: that product would take
    # a tenth of the whole time at 16,384 directions.
    crowded = n > 4 * d
    like = {"dtype": widest_float(unit.device), "device": unit.device}
    trace, fourth, n_zero = (torch.zeros((), **like) for _ in range(3))
    inner = torch.zeros(d, d, **like)
    for block in unit.split(max(1, 2**19 // d)):
        if crowded:
            inner += (block.T @ block).to(inner.dtype)
        block = block.to(inner.dtype)
        if not crowded:
            inner.addmm_(block.T, block)
        length_sq = block.square().sum(1)
        trace += length_sq.sum()
        fourth += length_sq.square().sum()
        n_zero += (length_sq == 0).sum()
    square = inner.square().sum()
    # Between orthogonal directions the difference is rounding only, and may be negative.
    return trace.item(), square.item(), max(0.0, (square - fourth).item()), int(n_zero.item())
