"""Figures per latent that add up: histogram, firing by position, sum. Exact whatever the batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_BINS = 64
_SMALLEST = -40  # exponent of a bin's width before a latent has fired


class Histograms:
    """A histogram of |activation| for each latent, in up to 64 bins whose width is a power of two.

    Bin b of latent i counts `b * 2**e_i <= |value| < (b + 1) * 2**e_i`, e_i the least exponent for which the largest
    value so far fits. When a larger one comes, pairs of bins are added up. As floor(floor(x) / 2) = floor(x / 2), the
    result is that of all values at once. The narrowest bins are 2**-40 wide.

    Example:
        >>> one = Histograms(1); one.update(torch.tensor([0, 0, 0]), torch.tensor([1.0, 3.0, 63.0]))
        >>> one.exponent.tolist(), one.counts[0].nonzero()[:, 0].tolist()
        ([0], [1, 3, 63])
        >>> one.update(torch.tensor([0]), torch.tensor([64.0]))
        >>> one.exponent.tolist(), one.counts[0].nonzero()[:, 0].tolist()
        ([1], [0, 1, 31, 32])
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.exponent = torch.full((d_sae,), _SMALLEST, dtype=torch.int32, device=device)
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int64, device=device)

    def update(self, latent: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> None:
        """Count these."""
        size = value.abs().float()
        needed = torch.frexp(size).exponent - 6  # size < 2**frexp, and 64 bins are 2**6
        largest = self.exponent.clone().scatter_reduce_(0, latent, needed.to(torch.int32), "amax")
        self._widen(largest)
        bins = torch.ldexp(size, -self.exponent[latent]).long().clamp_(max=N_BINS - 1)
        self.counts.view(-1).index_add_(0, latent * N_BINS + bins, torch.ones_like(bins))

    def merge(self, exponent: Tensor, counts: Tensor) -> None:
        """Add what another one has counted."""
        other = Histograms(0)
        other.exponent, other.counts = exponent.clone(), counts.clone()
        largest = torch.maximum(self.exponent, exponent)
        self._widen(largest)
        other._widen(largest)
        self.counts = self.counts + other.counts

    def _widen(self, exponent: Tensor) -> None:
        which = (exponent > self.exponent).nonzero()[:, 0]
        if len(which):
            shift = (exponent[which] - self.exponent[which]).clamp(max=6).long()
            bins = torch.arange(N_BINS, device=which.device) >> shift[:, None]
            self.counts[which] = torch.zeros_like(self.counts[which]).scatter_add_(1, bins, self.counts[which])
            self.exponent[which] = exponent[which]


class Counts:
    """Histogram, sum, and number of firings by position of each latent.

    Positions are counted in groups: 0, 1, 2-3, 4-7, 8-15, ... Sums are in float64 and so depend on the batches by its
    rounding; everything else is integers.
    """

    def __init__(self, d_sae: int, ctx_len: int, device: torch.device | str = "cpu") -> None:
        self.histograms = Histograms(d_sae, device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.group = position_group(torch.arange(ctx_len, device=device))
        self.n_groups = int(self.group[-1]) + 1
        self.by_position = torch.zeros(d_sae, self.n_groups, dtype=torch.int64, device=device)
        self.n_by_position = torch.zeros(self.n_groups, dtype=torch.int64, device=device)

    def update(self, latent: Tensor, value: Tensor, place: Tensor, plain: Tensor) -> None:
        """Count firings: `place` is each one's position in its row; `plain [rows, ctx]` the tokens that count."""
        self.n_by_position.index_add_(0, self.group, plain.sum(0))
        if len(latent):
            self.histograms.update(latent, value)
            self.total.index_add_(0, latent, value.double())
            at = latent * self.n_groups + self.group[place]
            self.by_position.view(-1).index_add_(0, at, torch.ones_like(at))

    def tensors(self) -> dict[str, Tensor]:
        """All it keeps, by name."""
        return {
            "exponent": self.histograms.exponent,
            "counts": self.histograms.counts,
            "total": self.total,
            "by_position": self.by_position,
            "n_by_position": self.n_by_position,
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; copied."""
        at = {k: t.to(self.total.device, copy=True) for k, t in tensors.items()}
        self.histograms.exponent, self.histograms.counts = at["exponent"], at["counts"]
        self.total, self.by_position, self.n_by_position = at["total"], at["by_position"], at["n_by_position"]

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what another one has counted."""
        self.histograms.merge(tensors["exponent"], tensors["counts"])
        self.total = self.total + tensors["total"]
        self.by_position = self.by_position + tensors["by_position"]
        self.n_by_position = self.n_by_position + tensors["n_by_position"]


def position_group(place: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """0 for 0, 1 for 1, 2 for 2-3, 3 for 4-7, ..."""
    return torch.frexp(place.double()).exponent.long()
