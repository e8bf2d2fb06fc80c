"""Recovery: perfect, baseline, by hand, in batches; and as sae-lens has it."""

import itertools
import math

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.sparse import SparseLatents
from saewb.synthetic import (
    FeatureDictionary,
    RecoveryStream,
    Sample,
    SyntheticData,
    best_ordering,
    constant,
    matched_sae,
    mean_correlation_coefficient,
    random_dictionary,
    recovery,
    uniqueness,
)


def directions(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [3, 5, 6])
def test_mcc_is_the_best_of_all_matchings(n):
    a, b = directions(n, 4), directions(5, 4, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).abs()
    few, many = sorted((n, 5))
    table = cosines if n <= 5 else cosines.T
    best = max(sum(table[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(many), few)) / few
    assert mean_correlation_coefficient(a, b) == pytest.approx(float(best), rel=1e-6)


def test_mcc_perfect_baseline_scale():
    a = directions(6, 8)
    assert mean_correlation_coefficient(a, -3 * a[[4, 0, 5, 1, 3, 2]]) == pytest.approx(1, abs=1e-6)
    assert mean_correlation_coefficient(torch.eye(6)[:3], torch.eye(6)[3:]) == 0
    assert mean_correlation_coefficient(a * 1e-9, directions(6, 8, 1)) == pytest.approx(
        mean_correlation_coefficient(a, directions(6, 8, 1)), rel=1e-5
    )
    with pytest.raises(ValueError, match="got directions"):
        mean_correlation_coefficient(a[:0], a)


def test_uniqueness_and_ordering():
    features = torch.eye(4)
    assert uniqueness(features, features) == 1
    assert uniqueness(features[[0, 0, 0, 0]], features) == 0.25
    latents = torch.tensor([[0.0, 0, 1, 0.1], [1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
    assert best_ordering(latents, features).tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match="no latents"):
        uniqueness(features[:0], features)


def test_the_truth_itself_is_perfect():
    data = SyntheticData(random_dictionary(24, 32), constant(24, 0.1))
    sae = matched_sae(SAE(SAEConfig(32, 24)), data.dictionary)
    with torch.no_grad():
        sae.b_enc.fill_(-1e-4)  # orthogonal to rounding only
    result = recovery(sae, data, 3000)
    for name in ("mcc", "uniqueness", "precision", "recall", "f1", "accuracy", "l2_ratio", "explained_variance"):
        assert getattr(result, name) == pytest.approx(1, abs=1e-3), name
    assert result.l0 == pytest.approx(result.true_l0)
    assert (result.dead_frac, result.n_samples) == (0, 3000)
    assert result.feature.tolist() == list(range(24))


def test_an_sae_that_never_fires():
    data = SyntheticData(random_dictionary(24, 32), constant(24, 0.1))
    sae = matched_sae(SAE(SAEConfig(32, 24)), data.dictionary)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    result = recovery(sae, data, 1000)
    assert (result.dead_frac, result.l0, result.recall, result.f1, result.precision) == (1, 0, 0, 0, 0)
    assert result.mcc == pytest.approx(1, abs=1e-5)


def by_hand():
    """Latent 0 is right on 2 of 3 samples on which it is on, and misses 1; latent 1 is always on."""
    sae = SAE(SAEConfig(2, 2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 1], [1, 1], [1, 1], [-1, 1], [-1, 1]])
    truth = torch.tensor([[1.0, 1], [1, 0], [0, 0], [1, 0], [0, 0]])
    return sae, Sample(x, SparseLatents.from_dense(truth))


def test_by_hand():
    sae, sample = by_hand()
    stream = RecoveryStream(sae, torch.eye(2))
    stream.update(sample)
    result = stream.result()
    assert result.latent_precision.tolist() == pytest.approx([2 / 3, 1 / 5])
    assert result.latent_recall.tolist() == pytest.approx([2 / 3, 1])
    assert result.latent_f1.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert result.accuracy == pytest.approx((3 / 5 + 1 / 5) / 2)
    assert (result.true_l0, result.l0) == (4 / 5, 8 / 5)
    frame = result.latents()
    assert frame.f1.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert result.to_frame().shape == (1, 12)


@examples(30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 99))
def test_batches_make_no_difference(sizes, seed):
    data = SyntheticData(random_dictionary(12, 8), constant(12, 0.2))
    sample = data.sample(sum(sizes) + 2, torch.Generator().manual_seed(seed))
    sae = SAE(SAEConfig(8, 10, "topk", k=2), seed=seed)
    whole, parts = (RecoveryStream(sae, data.dictionary.directions) for _ in range(2))
    whole.update(sample)
    dense, start = sample.firings.dense(), 0
    for size in [*sizes, 2]:
        parts.update(
            Sample(sample.activations[start : start + size], SparseLatents.from_dense(dense[start : start + size]))
        )
        start += size
    a, b = whole.result(), parts.result()
    for name in ("true_l0", "l0", "precision", "recall", "f1", "accuracy", "explained_variance", "l2_ratio"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6, abs=1e-6), name


def test_another_width_is_an_error():
    with pytest.raises(ValueError, match="writes 8 dimensions"):
        RecoveryStream(SAE(SAEConfig(8, 10)), torch.eye(5))
    with pytest.raises(ValueError, match="n_samples=0"):
        recovery(SAE(SAEConfig(2, 2)), SyntheticData(FeatureDictionary(torch.eye(2), torch.zeros(2)), constant(2)), 0)


def test_random_directions_score_about_what_the_docstring_says():
    result = mean_correlation_coefficient(directions(128, 64), directions(128, 64, 1))
    assert result == pytest.approx(math.sqrt(2 * math.log(128) / 64), rel=0.25)
