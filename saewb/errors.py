"""Error texts in a common template, near matches of a mistyped name, and the check of devices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch

_NUMBER = re.compile(r"\d+")


class FormatError(ValueError):
    """A file that does not match its layout: a tensor missing, left over or misshapen, or an unknown key."""


def near(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Find the `n` candidates most like a name (difflib's ratio, at least 0.5), those with its numbers first.

    Numbers come first since a layer or width is seldom mistyped.

    Example:
        >>> near("blocks.8.resid_pst", ["blocks.11.resid_post", "blocks.8.resid_pre", "hook_embed"], n=2)
        ['blocks.8.resid_pre', 'blocks.11.resid_post']
    """
    matches = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=10 * n, cutoff=0.5)
    return sorted(matches, key=lambda match: _NUMBER.findall(match) != _NUMBER.findall(name))[:n]


def explain(what: str, *, near: Iterable[str] = (), want: str = "", fix: str = "") -> str:
    """Compose an error text: the problem, then near names, what is expected, and a line of code to paste.

    Example:
        >>> print(explain("d_in is 5.", want="a positive even number", fix="d_in=4"))
        d_in is 5.
          want: a positive even number
          fix:  d_in=4
    """
    rows = [("near:", ", ".join(near)), ("want:", want), ("fix: ", fix)]
    return "\n".join([what, *(f"  {label} {text}" for label, text in rows if text)])


def check_device(device: torch.device | str) -> torch.device:
    """Resolve a device, and check that tensors can be put there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", ...; or a torch.device.

    Returns:
        The torch.device.

    Raises:
        ValueError: if torch knows no such device, was built without it, or finds none.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(explain(f"there is no device {device!r}.", want="'cpu', 'cuda', 'cuda:1', 'mps'")) from None
    if reason := _unusable(resolved):
        what = f"device {str(device)!r}: {reason}."
        raise ValueError(explain(what, want="'cpu'", fix="saewb doctor    # in a shell"))
    return resolved


def _unusable(device: torch.device) -> str:
    """Why a device cannot be used; empty if it can."""
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
