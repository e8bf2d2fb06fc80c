"""Reading prompts and next tokens, against the formulas written out and against what the model then does."""

import pytest
import torch
from circuits.test_attribution import RESID, SAES, Z
from helpers import tiny_models
from sae.test_cross_layer import formula, made

import saewb
from saewb.prompts.next_tokens import next_tokens
from saewb.prompts.prompt_latents import read_in_turn, read_prompt

PROMPT = "w3 w9 w20 w4 w11 w7"
LAST = f"blocks.{tiny_models.LAYERS - 1}.hook_resid_post"


def seen(model, *names):
    """Activations by transformer-lens itself, and the logits."""
    logits, cache = model.run_with_cache(model.to_tokens(PROMPT))
    return logits[0].detach(), *(cache[name].detach() for name in names)


def word(token):
    """Its direction, from the Hugging Face weights: the final norm's folded in, centered over words. In float64."""
    hf = tiny_models.hf_llama()
    rows = hf.lm_head.weight.detach().double()
    return hf.model.norm.weight.detach().double() * (rows[token] - rows.mean(0))


def length(final):
    return final[0].double().square().mean(-1).add(tiny_models.hf_llama().config.rms_norm_eps).sqrt()


def into_stream(sae, rows):
    """From where the SAE writes to the residual stream."""
    if (sae.cfg.hook_out or sae.cfg.hook) != Z:
        return rows
    w_o = tiny_models.hf_llama().model.layers[1].self_attn.o_proj.weight.detach().T.double()
    d_head = tiny_models.D_MODEL // tiny_models.HEADS
    return rows @ (w_o if sae.cfg.head is None else w_o[sae.cfg.head * d_head : (sae.cfg.head + 1) * d_head])


@pytest.fixture(params=SAES)
def sae(request):
    return SAES[request.param]()


def test_rows_are_the_active_latents(model, sae):
    reading = read_prompt(model, PROMPT, sae)
    _, x = seen(model, sae.cfg.hook)
    if x.ndim == 4:
        x = x.flatten(2) if sae.cfg.head is None else x[:, :, sae.cfg.head]
    with torch.no_grad():
        dense = sae.encode(x)[0]
    dense[0] = 0  # the BOS
    rebuilt = torch.zeros_like(dense).index_put((reading.position, reading.latent), reading.activation)
    torch.testing.assert_close(rebuilt, dense, atol=1e-4, rtol=1e-4)
    assert len(reading) == int((dense != 0).sum()) > 0
    assert reading.special.tolist() == [True] + [False] * 6
    i = int(reading.latent[3])
    torch.testing.assert_close(reading.activations(0, i), dense[:, i], atol=1e-4, rtol=1e-4)


def test_logit_effects_are_the_formula(model, sae):
    reading = read_prompt(model, PROMPT, sae, target=9)
    _, x, final = seen(model, sae.cfg.hook, LAST)
    if x.ndim == 4:
        x = x.flatten(2) if sae.cfg.head is None else x[:, :, sae.cfg.head]
    with torch.no_grad():
        latents = sae.encode(x)
        whole = sae.decode(latents, x)
        for row in reading.to_frame(by="logit_effect").iloc[::5].itertuples():
            without = latents.clone()
            without[0, row.position, row.latent] = 0
            written = (whole - sae.decode(without, x))[0, row.position].double()
            effect = into_stream(sae, written) @ word(9) / length(final)[row.position]
            assert row.logit_effect == pytest.approx(float(effect), rel=2e-3, abs=2e-3)


def test_effects_on_the_last_layer_sum_to_the_logit(model):
    sae = tiny_models.sae(LAST)
    reading = read_prompt(model, PROMPT, sae, target=9, skip_special_tokens=False)
    logits, x = seen(model, LAST)
    with torch.no_grad():
        rest = (x - sae.encode(x) @ sae.W_dec)[0].double()  # b_dec and the error
    sums = torch.zeros(7, dtype=torch.float64).index_add_(0, reading.position, reading.logit_effect.double())
    centered = (logits - logits.mean(-1, keepdim=True))[:, 9]
    torch.testing.assert_close((sums + rest @ word(9) / length(x)).float(), centered, atol=2e-3, rtol=1e-3)
    assert float((sums - centered).abs().max()) > 0.1  # so that the rest matters


