"""GraphPanel from Python: its edges, pruning, groups, interventions, its code, its snapshot, what is refused."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import graphs, panel_driver, tiny_models
from saewb_widgets import GraphPanel

import saewb
from saewb.features import build_index

HAND = {
    "kinds": ["latent", "latent", "latent", "error", "token", "target"],
    "layers": [0, 1, 2, 0, None, None],
    "edges": {(0, 4): 2.0, (1, 0): -1.0, (1, 3): 3.0, (2, 1): 2.0, (2, 4): 0.5, (5, 2): 1.0, (5, 1): -4.0},
    "weights": {5: 0.5},
}


@cache
def on_tiny():
    model = panel_driver.embedded()[0]
    transcoders = tuple(saewb.tiny.transcoders())
    return saewb.attribution_graph(model, "Paris is the capital", transcoders, progress=False), model, transcoders


def strongest(graph, n):
    return graph.nodes[graph.nodes["kind"] == "latent"].nlargest(n, "influence")["id"].tolist()


def test_what_it_shows_is_what_the_graph_computes():
    graph = on_tiny()[0]
    panel = GraphPanel(graph, nodes=0.6)
    small = graph.pruned(nodes=0.6)
    assert panel.pruned.nodes.equals(small.nodes)
    assert [node["id"] for node in panel.drawing["nodes"]] == small.nodes["id"].tolist()
    assert len(panel.drawing["edges"]) == small.n_edges
    (node,) = strongest(small, 1)
    panel.selected = node
    edges = small.edge_frame()
    assert panel.incoming.equals(edges[edges["target"] == node])
    assert panel.outgoing.equals(edges[edges["source"] == node])
    assert len(panel.incoming) > 0 < len(panel.outgoing)
    panel.pin(node)
    exec(panel.code(), shown := {"graph": graph})
    assert shown["pruned"].nodes.equals(small.nodes)
    assert shown["incoming"].equals(panel.incoming)
    assert shown["outgoing"].equals(panel.outgoing)
    assert shown["pinned"]["id"].tolist() == [node]


def test_pruning_again_keeps_what_is_still_there():
    graph = on_tiny()[0]
    best, last = strongest(graph, 1)[0], strongest(graph.pruned(0.9), 10**6)[-1]
    panel = GraphPanel(graph, nodes=0.9, selected=last, pins=[best, last])
    panel.groups = {"both": [last, best]}
    assert panel.selected == ""  # now within the group
    panel.selected = "both"
    panel.nodes = 0.5
    assert len(panel.pruned) == len(graph.pruned(0.5))
    assert last not in panel.pruned.nodes["id"].tolist()
    assert (panel.selected, panel.pins) == ("both", [best, last])
    assert "groups={'both': ['" + best + "']}" in panel.code()
    panel.ungroup("both")
    assert panel.selected == ""
    panel.selected = best
    panel.edges = 0.3
    assert panel.pruned.thresholds == (0.5, 0.3)
    with pytest.raises(ValueError, match=r"nodes=1\.5"):
        panel.nodes = 1.5
    assert panel.nodes == 0.5
    assert panel.error_message.startswith("ValueError: pruned got nodes=1.5")


def test_a_pruned_graph_stays_as_it_is(monkeypatch):
    small = on_tiny()[0].pruned(0.5, 0.9)
    panel = GraphPanel(small)
    assert (panel.nodes, panel.edges, panel.pruned is small) == (0.5, 0.9, True)
    assert "pruned = graph\n" in panel.code()
    with pytest.raises(ValueError, match="pruned already"):
        panel.nodes = 0.4
    monkeypatch.setattr("saewb.circuits.graph_page.MAX_NODES", 5)
    with pytest.raises(ValueError, match="at most 5"):
        GraphPanel(on_tiny()[0])


def test_a_group_has_the_sums_of_its_members():
    graph = graphs.by_hand(**HAND)
    ids = graph.nodes["id"].tolist()
    panel = GraphPanel(graph, nodes=1.0, edges=1.0, pins=[ids[0], ids[1]])
    panel.on_request("group", name=" middle ")
    assert (panel.groups, panel.pins, panel.selected) == ({"middle": ids[:2]}, [], "middle")
    effects = {
        (row.source, row.target): row.effect for row in [*panel.incoming.itertuples(), *panel.outgoing.itertuples()]
    }
    assert effects == {(ids[4], "middle"): 2, (ids[3], "middle"): 3, ("middle", ids[2]): 2, ("middle", ids[5]): -4}
    assert panel.incoming["share"].tolist() == pytest.approx([3 / 5, 2 / 5])
    assert panel.drawing["nodes"][6]["members"] == [0, 1]
    assert not any({0, 1} & set(edge[:2]) for edge in panel.drawing["edges"])
    panel.group("rest", [ids[2]])
    assert panel.outgoing["effect"].tolist() == [1.0]
    exec(panel.code(), shown := {"graph": graph})
    assert shown["outgoing"].equals(panel.outgoing)
    panel.on_request("ungroup", name="middle")
    assert set(panel.groups) == {"rest"}


def test_an_intervention_beside_its_prediction():
    graph, model, transcoders = on_tiny()
    panel = GraphPanel(graph, model=model, transcoders=iter(transcoders), nodes=0.6, factor=0.25)
    group = strongest(panel.pruned, 3)
    panel.group("three", group)
    panel.on_request("intervene")
    panel.wait()
    targets = np.flatnonzero(graph.nodes["kind"] == "target")
    sources = [graph.index(node) for node in group]
    assert panel.effect["id"].tolist() == graph.nodes["latent"][targets].tolist()
    predicted = graph.edges[targets][:, sources].sum(1).numpy() * (0.25 - 1)
    assert panel.effect["predicted"].to_numpy() == pytest.approx(predicted, rel=1e-3, abs=1e-4)
    assert np.abs(predicted).max() > 0.01
    columns = ["layer", "position", "latent", "activation"]
    rows = graph.nodes.set_index("id").loc[group, columns].itertuples(index=False)
    same = saewb.intervene(model, graph.prompt, transcoders, [(i, p, n, a * 0.25) for i, p, n, a in rows])
    change = (same.logits - same.clean_logits).double()
    measured = (change - change.mean())[panel.effect["id"].tolist()]
    assert panel.effect["measured"].to_numpy() == pytest.approx(measured.numpy(), rel=1e-4, abs=1e-5)
    assert [row[0] for row in panel.tried["rows"]] == graph.nodes["token"][targets].tolist()
    assert panel.tried["caption"] == "three: 3 latents × 0.25"
    exec(panel.code(), shown := {"graph": graph, "model": model, "transcoders": transcoders})
    assert shown["effect"].equals(panel.effect)
    assert "measured" in panel.static_html()
    panel.selected = graph.nodes["id"][targets[0]]
    with pytest.raises(ValueError, match="is a target"):
        panel.intervene()


def test_graphs_of_directions_and_of_other_tools(tmp_path):
    graph, model, transcoders = on_tiny()
    targets = [("a direction", 1.0, model.W_U.T[5])]
    of_direction = saewb.attribution_graph(model, graph.prompt, transcoders, targets=targets, progress=False)
    panel = GraphPanel(of_direction, model=model, transcoders=transcoders)
    panel.selected = strongest(panel.pruned, 1)[0]
    with pytest.raises(ValueError, match="directions"):
        panel.intervene()
    without = replace(graph, nodes=graph.nodes.assign(activation=float("nan")))
    panel = GraphPanel(without, model=model, transcoders=transcoders, selected=strongest(graph, 1)[0])
    with pytest.raises(ValueError, match="no activation"):
        panel.intervene()
    with pytest.raises(ValueError, match="no node is selected"):
        GraphPanel(graph, model=model, transcoders=transcoders).intervene()
    file = json.loads(graph.pruned(0.6).to_json())  # without the first token
    first = next(node["node_id"] for node in file["nodes"] if node["feature_type"] == "embedding")
    file["nodes"] = [node for node in file["nodes"] if node["node_id"] != first]
    file["links"] = [link for link in file["links"] if first not in (link["source"], link["target"])]
    del file["metadata"]["info"]
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(file))
    loaded = saewb.load_graph(path)
    panels = [
        GraphPanel(one, model=model, transcoders=transcoders, nodes=1.0, edges=1.0, selected=strongest(loaded, 1)[0])
        for one in (loaded, graph)
    ]
    for panel in panels:
        panel.intervene()
        panel.wait()
    assert panels[0].effect.equals(panels[1].effect)
    assert f"tokens = {graph.prompt!r}" in panels[0].code()


def test_labels_come_from_indexes():
    model, transcoders = tiny_models.bridge(), graphs.transcoders()
    graph = saewb.attribution_graph(model, graphs.IDS, transcoders, progress=False)
    indexes = [build_index(model, sae, tiny_models.tokens(8, 9), batch_size=8, n_nearest=0) for sae in transcoders[:2]]
    first = graph.nodes[(graph.nodes["kind"] == "latent") & (graph.nodes["layer"] == 1)].iloc[0]
    indexes[1] = indexes[1].with_labels({int(first.latent): panel_driver.HOSTILE})
    panel = GraphPanel(graph, indexes, nodes=1.0, edges=1.0, selected=first.id)
    labels = {node["id"]: node["label"] for node in panel.drawing["nodes"]}
    for row in panel.pruned.nodes.itertuples():
        is_labeled = row.kind == "latent" and row.layer < 2
        assert labels[row.id] == (indexes[row.layer].label(row.latent) if is_labeled else "")
    assert panel_driver.HOSTILE not in panel.snapshot().data
    assert "&lt;img" in panel.snapshot().data
    exec(panel.code(), shown := {"graph": graph, "index": indexes})
    assert shown["pruned"].nodes.equals(panel.pruned.nodes)
    alone = GraphPanel(graph, indexes[0])
    assert alone.graph.nodes["label"][0] == indexes[0].label(int(graph.nodes["latent"][0]))
    cards = {node["id"]: node.get("card") for node in alone.drawing["nodes"]}
    for row in alone.pruned.nodes.itertuples():
        assert (cards[row.id] is not None) == (row.kind == "latent" and row.layer == 0)
    node = next(row for row in alone.pruned.nodes.itertuples() if cards[row.id] and len(cards[row.id]) > 1)
    latent = indexes[0].latent(node.latent)
    assert repr(latent.logits_top[0].token) in cards[node.id][0]
    assert f"largest {latent.max:.3g}" in cards[node.id][1]
    assert f"\u00ab{latent.top[0].tokens[latent.top[0].at].lstrip()}\u00bb" in cards[node.id][2]
    with pytest.raises(ValueError, match="of no layer"):
        GraphPanel(graphs.by_hand(**HAND | {"layers": [4, 5, 6, 4, None, None]}), indexes[0])


def test_it_shows_its_errors():
    graph = graphs.by_hand(**HAND)
    ids = graph.nodes["id"].tolist()
    panel = GraphPanel(graph, nodes=1.0, edges=1.0)
    assert repr(panel) == "GraphPanel(6 of 6 nodes)"
    with pytest.raises(ValueError, match=r"(?s)no model and no transcoders.*GraphPanel\(graph, model=model"):
        panel.on_request("intervene")
    assert "transcoders" in panel.error_message
    with pytest.raises(ValueError, match="no node is pinned"):
        panel.group("x")
    with pytest.raises(ValueError, match="selected is '9_9_9'"):
        panel.selected = "9_9_9"
    with pytest.raises(ValueError, match="no node '9' to pin"):
        panel.pin("9")
    with pytest.raises(ValueError, match="a name that is no node's"):
        panel.group(ids[0], ids[:1])
    with pytest.raises(ValueError, match="in 'a' and in 'b'"):
        panel.groups = {"a": ids[:1], "b": ids[:2]}
    assert panel.groups == {}
    with pytest.raises(ValueError, match="finite"):
        panel.factor = float("nan")
    with pytest.raises(KeyError, match="no group 'a'"):
        panel.ungroup("a")
    with pytest.raises(ValueError, match="asked to 'x'"):
        panel.on_request("x")
    with pytest.raises(TypeError, match="pin="):
        GraphPanel(graph, pin=[])
    with pytest.raises(TypeError, match="got a str"):
        GraphPanel("graph")


def test_groups_of_similar_latents():
    kinds, layers = ["latent"] * 4 + ["token", "token", "target"], [0, 0, 0, 0, None, None, None]
    edges = {(i, 4 + i // 2): 1.0 + i for i in range(4)} | {(6, i): 1.0 for i in range(4)}
    graph = graphs.by_hand(kinds, layers, edges, {6: 1.0})
    ids = graph.nodes["id"].tolist()
    panel = GraphPanel(graph, nodes=1.0, edges=1.0, pins=[ids[0]])
    panel.on_request("group_similar")
    assert sorted(map(sorted, panel.groups.values())) == [ids[:2], ids[2:4]]
    assert panel.pins == []
    assert panel.groups == graph.similar_latents()
    with pytest.raises(ValueError, match="no two latents"):
        panel.group_similar()
    panel.ungroup(next(iter(panel.groups)))
    panel.group_similar(0.9)
    assert len(panel.groups) == 2
    exec(panel.code(), shown := {"graph": graph})
    assert set(panel.groups) <= set(shown["edges"]["source"])
