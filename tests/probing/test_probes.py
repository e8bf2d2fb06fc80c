"""Sparse probes against scikit-learn, sae-probes and SAEBench; splits; real texts; what is refused."""

import functools

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers import panel_driver, probe_oracles

import saewb
from saewb.probing import probes
from saewb.probing.logistic import fit_logistic
from saewb.probing.probes import LIKE, ProbeSettings, probe_table
from saewb.probing.rank_statistics import auc_of


def results_of(name, live):
    """Recorded results of a peer, or computed now in its environment."""
    if not live:
        return probe_oracles.recorded(name)
    python = probe_oracles.interpreter(probe_oracles.ENVIRONMENTS[name])
    if python is None:
        pytest.skip("SAEWB_PEER_ENVIRONMENTS has no environment of this peer")
    return probe_oracles.compute(name, python)


LIVE = pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.long)], ids=["recorded", "live"])


CHOICE = "normalized_mean_difference"


# -- scikit-learn ------------------------------------------------------------------------------------------------------


@LIVE
def test_logistic_regression_is_scikit_learns(live):
    oracle = results_of("scikit-learn", live)
    x, y = probe_oracles.pooled_values(120, seed=7)
    x = torch.from_numpy(x[:, :12]).double()
    for name, expected in oracle["fits"].items():
        penalty, C = name.split()
        fit = fit_logistic(x, torch.from_numpy(y).bool(), penalty=penalty, C=float(C))
        assert fit.converged
        np.testing.assert_allclose(fit.weight.numpy(), expected["weight"], rtol=0, atol=1e-6)
        if any(expected["weight"]):  # else saga stops before its intercept converges
            assert fit.bias == pytest.approx(expected["bias"], abs=1e-6)
        scores = fit.scores(x).numpy()
        assert auc_of(scores, y == 1) == pytest.approx(expected["auc"], abs=1e-12)
        assert probes._scores(scores, y == 1)["f1"] == pytest.approx(expected["f1"], abs=1e-12)
    assert auc_of(np.round(x[:, 3].numpy()), y == 1) == pytest.approx(oracle["auc of ties"], abs=1e-12)
    folds = [index.tolist() for _, index in probes.validation_splits(y[:120], 42)]
    assert folds == oracle["folds"]


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 80)])
def test_logistic_regression_is_at_the_optimum(penalty, n, d):
    """The gradient of the loss is that of the penalty, also with more features than texts and C = 100."""
    rng = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, d, generator=rng).double() * torch.logspace(-3, 3, d), torch.randn(n, generator=rng) > 0
    for C in (1e-3, 1.0, 100.0):
        fit = fit_logistic(x, y, penalty=penalty, C=C)
        sign = torch.where(y, 1.0, -1.0).double()
        slope = sign * torch.sigmoid(-sign * fit.scores(x)) * C  # minus the gradient
        gradient, scale = x.T @ slope, x.abs().amax(0)
        assert abs(slope.sum()) < 1e-6 * C
        if penalty == "l2":
            torch.testing.assert_close(gradient / scale, fit.weight / scale, atol=1e-6 * C, rtol=1e-5)
        else:
            on = fit.weight != 0
            torch.testing.assert_close((gradient / scale)[on], (fit.weight.sign() / scale)[on], atol=1e-6, rtol=1e-5)
            assert (gradient.abs() <= 1 + 1e-6 * scale).all()


def test_logistic_regression_goes_on_from_another_fit():
    x, y = probe_oracles.pooled_values(100, seed=3)
    x, y = torch.from_numpy(x), torch.from_numpy(y).bool()
    start = fit_logistic(x, y, penalty="l1", C=0.1)
    torch.testing.assert_close(
        fit_logistic(x, y, penalty="l1", C=1.0, start=start).weight, fit_logistic(x, y, penalty="l1", C=1.0).weight
    )
    with pytest.raises(ValueError, match="C=0"):
        fit_logistic(x, y, C=0)
    with pytest.raises(ValueError, match="penalty='l3'"):
        fit_logistic(x, y, penalty="l3")
    with pytest.raises(ValueError, match="0 of 100 texts with label 1"):
        fit_logistic(x, torch.zeros(100).bool())


