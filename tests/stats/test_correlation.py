"""Correlation matrices: what they amount to, dense and low-rank alike; random ones; samples that have them."""

import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from helpers.peak_memory import peak_bytes
from hypothesis import given
from hypothesis import strategies as st

from saewb.stats.correlation import (
    LowRankCorrelation,
    correlation_stats,
    random_correlation,
    random_low_rank_correlation,
)
from saewb.stats.sampling import CorrelatedNormals


def plain(matrix):
    off = matrix.double().numpy()[~np.eye(len(matrix), dtype=bool)]
    return np.sqrt(np.square(off).mean()), off.mean()


# -- statistics: perfect, baseline, scale, by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 100])
def test_no_correlation_and_full_correlation(n):
    none, full = correlation_stats(torch.eye(n)), correlation_stats(torch.ones(n, n))
    assert (none.rms, none.mean, none.n_features) == (0, 0, n)
    assert (full.rms, full.mean) == pytest.approx((1, 1), rel=1e-6)
    low = correlation_stats(LowRankCorrelation(torch.zeros(n, 3), torch.ones(n)))
    assert (low.rms, low.mean) == (0, 0)
    assert correlation_stats(LowRankCorrelation.of(torch.ones(n, 1))).rms == pytest.approx(1, rel=1e-6)


def test_random_signs_have_mean_0_and_their_strength_as_rms():
    signs = torch.where(torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    result = correlation_stats(LowRankCorrelation.of(signs * 0.5))
    assert result.rms == pytest.approx(0.25, rel=1e-6)
    assert abs(result.mean) < 0.01


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 0.5])
def test_both_scale_with_the_entries_off_the_diagonal(scale):
    """Down to entries whose squares vanish beside the diagonal's 1 in float32."""
    factor = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).mul_(0.3)
    matrix = (factor @ factor.T).mul_(scale).fill_diagonal_(1.0)
    base, result = correlation_stats((factor @ factor.T).fill_diagonal_(1.0)), correlation_stats(matrix)
    assert result.rms == pytest.approx(base.rms * scale, rel=1e-5)
    assert result.mean == pytest.approx(base.mean * scale, rel=1e-5)


def test_by_hand():
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, -0.7], [0.0, -0.7, 1.0]])
    result = correlation_stats(matrix)
    assert result.rms == pytest.approx(math.sqrt((0.25 + 0.49) / 3))
    assert result.mean == pytest.approx(-0.2 / 3)
    low = correlation_stats(LowRankCorrelation.of(torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.5, 0.5]])))  # 0, .3, .4
    assert (low.rms, low.mean) == pytest.approx((math.sqrt(0.25 / 3), 0.7 / 3), rel=1e-6)


@examples(40)
@given(st.integers(2, 60), st.integers(1, 8), st.sampled_from([0.0, 1e-3, 0.1, 0.35]), st.integers(0, 9999))
def test_dense_and_low_rank_and_the_definition_agree(n, rank, scale, seed):
    factor = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    factor /= factor.norm(dim=1, keepdim=True).clamp(min=1)
    low = LowRankCorrelation.of(factor)
    rms, mean = plain(low.dense())
    for form in (low, low.dense(), LowRankCorrelation.of(factor.float() * (1 - 1e-7)), low.dense().float()):
        result = correlation_stats(form)
        assert (result.rms, result.mean, result.n_features) == (
            pytest.approx(rms, abs=1e-6), pytest.approx(mean, abs=1e-6), n)  # fmt: skip


def test_a_matrix_of_many_blocks_and_one_that_is_not_contiguous(monkeypatch):
    from saewb.stats import correlation

    monkeypatch.setattr(correlation, "_BLOCK", 700)
    matrix = torch.randn(90, 90, generator=torch.Generator().manual_seed(0))
    for form in (matrix, matrix.T, matrix.repeat(2, 2)[::2, ::2]):
        assert (correlation_stats(form).rms, correlation_stats(form).mean) == pytest.approx(plain(form), rel=1e-6)


def test_dense_statistics_take_no_memory_of_the_size_of_the_matrix():
    before = """
from saewb.stats.correlation import correlation_stats
matrix = torch.eye(6000)
correlation_stats(matrix[:100, :100])
"""
    assert peak_bytes(before, "correlation_stats(matrix)") < 6000 * 6000 * 4 / 8


# -- random ones -------------------------------------------------------------------------------------------------------


