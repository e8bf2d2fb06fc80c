"""Rank statistics of sparse columns: scipy as oracle, definitions in numpy, families of permutations, error rates."""

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.probing.contrast import latent_statistics
from saewb.probing.rank_statistics import ColumnRanks, EffectSizes, auc_of, delong_interval


def random_columns(seed=0, n=60, d=40, density=0.3, negative=False):
    """Sparse, with many ties: values are rounded."""
    rng = np.random.default_rng(seed)
    z = np.round(rng.exponential(2.0, (n, d)), 1) * (rng.random((n, d)) < rng.uniform(0, 2 * density, d))
    z *= rng.choice([-1, 1], (n, d)) if negative else 1
    z[:, 0] = 0  # a latent that never fires
    z[:, 1] = 1  # one that is the same everywhere
    z[:, 2] = np.arange(n) + 1  # one without zeros or ties
    return z, rng.random(n) < 0.4


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_auc_and_p_are_scipys(seed, negative):
    z, is_a = random_columns(seed, negative=negative)
    ranks = ColumnRanks.of(scipy.sparse.csr_array(z))
    oracle = scipy.stats.mannwhitneyu(z[is_a], z[~is_a], method="asymptotic", use_continuity=True)
    auc = oracle.statistic / (is_a.sum() * (~is_a).sum())
    np.testing.assert_allclose(ranks.auc(is_a), auc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ranks.p_values(is_a), oracle.pvalue, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(4, 30), st.booleans())
@examples(60)
def test_auc_by_its_definition(seed, n, negative):
    z, is_a = random_columns(seed, n=n, d=5, negative=negative)
    is_a[:2] = [True, False]
    pairs = z[is_a][:, None] - z[~is_a][None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean((0, 1))
    np.testing.assert_allclose(ColumnRanks.of(scipy.sparse.csr_array(z)).auc(is_a), expected, rtol=0, atol=1e-12)
    assert auc_of(z[:, 3], is_a) == pytest.approx(expected[3], abs=1e-12)


def test_ranks_in_blocks_are_the_same(monkeypatch):
    z, is_a = random_columns(negative=True)
    matrix = scipy.sparse.csr_array(z)
    whole = ColumnRanks.of(matrix).p_values(is_a), EffectSizes.of(matrix, is_a)
    monkeypatch.setattr("saewb.probing.rank_statistics._ENTRIES", 50)
    np.testing.assert_array_equal(ColumnRanks.of(matrix).p_values(is_a), whole[0])
    np.testing.assert_array_equal(EffectSizes.of(matrix, is_a).separation, whole[1].separation)


def test_effect_sizes_by_their_formulas():
    z, is_a = random_columns(3)
    sizes = EffectSizes.of(scipy.sparse.csr_array(z), is_a)
    a, b = z[is_a], z[~is_a]
    k_a, k_b, n_a, n_b = (a > 0).sum(0), (b > 0).sum(0), len(a), len(b)
    np.testing.assert_allclose(sizes.freq_a, k_a / n_a)
    np.testing.assert_allclose(sizes.mean_b, b.mean(0), atol=1e-14)
    expected = np.log((k_a + 0.5) * (n_b - k_b + 0.5) / ((k_b + 0.5) * (n_a - k_a + 0.5)))
    np.testing.assert_allclose(sizes.log_odds, expected, atol=1e-14)
    pooled = ((n_a - 1) * a.var(0, ddof=1) + (n_b - 1) * b.var(0, ddof=1)) / (n_a + n_b - 2)
    varies = pooled > 1e-12
    assert np.isnan(sizes.d[~varies]).all()
    difference = a.mean(0) - b.mean(0)
    np.testing.assert_allclose(sizes.d[varies], difference[varies] / np.sqrt(pooled[varies]), rtol=1e-12)
    for column in range(z.shape[1]):  # a tenth of 60 texts, with those equal to the sixth
        values = z[:, column]
        limit = np.sort(values)[-6]
        top, zero = (values >= limit) & (values > 0), values == 0
        if top.any() and zero.any():
            assert sizes.separation[column] == pytest.approx(is_a[top].mean() - is_a[zero].mean(), abs=1e-12)
        else:
            assert np.isnan(sizes.separation[column])


def test_delong_by_its_definition():
    z, is_a = random_columns(5, negative=True)
    low, high = delong_interval(scipy.sparse.csr_array(z), is_a)
    for column in range(z.shape[1]):
        a, b = z[is_a, column], z[~is_a, column]
        psi = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
        variance = psi.mean(1).var(ddof=1) / len(a) + psi.mean(0).var(ddof=1) / len(b)
        half = scipy.stats.norm.ppf(0.975) * np.sqrt(variance)
        assert low[column] == pytest.approx(max(0, psi.mean() - half), abs=1e-12)
        assert high[column] == pytest.approx(min(1, psi.mean() + half), abs=1e-12)


def test_delong_covers_what_it_says():
    rng = np.random.default_rng(0)
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))  # of two normals one standard deviation apart
    is_a = np.arange(80) < 40
    z = rng.standard_normal((80, 2000)) + is_a[:, None]
    low, high = delong_interval(scipy.sparse.csr_array(z), is_a)
    assert ((low <= truth) & (truth <= high)).mean() == pytest.approx(0.95, abs=0.02)


