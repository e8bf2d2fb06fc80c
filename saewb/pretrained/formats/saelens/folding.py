"""What a SAELens file asks for that `SAE` has no field for, folded into the weights, in float64.

- Gates, decoder norms, a constant factor or a whitening of training inputs: `fold_gate`, `fold_decoder_norms`,
  `fold_factor`, `fold_whitening`. `input_transform` reads factor and whitening from the files beside the weights.
- Centered writing weights. TransformerLens can take the mean over d_model out of everything a model with LayerNorms
  writes into its residual stream (`center_writing_weights`). Such a model computes the same, since every LayerNorm
  takes that mean out anyway, but its residual stream is `x - mean(x)` where that of the model as published is `x`. An
  SAE trained there reads `x - mean(x)`; SAEs of this package do that themselves (normalization "centered") and give the
  mean back, so they fit both models. The file says so as sae-lens does, in
  `metadata.model_from_pretrained_kwargs.center_writing_weights`; sae-lens leaves it to its user to load such a model.
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
# What is written into the residual stream, and the stream itself; nothing else changes with the writing weights.
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed")
# These have RMSNorms, which do not take out a mean; TransformerLens then leaves the weights as they are.
_RMS = re.compile(r"gemma|llama|mi[sx]tral|qwen|olmo|smollm|deepseek|phi-?3|\byi-|gpt-oss|apertus", re.IGNORECASE)


@dataclass(frozen=True)
class Whitening:
    """What a training run applied before the SAE: z = (x - mean) @ matrix, undone by @ inverse + mean."""

    mean: Float[Tensor, " d_in"]
    matrix: Float[Tensor, "d_in d_in"]
    inverse: Float[Tensor, "d_in d_in"]


def input_transform(folder: Path, description: Description, factor: float | None) -> float | Whitening | None:
    """The factor or whitening that training inputs went through; None if there was none, or it is done per token.

    Raises:
        FormatError: if it is needed and not known, or given and not needed.
    """
    if description.normalize != "expected_average_only_in" and factor is not None:
        raise FormatError(
            explain(
                f"scaling_factor={factor} was given, but normalize_activations is {description.normalize!r}.",
                want="a factor only for 'expected_average_only_in'",
                fix=f"saewb.load_sae({str(folder)!r})",
            )
        )
    scaler = read_object(folder / SCALER) if (folder / SCALER).is_file() else {}
    if description.normalize == "expected_average_only_in":
        factor = scaler.get("scaling_factor") if factor is None else factor
        if factor is None:
            raise FormatError(
                explain(
                    "it was trained on activations scaled to norm sqrt(d_in), and the factor is not in the folder.",
                    want="sqrt(d_in) / (mean norm of the model's activations), as its authors measured it",
                    fix=f"saewb.load_sae({str(folder)!r}, scaling_factor=...)",
                )
            )
        return positive(factor, "scaling_factor")
    if description.normalize == "covariance_whitening":
        if description.architecture in ("matching_pursuit", "temporal"):
            raise FormatError(explain(f"a whitening cannot be folded into {description.architecture!r}."))
        return _read_whitening(folder / WHITENING, description.d_in)
    return None


def _read_whitening(path: Path, d_in: int) -> Whitening:
    if not path.is_file():
        raise FormatError(
            explain(
                f"it was trained on whitened activations, and {path.name} is not in the folder.",
                want="the checkpoint folder with that file, or the run's final export",
            )
        )
    tensors = TensorFile(path).tensors()
    check_shapes(
        {name: tuple(t.shape) for name, t in tensors.items()},
        {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)},
    )
    return Whitening(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])


def fold_gate(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gated weights as those of a JumpReLU SAE, exactly the same function."""
    # On where s W_enc + b_gate > 0, that is where p = e (s W_enc) + b_mag is above b_mag - e b_gate; its value relu(p).
    e, b_gate, b_mag = w["r_mag"].double().exp(), w["b_gate"].double(), w["b_mag"].double()
    others = {name: t for name, t in w.items() if name not in ("r_mag", "b_gate", "b_mag")}
    threshold = (b_mag - e * b_gate).clamp_min(0)
    return {**others, "W_enc": w["W_enc"].double() * e, "b_enc": w["b_mag"], "threshold": threshold}


