"""Correlated normal numbers, and features that fire with that correlation (a Gaussian copula)."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import widest_float
from saewb.stats.correlation import LowRankCorrelation


@final
class CorrelatedNormals:
    """Sampler of standard normal numbers, one per feature, with a given correlation matrix.

        dense:     z = eps L^T,                     C = L L^T
        low rank:  z = eps F^T + eta sqrt(diag),    C = F F^T + diag(diag)

    The Cholesky factor L is computed once, in n³ / 3 operations; a draw of b samples takes b n².

    Args:
        correlation: a matrix, symmetric, with diagonal 1 and positive definite; or its factors.

    Raises:
        ValueError: if it is no correlation matrix.

    Example:
        >>> normals = CorrelatedNormals(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
        >>> z = normals.sample(20_000, torch.Generator().manual_seed(0))
        >>> z.shape, round(z.T.corrcoef()[0, 1].item(), 2)
        (torch.Size([20000, 2]), 0.8)
    """

    def __init__(self, correlation: Float[Tensor, "n n"] | LowRankCorrelation) -> None:
        self._residual_std: Tensor | None = None
        if isinstance(correlation, LowRankCorrelation):
            self._factor, self._residual_std = correlation.factor, correlation.diag.sqrt()
        else:
            self._factor = _cholesky(correlation)

    @property
    def n_features(self) -> int:
        """Number of features, numbers in a sample."""
        return len(self._factor)

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples n"]:
        """Draw independent samples.

        Args:
            n_samples: rows.
            generator: on the device of the correlation; None is a new one, with seed 0.
        """
        rng = generator or torch.Generator(self._factor.device).manual_seed(0)
        like = {"generator": rng, "dtype": self._factor.dtype, "device": self._factor.device}
        normals = torch.randn(n_samples, self._factor.shape[1], **like) @ self._factor.T
        if self._residual_std is None:
            return normals
        return normals.addcmul_(torch.randn(n_samples, self.n_features, **like), self._residual_std)

    def fires(
        self, n_samples: int, probability: Float[Tensor, " n"] | float, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "samples n"]:
        """Draw which features fire: each with its probability, jointly by the correlated normal numbers.

            z > sqrt(2) erfinv(1 - 2 p)

        Args:
            n_samples: rows.
            probability: of each feature, or of all, 0..1.
            generator: as for `sample`.

        Raises:
            ValueError: for a probability out of 0..1.

        References:
            Gaussian copula: Sklar 1959; the thresholds are the normal quantiles of 1 - p.
        """
        device = self._factor.device
        p = torch.as_tensor(probability, dtype=widest_float(device), device=device)
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError(explain("a probability is not in 0..1.", want="0..1, for each feature or for all"))
        threshold = math.sqrt(2) * torch.erfinv(1 - 2 * p)
        return self.sample(n_samples, generator) > threshold.to(self._factor.dtype)


def _cholesky(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(explain(f"correlation has shape {tuple(matrix.shape)}.", want="[n, n], or LowRankCorrelation"))
    off, skew = (matrix.diagonal() - 1).abs().max().item(), _asymmetry(matrix)
    if not (off <= 1e-4 and skew <= 1e-4):
        what = f"correlation is off 1 on the diagonal by {off:.3g}, and off symmetric by {skew:.3g}."
        raise ValueError(explain(what, want="a symmetric matrix with diagonal 1"))
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        what = f"correlation is not positive definite: it has no Cholesky factor past row {int(info) - 1}."
        raise ValueError(explain(what, want="positive eigenvalues", fix="0.99 * correlation + 0.01 * torch.eye(n)"))
    return factor


def _asymmetry(matrix: Tensor) -> float:
    """Largest |c_ij - c_ji|, block by block, without a copy of the matrix."""
    rows = max(1, 2**21 // len(matrix))
    blocks = range(0, len(matrix), rows)
    return max((matrix[i : i + rows] - matrix[:, i : i + rows].T).abs().max().item() for i in blocks)