@pytest.mark.parametrize("skip", [False, True])
def test_latents_of_a_cross_layer_transcoder_count_with_all_they_write(model, skip):
    clt = made(read="blocks.{}.hook_resid_pre", skip=skip)
    reading = read_prompt(model, PROMPT, clt, target=9, skip_special_tokens=False)
    _, *xs, final = seen(model, *clt.cfg.hooks, LAST)
    latents, _ = formula(clt, xs)
    assert reading.saes[1] == "blocks.1.hook_resid_pre => blocks.1.hook_mlp_out"
    assert (reading.d_sae, reading.owner) == ((20, 24, 28), (0, 0, 0))
    for i in range(3):
        own = reading.sae == i
        got = torch.zeros(7, reading.d_sae[i]).index_put(
            (reading.position[own], reading.latent[own]), reading.activation[own]
        )
        torch.testing.assert_close(got.double(), torch.from_numpy(latents[i][0]), atol=1e-3, rtol=1e-3)
        per_unit = clt.W_dec[i].double().sum(1) @ word(9)
        effect = torch.from_numpy(latents[i][0]) * per_unit / length(final)[:, None]
        here = effect[reading.position[own], reading.latent[own]].float()
        torch.testing.assert_close(reading.logit_effect[own], here, atol=2e-3, rtol=2e-3)
    attributed, metric = reading.attributed(9), lambda logits: logits[0, -1].float().log_softmax(-1)[9]
    nodes = saewb.attribute(model, reading.clean_run.ids, clt, metric, skip_special_tokens=False)
    effects = {
        tuple(key): value
        for *key, value in zip(
            nodes.sae.tolist(), nodes.position.tolist(), nodes.latent.tolist(), nodes.effect.tolist(), strict=True
        )
    }
    for *key, value in zip(
        attributed.sae.tolist(),
        attributed.position.tolist(),
        attributed.latent.tolist(),
        attributed.attribution.tolist(),
        strict=True,
    ):
        assert value == pytest.approx(effects[tuple(key)], abs=1e-5)


def test_a_crosscoder_has_no_direct_effects(model):
    clt = made(read="blocks.{}.hook_resid_post", write=None)
    assert len(read_prompt(model, PROMPT, clt)) > 0
    with pytest.raises(ValueError, match="no direct effects on logits are known"):
        read_prompt(model, PROMPT, clt, target=9).to_frame(by="logit_effect")
    both = read_prompt(model, PROMPT, [clt, tiny_models.sae(RESID)], target=9)
    known = ~both.logit_effect.isnan()
    assert set(both.sae[known].tolist()) == {3}
    assert both.to_frame(by="logit_effect").logit_effect.isna().tolist() == sorted((~known).tolist())


@pytest.mark.parametrize("at", [-1, 3])
def test_attribution_is_that_of_attribute(model, sae, at):
    reading = read_prompt(model, PROMPT, sae, target=9, at=at, attribution="gradient")
    attribution = saewb.attribute(model, model.to_tokens(PROMPT), sae, lambda logits: logits[0, at].log_softmax(-1)[9])
    want = {
        (int(p), int(i)): float(e)
        for p, i, e in zip(attribution.position, attribution.latent, attribution.effect, strict=True)
        if i >= 0
    }
    got = zip(reading.position.tolist(), reading.latent.tolist(), reading.attribution.tolist(), strict=True)
    assert len(reading) == len(want)
    for position, latent, effect in got:
        assert effect == pytest.approx(want[position, latent], rel=1e-3, abs=1e-4)
        if position > reading.at:
            assert effect == 0
    assert reading.at == at % 7
    assert float(reading.attribution.abs().max()) > 1e-3


def test_several_at_once_are_those_one_by_one(model):
    several = [SAES["relu"](), SAES["transcoder"](), SAES["topk"]()]
    both = read_prompt(model, PROMPT, several, target=9, attribution="integrated")
    assert both.owner == (0, 1, 2)
    assert read_prompt(model, PROMPT, [several[0]] * 2).owner == (0, 1)
    assert both.saes == (RESID, "blocks.1.hook_resid_mid => blocks.1.hook_mlp_out", f"{RESID} (2)")
    for k, one in enumerate(several):
        alone = read_prompt(model, PROMPT, one, target=9, attribution="integrated").to_frame(by="logit_effect")
        frame = both.to_frame(sae=k, by="logit_effect")
        assert frame.equals(both.to_frame(sae=both.saes[k], by="logit_effect"))
        for column in ("position", "latent"):
            assert frame[column].tolist() == alone[column].tolist()
        for column in ("activation", "logit_effect", "attribution"):
            assert frame[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-3, abs=1e-4)
    assert saewb.attachments(model) == []


def test_long_prompts_are_read_in_parts(model, monkeypatch):
    from saewb.circuits import attribution_nodes

    sae = tiny_models.sae(RESID)
    ids = tiny_models.tokens(1, 60)[0].tolist()
    whole = read_prompt(model, ids, sae, target=9)
    monkeypatch.setattr(attribution_nodes, "TILE", 7 * 40)
    parts = read_prompt(model, ids, sae, target=9)
    assert torch.equal(whole.latent, parts.latent)
    assert torch.equal(whole.position, parts.position)
    torch.testing.assert_close(whole.logit_effect, parts.logit_effect, atol=1e-4, rtol=1e-4)


