"""What every architecture promises, on every architecture of `architectures.py`."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.architecture_registry import (
    ARCHITECTURES,
    D_IN,
    D_OUT,
    D_SAE,
    activations,
    feed_forward,
    pursuit,
    temporal,
    transcoder,
)
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.errors import FormatError
from saewb.pretrained.load import load_sae, save_sae
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.temporal import TemporalConfig, TemporalSAE

OWN = [name for name in ARCHITECTURES if name.endswith("_own_b_pre") or name == "skip_same_point"]


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture
def sae(name):
    return ARCHITECTURES[name]()


def _needs_sequences(sae):
    return isinstance(sae, TemporalSAE)


# --- shapes, dtypes, errors


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (0, 5)])
def test_shapes(sae, shape):
    x = activations(*shape)
    assert sae.encode(x).shape == (*shape, D_SAE)
    assert sae(x).shape == (*shape, sae.cfg.d_out)
    assert sae.cfg.d_out == (D_OUT if sae.cfg.is_transcoder else D_IN)
    assert sae.W_dec.shape == (D_SAE, sae.cfg.d_out)
    assert sae.b_dec.shape == (sae.cfg.d_out,)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,)])
def test_any_leading_axes(sae, shape):
    x = activations(*shape)
    if _needs_sequences(sae):
        with pytest.raises(ValueError, match=r"batch, pos, d_in=8"):
            sae.encode(x)
        with pytest.raises(ValueError, match=r"batch, pos, d_in=8"):
            sae(x)
        return
    assert sae.encode(x).shape == (*shape, D_SAE)
    flat = sae(x.reshape(-1, D_IN)).reshape(*shape, sae.cfg.d_out)
    torch.testing.assert_close(sae(x), flat)


def test_a_wrong_width_is_refused(sae):
    with pytest.raises(ValueError, match="d_in=8"):
        sae(torch.zeros(1, 2, D_IN + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(sae, dtype):
    moved = copy.deepcopy(sae).to(dtype)
    x = activations(2, 5)
    assert moved.dtype == dtype
    assert {p.dtype for p in moved.parameters()} == {dtype}
    latents = moved.encode(x)  # inputs are cast
    assert latents.dtype == moved(x).dtype == moved.decode(latents.float(), x).dtype == dtype
    assert str(dtype).removeprefix("torch.") in repr(moved)
    if dtype == torch.float64:
        torch.testing.assert_close(moved(x).float(), sae(x), atol=1e-4, rtol=1e-4)


def test_device_moves(sae):
    meta = copy.deepcopy(sae).to("meta")
    assert meta.device.type == "meta"
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert "meta" in repr(meta)


def test_repr_is_one_line_that_names_what_it_is(sae):
    line = repr(sae)
    assert "\n" not in line
    assert line.startswith(type(sae).__name__ + "(")
    for part in (f"{D_IN} -> {D_SAE} latents", sae.cfg.hook, "gpt2", "float32 on cpu"):
        assert part in line


# --- encode, decode, taps


def test_forward_is_decode_of_encode(sae):
    x = activations(2, 5)
    assert torch.equal(sae(x), sae.decode(sae.encode(x), x))


@pytest.mark.parametrize(
    "latents",
    [
        3,
        -1,
        slice(2, 20, 3),
        slice(None),
        slice(0, 0),
        [5, 1, 5],
        [-2, 0],
        torch.tensor([7, 7, 0]),
        torch.arange(D_SAE) % 3 == 1,
    ],
    ids=["int", "negative", "slice", "all", "none", "list", "negative list", "LongTensor", "mask"],
)
def test_a_subset_is_the_full_encoding_indexed(sae, latents):
    x = activations(2, 5)
    full = sae.encode(x)[..., latents]
    part = sae.encode(x, latents)
    assert part.shape == full.shape
    torch.testing.assert_close(part, full, atol=1e-6, rtol=1e-6)
    assert torch.equal(part != 0, full != 0)


def test_a_subset_of_one_dimensional_input(sae):
    if _needs_sequences(sae):
        with pytest.raises(ValueError, match="batch, pos"):
            sae.encode(activations(), [1])
        return
    x = activations()
    torch.testing.assert_close(sae.encode(x, [4, 2]), sae.encode(x)[[4, 2]])


def test_taps_fire_in_order_and_what_they_return_is_used(sae):
    x, fired = activations(2, 5), []

    def tap(name, value):
        fired.append(name)
        return value * 2

    plain, doubled = sae.encode(x), sae.encode(x, tap=lambda name, v: v * 2 if name == "acts_post" else v)
    torch.testing.assert_close(doubled, 2 * plain)
    latents = sae.encode(x, tap=tap)
    before = sae.decode(latents, x)
    assert not torch.allclose(sae.decode(latents, x, tap=tap), before)
    assert tuple(fired) == sae.taps
    if sae.cfg.normalization == "none" and not getattr(sae.cfg, "skip", False):
        torch.testing.assert_close(sae.decode(plain, x, tap=lambda _, v: v * 2), 2 * sae.decode(plain, x))


def test_a_tap_on_pre_activations_is_used(sae):
    if "acts_pre" not in sae.taps:
        assert isinstance(sae, PursuitSAE)
        return
    off = sae.encode(activations(2, 5), tap=lambda name, v: torch.zeros_like(v) if name == "acts_pre" else v)
    assert not off.any()


def test_a_subset_of_any_library_is_by_value(sae):
    import pandas as pd

    x, some = activations(2, 5), pd.Series([3, 1], index=[1, 0])  # labels in another order than the values
    all_of_them = sae.encode(x)
    assert torch.equal(sae.encode(x, latents=some), all_of_them[..., [3, 1]])
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool).index_fill_(0, torch.tensor([1, 3]), True)
    assert torch.equal(sae.encode(x, latents=pd.Series(mask.numpy())), all_of_them[..., [1, 3]])
    assert torch.equal(sae.encode(x, latents=np.int64(2)), sae.encode(x, latents=2))
    torch.testing.assert_close(
        sae.encode(x, latents=np.int64(2)), all_of_them[..., 2]
    )  # one row is a product of its own
    assert torch.equal(sae.encode(x, latents=slice(np.int64(1), None)), all_of_them[..., 1:])
    with pytest.raises(TypeError, match="got latent=True"):
        sae.encode(x, latents=True)


def test_taps_and_a_subset_are_refused_together(sae):
    with pytest.raises(ValueError, match="latents= and tap="):
        sae.encode(activations(1, 2), [1], tap=lambda _, v: v)


def test_decode_says_when_it_needs_the_input(sae):
    x = activations(2, 5)
    latents = sae.encode(x)
    if sae.cfg.normalization != "none" or getattr(sae.cfg, "skip", False) or _needs_sequences(sae):
        with pytest.raises(ValueError, match=r"sae\.decode\(latents, x\)"):
            sae.decode(latents)
    else:
        assert torch.equal(sae.decode(latents), sae(x))


def test_gradients_reach_every_parameter_and_are_finite(name, sae):
    x = activations(2, 5).requires_grad_()
    sae(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    # Thresholds have no gradient but the objective's; an unused b_dec has none.
    still = {"threshold"} | ({"b_dec"} if name in ("pursuit_untied", "temporal_no_bias") else set())
    for key, parameter in sae.named_parameters():
        if key in still:
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not key.endswith("k_ctx.bias"):  # a softmax does not see what all keys have in common
            assert parameter.grad.abs().sum() > 0, key


def test_gradients_are_those_of_finite_differences(sae):
    sae = copy.deepcopy(sae).double()
    # Away from kinks: `gradcheck` moves each input by 1e-6, far less than the distance to the next choice.
    x = activations(1, 2, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(sae, (x,), fast_mode=True)


# --- copies


def _assert_same(a, b):
    assert type(a) is type(b)
    assert a.cfg == b.cfg
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert all(left[key].dtype == right[key].dtype for key in left)


def test_deepcopy_and_pickle(sae):
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        _assert_same(sae, twin)
        assert torch.equal(twin(activations(2, 5)), sae(activations(2, 5)))
        assert twin.W_dec.data_ptr() != sae.W_dec.data_ptr()


def test_from_tensors_takes_all_and_only_its_tensors(sae):
    tensors = dict(sae.state_dict())
    twin = type(sae).from_tensors(sae.cfg, tensors)
    assert twin.W_dec.data_ptr() == sae.W_dec.data_ptr()  # no copy
    for broken in (
        {**tensors, "b_extra": torch.zeros(3)},
        {key: t for key, t in tensors.items() if key != "b_dec"},
        {**tensors, "b_dec": torch.zeros(D_SAE + 1)},
    ):
        with pytest.raises(FormatError):
            type(sae).from_tensors(sae.cfg, broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(name, sae, dtype, tmp_path):
    sae = sae.to(dtype)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    x = activations(2, 5)
    if name in OWN:  # b_pre has become part of b_enc
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype)
        assert again.cfg.pre_bias == "none"
        if tolerance:
            torch.testing.assert_close(again(x), sae(x), atol=tolerance, rtol=tolerance)
        _assert_same(load_sae(save_sae(again, tmp_path / "twice")), again)
        return
    _assert_same(again, sae)
    assert torch.equal(again(x), sae(x))


# --- folding


def test_fold_decoder_norm(sae):
    if sae.cfg.__dict__.get("k") is not None or not isinstance(sae, SAE):
        with pytest.raises(ValueError, match="cannot be folded"):
            sae.fold_decoder_norm()
        return
    x, folded = activations(2, 5), sae.fold_decoder_norm()
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(folded(x), sae(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * norms, atol=1e-5, rtol=1e-5)


def test_fold_decoder_norm_of_a_topk_whose_rows_agree():
    sae = feed_forward(activation="topk", k=5)
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) * 3
    even = SAE.from_tensors(sae.cfg, {**sae.state_dict(), "W_dec": rows})
    x, folded = activations(2, 5), even.fold_decoder_norm()
    torch.testing.assert_close(folded(x), even(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.encode(x), 3 * even.encode(x), atol=1e-5, rtol=1e-5)


def test_fold_scaling(sae):
    factor, x = 0.25, activations(2, 5)  # a power of two, so that nothing but the order of operations rounds
    if sae.cfg.normalization not in ("none", "centered"):  # taking out a mean commutes with a factor
        with pytest.raises(ValueError, match="normalization"):
            sae.fold_scaling(factor)
        return
    before = {key: t.clone() for key, t in sae.state_dict().items()}
    folded = sae.fold_scaling(factor)
    torch.testing.assert_close(folded(x), sae(factor * x) / factor, atol=1e-5, rtol=1e-5)
    shrunk = 1 / factor if isinstance(sae, PursuitSAE) else 1  # the pursuit's latents are in the input's units
    torch.testing.assert_close(folded.encode(x), sae.encode(factor * x) * shrunk, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[key], t) for key, t in sae.state_dict().items())
    with pytest.raises(ValueError, match=r"positive|0 or more"):
        sae.fold_scaling(-1.0)


def test_fold_scaling_with_two_factors():
    x, sae = activations(2, 5), transcoder(activation="jumprelu", skip=True, pre_bias="own")
    torch.testing.assert_close(sae.fold_scaling(0.5, 4.0)(x), sae(0.5 * x) / 4.0, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one factor"):
        feed_forward(pre_bias="tied").fold_scaling(0.5, 4.0)


# --- the formulas, by hand, in numpy


def _numbers(sae):
    return {key: t.double().numpy() for key, t in sae.state_dict().items()}


def _scale(x, scaling):
    if scaling == "layer_norm":
        mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if scaling == "constant_norm":
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        return x * np.sqrt(x.shape[-1]) / length, lambda y: y * length / np.sqrt(x.shape[-1])
    if scaling == "centered":
        return x - x.mean(-1, keepdims=True), lambda y: y + x.mean(-1, keepdims=True)
    return x, lambda y: y


def _keep_largest(keys, values, k):
    out = np.zeros_like(values)
    for index in np.ndindex(values.shape[:-1]):
        chosen = np.argsort(-keys[index])[:k]
        out[index][chosen] = values[index][chosen]
    return out


def _keep_largest_of_groups(p, k):
    groups = p.reshape(*p.shape[:-1], k, -1)
    return np.where(groups == groups.max(-1, keepdims=True), groups, 0).reshape(p.shape)


def _by_hand_feed_forward(cfg, w, x):
    u, unscale = _scale(x, cfg.normalization)
    b_pre = {"none": 0.0, "tied": w["b_dec"], "own": w.get("b_pre")}[cfg.pre_bias]
    p = (u - b_pre) @ w["W_enc"] + w["b_enc"]
    z = {
        "relu": lambda: np.maximum(p, 0),
        "jumprelu": lambda: np.where((p > w["threshold"]) & (p > 0), p, 0),
        "topk": lambda: np.maximum(_keep_largest(p, p, cfg.k), 0),
        "lineartopk": lambda: _keep_largest(p, p, cfg.k),
        "abstopk": lambda: _keep_largest(np.abs(p), p, cfg.k),
        "groupmax": lambda: np.maximum(_keep_largest_of_groups(p, cfg.k), 0),
    }[cfg.activation]()
    out = unscale(z @ w["W_dec"] + w["b_dec"])
    return z, out + x @ w["W_skip"] if cfg.skip else out


def _by_hand_pursuit(cfg, w, x):
    u, unscale = _scale(x, cfg.normalization)
    bias = w["b_dec"] if cfg.pre_bias == "tied" else 0.0
    z = np.zeros((*x.shape[:-1], cfg.d_sae))
    for index in np.ndindex(x.shape[:-1]):
        r = (u - bias)[index].copy()
        for _ in range(cfg.max_iterations or cfg.d_in):
            i = int(np.argmax(w["W_dec"] @ r))
            value, again = max(w["W_dec"][i] @ r, 0.0), z[index][i] != 0
            z[index][i] += value
            r -= value * w["W_dec"][i]
            if value == 0 or np.linalg.norm(r) < cfg.residual_threshold or (cfg.stop_on_duplicate and again):
                break
    return z, unscale(z @ w["W_dec"] + bias)


def _by_hand_attention(w, layer, z, n_heads):
    q, k, v, out = (
        (w[f"attn_layers.{layer}.{n}.weight"], w[f"attn_layers.{layer}.{n}.bias"])
        for n in ("q_target", "k_ctx", "v_ctx", "c_proj")
    )
    mixed = np.zeros_like(z)
    for b in range(z.shape[0]):
        earlier = np.vstack([np.zeros_like(z[b, :1]), z[b, :-1]])
        queries, keys, values = z[b] @ q[0].T + q[1], earlier @ k[0].T + k[1], earlier @ v[0].T + v[1]
        for head in range(n_heads):
            narrow = slice(*(head * keys.shape[1] // n_heads, (head + 1) * keys.shape[1] // n_heads))
            wide = slice(*(head * values.shape[1] // n_heads, (head + 1) * values.shape[1] // n_heads))
            for t in range(z.shape[1]):
                score = keys[: t + 1, narrow] @ queries[t, narrow] / np.sqrt(keys.shape[1] / n_heads)
                weight = np.exp(score - score.max())
                mixed[b, t, wide] = (weight / weight.sum()) @ values[: t + 1, wide]
    return mixed @ out[0].T + out[1]


def _by_hand_temporal(cfg, w, x):
    u, unscale = _scale(x * cfg.factor, cfg.normalization)
    w_enc = w["W_dec"].T if cfg.tied else w["W_enc"]
    r = u - w["b_dec"] if cfg.pre_bias == "tied" else u
    predicted = 0.0
    for layer in range(cfg.n_attn_layers):
        a = np.maximum(_by_hand_attention(w, layer, np.maximum(r @ w_enc / (4 * cfg.d_in), 0), cfg.n_heads), 0)
        g = a @ w["W_dec"]
        share = (g * r).sum(-1, keepdims=True) / (np.linalg.norm(g, axis=-1, keepdims=True) + 1e-6) ** 2
        predicted, r = predicted + share * a, r - share * g
    z = np.maximum(r @ w_enc / (4 * cfg.d_in), 0)
    z = z if cfg.k is None else _keep_largest(z, z, cfg.k)
    bias = w["b_dec"] if cfg.pre_bias == "tied" or not cfg.tied else 0.0
    return z, unscale((z + predicted) @ w["W_dec"] + bias) / cfg.factor


def test_formula(sae):
    by_hand = {SAE: _by_hand_feed_forward, PursuitSAE: _by_hand_pursuit, TemporalSAE: _by_hand_temporal}[type(sae)]
    sae = sae.double()
    x = activations(2, 7, dtype=torch.float64)
    with torch.no_grad():
        latents, out = sae.encode(x).numpy(), sae(x).numpy()
    want_latents, want_out = by_hand(sae.cfg, _numbers(sae), x.numpy())
    assert 0.05 < (want_latents != 0).mean() < 0.95
    np.testing.assert_array_equal(latents != 0, want_latents != 0)
    np.testing.assert_allclose(latents, want_latents, atol=1e-10)
    np.testing.assert_allclose(out, want_out, atol=1e-10)


def test_a_threshold_is_strict_and_never_below_zero():
    cfg = SAEConfig(d_in=1, d_sae=4, activation="jumprelu")
    sae = SAE.from_tensors(
        cfg,
        {
            "W_enc": torch.tensor([[1.0, 1.0, 1.0, -1.0]]),
            "b_enc": torch.zeros(4),
            "W_dec": torch.ones(4, 1),
            "b_dec": torch.zeros(1),
            "threshold": torch.tensor([2.0, 1.9999999, 2.0000002, -5.0]),
        },
    )
    # At the threshold off, just above it on; a negative threshold lets nothing negative through.
    assert sae.encode(torch.tensor([2.0])).tolist() == [0.0, 2.0, 0.0, 0.0]


# --- the two that are not one feed-forward pass


def test_pursuit_keeps_no_dense_tensor_per_round():
    sae = PursuitSAE(
        PursuitConfig(d_in=16, d_sae=512, max_iterations=12, residual_threshold=0.0, stop_on_duplicate=False)
    )
    x, kept = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        latents = sae.encode(x)
    assert (latents != 0).sum() > 64 * 6
    # W_dec itself (512 x 16) may be kept; [64, 512] may not, not even once.
    assert max(kept) < 64 * 512


def test_pursuit_that_finds_nothing_stops():
    cfg = PursuitConfig(d_in=2, d_sae=2, residual_threshold=0.0, stop_on_duplicate=False, pre_bias="none")
    sae = PursuitSAE.from_tensors(cfg, {"W_dec": torch.eye(2), "b_dec": torch.zeros(2)})
    x = torch.tensor([[-1.0, -2.0], [0.0, 0.0], [3.0, 4.0]])
    assert sae.encode(x).tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]
    assert sae(x).tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]


def test_pursuit_of_its_own_rows_finds_them():
    sae = PursuitSAE(PursuitConfig(d_in=8, d_sae=24, max_iterations=1))
    latents = sae.encode(3 * sae.W_dec)
    torch.testing.assert_close(latents, 3 * torch.eye(24))


def test_temporal_is_causal_and_its_first_token_foresees_nothing_of_the_others():
    sae, x = temporal(activation="topk", k=3), activations(1, 6)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(sae.encode(x)[:, :4], sae.encode(changed)[:, :4])
    torch.testing.assert_close(sae(x)[:, :4], sae(changed)[:, :4])
    assert not torch.equal(sae.predict(x)[:, 5], sae.predict(changed)[:, 5])


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (PursuitConfig, {"d_in": 0}),
        (PursuitConfig, {"d_sae": 2.5}),
        (PursuitConfig, {"residual_threshold": -1.0}),
        (PursuitConfig, {"max_iterations": 0}),
        (PursuitConfig, {"pre_bias": "own"}),
        (PursuitConfig, {"normalization": "batch_norm"}),
        (TemporalConfig, {"n_heads": 5}),
        (TemporalConfig, {"activation": "jumprelu"}),
        (TemporalConfig, {"activation": "topk"}),
        (TemporalConfig, {"k": 3}),
        (TemporalConfig, {"activation": "topk", "k": 25}),
        (TemporalConfig, {"factor": 0.0}),
        (TemporalConfig, {"factor": 2.0, "normalization": "layer_norm"}),
        (TemporalConfig, {"n_attn_layers": -1}),
    ],
)
def test_configurations_are_checked(config, wrong):
    right = {"d_in": 8, "d_sae": 24} | ({"n_heads": 2, "bottleneck_factor": 3} if config is TemporalConfig else {})
    config(**right)
    with pytest.raises((ValueError, TypeError), match=config.__name__):  # TypeError: beartype, which is on in tests
        config(**{**right, **wrong})


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError):
        PursuitConfig(d_in=2, d_sae=3, k=1)
    with pytest.raises(TypeError):
        TemporalConfig(d_in=2, d_sae=3, threshold=1)


def test_configurations_do_not_share_their_metadata():
    given_metadata = {"l0": 3}
    for cfg in (pursuit(metadata=given_metadata).cfg, temporal(metadata=given_metadata).cfg):
        given_metadata["l0"] = 4
        assert cfg.metadata["l0"] != 4
        given_metadata["l0"] = 3


# --- save and load over random configurations


def _k_of(draw, activation, d_sae):
    if activation == "groupmax":
        return draw(st.sampled_from([k for k in range(1, d_sae + 1) if d_sae % k == 0]))
    return draw(st.integers(1, d_sae)) if "topk" in activation else None


@st.composite
def _configs(draw):
    width = st.integers(1, 12)
    d_sae, activation = draw(width), draw(st.sampled_from(["relu", "jumprelu", "topk", "abstopk", "groupmax"]))
    d_in = draw(width)
    d_out = draw(st.none() | width)
    same = d_out in (None, d_in)
    hook = draw(st.sampled_from([None, "blocks.0.hook_resid_post", "blocks.3.attn.hook_z"]))
    hook_out = draw(st.sampled_from([None, "blocks.0.hook_mlp_out"])) if hook else None
    transcoder = not same or hook_out not in (None, hook)
    skip = draw(st.booleans())
    return SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        activation=activation,
        k=_k_of(draw, activation, d_sae),
        skip=skip,
        pre_bias="none" if transcoder or skip else draw(st.sampled_from(["none", "tied"])),
        normalization="none" if transcoder or skip else draw(st.sampled_from(["none", "layer_norm", "constant_norm"])),
        hook=hook,
        hook_out=hook_out,
        head=draw(st.none() | st.integers(0, 3)),
        model=draw(st.none() | st.text(max_size=5)),
        metadata=draw(st.dictionaries(st.sampled_from(["l0", "k", "note", "prepend_bos"]), st.booleans() | st.text())),
    )


@examples(30)
@given(cfg=_configs(), seed=st.integers(0, 99))
def test_save_and_load_any_configuration(cfg, seed, tmp_path_factory):
    sae = SAE(cfg, seed=seed)
    _assert_same(load_sae(save_sae(sae, tmp_path_factory.mktemp("any") / "sae")), sae)
