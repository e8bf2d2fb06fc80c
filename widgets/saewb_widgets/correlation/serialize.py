"""What a CorrelationPanel's front end is sent: cells as bytes, statistics, both features of a pair."""

from __future__ import annotations

import base64
from typing import Any

from saewb_widgets.html import grid, png_uri
from saewb_widgets.serialize import latent_page, short

_WORDS = 6  # contexts of a feature in a tip


def tile(overview: Any, views: list[Any], plain: bool) -> tuple[dict[str, Any], list[bytes]]:
    """A view, and that of the second matrix if there is one, in the colors of the first.

    Args:
        overview: of the first, for its order.
        views: of the same window and step.
        plain: as text, where binary buffers get lost.
    """
    first = views[0]
    (high, wide), (r0, r1, c0, c1) = first.values.shape, first.window
    head = {"window": list(first.window), "shape": [high, wide], "scale": first.scale, "step": first.step}
    head |= {"said": said(views), "final": all(v.is_final for v in views), "n": len(views)}
    if first.step == 1:
        head |= {"rows": overview.rows[r0:r1].tolist(), "cols": overview.cols[c0:c1].tolist()}
    levels = [v.levels(first.scale) for v in views]
    if plain:
        return head | {"levels": [base64.b64encode(x).decode() for x in levels]}, []
    return head, levels


def said(views: list[Any]) -> str:
    """What a cell is, and how far the two matrices differ."""
    first = views[0]
    if first.cells == "exact":
        what = "single entries"
    else:
        kind = "strongest entry" if first.cells == "strongest" else "mean"
        what = f"{kind} of {first.step} x {first.step}" + ("" if first.is_final else ", for now")
    if len(views) == 1 or (apart := first.differs(views[1])) != apart:
        return what
    return f"{what}; the two differ by {short(apart):g} (root mean square)"


def figures(overview: Any) -> dict[str, Any]:
    """Statistics and strongest pairs of what has been looked through."""
    found = overview.stats
    pairs = [[p.row, p.col, short(p.value)] for p in overview.pairs]
    stats = [] if found is None else [["root mean square", short(found.rms)], ["mean", short(found.mean)]]
    strongest = [["strongest", pairs[0][2]]] if pairs else []
    return {"figures": [*stats, *strongest], "pairs": pairs}


def pair(matrix: Any, second: Any, index: Any, i: int, j: int) -> dict[str, Any]:
    """Both features of a pair, and what is known of the two together."""
    found = matrix.pair(i, j)
    made = {"value": _value(found.value), "together": found.together, "n_tokens": found.n_tokens}
    made["sides"] = [_side(matrix, index, i, 0, found.fires_row), _side(matrix, index, j, 1, found.fires_col)]
    if second is not None:
        made["second"] = _value(second.pair(i, j).value)
    return made


def words(matrix: Any, index: Any, i: int, axis: int) -> list[str]:
    """Tokens on which a feature of the rows (0) or columns (1) is strongest."""
    latent = _latent(matrix, index, i, axis)
    return [] if latent is None else [c.token for c in latent.top[:_WORDS]]


def still(matrix: Any, views: list[Any], pairs: list[Any]) -> str:
    """HTML without scripts. Pictures are PNGs in data URIs, written by zlib."""
    first = views[0]
    high, wide = first.values.shape
    pictures = "".join(
        f"<img alt='{matrix.what} matrix' width=360 src='{png_uri(v.levels(first.scale), wide, high)}' "
        "style='image-rendering:pixelated;margin-right:12px'>"
        for v in views
    )
    scale = f"{said(views)}; blue {-first.scale:g}, orange {first.scale:+g}, gray not defined"
    rows = [(i, j, f"{v:+.3f}") for i, j, v in pairs[:12]]
    return f"{pictures}<div>{scale}</div>" + (grid(("feature", "and", matrix.what), rows) if rows else "")


def _value(x: float) -> float | None:
    return None if x != x else short(x)


def _latent(matrix: Any, index: Any, i: int, axis: int) -> Any:
    return index.latent(i) if index is not None and (axis == 0 or matrix.same) else None


def _side(matrix: Any, index: Any, i: int, axis: int, fires: int | None) -> dict[str, Any]:
    latent = _latent(matrix, index, i, axis)
    near = [[p.col if axis == 0 else p.row, short(p.value)] for p in matrix.partners(i, 8, axis)]
    made: dict[str, Any] = {"feature": i, "fires": fires, "near": near}
    if latent is not None:
        made["page"] = latent_page(latent, frozenset(index.info.special), None)
        made["page"] = {k: made["page"][k] for k in ("density", "max", "scale", "words", "top", "histogram")}
    return made
