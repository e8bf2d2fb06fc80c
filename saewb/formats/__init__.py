"""Published layouts: one module each, with `matches(folder)`, `read(folder, ...)` and the `FILES` it may need.

`recognise` finds the one a folder is in. Adding a layout means adding its module to `FORMATS`, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from saewb.errors import FormatError, explain
from saewb.formats import saelens

# Every entry has NAME (for messages), FILES (names of what it may read, for downloads), matches(folder) and
# read(folder, *, dtype, device, scaling_factor).
FORMATS: list[ModuleType] = [saelens]


def recognise(folder: Path) -> ModuleType:
    """The module that reads this folder.

    Args:
        folder: an existing folder.
    Returns:
        The first entry of `FORMATS` whose `matches` says yes.
    Raises:
        FormatError: if none does; the message lists the files seen and the layouts known.
    """
    for layout in FORMATS:
        if layout.matches(folder):
            return layout
    seen = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(seen[:12]) + (f" and {len(seen) - 12} more" if len(seen) > 12 else "")
    inner = next((name[:-1] for name in seen if name.endswith("/") and _readable(folder / name)), None)
    raise FormatError(
        explain(
            f"no layout that saewb knows: {folder} has {shown or 'no files'}.",
            want="; ".join(f"{layout.NAME} ({' + '.join(layout.MARKS)})" for layout in FORMATS),
            fix=f"saewb.load_sae({str(folder)!r}, {inner!r})" if inner else "",
        )
    )


def _readable(folder: Path) -> bool:
    return any(layout.matches(folder) for layout in FORMATS)
