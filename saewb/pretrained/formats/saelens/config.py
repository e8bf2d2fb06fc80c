"""Parse cfg.json of the SAELens layout, of all versions, into one flat description.

- 6.x: keys that affect the computation at the top level, everything else in `metadata`.
- 3 to 5: one flat dictionary; the activation may be named `activation_fn_str`, with `activation_fn_kwargs`.
- 2 and before: the flat dump of a training run; hooks are named `hook_point`, there is no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saewb.errors import FormatError, explain, near
from saewb.sae.config import TOP_K

_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
# sae-lens has no top-k transcoder, no groupmax and no top-k without a ReLU, and refuses these names; saewb writes them
# since such weights are published.
EXTENSIONS = (
    *("groupmax", "lineartopk"),
    *(f"{activation}_{kind}" for activation in TOP_K for kind in ("transcoder", "skip_transcoder")),
)
_RESCALES_SINCE = (6, 14)
"""Version of sae-lens since which a training with batch top-k multiplies pre-activations by decoder norms."""
UNFINISHED = ("batchtopk", "matryoshka_batchtopk")  # of training checkpoints only; published as jumprelu
ARCHITECTURES = (
    *("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal"),
    *(_TRANSCODERS + EXTENSIONS + UNFINISHED),
)
_NORMALIZATIONS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)
# Keys that affect the computation, with their defaults; `k` and others apply to some architectures only.
_DEFAULTS = {
    "architecture": "standard",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "finetuning_scaling_factor": False,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": 100, "rescale_acts_by_decoder_norm": False},
    "batchtopk": {"rescale_acts_by_decoder_norm": True},
    "transcoder": {"d_out": 768},
    "matching_pursuit": {"residual_threshold": 0.01, "max_iterations": None, "stop_on_duplicate_support": True},
    "temporal": {
        "n_heads": 8,
        "n_attn_layers": 1,
        "bottleneck_factor": 64,
        "sae_diff_type": "topk",
        "kval_topk": None,
        "tied_weights": True,
        "activation_normalization_factor": 1.0,
    },
}
SITE_KEYS = {"hook_name": "hook", "hook_name_out": "hook_out", "hook_head_index": "head", "model_name": "model"}
_NAMES, _INDICES = (
    ("hook_name", "hook_name_out", "hook_point", "model_name"),
    ("hook_head_index", "hook_point_head_index"),
)
_ALIASES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
# Keys about the file, not the SAE; `write` sets them.
SHA256 = "weights_sha256"
"""Key of the hash of the weights, in the metadata of files that saewb writes."""
_FILE_KEYS = ("sae_lens_version", "saewb_version", "dtype", "device", SHA256)
# Training options at the top level of 6.x checkpoints; none affects inference.
_TRAINING_KEYS = frozenset(
    (
        "decoder_init_norm",
        "l1_coefficient",
        "lp_norm",
        "l1_warm_up_steps",
        "use_sparse_activations",
        "aux_loss_coefficient",
        "jumprelu_init_threshold",
        "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode",
        "jumprelu_tanh_scale",
        "jumprelu_ste_to_input",
        "l0_coefficient",
        "l0_warm_up_steps",
        "pre_act_loss_coefficient",
        "target_l0",
        "topk_threshold_lr",
        "matryoshka_widths",
        "use_matryoshka_aux_loss",
    )
)
# Keys of `metadata` that some 6.x files have at the top level, because of overrides.
_METADATA_KEYS = frozenset(
    (
        "model_name",
        "hook_name",
        "model_class_name",
        "hook_head_index",
        "model_from_pretrained_kwargs",
        "prepend_bos",
        "exclude_special_tokens",
        "neuronpedia_id",
        "context_size",
        "seqpos_slice",
        "dataset_path",
        "dataset_trust_remote_code",
        "sae_lens_training_version",
        "hook_name_out",
        "hook_head_index_out",
        "hf_hook_name",
        "hf_hook_name_out",
        "hook_layer",
        "l0",
        "num_dead_features",
        "training_architecture",
        "training_architecture_details",
    )
)


@dataclass(frozen=True)
class Description:
    """A cfg.json of any version, in uniform fields."""

    architecture: str
    """Architecture as in the file; "topk" for `activation_fn: topk`."""
    d_in: int
    """Width of the input."""
    d_sae: int
    """Number of latents."""
    d_out: int
    """Width of the output."""
    tied: bool
    """`apply_b_dec_to_input`."""
    normalize: str
    """`normalize_activations`."""
    finetuned: bool
    """Whether a tensor `scaling_factor` multiplies the latents."""
    options: Mapping[str, Any]
    """Keys of this architecture only, with defaults filled in."""
    site: Mapping[str, Any]
    """hook, hook_out, head and model, as in the configuration classes."""
    metadata: Mapping[str, Any]
    """All other keys."""
    sha256: str | None = None
    """Hash of the weights, if saewb wrote the file."""

    @property
    def is_transcoder(self) -> bool:
        """Whether it is a transcoder, by the name of its architecture."""
        return self.architecture.endswith("transcoder")


def describe(raw: Mapping[str, Any]) -> Description:
    """Parse a cfg.json of any version.

    Raises:
        FormatError: for an unknown architecture, activation or normalization, a missing width, or (6.x) an unknown key.
    """
    if not isinstance(raw, Mapping):
        raise FormatError(explain(f"cfg.json holds a {type(raw).__name__}.", want="an object"))
    _check_types(raw)
    values, metadata = _split_version_6(raw) if _is_version_6(raw) else _flatten_older(raw)
    architecture = values.pop("architecture")
    _check_architecture(architecture)
    widths = {name: values.pop(name, None) for name in ("d_in", "d_sae")}
    for name, width in widths.items():
        if type(width) is not int:
            raise FormatError(explain(f"cfg.json has {name}={width!r}.", want="an integer"))
    defaults = options_of(architecture)
    if architecture in UNFINISHED and _version(raw) < _RESCALES_SINCE:
        defaults["rescale_acts_by_decoder_norm"] = False
    options = {name: values.pop(name, default) for name, default in defaults.items()}
    normalize = _normalization(values.pop("normalize_activations"))
    metadata |= {key: value for key, value in values.items() if key not in (*_DEFAULTS, "reshape_activations")}
    site = {name: metadata.pop(key, None) for key, name in SITE_KEYS.items()}
    reshape = default_reshape(site["hook"], site["head"], architecture)
    description = Description(
        architecture=architecture,
        d_out=options.pop("d_out", widths["d_in"]),
        tied=bool(values["apply_b_dec_to_input"]),
        normalize=normalize,
        finetuned=bool(values["finetuning_scaling_factor"]),
        options=options,
        site=site,
        sha256=metadata.get(SHA256),
        metadata=_clean_metadata(metadata, values.get("reshape_activations"), reshape),
        **widths,
    )
    _check_transcoder(description)
    return description


def options_of(architecture: str) -> dict[str, Any]:
    """Keys of this architecture only, with their defaults."""
    options: dict[str, Any] = {}
    if architecture.endswith("transcoder"):
        options |= _OPTIONS["transcoder"]
    if architecture.startswith(TOP_K):
        options |= _OPTIONS["topk"]
    if architecture in UNFINISHED:
        options |= _OPTIONS["batchtopk"]
    return options | _OPTIONS.get(architecture, {})


def default_reshape(hook: str | None, head: int | None, architecture: str) -> str:
    """Default of `reshape_activations`: "hook_z" flattens [n_heads, d_head] at a hook_z with all its heads."""
    whole = bool(hook) and str(hook).endswith("hook_z") and head is None
    return "hook_z" if whole and not architecture.endswith("transcoder") else "none"


def _check_types(raw: Mapping[str, Any]) -> None:
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise FormatError(explain(f"cfg.json has metadata={metadata!r}.", want="an object"))
    defaults = {"apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "activation_fn_kwargs": {}}
    for options in _OPTIONS.values():
        defaults |= {name: default for name, default in options.items() if isinstance(default, (bool, float))}
    for name, default in defaults.items():
        value = raw.get(name, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds and not (value is None and name == "activation_fn_kwargs"):
            raise FormatError(explain(f"cfg.json has {name}={value!r}.", want=f"something like {default!r}"))
    for name, kind in (*((name, str) for name in _NAMES), *((name, int) for name in _INDICES)):
        for value in (raw.get(name), metadata.get(name)):
            if value is not None and type(value) is not kind:
                raise FormatError(explain(f"cfg.json has {name}={value!r}.", want=f"{kind.__name__} or null"))


def _check_architecture(architecture: object) -> None:
    if architecture not in ARCHITECTURES:
        close = near(str(architecture), ARCHITECTURES)
        what = f"unknown architecture {architecture!r}."
        raise FormatError(explain(what, near=close, want=", ".join(ARCHITECTURES)))


def _version(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of sae-lens; (0, 0) if the file names none."""
    version = raw.get("sae_lens_version") or (raw.get("metadata") or {}).get("sae_lens_version")
    if not version:
        return 0, 0
    numbers = re.match(r"(\d{1,6})(?:\.(\d{1,6}))?(?!\d)", str(version))
    if not numbers:
        raise FormatError(explain(f"cfg.json has sae_lens_version={version!r}.", want="a version such as '6.54.12'"))
    return int(numbers[1]), int(numbers[2] or 0)


