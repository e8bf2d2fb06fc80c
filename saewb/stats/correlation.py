"""Dense and low-rank correlation matrices: statistics and random generation.

A low-rank one is `factor @ factor.T` off the diagonal and 1 on it: n * rank numbers represent n * n entries, and no
function here computes the n * n matrix, except `LowRankCorrelation.dense`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import float64, widest_float

_BLOCK = 2**21  # entries read at a time: they are read twice, the second time from the cache
_LONGEST = 0.99  # squared length of a row of a random factor


@dataclass(frozen=True)
class CorrelationStats:
    """Statistics of the entries off the diagonal of a correlation matrix."""

    rms: float
    """Root mean square of the correlations, 0..1."""
    mean: float
    """Mean of the correlations, -1/(n - 1)..1."""
    n_features: int
    """Number of features, rows of the matrix."""


@dataclass(frozen=True, eq=False, repr=False)
class LowRankCorrelation:
    """Low-rank correlation matrix: `factor @ factor.T + diag(diag)`, whose diagonal is 1.

    Raises:
        ValueError: if the shapes do not fit, `diag` is negative, or the diagonal is not 1 (within 1e-4).

    Example:
        >>> LowRankCorrelation.of(torch.tensor([[0.6], [0.8]])).dense()
        tensor([[1.0000, 0.4800],
                [0.4800, 1.0000]])
    """

    factor: Float[Tensor, "n rank"]
    """Shared part: the correlation of two features is the dot product of their rows."""
    diag: Float[Tensor, " n"]
    """Residual variance of each feature, which it shares with no other, 0..1."""

    def __post_init__(self) -> None:
        shapes = tuple(self.factor.shape), tuple(self.diag.shape)
        if self.factor.ndim != 2 or shapes[1] != shapes[0][:1]:
            raise ValueError(explain(f"factor has shape {shapes[0]}, diag {shapes[1]}.", want="[n, rank] and [n]"))
        off = (self.factor.square().sum(1) + self.diag - 1).abs()
        if bool((self.diag < 0).any()) or bool((off > 1e-4).any()):
            what = f"the diagonal of this correlation matrix is off 1 by {off.max():.3g}, or diag is below 0."
            raise ValueError(explain(what, want="diag = 1 - (factor**2).sum(1)", fix="LowRankCorrelation.of(factor)"))

    @classmethod
    def of(cls, factor: Float[Tensor, "n rank"]) -> LowRankCorrelation:
        """Complete a factor with the diagonal of a correlation matrix. ValueError if a row is longer than 1."""
        residual = 1 - factor.square().sum(1)
        # Rounding may make a row of length 1 slightly longer.
        return cls(factor, torch.where(residual > -1e-5, residual.clamp(min=0), residual))

    def dense(self) -> Float[Tensor, "n n"]:
        """All n * n entries."""
        return (self.factor @ self.factor.T).fill_diagonal_(1.0)

    def __repr__(self) -> str:
        n, rank = self.factor.shape
        return f"LowRankCorrelation({n:,} features, rank {rank})"


@torch.no_grad()
def correlation_stats(correlation: Float[Tensor, "n n"] | LowRankCorrelation) -> CorrelationStats:
    """Root mean square and mean of the entries off the diagonal; both are 0 without correlation.

        dense:     rms² = sum_{i != j} c_ij² / n(n-1),             mean = sum_{i != j} c_ij / n(n-1)
        low rank:  rms² = (||F^T F||² - sum_i ||F_i||⁴) / n(n-1),  mean = (||1^T F||² - sum_i ||F_i||²) / n(n-1)

    Both forms of one matrix have the same statistics. A dense one is read once, without a copy or a mask of it; a
    low-rank one takes n * rank² operations. Sums are in float64.

    Args:
        correlation: a matrix, or its factors. Entries on the diagonal are ignored.

    Returns:
        CorrelationStats: `rms`, `mean`, and the number of features.

    Raises:
        ValueError: if the matrix is not square or has fewer than two rows.

    Example:
        >>> factor = torch.tensor([[0.6], [0.8], [-0.5]])
        >>> stats = correlation_stats(LowRankCorrelation.of(factor))
        >>> round(stats.rms, 6), round(stats.mean, 6)
        (0.400167, -0.073333)
    """
    if isinstance(correlation, LowRankCorrelation):
        return _low_rank_stats(correlation.factor)
    if correlation.ndim != 2 or correlation.shape[0] != correlation.shape[1]:
        raise ValueError(explain(f"correlation has shape {tuple(correlation.shape)}.", want="[n, n]"))
    n = _at_least_two(len(correlation))
    rows = max(1, _BLOCK // n)
    sums = [_block_sums(correlation[i : i + rows], i) for i in range(0, n, rows)]
    square, total = torch.stack(sums).sum(0).tolist()
    return CorrelationStats(math.sqrt(square / (n * (n - 1))), total / (n * (n - 1)), n)


def random_correlation(
    n_features: int,
    *,
    positive_frac: float = 0.5,
    uncorrelated_frac: float = 0.3,
    min_strength: float = 0.1,
    max_strength: float = 0.8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "n n"]:
    """Random correlation matrix with a Cholesky factor, so that normal numbers can be drawn from it.

    Each pair is uncorrelated with probability `uncorrelated_frac`, else correlated with a strength drawn evenly from
    `min_strength..max_strength`, positive with probability `positive_frac`. Where such a matrix is not positive
    definite (many features, strong correlations), its eigenvalues are raised to a floor and its diagonal is brought
    back to 1: all entries then change, and zeros with them. Strengths of 0.1 / sqrt(n) or so stay as drawn.

    Args:
        n_features: rows of the matrix.
        positive_frac: of the correlated pairs, 0..1.
        uncorrelated_frac: of all pairs, 0..1.
        min_strength: of |correlation|, 0..1.
        max_strength: of |correlation|, min_strength..1.
        seed: of the draw.
        dtype: of the matrix.
        device: of the matrix, and of the draw: another device gives another matrix.

    Returns:
        A symmetric positive definite matrix with a diagonal of 1.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> matrix = random_correlation(50, max_strength=0.12, seed=1)
        >>> torch.linalg.cholesky(matrix).shape, bool((matrix.diagonal() == 1).all())
        (torch.Size([50, 50]), True)
    """
    _check_fractions(positive_frac=positive_frac, uncorrelated_frac=uncorrelated_frac)
    _check_fractions(min_strength=min_strength, max_strength=max_strength)
    if n_features < 1 or min_strength > max_strength:
        what = f"random_correlation got n_features={n_features}, strengths {min_strength}..{max_strength}."
        raise ValueError(explain(what, want="n_features >= 1, min_strength <= max_strength"))
    rng = torch.Generator(device).manual_seed(seed)
    shape = (n_features, n_features)
    kind = torch.rand(shape, generator=rng, dtype=dtype, device=device)
    matrix = torch.rand(shape, generator=rng, dtype=dtype, device=device)
    matrix.mul_(max_strength - min_strength).add_(min_strength)
    positive_below = uncorrelated_frac + positive_frac * (1 - uncorrelated_frac)
    matrix = torch.where(kind < positive_below, matrix, -matrix).masked_fill_(kind < uncorrelated_frac, 0.0)
    del kind
    matrix.triu_(1)
    matrix = (matrix + matrix.T).fill_diagonal_(1.0)
    return matrix if _is_positive_definite(matrix) else _make_positive_definite(matrix)


def random_low_rank_correlation(
    n_features: int,
    rank: int,
    *,
    scale: float = 0.075,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LowRankCorrelation:
    """Random low-rank correlation matrix, whose `factor` is normal with standard deviation `scale`.

    A row whose squared length exceeds 0.99 is shortened to exactly that, so that 0.01 of the feature's variance is not
    shared; a warning states how many. Correlations have a root mean square of about `scale² * sqrt(rank)`.

    Args:
        n_features: rows; a million takes 200 MB at rank 50.
        rank: number of factors that features share; 10 to 100 is usual.
        scale: standard deviation of the factor; 0 is no correlation.
        seed: of the draw.
        dtype: of the factors.
        device: of the factors, and of the draw: another device gives another matrix.

    Returns:
        A LowRankCorrelation, symmetric and positive definite with a diagonal of 1.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> random_low_rank_correlation(1000, 25)
        LowRankCorrelation(1,000 features, rank 25)
    """
    if n_features < 1 or rank < 1 or not scale >= 0:
        what = f"random_low_rank_correlation got n_features={n_features}, rank={rank}, scale={scale}."
        raise ValueError(explain(what, want="n_features and rank of at least 1, scale of at least 0"))
    rng = torch.Generator(device).manual_seed(seed)
    factor = torch.randn(n_features, rank, generator=rng, dtype=dtype, device=device).mul_(scale)
    square = factor.square().sum(1)
    long = square > _LONGEST
    factor.mul_(torch.where(long, (_LONGEST / square).sqrt(), 1.0)[:, None])
    if capped := int(long.sum()):
        # SAELens' sentence, which code may look for
        how = "Either reduce the rank or reduce the correlation_scale to avoid rescaling."
        warnings.warn(f"{capped} / {n_features} rows were capped. {how}", stacklevel=2)
    return LowRankCorrelation(factor, torch.where(long, 1 - _LONGEST, 1 - square))


# -- sums ------------------------------------------------------------------------------------------------------------


def _at_least_two(n: int) -> int:
    if n < 2:
        raise ValueError(explain(f"a correlation matrix of {n} features has no pairs.", want="at least 2 features"))
    return n


def _low_rank_stats(factor: Float[Tensor, "n rank"]) -> CorrelationStats:
    n, rank = factor.shape
    _at_least_two(n)
    like = {"dtype": widest_float(factor.device), "device": factor.device}
    inner = torch.zeros(rank, rank, **like)
    column, square, fourth = (torch.zeros(k, **like) for k in (rank, 1, 1))
    for block in factor.split(max(1, _BLOCK // rank)):
        block = block.to(inner.dtype)
        inner.addmm_(block.T, block)
        column += block.sum(0)
        length_sq = block.square().sum(1)
        square += length_sq.sum()
        fourth += length_sq.square().sum()
    # The difference may be below 0 by rounding, where there is no correlation.
    off = (inner.square().sum() - fourth).clamp(min=0).item()
    total = (column.square().sum() - square).item()
    return CorrelationStats(math.sqrt(off / (n * (n - 1))), total / (n * (n - 1)), n)


def _block_sums(rows: Float[Tensor, "rows n"], first: int) -> Float[Tensor, "2"]:
    """Sum of squares and sum of these rows without the diagonal, which starts at column `first`."""
    m = len(rows)
    square = rows[:, first : first + m].clone().fill_diagonal_(0.0)
    parts = [part for part in (rows[:, :first], square, rows[:, first + m :]) if part.shape[1]]
    # Per row in the matrix' precision, rows in float64. The diagonal is left out rather than subtracted: small
    # correlations would vanish beside it.
    norms = sum(float64(torch.linalg.vector_norm(part, dim=1)).square().sum() for part in parts)
    return torch.stack([norms, sum(float64(part.sum(1)).sum() for part in parts)])


# -- random matrices -------------------------------------------------------------------------------------------------


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(explain(f"random_correlation got {name}={value}.", want="0..1"))


def _is_positive_definite(matrix: Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(matrix).info) == 0


def _make_positive_definite(matrix: Tensor) -> Tensor:
    """Raise eigenvalues to a floor, as high as a Cholesky factor in the matrix' precision needs."""
    values, vectors = torch.linalg.eigh(float64(matrix))
    floor = 1e-6
    while True:
        raised = (vectors * values.clamp(min=floor)) @ vectors.T
        scale = raised.diagonal().rsqrt()
        raised.mul_(scale[:, None]).mul_(scale)
        raised = ((raised + raised.T) / 2).to(matrix).fill_diagonal_(1.0)
        if _is_positive_definite(raised):
            return raised
        floor *= 10  # ends: from the largest eigenvalue on, it is the identity
