"""From the weights of a published layout to an SAE, with what its files and `Facts` say about it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import FLOATS, TensorFile
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder
from saewb.sae.sae import SAE, SAEConfig

Kind = TypeVar("Kind")


def said(content: object, name: str, kind: type[Kind], where: str, default: Kind | None = None) -> Kind:
    """A field of a configuration file, of just this type.

    Raises:
        FormatError: if it is of another type, or missing and there is no default.
    """
    if not isinstance(content, Mapping):
        raise FormatError(explain(f"{where} holds a {type(content).__name__}.", want=f"a mapping with {name!r}"))
    value = content.get(name, default)
    if type(value) is not kind:
        got = f"{name}={reprlib.repr(value)}" if name in content else f"no {name!r}"
        raise FormatError(explain(f"{where} has {got}.", want=f"{name} as {kind.__name__}"))
    return value


def opened(place: Path) -> TensorFile | None:
    """The tensors of a file, to recognize a layout by their names; None if it is no file of tensors."""
    try:
        return TensorFile(place) if place.is_file() else None
    except FormatError:
        return None


def published(
    weights: Mapping[str, Tensor],
    facts: Facts,
    layout: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    model: str | None,
    hook: str | None,
    hook_out: str | None = None,
    metadata: Mapping[str, Any],
    **fields: Any,
) -> SAE:
    """An SAE of these weights, with its widths taken from them.

    Args:
        weights: by the names of `SAE`.
        facts: its overrides come before what the file says; `hook`, `hook_out`, `model` count where that says nothing.
        layout: its name, for messages.
        dtype: of the parameters; None means that of W_dec.
        device: of the parameters; None means the CPU.
        model: as the file says, None if it does not; `hook` and `hook_out` likewise.
        hook: see `model`.
        hook_out: see `model`; None for an SAE that writes where it reads.
        metadata: whatever else is known, by SAELens' names; None is left out.
        fields: of SAEConfig.

    Raises:
        FormatError: if weights do not fit each other, or are no floating point numbers.
    """
    facts.no_factor(layout)
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(explain(f"{name} is stored as {tensor.dtype}.", want=", ".join(map(str, FLOATS))))
    for name, want in (("W_enc", 2), ("W_dec", 2)):
        if weights[name].ndim != want:
            raise FormatError(explain(f"{name} has shape {tuple(weights[name].shape)}.", want=f"{want} dimensions"))
    placed = facts.placed(model=model, hook=hook, hook_out=hook_out, **metadata)
    if placed["hook_out"] == placed["hook"]:
        placed["hook_out"] = None
    d_in, d_sae = weights["W_enc"].shape
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, d_out=weights["W_dec"].shape[1], **placed, **fields)
    return built(cfg, weights, weights["W_dec"].dtype, dtype, device)


def across_layers(
    layers: Sequence[Mapping[str, Tensor]], dtype: torch.dtype | None, device: torch.device | str | None, **fields: Any
) -> CrossLayerTranscoder:
    """A cross-layer transcoder of these layers; what is large in it stays as stored, and memory-mapped on the CPU.

    Args:
        layers: of each layer the tensors by the names of CrossLayerTranscoder.
        dtype: to compute in; None means as stored.
        device: of the parameters; None means the CPU.
        fields: of CrossLayerConfig.

    Raises:
        FormatError: if there are no layers, or they have not the same tensors and widths.
    """
    names = [sorted(layer) for layer in layers]
    if not layers or any(of != names[0] for of in names):
        got = "; ".join(f"layer {i}: {', '.join(of)}" for i, of in enumerate(names) if of != names[0])
        raise FormatError(
            explain(f"its {len(layers)} layers differ in what they have: {got}.", want="the same in each")
        )
    d_in = layers[0]["W_enc"].shape[0]
    cfg = CrossLayerConfig(
        d_in=d_in,
        d_sae=tuple(layer["W_enc"].shape[1] for layer in layers),
        d_out=layers[0]["W_dec"].shape[2],
        activation="jumprelu" if "threshold" in layers[0] else "relu",
        skip="W_skip" in layers[0],
        **fields,
    )
    dtype = dtype or layers[0]["b_dec"].dtype
    cast = {name: dtype if name in ("b_enc", "b_dec", "threshold") else None for name in names[0]}
    tensors = {name: [layer[name].to(device or "cpu", to) for layer in layers] for name, to in cast.items()}
    return CrossLayerTranscoder.from_tensors(cfg, tensors)


def turned(weight: Tensor) -> Tensor:
    """The transpose of a matrix as it is stored: a decoder whose rows lie in one piece, as taking few of them needs."""
    if weight.ndim != 2:
        raise FormatError(explain(f"a weight has shape {tuple(weight.shape)}.", want="a matrix"))
    return weight.T.contiguous()
