"""Curves as inline SVG, for a notebook that is read without its kernel."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from saewb_widgets._watching import CHARTS

_COLOURS = ("#c8701a", "#2f6f9f", "#2f7d62", "#8a4f9e", "#b3543c", "#7a7a2a", "#3f8a96", "#7d6b5a")
_W, _H, _LEFT, _TOP, _BOTTOM = 300, 130, 8, 8, 14


def charts(series: Sequence[dict[str, Any]]) -> str:
    """A small chart per figure that is there, and what the colours mean."""
    drawn = [_chart(figure, title, series) for figure, (title, _) in CHARTS.items()]
    key = " &nbsp; ".join(
        f'<span style="color:{_COLOURS[i % len(_COLOURS)]}">&#9632;</span> {html.escape(s["label"])}'
        for i, s in enumerate(series)
    )
    return f'<div>{key}</div><div style="display:flex;flex-wrap:wrap;gap:14px">{"".join(drawn)}</div>'


def _chart(figure: str, title: str, series: Sequence[dict[str, Any]]) -> str:
    curves = [
        (i, s["tokens"][s["lines"][figure][0]], s["lines"][figure][1])
        for i, s in enumerate(series)
        if figure in s["lines"]
    ]
    if not curves:
        return ""
    right = max(max(x) for _, x, _ in curves)
    low, high = min(min(y) for *_, y in curves), max(max(y) for *_, y in curves)
    lines = "".join(_line(i, x, y, right, low, high) for i, x, y in curves)
    last = ", ".join(f"{series[i]['label']} {y[-1]:.4g}" for i, _, y in curves)
    label = html.escape(f"{title} over tokens, last: {last}", quote=True)
    text = 'font-size="10" fill="currentColor" fill-opacity=".65"'
    return (
        f'<div><div style="font-weight:600">{html.escape(title)}</div>'
        f'<svg width="{_W}" height="{_H}" viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">'
        f'<line x1="{_LEFT}" x2="{_W - 8}" y1="{_H - _BOTTOM}" y2="{_H - _BOTTOM}" stroke="currentColor" '
        f'stroke-opacity=".25"/>{lines}'
        f'<text x="{_LEFT}" y="{_TOP + 2}" {text}>{high:.4g}</text>'
        f'<text x="{_LEFT}" y="{_H - 3}" {text}>{low:.4g}</text>'
        f'<text x="{_W - 8}" y="{_H - 3}" text-anchor="end" {text}>{right:,} tokens</text></svg></div>'
    )


def _line(i: int, x: Sequence[float], y: Sequence[float], right: float, low: float, high: float) -> str:
    wide, tall = _W - 8 - _LEFT, _H - _TOP - _BOTTOM - 4
    at = [
        (_LEFT + wide * a / (right or 1), _TOP + 2 + tall * (1 - (b - low) / (high - low) if high > low else 0.5))
        for a, b in zip(x, y, strict=True)
    ]
    colour = _COLOURS[i % len(_COLOURS)]
    if len(at) == 1:
        return f'<circle cx="{at[0][0]:.1f}" cy="{at[0][1]:.1f}" r="2.5" fill="{colour}"/>'
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
