"""The layout of the library dictionary_learning (and of SAE Bench): `config.json` and `ae.pt`, of every dict_class.

- AutoEncoder        relu, `bias` is subtracted before encoding and added after decoding
- AutoEncoderNew     relu, nothing subtracted
- GatedAutoEncoder   gated, read as the exactly equal JumpReLU SAE
- AutoEncoderTopK    top-k, `b_dec` subtracted; its `threshold`, of newer files, is not used at inference
- BatchTopKSAE, MatryoshkaBatchTopKSAE   JumpReLU with one `threshold` for all latents; -1, "not yet known", is ReLU
- JumpReluAutoEncoder   JumpReLU, nothing subtracted

The library's `AutoEncoder.from_pretrained` also scales decoder rows to norm 1, which changes the units of latents but
not the reconstruction; here they stay as stored, and `sae.fold_decoder_norm()` scales them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saewb.errors import FormatError, explain, near
from saewb.pretrained.formats._layout import OpenFiles, TableLayout, get_typed
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats.crosscoder import has_points
from saewb.pretrained.formats.saelens.folding import fold_gate

_TRAINER = "its trainer"
_LINEAR = {"W_enc": "encoder.weight FD", "b_enc": "encoder.bias F", "W_dec": "decoder.weight DF"}
_PLAIN = {"W_enc": "W_enc DF", "b_enc": "b_enc F", "W_dec": "W_dec FD", "b_dec": "b_dec D"}
_GATED = {"b_gate": "gate_bias F", "b_mag": "mag_bias F", "r_mag": "r_mag F"}
_TABLES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "b_dec": "bias D"},
    "AutoEncoderNew": {**_LINEAR, "b_dec": "decoder.bias D"},
    "GatedAutoEncoder": {"W_enc": _LINEAR["W_enc"], "W_dec": _LINEAR["W_dec"], "b_dec": "decoder_bias D", **_GATED},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec D", "threshold": "?threshold "},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec D", "threshold": "threshold "},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": "threshold "},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "threshold F"},
}
_COUNTS = {
    "AutoEncoderTopK": {"k": ""},
    "BatchTopKSAE": {"k": ""},
    "MatryoshkaBatchTopKSAE": {"k": "", "group_sizes": "G"},
}
_ACTIVATIONS = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk"}
_UNTIED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SITES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp": "hook_mlp_out", "att": "hook_attn_out"}


class DictionaryLearning(TableLayout):
    """Layout of github.com/saprmarks/dictionary_learning; see dictionary.py and trainers/ there."""

    name = "dictionary_learning"
    aliases = ("dictionary_learning_1",)
    weights = "{path}/ae.pt"
    config = "{path}/config.json"

    def detect(self, path: Path) -> bool:
        """Whether it is of this layout, and no crosscoder, whose encoder has an axis more."""
        return super().detect(path) and not has_points(Path(self.weights_path(path)))

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration, and check the dict_class of its trainer."""
        config = super().read_config(path)
        kind = get_typed(get_typed(config, "trainer", dict, "config.json"), "dict_class", str, _TRAINER)
        if kind not in _TABLES:
            what = f"unknown dict_class {kind!r}."
            raise FormatError(explain(what, near=near(kind, _TABLES), want=", ".join(_TABLES)))
        return config

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Fields from the trainer's settings; the hook only for submodules that the library names."""
        trainer, buffer = files.config["trainer"], files.config.get("buffer")
        buffer, kind = buffer if isinstance(buffer, Mapping) else {}, trainer["dict_class"]
        metadata = {"prepend_bos": True, "dataset_path": "monology/pile-uncopyrighted"}
        if "group_sizes" in files.weights:
            metadata["group_sizes"] = _group_sizes(files.weights, trainer["dict_size"])
        return {
            "activation": _ACTIVATIONS.get(kind, "jumprelu"),
            "k": _k(files.weights, trainer) if kind == "AutoEncoderTopK" else None,
            "pre_bias": "none" if kind in _UNTIED else "tied",
            "model": get_typed(trainer, "lm_name", str, _TRAINER, files.provenance.model or "").split("/")[-1],
            "hook": _hook(trainer, get_typed(buffer, "io", str, "its buffer", "out")),
            "metadata": {**metadata, "context_size": buffer.get("ctx_len"), "dictionary_learning": dict(trainer)},
        }

    def open_weights(self, path: Path) -> TensorFile:
        """Open the weights; in a training checkpoint of the library they are under "ae"."""
        file = super().open_weights(path)
        return file.subset("ae/") if any(name.startswith("ae/") for name in file.names) else file

    def tensor_table(self, files: OpenFiles) -> Mapping[str, str]:
        """Table of the dict_class."""
        return _TABLES[files.config["trainer"]["dict_class"]]

    def side_tensors(self, files: OpenFiles) -> Mapping[str, str]:
        """Integer tensors of the top-k classes."""
        return _COUNTS.get(files.config["trainer"]["dict_class"], {})

    def widths(self, files: OpenFiles) -> dict[str, int]:
        """Widths from the trainer's settings."""
        trainer = files.config["trainer"]
        keys = {"D": "activation_dim", "F": "dict_size"}
        return {axis: get_typed(trainer, key, int, _TRAINER) for axis, key in keys.items()}

    def tensors(self, files: OpenFiles, table: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Weights with gates folded, and a single threshold repeated for all latents."""
        kind = files.config["trainer"]["dict_class"]
        weights = super().tensors(files, table)
        if kind == "AutoEncoderTopK":
            weights.pop("threshold", None)
        if kind == "GatedAutoEncoder":
            return fold_gate(weights)
        if "threshold" in weights and weights["threshold"].ndim == 0:
            weights["threshold"] = weights["threshold"].repeat(weights["b_enc"].shape[0])
        return weights


def _group_sizes(file: TensorFile, d_sae: int) -> list[int]:
    sizes = file.tensor("group_sizes").reshape(-1).tolist()
    if sum(sizes) != d_sae:
        raise FormatError(explain(f"group_sizes sum to {sum(sizes)}.", want=f"{d_sae}"))
    return sizes


def _k(file: TensorFile, trainer: Mapping[str, Any]) -> int:
    values = file.tensor("k").reshape(-1).tolist() if "k" in file else []
    values += [source["k"] for source in (file.values, trainer) if source.get("k") is not None]
    if not values or any(type(k) is not int for k in values) or len(set(values)) > 1:
        raise FormatError(explain(f"k is {values or 'not said'} in ae.pt and config.json.", want="one integer"))
    return values[0]


def _hook(trainer: Mapping[str, Any], side: object) -> str | None:
    """Hook from the layer and submodule, the residual stream where none is named, as in sae-lens.

    None for a submodule that the library's examples do not use.
    """
    layer = get_typed(trainer, "layer", int, _TRAINER)
    part = get_typed(trainer, "submodule_name", str, _TRAINER, "resid_post")
    site = next((hook for name, hook in _SITES.items() if re.search(rf"(?<![a-z]){name}", part)), None)
    return f"blocks.{layer}.{site}" if site and side == "out" else None
