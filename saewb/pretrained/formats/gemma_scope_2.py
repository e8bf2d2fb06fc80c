"""Gemma Scope 2: SAEs, transcoders, cross-layer transcoders and crosscoders of Gemma 3.

`GemmaScope2` reads `params.safetensors` and `config.json`. The weights are those of a JumpReLU SAE, with
`affine_skip_connection` [d_in, d_out] for the affine transcoders.

- A transcoder reads `blocks.L.mlp.hook_in`, the MLP's input after the norm and its gain. (`hook_mlp_in`, as in
  sae-lens, is the residual stream before the norm.)
- Values missing in config.json come from names: repository google/gemma-scope-2-{size}-{pt,it}, folders
  {resid_post,attn_out,mlp_out,transcoder,clt}[_all]/layer_L_width_W_l0_L0[_affine].

`GemmaScope2CrossLayer` reads a folder of `params_layer_<i>.safetensors`, a cross-layer transcoder or crosscoder:

    z_i = relu(x_i @ w_enc_i + b_enc_i) where that is > threshold_i
    y_j = sum over i <= j of z_i @ w_dec_i[:, j]  +  b_dec_j  (+ x_j @ affine_skip_connection_j)

A crosscoder of layers 5, 9, 12, 15 has four files, 0 to 3, each with latents that read the residual stream at that
layer and reconstruct it there and at the later ones ("weakly causal"), by the same formula. `w_dec` also has entries
for earlier layers, which are zero; a file with others is refused, since a forward pass cannot write to earlier layers.
A single file of a transcoder is read as an SAE, with its rows summed over the layers: its latents are exact and its
output is the sum of what it writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
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
    check_table,
    get_typed,
    sum_over_targets,
)
from saewb.pretrained.formats._tensors import TensorFile
from saewb.sae.cross_layer import CrossLayerTranscoder

_CONFIG = "config.json"
_ONE_LAYER = re.compile(r"params_layer_(\d+)(\.safetensors)?")
_REPO = re.compile(r"gemma-scope-2-(\w+)-(pt|it)")
_POINT = re.compile(r"model\.layers\.\{([^}]*)\}\.(.+)")
_MLP = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
_SITES = {  # by folder: the points read and written, as config.json names them
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": _MLP,
    "clt": _MLP,
}
_HOOKS = {  # names in config.json -> names in TransformerLens
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.input": "hook_resid_mid",
    "pre_feedforward_layernorm.output": "mlp.hook_in",  # with the norm's gain: not hook_mlp_in, which is before it
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
_CROSS_LAYER_HOOKS = (*_MLP, "output")
_TYPES = ("sae", "transcoder", "clt")
_TABLE = {
    "W_enc": "w_enc DF",
    "b_enc": "b_enc F",
    "W_dec": "w_dec FO",
    "b_dec": "b_dec O",
    "threshold": "threshold F",
    "W_skip": "?affine_skip_connection DO",
}
_SAMPLED_ROWS = 64  # decoder rows on which entries for earlier layers are checked


class GemmaScope2(TableLayout):
    """Gemma Scope 2's SAEs and transcoders, and one layer of its cross-layer transcoders."""

    name = "Gemma Scope 2"
    aliases = ("gemma_3",)
    weights = "{path}/params.safetensors"
    needs_config = False
    marks = ("params.safetensors",)

    def weights_path(self, path: PurePath) -> PurePath:
        """Path of the weights, for the folder or the file; of one layer also without ".safetensors"."""
        if _ONE_LAYER.fullmatch(path.name):
            return path.with_name(f"{path.name.removesuffix('.safetensors')}.safetensors")
        return path if path.name == "params.safetensors" else path / "params.safetensors"

    def config_path(self, path: PurePath) -> PurePath:
        """Path of config.json in the folder of the weights."""
        return self.weights_path(path).with_name(_CONFIG)

    def tensor_table(self, files: OpenFiles) -> dict[str, str]:
        """Table with a third decoder axis for a cross-layer transcoder, and the skip of the configuration."""
        config = _completed(files)
        _check_axes(files.weights, config["type"])
        table = {**_TABLE, "W_dec": "w_dec FLO"} if config["type"] == "clt" else dict(_TABLE)
        if "affine_connection" in config:
            del table["W_skip"]
        return table | ({"W_skip": "affine_skip_connection DO"} if config.get("affine_connection") else {})

    def tensors(self, files: OpenFiles, table: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Weights with the decoder summed over the layers written to, if there are several."""
        weights = super().tensors(files, table)
        if weights["W_dec"].ndim == 3:
            weights["W_dec"] = sum_over_targets(weights["W_dec"], files.dtype)
        return weights

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Fields from config.json, completed by names of repository and folders."""
        config, shape = _completed(files), files.weights.shape("w_dec")
        return {
            "activation": "jumprelu",
            "skip": "affine_skip_connection" in files.weights,
            "model": _model(config.get("model_name"), files.address),
            "hook": _hook(config.get("hf_hook_point_in")),
            "hook_out": _hook(config.get("hf_hook_point_out")),
            "metadata": {
                "prepend_bos": True,
                "context_size": 1024,
                "dataset_path": "monology/pile-uncopyrighted",
                "l0": config.get("l0"),
                "hf_hook_name": config.get("hf_hook_point_in"),
                "hf_hook_name_out": config.get("hf_hook_point_out"),
                "summed_over_layers": shape[1] if len(shape) == 3 else None,
            },
        }


class GemmaScope2CrossLayer(Layout):
    """Gemma Scope 2's cross-layer transcoders and crosscoders: the whole folder."""

    name = "Gemma Scope 2 cross-layer transcoder or crosscoder"
    weights = "{path}/params_layer_0.safetensors"
    config = "{path}/config.json"
    needs_config = False
    marks = ("params_layer_<n>.safetensors",)

    def patterns(self, path: str) -> list[str]:
        """Patterns of the files of all layers."""
        return [pattern.replace("_0.safetensors", "_*.safetensors") for pattern in super().patterns(path)]

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> CrossLayerTranscoder:
        config, address = self.read_config(path), provenance.address(path)
        if get_typed(config, "architecture", str, _CONFIG, "jump_relu") != "jump_relu":
            raise FormatError(explain(f"config.json has architecture={config['architecture']!r}.", want="'jump_relu'"))
        n = len(list(path.glob("params_layer_*.safetensors")))
        layers = [_read_layer(path / f"params_layer_{i}.safetensors", i, n) for i in range(n)]
        total = sum(layer["W_enc"].shape[1] for layer in layers)
        if get_typed(config, "width", int, _CONFIG, total) != total:
            what = f"config.json has width={config['width']}."
            raise FormatError(explain(what, want=f"{total}, as the layers have"))
        hooks, hooks_out = _cross_layer_hooks(config, address, n)
        return build_cross_layer(
            layers,
            dtype,
            device,
            hooks=hooks,
            hooks_out=hooks_out,
            model=_model(get_typed(config, "model_name", str, _CONFIG, provenance.model or "") or None, address),
            metadata={"context_size": 1024, "prepend_bos": True, "gemma_scope_2": config},
        )


# --- one SAE


def _completed(files: OpenFiles) -> dict[str, Any]:
    """config.json, completed by names of repository and folders; hooks as config.json names them."""
    config = {name: value for name, value in files.config.items() if value is not None}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(explain(f"config.json has architecture {config['architecture']!r}.", want="'jump_relu'"))
    for name in ("hf_hook_point_in", "hf_hook_point_out", "model_name"):
        if not isinstance(config.get(name, ""), str):
            raise FormatError(explain(f"config.json has {name}={config[name]!r}.", want="text"))
    inner = _inner_path(files)
    kind = _type(config, files.weights, inner)
    if kind == "clt":  # one configuration for all layers, with a placeholder for the number
        config = {name: value for name, value in config.items() if not name.startswith("hf_hook")}
    inferred = _hooks_by_name(files, inner)
    completed = {**inferred, **config, "type": kind}
    for name in ("hf_hook_point_in", "hf_hook_point_out"):
        if name in completed and _hook(completed[name]) is None:
            if name not in inferred:
                want = ", ".join(f"model.layers.<n>.{point}" for point in _HOOKS)
                raise FormatError(explain(f"config.json has {name}={completed[name]!r}.", want=want))
            completed[name] = inferred[name]
    if kind == "sae":  # it writes where it reads, and its file may repeat that
        completed.pop("hf_hook_point_out", None)
    return completed


def _type(config: Mapping[str, Any], weights: TensorFile, inner: str) -> str:
    by_name = "transcoder" if _site(inner) == "transcoder" else "sae"
    kind = config.get("type", "clt" if weights.path.name != "params.safetensors" else by_name)
    if "crosscoder" in inner:
        kind = "crosscoder"
    if kind not in _TYPES:
        want = "for a crosscoder, the whole folder; else one of " + ", ".join(_TYPES)
        raise FormatError(explain(f"{weights.path.name} is of type {kind!r}.", want=want))
    return kind


def _check_axes(file: TensorFile, kind: str) -> None:
    encoder, decoder, n_axes = file.shape("w_enc"), file.shape("w_dec"), 3 if kind == "clt" else 2
    if len(encoder) != 2 or len(decoder) != n_axes:
        what = f"{file.path.name} has w_enc of shape {encoder}, w_dec of shape {decoder}."
        raise FormatError(explain(what, want=f"2 and {n_axes} axes for type {kind!r}"))
    if kind == "sae" and encoder[0] != decoder[1]:
        what = f"an SAE that reads {encoder[0]} numbers and writes {decoder[1]}."
        raise FormatError(explain(what, want="type 'transcoder'"))


def _inner_path(files: OpenFiles) -> str:
    """Path inside the repository, without "owner/name", which may contain any word."""
    if files.provenance.path is not None:
        return files.provenance.path
    names = list(_REPO.finditer(files.address))
    return files.address[names[-1].end() :] if names else "/".join(Path(files.address).parts[-4:])


def _site(inner: str) -> str:
    sites = re.findall(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?(?=/|$)", inner)
    return sites[-1] if sites else ""


def _hooks_by_name(files: OpenFiles, inner: str) -> dict[str, str]:
    """Hooks from the layer in the name of file or folder, or in the catalogue, and the folder of the site."""
    in_file = re.search(r"layer_(\d+)", files.weights.path.name)
    in_path = re.findall(r"layer_(\d+)", inner)
    layer = in_file[1] if in_file else in_path[-1] if in_path else files.provenance.layer
    points = zip(("hf_hook_point_in", "hf_hook_point_out"), _SITES.get(_site(inner), (None, None)), strict=True)
    return {} if layer is None else {name: f"model.layers.{int(layer)}.{point}" for name, point in points if point}


def _hook(point: str | None) -> str | None:
    """Convert "model.layers.5.output" to TransformerLens' name; None if unknown."""
    names = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", point or "")
    return f"blocks.{names[1]}.{_HOOKS[names[2]]}" if names and names[2] in _HOOKS else None


def _model(name: str | None, address: str) -> str | None:
    """Name of the model on the hub, from config.json or else the repository's name."""
    sizes = _REPO.findall(address)
    if name is None:
        name = f"gemma-3-{sizes[-1][0]}-{sizes[-1][1]}" if sizes else None
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    name = name if "google" in name else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name  # the smallest has no suffix on the hub


# --- all layers


def _read_layer(path: Path, i: int, n: int) -> dict[str, Tensor]:
    """Read the tensors of layer `i` of `n`, by the names of CrossLayerTranscoder."""
    file = TensorFile(path)
    table = check_table(file, {**_TABLE, "W_dec": "w_dec FLO"}, L=n)
    tensors = {name: file.tensor(stored) for name, (stored, _) in table.items()}
    rows = tensors["W_dec"][:: max(1, len(tensors["W_dec"]) // _SAMPLED_ROWS)]
    if i and float(rows[:, :i].abs().max()) > 1e-3 * float(rows[:, i:].abs().max()):
        what = f"{path.name} writes to layers before its own, {i}."
        raise FormatError(explain(what, want="layers that write to themselves and later ones; nothing else can be run"))
    return {**tensors, "W_dec": tensors["W_dec"][:, i:]}


def _cross_layer_hooks(config: Mapping[str, Any], address: str, n: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kind = get_typed(config, "type", str, _CONFIG, "crosscoder" if "crosscoder" in address else "clt")
    layers = re.search(r"layer_(\d+(?:_\d+)*)_width", address)
    numbers = layers[1].replace("_", ",") if layers and kind != "clt" else "all"
    points = ("output", "output") if kind == "crosscoder" else _MLP
    read, written = (
        get_typed(config, f"hf_hook_point_{side}", str, _CONFIG, f"model.layers.{{{numbers}}}.{point}")
        for side, point in zip(("in", "out"), points, strict=True)
    )
    return _expand_hooks(read, n), _expand_hooks(written, n)


def _expand_hooks(name: str, n: int) -> tuple[str, ...]:
    """Convert "model.layers.{5,9}.output" or "model.layers.{all}...." to TransformerLens' names."""
    point = _POINT.fullmatch(name)
    layers = point[1].split(",") if point else []
    layers = [str(i) for i in range(n)] if layers == ["all"] else [layer.strip() for layer in layers]
    is_known = point is not None and point[2] in _CROSS_LAYER_HOOKS
    if not is_known or len(layers) != n or not all(layer.isdecimal() for layer in layers):
        want = f"model.layers.{{...}} with {n} layers or 'all', then one of {', '.join(_CROSS_LAYER_HOOKS)}"
        raise FormatError(explain(f"it is at {name!r}, and there are {n} files.", want=want))
    return tuple(f"blocks.{int(layer)}.{_HOOKS[point[2]]}" for layer in layers)