def test_tables(model):
    reading = read_prompt(model, PROMPT, tiny_models.sae(RESID), target=9)
    here = reading.to_frame(2, by="logit_effect", n=4)
    assert here.columns.tolist() == ["sae", "position", "token", "latent", "activation", "logit_effect"]
    assert set(here.position) == {2}
    assert set(here.token) == {reading.tokens[2]}
    sizes = here.logit_effect.abs().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert len(here) == 4
    own = reading.position == 2
    assert sizes[0] == pytest.approx(float(reading.logit_effect[own].abs().max()))
    assert reading.to_frame(-5).equals(reading.to_frame(2))
    once, largest = reading.to_frame(once=True), reading.to_frame().groupby("latent").activation.max()
    assert sorted(once.latent) == sorted(set(reading.latent.tolist()))
    assert once.set_index("latent").activation.to_dict() == largest.to_dict()
    assert repr(reading) == f"PromptReading({len(reading)} rows on 6 tokens: {RESID}, toward 'w5')"
    assert "<table" in reading._repr_html_()


def test_what_an_index_knows(model):
    several = [tiny_models.sae(RESID), tiny_models.sae(LAST, seed=4)]
    index = saewb.build_index(model, several[0], tiny_models.tokens(8, 9))
    reading = read_prompt(model, PROMPT, several)
    frame = reading.to_frame(by="of_max", index=[index, None])
    own = frame[frame.sae == RESID]
    for row in own.head(20).itertuples():
        latent = index.latent(row.latent)
        assert row.density == pytest.approx(latent.density)
        assert row.of_max == pytest.approx(row.activation / latent.max, rel=1e-4)
    assert own.of_max.tolist() == sorted(own.of_max, reverse=True)
    assert frame[frame.sae == LAST].of_max.isna().all()
    few = reading.to_frame(index=[index, None], max_density=0.3)
    assert few[few.sae == RESID].density.max() <= 0.3
    assert 0 < len(few[few.sae == RESID]) < len(own)
    assert len(few[few.sae == LAST]) == len(frame[frame.sae == LAST])
    with pytest.raises(ValueError, match="1 indexes for 2 SAEs"):
        reading.to_frame(index=index)
    with pytest.raises(ValueError, match="which has 40 latents"):
        reading.to_frame(
            index=[None, saewb.build_index(model, tiny_models.sae(RESID, d_sae=9), tiny_models.tokens(8, 9))]
        )
    with pytest.raises(ValueError, match="no of_max"):
        reading.to_frame(by="of_max")


def test_nothing_to_read(model):
    reading = read_prompt(
        model, torch.tensor([tiny_models.BOS]), tiny_models.sae(RESID), target=9, attribution="gradient"
    )
    assert len(reading) == len(reading.to_frame()) == 0
    assert reading.tokens == ("<bos>",)
    silent = tiny_models.sae(RESID)
    silent.b_enc.data.fill_(-1e6)
    assert len(read_prompt(model, PROMPT, silent, target=9, attribution="gradient")) == 0


def test_what_is_wrong_is_said(model):
    sae = tiny_models.sae(RESID)
    reading = read_prompt(model, PROMPT, sae)
    for wrong, error, says in (
        (lambda: read_prompt(model, [], sae), ValueError, "want: one text at a time"),
        (lambda: read_prompt(model, 3, sae), TypeError, "got a int as prompt"),
        (lambda: read_prompt(model, tiny_models.tokens(2, 5), sae), ValueError, "shape \\(2, 5\\)"),
        (lambda: read_prompt(model, [4] * 65, sae), ValueError, "65 tokens; .* takes 64 at most"),
        (lambda: read_prompt(model, "w3 " * 70, sae), ValueError, "71 tokens; .* takes 64 at most"),
        (lambda: next_tokens(model, "w3 " * 70, sae), ValueError, "71 tokens; .* takes 64 at most"),
        (lambda: read_prompt(model, PROMPT, []), ValueError, "got no SAE"),
        (lambda: read_prompt(model, PROMPT, "sae"), TypeError, "got str as an SAE"),
        (lambda: read_prompt(model, PROMPT, tiny_models.sae("blocks.1.hook_resid_pots")), ValueError, "near: blocks.1"),
        (lambda: read_prompt(model, PROMPT, sae, attribution="gradient"), ValueError, "want: a target"),
        (lambda: read_prompt(model, PROMPT, sae, target="w3 w4"), ValueError, "is 2 tokens"),
        (lambda: read_prompt(model, PROMPT, sae, target=9, at=7, attribution="gradient"), ValueError, "0 to 6"),
        (lambda: reading.to_frame(7), ValueError, "no position 7"),
        (lambda: reading.to_frame(sae=1), ValueError, "no sae 1"),
        (lambda: reading.to_frame(sae="blocks.1.hook_resid"), ValueError, f"near: {RESID}"),
        (lambda: reading.to_frame(by="activaton"), ValueError, "near: activation"),
        (lambda: reading.to_frame(by="logit_effect"), ValueError, "reading.toward"),
        (lambda: reading.activations(0, 40), ValueError, "0 to 39"),
        (lambda: next_tokens(model, PROMPT, n=0), ValueError, "1 or more"),
        (lambda: next_tokens(model, PROMPT).to_frame(7), ValueError, "0 to 6"),
    ):
        with pytest.raises(error, match=says):
            wrong()


