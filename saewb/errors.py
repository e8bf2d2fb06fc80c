"""What saewb's errors have in common: a template of three lines, and names near the one that was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FormatError(ValueError):
    """A file that is not what its layout promises: a tensor missing, left over or misshapen, an unknown key."""


def near(got: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` known names most like `got`, best first (difflib's ratio, at least 0.5).

    Example:
        >>> near("hook_resid_pots", ["hook_resid_post", "hook_embed", "hook_resid_pre"], n=2)
        ['hook_resid_post', 'hook_resid_pre']
    """
    return difflib.get_close_matches(got, list(known), n=n, cutoff=0.5)


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
