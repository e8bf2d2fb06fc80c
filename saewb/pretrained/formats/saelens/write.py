"""Convert saewb's classes to the SAELens layout, version 6: architecture, keys and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from saewb.errors import explain
from saewb.pretrained.formats.saelens.config import SITE_KEYS, default_reshape
from saewb.pretrained.formats.saelens.folding import metadata_written
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalSAE

# Version of sae-lens whose form is written; sae-lens reads files of version 6 by other rules than older ones.
LAYOUT_VERSION = "6.54.12"
_NORMALIZE = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale", "centered": "none"}


def compose(
    sae: SAE | PursuitSAE | TemporalSAE, architecture: str, tied: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Compose the cfg.json of version 6 of an SAE; `describe` reads it back.

    Args:
        sae: source of widths, normalization, hooks, model and metadata.
        architecture: name of the architecture in files.
        tied: whether b_dec is subtracted before encoding.
        options: keys of this architecture only.
    """
    cfg = sae.cfg
    metadata = {key: value for key, value in cfg.metadata.items() if key != "reshape_activations"}
    if not cfg.is_transcoder:
        metadata = metadata_written(metadata, cfg.normalization, cfg.hook, cfg.model)
    reshape = cfg.metadata.get("reshape_activations", default_reshape(cfg.hook, cfg.head, architecture))
    site = {key: getattr(cfg, name) for key, name in SITE_KEYS.items() if getattr(cfg, name) is not None}
    return {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": tied,
        "normalize_activations": _NORMALIZE[cfg.normalization],
        "reshape_activations": reshape,
        "metadata": {**metadata, **site, "sae_lens_version": LAYOUT_VERSION, "saewb_version": _saewb_version()},
        **options,
        "architecture": architecture,
    }


def _saewb_version() -> str:
    try:
        return version("saewb")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was never installed


def to_file(sae: SAE | PursuitSAE | TemporalSAE) -> tuple[str, bool, dict[str, Any], dict[str, Tensor]]:
    """Convert an SAE to architecture, apply_b_dec_to_input, keys of the architecture, and stored tensors."""
    if not isinstance(sae, (SAE, PursuitSAE, TemporalSAE)):
        what = f"the SAELens layout has no {type(sae).__name__}: {sae!r}."
        raise TypeError(explain(what, want="SAE, PursuitSAE or TemporalSAE"))
    tensors = {name: t.detach() for name, t in sae.state_dict().items()}
    cfg = sae.cfg
    if isinstance(sae, PursuitSAE):
        options = {
            "residual_threshold": cfg.residual_threshold,
            "max_iterations": cfg.max_iterations,
            "stop_on_duplicate_support": cfg.stop_on_duplicate,
        }
        return "matching_pursuit", cfg.pre_bias == "tied", options, tensors
    if isinstance(sae, TemporalSAE):
        options = {
            "n_heads": cfg.n_heads,
            "n_attn_layers": cfg.n_attn_layers,
            "bottleneck_factor": cfg.bottleneck_factor,
            "sae_diff_type": cfg.activation,
            "kval_topk": cfg.k,
            "tied_weights": cfg.tied,
            "activation_normalization_factor": cfg.factor,
        }
        if cfg.factor != 1:
            options["normalize_activations"] = "constant_scalar_rescale"
        return "temporal", cfg.pre_bias == "tied", options, tensors
    return _feed_forward_to_file(sae, tensors)


def _feed_forward_to_file(sae: SAE, w: dict[str, Tensor]) -> tuple[str, bool, dict[str, Any], dict[str, Tensor]]:
    cfg = sae.cfg
    transcoder = cfg.is_transcoder or cfg.skip
    if transcoder and cfg.normalization != "none":
        what = f"the SAELens layout has no skip matrix together with normalization={cfg.normalization!r}: {sae!r}."
        raise ValueError(explain(what, want="skip=False or normalization='none'"))
    architecture = "standard" if cfg.activation == "relu" else cfg.activation
    if transcoder:
        activation = "" if cfg.activation == "relu" else f"{cfg.activation}_"
        architecture = f"{activation}{'skip_' if cfg.skip else ''}transcoder"
    tied = cfg.pre_bias == "tied" and not transcoder
    if sae.b_pre is not None and not tied:
        shift = sae.b_pre.detach().double() @ w["W_enc"].double()
        w = {**w, "b_enc": (w["b_enc"].double() - shift).to(sae.dtype)}
        w.pop("b_pre", None)
    if cfg.skip:
        w = {**w, "W_skip": w["W_skip"].T}
    options: dict[str, Any] = {"d_out": cfg.d_out} if transcoder else {}
    if cfg.k is not None:
        options |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return architecture, tied, options, w


def separate_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, contiguous, without shared memory, which safetensors refuses."""
    addresses: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.cpu().contiguous()
        separate[name] = whole.clone() if whole.data_ptr() in addresses else whole
        addresses.add(whole.data_ptr())
    return separate
