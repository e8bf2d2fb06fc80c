"""Synthetic data have the rates, magnitudes, correlations and hierarchy asked for: 10^6 samples, 3 standard errors.

Seeds are fixed: a test that passes passes again.
"""

import json
import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.sae.sparse import SparseLatents
from saewb.stats.correlation import LowRankCorrelation, random_low_rank_correlation
from saewb.synthetic import (
    FeatureDictionary,
    Hierarchy,
    Magnitudes,
    Node,
    SyntheticData,
    constant,
    linear,
    load_synthetic,
    matched_sae,
    orthogonalized,
    random,
    random_dictionary,
    random_hierarchy,
    zipfian,
)
from saewb.synthetic.firing_patterns import independent

MILLION = 1_000_000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def eye(n):
    return FeatureDictionary(torch.eye(n), torch.zeros(n))


def rates(data, n=MILLION, seed=0):
    firings = data.fire(n, rng(seed))
    return torch.bincount(firings.latent, minlength=firings.shape[1]).double() / n


def within(found, wanted, n=MILLION, sigmas=3.0):
    """All of them within so many standard errors (seeds are fixed, so that all of them are)."""
    wanted = torch.as_tensor(wanted).double()
    error = (wanted * (1 - wanted) / n).sqrt()
    return bool(((found - wanted).abs() <= sigmas * error + 1e-12).all())


# -- probabilities ---------------------------------------------------------------------------------------------------


