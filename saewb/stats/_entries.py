"""Where the entries of a large matrix come from: any rows and columns of it, of which none but the dense one holds all.

Entries that are not defined (a feature that never fires, a direction of length 0) are nan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.stats.cooccurrence import Coactivation
from saewb.stats.correlation import CorrelationStats, LowRankCorrelation, correlation_stats

_COUNTED = 32  # operations that an entry of counts costs, about


class Entries(ABC):
    """The entries of a matrix, abstract: those of some rows and columns, and its product with a few columns."""

    shape: tuple[int, int]
    same: bool  # rows and columns are the same things: it is symmetric, and its diagonal says nothing
    what: str  # what an entry is, a word
    device: torch.device

    @abstractmethod
    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """Exact entries, float32."""

    @abstractmethod
    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """The matrix times `x`, where what is not defined counts as 0."""

    @abstractmethod
    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """Multiplications that making these entries takes, about."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`a [n, d], b [m, d]` with entries `a_i . b_j` off the diagonal, if it has such; nan rows are undefined."""
        return None

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "blocks_r blocks_c"] | None:
        """Means of blocks of `step * step`, if there is a quick way to them; the diagonal of `same` is left out."""
        return None

    def means_cost(self, n_rows: int, n_cols: int, step: int) -> float:
        """Multiplications that `means` takes, about."""
        return float("inf")

    def stats(self) -> CorrelationStats | None:
        """Of all entries off the diagonal, if there is a closed form."""
        return None

    def fires(self) -> Int[Tensor, " n"] | None:
        """Tokens on which each feature of the rows fires, if that is known."""
        return None

    def together(self, i: int, j: int) -> tuple[int, int] | None:
        """Tokens on which both fire, and all tokens looked at, if that is known."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Factors(Entries):
    """`a_i . b_j`: directions of length 1, or the factor of a low-rank correlation, whose diagonal is 1."""

    a: Float[Tensor, "n d"]
    b: Float[Tensor, "m d"]
    same: bool
    what: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return len(self.a), len(self.b)

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.a.device

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries."""
        found = self.a[rows] @ self.b[cols].T
        if self.same:
            at, to = diagonal(rows, cols, self.shape[1])
            found[at, to] = torch.where(found[at, to].isnan(), torch.nan, 1.0)
        return found

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries."""
        return self.a.nan_to_num(0) @ (self.b.nan_to_num(0).T @ x)

    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """See Entries."""
        return float(len(rows)) * len(cols) * (self.a.shape[1] + 32)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See Entries."""
        return self.a, self.b

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "blocks_r blocks_c"]:
        """sum_ij a_i . b_j = (sum_i a_i) . (sum_j b_j), less the diagonal."""
        (a, n_a), (b, n_b) = block_sums(self.a, rows, step), block_sums(self.b, cols, step)
        total, count = (a @ b.T).double(), n_a[:, None] * n_b
        if self.same:
            at, to = diagonal(rows, cols, self.shape[1])
            own = self.a[rows[at]].square().sum(1).double()
            _take_off(total, count, own, at // step, to // step)
        return torch.where(count > 0, total / count, torch.nan).float()

    def means_cost(self, n_rows: int, n_cols: int, step: int) -> float:
        """See Entries. Adding is slow, as it reads from memory."""
        blocks = (-(-n_rows // step)) * (-(-n_cols // step))
        return float(self.a.shape[1]) * (blocks + 8 * (n_rows + n_cols))

    def stats(self) -> CorrelationStats | None:
        """See Entries."""
        if not self.same or bool(self.a[:, 0].isnan().any()) or len(self.a) < 2:
            return None
        own = torch.zeros(len(self.a), dtype=self.a.dtype, device=self.a.device)
        long = (1 - self.a.square().sum(1)).clamp(min=0)
        return correlation_stats(LowRankCorrelation(self.a, torch.where(long > 0, long, own)))


@final
@dataclass(frozen=True, eq=False)
class Dense(Entries):
    """A matrix that is there."""

    matrix: Float[Tensor, "n n"]
    same: bool = True
    what: str = "correlation"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return tuple(self.matrix.shape)

    @property
    def device(self) -> torch.device:
        """Of the matrix."""
        return self.matrix.device

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries."""
        return self.matrix[rows[:, None], cols].float()

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries."""
        parts = self.matrix.split(max(1, 2**22 // len(self.matrix)))
        return torch.cat([part.float().nan_to_num(0) @ x for part in parts])

    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """See Entries."""
        return float(len(rows)) * len(cols) * 16


@final
@dataclass(frozen=True, eq=False)
class Counted(Entries):
    """A figure of counts of latents that fire together."""

    counts: Coactivation
    what: str  # phi, jaccard or correlation
    _figures: tuple[str, ...] = field(default=("phi", "jaccard", "correlation"), repr=False)

    @property
    def same(self) -> bool:
        """Within one SAE."""
        return self.counts.b is None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.counts.shape

    @property
    def device(self) -> torch.device:
        """Of the counts."""
        return self.counts.together.device

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries."""
        return getattr(self.counts, self.what)(rows, cols).float()

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries."""
        n, m = self.shape
        rows, cols = (torch.arange(size, device=self.device) for size in (n, m))
        return torch.cat([self.tile(part, cols).nan_to_num(0) @ x for part in rows.split(max(1, 2**20 // m))])

    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """See Entries."""
        return float(len(rows)) * len(cols) * 16 * _COUNTED

    def fires(self) -> Int[Tensor, " n"]:
        """See Entries."""
        return self.counts.a.fired

    def together(self, i: int, j: int) -> tuple[int, int]:
        """See Entries."""
        return int(self.counts.counts([i], [j])), self.counts.n_tokens


@final
@dataclass(frozen=True, eq=False)
class Picked(Entries):
    """Entries between features of another matrix, any number of times each; -1 is none, and not defined."""

    of: Entries
    at: Int[Tensor, " n"]
    same: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return len(self.at), len(self.at)

    @property
    def what(self) -> str:
        """Of the other."""
        return self.of.what

    @property
    def device(self) -> torch.device:
        """Of the other."""
        return self.of.device

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries. Of each feature once, since a feature and itself are on the diagonal wherever they stand."""
        row, col = self.at[rows], self.at[cols]
        (a, in_a), (b, in_b) = (x.clamp(min=0).unique(return_inverse=True) for x in (row, col))
        found = self.of.tile(a, b)[in_a[:, None], in_b]
        return found.masked_fill_((row < 0)[:, None] | (col < 0), torch.nan)

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries."""
        some = self.at >= 0
        given = x.new_zeros(self.of.shape[1], x.shape[1]).index_add_(0, self.at[some], x[some])
        return torch.where(some[:, None], self.of.times(given)[self.at.clamp(min=0)], 0)

    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """See Entries."""
        return self.of.cost(*(self.at[x].clamp(min=0) for x in (rows, cols))) + 16.0 * len(rows) * len(cols)

    def fires(self) -> Int[Tensor, " n"] | None:
        """See Entries."""
        found = self.of.fires()
        return None if found is None else torch.where(self.at >= 0, found[self.at.clamp(min=0)], 0)

    def together(self, i: int, j: int) -> tuple[int, int] | None:
        """See Entries."""
        a, b = int(self.at[i]), int(self.at[j])
        return self.of.together(a, b) if min(a, b) >= 0 else None


def diagonal(rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], n: int) -> tuple[Tensor, Tensor]:
    """Places, in rows and in columns, of the features that are in both.

    Example:
        >>> diagonal(torch.tensor([3, 1]), torch.tensor([0, 1, 2]), 4)
        (tensor([1]), tensor([1]))
    """
    place = torch.full((n,), -1, device=rows.device)
    place[cols] = torch.arange(len(cols), device=rows.device)
    found = place[rows]
    at = (found >= 0).nonzero()[:, 0]
    return at, found[at]


def unit(directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Directions brought to length 1, in float32; nan where there is no direction."""
    x = directions.detach().float()
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.nan)
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


def block_sums(factor: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Sums of the factor's rows by blocks of `step`, and how many are defined; some rows at a time."""
    sums, counts = [], []
    for part in rows.split(step * max(1, 2**22 // (step * factor.shape[1]))):
        x = factor[part]
        known = ~x[:, 0].isnan()
        x = torch.where(known[:, None], x, 0)
        short = -len(x) % step
        x, known = torch.nn.functional.pad(x, (0, 0, 0, short)), torch.nn.functional.pad(known, (0, short))
        sums.append(x.view(-1, step, x.shape[1]).sum(1))
        counts.append(known.view(-1, step).sum(1))
    return torch.cat(sums), torch.cat(counts)


def _take_off(total: Tensor, count: Tensor, own: Tensor, row: Tensor, col: Tensor) -> None:
    """Take entries of the diagonal out of sums of blocks."""
    known = ~own.isnan()
    place = (row * total.shape[1] + col)[known]
    total.view(-1).index_add_(0, place, -own[known])
    count.view(-1).index_add_(0, place, torch.full_like(place, -1))
