"""Cosines of all pairs: four tests of each figure, then the plain definition on features of every kind, and memory."""

import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from helpers.peak_memory import peak_bytes
from hypothesis import given
from hypothesis import strategies as st

from saewb.sae.sae import SAE, SAEConfig
from saewb.stats import superposition as superposition_module
from saewb.stats.superposition import superposition

RNG = torch.Generator().manual_seed(0)
RANDOM = torch.randn(60, 12, generator=RNG)
SAME = torch.ones(5, 3)
ORTHOGONAL = torch.eye(6)


def plain(directions, percentiles=(95, 99)):
    """The definition, in numpy's float64, all n * n at once."""
    x = directions.double().numpy()
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    cosines = unit @ unit.T
    n = len(x)
    others = np.abs(cosines)[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    pairs = cosines[np.triu_indices(n, 1)]
    return {
        "cosines": cosines,
        "max": others.max(1),
        "percentiles": {p: np.percentile(others, p, axis=1) for p in percentiles},
        "mean": np.abs(pairs).mean(),
        "rms": np.sqrt(np.square(pairs).mean()),
        "pairs": pairs,
        "eigenvalues": np.linalg.eigvalsh(unit.T @ unit),
    }


def check(found, directions, percentiles=(95, 99)):
    """Everything `superposition` says, against the definition."""
    truth = plain(directions, percentiles)
    n = len(directions)
    assert found.max_abs_cos.numpy() == pytest.approx(truth["max"], abs=1e-5)
    assert found.mean_max_abs_cos == pytest.approx(truth["max"].mean(), abs=1e-6)
    assert list(found.percentile_abs_cos) == list(percentiles)
    for p in percentiles:
        assert found.percentile_abs_cos[p].numpy() == pytest.approx(truth["percentiles"][p], abs=1e-5)
        assert found.mean_percentile_abs_cos[p] == pytest.approx(truth["percentiles"][p].mean(), abs=1e-6)
    assert found.mean_abs_cos == pytest.approx(truth["mean"], abs=1e-6)
    assert found.rms_cos == pytest.approx(truth["rms"], abs=1e-6)
    values = truth["eigenvalues"]
    assert found.effective_dim == pytest.approx(values.sum() ** 2 / max(np.square(values).sum(), 1e-300), rel=1e-5)
    k = found.nearest.shape[1]
    strongest = -np.sort(-np.abs(truth["cosines"] - 9 * np.eye(n)) * (1 - np.eye(n)), axis=1)[:, :k]
    assert found.nearest_cos.abs().numpy() == pytest.approx(strongest, abs=1e-5)
    rows = np.arange(n)[:, None]
    assert found.nearest_cos.numpy() == pytest.approx(truth["cosines"][rows, found.nearest.numpy()], abs=1e-5)
    assert (found.nearest.numpy() != rows).all()
    assert all(len(set(row)) == k for row in found.nearest.tolist())
    assert int(found.histogram.sum()) == math.comb(n, 2)
    # a cosine on an edge may fall to either side in float32, so sums up to edges are compared a hair to both sides
    upto = np.concatenate([[0], found.histogram.numpy().cumsum()])
    for edge, count in zip(found.bin_edges.numpy()[:-1], upto[:-1], strict=True):
        below, above = (int((truth["pairs"] < edge + hair).sum()) for hair in (-1e-5, 1e-5))
        assert below <= count <= above


# -- perfect, baseline, scale, by hand ---------------------------------------------------------------------------------


def test_perfect_orthogonal_directions_have_no_cosine_and_fill_all_dimensions():
    overlap = superposition(ORTHOGONAL)
    assert overlap.max_abs_cos.tolist() == [0] * 6
    assert (overlap.mean_abs_cos, overlap.rms_cos, overlap.mean_max_abs_cos) == (0, 0, 0)
    assert overlap.mean_percentile_abs_cos == {95: 0, 99: 0}
    assert overlap.effective_dim == 6
    assert overlap.histogram[100] == 15  # all at 0, the lower edge of its bin


@pytest.mark.parametrize("sign", [1, -1])
def test_baseline_one_direction_many_times_or_reversed(sign):
    rows = SAME * torch.tensor([1, sign, 1, 1, 1])[:, None]
    overlap = superposition(rows)
    assert overlap.max_abs_cos.tolist() == pytest.approx([1] * 5)
    assert float(overlap.max_abs_cos.max()) <= 1
    assert (overlap.mean_abs_cos, overlap.rms_cos, overlap.effective_dim) == pytest.approx((1, 1, 1), abs=1e-6)
    opposite = 4 if sign < 0 else 0
    assert (int(overlap.histogram[0]), int(overlap.histogram[-1])) == (opposite, 10 - opposite)


def test_baseline_random_directions_nearly_reach_the_welch_bound():
    overlap = superposition(torch.randn(2000, 50, generator=RNG))
    assert overlap.rms_cos == pytest.approx(1 / math.sqrt(50), rel=0.01)
    assert overlap.welch_bound < overlap.rms_cos < overlap.welch_bound * 1.03
    assert 0.95 * 50 < overlap.effective_dim <= 50


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e30])
def test_scale_does_not_matter_row_by_row(scale):
    scales = torch.full((60, 1), scale)
    scales[::7] = 1.0
    overlap, before = superposition(RANDOM * scales), superposition(RANDOM)
    assert overlap.max_abs_cos.numpy() == pytest.approx(before.max_abs_cos.numpy(), abs=1e-6)
    assert overlap.mean_abs_cos == pytest.approx(before.mean_abs_cos, abs=1e-7)
    assert overlap.effective_dim == pytest.approx(before.effective_dim, rel=1e-6)
    assert torch.equal(overlap.nearest, before.nearest)


