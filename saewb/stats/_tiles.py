"""Cosines of a tile of directions with all of them, reduced to what was asked for before the next tile is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain

_CHUNK = 2**18  # cosines that one thread works on: with its copies they stay in its share of the cache
_TILE = 2**22  # cosines multiplied at a time, if that makes at least `_ROWS` rows
_SAMPLE = 1024  # values that a limit is guessed from
_ROWS = 128  # with fewer, reading all directions from memory costs more than multiplying them


@dataclass(frozen=True)
class Asked:
    """What is wanted of each row of cosines."""

    n: int  # directions
    percentiles: tuple[float | int, ...]  # 0..100
    neighbours: int  # per direction, 1..n-1
    bins: int  # of the histogram

    def ranks(self) -> list[tuple[int, int, float]]:
        """Per percentile: the two order statistics between which it lies, and where (0: at the lower).

        Of n numbers, of which the first is a -1 that stands for the direction itself.
        """
        at = [p / 100 * (self.n - 2) for p in self.percentiles]
        return [(int(a) + 1, min(int(a) + 1, self.n - 2) + 1, a - int(a)) for a in at]


@dataclass(frozen=True, eq=False)
class Found:
    """Of some rows of cosines, what was asked for."""

    largest: Float[Tensor, "rows neighbours"]  # |cos|, descending
    nearest: Int[Tensor, "rows neighbours"]  # whose; of equal ones the lowest index first
    signed: Float[Tensor, "rows neighbours"]  # cos
    percentiles: Float[Tensor, "rows percentiles"]  # of |cos|
    total: Float[Tensor, " rows"]  # sum of |cos| over the others
    counts: Int[Tensor, " bins"]  # cosines with later directions

    @classmethod
    def join(cls, parts: Sequence[Found], asked: Asked) -> Found:
        """Of all these rows, in their order."""
        per_row = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls) if f.name != "counts"}
        return cls(**per_row, counts=torch.stack([p.counts for p in parts]).sum(0))


def tile_rows(unit: Tensor, max_bytes: int) -> int:
    """How many rows of cosines are made at a time, within `max_bytes` of working memory."""
    row = len(unit) * unit.element_size()
    if unit.device.type == "cpu":
        # A thread has absolute values of its chunk, and, if all are large, places, rows, columns, values, padded ones.
        fixed, per_row = torch.get_num_threads() * _chunk_rows(len(unit)) * (3 * row + 33 * len(unit)), row
    else:
        fixed, per_row = 0, 3 * row + 32 * len(unit)  # what sorting with indices takes
    rows = (max_bytes - fixed) // per_row
    if rows < 1:
        want = f"at least {fixed + per_row:,} for {len(unit):,} directions"
        raise ValueError(explain(f"superposition got max_bytes={max_bytes:,}.", want=want))
    return int(min(rows, max(_ROWS, _TILE // len(unit)), len(unit)))


def tiles(unit: Float[Tensor, "n d"], asked: Asked, rows: int) -> Iterator[Found]:
    """What was asked for, of all rows, a tile at a time."""
    if unit.device.type != "cpu":
        yield from (_by_sorting(unit, start, min(start + rows, asked.n), asked) for start in range(0, asked.n, rows))
        return
    tile = torch.empty(rows, asked.n, dtype=unit.dtype)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, asked.n, rows):
            cosines = torch.mm(unit[start : start + rows], unit.T, out=tile[: min(rows, asked.n - start)]).numpy()
            yield from pool.map(lambda chunk: _by_selecting(*chunk, asked), _chunks(cosines, start))


def _chunk_rows(n: int) -> int:
    return max(1, _CHUNK // n)


def _chunks(cosines: np.ndarray, start: int) -> Iterable[tuple[np.ndarray, int]]:
    step = _chunk_rows(cosines.shape[1])
    return ((cosines[at : at + step], start + at) for at in range(0, len(cosines), step))


# -- on the CPU: selection, in numpy, which lets go of the interpreter's lock and selects with vector instructions ----


def _by_selecting(cosines: np.ndarray, first: int, asked: Asked) -> Found:
    """Of rows `first` onwards of the cosines, which are changed."""
    m, n = cosines.shape
    counts = _counts(cosines, first, asked.bins)
    size = np.abs(cosines)
    size[np.arange(m), first + np.arange(m)] = -1.0  # itself, below all others
    total = size.sum(1).astype(np.float64) + 1
    ranks, cut = asked.ranks(), n - asked.neighbours
    wanted = sorted({cut, *(rank for low, high, _ in ranks for rank in (low, high))})
    large = _large(size, n - wanted[0])
    offset = n - large.padded.shape[1]  # ranks are counted from the smallest, of which some were left out
    large.padded.partition([rank - offset for rank in wanted], axis=1)
    at = {rank: large.padded[:, rank - offset] for rank in wanted}
    columns = [at[low] + (at[high] - at[low]) * size.dtype.type(share) for low, high, share in ranks]
    nearest = _nearest(large, at[cut], asked.neighbours)
    signed = cosines[np.arange(m)[:, None], nearest]
    percentiles = np.stack(columns, 1) if columns else np.empty((m, 0), size.dtype)
    return Found(*map(torch.from_numpy, (np.abs(signed), nearest, signed, percentiles, total, counts)))


@dataclass(frozen=True, eq=False)
class _Large:
    """The large values of each row: at least as many as were asked for."""

    row: np.ndarray  # of each, ascending
    column: np.ndarray  # of each, ascending within a row
    value: np.ndarray
    padded: np.ndarray  # the values again, a row each, with -1 where a row has fewer


def _large(size: np.ndarray, n_wanted: int) -> _Large:
    """The `n_wanted` largest values of each row, and some more.

    A lower limit is guessed from a sample of the row; where too few are above it, all values are taken. So it costs
    one comparison per value to leave most of them out, and what is left is small enough to be put in order.
    """
    m, n = size.shape
    limit = _guess(size, n_wanted / n)
    place = np.flatnonzero(size >= limit[:, None])
    starts = np.searchsorted(place, np.arange(m + 1) * n)
    if (few := np.diff(starts) < n_wanted).any():
        limit[few] = 0
        place = np.flatnonzero(size >= limit[:, None])
        starts = np.searchsorted(place, np.arange(m + 1) * n)
    each = np.diff(starts)
    row = np.repeat(np.arange(m), each)
    value = size.ravel()[place]
    padded = np.full((m, each.max()), -1, size.dtype)
    padded[row, np.arange(len(place)) - starts[row]] = value
    return _Large(row, place - row * n, value, padded)


def _guess(size: np.ndarray, share: float) -> np.ndarray:
    """Per row, a value that at least this share of it most likely reaches: 4 standard errors on the safe side."""
    m, n = size.shape
    sample = size[:, :: max(1, n // _SAMPLE)].copy()
    drawn = sample.shape[1]
    safe = share + 4 * math.sqrt(share * (1 - share) / drawn)
    if safe > 0.4 or n < 4 * _SAMPLE:
        return np.zeros(m, size.dtype)
    rank = int((1 - safe) * drawn)
    sample.partition(rank, axis=1)
    return np.maximum(sample[:, rank], 0)


def _nearest(large: _Large, kth: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, of equal ones the first; `kth` is the k-th largest value."""
    hit = np.flatnonzero(large.value >= kth[large.row])
    row, column, value = large.row[hit], large.column[hit], large.value[hit]
    order = np.lexsort((column, -value, row))
    starts = np.searchsorted(row, np.arange(len(kth)))  # a row has k hits or, with ties, more
    return column[order[starts[:, None] + np.arange(k)]]