def test_probabilities_by_their_formulas():
    r = np.arange(1, 101) ** -1.5
    want = 0.02 + 0.28 * (r - r[-1]) / (r[0] - r[-1])
    np.testing.assert_allclose(zipfian(100, 1.5, 0.3, 0.02).numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(linear(5, 0.5, 0.1).numpy(), [0.5, 0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    assert torch.equal(random(9, seed=4), random(9, seed=4))
    assert not torch.equal(random(9, seed=4), random(9, seed=5))
    assert zipfian(1).tolist() == pytest.approx([0.3])
    for wrong in (lambda: constant(3, 1.5), lambda: linear(3, 0.1, 0.2), lambda: zipfian(3, highest=2)):
        with pytest.raises(ValueError, match="0 <= lowest <= highest <= 1"):
            wrong()


@pytest.mark.parametrize("p", [zipfian(30), linear(8, 0.9, 0.0), random(8), torch.tensor([0.0, 1.0, 1e-5, 0.26])])
def test_independent_features_fire_as_often_as_asked(p):
    data = SyntheticData(eye(len(p)), p)
    assert within(rates(data), p)


def test_independent_features_are_independent_and_each_once_in_a_sample():
    p = torch.tensor([0.3, 0.2, 0.1])
    samples, features = independent(p, MILLION, rng(3))
    assert len((samples * 3 + features).unique()) == len(samples)
    assert bool((samples.diff() >= 0).all())
    on = torch.zeros(MILLION, 3, dtype=torch.bool)
    on[samples, features] = True
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = (on[:, i] & on[:, j]).double().mean()
        assert within(both, p[i] * p[j])


def test_every_sample_is_as_likely():
    samples, _ = independent(torch.tensor([0.2]), 20, rng(1))
    counts = torch.zeros(20)
    for seed in range(1500):
        samples, _ = independent(torch.tensor([0.2]), 20, rng(seed))
        counts[samples] += 1
    assert within(counts / 1500, torch.full((20,), 0.2), 1500)


@examples(30)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_any_size(n_samples, n_features, seed):
    data = SyntheticData(eye(n_features), random(n_features, 1.0, 0.0, seed=seed))
    sample = data.sample(n_samples, rng(seed))
    assert sample.activations.shape == (n_samples, n_features)
    torch.testing.assert_close(sample.activations, sample.firings.dense())
    again = data.sample(n_samples, rng(seed))
    assert torch.equal(sample.activations, again.activations)


# -- magnitudes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("magnitudes", "mean", "std"),
    [
        (Magnitudes(mean=2.5), 2.5, 0.0),
        (Magnitudes("exponential", 2.0), 2.0, 2.0),
        (Magnitudes("folded_normal", 0.0, 1.5), 1.5 * math.sqrt(2 / math.pi), 1.5 * math.sqrt(1 - 2 / math.pi)),
        (Magnitudes("rectified_normal", 5.0, 0.5), 5.0, 0.5),
    ],
    ids=lambda m: m.shape if isinstance(m, Magnitudes) else "",
)
def test_magnitudes_have_their_mean_and_deviation(magnitudes, mean, std):
    values = SyntheticData(eye(2), torch.tensor([0.5, 0.5]), magnitudes).fire(MILLION, rng()).act.double()
    assert abs(values.mean() - mean) <= 3 * std / math.sqrt(len(values)) + 1e-6
    assert values.std() == pytest.approx(std, rel=0.01, abs=1e-6)


def test_magnitudes_by_feature_and_those_of_zero_do_not_fire():
    by_feature = SyntheticData(eye(3), constant(3, 0.5), Magnitudes(mean=torch.tensor([1.0, 2.0, 0.0])))
    firings = by_feature.fire(1000, rng())
    assert set(firings.latent.tolist()) == {0, 1}
    assert torch.equal(firings.act, firings.latent.float() + 1)
    cut = SyntheticData(eye(1), constant(1, 1.0), Magnitudes("rectified_normal", 0.0, 1.0))
    assert within(rates(cut), torch.tensor([0.5]))


# -- correlation -----------------------------------------------------------------------------------------------------


def copula(p, q, c):
    """P(both fire) of two normal numbers with correlation c, by quadrature."""
    from scipy.stats import multivariate_normal, norm

    return multivariate_normal([0, 0], [[1, c], [c, 1]]).cdf([norm.ppf(p), norm.ppf(q)])


@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_correlated_features(form):
    low = LowRankCorrelation.of(torch.tensor([[0.9, 0.0], [0.8, 0.3], [0.0, -0.7]]))
    correlation = low.dense() if form == "dense" else low
    p = torch.tensor([0.3, 0.1, 0.05])
    data = SyntheticData(eye(3), p, correlation=correlation)
    on = data.fire(MILLION, rng()).dense() > 0
    assert within(on.double().mean(0), p)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = (on[:, i] & on[:, j]).double().mean()
        assert within(both, copula(p[i].item(), p[j].item(), low.dense()[i, j].item())), (i, j)


def test_correlated_draws_do_not_depend_on_the_blocks(monkeypatch):
    data = SyntheticData(eye(8), constant(8, 0.3), correlation=random_low_rank_correlation(8, 2, scale=0.5))
    monkeypatch.setattr("saewb.synthetic.data._BLOCK", 8 * 100)
    firings = data.fire(1000, rng())
    assert firings.token.max() > 900
    assert within(torch.bincount(firings.latent).double() / 1000, torch.full((8,), 0.3), 1000)


# -- hierarchy -------------------------------------------------------------------------------------------------------

TREE = Hierarchy(
    [
        Node(0, (Node(1, (Node(3),)), Node(2)), exclusive=True),
        Node(None, (Node(4, (Node(None, (Node(6),)),)), Node(5)), exclusive=True),
    ]
)


def test_children_fire_under_their_parents_and_exclusive_ones_alone():
    data = SyntheticData(eye(8), constant(8, 0.6), hierarchy=TREE, compensate=False)
    on = data.fire(20_000, rng()).dense() > 0
    for child, parent in ((1, 0), (2, 0), (3, 1), (6, 4)):
        assert not bool((on[:, child] & ~on[:, parent]).any())
        assert bool((on[:, child] & on[:, parent]).any())
    for a, b in ((1, 2), (4, 5)):
        assert not bool((on[:, a] & on[:, b]).any())
    assert within(on[:, 7].double().mean(), 0.6, 20_000)


def test_without_compensation_rates_are_those_of_the_formula():
    data = SyntheticData(eye(8), constant(8, 0.6), hierarchy=TREE, compensate=False)
    alone = 0.6 * (1 - 0.6 / 2)  # given its parent, and half the time where its sibling fires too
    want = [0.6, 0.6 * alone, 0.6 * alone, 0.6 * alone * 0.6, alone, alone, alone * 0.6, 0.6]
    assert within(rates(data), want)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_compensated_rates_are_those_asked_for(seed):
    trees = random_hierarchy(60, 6, branching=(2, 4), depth=2, exclusive_frac=0.6, seed=seed)
    depth = torch.zeros(60)
    for i, level in enumerate(trees._levels):
        depth[level.feature] = float(i)
    p = torch.full((60,), 0.1) * 0.22**depth
    data, n = SyntheticData(eye(60), p, hierarchy=trees), MILLION
    assert within(rates(data, n, seed), p, n)


def test_exclusive_siblings_that_fill_their_parent_nearly():
    p = torch.tensor([0.5, 0.2, 0.2, 0.08])
    data = SyntheticData(eye(4), p, hierarchy=Hierarchy([Node(0, (Node(1), Node(2), Node(3)), exclusive=True)]))
    assert within(rates(data), p)


def test_children_scaled_by_their_parents():
    trees = Hierarchy([Node(0, (Node(1, (Node(2),)),))], scale_by_parent="magnitude")
    values = torch.tensor([[2.0, 3.0, 5.0], [0.0, 3.0, 5.0], [2.0, 0.0, 5.0]])
    out = trees.apply(SparseLatents.from_dense(values), rng()).dense()
    assert out.tolist() == [[2, 6, 30], [0, 0, 0], [2, 0, 0]]


def test_children_scaled_by_how_strong_their_parents_are_for_them():
    trees = Hierarchy([Node(0, (Node(1, (Node(2),)),))], scale_by_parent="relative")
    values = torch.tensor([[2.0, 3.0, 5.0], [0.0, 3.0, 5.0], [4.0, 0.0, 5.0]])
    out = trees.apply(SparseLatents.from_dense(values), rng(), mean=torch.tensor([4.0, 2.0, 9.0])).dense()
    assert out.tolist() == [[2, 1.5, 3.75], [0, 0, 0], [4, 0, 0]]  # 3 * 2/4, then 5 * 1.5/2
    with pytest.raises(ValueError, match="without a mean"):
        trees.apply(SparseLatents.from_dense(values), rng())
    with pytest.raises(ValueError, match="'relative', 'magnitude' or None"):
        Hierarchy([Node(0)], scale_by_parent=True)
    some = Hierarchy([Node(0, (Node(1, (Node(2),)),), scales=False)], scale_by_parent="magnitude")
    assert some.apply(SparseLatents.from_dense(values), rng()).dense()[0].tolist() == [2, 3, 15]


def test_a_parent_of_magnitude_0_does_not_fire_nor_do_its_children():
    magnitudes = Magnitudes("rectified_normal", mean=torch.tensor([1.0, 5.0]), std=torch.tensor([1.0, 0.0]))
    data = SyntheticData(
        eye(2), torch.ones(2), magnitudes, hierarchy=Hierarchy([Node(0, (Node(1),))]), compensate=False
    )
    fired = data.sample(50_000, rng()).firings.dense() > 0
    assert torch.equal(fired[:, 0], fired[:, 1])
    p = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # of a normal number above -1
    assert abs(fired[:, 0].double().mean() - p) < 4 * math.sqrt(p * (1 - p) / 50_000)


def saelens_model(folder, **changes):
    """A synthetic model as sae-lens 6.54.12 writes it: 5 features of 3, three of them in a tree."""
    folder.mkdir()
    facts = {
        "num_features": 5,
        "hidden_dim": 3,
        "firing_probability": {"generator_name": "zipfian", "exponent": 1.0, "max_prob": 0.3, "min_prob": 0.01},
        "hierarchy": {"total_root_nodes": 1, "branching_factor": 2, "max_depth": 1, "scale_children_by_parent": True},
        "orthogonalization": None,
        "correlation": None,
        "std_firing_magnitudes": 0.5,
        "mean_firing_magnitudes": {"start": 1.0, "end": 5.0, "generator_name": "linear"},
        "bias": 1.0,
        "dtype": "float32",
        "seed": 7,
    }
    (folder / "synthetic_model_config.json").write_text(json.dumps(facts | changes))
    node = {"mutually_exclusive_children": False, "scale_children_by_parent": False, "feature_id": None, "children": []}
    children = [{**node, "feature_index": 1}, {**node, "feature_index": 2}]
    root = {"feature_index": 0, "mutually_exclusive_children": True, "scale_children_by_parent": True}
    (folder / "hierarchy.json").write_text(json.dumps({"roots": [{**root, "feature_id": None, "children": children}]}))
    tensors = {
        "feature_vectors": torch.randn(5, 3, generator=rng()),
        "bias": torch.tensor([0.1, 0.2, 0.3]),
        "firing_probabilities": torch.tensor([0.5, 0.6, 0.4, 0.2, 0.1]),
    }
    save_file(tensors, folder / "synthetic_model.safetensors")
    return folder, tensors


def test_a_synthetic_model_of_saelens(tmp_path):
    folder, tensors = saelens_model(tmp_path / "model")
    data, n = load_synthetic(folder), 200_000
    assert torch.equal(data.dictionary.directions, tensors["feature_vectors"])
    features = torch.rand(4, 5, generator=rng())
    expected = features @ tensors["feature_vectors"] + tensors["bias"]
    assert torch.equal(data.dictionary.embed(features), expected)
    z = data.sample(n, rng()).firings.dense()
    # 1 and 2 exclude one another under 0; both drawn: each stays in half of the samples
    p = torch.tensor([0.5, 0.5 * 0.6 * (1 - 0.4 / 2), 0.5 * 0.4 * (1 - 0.6 / 2), 0.2, 0.1])
    above = 0.5 * (1 + torch.erf(torch.arange(1.0, 6.0) / 0.5 / math.sqrt(2)))  # of a magnitude above 0
    p = p * above * torch.tensor([1.0, above[0], above[0], 1.0, 1.0])
    assert within((z > 0).double().mean(0), p, n)
    assert not bool(((z[:, 1] > 0) & (z[:, 2] > 0)).any())
    child = z[z[:, 1] > 0, 1]  # 2 * parent / 1, both of std 0.5: mean 2 (but for parents below 0), std about sqrt(1.31)
    assert abs(child.mean() - 2.0) < 0.1
    parent = z[z[:, 1] > 0, 0]
    ratio = child / parent
    assert abs(ratio.mean() - 2.0) < 4 * 0.5 / math.sqrt(len(ratio))
    again = load_synthetic(data.save(tmp_path / "ours"))
    assert torch.equal(again.sample(100, rng()).activations, data.sample(100, rng()).activations)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_features": 6}, "6 features of 3"),
        ({"mean_firing_magnitudes": {"generator_name": "cauchy"}}, "of kind 'cauchy'"),
        ({"mean_firing_magnitudes": {"generator_name": "folded_normal", "mean": 1, "std": 1}, "seed": None}, "no seed"),
        ({"mean_firing_magnitudes": {"generator_name": "linear"}}, "lacks .start"),
        ({"correlation": {"rank": 2}}, "correlation is"),
        ({"num_features": None}, "cannot read"),
    ],
)
def test_a_model_of_saelens_that_does_not_fit(changes, says, tmp_path):
    folder, _ = saelens_model(tmp_path / "model", **changes)
    with pytest.raises(FormatError, match=says):
        load_synthetic(folder)


