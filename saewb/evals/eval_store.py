"""Evaluations kept in a folder: a file each, written whole or not at all, and found again if they are of the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import pandas as pd


def source_name(source: Any) -> str:
    """What `load_sae` takes, as one name."""
    return "/".join(map(str, source)) if isinstance(source, tuple) else str(source)


class Store:
    """The figures of many SAEs by name. Without a folder it keeps nothing.

    Args:
        folder: made if it is not there.
        options: what else the figures depend on; those of other options are not found.
    """

    def __init__(self, folder: str | Path | None, options: dict[str, Any]) -> None:
        self._folder, self._options = None if folder is None else Path(folder), options
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, sae: Any) -> dict[str, Any] | None:
        """What is known of this SAE under this name; None if nothing, or with other weights, tokens or options."""
        if self._folder is None or not (path := self._path(name)).exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] != self._key(sae):
            return None
        return {k: math.nan if v is None else v for k, v in kept["figures"].items()}

    def write(self, name: str, sae: Any, figures: dict[str, Any]) -> None:
        """Keep these figures."""
        if self._folder is not None:
            strict = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}
            kept = {"name": name, "of": self._key(sae), "figures": strict}
            self._put(self._path(name), json.dumps(kept, indent=1, allow_nan=False))

    def write_table(self, table: pd.DataFrame) -> None:
        """Keep all of them as `evaluations.csv`."""
        if self._folder is not None:
            self._put(self._folder / "evaluations.csv", table.to_csv())

    def _path(self, name: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name)[:80]
        return self._folder / f"{readable}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"

    def _key(self, sae: Any) -> str:
        what = _fingerprint(sae) if isinstance(sae, nn.Module) else source_name(sae)
        return hashlib.sha256(json.dumps([what, self._options], sort_keys=True).encode()).hexdigest()

    def _put(self, path: Path, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)


def _fingerprint(sae: nn.Module) -> str:
    """What tells SAEs apart without hashing gigabytes: the configuration, and two sums of each tensor."""
    parts = [f"{name} {t.double().sum():.17g} {t.double().norm():.17g}" for name, t in sae.state_dict().items()]
    return "\n".join([repr(sae.cfg), *parts])
