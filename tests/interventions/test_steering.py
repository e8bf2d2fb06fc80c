"""Steering and ablating: by hand on every kind of model, in generation, with everything else on the model."""

import math

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.interventions.attachment import attach, detach_all
from saewb.interventions.steering import ablate, steer
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE

RESID, MLP, MID, Z = (
    "blocks.1.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_mid",
    "blocks.1.attn.hook_z",
)
GATES = [
    {"activation": "relu"},
    {"activation": "jumprelu"},
    {"activation": "topk", "k": 6},
    {"activation": "abstopk", "k": 6},
]
HOW = {"add": lambda a, v: a + v, "clamp": lambda a, v: torch.full_like(a, v), "scale": lambda a, v: a * v}


def by_hand(model, tokens, point, change):
    """Logits with `change(activation)` added at the point, by a plain hook."""
    return model.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: x + change(x))])


def active(sae, model, tokens, n=3):
    """The latents that are on at most tokens."""
    _, cache = model.run_with_cache(tokens, names_filter=sae.cfg.hook)
    return (sae.encode(cache[sae.cfg.hook]) != 0).flatten(0, 1).sum(0).topk(n).indices.tolist()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("activation", GATES, ids=lambda g: g["activation"])
def test_each_way_by_hand(model, activation, how):
    sae, tokens = tiny_models.sae(RESID, **activation), tiny_models.tokens()
    chosen = active(sae, model, tokens)
    values = dict(zip(chosen, [4.0, -2.5, 0.5], strict=True))

    def change(x):
        a = sae.encode(x)
        new = a.clone()
        for i, v in values.items():
            new[..., i] = HOW[how](a[..., i], v)
        return sae.decode(new) - sae.decode(a)

    with torch.no_grad():
        want, clean = by_hand(model, tokens, RESID, change), model(tokens)
        with steer(model, sae, values, how=how):
            got = model(tokens)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert (got - clean).abs().max() > 1e-2
        assert torch.equal(model(tokens), clean)


def test_ablating_is_what_attach_with_error_term_and_a_plain_hook_do(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    i, j = active(sae, model, tokens, 2)

    def zero(acts, hook):
        acts = acts.clone()
        acts[..., [i, j]] = 0
        return acts

    with torch.no_grad():
        plain = by_hand(
            model, tokens, RESID, lambda x: -sum(sae.encode(x)[..., n, None] * sae.W_dec[n] for n in (i, j))
        )
        with ablate(model, sae, [i, j]):
            ours = model(tokens)
        with attach(model, sae, error_term=True):
            attached = model.run_with_hooks(tokens, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", zero)])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attached, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_generation_with_and_without_a_cache(model, how, cached):
    sae, prompt = tiny_models.sae(RESID, "topk", k=6), tiny_models.tokens(1, 5)
    chosen = dict.fromkeys(active(sae, model, prompt, 2), 3.0)
    # A HookedTransformer that generates without a cache runs on embeddings, and nobody can tell special tokens there.
    skip = cached or hasattr(model, "original_model")
    with torch.no_grad(), steer(model, sae, chosen, how=how, positions=slice(3, None), skip_special_tokens=skip):
        args = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
        out = model.generate(prompt, use_past_kv_cache=cached, **args)
        step = prompt
        for _ in range(5):
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, step)


def test_a_transcoder_is_read_in_one_place_and_changed_in_another(model):
    sae, tokens = tiny_models.sae(MID, hook_out=MLP), tiny_models.tokens()
    (i,) = active(sae, model, tokens, 1)
    seen = {}

    def keep(x, hook):
        seen["x"] = x.clone()

    def cut(y, hook):
        return y - sae.encode(seen["x"])[..., i, None] * sae.W_dec[i]

    with torch.no_grad():
        want = model.run_with_hooks(tokens, fwd_hooks=[(MID, keep), (MLP, cut)])
        with ablate(model, sae, i):
            torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=1e-5)


