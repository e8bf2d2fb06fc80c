"""Statistics of two sets of texts for every column of a sparse matrix, from ranks; zeros are one tie.

A column with m zeros among N values: they share a rank, so that only the others are sorted. With `low` negative values,
zeros have the mid-rank low + (m + 1) / 2, and positive values the ranks after low + m. Ranks are halves of integers and
their sums exact in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

_ENTRIES = 2**20  # stored values ranked at a time
_PRODUCTS = 2**22  # columns times permutations computed at a time


@dataclass(frozen=True, eq=False)
class ColumnRanks:
    """Mid-ranks of each column of a sparse matrix.

    Example:
        >>> import scipy.sparse
        >>> ranks = ColumnRanks.of(scipy.sparse.csr_array(np.array([[0.0], [2.0], [0.0], [5.0]])))
        >>> ranks.auc(np.array([False, True, False, True])).tolist()
        [1.0]
    """

    above_zero: Any
    """Rank less `zero_rank` of every value that is not 0: a `scipy.sparse.csc_array` `[texts, columns]`."""
    zero_rank: Float[np.ndarray, " columns"]
    """Mid-rank of zeros, from 1; where a column has none it is between the ranks of negative and positive values."""
    ties: Float[np.ndarray, " columns"]
    """Sum of t^3 - t over the groups of t equal values."""

    @classmethod
    def of(cls, matrix: Any) -> ColumnRanks:
        """Rank each column of a sparse matrix `[texts, columns]` without stored zeros, in float64."""
        import scipy.sparse

        columns = matrix.tocsc()
        columns = columns if columns is not matrix else columns.copy()
        n, d = columns.shape
        rank, ties, zero_rank = np.empty(columns.nnz), np.zeros(d), np.empty(d)
        for begin, end in _blocks(columns.indptr, _ENTRIES):
            part = slice(columns.indptr[begin], columns.indptr[end])
            starts = columns.indptr[begin : end + 1] - part.start
            rank[part], ties[begin:end], zero_rank[begin:end] = _rank(columns.data[part], starts, n)
        above = scipy.sparse.csc_array((rank, columns.indices, columns.indptr), shape=(n, d))
        return cls(above, zero_rank, ties)

    @property
    def n(self) -> int:
        """Number of values per column."""
        return self.above_zero.shape[0]

    def shift(self, is_a: Bool[np.ndarray, " texts"]) -> Float[np.ndarray, " columns"]:
        """U - n_a n_b / 2 of the Mann-Whitney statistic: how far set a ranks above chance."""
        return is_a.sum() * (self.zero_rank - (self.n + 1) / 2) + self.above_zero.T @ is_a.astype(np.float64)

    def auc(self, is_a: Bool[np.ndarray, " texts"]) -> Float[np.ndarray, " columns"]:
        """P(a value of set a is larger than one of set b) + P(they are equal) / 2, per column."""
        n_a = int(is_a.sum())
        return 0.5 + self.shift(is_a) / (n_a * (self.n - n_a))

    def sigma(self, n_a: int) -> Float[np.ndarray, " columns"]:
        """Standard deviation of U over all assignments of labels, corrected for ties; 0 if all values are equal."""
        n, n_b = self.n, self.n - n_a
        return np.sqrt(np.maximum(0, n_a * n_b / 12 * ((n + 1) - self.ties / (n * (n - 1)))))

    def p_values(self, is_a: Bool[np.ndarray, " texts"]) -> Float[np.ndarray, " columns"]:
        """Two-sided p of Mann-Whitney's test, normal approximation with continuity correction; 1 where all is equal."""
        from scipy.special import ndtr

        sigma = self.sigma(int(is_a.sum()))
        distance = np.abs(self.shift(is_a)) - 0.5
        z = np.divide(distance, sigma, out=np.full_like(sigma, -np.inf), where=sigma > 0)
        return np.clip(2 * ndtr(-z), 0, 1)

    def family_p(
        self, is_a: Bool[np.ndarray, " texts"], columns: Int[np.ndarray, " some"], n_permutations: int, seed: int
    ) -> Float[np.ndarray, " some"]:
        """Family-wise p of some columns, from permutations of the labels (Westfall and Young's single-step max-T).

            T_i = |auc_i - .5| / sigma_i        p_i = (1 + #{permutations with max_j T_j >= T_i}) / (1 + permutations)

        Args:
            is_a: set of each text.
            columns: the family.
            n_permutations: random assignments of the labels.
            seed: of them.

        Returns:
            p per column; never 0.
        """
        labels = np.tile(is_a.astype(np.float64), (n_permutations + 1, 1))
        np.random.default_rng(seed).permuted(labels[1:], axis=1, out=labels[1:])
        labels = np.ascontiguousarray(labels.T)
        n_a = int(is_a.sum())
        sigma = self.sigma(n_a)[columns]
        sigma = np.where(sigma > 0, sigma, np.inf)
        offset = n_a * (self.zero_rank[columns] - (self.n + 1) / 2) / sigma
        rows = self.above_zero[:, columns].T.tocsr()
        observed, largest = np.zeros(len(columns)), np.zeros(n_permutations)
        step = max(1, _PRODUCTS // (n_permutations + 1))
        for begin in range(0, len(columns), step):
            part = slice(begin, begin + step)
            statistic = np.abs(rows[part] @ labels / sigma[part, None] + offset[part, None])
            observed[part] = statistic[:, 0]
            largest = np.maximum(largest, statistic[:, 1:].max(0, initial=0))
        largest.sort()
        reached = n_permutations - np.searchsorted(largest, observed * (1 - 1e-9))  # equal ones differ by rounding
        return (1 + reached) / (1 + n_permutations)


def _rank(values: np.ndarray, starts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank less zero's of each stored value, ties and rank of zero of each column."""
    sizes = np.diff(starts)
    column = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((values, column))
    ordered = values[order]
    n_zeros = n - sizes
    n_negative = np.bincount(column[values < 0], minlength=len(sizes))
    zero_rank = n_negative + (n_zeros + 1) / 2
    new = np.ones(len(values), bool)
    new[1:] = (ordered[1:] != ordered[:-1]) | (column[1:] != column[:-1])
    first = new.nonzero()[0]
    t = np.diff(np.append(first, len(values))).astype(np.float64)
    group = np.cumsum(new) - 1
    rank = (first + (t + 1) / 2)[group] - starts[column]
    rank += np.where(ordered > 0, n_zeros[column], 0) - zero_rank[column]
    ties = np.bincount(column[first], weights=t**3 - t, minlength=len(sizes)) + (n_zeros.astype(float) ** 3 - n_zeros)
    unordered = np.empty_like(rank)
    unordered[order] = rank
    return unordered, ties, zero_rank


def _blocks(indptr: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Consecutive columns of at most `size` stored values together, or one column."""
    blocks, begin, d = [], 0, len(indptr) - 1
    while begin < d:
        end = max(begin + 1, int(np.searchsorted(indptr, indptr[begin] + size, side="right")) - 1)
        blocks.append((begin, end))
        begin = end
    return blocks


def delong_interval(matrix: Any, is_a: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of the AUC of each column, by DeLong's variance, within 0..1.

        var = S_a / n_a + S_b / n_b,   S_a: variance over a of the share of b that a text of a exceeds (ties half)

    Args:
        matrix: sparse, `[texts, columns]`.
        is_a: set of each text, at least two of each.
        level: coverage.

    Returns:
        Lower and upper ends.

    References:
        DeLong et al. 1988, "Comparing the areas under two or more correlated receiver operating characteristic curves".
    """
    from scipy.special import ndtri

    ranks, sides = ColumnRanks.of(matrix), (is_a, ~is_a)
    auc, variance = ranks.auc(is_a), np.zeros(matrix.shape[1])
    for side, mean in zip(sides, (auc, 1 - auc), strict=True):
        n, n_other = int(side.sum()), int((~side).sum())
        own = ColumnRanks.of(matrix[side])
        zero = (ranks.zero_rank - own.zero_rank) / n_other - mean  # of a text of value 0
        all_ranks = ranks.above_zero.tocsr()[side].tocsc()
        column = np.repeat(np.arange(matrix.shape[1]), np.diff(all_ranks.indptr))
        own_ranks = own.above_zero
        all_ranks.sort_indices()
        own_ranks.sort_indices()
        placement = (all_ranks.data - own_ranks.data) / n_other + zero[column]
        squares = np.bincount(column, weights=placement**2, minlength=matrix.shape[1])
        squares += (n - np.diff(all_ranks.indptr)) * zero**2
        variance += squares / (n - 1) / n
    half = ndtri((1 + level) / 2) * np.sqrt(variance)
    return np.clip(auc - half, 0, 1), np.clip(auc + half, 0, 1)


@dataclass(frozen=True, eq=False)
class EffectSizes:
    """Sizes of the difference between set a and set b, per column; not defined: nan."""

    freq_a: np.ndarray
    """Share of texts of a with a value > 0."""
    freq_b: np.ndarray
    """The same of b."""
    mean_a: np.ndarray
    """Mean value in a."""
    mean_b: np.ndarray
    """The same in b."""
    log_odds: np.ndarray
    """ln[(k_a + .5)(n_b - k_b + .5) / ((k_b + .5)(n_a - k_a + .5))], k: texts with a value > 0."""
    d: np.ndarray
    """Cohen's d: difference of means over the pooled standard deviation."""
    separation: np.ndarray
    """Share of a among the texts of the largest values less its share among texts of value 0."""
    n_texts: np.ndarray
    """Texts with a value that is not 0."""

    @classmethod
    def of(cls, matrix: Any, is_a: Bool[np.ndarray, " texts"]) -> EffectSizes:
        """Compute all of them from a sparse matrix `[texts, columns]`, in float64.

        Separation takes the 100 texts of largest value, or a tenth of fewer than 500; equal values at the limit all
        count (HypotheSAEs, arXiv:2502.04382).
        """
        columns = matrix.tocsc()
        n, d = columns.shape
        n_a, sizes = int(is_a.sum()), np.diff(columns.indptr)
        column, values = np.repeat(np.arange(d), sizes), columns.data.astype(np.float64)
        of_a, positive = is_a[columns.indices], values > 0

        def total(weights: np.ndarray) -> np.ndarray:
            return np.bincount(column, weights=weights, minlength=d)

        k_a, k_b = total(of_a & positive), total(~of_a & positive)
        mean, spread = [], []
        for side, size in ((of_a, n_a), (~of_a, n - n_a)):
            average = total(values * side) / size
            squares = total(side * (values - average[column]) ** 2) + (size - total(side)) * average**2
            mean.append(average)
            spread.append(squares)
        deviation = np.sqrt((spread[0] + spread[1]) / max(1, n - 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            cohen = np.where(deviation > 0, (mean[0] - mean[1]) / deviation, np.nan)
        odds = (k_a + 0.5) * (n - n_a - k_b + 0.5) / ((k_b + 0.5) * (n_a - k_a + 0.5))
        top = values >= _nth_largest(values, columns.indptr, 100 if n >= 500 else math.ceil(n / 10))[column]
        n_top, zeros = total(top & positive), n - sizes
        with np.errstate(divide="ignore", invalid="ignore"):
            separation = total(top & positive & of_a) / n_top - (n_a - total(of_a)) / zeros
        figures = (k_a / n_a, k_b / (n - n_a), *mean, np.log(odds), cohen, separation, sizes)
        return cls(*figures)


def _nth_largest(values: np.ndarray, indptr: np.ndarray, nth: int) -> np.ndarray:
    """The nth largest stored value of each column; -inf where it has fewer."""
    result = np.full(len(indptr) - 1, -np.inf)
    for begin, end in _blocks(indptr, _ENTRIES):
        part, starts = slice(indptr[begin], indptr[end]), indptr[begin : end + 1] - indptr[begin]
        sizes = np.diff(starts)
        ordered = values[part][np.lexsort((values[part], np.repeat(np.arange(len(sizes)), sizes)))]
        enough = sizes >= nth
        result[begin:end][enough] = ordered[starts[1:][enough] - nth]
    return result


def auc_of(scores: Float[np.ndarray, " texts"], is_a: Bool[np.ndarray, " texts"]) -> float:
    """AUC of one score per text: P(larger in a) + P(equal) / 2.

    Example:
        >>> auc_of(np.array([3.0, 1.0, 1.0]), np.array([True, True, False]))
        0.75
    """
    from scipy.stats import rankdata

    n_a = int(is_a.sum())
    return float((rankdata(scores)[is_a].sum() - n_a * (n_a + 1) / 2) / (n_a * (len(scores) - n_a)))