def test_each_sibling_has_the_same_chance():
    trees = Hierarchy([Node(None, (Node(0), Node(1), Node(2)), exclusive=True)])
    out = trees.apply(SparseLatents.from_dense(torch.ones(90_000, 3)), rng())
    assert len(out.act) == 90_000
    assert within(torch.bincount(out.latent).double() / 90_000, torch.full((3,), 1 / 3), 90_000)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hierarchy([Node(0, (Node(1),)), Node(1)]), "feature 1 stands in two places"),
        (lambda: Hierarchy([Node(-3)]), "a feature is -3"),
        (lambda: Hierarchy([Node(0, (Node(1),), exclusive=True)]), "feature 0 are exclusive: 1"),
        (lambda: Hierarchy([Node(0, (Node(1), Node(None)), exclusive=True)]), "each with a feature"),
        (lambda: Node.of({"feature": 1, "chidren": []}), "'chidren'"),
        (lambda: SyntheticData(eye(2), constant(2), hierarchy=Hierarchy([Node(5)])), "feature 5"),
        (
            lambda: SyntheticData(eye(2), torch.tensor([0.1, 0.2]), hierarchy=Hierarchy([Node(0, (Node(1),))])),
            "its parent 0 on 0.1",
        ),
        (
            lambda: SyntheticData(
                eye(3), torch.tensor([0.5, 0.3, 0.3]), hierarchy=Hierarchy([Node(0, (Node(1), Node(2)), True)])
            ),
            "together",
        ),
        (lambda: SyntheticData(eye(2), torch.tensor([0.1, 1.2])), "not in 0..1"),
        (lambda: SyntheticData(eye(2), constant(2), correlation=torch.eye(3)), "correlation is of 3 features"),
        (lambda: SyntheticData(eye(2), constant(2), noise=-1.0), "noise=-1"),
        (lambda: Magnitudes("uniform"), "shape='uniform'"),
        (lambda: Magnitudes(mean=-1.0), "mean below 0"),
        (lambda: FeatureDictionary(torch.eye(2), torch.zeros(3)), r"\[features, d\] and \[d\]"),
        (lambda: random_dictionary(0, 4), "n_features=0"),
        (lambda: random_hierarchy(3, 9), "9 roots"),
    ],
)
def test_what_is_wrong_is_said(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# -- dictionaries ----------------------------------------------------------------------------------------------------


def test_no_more_features_than_dimensions_are_orthogonal():
    directions = random_dictionary(20, 32).directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(20), atol=1e-5, rtol=0)