def test_random_dense_is_what_was_asked_for_where_it_need_not_be_repaired():
    matrix = random_correlation(
        400, positive_frac=0.7, uncorrelated_frac=0.4, min_strength=0.005, max_strength=0.01, seed=3
    )
    off = matrix[torch.triu(torch.ones(400, 400, dtype=torch.bool), 1)]
    assert torch.equal(matrix, matrix.T)
    assert bool((matrix.diagonal() == 1).all())
    assert (off == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
    strong = off[off != 0]
    assert (strong > 0).double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert 0.005 <= strong.abs().min() < 0.00501
    assert 0.00999 < strong.abs().max() <= 0.01
    assert strong.abs().mean().item() == pytest.approx(0.0075, rel=0.01)


@pytest.mark.parametrize("n", [1, 2, 30, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_dense_always_has_a_cholesky_factor(n, dtype):
    """At these strengths the matrix as drawn has none."""
    matrix = random_correlation(n, dtype=dtype, seed=1)
    assert bool((matrix.diagonal() == 1).all())
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().max() <= 1
    torch.linalg.cholesky(matrix)


def test_random_dense_one_strong_pair_is_left_as_it_is():
    matrix = random_correlation(2, uncorrelated_frac=0.0, positive_frac=0.0, min_strength=0.6, max_strength=0.6)
    assert matrix.flatten().tolist() == pytest.approx([1, -0.6, -0.6, 1])


@pytest.mark.parametrize("make", [
    lambda seed: random_correlation(20, seed=seed), lambda seed: random_low_rank_correlation(20, 3, seed=seed).factor,
])  # fmt: skip
def test_the_seed_decides_and_nothing_global_does(make):
    state = torch.random.get_rng_state()
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_low_rank_by_its_definition():
    result = random_low_rank_correlation(2000, 25)
    assert result.factor.std().item() == pytest.approx(0.075, rel=0.02)
    assert (result.factor.square().sum(1) + result.diag).numpy() == pytest.approx(np.ones(2000), abs=1e-6)
    assert correlation_stats(result).rms == pytest.approx(0.075**2 * 5, rel=0.05)


def test_rows_that_are_too_long_are_capped_alone_and_counted():
    alone = torch.randn(500, 100, generator=torch.Generator().manual_seed(0)).mul_(0.1)
    long = alone.square().sum(1) > 0.99
    with pytest.warns(UserWarning, match=rf"^{int(long.sum())} / 500 rows were capped\. Either reduce the rank or"):
        result = random_low_rank_correlation(500, 100, scale=0.1)
    assert 100 < long.sum() < 400
    assert torch.equal(result.factor[~long], alone[~long])
    assert result.factor[long].square().sum(1).numpy() == pytest.approx(0.99, abs=1e-5)
    assert result.diag[long].numpy() == pytest.approx(0.01, abs=1e-6)
    torch.linalg.cholesky(result.dense())


@pytest.mark.parametrize(("call", "text"), [
    (lambda: random_correlation(5, positive_frac=1.1), "positive_frac=1.1"),
    (lambda: random_correlation(5, max_strength=-0.1), "max_strength=-0.1"),
    (lambda: random_correlation(5, min_strength=0.5, max_strength=0.2), "strengths 0.5..0.2"),
    (lambda: random_correlation(0), "n_features=0"),
    (lambda: random_low_rank_correlation(5, 0), "rank=0"),
    (lambda: random_low_rank_correlation(5, 2, scale=-1.0), "scale=-1.0"),
    (lambda: random_low_rank_correlation(5, 2, scale=math.nan), "scale=nan"),
    (lambda: correlation_stats(torch.eye(1)), "1 features has no pairs"),
    (lambda: correlation_stats(LowRankCorrelation.of(torch.ones(1, 1))), "1 features has no pairs"),
    (lambda: LowRankCorrelation.of(torch.ones(2, 2)), "off 1"),
    (lambda: LowRankCorrelation(torch.zeros(2, 2), torch.zeros(2)), "off 1 on|off 1 by"),
    (lambda: CorrelatedNormals(torch.eye(3) * 2), "off 1 on the diagonal by 1"),
    (lambda: CorrelatedNormals(torch.eye(3) + torch.ones(3, 3).triu(1)), "off symmetric by 1"),
    (lambda: CorrelatedNormals(torch.ones(3, 3)), "not positive definite"),
    (lambda: CorrelatedNormals(torch.eye(3)).fires(5, 1.5), "not in 0..1"),
])  # fmt: skip
def test_wrong_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_samples_have_the_correlation_and_unit_variance(form):
    low = LowRankCorrelation.of(torch.tensor([[0.9, 0.0], [0.6, 0.6], [-0.5, 0.5], [0.0, 0.0]]))
    normals = CorrelatedNormals(low if form == "low rank" else low.dense())
    z = normals.sample(200_000, torch.Generator().manual_seed(0))
    assert z.mean(0).numpy() == pytest.approx(np.zeros(4), abs=0.01)
    assert z.T.cov().numpy() == pytest.approx(low.dense().numpy(), abs=0.015)


def test_firing_has_its_probabilities_and_the_copula_of_two():
    """Of two normal numbers with correlation r, both are above 0 with probability 1/4 + asin(r) / 2 pi."""
    r = 0.8
    normals = CorrelatedNormals(torch.tensor([[1.0, r, 0.0], [r, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    fires = normals.fires(200_000, torch.tensor([0.5, 0.5, 0.03]), torch.Generator().manual_seed(1))
    assert fires.double().mean(0).tolist() == pytest.approx([0.5, 0.5, 0.03], abs=0.004)
    assert (fires[:, 0] & fires[:, 1]).double().mean().item() == pytest.approx(
        0.25 + math.asin(r) / 2 / math.pi, abs=0.004
    )
    assert (fires[:, 0] & fires[:, 2]).double().mean().item() == pytest.approx(0.015, abs=0.002)
    ends = normals.fires(100, torch.tensor([0.0, 1.0, 0.5]))
    assert ends[:, :2].double().mean(0).tolist() == [0, 1]


def test_sampling_factorises_once(monkeypatch):
    normals = CorrelatedNormals(torch.eye(4))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    rng = torch.Generator().manual_seed(0)
    first, second = normals.sample(3, rng), normals.sample(3, rng)
    assert first.shape == (3, 4)
    assert not torch.equal(first, second)
