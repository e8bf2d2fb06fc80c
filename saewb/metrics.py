"""Reconstruction and sparsity metrics: functions of tensors, and an accumulator over batches.

Every metric takes one row per token. Sums are float64 and about the running mean, so that no precision is lost on
activations far from zero (mean 1e4, standard deviation 1). A latent is active where it is not 0, whatever its sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain

__all__ = ["Reconstruction", "ReconstructionStream", "cosine", "density", "explained_variance", "fvu", "l0", "mse"]

NO_FLOAT64 = {"mps"}
"""Types of device without floats of 64 bits."""


def l0(latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
    """Mean number of active latents per token, 0..d_sae.

        mean over tokens of #{i : latents[i] != 0}

    Negative latents (AbsTopK) count as active.

    Args:
        latents: activations, as from `sae.encode`; only whether they are 0 matters.

    Returns:
        A scalar, in latents per token; unchanged when `latents` is scaled.

    Raises:
        ValueError: if there are no tokens.

    References:
        Cunningham et al. 2023, arXiv:2309.08600.

    Example:
        >>> l0(torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0]])).item()
        1.5
    """
    return density(latents).sum()


def density(latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, " d_sae"]:
    """Fraction of tokens on which each latent is active, 0..1.

        #{t : latents[t, i] != 0} / tokens

    Args:
        latents: activations, as from `sae.encode`; only whether they are 0 matters.

    Returns:
        A number per latent; unchanged when `latents` is scaled.

    Raises:
        ValueError: if there are no tokens.

    References:
        "Feature density" of Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features.

    Example:
        >>> density(torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0]])).tolist()
        [0.0, 0.5, 1.0]
    """
    check_not_empty(len(latents))
    return float64(latents.count_nonzero(0)) / len(latents)


def mse(x: Float[Tensor, "tokens d_in"], recon: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
    """Mean squared length of the error per token: 0 is perfect, a reconstruction of zeros has `mean ||x||^2`.

        mean over tokens of ||x - recon||^2      (summed, not averaged, over coordinates)

    Args:
        x: activations that the SAE reconstructs (a transcoder: predicts), in the model's units.
        recon: its output, in the same units.

    Returns:
        A scalar, in squared units of the activations; c^2 times as large when `x` and `recon` are scaled by c.

    Raises:
        ValueError: if there are no tokens or the shapes differ.

    References:
        Gao et al. 2024, arXiv:2406.04093, section 2.1: the loss of TopK SAEs.

    Example:
        >>> mse(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)).item()
        12.5
    """
    x, recon = _pair(x, recon)
    return (x - recon).square().sum() / len(x)


def fvu(x: Float[Tensor, "tokens d_in"], recon: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean.

        sum ||x - recon||^2 / sum ||x - mean(x)||^2      (mean over tokens, per coordinate)

    Both sums come before the ratio; a constant offset counts as error.

    Args:
        x: activations that the SAE reconstructs, in the model's units (before any input scaling).
        recon: the SAE's reconstruction of `x`, in the same units.

    Returns:
        A scalar, unitless, >= 0; unchanged when `x` and `recon` are scaled together.

    Raises:
        ValueError: if every row of `x` is the same, so that there is no variance to explain; if the shapes differ.

    References:
        Gao et al. 2024, arXiv:2406.04093 ("normalized MSE").

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> fvu(x, x).item(), fvu(x, x.mean(0).expand(2, 2)).item()
        (0.0, 1.0)
    """
    x, recon = _pair(x, recon)
    return (x - recon).square().sum() / _check_variance(_spread(x - x[0]), len(x))


