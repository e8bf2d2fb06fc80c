"""Attention SAEs of GPT-2 small by Kissane and others: `<name>.pt` and `<name>_cfg.json` side by side.

The weights have saewb's names and orientation. The SAEs read the concatenated outputs of all heads (`attn.hook_z`,
flattened), and subtract b_dec first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar

from saewb.pretrained.formats._layout import OpenFiles, TableLayout, get_typed


class AttentionHookZ(TableLayout):
    """Kissane's attention SAEs: a .pt file and its configuration in the same folder."""

    name = "attention SAEs (hook_z)"
    aliases = ("connor_rob_hook_z",)
    weights = "{path}"
    file_name = re.compile(r".*\.pt")
    marks = ("<name>.pt", "<name>_cfg.json")
    table: ClassVar[Mapping[str, str]] = {
        "W_enc": "W_enc DF",
        "b_enc": "b_enc F",
        "W_dec": "W_dec FD",
        "b_dec": "b_dec D",
    }

    def config_path(self, path: PurePath) -> PurePath:
        """Path of <name>_cfg.json; the name ends before the first ".pt"."""
        return path.with_name(f"{path.name.split('.pt')[0]}_cfg.json")

    def widths(self, files: OpenFiles) -> dict[str, int]:
        """Widths from the configuration."""
        where = self.config_path(files.path).name
        return {axis: get_typed(files.config, key, int, where) for axis, key in (("D", "act_size"), ("F", "dict_size"))}

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Hook from the configuration; model and data set are fixed."""
        return {
            "pre_bias": "tied",
            "model": "gpt2-small",
            "hook": get_typed(files.config, "act_name", str, self.config_path(files.path).name),
            "metadata": {"prepend_bos": True, "context_size": 128, "dataset_path": "Skylion007/openwebtext"},
        }
