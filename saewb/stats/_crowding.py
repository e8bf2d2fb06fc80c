"""What `superposition` found, and how it shows itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb._display import html_table, text_table
from saewb.stats._tiles import Asked, Found, pairs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Superposition:
    """How directions overlap. `print` it for a table; in a notebook it shows itself; `to_frame()` for each direction.

    |cos| is the absolute cosine, 0..1, between two different directions.
    """

    n_features: int  # directions
    d: int  # dimensions they live in
    max_abs_cos: Float[Tensor, " n"]  # per direction, the largest |cos| with another
    percentile_abs_cos: Mapping[float | int, Float[Tensor, " n"]]  # per direction, of |cos| with all others
    nearest: Int[Tensor, "n neighbors"]  # per direction, those with the largest |cos|, the nearest first
    nearest_cos: Float[Tensor, "n neighbors"]  # the cosines with them, with their sign
    mean_max_abs_cos: float  # mean over directions of `max_abs_cos`
    mean_percentile_abs_cos: Mapping[float | int, float]  # means over directions of `percentile_abs_cos`
    mean_abs_cos: float  # mean |cos| over pairs
    rms_cos: float  # root of the mean cos² over pairs
    welch_bound: float  # the least `rms_cos` that n directions in d dimensions can have
    effective_dim: float  # 1..d: (sum of eigenvalues)² / sum of their squares, of the sum of u u^T
    n_zero: int  # directions of length 0, whose cosines count as 0
    histogram: Int[Tensor, " bins"]  # pairs, by cosine
    bin_edges: Float[Tensor, " edges"]  # of the histogram, -1..1; a bin holds its lower edge, the last one both

    @classmethod
    def of(cls, found: Found, asked: Asked, unit: Float[Tensor, "n d"]) -> Superposition:
        """From the parts."""
        n, d = unit.shape
        moments = _moments(unit)
        largest = found.largest[:, 0].clamp(max=1)
        by_p = dict(zip(asked.percentiles, found.percentiles.clamp(max=1).unbind(1), strict=True))
        return cls(
            n_features=n,
            d=d,
            max_abs_cos=largest,
            percentile_abs_cos=by_p,
            nearest=found.nearest,
            nearest_cos=found.signed.clamp(-1, 1),
            mean_max_abs_cos=largest.double().mean().item(),
            mean_percentile_abs_cos={p: column.double().mean().item() for p, column in by_p.items()},
            mean_abs_cos=found.total.sum().item() / 2 / pairs(n),
            rms_cos=math.sqrt(moments.off_diagonal / 2 / pairs(n)),
            welch_bound=math.sqrt(max(0, n - d) / (d * (n - 1))),
            effective_dim=moments.trace**2 / moments.square if moments.trace else 0.0,
            n_zero=moments.n_zero,
            histogram=found.counts,
            bin_edges=torch.linspace(-1, 1, asked.bins + 1, dtype=torch.float64),
        )

    def figures(self) -> dict[str, float | int]:
        """All that is one number, by name: `pd.DataFrame({"a": a.figures(), "b": b.figures()}).T` compares two.

        `mean_p95_abs_cos` is `mean_percentile_abs_cos[95]`, and so for each percentile.
        """
        by_p = {f"mean_p{p:g}_abs_cos": v for p, v in self.mean_percentile_abs_cos.items()}
        names = ("mean_abs_cos", "rms_cos", "welch_bound", "effective_dim", "n_zero")
        sizes = {"n_features": self.n_features, "d": self.d}
        rest = {name: getattr(self, name) for name in names}
        return {**sizes, "mean_max_abs_cos": self.mean_max_abs_cos, **by_p, **rest}

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


@dataclass(frozen=True)
class _Moments:
    trace: float  # sum of ||u||², which are 1 or 0
    square: float  # sum of cos² over ordered pairs, a direction with itself included
    off_diagonal: float  # and not included
    n_zero: int  # directions of length 0


def _moments(unit: Float[Tensor, "n d"]) -> _Moments:
    """Sums of cos² over all pairs from the d by d matrix sum u u^T: ||U U^T||² = ||U^T U||². In float64, block-wise."""
    n, d = unit.shape
    # Many more directions than dimensions cannot be orthogonal (Welch), so that nothing cancels in the difference below
    # and blocks may be multiplied as they are: a tenth of the whole time at 16,384 directions in float64.
    crowded = n > 4 * d
    trace, fourth, n_zero = (torch.zeros((), dtype=torch.float64, device=unit.device) for _ in range(3))
    inner = torch.zeros(d, d, dtype=torch.float64, device=unit.device)
    for block in unit.split(max(1, 2**19 // d)):
        if crowded:
            inner += (block.T @ block).double()
        block = block.double()
        if not crowded:
            inner.addmm_(block.T, block)
        length_sq = block.square().sum(1)
        trace += length_sq.sum()
        fourth += length_sq.square().sum()
        n_zero += (length_sq == 0).sum()
    square = inner.square().sum()
    # Between orthogonal directions the difference is rounding only, and may be negative.
    return _Moments(trace.item(), square.item(), max(0.0, (square - fourth).item()), int(n_zero.item()))
