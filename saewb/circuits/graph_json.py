"""Attribution graphs in the JSON format of Neuronpedia, circuit-tracer and Anthropic's viewer.

Fields that this format does not have (values, constants, influences before the cumulative sum) are in
`metadata.info.saewb`, which other readers ignore; a graph without them, of another tool, is read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from saewb._files import write_text

TYPES = {
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "target": "logit",
}
OWN = ("activation", "probability", "value", "constant", "left_out", "influence", "cumulative")
"""Columns of the nodes that the format does not have, or has in another meaning."""


def graph_json(graph: Any, path: str | Path | None, slug: str, scan: str | None) -> str:
    """The JSON text of an AttributionGraph, also written to `path` unless that is None."""
    frame = graph.nodes
    taken = set(frame["id"])
    nodes = [_node(row, taken) for row in frame.to_dict("records")]
    ids = [node["node_id"] for node in nodes]
    for rank, node in enumerate(node for node in nodes if node["feature_type"] == TYPES["target"]):
        node["is_target_logit"] = rank == 0
    target, source = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[target, source].tolist()
    edges = zip(source.tolist(), target.tolist(), weights, strict=True)
    own: dict[str, Any] = {name: [_number(value) for value in frame[name]] for name in OWN}
    own |= {
        "targets": frame.loc[frame["kind"] == "target", "token"].tolist(),
        "saes": list(graph.saes),
        "is_exact": graph.is_exact,
        "n_active": graph.n_active,
        "thresholds": graph.thresholds,
        "interrupted": graph.interrupted,
    }
    metadata = {
        "slug": slug,
        "scan": scan or graph.model,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": graph.thresholds[0] if graph.thresholds else None,
        "schema_version": 1,
        "info": {
            "generator": {"name": "saewb", "url": "https://pypi.org/project/saewb/"},
            "graph_scores": {"replacement": graph.replacement_score, "completeness": graph.completeness},
            "saewb": own,
        },
    }
    document = {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": ids[s], "target": ids[t], "weight": weight} for s, t, weight in edges],
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if path is not None:
        write_text(Path(path), text)
    return text


def _node(row: Mapping[str, Any], taken: Set[str]) -> dict[str, Any]:
    kind, position, node = row["kind"], row["position"], row["id"]
    if kind == "error" and (theirs := f"0_{row['layer']}_{position}") not in taken:  # not that of a latent, too
        node = theirs
    number = None if kind == "error" else int(row["latent"])
    layer = {"token": "E", "target": node.partition("_")[0]}.get(kind) or str(row["layer"])
    feature = {"error": -1, "token": position}.get(kind, number)
    if kind == "latent":
        feature = _pair(int(row["layer"]), number)
    short = {
        "latent": f"{layer}_{number}-0",
        "error": f"{layer}_{position}-0",
        "token": f"E_{number}-{position}",
        "target": f"L_{number}-{position}",
    }
    label = row["label"] or (f'Output "{row["token"]}" (p={row["probability"]:.3f})' if kind == "target" else "")
    return {
        "node_id": node,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "jsNodeId": short[kind],
        "clerp": label,
        "influence": None if kind == "target" else _number(row["cumulative"]),
        "activation": _number(row["activation"]) if kind == "latent" else None,
        "token_prob": row["probability"] if kind == "target" else 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pair(x: int, y: int) -> int:
    """Cantor's pairing function."""
    return (x + y) * (x + y + 1) // 2 + y
