"""Sources of matrix entries: blocks of a correlation matrix that is dense, low-rank, counted or sparse.

Every source computes `block(rows, cols)`; only `Dense` holds all entries. Entries that are undefined (a feature that
never fires, a direction of length 0) are nan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.metrics import widest_float
from saewb.sae.sparse import SparseLatents
from saewb.stats.coactivation import Coactivation
from saewb.stats.correlation import CorrelationStats, LowRankCorrelation, correlation_stats

_TOKEN_SUMS = 2**23  # numbers of [tokens, cells] held at a time


class Entries(ABC):
    """Base class of matrix sources: blocks, products with vectors, and firing counts of the features."""

    shape: tuple[int, int]
    same: bool
    """Rows and columns are the same features: the matrix is symmetric, and its diagonal carries no information."""
    what: str
    """Kind of entry: correlation, phi, jaccard or cosine."""
    device: torch.device
    entry_cost: float
    """Cost of computing and pooling an entry, in the unit of `INTERACTIVE_COST`: measured on one core with AVX-512."""
    n_terms: int | None = None
    """Length of the dot product behind an entry; None if there is no shortcut to means of cells."""

    @abstractmethod
    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """Exact entries, float32."""

    @abstractmethod
    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """The matrix times `x`, with undefined entries as 0."""

    def block_cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """Cost of computing and pooling a block."""
        return self.entry_cost * len(rows) * len(cols)

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "cells_r cells_c"] | None:
        """Means of cells of `step * step` entries off the diagonal, without computing entries; None if impossible."""
        return None

    def stats(self) -> CorrelationStats | None:
        """Statistics of all entries off the diagonal, if there is a closed form."""
        return None

    def firing_counts(self) -> Int[Tensor, " n"] | None:
        """Tokens on which each feature of the rows fires, if known."""
        return None

    def joint_count(self, i: int, j: int) -> tuple[int, int] | None:
        """Tokens on which both features fire, and all tokens, if known."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Factors(Entries):
    """Entries `a_i . b_j`: cosines of unit directions, or a low-rank correlation, whose diagonal is 1."""

    a: Float[Tensor, "n d"]
    b: Float[Tensor, "m d"]
    same: bool
    what: str

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.a), len(self.b)

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def n_terms(self) -> int:
        return self.a.shape[1]

    @property
    def entry_cost(self) -> float:
        return self.n_terms / 8 + 16

    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        with torch.autocast(self.device.type, enabled=False):
            entries = self.a[rows] @ self.b[cols].T
        if self.same:
            i, j = diagonal(rows, cols, self.shape[1])
            entries[i, j] = torch.where(entries[i, j].isnan(), torch.nan, 1.0)
        return entries

    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        return self.a.nan_to_num(0) @ (self.b.nan_to_num(0).T @ x)

    def cell_sums(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int) -> FactorSums:
        """Sum the factors over cells of `step` features; if `same`, rows and columns must be in the same order."""
        diag = [add_rows(x[rows], step) for x in self._diagonal] if self.same else None
        return FactorSums(_sum_factors(self.a, rows, step), _sum_factors(self.b, cols, step), diag)

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "cells_r cells_c"]:
        """Means by sum_ij a_i . b_j = (sum_i a_i) . (sum_j b_j)."""
        (a, n_a), (b, n_b) = _sum_factors(self.a, rows, step), _sum_factors(self.b, cols, step)
        diag = self._diagonal if self.same else None
        return _off_diagonal_means((a @ b.T).to(widest_float(a.device)), n_a[:, None] * n_b, diag, rows, cols, step)

    @cached_property
    def _diagonal(self) -> tuple[Tensor, Tensor]:
        """Products of each feature with itself, and whether it is defined."""
        square = torch.linalg.vector_norm(self.a, dim=1).square().to(widest_float(self.a.device))
        return square.nan_to_num(0), (~square.isnan()).long()

    def stats(self) -> CorrelationStats | None:
        if not self.same or bool(self.a[:, 0].isnan().any()) or len(self.a) < 2:
            return None
        return correlation_stats(LowRankCorrelation(self.a, (1 - self.a.square().sum(1)).clamp(min=0)))


