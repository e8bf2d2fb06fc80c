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
    mean_correlation_coefficient,
    random_dictionary,
    uniqueness,
    zipfian,
)

pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.synthetic import evals as theirs
from sae_lens.synthetic import firing_probabilities


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