def test_family_p_by_its_definition():
    z, is_a = random_columns(7, n=30, d=12)
    ranks, family = ColumnRanks.of(scipy.sparse.csr_array(z)), np.array([2, 3, 5, 8, 11])
    p = ranks.family_p(is_a, family, n_permutations=200, seed=4)
    dense, n_a, n = scipy.stats.rankdata(z[:, family], axis=0), int(is_a.sum()), len(z)
    ties = np.array([(c**3 - c).sum() for c in (np.unique(z[:, i], return_counts=True)[1] for i in family)])
    sigma = np.sqrt(n_a * (n - n_a) / 12 * (n + 1 - ties / (n * (n - 1))))

    def statistic(labels):
        return np.abs(dense[labels].sum(0) - n_a * (n + 1) / 2) / np.where(sigma > 0, sigma, np.inf)

    rng = np.random.default_rng(4)
    labels = np.tile(is_a.astype(float), (200, 1))
    largest = np.array([statistic(row > 0).max() for row in rng.permuted(labels, axis=1)])
    expected = (1 + (largest[:, None] >= statistic(is_a) - 1e-9).sum(0)) / 201
    np.testing.assert_allclose(p, expected, atol=1e-12)


def pooled_texts(rng, n=100, d=300, shift=0.0):
    """Pooled values of texts in which column 17 fires more often in the first half."""
    is_a = np.arange(n) < n // 2
    rate = np.tile(rng.uniform(0.02, 0.6, d), (n, 1))
    rate[:, 17] = 0.2 + shift * is_a
    z = rng.exponential(1.0, (n, d)) * (rng.random((n, d)) < rate)
    return scipy.sparse.csr_array(z), is_a


def test_a_planted_difference_is_first():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix, is_a = pooled_texts(rng, n=160, shift=0.6)
        table = latent_statistics(matrix, is_a, rng.permutation(160) < 80, n_permutations=200, seed=seed)
        best = table.iloc[(table.auc - 0.5).abs().argmax()]
        assert best.latent == 17
        assert best.q < 0.01
        assert best.p_family < 0.01
        assert best.auc_held_out > 0.7
        assert best.ci_low < best.auc_held_out < best.ci_high


def test_without_a_difference_one_in_twenty_families_errs():
    """And the best latent, which looks good on the texts that chose it, is at chance on the others."""
    errors, chosen, held_out = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        matrix, is_a = pooled_texts(rng, d=200)
        table = latent_statistics(matrix, is_a, np.arange(100) % 2 == 0, n_permutations=200, seed=seed)
        errors.append(table.p_family.min() < 0.05)
        best = (table.auc - 0.5).abs().argmax()
        sign = np.sign(table.auc[best] - 0.5)
        chosen.append(0.5 + sign * (table.auc[best] - 0.5))
        held_out.append(0.5 + sign * (table.auc_held_out[best] - 0.5))
    assert np.mean(errors) == pytest.approx(0.05, abs=0.03)
    assert np.mean(chosen) > 0.7
    assert np.mean(held_out) == pytest.approx(0.5, abs=0.02)


def test_latents_on_few_texts_are_not_tested():
    matrix, is_a = pooled_texts(np.random.default_rng(0))
    dense = matrix.toarray()
    dense[2:, 5] = 0
    dense[:, 6] = 0
    table = latent_statistics(scipy.sparse.csr_array(dense), is_a, n_permutations=20, min_texts=3)
    assert table.q.isna().tolist() == table.p_family.isna().tolist() == (table.n_texts < 3).tolist()
    assert table.auc[6] == 0.5
    assert table.p[6] == 1
    assert table.auc_held_out.isna().all()
    matrix_empty = scipy.sparse.csr_array((10, 4))
    empty = latent_statistics(matrix_empty, np.arange(10) < 5, n_permutations=5)
    assert (empty.auc == 0.5).all()
    assert empty.q.isna().all()
