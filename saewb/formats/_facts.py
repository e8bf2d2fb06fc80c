"""What is known about an SAE beyond its files: where it was published, and what a catalogue says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saewb.errors import explain


@dataclass(frozen=True)
class Facts:
    """What a caller knows beyond the files; None where it does not. Some layouts say it only by a repository's name.

    A file's own word comes first; `read` of each layout says where it does not.
    """

    repo: str | None = None  # "owner/name" on the hub
    path: str | None = None  # of the folder or file inside the repository; "" for its root
    model: str | None = None  # name of the language model
    hook: str | None = None  # the point of the model it reads
    hook_out: str | None = None  # the point it writes
    layer: int | None = None  # of that point
    scaling_factor: float | None = None  # what training inputs were multiplied with
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)  # by the keys of SAELens' cfg.json

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.layer is not None and not (type(self.layer) is int and self.layer >= 0):
            raise ValueError(explain(f"Facts got layer={self.layer!r}.", want="an integer, 0 or more"))

    def where(self, place: Path) -> str:
        """The text that speaking names are looked for in: "owner/name/path" if known, or else the full path on disk.

        Example:
            >>> Facts(repo="google/gemma-scope-2b-pt-res", path="layer_3/width_16k").where(Path("a"))
            'google/gemma-scope-2b-pt-res/layer_3/width_16k'
        """
        if self.repo is None:
            return Path(place).absolute().as_posix()
        return "/".join(part for part in (self.repo, self.path) if part)

    def number(self, pattern: str, place: Path) -> int | None:
        """The number that the pattern's first group finds last in `where(place)`, e.g. r"layer_(\\d+)"; or None.

        Example:
            >>> Facts(repo="a/b", path="layer_3/width_16k").number(r"layer_(\\d+)", Path("c"))
            3
        """
        found = re.findall(pattern, self.where(place))
        return int(found[-1]) if found else None