# -- sae-probes and SAEBench -------------------------------------------------------------------------------------------


@LIVE
def test_probes_are_those_of_sae_probes(live):
    """Indices and C exactly, AUC to 2e-4, accuracy to one text of 200: its solver stops at 1e-4, in float32.

    Not where the classes are separable: there its solver ends wherever 1,000 steps lead (10 texts; 8 latents with L1).
    """
    oracle = results_of("sae-probes", live)
    for name, expected in oracle["probes"].items():
        n, penalty, k = int(name.split()[0]), name.split()[1], int(name.split()[2])
        (x, y), (x_test, y_test) = probe_oracles.pooled_values(n, seed=n), probe_oracles.pooled_values(200, seed=n + 1)
        assert probes.best_columns(torch.from_numpy(x), y == 1, CHOICE)[:k].tolist() == expected["indices"]
        if (n == 10 and name != "10 l2 8") or name == "60 l1 8" or (k < 4 and not live):
            continue
        features = {"latents": scipy.sparse.csr_array(np.concatenate([x, x_test]))}
        split = np.arange(n), np.arange(n, n + 200)
        settings = ProbeSettings((k,), "last", CHOICE, penalty)
        [row] = probe_table(features, np.concatenate([y, y_test]), [0, 1], *split, settings).to_dict("records")
        assert row["indices"] == expected["indices"]
        assert row["C"] == pytest.approx(expected["C"])
        assert row["auc"] == pytest.approx(expected["test_auc"], abs=2e-4)
        assert row["val_auc"] == pytest.approx(expected["val_auc"], abs=2e-4)
        assert row["accuracy"] == pytest.approx(expected["test_acc"], abs=0.0051)
        assert row["f1"] == pytest.approx(expected["test_f1"], abs=0.006)
    _, y = probe_oracles.pooled_values(300, seed=1)
    assert [part.tolist() for part in probes.sae_probes_split(y, 120, 90, 0.4)] == oracle["split"]


