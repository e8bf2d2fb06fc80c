"""The layout of the library dictionary_learning (and of SAE Bench): `config.json` and `ae.pt`, of every dict_class.

- AutoEncoder        relu, `bias` subtracted before encoding and added after decoding
- AutoEncoderNew     relu, nothing subtracted
- GatedAutoEncoder   gated: exactly a JumpReLU SAE, and read as one
- AutoEncoderTopK    top-k, `b_dec` subtracted; its `threshold`, of newer files, is not used at inference
- BatchTopKSAE, MatryoshkaBatchTopKSAE   JumpReLU with one `threshold` for all latents; -1, "not yet known", is ReLU
- JumpReluAutoEncoder   JumpReLU, nothing subtracted

The library's own `AutoEncoder.from_pretrained` also scales decoder rows to norm 1, which changes the units of latents
but not the reconstruction; here they are as stored: `sae.fold_decoder_norm()` does the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain, near
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import published, said, turned
from saewb.pretrained.formats._tensors import FLOATS, TensorFile, fit
from saewb.pretrained.formats._text import read_json
from saewb.pretrained.formats.saelens.fold import ungated
from saewb.sae.sae import SAE

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
MARKS = (CONFIG, WEIGHTS)

# What is stored: names, each with its axes; what only newer files have comes after a question mark.
_LINEAR = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
_PLAIN = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"}
_CLASSES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "bias": "D"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "D"},
    "GatedAutoEncoder": {
        **{"encoder.weight": "FD", "decoder.weight": "DF", "decoder_bias": "D"},
        **{"r_mag": "F", "gate_bias": "F", "mag_bias": "F"},
    },
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "D", "k": "?", "threshold": "?"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "D", "k": "?", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "k": "?", "threshold": "", "group_sizes": "?G"},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "F"},
}
_OURS = {
    "encoder.bias": "b_enc",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_WIDTHS = {"D": "activation_dim", "F": "dict_size"}
_UNTIED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SITES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp": "hook_mlp_out", "att": "hook_attn_out"}


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` needs."""
    prefix = f"{escape(path)}/" if path else ""
    return [f"{prefix}{name}" for name in MARKS]


def matches(place: Path) -> bool:
    """Whether the folder has the two files of this layout."""
    return all((Path(place) / name).is_file() for name in MARKS)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in a folder of this layout. The encoder is memory-mapped; a stored `decoder.weight` is transposed.

    Args:
        place: a folder with config.json and ae.pt.
        facts: `hook` counts where config.json names a part of the model that saewb does not know.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if anything in the folder is unknown, missing, left over or contradictory.

    References:
        github.com/saprmarks/dictionary_learning, dictionary.py and trainers/.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        config = read_json(place / CONFIG)
        trainer = said(config, "trainer", dict, CONFIG)
        kind = said(trainer, "dict_class", str, "its trainer")
        if kind not in _CLASSES:
            raise FormatError(
                explain(f"unknown dict_class {kind!r}.", near=near(kind, _CLASSES), want=", ".join(_CLASSES))
            )
        stored, values = _stored(TensorFile(place / WEIGHTS))
        _check_shapes(stored, kind, trainer)
        k = _k(stored, values, trainer) if kind == "AutoEncoderTopK" else None
        return published(
            _weights(stored, kind),
            facts,
            NAME,
            dtype=dtype,
            device=device,
            activation={"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk"}.get(
                kind, "jumprelu"
            ),
            k=k,
            pre_bias="none" if kind in _UNTIED else "tied",
            hook=_hook(trainer, config.get("buffer")),
            model=said(trainer, "lm_name", str, "its trainer", facts.model or "").split("/")[-1],
            metadata=_metadata(trainer, config.get("buffer"), stored),
        )


def _stored(file: TensorFile) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors and plain values; out of "ae" in what the library writes to go on with training."""
    prefix = "ae/" if any(name.startswith("ae/") for name in file.names) else ""
    own = [name for name in file.names if name.startswith(prefix)]
    values = {name[len(prefix) :]: value for name, value in file.values.items() if name.startswith(prefix)}
    return {name[len(prefix) :]: file.tensor(name) for name in own}, values


def _check_shapes(stored: Mapping[str, Tensor], kind: str, trainer: Mapping[str, Any]) -> None:
    widths = {axis: said(trainer, name, int, "its trainer") for axis, name in _WIDTHS.items()}
    widths["G"] = stored["group_sizes"].numel() if "group_sizes" in stored else 0
    want = {
        name: tuple(widths[axis] for axis in axes.lstrip("?"))
        for name, axes in _CLASSES[kind].items()
        if name in stored or not axes.startswith("?")
    }
    fit({name: tuple(tensor.shape) for name, tensor in stored.items()}, want, WEIGHTS)
    wrong = [name for name, t in stored.items() if name not in ("k", "group_sizes") and t.dtype not in FLOATS]
    if wrong:
        raise FormatError(explain(f"{wrong[0]} is stored as {stored[wrong[0]].dtype}.", want="floating point numbers"))
    if "group_sizes" in stored and int(stored["group_sizes"].sum()) != widths["F"]:
        raise FormatError(explain(f"group_sizes sum to {int(stored['group_sizes'].sum())}.", want=f"{widths['F']}"))


def _k(stored: Mapping[str, Tensor], values: Mapping[str, Any], trainer: Mapping[str, Any]) -> int:
    found = [stored["k"].item()] if "k" in stored else [values[name] for name in ("k",) if name in values]
    found += [trainer["k"]] if "k" in trainer else []
    if not found or any(type(k) is not int for k in found) or len(set(found)) > 1:
        raise FormatError(explain(f"k is {found or 'not said'} in {WEIGHTS} and {CONFIG}.", want="one integer"))
    return found[0]


def _weights(stored: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    w = {_OURS.get(name, name): t for name, t in stored.items() if name not in ("k", "group_sizes")}
    if "encoder.weight" in w:
        w["W_enc"], w["W_dec"] = w.pop("encoder.weight").T, turned(w.pop("decoder.weight"))
    if kind == "GatedAutoEncoder":
        return ungated(w)
    if kind == "AutoEncoderTopK":
        w.pop("threshold", None)
    elif "threshold" in w and w["threshold"].ndim == 0:
        w["threshold"] = w["threshold"].repeat(w["b_enc"].shape[0])
    return w


def _hook(trainer: Mapping[str, Any], buffer: object) -> str | None:
    """By the layer and the name of the part; None if the name is not one that the library's examples use."""
    layer = said(trainer, "layer", int, "its trainer")
    part = said(trainer, "submodule_name", str, "its trainer", "resid_post")
    io = buffer.get("io", "out") if isinstance(buffer, Mapping) else "out"
    site = next((hook for name, hook in _SITES.items() if re.search(rf"(?<![a-z]){name}", part)), None)
    return f"blocks.{layer}.{site}" if site and io == "out" else None


def _metadata(trainer: Mapping[str, Any], buffer: object, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    ctx_len = buffer.get("ctx_len") if isinstance(buffer, Mapping) else None
    kept = {"context_size": ctx_len, "dataset_path": "monology/pile-uncopyrighted", "prepend_bos": True}
    if "group_sizes" in stored:
        kept["group_sizes"] = stored["group_sizes"].tolist()
    return {**kept, "dictionary_learning": dict(trainer)}
