"""Steering scores: equal to the reference's steps one latent at a time, planted directions, controls, errors."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.features.top_contexts import EMPTY
from saewb.prompts.steering_scores import random_directions, steering_scores

HOOK = "blocks.2.hook_resid_post"
PROMPT = "From my experience,"


def transcribed(model, sae, prompt, latents, k):
    """Arad et al.'s output score (src/output_score.py, sae_utils.py, utils.py), one full pass for each latent."""
    ids, result = model.to_tokens(prompt), []
    lens = model.unembed(model.ln_final(sae.W_dec[None]))[0].softmax(-1)
    clean = model(ids)[0, -1].log_softmax(-1)
    for i in latents:

        def amplify(x, hook, i=i):
            acts = sae.encode(x)
            error = x - sae.decode(acts)
            acts[:, -1, i] += 10 * acts[:, -1].max()
            return sae.decode(acts) + error

        log_p = model.run_with_hooks(ids, fwd_hooks=[(sae.cfg.hook, amplify)])[0, -1].log_softmax(-1)
        words = lens[i].topk(20).indices.tolist()
        order = log_p.argsort(descending=True)
        ranks = [(order == word).nonzero().item() for word in words]
        score = (1 - min(ranks) / len(log_p)) * float(log_p[words].exp().max())
        confidence = [-float(x.topk(k).values.mean()) for x in (log_p, clean)]
        result.append((min(ranks), score, confidence[0] - confidence[1], float((log_p.exp() * (log_p - clean)).sum())))
    return result


@torch.no_grad()
def test_scores_are_the_references_with_exact_ranks():
    model, sae = saewb.load_model("tiny", device="cpu", dtype=torch.float64), saewb.load_sae("tiny").double()
    latents = list(range(0, 1024, 100))
    got = steering_scores(model, sae, latents, PROMPT, k=7, n_random=2, batch_size=5, progress=False)
    want = transcribed(model, sae, PROMPT, latents, 7)
    assert got["rank"].tolist() == [rank for rank, *_ in want]
    for column, name in enumerate(("output_score", "delta_confidence", "kl"), 1):
        torch.testing.assert_close(
            torch.tensor(got[name].to_numpy()).double(),
            torch.tensor([row[column] for row in want]).double(),
            rtol=1e-4,
            atol=1e-5,
            msg=name,
        )


def planted():
    """A model whose logits are far apart, and whose final norm drops coordinate 3."""
    model = tiny_models.new_bridge()
    model.original_model.lm_head.weight.data.mul_(10)
    model.original_model.model.norm.weight.data[3] = 0
    return model


def test_a_column_of_the_unembedding_steers_and_what_the_norm_drops_does_not():
    model = planted()
    word = 9
    column = saewb.models.unembed.unembedding(model)[:, word]
    vectors = {"word": column, "dropped": torch.eye(16)[3] * column.norm()}
    sae = saewb.directions(vectors, HOOK)
    scores = steering_scores(model, sae, None, "w1 w2", strength=1e3, n_random=32, progress=False)
    assert scores.output_score[0] > 0.99
    assert (scores["rank"][0], scores.word[0]) == (0, "w5")
    assert scores.above_random[0] > 0.9
    assert scores.output_score[1] < 1.1 / 32  # all words alike
    assert scores.delta_confidence[0] > 0 > scores.delta_confidence[1]
    assert 1.1 / 32 < scores.output_score_random[0] < 0.99
    assert scores.n_random.tolist() == [32, 32]


def test_batches_do_not_matter_and_a_random_sae_scores_as_random_directions(model):
    sae = tiny_models.sae(HOOK, d_sae=64)
    one = steering_scores(model, sae, None, "w1 w2 w3", n_random=100, batch_size=64, progress=False)
    other = steering_scores(model, sae, None, "w1 w2 w3", n_random=100, batch_size=7, progress=False)
    torch.testing.assert_close(torch.tensor(one.output_score), torch.tensor(other.output_score))
    some = steering_scores(model, sae, [5, 3], "w1 w2 w3", n_random=3, progress=False)
    assert some.latent.tolist() == [5, 3]
    torch.testing.assert_close(torch.tensor(some.kl), torch.tensor(one.kl[[5, 3]].to_numpy()))
    assert 0.3 < one.above_random.mean() < 0.7
    assert len(steering_scores(model, sae, [1], [1], strength=3.0, n_random=1, progress=False)) == 1  # one token


def test_input_scores_count_strongest_tokens_among_the_words():
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:12]], progress=False)
    latents = [748, 972, 4, 385]
    got = steering_scores(model, sae, latents, PROMPT, index, n_random=4, progress=False)
    w = saewb.models.unembed.unembedding(model)
    for row, i in enumerate(latents):
        words = set((sae.W_dec[i] @ w).topk(20).indices.tolist())
        filled = index.tensors["top.order"][i] != EMPTY
        peaks = index.tensors["top.tokens"][i][filled, index.info.before].tolist()
        assert got.n_contexts[row] == len(peaks)
        if len(peaks) < 10:
            assert got.input_score.isna()[row]
        else:
            assert got.input_score[row] == pytest.approx(sum(p in words for p in peaks) / len(peaks))
            assert got.input_low[row] <= got.input_score[row] <= got.input_high[row]
    assert got.input_score.notna().any()
    assert (got.input_score_random.dropna() < 0.3).all()


def test_random_directions_have_the_norms():
    rows = torch.randn(5, 8) * torch.arange(1, 6)[:, None]
    random = random_directions(rows, 50, seed=1)
    distance = (random.norm(dim=1)[:, None] - rows.norm(dim=1)).abs().min(1).values
    assert distance.max() < 1e-4
    assert torch.equal(random, random_directions(rows, 50, seed=1))


def test_what_is_refused(model):
    sae = tiny_models.sae(HOOK)
    with pytest.raises(ValueError, match="no latents"):
        steering_scores(model, sae, [], "w1")
    with pytest.raises(ValueError, match="n_random=0"):
        steering_scores(model, sae, [1], "w1", n_random=0)
    with pytest.raises(ValueError, match=r"no latents \[40\]"):
        steering_scores(model, sae, [40], "w1")
    silent = tiny_models.sae(HOOK)
    silent.b_enc.data.fill_(-1e6)
    with pytest.raises(ValueError, match="largest activation at the last token.*\n.*\n.*strength=20"):
        steering_scores(model, silent, [1], "w1")
    with pytest.raises(ValueError, match="no logit effects"):
        steering_scores(model, tiny_models.sae("blocks.1.attn.hook_q"), [1], "w1")
    with saewb.steer(model, sae, {1: 2.0}), pytest.raises(ValueError, match="not its own"):
        steering_scores(model, sae, [1], "w1")
