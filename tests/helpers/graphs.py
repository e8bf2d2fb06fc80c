"""Transcoders for small models, and attribution graphs made by hand."""

import numpy as np
import pandas as pd
import torch

from helpers import tiny_models
from saewb.circuits.graph import AttributionGraph, completed, node_ids
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder

ACTIVATIONS = ({"activation": "relu"}, {"activation": "jumprelu"}, {"activation": "topk", "k": 6})
IDS = tiny_models.tokens(1, 6, seed=3)


def transcoders(read="mlp.hook_in", skip=False, layers=3):
    """One per layer, of another activation each."""
    return [
        tiny_models.sae(
            f"blocks.{i}.{read}", hook_out=f"blocks.{i}.hook_mlp_out", seed=i, skip=skip, **ACTIVATIONS[i % 3]
        )
        for i in range(layers)
    ]


def cross_layer(read="mlp.hook_in", layers=3, widths=(9, 14, 11), d=tiny_models.D_MODEL, activation="relu", **fields):
    """A cross-layer transcoder of random weights."""
    hooks = tuple(f"blocks.{i}.{read}" for i in range(layers))
    hooks_out = tuple(f"blocks.{i}.hook_mlp_out" for i in range(layers))
    cfg = CrossLayerConfig(d, widths, hooks=hooks, hooks_out=hooks_out, activation=activation, **fields)
    rng = torch.Generator().manual_seed(5)
    tensors = {
        name: [torch.randn(shape, generator=rng) * 0.3 for shape in shapes]
        for name, shapes in cfg.tensor_shapes().items()
    }
    if activation == "jumprelu":
        tensors["threshold"] = [t.abs() for t in tensors["threshold"]]
    return CrossLayerTranscoder.from_tensors(cfg, tensors)


def check_sums(graph, rel=1e-4):
    """Effects, constant and what is left out sum to the value of each target."""
    rows = graph.nodes["kind"].isin(["latent", "target"]).to_numpy()
    total = graph.edges.double().sum(1).numpy() + graph.nodes["constant"] + graph.nodes["left_out"]
    value = graph.nodes["value"].to_numpy()
    scale = np.maximum(np.abs(value[rows]), graph.edges.abs().sum(1).numpy()[rows])
    assert rows.any()
    assert np.isfinite(value[rows]).all()
    assert (np.abs(total.to_numpy() - value)[rows] <= rel * scale).all()
    assert not graph.edges[~torch.tensor(rows)].any()


def by_hand(kinds, layers, edges, weights, n_pos=1, positions=None, n_layers=None):
    """A graph of these nodes and edges `{(target, source): effect}`, all else made up."""
    n = len(kinds)
    frame = pd.DataFrame(
        {
            "id": "",
            "kind": kinds,
            "layer": pd.array([pd.NA if layer is None else layer for layer in layers], dtype="Int64"),
            "position": positions or [0] * n,
            "token": "x",
            "latent": pd.array([pd.NA if kind == "error" else i for i, kind in enumerate(kinds)], dtype="Int64"),
            "activation": 1.0,
            "probability": [weights.get(i, float("nan")) for i in range(n)],
            "value": 1.0,
            "constant": 0.0,
            "left_out": 0.0,
            "influence": 0.0,
            "cumulative": 0.0,
            "label": "",
        }
    )
    matrix = torch.zeros(n, n)
    for (target, source), effect in edges.items():
        matrix[target, source] = effect
    n_layers = n_layers or max(layer for layer in layers if layer is not None) + 1
    frame = frame.assign(id=node_ids(frame, n_layers))
    graph = AttributionGraph(
        nodes=frame,
        edges=matrix,
        tokens=("x",) * n_pos,
        prompt="x" * n_pos,
        model="by hand",
        saes=(),
        is_exact=True,
        n_active=kinds.count("latent"),
        replacement_score=0.0,
        completeness=0.0,
    )
    return completed(graph)


def large(n_nodes=500, n_layers=12, n_pos=10, seed=0):
    """A graph of many nodes and about 30 edges to each."""
    rng = np.random.default_rng(seed)
    n_latents = n_nodes - n_pos - 5 - 40
    kinds = ["latent"] * n_latents + ["error"] * 40 + ["token"] * n_pos + ["target"] * 5
    layers = [*rng.integers(0, n_layers, n_latents + 40).tolist(), *[None] * (n_pos + 5)]
    places = [(layer, i % n_pos) for i, layer in enumerate(layers[n_latents : n_latents + 40])]
    positions = [*rng.integers(1, n_pos, n_latents).tolist(), *[p for _, p in places], *range(n_pos), *[n_pos - 1] * 5]
    depth = np.array(
        [-1 if k == "token" else n_layers if k == "target" else i for k, i in zip(kinds, layers, strict=True)]
    )
    edges = {}
    for target in [i for i, kind in enumerate(kinds) if kind in ("latent", "target")]:
        below = np.flatnonzero(depth < depth[target])
        for source in rng.choice(below, min(30, len(below)), replace=False):
            edges[target, source] = float(rng.normal())
    weights = dict.fromkeys(range(n_nodes - 5, n_nodes), 0.2)
    return by_hand(kinds, layers, edges, weights, n_pos=n_pos, positions=positions)
