"""What a product in bf16 chooses and float32 decides is what float32 alone finds: whatever the numbers."""

import math

import pytest
import torch
from helpers.examples import examples
from helpers.peak_memory import peak_bytes
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.kernels import select
from saewb.kernels.select import ApproximateTopK
from saewb.kernels.topk import top, top_of_product
from saewb.sae.base import SparseEncoder

D_SAE = 2048


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Also on a processor without bf16 instructions: its products are slow there, and as exact."""
    monkeypatch.setattr(select, "next_higher_precision", lambda precision, device: "bf16")


def numbers(seed, tokens=12, d_in=24, scale=1.0, bias=0.1, common=0.0, long=1.0):
    """Rows, of which one is `long` times as long and that have `common` in common; weights and biases."""
    rng = torch.Generator().manual_seed(seed)
    h, W, b = (torch.randn(*shape, generator=rng) for shape in ((tokens, d_in), (d_in, D_SAE), (D_SAE,)))
    h = h + common * torch.randn(d_in, generator=rng)
    h[0] *= long
    return h * scale, W, b * bias * scale


def assert_same(h, W, b, k, activation):
    """The very latents of float64, where it can tell them from the next ones; values as float32 gives them."""
    prepared = ApproximateTopK.of(W, b, like=h)
    values, latents = prepared.top(h, k, activation)
    exact = h.double() @ W.double() + b.double()
    size = (h.double().abs() @ W.double().abs() + b.double().abs()).amax(1, keepdim=True)
    best, which = top(exact, k, activation)
    tolerance = size * h.shape[1] * 2.0**-23 + 1e-37
    assert values.shape == latents.shape == (len(h), k)
    assert all(len(set(row)) == k for row in latents.tolist())
    assert ((values.abs().sort(1).values - best.abs().sort(1).values).abs() <= tolerance).all()
    own = exact.gather(1, latents) if activation == "abstopk" else torch.relu(exact.gather(1, latents))
    assert ((values - own).abs() <= tolerance).all()
    clear = (best.abs().amin(1) - _next_best(exact, which, activation)) > 2 * tolerance[:, 0]
    assert (latents.sort(1).values == which.sort(1).values)[clear].all()
    return prepared


def _next_best(exact, which, activation):
    others = (exact.abs() if activation == "abstopk" else torch.relu(exact)).scatter(1, which, -math.inf)
    return others.amax(1)  # of those that are 0 any may be kept


@given(
    seed=st.integers(0, 2**16),
    k=st.integers(1, 40),
    activation=st.sampled_from(["topk", "abstopk"]),
    scale=st.sampled_from([1.0, 1e-30, 1e-37, 1e-42, 1e-12, 1e10, 1e17]),
    bias=st.sampled_from([0.0, 0.1, 30.0, -30.0]),
    common=st.sampled_from([0.0, 1.0, 300.0]),
    long=st.sampled_from([1.0, 1e4, 0.0]),
)
@examples(25)
def test_of_any_numbers_the_largest(seed, k, activation, scale, bias, common, long):
    assert_same(*numbers(seed, scale=scale, bias=bias, common=common, long=long), k, activation)


@given(
    seed=st.integers(0, 2**16),
    near=st.sampled_from([0.0, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2]),
    copies=st.integers(2, D_SAE),
    activation=st.sampled_from(["topk", "abstopk"]),
)
@examples(25)
def test_of_latents_that_are_all_but_one_and_the_same(seed, near, copies, activation):
    """Differences far below what bf16 can tell: rows for which the candidates do not suffice are done in float32."""
    h, W, b = numbers(seed)
    W[:, :copies] = W[:, :1] + near * W[:, :copies]
    b[:copies] = b[0]
    assert_same(h, W, b, 5, activation)


@given(seed=st.integers(0, 2**16), above=st.integers(0, 7))
@examples(20)
def test_of_rows_where_fewer_than_k_are_above_zero(seed, above):
    h, W, b = numbers(seed)
    h = torch.ones_like(h) + h / 1000
    W = -W.abs()
    W[:, 100 : 100 + above].neg_()
    values, _ = ApproximateTopK.of(W, b, like=h).top(h, 6, "topk")
    want, _ = top(h @ W + b, 6, "topk")
    assert torch.allclose(values.sort(1).values, want.sort(1).values, atol=1e-4)
    assert ((values > 0).sum(1) == (want > 0).sum(1)).all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_rows_with_odd_numbers_are_what_float32_makes_of_them_and_do_no_harm_to_others(odd, activation):
    h, W, b = numbers(0)
    h[3, 5] = odd
    prepared = ApproximateTopK.of(W, b, like=h)
    values, latents = prepared.top(h, 4, activation)
    want, which = top_of_product(h, W, b, 4, activation)
    assert torch.allclose(values.sort(1).values, want.sort(1).values, atol=1e-5, equal_nan=True)
    others = torch.arange(len(h)) != 3
    assert (latents.sort(1).values == which.sort(1).values)[others].all()
    assert prepared.over(h, 10**6) is None  # float32 is to do it


@pytest.mark.parametrize("where", ["W", "b"])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_odd_weights_are_left_to_float32(where, odd):
    h, W, b = numbers(0)
    {"W": W[0], "b": b}[where][7] = odd
    assert ApproximateTopK.of(W, b, like=h) is None


@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1.0, 1e-30, 1e10]),
    common=st.sampled_from([0.0, 1.0, 300.0]),
    long=st.sampled_from([1.0, 1e4]),
)
@examples(25)
def test_the_bound_holds_for_every_rough_value(seed, scale, common, long):
    h, W, b = numbers(seed, scale=scale, common=common, long=long)
    prepared = ApproximateTopK.of(W, b, like=h)
    scores, off = prepared._scores(h, torch.empty(len(h), D_SAE, dtype=torch.bfloat16))
    exact = h.double() @ W.double() + b.double()
    assert ((exact - scores.double()).abs() <= off[:, None] + 2.0**-8 * scores.double().abs()).all()
    raised, _ = prepared._scores(h, torch.empty(len(h), D_SAE, dtype=torch.bfloat16), raised=True)
    assert (raised.double() + 2.0**-8 * raised.double().abs() >= exact).all()
    assert (raised > 0)[exact > 0].all()


def test_most_rows_are_decided_without_float32(monkeypatch):
    """Else it would be right and no quicker."""
    h, W, b = numbers(1, tokens=300, d_in=256, common=3.0)
    left = []
    monkeypatch.setattr(select, "top_of_product", lambda h, *a: left.append(len(h)) or top_of_product(h, *a))
    result = assert_same(h, W, b, 8, "topk")
    assert sum(left) <= 3
    floor = torch.full((D_SAE,), 60.0)
    token, _, pre = ApproximateTopK.of(W, b, like=h, floor=floor).over(h, 10**6)
    assert 0 < int((pre > 60).sum()) <= len(token) < 3 * int((pre > 60).sum())
    assert result.nbytes == ApproximateTopK.max_bytes(256, D_SAE) - 2 * select._TILE - 40 * select._PICKED


# -- an SAE's latents --------------------------------------------------------------------------------------------------


def sae_of(activation, d_in=48, **how):
    sae = saewb.SAE(saewb.SAEConfig(d_in, D_SAE, activation=activation, **how), seed=3)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.b_enc += torch.randn(D_SAE, generator=rng) / 10 - (2.5 if activation == "relu" else 0)
        sae.b_dec += torch.randn(d_in, generator=rng)
        if activation == "jumprelu":
            sae.threshold += 2.0 + torch.rand(D_SAE, generator=rng)
            sae.threshold[:9] = -1.0  # below 0 it is 0 that counts
            sae.b_enc[:9] = -3.0
    return sae


SAES = {
    "topk": lambda: sae_of("topk", k=5),
    "topk layer_norm": lambda: sae_of("topk", k=5, normalization="layer_norm", pre_bias="tied"),
    "abstopk": lambda: sae_of("abstopk", k=5),
    "groupmax": lambda: sae_of("groupmax", k=8),
    "relu": lambda: sae_of("relu"),
    "relu dense": lambda: saewb.SAE(saewb.SAEConfig(48, D_SAE)),
    "jumprelu": lambda: sae_of("jumprelu", pre_bias="tied"),
    "topk bf16": lambda: sae_of("topk", k=5).bfloat16(),
    "jumprelu float64": lambda: sae_of("jumprelu").double(),
}


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("quick", [True, False])
def test_an_encoder_says_what_fires(name, quick, monkeypatch):
    monkeypatch.setattr(select, "next_higher_precision", lambda *_: "bf16" if quick else "full")
    sae = SAES[name]()
    rng = torch.Generator().manual_seed(5)
    x, plain = torch.randn(6, 7, 48, generator=rng), torch.rand(6, 7, generator=rng) < 0.8
    encoder, dense = SparseEncoder(sae), torch.zeros(6, 7, D_SAE)
    for rows, on in encoder.tiles(x, plain):
        key = on.token * D_SAE + on.latent
        assert (key.diff() > 0).all()
        assert (on.act != 0).all()
        dense[rows] = on.dense().float()
    want = (sae.encode(x) * plain[..., None]).detach().float()
    if sae.dtype == torch.bfloat16:  # equal values, of which any may be kept, are common
        dense, want, rtol = dense.sort(-1).values, want.sort(-1).values, 1e-2
    else:
        rtol = 1e-5
    assert torch.equal(dense != 0, want != 0)
    assert torch.allclose(dense, want, rtol=rtol, atol=1e-5)
    assert (encoder._approximate is not None) == (quick and name not in ("groupmax", "topk bf16", "jumprelu float64"))


def test_one_call_with_many_tokens_gives_the_same(monkeypatch):
    monkeypatch.setattr(select, "_MANY", 100)
    sae = saewb.SAE(saewb.SAEConfig(8, 2**15, activation="topk", k=4), seed=1)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    prepared, of = [], ApproximateTopK.of
    monkeypatch.setattr(ApproximateTopK, "of", lambda *a, **k: prepared.append(of(*a, **k)) or prepared[-1])
    with torch.no_grad():
        quick = sae.encode_topk(x)
        few = sae.encode_topk(x[:99])
    assert len(prepared) == 1
    assert prepared[0] is not None
    monkeypatch.setattr(select, "next_higher_precision", lambda *_: "full")
    with torch.no_grad():
        plain = sae.encode_topk(x)
    assert torch.allclose(quick.dense(), plain.dense(), atol=1e-5)
    assert torch.equal(quick.dense() != 0, plain.dense() != 0)
    assert torch.equal(few.dense() != 0, plain.dense()[:99] != 0)


@pytest.mark.long
def test_what_it_holds_is_what_is_stated():
    before = """
import saewb.kernels.select as select
select.next_higher_precision = lambda *_: "bf16"
W, b, h = torch.randn(64, 2**16), torch.zeros(2**16), torch.randn(4096, 64)
select.ApproximateTopK.of(W[:, :2048].contiguous(), b[:2048], h).top(h[:64], 32, "topk")"""
    took = peak_bytes(before, "select.ApproximateTopK.of(W, b, h).top(h, 32, 'topk')")  # all of it would be 1 GiB
    assert took < ApproximateTopK.max_bytes(64, 2**16) + 4096 * 32 * 12
