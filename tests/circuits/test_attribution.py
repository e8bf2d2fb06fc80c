"""Attribution against what really happens: small changes, ablations, and the whole way from decode(0)."""

import math

import pytest
import torch
from helpers import tiny_models
from helpers.graphs import cross_layer, transcoders

import saewb
from saewb.circuits.attribution import attribute, attribute_edges
from saewb.interventions.steering import steer
from saewb.models import hook_points
from saewb.models.capture import capture
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE


def biased(sae):
    """With a decoder bias: at an activation of exactly 0 a model's norm has no gradient."""
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.5, 0.5, len(sae.b_dec)))
    return sae


EARLY, RESID, MID, MLP, Z = (
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_post",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_z",
)
SAES = {
    "relu": lambda: tiny_models.sae(RESID),
    "topk": lambda: tiny_models.sae(RESID, "topk", k=6),
    "jumprelu": lambda: tiny_models.sae(RESID, "jumprelu"),
    "abstopk": lambda: tiny_models.sae(RESID, "abstopk", k=6),
    "layer_norm": lambda: tiny_models.sae(RESID, normalization="layer_norm"),
    "transcoder": lambda: tiny_models.sae(MID, hook_out=MLP),
    "skip_transcoder": lambda: tiny_models.sae(MID, hook_out=MLP, skip=True),
    "heads": lambda: tiny_models.sae(Z),
    "one_head": lambda: tiny_models.sae(Z, d_in=tiny_models.D_MODEL // tiny_models.HEADS, head=2),
    "pursuit": lambda: biased(
        PursuitSAE(PursuitConfig(d_in=tiny_models.D_MODEL, d_sae=40, max_iterations=4, hook=RESID))
    ),
    "temporal": lambda: biased(
        TemporalSAE(TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID))
    ),
}
PROMPT = "w3 w9 w20 w4 w11 w7"


@pytest.fixture(params=SAES)
def sae(request):
    return SAES[request.param]()


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 9]


def rows(frame, kind):
    return frame[frame.latent.isna()] if kind == "error" else frame[~frame.latent.isna()]


def test_a_gradient_is_what_a_small_change_does(model, sae):
    attribution = attribute(model, PROMPT, sae, metric)
    tokens = model.to_tokens(PROMPT)
    checked = rows(attribution.to_frame(), "latent").head(4)
    for row in checked.itertuples():
        effects = []
        for scale in (1 - 1e-3, 1 + 1e-3):
            with torch.no_grad(), steer(model, sae, {row.latent: scale}, how="scale", positions=[row.position]):
                effects.append(float(metric(model(tokens).double())))
        slope = (effects[1] - effects[0]) / 2e-3
        assert row.effect == pytest.approx(slope, rel=0.05, abs=0.02)
    assert len(checked) == 4
    assert attribution.metric == pytest.approx(float(metric(model(tokens))), abs=1e-4)