def test_by_hand():
    """(1, 0), (3, 4), (0, -2): cosines .6, 0, -.8."""
    overlap = superposition(torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]), percentiles=(0, 50, 75, 100))
    assert overlap.max_abs_cos.tolist() == pytest.approx([0.6, 0.8, 0.8])
    assert overlap.percentile_abs_cos[50].tolist() == pytest.approx([0.3, 0.7, 0.4])
    assert overlap.percentile_abs_cos[75].tolist() == pytest.approx([0.45, 0.75, 0.6])
    assert overlap.percentile_abs_cos[0].tolist() == pytest.approx([0, 0.6, 0])
    assert torch.equal(overlap.percentile_abs_cos[100], overlap.max_abs_cos)
    assert overlap.mean_abs_cos == pytest.approx(1.4 / 3)
    assert overlap.rms_cos == pytest.approx(math.sqrt(1 / 3))
    assert overlap.nearest.tolist() == [[1, 2], [2, 0], [1, 0]]
    assert overlap.nearest_cos[1].tolist() == pytest.approx([-0.8, 0.6])
    # sum u u^T = [[1.36, .48], [.48, 1.64]]: trace 3, squares 3 + 2 * (.36 + .64)
    assert overlap.effective_dim == pytest.approx(9 / 5)


# -- the plain definition ----------------------------------------------------------------------------------------------


@st.composite
def dictionaries(draw):
    """Random, duplicate, opposite, zero and near-orthogonal features, of any lengths."""
    n, d = draw(st.integers(2, 40)), draw(st.integers(1, 12))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randn(n, d, generator=rng)
    if draw(st.booleans()):
        x = torch.eye(n, d) + 1e-4 * x
    for row in range(n):
        kind = draw(st.sampled_from(["own"] * 4 + ["same", "opposite", "zero", "long"]))
        other = x[draw(st.integers(0, n - 1))]
        x[row] = {"own": x[row], "same": other, "opposite": -2 * other, "zero": 0 * other, "long": 1e4 * x[row]}[kind]
    return x


@examples(40)
@given(dictionaries(), st.lists(st.sampled_from([0, 12.5, 50, 95, 99, 100]), unique=True, max_size=4))
def test_plain_definition(directions, percentiles):
    check(superposition(directions, percentiles, bins=20), directions, percentiles)


