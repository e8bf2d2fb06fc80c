"""Attribution graphs: sums to the last digit in every family and architecture, paths by hand, ranking, interrupts."""

import re

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.families import FAMILIES, family
from helpers.graphs import IDS, check_sums, cross_layer, transcoders
from helpers.transformer_lens_3 import has_hooked_transformer

import saewb
from saewb.circuits import attribution_graph as module
from saewb.circuits.frozen import FrozenModel
from saewb.circuits.replacement import ReplacementModel
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE

HAS_HOOKED = has_hooked_transformer()
PURSUIT = PursuitSAE.from_tensors(
    PursuitConfig(16, 40, hook="blocks.1.hook_resid_post"), {"W_dec": torch.eye(40, 16), "b_dec": torch.zeros(16)}
)


def graph_of(model, coders, ids=IDS, **options):
    return saewb.attribution_graph(model, ids, coders, progress=False, **options)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("name", FAMILIES)
def test_effects_and_constant_sum_to_every_value(name, skip):
    """The constants come from a pass without sources, not from the difference."""
    model = family(name)
    before = tiny_models.snapshot(model)
    graph = graph_of(model, transcoders(skip=skip))
    check_sums(graph, 1e-5)
    assert graph.is_exact
    assert np.abs(graph.nodes["left_out"].dropna()).max() < 1e-6
    with torch.no_grad():
        logits = model(IDS)[0, -1].float()
    targets = graph.nodes[graph.nodes["kind"] == "target"]
    capped = 5 * np.tanh(targets["value"] / 5) if "gemma2" in name else targets["value"]
    assert targets["probability"].to_numpy() == pytest.approx(logits.softmax(-1)[targets["latent"].tolist()], rel=1e-4)
    if "gemma2" not in name:  # values are before the soft cap
        want = (logits - logits.mean())[targets["latent"].tolist()]
        assert capped.to_numpy() == pytest.approx(want.numpy(), rel=1e-4, abs=1e-4)
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("coders", ["clt", "clt_jumprelu", "clt_skip", "some", "before_norm", "few_layers"])
def test_other_transcoders(model, coders):
    """Cross-layer ones, of some layers only, with inputs before the norm."""
    widths = (9, 14)
    of_few = cross_layer(layers=2, widths=widths)
    made = {
        "clt": lambda: cross_layer(),
        "clt_jumprelu": lambda: cross_layer(activation="jumprelu"),
        "clt_skip": lambda: cross_layer(skip=True),
        "some": lambda: transcoders()[1:2],
        "before_norm": lambda: transcoders("hook_resid_mid"),
        "few_layers": lambda: of_few,
    }
    graph = graph_of(model, made[coders]())
    check_sums(graph, 1e-5)
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    assert set(latents["layer"]) == {"some": {1}, "few_layers": {0, 1}}.get(coders, {0, 1, 2})
    assert (graph.nodes["kind"] == "error").sum() == 3 * 6


def test_a_cross_layer_latent_writes_to_every_later_layer(model):
    """Its effect is the sum over the layers that it writes to."""
    clt = cross_layer()
    whole = graph_of(model, clt, targets=[5])
    tensors = clt.tensors()
    first = [
        torch.cat([t[:, :1], torch.zeros_like(t[:, 1:])], 1) if i == 0 else t for i, t in enumerate(tensors["W_dec"])
    ]
    rest = [
        torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], 1) if i == 0 else t for i, t in enumerate(tensors["W_dec"])
    ]
    parts = [graph_of(model, clt.from_tensors(clt.cfg, {**tensors, "W_dec": w}), targets=[5]) for w in (first, rest)]
    mask = (whole.nodes["kind"] == "latent") & (whole.nodes["layer"] == 0)
    columns = torch.tensor(mask.to_numpy())
    torch.testing.assert_close(
        whole.edges[:, columns], parts[0].edges[:, columns] + parts[1].edges[:, columns], rtol=1e-4, atol=1e-5
    )
    assert parts[1].edges[-1, columns].abs().max() > 1e-3


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "centered", "constant_norm"])
def test_saes_of_the_stream(model, normalization):
    """Effects are gradients through the linearized block between; each SAE hides everything before it."""
    saes = [
        tiny_models.sae(f"blocks.{i}.hook_resid_post", normalization=normalization, seed=i, pre_bias="tied")
        for i in (0, 1)
    ]
    graph = graph_of(model, saes, targets=[5, 6])
    assert not graph.is_exact
    check_sums(graph, 1e-5)
    layer = graph.nodes["layer"].fillna(-1).astype(int).to_numpy()
    target, source = graph.edges.nonzero(as_tuple=True)
    steps = set(zip(layer[source].tolist(), layer[target].tolist(), strict=True))
    if normalization in ("none", "constant_norm"):
        assert steps == {(-1, 0), (0, 1), (1, -1)}
    else:  # an SAE that subtracts the mean adds that of its input again
        assert steps > {(-1, 0), (0, 1), (1, -1)}