def explained_variance(x: Float[Tensor, "tokens d_in"], recon: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance explained, `1 - fvu`: 1 is perfect, 0 no better than the mean, below 0 worse.

    A constant offset counts as error, as in scikit-learn's `r2_score` and unlike its `explained_variance_score`.

    Args:
        x: activations that the SAE reconstructs, in the model's units.
        recon: the SAE's reconstruction of `x`, in the same units.

    Returns:
        A scalar, unitless, <= 1; unchanged when `x` and `recon` are scaled together.

    Raises:
        ValueError: as `fvu`.

    References:
        1 less the "normalized MSE" of Gao et al. 2024, arXiv:2406.04093.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> explained_variance(x, x).item(), explained_variance(x, x + 1).item()
        (1.0, 0.0)
    """
    return 1 - fvu(x, recon)


def cosine(x: Float[Tensor, "tokens d_in"], recon: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
    """Cosine between activation and reconstruction: 1 is the same direction, 0 is orthogonal.

        mean over tokens with x != 0 of x . recon / (||x|| ||recon||)      (0 where recon is 0)

    Args:
        x: activations that the SAE reconstructs, in the model's units.
        recon: the SAE's reconstruction of `x`.

    Returns:
        A scalar in -1..1; unchanged when either argument is scaled.

    Raises:
        ValueError: if every row of `x` is 0, if there are no tokens, or if the shapes differ.

    References:
        Karvonen et al. 2025, arXiv:2503.09532 (SAEBench): "cossim".

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])).item()
        0.5
    """
    cosines, _, counted = _per_token(*_pair(x, recon))
    return cosines.sum() / _check_directions(counted.sum(), len(x))


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction metrics of some tokens; the first four are the functions of the same name."""

    n_tokens: int
    """Tokens."""
    mse: float
    """Squared units of the activations, per token; 0 is perfect."""
    fvu: float
    """Fraction; 0 is perfect, 1 no better than the mean."""
    explained_variance: float
    """Fraction, 1 - fvu."""
    cosine: float
    """-1..1; 1 is perfect."""
    l2_in: float
    """Mean ||x||, units of the activations."""
    l2_out: float
    """Mean ||recon||, the same units."""
    l2_ratio: float
    """Mean over tokens with x != 0 of ||recon|| / ||x||; 1 is perfect, less is shrinkage."""
    relative_reconstruction_bias: float
    """sum ||recon||^2 / sum x . recon, by which recon has to be divided for the least error: 1 is unbiased, less is
    shrinkage, nan where x . recon is 0 (Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 10)."""


class ReconstructionStream:
    """Accumulator of a `Reconstruction` over batches: equal, up to float64 rounding, to that of all tokens at once.

    Holds 2 d_in + 9 numbers on the device of the first batch, and never waits for the device before `result`.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]]); stream = ReconstructionStream()
        >>> stream.update(x[:1], x[:1] + 1); stream.update(x[1:], x[1:] + 1)
        >>> stream.result().fvu, fvu(x, x + 1).item()
        (2.0, 2.0)
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._origin: Tensor | None = None  # the first row of x
        self._mean: Tensor | None = None  # of x - origin
        self._sums: Tensor | None = None  # see `_reconstruction_sums`

    def update(self, x: Float[Tensor, "tokens d_in"], recon: Float[Tensor, "tokens d_in"]) -> None:
        """Add a batch of tokens, which may be empty.

        Raises:
            ValueError: if the shapes differ from one another or from earlier batches.
        """
        if len(x) or x.shape != recon.shape:
            x, recon = _pair(x, recon)
            self._add(len(x), x[0], (x - x[0]).mean(0), _reconstruction_sums(x, recon))

    def merge(self, other: ReconstructionStream) -> None:
        """Add the tokens of another stream, which is not changed."""
        if other.n_tokens:
            self._add(other.n_tokens, other._origin, other._mean, other._sums)

    def state(self) -> dict[str, Tensor]:
        """The sums so far, by name; empty before the first token."""
        if self.n_tokens == 0:
            return {}
        return {
            "n_tokens": torch.tensor(self.n_tokens),
            "origin": self._origin,
            "mean": self._mean,
            "sums": self._sums,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ReconstructionStream:
        """The stream with that `state()`."""
        stream = cls()
        if state:
            stream._add(int(state["n_tokens"]), state["origin"], state["mean"], state["sums"])
        return stream

    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of `x` over the tokens so far, in float64; a ValueError if there were none."""
        check_not_empty(self.n_tokens)
        return self._origin + self._mean

    def result(self) -> Reconstruction:
        """Metrics of all tokens so far.

        Raises:
            ValueError: if there were none, or if `x` was the same, or 0, on every one of them.
        """
        check_not_empty(self.n_tokens)
        error, spread, cosines, ratios, counted, recon_sq, dot, l2_in, l2_out = self._sums.tolist()
        unexplained = error / _check_variance(spread, self.n_tokens)
        counted = _check_directions(counted, self.n_tokens)
        return Reconstruction(
            n_tokens=self.n_tokens,
            mse=error / self.n_tokens,
            fvu=unexplained,
            explained_variance=1 - unexplained,
            cosine=cosines / counted,
            l2_in=l2_in / self.n_tokens,
            l2_out=l2_out / self.n_tokens,
            l2_ratio=ratios / counted,
            relative_reconstruction_bias=recon_sq / dot if dot else math.nan,
        )

    def _add(self, n: int, origin: Tensor, mean: Tensor, sums: Tensor) -> None:
        if self.n_tokens == 0:
            self.n_tokens, self._origin, self._mean, self._sums = n, origin.clone(), mean.clone(), sums.clone()
            return
        check_size("d_in", len(mean), len(self._mean))
        origin, mean, sums = (t.to(self._mean.device) for t in (origin, mean, sums))
        # Chan, Golub and LeVeque 1979: the spread about the common mean is the sum of the spreads about the two means
        # plus that between these. Sums of squares about 0 would cancel where the mean is large. About one of the rows,
        # the mean of equal rows is exactly 0, so that their spread is.
        shift, share = (origin - self._origin) + (mean - self._mean), n / (self.n_tokens + n)
        self._sums = self._sums + sums
        self._sums[1] += shift.square().sum() * (self.n_tokens * share)
        self.n_tokens, self._mean = self.n_tokens + n, self._mean + shift * share


