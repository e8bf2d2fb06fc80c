"""The layout of EleutherAI's library sparsify: `cfg.json` and `sae.safetensors`, of SAEs and (skip) transcoders.

    p = relu((x - b_dec) @ encoder.weight.T + encoder.bias)          (with "transcode": true nothing is subtracted)
    z = the k largest of p; "groupmax": of k equal groups the largest of each; "signed": the k largest in magnitude
    y = z @ W_dec + b_dec (+ x @ W_skip.T)

`transcode` is younger than the first published transcoders: where cfg.json does not say it, b_dec is subtracted.
`multi_topk` is of the loss: k latents are kept all the same.
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
from saewb.pretrained.formats._layout import published, said
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_json
from saewb.sae.sae import SAE

NAME = "sparsify"
CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
MARKS = (CONFIG, WEIGHTS)
_KNOWN = {
    "expansion_factor": int,
    "normalize_decoder": bool,
    "num_latents": int,
    "k": int,
    "multi_topk": bool,
    "skip_connection": bool,
    "transcode": bool,
    "activation": str,
    "signed": bool,
    "d_in": int,
}
_MODULE = re.compile(r"(?:^|[._])(?:layers|h|blocks)[._](\d+)(?:[._](mlp|attention|attn|self_attn))?$")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` may need."""
    if not path:
        return list(MARKS)
    parent = PurePosixPath(path).parent
    run = RUN if str(parent) == "." else f"{escape(str(parent))}/{RUN}"
    return [*(f"{escape(path)}/{name}" for name in MARKS), run]


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
    """The SAE or transcoder in a folder of this layout, all of it memory-mapped.

    Args:
        place: a folder with cfg.json and sae.safetensors, named like the module it reads ("layers.5.mlp").
        facts: `hook`, `hook_out` and `model` count where the folder's name and the run's config.json say nothing.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if anything is unknown, missing, left over or contradictory, or the file has an encoder only.

    References:
        github.com/EleutherAI/sparsify, sparse_coder.py and fused_encoder.py.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        cfg, file = _config(place / CONFIG), TensorFile(place / WEIGHTS)
        d_in, skip = said(cfg, "d_in", int, CONFIG), said(cfg, "skip_connection", bool, CONFIG, False)
        d_sae = cfg.get("num_latents") or d_in * said(cfg, "expansion_factor", int, CONFIG, 32)
        _check_tensors(file, d_in, d_sae, skip)
        run = _run(place)
        transcode = said(cfg, "transcode", bool, CONFIG, False)
        across = transcode or skip or run.get("transcode") is True
        hook, hook_out = _hooks(facts.path or place.absolute().as_posix(), across)
        weights = {
            "W_enc": file.tensor("encoder.weight").T,
            "b_enc": file.tensor("encoder.bias"),
            "W_dec": file.tensor("W_dec"),
            "b_dec": file.tensor("b_dec"),
        }
        if skip:
            weights["W_skip"] = file.tensor("W_skip").T.contiguous()
        return published(
            weights,
            facts,
            NAME,
            dtype=dtype,
            device=device,
            activation=_gate(cfg),
            k=said(cfg, "k", int, CONFIG),
            skip=skip,
            pre_bias="none" if transcode else "tied",
            hook=hook,
            hook_out=hook_out,
            model=run.get("model") if isinstance(run.get("model"), str) else None,
            metadata={"sparsify": cfg, **_corpus(run)},
        )


def _config(path: Path) -> Mapping[str, Any]:
    cfg = object_of(read_json(path), path)
    unknown = sorted(set(cfg) - set(_KNOWN))
    if unknown:
        raise FormatError(explain(f"{CONFIG} has keys that saewb does not know: {unknown}.", want=", ".join(_KNOWN)))
    for name in cfg:
        said(cfg, name, _KNOWN[name], CONFIG)
    return cfg


def _check_tensors(file: TensorFile, d_in: int, d_sae: int, skip: bool) -> None:
    if "W_dec" not in file and "encoder.weight" in file:
        raise FormatError(explain("it has an encoder and no W_dec.", want="a file that was saved with its decoder"))
    want = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    file.fit({**want, **({"W_skip": (d_in, d_in)} if skip else {})})


def _gate(cfg: Mapping[str, Any]) -> str:
    activation, signed = said(cfg, "activation", str, CONFIG, "topk"), said(cfg, "signed", bool, CONFIG, False)
    if activation not in ("topk", "groupmax") or (signed and activation != "topk"):
        what = f"{CONFIG} has activation={activation!r}, signed={signed}."
        raise FormatError(explain(what, want="'topk' (signed or not) or 'groupmax'"))
    return "abstopk" if signed else activation


def _run(place: Path) -> Mapping[str, Any]:
    """The training run's configuration, in the folder above; empty if there is none."""
    path = place.absolute().parent / RUN
    return object_of(read_json(path), path) if path.is_file() else {}


def _corpus(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"dataset_path": run.get("dataset"), "context_size": run.get("ctx_len")}


def _hooks(path: str, across: bool) -> tuple[str | None, str | None]:
    """Where the module of this name is read and written, in TransformerLens' names; None if that is not known."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if name == "embed_tokens":
        return "hook_embed", None
    found = _MODULE.search(name)
    if not found:
        return None, None
    block, part = f"blocks.{found[1]}", found[2]
    if part is None:
        return (f"{block}.hook_resid_pre", f"{block}.hook_resid_post") if across else (f"{block}.hook_resid_post", None)
    if part == "mlp":
        return (f"{block}.mlp.hook_in", f"{block}.hook_mlp_out") if across else (f"{block}.hook_mlp_out", None)
    return (None, f"{block}.hook_attn_out") if across else (f"{block}.hook_attn_out", None)
