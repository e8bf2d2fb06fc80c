"""Sweeps of steering strengths: figures by their formulas, exact zeros, controls, choice by hand, interrupts."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.prompts import steering_sweep as sweeps
from saewb.prompts.steered_texts import repetition, steered_text, write_rows
from saewb.prompts.steering_sweep import Sweep, steering_sweep

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8 w1 w2"]
HOW = {"n_new_tokens": 6, "progress": False}


def at(sweep, arm, strength=None):
    rows = sweep.samples[sweep.samples.arm == arm]
    return rows if strength is None else rows[np.isclose(rows.strength, strength)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_0_is_the_model_bit_for_bit(model, temperature):
    sweep = steering_sweep(model, tiny_models.sae(HOOK), 3, PROMPTS, [0, 5, 20], temperature=temperature, **HOW)
    for arm in ("latent", "random direction", "prompting", "unsteered"):
        rows = at(sweep, arm) if arm in ("prompting", "unsteered") else at(sweep, arm, 0)
        assert len(rows) == len(PROMPTS)
        if arm != "prompting":
            assert rows.kl.tolist() == [0.0] * 4
            assert rows.fluency.tolist() == [0.0] * 4
            assert rows.text.tolist() == at(sweep, "unsteered").text.tolist()
    assert (at(sweep, "latent", 20).kl > 0).all()


@torch.no_grad()
def test_figures_are_their_formulas_one_text_at_a_time(model):
    sae, value = tiny_models.sae(HOOK), 9.0
    sweep = steering_sweep(model, sae, 3, PROMPTS, [value, 2.0], batch_rows=3, **HOW)
    w = saewb.models.unembed.unembedding(model)
    words = set((sae.W_dec[3] @ w).topk(20).indices.tolist())
    for p, prompt in enumerate(PROMPTS):
        ids = model.to_tokens(prompt)
        own, steered = (
            [t.token_id for t in saewb.generate_tokens(model, ids, f, max_new_tokens=6)]
            for f in (None, lambda: saewb.steer(model, sae, {3: value}, skip_special_tokens=True))
        )
        row = at(sweep, "latent", value).iloc[p]
        text = torch.cat([ids, torch.tensor([steered])], 1)
        clean = torch.cat([ids, torch.tensor([own])], 1)
        with saewb.steer(model, sae, {3: value}, skip_special_tokens=True):
            log_p = model(clean).double().log_softmax(-1)[0, ids.shape[1] - 1 :]
        log_q = model(clean).double().log_softmax(-1)[0, ids.shape[1] - 1 :]
        assert row.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
        nll = []
        for tokens in (text, clean):
            log = model(tokens).double().log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
            nll.append(-float(log[ids.shape[1] - 1 :].mean()))
        assert row.fluency == pytest.approx(nll[0] - nll[1], abs=1e-4)
        acts = {}
        model.run_with_hooks(text, fwd_hooks=[(HOOK, lambda x, hook, acts=acts: acts.update(x=x) or None)])
        fires = sae.encode(acts["x"])[0, ids.shape[1] :, 3] > 0
        assert row.concept_latent == pytest.approx(float(fires.float().mean()))
        assert row.concept_words == pytest.approx(sum(i in words for i in steered) / len(steered))
        same = pytest.approx(repetition(steered), nan_ok=True)
        assert row.repetition == same
        figures = steered_text(
            model, prompt, own, steered, lambda: saewb.steer(model, sae, {3: value}, skip_special_tokens=True)
        )
        assert (figures.kl, figures.fluency) == pytest.approx((row.kl, row.fluency), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", ["clamp", "scale"])
def test_clamp_and_scale_beside_an_unsteered_row(model, how):
    sae = tiny_models.sae(HOOK)
    sweep = steering_sweep(model, sae, 3, PROMPTS[:2], [1.0, 8.0], how, **HOW)
    assert at(sweep, "unsteered").kl.tolist() == [0.0, 0.0]
    if how == "scale":  # a factor of 1 changes nothing
        assert at(sweep, "latent", 1).kl.max() < 1e-9
        with pytest.raises(ValueError, match="needs strengths"):
            steering_sweep(model, sae, 3, PROMPTS, how="scale", **HOW)
    row = at(sweep, "latent", 8).iloc[0]
    steer = lambda: saewb.steer(model, sae, {3: 8.0}, how=how, skip_special_tokens=True)  # noqa: E731
    texts = [[t.token_id for t in saewb.generate_tokens(model, PROMPTS[0], f, max_new_tokens=6)] for f in (None, steer)]
    assert steered_text(model, PROMPTS[0], *texts, steer).kl == pytest.approx(row.kl, rel=1e-3)


def test_a_vector_directions_and_a_difference_of_means(model):
    sae = tiny_models.sae(HOOK)
    v = sae.W_dec[3].detach()
    strengths = [3.0, 6.0]
    by_latent = steering_sweep(model, sae, 3, PROMPTS[:2], strengths, controls=[], **HOW)
    by_vector = steering_sweep(model, sae, v, PROMPTS[:2], strengths, controls=[], **HOW)
    named = saewb.directions({"mine": v}, HOOK)
    by_direction = steering_sweep(model, named, 0, PROMPTS[:2], strengths, controls=[], **HOW)
    for other in (by_vector, by_direction):
        assert other.samples.kl.to_numpy() == pytest.approx(by_latent.samples.kl.to_numpy(), rel=1e-4)
    assert (by_vector.about["name"], by_direction.about["name"]) == ("vector", "mine")
    examples = (["w1 w2", "w3 w1"], ["w9 w8", "w7 w9"])
    sweep = steering_sweep(model, sae, 3, PROMPTS[:2], strengths, examples=examples, **HOW)
    mean = saewb.difference_of_means(model, *examples, HOOK, progress=False).W_dec[0]
    mean = mean / mean.norm() * v.norm()
    control = steering_sweep(model, sae, mean, PROMPTS[:2], strengths, controls=[], **HOW)
    assert at(sweep, "difference of means").kl.tolist() == pytest.approx(at(control, "latent").kl.tolist(), rel=1e-3)


def test_default_strengths_units_and_a_latent_of_like_density():
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:8]], progress=False)
    sweep = steering_sweep(model, sae, 972, ["It is a", "She was"], index=index, n_new_tokens=3, progress=False)
    table = sweep.to_frame()
    of_latent = table[table.arm == "latent"]
    assert of_latent.of_norm.tolist() == pytest.approx(list(sweeps.MULTIPLES))
    norms = []
    for prompt in ("It is a", "She was"):
        _, cache = model.run_with_cache(prompt, names_filter=[sae.cfg.hook])
        norms += cache[sae.cfg.hook][0, 1:].norm(dim=-1).tolist()
    assert sweep.about["median_norm"] == pytest.approx(float(torch.tensor(norms).median()), rel=1e-4)
    assert of_latent.of_max.tolist() == pytest.approx((of_latent.strength / float(index.largest[972])).tolist())
    arms = {"latent", "unsteered", "random direction", "latent of like density", "prompting"}
    assert set(table.arm) == arms
    assert table[[f"{name}_n" for name in sweep.figures]].notna().all().all()
    assert set(sweep.choice.arm) == arms
    assert "latent of like density" in repr(sweep)
    assert "<table>" in sweep._repr_html_()
    assert len(sweep.plot().data) == len(arms) * len(sweep.figures)


def test_a_judge_rates_and_the_strength_is_chosen_on_the_other_half(model, tmp_path):
    sae, asked = tiny_models.sae(HOOK), []
    ratings = {"concept": 2, "instruction": 1, "fluent": 2}

    def answer(request):
        name = re.search(r"express the concept|continue or answer|fluent\?", request.messages[0][1])[0]
        asked.append(request)
        key = {"express the concept": "concept", "continue or answer": "instruction"}.get(name, "fluent")
        return f"So be it. Rating: [[{ratings[key]}]]"

    judge = saewb.explanations.Scripted(answer, cache=tmp_path)
    run = lambda **how: steering_sweep(  # noqa: E731
        model, sae, 3, PROMPTS, [2.0, 9.0], judge=judge, concept="w9", controls=["random direction"], **HOW, **how
    )
    sweep = run()
    assert sweep.samples.harmonic.tolist() == pytest.approx([3 / (1 / 2 + 1 + 1 / 2)] * len(sweep.samples))
    n = len(asked)
    assert n <= 3 * len(sweep.samples)
    run()
    assert len(asked) == n  # all answers were cached
    with pytest.raises(ValueError, match="budget_tokens is 10"):
        steering_sweep(model, sae, 3, PROMPTS, [1.0], judge=judge, concept="w8", budget_tokens=10, **HOW)
    with pytest.raises(ValueError, match="a judge has to know"):
        steering_sweep(model, sae, 3, [[1, 5]], [1.0], judge=judge, concept="w8", **HOW)


def by_hand(harmonic):
    """A sweep of six prompts, three of which choose, with these harmonic means by strength and prompt."""
    rows = [
        {"prompt": p, "half": "choose" if p < 3 else "report", "arm": "latent", "strength": s, "kl": s * (p + 1) / 7,
         "fluency": s / 10, "repetition": math.nan, "concept_latent": 0.0, "concept_words": 0.0, "harmonic": h}
        for s, values in harmonic.items() for p, h in enumerate(values)
    ]  # fmt: skip
    clean = [{**row, "arm": "unsteered", "strength": math.nan, "kl": 0.0, "fluency": 0.0} for row in rows[:6]]
    about = {"name": "x", "hook": "h", "how": "add", "median_norm": 10.0, "direction_norm": 2.0, "largest": 4.0}
    return Sweep(pd.DataFrame([*rows, *clean]), {**about, "judge": "j"}, 6, 1.0)


def test_choice_and_matching_by_hand():
    sweep = by_hand({1.0: [2, 2, math.nan, 0, 0, 0], 2.0: [1, 1, 1, 2, 2, 1], 4.0: [0, 0, 0, 2, 2, 2]})
    chosen = sweep.choice.iloc[0]
    assert (chosen.strength, chosen.harmonic, chosen.harmonic_n, chosen.half) == (1.0, 0.0, 3, "report")
    assert (chosen.of_norm, chosen.of_max) == (0.2, 0.25)
    assert math.isnan(chosen.repetition)
    assert chosen.repetition_n == 0
    matched = sweep.matched(kl=1.5).iloc[0]  # mean KL is s / 2: 1 at 2, 2 at 4
    assert (matched.strength, matched.kl, matched.fluency) == pytest.approx((3.0, 1.5, 0.3))
    x = np.array([p + 1 for p in range(6)]) * 3 / 7  # of each prompt, half way between 2 and 4
    half = 2.5705818 * x.std(ddof=1) / math.sqrt(6)
    assert (matched.kl_low, matched.kl_n) == pytest.approx((x.mean() - half, 6))
    assert sweep.matched(kl=0.25).strength[0] == pytest.approx(0.5)  # between no steering and the smallest
    assert math.isnan(sweep.matched(kl=9.0).strength[0])
    interval = sweep.to_frame().query("strength == 2").iloc[0]
    x = np.array([p + 1 for p in range(6)]) * 2 / 7
    half = 2.5705818 * x.std(ddof=1) / math.sqrt(6)  # Student's t with 5 degrees of freedom
    assert (interval.kl_low, interval.kl_high) == pytest.approx((x.mean() - half, x.mean() + half))


def test_without_a_judge_the_fluent_ones_are_chosen_from():
    rows = pd.DataFrame(
        {"fluency": [0.1, 0.9, 3.0], "concept_latent": [0.1, 0.5, 1.0], "concept_words": [0.0, 0.5, 1.0]}
    )
    assert sweeps._best(rows, 1.0) == 1
    assert sweeps._best(rows, 5.0) == 2
    assert sweeps._best(rows, 0.05) == 0


def test_halves_have_at_least_one_prompt_each():
    assert sweeps._halves(1, 0.5, 0) == sweeps._halves(3, 0.0, 0)[:1] == ["both"]
    for n in range(2, 9):
        for share in (0.1, 0.5, 0.9):
            halves = sweeps._halves(n, share, seed=n)
            assert set(halves) == {"choose", "report"}
    assert sweeps._halves(10, 0.3, 0).count("report") == 3


def test_an_interrupt_returns_what_is_done(model, monkeypatch):
    sae, calls, real = tiny_models.sae(HOOK), [], sweeps.write_rows

    def interrupted(*args, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(sweeps, "write_rows", interrupted)
    sweep = steering_sweep(model, sae, 3, PROMPTS, [2.0, 4.0], controls=[], **HOW)
    assert not sweep.is_complete
    assert sorted(set(sweep.samples.prompt)) == [0, 1]
    assert "2 of 4 (stopped) prompts" in repr(sweep)
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        steering_sweep(model, sae, 3, PROMPTS, [2.0], controls=[], **HOW)


def test_rows_write_what_each_would_alone_and_end_where_a_text_ends(model):
    sae, ids = tiny_models.sae(HOOK), model.to_tokens("w1 w2")
    values = [None, 4.0, 30.0]
    rows = write_rows(model, ids, 3, lambda: saewb.steer(model, sae, {3: values}), max_new_tokens=12)
    for value, row in zip(values, rows, strict=True):
        steer = None if value is None else lambda value=value: saewb.steer(model, sae, {3: value})
        assert row == [t.token_id for t in saewb.generate_tokens(model, ids, steer, max_new_tokens=12)]


def test_what_is_refused(model):
    sae = tiny_models.sae(HOOK)
    with pytest.raises(TypeError, match="no list of prompts"):
        steering_sweep(model, sae, 3, "w1 w2")
    with pytest.raises(ValueError, match="near: prompting"):
        steering_sweep(model, sae, 3, PROMPTS, controls=["promting"], **HOW)
    with pytest.raises(ValueError, match="index=saewb.build_index"):
        steering_sweep(model, sae, 3, PROMPTS, controls=["latent of like density"], **HOW)
    with pytest.raises(ValueError, match="each once"):
        steering_sweep(model, sae, 3, PROMPTS, [1.0, 1.0], **HOW)
    with pytest.raises(ValueError, match="in all; small takes 64 at most|takes 64 at most"):
        steering_sweep(model, sae, 3, PROMPTS, [1.0], n_new_tokens=64)
    with pytest.raises(ValueError, match="a vector of shape"):
        steering_sweep(model, sae, torch.ones(3), PROMPTS, [1.0], **HOW)
