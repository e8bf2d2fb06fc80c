"""circuit-tracer's layouts: one file per layer's transcoder, or two files per layer of a cross-layer transcoder.

Per layer, `layer_<i>.safetensors`; x is the input of the MLP, after its norm and the norm's gain:

    z = relu(x @ W_enc.T + b_enc)  (with `activation_function.threshold`: where it is strictly greater)
    y = z @ W_dec + b_dec (+ x @ W_skip.T)

With `activation: topk` in config.yaml, z keeps the k largest of x @ W_enc.T + b_enc as they are, of either sign.

Cross-layer, `W_enc_<i>.safetensors` and `W_dec_<i>.safetensors`:

    z_i = relu(x_i @ W_enc_i.T + b_enc_i)  (with `threshold_i`: where it is strictly greater)
    y_j = sum over i <= j of z_i @ W_dec_i[:, j - i]  +  b_dec_j  (+ x_j @ W_skip_j)

`b_dec_j` is stored in the file of W_enc_j and belongs to the layer written to; it is added once. The folder is read as
one `CrossLayerTranscoder`. One layer of it, "<folder>/3", is read as an SAE for encoding: its decoder row is the sum of
what a latent writes to all layers, which describes the latent but does not reconstruct an activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import (
    Layout,
    OpenFiles,
    Provenance,
    TableLayout,
    build_cross_layer,
    build_sae,
    check_table,
    get_typed,
    sum_over_targets,
)
from saewb.pretrained.formats._tensors import TensorFile, read_object
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.sae import SAE

_CONFIG = "config.yaml"
_THRESHOLDS = {"activation_function.threshold", "threshold"}
_UNFOLDED = {"model_from_pretrained_kwargs": {"fold_ln": False}}
_KINDS = {"transcoder_set": "circuit-tracer transcoders", "cross_layer_transcoder": "a cross-layer transcoder"}
_K = {"facebook/crv-8b-instruct-transcoders": 128}  # which circuit-tracer knows: its config.yaml says none


class CircuitTracerTranscoder(TableLayout):
    """circuit-tracer's per-layer transcoders; github.com/decoderesearch/circuit-tracer, single_layer_transcoder.py."""

    name = "circuit-tracer transcoders"
    aliases = ("mwhanna_transcoder",)
    weights = "{path}"
    config = "{parent}/config.yaml"
    needs_config = False
    extra_files = ("{parent}/wandb-config.yaml", "{parent}/wanb-config.yaml")  # sic: some repositories spell it so
    file_name = re.compile(r"layer_(\d+)\.safetensors")
    marks = ("layer_<n>.safetensors with W_enc, W_dec, b_enc, b_dec",)
    has_tensors = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})

    def tensor_table(self, files: OpenFiles) -> dict[str, str]:
        """Table with either spelling of thresholds, and an optional W_skip."""
        stored = next((name for name in files.weights.names if name in _THRESHOLDS), None)
        table = {"W_enc": "W_enc FD", "b_enc": "b_enc F", "W_dec": "W_dec FO", "b_dec": "b_dec O"}
        table |= {"W_skip": "?W_skip OD"} | ({"threshold": f"{stored} F"} if stored else {})
        return table

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration, and check its kind and activation."""
        config = super().read_config(path)
        _check_kind(config, "transcoder_set")
        activation = get_typed(config, "activation", str, _CONFIG, "")
        if activation not in ("", "relu", "jumprelu", "topk"):
            what = f"{_CONFIG} has activation {activation!r}."
            raise FormatError(explain(what, want="'relu', 'jumprelu', 'topk' or none"))
        return config

    def side_tensors(self, files: OpenFiles) -> dict[str, str | None]:
        """K of a top-k; beside a threshold that of a training with batch top-k, which the threshold replaces."""
        if files.config.get("activation") == "topk":
            return {"k": ""}
        return {"k": None} if _THRESHOLDS & set(files.weights.names) else {}

    def widths(self, files: OpenFiles) -> dict[str, int]:
        """Widths from the configuration of the training run, if there is one."""
        paths = (Path(files.path.parent / template.partition("/")[2]) for template in self.extra_files)
        run = next((read_object(path) for path in paths if path.is_file()), {})
        return {
            axis: get_typed(get_typed(run, key, dict, "wandb-config.yaml"), "value", int, key)
            for axis, key in (("D", "d_model"), ("F", "d_feature"))
            if key in run
        }

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Hooks and model from config.yaml; the model also from a repository such as mwhanna/qwen3-14b-transcoders."""
        config, block = files.config, f"blocks.{self.file_name.fullmatch(files.path.name)[1]}"
        size = re.search(r"qwen3-(\d+(?:\.\d+)?)b", files.address, re.IGNORECASE)
        model = files.provenance.model or (f"Qwen/Qwen3-{size[1]}B" if size else None)
        activation = _activation(files)
        return {
            "activation": activation,
            "k": _k(files) if activation == "lineartopk" else None,
            "skip": "W_skip" in files.weights,
            "model": get_typed(config, "model_name", str, _CONFIG, model or "") or None,
            "hook": f"{block}.{get_typed(config, 'feature_input_hook', str, _CONFIG, 'mlp.hook_in')}",
            "hook_out": f"{block}.{get_typed(config, 'feature_output_hook', str, _CONFIG, 'hook_mlp_out')}",
            "metadata": {**_UNFOLDED, "dataset_path": "monology/pile-uncopyrighted"},
        }


