"""Serialize the view of a CorrelationPanel for the front end: cells as bytes, statistics, both features of a pair."""

from __future__ import annotations

import base64
import math
from typing import Any

from saewb_widgets.html import grid, png_uri
from saewb_widgets.serialize import latent_page, short

_N_TOKENS = 6  # tokens of a feature in a tooltip


def tile(overview: Any, views: list[Any], plain: bool) -> tuple[dict[str, Any], list[bytes]]:
    """A message with the cells of one view, or of both matrices on the color scale of the first.

    Args:
        overview: Overview of the first matrix, for its order.
        views: views of the same window and step.
        plain: encode the cells as text, for front ends that lose binary buffers.
    """
    first = views[0]
    (high, wide), (r0, r1, c0, c1) = first.values.shape, first.window
    head = {"window": list(first.window), "shape": [high, wide], "scale": first.scale, "step": first.step}
    head |= {"caption": caption(views), "final": all(v.is_final for v in views), "n": len(views)}
    if first.step == 1:
        head |= {"rows": overview.rows[r0:r1].tolist(), "cols": overview.cols[c0:c1].tolist()}
    levels = [v.levels(first.scale) for v in views]
    if plain:
        return head | {"levels": [base64.b64encode(x).decode() for x in levels]}, []
    return head, levels


def caption(views: list[Any]) -> str:
    """What a cell stands for, and how much the two matrices differ."""
    first = views[0]
    if first.cells == "exact":
        what = "single entries"
    else:
        kind = "strongest entry" if first.cells == "strongest" else "mean"
        what = f"{kind} of {first.step} x {first.step}" + ("" if first.is_final else ", for now")
    if len(views) == 1 or math.isnan(rms := first.differs(views[1])):
        return what
    return f"{what}; the two differ by {short(rms):g} (root mean square)"


def figures(overview: Any, matrix: Any, index: Any) -> dict[str, Any]:
    """Statistics and strongest pairs of the entries scanned so far, each with the labels of both features."""
    of_rows = labels(matrix, index, [p.row for p in overview.pairs], 0)
    of_columns = labels(matrix, index, [p.col for p in overview.pairs], 1)
    named = zip(overview.pairs, of_rows, of_columns, strict=True)
    pairs = [[p.row, p.col, short(p.value), row, column] for p, row, column in named]
    rows = [["strongest", pairs[0][2]]] if pairs else []
    if (stats := overview.stats) is not None:
        rows = [["root mean square", short(stats.rms)], ["mean", short(stats.mean)], *rows]
    return {"figures": rows, "pairs": pairs}


def pair(matrix: Any, second: Any, index: Any, i: int, j: int) -> dict[str, Any]:
    """The entry of a pair, and both of its features."""
    entry = matrix.pair(i, j)
    page = {"value": _value(entry.value), "together": entry.together, "n_tokens": entry.n_tokens}
    page["sides"] = [_side(matrix, index, i, 0, entry.fires_row), _side(matrix, index, j, 1, entry.fires_col)]
    if second is not None:
        page["second"] = _value(second.pair(i, j).value)
    return page


def labels(matrix: Any, index: Any, features: list[int], axis: int) -> list[str]:
    """Labels of features of the rows (axis 0) or columns (axis 1); "" where no index knows them."""
    return index.label_texts(features) if index is not None and (axis == 0 or matrix.same) else [""] * len(features)


def top_tokens(matrix: Any, index: Any, i: int, axis: int) -> list[str]:
    """Tokens on which a feature of the rows (axis 0) or columns (axis 1) is strongest."""
    latent = _latent(matrix, index, i, axis)
    return [] if latent is None else [c.token for c in latent.top[:_N_TOKENS]]


def static_html(matrix: Any, views: list[Any], pairs: list[Any]) -> str:
    """The matrix as PNGs in data URIs, and the strongest pairs, as HTML without scripts."""
    first = views[0]
    high, wide = first.values.shape
    pictures = "".join(
        f"<img alt='{matrix.what} matrix' width=360 src='{png_uri(v.levels(first.scale), wide, high)}' "
        "style='image-rendering:pixelated;margin-right:12px'>"
        for v in views
    )
    scale = f"{caption(views)}; blue {-first.scale:g}, orange {first.scale:+g}, gray not defined"
    rows = [(f"{i} {a}".strip(), f"{j} {b}".strip(), f"{v:+.3f}") for i, j, v, a, b in pairs[:12]]
    return f"{pictures}<div>{scale}</div>" + (grid(("feature", "and", matrix.what), rows) if rows else "")


def _value(x: float) -> float | None:
    return None if x != x else short(x)


def _latent(matrix: Any, index: Any, i: int, axis: int) -> Any:
    return index.latent(i) if index is not None and (axis == 0 or matrix.same) else None


def _side(matrix: Any, index: Any, i: int, axis: int, fires: int | None) -> dict[str, Any]:
    latent = _latent(matrix, index, i, axis)
    partners = matrix.partners(i, 8, axis)
    others = [p.col if axis == 0 else p.row for p in partners]
    names = labels(matrix, index, others, 1 - axis)
    near = [[j, short(p.value), name] for j, p, name in zip(others, partners, names, strict=True)]
    (name,) = labels(matrix, index, [i], axis)
    side: dict[str, Any] = {"feature": i, "label": name, "fires": fires, "near": near}
    if latent is not None:
        page = latent_page(latent, frozenset(index.info.special), None)
        side["page"] = {k: page[k] for k in ("density", "max", "scale", "words", "top", "histogram")}
    return side
