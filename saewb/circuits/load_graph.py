"""Load attribution graphs from JSON files, of saewb and of other tools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saewb._files import read_json
from saewb.circuits.graph import KINDS, AttributionGraph, completed
from saewb.circuits.graph_json import OWN, TYPES
from saewb.errors import FormatError, explain

if TYPE_CHECKING:
    import pandas as pd

_MAX_BYTES = 2**30


def load_graph(path: str | Path) -> AttributionGraph:
    """Load an attribution graph from a JSON file of `AttributionGraph.to_json`, circuit-tracer or Neuronpedia.

    Files of other tools have no values, constants and influences: the first two are then missing, influence and scores
    are computed from the links that the file has, of a pruned graph therefore from what was kept.

    Args:
        path: a `.json` file.

    Returns:
        An AttributionGraph.

    Raises:
        FormatError: if it is no such file: no JSON, a field that is missing, a link between nodes it does not have, or
            that leads back to an earlier layer.

    Example:
        >>> import saewb, tempfile, pathlib
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> graph = saewb.attribution_graph(model, "Paris is the capital", sae, progress=False).pruned()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = graph.to_json(pathlib.Path(folder) / "graph.json")
        ...     again = saewb.load_graph(pathlib.Path(folder) / "graph.json")
        >>> again.nodes.equals(graph.nodes), bool((again.edges == graph.edges).all())
        (True, True)
    """
    document = read_json(Path(path), limit=_MAX_BYTES)
    try:
        return _graph(document)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{path} is no attribution graph: {type(error).__name__}: {error}."
        raise FormatError(explain(what, want="metadata, nodes and links, as graph.to_json writes them")) from None


def _graph(document: Mapping[str, Any]) -> AttributionGraph:
    metadata, nodes = document["metadata"], document["nodes"]
    info = metadata.get("info") or {}
    own = info.get("saewb") or {}
    kinds = {text: kind for kind, text in TYPES.items()}
    known = [dict(node, kind=kinds.get(node["feature_type"])) for node in nodes]
    if unknown := sorted({node["feature_type"] for node in known if node["kind"] is None}):
        raise FormatError(explain(f"nodes of types {unknown}.", want=", ".join(kinds)))
    order = sorted(range(len(known)), key=lambda i: KINDS.index(known[i]["kind"]))
    frame = _frame([known[i] for i in order], [str(token) for token in metadata["prompt_tokens"]])
    index = {known[i]["node_id"]: at for at, i in enumerate(order)}
    if len(index) < len(frame):
        twice = next(node for node in index if [n["node_id"] for n in known].count(node) > 1)
        want = "ids that are unique (circuit-tracer gives an error the id of a latent of layer 0, if both are there)"
        raise FormatError(explain(f"two nodes have one id, {twice!r}.", want=want))
    edges = torch.zeros(len(frame), len(frame))
    links = document["links"]
    ends = [{link[end] for link in links} - set(index) for end in ("source", "target")]
    if missing := sorted(ends[0] | ends[1]):
        raise FormatError(explain(f"links of {missing[:3]}.", want="ids of the file's nodes"))
    source, target = ([index[link[end]] for link in links] for end in ("source", "target"))
    edges[target, source] = torch.tensor([float(link["weight"]) for link in links])
    if not edges.isfinite().all():
        raise FormatError(explain("a link has no finite weight.", want="numbers"))
    for name in OWN:
        if name in own:
            values = [own[name][i] for i in order] if len(own[name]) == len(frame) else None
            if values is None:
                raise FormatError(explain(f"{name} of {len(own[name])} nodes, of {len(frame)}.", want="one each"))
            frame[name] = [math.nan if value is None else float(value) for value in values]
    if "targets" in own:
        frame.loc[frame["kind"] == "target", "token"] = [str(token) for token in own["targets"]]
    thresholds = own.get("thresholds")
    scores = info.get("graph_scores") or {}
    graph = AttributionGraph(
        nodes=frame,
        edges=edges,
        tokens=tuple(str(token) for token in metadata["prompt_tokens"]),
        prompt=str(metadata["prompt"]),
        model=str(metadata["scan"]),
        saes=tuple(own.get("saes", ())),
        is_exact=bool(own.get("is_exact", True)),
        n_active=int(own.get("n_active", (frame["kind"] == "latent").sum())),
        replacement_score=float(scores.get("replacement", math.nan)),
        completeness=float(scores.get("completeness", math.nan)),
        thresholds=tuple(thresholds) if thresholds else None,
        interrupted=bool(own.get("interrupted", False)),
    )
    if bool((graph.order[target] <= graph.order[source]).any()):
        raise FormatError(explain("a link leads to an earlier layer, or its own.", want="links upwards only"))
    return graph if own else completed(graph)


def _frame(nodes: list[dict[str, Any]], tokens: list[str]) -> pd.DataFrame:
    """Nodes as saewb has them."""
    import pandas as pd

    rows = []
    for node in nodes:
        kind, position, name = node["kind"], int(node["ctx_idx"]), str(node["node_id"])
        if not 0 <= position < len(tokens):
            raise FormatError(explain(f"node {name!r} is at position {position} of {len(tokens)}.", want="a token"))
        inner = kind in ("latent", "error")
        name = f"error_{int(node['layer'])}_{position}" if kind == "error" else name
        label = str(node.get("clerp") or "")
        text = tokens[position]
        if kind == "target":
            text = label.split('"')[1] if label.count('"') > 1 else label
            label = ""
        rows.append(
            {
                "id": name,
                "kind": kind,
                "layer": int(node["layer"]) if inner else pd.NA,
                "position": position,
                "token": text,
                "latent": pd.NA if kind == "error" else int(name.split("_")[1]),
                "activation": _float(node.get("activation")),
                "probability": float(node.get("token_prob") or 0.0) if kind == "target" else math.nan,
                "value": math.nan,
                "constant": math.nan,
                "left_out": math.nan,
                "influence": 0.0,
                "cumulative": _float(node.get("influence")),
                "label": label,
            }
        )
    frame = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["id", "kind"])
    return frame.astype({"layer": "Int64", "latent": "Int64"})


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
