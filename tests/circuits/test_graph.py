"""Scores and pruning against the formulas in numpy and by hand; files, their readers, and broken ones."""

import json
from functools import cache

import networkx
import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.examples import examples
from helpers.graphs import IDS, by_hand, transcoders
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.errors import FormatError

CHAIN = {
    "kinds": ["latent", "latent", "error", "token", "target"],
    "layers": [0, 1, 0, None, None],
    "edges": {(0, 3): 2.0, (1, 0): -1.0, (1, 2): 3.0, (4, 1): 1.0, (4, 3): 1.0},
    "weights": {4: 0.5},
}


@cache
def small():
    return saewb.attribution_graph(tiny_models.bridge(), IDS, transcoders(), progress=False)


def powers(edges, weights):
    """w N + w N^2 + ... until zero."""
    n = np.abs(edges) / np.maximum(np.abs(edges).sum(1, keepdims=True), 1e-10)
    total, power = np.zeros(len(n)), weights
    while (power := power @ n).any():
        total += power
    return total, n


def test_scores_by_hand():
    graph = by_hand(**CHAIN)
    # latent 1 has half of the target's input, and a quarter of its own from latent 0, the rest from the error.
    assert graph.nodes["influence"].tolist() == pytest.approx([0.0625, 0.25, 0.1875, 0.25 + 0.0625, 0.0])
    assert graph.replacement_score == pytest.approx(0.3125 / (0.3125 + 0.1875))
    weighted = 0.0625 * 1 + 0.25 * 0.25 + 0.1875 + 0.3125 + 0.5 * 1
    assert graph.completeness == pytest.approx(weighted / (0.0625 + 0.25 + 0.1875 + 0.3125 + 0.5))


def test_pruning_by_hand():
    graph = by_hand(**CHAIN)
    # Cumulative shares: token .385, latent 1 .692, error .923, latent 0 1.
    assert graph.nodes["cumulative"].tolist()[:4] == pytest.approx(
        [1.0, 0.5625 / 0.8125, 0.75 / 0.8125, 0.3125 / 0.8125]
    )
    kept = graph.pruned(0.8, 1.0)
    assert kept.nodes["kind"].tolist() == ["latent", "error", "token", "target"]
    assert kept.replacement_score == graph.replacement_score
    assert kept.thresholds == (0.8, 1.0)
    assert kept.nodes["left_out"].iloc[0] == pytest.approx(1.0 - 3.0)  # value 1, constant 0, the error's edge 3
    # Without the error, latent 1 has no incoming edge and goes, too.
    assert graph.pruned(0.6, 1.0).nodes["kind"].tolist() == ["token", "target"]
    assert graph.pruned(1.0, 1.0).n_edges == graph.n_edges == 5
    with pytest.raises(ValueError, match="pruned already"):
        kept.pruned()
    with pytest.raises(ValueError, match="0 to 1"):
        graph.pruned(nodes=1.5)


@given(seed=st.integers(0, 10**6), nodes=st.floats(0.1, 1), edges=st.floats(0.1, 1))
@examples(60)
def test_influence_and_pruning_are_the_formulas(seed, nodes, edges):
    rng = np.random.default_rng(seed)
    n_latents, n_errors, n_tokens, n_targets = rng.integers(1, 7, 4)
    layers = [*rng.integers(0, 4, n_latents + n_errors).tolist(), *[None] * (n_tokens + n_targets)]
    kinds = ["latent"] * n_latents + ["error"] * n_errors + ["token"] * n_tokens + ["target"] * n_targets
    depth = [-1 if k == "token" else 9 if k == "target" else i for k, i in zip(kinds, layers, strict=True)]
    n = len(kinds)
    matrix = rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.6)
    matrix *= np.array(depth)[None] < np.array(depth)[:, None]
    matrix[[k not in ("latent", "target") for k in kinds]] = 0
    weights = {n - 1 - i: float(rng.random()) for i in range(n_targets)}
    cells = {(t, s): matrix[t, s] for t, s in zip(*matrix.nonzero(), strict=True)}
    graph = by_hand(kinds, layers, cells, weights)
    a = graph.edges.double().numpy()
    w = np.array([weights.get(i, 0.0) for i in range(n)])
    reach, share = powers(a, w)
    assert graph.nodes["influence"].to_numpy() == pytest.approx(reach, rel=1e-5, abs=1e-9)
    is_error, is_token = (np.array([k == kind for k in kinds]) for kind in ("error", "token"))
    if reach[is_token].sum() + reach[is_error].sum() > 1e-6:
        want = reach[is_token].sum() / (reach[is_token].sum() + reach[is_error].sum())
        assert graph.replacement_score == pytest.approx(want, rel=1e-5)
    out = reach + w
    assert graph.completeness == pytest.approx(((1 - share[:, is_error].sum(1)) * out).sum() / out.sum(), rel=1e-5)
    if graph.n_edges == 0:
        return
    kept = graph.pruned(nodes, edges)
    ids = set(kept.nodes["id"])
    assert {i for i, k in zip(graph.nodes["id"], kinds, strict=True) if k in ("token", "target")} <= ids
    incoming, outgoing = (kept.edges != 0).any(1), (kept.edges != 0).any(0)
    inner = torch.tensor(kept.nodes["kind"].isin(["latent", "error"]).to_numpy())
    latents = torch.tensor((kept.nodes["kind"] == "latent").to_numpy())
    assert outgoing[inner].all()
    assert incoming[latents].all()


