"""GraphPanel: an attribution graph to look through, to group, and to test by interventions."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.graph.still import picture
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, model_code, on_change, report_errors, source
from saewb_widgets.serialize import short

if TYPE_CHECKING:
    import pandas as pd

_PAGE = Path(saewb.__file__).parent / "circuits" / "page"
_LISTED = 12  # edges in a still picture


class GraphPanel(Panel):
    """An attribution graph: layers upwards, positions across, tokens below, targets above; errors are hollow.

    A click selects a node: `panel.incoming` and `panel.outgoing` are its edges, in the part of the graph that is shown,
    `panel.pruned`. Pinned nodes become a supernode with `group`; with a model and transcoders, `intervene` scales the
    selected latents, with attention held, and `panel.effect` has the change of each target's logit beside the
    predicted one.

    Example:
        >>> import saewb
        >>> model, transcoders = saewb.load_model("tiny", device="cpu"), saewb.tiny.transcoders()
        >>> graph = saewb.attribution_graph(model, "Paris is the capital", transcoders, progress=False)
        >>> panel = GraphPanel(graph, model=model, transcoders=transcoders, nodes=0.6)
        >>> best = panel.pruned.nodes[panel.pruned.nodes.kind == "latent"].nlargest(2, "influence").id.tolist()
        >>> panel.group("strongest", best)
        >>> panel.intervene()
        >>> panel.wait()
        >>> exec(panel.code(), shown := {"graph": graph, "model": model, "transcoders": transcoders})
        >>> shown["incoming"].equals(panel.incoming), shown["effect"].equals(panel.effect)
        (True, True)
    """

    _esm = source("shared/frame.js", _PAGE / "drawing.js", "graph/graph.js")
    _css = source("shared/frame.css", _PAGE / "drawing.css", "graph/graph.css")
    _still_style = ";background:#fff;color:#222;padding:8px"  # the picture's: a viewer may have black text on dark

    nodes = t.Float(0.8, help="share of the nodes' influence that is shown, see AttributionGraph.pruned").tag(sync=True)
    edges = t.Float(0.98, help="share of the edges' scores that is shown").tag(sync=True)
    selected = t.Unicode("", help="id of a node, or name of a group; '' for none").tag(sync=True)
    pins = t.List(t.Unicode(), help="ids of pinned nodes").tag(sync=True)
    groups = t.Dict(value_trait=t.List(t.Unicode()), help="supernodes: ids of nodes by name").tag(sync=True)
    factor = t.Float(0.0, help="by what an intervention multiplies activations; 0 turns latents off").tag(sync=True)
    # Written by the panel for the front end; setting them has no other effect.
    drawing = t.Dict(help="nodes and edges, with their places").tag(sync=True)
    tried = t.Dict(help="the last intervention: what was changed, and its effects on the targets").tag(sync=True)
    facts = t.Dict(help="constants for the front end").tag(sync=True)

    def __init__(
        self, graph: Any, index: Any = None, *, model: Any = None, transcoders: Any = None, **traits: Any
    ) -> None:
        """Show the panel.

        Args:
            graph: an AttributionGraph: whole, or pruned, which then stays as it is.
            index: feature index of a transcoder, or several indexes: labels of latents that have none, and lines on
                each latent where the mouse is on it.
            model: the model of the graph, for interventions.
            transcoders: those of the graph, for interventions.
            traits: `nodes`, `edges`, `selected`, `pins`, `groups`, `factor`.

        Raises:
            TypeError: for anything but a graph, an unknown trait.
            ValueError: for shares that are not in 0 to 1 or leave more than 2,000 nodes; an index of a layer without
                latents; ids that are no node's, groups that overlap.
        """
        self.check_names(traits)
        if not isinstance(graph, saewb.AttributionGraph):
            what = f"GraphPanel got a {type(graph).__name__}."
            raise TypeError(errors.explain(what, want="an AttributionGraph", fix="saewb.attribution_graph(...)"))
        self._indexes = [] if index is None else saewb.circuits.latent_cards.index_list(index)
        self._cards: dict[tuple[int, int], list[str]] = {}
        self.graph = graph.with_labels(self._indexes) if self._indexes else graph
        self.model = model
        self.transcoders = list(transcoders) if isinstance(transcoders, Iterable) else transcoders
        self._model_copy = None if model is None else saewb.models.shared_copy.shared_copy(model)
        self._ids = {node: i for i, node in enumerate(self.graph.nodes["id"])}
        self._pruned: tuple[tuple[float, float], saewb.AttributionGraph] | None = None
        self._changes: list[tuple[int, int, int, float]] = []
        self.result: saewb.LatentIntervention | None = None
        self.effect: pd.DataFrame | None = None  # of the last intervention on the targets
        self._edge_table: pd.DataFrame | None = None
        if graph.thresholds is not None:
            traits = dict(zip(("nodes", "edges"), graph.thresholds, strict=True)) | traits
        super().__init__(**traits)
        self.title = f"How {self.graph.model or 'the model'} got to its next token"
        self.facts = {"can_prune": graph.thresholds is None, "n_nodes": len(graph), "can_try": not self._missing()}
        self._ready = True
        self._draw()

    # What a panel has

    @property
    def pruned(self) -> saewb.AttributionGraph:
        """The part of the graph that is shown."""
        return self._prune(self.nodes, self.edges)

    @property
    def incoming(self) -> pd.DataFrame:
        """Edges to the selected node or group, strongest first: as `AttributionGraph.edge_frame`."""
        return self._edge_table[self._edge_table["target"] == self.selected]

    @property
    def outgoing(self) -> pd.DataFrame:
        """Edges from the selected node or group, strongest first: as `AttributionGraph.edge_frame`."""
        return self._edge_table[self._edge_table["source"] == self.selected]

    # What a user does

    @catch_errors
    def pin(self, node: str) -> None:
        """Pin a node, or unpin it.

        Args:
            node: its id.

        Raises:
            ValueError: if there is none.
        """
        self.pins = [pin for pin in self.pins if pin != node] if node in self.pins else [*self.pins, node]

    @catch_errors
    def group(self, name: str, nodes: Sequence[str] | None = None) -> None:
        """Make a supernode, whose edges are the sums of its members' edges, and select it.

        Args:
            name: of the group; one of this name is replaced.
            nodes: ids of its members; None means the pinned ones, which are then unpinned.

        Raises:
            ValueError: if there are none, or one is in another group.
        """
        members = list(self.pins if nodes is None else nodes)
        if not members:
            raise ValueError(errors.explain("no node is pinned.", want="pinned nodes", fix="panel.pin('2_57_4')"))
        self.groups = self.groups | {name: members}
        self.pins = [pin for pin in self.pins if pin not in members]
        self.selected = name if name in self._shown() else ""

    @catch_errors
    def group_similar(self, similarity: float = 0.7) -> None:
        """Make supernodes of latents with similar edges, of those that are shown and in no group.

        Args:
            similarity: see `AttributionGraph.similar_latents`.

        Raises:
            ValueError: if `similarity` is not in 0 to 1, or no two latents are as similar as this.
        """
        taken = {node for members in self.groups.values() for node in members}
        similar = self.pruned.similar_latents(similarity)
        left = {name: [node for node in members if node not in taken] for name, members in similar.items()}
        new = {name: members for name, members in left.items() if len(members) > 1 and name not in self.groups}
        if not new:
            what = f"no two latents that are shown, and in no group, have edges of cosine {similarity:g}."
            raise ValueError(errors.explain(what, fix="panel.group_similar(similarity=0.5)"))
        grouped = {node for members in new.values() for node in members}
        self.groups = self.groups | new
        self.pins = [pin for pin in self.pins if pin not in grouped]

    @catch_errors
    def ungroup(self, name: str) -> None:
        """Take a supernode apart.

        Args:
            name: of the group.

        Raises:
            KeyError: if there is none.
        """
        if name not in self.groups:
            raise KeyError(errors.explain(f"no group {name!r}.", near=errors.near(name, self.groups)))
        self.groups = {other: members for other, members in self.groups.items() if other != name}

    @catch_errors
    def intervene(self) -> None:
        """Multiply the selected latents by `factor`, in the background, with attention held: `result`, `effect`.

        Raises:
            ValueError: if nothing is selected, or what is no latent, or one without an activation; without a model and
                transcoders; if no target is a token.
        """
        if missing := self._missing():
            what = f"GraphPanel has no {' and no '.join(missing)}."
            fix = "GraphPanel(graph, model=model, transcoders=transcoders)"
            raise ValueError(errors.explain(what, want="what the graph is of", fix=fix))
        frame = self.pruned.nodes.set_index("id")
        members = self._drawn_groups().get(self.selected, [self.selected] if self.selected else [])
        if not members:
            raise ValueError(errors.explain("no node is selected.", want="a latent or a group", fix="panel.selected ="))
        rows = frame.loc[members]
        if others := rows.index[rows["kind"] != "latent"].tolist():
            what = f"{others[0]!r} is a {rows['kind'][others[0]]}."
            raise ValueError(errors.explain(what, want="latents only, whose activations can be changed"))
        if silent := rows.index[rows["activation"].isna()].tolist():
            what = f"{silent[0]!r} has no activation in this graph, which another tool wrote."
            raise ValueError(
                errors.explain(what, fix="GraphPanel(saewb.attribution_graph(model, prompt, transcoders))")
            )
        if not (targets := self._target_ids()):
            what = "the targets of this graph are directions."
            raise ValueError(errors.explain(what, want="targets that are tokens", fix="saewb.intervene(...)"))
        factor, columns = self.factor, ("layer", "position", "latent", "activation")
        changes = [
            (int(layer), int(position), int(latent), float(activation) * factor)
            for layer, position, latent, activation in zip(*(rows[name] for name in columns), strict=True)
        ]
        model, transcoders, tokens = self._model_copy, self.transcoders, self._tokens()
        caption = f"{self._name(self.selected)}: {len(changes)} latent{'s' * (len(changes) > 1)} \u00d7 {factor:g}"

        def work() -> Any:
            result = saewb.intervene(model, tokens, transcoders, changes)
            return result, result.next_tokens(tokens=targets)

        def then(both: Any) -> None:
            self.result, self.effect = both
            self._changes = changes
            columns = ("token", "clean_probability", "probability", "predicted", "measured")
            rows = [
                [token, *map(short, values)] for token, *values in self.effect[list(columns)].itertuples(index=False)
            ]
            self.tried = {"caption": caption, "rows": rows}

        self.start_work("intervene", f"running the model with {caption}", work, then)

    # See Panel

    def summary(self) -> str:
        """See Panel."""
        selected = f", {self.selected!r}" if self.selected else ""
        return f"{len(self.pruned)} of {len(self.graph)} nodes{selected}"

    def code(self) -> str:
        """Python code that computes `pruned`, `incoming`, `outgoing` and `effect`.

        From `graph`, and `index`, `model` and `transcoders` where the panel has them.
        """
        labeled = "graph.with_labels(index)" if self._indexes else "graph"
        shares = f".pruned(nodes={self.nodes!r}, edges={self.edges!r})" if self.facts["can_prune"] else ""
        groups = self._drawn_groups()
        lines = [
            f"pruned = {labeled}{shares}",
            f"edges = pruned.edge_frame({f'groups={groups!r}' if groups else ''})",
        ]
        if self.pins:
            lines.append(f"pinned = pruned.nodes[pruned.nodes.id.isin({list(self.pins)!r})]")
        if self.selected:
            lines += [
                f"incoming = edges[edges.target == {self.selected!r}]",
                f"outgoing = edges[edges.source == {self.selected!r}]",
            ]
        if self.result is not None:
            model, before = model_code(self.model)
            lines += [
                *before,
                f"tokens = {self._tokens()!r}",
                f"result = saewb.intervene({model}, tokens, transcoders, {self._changes!r})",
                f"effect = result.next_tokens(tokens={self._target_ids()})",
            ]
        return "\n".join(["import saewb", "", *lines]) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        parts = [picture(self.drawing, self.selected, list(self.pins))]
        if self.selected:
            parts.append(f"<div style='margin-top:8px'><b>{html.escape(self._name(self.selected))}</b></div>")
            for title, end, frame in (("incoming", "source", self.incoming), ("outgoing", "target", self.outgoing)):
                body = [
                    (self._name(node), f"{effect:+.3g}", f"{share:.3f}")
                    for node, effect, share in frame[[end, "effect", "share"]].head(_LISTED).itertuples(index=False)
                ]
                parts.append(grid((f"{title} ({len(frame)})", "effect", "share of the target's input"), body))
        if self.tried:
            head = ("target", "p before", "p after", "predicted", "measured")
            parts += [f"<div>{html.escape(self.tried['caption'])}</div>", grid(head, self.tried["rows"])]
        return "".join(parts)

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "pin":
            self.pin(str(how["node"]))
        elif what == "group":
            self.group(str(how["name"]).strip())
        elif what == "group_similar":
            self.group_similar()
        elif what == "ungroup":
            self.ungroup(str(how["name"]))
        elif what == "intervene":
            self.intervene()
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"GraphPanel was asked to {what!r}."))

    @t.validate("nodes", "edges", "selected", "pins", "groups", "factor")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name in ("nodes", "edges"):
                self._prune(*((value, self.edges) if name == "nodes" else (self.nodes, value)))
            elif name == "groups":
                saewb.circuits.supernodes.check_groups(value, self._ids)
            elif name == "factor":
                if value - value != 0:
                    raise ValueError(errors.explain(f"factor is {value!r}.", want="a finite number", fix="factor = 0"))
            elif name == "selected":
                if value and value not in (shown := self._shown()):
                    want = "a node or a group that is shown, or ''"
                    raise ValueError(
                        errors.explain(f"selected is {value!r}.", near=errors.near(value, shown), want=want)
                    )
            else:
                value = list(dict.fromkeys(value))
                if unknown := [node for node in value if node not in self._ids]:
                    near = errors.near(unknown[0], self._ids)
                    raise ValueError(errors.explain(f"no node {unknown[0]!r} to pin.", near=near))
        return value

    @on_change("nodes", "edges", "groups")
    def _on_view(self) -> None:
        self._draw()

    def _shown(self) -> set[str]:
        """Ids of the nodes, and names of the groups, that are drawn."""
        groups = self._drawn_groups()
        return (set(self.pruned.nodes["id"]) - {node for members in groups.values() for node in members}) | set(groups)

    def _drawn_groups(self) -> dict[str, list[str]]:
        """Groups, without members that pruning has removed."""
        ids = set(self.pruned.nodes["id"])
        drawn = {name: [node for node in members if node in ids] for name, members in self.groups.items()}
        return {name: members for name, members in drawn.items() if members}

    def _prune(self, nodes: float, edges: float) -> saewb.AttributionGraph:
        if self.graph.thresholds is not None:
            if (nodes, edges) != tuple(self.graph.thresholds):
                what = "this graph is pruned already."
                raise ValueError(errors.explain(what, want="the whole graph", fix="GraphPanel(graph)"))
            pruned = self.graph
        elif self._pruned is not None and self._pruned[0] == (nodes, edges):
            return self._pruned[1]
        else:
            pruned = self.graph.pruned(nodes, edges)
        if len(pruned) > (most := saewb.circuits.graph_page.MAX_NODES):
            what = f"nodes={nodes:g} and edges={edges:g} leave {len(pruned):,} nodes."
            raise ValueError(errors.explain(what, want=f"at most {most:,}", fix=f"nodes={nodes * 0.75:.2g}"))
        self._pruned = ((nodes, edges), pruned)
        return pruned

    def _draw(self) -> None:
        pruned, groups = self.pruned, self._drawn_groups()
        self._edge_table = pruned.edge_frame(groups=groups)
        if self.selected and self.selected not in self._shown():
            self.selected = ""
        cards = saewb.circuits.latent_cards.latent_cards(pruned.nodes, self._indexes, self._cards)
        self.drawing = saewb.circuits.graph_page.graph_data(pruned, groups, cards)
        self.about = self.drawing["about"]

    def _name(self, node: str) -> str:
        if node in self.groups:
            return node
        row = self.graph.nodes.iloc[self._ids[node]]
        where = f"{row['kind']} {row['token']!r}" if row["kind"] in ("token", "target") else f"{row['kind']} {node}"
        return f"{where} {row['label']}".strip()

    def _missing(self) -> list[str]:
        return [name for name in ("model", "transcoders") if getattr(self, name) is None]

    def _tokens(self) -> list[int] | str:
        """Ids of the prompt; its text, if a file of another tool left tokens out."""
        frame = self.graph.nodes[self.graph.nodes["kind"] == "token"].sort_values("position")
        return frame["latent"].astype(int).tolist() if len(frame) == len(self.graph.tokens) else self.graph.prompt

    def _target_ids(self) -> list[int]:
        frame, n_vocab = self.graph.nodes, int(self.model.cfg.d_vocab)
        ids = frame.loc[frame["kind"] == "target", "latent"].astype(int).tolist()
        return [i for i in ids if i < n_vocab]  # beyond are directions, which are no tokens
