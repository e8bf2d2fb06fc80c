"""Absorption, SCR and TPP on a model and on planted texts; meta-SAEs; published results; comparisons."""

import json
import random

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers.transformer_lens_3 import tiny_bridge

import saewb
from saewb.evals import absorption, comparison, meta_sae, scr_tpp, spelling
from saewb.evals.published import read_saebench
from saewb.probing.logistic import balancing_weights, fit_logistic
from saewb.probing.pooling import Pooled
from saewb.sae.sae import SAE, SAEConfig


def capital(word):
    return "capital" if word.strip()[0].isupper() else "small"


@pytest.fixture(scope="module")
def tiny():
    return tiny_bridge(), saewb.load_sae("tiny")


# -- words and prompts -------------------------------------------------------------------------------------------------


def test_prompts_are_saebenchs_and_no_example_is_the_word():
    words = [f" w{i}" for i in range(12)]
    made = spelling.prompts(words, words, lambda word: word.strip()[0].upper(), spelling.SPELLING, 3, random.Random(0))
    expected = random.Random(0)
    for word, (before, after) in zip(words, made, strict=True):
        while word in (lines := expected.sample(words, 3)):
            pass
        icl = "\n".join(f"{line} has the first letter: W" for line in lines)
        assert before + after == f"\n{icl}\n{word} has the first letter:"
        assert before.endswith(word)
    with pytest.raises(ValueError, match="no 2 words without"):
        spelling.prompts(["a"], ["a", "b"], str, "{word}", 2, random.Random(0))


def test_the_token_that_is_read_is_the_last_one_of_the_word(tiny):
    model, _ = tiny
    texts = spelling.prompts([" river", " Wikipedia"], [" city", " year"], str, spelling.SPELLING, 1, random.Random(0))
    tokens = spelling.at_the_word(model, texts)
    for (before, _), ids, mask in zip(texts, tokens.ids, tokens.masks, strict=True):
        assert int(mask.sum()) == 1
        assert model.tokenizer.decode(ids[1 : int(mask.nonzero()) + 1]) == before
    assert len(tokens.ids[0]) - 1 - int(tokens.masks[0].nonzero()) == len(
        model.tokenizer(" has the first letter:", add_special_tokens=False)["input_ids"]
    )


def test_absorption_in_a_model_with_its_control_and_without_words_given(tiny):
    model, sae = tiny
    result = saewb.absorption(model, {"tiny": sae}, labels=capital, max_words=300, max_k=2, progress=False)
    again = saewb.absorption(model, {"tiny": sae}, labels=capital, max_words=300, max_k=2, progress=False)
    assert result.to_frame().equals(again.to_frame())  # seeded
    table, words = result.to_frame(), result.by_word
    assert set(table.sae) == {"tiny", "random (tiny)"}
    assert table.probe_f1.min() > 0.6
    for (name, of), part in words.groupby(["sae", "class"]):
        row = table[(table.sae == name) & (table["class"] == of)].iloc[0]
        assert row.n == len(part)
        assert row.fraction == pytest.approx(part.fraction.mean())
        assert row.full == pytest.approx(part.full.mean())
        assert all(capital(word) == of for word in part.word)
    assert "k-sparse F1" in repr(result)
    assert "random" in str(result)
    assert "<table" in result._repr_html_()
    train_forms = {word.strip().lower() for word in words.word}
    assert len(train_forms) > 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"like": "saebenhc"}, "near: saebench"),
        ({"labels": "first_leter"}, "near: first_letter"),
        ({"labels": {" a": 0, " b": 1}}, "classes of 5 words or more"),
        ({"max_k": 0}, "max_k=0"),
        ({"template": "the word"}, "one {word}"),
        ({"words": [" river"] * 3}, "classes of 5 words"),
    ],
)
def test_what_absorption_refuses(tiny, arguments, says):
    with pytest.raises(ValueError, match=says):
        saewb.absorption(*tiny, progress=False, **arguments)


def test_transcoders_and_texts_that_are_no_lists_are_refused(tiny):
    model, _ = tiny
    transcoder = saewb.tiny.transcoders()[0]
    with pytest.raises(ValueError, match="is a transcoder"):
        saewb.absorption(model, transcoder, progress=False)
    with pytest.raises(ValueError, match="is a transcoder"):
        saewb.scr_tpp(model, transcoder, ["a"] * 3, [0, 1, 2], progress=False)
    with pytest.raises(TypeError, match="one string"):
        saewb.absorption(*tiny, words="river", progress=False)


