"""Every figure: perfect, trivial baseline, scale, a case by hand; then that a stream gives what the whole gives."""

import inspect
import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb import metrics
from saewb.metrics import ReconstructionStream, cosine, density, explained_variance, fvu, l0, mse
from saewb.stats.firing import FiringStream

X = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 3  # an offset, so that 0 and the mean differ
NOISY = X + torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
MEAN = X.mean(0).expand_as(X)
ZERO = torch.zeros_like(X)
PAIRS = ["mse", "fvu", "explained_variance", "cosine", "l2_ratio", "relative_reconstruction_bias"]
PERFECT = dict(zip(PAIRS, (0, 0, 1, 1, 1, 1), strict=True))


def streamed(name, x, recon):
    stream = ReconstructionStream()
    stream.update(x, recon)
    return getattr(stream.result(), name)


def figure(name, x, recon):
    """By the pure function, where there is one, and as the stream gives it: one number."""
    result = streamed(name, x, recon)
    if hasattr(metrics, name):
        assert getattr(metrics, name)(x, recon).item() == pytest.approx(result, rel=1e-12, abs=1e-15, nan_ok=True)
    return result


@pytest.mark.parametrize("name", PAIRS)
def test_perfect(name):
    assert figure(name, X, X) == pytest.approx(PERFECT[name], abs=1e-12)


@pytest.mark.parametrize(("name", "baseline", "score"), [
    ("mse", ZERO, X.double().square().sum(1).mean().item()),
    ("fvu", MEAN, 1),
    ("explained_variance", MEAN, 0),
    ("cosine", ZERO, 0),
    ("cosine", -X, -1),
    ("l2_ratio", ZERO, 0),
    ("l2_ratio", X / 2, 0.5),
    ("relative_reconstruction_bias", ZERO, math.nan),
    ("relative_reconstruction_bias", X / 2, 0.5),
])  # fmt: skip
def test_trivial_baseline(name, baseline, score):
    assert figure(name, X, baseline) == pytest.approx(score, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scaled_together(name, scale):
    factor = scale**2 if name == "mse" else 1
    assert figure(name, X * scale, NOISY * scale) == pytest.approx(figure(name, X, NOISY) * factor, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 40.0])
def test_cosine_does_not_see_the_length_of_the_reconstruction(scale):
    assert figure("cosine", X, NOISY * scale) == pytest.approx(figure("cosine", X, NOISY), rel=1e-6)


@pytest.mark.parametrize(("name", "score"), [
    ("mse", (1 + 0 + 4) / 3),
    ("fvu", 5 / (70 / 3)),  # mean (7/3, 4/3): spread 29 - 49/3 along the first axis, 16 - 16/3 along the second
    ("explained_variance", 11 / 14),
    ("cosine", (2 / math.sqrt(5) + 1 + 1) / 3),
    ("l2_ratio", (math.sqrt(5) / 2 + 1 + 7 / 5) / 3),
    ("relative_reconstruction_bias", (5 + 16 + 49) / (4 + 16 + 35)),
])  # fmt: skip
def test_by_hand(name, score):
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [5.0, 0.0]])
    recon = torch.tensor([[2.0, 1.0], [0.0, 4.0], [7.0, 0.0]])
    assert figure(name, x, recon) == pytest.approx(score, rel=1e-7)


@pytest.mark.parametrize("offset", [0.5, -3.0])
def test_a_constant_offset_counts_as_error(offset):
    spread = (X - X.mean(0)).double().square().sum().item()
    assert figure("fvu", X, X + offset) == pytest.approx(offset**2 * X.numel() / spread, rel=1e-5)
    assert figure("explained_variance", X, X + offset) < 1


