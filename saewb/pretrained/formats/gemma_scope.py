"""Gemma Scope: `params.npz` and no configuration; SAEs of Gemma 2, and transcoders of its MLPs.

The weights are those of a JumpReLU SAE as they stand. All else, model, layer and site, is in the names of the
repository and its folders: google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}/layer_L/width_W/... .

- Widths are those of the arrays, not of the names.
- SAEs of the embedding were trained before Gemma multiplies embeddings with sqrt(d_model), and the model's hook is
  behind it: W_enc / sqrt(d), W_dec sqrt(d), b_dec sqrt(d). (sae-lens leaves b_dec as it is.)
- Transcoders read `ln2.hook_normalized`, before the norm's gain: the model must not have its norms folded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built, reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile
from saewb.sae.sae import SAE, SAEConfig

NAME = "Gemma Scope"
WEIGHTS = "params.npz"
MARKS = (WEIGHTS,)

_REPO = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_HOOKS = {
    "res": ("blocks.{}.hook_resid_post", None),
    "mlp": ("blocks.{}.hook_mlp_out", None),
    "att": ("blocks.{}.attn.hook_z", None),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}
_SPELLINGS = {
    **{"wenc": "W_enc", "we": "W_enc", "wdec": "W_dec", "wd": "W_dec"},
    **{"benc": "b_enc", "be": "b_enc", "bdec": "b_dec", "bd": "b_dec", "threshold": "threshold"},
}


@dataclass(frozen=True)
class _Named:
    """What the names say; None where they do not."""

    model: str | None
    hook: str | None
    hook_out: str | None
    embedding: bool


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder (or file) `path` needs."""
    return [escape(path if path.endswith(WEIGHTS) else f"{path}/{WEIGHTS}".lstrip("/"))]


def matches(place: Path) -> bool:
    """Whether it is a file params.npz, or a folder with one."""
    return _weights(Path(place)).is_file()


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE or transcoder in a folder of this layout.

    Args:
        place: the folder, or its params.npz. Without `facts.repo` its full path is searched for the speaking names.
        facts: `repo` and `path` say model, layer and site; `model`, `hook`, `hook_out`, `layer` count where those
            names do not say it.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if the arrays are not those of a JumpReLU SAE.
    """
    facts, path = facts or Facts(), _weights(Path(place))
    with reading(path):
        facts.no_factor(NAME)
        file = TensorFile(path)
        stored = _stored_names(file)
        d_in, d_sae, d_out = _widths(file, stored)
        weights = {ours: file.tensor(name) for ours, name in stored.items()}
        named = _named(facts, path)
        if named.embedding:
            weights = _unscaled_embedding(weights, d_in)
        transcoder = named.hook_out is not None
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            activation="jumprelu",
            **facts.placed(
                model=named.model,
                hook=named.hook,
                hook_out=named.hook_out,
                prepend_bos=True,
                context_size=1024,
                dataset_path="monology/pile-uncopyrighted",
                l0=facts.number(r"average_l0_(\d+)", path),
                model_from_pretrained_kwargs={"fold_ln": False} if transcoder else None,
            ),
        )
        return built(cfg, weights, file.dtype(stored["W_dec"]), dtype, device)


def _weights(place: Path) -> Path:
    return place if place.name == WEIGHTS and not place.is_dir() else place / WEIGHTS


def _stored_names(file: TensorFile) -> dict[str, str]:
    """Our name -> the file's, without a factor per latent that is all ones."""
    found: dict[str, str] = {}
    for name in file.names:
        ours = _SPELLINGS.get(name.lower().replace("_", ""), name)
        if ours in found:
            raise FormatError(explain(f"{file.path.name} has both {found[ours]} and {name}.", want="one of them"))
        found[ours] = name
    if "scaling_factor" in found:
        if not bool((file.tensor(found["scaling_factor"]) == 1).all()):
            raise FormatError(explain("`scaling_factor` is not all ones.", want="a file without it, or all ones"))
        del found["scaling_factor"]
    return found


def _widths(file: TensorFile, stored: dict[str, str]) -> tuple[int, int, int]:
    shapes = {ours: file.shape(name) for ours, name in stored.items()}
    enc, dec = shapes.get("W_enc", ()), shapes.get("W_dec", ())
    if len(enc) != 2 or len(dec) != 2:
        what = f"{file.path.name} has W_enc of shape {enc}, W_dec of shape {dec}; in all {', '.join(file.names)}."
        raise FormatError(explain(what, want="W_enc [d_in, d_sae] and W_dec [d_sae, d_out]"))
    (d_in, d_sae), d_out = enc, dec[1]
    want = {
        **{"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out)},
        **{"b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)},
    }
    file.fit({stored.get(ours, ours): shape for ours, shape in want.items()}, ignore=("scaling_factor",))
    return d_in, d_sae, d_out


def _named(facts: Facts, path: Path) -> _Named:
    found = list(_REPO.finditer(facts.where(path)))
    if not found:
        embedding = (facts.hook or "").endswith("hook_embed")
        return _Named(None, None, None, embedding)
    size, kind, site = found[-1].groups()
    model = f"gemma-2-{size}" + ("-it" if kind == "it" else "")
    if "embedding" in facts.where(path)[found[-1].end() :]:
        return _Named(model, "hook_embed", None, True)
    layer = facts.number(r"layer_(\d+)", path)
    layer = facts.layer if layer is None else layer
    if layer is None:
        return _Named(model, None, None, False)
    hook, hook_out = _HOOKS[site]
    return _Named(model, hook.format(layer), hook_out and hook_out.format(layer), False)


def _unscaled_embedding(w: dict[str, Tensor], d_in: int) -> dict[str, Tensor]:
    root = d_in**0.5
    return {**w, "W_enc": w["W_enc"] / root, "W_dec": w["W_dec"] * root, "b_dec": w["b_dec"] * root}