def test_signed_latents_are_chosen_by_the_size_of_their_weight():
    """A latent that is negative on the class writes its direction by a row that points the other way."""
    rng = np.random.default_rng(0)
    y = torch.arange(200) % 2
    x = torch.from_numpy(rng.normal(size=(200, 8)) * 0.2).float()
    x[:, 0] += 3.0 * y
    acts = torch.from_numpy(rng.normal(size=(200, 4)) * 0.05).float()
    acts[:, 2] = -3.0 * y
    W_dec = torch.eye(4, 8)
    W_dec[2] = -torch.eye(8)[0]
    weights = {"W_enc": torch.zeros(8, 4), "b_enc": torch.zeros(4), "W_dec": W_dec, "b_dec": torch.zeros(8)}
    sae = SAE.from_tensors(SAEConfig(8, 4, activation="abstopk", k=4), weights)
    data = absorption._WordData([str(i) for i in range(200)], y, ["no", "yes"], 150)
    one = [("abs", sae, Pooled(scipy.sparse.csr_array(acts.numpy()), x), "here")]
    measured = absorption._measured(one, data, absorption.AbsorptionSettings(max_k=2), False, 0)
    row = absorption._result(measured, data, absorption.AbsorptionSettings(max_k=2), None).table.iloc[1]
    assert (row.latents[0], row.f1_1, row.fraction, row.full) == (2, 1.0, 0.0, 0.0)


# -- TPP and SCR -------------------------------------------------------------------------------------------------------


def planted(y, directions, d=12, seed=0, noise=0.3):
    """Averaged activations of texts with a direction per class, and an SAE whose latents are those directions."""
    rng = np.random.default_rng(seed)
    size = rng.exponential(1.0, (len(y), len(directions))) * 0.2 + 2.0 * np.stack(
        [y == c for c in range(len(directions))], 1
    )
    x = size @ directions + noise * rng.normal(size=(len(y), d))
    weights = {"W_enc": torch.zeros(d, d), "b_enc": torch.zeros(d), "b_dec": torch.zeros(d)}
    weights["W_dec"] = torch.eye(d)
    latents = np.zeros((len(y), d))
    latents[:, : len(directions)] = size
    sae = SAE.from_tensors(SAEConfig(d, d), weights)
    train = np.arange(len(y)) < 2 * len(y) // 3
    index = np.arange(len(y))
    pooled = Pooled(scipy.sparse.csr_array(latents), torch.from_numpy(x).float())
    return scr_tpp._Texts(pooled, sae, y, index[train], index[~train], np.zeros(len(y)))


def test_tpp_of_planted_classes_is_the_drop_to_chance_and_no_other_class_is_hurt():
    y = np.arange(360) % 4
    table = scr_tpp._tpp(planted(y, np.eye(4, 12)), list("abcd"), (1, 2), None, True)
    for _, row in table[table.n == 1].iterrows():
        assert row.clean_accuracy > 0.99
        assert row.intended == pytest.approx(0.5, abs=0.02)  # no positives are told any more
        assert abs(row.unintended) < 0.02
        assert row.score == pytest.approx(row.intended - row.unintended)
        assert row.low <= row.score <= row.high
        assert row.n_test == 120
    assert table[table["class"].isna()].n.tolist() == [1, 2]


