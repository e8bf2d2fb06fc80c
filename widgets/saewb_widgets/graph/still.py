"""A still picture of an attribution graph, for a notebook without its kernel: an SVG as an image, no script."""

from __future__ import annotations

import base64
import html
from itertools import pairwise
from typing import Any

_WIDTH, _ROW, _LEFT, _TOP, _BOTTOM = 760, 46, 48, 26, 30
_EDGES = 300
_STYLE = (
    "text{font:10px system-ui,sans-serif;fill:#444}path{fill:none;stroke:#9aa3b2;stroke-opacity:.4}"
    ".up{stroke:#1f77b4;stroke-opacity:.85}.down{stroke:#c2452d;stroke-opacity:.85}circle{fill:#4c78a8}"
    ".error{fill:#fff;stroke:#c2452d}.token,.target{fill:#222}.group{fill:#1f77b4;stroke:#222}"
    ".pinned,.picked{stroke:#222;stroke-width:2}"
)


def picture(drawing: dict[str, Any], selected: str, pins: list[str]) -> str:
    """The graph as an `<img>`: nodes in their places, the strongest edges, those of the selected node in color.

    Args:
        drawing: what the front end draws.
        selected: id of a node, or name of a group; "" for none.
        pins: ids of pinned nodes.
    """
    nodes, layers, tokens = drawing["nodes"], drawing["layers"], drawing["tokens"]
    height = _TOP + _BOTTOM + _ROW * (len(layers) + 1)
    left = [_LEFT + (_WIDTH - _LEFT - 12) * end for end in drawing["ends"]]
    column = [b - a for a, b in pairwise(left)]
    at: list[tuple[float, float]] = []
    for node in nodes:
        if node["kind"] == "group":
            inside = [at[i] for i in node["members"]]
            at.append((sum(x for x, _ in inside) / len(inside), sum(y for _, y in inside) / len(inside)))
        else:
            position = node["position"]
            step = min(15, (column[position] - 4) / node["slots"]) * node["slot"]
            at.append((left[position] + 8 + step, height - _BOTTOM - _ROW * node["row"]))
    parts = [f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>']
    parts += [_text(4, height - _BOTTOM - _ROW * (i + 1) + 4, f"layer {layer}") for i, layer in enumerate(layers)]
    parts += [
        _text(x, height - 8, _cut(token, max(2, int(room / 7))))
        for token, x, room in zip(tokens, left, column, strict=False)
    ]
    parts += [_curve(at[source], at[target]) for source, target, *_ in drawing["edges"][:_EDGES]]
    picked = next((i for i, node in enumerate(nodes) if node["id"] == selected), None)
    own = [edge for edge in drawing["edges"] if picked in edge[:2]][:80]
    most = max((abs(effect) for _, _, effect, _ in own), default=1.0) or 1.0
    for source, target, effect, _ in own:
        look = f'class="{"up" if effect > 0 else "down"}" stroke-width="{0.5 + 4 * abs(effect) / most:.2f}"'
        parts.append(_curve(at[source], at[target], look))
    for i, (node, (x, y)) in enumerate(zip(nodes, at, strict=True)):
        if "group" in node:
            continue
        look = node["kind"] + (" picked" if i == picked else " pinned" if node["id"] in pins else "")
        parts.append(f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{node["r"]:.1f}"/>')
        if node["kind"] == "target":
            parts.append(_text(x + 6, y - 6 - 11 * (i % 2), _cut(node["token"], 14)))
        if node["kind"] == "group":
            parts.append(_text(x + 11, y + 4, _cut(node["label"], 24)))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"><style>{_STYLE}</style>'
    data = base64.b64encode(f"{head}{''.join(parts)}</svg>".encode()).decode()
    about = html.escape(drawing["about"], quote=True)
    return f'<img alt="{about}" style="width:100%;max-width:{_WIDTH}px" src="data:image/svg+xml;base64,{data}">'


def _curve(a: tuple[float, float], b: tuple[float, float], look: str = "") -> str:
    middle = (a[1] + b[1]) / 2
    line = f"M{a[0]:.0f} {a[1]:.0f}C{a[0]:.0f} {middle:.0f} {b[0]:.0f} {middle:.0f} {b[0]:.0f} {b[1]:.0f}"
    return f'<path {look} d="{line}"/>'


def _text(x: float, y: float, text: str) -> str:
    printable = "".join(c if c.isprintable() else "\ufffd" for c in text)  # XML has no control characters
    return f'<text x="{x:.0f}" y="{y:.0f}">{html.escape(printable)}</text>'


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"