def fold_factor(w: Mapping[str, Tensor], factor: float, rescale: bool) -> dict[str, Tensor]:
    """Weights trained on `factor * x`, made to read `x`; `rescale`: decoder norms are still to be folded."""
    new = {
        **w,
        "W_enc": w["W_enc"].double() * factor,
        "W_dec": w["W_dec"].double() / factor,
        "b_dec": w["b_dec"].double() / factor,
    }
    if rescale and "threshold" in w:  # it is compared with p |W_dec|, and |W_dec| has just been divided
        new["threshold"] = w["threshold"].double() / factor
    return new


def fold_decoder_norms(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder norms moved into the encoder, thresholds as they are: they were compared with p |W_dec| already."""
    norm = w["W_dec"].double().norm(dim=1)
    safe = torch.where(norm == 0, torch.ones_like(norm), norm)
    return {
        **w,
        "W_enc": w["W_enc"].double() * norm,
        "b_enc": w["b_enc"].double() * norm,
        "W_dec": w["W_dec"].double() / safe[:, None],
    }


def fold_whitening(w: Mapping[str, Tensor], whitening: Whitening, *, own: bool) -> dict[str, Tensor]:
    """Weights trained on whitened activations, made to read raw ones; `own`: with a b_pre, since b_dec is not tied."""
    mean, matrix, inverse = whitening.mean.double(), whitening.matrix.double(), whitening.inverse.double()
    new = {
        **w,
        "W_enc": matrix @ w["W_enc"].double(),
        "W_dec": w["W_dec"].double() @ inverse,
        "b_dec": w["b_dec"].double() @ inverse + mean,
    }
    # A tied bias takes the mean along: (x - b_dec') M = (x - mean) M - b_dec.
    return {**new, "b_pre": mean} if own else new


def fold_centering(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transcoder's weights that take the mean out themselves: (x - mean(x)) W = x (W - mean of W's rows).

    What it writes stays without its mean, which every LayerNorm further on takes out.
    """
    inward = {name: w[name].double() - w[name].double().mean(0) for name in ("W_enc", "W_skip") if name in w}
    return {**w, **inward}


def is_centered(metadata: Mapping[str, Any], hook: str | None, model: str | None) -> bool:
    """Whether what the SAE was trained on had its mean over d_model taken out."""
    kwargs = metadata.get(_KWARGS)
    if not (isinstance(kwargs, Mapping) and kwargs.get(_FLAG) is True) or (model and _RMS.search(model)):
        return False
    return hook is None or hook.rpartition(".")[2].removeprefix("hook_") in _WRITTEN


def token_normalization(description: Description) -> TokenNormalization:
    """The normalization of the SAE in a file: what it says, and "centered" by its metadata.

    Raises:
        FormatError: if it is centered and also rescales to a constant norm, which nobody has published.
    """
    names: dict[str, TokenNormalization] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
    normalization, site = names.get(description.normalize, "none"), description.site
    if description.is_transcoder or not is_centered(description.metadata, site["hook"], site["model"]):
        return normalization
    if normalization == "constant_norm":
        raise FormatError(explain("centered writing weights together with constant_norm_rescale.", want="one of them"))
    # A layer norm takes the mean out, and gives it back, already.
    return "centered" if normalization == "none" else normalization


def metadata_read(metadata: Mapping[str, Any], normalization: TokenNormalization) -> dict[str, Any]:
    """The metadata of an SAE with this normalization: without the flag that "centered" implies."""
    if normalization != "centered":
        return dict(metadata)
    kwargs = {key: value for key, value in metadata[_KWARGS].items() if key != _FLAG}
    others = {key: value for key, value in metadata.items() if key != _KWARGS}
    return others | ({_KWARGS: kwargs} if kwargs else {})


def metadata_written(
    metadata: Mapping[str, Any], normalization: TokenNormalization, hook: str | None, model: str | None
) -> dict[str, Any]:
    """The metadata to write, from which `token_normalization` gives this normalization again.

    Raises:
        ValueError: if it would not: a centered SAE of a hook or a model where that flag means nothing.
    """
    kwargs = metadata.get(_KWARGS)
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if normalization == "centered":
        written = {**metadata, _KWARGS: {**kwargs, _FLAG: True}}
        if not is_centered(written, hook, model):
            raise ValueError(
                explain(
                    f"the SAELens layout has no normalization 'centered' at hook {hook!r} of {model!r}.",
                    want="a hook that writes into the residual stream, of a model with LayerNorms",
                )
            )
        return written
    if normalization == "none" and is_centered(metadata, hook, model):
        return {**metadata, _KWARGS: {**kwargs, _FLAG: False}}
    return dict(metadata)