def test_scr_of_a_planted_correlation_is_removed_by_its_latents():
    """The label and the spurious label go up or down a direction each, and each has two latents, one for up."""
    rng = np.random.default_rng(1)
    kinds = rng.permutation(np.repeat([0, 1, 2, 3], 120))
    up = np.stack([kinds // 2, kinds % 2], 1)
    texts = planted(kinds, np.zeros((4, 12)), seed=2)
    size = np.concatenate([up * [0.4, 2.0], (1 - up) * [0.4, 2.0]], 1)  # the spurious one is easier to see
    texts.W_dec = torch.eye(12)
    texts.W_dec[2:4] = -torch.eye(12)[:2]
    latents = np.zeros((len(kinds), 12))
    latents[:, :4] = size
    texts.latents = scipy.sparse.csr_array(latents)
    texts.x = (
        torch.from_numpy(latents).float() @ texts.W_dec + 0.3 * torch.from_numpy(rng.normal(size=(480, 12))).float()
    )
    table = scr_tpp._scr(texts, (1, 2), None, 0)
    row = table[(table["class"] == "label") & (table.n == 2)].iloc[0]
    assert row.biased_accuracy < row.clean_accuracy - 0.1  # it went by the spurious one
    gained, gap = row.ablated_accuracy - row.biased_accuracy, row.clean_accuracy - row.biased_accuracy
    assert row.score == pytest.approx(gained / gap)
    assert row.score > 0.2  # what is left of the probe is the little that it knew of the label
    assert 0 < row.low < row.score < row.high
    headline = table[table["class"].isna()].set_index("n")
    assert headline.score[2] == row.score  # the direction in which the biased probe is worse
    assert scr_tpp.scr_score(0.9, 0.8999, 0.1) == 0


def test_ablating_averages_is_averaging_ablated_tokens():
    """x' = x - sum a_i W_dec[i] on every token, then the mean: what the pooled latents give."""
    rng = np.random.default_rng(3)
    x, acts = rng.normal(size=(5, 7, 6)), rng.exponential(1.0, (5, 7, 9))
    W_dec, w = rng.normal(size=(9, 6)), rng.normal(size=6)
    weights = {"W_enc": np.zeros((6, 9)), "b_enc": np.zeros(9), "W_dec": W_dec, "b_dec": np.zeros(6)}
    sae = SAE.from_tensors(SAEConfig(6, 9), {name: torch.from_numpy(value).float() for name, value in weights.items()})
    pooled = Pooled(scipy.sparse.csr_array(acts.mean(1)), torch.from_numpy(x.mean(1)).float())
    index = np.arange(5)
    texts = scr_tpp._Texts(pooled, sae, index, index, index, np.zeros(5))
    fit = scr_tpp.LogisticFit(torch.from_numpy(w), 0.25, True)
    expected = (x - acts[..., [2, 4]] @ W_dec[[2, 4]]).mean(1) @ w + 0.25
    np.testing.assert_allclose(texts.scores(fit, index, torch.tensor([2, 4])), expected, atol=1e-5)


@pytest.mark.parametrize("like", [None, pytest.param("saebench", marks=pytest.mark.long)])
def test_a_trained_sae_beats_the_random_one_with_few_latents(tiny, like):
    model, sae = tiny
    topics = ("Geography", "Mathematics", "Arts")
    documents = [[d for d in saewb.tiny.texts() if d.topic == topic][:40] for topic in topics]
    texts = [d.text for of in documents for d in of]
    labels = [d.topic for of in documents for d in of]
    result = saewb.scr_tpp(model, {"tiny": sae}, texts, labels, ns=[10], like=like, ctx_len=32, progress=False)
    summary = result.summary().set_index("sae")
    if like is None:  # SAEBench draws 24 texts for an accuracy here
        assert summary.score["tiny"] > summary.score["random (tiny)"] + 0.05
    assert (summary.se > 0).all()
    assert summary.clean_accuracy.min() > 0.7
    assert len(result.plot().data) == 2
    assert repr(result).startswith("ScrTpp(tpp ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": [0, 1] * 3}, "nothing is targeted"),
        ({"labels": [0, 1, 2] * 2, "spurious": [0, 1] * 3}, "labels have 3 values"),
        ({"labels": [0, 1, 2] * 2, "ns": []}, "numbers of latents"),
        ({"labels": [0, 1, 2] * 2, "like": "saebnech"}, "near: saebench"),
        ({"labels": [0, 1, 2]}, "3 labels for 6 texts"),
    ],
)
def test_what_scr_tpp_refuses(tiny, arguments, says):
    with pytest.raises(ValueError, match=says):
        saewb.scr_tpp(*tiny, [f"text {i}" for i in range(6)], progress=False, **arguments)


def test_weights_of_texts_are_texts_that_are_repeated():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(30, 3))), torch.arange(30) % 3 == 0
    x[:, 0] += y
    times = 1 + torch.arange(30) % 2
    a = fit_logistic(x, y, weights=times.double())
    b = fit_logistic(x.repeat_interleave(times, 0), y.repeat_interleave(times))
    torch.testing.assert_close(a.weight, b.weight, atol=1e-8, rtol=0)
    weights = balancing_weights(y)
    assert weights[y].sum() == pytest.approx(float(weights[~y].sum()))
    assert float(weights.mean()) == pytest.approx(1)
    with pytest.raises(ValueError, match="weights for 30 texts"):
        fit_logistic(x, y, weights=torch.ones(3))


