"""sae-lens' synthetic toolkit as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saewb.sae.sae import SAE, SAEConfig
from saewb.synthetic import (
    RecoveryStream,
    SyntheticData,
    constant,
    linear,
    load_synthetic,
    mean_correlation_coefficient,
    random_dictionary,
    uniqueness,
    zipfian,
)

pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.synthetic import evals as theirs
from sae_lens.synthetic import firing_probabilities, synthetic_model
from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from sae_lens.synthetic.hierarchy import HierarchyConfig


def test_firing_probabilities():
    want = firing_probabilities.zipfian_firing_probabilities(50, exponent=1.3, max_prob=0.3, min_prob=0.01)
    np.testing.assert_allclose(zipfian(50, 1.3, 0.3, 0.01).numpy(), want.numpy(), rtol=1e-5)
    want = firing_probabilities.linear_firing_probabilities(50, max_prob=0.3, min_prob=0.01)
    np.testing.assert_allclose(linear(50, 0.3, 0.01).numpy(), want.numpy(), rtol=1e-5)


def test_scores():
    data = SyntheticData(random_dictionary(40, 16), constant(40, 0.1))
    sae = SAE(SAEConfig(16, 30, "topk", k=4), seed=3)
    sample = data.sample(500, torch.Generator().manual_seed(0))
    stream = RecoveryStream(sae, data.dictionary.directions)
    stream.update(sample)
    result, truth = stream.result(), data.dictionary.directions
    W_dec, latents = sae.W_dec.detach(), sae.encode(sample.activations).detach()
    assert result.mcc == pytest.approx(theirs.mean_correlation_coefficient(W_dec, truth), rel=1e-5)
    assert result.uniqueness == theirs.feature_uniqueness(W_dec, truth)
    want = theirs.compute_classification_metrics(latents, sample.firings.dense(), W_dec, truth)
    for name in ("precision", "recall", "accuracy"):
        assert getattr(result, name) == pytest.approx(getattr(want, name), rel=1e-5), name
    assert result.f1 == pytest.approx(want.f1_score, rel=1e-5)
    shrinkage = theirs.ShrinkageCalculator()
    shrinkage.add_batch(sae.decode(latents).detach(), sample.activations)
    assert result.l2_ratio == pytest.approx(shrinkage.compute(), rel=1e-5)


def test_a_row_of_zeros_agrees_with_nothing():
    a = torch.eye(3)
    a[1] = 0
    assert mean_correlation_coefficient(a, torch.eye(3)) == pytest.approx(2 / 3)
    assert uniqueness(a, torch.eye(3)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("correlated", [False, True])
def test_a_saved_synthetic_model(correlated, tmp_path):
    """Directions, bias and magnitudes are theirs to the bit; rates, means and joint rates within 4 standard errors."""
    config = synthetic_model.SyntheticModelConfig(
        num_features=60,
        hidden_dim=16,
        hierarchy=HierarchyConfig(
            total_root_nodes=4,
            branching_factor=3,
            max_depth=2,
            mutually_exclusive_portion=0.5,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=synthetic_model.LowRankCorrelationConfig(rank=4, correlation_scale=0.2) if correlated else None,
        mean_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=2.0, std=0.5, min_value=0.5),
        std_firing_magnitudes=LinearMagnitudeConfig(start=0.2, end=0.9),
        seed=5,
    )
    their = synthetic_model.SyntheticModel(config)
    their.save(tmp_path)
    ours, n = load_synthetic(tmp_path), 100_000
    assert torch.equal(ours.dictionary.directions, their.feature_dict.feature_vectors.data)
    assert torch.equal(ours.probability, their.activation_generator.firing_probabilities)
    assert torch.equal(ours.magnitudes.mean, their.activation_generator.mean_firing_magnitudes)
    assert torch.equal(ours.magnitudes.std, their.activation_generator.std_firing_magnitudes)
    z = torch.rand(7, 60)
    torch.testing.assert_close(ours.dictionary.embed(z), their.feature_dict(z).detach(), rtol=0, atol=1e-6)
    torch.manual_seed(1)
    want = their.sample_with_features(n)[1].double()
    got = ours.sample(n, torch.Generator().manual_seed(2)).firings.dense().double()

    def within(a, b):
        error = (a.var(0) / n + b.var(0) / n).sqrt()
        return bool(((a.mean(0) - b.mean(0)).abs() <= 4 * error + 1e-12).all())

    assert within(got, want)  # mean activations, with scaling by parents
    assert within((got > 0).double(), (want > 0).double())
    i, j = torch.combinations(torch.arange(20), 2).unbind(1)
    assert within(*(((z[:, i] > 0) & (z[:, j] > 0)).double() for z in (got, want)))  # joint rates