def test_saes_agree_with_gradients_of_a_frozen_block():
    """Finite differences of a later latent's pre-activation, with patterns and scales held."""
    model = tiny_models.bridge()
    early, late = (tiny_models.sae(f"blocks.{i}.hook_resid_post", seed=i) for i in (0, 1))
    graph = graph_of(model, [early, late], targets=[5])
    target = int(np.flatnonzero((graph.nodes["kind"] == "latent") & (graph.nodes["layer"] == 1))[-1])
    row = graph.nodes.iloc[target]
    for source in graph.edges[target].abs().topk(4).indices.tolist():
        what = graph.nodes.iloc[source]
        if what["kind"] != "latent":
            continue
        step = 1e-2 * early.W_dec[what["latent"]].detach() * what["activation"]
        values = []
        for sign in (1, -1):

            def push(x, hook, sign=sign, position=what["position"], step=step):
                x = x.clone()
                x[0, position] += sign * step
                return x

            with saewb.freeze(model, IDS, mlps=False), torch.no_grad():
                cache = {}
                model.run_with_hooks(
                    IDS,
                    fwd_hooks=[
                        ("blocks.0.hook_resid_post", push),
                        ("blocks.1.hook_resid_post", lambda x, hook, cache=cache: cache.update(x=x)),
                    ],
                )
            x = cache["x"][0, row["position"]]
            values.append(float(x @ late.W_enc[:, row["latent"]].detach()))
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(graph.edges[target, source]), rel=2e-2, abs=1e-3)


def test_ranking_takes_the_most_influential(model):
    """Of all ranked anew after each batch, and with what is left out accounted for."""
    coders = transcoders()
    whole = graph_of(model, coders)
    some = graph_of(model, coders, max_latents=30, batch_size=8, rank_every=1)
    check_sums(some, 1e-5)
    latents = some.nodes[some.nodes["kind"] == "latent"]
    assert len(latents) == 30
    assert some.n_active == whole.n_active > 100
    strongest = whole.nodes[whole.nodes["kind"] == "latent"].nlargest(30, "influence")
    assert len(set(strongest["id"]) & set(latents["id"])) >= 25
    a, b = whole.index(latents["id"].iloc[-1]), some.index(latents["id"].iloc[-1])
    c, d = whole.index(latents["id"].iloc[0]), some.index(latents["id"].iloc[0])
    assert float(whole.edges[a, c]) == pytest.approx(float(some.edges[b, d]), rel=1e-4, abs=1e-6)
    none = graph_of(model, coders, max_latents=0)
    check_sums(none, 1e-5)
    assert (none.nodes["kind"] != "latent").all()


def test_batches_change_nothing(model):
    a, b = (graph_of(model, transcoders(), batch_size=size) for size in (3, 256))
    torch.testing.assert_close(a.edges, b.edges, rtol=1e-4, atol=1e-5)
    assert (a.nodes["id"] == b.nodes["id"]).all()


