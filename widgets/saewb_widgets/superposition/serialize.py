"""What the front end of a SuperpositionPanel is sent, and what stands in for it where no kernel runs."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from saewb_widgets.html import grid
from saewb_widgets.serialize import short

DOTS = 4000  # of the scatter that are sent, at most
_ENDS = 250  # at each end of both axes that are kept
BINS = 50  # of |cos| with the nearest other, 0..1
_COLORS = ("#2f6f9f", "#2f7d62", "#8a4f9e", "#b3543c", "#7a7a2a", "#3f8a96")  # as in superposition.css
_DASHES = ("none", "5 3", "2 3", "8 3 2 3")
_W, _H, _LEFT, _BOTTOM, _NEVER = 420, 190, 34, 18, 16  # of the still's charts; the strip of those that never fire


def figures(name: str, found: Any, frame: Any) -> dict[str, Any]:
    """What a `Superposition` says of all pairs.

    Args:
        name: of what.
        found: the result.
        frame: its `to_frame()`.
    """
    by_p = [
        [f"percentile {p:g} of |cos|", short(v), "mean over directions"]
        for p, v in found.mean_percentile_abs_cos.items()
    ]
    return {
        "figures": [
            ["largest |cos|", short(found.mean_max_abs_cos), "with the nearest other, mean over directions"],
            *by_p,
            ["|cos|", short(found.mean_abs_cos), "mean over pairs"],
            ["root mean square", short(found.rms_cos), f"of the cosine; at least {found.welch_bound:.3g} (Welch)"],
            ["effective dimensions", short(found.effective_dim), f"of {found.d:,}"],
            *([["of length 0", found.n_zero, "directions"]] if found.n_zero else []),
        ],
        "of": name,
        "cosines": found.histogram.tolist(),
        "largest": _largest(frame),
    }


def compared(names: list[str], made: Mapping[str, tuple[Any, Any]], why: Mapping[str, str]) -> dict[str, Any]:
    """The figures of several beside each other, and their histograms, of those that are there.

    Args:
        names: of all.
        made: of each that is there its result and `to_frame()`.
        why: of each that will not be there, the reason.
    """
    wanted = ("mean_max_abs_cos", *_percentiles(made), "rms_cos", "welch_bound", "effective_dim")
    rows, outlines = [], {}
    for name in names:
        if name not in made:
            rows.append({"name": name, "why": why.get(name, "not computed yet")})
            continue
        found, frame = made[name]
        said = found.figures()
        rows.append({"name": name, "n": found.n_features, "d": found.d, "figures": [short(said[k]) for k in wanted]})
        outlines[name] = {"cosines": found.histogram.tolist(), "largest": _largest(frame)}
    heads = ["largest |cos|", *(f"percentile {k[6:-8]}" for k in _percentiles(made))]
    sizes = {row["d"] for row in rows if "d" in row}
    note = "Random directions have smaller cosines in more dimensions: compare each with its own Welch bound."
    return {
        "heads": [*heads, "root mean square", "Welch bound", "effective dimensions"],
        "rows": rows,
        "outlines": outlines,
        "note": note if len(sizes) > 1 else "",
    }


def dots(points: Any, scatter: str, what: str) -> dict[str, Any]:
    """The scatter: of all directions, or of many a choice that keeps the extremes.

    Args:
        points: a frame of `max_abs_cos` and `scatter`, one row per direction.
        scatter: norm or density.
        what: the axis' label.
    """
    kept, said = points, ""
    if len(points) > DOTS:
        by_cos, by_x = (points[name].sort_values(kind="stable").index for name in ("max_abs_cos", scatter))
        ends = by_cos[:_ENDS].union(by_cos[-_ENDS:]).union(by_x[:_ENDS]).union(by_x[-_ENDS:])
        inner = by_cos[~by_cos.isin(ends)]
        step = -(-len(inner) // (DOTS - len(ends)))
        kept = points.loc[ends.union(inner[::step])]
        said = f"{len(kept):,} of {len(points):,}: the {_ENDS} at each end of both axes, and of the others "
        said += f"one in {step} by |cos|"
    return {
        "latents": [int(i) for i in kept.index],
        "x": [short(v) for v in kept[scatter]],
        "y": [short(v) for v in kept["max_abs_cos"]],
        "log": scatter == "density",
        "label": what,
        "said": said,
    }


def still(compared: dict[str, Any], which: str, dots: dict[str, Any], cosines: list[int]) -> str:
    """Several beside each other and the charts, as HTML without scripts."""
    table = ""
    if len(compared.get("rows", [])) > 1:
        head = ("", "directions", "dimensions", *compared["heads"])
        body = [
            (r["name"], f"{r['n']:,}", f"{r['d']:,}", *r["figures"]) if "n" in r else (r["name"], r["why"])
            for r in compared["rows"]
        ]
        table = grid(head, body) + f"<div style='opacity:.65'>{compared['note']}</div>"
    others = {name: o["cosines"] for name, o in compared.get("outlines", {}).items() if name != which}
    charts = _histogram(which, cosines, others, list(compared.get("outlines", {}))) + _scatter(dots)
    return table + f"<div style='display:flex;flex-wrap:wrap;gap:14px;margin:8px 0'>{charts}</div>"


def _percentiles(made: Mapping[str, tuple[Any, Any]]) -> list[str]:
    found = next(iter(made.values()), (None,))[0]
    return [] if found is None else [name for name in found.figures() if name.startswith("mean_p")]


def _largest(frame: Any) -> list[int]:
    places = (frame["max_abs_cos"] * BINS).astype(int).clip(upper=BINS - 1).value_counts()
    return [int(places.get(k, 0)) for k in range(BINS)]


def _histogram(which: str, cosines: list[int], others: dict[str, list[int]], names: list[str]) -> str:
    """Fractions of pairs on a log scale: what is looked at filled, the others as lines."""
    total = sum(cosines)
    lines = {
        name: [math.log1p(c * total / max(1, sum(each))) for c in each]
        for name, each in {which: cosines, **others}.items()
    }
    most, n = max(max(line) for line in lines.values()) or 1, len(cosines)
    drawn, key = [], []
    for name, line in lines.items():
        at = " ".join(f"{_W * k / n:.1f},{_H - _BOTTOM - (_H - 30) * y / most:.1f}" for k, y in enumerate(line))
        if name == which:
            drawn.append(f'<polygon points="0,{_H - _BOTTOM} {at} {_W},{_H - _BOTTOM}" fill="#f0a83c" opacity=".75"/>')
            key.append(f"<span style='color:#c8701a'>&#9632;</span> {html.escape(name)}")
        else:
            k = names.index(name)
            color, dash = _COLORS[k % len(_COLORS)], _DASHES[k % len(_DASHES)]
            drawn.append(f'<polyline points="{at}" fill="none" stroke="{color}" stroke-dasharray="{dash}"/>')
            key.append(f"<span style='color:{color}'>&#9473;</span> {html.escape(name)}")
    ends = f'<text x="0" y="{_H - 4}" {_TEXT}>−1</text><text x="{_W}" y="{_H - 4}" text-anchor="end" {_TEXT}>1</text>'
    legend = f"<div>{' &nbsp; '.join(key)}</div>" if others else ""
    return _chart("Cosines of all pairs, log scale", "".join(drawn) + ends, legend)


def _scatter(dots: dict[str, Any]) -> str:
    """A dot for each place that has one."""
    if not dots.get("x"):
        return ""
    log = dots["log"]
    xs = [(math.log10(x) if x > 0 else None) if log else x for x in dots["x"]]
    there = [x for x in xs if x is not None] or [0.0]
    low, high = min(there), max(there)
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
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}" {_TEXT}>{said}</text>' for x, y, a, said in marks)
    drawn = f'<path d="{path}" stroke="#c8701a" stroke-width="2.5" stroke-linecap="round" opacity=".6"/>{texts}'
    return _chart(
        f"Largest |cos| against {dots['label']}", drawn, f"<div style='opacity:.65'>{html.escape(dots['said'])}</div>"
    )


_TEXT = 'font-size="10" fill="currentColor" fill-opacity=".65"'


def _chart(title: str, drawn: str, under: str) -> str:
    said = html.escape(title, quote=True)
    svg = f'<svg width="{_W}" height="{_H}" viewBox="0 0 {_W} {_H}" role="img" aria-label="{said}">{drawn}</svg>'
    return f'<div><div style="font-weight:600">{said}</div>{svg}{under}</div>'
