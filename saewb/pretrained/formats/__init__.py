"""Published layouts: one module each; `recognize` finds the one that a folder or file is in, `read` reads it.

Every module in `FORMATS` has NAME and MARKS (for messages), `files(path)` (patterns of what reading `path` of a
repository needs), `matches(place)` (cheap: by names, or a header where those are ambiguous; never by weights) and
`read(place, facts, *, dtype, device)`. Adding a layout means adding its module here, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats import (
    attention_hook_z,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_cross_layer,
    llama_scope,
    llama_scope_r1,
    mwhanna,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from saewb.pretrained.formats import circuit_tracer as mntss
from saewb.pretrained.formats import linear_pt as goodfire
from saewb.pretrained.formats import temporal as temporal_conf
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile

__all__ = ["FORMATS", "Facts", "TensorFile", "read", "recognize"]

# The first that matches counts.
FORMATS: list[ModuleType] = [
    saelens,
    sparsify,
    dictionary_learning,
    gemma_scope_2_cross_layer,
    mntss,
    mwhanna,
    qwen_scope,
    openai,
    deepseek_r1,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llama_scope_r1,
    temporal_conf,
    attention_hook_z,
    goodfire,
]


def recognize(place: Path) -> ModuleType:
    """The module that reads this folder or file.

    Args:
        place: an existing folder or file.

    Returns:
        The first entry of `FORMATS` whose `matches` says yes.

    Raises:
        FormatError: if none does; the message lists the files seen and the layouts known.
    """
    place = Path(place)
    for layout in FORMATS:
        if layout.matches(place):
            return layout
    inner = None
    if place.is_dir():
        seen = sorted(entry.name + "/" * entry.is_dir() for entry in place.iterdir())
        shown = ", ".join(seen[:12]) + (f" and {len(seen) - 12} more" if len(seen) > 12 else "")
        what = f"{place} has {shown or 'no files'}"
        inner = next((name.rstrip("/") for name in seen if _readable(place / name)), None)
    else:
        what = f"the file {place}"
    raise FormatError(
        explain(
            f"no layout that saewb knows: {what}.",
            want="; ".join(f"{layout.NAME} ({' + '.join(layout.MARKS)})" for layout in FORMATS),
            fix=f"saewb.load_sae({str(place)!r}, {inner!r})" if inner else "",
        )
    )


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The SAE in a folder or file of any layout.

    Args:
        place: an existing folder or file.
        facts: what is known beyond the files; None means nothing.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Returns:
        One of saewb's SAE classes.

    Raises:
        FormatError: if it is of no known layout, or not what its layout promises.
    """
    return recognize(place).read(Path(place), facts or Facts(), dtype=dtype, device=device)


def _readable(place: Path) -> bool:
    return any(layout.matches(place) for layout in FORMATS)
