"""What saewb's errors have in common: a template of three lines, and names near the one that was typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch

_NUMBER = re.compile(r"\d+")


class FormatError(ValueError):
    """A file that is not what its layout promises: a tensor missing, left over or misshapen, an unknown key."""


def near(got: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` known names most like `got` (difflib's ratio, at least 0.5); those with its numbers come first.

    A layer or a width is seldom what was mistyped.

    Example:
        >>> near("blocks.8.resid_pst", ["blocks.11.resid_post", "blocks.8.resid_pre", "hook_embed"], n=2)
        ['blocks.8.resid_pre', 'blocks.11.resid_post']
    """
    found = difflib.get_close_matches(got, list(dict.fromkeys(known)), n=10 * n, cutoff=0.5)
    return sorted(found, key=lambda name: _NUMBER.findall(name) != _NUMBER.findall(got))[:n]


def explain(what: str, *, near: Iterable[str] = (), want: str = "", fix: str = "") -> str:
    """One error text: what was got, then what is near or wanted, then a line to paste.

    Example:
        >>> print(explain("d_in is 5.", want="a positive even number", fix="d_in=4"))
        d_in is 5.
          want: a positive even number
          fix:  d_in=4
    """
    rows = [("near:", ", ".join(near)), ("want:", want), ("fix: ", fix)]
    return "\n".join([what, *(f"  {label} {text}" for label, text in rows if text)])


def check_device(device: torch.device | str) -> torch.device:
    """The device of that name, if tensors can be put there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", ...; or a torch.device.

    Returns:
        A torch.device.

    Raises:
        ValueError: if torch knows no such device, was built without it, or finds none.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(explain(f"there is no device {device!r}.", want="'cpu', 'cuda', 'cuda:1', 'mps'")) from None
    if why := _missing(found):
        raise ValueError(explain(f"device {str(device)!r}: {why}.", want="'cpu'", fix="saewb doctor    # in a shell"))
    return found


def _missing(device: torch.device) -> str:
    """Why nothing can be put there; empty if it can."""
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is built for the CPU only"
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        n = torch.cuda.device_count()
        return f"there are {n}, counted from 0" if (device.index or 0) >= n else ""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "torch finds no Apple GPU"
    return ""
