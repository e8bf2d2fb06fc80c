"""Cross-layer transcoders and crosscoders: their formula, what they read of their weights, what attaching them does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.errors import FormatError
from saewb.interventions.attachment import attach
from saewb.models import hook_points
from saewb.pretrained.load import save_sae
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder

READ, WRITE = "blocks.{}.hook_resid_mid", "blocks.{}.hook_mlp_out"
WIDTHS = (20, 24, 28)


def drawn(cfg, seed=0, std=0.3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        name: [(torch.randn(shape, generator=rng) * std).to(dtype) for shape in shapes]
        for name, shapes in cfg.tensor_shapes().items()
    }
    if "threshold" in tensors:
        tensors["threshold"] = [t.abs() for t in tensors["threshold"]]
    return tensors


def config(activation="jumprelu", d_in=tiny_models.D_MODEL, widths=WIDTHS, read=READ, write=WRITE, **fields):
    layers = range(len(widths))
    hooks_out = None if write is None else tuple(write.format(layer) for layer in layers)
    return CrossLayerConfig(
        d_in, widths, tuple(read.format(layer) for layer in layers), hooks_out, activation=activation, **fields
    )


def made(seed=0, **fields):
    cfg = config(**fields)
    return CrossLayerTranscoder.from_tensors(cfg, drawn(cfg, seed))


def formula(clt, xs):
    """z_i and y_j by numpy, in float64."""
    w = {name: [p.double().numpy() for p in getattr(clt, name)] for name in clt.cfg.tensor_shapes()}
    latents, out = [], []
    for i, x in enumerate(xs):
        pre = x.double().numpy() @ w["W_enc"][i] + w["b_enc"][i]
        keep = pre > (w["threshold"][i] if "threshold" in w else 0)
        latents.append(np.maximum(pre, 0) * keep)
    for j, x in enumerate(xs):
        y = w["b_dec"][j] + sum(latents[i] @ w["W_dec"][i][:, j - i] for i in range(j + 1))
        out.append(y + x.double().numpy() @ w["W_skip"][j] if "W_skip" in w else y)
    return latents, out


def inputs(n=3, d=tiny_models.D_MODEL, shape=(2, 5), seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, d, generator=rng) + 0.3 for _ in range(n)]


# --- the formula


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(["relu", "jumprelu"]),
    st.booleans(),
    st.integers(0, 99),
)
@examples(30, derandomize=True)
def test_encode_decode_and_forward_are_the_formula(widths, activation, skip, seed):
    clt = made(seed, activation=activation, d_in=5, d_out=7, widths=tuple(widths), skip=skip)
    xs = inputs(len(widths), 5, (3,), seed)
    want_latents, want_out = formula(clt, xs)
    latents = clt.encode(xs)
    for j, (z, y, again) in enumerate(zip(latents, clt.decode(latents, xs), clt(xs), strict=True)):
        np.testing.assert_allclose(z, want_latents[j], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(y, want_out[j], atol=1e-5, rtol=1e-5)
        assert torch.equal(y, again)
        one = clt.decode_layer(latents, j, xs[j] if skip else None)
        torch.testing.assert_close(one, y)
        z.requires_grad_()  # all rows are read then
    for y, want in zip(clt.decode(latents, xs), want_out, strict=True):
        np.testing.assert_allclose(y.detach(), want, atol=1e-5, rtol=1e-5)


def test_a_subset_of_latents():
    clt, (_, x, _) = made(), inputs()
    whole = clt.encode_layer(x, 1)
    for chosen in ([3, 1], slice(2, 9), torch.arange(24) % 2 == 0, 5):
        torch.testing.assert_close(clt.encode_layer(x, 1, chosen), whole[..., chosen])
    with pytest.raises(ValueError, match="both latents= and tap="):
        clt.encode_layer(x, 1, [1], tap=lambda name, value: value)


def test_a_threshold_is_strict():
    clt, x = made(), inputs()[0]
    pre = x @ clt.W_enc[0] + clt.b_enc[0]
    clt.threshold[0].copy_(pre.abs().reshape(-1, 20).median(0).values)  # the values of one token, exactly
    assert ((pre == clt.threshold[0]) & (pre > 0)).any()
    assert (clt.encode_layer(x, 0)[pre == clt.threshold[0]] == 0).all()


def test_taps_see_and_change_values():
    clt, xs = made(skip=True), inputs()
    seen = []
    z = clt.encode_layer(xs[0], 0, tap=lambda name, value: seen.append(name) or value)
    clt.decode_layer([z], 0, xs[0], tap=lambda name, value: seen.append(name) or value)
    assert tuple(seen) == CrossLayerTranscoder.taps
    twice = clt.encode_layer(xs[0], 0, tap=lambda name, value: value * 2 if name == "acts_post" else value)
    torch.testing.assert_close(twice, z * 2)


def test_gradients_pass_through_and_none_are_kept():
    clt, xs = made(), [x.requires_grad_() for x in inputs()]
    sum(y.sum() for y in clt(xs)).backward()
    assert all(x.grad.abs().sum() > 0 for x in xs)
    assert all(parameter.grad is None for parameter in clt.parameters())
    latents = [z.detach().requires_grad_() for z in clt.encode(xs)]
    clt.decode(latents)[2].sum().backward()  # of latents that are 0, too
    torch.testing.assert_close(latents[0].grad[0, 0], clt.W_dec[0][:, 2].sum(-1))


def test_matrices_stay_as_stored_and_it_computes_in_the_dtype_of_the_biases():
    cfg = config()
    stored = drawn(cfg, dtype=torch.bfloat16)
    biases = {name: [t.float() for t in stored[name]] for name in ("b_enc", "b_dec", "threshold")}
    clt, xs = CrossLayerTranscoder.from_tensors(cfg, {**stored, **biases}), inputs()
    assert clt.dtype == torch.float32
    assert clt.W_dec[0].data_ptr() == stored["W_dec"][0].data_ptr()
    latents, out = formula(clt, xs)
    for got, want in zip([*clt.encode(xs), *clt(xs)], [*latents, *out], strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    assert clt.to(torch.float64)(xs)[0].dtype == torch.float64


def test_only_active_rows_of_a_decoder_are_read():
    clt, xs = made(activation="relu"), inputs()
    for bias in clt.b_enc:
        bias[::2] = -50
    latents = clt.encode(xs)
    want = clt.decode(latents)
    for i, z in enumerate(latents):
        never = (z.reshape(-1, z.shape[-1]) == 0).all(0)
        assert never.any()
        clt.W_dec[i][never] = torch.nan
    for got, expected in zip(clt.decode(latents), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_wrong_input_is_refused():
    clt, xs = made(skip=True), inputs()
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 9\)"):
        clt.encode_layer(torch.ones(2, 5, 9), 0)
    for wrong in (xs[:2], torch.stack(xs)):
        with pytest.raises(ValueError, match="a list of 3, one for each layer"):
            clt.encode(wrong)
    with pytest.raises(ValueError, match="latents of 1 layers to decode layer 2"):
        clt.decode_layer(clt.encode(xs)[:1], 2)
    with pytest.raises(ValueError, match="needs its input"):
        clt.decode(clt.encode(xs))


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"d_in": 0}, "d_in"),
        ({"d_in": True}, "d_in"),
        ({"d_out": -1}, "d_out"),
        ({"d_sae": ()}, "d_sae"),
        ({"d_sae": (3, 0)}, "d_sae"),
        ({"d_sae": 3}, "d_sae"),
        ({"hooks": ("a",)}, "hooks"),
        ({"hooks": ("a", "a")}, "hooks"),
        ({"hooks": "ab"}, "hooks"),
        ({"hooks_out": ("c",)}, "hooks_out"),
        ({"activation": "topk"}, "activation"),
        ({"skip": 1}, "skip"),
    ],
)
def test_configurations_are_checked(fields, wrong):
    with pytest.raises(ValueError, match=f"CrossLayerConfig got {wrong}="):
        CrossLayerConfig(**{"d_in": 4, "d_sae": (3, 5), "hooks": ("a", "b"), **fields})


def test_every_tensor_is_accounted_for():
    cfg = config(skip=True)
    for name in cfg.tensor_shapes():
        tensors = drawn(cfg)
        with pytest.raises(FormatError, match=f"missing .*{name}"):
            CrossLayerTranscoder.from_tensors(cfg, {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(FormatError, match=f"layers of {name} have shapes"):
            CrossLayerTranscoder.from_tensors(cfg, {**tensors, name: tensors[name][::-1][1:]})
    with pytest.raises(FormatError, match=r"left over \['more'\]"):
        CrossLayerTranscoder.from_tensors(cfg, {**drawn(cfg), "more": []})


def test_it_is_not_saved_as_what_it_is_not(tmp_path):
    with pytest.raises(TypeError, match="the SAELens layout has no CrossLayerTranscoder"):
        save_sae(made(), tmp_path / "clt")
    assert not (tmp_path / "clt").exists()


def test_repr_is_one_line():
    assert repr(made(model="gpt2", skip=True)) == (
        "CrossLayerTranscoder(jumprelu, 3 layers of 16 -> 20 to 28 latents -> 16, skip, "
        "blocks.0.hook_resid_mid to blocks.2.hook_resid_mid => blocks.0.hook_mlp_out to blocks.2.hook_mlp_out, gpt2, "
        "float32 on cpu)"
    )
    assert "=>" not in repr(made(write=None))


# --- attached


def by_hand(model, clt, tokens, edit=lambda z, layer: z, error=False, clean=None):
    """Logits, and latents of each layer, with plain hooks; `edit` changes latents, `error` adds what it gets wrong."""
    xs, used, plain = {}, {}, {}

    def reader(layer):
        return lambda a: xs.__setitem__(layer, a)

    def writer(layer):
        def write(target):
            x = xs.get(layer, target) if clt.cfg.is_transcoder else target
            plain[layer] = clt.encode_layer(x, layer)
            used[layer] = edit(plain[layer], layer)
            out = clt.decode_layer([used[i] for i in range(layer + 1)], layer, x)
            if error:
                out = out + (target - clt.decode_layer([plain[i] for i in range(layer + 1)], layer, x)).detach()
            return out

        return write

    edits = {hook: reader(i) for i, hook in enumerate(clt.cfg.hooks)} if clt.cfg.is_transcoder else {}
    edits |= {hook: writer(i) for i, hook in enumerate(clt.cfg.hooks_out)}
    with hook_points.editing(model, edits):
        logits = model(tokens)
    return logits, [used[i] for i in range(clt.cfg.n_layers)]


KINDS = {
    "clt": {},
    "relu skip": {"activation": "relu", "skip": True},
    "mlp in": {"read": "blocks.{}.mlp.hook_in"},
    "crosscoder": {"read": "blocks.{}.hook_resid_post", "write": None},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_attaching_equals_plain_hooks(model, kind, grad):
    clt, tokens = made(**KINDS[kind]), tiny_models.tokens()
    with torch.set_grad_enabled(grad):
        clean = model(tokens)
        want, want_latents = by_hand(model, clt, tokens)
        with attach(model, clt) as attached:
            got = model(tokens)
            latents = attached.latents[clt]
            assert attached.saes == [clt]
        assert torch.equal(model(tokens), clean)
    torch.testing.assert_close(got, want)
    assert (want - clean).abs().max() > 1e-2
    assert len(latents) == 3
    for layer, (z, expected) in enumerate(zip(latents, want_latents, strict=True)):
        torch.testing.assert_close(z, expected, msg=f"layer {layer}")


@pytest.mark.parametrize("kind", KINDS)
def test_latents_by_point_and_inner_points(model, kind):
    clt, tokens = made(**KINDS[kind]), tiny_models.tokens()
    with torch.no_grad(), attach(model, clt) as attached:
        _, cache = model.run_with_cache(tokens)
        for layer, hook in enumerate(clt.cfg.hooks_out):
            z = attached.latents[hook]
            assert z.shape == (*tokens.shape, WIDTHS[layer])
            torch.testing.assert_close(cache[f"{hook}.hook_sae_acts_post"], z)
            torch.testing.assert_close(cache[f"{hook}.hook_sae_output"], cache[hook])
            x = cache[f"{hook}.hook_sae_input"]
            torch.testing.assert_close(clt.encode_layer(x, layer), z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_error_term_restores_the_model(model, kind, grad):
    clt, tokens = made(**KINDS[kind]), tiny_models.tokens()
    with torch.set_grad_enabled(grad):
        clean = model(tokens)
        with attach(model, clt, error_term=True):
            torch.testing.assert_close(model(tokens), clean, atol=1e-4, rtol=1e-4)
            _, cache = model.run_with_cache(tokens)
            assert cache[f"{clt.cfg.hooks_out[1]}.hook_sae_error"].abs().max() > 1e-2


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_an_edit_of_latents_is_felt_at_every_later_layer(model, kind, layer, error, grad):
    clt, tokens = made(**KINDS[kind]), tiny_models.tokens()
    with torch.set_grad_enabled(grad):
        want, _ = by_hand(model, clt, tokens, lambda z, i: z * 3 if i == layer else z, error)
        with attach(model, clt, error_term=error):
            point = f"{clt.cfg.hooks_out[layer]}.hook_sae_acts_post"
            got = model.run_with_hooks(tokens, fwd_hooks=[(point, lambda z, hook: z * 3)])
            again = model(tokens)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - again).abs().max() > 1e-2


def test_gradients_of_latents_through_later_layers(model):
    """As by plain hooks, and for inactive latents too."""
    clt, tokens = made(), tiny_models.tokens()

    def kept(z, layer=None):
        z.retain_grad()
        return z

    logits, plain = by_hand(model, clt, tokens, error=True, edit=kept)
    logits[0, -1, 3].backward()
    with attach(model, clt, error_term=True) as attached:
        points = [f"{hook}.hook_sae_acts_post" for hook in clt.cfg.hooks_out]
        logits = model.run_with_hooks(tokens, fwd_hooks=[(point, lambda z, hook: kept(z)) for point in points])
        latents = attached.latents[clt]
        logits[0, -1, 3].backward()
    for got, want in zip(latents, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-4, rtol=1e-3)
        assert (want.grad[want == 0] != 0).any()
    model.zero_grad()


@pytest.mark.parametrize("error", [True, False])
def test_special_tokens_pass(model, error):
    clt, tokens = made(), tiny_models.tokens()
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        with attach(model, clt, skip_special_tokens=[tiny_models.BOS], error_term=error):
            _, cache = model.run_with_cache(tokens)
    for hook in clt.cfg.hooks_out:
        torch.testing.assert_close(cache[hook][:, 0], clean[hook][:, 0])
        if not error:
            assert not torch.allclose(cache[hook][:, 1:], clean[hook][:, 1:])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_sae_over_one_layer_overrides_it_there_and_only_there(model, layer):
    clt, tokens = made(), tiny_models.tokens()
    sae = tiny_models.sae(clt.cfg.hooks_out[layer])
    with torch.no_grad():
        want_clt, _ = by_hand(model, clt, tokens)
        want = _overridden(model, clt, sae, layer, tokens)
        with attach(model, clt) as outer:
            with attach(model, sae):
                got = model(tokens)
                assert all(z.shape[:2] == tokens.shape for z in outer.latents[clt])
            torch.testing.assert_close(model(tokens), want_clt)
    torch.testing.assert_close(got, want)


def _overridden(model, clt, sae, over, tokens):
    xs, zs = {}, {}

    def writer(layer):
        def write(target):
            zs[layer] = clt.encode_layer(xs[layer], layer)
            return sae(target) if layer == over else clt.decode_layer([zs[i] for i in range(layer + 1)], layer)

        return write

    edits = {hook: lambda a, i=i: xs.__setitem__(i, a) for i, hook in enumerate(clt.cfg.hooks)}
    with hook_points.editing(model, {**edits, **{hook: writer(i) for i, hook in enumerate(clt.cfg.hooks_out)}}):
        return model(tokens)


def test_model_and_hooks_are_as_before_after_an_exception(model):
    clt, tokens = made(), tiny_models.tokens()
    clean, before = model(tokens), tiny_models.snapshot(model)

    def fail(activation, hook):
        raise RuntimeError("in a hook")

    with attach(model, clt) as attached:
        with pytest.raises(RuntimeError, match="in a hook"):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
        torch.testing.assert_close(model(tokens), by_hand(small_twin(model), clt, tokens)[0])
        assert "blocks.0.hook_resid_mid" in repr(attached)
    assert tiny_models.snapshot(model) == before
    assert torch.equal(model(tokens), clean)


def small_twin(model):
    return tiny_models.new_bridge() if type(model).__name__ == "TransformerBridge" else tiny_models.new_hooked()


def test_a_shared_object_can_be_attached_to_two_models_at_once():
    clt, tokens, (a, b) = made(), tiny_models.tokens(), (tiny_models.new_bridge(), tiny_models.new_bridge())
    with torch.no_grad():
        want, _ = by_hand(a, clt, tokens)
        with attach(a, clt), attach(b, clt):
            torch.testing.assert_close(a(tokens), want)
            torch.testing.assert_close(b(tokens), want)


def test_nothing_of_the_last_pass_is_left_after_detach(model):
    clt = made()
    attached = attach(model, clt)
    model(tiny_models.tokens())
    attached.detach()
    assert all(not splice.sae._latents.edited and not splice.sae.edited for splice in attached._splices)
    with pytest.raises(ValueError, match="is detached"):
        attached.latents[clt]


def test_generation_with_a_cache_is_generation_without(model):
    clt, tokens = made(), tiny_models.tokens(1)
    arguments = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "return_type": "tokens"}
    with torch.no_grad(), attach(model, clt):
        torch.testing.assert_close(
            model.generate(tokens, **arguments), model.generate(tokens, use_past_kv_cache=False, **arguments)
        )


def test_a_pass_that_starts_later_has_not_read_the_first_layers(model):
    clt, tokens = made(), tiny_models.tokens()
    with torch.no_grad():
        start = model.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"]
        if not can_start_later(model, start):
            pytest.skip("the Bridge of transformer-lens 3 has no start_at_layer")
        with attach(model, clt):
            with pytest.raises(ValueError, match=r"'blocks.0.hook_resid_mid' was not read in this pass"):
                model(start, start_at_layer=1)
            want, _ = by_hand(small_twin(model), clt, tokens)
            torch.testing.assert_close(model(tokens), want)


def can_start_later(model, residual):
    try:
        model(residual, start_at_layer=1)
    except NotImplementedError:
        return False
    return True


def test_points_that_do_not_fit(model):
    clt = made()
    with pytest.raises(ValueError, match="which has points for every layer"):
        attach(model, clt, hook="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match="both write to 'blocks.1"):
        attach(model, [clt, tiny_models.sae("blocks.1.hook_mlp_out")])
    with pytest.raises(ValueError, match="no hook named 'blocks.3.hook_resid_mid'"):
        attach(model, made(widths=(4, 5, 6, 7)))
    backwards = CrossLayerTranscoder.from_tensors(
        CrossLayerConfig(16, (20, 24), clt.cfg.hooks[1::-1], clt.cfg.hooks_out[1::-1]),
        {name: tensors for name, tensors in drawn(config("relu", widths=(20, 24))).items()},
    )
    with attach(model, backwards), pytest.raises(ValueError, match="was not read in this pass"):
        model(tiny_models.tokens())


def test_beside_other_saes(model):
    clt, sae, tokens = made(), tiny_models.sae("blocks.2.hook_resid_post"), tiny_models.tokens()
    with torch.no_grad(), attach(model, [clt, sae]) as attached:
        got = model(tokens)
        assert attached.saes == [clt, sae]
        assert attached.latents[sae].shape == (*tokens.shape, 40)
        assert len(attached.latents) == 4
    twin = small_twin(model)
    with torch.no_grad(), attach(twin, sae):
        torch.testing.assert_close(got, by_hand(twin, clt, tokens)[0])


@pytest.mark.parametrize("verb", ["evaluate", "steer"])
def test_what_works_on_one_point_says_so(model, verb):
    work = {
        "evaluate": lambda clt: saewb.evaluate(model, clt, tiny_models.tokens()),
        "steer": lambda clt: saewb.steer(model, clt, {1: 2.0}),
    }[verb]
    with pytest.raises(TypeError, match=r"reads and writes at every layer[\s\S]*saewb.attach"):
        work(made())
