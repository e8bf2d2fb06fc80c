"""Text and HTML tables for `__str__` and `_repr_html_`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Row = tuple[str, str, str, str]
"""Name, value, unit and meaning of a figure."""

SIDES = ("left", "right", "left", "left")
"""Alignment of the four columns of a `Row`."""


def text_table(title: str, rows: Sequence[Row]) -> str:
    """A title line, then one line per figure in aligned columns.

    Example:
        >>> print(text_table("two", [("a", "1", "m", "short"), ("bcd", "22.5", "kg", "heavy")]))
        two
        a       1  m   short
        bcd  22.5  kg  heavy
    """
    name, value, unit = (max(len(row[i]) for row in rows) for i in range(3))
    return "\n".join([title, *(f"{a:<{name}}  {b:>{value}}  {c:<{unit}}  {d}".rstrip() for a, b, c, d in rows)])


def html_table(
    title: str, rows: Iterable[Iterable[str]], head: Sequence[str] = (), sides: Sequence[str] = SIDES
) -> str:
    """A title above a table, as HTML; all text is escaped.

    Args:
        title: the line above the table.
        rows: cells of each row.
        head: column titles, if any.
        sides: alignment of each column, "left" or "right".
    """
    top = f"<thead><tr>{_cells('th', head, sides)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{_cells('td', row, sides)}</tr>" for row in rows)
    return f"<div><div>{html.escape(title)}</div><table>{top}{body}</table></div>"


def _cells(tag: str, texts: Iterable[str], sides: Sequence[str]) -> str:
    return "".join(
        f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>'
        for text, side in zip(texts, sides, strict=False)
    )
