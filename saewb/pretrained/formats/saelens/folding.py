"""SAEs of language models whose writing weights were centered: what a SAELens file says of it, and what it means.

TransformerLens can take the mean over d_model out of everything a model with LayerNorms writes into its residual stream
(`center_writing_weights`). Such a model computes the same, since every LayerNorm takes that mean out anyway, but its
residual stream is `x - mean(x)` where that of the model as published is `x`. An SAE trained there reads `x - mean(x)`;
SAEs of this package do that themselves (normalization "centered") and give the mean back, so they fit both models.

The file says so as sae-lens does, in `metadata.model_from_pretrained_kwargs.center_writing_weights`; sae-lens leaves it
to its user to load such a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.sae.config import TokenNormalization

_KWARGS, _FLAG = "model_from_pretrained_kwargs", "center_writing_weights"
# What is written into the residual stream, and the stream itself; nothing else changes with the writing weights.
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed")
# These have RMSNorms, which do not take out a mean; TransformerLens then leaves the weights as they are.
_RMS = re.compile(r"gemma|llama|mi[sx]tral|qwen|olmo|smollm|deepseek|phi-?3|\byi-|gpt-oss|apertus", re.IGNORECASE)


def centered(
    normalization: TokenNormalization, metadata: Mapping[str, Any], hook: str | None, model: str | None
) -> TokenNormalization:
    """The normalization of an SAE whose file gives `normalization` and this metadata.

    Raises:
        FormatError: if it also rescales to a constant norm, which nobody has published.
    """
    if not reads_centered(metadata, hook, model):
        return normalization
    if normalization == "constant_norm":
        raise FormatError(explain("centered writing weights together with constant_norm_rescale.", want="one of them"))
    return (
        "centered" if normalization == "none" else normalization
    )  # a layer norm takes the mean out, and gives it back, already


def reads_centered(metadata: Mapping[str, Any], hook: str | None, model: str | None) -> bool:
    """Whether what the SAE was trained on had its mean over d_model taken out."""
    told = metadata.get(_KWARGS)
    if not (isinstance(told, Mapping) and told.get(_FLAG) is True) or (model and _RMS.search(model)):
        return False
    return hook is None or hook.rpartition(".")[2].removeprefix("hook_") in _WRITTEN


def without_flag(metadata: Mapping[str, Any], normalization: TokenNormalization) -> dict[str, Any]:
    """The metadata of an SAE with this normalization: what "centered" says already is not said twice."""
    if normalization != "centered":
        return dict(metadata)
    rest = {key: value for key, value in metadata[_KWARGS].items() if key != _FLAG}
    kept = {key: value for key, value in metadata.items() if key != _KWARGS}
    return kept | ({_KWARGS: rest} if rest else {})


def reading_centered(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transcoder's weights that take the mean out themselves: (x - mean(x)) W = x (W - mean of W's rows).

    What it writes stays without its mean, which every LayerNorm further on takes out.
    """
    inward = {name: w[name].double() - w[name].double().mean(0) for name in ("W_enc", "W_skip") if name in w}
    return {**w, **inward}


def said(
    metadata: Mapping[str, Any], normalization: TokenNormalization, hook: str | None, model: str | None
) -> dict[str, Any]:
    """The metadata to write, from which `centered` finds this normalization again.

    Raises:
        ValueError: if it would not: a centered SAE of a place or a model where that flag means nothing.
    """
    told = metadata.get(_KWARGS)
    told = dict(told) if isinstance(told, Mapping) else {}
    if normalization == "centered":
        written = {**metadata, _KWARGS: {**told, _FLAG: True}}
        if not reads_centered(written, hook, model):
            raise ValueError(
                explain(
                    f"the SAELens layout has no normalization 'centered' at hook {hook!r} of {model!r}.",
                    want="a hook that writes into the residual stream, of a model with LayerNorms",
                )
            )
        return written
    if normalization == "none" and reads_centered(metadata, hook, model):
        return {**metadata, _KWARGS: {**told, _FLAG: False}}
    return dict(metadata)