@pytest.mark.parametrize("skip", [True, False])
def test_next_tokens_are_those_of_the_model_and_of_it_with_saes(model, skip):
    saes = [tiny_models.sae(RESID), tiny_models.sae(LAST)]
    result = next_tokens(model, PROMPT, saes, n=4, skip_special_tokens=skip)
    ids = model.to_tokens(PROMPT)
    with torch.no_grad():
        clean = model(ids)[0].log_softmax(-1)
        with saewb.attach(model, saes, skip_special_tokens=skip):
            changed = model(ids)[0].log_softmax(-1)
    for position in (0, 3, -1):
        frame = result.to_frame(position)
        p, q = clean[position].exp(), changed[position].exp()
        assert set(frame.id) == set(p.topk(4).indices.tolist()) | set(q.topk(4).indices.tolist())
        assert frame.probability.tolist() == pytest.approx(p[frame.id.tolist()].tolist(), rel=1e-4)
        assert frame.with_saes.tolist() == pytest.approx(q[frame.id.tolist()].tolist(), rel=1e-4)
        likeliest = frame[["probability", "with_saes"]].max(axis=1).tolist()
        assert likeliest == sorted(likeliest, reverse=True)
    want = torch.nn.functional.kl_div(changed, clean, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(result.kl, want, atol=1e-4, rtol=1e-3)
    assert float(result.kl.max()) > 0.01
    alone = next_tokens(model, PROMPT, n=4)
    assert alone.kl is alone.log_prob_with_saes is None
    assert alone.to_frame().columns.tolist() == ["token", "id", "probability"]
    same = next_tokens(model, PROMPT, saes, n=4, error_term=True)
    assert float(same.kl.max()) < 1e-5
    assert "<table" in same._repr_html_()
    assert repr(alone).startswith("NextTokens(7 positions; after the last 'w")
    assert next_tokens(model, PROMPT, n=99).ids.shape == (7, tiny_models.VOCAB)


@pytest.mark.parametrize("skip", [True, False])
def test_in_turn_it_is_the_same_of_two_passes(model, skip):
    saes, passes = [tiny_models.sae(RESID), tiny_models.sae(LAST)], []
    with saewb.models.hook_points.editing(model, {LAST: lambda x: passes.append(1)}):
        steps = read_in_turn(model, PROMPT, saes, saes, n=4, skip_special_tokens=skip)
        reading, alone = next(steps)
        assert len(passes) == 1
        ((nothing, compared),) = steps
    assert (nothing, len(passes)) == (None, 2)
    want = read_prompt(model, PROMPT, saes, skip_special_tokens=skip)
    for name in ("position", "latent", "activation", "sae"):
        assert torch.equal(getattr(reading, name), getattr(want, name))
    assert reading.toward("w5").to_frame().equals(want.toward("w5").to_frame())
    assert alone.to_frame(3).equals(next_tokens(model, PROMPT, n=4).to_frame(3))
    both = next_tokens(model, PROMPT, saes, n=4, skip_special_tokens=skip)
    assert torch.equal(compared.kl, both.kl)
    assert compared.to_frame(3).equals(both.to_frame(3))
    assert len(list(read_in_turn(model, PROMPT, saes))) == 1  # nothing to compare


def test_they_see_what_is_attached(model):
    """Both are about the model as it is."""
    sae = tiny_models.sae("blocks.0.hook_resid_post")
    before = read_prompt(model, PROMPT, tiny_models.sae(RESID))
    with saewb.attach(model, sae, skip_special_tokens=True):
        after, words = read_prompt(model, PROMPT, tiny_models.sae(RESID)), next_tokens(model, PROMPT, n=3)
    assert not torch.equal(before.activation, after.activation)
    torch.testing.assert_close(words.log_prob, next_tokens(model, PROMPT, sae, n=3).log_prob_with_saes[:, 3:])


def test_the_model_is_read_in_eval_mode_and_left_in_its_own(model):
    model.train()
    try:
        read_prompt(model, PROMPT, tiny_models.sae(RESID), target=9, attribution="gradient")
        next_tokens(model, PROMPT, tiny_models.sae(RESID))
        assert model.training
    finally:
        model.eval()
