"""Influence over all paths of an attribution graph, and pruning by it; knows matrices, not graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.errors import explain

CHUNK = 2**22
"""Entries of the edge matrix that are copied at a time."""


def row_totals(edges: Float[Tensor, "rows nodes"]) -> Float[Tensor, " rows"]:
    """Sum of |effect| of each row."""
    return torch.cat([rows.abs().sum(1, dtype=torch.float64) for _, rows in row_chunks(edges)])


def influence(
    edges: Float[Tensor, "rows nodes"],
    row_node: Int[Tensor, " rows"],
    order: Int[Tensor, " nodes"],
    weights: Float[Tensor, " nodes"],
    totals: Float[Tensor, " rows"],
) -> Float[Tensor, " nodes"]:
    """Influence of each node on the targets over all paths: w N + w N^2 + ..., N the rows of |edges| over their sums.

    The graph has no circles, so one pass from the targets down gives the sum of all powers.

    Args:
        edges: effects on some nodes.
        row_node: which node each row is of.
        order: depth of each node.
        weights: w, of the nodes.
        totals: `row_totals(edges)`.

    Returns:
        float64.
    """
    reach = torch.zeros(edges.shape[1], dtype=torch.float64)
    depth = order[row_node]
    for level in depth.unique().flip(0).tolist():
        rows = ((depth == level) & (totals > 0)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        share = (reach[row_node[rows]] + weights[row_node[rows]]) / totals[rows].clamp_min(1e-10)
        step = max(1, CHUNK // edges.shape[1])
        for some, values in zip(rows.split(step), share.split(step), strict=True):
            reach += (values.float() @ edges[some].abs()).double()
    return reach


def prune(
    matrix: Float[Tensor, "nodes nodes"],
    reach: Float[Tensor, " nodes"],
    order: Int[Tensor, " nodes"],
    weights: Float[Tensor, " nodes"],
    fixed: Bool[Tensor, " nodes"],
    latents: Bool[Tensor, " nodes"],
    *,
    nodes: float,
    edges: float,
) -> tuple[Bool[Tensor, " nodes"], Bool[Tensor, "nodes nodes"]]:
    """Masks of the nodes and edges that `AttributionGraph.pruned` keeps.

    Args:
        matrix: effects.
        reach: influence of each node.
        order: depth of each node.
        weights: of the targets.
        fixed: nodes that are always kept.
        latents: nodes that need an incoming edge.
        nodes: share of the influence.
        edges: share of the edges' scores.

    Raises:
        ValueError: for a share that is not in 0 to 1.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise ValueError(explain(f"pruned got {name}={share!r}.", want="a share, 0 to 1", fix=f"{name}=0.8"))
    keep = (reach >= _threshold(reach, nodes)) | fixed
    index = keep.nonzero()[:, 0]
    inner = matrix[index][:, index].abs()  # of the kept nodes only: few of many
    edge_mask = torch.zeros(matrix.shape, dtype=torch.bool)
    some, within = _prune_edges(inner, order[index], weights[index], fixed[index], latents[index], edges)
    edge_mask[index[:, None], index] = within
    keep[index] = some
    return keep, edge_mask


def _prune_edges(
    matrix: Tensor, order: Tensor, weights: Tensor, fixed: Tensor, latents: Tensor, share: float
) -> tuple[Bool[Tensor, " nodes"], Bool[Tensor, "nodes nodes"]]:
    """Edges by their scores, then nodes that are connected; of |effects| among the nodes that were kept."""
    totals = row_totals(matrix)
    reach = influence(matrix, torch.arange(len(matrix)), order, weights, totals)
    scores = matrix * ((reach + weights) / totals.clamp_min(1e-10)).float()[:, None]
    edge_mask = (scores >= _threshold(scores[scores > 0], share)) & (scores > 0)
    keep = torch.ones(len(matrix), dtype=torch.bool)
    while True:
        before = int(keep.sum())
        keep &= edge_mask.any(0) | fixed
        keep &= edge_mask.any(1) | ~latents
        edge_mask &= keep[:, None] & keep
        if int(keep.sum()) == before:
            return keep, edge_mask


def _threshold(scores: Tensor, share: float) -> float:
    """The score down to which the largest make up this share of the sum."""
    if scores.numel() == 0:
        return 0.0
    ordered = scores.flatten().sort(descending=True, stable=True).values
    cumulative = ordered.double().cumsum(0)
    index = int(torch.searchsorted(cumulative / cumulative[-1].clamp_min(1e-30), share))
    return float(ordered[min(index, len(ordered) - 1)])


def row_chunks(edges: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows of a matrix, some at a time, with the index of the first."""
    step = max(1, CHUNK // max(1, edges.shape[1]))
    for begin in range(0, len(edges), step):
        yield begin, edges[begin : begin + step]
