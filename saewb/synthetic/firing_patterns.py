"""Firing probabilities and magnitudes of features, and independent draws of their firings."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import float64

# -- probabilities ---------------------------------------------------------------------------------------------------


def constant(n_features: int, probability: float = 0.01) -> Float[Tensor, " features"]:
    """Equal firing probabilities for all features.

    Args:
        n_features: how many.
        probability: firings per sample, 0..1.

    Returns:
        Firings per sample of each feature.

    Raises:
        ValueError: if the probability is not in 0..1.

    Example:
        >>> constant(2, 0.25)
        tensor([0.2500, 0.2500])
    """
    _check_range(probability, probability)
    return torch.full((n_features,), float(probability))


def zipfian(
    n_features: int, exponent: float = 1.0, highest: float = 0.3, lowest: float = 0.01
) -> Float[Tensor, " features"]:
    """Firing probabilities that fall with the rank by Zipf's law, from `highest` to `lowest`.

        p_r = lowest + (highest - lowest) (r^-e - n^-e) / (1 - n^-e),    r = 1..n

    Args:
        n_features: how many.
        exponent: e; larger is steeper.
        highest: of the first, 0..1.
        lowest: of the last, 0..highest.

    Returns:
        Firings per sample of each feature, falling.

    Raises:
        ValueError: if it is not 0 <= lowest <= highest <= 1.

    Example:
        >>> zipfian(3, highest=0.3, lowest=0.1)
        tensor([0.3000, 0.1500, 0.1000])
    """
    _check_range(lowest, highest)
    rank = torch.arange(1, n_features + 1, dtype=torch.float64).pow(-exponent)
    span = rank[0] - rank[-1]
    share = (rank - rank[-1]) / span if span > 0 else torch.ones_like(rank)
    return (lowest + (highest - lowest) * share).float()


def linear(n_features: int, highest: float = 0.3, lowest: float = 0.01) -> Float[Tensor, " features"]:
    """Firing probabilities that fall linearly from `highest` to `lowest`.

    Args:
        n_features: how many.
        highest: probability of the first, 0..1.
        lowest: probability of the last, 0..highest.

    Returns:
        Firings per sample of each feature.

    Raises:
        ValueError: if it is not 0 <= lowest <= highest <= 1.

    Example:
        >>> linear(3, 0.3, 0.1)
        tensor([0.3000, 0.2000, 0.1000])
    """
    _check_range(lowest, highest)
    return torch.linspace(highest, lowest, n_features)


def random(n_features: int, highest: float = 0.5, lowest: float = 0.01, *, seed: int = 0) -> Float[Tensor, " features"]:
    """Firing probabilities drawn uniformly from `lowest..highest`.

    Args:
        n_features: how many.
        highest: largest probability, 0..1.
        lowest: smallest probability, 0..highest.
        seed: of the draw.

    Returns:
        Firings per sample of each feature.

    Raises:
        ValueError: if it is not 0 <= lowest <= highest <= 1.

    Example:
        >>> bool(((p := random(50)) > 0.01).all() and (p < 0.5).all())
        True
    """
    _check_range(lowest, highest)
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n_features, generator=rng) * (highest - lowest) + lowest


def _check_range(lowest: float, highest: float) -> None:
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(explain(f"got probabilities from {lowest} to {highest}.", want="0 <= lowest <= highest <= 1"))


# -- magnitudes ------------------------------------------------------------------------------------------------------

Shape = Literal["constant", "rectified_normal", "folded_normal", "exponential"]


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Distribution of a feature's activation where it fires; never below 0.

        constant:          mean
        rectified_normal:  max(mean + std * N(0, 1), 0): its expectation is higher; a 0 counts as not firing
        folded_normal:     |mean + std * N(0, 1)|
        exponential:       mean * Exp(1)

    `std` is only used by the two normal shapes. Tensors set magnitudes that differ by feature: `torch.linspace` is the
    "linear" of SAELens.

    Raises:
        ValueError: for another shape, or values below 0.
    """

    shape: Shape = "constant"
    """Shape of the distribution."""
    mean: float | Float[Tensor, " features"] = 1.0
    """Mean, of all features or of each."""
    std: float | Float[Tensor, " features"] = 0.0
    """Standard deviation before rectifying or folding, of all features or of each."""

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            want = "one of " + ", ".join(map(repr, get_args(Shape)))
            raise ValueError(explain(f"Magnitudes got shape={self.shape!r}.", want=want))
        for name in ("mean", "std"):
            if not isinstance(value := getattr(self, name), (int, float, Tensor)):
                raise ValueError(explain(f"Magnitudes got {name}={reprlib.repr(value)}.", want="a number, or a tensor"))
            if bool((torch.as_tensor(getattr(self, name)) < 0).any()):
                raise ValueError(explain(f"Magnitudes got a {name} below 0.", want="0 or more"))

    def sample(self, features: Int[Tensor, " fired"], generator: torch.Generator) -> Float[Tensor, " fired"]:
        """Draw a magnitude for each firing, by its feature."""
        mean, std = (_per_firing(value, features) for value in (self.mean, self.std))
        like = {"generator": generator, "device": features.device}
        if self.shape == "constant":
            return mean.clone()
        if self.shape == "exponential":
            # -log of a uniform number in (0, 1]
            return mean * -torch.log1p(-torch.rand(len(features), **like))
        normal = mean + std * torch.randn(len(features), **like)
        return normal.abs() if self.shape == "folded_normal" else normal.relu()


