"""Figures with their unit and meaning, as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

Row = tuple[str, str, str, str]  # name, value, unit, meaning

_SIDES = ("left", "right", "left", "left")


def text_table(title: str, rows: Sequence[Row]) -> str:
    """A line of title, then one line per figure, in columns.

    Example:
        >>> print(text_table("two", [("a", "1", "m", "short"), ("bcd", "22.5", "kg", "heavy")]))
        two
        a       1  m   short
        bcd  22.5  kg  heavy
    """
    name, value, unit = (max(len(row[i]) for row in rows) for i in range(3))
    return "\n".join([title, *(f"{a:<{name}}  {b:>{value}}  {c:<{unit}}  {d}".rstrip() for a, b, c, d in rows)])


def html_table(title: str, rows: Sequence[Row]) -> str:
    """The same for a notebook; nothing in it is taken for markup."""
    body = "".join(f"<tr>{''.join(map(_cell, row, _SIDES))}</tr>" for row in rows)
    return f"<div><div>{html.escape(title)}</div><table>{body}</table></div>"


def _cell(text: str, side: str) -> str:
    return f'<td style="text-align:{side}">{html.escape(text)}</td>'