def test_heads(model):
    one = tiny_models.sae(Z, d_in=tiny_models.D_MODEL // tiny_models.HEADS, head=2)
    whole = tiny_models.sae(Z)
    tokens = tiny_models.tokens()

    def on_head(z, hook):
        z = z.clone()
        z[:, :, 2] += 5 * one.W_dec[3]
        return z

    def on_all(z, hook):
        return z + 5 * whole.W_dec[3].view(z.shape[2:])

    for sae, edit in ((one, on_head), (whole, on_all)):
        with torch.no_grad():
            want = model.run_with_hooks(tokens, fwd_hooks=[(Z, edit)])
            with steer(model, sae, {3: 5.0}):
                torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm"])
def test_a_change_is_scaled_as_the_sae_scales(model, normalization):
    sae, tokens = tiny_models.sae(RESID, normalization=normalization), tiny_models.tokens()

    def change(x):
        a = sae.encode(x)
        new = a.clone()
        new[..., 7] += 2
        return sae.decode(new, x) - sae.decode(a, x)

    with torch.no_grad():
        want = by_hand(model, tokens, RESID, change)
        with steer(model, sae, {7: 2.0}):
            torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_pursuit_and_temporal_saes(model, how):
    tokens = tiny_models.tokens()
    result = [
        PursuitSAE(PursuitConfig(d_in=tiny_models.D_MODEL, d_sae=40, max_iterations=4, hook=RESID)),
        TemporalSAE(TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID)),
    ]
    for sae in result:

        def change(x, sae=sae):
            a = sae.encode(x)
            new = a.clone()
            new[..., 5] = HOW[how](a[..., 5], 2.0)
            return sae.decode(new, x) - sae.decode(a, x)

        with torch.no_grad():
            want = by_hand(model, tokens, RESID, change)
            with steer(model, sae, {5: 2.0}, how=how):
                torch.testing.assert_close(model(tokens), want, atol=1e-4, rtol=1e-4)


def test_a_temporal_sae_clamps_without_a_cache_only(model):
    sae = TemporalSAE(TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID))
    args = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with torch.no_grad(), ablate(model, sae, 3):
        with pytest.raises(ValueError, match="use_past_kv_cache=False"):
            model.generate(tiny_models.tokens(1, 4), **args)


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        (2, [2]),
        ([0, 4], [0, 4]),
        (slice(3, None), [3, 4, 5, 6]),
        (slice(1, 6, 2), [1, 3, 5]),
        (torch.tensor([0, 1, 0, 0, 0, 1, 0]).bool(), [1, 5]),
        (torch.tensor([6, 2]), [2, 6]),
        (slice(20, None), []),
    ],
    ids=str,
)
def test_positions(model, positions, where):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    mask = torch.zeros(1, 7, 1)
    mask[:, where] = 1
    with torch.no_grad():
        want = by_hand(model, tokens, RESID, lambda x: mask * 6 * sae.W_dec[3])
        with steer(model, sae, {3: 6.0}, positions=positions):
            torch.testing.assert_close(model(tokens), want)


