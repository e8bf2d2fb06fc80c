"""Map of a correlation matrix of any size: exact blocks, pooled overviews, orders and pairs of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._indices import Indices, as_tensor, index_of, indices_of
from saewb.errors import explain, near
from saewb.stats._entries import Counts, Dense, Entries, Factors, Selected, unit
from saewb.stats._ordering import by_clusters
from saewb.stats._overview import BAND_ENTRIES, Overview, Pair, pool
from saewb.stats.coactivation import Coactivation
from saewb.stats.correlation import CorrelationStats, LowRankCorrelation


@dataclass(frozen=True)
class PairFigures:
    """Two features of a matrix: their entry and firing counts, None where unknown."""

    row: int
    """Feature of the row."""
    col: int
    """Feature of the column."""
    value: float
    """Entry; nan where it is undefined."""
    fires_row: int | None
    """Tokens on which the row's feature fires."""
    fires_col: int | None
    """Tokens on which the column's feature fires."""
    together: int | None
    """Tokens on which both fire."""
    n_tokens: int | None
    """Tokens in the sample."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class MatrixView:
    """A matrix of any size whose entries are computed on demand. Created by `saewb.matrix_view`.

    Undefined entries (a feature that never fires, a direction of length 0) are nan.
    """

    entries: Entries
    """Source of the entries: a matrix, factors, counts or sparse activations."""
    density: Float[Tensor, " n"] | None = None
    """Fraction of tokens on which each feature of the rows fires; None: unknown."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.entries.shape

    @property
    def same(self) -> bool:
        """Whether rows and columns are the same features: the matrix is symmetric."""
        return self.entries.same

    @property
    def what(self) -> str:
        """What an entry is: correlation, phi, jaccard or cosine."""
        return self.entries.what

    @property
    def orders(self) -> tuple[str, ...]:
        """Values that `order` accepts."""
        by_density = () if self.density is None else ("density",)
        return ("clusters" if self.same else "matched", *by_density, "index")

    @torch.no_grad()
    def block(self, rows: Indices, cols: Indices) -> Float[Tensor, "rows cols"]:
        """Exact entries of some features, float32, on the CPU.

        Raises:
            ValueError: for a feature out of range.
        """
        return self.entries.block(self._index(rows, 0), self._index(cols, 1)).cpu()

    def picked(self, features: Indices) -> MatrixView:
        """The matrix between selected features, repeated or not; entries of feature -1 are nan.

        With the feature of each latent, the matrix of true features compares with that of the learned latents.

        Raises:
            ValueError: for a feature out of range, or if rows and columns are different features.

        Example:
            >>> truth = matrix_view(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
            >>> truth.picked([1, 0, -1]).block([0], [1, 2])
            tensor([[0.5000,    nan]])
        """
        if not self.same:
            raise ValueError(explain(f"{self!r} is of two sets.", want="one of correlations within a set"))
        index = as_tensor(features, "features")
        index = indices_of(index, "features", self.shape[0] if index.dtype == torch.bool else None, repeats=True)
        index = index.to(self.entries.device)
        self._index(index[index >= 0], 0)
        if bool((index < -1).any()) or not len(index):
            raise ValueError(explain(f"picked got {index[:5].tolist()}.", want="features, or -1 for none"))
        density = self.density
        if density is not None:
            density = torch.where(index >= 0, density.to(index.device)[index.clamp(min=0)], 0)
        return MatrixView(Selected(self.entries, index), density)

    @torch.no_grad()
    def pooled(
        self, rows: Indices, cols: Indices, step: int, cells: str = "strongest"
    ) -> Float[Tensor, "cells_r cells_c"]:
        """Pool a block into cells of `step * step` entries: the strongest entry, with its sign, or the mean.

        The diagonal of a symmetric matrix is left out (unless `step` is 1), and so are undefined entries. Strongest
        entries take the time of computing all, 16 MB at a time; means of cosines, low-rank correlations and sparse
        activations that of dot products of sums.

        Args:
            rows: features, in order.
            cols: features, in order.
            step: entries per side of a cell; the last cells have fewer.
            cells: "strongest" or "mean".
        """
        if step < 1 or cells not in ("strongest", "mean"):
            raise ValueError(explain(f"pooled got step={step}, cells={cells!r}.", want="1 or more; strongest or mean"))
        return pool(self.entries, self._index(rows, 0), self._index(cols, 1), step, cells)

    @torch.no_grad()
    def order(self, by: str = "index", seed: int = 0) -> Int[Tensor, " n"]:
        """Order the rows (and columns, if they are the same features) so that structure is visible.

        "clusters" places correlated features next to each other: up to 1,024 by average linkage of 1 - r; more of them
        are first split by k-means in the space of the 32 leading eigenvectors (a few seconds for 65,536). "density":
        features that fire most often first. "matched": each row at its nearest column (largest magnitude), the largest
        first, so that a recovered dictionary is a diagonal. "index": no reordering.

        Args:
            by: one of `orders`.
            seed: of "clusters" of more than 1,024.

        Raises:
            ValueError: for an order that this matrix does not have.

        Example:
            >>> c = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.0], [0.9, 0.0, 1.0]])
            >>> matrix_view(c).order("clusters").tolist()
            [1, 0, 2]
        """
        if by not in self.orders:
            what = f"{self!r} has no order {by!r}."
            raise ValueError(explain(what, near=near(by, self.orders), want=", ".join(self.orders)))
        if by == "clusters":
            return by_clusters(self.entries, seed)
        if by == "density":
            return self.density.argsort(descending=True, stable=True).cpu()
        return self._matched() if by == "matched" else torch.arange(self.shape[0])

    def overview(self, rows: Int[Tensor, " n"] | None = None, n_pairs: int = 100) -> Overview:
        """Pooled overview of the matrix with its rows (and columns, if they are the same features) in an order.

        Args:
            rows: a permutation, e.g. `order("clusters")`; None is the order of the matrix.
            n_pairs: strongest pairs to keep.
        """
        every = [torch.arange(n) for n in self.shape]
        rows = every[0] if rows is None else rows.cpu()
        if not torch.equal(rows.sort().values, every[0]):
            raise ValueError(
                explain("overview got rows that are no permutation.", want=f"each of {self.shape[0]} once")
            )
        return Overview(self.entries, rows, rows if self.same else every[1], n_pairs)

    def stats(self) -> CorrelationStats | None:
        """Root mean square and mean of the defined entries off the diagonal.

        Without a closed form all entries are computed, a band at a time. None if no entry is defined.
        """
        if (stats := self.entries.stats()) is not None:
            return stats
        overview = self.overview()
        for _ in overview.scan():
            pass
        return overview.stats

    @torch.no_grad()
    def partners(self, feature: int, k: int = 8, axis: int = 0) -> list[Pair]:
        """The k strongest entries of a feature's row (axis=0) or column (axis=1), without the diagonal."""
        this = self._index([feature], axis)
        feature = int(this)
        others = torch.arange(self.shape[1 - axis], device=self.entries.device)
        values = self.entries.block(*((this, others) if axis == 0 else (others, this))).flatten().cpu()
        size = values.abs().nan_to_num(-1)
        if self.same:
            size[feature] = -1
        # The k-th largest first: sorting all takes longer than computing the row.
        largest = (size >= size.topk(min(max(1, k), len(size))).values[-1]).nonzero()[:, 0]
        order = largest[size[largest].argsort(descending=True, stable=True)[:k]]
        best = [j for j in order.tolist() if size[j] >= 0]
        return [Pair(*((feature, j) if axis == 0 else (j, feature)), values[j].item()) for j in best]

    def pair(self, row: int, col: int) -> PairFigures:
        """Entry, firing counts and joint count of two features."""
        row, col = index_of(row, "row", self.shape[0]), index_of(col, "col", self.shape[1])
        value, fires = self.block([row], [col]).item(), self.entries.firing_counts()
        fires_row = None if fires is None else int(fires[row])
        fires_col = None if fires is None or not self.same else int(fires[col])
        return PairFigures(row, col, value, fires_row, fires_col, *(self.entries.joint_count(row, col) or (None, None)))

    def __repr__(self) -> str:
        n, m = self.shape
        return f"MatrixView({self.what}, {n:,} features)" if self.same else f"MatrixView({self.what}, {n:,} x {m:,})"

    def _index(self, features: Indices, axis: int) -> Int[Tensor, " some"]:
        return indices_of(features, "features", self.shape[axis], repeats=True, of=self).to(self.entries.device)

    def _matched(self) -> Tensor:
        n, m = self.shape
        rows, cols = (torch.arange(size, device=self.entries.device) for size in (n, m))
        parts = rows.split(max(1, BAND_ENTRIES // m))
        best = [self.entries.block(part, cols).abs().nan_to_num(-1).max(1) for part in parts]
        column, size = torch.cat([x.indices for x in best]), torch.cat([x.values for x in best])
        by_size = size.argsort(descending=True, stable=True)
        column = torch.where(size < 0, m, column)
        return by_size[column[by_size].argsort(stable=True)].cpu()


def matrix_view(
    of: Any,
    other: Any = None,
    *,
    by: str | None = None,
    density: Float[Tensor, " n"] | None = None,
) -> MatrixView:
    """View a matrix of any size, e.g. 65,536 x 65,536 entries from their factors, computed on demand.

    Args:
        of: a correlation matrix `[n, n]`; its factors; counts of a `Coactivation`; an SAE, for the cosines of its
            directions; or, with by="cosine" or `other`, directions `[n, d]`.
        other: an SAE, directions `[m, d]` or a synthetic `FeatureDictionary`: cosines between `of` and these.
        by: of an SAE "decoder" (default) or "encoder"; of counts "phi" (default), "jaccard" or "correlation"; "cosine"
            for directions.
        density: fraction of tokens on which each feature fires, for an order. Counts have their own.

    Returns:
        A MatrixView; nothing is computed yet.

    Raises:
        TypeError: for anything else.
        ValueError: for a matrix that is not square or not symmetric, or widths that differ.

    Example:
        >>> view = matrix_view(LowRankCorrelation.of(torch.tensor([[0.6], [0.8], [-0.5]])))
        >>> view, view.block([0, 1], [2])
        (MatrixView(correlation, 3 features), tensor([[-0.3000],
                [-0.4000]]))
    """
    entries = _cross_cosines(of, other, by) if other is not None else _entries(of, by)
    if min(entries.shape) < 1:
        raise ValueError(explain(f"a matrix of {entries.shape} features.", want="at least 1"))
    fires = entries.firing_counts()
    if density is None and fires is not None:
        density = fires / max(1, entries.joint_count(0, 0)[1])
    if density is not None and len(density) != entries.shape[0]:
        what = f"density has {len(density)} values for {entries.shape[0]} features."
        raise ValueError(explain(what, want="one for each"))
    return MatrixView(entries, density)


def _entries(of: Any, by: str | None) -> Entries:
    if isinstance(of, LowRankCorrelation):
        _check(by, ("correlation",), "a low-rank correlation")
        factor = of.factor.float()
        return Factors(factor, factor, True, "correlation")
    if isinstance(of, Coactivation):
        _check(by, ("phi", "jaccard", "correlation"), "counts")
        return Counts(of, by or "phi")
    if isinstance(of, nn.Module) or by == "cosine":
        rows = unit(_directions(of, by))
        return Factors(rows, rows, True, "cosine")
    if not isinstance(of, Tensor):
        want = "a tensor [n, n], a LowRankCorrelation, a Coactivation or an SAE"
        raise TypeError(explain(f"matrix_view got a {type(of).__name__}.", want=want))
    _check(by, ("correlation",), "a matrix")
    return _dense(of)


def _cross_cosines(of: Any, other: Any, by: str | None) -> Entries:
    side = by if by in ("decoder", "encoder") else None
    a, b = unit(_directions(of, side or "cosine")), unit(_directions(other, side or "cosine"))
    if a.shape[1] != b.shape[1]:
        what = f"directions of {a.shape[1]} and of {b.shape[1]} dimensions."
        raise ValueError(explain(what, want="the same"))
    return Factors(a, b.to(a.device), False, "cosine")


def _directions(of: Any, by: str | None) -> Tensor:
    rows = getattr(of, "directions", of)  # of a dictionary
    if isinstance(of, nn.Module):
        _check(by, ("decoder", "encoder", "cosine"), "an SAE")
        rows = getattr(of, "W_enc" if by == "encoder" else "W_dec", None)
        rows = rows.T if by == "encoder" and rows is not None else rows
    if not isinstance(rows, Tensor):
        what = f"matrix_view got a {type(of).__name__}, which has no such directions."
        raise TypeError(explain(what, want="a tensor [n, d], an SAE or a dictionary"))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(explain(f"directions have shape {tuple(rows.shape)}.", want="[n, d]"))
    return rows


def _dense(matrix: Tensor) -> Entries:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        what, fix = f"the matrix has shape {tuple(matrix.shape)}.", "matrix_view(directions, by='cosine')"
        raise ValueError(explain(what, want="[n, n]; for the cosines of directions [n, d] say so", fix=fix))
    rows = max(1, BAND_ENTRIES // max(1, len(matrix)))
    for i in range(0, len(matrix), rows):
        part, transposed = matrix[i : i + rows], matrix[:, i : i + rows].T
        if not torch.allclose(part, transposed, rtol=1e-4, atol=1e-5, equal_nan=True):
            what = "the matrix is not symmetric."
            raise ValueError(explain(what, want="a correlation matrix", fix="matrix_view((m + m.T) / 2)"))
    return Dense(matrix.detach() if matrix.is_floating_point() else matrix.float())


def _check(by: str | None, allowed: tuple[str, ...], what: str) -> None:
    if by is not None and by not in allowed:
        raise ValueError(explain(f"{what} has no {by!r}.", near=near(by, allowed), want=", ".join(allowed)))
