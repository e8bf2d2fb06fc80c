"""Firing patterns: probabilities and magnitudes of features, and independent draws of where they fire."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain

# -- probabilities ---------------------------------------------------------------------------------------------------


def constant(n_features: int, probability: float = 0.01) -> Float[Tensor, " features"]:
    """Every feature fires on this fraction of samples. ValueError if it is not in 0..1.

    Args:
        n_features: how many.
        probability: firings per sample, 0..1.

    Returns:
        The same number for each feature.

    Raises:
        ValueError: if it is not in 0..1.

    Example:
        >>> constant(2, 0.25)
        tensor([0.2500, 0.2500])
    """
    _check_range(probability, probability)
    return torch.full((n_features,), float(probability))


def zipfian(
    n_features: int, exponent: float = 1.0, highest: float = 0.3, lowest: float = 0.01
) -> Float[Tensor, " features"]:
    """Firing probabilities by rank, as words have them: the first feature `highest`, the last `lowest`.

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
    """Firing probabilities that fall evenly from `highest` to `lowest`.

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
    """Firing probabilities drawn evenly from `lowest..highest`.

    Args:
        n_features: how many.
        highest: probability no feature exceeds, 0..1.
        lowest: probability no feature is below, 0..highest.
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
    """How strong a feature is where it fires; never below 0.

        constant:          mean
        rectified_normal:  max(mean + std * N(0, 1), 0): its own mean is higher, and a 0 is as if it did not fire
        folded_normal:     |mean + std * N(0, 1)|
        exponential:       mean * Exp(1)

    `std` is only used by the two normal shapes. For magnitudes that differ by feature, give tensors: `torch.linspace`
    is the "linear" of sae-lens.

    Raises:
        ValueError: for another shape, or values below 0.
    """

    shape: Shape = "constant"
    mean: float | Float[Tensor, " features"] = 1.0
    std: float | Float[Tensor, " features"] = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            want = "one of " + ", ".join(map(repr, get_args(Shape)))
            raise ValueError(explain(f"Magnitudes got shape={self.shape!r}.", want=want))
        for name in ("mean", "std"):
            if bool((torch.as_tensor(getattr(self, name)) < 0).any()):
                raise ValueError(explain(f"Magnitudes got a {name} below 0.", want="0 or more"))

    def sample(self, features: Int[Tensor, " fired"], generator: torch.Generator) -> Float[Tensor, " fired"]:
        """A magnitude for each firing, given which feature it is."""
        mean, std = (_each(value, features) for value in (self.mean, self.std))
        like = {"generator": generator, "device": features.device}
        if self.shape == "constant":
            return mean.clone()
        if self.shape == "exponential":
            # -log of an even number in (0, 1]
            return mean * -torch.log1p(-torch.rand(len(features), **like))
        normal = mean + std * torch.randn(len(features), **like)
        return normal.abs() if self.shape == "folded_normal" else normal.relu()


def _each(value: float | Tensor, features: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(features.device)[features]
    return torch.full((len(features),), float(value), device=features.device)


# -- where features fire -------------------------------------------------------------------------------------------


def independent(
    probability: Float[Tensor, " features"], n_samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"]]:
    """Where features fire, each in every sample with its probability, independently: (samples, features), by sample.

    How often each fires is drawn first (binomial), then in which samples, without replacement: exact, and in time and
    memory of what fires. Features that fire in more than a quarter of samples are drawn sample by sample.
    """
    often = probability > 0.25
    rare = (~often).nonzero()[:, 0]
    keys = [_placed(probability, rare, n_samples, generator)]
    for some in often.nonzero()[:, 0].split(max(1, 2**24 // max(n_samples, 1))):
        drawn = torch.rand(n_samples, len(some), generator=generator, device=probability.device)
        samples, which = (drawn < probability[some]).nonzero(as_tuple=True)
        keys.append(samples * len(probability) + some[which])
    key = torch.cat(keys).sort().values
    return key // len(probability), key % len(probability)


def _placed(probability: Tensor, rare: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    n = torch.full((len(rare),), float(n_samples), device=rare.device)
    counts = torch.binomial(n, probability[rare].to(n), generator=generator).long()
    features = rare.repeat_interleave(counts)
    n_features = len(probability)

    def draw(some: Tensor) -> Tensor:
        samples = torch.randint(0, n_samples, (len(some),), generator=generator, device=some.device)
        return samples * n_features + some

    key = draw(features).sort().values if len(features) else features
    while True:  # a sample drawn twice for one feature is drawn again: that leaves any set of samples equally likely
        twice = torch.zeros_like(key, dtype=torch.bool)
        twice[1:] = key[1:] == key[:-1]
        again = key[twice] % n_features
        if len(again) == 0:
            return key
        key = torch.cat([key[~twice], draw(again)]).sort().values


def normal_threshold(probability: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
    """Above which a standard normal number lies with this probability: sqrt(2) erfinv(1 - 2 p)."""
    return (math.sqrt(2) * torch.erfinv(1 - 2 * probability.double())).float()