def test_orthogonalizing_reaches_the_bound():
    """No n unit vectors in d dimensions have a smaller sum of squared cosines than n (n - d) / d."""
    n, d = 128, 32
    start = random_dictionary(n, d, orthogonal_rounds=0).directions
    done = orthogonalized(start)
    torch.testing.assert_close(done.norm(dim=1), torch.ones(n))

    def crowding(f):
        return float((f @ f.T).square().sum() - n)

    bound = n * (n - d) / d
    assert bound <= crowding(done) * (1 + 1e-5)
    assert crowding(done) < bound * (1 + 1e-4) < crowding(start) / 1.2
    assert torch.equal(start, random_dictionary(n, d, orthogonal_rounds=0).directions)


def test_a_bias_has_its_length():
    assert random_dictionary(5, 3, bias_scale=2.5).bias.norm() == pytest.approx(2.5)


def test_embedding_sparse_and_dense_and_noise():
    dictionary = random_dictionary(50, 16, bias_scale=1.0)
    data = SyntheticData(dictionary, constant(50, 0.1), Magnitudes("exponential", 3.0))
    sample = data.sample(300, rng())
    torch.testing.assert_close(sample.activations, dictionary.embed(sample.firings.dense()))
    noisy = SyntheticData(dictionary, constant(50, 0.1), Magnitudes("exponential", 3.0), noise=0.5).sample(300, rng())
    error = noisy.activations - sample.activations
    assert error.std() == pytest.approx(0.5, rel=0.05)