# -- meta-SAE ----------------------------------------------------------------------------------------------------------


def test_a_decoder_of_few_directions_is_explained_on_rows_not_trained_on_and_a_random_one_is_not():
    rng = torch.Generator().manual_seed(0)
    meta = torch.nn.functional.normalize(torch.randn(8, 24, generator=rng), dim=1)
    weights = torch.rand(200, 8, generator=rng) * (torch.rand(200, 8, generator=rng) < 0.25)
    sae = SAE(SAEConfig(24, 200))
    with torch.no_grad():
        sae.W_dec.copy_(weights @ meta)
    result = saewb.meta_sae(sae, width=12, k=3, n_steps=200, batch=128, lr=5e-3)
    table = result.to_frame()
    assert table.explained_variance["decoder"] > 0.8
    assert table.explained_variance["random"] < 0.5
    assert (table.low < table.explained_variance).all()
    assert table.n.tolist() == [20, 20]
    assert table.n_train.tolist() == [180, 180]
    assert "random matrix" in repr(result)
    with pytest.raises(ValueError, match="k=20"):
        saewb.meta_sae(sae, width=12, k=20)


def test_the_variance_of_a_perfect_and_of_a_constant_meta_sae():
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert meta_sae._explained(lambda x: x, rows)[0] == 1
    mean = rows.mean(0)
    assert meta_sae._explained(lambda x: mean.expand_as(x), rows)[0] == pytest.approx(0, abs=1e-6)


# -- published results and comparisons ---------------------------------------------------------------------------------


def published(kind, metrics, name="layer_5/width_4k", release="some-release", **cfg):
    return {
        "eval_type_id": kind,
        "eval_config": {"model_name": "pythia-160m-deduped"},
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "sae_lens_release_id": release,
        "sae_lens_id": name,
        "sae_cfg_dict": {"architecture": "topk", "d_sae": 4096, "hook_name": "blocks.5.hook_resid_post", **cfg},
    }


CORE = {
    "model_behavior_preservation": {"kl_div_score": 0.98, "kl_div_with_ablation": 10.0, "kl_div_with_sae": 0.2},
    "sparsity": {"l0": 40.0, "l1": 100.0},
    "reconstruction_quality": {"explained_variance": 0.8, "cossim": 0.9, "mse": 0.001},
    "misc_metrics": {"frac_alive": 0.75, "freq_over_1_percent": -1.0},
}