def _check_kind(config: Mapping[str, Any], expected: str) -> None:
    kind = get_typed(config, "model_kind", str, _CONFIG, expected)
    if kind != expected:
        what = f"{_CONFIG} has model_kind {kind!r}, and the files are of {_KINDS[expected]}."
        raise FormatError(explain(what, want=repr(expected)))


def _activation(files: OpenFiles) -> str:
    """Activation function, by the configuration and by whether there are thresholds."""
    stated = get_typed(files.config, "activation", str, _CONFIG, "")
    stored = "jumprelu" if _THRESHOLDS & set(files.weights.names) else "relu"
    if stated == "topk" and stored == "relu":
        return "lineartopk"
    if stated not in ("", stored):
        what = f"{_CONFIG} has activation {stated!r}, and there are {'no ' * (stored == 'relu')}thresholds."
        raise FormatError(explain(what, want=f"activation {stored!r}, or weights that fit"))
    return stored


def _k(files: OpenFiles) -> int:
    values = {
        _CONFIG: files.config.get("k"),
        "the weights": int(files.weights.tensor("k")) if "k" in files.weights else None,
        "circuit-tracer itself": _K.get(files.provenance.repo or ""),
    }
    sizes = {place: k for place, k in values.items() if k is not None}
    if not sizes or any(type(k) is not int for k in sizes.values()) or len(set(sizes.values())) > 1:
        what = f"activation 'topk' with k {sizes or 'not said'}."
        raise FormatError(explain(what, want=f"one integer, as `k: 32` in {_CONFIG}"))
    return next(iter(sizes.values()))