@dataclass(frozen=True, eq=False)
class FactorSums:
    """Factors summed over cells of features, for means of larger cells in any window."""

    rows: tuple[Float[Tensor, "cells_r d"], Int[Tensor, " cells_r"]]
    """Sums of the defined factors of the rows, and their numbers."""
    cols: tuple[Float[Tensor, "cells_c d"], Int[Tensor, " cells_c"]]
    """The same of the columns."""
    diag: Sequence[Tensor] | None
    """Sums and numbers of the diagonal entries of each cell on the diagonal; None if rows and columns differ."""

    def means(self, rows: slice, cols: slice, step: int) -> Float[Tensor, "larger_r larger_c"]:
        """Means of entries over `step * step` cells each, both slices of cells starting at multiples of it."""
        (a, n_a), (b, n_b) = (
            [add_rows(x[part], step) for x in sums] for sums, part in ((self.rows, rows), (self.cols, cols))
        )
        total, count = (a @ b.T).to(widest_float(a.device)), n_a[:, None] * n_b
        if self.diag is not None:
            offset = (rows.start - cols.start) // step
            for table, x in zip((total, count), self.diag, strict=True):
                line = table.diagonal(offset)
                line -= add_rows(x[rows], step)[max(0, -offset) :][: len(line)]
        return ratio(total, count).float()