def test_an_sae_that_matches():
    from saewb.sae.sae import SAE, SAEConfig

    dictionary = random_dictionary(24, 16, bias_scale=1.0)
    order = torch.tensor([3, 1, 20])
    sae = SAE(SAEConfig(16, 30, pre_bias="tied"))
    result = matched_sae(sae, dictionary, order=order)
    torch.testing.assert_close(result.W_dec[:3], dictionary.directions[order])
    assert torch.equal(result.W_dec[3:], sae.W_dec[3:])
    assert torch.equal(result.b_dec, dictionary.bias)
    noisy = matched_sae(sae, dictionary, noise=1.0)
    cosines = (noisy.W_dec[:24] * dictionary.directions).sum(1)
    assert cosines.mean().item() == pytest.approx(math.sqrt(0.5), abs=0.08)  # an error as long as the direction itself
    with pytest.raises(ValueError, match="cannot match"):
        matched_sae(SAE(SAEConfig(5, 8)), dictionary)
    with pytest.raises(ValueError, match="order has 1 entries"):
        matched_sae(sae, dictionary, order=torch.tensor([24]))


# -- saved -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_draws_the_same(tmp_path):
    full = {
        "plain": SyntheticData(random_dictionary(12, 6), zipfian(12)),
        "dense": SyntheticData(random_dictionary(3, 6), constant(3), correlation=torch.eye(3) * 0.7 + 0.3),
        "low rank": SyntheticData(
            random_dictionary(12, 6), constant(12), correlation=random_low_rank_correlation(12, 2)
        ),
        "trees": SyntheticData(
            random_dictionary(8, 6, bias_scale=1.0),
            constant(8, 0.1) * torch.tensor([5, 1, 1, 0.1, 1, 1, 0.1, 1]),
            Magnitudes("folded_normal", torch.linspace(1, 2, 8), 0.1),
            hierarchy=TREE,
            noise=0.2,
        ),
    }
    for name, data in full.items():
        folder = data.save(tmp_path / name)
        again = load_synthetic(folder)
        assert repr(again) == repr(data)
        assert torch.equal(again.sample(200, rng()).activations, data.sample(200, rng()).activations)
        with pytest.raises(FileExistsError, match="is there already"):
            data.save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(full)  # nothing temporary is left


def test_what_is_no_synthetic_data_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no synthetic data"):
        load_synthetic(tmp_path)
    folder = SyntheticData(eye(2), constant(2)).save(tmp_path / "x")
    facts = folder / "synthetic.json"
    text = facts.read_text()
    facts.write_text(text.replace('"version": 2', '"version": 9'))
    with pytest.raises(FormatError, match="version 9"):
        load_synthetic(folder)
    facts.write_text(text.replace('"noise"', '"noisy"'))
    with pytest.raises(FormatError, match="lacks 'noise'"):
        load_synthetic(folder)
