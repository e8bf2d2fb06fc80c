"""Gemma Scope: `params.npz` without a configuration; SAEs of Gemma 2, and transcoders of its MLPs.

The weights are those of a JumpReLU SAE. Model, layer and site are in the names of the repository and its folders:
google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}/layer_L/width_W/... .

- Widths come from the arrays, not from the names.
- SAEs of the embedding were trained before Gemma multiplies embeddings with sqrt(d_model), and the model's hook is
  after it: W_enc / sqrt(d), W_dec sqrt(d), b_dec sqrt(d). (sae-lens leaves b_dec as it is.)
- Transcoders read `ln2.hook_normalized`, before the norm's gain: the model must not have its norms folded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import OpenFiles, TableLayout

_REPO = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_HOOKS = {
    "res": ("blocks.{}.hook_resid_post", None),
    "mlp": ("blocks.{}.hook_mlp_out", None),
    "att": ("blocks.{}.attn.hook_z", None),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}
_AXES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FO", "b_dec": "O", "threshold": "F"}
_SPELLINGS = {
    **{"wenc": "W_enc", "we": "W_enc", "wdec": "W_dec", "wd": "W_dec"},
    **{"benc": "b_enc", "be": "b_enc", "bdec": "b_dec", "bd": "b_dec", "threshold": "threshold"},
}


class GemmaScope(TableLayout):
    """Gemma Scope: JumpReLU SAEs of Gemma 2 in a `params.npz`; the folder's name is their site."""

    name = "Gemma Scope"
    aliases = ("gemma_2", "gemma_2_transcoder")
    weights = "{path}/params.npz"

    def weights_path(self, path: PurePath) -> PurePath:
        """Path of params.npz, for the folder or the file itself."""
        return path if path.name == "params.npz" else path / "params.npz"

    def tensor_table(self, files: OpenFiles) -> dict[str, str]:
        """Table of the arrays, in any of their spellings."""
        stored: dict[str, str] = {}
        for name in files.weights.names:
            weight = _SPELLINGS.get(name.lower().replace("_", ""), name)
            if weight in stored:
                what = f"params.npz has both {stored[weight]} and {name}."
                raise FormatError(explain(what, want="one of them"))
            stored[weight] = name
        if "scaling_factor" in stored and not bool((files.weights.tensor(stored["scaling_factor"]) == 1).all()):
            raise FormatError(explain("`scaling_factor` is not all ones.", want="a file without it, or all ones"))
        return {name: f"{stored.get(name, name)} {axes}" for name, axes in _AXES.items()}

    def side_tensors(self, files: OpenFiles) -> dict[str, str]:
        """Factor per latent, which is all ones."""
        return {"scaling_factor": "F"}

    def tensors(self, files: OpenFiles, table: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Weights as stored; for the embedding, in units of the scaled embedding."""
        weights = super().tensors(files, table)
        if not _is_of_embedding(files):
            return weights
        root = weights["W_enc"].shape[0] ** 0.5
        scaled = {"W_enc": weights["W_enc"] / root, "W_dec": weights["W_dec"] * root, "b_dec": weights["b_dec"] * root}
        return {**weights, **scaled}

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Model, layer and site from the names of repository and folder."""
        model, hook, hook_out = _site(files)
        return {
            "activation": "jumprelu",
            "model": model,
            "hook": hook,
            "hook_out": hook_out,
            "metadata": {
                "prepend_bos": True,
                "context_size": 1024,
                "dataset_path": "monology/pile-uncopyrighted",
                "l0": files.provenance.number(r"average_l0_(\d+)", files.path),
                "model_from_pretrained_kwargs": {"fold_ln": False} if hook_out else None,
            },
        }


def _is_of_embedding(files: OpenFiles) -> bool:
    names = list(_REPO.finditer(files.address))
    if not names:
        return (files.provenance.hook or "").endswith("hook_embed")
    return "embedding" in files.address[names[-1].end() :]


def _site(files: OpenFiles) -> tuple[str | None, str | None, str | None]:
    """Model, hook and hook_out from the names; None if unknown."""
    names = list(_REPO.finditer(files.address))
    if not names:
        return None, None, None
    size, kind, site = names[-1].groups()
    model = f"gemma-2-{size}" + ("-it" if kind == "it" else "")
    if _is_of_embedding(files):
        return model, "hook_embed", None
    layer = files.provenance.number(r"layer_(\d+)", files.path)
    layer = files.provenance.layer if layer is None else layer
    if layer is None:
        return model, None, None
    hook, hook_out = _HOOKS[site]
    return model, hook.format(layer), hook_out and hook_out.format(layer)
