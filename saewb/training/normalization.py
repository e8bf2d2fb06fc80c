"""Normalization of training activations, and its inverse, which is folded into an exported SAE.

    none           x' = x
    constant       x' = f x,         f = sqrt(d) / mean ||x||           (one number per point, estimated once)
    centered       x' = f (x - m),   m = mean x, f = sqrt(d) / mean ||x - m||
    whitened       x' = (x - m) M,   M = C_s^(-1/2),   C_s = (1 - s) C + s tr(C) / d I,     C: covariance of x
    layer_norm, constant_norm        per token, as the normalization of `SAEConfig`

The first four are folded into the weights at export; the others stay with the SAE as its `normalization`.

Whitening gives all directions the same variance, so that the loss no longer favors the largest. M is the symmetric
root (ZCA): x' is as close to x as whitened activations can be. With shrinkage s = 0 the covariance of x' is the
identity; a direction of C with eigenvalue c has the variance c / ((1 - s) c + s tr(C) / d), so that directions of no
variance are not amplified. All in float64, from one pass over the tokens of the estimate.

References:
    Saraswatula and Klindt 2025, arXiv:2511.13981 (whitening before SAEs); Ledoit and Wolf 2004 (shrinkage to
    tr(C) / d I).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import float64
from saewb.sae.activation_functions import denormalized, normalized
from saewb.sae.config import TokenNormalization
from saewb.sae.crosscoder import CrossCoderSAE
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.training.config import Normalization

AnySAE = Union[SAE, PursuitSAE, CrossCoderSAE]
_MIN_VARIANCE = 1e-12  # relative to the largest eigenvalue; below it a direction counts as constant


@dataclass(frozen=True, eq=False)
class Whitening:
    """Whitening matrix of one point and its inverse; the mean is handled separately."""

    matrix: Float[Tensor, "d d"]
    """z = (x - m) @ matrix."""
    inverse: Float[Tensor, "d d"]
    """x = z @ inverse + m."""


@dataclass(frozen=True, eq=False)
class ActivationNormalizer:
    """Normalization of the activations of one point, and its inverse."""

    factor: float = 1.0
    """Factor f that multiplies activations."""
    mean: Float[Tensor, " d"] | None = None
    """Mean subtracted before scaling, in the model's units."""
    normalization: TokenNormalization = "none"
    """Normalization per token, in place of factor and mean."""
    whitening: Whitening | None = None
    """Whitening after the mean is subtracted, in place of the factor."""

    @classmethod
    def from_estimates(
        cls, normalization: Normalization, factor: float, mean: Float[Tensor, " d"]
    ) -> ActivationNormalizer:
        """Normalizer of a point from its estimates, for any normalization but "whitened"."""
        if normalization in ("layer_norm", "constant_norm"):
            return cls(normalization=normalization)
        if normalization == "none":
            return cls()
        return cls(factor, mean if normalization == "centered" else None)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors on the host, for `from_state`."""
        state = {"factor": self.factor, "mean": _to_host(self.mean), "normalization": self.normalization}
        if self.whitening is not None:
            state |= {"matrix": _to_host(self.whitening.matrix), "inverse": _to_host(self.whitening.inverse)}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> ActivationNormalizer:
        """Restore a normalizer from its `state()`."""
        names = [name for name in ("mean", "matrix", "inverse") if state.get(name) is not None]
        tensors = {name: state[name].to(device, torch.float32) for name in names}
        matrices = Whitening(tensors["matrix"], tensors["inverse"]) if "matrix" in tensors else None
        return cls(state["factor"], tensors.get("mean"), state["normalization"], matrices)

    def normalize(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Convert activations from the model's units to training units."""
        x = normalized(x, self.normalization)
        x = x if self.mean is None else x - self.mean
        if self.whitening is not None:
            return x @ self.whitening.matrix
        return x if self.factor == 1 else x * self.factor

    def denormalize(self, y: Float[Tensor, "tokens d"], x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Convert an output to the model's units; `x` is the input in the model's units, for its scale per token."""
        if self.whitening is None:
            y = denormalized(y / self.factor, x, self.normalization)
        else:
            y = y @ self.whitening.inverse
        return y if self.mean is None else y + self.mean


@dataclass(frozen=True, eq=False)
class JointNormalizer:
    """Normalization of the activations of several points side by side, each by its own: factors and means only."""

    parts: Mapping[str, tuple[ActivationNormalizer, int]]
    """Normalizer and width of each point, in order."""

    @classmethod
    def of(cls, parts: Mapping[str, tuple[ActivationNormalizer, int]]) -> ActivationNormalizer | JointNormalizer:
        """The normalizer of these points; of a single one its own."""
        return next(iter(parts.values()))[0] if len(parts) == 1 else cls(parts)

    def normalize(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Convert activations from the model's units to training units."""
        blocks = x.split([width for _, width in self.parts.values()], dim=1)
        parts = zip(self.parts.values(), blocks, strict=True)
        return torch.cat([normalizer.normalize(block) for (normalizer, _), block in parts], dim=1)

    def denormalize(self, y: Float[Tensor, "tokens d"], x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Convert an output to the model's units; `x` is not used."""
        mean, scale = self.mean_and_scale(y.device)
        return y / scale + mean

    def mean_and_scale(self, device: torch.device | str = "cpu") -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean and factor of each coordinate: `normalize(x) = scale (x - mean)`."""
        means = [torch.zeros(d) if n.mean is None else n.mean.cpu() for n, d in self.parts.values()]
        scales = [torch.full((d,), float(n.factor)) for n, d in self.parts.values()]
        return torch.cat(means).to(device), torch.cat(scales).to(device)


AnyNormalizer = Union[ActivationNormalizer, JointNormalizer]


def _to_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", copy=True)


def estimate_factor_and_mean(
    point: str, batches: Iterable[Float[Tensor, "tokens d"]], *, centered: bool
) -> tuple[float, Tensor]:
    """`sqrt(d) / mean ||x||` (centered: of `||x - mean||`) and the mean of `x`, over these batches, in float64 sums.

    Raises:
        ValueError: if that length is 0.
        FloatingPointError: if activations are not finite.
    """
    batches = list(batches)
    n = sum(map(len, batches))
    mean = sum(float64(x).sum(0) for x in batches) / n
    lengths = sum(float64((x - mean.to(x) if centered else x).norm(dim=1)).sum() for x in batches) / n
    if not math.isfinite(lengths):
        fix = "load_model(..., torch.bfloat16), where the model ran in float16"
        raise FloatingPointError(explain(f"activations at {point!r} are not finite.", want="finite numbers", fix=fix))
    if not float(lengths) > 0:
        raise ValueError(explain(f"no length to normalize by at {point!r}: all {n} tokens are the same.", want="data"))
    return batches[0].shape[1] ** 0.5 / float(lengths), mean.float().to(batches[0].device)


def estimate_whitening(
    point: str, batches: Iterable[Float[Tensor, "tokens d"]], mean: Float[Tensor, " d"], shrinkage: float
) -> Whitening:
    """Compute the matrices that whiten these activations.

    Args:
        point: name of the point, for messages.
        batches: in the model's units; read once.
        mean: of all of them.
        shrinkage: s, 0 to 1.

    Raises:
        ValueError: if some direction does not vary and `shrinkage` is 0.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])
        >>> z = (x - x.mean(0)) @ estimate_whitening("x", [x], x.mean(0), 0.0).matrix
        >>> torch.allclose(z.T @ z / 1000, torch.eye(3), atol=1e-5)
        True
    """
    products, n = torch.zeros((), dtype=torch.float64), 0
    for x in batches:
        centered = float64(x) - float64(mean)
        products, n = products.to(centered.device) + centered.T @ centered, n + len(x)
    covariance = products / n
    d = len(covariance)
    values, axes = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.trace() / d
    flat = int((values <= _MIN_VARIANCE * values.max()).sum())
    if flat:
        what = f"{flat} of {d} directions of {point!r} do not vary over {n} tokens, and shrinkage={shrinkage:g}."
        fix = "TrainConfig(..., normalization='whitened', shrinkage=1e-3)"
        raise ValueError(explain(what, want=f"more than {d} tokens, or a shrinkage above 0", fix=fix))
    root = values.sqrt()
    return Whitening(*((scaled @ axes.T).float().to(mean.device) for scaled in (axes / root, axes * root)))


@torch.no_grad()
def to_model(sae: AnySAE, read: AnyNormalizer, write: AnyNormalizer) -> AnySAE:
    """Convert an SAE from training units to the model's: a new SAE with unit decoder rows.

    A crosscoder keeps its weights, and gets names, mean and scale of its points.

    Whitened top-k SAEs keep other row lengths, see `_unwhiten`.

    With u(x) = f (x - m) on each side, `W_enc *= f_in; W_dec, b_dec /= f_out`, then the means: added to b_dec where it
    is tied; else the mean of the input becomes a separate `b_pre` (folding it into b_enc would lose digits) and that of
    the output is added to b_dec.
    """
    if isinstance(sae, CrossCoderSAE):
        mean, scale = read.mean_and_scale(sae.device)
        cfg = replace(sae.cfg, points=tuple(read.parts))
        return CrossCoderSAE.from_tensors(cfg, {**sae.tensors(), "mean": mean, "scale": scale})
    if read.normalization != "none":
        return sae.with_config(normalization=read.normalization)
    if isinstance(sae, PursuitSAE):
        folded = sae.fold_scaling(read.factor)
        folded.b_dec.add_(0 if read.mean is None else read.mean.to(folded.device))
        return folded
    if read.whitening is not None:
        folded = _unwhiten(sae, read.whitening, write.whitening)
    else:
        folded = sae.fold_scaling(read.factor, write.factor).fold_decoder_norm()
    return folded if read.mean is None else _shift(folded, read.mean.to(sae.device), write.mean.to(sae.device))


def _shift(sae: SAE, read: Tensor, write: Tensor) -> SAE:
    tensors = {name: p.detach() for name, p in sae.named_parameters()}
    if sae.cfg.pre_bias == "tied" and not sae.cfg.skip:
        return SAE.from_tensors(sae.cfg, {**tensors, "b_dec": tensors["b_dec"] + write})
    tensors["b_pre"] = read + (tensors["b_dec"] if sae.cfg.pre_bias == "tied" else 0)
    tensors["b_dec"] = tensors["b_dec"] + write - (read @ tensors["W_skip"] if sae.cfg.skip else 0)
    return SAE.from_tensors(replace(sae.cfg, pre_bias="own"), tensors)


@torch.no_grad()
def to_training(sae: AnySAE, read: AnyNormalizer, write: AnyNormalizer) -> AnySAE:
    """Convert an SAE from the model's units to training units: the inverse of `to_model`, up to row lengths.

    Raises:
        ValueError: if its normalization per token is another one, or for a mean with a tied SAE that has a skip matrix.
    """
    if isinstance(read, JointNormalizer):
        return _rescaled(sae, *read.mean_and_scale(sae.device)) if isinstance(sae, CrossCoderSAE) else sae
    normalization = sae.cfg.normalization
    if normalization != read.normalization:
        what = f"{sae!r} has normalization={normalization!r}, training has {read.normalization!r}."
        raise ValueError(explain(what, want="the same", fix=f"TrainConfig(..., normalization={normalization!r})"))
    if normalization != "none":
        return sae.with_config(normalization="none")
    if isinstance(sae, SAE) and sae.cfg.pre_bias == "own":
        sae = _fold_pre_bias(sae)
    if read.mean is not None:
        sae = _unshift(sae, read.mean.to(sae.device), write.mean.to(sae.device))
    if read.whitening is not None:
        return _whiten(sae, read.whitening, write.whitening)
    if isinstance(sae, PursuitSAE):
        return sae.fold_scaling(1 / read.factor)
    return sae.fold_scaling(1 / read.factor, 1 / write.factor).fold_decoder_norm()


def _rescaled(sae: CrossCoderSAE, mean: Tensor, scale: Tensor) -> CrossCoderSAE:
    """The same crosscoder with another mean and scale of its input."""
    ratio = sae.scale / scale
    tensors = {
        **{name: p.detach().clone() for name, p in sae.named_parameters()},
        "W_enc": sae.W_enc * ratio[:, None],
        "b_enc": sae.b_enc + (sae.scale * (mean - sae.mean)) @ sae.W_enc,
        "W_dec": sae.W_dec / ratio,
        "b_dec": sae.b_dec / ratio + (sae.mean - mean) * scale,
        "mean": mean,
        "scale": scale,
    }
    return CrossCoderSAE.from_tensors(sae.cfg, tensors)


def _unshift(sae: AnySAE, read: Tensor, write: Tensor) -> AnySAE:
    tensors = {name: p.detach().clone() for name, p in sae.named_parameters()}
    skip = getattr(sae.cfg, "skip", False)
    if sae.cfg.pre_bias == "tied":
        if skip:
            what = f"a mean cannot be taken out of {sae!r}, tied and with a skip matrix."
            raise ValueError(explain(what, want="normalization 'none' or 'constant'"))
        return type(sae).from_tensors(sae.cfg, {**tensors, "b_dec": tensors["b_dec"] - write})
    tensors["b_enc"] += read @ tensors["W_enc"]
    tensors["b_dec"] += (read @ tensors["W_skip"] if skip else 0) - write
    return SAE.from_tensors(sae.cfg, tensors)


def _fold_pre_bias(sae: SAE) -> SAE:
    tensors = {name: p.detach().clone() for name, p in sae.named_parameters()}
    tensors["b_enc"] -= tensors.pop("b_pre") @ tensors["W_enc"]
    return SAE.from_tensors(replace(sae.cfg, pre_bias="none"), tensors)


def _unwhiten(sae: SAE, read: Whitening, write: Whitening) -> SAE:
    """Fold whitening into an SAE, which then computes the same function of centered activations.

        W_enc' = M_r W_enc;   W_dec' = W_dec M_w^-1;   W_skip' = M_r W_skip M_w^-1
        b_dec' = b_dec M_w^-1;   b_pre' = b_pre M_r^-1

    Rows of W_dec are scaled to unit length unless the activation is top-k, which selects by row lengths in whitened
    units.
    """
    folded = _change_basis(sae, read.matrix, read.inverse, write.inverse)
    return folded if sae.cfg.k is not None else folded.fold_decoder_norm()


def _whiten(sae: SAE, read: Whitening, write: Whitening) -> SAE:
    """The inverse of `_unwhiten`, with unit rows in whitened units, where a top-k SAE then selects latents."""
    folded = _change_basis(sae, read.inverse, read.matrix, write.matrix)
    if sae.cfg.k is None:
        return folded.fold_decoder_norm()
    norm = folded.W_dec.norm(dim=1)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    tensors = {name: p.detach() for name, p in folded.named_parameters()}
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm
    return SAE.from_tensors(folded.cfg, {**tensors, "W_dec": tensors["W_dec"] / norm[:, None]})


@torch.no_grad()
def _change_basis(sae: SAE, reads: Tensor, back: Tensor, writes: Tensor) -> SAE:
    """Multiply W_enc by `reads`, b_pre by `back`, decoder side by `writes`."""
    old = {name: p.detach() for name, p in sae.named_parameters()}
    reads, back, writes = (float64(m.to(sae.device)) for m in (reads, back, writes))
    new = {"W_enc": reads @ float64(old["W_enc"]), "W_dec": float64(old["W_dec"]) @ writes}
    new["b_dec"] = float64(old["b_dec"]) @ writes
    if "b_pre" in old:
        new["b_pre"] = float64(old["b_pre"]) @ back
    if "W_skip" in old:
        new["W_skip"] = reads @ float64(old["W_skip"]) @ writes
    return SAE.from_tensors(sae.cfg, {**old, **{name: t.to(sae.device, sae.dtype) for name, t in new.items()}})
