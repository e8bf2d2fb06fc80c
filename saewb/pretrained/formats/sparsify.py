"""The layout of EleutherAI's library sparsify: `cfg.json` and `sae.safetensors`, of SAEs and (skip) transcoders.

    p = relu((x - b_dec) @ encoder.weight.T + encoder.bias)          (with "transcode": true nothing is subtracted)
    z = the k largest of p; "groupmax": of k equal groups the largest of each; "signed": the k largest in magnitude
    y = z @ W_dec + b_dec (+ x @ W_skip.T)

`transcode` is newer than the first published transcoders: without it in cfg.json, b_dec is subtracted.
`multi_topk` concerns the loss only: k latents are active all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import OpenFiles, TableLayout, get_typed
from saewb.pretrained.formats._tensors import TensorFile, read_object

_CONFIG = "cfg.json"
_TYPES = {
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


class Sparsify(TableLayout):
    """Layout of the library sparsify: a folder named after the module; see its sparse_coder.py and fused_encoder.py."""

    name = "sparsify"
    weights = "{path}/sae.safetensors"
    config = "{path}/cfg.json"
    extra_files = ("{parent}/config.json",)  # of the training run

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration, and check the types of its values; as in the library, keys it has not are ignored."""
        config = {name: value for name, value in super().read_config(path).items() if value is not None}
        for name in set(config) & set(_TYPES):
            get_typed(config, name, _TYPES[name], _CONFIG)
        return config

    def open_weights(self, path: Path) -> TensorFile:
        """Open the weights; refuse a file that was saved without its decoder."""
        file = super().open_weights(path)
        if "W_dec" not in file and "encoder.weight" in file:
            what = "it has an encoder and no W_dec."
            raise FormatError(explain(what, want="a file that was saved with its decoder"))
        return file

    def tensor_table(self, files: OpenFiles) -> dict[str, str]:
        """Table with the skip matrix, if the configuration has it."""
        table = {"W_enc": "encoder.weight FD", "b_enc": "encoder.bias F", "W_dec": "W_dec FO", "b_dec": "b_dec O"}
        return table | ({"W_skip": "W_skip OD"} if files.config.get("skip_connection") else {})

    def widths(self, files: OpenFiles) -> dict[str, int]:
        """Widths from the configuration."""
        d_in = get_typed(files.config, "d_in", int, _CONFIG)
        d_sae = files.config.get("num_latents") or d_in * files.config.get("expansion_factor", 32)
        return {"D": d_in, "O": d_in, "F": d_sae}

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Hooks from the folder's name, model from the run's configuration in the parent folder."""
        config, path = files.config, files.path.parent / "config.json"
        run: Mapping[str, Any] = read_object(path) if path.is_file() else {}
        transcode, skip = config.get("transcode", False), config.get("skip_connection", False)
        hook, hook_out = _hooks(
            files.provenance.path or files.path.as_posix(), transcode or skip or run.get("transcode") is True
        )
        return {
            "activation": _activation(config),
            "k": get_typed(config, "k", int, _CONFIG),
            "skip": skip,
            "pre_bias": "none" if transcode else "tied",
            "model": run.get("model") if isinstance(run.get("model"), str) else None,
            "hook": hook,
            "hook_out": hook_out,
            "metadata": {"sparsify": config, "dataset_path": run.get("dataset"), "context_size": run.get("ctx_len")},
        }


def _activation(config: Mapping[str, Any]) -> str:
    activation, signed = config.get("activation", "topk"), config.get("signed", False)
    if activation not in ("topk", "groupmax") or (signed and activation != "topk"):
        what = f"cfg.json has activation={activation!r}, signed={signed}."
        raise FormatError(explain(what, want="'topk' (signed or not) or 'groupmax'"))
    return "abstopk" if signed else activation


def _hooks(path: str, is_transcoder: bool) -> tuple[str | None, str | None]:
    """TransformerLens' names of the input and output of a module; None if unknown."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if name == "embed_tokens":
        return "hook_embed", None
    module = _MODULE.search(name)
    if not module:
        return None, None
    block, part = f"blocks.{module[1]}", module[2]
    if part == "mlp":
        read, written = f"{block}.mlp.hook_in", f"{block}.hook_mlp_out"
    elif part is None:
        read, written = f"{block}.hook_resid_pre", f"{block}.hook_resid_post"
    else:
        read, written = None, f"{block}.hook_attn_out"
    return (read, written) if is_transcoder else (written, None)