def _per_firing(value: float | Tensor, features: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(features.device)[features]
    return torch.full((len(features),), float(value), device=features.device)


# -- firings ---------------------------------------------------------------------------------------------------------


def independent(
    probability: Float[Tensor, " features"], n_samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"]]:
    """Draw firings independently for each feature and sample: (samples, features), sorted by sample.

    The number of firings of each feature is drawn first (binomial), then their samples, without replacement: exact, and
    in time and memory of the firings. Features that fire in more than a quarter of samples are drawn for each sample.
    """
    is_frequent = probability > 0.25
    keys = [_draw_rare(probability, (~is_frequent).nonzero()[:, 0], n_samples, generator)]
    for frequent in is_frequent.nonzero()[:, 0].split(max(1, 2**24 // max(n_samples, 1))):
        uniform = torch.rand(n_samples, len(frequent), generator=generator, device=probability.device)
        samples, column = (uniform < probability[frequent]).nonzero(as_tuple=True)
        keys.append(samples * len(probability) + frequent[column])
    key = torch.cat(keys).sort().values
    return key // len(probability), key % len(probability)


def _draw_rare(probability: Tensor, rare: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    """Firings of rare features as keys sample * n_features + feature, sorted."""
    n = torch.full((len(rare),), float(n_samples), device=rare.device)
    counts = torch.binomial(n, probability[rare].to(n), generator=generator).long()
    features = rare.repeat_interleave(counts)
    n_features = len(probability)

    def draw(features: Tensor) -> Tensor:
        samples = torch.randint(0, n_samples, (len(features),), generator=generator, device=features.device)
        return samples * n_features + features

    key = draw(features).sort().values if len(features) else features
    while True:  # a sample drawn twice for one feature is drawn again: all sets of samples stay equally likely
        is_duplicate = torch.zeros_like(key, dtype=torch.bool)
        is_duplicate[1:] = key[1:] == key[:-1]
        duplicates = key[is_duplicate] % n_features
        if len(duplicates) == 0:
            return key
        key = torch.cat([key[~is_duplicate], draw(duplicates)]).sort().values


def normal_threshold(probability: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
    """Threshold that a standard normal number exceeds with this probability: sqrt(2) erfinv(1 - 2 p)."""
    return (math.sqrt(2) * torch.erfinv(1 - 2 * float64(probability))).float().to(probability.device)
