"""Temporal SAEs as their authors published them: `conf.yaml` and `latest_ckpt.safetensors`.

Tensors are named D [d_sae, d_in], b, E [d_in, d_sae] if untied, and attn_layers.*; they are those of TemporalSAE as
they stand. The layer is in the folder's name: conf.yaml has one too, which is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, positive, read_yaml
from saewb.sae.temporal import TemporalConfig, TemporalSAE

NAME = "temporal SAEs"
CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"
MARKS = (CONFIG, WEIGHTS)

_MOST = 1 << 32  # of a width
_OURS = {"D": "W_dec", "b": "b_dec", "E": "W_enc"}


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` needs."""
    prefix = f"{path}/" if path else ""
    return [escape(f"{prefix}{name}") for name in MARKS]


def matches(place: Path) -> bool:
    """Whether the folder has the two files of this layout."""
    return all((Path(place) / name).is_file() for name in MARKS)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TemporalSAE:
    """The temporal SAE in a folder of this layout; weights are memory-mapped.

    Args:
        place: the folder.
        facts: `model` and `hook` are not in the files; without a hook it is the residual stream behind the layer that
            the folder's name says. `scaling_factor` is not used: conf.yaml has it.
        dtype: of the parameters; None means as stored (bfloat16).
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if conf.yaml lacks a setting, or the tensors are not those it says.
    """
    facts, folder = facts or Facts(), Path(place)
    with reading(folder):
        said = _settings(folder / CONFIG)
        file = TensorFile(folder / WEIGHTS)
        if said["n_attn_layers"] > len(file.names):  # before a name is made for each
            raise FormatError(explain(f"{CONFIG} has n_attn_layers {said['n_attn_layers']}, {file!r} not so many."))
        cfg = TemporalConfig(**said, **_placed(facts, folder))
        theirs = {ours: name for name, ours in _OURS.items()}
        names = {name: theirs.get(name, name) for name in cfg.tensor_shapes()}
        file.fit({names[name]: shape for name, shape in cfg.tensor_shapes().items()})
        kind = dtype or file.dtype("D")
        weights = {ours: file.tensor(name).to(device or "cpu", kind) for ours, name in names.items()}
        return TemporalSAE.from_tensors(cfg, weights)


def _settings(path: Path) -> dict[str, Any]:
    conf = object_of(read_yaml(path), path)
    sae, d_in = _inner(conf, "sae"), _inner(conf, "llm").get("dimin")
    wanted = ("exp_factor", "n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk")
    missing = [name for name in (*wanted, "tied_weights", "scaling_factor") if name not in sae]
    if missing or type(d_in) is not int or not 0 < d_in < _MOST:
        what = f"{path.name} has llm.dimin={d_in!r} and no sae.{', sae.'.join(missing)}." if missing else ""
        raise FormatError(explain(what or f"{path.name} has llm.dimin={d_in!r}.", want="both, llm.dimin a width"))
    if sae["sae_diff_type"] not in ("relu", "topk"):
        raise FormatError(explain(f"{path.name} has sae_diff_type {sae['sae_diff_type']!r}.", want="'relu' or 'topk'"))
    k = sae["kval_topk"] if sae["sae_diff_type"] == "topk" else None  # a top-k without its k keeps all
    counts = {name: sae[name] for name in ("n_heads", "n_attn_layers", "bottleneck_factor")}
    wrong = [name for name, n in {**counts, "kval_topk": 1 if k is None else k}.items() if type(n) is not int]
    if wrong or type(sae["tied_weights"]) is not bool:
        what = f"{path.name} has tied_weights {sae['tied_weights']!r}, {', '.join(f'{n} {sae[n]!r}' for n in wrong)}."
        raise FormatError(explain(what, want="true or false, and integers"))
    return {
        "d_in": d_in,
        "d_sae": int(min(_MOST, d_in * positive(sae["exp_factor"], "exp_factor"))),
        "activation": "relu" if k is None else "topk",
        "k": k,
        **counts,
        "tied": sae["tied_weights"],
        "pre_bias": "tied",
        "factor": positive(sae["scaling_factor"], "scaling_factor"),
    }


def _inner(conf: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = conf.get(name)
    if not isinstance(inner, Mapping):
        raise FormatError(explain(f"{CONFIG} has {name}={inner!r}.", want="a block of settings"))
    return inner


def _placed(facts: Facts, folder: Path) -> dict[str, Any]:
    layer = facts.number(r"layer_(\d+)", folder)
    layer = facts.layer if layer is None else layer
    hook = facts.hook or (None if layer is None else f"blocks.{layer}.hook_resid_post")
    places = facts.placed(model=None, hook=hook)
    del places["hook_out"]
    return places
