"""Qwen Scope: one `layer<n>.sae.pt` per layer at the root of a repository, and a `config.json` for all of them.

    z = the k largest of relu(x @ W_enc.T + b_enc);  y = z @ W_dec.T + b_dec             (nothing is subtracted from x)

Where there is no config.json, k and the model are in the repository's name: Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import published, said, turned
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_json
from saewb.sae.sae import SAE

NAME = "Qwen Scope"
CONFIG = "config.json"
MARKS = ("layer<n>.sae.pt",)
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPO = re.compile(r"SAE-Res-(?P<model>[^/]+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` may need."""
    if not _FILE.fullmatch(PurePosixPath(path).name):
        return []
    return [escape(path), escape(str(PurePosixPath(path).with_name(CONFIG)))]


def matches(place: Path) -> bool:
    """Whether it is a file of such a name."""
    return bool(_FILE.fullmatch(Path(place).name)) and Path(place).is_file()


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE of one layer. The encoder is memory-mapped, the decoder transposed.

    Args:
        place: the file layer<n>.sae.pt.
        facts: `repo` says k and the model where there is no config.json beside the file; so does `overrides["k"]`.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if a tensor is missing, left over or does not fit, or k is not known.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        file, config, named = TensorFile(place), _config(place), _REPO.search(facts.where(place))
        d_sae, d_in = file.shape("W_enc") if len(file.shape("W_enc")) == 2 else (0, 0)
        file.fit({"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)})
        _check_widths(config, named, d_in, d_sae)
        layer = int(_FILE.fullmatch(place.name)[1])
        overrides = dict(facts.overrides)
        k = config.get("k", overrides.pop("k", int(named["k"]) if named else None))
        if type(k) is not int:
            raise FormatError(
                explain(
                    f"k is {k!r}: there is no {CONFIG} beside the file that says it.",
                    want="a repository's name such as Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
                    fix='saewb.load_sae("Qwen/SAE-Res-...", "layer0.sae.pt")',
                )
            )
        weights = {"W_enc": file.tensor("W_enc").T, "W_dec": turned(file.tensor("W_dec"))}
        return published(
            {**weights, "b_enc": file.tensor("b_enc"), "b_dec": file.tensor("b_dec")},
            replace(facts, overrides=overrides),
            NAME,
            dtype=dtype,
            device=device,
            activation="topk",
            k=k,
            hook=f"blocks.{layer}.{_site(config)}",
            model=config.get("base_model") or (f"Qwen/{named['model']}" if named else None),
            metadata={"context_size": 1024, "prepend_bos": True, "hf_hook_name": f"model.layers.{layer}"},
        )


def _config(place: Path) -> Mapping[str, Any]:
    path = place.with_name(CONFIG)
    config = object_of(read_json(path), path) if path.is_file() else {}
    for name, kind in (("k", int), ("d_model", int), ("d_sae", int), ("base_model", str), ("hook_point", str)):
        if name in config:
            said(config, name, kind, CONFIG)
    return config


def _site(config: Mapping[str, Any]) -> str:
    site = config.get("hook_point", "resid_post")
    if site != "resid_post":
        raise FormatError(explain(f"{CONFIG} has hook_point={site!r}.", want="'resid_post'"))
    return "hook_resid_post"


def _check_widths(config: Mapping[str, Any], named: re.Match[str] | None, d_in: int, d_sae: int) -> None:
    if config.get("d_model", d_in) != d_in or config.get("d_sae", d_sae) != d_sae:
        what = f"{CONFIG} says d_model={config.get('d_model')}, d_sae={config.get('d_sae')}."
        raise FormatError(explain(what, want=f"{d_in} and {d_sae}, as W_enc has"))
    if not config and named and int(named["width"]) * 1024 != d_sae:
        raise FormatError(explain(f"{named[0]} should have {named['width']}K latents, and W_enc has {d_sae}."))