def test_the_mean_predictor_scores_1_wherever_the_data_lie():
    far = X.double() + 1e4
    assert figure("fvu", far, far.mean(0).expand_as(far)) == pytest.approx(1, rel=1e-12)
    assert figure("fvu", far, X.double().flip(0) + 1e4) == pytest.approx(figure("fvu", X, X.flip(0)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_float64_whatever_comes_in(dtype):
    x, recon = X.to(dtype), NOISY.to(dtype)
    expected = np.square(x.double().numpy() - recon.double().numpy()).sum(1).mean()
    assert mse(x, recon).dtype == torch.float64
    assert figure("mse", x, recon) == pytest.approx(expected, rel=1e-13)


def test_tokens_without_length_have_no_direction():
    x, recon = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert figure("cosine", x, recon) == 1
    assert figure("l2_ratio", x, recon) == 0.5


def test_lengths_near_the_ends_of_float32():
    x = X * torch.tensor([1e-30, 1e30]).repeat(25)[:, None]
    assert figure("cosine", x, x) == pytest.approx(1, rel=1e-12)


LATENTS = torch.tensor([[0.0, 2.0, -1.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.5, -9.0, 0.0], [0.0, 0.0, 1.0, 0.0]])


def firing(*batches, **limits):
    stream = FiringStream()
    for batch in batches:
        stream.update(batch)
    return stream.result(**limits)


@pytest.mark.parametrize("scale", [1, 1e-20, -5.0])
def test_firing_by_hand_whatever_scale_and_sign(scale):
    """Perfect and baseline have no meaning here: all, none, and a case by hand."""
    result = firing(LATENTS * scale)
    assert result.l0 == l0(LATENTS * scale).item() == 1.5
    assert result.density.tolist() == density(LATENTS * scale).tolist() == [0, 0.5, 1, 0]
    assert (result.dead_frac, result.dense_frac, result.n_tokens) == (0.5, 0.5, 4)


def test_all_latents_fire_or_none():
    on, off = firing(torch.ones(3, 5)), firing(torch.zeros(3, 5))
    assert (on.l0, on.dead_frac, on.dense_frac, on.density.tolist()) == (5, 0, 1, [1] * 5)
    assert (off.l0, off.dead_frac, off.dense_frac, off.density.tolist()) == (0, 1, 0, [0] * 5)
    assert (l0(torch.ones(3, 5)).item(), l0(torch.zeros(3, 5)).item()) == (5, 0)
    assert (density(torch.ones(3, 2)).tolist(), density(torch.zeros(3, 2)).tolist()) == ([1, 1], [0, 0])


def test_limits_of_dead_and_dense_are_exclusive():
    result = firing(LATENTS, dead_below=0.5, dense_above=0.5)
    assert (result.dead_frac, result.dense_frac) == (0.5, 0.25)
    result = firing(LATENTS, dead_below=0.51, dense_above=0.49)
    assert (result.dead_frac, result.dense_frac) == (0.75, 0.5)


def test_thirds_are_not_rounded_to_float32():
    assert firing(torch.tensor([[1.0, 0.0, 0.0]])).dead_frac == 2 / 3
    assert density(torch.tensor([[1.0], [0.0], [0.0]])).item() == 1 / 3


@st.composite
def streams(draw):
    """Data of any mean and spread, cut in any way, some cuts empty."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(lambda s: sum(s) >= 2))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    d = draw(st.integers(1, 5))
    offset, spread = draw(st.sampled_from([0.0, 1.0, 1e4, -1e6])), draw(st.sampled_from([1e-2, 1.0, 50.0]))
    x = torch.randn(sum(sizes), d, generator=rng, dtype=torch.float64) * spread + offset
    recon = x + torch.randn(x.shape, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 10.0]))
    return sizes, x, recon


@examples(100)
@given(streams(), st.integers(0, 7))
def test_a_stream_gives_what_the_whole_gives(data, cut):
    """In any batches; and as two streams, merged."""
    sizes, x, recon = data
    parts = list(zip(x.split(sizes), recon.split(sizes), strict=True))
    one, first, second = ReconstructionStream(), ReconstructionStream(), ReconstructionStream()
    for i, (a, b) in enumerate(parts):
        one.update(a, b)
        (first if i < cut else second).update(a, b)
    first.merge(second)
    # of a distance to the mean that is 1e-8 of its size, float64 keeps about 8 digits squared
    rel = 1e-11 * max(1.0, x.abs().max().item() / x.std().item())
    for stream in (one, first):
        result = stream.result()
        assert result.n_tokens == len(x)
        assert stream.mean().numpy() == pytest.approx(x.numpy().mean(0), rel=1e-12)
        for function in (mse, fvu, explained_variance, cosine):
            expected = function(x, recon).item()
            assert getattr(result, function.__name__) == pytest.approx(expected, rel=rel, abs=rel)
        lengths = np.linalg.norm(recon, axis=1) / np.linalg.norm(x, axis=1)
        assert result.l2_ratio == pytest.approx(lengths.mean(), rel=1e-10)
        bias = np.square(recon.numpy()).sum() / (x.numpy() * recon.numpy()).sum()
        assert result.relative_reconstruction_bias == pytest.approx(bias, rel=1e-8)


@examples(50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(sum), st.integers(0, 1000), st.integers(0, 7))
def test_firing_in_batches_is_exactly_firing_of_the_whole(sizes, seed, cut):
    latents = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(seed))
    latents[latents.abs() < 0.8] = 0
    first, second = FiringStream(), FiringStream()
    for i, batch in enumerate(latents.split(sizes)):
        (first if i < cut else second).update(batch)
    first.merge(second)
    result, whole = first.result(), firing(latents)
    for name in ("n_tokens", "l0", "dead_frac", "dense_frac"):
        assert getattr(result, name) == getattr(whole, name)
    assert torch.equal(result.density, density(latents))
    assert result.l0 == pytest.approx(l0(latents).item(), rel=1e-14)


def test_a_large_common_offset_costs_nothing_in_float32_data():
    """Mean 1e4, standard deviation 1, a hundred batches: sums about 0 in float32 are wrong here in the first digit."""
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(2)) + 1e4
    recon = x + 0.1
    stream = ReconstructionStream()
    for a, b in zip(x.split(200), recon.split(200), strict=True):
        stream.update(a, b)
    exact = (
        np.square((x - recon).double().numpy()).sum() / np.square(x.double().numpy() - x.double().numpy().mean(0)).sum()
    )
    assert stream.result().fvu == pytest.approx(exact, rel=1e-10)
    naive = (x.square().sum() / len(x) - x.mean(0).square().sum()).item() / 8
    assert abs(naive - 1) > 0.05


def test_merging_leaves_the_other_as_it_was_and_takes_an_empty_one():
    first, second = ReconstructionStream(), ReconstructionStream()
    second.update(X, NOISY)
    before = second.result()
    first.merge(second)
    first.update(X, NOISY)
    first.merge(ReconstructionStream())
    assert second.result() == before
    assert first.result().n_tokens == 100
    assert first.result().fvu == pytest.approx(before.fvu, rel=1e-12)
    a, b = FiringStream(), FiringStream()
    b.update(LATENTS)
    a.merge(b)
    a.update(LATENTS)
    a.merge(FiringStream())
    assert (a.result().n_tokens, b.result().n_tokens, a.result().l0) == (8, 4, 1.5)


def test_nothing_is_kept_of_the_batches():
    """The stream holds its own numbers: changing a batch afterwards changes nothing."""
    x, latents = X.clone(), LATENTS.clone()
    stream, fired = ReconstructionStream(), FiringStream()
    stream.update(x, NOISY)
    fired.update(latents)
    before = stream.result(), stream.mean()
    x.zero_()
    latents.fill_(1)
    assert stream.result() == before[0]
    assert torch.equal(stream.mean(), before[1])
    assert fired.result().l0 == 1.5


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7.7e-8])
def test_no_variance_is_an_error_not_a_huge_number(value):
    x = torch.full((7, 3), value, dtype=torch.float64)
    for function in (fvu, explained_variance):
        with pytest.raises(ValueError, match="all 7 rows of x are the same"):
            function(x, x)
    stream, other = ReconstructionStream(), ReconstructionStream()
    stream.update(x[:3], x[:3])
    other.update(x[3:], x[3:])
    stream.merge(other)
    with pytest.raises(ValueError, match="all 7 rows of x are the same"):
        stream.result()


def test_no_direction_is_an_error():
    with pytest.raises(ValueError, match="all 2 rows of x are 0"):
        cosine(torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("function", [mse, fvu, explained_variance, cosine])
def test_no_tokens_are_an_error(function):
    with pytest.raises(ValueError, match="no tokens"):
        function(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("function", [mse, fvu, cosine])
def test_other_shapes_are_an_error(function):
    unchecked = inspect.unwrap(function)  # as it is outside of these tests, which check shapes in the signature
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), recon \(2, 4\)"):
        unchecked(torch.zeros(2, 3), torch.zeros(2, 4))


def test_streams_say_what_is_wrong():
    stream, fired = ReconstructionStream(), FiringStream()
    for empty in (
        stream.result,
        stream.mean,
        fired.result,
        lambda: l0(torch.zeros(0, 2)),
        lambda: density(torch.zeros(0, 2)),
    ):
        with pytest.raises(ValueError, match="no tokens"):
            empty()
    stream.update(X, X)
    fired.update(LATENTS)
    with pytest.raises(ValueError, match="d_in=6"):
        stream.update(X[:, :6], X[:, :6])
    with pytest.raises(ValueError, match="d_sae=3"):
        fired.update(LATENTS[:, :3])
    assert (stream.result().n_tokens, fired.result().n_tokens) == (50, 4)  # nothing was added


def test_nan_stays_nan():
    x = X.clone()
    x[3, 2] = math.nan
    assert math.isnan(figure("fvu", x, NOISY))
    assert math.isnan(figure("mse", x, NOISY))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_from_several_devices_and_no_wait_for_them():
    stream, fired = ReconstructionStream(), FiringStream()
    x, recon, latents = X.cuda(), NOISY.cuda(), LATENTS.cuda()
    stream.update(x, recon)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.update(x, recon)
        fired.update(latents)
        fired.update(latents)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream.update(X, NOISY)
    fired.update(LATENTS)
    assert stream.result().fvu == pytest.approx(fvu(X, NOISY).item(), rel=1e-9)
    assert fired.result().l0 == 1.5
