"""Cross-layer transcoders in circuit-tracer's layout: `W_enc_<i>.safetensors`, `W_dec_<i>.safetensors`, `config.yaml`.

    z_i = relu(x_i @ W_enc_i.T + b_enc_i)  (with `threshold_i`: where it is strictly greater)
    y_j = sum over i <= j of z_i @ W_dec_i[:, j - i]  +  b_dec_j  (+ x_j @ W_skip_j)

`b_dec_j` stands in the file of W_enc_j and belongs to the layer that is written to; it is added once. The folder is
read as one `CrossLayerTranscoder`. One layer of it, "<folder>/3", is read as an SAE to encode with: its decoder row is
all that a latent writes to any layer, summed, which says what the latent does but reconstructs nothing.
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import across_layers, published, said
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_yaml
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.sae import SAE

NAME = "circuit-tracer cross-layer transcoder"
CONFIG = "config.yaml"
MARKS = ("W_enc_<n>.safetensors", "W_dec_<n>.safetensors", CONFIG)
_LAYER = re.compile(r"(?:W_enc_)?(\d+)(?:\.safetensors)?")
_METADATA = {"model_from_pretrained_kwargs": {"fold_ln": False}}


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading `path` needs: its root, or the number of a layer."""
    place = PurePosixPath(path)
    found = _LAYER.fullmatch(place.name)
    folder = place.parent if found else place
    names = [f"W_enc_{n}.safetensors" for n in (found[1] if found else "*",)]
    names += [f"W_dec_{n}.safetensors" for n in (found[1] if found else "*",)]
    return [name if str(folder) == "." else f"{escape(str(folder))}/{name}" for name in (*names, CONFIG)]


def matches(place: Path) -> bool:
    """Whether the folder has the files of layer 0; or, for "<folder>/<n>" or .../W_enc_<n>.safetensors, of layer n."""
    folder, layer = _one(Path(place))
    return all((folder / f"W_{side}_{layer or 0}.safetensors").is_file() for side in ("enc", "dec"))


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CrossLayerTranscoder | SAE:
    """The whole transcoder, its matrices memory-mapped; or one layer of it, to encode with.

    Args:
        place: the folder; or its name, a slash and the number of a layer.
        facts: `model` counts where there is no config.yaml.
        dtype: to compute in; None means as stored. Of the whole, only biases and thresholds are converted at once.
        device: of the parameters; None means the CPU. Another one is given all of them.

    Raises:
        FormatError: if anything is missing, left over or does not fit.

    References:
        github.com/decoderesearch/circuit-tracer, transcoder/cross_layer_transcoder.py.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        facts.no_factor(NAME)
        folder, layer = _one(place)
        config = object_of(read_yaml(folder / CONFIG), folder / CONFIG) if (folder / CONFIG).is_file() else {}
        sides = [said(config, f"feature_{side}_hook", str, CONFIG, default) for side, default in _SIDES]
        fields = {"model": said(config, "model_name", str, CONFIG, facts.model or "") or None}
        if layer is not None:
            hooks = {"hook": f"blocks.{layer}.{sides[0]}", "hook_out": f"blocks.{layer}.{sides[1]}"}
            return _summed(folder, layer, facts, dtype, device, **hooks, **fields)
        n = len(list(folder.glob("W_enc_*.safetensors")))
        layers = [_layer(folder, i, n) for i in range(n)]
        hooks = [tuple(f"blocks.{i}.{side}" for i in range(n)) for side in sides]
        return across_layers(layers, dtype, device, hooks=hooks[0], hooks_out=hooks[1], metadata=_METADATA, **fields)


_SIDES = (("input", "hook_resid_mid"), ("output", "hook_mlp_out"))


def _one(place: Path) -> tuple[Path, int | None]:
    """The folder, and which layer of it is meant, if one."""
    found = _LAYER.fullmatch(place.name)
    return (place.parent, int(found[1])) if found and not place.is_dir() else (place, None)


def _layer(folder: Path, i: int, n: int | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by the names of CrossLayerTranscoder; `n` layers in all, if that is known."""
    enc, dec = (TensorFile(folder / f"W_{side}_{i}.safetensors") for side in ("enc", "dec"))
    shape, written = enc.shape(f"W_enc_{i}"), dec.shape(f"W_dec_{i}")
    if len(shape) != 2 or len(written) != 3:
        what = f"layer {i} has W_enc of shape {shape}, W_dec of shape {written}."
        raise FormatError(explain(what, want="[d_sae, d_in] and [d_sae, layers from this one on, d_out]"))
    (d_sae, d_in), (_, targets, d_out) = shape, written
    dec.fit({f"W_dec_{i}": (d_sae, targets if n is None else n - i, d_out)})
    want: dict[str, tuple[int, ...]] = {"W_enc": shape, "b_enc": (d_sae,), "b_dec": (d_out,)}
    optional = {"threshold": (d_sae,), "W_skip": (d_in, d_out)}
    want |= {name: shape for name, shape in optional.items() if f"{name}_{i}" in enc}
    enc.fit({f"{name}_{i}": shape for name, shape in want.items()})
    tensors = {name: enc.tensor(f"{name}_{i}") for name in want}
    return {**tensors, "W_enc": tensors["W_enc"].T, "W_dec": dec.tensor(f"W_dec_{i}")}


def _summed(folder: Path, layer: int, facts: Facts, dtype: Any, device: Any, **fields: Any) -> SAE:
    w = _layer(folder, layer)
    stored, targets = w["W_dec"].dtype, w["W_dec"].shape[1]
    if "W_skip" in w:  # of the layer written to; it has no part in the latents
        del w["W_skip"]
    total = w["W_dec"][:, 0].float()
    for target in range(1, targets):  # one at a time: a sum in another dtype copies all of it first
        total += w["W_dec"][:, target]
    w["W_dec"] = total.to(dtype or stored)
    return published(
        w,
        facts,
        NAME,
        dtype=dtype,
        device=device,
        activation="jumprelu" if "threshold" in w else "relu",
        metadata={**_METADATA, "summed_over_layers": targets},
        **fields,
    )