@LIVE
def test_probes_are_those_of_saebench(live):
    """To its random negatives, and to the epoch of AdamW that it reports."""
    oracle = results_of("sae-bench", live)
    train, test = probe_oracles.classes_of_values()
    values = [np.concatenate(list(side.values())) for side in (train, test)]
    y = np.concatenate([np.repeat(np.arange(3), len(x) // 3) for x in values])
    x, split = np.concatenate(values), np.split(np.arange(len(y)), [len(values[0])])
    features = {"residual": torch.from_numpy(x), "latents": scipy.sparse.csr_array(x)}
    table = probe_table(features, y, ["0", "1", "2"], *split, LIKE["saebench"])
    for (name, k, label), accuracy in table.set_index(["features", "k", "class"]).accuracy.items():
        assert accuracy == pytest.approx(oracle["residual" if name == "residual" else str(k)][label], abs=1e-6)
    assert len(table) == 12


# -- real texts --------------------------------------------------------------------------------------------------------


@functools.cache
def real():
    documents = [d for d in saewb.tiny.held_out_texts() if d.topic.startswith(("Biology", "People", "Geography"))]
    return [" ".join(d.text.split()[:30]) for d in documents], [d.topic.split()[0] for d in documents]


def test_real_texts_of_three_classes():
    model, sae = panel_driver.embedded()
    texts, labels = real()
    found = saewb.sparse_probe(model, sae, texts, labels, ks=[1, 5], penalty="l2", C=1.0, progress=False)
    table = found.to_frame()
    assert table["class"].nunique() == 3
    assert table.features.value_counts().to_dict() == {"latents": 6, "residual_top_k": 6, "token": 6, "residual": 3}
    assert table[(table.features == "latents") & (table.k == 5)].auc.mean() > 0.85
    assert table[table.features == "residual"].auc.mean() > 0.9
    assert len(found.latents(5, "People")) == 5
    assert repr(found).startswith("Probes(3 classes, k [1, 5], best AUC")
    assert "residual_top_k" in str(found)
    assert "residual_top_k" in found._repr_html_()
    lines = {trace.name: list(trace.y) for trace in found.plot().data}
    assert lines["latents"][0] == pytest.approx(table[(table.features == "latents") & (table.k == 1)].auc.mean())
    assert set(lines) == {"latents", *probes.BASELINES}
    with pytest.raises(ValueError, match="k of .1, 5."):
        found.latents(3)


@pytest.mark.parametrize("like", ["saebench", "sae-probes"])
def test_settings_of_others_on_real_texts(like):
    model, sae = panel_driver.embedded()
    texts, labels = real()
    two = [i for i, label in enumerate(labels) if label != "Geography"]
    texts, labels = [texts[i] for i in two], [labels[i] for i in two]
    order = np.argsort(labels, kind="stable")  # as many of each class
    order = np.concatenate([order[:40], order[-40:]])
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    options = {"ks": [1, 2], "like": like, "baselines": ["residual"], "progress": False}
    found = saewb.sparse_probe(model, [sae], texts, labels, train=40, **options)[0]
    assert found.settings.pool == {"saebench": "mean", "sae-probes": "last"}[like]
    table = found.to_frame()
    assert table["class"].nunique() == (2 if like == "saebench" else 1)
    assert (table.auc > 0.5).any()
    assert (table.n_train == 40).all()


# -- splits ------------------------------------------------------------------------------------------------------------


def test_groups_and_equal_texts_are_not_divided():
    first = [0, 1, 2, 0, 4, 5, 6, 7, 8, 9]  # text 3 is text 0
    groups = ["a", "b", "b", "c", "c", "d", "e", "f", "g", "h"]
    component = probes._components(first, groups)
    assert component[0] == component[3] == component[4]
    assert component[1] == component[2]
    assert len(set(component)) == 7
    y = np.array([0, 1] * 5)
    for seed in range(20):
        train, test = probes.grouped_split(y, component, 0.5, seed)
        assert not set(component[train]) & set(component[test])
        assert sorted([*train, *test]) == list(range(10))
    big = probes.grouped_split(np.arange(1000) % 4 == 0, np.arange(1000), 0.8, 0)[0]
    assert len(big) == 800
    assert (big % 4 == 0).sum() == 200


def test_validation_splits():
    y = np.arange(10) % 2
    pairs = [tuple(held.tolist()) for _, held in probes.validation_splits(y, 42)]
    assert pairs == [(i, j) for i in range(10) for j in range(i + 1, 10) if y[i] != y[j]]
    [(_, held)] = probes.validation_splits(np.arange(1024) % 2, 42)
    assert held.tolist() == list(range(924, 1024))
    assert probes.best_C(torch.zeros(3, 1), torch.tensor([True, False, True]), "l1", 0)[0] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 1]}, "2 labels for 4 texts"),
        ({"labels": [1, 1, 1, 1]}, "all texts have the label 1"),
        ({"like": "sae-bench"}, "near: saebench"),
        ({"ks": [0]}, "ks="),
        ({"choose": "mean"}, "choose='mean'"),
        ({"baselines": ["tokens"]}, "near: token"),
        ({"groups": [1]}, "1 groups for 4 texts"),
        ({"train": 1.2}, "train=1.2"),
        ({"train": [0, 2]}, "no training text has the label 1"),
        ({"like": "sae-probes", "train": 3}, "needs"),
    ],
)
def test_refused(options, message):
    model, sae = panel_driver.embedded()
    labels = options.pop("labels", [0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        saewb.sparse_probe(model, sae, ["a cat", "a dog", "the sun", "a river"], labels, progress=False, **options)
