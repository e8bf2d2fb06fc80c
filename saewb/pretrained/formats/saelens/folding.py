"""Fold settings of a SAELens file that `SAE` has no field for into the weights, in float64.

- Gates, decoder norms, a constant factor or a whitening of training inputs: `fold_gate`, `fold_decoder_norms`,
  `fold_factor`, `fold_whitening`. `input_transform` reads factor and whitening from further files of the folder.
- Centered writing weights. TransformerLens can take the mean over d_model out of everything a model with LayerNorms
  writes into its residual stream (`center_writing_weights`). Such a model computes the same, since every LayerNorm
  removes that mean anyway, but its residual stream is `x - mean(x)` where that of the published model is `x`. An SAE
  trained there reads `x - mean(x)`; SAEs of this package subtract the mean (normalization "centered") and add it back,
  so they fit both models. In a file this is `metadata.model_from_pretrained_kwargs.center_writing_weights`, as in
  sae-lens, whose users have to load such a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._tensors import TensorFile, check_shapes, positive, read_object
from saewb.pretrained.formats.saelens.config import Description
from saewb.sae.config import TokenNormalization

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_KWARGS, _FLAG = "model_from_pretrained_kwargs", "center_writing_weights"
# The residual stream and what is written into it; centered writing weights change nothing else.
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed")
# Models with RMSNorms, which do not remove the mean; TransformerLens does not center their weights.
_RMS = re.compile(r"gemma|llama|mi[sx]tral|qwen|olmo|smollm|deepseek|phi-?3|\byi-|gpt-oss|apertus", re.IGNORECASE)


@dataclass(frozen=True)
class Whitening:
    """Whitening of training inputs: z = (x - mean) @ matrix, x = z @ inverse + mean."""

    mean: Float[Tensor, " d_in"]
    """Mean of the activations."""
    matrix: Float[Tensor, "d_in d_in"]
    """Whitening matrix."""
    inverse: Float[Tensor, "d_in d_in"]
    """Its inverse."""


def input_transform(folder: Path, description: Description, factor: float | None) -> float | Whitening | None:
    """Factor or whitening of training inputs; None if there is none, or normalization is per token.

    Raises:
        FormatError: if it is needed and unknown, or passed and not needed.
    """
    if description.normalize != "expected_average_only_in" and factor is not None:
        what = f"scaling_factor={factor} was given, but normalize_activations is {description.normalize!r}."
        want = "a factor only for 'expected_average_only_in'"
        raise FormatError(explain(what, want=want, fix=f"saewb.load_sae({str(folder)!r})"))
    scaler = read_object(folder / SCALER) if (folder / SCALER).is_file() else {}
    if description.normalize == "expected_average_only_in":
        factor = scaler.get("scaling_factor") if factor is None else factor
        if factor is None:
            what = "it was trained on activations scaled to norm sqrt(d_in), and the factor is not in the folder."
            want = "sqrt(d_in) / (mean norm of the model's activations), as its authors measured it"
            raise FormatError(explain(what, want=want, fix=f"saewb.load_sae({str(folder)!r}, scaling_factor=...)"))
        return positive(factor, "scaling_factor")
    if description.normalize == "covariance_whitening":
        if description.architecture in ("matching_pursuit", "temporal"):
            raise FormatError(explain(f"a whitening cannot be folded into {description.architecture!r}."))
        return _read_whitening(folder / WHITENING, description.d_in)
    return None


def _read_whitening(path: Path, d_in: int) -> Whitening:
    if not path.is_file():
        what = f"it was trained on whitened activations, and {path.name} is not in the folder."
        raise FormatError(explain(what, want="the checkpoint folder with that file, or the run's final export"))
    tensors = TensorFile(path).tensors()
    expected = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
    check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, expected)
    return Whitening(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])


def fold_gate(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert gated weights to those of the exactly equal JumpReLU SAE."""
    # Active where s W_enc + b_gate > 0: where p = e (s W_enc) + b_mag is above b_mag - e b_gate; the value is relu(p).
    e, b_gate, b_mag = w["r_mag"].double().exp(), w["b_gate"].double(), w["b_mag"].double()
    others = {name: t for name, t in w.items() if name not in ("r_mag", "b_gate", "b_mag")}
    threshold = (b_mag - e * b_gate).clamp_min(0)
    return {**others, "W_enc": w["W_enc"].double() * e, "b_enc": w["b_mag"], "threshold": threshold}


