"""Qwen Scope: one `layer<n>.sae.pt` per layer at the root of a repository, and a `config.json` for all of them.

    z = the k largest of relu(x @ W_enc.T + b_enc);  y = z @ W_dec.T + b_dec             (nothing is subtracted from x)

Without config.json, k and the model come from the repository's name: Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import OpenFiles, TableLayout, get_typed

_REPO = re.compile(r"SAE-Res-(?P<model>[^/]+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")
_TYPES = {"k": int, "d_model": int, "d_sae": int, "base_model": str, "hook_point": str}


class QwenScope(TableLayout):
    """Qwen Scope: top-k SAEs of the residual stream of Qwen 3."""

    name = "Qwen Scope"
    aliases = ("qwen_scope",)
    weights = "{path}"
    config = "{parent}/config.json"
    needs_config = False
    file_name = re.compile(r"layer(\d+)\.sae\.pt")
    marks = ("layer<n>.sae.pt",)
    used_overrides = ("k",)
    table: ClassVar[Mapping[str, str]] = {
        "W_enc": "W_enc FD",
        "b_enc": "b_enc F",
        "W_dec": "W_dec DF",
        "b_dec": "b_dec D",
    }

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration in the same folder, and check the types of its values."""
        config = {name: value for name, value in super().read_config(path).items() if value is not None}
        for name in set(_TYPES) & set(config):
            get_typed(config, name, _TYPES[name], "config.json")
        if config.get("hook_point", "resid_post") != "resid_post":
            raise FormatError(explain(f"config.json has hook_point={config['hook_point']!r}.", want="'resid_post'"))
        return config

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """K and model from config.json or the repository's name; k also from the catalogue's overrides."""
        config, name = files.config, _REPO.search(files.address)
        _check_widths(config, name, *files.weights.shape("W_enc"))
        k = config.get("k", files.provenance.overrides.get("k", int(name["k"]) if name else None))
        if type(k) is not int:
            want = "a repository's name such as Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
            fix = 'saewb.load_sae("Qwen/SAE-Res-...", "layer0.sae.pt")'
            raise FormatError(
                explain(f"k is {k!r}: there is no config.json beside the file that says it.", want=want, fix=fix)
            )
        layer = int(self.file_name.fullmatch(files.path.name)[1])
        return {
            "activation": "topk",
            "k": k,
            "model": config.get("base_model") or (f"Qwen/{name['model']}" if name else None),
            "hook": f"blocks.{layer}.hook_resid_post",
            "metadata": {"context_size": 1024, "prepend_bos": True, "hf_hook_name": f"model.layers.{layer}"},
        }


def _check_widths(config: Mapping[str, Any], name: re.Match[str] | None, d_sae: int, d_in: int) -> None:
    if config.get("d_model", d_in) != d_in or config.get("d_sae", d_sae) != d_sae:
        what = f"config.json says d_model={config.get('d_model')}, d_sae={config.get('d_sae')}."
        raise FormatError(explain(what, want=f"{d_in} and {d_sae}, as W_enc has"))
    if not config and name and int(name["width"]) * 1024 != d_sae:
        raise FormatError(explain(f"{name[0]} should have {name['width']}K latents, and W_enc has {d_sae}."))