def test_latents_and_errors_are_all_there(model, sae):
    """Their contributions and decode(0) make up the activation, so that effects sum to gradient . (y - decode(0))."""
    attribution = attribute(model, PROMPT, sae, metric, skip_special_tokens=False)
    seen = {}

    def leaf(y, hook):
        seen["y"] = y.detach().requires_grad_()
        return seen["y"]

    write = sae.cfg.hook_out or sae.cfg.hook
    read = {}
    hooks = [(write, leaf)]
    if sae.cfg.hook_out:
        hooks.insert(0, (sae.cfg.hook, lambda x, hook: read.update(x=x.detach())))
    value = metric(model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=hooks))
    (g,) = torch.autograd.grad(value, seen["y"])
    y, x = seen["y"].detach(), read.get("x", seen["y"].detach())
    if y.ndim == 4:
        y, g, x = (t[:, :, 2] if sae.cfg.head == 2 else t.flatten(2) for t in (y, g, x))
    with torch.no_grad():
        base = sae.decode(torch.zeros(*x.shape[:-1], sae.cfg.d_sae), x)
    totals = attribution.totals().iloc[0]
    assert totals.latents + totals.errors == pytest.approx(float((g * (y - base)).sum()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("skip", [True, False])
def test_integrated_gradients_are_complete(model, sae, skip):
    attribution = attribute(
        model, PROMPT, sae, metric, method="integrated", n_steps=48, batch_size=20, skip_special_tokens=skip
    )
    totals = attribution.totals().iloc[0]
    assert math.isfinite(totals.metric_difference)
    assert totals.latents + totals.errors == pytest.approx(totals.metric_difference, rel=0.02, abs=0.02)
    assert (0 in attribution.position.tolist()) is not skip


def test_ablation_is_what_ablating_does(model, sae):
    attribution = attribute(model, PROMPT, sae, metric, method="ablation", n_nodes=12, batch_size=5)
    tokens = model.to_tokens(PROMPT)
    for row in rows(attribution.to_frame(), "latent").itertuples():
        with torch.no_grad(), steer(model, sae, {row.latent: 0.0}, how="clamp", positions=[row.position]):
            assert row.effect == pytest.approx(attribution.metric - float(metric(model(tokens))), abs=2e-3)
    assert len(attribution) == 12


def test_ablating_an_error(model):
    sae, tokens = SAES["relu"](), model.to_tokens(PROMPT)
    attribution = attribute(model, PROMPT, sae, metric, method="ablation", n_nodes=10_000)
    row = rows(attribution.to_frame(), "error").iloc[0]

    def cut(y, hook):
        y = y.clone()
        y[:, row.position] = sae(y[:, row.position])
        return y

    with torch.no_grad():
        value = float(metric(model.run_with_hooks(tokens, fwd_hooks=[(RESID, cut)])))
    assert row.effect == pytest.approx(attribution.metric - value, abs=1e-3)


def test_several_saes_each_as_if_alone(model):
    a, b = tiny_models.sae(EARLY), tiny_models.sae(RESID, seed=3)
    both = attribute(model, PROMPT, [a, b], metric).to_frame()
    for sae in (a, b):
        alone = attribute(model, PROMPT, sae, metric).to_frame()
        mine = both[both.sae == sae.cfg.hook].reset_index(drop=True)
        assert mine.effect.tolist() == pytest.approx(alone.effect.tolist(), rel=1e-4, abs=1e-5)
        assert mine.latent.equals(alone.latent)


def test_edges_are_what_a_small_change_does(model):
    a, b, tokens = tiny_models.sae(EARLY), tiny_models.sae(RESID, seed=3), model.to_tokens(PROMPT)
    edges = attribute_edges(model, PROMPT, a, b, metric=metric, n_targets=3)
    assert edges.groupby(["to_position", "to_latent"]).ngroups == 3

    def later(scale, row):
        with torch.no_grad(), steer(model, a, {row.from_latent: scale}, how="scale", positions=[row.from_position]):
            _, cache = model.run_with_cache(tokens, names_filter=RESID)
        return float(b.encode(cache[RESID])[0, row.to_position, row.to_latent])

    for row in rows(edges.rename(columns={"from_latent": "latent"}), "latent").head(5).itertuples():
        row = row._asdict() | {"from_latent": row.latent}
        row = type("Row", (), row)
        slope = (later(1 + 1e-3, row) - later(1 - 1e-3, row)) / 2e-3
        assert row.effect == pytest.approx(slope, rel=0.05, abs=0.02)
    nodes = attribute(model, PROMPT, b, metric).to_frame()
    top = rows(nodes, "latent").iloc[0]
    mine = edges[(edges.to_position == top.position) & (edges.to_latent == top.latent)]
    assert mine.metric_effect.iloc[0] == pytest.approx(mine.effect.iloc[0] * top.effect / top.activation, rel=1e-3)


def test_edges_to_chosen_targets_without_a_metric(model):
    a, b = tiny_models.sae(EARLY), tiny_models.sae(RESID, seed=3)
    strongest = attribute_edges(model, PROMPT, a, b, n_targets=2)
    pairs = {(p, i) for p, i in zip(strongest.to_position, strongest.to_latent, strict=True)}
    again = attribute_edges(model, PROMPT, a, b, targets=pairs)
    assert again.effect.abs().tolist() == pytest.approx(strongest.effect.abs().tolist(), rel=1e-5)
    assert "metric_effect" not in again
    assert (again.from_position <= again.to_position).all()


@pytest.mark.parametrize("pair", [(RESID, EARLY), (RESID, RESID)])
def test_edges_lead_forward_only(model, pair):
    a, b = (tiny_models.sae(point) for point in pair)
    with pytest.raises(ValueError, match="does not depend on"):
        attribute_edges(model, PROMPT, a, b)


def test_edges_to_what_is_not_active(model):
    a, b = tiny_models.sae(EARLY), tiny_models.sae(RESID, "topk", k=2)
    with pytest.raises(ValueError, match="no position 99"):
        attribute_edges(model, PROMPT, a, b, targets=[(99, 3)])


def test_metrics_by_word(model):
    sae, logits = SAES["relu"](), model(model.to_tokens(PROMPT))[0, -1]
    word, other = model.tokenizer("w5 w8", add_special_tokens=False)["input_ids"]
    assert attribute(model, PROMPT, sae, "w5").metric == pytest.approx(float(logits.log_softmax(-1)[word]), abs=1e-4)
    pair = attribute(model, PROMPT, sae, ("w5", other)).metric
    assert pair == pytest.approx(float(logits[word] - logits[other]), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metric": "w5 w8"}, "is 2 tokens of this model"),
        ({"metric": 99}, "no token 99"),
        ({"metric": None}, "metric=None"),
        ({"metric": lambda logits: logits[0, -1]}, r"the metric gave \(32,\)"),
        ({"metric": lambda logits: float(logits[0, -1, 3])}, "the metric gave float"),
        ({"metric": lambda logits: logits[0, -1, 3].detach()}, "can be differentiated"),
        ({"prompt": tiny_models.tokens(2)}, "one text at a time"),
        ({"prompt": ["w1", "w2"]}, "a list as prompt"),
        ({"saes": []}, "got no SAE"),
        ({"saes": torch.nn.Linear(2, 2)}, "Linear as an SAE"),
        ({"saes": tiny_models.sae("blocks.9.hook_resid_post")}, "no hook named"),
        ({"saes": tiny_models.sae(RESID, d_in=12)}, "do not fit"),
        ({"method": "shapley"}, "method='shapley'"),
        ({"n_steps": 0}, "n_steps=0"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_is_wrong_is_said(model, change, says):
    before = tiny_models.snapshot(model)
    request = {"prompt": PROMPT, "saes": SAES["relu"](), "metric": metric, **change}
    with pytest.raises((ValueError, TypeError), match=says):
        attribute(model, **request)
    assert tiny_models.snapshot(model) == before


def test_frozen_models_under_no_grad(model):
    sae = SAES["relu"]()
    want = attribute(model, PROMPT, sae, metric)
    model.zero_grad(set_to_none=True)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        with torch.no_grad():
            got = attribute(model, PROMPT, sae, metric)
    finally:
        for p in frozen:
            p.requires_grad_()
    assert torch.equal(got.effect, want.effect)
    assert all(p.grad is None for p in model.parameters())


def test_tiles_change_nothing(model, monkeypatch):
    sae = SAES["topk"]()
    want = attribute(model, PROMPT, sae, metric).to_frame()
    monkeypatch.setattr("saewb.circuits.attribution_nodes.TILE", 2 * sae.cfg.d_sae)
    got = attribute(model, PROMPT, sae, metric).to_frame()
    assert got.latent.equals(want.latent)
    assert got.effect.tolist() == pytest.approx(want.effect.tolist(), rel=1e-5)


def test_on_the_embedded_model_estimates_rank_as_the_truth_does():
    model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
    prompt, answer = "The species is a member of the", " family"
    truth = attribute(model, prompt, sae, answer, method="ablation", n_nodes=60)
    frame = truth.to_frame()
    by_gradient = frame.effect.rank().corr(frame.gradient_estimate.rank())
    whole = attribute(model, prompt, sae, answer, method="integrated").to_frame()
    merged = frame.merge(whole, on=["position", "latent"], suffixes=("", "_integrated"))
    by_integrated = merged.effect.rank().corr(merged.effect_integrated.rank())
    print(f"Spearman with ablation truth: gradient {by_gradient:.2f}, integrated {by_integrated:.2f}")
    assert by_gradient > 0.7
    assert by_integrated > 0.5


def test_latents_have_labels_where_there_is_an_index():
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:5]]).with_labels({748: "who"})
    result = saewb.attribute(model, "Marie Curie was a Polish", sae, " physicist")
    plain, table = result.to_frame(30), result.to_frame(30, index=index)
    assert plain.equals(table.drop(columns="label"))
    latents = table.latent.dropna().astype(int)
    assert len(latents) > 10
    assert table.label[latents.index].tolist() == index.label_texts(latents)
    assert (table.label[table.latent.isna()] == "").all()
    assert result.to_frame(30, index={result.saes[0]: index}).equals(table)
    assert (result.to_frame(5, index={}).label == "").all()


# -- cross-layer transcoders -----------------------------------------------------------------------------------------

CLTS = {
    "relu": lambda: cross_layer(),
    "jumprelu": lambda: cross_layer(activation="jumprelu"),
    "skip": lambda: cross_layer(skip=True),
}


def written_by_nodes(model, clt, ids):
    """What each active latent writes at each layer, and each layer's error, in tensors that repeat the definition."""
    cache = capture(model, ids, [*clt.cfg.hooks, *clt.cfg.hooks_out])
    xs, ys = ([cache[name][0].detach() for name in names] for names in (clt.cfg.hooks, clt.cfg.hooks_out))
    acts = [clt.encode_layer(x, i).detach() for i, x in enumerate(xs)]
    vectors = {}
    for i, z in enumerate(acts):
        for position, latent in z.nonzero().tolist():
            if position:  # the first is special
                parts = [z[position, latent] * clt.W_dec[i][latent, j - i] for j in range(i, len(acts))]
                vectors[i, position, latent] = [torch.zeros_like(parts[0])] * i + parts
    for j, y in enumerate(clt.decode(acts, xs)):
        for position in range(1, len(y)):
            zeros = [torch.zeros_like(y[0])] * len(acts)
            vectors[j, position, -1] = [*zeros[:j], (ys[j] - y)[position].detach(), *zeros[j + 1 :]]
    return vectors


def adding(clt, vectors, scale):
    """Hooks that add to each layer's output, for each node, its vector there times its scale."""

    def edit(j):
        def add(y, hook):
            extra = torch.zeros_like(y)
            for s, (key, of_layers) in zip(scale, vectors.items(), strict=True):
                extra[0, key[1]] = extra[0, key[1]] + s * of_layers[j]
            return y + extra

        return add

    return [(name, edit(j)) for j, name in enumerate(clt.cfg.hooks_out)]


def keyed(frame, sae=None):
    layer = [int(name.split(".")[1]) for name in frame.sae]
    keys = zip(layer, frame.position, frame.latent.fillna(-1).astype(int), strict=True)
    return dict(zip(keys, frame.effect, strict=True))


@pytest.mark.parametrize("name", CLTS)
def test_a_cross_layer_latent_counts_at_every_layer_that_it_writes_to(model, name):
    """The gradient by a factor of all that a latent writes, by autograd through the model."""
    clt, ids = CLTS[name](), model.to_tokens(PROMPT)
    vectors = written_by_nodes(model, clt, ids)
    factors = torch.zeros(len(vectors), requires_grad=True)
    value = metric(model.run_with_hooks(ids, fwd_hooks=adding(clt, vectors, factors)))
    (want,) = torch.autograd.grad(value, factors)
    attribution = attribute(model, PROMPT, clt, metric)
    got = keyed(attribution.to_frame())
    assert got.keys() == vectors.keys()
    torch.testing.assert_close(torch.tensor([got[key] for key in vectors]), want, rtol=1e-4, atol=1e-4)
    assert attribution.saes == clt.cfg.hooks_out
    totals = attribution.totals()
    assert totals.sae.tolist() == ["blocks.0.hook_mlp_out to blocks.2.hook_mlp_out"]
    assert totals.latents[0] + totals.errors[0] == pytest.approx(float(want.sum()), rel=1e-3)
    strongest = max(got, key=lambda key: abs(got[key]))
    assert any(key[0] < 2 and key[2] >= 0 for key in got)
    assert attribution.to_frame(1).latent.fillna(-1).tolist() == [strongest[2]]


@pytest.mark.parametrize("name", CLTS)
def test_a_cross_layer_latent_is_ablated_at_every_layer_that_it_writes_to(model, name):
    clt, ids = CLTS[name](), model.to_tokens(PROMPT)
    vectors = written_by_nodes(model, clt, ids)
    ablation = attribute(model, PROMPT, clt, metric, method="ablation", n_nodes=10_000, batch_size=7)
    got = keyed(ablation.to_frame())
    assert got.keys() == vectors.keys()
    for key in [*list(vectors)[::9], next(key for key in vectors if key[2] < 0)]:
        scale = [-1.0 if key == other else 0.0 for other in vectors]
        with torch.no_grad():
            without = metric(model.run_with_hooks(ids, fwd_hooks=adding(clt, vectors, scale)))
        assert got[key] == pytest.approx(ablation.metric - float(without), rel=1e-3, abs=1e-3)
    few = attribute(model, PROMPT, clt, metric, method="ablation", n_nodes=5)
    assert len(few) == 5


def test_integrated_gradients_of_all_layers_are_complete(model):
    clt, ids = cross_layer(skip=True), model.to_tokens(PROMPT)
    attribution = attribute(model, PROMPT, clt, metric, method="integrated", n_steps=48, batch_size=20)
    totals = attribution.totals().iloc[0]
    assert totals.latents + totals.errors == pytest.approx(totals.metric_difference, rel=0.02, abs=0.02)
    cache = capture(model, ids, clt.cfg.hooks)
    zeros = [torch.zeros(7, width) for width in clt.cfg.d_sae]
    outputs = clt.decode(zeros, [cache[name][0].detach() for name in clt.cfg.hooks])

    def replace_all(y, hook, output):
        return torch.cat([y[:, :1], output[None, 1:]], 1)

    hooks = [
        (name, lambda y, hook, output=output: replace_all(y, hook, output))
        for name, output in zip(clt.cfg.hooks_out, outputs, strict=True)
    ]
    baseline = float(metric(model.run_with_hooks(ids, fwd_hooks=hooks)).detach())
    assert totals.metric_difference == pytest.approx(attribution.metric - baseline, abs=1e-4)


@pytest.mark.parametrize("name", CLTS)
def test_edges_within_a_cross_layer_transcoder(model, name):
    """The gradient of a later activation by a factor of all that an earlier latent writes, by autograd."""
    clt, ids = CLTS[name](), model.to_tokens(PROMPT)
    edges = attribute_edges(model, PROMPT, clt, clt, metric=metric, n_targets=4)
    vectors = written_by_nodes(model, clt, ids)
    for (layer, position, latent), some in edges.groupby(["to_layer", "to_position", "to_latent"]):
        factors, seen = torch.zeros(len(vectors), requires_grad=True), {}
        with hook_points.editing(model, {clt.cfg.hooks[layer]: lambda x, seen=seen: seen.update(x=x)}):
            model.run_with_hooks(ids, fwd_hooks=adding(clt, vectors, factors))
        act = clt.encode_layer(seen["x"][0, position], layer)[latent]
        (want,) = torch.autograd.grad(act, factors)
        keys = zip(some.from_layer, some.from_position, some.from_latent.fillna(-1).astype(int), strict=True)
        got = dict(zip(keys, some.effect, strict=True))
        assert got.keys() == {key for key in vectors if key[0] < layer}
        expected = {key: float(w) for key, w in zip(vectors, want, strict=True)}
        assert all(expected[key] == 0 for key in vectors.keys() - got.keys())
        assert list(got.values()) == pytest.approx([expected[key] for key in got], rel=1e-3, abs=1e-4)
    assert edges.groupby(["to_layer", "to_position", "to_latent"]).ngroups == 4
    triple = tuple(edges.iloc[0][["to_layer", "to_position", "to_latent"]])
    again = attribute_edges(model, PROMPT, clt, clt, targets=[triple])
    assert again.effect.abs().max() == pytest.approx(abs(edges.effect[0]), rel=1e-4)


def test_edges_between_a_cross_layer_transcoder_and_others(model):
    """To and from an SAE or transcoder of one layer; of one layer it is the transcoder of that layer."""
    clt, late, early = cross_layer(), tiny_models.sae("blocks.2.hook_resid_post"), tiny_models.sae(EARLY)
    edges = attribute_edges(model, PROMPT, clt, late, n_targets=2)
    assert set(edges.from_layer) == {0, 1, 2}
    assert "to_layer" not in edges
    edges = attribute_edges(model, PROMPT, early, clt, n_targets=5)
    assert set(edges.to_layer) <= {1, 2}
    assert "from_layer" not in edges
    one = transcoders()[0]
    tensors = {name: [getattr(one, name).detach()] for name in ("W_enc", "b_enc", "b_dec")}
    tensors["W_dec"] = [one.W_dec.detach()[:, None]]
    same = cross_layer(layers=1, widths=(40,)).from_tensors(cross_layer(layers=1, widths=(40,)).cfg, tensors)
    a, b = (attribute_edges(model, PROMPT, sae, late, n_targets=2) for sae in (one, same))
    assert b.effect.tolist() == pytest.approx(a.effect.tolist(), rel=1e-4, abs=1e-5)


def test_cross_layer_errors(model):
    clt = cross_layer()
    with pytest.raises(ValueError, match=r"\(layer, position, latent\) triples, with a layer of \[0, 1, 2\]"):
        attribute_edges(model, PROMPT, clt, clt, targets=[(3, 1)])
    with pytest.raises(ValueError, match="does not depend on"):
        attribute_edges(model, PROMPT, clt, clt, targets=[(0, 3, 1)])
    with pytest.raises(ValueError, match="does not depend on"):
        attribute_edges(model, PROMPT, tiny_models.sae("blocks.2.hook_resid_post"), clt)
    hooks = tuple(f"blocks.{i}.hook_resid_post" for i in range(3))
    crosscoder = type(clt).from_tensors(type(clt.cfg)(16, (9, 14, 11), hooks=hooks), clt.tensors())
    with pytest.raises(TypeError, match="is a crosscoder"):
        attribute(model, PROMPT, crosscoder, metric)
