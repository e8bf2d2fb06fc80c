"""Gemma Scope 2's cross-layer transcoders and crosscoders: a folder of `params_layer_<i>.safetensors`, `config.json`.

    z_i = relu(x_i @ w_enc_i + b_enc_i) where that is > threshold_i
    y_j = sum over i <= j of z_i @ w_dec_i[:, j]  +  b_dec_j  (+ x_j @ affine_skip_connection_j)

A crosscoder of layers 5, 9, 12, 15 has four files, 0 to 3, each with latents of its own that read the residual stream
at that layer and describe it there and at the later ones ("weakly causal"); it is the same arithmetic. `w_dec` has room
for earlier layers too, which is zero; a file in which it is not is refused, since no pass could write there in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import across_layers, said
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_json
from saewb.sae.cross_layer import CrossLayerTranscoder

NAME = "Gemma Scope 2 cross-layer transcoder or crosscoder"
CONFIG = "config.json"
MARKS = ("params_layer_<n>.safetensors",)
_SITES = {  # in hf_hook_point_in and _out, after the layer: what TransformerLens calls it
    "pre_feedforward_layernorm.output": "mlp.hook_in",  # with the norm's gain: not hook_mlp_in, which is before it
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "output": "hook_resid_post",
}
_POINT = re.compile(r"model\.layers\.\{([^}]*)\}\.(.+)")
_SAMPLED = 64  # rows of a decoder that are looked at for what it writes to earlier layers


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` needs."""
    prefix = f"{escape(path)}/" if path else ""
    return [f"{prefix}params_layer_*.safetensors", f"{prefix}{CONFIG}"]


def matches(place: Path) -> bool:
    """Whether the folder has the file of layer 0."""
    return (Path(place) / "params_layer_0.safetensors").is_file()


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CrossLayerTranscoder:
    """The cross-layer transcoder or crosscoder in a folder, its matrices memory-mapped.

    Args:
        place: the folder.
        facts: `repo` and `path` say what it is where there is no config.json; `model` counts where that says nothing.
        dtype: to compute in; None means as stored. Only biases and thresholds are converted at once.
        device: of the parameters; None means the CPU. Another one is given all of them.

    Raises:
        FormatError: if anything is missing, left over or does not fit, or a layer writes to an earlier one.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        facts.no_factor(NAME)
        config = object_of(read_json(place / CONFIG), place / CONFIG) if (place / CONFIG).is_file() else {}
        if said(config, "architecture", str, CONFIG, "jump_relu") != "jump_relu":
            raise FormatError(explain(f"{CONFIG} has architecture={config['architecture']!r}.", want="'jump_relu'"))
        n = len(list(place.glob("params_layer_*.safetensors")))
        layers = [_layer(place / f"params_layer_{i}.safetensors", i, n) for i in range(n)]
        _check_total(config, layers)
        hooks, hooks_out = _hooks(config, facts.where(place), n)
        return across_layers(
            layers,
            dtype,
            device,
            hooks=hooks,
            hooks_out=hooks_out,
            model=_model(config, facts, place),
            metadata={"context_size": 1024, "prepend_bos": True, "gemma_scope_2": config},
        )


def _layer(path: Path, i: int, n: int) -> dict[str, Tensor]:
    """Tensors of one layer, by the names of CrossLayerTranscoder."""
    file = TensorFile(path)
    shape, written = file.shape("w_enc"), file.shape("w_dec")
    if len(shape) != 2 or len(written) != 3:
        what = f"{path.name} has w_enc of shape {shape}, w_dec of shape {written}."
        raise FormatError(explain(what, want=f"[d_in, d_sae] and [d_sae, {n} layers, d_out]"))
    (d_in, d_sae), d_out = shape, written[2]
    want: dict[str, tuple[int, ...]] = {"w_enc": shape, "w_dec": (d_sae, n, d_out), "threshold": (d_sae,)}
    want |= {"b_enc": (d_sae,), "b_dec": (d_out,)}
    skip = "affine_skip_connection"
    if skip in file:
        want[skip] = (d_in, d_out)
    file.fit(want)
    tensors = {_OURS.get(name, name): file.tensor(name) for name in want}
    _check_causal(tensors["W_dec"], i, path.name)
    return {**tensors, "W_dec": tensors["W_dec"][:, i:]}


_OURS = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}


def _check_causal(decoder: Tensor, i: int, name: str) -> None:
    rows = decoder[:: max(1, len(decoder) // _SAMPLED)]
    if i and float(rows[:, :i].abs().max()) > 1e-3 * float(rows[:, i:].abs().max()):
        what = f"{name} writes to layers before its own, {i}."
        raise FormatError(explain(what, want="layers that write to themselves and later ones; nothing else can be run"))


def _check_total(config: Mapping[str, Any], layers: list[dict[str, Tensor]]) -> None:
    total = sum(layer["W_enc"].shape[1] for layer in layers)
    if said(config, "width", int, CONFIG, total) != total:
        raise FormatError(explain(f"{CONFIG} has width={config['width']}.", want=f"{total}, as the layers have"))


def _hooks(config: Mapping[str, Any], where: str, n: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kind = said(config, "type", str, CONFIG, "crosscoder" if "crosscoder" in where else "clt")
    named = re.search(r"layer_(\d+(?:_\d+)*)_width", where)
    layers = "all" if kind == "clt" else ",".join(named[1].split("_")) if named else "all"
    inner = ("output", "output") if kind == "crosscoder" else list(_SITES)[:2]
    default = [f"model.layers.{{{layers}}}.{site}" for site in inner]
    points = zip(("in", "out"), default, strict=True)
    read, written = (_points(said(config, f"hf_hook_point_{s}", str, CONFIG, d), n) for s, d in points)
    return read, written


def _points(name: str, n: int) -> tuple[str, ...]:
    """TransformerLens' names of "model.layers.{5,9}.output" or "model.layers.{all}...."."""
    found = _POINT.fullmatch(name)
    layers = found[1].split(",") if found else []
    layers = [str(i) for i in range(n)] if layers == ["all"] else [layer.strip() for layer in layers]
    if not found or found[2] not in _SITES or len(layers) != n or not all(layer.isdecimal() for layer in layers):
        want = f"model.layers.{{...}} with {n} layers or 'all', then one of {', '.join(_SITES)}"
        raise FormatError(explain(f"it is at {name!r}, and there are {n} files.", want=want))
    return tuple(f"blocks.{int(layer)}.{_SITES[found[2]]}" for layer in layers)


def _model(config: Mapping[str, Any], facts: Facts, place: Path) -> str | None:
    named = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", facts.where(place))
    name = said(config, "model_name", str, CONFIG, facts.model or (f"gemma-3-{named[1]}" if named else ""))
    name = name.replace("-v3", "-3")
    if name.endswith("270m-pt"):
        name = name.removesuffix("-pt")
    return (name if "google" in name else f"google/{name}") if name else None
