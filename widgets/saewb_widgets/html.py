"""HTML tables and PNGs without scripts or style sheets, for viewers without a kernel."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

_CELL = "padding:1px 10px 1px 0;white-space:nowrap;vertical-align:top"
_FIGURE = f"{_CELL};text-align:right"
_TABLE = "border-collapse:collapse;color:inherit;font:inherit"  # without a doctype, tables inherit neither
_WIDE = "padding:1px 0;text-align:left;white-space:pre-wrap"


def token(text: str, share: float, special: bool, strong: bool) -> str:
    """A token on a background that shows its activation, as `share` of the largest one."""
    shown = " ¶ " if special else html.escape(text.replace("\n", "↵").replace("\t", "⇥"))
    style = f"background-color:rgba(240,148,40,{0.1 + 0.75 * min(1.0, share):.2f})" if share else ""
    style += ";font-weight:600" if strong else ""
    return f'<span style="{style}">{shown}</span>' if style else shown


def latent_rows(rows: Iterable[dict[str, Any]]) -> str:
    """A table of latents with their strongest contexts."""
    out = []
    for r in rows:
        pieces = "".join(token(s, a, bool(x), j == r.get("at")) for j, (s, a, x) in enumerate(r["tokens"]))
        figures = "".join(f'<td style="{_FIGURE}">{v}</td>' for v in (r["latent"], percent(r["density"]), r["max"]))
        name = f"<b>{html.escape(r['label'])}</b> " if r.get("label") else ""
        out.append(f'<tr>{figures}<td style="{_WIDE}">{name}{pieces or "never fires"}</td></tr>')
    head = "".join(f'<th style="{_FIGURE}">{h}</th>' for h in ("latent", "fires on", "largest"))
    where = f'<th style="{_WIDE}">where it is strongest</th>'
    return f'<table style="{_TABLE}"><tr>{head}{where}</tr>{"".join(out)}</table>'


def latent_html(p: dict[str, Any], contexts: int = 8) -> str:
    """The page of one latent: statistics, promoted tokens, strongest contexts."""
    direct, through = _words(p["raised"]), _words(p["jacobian_raised"])
    facts = f"fires on {percent(p['density'])} of tokens, largest {p['max']}, mean {p['mean']}"
    lines = "".join(
        f'<tr><td style="{_FIGURE}">{c["acts"][c["at"]]}</td>{_pieces(p, c)}</tr>' for c in p["top"][:contexts]
    )
    likelier = f"<div>makes likelier: {direct}</div>" if direct else ""
    likelier += f"<div>through later layers: {through}</div>" if through else ""
    table = f'<table style="{_TABLE}">{lines}</table>'
    name = f"Latent {p['latent']}" + (f" {html.escape(p['label'])}" if p["label"] else "")
    return f"<div style='margin-top:8px'><b>{name}</b>: {facts}</div>{likelier}{table}"


def _words(raised: list[Any]) -> str:
    """The first tokens that a latent makes likelier, with their logits."""
    return ", ".join(f"<code>{html.escape(text.strip() or text)}</code> {v:+.2f}" for text, _, v in raised[:6])


def _pieces(p: dict[str, Any], c: dict[str, Any]) -> str:
    shown = zip(c["words"], c["acts"], strict=True)
    inside = (
        token(p["words"][w], abs(a) / p["scale"], j in c["special"], j == c["at"]) for j, (w, a) in enumerate(shown)
    )
    return f'<td style="{_WIDE}">{"".join(inside)}</td>'


def percent(share: float) -> str:
    """Format a fraction as a percentage: 0.0123 is 1.23 %."""
    return "0 %" if share == 0 else f"{100 * share:.3g} %"


def grid(head: Iterable[str], body: Iterable[Iterable[object]]) -> str:
    """A small table: numbers aligned right, words left, a heading like the first cell under it."""
    cells = [[str(value) for value in line] for line in body]
    first = cells[0] if cells else []
    top = "".join(_cell("th", title, under) for title, under in zip_longest(head, first, fillvalue=""))
    lines = ("".join(_cell("td", value, value) for value in line) for line in cells)
    return f'<table style="{_TABLE}"><tr>{top}</tr>{"".join(f"<tr>{x}</tr>" for x in lines)}</table>'


def _cell(tag: str, text: str, like: str) -> str:
    side = "right" if like.lstrip("+-\u2212")[:1].isdigit() else "left"
    return f'<{tag} style="{_CELL};text-align:{side}">{html.escape(text)}</{tag}>'


# The front end's color scale: blue below 0, orange above, white between; safe for the color-blind.
COLD, PAPER, WARM, NONE = (33, 102, 172), (247, 247, 247), (200, 84, 10), (205, 205, 205)


def palette() -> bytes:
    """RGB colors of the levels 0..255: level 0 is undefined, level 128 is the value 0."""
    colors = [NONE]
    for level in range(1, 256):
        share = abs(level - 128) / 127
        end = COLD if level < 128 else WARM
        colors.append(tuple(round(a + (b - a) * share**0.8) for a, b in zip(PAPER, end, strict=True)))
    return bytes(c for color in colors for c in color)


def png_uri(levels: bytes, width: int, height: int) -> str:
    """A PNG of levels in row-major order, as a data URI."""
    lines = b"".join(b"\0" + levels[i * width : (i + 1) * width] for i in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", head), (b"PLTE", palette()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in parts]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
