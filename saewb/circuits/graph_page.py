"""The HTML page of an attribution graph: one file that needs neither network nor kernel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from saewb._files import write_text
from saewb.circuits.supernodes import check_groups, collapse
from saewb.errors import explain

MAX_NODES = 2000
"""Nodes of a page, at most; 500 are drawn in a moment."""
_MAX_EDGES = 50_000
_PAGE = Path(__file__).parent / "page"


def write_graph_page(
    graph: Any, path: str | Path, title: str | None, cards: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Write the page of a graph, whole or not at all, and return its absolute path."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(explain(f"{str(path)!r} is a folder.", fix=f"save_html({str(path / 'graph.html')!r})"))
    page = render_graph_page(graph, title, cards)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path.resolve()


def render_graph_page(graph: Any, title: str | None = None, cards: Mapping[str, Sequence[str]] | None = None) -> str:
    """Render the page as a string."""
    from jinja2 import Environment, FileSystemLoader

    if len(graph) > MAX_NODES:
        what = f"{graph!r} has {len(graph)} nodes."
        raise ValueError(explain(what, want=f"at most {MAX_NODES}", fix="graph.pruned(nodes=0.6).save_html(path)"))
    data = graph_data(graph, cards=cards)
    # Without "<", so that no text can end the script element.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Environment(loader=FileSystemLoader(_PAGE), autoescape=True).get_template("graph.html")
    return template.render(title=title or f"How {graph.model or 'the model'} got here", about=data["about"], data=text)


def graph_data(
    graph: Any,
    groups: Mapping[str, Sequence[str]] | None = None,
    cards: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """What is drawn: nodes, after them the groups, and the strongest edges as (source, target, effect, score).

    A node has its place: its row (0 tokens, then layers, last targets), its position, and its slot of the slots there;
    `ends` are where positions begin and end. `cards` are lines on nodes, by id, for the tip at the mouse.
    """
    groups, cards = groups or {}, cards or {}
    rows = graph.nodes.astype(object).where(graph.nodes.notna(), None).to_dict("records")
    columns = ("id", "kind", "layer", "position", "token", "latent", "activation", "value", "label")
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    nodes = [
        {name: _plain(row[name]) for name in columns}
        | {name: _plain(row[name] or 0.0) for name in ("influence", "cumulative")}
        | {"row": _row(layers, row), "r": _radius(row)}
        | ({"card": list(cards[row["id"]])} if row["id"] in cards else {})
        for row in rows
    ]
    ends = _place(nodes, len(graph.tokens))
    members = check_groups(groups, {node["id"]: i for i, node in enumerate(nodes)})
    matrix, totals = collapse(graph.edges, members)
    reach = graph.weights + graph.weights.new_tensor(graph.nodes["influence"].fillna(0).to_numpy())
    importance = torch.cat([reach, torch.stack([reach[i].sum() for i in members]) if members else reach[:0]])
    nodes += [
        {"id": name, "kind": "group", "label": name, "members": index, "r": 8.0}
        for name, index in zip(groups, members, strict=True)
    ]
    for k, index in enumerate(members):
        for i in index:
            nodes[i]["group"] = len(rows) + k
    target, source = matrix.nonzero(as_tuple=True)
    effect = matrix[target, source].double()
    score = effect.abs() / totals[target].clamp_min(1e-10) * importance[target]
    order = score.argsort(descending=True, stable=True)[:_MAX_EDGES]
    pairs = zip(
        source[order].tolist(), target[order].tolist(), effect[order].tolist(), score[order].tolist(), strict=True
    )
    exact = "" if graph.is_exact else " SAEs: MLPs linearized, effects to first order."
    about = (
        f"{graph.prompt!r}: replacement score {graph.replacement_score:.2f}, completeness {graph.completeness:.2f}."
        f" Effects are of the frozen model, not validated by an intervention.{exact}"
    )
    edges = [(s, t, _plain(e), _plain(x)) for s, t, e, x in pairs]
    places = {"layers": layers, "ends": ends}
    return {"tokens": list(graph.tokens), "about": about, **places, "nodes": nodes, "edges": edges}


def _row(layers: list[int], node: Mapping[str, Any]) -> int:
    if node["layer"] is None:
        return len(layers) + 1 if node["kind"] == "target" else 0
    return layers.index(node["layer"]) + 1


def _radius(node: Mapping[str, Any]) -> float | None:
    if node["kind"] in ("token", "target"):
        return 4.0
    return _plain(min(7.0, 2 + 7.5 * max(node["influence"] or 0.0, 0.0) ** 0.5))


def _place(nodes: list[dict[str, Any]], n_pos: int) -> list[float]:
    """Give each node its slot among those of its row and position, those of most influence first.

    Returns where each position begins, and the last ends, as shares of the width: wider where there are more nodes.
    """
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for node in nodes:
        cells.setdefault((node["row"], node["position"]), []).append(node)
    for cell in cells.values():
        for slot, node in enumerate(sorted(cell, key=lambda node: -node["influence"])):
            node |= {"slot": slot, "slots": len(cell)}
    widths = [3.0] * n_pos
    for (_, position), cell in cells.items():
        widths[position] = max(widths[position], len(cell) + 1.0)
    return [round(end / sum(widths), 4) for end in accumulate(widths, initial=0.0)]


def _plain(value: Any) -> Any:
    """Numbers in four digits; missing ones as None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
