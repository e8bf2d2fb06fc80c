"""Serialize the view of a SuperpositionPanel for the front end, and as static HTML without a kernel."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from saewb_widgets.html import grid
from saewb_widgets.serialize import short

DOTS = 4000  # points of the scatter plot sent, at most
_ENDS = 250  # points kept at each end of both axes
BINS = 50  # histogram bins of the largest |cos|, 0..1
_COLORS = ("#2f6f9f", "#2f7d62", "#8a4f9e", "#b3543c", "#7a7a2a", "#3f8a96")  # as in superposition.css
_DASHES = ("none", "5 3", "2 3", "8 3 2 3")
_W, _H, _LEFT, _BOTTOM, _NEVER = (
    420,
    190,
    34,
    18,
    16,
)  # pixels of the static charts; _NEVER: strip of latents with density 0


def figures(name: str, result: Any, frame: Any) -> dict[str, Any]:
    """Statistics and histograms of all pairs of one set.

    Args:
        name: name of the set.
        result: its `Superposition`.
        frame: `result.to_frame()`.
    """
    by_p = [
        [f"percentile {p:g} of |cos|", short(v), "mean over directions"]
        for p, v in result.mean_percentile_abs_cos.items()
    ]
    return {
        "figures": [
            ["largest |cos|", short(result.mean_max_abs_cos), "with the nearest other, mean over directions"],
            *by_p,
            ["|cos|", short(result.mean_abs_cos), "mean over pairs"],
            ["root mean square", short(result.rms_cos), f"of the cosine; at least {result.welch_bound:.3g} (Welch)"],
            ["effective dimensions", short(result.effective_dim), f"of {result.d:,}"],
            *([["of length 0", result.n_zero, "directions"]] if result.n_zero else []),
        ],
        "of": name,
        "cosines": result.histogram.tolist(),
        "largest": _largest(frame),
    }


def comparison(names: list[str], results: Mapping[str, tuple[Any, Any]], reasons: Mapping[str, str]) -> dict[str, Any]:
    """Statistics and histograms of several sets, for comparison.

    Args:
        names: names of all sets.
        results: `Superposition` and `to_frame()` of each set computed so far.
        reasons: why a set has no result, for those that will not get one.
    """
    first = next(iter(results.values()), (None,))[0]
    percentiles = [] if first is None else [key for key in first.figures() if key.startswith("mean_p")]
    keys = ("mean_max_abs_cos", *percentiles, "rms_cos", "welch_bound", "effective_dim")
    rows, outlines = [], {}
    for name in names:
        if name not in results:
            rows.append({"name": name, "why": reasons.get(name, "not computed yet")})
            continue
        result, frame = results[name]
        stats = result.figures()
        rows.append({"name": name, "n": result.n_features, "d": result.d, "figures": [short(stats[k]) for k in keys]})
        outlines[name] = {"cosines": result.histogram.tolist(), "largest": _largest(frame)}
    heads = ["largest |cos|", *(f"percentile {k[6:-8]}" for k in percentiles)]
    note = "Random directions have smaller cosines in more dimensions: compare each with its own Welch bound."
    return {
        "heads": [*heads, "root mean square", "Welch bound", "effective dimensions"],
        "rows": rows,
        "outlines": outlines,
        "note": note if len({row["d"] for row in rows if "d" in row}) > 1 else "",
    }


def dots(points: Any, scatter: str, label: str) -> dict[str, Any]:
    """Points of the scatter plot; of many directions a subset that keeps the extremes.

    Args:
        points: a frame of `max_abs_cos` and `scatter`, one row per direction.
        scatter: quantity on the x axis, norm or density.
        label: label of the x axis.
    """
    subset, caption = points, ""
    if len(points) > DOTS:
        by_cos, by_x = (points[name].sort_values(kind="stable").index for name in ("max_abs_cos", scatter))
        ends = by_cos[:_ENDS].union(by_cos[-_ENDS:]).union(by_x[:_ENDS]).union(by_x[-_ENDS:])
        inner = by_cos[~by_cos.isin(ends)]
        step = -(-len(inner) // (DOTS - len(ends)))
        subset = points.loc[ends.union(inner[::step])]
        caption = f"{len(subset):,} of {len(points):,}: the {_ENDS} at each end of both axes, and of the others "
        caption += f"one in {step} by |cos|"
    return {
        "latents": [int(i) for i in subset.index],
        "x": [short(v) for v in subset[scatter]],
        "y": [short(v) for v in subset["max_abs_cos"]],
        "log": scatter == "density",
        "label": label,
        "caption": caption,
    }


def static_html(comparison: dict[str, Any], which: str, dots: dict[str, Any], cosines: list[int]) -> str:
    """The comparison table and both charts, as HTML without scripts."""
    table, outlines = "", comparison.get("outlines", {})
    if len(comparison.get("rows", [])) > 1:
        head = ("", "directions", "dimensions", *comparison["heads"])
        body = [
            (r["name"], f"{r['n']:,}", f"{r['d']:,}", *r["figures"]) if "n" in r else (r["name"], r["why"])
            for r in comparison["rows"]
        ]
        table = grid(head, body) + f"<div style='opacity:.65'>{comparison['note']}</div>"
    others = {name: o["cosines"] for name, o in outlines.items() if name != which}
    charts = _histogram(which, cosines, others, list(outlines)) + _scatter(dots)
    return table + f"<div style='display:flex;flex-wrap:wrap;gap:14px;margin:8px 0'>{charts}</div>"


def _largest(frame: Any) -> list[int]:
    """Histogram counts of the largest |cos| of each direction."""
    counts = (frame["max_abs_cos"] * BINS).astype(int).clip(upper=BINS - 1).value_counts()
    return [int(counts.get(k, 0)) for k in range(BINS)]


def _histogram(which: str, cosines: list[int], others: dict[str, list[int]], names: list[str]) -> str:
    """Histogram of the cosines of all pairs on a log scale: the current set filled, the others as lines."""
    total = sum(cosines)
    lines = {
        name: [math.log1p(c * total / max(1, sum(each))) for c in each]
        for name, each in {which: cosines, **others}.items()
    }
    most, n = max(max(line) for line in lines.values()) or 1, len(cosines)
    shapes, key = [], []
    for name, line in lines.items():
        at = " ".join(f"{_W * k / n:.1f},{_H - _BOTTOM - (_H - 30) * y / most:.1f}" for k, y in enumerate(line))
        if name == which:
            shapes.append(f'<polygon points="0,{_H - _BOTTOM} {at} {_W},{_H - _BOTTOM}" fill="#f0a83c" opacity=".75"/>')
            key.append(f"<span style='color:#c8701a'>&#9632;</span> {html.escape(name)}")
        else:
            k = names.index(name)
            color, dash = _COLORS[k % len(_COLORS)], _DASHES[k % len(_DASHES)]
            shapes.append(f'<polyline points="{at}" fill="none" stroke="{color}" stroke-dasharray="{dash}"/>')
            key.append(f"<span style='color:{color}'>&#9473;</span> {html.escape(name)}")
    ends = f'<text x="0" y="{_H - 4}" {_TEXT}>−1</text><text x="{_W}" y="{_H - 4}" text-anchor="end" {_TEXT}>1</text>'
    legend = f"<div>{' &nbsp; '.join(key)}</div>" if others else ""
    return _chart("Cosines of all pairs, log scale", "".join(shapes) + ends, legend)


def _scatter(dots: dict[str, Any]) -> str:
    """Scatter plot with one dot per occupied pixel."""
    if not dots.get("x"):
        return ""
    log = dots["log"]
    xs = [(math.log10(x) if x > 0 else None) if log else x for x in dots["x"]]
    finite = [x for x in xs if x is not None] or [0.0]
    low, high = min(finite), max(finite)
    left, top = _LEFT + (_NEVER if log and None in xs else 0), max(dots["y"]) or 1
    width, height = _W - left - 6, _H - _BOTTOM - 10
    at = {
        (
            _LEFT + 4 if x is None else left + round(width * ((x - low) / (high - low) if high > low else 0.5)),
            6 + round(height * (1 - y / top)),
        )
        for x, y in zip(xs, dots["y"], strict=True)
    }
    path = "".join(f"M{x} {y}h0" for x, y in sorted(at))
    first, last = (f"{10**v:.3g}" if log else f"{v:.3g}" for v in (low, high))
    marks = [(left, _H - 4, "start", first), (_W - 2, _H - 4, "end", last), (_LEFT - 4, 12, "end", f"{top:.2f}")]
    marks += [(_LEFT - 4, _H - _BOTTOM, "end", "0")]
    marks += [(_LEFT, _H - 4, "middle", "never")] if left > _LEFT else []
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}" {_TEXT}>{text}</text>' for x, y, a, text in marks)
    shapes = f'<path d="{path}" stroke="#c8701a" stroke-width="2.5" stroke-linecap="round" opacity=".6"/>{texts}'
    caption = f"<div style='opacity:.65'>{html.escape(dots['caption'])}</div>"
    return _chart(f"Largest |cos| against {dots['label']}", shapes, caption)


_TEXT = 'font-size="10" fill="currentColor" fill-opacity=".65"'


def _chart(title: str, shapes: str, caption: str) -> str:
    title = html.escape(title, quote=True)
    svg = f'<svg width="{_W}" height="{_H}" viewBox="0 0 {_W} {_H}" role="img" aria-label="{title}">{shapes}</svg>'
    return f'<div><div style="font-weight:600">{title}</div>{svg}{caption}</div>'
