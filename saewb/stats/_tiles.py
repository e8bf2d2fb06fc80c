"""Cosines of a tile of directions with all of them, reduced to what was asked for before the next tile is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.kernels.precision import multiply_into

_CHUNK = 2**18  # cosines that one thread works on: with its copies they stay in its share of the cache
_TILE = 2**23  # cosines multiplied at a time, if that makes at least `_ROWS` rows
_SERIAL = 2**15 - 1  # elements that torch works on without starting threads
_ROWS = 128  # with fewer, reading all directions from memory costs more than multiplying them


@dataclass(frozen=True)
class Asked:
    """What is wanted of each row of cosines."""

    n: int  # directions
    percentiles: tuple[float | int, ...]  # 0..100
    neighbors: int  # per direction, 1..n-1
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

    largest: Float[Tensor, "rows neighbors"]  # |cos|, descending
    nearest: Int[Tensor, "rows neighbors"]  # whose; of equal ones the lowest index first
    signed: Float[Tensor, "rows neighbors"]  # cos
    percentiles: Float[Tensor, "rows percentiles"]  # of |cos|
    total: Float[Tensor, " rows"]  # sum of |cos| over the others
    counts: Int[Tensor, " bins"]  # cosines with later directions

    @classmethod
    def join(cls, parts: Iterable[Found], asked: Asked) -> Found:
        """Of all these rows, in their order. Each is let go of once it is copied."""
        whole, at = None, 0
        for part in parts:
            per_row = {f.name: getattr(part, f.name) for f in fields(cls)}
            counts = per_row.pop("counts")
            if whole is None:
                made = {name: x.new_empty(asked.n, *x.shape[1:]) for name, x in per_row.items()}
                whole = cls(**made, counts=torch.zeros_like(counts))
            for name, x in per_row.items():
                getattr(whole, name)[at : at + len(x)] = x
            whole.counts.add_(counts)
            at += len(part.total)
        return whole


def tiles(unit: Float[Tensor, "n d"], asked: Asked, max_bytes: int) -> Iterator[Found]:
    """What was asked for, of all rows, a tile at a time, within `max_bytes` of working memory."""
    row = unit.element_size() * asked.n
    if unit.device.type != "cpu":
        rows = _tile_rows(asked.n, max_bytes, 3 * row + 32 * asked.n)  # what sorting with indices takes
        yield from (_by_sorting(unit, start, min(start + rows, asked.n), asked) for start in range(0, asked.n, rows))
        return
    each = _chunk_bytes(asked, unit.element_size())
    workers = max(1, min(torch.get_num_threads(), max_bytes // 2 // each))
    rows = _tile_rows(asked.n, max_bytes, 2 * row, workers * each)  # the product may be copied to its place
    tile = torch.empty(rows, asked.n, dtype=unit.dtype)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, asked.n, rows):
            cosines = multiply_into(tile[: min(rows, asked.n - start)], unit[start : start + rows], unit).numpy()
            yield from pool.map(lambda chunk: _by_selecting(*chunk, asked), _chunks(cosines, start))


def _tile_rows(n: int, max_bytes: int, per_row: int, fixed: int = 0) -> int:
    rows = (max_bytes - fixed) // per_row
    if rows < 1:
        want = f"at least {fixed + per_row:,} for {n:,} directions"
        raise ValueError(explain(f"superposition got max_bytes={max_bytes:,}.", want=want))
    return int(min(rows, max(_ROWS, _TILE // n), n))


def _chunk_rows(n: int) -> int:
    return max(1, min(n, _CHUNK // n))


def _chunk_bytes(asked: Asked, size: int) -> int:
    """What a thread takes: absolute values twice, masks or bins, forms of the nearest, and a row's places."""
    n, k = asked.n, asked.neighbors
    return _chunk_rows(n) * ((2 * size + 2) * n + (2 * size + 32) * k) + 9 * n


def _chunks(cosines: np.ndarray, start: int) -> Iterable[tuple[np.ndarray, int]]:
    step = _chunk_rows(cosines.shape[1])
    return ((cosines[at : at + step], start + at) for at in range(0, len(cosines), step))


# -- on the CPU: selection, in numpy, which lets go of the interpreter's lock and selects with vector instructions ----


def _by_selecting(cosines: np.ndarray, first: int, asked: Asked) -> Found:
    """Of rows `first` onwards of the cosines."""
    m, n = cosines.shape
    work = np.empty_like(cosines)
    counts = _counts(cosines, first, asked.bins, work)
    size = np.abs(cosines)
    size[np.arange(m), first + np.arange(m)] = -1.0  # itself, below all others
    total = size.sum(1).astype(np.float64) + 1
    ranks, cut = asked.ranks(), n - asked.neighbors
    at = _ordered(size, {cut, *(rank for low, high, _ in ranks for rank in (low, high))}, work)
    columns = [at[low] + (at[high] - at[low]) * size.dtype.type(share) for low, high, share in ranks]
    nearest = _nearest(size, at[cut], asked.neighbors)
    signed = np.take_along_axis(cosines, nearest, axis=1)
    percentiles = np.stack(columns, 1) if columns else np.empty((m, 0), size.dtype)
    return Found(*map(torch.from_numpy, (np.abs(signed), nearest, signed, percentiles, total, counts)))


def _ordered(size: np.ndarray, ranks: set[int], work: np.ndarray) -> dict[int, np.ndarray]:
    """Order statistics of each row, by rank from the smallest. One partition, then only what is above it is sorted."""
    low = min(ranks)
    np.copyto(work, size)
    work.partition(low, axis=1)
    work[:, low:].sort(axis=1)
    return {rank: work[:, rank].copy() for rank in ranks}


def _nearest(size: np.ndarray, kth: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, of equal ones the first; `kth` is the k-th largest value."""
    m, n = size.shape
    hit = size >= kth[:, None]
    if np.count_nonzero(hit) > m * k:  # values that equal the k-th: the last ones are too many
        for row, many in enumerate(np.count_nonzero(hit, axis=1) - k):
            if many:
                hit[row, np.flatnonzero(size[row] == kth[row])[-many:]] = False
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
    # Rounding may put a cosine a hair outside of -1..1: those below 0 are cut to 0, those above have the last place.
    places = torch.from_numpy(scaled.astype(np.int16).ravel())
    # torch counts small integers as they are, numpy would widen them; in parts, so that it does not start threads
    counts = sum(torch.bincount(part, minlength=bins + 1) for part in places.split(_SERIAL)).numpy()
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
    k, last = asked.neighbors, asked.n - 1
    columns = [torch.lerp(ordered[:, last - low], ordered[:, last - high], f) for low, high, f in asked.ranks()]
    percentiles = torch.stack(columns, 1) if columns else ordered[:, :0]
    nearest = places[:, :k].clone()
    signed = cosines.gather(1, nearest)
    return Found(*(t.cpu() for t in (ordered[:, :k].clone(), nearest, signed, percentiles, total, counts)))


def pairs(n: int) -> int:
    """Of n things, each once."""
    return math.comb(n, 2)