def test_published_files_of_one_sae_are_a_row_with_the_names_of_evaluate(tmp_path):
    files = {
        "core": CORE,
        "absorption": {"mean": {"mean_absorption_fraction_score": 0.1, "mean_full_absorption_score": 0.02}},
        "tpp": {"tpp_metrics": {"tpp_threshold_20_total_metric": 0.3, "tpp_threshold_20_intended_diff_only": 0.4}},
        "scr": {"scr_metrics": {"scr_metric_threshold_20": 0.25, "scr_dir1_threshold_20": None}},
        "sparse_probing": {"sae": {"sae_top_1_test_accuracy": 0.7}},
    }
    for kind, metrics in files.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "x_eval_results.json").write_text(json.dumps(published(kind, metrics)))
    table = read_saebench(tmp_path)
    assert table.index.tolist() == ["some-release/layer_5/width_4k"]
    row = table.iloc[0]
    assert (row.l0, row.kl, row.kl_recovered_zero, row.dead_frac) == (40, 0.2, 0.98, 0.25)
    assert (row.absorption_fraction, row.tpp_20, row.scr_20) == (0.1, 0.3, 0.25)
    assert row["sparse_probing/sae_top_1_test_accuracy"] == 0.7
    assert row["core/explained_variance"] == 0.8  # not what saewb calls so
    assert "explained_variance" not in table
    assert np.isnan(row.over_1_percent_frac)
    assert (row.source, row.model, row.architecture, row.d_sae) == ("SAEBench", "pythia-160m-deduped", "topk", 4096)
    shared = set(saewb.Evaluation.__dataclass_fields__)
    assert {"l0", "kl", "kl_recovered_zero", "cosine", "over_1_percent_frac", "dead_frac"} <= shared & set(table)
    (tmp_path / "again.json").write_text(json.dumps(published("core", CORE)))
    with pytest.raises(ValueError, match="both have core"):
        read_saebench(tmp_path)


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no JSON file"):
        read_saebench(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_saebench(tmp_path / "nothing.json")
    for text in ("{}", "[1]", '{"eval_type_id": "core", "eval_result_metrics": 3}', "no json"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(saewb.FormatError):
            read_saebench(tmp_path / "a.json")


def test_the_pareto_front_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    cost, gain = rng.integers(0, 6, (2, 60)).astype(float)
    gain[:4] = np.nan
    front = comparison.is_pareto(cost, gain)
    for i in range(60):
        better = (cost <= cost[i]) & (gain >= gain[i]) & ((cost < cost[i]) | (gain > gain[i]))
        assert front[i] == (not np.isnan(gain[i]) and not better.any())


def test_ones_own_sae_stands_beside_published_ones(tiny, tmp_path):
    model, sae = tiny
    texts = [d.text for d in saewb.tiny.held_out_texts()[:4]]
    evaluation = saewb.evaluate(model, sae, texts, losses=False, core=True)
    for i, l0 in enumerate((8.0, 40.0)):
        core = {**CORE, "sparsity": {"l0": l0, "l1": 1.0}, "reconstruction_quality": {"cossim": 0.5 + 0.4 * i}}
        (tmp_path / f"{i}.json").write_text(json.dumps(published("core", core, name=str(i))))
    compared = saewb.compare({"mine": evaluation}, read_saebench(tmp_path))
    assert compared.to_frame().source.tolist() == ["own", "SAEBench", "SAEBench"]
    assert compared.pareto("cosine") == ["some-release/0", "mine"]
    assert "mean_max_decoder_cosine" in compared.figures()
    figure = compared.plot(["cosine", "dead_frac"])
    assert {trace.name for trace in figure.data} == {"Pareto front", "own", "SAEBench"}
    assert compared.plot().data
    assert repr(compared) == f"Comparison(3 SAEs: 1 own, 2 SAEBench; {len(compared.figures())} figures)"
    assert "<table" in compared._repr_html_()
    assert evaluation.mean_max_decoder_cosine == pytest.approx(float(evaluation.latents.max_decoder_cosine.mean()))
    without = saewb.evaluate(model, sae, texts, losses=False)
    assert without.mean_max_decoder_cosine is None
    assert "mean_max_decoder_cosine" not in without.figures()
    assert "mean_max" not in str(without)
    assert "mean_max" in str(evaluation)


def test_what_compare_refuses(tiny):
    with pytest.raises(ValueError, match="got nothing"):
        saewb.compare()
    with pytest.raises(TypeError, match="compare got a str"):
        saewb.compare("x")
    with pytest.raises(TypeError, match="named 'a'"):
        saewb.compare({"a": 3})
    import pandas as pd

    a = pd.DataFrame({"l0": [1.0], "fvu": [0.5], "words": [3.0]}, index=["x"])
    with pytest.raises(ValueError, match="two results have 'l0' of 'x'"):
        saewb.compare(a, a.assign(l0=2.0))
    compared = saewb.compare(a)
    with pytest.raises(ValueError, match="near: fvu"):
        compared.pareto("fuv")
    with pytest.raises(ValueError, match="no better side"):
        compared.pareto("words")


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm", "centered"])
def test_shares_of_a_projection_add_up_to_the_reconstruction_under_any_normalization(normalization):
    """sum_i q_i + the constant output's = the reconstruction's projection."""
    sae = SAE(SAEConfig(6, 10, normalization=normalization))
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(6, generator=torch.Generator().manual_seed(1)))
        sae.W_dec.mul_(torch.linspace(0.5, 2, 10)[:, None])
    rng = torch.Generator().manual_seed(0)
    x, u = torch.randn(4, 6, generator=rng) * 3 + 1, torch.nn.functional.normalize(torch.randn(6, generator=rng), dim=0)
    with torch.no_grad():
        q = sae.encode(x) * absorption._input_scale(sae, x) * (sae.W_dec @ u)
        whole = q.sum(1) + absorption._constant_output(sae, x) @ u
        torch.testing.assert_close(whole, sae(x) @ u, atol=1e-5, rtol=1e-5)