class CircuitTracerCrossLayer(Layout):
    """circuit-tracer's cross-layer transcoders: the whole folder, or one layer; cross_layer_transcoder.py there."""

    name = "circuit-tracer cross-layer transcoder"
    aliases = ("mntss_clt_layer_transcoder",)
    config = "{path}/config.yaml"
    marks = ("W_enc_<n>.safetensors", "W_dec_<n>.safetensors", _CONFIG)

    def patterns(self, path: str) -> list[str]:
        """Files of one layer for "<folder>/<n>", else of all layers."""
        pure = PurePosixPath(path)
        layer = _layer_number(pure)
        folder = PurePosixPath(escape(str(pure.parent if layer is not None else pure)))
        n = "*" if layer is None else layer
        return [str(folder / name) for name in (f"W_enc_{n}.safetensors", f"W_dec_{n}.safetensors", _CONFIG)]

    def detect(self, path: Path) -> bool:
        """Whether the folder has the files of layer 0; or, for "<folder>/<n>" or .../W_enc_<n>.safetensors, of n."""
        folder, layer = _split(path)
        return all((folder / f"W_{side}_{layer or 0}.safetensors").is_file() for side in ("enc", "dec"))

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> CrossLayerTranscoder | SAE:
        folder, layer = _split(path)
        config = read_object(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        _check_kind(config, "cross_layer_transcoder")
        if config.get("activation") not in (None, "relu", "jumprelu"):
            what = f"{_CONFIG} of a cross-layer transcoder has activation {config['activation']!r}."
            raise FormatError(explain(what, want="'relu', 'jumprelu' or none"))
        hook = get_typed(config, "feature_input_hook", str, _CONFIG, "hook_resid_mid")
        hook_out = get_typed(config, "feature_output_hook", str, _CONFIG, "hook_mlp_out")
        model = get_typed(config, "model_name", str, _CONFIG, provenance.model or "") or None
        if layer is not None:
            site = {"hook": f"blocks.{layer}.{hook}", "hook_out": f"blocks.{layer}.{hook_out}", "model": model}
            return _read_one_layer(_read_layer(folder, layer), site, provenance, dtype, device)
        n = len(list(folder.glob("W_enc_*.safetensors")))
        return build_cross_layer(
            [_read_layer(folder, i, n) for i in range(n)],
            dtype,
            device,
            model=model,
            hooks=tuple(f"blocks.{i}.{hook}" for i in range(n)),
            hooks_out=tuple(f"blocks.{i}.{hook_out}" for i in range(n)),
            metadata=_UNFOLDED,
        )


def _layer_number(path: PurePath) -> int | None:
    name = re.fullmatch(r"(?:W_enc_)?(\d+)(?:\.safetensors)?", path.name)
    return int(name[1]) if name else None


def _split(path: Path) -> tuple[Path, int | None]:
    """Split a path into the folder and the number of a layer, or None."""
    layer = None if path.is_dir() else _layer_number(path)
    return (path, None) if layer is None else (path.parent, layer)


def _read_layer(folder: Path, i: int, n: int | None = None) -> dict[str, Tensor]:
    """Read the tensors of one layer, by the names of CrossLayerTranscoder; `n` layers in all, if known."""
    encoder, decoder = (TensorFile(folder / f"W_{side}_{i}.safetensors") for side in ("enc", "dec"))
    shapes = encoder.shape(f"W_enc_{i}"), decoder.shape(f"W_dec_{i}")
    if [len(shape) for shape in shapes] != [2, 3]:
        what = f"layer {i} has W_enc of shape {shapes[0]}, W_dec of shape {shapes[1]}."
        raise FormatError(explain(what, want="[d_sae, d_in] and [d_sae, layers from this one on, d_out]"))
    widths = {"F": shapes[0][0], "D": shapes[0][1], "O": shapes[1][2]}
    check_table(decoder, {"W_dec": f"W_dec_{i} FLO"}, **widths, **({} if n is None else {"L": n - i}))
    table = {"W_enc": "W_enc FD", "b_enc": "b_enc F", "b_dec": "b_dec O"}
    table |= {"threshold": "?threshold F", "W_skip": "?W_skip DO"}
    numbered = {name: text.replace(" ", f"_{i} ") for name, text in table.items()}
    tensors = {name: encoder.tensor(stored) for name, (stored, _) in check_table(encoder, numbered, **widths).items()}
    return {**tensors, "W_enc": tensors["W_enc"].T, "W_dec": decoder.tensor(f"W_dec_{i}")}


def _read_one_layer(
    weights: dict[str, Tensor], site: Mapping[str, Any], provenance: Provenance, dtype: Any, device: Any
) -> SAE:
    weights.pop("W_skip", None)  # belongs to the layer written to, not to the latents
    n_targets = weights["W_dec"].shape[1]
    fields = {
        "activation": "jumprelu" if "threshold" in weights else "relu",
        "metadata": {**_UNFOLDED, "summed_over_layers": n_targets},
    }
    weights["W_dec"] = sum_over_targets(weights["W_dec"], dtype)
    return build_sae(weights, {**site, **fields}, provenance, dtype, device)