def test_a_mask_for_each_row_and_special_tokens(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    mask = torch.rand(2, 7) > 0.5
    plain = mask & (tokens != tiny_models.BOS)
    with torch.no_grad():
        want = by_hand(model, tokens, RESID, lambda x: plain[..., None] * 6 * sae.W_dec[3])
        with steer(model, sae, {3: 6.0}, positions=mask, skip_special_tokens=True):
            torch.testing.assert_close(model(tokens), want)


def test_several_saes_at_once(model):
    a, b, tokens = tiny_models.sae("blocks.0.hook_resid_post"), tiny_models.sae(RESID, seed=5), tiny_models.tokens()
    with torch.no_grad():
        with steer(model, a, {3: 4.0}), steer(model, b, {9: -4.0}):
            want = model(tokens)
        with steer(model, {a: {3: 4.0}, b: {9: -4.0}}) as steering:
            assert torch.equal(model(tokens), want)
            assert "add 3: 4 at blocks.0.hook_resid_post; add 9: -4" in repr(steering)


def test_where_the_sae_is_attached_its_latents_are_the_ones_that_count(model):
    """Its own reconstruction, encoded again, would have other latents; and hooks on latents have their say first."""
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    (i,) = active(sae, model, tokens, 1)

    def double(acts, hook):
        return acts * 2

    def zero(acts, hook):
        acts = acts * 2
        acts[..., i] = 0
        return acts

    inner = f"{RESID}.hook_sae_acts_post"
    with torch.no_grad(), attach(model, sae):
        want = model.run_with_hooks(tokens, fwd_hooks=[(inner, zero)])
        with ablate(model, sae, i):
            got = model.run_with_hooks(tokens, fwd_hooks=[(inner, double)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_users_hooks_and_order(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()

    def halve(x, hook):
        return x / 2

    with torch.no_grad():
        model.add_hook(RESID, halve)
        try:
            with steer(model, sae, {3: 6.0}):
                got = model(tokens)
        finally:
            model.reset_hooks()
        want = model.run_with_hooks(tokens, fwd_hooks=[(RESID, lambda x, hook: x / 2 + 6 * sae.W_dec[3])])
        torch.testing.assert_close(got, want)


def test_reset_hooks_does_not_detach_and_detach_all_does(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    with torch.no_grad():
        clean = model(tokens)
        steering = steer(model, sae, {3: 6.0})
        steered = model(tokens)
        model.reset_hooks()
        assert torch.equal(model(tokens), steered)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), steered)
        detach_all(model)
        assert not steering.is_attached
        assert torch.equal(model(tokens), clean)
        steering.detach()
        with pytest.raises(ValueError, match="is over"), steering:
            pass


def test_detached_in_any_order_after_an_exception(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    before = tiny_models.snapshot(model)
    with torch.no_grad():
        clean = model(tokens)
        first, second = steer(model, sae, {3: 6.0}), attach(model, sae)
        third = ablate(model, sae, [1])
        first.detach()
        third.detach()
        second.detach()
        assert tiny_models.snapshot(model) == before
        with pytest.raises(RuntimeError, match="mine"), steer(model, sae, {3: 1.0}):
            raise RuntimeError("mine")
        assert tiny_models.snapshot(model) == before
        assert torch.equal(model(tokens), clean)


def test_a_point_that_does_not_exist_leaves_nothing_behind(model):
    before = tiny_models.snapshot(model)
    with pytest.raises(ValueError, match=r"no hook named[\s\S]*near"):
        steer(model, {tiny_models.sae(RESID): {1: 1.0}, tiny_models.sae("blocks.1.hook_resid_pots"): {2: 1.0}})
    assert tiny_models.snapshot(model) == before


def test_gradients_pass_through(model):
    """Normalization by 1/2 halves what the latent's part of the activation contributes to the gradient."""
    sae, tokens, seen = tiny_models.sae(RESID), tiny_models.tokens(), []
    (i,) = active(sae, model, tokens, 1)

    def leaf(x, hook):
        seen.append(x.detach().requires_grad_())
        return seen[-1]

    weights = torch.randn(tiny_models.VOCAB)
    with steer(model, sae, {i: 0.5}, how="scale") as steering:
        model.add_hook("blocks.1.hook_resid_mid", leaf)
        try:
            got = torch.autograd.grad((model(tokens) @ weights).sum(), seen[-1])[0]
        finally:
            model.reset_hooks()
        assert steering.is_attached

    def halve(x, hook):
        return x - 0.5 * sae.encode(x, latents=[i]) @ sae.W_dec[[i]]

    out = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_mid", leaf), (RESID, halve)])
    torch.testing.assert_close(got, torch.autograd.grad((out @ weights).sum(), seen[-1])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, s: steer(m, s, {40: 1.0}), "has no latent 40[\\s\\S]*0 to 39"),
        (lambda m, s: steer(m, s, {-1: 1.0}), "has no latent -1"),
        (lambda m, s: steer(m, s, {1: math.nan}), "nan"),
        (lambda m, s: steer(m, s, {}), "latents=\\{\\}"),
        (lambda m, s: steer(m, s, [3]), "latents=\\[3\\]"),
        (lambda m, s: steer(m, s, {1: 1.0}, how="set"), "how='set'[\\s\\S]*'clamp'"),
        (lambda m, s: steer(m, s, {1: 1.0}, positions=-1), "positions=-1"),
        (lambda m, s: steer(m, s, {1: 1.0}, positions=slice(-2, None)), "from the start"),
        (lambda m, s: steer(m, {s: {1: 1.0}}, {1: 1.0}), "several SAEs together"),
        (lambda m, s: steer(m, torch.nn.Linear(2, 2), {1: 1.0}), "Linear as an SAE"),
        (lambda m, s: ablate(m, s, []), "latents=\\[\\]"),
        (lambda m, s: ablate(m, s), "latents=None"),
    ],
)
def test_what_is_wrong_is_said(model, call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(model, tiny_models.sae(RESID))


def test_a_mask_of_another_shape_is_said_in_the_pass(model):
    with torch.no_grad(), steer(model, tiny_models.sae(RESID), {1: 1.0}, positions=torch.ones(5).bool()):
        with pytest.raises(ValueError, match=r"positions has shape \(5,\)"):
            model(tiny_models.tokens())


def test_an_sae_of_another_width_is_said_in_the_pass(model):
    with torch.no_grad(), steer(model, tiny_models.sae(RESID, d_in=12), {1: 1.0}):
        with pytest.raises(ValueError, match="do not fit"):
            model(tiny_models.tokens())


def test_a_bfloat16_model_stays_in_its_dtype():
    model = tiny_models.new_bridge(torch.bfloat16)
    with torch.no_grad(), steer(model, tiny_models.sae(RESID), {1: 2.0}, how="clamp"):
        _, cache = model.run_with_cache(tiny_models.tokens())
    assert cache[RESID].dtype == torch.bfloat16


# -- values by row, and conditions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["add", "clamp", "scale"])
def test_each_row_has_its_own_value_and_none_leaves_it_alone(model, how):
    sae, ids = tiny_models.sae(RESID, normalization="layer_norm"), tiny_models.tokens(1, 6)
    rows = ids.expand(4, -1)
    with torch.no_grad():
        clean = model(rows)
        with steer(model, sae, {3: [2.0, None, -4.0, 9.0], 7: 1.5}, how=how):
            some = model(rows)
        with steer(model, sae, {3: [None, 2.0, -4.0, 9.0]}, how=how) as steering:
            got = model(rows)
        for row, value in ((1, 2.0), (2, -4.0), (3, 9.0)):
            with steer(model, sae, {3: value}, how=how):
                torch.testing.assert_close(got[row], model(rows)[row], atol=1e-4, rtol=1e-4)
        with steer(model, sae, {7: 1.5}, how=how):
            torch.testing.assert_close(some[1], model(rows)[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(got[0], clean[0])
    assert f"{how} 3: [-, 2, -4, 9]" in repr(steering)
    with steer(model, sae, {3: [1.0, 2.0]}), pytest.raises(ValueError, match="2 rows, the batch has 4"):
        model(rows)
    with pytest.raises(ValueError, match="as many for each latent"):
        steer(model, sae, {3: [1.0, 2.0], 4: [1.0]})


def conditional(model, hook, threshold=0.0, latent=5):
    """An SAE one of whose latents fires on half of `tokens(3, 8)`, those tokens, and on which of them."""
    sae, tokens, seen = tiny_models.sae(hook, seed=4), tiny_models.tokens(3, 8), {}
    model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: seen.update(x=x) or None)])
    with torch.no_grad():
        sae.b_enc[latent] = 0
        sae.b_enc[latent] = threshold - (seen["x"] @ sae.W_enc[:, latent]).quantile(0.5)  # between two tokens
        fires = sae.encode(seen["x"])[..., latent] > threshold
    assert 6 <= int(fires.sum()) <= 18
    return sae, tokens, fires


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", RESID])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_it_steers_only_where_another_latent_fires(model, hook, threshold):
    with torch.no_grad():
        other, tokens, fires = conditional(model, hook, threshold)
        sae = tiny_models.sae(RESID)
        when = {other: 5} if not threshold else {other: {5: threshold}}
        with steer(model, sae, {3: 6.0}, when=when, positions=slice(1, None)):
            got = model(tokens)
        with steer(model, sae, {3: 6.0}, positions=fires & (torch.arange(8) >= 1)):
            want = model(tokens)
        clean = model(tokens)
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, clean)


def test_a_latent_of_the_same_sae_and_one_of_several_is_enough(model):
    with torch.no_grad():
        sae, tokens, fires = conditional(model, RESID)
        acts = {}
        model.run_with_hooks(tokens, fwd_hooks=[(RESID, lambda x, hook: acts.update(a=sae.encode(x)) or None)])
        with steer(model, sae, {3: 6.0}, when=5) as steering:
            one = model(tokens)
        with steer(model, sae, {3: 6.0}, positions=fires):
            torch.testing.assert_close(one, model(tokens))
        with steer(model, sae, {3: 6.0}, when=[5, 9]):
            both = model(tokens)
        with steer(model, sae, {3: 6.0}, positions=fires | (acts["a"][..., 9] > 0)):
            torch.testing.assert_close(both, model(tokens))
        with saewb.attach(model, sae), steer(model, sae, {3: 6.0}, when=5):  # its latents are the attachment's
            model(tokens)
    assert "when 5 > 0" in repr(steering)


def test_conditions_hold_with_a_cache_of_keys_and_values_as_without(model):
    sae, (other, *_) = tiny_models.sae(RESID), conditional(model, "blocks.0.hook_resid_post", 0.3)
    make = lambda: steer(model, sae, {3: 20.0}, when={other: {5: 0.3}})  # noqa: E731
    texts = [
        [t.token_id for t in saewb.generate_tokens(
            model, tiny_models.tokens(1, 5), f, max_new_tokens=14, temperature=1.5, use_past_kv_cache=cache)]
        for f, cache in ((make, True), (make, False), (None, True), (lambda: steer(model, sae, {3: 20.0}), True))
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0] != texts[3]


def test_what_is_wrong_with_a_condition_is_said(model):
    sae, late = tiny_models.sae(RESID), tiny_models.sae("blocks.2.hook_resid_post")
    with torch.no_grad(), steer(model, sae, {3: 6.0}, when={late: 5}):
        with pytest.raises(ValueError, match="did not fire before the point that is steered"):
            model(tiny_models.tokens())
    with pytest.raises(ValueError, match="when=\\{sae: 40\\}"):
        steer(model, {sae: {3: 6.0}}, when=5)
    with pytest.raises(ValueError, match="no when \\[40\\]|has no when"):
        steer(model, sae, {3: 6.0}, when=40)
    with pytest.raises(ValueError, match="finite thresholds"):
        steer(model, sae, {3: 6.0}, when={sae: {5: math.inf}})