@pytest.mark.parametrize("name", ["bridge-llama", "bridge-gemma2", "bridge-neox", *["hooked-gpt2"] * HAS_HOOKED])
@pytest.mark.parametrize("coders", [lambda: transcoders(skip=True), cross_layer], ids=["skip", "clt"])
def test_passes_over_prefixes_change_nothing(name, coders, monkeypatch):
    """Targets take the shortest prefix that has their position; a model that looks ahead takes the whole prompt."""
    model, ids = family(name), tiny_models.tokens(1, 21, seed=4)
    lengths, run = [], ReplacementModel.run

    def counted(self, added):
        lengths.append(added[-1].shape[1])
        return run(self, added)

    monkeypatch.setattr(ReplacementModel, "run", counted)
    graph = graph_of(model, coders(), ids, targets=[5], batch_size=16)
    assert sorted(lengths) == [11, 21, 21]  # the last is without sources
    check_sums(graph, 1e-5)
    monkeypatch.setattr(FrozenModel, "is_causal", False)
    whole = graph_of(model, coders(), ids, targets=[5], batch_size=16)
    assert sorted(lengths) == [11, 21, 21, 21, 21]
    torch.testing.assert_close(graph.edges, whole.edges, rtol=1e-4, atol=1e-5)
    assert (graph.nodes["id"] == whole.nodes["id"]).all()


