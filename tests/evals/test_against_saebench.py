"""Absorption, splitting, TPP, SCR and core figures against SAEBench's own functions, on the same numbers."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import probe_oracles
from helpers import saebench_oracle as oracle

from saewb.evals import absorption, evaluation, meta_sae, scr_tpp
from saewb.probing.pooling import Pooled
from saewb.sae.sae import SAE, SAEConfig

LIVE = pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.long)], ids=["recorded", "live"])


@functools.cache
def live_results():
    return oracle.compute(probe_oracles.interpreter("sae-bench"))


def results(live):
    if live and probe_oracles.interpreter("sae-bench") is None:
        pytest.skip("SAEWB_PEER_ENVIRONMENTS has no environment of this peer")
    return live_results() if live else oracle.recorded()


def sae_of(weights):
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    d_in, d_sae = tensors["W_enc"].shape
    return SAE.from_tensors(SAEConfig(d_in, d_sae), {"b_dec": torch.zeros(d_in), **tensors})


# -- absorption --------------------------------------------------------------------------------------------------------


@LIVE
def test_fractions_and_full_absorption_on_random_numbers_are_equal_to_the_last_digit(live):
    numbers = {name: torch.from_numpy(value) for name, value in oracle.absorbing_numbers().items()}
    u = numbers["probe"] / numbers["probe"].norm()
    cosines = torch.nn.functional.cosine_similarity(u, numbers["W_dec"], dim=-1)
    kinds = set()
    for main, expected in zip(oracle.MAINS, results(live)["random"], strict=True):
        projection = torch.tensor(expected["projection"], dtype=torch.float64)
        torch.testing.assert_close((numbers["x"] @ u).double(), projection, rtol=1e-5, atol=1e-5)
        fraction, full = absorption.absorption_scores(numbers["acts"], cosines, cosines, projection, main)
        assert fraction.tolist() == expected["fraction"]
        assert full.tolist() == expected["full"]
        kinds |= {"partly" if 0 < value < 1 else value for value in expected["fraction"]} | set(expected["full"])
    assert kinds == {"partly", 0.0, 1.0}  # True is 1.0: every branch occurs


def spelled(settings, control=False, weights=None):
    """The result on planted words, from their activations on."""
    of = oracle.spelled_words()
    sae = sae_of(weights or {name: of[name] for name in ("W_enc", "b_enc", "W_dec")})
    rows = np.concatenate([of["train"].nonzero()[0], (~of["train"]).nonzero()[0]])
    x = torch.from_numpy(of["x"][rows])
    with torch.no_grad():
        latents = scipy.sparse.csr_array(sae.encode(x).numpy())
    words, y = [of["words"][i] for i in rows], torch.from_numpy(of["letter"][rows])
    data = absorption._WordData(words, y, list(oracle.LETTERS), int(of["train"].sum()))
    measured = absorption._measured([("stub", sae, Pooled(latents, x), "here")], data, settings, control, 42)
    return absorption._result(measured, data, settings, None)


@LIVE
def test_the_whole_evaluation_of_a_stub_model_is_saebenchs(live):
    settings = replace(absorption.LIKE["saebench"], max_k=oracle.MAX_K)
    table = spelled(settings).to_frame().set_index("class")
    expected = results(live)["spelling"]
    fractions, splits = set(), set()
    for letter, of in expected.items():
        row = table.loc[letter]
        assert row.probe_f1 == pytest.approx(of["f1_probe"], abs=1e-12)
        assert [row[f"f1_{k}"] for k in range(1, oracle.MAX_K + 1)] == pytest.approx(of["f1"], abs=1e-12)
        assert (row.latents, row.n_split, row.n) == (of["split"], len(of["split"]), of["n"])
        if of["n"]:
            assert row.fraction == pytest.approx(of["fraction"], abs=1e-6)
            assert row.full == pytest.approx(of["full"], abs=1e-12)
        fractions.add(of["fraction"])
        splits.add(len(of["split"]))
    assert len(fractions) > 10  # it tells letters apart
    assert len(splits) > 1


@functools.cache
def by_default():
    return spelled(replace(absorption.LIKE[None], max_k=2), control=True)


def test_defaults_on_the_stub_model_and_its_control():
    summary = by_default().summary()
    assert summary.index.tolist() == ["stub", "random (stub)"]
    assert (summary.n_classes > 10).all()
    assert summary.f1_1["stub"] > summary.f1_1["random (stub)"] + 0.2
    assert (summary.fraction_low <= summary.fraction).all()
    assert (summary.fraction_high >= summary.fraction).all()
    assert len(by_default().plot().data) == 2


@pytest.mark.long
def test_permuting_latents_changes_nothing():
    of = oracle.spelled_words()
    order = np.random.default_rng(5).permutation(of["W_dec"].shape[0])
    permuted = {"W_enc": of["W_enc"][:, order], "b_enc": of["b_enc"][order], "W_dec": of["W_dec"][order]}
    b = spelled(by_default().settings, weights={name: value.copy() for name, value in permuted.items()}).to_frame()
    a = by_default().to_frame()
    a = a[a.sae == "stub"]
    for figure in ("probe_f1", "f1_1", "f1_2", "n_split", "fraction", "full", "n"):
        np.testing.assert_allclose(a[figure].astype(float), b[figure].astype(float), atol=1e-5)
    assert [order[row].tolist() for row in b.latents] == list(a.latents)


# -- splitting ---------------------------------------------------------------------------------------------------------


def test_a_latent_that_is_split_in_two_adds_one_to_the_splitting_and_half_of_it_twice_does_not():
    """Two latents that fire on half of the words each are a split; two of half the activation each say the same."""
    rng = np.random.default_rng(0)
    n, d = 400, 12
    y = torch.arange(n) % 2
    x = torch.from_numpy(rng.normal(size=(n, d)) * 0.3).float()
    x[:, 0] += 3 * y
    whole = torch.zeros(n, 6)
    whole[:, 0] = torch.relu(x[:, 0] - 1.5)
    whole[:, 1:4] = torch.from_numpy(rng.exponential(1, (n, 3)) * (rng.random((n, 3)) < 0.2)).float()
    W_dec = torch.zeros(6, d)
    W_dec[torch.arange(6), torch.arange(6)] = 1
    half, twin = whole.clone(), whole.clone()
    first = torch.from_numpy(rng.random(n) < 0.5)
    half[:, 5], half[:, 0] = whole[:, 0] * ~first, whole[:, 0] * first
    twin[:, 5] = twin[:, 0] = whole[:, 0] / 2
    split_dec = W_dec.clone()
    split_dec[5] = W_dec[0]
    counts = {}
    for name, acts in {"whole": whole, "half": half, "twin": twin}.items():
        sae = SAE.from_tensors(
            SAEConfig(d, 6),
            {"W_enc": torch.zeros(d, 6), "b_enc": torch.zeros(6), "W_dec": split_dec, "b_dec": torch.zeros(d)},
        )
        data = absorption._WordData([str(i) for i in range(n)], y, ["no", "yes"], 300)
        pooled = Pooled(scipy.sparse.csr_array(acts.numpy()), x)
        settings = replace(absorption.LIKE[None], max_k=3)
        measured = absorption._measured([(name, sae, pooled, "here")], data, settings, False, 0)
        row = absorption._result(measured, data, settings, None).table.set_index("class").loc["yes"]
        counts[name] = row.n_split
        assert row.f1_2 > 0.98
    assert counts == {"whole": 1, "half": 2, "twin": 1}


# -- TPP and SCR -------------------------------------------------------------------------------------------------------


def texts_of(sides, sae, kinds):
    """`_Texts` of tokens that are zero where masked."""
    x = torch.from_numpy(np.concatenate(sides))
    counted = x.sum(-1) != 0
    n = counted.sum(1, keepdim=True)
    with torch.no_grad():
        latents = (sae.encode(x) * counted[..., None]).sum(1) / n
    pooled = Pooled(scipy.sparse.csr_array(latents.numpy()), x.sum(1) / n)
    padding = ((x.shape[1] - n) / n)[:, 0].numpy()
    index = np.arange(len(x))
    n_train = len(sides[0])
    return scr_tpp._Texts(pooled, sae, kinds, index[:n_train], index[n_train:], padding)


@pytest.fixture
def effects(monkeypatch):
    """All effects that latents were chosen by."""
    seen, strongest = [], scr_tpp.strongest

    def record(effects, n, **how):
        seen.append(effects)
        return strongest(effects, n, **how)

    monkeypatch.setattr(scr_tpp, "strongest", record)
    return seen


def texts_of_classes(n):
    return oracle.texts_of_classes((n, n, n), seed=2)


@LIVE
def test_tpp_is_saebenchs(live, effects):
    expected = results(live)["tpp"]
    (train, y), (test, y_test) = (texts_of_classes(n) for n in (60, 30))
    texts = texts_of([train, test], sae_of(oracle.small_sae()), np.concatenate([y, y_test]))
    rng = torch.Generator().manual_seed(42)
    table = scr_tpp._tpp_saebench(texts, ["0", "1", "2"], oracle.NS, rng, True)
    by_class = table.set_index(["class", "n"])
    for name in ("0", "1", "2"):
        for n in oracle.NS:
            row, ablated = by_class.loc[(name, n)], expected["ablated"][name][str(n)]
            assert row.clean_accuracy == pytest.approx(expected["clean"][name], abs=1e-6)
            assert row.intended == pytest.approx(expected["clean"][name] - ablated[name], abs=1e-6)
    overall = table[table["class"].isna()].set_index("n")
    for n in oracle.NS:
        for name, key in {"score": "total_metric", "intended": "intended_diff_only"}.items():
            assert overall[name][n] == pytest.approx(expected["scores"][f"tpp_threshold_{n}_{key}"], abs=1e-6)
    assert overall.score.max() > 0.1
    for found, name in zip(effects[:: len(oracle.NS)], ("0", "1", "2"), strict=True):
        np.testing.assert_allclose(found.numpy(), expected["effects"][name], rtol=1e-4, atol=1e-6)


@LIVE
def test_scr_is_saebenchs(live, effects):
    expected = results(live)["scr"]
    (train, kinds), (test, kinds_test) = (oracle.quadrants(seed) for seed in (10, 20))
    texts = texts_of([train, test], sae_of(oracle.small_sae()), np.concatenate([kinds, kinds_test]))
    table = scr_tpp._scr_saebench(texts, oracle.NS, torch.Generator().manual_seed(42), 42)
    rows, scores = table.set_index(["class", "n"]), expected["scores"]
    of = {"label": ("professor / nurse", 1), "spurious": ("male / female", 2)}
    for name, (data, direction) in of.items():
        for n in oracle.NS:
            row = rows.loc[(name, n)]
            assert row.clean_accuracy == pytest.approx(expected["clean"][data], abs=1e-6)
            biased = expected["clean"][f"male_professor / female_nurse probe on {data} data"]
            assert row.biased_accuracy == pytest.approx(biased, abs=1e-6)
            assert row.score == pytest.approx(scores[f"scr_dir{direction}_threshold_{n}"], abs=1e-5)
    overall = table[table["class"].isna()].set_index("n").score
    for n in oracle.NS:
        assert overall[n] == pytest.approx(scores[f"scr_metric_threshold_{n}"], abs=1e-5)
    assert overall.abs().max() > 0.05
    for found, name in zip(effects[:: len(oracle.NS)], ("male / female", "professor / nurse"), strict=True):
        np.testing.assert_allclose(found.numpy(), expected["effects"][name], rtol=1e-4, atol=1e-6)


# -- core and meta-SAE -------------------------------------------------------------------------------------------------


@LIVE
def test_core_figures_and_the_meta_variance_are_saebenchs(live):
    expected, weights = results(live)["core"], oracle.small_sae()
    figures = evaluation._weight_figures(sae_of(weights), True)
    for name in ("encoder", "decoder"):
        of = expected["per latent"][f"max_{name}_cosine_sim"]
        np.testing.assert_allclose(figures[f"max_{name}_cosine"].numpy(), of, atol=1e-6)
        mean = expected["misc"][f"average_max_{name}_cosine_sim"]
        assert float(figures[f"max_{name}_cosine"].mean()) == pytest.approx(mean, abs=1e-6)
    density = torch.tensor(expected["per latent"]["feature_density"], dtype=torch.float64)
    frequent = evaluation._frequent(density)
    for percent in (1, 10):
        share, frac = (expected["misc"][f"{kind}freq_over_{percent}_percent"] for kind in ("normalized_", ""))
        assert frequent[f"over_{percent}_percent_share"] == pytest.approx(share, abs=1e-6)
        assert frequent[f"over_{percent}_percent_frac"] == pytest.approx(frac, abs=1e-6)
    rows = torch.from_numpy(weights["W_dec"])
    assert meta_sae._explained(lambda x: 0.5 * x + 0.01, rows)[0] == pytest.approx(expected["meta"], abs=1e-6)