def _counts(cosines: np.ndarray, first: int, bins: int) -> np.ndarray:
    """Cosines with later directions, by bin of equal width over -1..1; bins hold their lower edge."""
    m = len(cosines)
    near = cosines[:, first : first + m][np.triu_indices(m, 1)]
    return _binned(near, bins) + _binned(cosines[:, first + m :], bins)


def _binned(values: np.ndarray, bins: int) -> np.ndarray:
    scaled = values * values.dtype.type(bins / 2)
    scaled += values.dtype.type(bins / 2)
    # Rounding may put a cosine a hair outside of -1..1: those below 0 are cut to 0, those above have the last place.
    counts = np.bincount(scaled.astype(np.intp).ravel(), minlength=bins + 1)
    counts[bins - 1] += counts[bins]
    return counts[:bins]


# -- elsewhere: sorting, which is what such devices do fast ------------------------------------------------------------


def _by_sorting(unit: Tensor, start: int, stop: int, asked: Asked) -> Found:
    cosines = unit[start:stop] @ unit.T
    later = torch.ones_like(cosines, dtype=torch.bool).triu_(start + 1)
    bin_of = ((cosines + 1) * (asked.bins / 2)).long().clamp_(0, asked.bins - 1)
    counts = torch.zeros(asked.bins, dtype=torch.long, device=unit.device)
    counts.index_add_(0, bin_of.flatten(), later.flatten().long())
    ordered = cosines.abs()
    ordered.diagonal(start).fill_(-1.0)
    total = ordered.sum(1, dtype=torch.float64) + 1
    # Stable and descending, so that of equal ones the lowest index comes first.
    ordered, places = ordered.sort(dim=1, descending=True, stable=True)
    k, last = asked.neighbours, asked.n - 1
    columns = [torch.lerp(ordered[:, last - low], ordered[:, last - high], f) for low, high, f in asked.ranks()]
    percentiles = torch.stack(columns, 1) if columns else ordered[:, :0]
    nearest = places[:, :k].clone()
    signed = cosines.gather(1, nearest)
    return Found(*(t.cpu() for t in (ordered[:, :k].clone(), nearest, signed, percentiles, total, counts)))


def pairs(n: int) -> int:
    """Of n things, each once."""
    return math.comb(n, 2)
