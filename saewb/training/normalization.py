"""The units training happens in, and the way back: an exported SAE reads and writes the model's own activations.

    none           as they are
    constant       x' = f x,         f = sqrt(d) / mean ||x||           (one number per point, estimated once)
    centered        x' = f (x - m),   m = mean x, f = sqrt(d) / mean ||x - m||
    whitened       x' = (x - m) M,   M from the covariance: `saewb.training.whitening`
    layer_norm, constant_norm        per token, as the normalization of `SAEConfig`

The first four are folded into the weights at export; the others stay with the SAE as its `normalization`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.sae.activation_functions import denormalized, normalized
from saewb.sae.config import TokenNormalization
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE, replace_config
from saewb.training.config import Normalization
from saewb.training.whitening import Whitening, unwhitened, whitened, whitening

AnySAE = Union[SAE, PursuitSAE]


@dataclass(frozen=True, eq=False)
class Units:
    """How activations of one point become what is trained on, and back."""

    factor: float = 1.0  # multiplies activations
    mean: Float[Tensor, " d"] | None = None  # subtracted before, in the model's units
    normalization: TokenNormalization = "none"  # instead of both: per token
    whitening: Whitening | None = None  # after the mean, instead of the factor

    def snapshot(self) -> dict[str, Any]:
        """As plain values and tensors on the host."""
        kept = {"factor": self.factor, "mean": _host(self.mean), "normalization": self.normalization}
        white = self.whitening
        return kept if white is None else {**kept, "matrix": _host(white.matrix), "inverse": _host(white.inverse)}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], device: torch.device) -> Units:
        """From a snapshot."""
        names = [name for name in ("mean", "matrix", "inverse") if saved.get(name) is not None]
        tensors = {name: saved[name].to(device, torch.float32) for name in names}
        white = Whitening(tensors["matrix"], tensors["inverse"]) if "matrix" in tensors else None
        return cls(saved["factor"], tensors.get("mean"), saved["normalization"], white)

    def apply(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Activations in training units."""
        x = normalized(x, self.normalization)
        x = x if self.mean is None else x - self.mean
        if self.whitening is not None:
            return x @ self.whitening.matrix
        return x if self.factor == 1 else x * self.factor

    def undo(self, y: Float[Tensor, "tokens d"], x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """What was written in training units, in the model's; `x` is what was read, in the model's (for its scale)."""
        y = (
            denormalized(y / self.factor, x, self.normalization)
            if self.whitening is None
            else y @ self.whitening.inverse
        )
        return y if self.mean is None else y + self.mean


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", copy=True)


def estimated(point: str, batches: Iterable[Float[Tensor, "tokens d"]], *, centered: bool) -> tuple[float, Tensor]:
    """`sqrt(d) / mean ||x||` (centered: of `||x - mean||`) and the mean of `x`, over these batches, in float64 sums.

    Raises:
        ValueError: if that length is 0.
        FloatingPointError: if activations are not finite.
    """
    batches = list(batches)
    n = sum(map(len, batches))
    mean = sum(x.double().sum(0) for x in batches) / n
    lengths = sum(((x - mean.to(x.dtype)) if centered else x).norm(dim=1).double().sum() for x in batches) / n
    if not math.isfinite(lengths):
        fix = "load_model(..., torch.bfloat16), where the model ran in float16"
        raise FloatingPointError(explain(f"activations at {point!r} are not finite.", want="finite numbers", fix=fix))
    if not float(lengths) > 0:
        raise ValueError(explain(f"no length to normalize by at {point!r}: all {n} tokens are the same.", want="data"))
    return batches[0].shape[1] ** 0.5 / float(lengths), mean.float()


def from_estimates(normalization: Normalization, factor: float, mean: Float[Tensor, " d"]) -> Units:
    """The units that a normalization means, given a point's estimates."""
    if normalization in ("layer_norm", "constant_norm"):
        return Units(normalization=normalization)
    if normalization == "none":
        return Units()
    return Units(factor, mean if normalization == "centered" else None)


def whitening_units(
    point: str, batches: Sequence[Float[Tensor, "tokens d"]], mean: Float[Tensor, " d"], shrinkage: float
) -> Units:
    """The units of whitened activations, estimated on these batches."""
    return Units(mean=mean, whitening=whitening(point, batches, mean, shrinkage))


@torch.no_grad()
def to_model(sae: AnySAE, read: Units, write: Units) -> AnySAE:
    """An SAE in training units, made to read and write the model's own: a new one, with unit decoder rows (whitened
    top-k ones excepted: `unwhitened`).

    With u(x) = f (x - m) on each side, `W_enc *= f_in; W_dec, b_dec /= f_out`, then the means: added to b_dec where it
    is tied; else the read mean becomes a `b_pre` of its own (folding it into b_enc would lose digits) and the written
    one is added to b_dec.
    """
    if read.normalization != "none":
        return (
            replace_config(sae, normalization=read.normalization)
            if isinstance(sae, SAE)
            else _pursuit(sae, normalization=read.normalization)
        )
    if isinstance(sae, PursuitSAE):
        moved = sae.fold_scaling(read.factor)
        moved.b_dec.add_(0 if read.mean is None else read.mean.to(moved.device))
        return moved
    if read.whitening is not None:
        moved = unwhitened(sae, read.whitening, write.whitening)
    else:
        moved = sae.fold_scaling(read.factor, write.factor).fold_decoder_norm()
    return moved if read.mean is None else _shifted(moved, read.mean.to(sae.device), write.mean.to(sae.device))


def _shifted(sae: SAE, read: Tensor, write: Tensor) -> SAE:
    tensors = {name: p.detach() for name, p in sae.named_parameters()}
    if sae.cfg.pre_bias == "tied" and not sae.cfg.skip:
        return SAE.from_tensors(sae.cfg, {**tensors, "b_dec": tensors["b_dec"] + write})
    tensors["b_pre"] = read + (tensors["b_dec"] if sae.cfg.pre_bias == "tied" else 0)
    tensors["b_dec"] = tensors["b_dec"] + write - (read @ tensors["W_skip"] if sae.cfg.skip else 0)
    return SAE.from_tensors(replace(sae.cfg, pre_bias="own"), tensors)


@torch.no_grad()
def to_training(sae: AnySAE, read: Units, write: Units) -> AnySAE:
    """The inverse of `to_model`, up to row lengths: an SAE that reads the model's units, made to read training units.

    Raises:
        ValueError: if it has another scale per token than the units, or a mean has to leave a tied SAE with skip.
    """
    normalization = sae.cfg.normalization
    if normalization != read.normalization:
        what = f"{sae!r} has normalization={normalization!r}, training has {read.normalization!r}."
        raise ValueError(explain(what, want="the same", fix=f"TrainConfig(..., normalization={normalization!r})"))
    if normalization != "none":
        return (
            replace_config(sae, normalization="none") if isinstance(sae, SAE) else _pursuit(sae, normalization="none")
        )
    if isinstance(sae, SAE) and sae.cfg.pre_bias == "own":
        sae = _pre_bias_folded(sae)
    if read.mean is not None:
        sae = _unshifted(sae, read.mean.to(sae.device), write.mean.to(sae.device))
    if read.whitening is not None:
        return whitened(sae, read.whitening, write.whitening)
    if isinstance(sae, PursuitSAE):
        return sae.fold_scaling(1 / read.factor)
    return sae.fold_scaling(1 / read.factor, 1 / write.factor).fold_decoder_norm()


def _unshifted(sae: AnySAE, read: Tensor, write: Tensor) -> AnySAE:
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


def _pre_bias_folded(sae: SAE) -> SAE:
    tensors = {name: p.detach().clone() for name, p in sae.named_parameters()}
    tensors["b_enc"] -= tensors.pop("b_pre") @ tensors["W_enc"]
    return SAE.from_tensors(replace(sae.cfg, pre_bias="none"), tensors)


def _pursuit(sae: PursuitSAE, normalization: TokenNormalization) -> PursuitSAE:
    return PursuitSAE.from_tensors(replace(sae.cfg, normalization=normalization), dict(sae.named_parameters()))
