"""Attribution graphs: nodes, edge matrix, influence, pruning and scores.

Rows of the edge matrix are targets, columns sources: `edges[t, s]` is the direct effect of s on t.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.circuits.graph_json import graph_json
from saewb.circuits.graph_page import write_graph_page
from saewb.circuits.influence import influence, prune, row_chunks, row_totals
from saewb.circuits.latent_cards import index_list, latent_cards, latents_of
from saewb.circuits.supernodes import check_groups, collapse, similar
from saewb.errors import explain, near

if TYPE_CHECKING:
    import networkx
    import pandas as pd

    from saewb.features import FeatureIndex

KINDS = ("latent", "error", "token", "target")
"""Kinds of nodes, in the order in which they stand in a graph."""


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Direct effects among latents, errors and tokens of one prompt, and on its next token.

    Created by `saewb.attribution_graph` and `saewb.load_graph`.

    References:
        Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html; influence, pruning and
        scores as in circuit-tracer, github.com/decoderesearch/circuit-tracer.
    """

    nodes: pd.DataFrame
    """A row per node: id, kind (latent, error, token, target), layer, position, token, latent (of a token or target its
    token id), activation, probability (weight of a target), value (pre-activation or logit), constant (what is left of
    it without any source), left_out (the sum of effects that are not in the graph), influence (share of the targets'
    input that comes from it, over all paths), cumulative (share of all influence down to its rank), label."""
    edges: Float[Tensor, "nodes nodes"]
    """Direct effects `[target, source]`, float32, in the unit of the target; on disk if over 1 GB."""
    tokens: tuple[str, ...]
    """The prompt, token by token."""
    prompt: str
    """Text of the prompt."""
    model: str
    """Name of the model."""
    saes: tuple[str, ...]
    """Where each transcoder or SAE reads and writes."""
    is_exact: bool
    """Whether effects and constant sum to each target's value: of transcoders. Of SAEs, the MLPs between them are
    linearized, and `constant` has what their curvature leaves."""
    n_active: int
    """Active latents of the prompt; those that are not nodes are in `left_out`."""
    replacement_score: float
    """Influence of tokens / influence of tokens and errors, of the unpruned graph: how much of what the tokens do to
    the targets goes through latents."""
    completeness: float
    """Share of the nodes' input that does not come from errors, weighted by their influence, of the unpruned graph."""
    thresholds: tuple[float, float] | None = None
    """Of `pruned`: shares of influence of nodes and of edges; None for the whole graph."""
    interrupted: bool = False
    """Whether an interrupt came before all rows were done: the latents are those of the rows that were."""

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Number of edges: effects that are not 0."""
        return sum(int(rows.count_nonzero()) for _, rows in row_chunks(self.edges))

    def pruned(self, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
        """The part of the graph with most influence on the targets.

        1. Keep nodes, by influence, up to a cumulative share of `nodes`; tokens and targets always.
        2. Without the others, score each edge: its share of the target's input, times the target's influence and
           weight. Keep edges, by score, up to a cumulative share of `edges`.
        3. Until nothing changes: drop latents and errors without an outgoing edge, and latents without an incoming one.

        Args:
            nodes: share of the influence, 0 to 1.
            edges: share of the edges' scores, 0 to 1.

        Returns:
            A graph of the nodes that are left, with their influence and both scores from the whole graph.

        Raises:
            ValueError: if a share is not in 0 to 1, or the graph was pruned before.
        """
        if self.thresholds is not None:
            raise ValueError(explain("this graph is pruned already.", want="the whole graph", fix="graph.pruned(...)"))
        node_mask, edge_mask = self.masks(nodes, edges)
        index = node_mask.nonzero()[:, 0]
        matrix = torch.where(edge_mask[index][:, index], self.edges[index][:, index], 0)
        frame = self.nodes.iloc[index.tolist()].reset_index(drop=True)
        frame["left_out"] = frame["value"] - frame["constant"] - matrix.double().sum(1).numpy()
        return replace(self, nodes=frame, edges=matrix, thresholds=(nodes, edges))

    def masks(self, nodes: float = 0.8, edges: float = 0.98) -> tuple[Bool[Tensor, " nodes"], Tensor]:
        """Which nodes and edges `pruned` keeps: masks of `nodes` and of `edges`.

        Args:
            nodes: share of the influence, 0 to 1.
            edges: share of the edges' scores, 0 to 1.

        Raises:
            ValueError: if a share is not in 0 to 1.
        """
        reach = torch.tensor(self.nodes["influence"].to_numpy(), dtype=torch.float64)
        fixed, latents = self.is_kind("token", "target"), self.is_kind("latent")
        return prune(self.edges, reach, self.order, self.weights, fixed, latents, nodes=nodes, edges=edges)

    def edge_frame(self, n: int | None = None, *, groups: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
        """The n strongest edges, by |effect|; None means all.

        The effect of a group is the sum of its members' effects, the effect on a group the sum of those on its members,
        in their own units; effects within a group are left out.

        Args:
            n: how many.
            groups: ids of nodes by name: each group stands as one node of that name, a supernode.

        Returns:
            A row per edge: source and target (ids of nodes, names of groups), effect, and share (of the target's input:
            |effect| over the sum of |effects| on it; of a group from outside it).

        Raises:
            ValueError: for an empty group, a name that is that of a node, an id that is no node's or in two groups.
        """
        import pandas as pd

        groups = groups or {}
        members = check_groups(groups, self._index)
        edges, totals = collapse(self.edges, members) if members else (self.edges, row_totals(self.edges))
        target, source = edges.nonzero(as_tuple=True)
        effect = edges[target, source]
        order = effect.abs().argsort(descending=True, stable=True)[:n]
        target, source, effect = target[order], source[order], effect[order]
        ids = pd.Series([*self.nodes["id"], *groups], dtype=object).to_numpy()
        share = effect.abs() / totals[target].clamp_min(1e-10)
        columns = {"source": ids[source.numpy()], "target": ids[target.numpy()]}
        return pd.DataFrame({**columns, "effect": effect.numpy(), "share": share.float().numpy()})

    def index(self, node: str) -> int:
        """Row of `nodes` with this id.

        Args:
            node: an id.

        Raises:
            KeyError: if there is none.
        """
        if node not in self._index:
            raise KeyError(explain(f"no node {node!r} in {self!r}.", near=near(node, self._index)))
        return self._index[node]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {node: i for i, node in enumerate(self.nodes["id"])}

    @cached_property
    def order(self) -> Int[Tensor, " nodes"]:
        """Depth of each node: every edge leads from a lower to a higher one."""
        layer = torch.tensor(self.nodes["layer"].fillna(-1).astype(int).to_numpy())
        kind = self.nodes["kind"].to_numpy()
        return torch.where(torch.tensor(kind == "target"), int(layer.max()) + 2, layer + 1)

    @cached_property
    def weights(self) -> Float[Tensor, " nodes"]:
        """Weights of the targets; 0 for other nodes."""
        return torch.tensor(self.nodes["probability"].fillna(0.0).to_numpy(), dtype=torch.float64)

    def is_kind(self, *kinds: str) -> Bool[Tensor, " nodes"]:
        """Mask of the nodes of these kinds.

        Args:
            kinds: of `"latent"`, `"error"`, `"token"`, `"target"`.
        """
        return torch.tensor(self.nodes["kind"].isin(kinds).to_numpy())

    def with_labels(self, labels: Mapping[Any, str] | FeatureIndex | Iterable[FeatureIndex]) -> AttributionGraph:
        """A graph with labels of latents.

        Args:
            labels: text by (layer, latent), or by node id. Or the feature index of a transcoder, or several indexes:
                the label of a latent there (`index.label`) is for the latents of its layer that have none here.

        Returns:
            The same graph otherwise.

        Raises:
            ValueError: for an index whose layer has no latents here.
        """
        if not isinstance(labels, Mapping):
            labels = self._index_labels(index_list(labels))
        by_id = {key: text for key, text in dict(labels).items() if isinstance(key, str)}
        by_latent = {key: text for key, text in dict(labels).items() if not isinstance(key, str)}
        frame = self.nodes.copy()
        rows = zip(frame["id"], frame["kind"], frame["layer"], frame["latent"], frame["label"], strict=True)
        frame["label"] = [
            by_id.get(node) or (by_latent.get((layer, latent)) if kind == "latent" else None) or label
            for node, kind, layer, latent, label in rows
        ]
        return replace(self, nodes=frame)

    def _index_labels(self, indexes: Iterable[FeatureIndex]) -> dict[str, str]:
        """Labels by node id, of the latents that have none."""
        latents = self.nodes[self.nodes["kind"] == "latent"]
        result: dict[str, str] = {}
        for index in indexes:
            here = latents_of(index, latents)
            here = here[here["label"] == ""]
            result |= dict(zip(here["id"], index.label_texts(here["latent"].tolist()), strict=True))
        return result

    def similar_latents(self, similarity: float = 0.7) -> dict[str, list[str]]:
        """Groups of latents with similar edges: supernodes to begin with, for `edge_frame` and `GraphPanel`.

        Each edge is taken as its share of the target's input, with its sign. Two latents are as similar as the cosine
        of their edges, incoming and outgoing together; clusters are those of complete linkage, so that any two members
        of a group are as similar as this at least.

        Args:
            similarity: cosine, 0 to 1.

        Returns:
            Ids of nodes by name of the group, for groups of two and more; a name is the label of the member with most
            influence, or its id, and the number of the others.

        Raises:
            ValueError: if `similarity` is not in 0 to 1; for more than 5,000 latents: prune the graph first.

        References:
            Complete linkage over edge profiles is what Neuronpedia's graphs use.
        """
        latents = self.is_kind("latent").nonzero()[:, 0]
        frame, names = self.nodes.iloc[latents.tolist()], {}
        for cluster in similar(self.edges, row_totals(self.edges), latents, similarity):
            members = frame.iloc[cluster].sort_values("influence", ascending=False, kind="stable")
            first = members.iloc[0]
            name = f"{first['label'] or first['id']} + {len(cluster) - 1}"
            names[name if name not in names else f"{name} ({first['id']})"] = members["id"].tolist()
        return names

    def to_networkx(self) -> networkx.DiGraph:
        """The graph as a networkx.DiGraph: nodes by id, with the columns of `nodes`; edges with `weight`."""
        import networkx

        graph = networkx.DiGraph(prompt=self.prompt, model=self.model)
        for row in self.nodes.to_dict("records"):
            graph.add_node(row.pop("id"), **row)
        edges = self.edge_frame()
        graph.add_weighted_edges_from(zip(edges["source"], edges["target"], edges["effect"].tolist(), strict=True))
        return graph

    def to_json(self, path: str | Path | None = None, *, slug: str = "graph", scan: str | None = None) -> str:
        """The graph in the format of Neuronpedia and circuit-tracer; see `saewb.load_graph`.

        Args:
            path: file to write, whole or not at all; None writes none.
            slug: name of the graph in the file.
            scan: identifier of the transcoders there; None means the model's name.

        Returns:
            The JSON text.
        """
        return graph_json(self, path, slug, scan)

    def save_html(
        self,
        path: str | Path,
        *,
        title: str | None = None,
        index: FeatureIndex | Iterable[FeatureIndex] | None = None,
    ) -> Path:
        """Write a page that draws the graph by itself: no network, no kernel; whole or not at all.

        Layers upwards, positions across; click a node for its incoming and outgoing effects. 500 nodes take about 1 MB.

        Args:
            path: file to write.
            title: of the page.
            index: feature index of a transcoder, or several: labels of latents that have none, and where the mouse is
                on a latent, what it raises and where it is strongest.

        Returns:
            The absolute path.

        Raises:
            ValueError: for more than 2,000 nodes: prune the graph first; for an index whose layer has no latents here.
            IsADirectoryError: if `path` is a folder.
        """
        indexes = [] if index is None else index_list(index)
        graph = self.with_labels(indexes) if indexes else self
        return write_graph_page(graph, path, title, latent_cards(graph.nodes, indexes))

    def __repr__(self) -> str:
        counts = self.nodes["kind"].value_counts()
        parts = [f"{counts.get(kind, 0)} {kind}s" for kind in KINDS]
        parts += [f"pruned to {self.thresholds[0]:g} and {self.thresholds[1]:g}"] if self.thresholds else []
        parts += ["interrupted"] if self.interrupted else []
        scores = f"replacement {self.replacement_score:.3f}, completeness {self.completeness:.3f}"
        return f"AttributionGraph({', '.join(parts)}; {scores})"

    def _repr_html_(self) -> str:
        import html

        columns = ["id", "kind", "layer", "position", "token", "activation", "influence", "label"]
        strongest = self.nodes.sort_values("influence", ascending=False, kind="stable", na_position="last")
        return f"<p>{html.escape(repr(self))}</p>{strongest[columns].head(20)._repr_html_()}"


def completed(graph: AttributionGraph) -> AttributionGraph:
    """A whole graph with influences and scores, which are computed from its edges here."""
    totals = row_totals(graph.edges)
    reach = influence(graph.edges, torch.arange(len(graph)), graph.order, graph.weights, totals)
    sorted_reach, rank = reach.sort(descending=True, stable=True)
    cumulative = torch.empty_like(reach)
    cumulative[rank] = sorted_reach.cumsum(0) / sorted_reach.sum().clamp_min(1e-30)
    frame = graph.nodes.assign(influence=reach.numpy(), cumulative=cumulative.numpy())
    errors, tokens = graph.is_kind("error"), graph.is_kind("token")
    token_reach, error_reach = float(reach[tokens].sum()), float(reach[errors].sum())
    from_errors = torch.cat([rows[:, errors].abs().sum(1, dtype=torch.float64) for _, rows in row_chunks(graph.edges)])
    output = reach + graph.weights
    clean = (1 - from_errors / totals.clamp_min(1e-10)) * output
    return replace(
        graph,
        nodes=frame,
        replacement_score=token_reach / max(token_reach + error_reach, 1e-30),
        completeness=float(clean.sum() / output.sum()),
    )


def node_ids(frame: pd.DataFrame, n_layers: int) -> list[str]:
    """Ids of nodes, those of circuit-tracer but for errors.

    There an error is `0_{layer}_{position}`, which may also be a latent of layer 0.
    """
    columns = zip(frame["kind"], frame["layer"], frame["position"], frame["latent"], strict=True)
    names = {
        "latent": lambda layer, position, latent: f"{layer}_{latent}_{position}",
        "error": lambda layer, position, latent: f"error_{layer}_{position}",
        "token": lambda layer, position, latent: f"E_{latent}_{position}",
        "target": lambda layer, position, latent: f"{n_layers + 1}_{latent}_{position}",
    }
    return [names[kind](*rest) for kind, *rest in columns]
