"""Curves and histograms as pictures, for a notebook that is read without its kernel.

SVG inside an `img`: where a notebook is not trusted, JupyterLab takes drawings out and leaves pictures.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from saewb_widgets.training.monitor import CHARTS, LOG_SCALE

_COLORS = (
    "#c8701a",
    "#1f6fb2",
    "#1f8a5b",
    "#9a4bb0",
    "#c2354f",
    "#8a6a3a",
    "#0e8f9b",
    "#7a828e",
)  # on white and black
_DASHES = ("", "5 3", "1.5 2.5", "7 2.5 1.5 2.5")  # after every eight colors
_W, _H, _LEFT, _TOP, _BOTTOM = 300, 136, 8, 14, 14
_GREY = "#808080"  # on white and black
_TEXT = f'font-size="10" font-family="system-ui,sans-serif" fill="{_GREY}"'


def charts(series: Sequence[dict[str, Any]], scale: str = "auto") -> str:
    """A small chart per figure that is there, a histogram of densities, and what the colors mean.

    Args:
        series: as the front end is sent them.
        scale: "auto", "linear" or "log".
    """
    drawn = [_chart(figure, title, series, scale) for figure, (title, _) in CHARTS.items()]
    key = " &nbsp; ".join(_key(i, s["label"]) for i, s in enumerate(series))
    boxes = "".join([*drawn, _densities(series)])
    return f'<div>{key}</div><div style="display:flex;flex-wrap:wrap;gap:14px">{boxes}</div>'


def is_log(values: Sequence[float], scale: str) -> bool:
    """Whether a chart of these values is drawn on a log scale."""
    return scale == "log" or (scale == "auto" and min(values) > 0 and max(values) > 30 * min(values))


def _key(i: int, label: str) -> str:
    line = f'<line x1="0" x2="22" y1="5" y2="5" {_pen(i, 3)}/>'
    return f"{_picture(22, 10, line, '')} {html.escape(label)}"


def _pen(i: int, width: float = 1.5) -> str:
    dash = _DASHES[i // len(_COLORS) % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{_COLORS[i % len(_COLORS)]}" stroke-width="{width}" fill="none"{dashed}'


def _chart(figure: str, title: str, series: Sequence[dict[str, Any]], scale: str) -> str:
    curves = [
        (i, s["tokens"][s["lines"][figure][0]], s["lines"][figure][1])
        for i, s in enumerate(series)
        if figure in s["lines"]
    ]
    if not curves:
        return ""
    log = figure in LOG_SCALE and is_log([v for *_, y in curves for v in y], scale)
    if log:
        curves = [(i, *zip(*pairs, strict=True)) for i, x, y in curves if (pairs := _positive(x, y))]
        if not curves:
            return ""
    right = max(max(x) for _, x, _ in curves)
    low, high = min(min(y) for *_, y in curves), max(max(y) for *_, y in curves)
    of: Callable[[float], float] = math.log10 if log else float
    lines = "".join(_line(i, x, [of(v) for v in y], right, of(low), of(high)) for i, x, y in curves)
    last = ", ".join(f"{series[i]['label']} {y[-1]:.4g}" for i, _, y in curves)
    text = (
        f'<text x="{_LEFT}" y="10" {_TEXT}>{high:.4g}{", log scale" if log else ""}</text>'
        f'<text x="{_LEFT}" y="{_H - 3}" {_TEXT}>{low:.4g}</text>'
        f'<text x="{_W - 8}" y="{_H - 3}" text-anchor="end" {_TEXT}>{right:,} tokens</text>'
    )
    return _box(title, f"{title} over tokens, last: {last}", lines + text)


def _positive(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if b > 0]


def _box(title: str, label: str, inside: str) -> str:
    floor = f'<line x1="{_LEFT}" x2="{_W - 8}" y1="{_H - _BOTTOM}" y2="{_H - _BOTTOM}" stroke="{_GREY}"/>'
    picture = _picture(_W, _H, floor + inside, label)
    return f'<div><div style="font-weight:600">{html.escape(title)}</div>{picture}</div>'


def _picture(width: int, height: int, inside: str, label: str) -> str:
    size = f'width="{width}" height="{height}"'
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">{inside}</svg>'
    data = base64.b64encode(drawn.encode()).decode()
    return f'<img {size} alt="{html.escape(label, quote=True)}" src="data:image/svg+xml;base64,{data}">'


def _line(i: int, x: Sequence[float], y: Sequence[float], right: float, low: float, high: float) -> str:
    wide, tall = _W - 8 - _LEFT, _H - _TOP - _BOTTOM - 4
    at = [
        (_LEFT + wide * a / (right or 1), _TOP + 2 + tall * (1 - (b - low) / (high - low) if high > low else 0.5))
        for a, b in zip(x, y, strict=True)
    ]
    if len(at) == 1:
        return f'<circle cx="{at[0][0]:.1f}" cy="{at[0][1]:.1f}" r="2.5" fill="{_COLORS[i % len(_COLORS)]}"/>'
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    return f'<polyline points="{points}" {_pen(i)}/>'


def _densities(series: Sequence[dict[str, Any]]) -> str:
    """How many latents are how frequent, as outlines; the first bin holds those that are hardly ever on."""
    curves = [(i, s["label"], s["density"]) for i, s in enumerate(series) if "density" in s]
    if not curves:
        return ""
    shares = [[count / sum(d["counts"]) for count in d["counts"]] for *_, d in curves]
    most, step = max(map(max, shares)), (_W - 8 - _LEFT) / len(shares[0])
    tall = _H - _BOTTOM - _TOP - 4
    lines = ""
    for (i, *_), heights in zip(curves, shares, strict=True):
        at = [(_LEFT + (j + k) * step, _H - _BOTTOM - tall * h / most) for j, h in enumerate(heights) for k in (0, 1)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        lines += f'<polyline points="{points}" {_pen(i)}/>'
    silent = ", ".join(f"{label} {d['counts'][0]} of {sum(d['counts'])} silent" for _, label, d in curves)
    text = (
        f'<text x="{_LEFT}" y="10" {_TEXT}>{most:.0%} of latents</text>'
        f'<text x="{_LEFT}" y="{_H - 3}" {_TEXT}>silent, 1e-7</text>'
        f'<text x="{_W - 8}" y="{_H - 3}" text-anchor="end" {_TEXT}>on every token</text>'
    )
    return _box("density", f"number of latents by density: {silent}", lines + text)
