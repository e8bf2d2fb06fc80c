"""Supernodes: nodes of an attribution graph as one, with their effects summed, and which belong together.

It knows matrices, not graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.circuits.influence import row_totals
from saewb.errors import explain

_MAX_CLUSTERED = 5000


def collapse(
    edges: Float[Tensor, "nodes nodes"], groups: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "all all"], Float[Tensor, " all"]]:
    """Effects among the nodes that are in no group and, after all nodes, the groups; and the |input| of each.

    The effect of a group is the sum of its members' effects, that on a group the sum of those on its members. Rows and
    columns of members, and effects within a group, are 0. The |input| is the sum of |effect| over sources, of a group
    without those within it.

    Args:
        edges: effects, `[target, source]`.
        groups: indices of the members of each group.
    """
    n, n_all = len(edges), len(edges) + len(groups)
    place = torch.arange(n)
    totals = torch.cat([row_totals(edges), torch.zeros(len(groups), dtype=torch.float64)])
    for k, members in enumerate(groups):
        index = torch.tensor(members)
        place[index] = n + k
        totals[n + k] = totals[index].sum() - edges[index][:, index].abs().sum(dtype=torch.float64)
        totals[index] = 0
    rows = torch.zeros(n_all, n).index_add_(0, place, edges)
    matrix = torch.zeros(n_all, n_all).index_add_(1, place, rows)
    matrix[range(n, n_all), range(n, n_all)] = 0
    return matrix, totals


def similar(
    edges: Float[Tensor, "nodes nodes"],
    totals: Float[Tensor, " nodes"],
    nodes: Int[Tensor, " some"],
    similarity: float,
) -> list[list[int]]:
    """Clusters of nodes whose edges, incoming and outgoing, have a cosine of `similarity` and more, pair by pair.

    Args:
        edges: effects, `[target, source]`.
        totals: |input| of each node; edges are compared as shares of it.
        nodes: those to cluster; others count as ends of edges only.
        similarity: 0 to 1.

    Returns:
        Indices into `nodes`, of clusters of two and more, the largest first.

    Raises:
        ValueError: if `similarity` is not in 0 to 1, or there are more than 5,000 nodes.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if not 0 < similarity <= 1:
        what = f"got similarity={similarity!r}."
        raise ValueError(explain(what, want="a cosine, more than 0 and at most 1", fix="similarity=0.7"))
    if len(nodes) > _MAX_CLUSTERED:
        what = f"got {len(nodes):,} nodes to cluster."
        raise ValueError(explain(what, want=f"at most {_MAX_CLUSTERED:,}", fix="graph.pruned().similar_latents()"))
    if len(nodes) < 2:
        return []
    shares = edges / totals.clamp_min(1e-10).to(edges.dtype)[:, None]
    profiles = torch.nn.functional.normalize(torch.cat([shares[nodes], shares[:, nodes].T], 1), dim=1)
    distance = (1 - profiles @ profiles.T).clamp_min(0).double().numpy()
    tree = linkage(squareform(distance, checks=False), method="complete")
    labels = fcluster(tree, 1 - similarity + 1e-6, criterion="distance")
    clusters: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        clusters.setdefault(label, []).append(i)
    return sorted((c for c in clusters.values() if len(c) > 1), key=len, reverse=True)


def check_groups(groups: Mapping[str, Sequence[str]], nodes: Mapping[str, int]) -> list[list[int]]:
    """Indices of the members of each group.

    Args:
        groups: ids of nodes by name.
        nodes: index of each node by its id.

    Raises:
        ValueError: for an empty group, a name that is that of a node, an id that is no node's or in two groups.
    """
    owner: dict[str, str] = {}
    for name, members in groups.items():
        if not name or name in nodes:
            what = f"got a group of the name {name!r}."
            raise ValueError(explain(what, want="a name that is no node's", fix='{"capitals": ["2_57_4"]}'))
        if isinstance(members, str) or not members:
            raise ValueError(explain(f"got {members!r} as group {name!r}.", want="a list of ids of nodes"))
        for node in members:
            if node not in nodes:
                raise ValueError(explain(f"group {name!r} has {node!r}.", want="ids of the graph's nodes"))
            if node in owner:
                raise ValueError(explain(f"{node!r} is in {owner[node]!r} and in {name!r}.", want="one group each"))
            owner[node] = name
    return [[nodes[node] for node in members] for members in groups.values()]
