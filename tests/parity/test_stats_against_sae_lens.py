"""sae-lens' statistics as the oracle where they are right; and where not, both figures and the truth."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saewb.features.enrichment import enrichment_scores
from saewb.stats.correlation import (
    LowRankCorrelation,
    correlation_stats,
    random_correlation,
    random_low_rank_correlation,
)
from saewb.stats.sampling import CorrelatedNormals
from saewb.stats.superposition import superposition

pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from sae_lens.synthetic import correlation as their_correlation
from sae_lens.synthetic import stats as theirs


def their_superposition(directions, **kwargs):
    return theirs.compute_superposition_stats(SimpleNamespace(feature_vectors=directions), **kwargs)


def dictionaries():
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(150, 20, generator=rng)
    return {
        "random": random,
        "near-orthogonal": torch.eye(40) + 1e-3 * torch.randn(40, 40, generator=rng),
        "duplicate": random[torch.arange(150) // 2],
        "opposite": random * torch.where(torch.arange(150) % 2 == 0, 1.0, -3.0)[:, None],
        "zero": random * (torch.arange(150) % 3 != 0)[:, None],
        "two": random[:2],
    }


@pytest.mark.parametrize("kind", dictionaries())
def test_superposition(kind):
    directions = dictionaries()[kind]
    overlap, oracle = superposition(directions, (50, 95, 99)), their_superposition(directions, percentiles=[50, 95, 99])
    assert overlap.max_abs_cos.numpy() == pytest.approx(oracle.max_abs_cos_sims.numpy(), abs=1e-5)
    for p in (50, 95, 99):
        assert overlap.percentile_abs_cos[p].numpy() == pytest.approx(
            oracle.percentile_abs_cos_sims[p].numpy(), abs=1e-5
        )
    assert overlap.mean_max_abs_cos == pytest.approx(oracle.mean_max_abs_cos_sim, abs=1e-6)
    assert overlap.mean_percentile_abs_cos == pytest.approx(oracle.mean_percentile_abs_cos_sim, abs=1e-6)
    assert overlap.mean_abs_cos == pytest.approx(oracle.mean_abs_cos_sim, abs=1e-6)
    assert (overlap.n_features, overlap.d) == (oracle.num_features, oracle.hidden_dim)


def test_superposition_of_its_own_dictionary_and_its_error():
    dictionary = FeatureDictionary(30, 8, initializer=None)
    overlap, oracle = superposition(dictionary.feature_vectors), theirs.compute_superposition_stats(dictionary)
    assert overlap.max_abs_cos.numpy() == pytest.approx(oracle.max_abs_cos_sims.numpy(), abs=1e-5)
    sentence = "Need at least 2 features to compute superposition stats"
    for function in (superposition, their_superposition):
        with pytest.raises(ValueError, match=sentence):
            function(torch.ones(1, 4))


@pytest.mark.parametrize("n", [2, 60])
def test_correlation_statistics(n):
    low = random_low_rank_correlation(n, 5, scale=0.2, seed=1)
    their_low = their_correlation.LowRankCorrelationMatrix(low.factor, low.diag)
    for ours, oracle in [
        (correlation_stats(low), theirs.compute_low_rank_correlation_matrix_stats(their_low)),
        (correlation_stats(low.dense()), theirs.compute_correlation_matrix_stats(low.dense())),
    ]:
        assert ours.rms == pytest.approx(oracle.rms_correlation, abs=1e-6)
        assert ours.mean == pytest.approx(oracle.mean_correlation, abs=1e-6)
        assert ours.n_features == oracle.num_features


def test_random_low_rank_is_the_same_draw_and_warns_alike(monkeypatch):
    items = []  # not by caplog, which hears nothing once other tests have touched the peer's logger
    monkeypatch.setattr(their_correlation.logger, "warning", items.append)
    theirs_low = their_correlation.generate_random_low_rank_correlation_matrix(300, 100, 0.1, seed=7)
    with pytest.warns(UserWarning, match="rows were capped") as warned:
        ours = random_low_rank_correlation(300, 100, scale=0.1, seed=7)
    assert torch.equal(ours.factor, theirs_low.correlation_factor)
    assert ours.diag.numpy() == pytest.approx(theirs_low.correlation_diag.numpy(), abs=1e-5)
    assert items == [str(warned[0].message)]


def test_random_dense_is_of_the_same_kind():
    options = {"seed": 0}
    ours = random_correlation(300, min_strength=0.001, max_strength=0.01, **options)
    oracle = their_correlation.generate_random_correlation_matrix(
        300, min_correlation_strength=0.001, max_correlation_strength=0.01, **options
    )
    for statistic in (lambda c: (c == 0).double().mean(), lambda c: (c < 0).double().mean(), lambda c: c.abs().mean()):
        assert statistic(ours).item() == pytest.approx(statistic(oracle).item(), rel=0.03)


def test_samples_fire_alike():
    matrix = random_low_rank_correlation(40, 3, scale=0.3, seed=0).dense()
    p = torch.linspace(0.05, 0.5, 40)
    generator = ActivationGenerator(40, p, correlation_matrix=matrix)
    fires = CorrelatedNormals(matrix).fires(60_000, p, torch.Generator().manual_seed(0)).double()
    oracle = (generator.sample(60_000) > 0).double()
    assert fires.mean(0).numpy() == pytest.approx(oracle.mean(0).numpy(), abs=0.012)
    assert (fires.T @ fires / 60_000).numpy() == pytest.approx((oracle.T @ oracle / 60_000).numpy(), abs=0.012)


def test_enrichment_scores():
    try:
        from sae_lens.tutorial.tsea import calculate_batch_enrichment_scores
    except ImportError as error:
        pytest.skip(f"the oracle's own dependencies are not installed: {error}")
    effects = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    sets = [torch.arange(9), torch.arange(50, 100)]
    padded = torch.full((2, 50), -1)
    padded[0, :9], padded[1] = sets
    oracle = calculate_batch_enrichment_scores(effects, padded).T
    assert enrichment_scores(effects, sets).abs().numpy() == pytest.approx(oracle.numpy(), abs=1e-5)


# -- where sae-lens 6.54.12 is wrong -----------------------------------------------------------------------------------


def test_cosines_of_short_directions():
    """It divides by at least 1e-8, so directions shorter than that are no longer of length 1: cosines shrink."""
    directions = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    truth = math.sqrt(0.5)
    short = directions * torch.tensor([[1e-10], [1.0]])
    assert their_superposition(short).max_abs_cos_sims.tolist() == pytest.approx([0.01 * math.sqrt(2) * truth] * 2)
    assert superposition(short).max_abs_cos.tolist() == pytest.approx([truth] * 2)


def test_cosines_of_directions_whose_length_overflows():
    """||x||² beyond float32 makes its lengths infinite and all cosines 0."""
    directions = torch.tensor([[1e30, 1e30], [1.0, 0.0]])
    assert their_superposition(directions).mean_max_abs_cos_sim == 0
    assert superposition(directions).mean_max_abs_cos == pytest.approx(math.sqrt(0.5))


def test_weak_correlation_beside_strong_variance():
    """It subtracts sums of about equal size in float32: of entries of 1e-5 nothing is left, or the root of less."""
    factor = torch.tensor([[0.9, 0.0], [1e-5, 0.9]])
    oracle = theirs.compute_low_rank_correlation_matrix_stats(
        their_correlation.LowRankCorrelationMatrix(factor, 1 - factor.square().sum(1))
    )
    assert oracle.rms_correlation != pytest.approx(9e-6, rel=0.5)  # nan or 0 or a rounding
    result = correlation_stats(LowRankCorrelation.of(factor))
    assert (result.rms, result.mean) == pytest.approx((9e-6, 9e-6), rel=1e-6)


def test_random_dense_matrix_without_a_cholesky_factor():
    """Its repair leaves eigenvalues of 1e-6, which float32 rounds to below 0 soon; its own sampler then refuses."""
    failed = []
    for seed in range(4):
        oracle = their_correlation.generate_random_correlation_matrix(400, seed=seed)
        failed.append(int(torch.linalg.cholesky_ex(oracle).info) != 0)
        assert int(torch.linalg.cholesky_ex(random_correlation(400, seed=seed)).info) == 0
    assert np.mean(failed) > 0.5