@examples(15)
@given(dictionaries(), st.integers(1, 50))
def test_sorting_finds_what_selecting_finds(directions, rows):
    """What runs on other devices, run here."""
    truth = superposition(directions)
    options = superposition_module._Options(len(directions), (95, 99), truth.nearest.shape[1], 200)
    unit = torch.nn.functional.normalize(directions.double(), dim=1, eps=1e-300).float()
    spans = [(start, min(start + rows, options.n)) for start in range(0, options.n, rows)]
    parts = [superposition_module._by_sorting(unit, *span, options) for span in spans]
    result = superposition_module._RowStats.cat(parts, options.n)
    assert result.largest[:, 0].numpy() == pytest.approx(truth.max_abs_cos.numpy(), abs=1e-5)
    for i, p in enumerate((95, 99)):
        assert result.percentiles[:, i].numpy() == pytest.approx(truth.percentile_abs_cos[p].numpy(), abs=1e-5)
    assert result.signed.abs().numpy() == pytest.approx(truth.nearest_cos.abs().numpy(), abs=1e-5)
    assert result.total.sum().item() == pytest.approx(truth.mean_abs_cos * len(unit) * (len(unit) - 1), abs=1e-3)
    assert int(result.counts.sum()) == math.comb(len(unit), 2)


@pytest.mark.parametrize("kind", ["random", "half zero", "sorted by likeness"])
def test_percentiles_low_and_high(kind):
    """Of features of which many are equally near, and of which the near ones stand together."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 16, generator=rng)
    if kind == "half zero":
        x[::2] = 0
    if kind == "sorted by likeness":
        x = torch.randn(1000, 16, generator=rng)[torch.arange(1000) // 4 * 4] + 0.3 * x
    overlap = superposition(x, percentiles=(5, 95, 99.9), neighbors=3)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(-1)
    ordered = cosines.sort(1).values[:, 1:].numpy()
    for p in (5, 95, 99.9):
        expected = np.percentile(ordered, p, axis=1)
        assert overlap.percentile_abs_cos[p].numpy() == pytest.approx(expected, abs=1e-5)
    assert overlap.nearest_cos.abs().numpy() == pytest.approx(ordered[:, :-4:-1], abs=1e-5)
    assert overlap.mean_abs_cos == pytest.approx(ordered.mean(), abs=1e-7)


def test_of_equally_near_ones_the_first_come_first():
    overlap = superposition(torch.eye(5), neighbors=2)
    assert overlap.nearest.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_of_many_equally_near_ones_the_first_come_first():
    """Three directions, many times: first those that are the same, then of those that are next the first."""
    kinds = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-2.4, -0.7]])[
        torch.randint(0, 3, (3000,), generator=torch.Generator().manual_seed(2))
    ]
    kinds[100:] = kinds[100:101]  # so that the others have 30 or so alike, and then many that are equally far
    unit = torch.nn.functional.normalize(kinds, dim=1)
    cosines = (unit @ unit.T).abs().double().round(decimals=4).fill_diagonal_(-1)
    expected = cosines.sort(dim=1, descending=True, stable=True).indices[:, :60]
    assert torch.equal(superposition(kinds, neighbors=60).nearest, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    check(superposition(RANDOM.to(dtype)), RANDOM.to(dtype))


def test_float64_is_computed_in_float64():
    x = torch.eye(3, dtype=torch.float64)
    x[0, 1] = 1e-12
    assert superposition(x).max_abs_cos[0].item() == pytest.approx(1e-12, rel=1e-9)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("max_bytes", [200_000, 2**28])
def test_any_memory_and_any_number_of_threads_give_the_same(threads, max_bytes, monkeypatch):
    monkeypatch.setattr(superposition_module, "_CHUNK", 300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        overlap = superposition(torch.randn(300, 8, generator=torch.Generator().manual_seed(3)), max_bytes=max_bytes)
    finally:
        torch.set_num_threads(before)
    check(overlap, torch.randn(300, 8, generator=torch.Generator().manual_seed(3)))


def test_many_cores_share_the_memory(monkeypatch):
    truth = superposition(RANDOM.repeat(30, 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    overlap = superposition(RANDOM.repeat(30, 1), max_bytes=20_000_000)
    assert torch.equal(overlap.nearest, truth.nearest)
    assert torch.equal(overlap.histogram, truth.histogram)


@pytest.mark.parametrize("d", [8, pytest.param(576, marks=pytest.mark.long)])
def test_memory_is_what_was_said(d):
    """12,000 directions: n * n would be 576 MB."""
    before = f"""
