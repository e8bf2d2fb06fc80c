"""Attribution against what really happens: small changes, ablations, and the whole way from decode(0)."""

import math

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.circuits.attribution import attribute, attribute_edges
from saewb.interventions.steering import steer
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
