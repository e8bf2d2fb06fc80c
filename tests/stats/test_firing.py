"""Firing figures: by hand, sparse as dense, in any batches."""

import math

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.sae.sparse import SparseLatents
from saewb.stats.firing import FiringStream

LATENTS = torch.tensor([[0.0, 2.0, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.5, -9.0, 0.0], [0.0, 0.0, 1.0, 0.0]])


def firing(*batches, lengths=None, **limits):
    stream = FiringStream()
    for batch in batches:
        stream.update(batch, lengths)
    return stream.result(**limits)


def as_top(dense, k=3):
    indices = dense.abs().topk(k).indices
    return SparseLatents.from_topk(dense.gather(1, indices), indices, tuple(dense.shape))


@pytest.mark.parametrize("form", [lambda x: x, as_top], ids=["dense", "sparse"])
def test_by_hand(form):
    result = firing(form(LATENTS), lengths=[1, 3])
    assert result.l1 == 16.5 / 4
    assert result.density.tolist() == [0, 0.5, 1, 0]
    assert result.mean_activation.nan_to_num(-1).tolist() == [-1, 1.25, 3.5, -1]
    assert result.max_activation.tolist() == [0, 2, 9, 0]
    assert result.consistent_activation.nan_to_num(-1).tolist() == [-1, 1, 2, -1]


@pytest.mark.parametrize("scale", [1e-20, -3.0])
def test_scale(scale):
    result, base = firing(LATENTS * scale), firing(LATENTS)
    assert result.l1 == pytest.approx(base.l1 * abs(scale), rel=1e-6)
    assert result.consistent_activation.nan_to_num().equal(base.consistent_activation.nan_to_num())


def test_always_and_never():
    on, off = firing(torch.ones(6, 5), lengths=[2, 4]), firing(torch.zeros(6, 5))
    assert on.consistent_activation.tolist() == [3] * 5
    assert (on.alive_frac, on.dense_frac, on.dead_frac) == (1, 1, 0)
    assert (off.alive_frac, off.l1, off.ultra_low_frac) == (0, 0, 0)
    assert all(math.isnan(v) for v in off.mean_activation)


def test_ultra_low_density_is_alive_and_rare():
    latents = torch.zeros(1000, 4)
    latents[0, 1] = latents[:20, 2] = latents[:500, 3] = 1
    result = firing(latents, dead_below=1e-6, ultra_low_below=0.01, dense_above=0.1)
    assert (result.dead_frac, result.ultra_low_frac, result.dense_frac) == (0.25, 0.25, 0.25)


@examples(50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum), st.integers(0, 999), st.integers(0, 6))
def test_any_batches_of_whole_rows_sparse_or_dense(lengths, seed, cut):
    latents = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(seed)).double()
    latents[latents.abs() < 0.8] = 0
    whole = firing(latents, lengths=lengths)
    for form in (lambda x: x, lambda x: as_top(x, 6)):
        first, second = FiringStream(), FiringStream()
        for i, (row, n) in enumerate(zip(latents.split(lengths), lengths, strict=True)):
            (first if i < cut else second).update(form(row), [n])
        first.merge(second)
        result = first.result()
        assert result.l0 == whole.l0
        for name in ("density", "mean_activation", "max_activation", "consistent_activation"):
            torch.testing.assert_close(
                getattr(result, name), getattr(whole, name), rtol=1e-12, atol=0, equal_nan=True, msg=name
            )


def test_lengths_have_to_fit():
    with pytest.raises(ValueError, match=r"sum to 3[\s\S]*4, the number of tokens"):
        FiringStream().update(LATENTS, [1, 2])