from saewb.stats.superposition import superposition
x = torch.randn(12_000, {d}, generator=torch.Generator().manual_seed(0))
superposition(x[:100])
"""
    took = peak_bytes(before, "superposition(x, max_bytes=40_000_000)")
    beside = 12_000 * (4 * d + 4 * 3 + 5 * 16 * 2 + 8 * 8)  # a copy of the directions, and the result, joined
    assert 5_000_000 < took < 40_000_000 + beside


# -- what it takes and shows -------------------------------------------------------------------------------------------


def test_an_sae_is_its_decoder_and_the_encoder_is_asked_for():
    sae = SAE(SAEConfig(d_in=6, d_sae=20, d_out=9), seed=3)
    assert torch.equal(superposition(sae).max_abs_cos, superposition(sae.W_dec).max_abs_cos)
    assert superposition(sae.W_enc.T).d == 6


def test_directions_are_not_changed():
    x = RANDOM.clone()
    superposition(x)
    assert torch.equal(x, RANDOM)


def test_two_features_are_enough_and_have_one_neighbor():
    overlap = superposition(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert overlap.nearest.tolist() == [[1], [0]]
    assert overlap.percentile_abs_cos[95].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert overlap.welch_bound == 0


def test_zero_directions_are_counted():
    x = RANDOM.clone()
    x[[3, 9]] = 0
    overlap = superposition(x)
    assert overlap.n_zero == 2
    assert overlap.max_abs_cos[3] == overlap.max_abs_cos[9] == 0
    assert superposition(torch.zeros(3, 2)).effective_dim == 0


def test_shows_itself():
    overlap = superposition(RANDOM)
    assert repr(overlap).startswith("Superposition(60 features in 12 dimensions, mean_max_abs_cos=0.")
    text = str(overlap)
    assert f"{overlap.mean_percentile_abs_cos[99]:.4g}" in text
    assert f"{overlap.effective_dim:.4g}" in text
    assert "<table>" in overlap._repr_html_()
    frame = overlap.to_frame()
    assert list(frame.columns) == ["max_abs_cos", "p95_abs_cos", "p99_abs_cos", "nearest", "nearest_cos"]
    assert frame.loc[7, "nearest"] == overlap.nearest[7, 0]


@pytest.mark.parametrize(("args", "error", "text"), [
    ((torch.ones(1, 3),), ValueError, "Need at least 2 features to compute superposition stats"),
    ((torch.ones(0, 3),), ValueError, "Need at least 2 features to compute superposition stats"),
    ((torch.ones(3),), ValueError, r"shape \(3,\)"),
    ((torch.ones(3, 0),), ValueError, r"shape \(3, 0\)"),
    ((torch.nn.Linear(2, 3),), TypeError, "got a Linear"),
    ((RANDOM, (95, 101)), ValueError, r"percentiles=\(95, 101\)"),
])  # fmt: skip
def test_wrong_input(args, error, text):
    import inspect

    with pytest.raises(error, match=text):
        inspect.unwrap(superposition)(*args)


@pytest.mark.parametrize(("kwargs", "text"), [
    ({"neighbors": 0}, "neighbors=0"), ({"bins": 0}, "bins=0"), ({"max_bytes": 1000}, "max_bytes=1,000"),
])  # fmt: skip
def test_wrong_options(kwargs, text):
    with pytest.raises(ValueError, match=text):
        superposition(RANDOM, **kwargs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_named(bad):
    x = RANDOM.clone()
    x[[4, 11], 2] = bad
    with pytest.raises(ValueError, match="2 of 60 directions are not finite: 4, 11"):
        superposition(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    check(superposition(RANDOM.cuda(), max_bytes=10_000), RANDOM)