def test_batches_are_of_similar_positions_and_fit(model):
    """Each latent once; late layers first; none larger than what its gradients may take."""
    ids = tiny_models.tokens(1, 32, seed=4)
    replacement = ReplacementModel.of(model, ids, transcoders(), 1)
    some = torch.randperm(replacement.n_active, generator=torch.Generator().manual_seed(0))[:200]
    batches = replacement.batches(some, 9)
    assert torch.equal(torch.cat(batches).sort().values, some.sort().values)
    layers, positions = ([values[batch] for batch in batches] for values in (replacement.layer, replacement.position))
    highest = [int(layer.max()) for layer in layers]
    assert highest == sorted(highest, reverse=True)
    assert all(len((position // 8).unique()) == 1 for position in positions)
    assert max(map(len, batches)) == 9
    row = 4 * 16 * 32
    assert replacement.batch_size(10**6, 2, 32) == 2**25 // (3 * row)
    assert replacement.batch_size(10**6, 0, 8) == 2**25 // (row // 4)
    assert replacement.batches(some[:0], 9) == []


def test_a_matrix_over_the_limit_is_on_disk(model, monkeypatch):
    expected = graph_of(model, transcoders()).edges
    monkeypatch.setattr(module, "_IN_MEMORY", 1000)
    graph = graph_of(model, transcoders())
    torch.testing.assert_close(graph.edges, expected, rtol=1e-5, atol=1e-6)
    assert graph.pruned().n_edges > 0


def test_an_interrupt_keeps_the_rows_that_are_done(model, monkeypatch):
    rows, calls = ReplacementModel.rows, []

    def interrupted(self, batches):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return rows(self, batches)

    monkeypatch.setattr(ReplacementModel, "rows", interrupted)
    graph = graph_of(model, transcoders(), batch_size=10)
    assert graph.interrupted
    assert 20 < (graph.nodes["kind"] == "latent").sum() <= 30
    assert "interrupted" in repr(graph)
    check_sums(graph, 1e-5)
    last = graph.nodes[graph.nodes["kind"] == "latent"]["layer"]
    assert last.min() == 2  # the last layer comes first


def test_targets(model):
    graph = graph_of(model, transcoders(), targets=["w3", 7])
    targets = graph.nodes[graph.nodes["kind"] == "target"]
    assert targets["latent"].tolist() == [7]  # the same token twice
    assert targets["token"].iloc[0].strip() == "w3"
    direction = torch.arange(16.0)
    graph = graph_of(model, transcoders(), targets=[("up", 0.5, direction), ("down", 0.5, -direction)])
    check_sums(graph, 1e-5)
    assert torch.allclose(graph.edges[-1], -graph.edges[-2], atol=1e-4)
    few = graph_of(model, transcoders(), max_targets=20, target_mass=0.5)
    p = few.nodes.loc[few.nodes["kind"] == "target", "probability"]
    assert p.sum() >= 0.5 > p[:-1].sum()


def test_first_positions_are_constants(model):
    graph = graph_of(model, transcoders(), zero_first=2)
    errors = graph.nodes[(graph.nodes["kind"] == "error") & (graph.nodes["position"] < 2)]
    assert not graph.edges[:, torch.tensor(errors.index.to_numpy())].any()
    assert graph.nodes.loc[graph.nodes["kind"] == "latent", "position"].min() == 2
    check_sums(graph, 1e-5)
    check_sums(graph_of(model, transcoders(), zero_first=False), 1e-5)


def test_effects_follow_by_hand():
    """A linear model of two layers: attention to the first token only, MLPs and transcoders with known weights."""
    model = tiny_models.new_bridge()
    d = tiny_models.D_MODEL
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.zero_()  # no attention: each position by itself
    one, two, _ = transcoders()
    graph = graph_of(model, [one, two], targets=[5])
    with torch.no_grad(), saewb.freeze(model, IDS) as frozen:
        scales = {name: s[0, :, 0] for name, s in frozen.scales.items()}
        w = [model.blocks[i].ln2.weight for i in range(3)]
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    a = latents[latents["layer"] == 0].iloc[0]
    b = latents[(latents["layer"] == 1) & (latents["position"] == a["position"])].iloc[0]
    p = a["position"]
    written = a["activation"] * one.W_dec[a["latent"]]
    read = written / scales["blocks.1.ln2.hook_scale"][p] * w[1]
    want = float(read @ two.W_enc[:, b["latent"]])
    assert float(graph.edges[graph.index(b["id"]), graph.index(a["id"])]) == pytest.approx(want, rel=1e-4)
    other = latents[(latents["layer"] == 1) & (latents["position"] != p)]
    assert not graph.edges[[graph.index(i) for i in other["id"]], graph.index(a["id"])].any()
    assert d == 16


@pytest.mark.parametrize(
    ("coders", "error", "text"),
    [
        (lambda: [], ValueError, "no transcoder"),
        (
            lambda: [*transcoders(), tiny_models.sae("blocks.1.hook_resid_post")],
            ValueError,
            "one SAE or transcoder per",
        ),
        (lambda: [transcoders()[0], tiny_models.sae("blocks.1.hook_resid_post")], ValueError, "no output of an MLP"),
        (lambda: [cross_layer(), transcoders()[0]], ValueError, "nothing beside it"),
        (lambda: PURSUIT, TypeError, "no pre-activation"),
    ],
)
def test_what_does_not_fit_is_refused(model, coders, error, text):
    with pytest.raises(error, match=text):
        graph_of(model, coders())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"targets": []}, "no targets"),
        ({"targets": [("up", 1.0, torch.ones(3))]}, r"direction \[16\]"),
        ({"target_mass": 0}, "a probability"),
        ({"batch_size": 0}, "1 or more"),
        ({"zero_first": 9}, "0 to 6"),
        ({"targets": [99]}, "99"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        graph_of(tiny_models.bridge(), transcoders(), **options)


def test_what_is_attached_there_is_refused(model):
    coders = transcoders()
    with saewb.attach(model, coders[1]), pytest.raises(ValueError, match="writes to"):
        graph_of(model, coders)


def test_a_prompt_of_one_token(model):
    """Without latents: the first position has none."""
    graph = graph_of(model, transcoders(), IDS[:, :1])
    assert graph.n_active == 0
    check_sums(graph, 1e-5)
    assert graph.replacement_score == 1
    assert len(graph.pruned()) == 1 + (graph.nodes["kind"] == "target").sum()


def test_from_inside_of_inference_mode(model):
    with torch.inference_mode():
        check_sums(graph_of(model, transcoders(), targets=[5]), 1e-5)
    assert re.match(r"AttributionGraph\(\d+ latents", repr(graph_of(model, transcoders(), targets=[5])))