def has_float64(device: torch.device) -> bool:
    """Whether a device has floats of 64 bits; an Apple GPU has none."""
    return device.type not in NO_FLOAT64


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none: for sums that stay on the device."""
    return torch.float64 if has_float64(device) else torch.float32


def float64(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none."""
    return (x if has_float64(x.device) else x.cpu()).double()


def _pair(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != recon.shape or x.ndim != 2:
        what = f"x has shape {tuple(x.shape)}, recon {tuple(recon.shape)}."
        raise ValueError(explain(what, want="[tokens, d_in], the same for both"))
    check_not_empty(len(x))
    return float64(x), float64(recon.to(x.device))


def _per_token(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and ratio of norms of each token, 0 where they are not defined, and whether it counts (x != 0)."""
    norm, norm_recon = x.norm(dim=1), recon.norm(dim=1)
    counted = norm > 0
    # Each divided by its own norm: the product of two norms may overflow or vanish where neither does.
    unit, unit_recon = (v / torch.where(n > 0, n, 1)[:, None] for v, n in ((x, norm), (recon, norm_recon)))
    ratios = torch.where(counted, norm_recon / torch.where(counted, norm, 1), 0)
    return (unit * unit_recon).sum(1), ratios, counted


def _reconstruction_sums(x: Tensor, recon: Tensor) -> Tensor:
    """Sums over tokens for `ReconstructionStream`: errors, spread, cosines, ratios, counts, dots, norms."""
    cosines, ratios, counted = _per_token(x, recon)
    parts = [(x - recon).square().sum(), _spread(x - x[0]), cosines.sum(), ratios.sum(), float64(counted).sum()]
    norms = [x.norm(dim=1).sum(), recon.norm(dim=1).sum()]
    return torch.stack([*parts, recon.square().sum(), (x * recon).sum(), *norms])


def _spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


def check_not_empty(n_tokens: int) -> None:
    """Raise a ValueError if there are no tokens."""
    if n_tokens == 0:
        raise ValueError(explain("no tokens to measure.", want="at least one row"))


def check_size(name: str, size: int, before: int) -> None:
    """Raise a ValueError if a size differs from that of earlier batches."""
    if size != before:
        raise ValueError(explain(f"a batch has {name}={size}.", want=f"{name}={before}, as the batches before it"))


def _check_variance(spread: Tensor | float, n_tokens: int) -> Tensor | float:
    if spread == 0:
        what = f"all {n_tokens} rows of x are the same: there is no variance to explain."
        raise ValueError(explain(what, want="at least two different rows"))
    return spread


def _check_directions(counted: Tensor | float, n_tokens: int) -> Tensor | float:
    if counted == 0:
        raise ValueError(explain(f"all {n_tokens} rows of x are 0.", want="at least one row with a direction"))
    return counted