def fold_factor(w: Mapping[str, Tensor], factor: float, rescale: bool) -> dict[str, Tensor]:
    """Fold an input factor into weights trained on `factor * x`; `rescale`: decoder norms are folded later."""
    new = {
        **w,
        "W_enc": w["W_enc"].double() * factor,
        "W_dec": w["W_dec"].double() / factor,
        "b_dec": w["b_dec"].double() / factor,
    }
    if rescale and "threshold" in w:  # it is compared with p |W_dec|, which is divided as well
        new["threshold"] = w["threshold"].double() / factor
    return new


def fold_decoder_norms(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move decoder norms into the encoder; thresholds stay, as they are compared with p |W_dec|."""
    norm = w["W_dec"].double().norm(dim=1)
    safe = torch.where(norm == 0, torch.ones_like(norm), norm)
    return {
        **w,
        "W_enc": w["W_enc"].double() * norm,
        "b_enc": w["b_enc"].double() * norm,
        "W_dec": w["W_dec"].double() / safe[:, None],
    }


def fold_whitening(w: Mapping[str, Tensor], whitening: Whitening, *, separate: bool) -> dict[str, Tensor]:
    """Fold a whitening of inputs into the weights; `separate`: add a b_pre, since b_dec is not tied."""
    mean, matrix, inverse = whitening.mean.double(), whitening.matrix.double(), whitening.inverse.double()
    new = {
        **w,
        "W_enc": matrix @ w["W_enc"].double(),
        "W_dec": w["W_dec"].double() @ inverse,
        "b_dec": w["b_dec"].double() @ inverse + mean,
    }
    # A tied bias contains the mean: (x - b_dec') M = (x - mean) M - b_dec.
    return {**new, "b_pre": mean} if separate else new


def fold_centering(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Center the input of a transcoder in its weights: (x - mean(x)) W = x (W - mean of W's rows).

    Its output stays centered: every later LayerNorm removes the mean.
    """
    inward = {name: w[name].double() - w[name].double().mean(0) for name in ("W_enc", "W_skip") if name in w}
    return {**w, **inward}


def is_centered(metadata: Mapping[str, Any], hook: str | None, model: str | None) -> bool:
    """Whether the SAE was trained on activations without their mean over d_model."""
    kwargs = metadata.get(_KWARGS)
    if not (isinstance(kwargs, Mapping) and kwargs.get(_FLAG) is True) or (model and _RMS.search(model)):
        return False
    return hook is None or hook.rpartition(".")[2].removeprefix("hook_") in _WRITTEN


def token_normalization(description: Description) -> TokenNormalization:
    """Normalization per token of the SAE in a file, "centered" by its metadata.

    Raises:
        FormatError: if it is centered and also rescales to a constant norm, which no published SAE does.
    """
    names: dict[str, TokenNormalization] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
    normalization, site = names.get(description.normalize, "none"), description.site
    if description.is_transcoder or not is_centered(description.metadata, site["hook"], site["model"]):
        return normalization
    if normalization == "constant_norm":
        raise FormatError(explain("centered writing weights together with constant_norm_rescale.", want="one of them"))
    # A layer norm already removes the mean, and adds it back.
    return "centered" if normalization == "none" else normalization


def metadata_read(metadata: Mapping[str, Any], normalization: TokenNormalization) -> dict[str, Any]:
    """Metadata of an SAE read with this normalization: drop the flag that "centered" implies."""
    if normalization != "centered":
        return dict(metadata)
    kwargs = {key: value for key, value in metadata[_KWARGS].items() if key != _FLAG}
    others = {key: value for key, value in metadata.items() if key != _KWARGS}
    return others | ({_KWARGS: kwargs} if kwargs else {})


def metadata_written(
    metadata: Mapping[str, Any], normalization: TokenNormalization, hook: str | None, model: str | None
) -> dict[str, Any]:
    """Metadata to write, from which `token_normalization` returns this normalization.

    Raises:
        ValueError: for a centered SAE of a hook or model where the flag has no effect.
    """
    kwargs = metadata.get(_KWARGS)
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if normalization == "centered":
        written = {**metadata, _KWARGS: {**kwargs, _FLAG: True}}
        if not is_centered(written, hook, model):
            what = f"the SAELens layout has no normalization 'centered' at hook {hook!r} of {model!r}."
            want = "a hook that writes into the residual stream, of a model with LayerNorms"
            raise ValueError(explain(what, want=want))
        return written
    if normalization == "none" and is_centered(metadata, hook, model):
        return {**metadata, _KWARGS: {**kwargs, _FLAG: False}}
    return dict(metadata)