def test_edges_and_networkx():
    graph = by_hand(**CHAIN)
    edges = graph.edge_frame()
    assert edges["effect"].tolist() == [3.0, 2.0, -1.0, 1.0, 1.0]
    assert edges["share"].tolist() == [0.75, 1.0, 0.25, 0.5, 0.5]
    assert len(graph.edge_frame(2)) == 2
    net = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(net)
    assert len(net) == 5
    assert net.edges["0_0_0", "1_1_0"]["weight"] == -1.0
    assert net.nodes["1_1_0"]["kind"] == "latent"
    with pytest.raises(KeyError, match="near:"):
        graph.index("1_1_9")


def test_labels():
    graph = by_hand(**CHAIN).with_labels({(1, 1): "cats", "E_3_0": "first"})
    assert graph.nodes["label"].tolist() == ["", "cats", "", "first", ""]
    assert "cats" in graph._repr_html_()


@pytest.mark.parametrize("pruned", [False, True])
def test_a_file_gives_the_graph_back(tmp_path, pruned):
    graph = small().pruned() if pruned else small()
    graph = graph.with_labels({(1, 1): 'a "quoted" label'})
    text = graph.to_json(tmp_path / "graph.json", slug="a", scan="b")
    again = saewb.load_graph(tmp_path / "graph.json")
    assert again.nodes.equals(graph.nodes)
    assert torch.equal(again.edges, graph.edges)
    assert repr(again) == repr(graph)
    assert again.tokens == graph.tokens
    assert again.prompt == graph.prompt
    assert again.to_json(slug="a", scan="b") == text
    document = json.loads(text)
    assert document["metadata"]["slug"] == "a"
    assert document["metadata"]["scan"] == "b"
    latent = document["nodes"][0]
    layer, feature, position = map(int, latent["node_id"].split("_"))
    assert latent["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
    assert (latent["layer"], latent["ctx_idx"]) == (str(layer), position)


def test_a_file_of_another_tool_is_read(tmp_path):
    """Without what only saewb writes; nodes in any order."""
    graph = small().pruned()
    document = json.loads(graph.to_json())
    del document["metadata"]["info"]
    document["nodes"].reverse()
    (tmp_path / "graph.json").write_text(json.dumps(document))
    other = saewb.load_graph(tmp_path / "graph.json")
    assert set(other.nodes["id"]) == set(graph.nodes["id"])
    source, target = graph.edge_frame(1)[["source", "target"]].iloc[0]
    strongest = float(graph.edges[graph.index(target), graph.index(source)])
    assert float(other.edges[other.index(target), other.index(source)]) == strongest
    assert 0 < other.replacement_score < 1
    assert other.nodes["value"].isna().all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("nodes"), "KeyError"),
        (lambda d: d["nodes"][0].update(feature_type="lorsa"), "lorsa"),
        (lambda d: d["links"].append({"source": "9_9_9", "target": d["nodes"][0]["node_id"], "weight": 1}), "9_9_9"),
        (lambda d: d["links"].append({**d["links"][0], "source": d["links"][0]["target"]}), "links upwards only"),
        (lambda d: d["links"].append({**d["links"][0], "weight": "x"}), "ValueError"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "one id"),
        (lambda d: d["nodes"][0].update(ctx_idx=99), "position 99"),
        (lambda d: d["metadata"]["info"]["saewb"]["value"].pop(), "value of"),
        (lambda d: d["metadata"]["info"].update(saewb=[1]), "TypeError|AttributeError"),
    ],
)
def test_broken_files(tmp_path, change, text):
    document = json.loads(by_hand(**CHAIN).to_json())
    change(document)
    (tmp_path / "graph.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=text):
        saewb.load_graph(tmp_path / "graph.json")


def test_no_json(tmp_path):
    (tmp_path / "graph.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        saewb.load_graph(tmp_path / "graph.json")
    with pytest.raises(FormatError, match="cannot be read"):
        saewb.load_graph(tmp_path / "none.json")


@examples(4)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_edges_of_groups_are_sums(seed, n_groups):
    graph, rng = small(), np.random.default_rng(seed)
    ids = graph.nodes["id"].to_numpy()
    chosen = rng.permutation(len(ids))[: rng.integers(n_groups, 30)]
    groups = {f"group {k}": ids[part].tolist() for k, part in enumerate(np.array_split(chosen, n_groups))}
    names = np.setdiff1d(ids, ids[chosen]).tolist() + list(groups)
    member = np.array([[node in groups.get(name, [name]) for node in ids] for name in names], dtype=float)
    matrix = graph.edges.double().numpy()
    effects, total = member @ matrix @ member.T, member @ np.abs(matrix) @ member.T
    inside = np.eye(len(names), dtype=bool)
    effects[inside], total[inside] = 0, 0
    table = graph.edge_frame(groups=groups)
    at = {name: i for i, name in enumerate(names)}
    got = np.zeros_like(effects)
    got[table["target"].map(at), table["source"].map(at)] = table["effect"]
    assert got == pytest.approx(effects, rel=1e-4, abs=1e-5)
    share = table["effect"].abs() / total.sum(1)[table["target"].map(at)]
    assert table["share"].to_numpy() == pytest.approx(share.to_numpy(), rel=1e-4, abs=1e-6)
    assert table["effect"].abs().is_monotonic_decreasing


def test_a_group_by_hand():
    graph = by_hand(**CHAIN)
    ids = graph.nodes["id"].tolist()
    table = graph.edge_frame(groups={"both": [ids[0], ids[2]], "end": [ids[4]]})
    assert table[["source", "target", "effect"]].to_numpy().tolist() == [
        ["both", ids[1], 2.0],
        [ids[3], "both", 2.0],
        [ids[1], "end", 1.0],
        [ids[3], "end", 1.0],
    ]
    assert table["share"].tolist() == pytest.approx([0.5, 1.0, 0.5, 0.5])  # of latent 1: 2 of |-1| + |3|
    assert graph.edge_frame(1, groups={"both": [ids[0], ids[2]]})["source"].tolist() == ["both"]
    assert len(graph.edge_frame(groups={})) == graph.n_edges


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"": ["0_0_0"]}, "a name that is no node's"),
        ({"0_0_0": ["0_0_0"]}, "a name that is no node's"),
        ({"a": []}, "a list of ids"),
        ({"a": "0_0_0"}, "a list of ids"),
        ({"a": ["7_7_7"]}, "'a' has '7_7_7'"),
        ({"a": ["0_0_0", "0_0_0"]}, "in 'a' and in 'a'"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(ValueError, match=message):
        by_hand(**CHAIN).edge_frame(groups=groups)


def test_labels_of_an_index():
    model, coders = tiny_models.bridge(), transcoders()
    index = saewb.features.build_index(model, coders[1], tiny_models.tokens(8, 9), batch_size=8, n_nearest=0)
    graph = small()
    latents = graph.nodes[(graph.nodes["kind"] == "latent") & (graph.nodes["layer"] == 1)]
    mine = latents["id"].iloc[0]
    labeled = graph.with_labels({mine: "mine"}).with_labels(index).nodes.set_index("id")["label"]
    assert labeled[mine] == "mine"
    for node, latent in zip(latents["id"].iloc[1:], latents["latent"].iloc[1:], strict=True):
        assert labeled[node] == index.label(int(latent))
    assert set(labeled.drop(latents["id"])) == {""}
    assert labeled.equals(graph.with_labels({mine: "mine"}).with_labels([index]).nodes.set_index("id")["label"])
    alone = by_hand(["latent", "token", "target"], [0, None, None], {(0, 1): 1.0, (2, 0): 1.0}, {2: 1.0})
    with pytest.raises(ValueError, match="of no layer of this graph"):
        alone.with_labels(index)


def test_similar_latents_are_planted_twins():
    """Twins of the same edges up to a factor; in a chain of near ones, any two of a group are similar."""
    kinds = ["latent"] * 6 + ["token", "token", "target"]
    layers = [0, 0, 0, 1, 1, 1, None, None, None]
    edges = {}
    for node, (a, b) in enumerate([(1, 0), (2, 0), (0, 3)]):  # 0 and 1 read the first token, 2 the second
        edges |= {(node, 6): a, (node, 7): b}
    for node, angle in zip((3, 4, 5), (0.0, 0.7, 1.4), strict=True):  # neighbors have cosine 0.76, ends 0.17
        edges |= {(node, 0): float(np.cos(angle)), (node, 2): float(np.sin(angle))}
    edges |= {(8, node): 1.0 for node in (0, 1)}
    graph = by_hand(kinds, layers, {k: v for k, v in edges.items() if v}, {8: 1.0})
    ids = graph.nodes["id"].tolist()
    shares = graph.edges / graph.edges.abs().sum(1, keepdim=True).clamp_min(1e-10)
    profile = torch.cat([shares[:6], shares[:, :6].T], 1)
    cosine = torch.nn.functional.normalize(profile, dim=1) @ torch.nn.functional.normalize(profile, dim=1).T
    groups = graph.similar_latents(0.7)
    members = [tuple(sorted(ids.index(node) for node in group)) for group in groups.values()]
    assert sorted(members) in ([(3, 4)], [(4, 5)])  # 0 and 1 write to others, so their cosine is less
    assert float(cosine[0, 1]) < 0.7 < float(cosine[3, 4])
    for group in graph.similar_latents(0.4).values():
        index = [ids.index(node) for node in group]
        assert float(cosine[index][:, index].min()) >= 0.4 - 1e-6
    assert all(name.endswith(" + 1") for name in groups)
    assert graph.similar_latents(1.0) == {}
    with pytest.raises(ValueError, match="similarity=0"):
        graph.similar_latents(0)
    assert by_hand(["token", "target"], [None, None], {(1, 0): 1.0}, {1: 1.0}, n_layers=1).similar_latents() == {}