@final
@dataclass(frozen=True, eq=False)
class Dense(Entries):
    """Entries of a matrix in memory."""

    matrix: Float[Tensor, "n n"]
    same: bool = True
    what: str = "correlation"
    entry_cost: float = 32.0

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        return self.matrix[rows[:, None], cols].float()

    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        parts = self.matrix.split(max(1, 2**22 // len(self.matrix)))
        return torch.cat([part.float().nan_to_num(0) @ x for part in parts])


@final
@dataclass(frozen=True, eq=False)
class Counts(Entries):
    """phi, Jaccard or correlation from counts of latents that fire together."""

    counts: Coactivation
    what: str
    entry_cost: float = 256.0

    @property
    def same(self) -> bool:
        return self.counts.b is None

    @property
    def shape(self) -> tuple[int, int]:
        return self.counts.shape

    @property
    def device(self) -> torch.device:
        return self.counts.together.device

    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        return getattr(self.counts, self.what)(rows, cols).float()

    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        n, m = self.shape
        rows, cols = (torch.arange(size, device=self.device) for size in (n, m))
        return torch.cat([self.block(part, cols).nan_to_num(0) @ x for part in rows.split(max(1, 2**20 // m))])

    def firing_counts(self) -> Int[Tensor, " n"]:
        return self.counts.a.fired

    def joint_count(self, i: int, j: int) -> tuple[int, int]:
        return int(self.counts.counts([i], [j])), self.counts.n_tokens


@final
@dataclass(frozen=True, eq=False)
class Sparse(Entries):
    """Correlation of latents over tokens from their sparse activations; phi where all activations count as 1.

    r_ij = sum_t z_ti z_tj / N - mean_i mean_j,    z = activation / its standard deviation,    mean of z
    """

    by_latent: Any
    """z as scipy.sparse.csc_array `[tokens, d_sae]`, float64."""
    by_token: Any
    """The same as scipy.sparse.csr_array."""
    mean: Float[Tensor, " n"]
    """Mean of z per latent, float64; nan where a latent is undefined, whose z is 0."""
    what: str
    same: bool = True

    @classmethod
    def of(cls, latents: SparseLatents, what: str, min_fires: int) -> Sparse:
        """Build the source from active latents; those active on fewer than `min_fires` tokens are undefined."""
        z = latents.to_scipy().astype(np.float64)
        if what != "correlation":
            z.data[:] = 1
        act, n_tokens, d_sae = torch.from_numpy(z.data), *z.shape
        latent = torch.from_numpy(z.indices).long()
        mean, square = (act.new_zeros(d_sae).index_add_(0, latent, x) / n_tokens for x in (act, act.square()))
        variance = (square - mean.square()).clamp(min=0)
        fires = torch.bincount(latent, minlength=d_sae)
        defined = (fires >= max(1, min_fires)) & (variance > 1e-12 * square)
        scale = torch.where(defined, variance.rsqrt(), 0)
        act *= scale[latent]
        return cls(z.tocsc(), z, torch.where(defined, mean * scale, torch.nan), what)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.mean), len(self.mean)

    @property
    def device(self) -> torch.device:
        """The CPU, where scipy computes."""
        return self.mean.device

    @property
    def n_terms(self) -> int:
        return self.by_token.shape[0]

    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        z_rows, n = self.by_latent[:, rows.numpy()].T, len(self.mean)
        # Selecting columns first saves the products of the others, but scipy converts what is selected. Measured: a
        # conversion takes as long as four products.
        if len(cols) * n * self.n_terms < 4 * len(rows) * (n - len(cols)) * self.by_token.nnz:
            products = z_rows @ self.by_latent[:, cols.numpy()]
        else:
            products = (z_rows @ self.by_token)[:, cols.numpy()]
        products = torch.from_numpy(products.toarray()).div_(self.n_terms)
        return products.addr_(self.mean[rows], self.mean[cols], alpha=-1).float()

    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        mean, y = self.mean.nan_to_num(0), x.double()
        product = torch.from_numpy(self.by_latent.T @ (self.by_token @ y.numpy())) / self.n_terms
        return (product - mean[:, None] * (mean @ y)).to(x.dtype)

    def block_cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """Cost of entries, products (if latents fired independently of one another) and the selection of columns."""
        fires = self.firing_counts().double()
        a, b = float(fires[rows].sum()), float(fires[cols].sum())
        return 32.0 * len(rows) * len(cols) + 24 * a * b / max(1, self.n_terms) + 80 * b

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "cells_r cells_c"]:
        """Means of cells from sums over tokens.

            sum_ij r_ij = sum_t (sum_i z_ti - s_i) (sum_j z_tj - s_j) / N - sum_ij (mean_i - s_i) (mean_j - s_j)

        for any s. Products are summed in float32, so s is `mean` for latents that mostly fire, where it is the largest
        part of z, and 0 for others, whose zeros stay zeros.
        """
        diag = (~self.mean.isnan()).double()  # of a correlation 1, where it is defined
        defined, mean = diag.numpy(), self.mean.nan_to_num(0).numpy()
        shift = np.where(2 * self.firing_counts().numpy() > self.n_terms, mean, 0)
        sides = [_membership(x, step, len(mean)) for x in ([rows] if torch.equal(rows, cols) else [rows, cols])]
        sums = [[x @ cells for x in (shift, mean, defined)] for cells in sides]
        (s_r, m_r, n_r), (s_c, m_c, n_c) = sums[0], sums[-1]
        total = torch.zeros(len(s_r), len(s_c), dtype=torch.float64)
        n_tokens = max(1, _TOKEN_SUMS // max(total.shape))
        for first in range(0, self.n_terms, n_tokens):
            z = self.by_token[first : first + n_tokens]
            shifted = [(z @ cells).toarray() - s for cells, (s, _, _) in zip(sides, sums, strict=True)]
            parts = [torch.from_numpy(x).float() for x in shifted]
            total += (parts[0].T @ parts[-1]).double()
        total = total / self.n_terms - torch.from_numpy(np.outer(m_r - s_r, m_c - s_c))
        count = torch.from_numpy(np.outer(n_r, n_c))
        return _off_diagonal_means(total, count, (diag, diag), rows, cols, step)

    def firing_counts(self) -> Int[Tensor, " n"]:
        return torch.from_numpy(np.diff(self.by_latent.indptr)).long()

    def joint_count(self, i: int, j: int) -> tuple[int, int]:
        a, b = (self.by_latent.indices[slice(*self.by_latent.indptr[[k, k + 1]])] for k in (i, j))
        return len(np.intersect1d(a, b, assume_unique=True)), self.n_terms


@final
@dataclass(frozen=True, eq=False)
class Selected(Entries):
    """Entries of another matrix at selected features, repeated or not; index -1 has undefined entries."""

    base: Entries
    index: Int[Tensor, " n"]
    same: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), len(self.index)

    @property
    def what(self) -> str:
        return self.base.what

    @property
    def device(self) -> torch.device:
        return self.base.device

    def block(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        # Each feature once: an entry of a feature with itself is a diagonal one wherever its rows and columns stand.
        row, col = self.index[rows], self.index[cols]
        (a, in_a), (b, in_b) = (x.clamp(min=0).unique(return_inverse=True) for x in (row, col))
        entries = self.base.block(a, b)[in_a[:, None], in_b]
        return entries.masked_fill_((row < 0)[:, None] | (col < 0), torch.nan)

    def matmul(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        mask = self.index >= 0
        y = x.new_zeros(self.base.shape[1], x.shape[1]).index_add_(0, self.index[mask], x[mask])
        return torch.where(mask[:, None], self.base.matmul(y)[self.index.clamp(min=0)], 0)

    def block_cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        return self.base.block_cost(*(self.index[x].clamp(min=0) for x in (rows, cols))) + 32.0 * len(rows) * len(cols)

    def firing_counts(self) -> Int[Tensor, " n"] | None:
        counts = self.base.firing_counts()
        return None if counts is None else torch.where(self.index >= 0, counts[self.index.clamp(min=0)], 0)

    def joint_count(self, i: int, j: int) -> tuple[int, int] | None:
        a, b = int(self.index[i]), int(self.index[j])
        return self.base.joint_count(a, b) if min(a, b) >= 0 else None


def diagonal(rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], n: int) -> tuple[Tensor, Tensor]:
    """Positions of the diagonal entries of a block: of the features that are both in `rows` and in `cols`.

    Example:
        >>> diagonal(torch.tensor([3, 1]), torch.tensor([0, 1, 2]), 4)
        (tensor([1]), tensor([1]))
    """
    position = torch.full((n,), -1, device=rows.device)
    position[cols] = torch.arange(len(cols), device=rows.device)
    col = position[rows]
    row = (col >= 0).nonzero()[:, 0]
    return row, col[row]


def unit(directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Directions scaled to length 1, in float32; nan for a direction of length 0."""
    x = directions.detach().float()
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.nan)
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


def add_rows(x: Tensor, n: int) -> Tensor:
    """Sums of `n` consecutive rows each; the last sum may have fewer."""
    if missing := -len(x) % n:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return x.unflatten(0, (-1, n)).sum(1)


def _membership(index: Int[Tensor, " some"], step: int, n: int) -> Any:
    """Sparse matrix `[n, cells]` with a 1 where a feature is in a cell of `step` consecutive ones."""
    from scipy.sparse import csr_array

    place = index.numpy(), np.arange(len(index)) // step
    return csr_array((np.ones(len(index)), place), shape=(n, -(-len(index) // step)))


def _sum_factors(factor: Float[Tensor, "n d"], index: Int[Tensor, " some"], step: int) -> tuple[Tensor, Tensor]:
    """Sums of `step` features each of `index`, as far as they are defined, and their numbers; 16 MB at a time."""
    sums, counts = [], []
    for part in index.split(step * max(1, 2**22 // (step * factor.shape[1]))):
        x = factor[part]
        defined = ~x[:, 0].isnan()
        sums.append(add_rows(x.masked_fill_(~defined[:, None], 0), step))
        counts.append(add_rows(defined.long(), step))
    return torch.cat(sums), torch.cat(counts)


def _off_diagonal_means(
    total: Tensor, count: Tensor, diag: Sequence[Tensor] | None, rows: Tensor, cols: Tensor, step: int
) -> Float[Tensor, "cells_r cells_c"]:
    """Means of cells from sums and counts of their entries, less `diag`: sum and count of diagonal ones per feature."""
    if diag is not None:
        i, j = diagonal(rows, cols, len(diag[0]))
        cell = (i // step) * total.shape[1] + j // step
        for table, x in zip((total, count), diag, strict=True):
            table.view(-1).index_add_(0, cell, x[rows[i]], alpha=-1)
    return ratio(total, count).float()


def ratio(total: Tensor, n: Tensor) -> Tensor:
    """Sums over numbers; nan for none."""
    return torch.where(n > 0, total / n, torch.nan)