def _is_version_6(raw: Mapping[str, Any]) -> bool:
    return _version(raw)[0] >= 6


def _split_version_6(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into keys that affect the computation, and metadata, which may have another `k` or `d_out`."""
    if "architecture" not in raw:
        raise FormatError(explain("cfg.json of version 6 has no architecture.", want=", ".join(ARCHITECTURES)))
    _check_architecture(raw["architecture"])  # before its keys, which other architectures do not have
    deciding = {"d_in", "d_sae", "reshape_activations", *_DEFAULTS, *_FILE_KEYS}
    deciding |= {name for options in _OPTIONS.values() for name in options}
    unknown = sorted(set(raw) - deciding - {"metadata"} - _TRAINING_KEYS - _METADATA_KEYS)
    if unknown:
        what = f"cfg.json has keys that saewb does not know: {', '.join(unknown)}."
        want = "only keys whose effect on the result is known; what has none belongs in `metadata`"
        raise FormatError(explain(what, want=want))
    metadata = {**(raw.get("metadata") or {}), **{key: raw[key] for key in raw if key in _METADATA_KEYS}}
    if training := {key: raw[key] for key in raw if key in _TRAINING_KEYS}:
        metadata.setdefault("training_architecture", raw["architecture"])
        metadata.setdefault("training_architecture_details", training)
    return {**_DEFAULTS, **{key: raw[key] for key in raw if key in deciding}}, metadata


def _flatten_older(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert versions before 6: one flat dictionary with aliases, top-k as `activation_fn`."""
    flat = {**(raw.get("metadata") or {}), **{key: value for key, value in raw.items() if key != "metadata"}}
    values = {**_DEFAULTS, "prepend_bos": True, **{_ALIASES.get(key, key): value for key, value in flat.items()}}
    activation, kwargs = values.pop("activation_fn", "relu"), dict(values.pop("activation_fn_kwargs", None) or {})
    if activation not in ("relu", "topk"):
        what = f"cfg.json has activation_fn {activation!r}, which saewb cannot compute."
        raise FormatError(explain(what, want="'relu' or 'topk'"))
    if activation == "topk":
        if "k" not in kwargs:
            what = "cfg.json has activation_fn 'topk' and no k, which would compute a plain ReLU."
            raise FormatError(explain(what, want='"activation_fn_kwargs": {"k": ...}'))
        values["architecture"] = "topk"
    if values["architecture"] in ("topk", "abstopk") and "k" in kwargs:
        values["k"] = kwargs.pop("k")
    if kwargs:
        what = f"cfg.json has activation_fn_kwargs that saewb does not know: {kwargs}."
        raise FormatError(explain(what, want='at most {"k": ...}'))
    if values["architecture"] in ("topk", "abstopk") and values.get("k") is None:
        raise FormatError(explain(f"cfg.json has architecture {values['architecture']!r} and no k.", want='"k": ...'))
    return values, {}


def _normalization(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "expected_average_only_in" if value else "none"
    if value not in _NORMALIZATIONS:
        what, close = f"cfg.json has normalize_activations {value!r}.", near(str(value), _NORMALIZATIONS)
        raise FormatError(explain(what, near=close, want=", ".join(_NORMALIZATIONS)))
    return str(value)


def _clean_metadata(metadata: Mapping[str, Any], reshape: object, implied: str) -> dict[str, Any]:
    clean = {key: value for key, value in metadata.items() if key not in _FILE_KEYS}
    if "normalisation" in clean:  # spelling of saewb 0.1.0
        clean["normalization"] = str(clean.pop("normalisation")).replace("centred", "centered")
    if clean.get("sae_lens_training_version", "") is None:
        del clean["sae_lens_training_version"]
    if reshape not in (None, "none", "hook_z"):
        raise FormatError(explain(f"cfg.json has reshape_activations {reshape!r}.", want="'none' or 'hook_z'"))
    # In `metadata` only if the hook's name does not imply it.
    return clean if reshape in (None, implied) else clean | {"reshape_activations": reshape}


def _check_transcoder(description: Description) -> None:
    if not description.is_transcoder:
        return
    if description.tied:
        what = f"a {description.architecture} with apply_b_dec_to_input (or without that key, which means true)."
        raise FormatError(explain(what, want='"apply_b_dec_to_input": false, since b_dec belongs to the output'))
    if description.normalize not in ("none", "expected_average_only_in"):
        what = f"a {description.architecture} with normalize_activations {description.normalize!r}."
        raise FormatError(explain(what, want="'none': the scale of its input says nothing about its output"))
