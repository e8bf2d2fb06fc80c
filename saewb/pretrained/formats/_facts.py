"""What is known about an SAE beyond its files: where it was published, and what a catalogue says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saewb.errors import FormatError, explain

# Overrides that say where an SAE belongs, and those that would change what it computes: only SAELens files have these.
_PLACES = {"model_name": "model", "hook_name": "hook", "hook_name_out": "hook_out", "hook_head_index": "head"}
_ARITHMETIC = frozenset(
    (
        *("architecture", "d_in", "d_sae", "d_out", "k", "activation_fn", "apply_b_dec_to_input"),
        *("normalize_activations", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
    )
)
_OF_THE_FILE = ("dtype", "device")


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

    def placed(
        self, *, model: str | None, hook: str | None, hook_out: str | None = None, **said: Any
    ) -> dict[str, Any]:
        """Fields of a configuration class: where the SAE belongs, and what else is known about it, as `metadata`.

        Args:
            model: as the file or the name of its repository says; None if neither does, and then ours counts.
            hook: likewise.
            hook_out: likewise; None for an SAE that writes where it reads.
            said: what the file says beside, by SAELens' keys. Overrides replace it.

        Raises:
            FormatError: if `overrides` would change what is computed.
        """
        wrong = sorted(_ARITHMETIC & set(self.overrides))
        if wrong:
            what = f"overrides {wrong} would change what the SAE computes."
            raise FormatError(explain(what, want="a layout that says them in its own files"))
        out = self.hook_out if hook_out is None and hook is None else hook_out
        places = {"model": model or self.model, "hook": hook or self.hook, "hook_out": out}
        places |= {ours: self.overrides[key] for key, ours in _PLACES.items() if key in self.overrides}
        others = {k: v for k, v in self.overrides.items() if k not in (*_PLACES, *_OF_THE_FILE)}
        return {**places, "metadata": {**{k: v for k, v in said.items() if v is not None}, **others}}

    def no_factor(self, layout: str) -> None:
        """Check that no `scaling_factor` was given, for a layout whose weights read the model's own units.

        Raises:
            FormatError: if there was.
        """
        if self.scaling_factor is not None:
            what = f"scaling_factor={self.scaling_factor} was given, but {layout} reads the model's own units."
            raise FormatError(explain(what, want="no factor"))
