"""Per-layer transcoders of circuit-tracer's layout: `layer_<i>.safetensors` at the root of a repository.

    z = relu(x @ W_enc.T + b_enc)  (with `activation_function.threshold`: where it is strictly greater)
    y = z @ W_dec + b_dec (+ x @ W_skip.T)

x is what the MLP reads, after its norm and the norm's gain; y its output. The model and the two points are in
`config.yaml`, the widths in `wandb-config.yaml` (some repositories spell it wanb-config.yaml); both may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import opened, published, said
from saewb.pretrained.formats._tensors import TensorFile, fit
from saewb.pretrained.formats._text import object_of, read_yaml
from saewb.sae.sae import SAE

NAME = "circuit-tracer transcoders"
CONFIG, WIDTHS = "config.yaml", ("wandb-config.yaml", "wanb-config.yaml")
MARKS = ("layer_<n>.safetensors with W_enc, W_dec, b_enc, b_dec",)
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_CORPUS = {"model_from_pretrained_kwargs": {"fold_ln": False}, "dataset_path": "monology/pile-uncopyrighted"}
_THRESHOLDS = ("activation_function.threshold", "threshold")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` may need."""
    if not _FILE.fullmatch(PurePosixPath(path).name):
        return []
    return [escape(path), *(escape(str(PurePosixPath(path).with_name(name))) for name in (CONFIG, *WIDTHS))]


def matches(place: Path) -> bool:
    """Whether it is a file of such a name with such tensors."""
    file = opened(Path(place)) if _FILE.fullmatch(Path(place).name) else None
    return file is not None and {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(file.names)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The transcoder of one layer, all of it memory-mapped.

    Args:
        place: the file layer_<n>.safetensors.
        facts: `model`, or a `repo` such as mwhanna/qwen3-14b-transcoders, says the model where config.yaml is missing.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if a tensor is missing, left over or does not fit the others or wandb-config.yaml.

    References:
        github.com/decoderesearch/circuit-tracer, transcoder/single_layer_transcoder.py.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        file = TensorFile(place)
        threshold = next((name for name in _THRESHOLDS if name in file), None)
        _check_tensors(file, threshold, _run(place))
        weights = {name: file.tensor(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        weights["W_enc"] = weights["W_enc"].T
        if threshold:
            weights["threshold"] = file.tensor(threshold)
        if "W_skip" in file:
            weights["W_skip"] = file.tensor("W_skip").T.contiguous()
        config = _yaml(place.with_name(CONFIG))
        block = f"blocks.{_FILE.fullmatch(place.name)[1]}"
        return published(
            weights,
            facts,
            NAME,
            dtype=dtype,
            device=device,
            activation="jumprelu" if threshold else "relu",
            skip="W_skip" in file,
            hook=f"{block}.{said(config, 'feature_input_hook', str, CONFIG, 'mlp.hook_in')}",
            hook_out=f"{block}.{said(config, 'feature_output_hook', str, CONFIG, 'hook_mlp_out')}",
            model=_model(config, facts, place),
            metadata={
                "model_from_pretrained_kwargs": {"fold_ln": False},
                "dataset_path": "monology/pile-uncopyrighted",
            },
        )


def _run(place: Path) -> Mapping[str, Any]:
    return next((found for name in WIDTHS if (found := _yaml(place.with_name(name)))), {})


def _yaml(path: Path) -> Mapping[str, Any]:
    return object_of(read_yaml(path), path) if path.is_file() else {}


def _check_tensors(file: TensorFile, threshold: str | None, run: Mapping[str, Any]) -> None:
    d_sae, d_in = file.shape("W_enc") if len(file.shape("W_enc")) == 2 else (0, 0)
    d_out = file.shape("W_dec")[-1] if file.shape("W_dec") else 0
    want: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_out)}
    want |= {"b_enc": (d_sae,), "b_dec": (d_out,)}
    if threshold:
        want[threshold] = (d_sae,)
    if "W_skip" in file:
        want["W_skip"] = (d_out, d_in)
    if "k" in file and threshold:  # of a training with a batch's top k, whose threshold is what counts now
        want["k"] = file.shape("k")
    fit({name: file.shape(name) for name in file.names}, want, file.path.name)
    for name, width in (("d_model", d_in), ("d_feature", d_sae)):
        says = said(said(run, name, dict, WIDTHS[0]), "value", int, name) if name in run else width
        if says != width:
            raise FormatError(explain(f"{WIDTHS[0]} has {name} {says}.", want=f"{width}, as W_enc has"))


def _model(config: Mapping[str, Any], facts: Facts, place: Path) -> str | None:
    if "model_name" in config:
        return said(config, "model_name", str, CONFIG)
    size = re.search(r"qwen3-(\d+(?:\.\d+)?)b", facts.where(place), re.IGNORECASE)
    return facts.model or (f"Qwen/Qwen3-{size[1]}B" if size else None)
