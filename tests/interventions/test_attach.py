"""Attaching: what flows through the model, what can be seen and edited, and that nothing is left behind."""

import threading

import pytest
import torch
from helpers import tiny_models
from torch import nn

from saewb.interventions.attachment import attach, attachments, detach_all
from saewb.models import hook_points
from saewb.sae.temporal import TemporalConfig, TemporalSAE

RESID, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
POINTS = [RESID, "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.2.attn.hook_z"]


def by_hand(model, sae, tokens, edit=lambda recon, target: recon, point=None):
    """The model's logits with `edit(sae(x), x)` written at the point, by transformer-lens' own hooks."""

    def write(activation, hook):
        flat = activation.flatten(2) if activation.ndim == 4 else activation
        return edit(sae(flat), flat).reshape(activation.shape).to(activation.dtype)

    return model.run_with_hooks(tokens, fwd_hooks=[(point or sae.cfg.hook, write)])


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_output_of_the_sae_replaces_the_activation(model, point, grad):
    sae, tokens = tiny_models.sae(point), tiny_models.tokens()
    with torch.set_grad_enabled(grad):
        clean, want = model(tokens), by_hand(model, sae, tokens)
        with attach(model, sae):
            got = model(tokens)
        assert torch.equal(model(tokens), clean)
    torch.testing.assert_close(got, want)
    assert (want - clean).abs().max() > 1e-2


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "abstopk"])
@pytest.mark.parametrize("grad", [True, False])
def test_every_gate_with_and_without_gradients(model, activation, grad):
    sae, tokens = tiny_models.sae(RESID, activation, k=5 if "topk" in activation else None), tiny_models.tokens()
    with torch.set_grad_enabled(grad):
        want = by_hand(model, sae, tokens)
        with attach(model, sae) as attached:
            torch.testing.assert_close(model(tokens), want)
            torch.testing.assert_close(
                attached.latents[sae], sae.encode(clean_activation(model, tokens, RESID, attached))
            )


def clean_activation(model, tokens, name, attached=None):
    """What the model computes there by itself."""
    if attached is not None:
        return model.run_with_cache(tokens)[1][f"{name}.hook_sae_input"]
    return model.run_with_cache(tokens)[1][name]


def test_several_saes_each_reads_what_the_one_before_wrote(model):
    first, second = tiny_models.sae(OTHER), tiny_models.sae(RESID, seed=5)
    tokens = tiny_models.tokens()
    with attach(model, [first, second]) as attached:
        got = model(tokens)
        assert list(attached.latents) == [s.write.name for s in attached._splices]
        assert len(attached.latents) == 2
    with model.hooks(fwd_hooks=[(OTHER, lambda a, hook: first(a)), (RESID, lambda a, hook: second(a))]):
        torch.testing.assert_close(got, model(tokens))


def test_open_and_close_across_cells(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean = model(tokens)
    attached = attach(model, sae)
    assert attachments(model) == [attached]
    assert not torch.allclose(model(tokens), clean)
    attached.detach()
    attached.detach()
    assert attachments(model) == []
    assert torch.equal(model(tokens), clean)
    with pytest.raises(ValueError, match="is over"), attached:
        pass


def test_detach_all_finds_lost_attachments(model):
    attach(model, tiny_models.sae(RESID))
    attach(model, [tiny_models.sae(RESID), tiny_models.sae(OTHER)])
    detach_all(model)
    assert attachments(model) == []


def test_detached_also_after_an_exception(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean = model(tokens)
    with pytest.raises(RuntimeError, match="in the cell"), attach(model, sae):
        raise RuntimeError("in the cell")

    def fail(activation, hook):
        raise RuntimeError("in a hook")

    with attach(model, sae):
        with pytest.raises(RuntimeError, match="in a hook"):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_pre", fail)])
        torch.testing.assert_close(model(tokens), by_hand_detached(model, sae, tokens))
    assert torch.equal(model(tokens), clean)


def by_hand_detached(model, sae, tokens):
    """`by_hand` on a model with an attachment: the splice already wrote, so run on an attachment-free twin."""
    twin = tiny_models.new_bridge() if type(model).__name__ == "TransformerBridge" else tiny_models.new_hooked()
    return by_hand(twin, sae, tokens)


@pytest.mark.parametrize("order", ["inner first", "outer first"])
def test_nested_attachment_overrides_until_it_ends(model, order):
    outer_sae, inner_sae, tokens = tiny_models.sae(RESID), tiny_models.sae(RESID, seed=9), tiny_models.tokens()
    clean = model(tokens)
    want_outer, want_inner = by_hand(model, outer_sae, tokens), by_hand(model, inner_sae, tokens)
    outer = attach(model, outer_sae)
    inner = attach(model, inner_sae)
    torch.testing.assert_close(model(tokens), want_inner)
    assert "overridden at" in repr(outer)
    assert "overrides an earlier one at" in repr(inner)
    with pytest.raises(ValueError, match="on top of it"):
        outer.latents[outer_sae]
    first, second, between = (inner, outer, want_outer) if order == "inner first" else (outer, inner, want_inner)
    first.detach()
    torch.testing.assert_close(model(tokens), between)
    second.detach()
    assert torch.equal(model(tokens), clean)


def test_inner_points_under_every_name_in_every_call(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    names = hook_points.resolve(model, RESID).names
    with attach(model, sae, error_term=True) as attached:
        _, cache = model.run_with_cache(tokens)
        cached_names = names if "blocks.1.hook_out" in names else [RESID]
        for name in cached_names:
            for key in ("input", "acts_pre", "acts_post", "recons", "error", "output"):
                full = f"{name}.hook_sae_{key}"
                assert full in model.hook_dict
                assert full in cache, full
                seen = []
                model.run_with_hooks(tokens, fwd_hooks=[(full, lambda a, hook, seen=seen: seen.append(a.clone()))])
                assert torch.equal(seen[0], cache[full])
                model.add_hook(full, lambda a, hook, seen=seen: seen.append(a.clone()))
                model(tokens)
                model.reset_hooks()
                assert torch.equal(seen[1], cache[full])
        x = cache[f"{RESID}.hook_sae_input"]
        torch.testing.assert_close(cache[f"{RESID}.hook_sae_acts_pre"], x @ sae.W_enc + sae.b_enc)
        torch.testing.assert_close(cache[f"{RESID}.hook_sae_acts_post"], sae.encode(x))
        torch.testing.assert_close(cache[f"{RESID}.hook_sae_recons"], sae(x))
        torch.testing.assert_close(cache[f"{RESID}.hook_sae_error"], x - sae(x))
        torch.testing.assert_close(cache[f"{RESID}.hook_sae_output"], x)
        assert torch.equal(cache[RESID], cache[f"{RESID}.hook_sae_output"])
        assert torch.equal(attached.latents[RESID], cache[f"{RESID}.hook_sae_acts_post"])
    assert not any("hook_sae" in name for name in model.hook_dict)


def test_names_filter_and_stop_at_layer(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    name = f"{RESID}.hook_sae_acts_post"
    with attach(model, sae) as attached:
        _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=2)
        assert {key.rpartition(".")[2] for key in cache} == {"hook_sae_acts_post"}  # under both names on a Bridge
        assert cache[name].shape == (2, 7, 40)
        model(tokens, stop_at_layer=1)  # ends before the point: no error, and no latents
        with pytest.raises(ValueError, match="did not run"):
            attached.latents[sae]


def test_activation_cache_methods_work_while_attached(model):
    tokens = tiny_models.tokens()
    with attach(model, tiny_models.sae(RESID)):
        _, cache = model.run_with_cache(tokens)
        parts, labels = cache.decompose_resid(return_labels=True)
        accumulated = cache.accumulated_resid(layer=2)
    assert len(labels) == parts.shape[0]
    assert accumulated.shape[-1] == tiny_models.D_MODEL


def test_edits_of_latents_have_their_effect_with_and_without_error_term(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    x = clean_activation(model, tokens, RESID)
    edited = sae.encode(x)
    edited[..., 3] += 2.0
    change = sae.decode(edited) - sae(x)

    def bump(acts, hook):
        acts[..., 3] += 2.0  # in place, as people do

    for error_term, base in ((False, sae(x)), (True, x)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), attach(model, sae, error_term=error_term) as attached:
                got = model.run_with_hooks(tokens, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", bump)])
                torch.testing.assert_close(attached.latents[sae], edited)
            want = model.run_with_hooks(tokens, fwd_hooks=[(RESID, lambda a, hook, base=base: base + change)])
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_an_edit_in_place_of_the_input_leaves_the_target_alone(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean = model(tokens)

    def zero(x, hook):
        x.zero_()

    with attach(model, sae, error_term=True):
        got = model.run_with_hooks(tokens, fwd_hooks=[(f"{RESID}.hook_sae_input", zero)])
    x = clean_activation(model, tokens, RESID)
    want = x - sae(x) + sae(torch.zeros_like(x))
    torch.testing.assert_close(
        got, model.run_with_hooks(tokens, fwd_hooks=[(RESID, lambda a, hook: want)]), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(got, clean)


def test_error_term_makes_the_model_whole(model):
    tokens = tiny_models.tokens()
    clean = model(tokens)
    saes = [tiny_models.sae(point, seed=i) for i, point in enumerate(POINTS)]
    with attach(model, saes, error_term=True):
        torch.testing.assert_close(model(tokens), clean, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert torch.equal(model(tokens), clean)  # nobody looks inside: the activations themselves


def test_gradients_go_through_the_latents_and_not_through_the_error(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    with attach(model, sae, error_term=True) as attached:
        loss = model(tokens)[..., 5].sum()
        got = torch.autograd.grad(loss, attached.latents[sae])[0]
    x = clean_activation(model, tokens, RESID).detach()
    latents = sae.encode(x).detach().requires_grad_()
    base = (x - sae(x)).detach()
    with model.hooks(fwd_hooks=[(RESID, lambda a, hook: sae.decode(latents) + base)]):
        want = torch.autograd.grad(model(tokens)[..., 5].sum(), latents)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert want.abs().max() > 0


def test_backward_hooks_on_inner_points(model):
    sae, tokens, seen = tiny_models.sae(RESID), tiny_models.tokens(), []
    with attach(model, sae) as attached:
        model.add_hook(f"{RESID}.hook_sae_acts_post", lambda grad, hook: seen.append(grad.clone()), dir="bwd")
        loss = model(tokens)[..., 5].sum()
        latents = attached.latents[sae]
        want = torch.autograd.grad(loss, latents, retain_graph=True)[0]
        seen.clear()
        loss.backward()
        model.reset_hooks()
    model.zero_grad()
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize("skip", [True, [1, 5]])
@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("point", [RESID, "blocks.2.attn.hook_z"])
def test_special_tokens_pass_by(model, skip, error_term, point):
    sae, tokens = tiny_models.sae(point), tiny_models.tokens()
    tokens[1, 3] = 5
    special = torch.isin(tokens, torch.tensor([1, 2, 3] if skip is True else skip))
    assert special.any()

    def edit(recon, target):
        return torch.where(special[..., None], target, target if error_term else recon)

    want = by_hand(model, sae, tokens, edit)
    with attach(model, sae, skip_special_tokens=skip, error_term=error_term):
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    if error_term:
        assert cache[f"{point}.hook_sae_error"].flatten(2)[special].abs().max() == 0


def test_a_pass_that_starts_at_a_later_layer(model):
    """A Bridge computes the earlier blocks too, on what is not their input: no SAE may take that for activations."""
    if isinstance(_start(model, torch.zeros(1, 3, tiny_models.D_MODEL), 1), NotImplementedError):
        pytest.skip("the Bridge of transformer-lens 3 has no start_at_layer")
    tokens, first, last = tiny_models.tokens(), tiny_models.sae(OTHER), tiny_models.sae("blocks.2.hook_resid_post")
    with torch.no_grad(), attach(model, [first, last]) as attached:
        whole = model(tokens)
        latents = attached.latents[last]
        halfway = model(tokens, stop_at_layer=1)
    with torch.no_grad(), attach(model, [first, last]) as attached:
        torch.testing.assert_close(_start(model, halfway, 1), whole)
        torch.testing.assert_close(attached.latents[last], latents)
        with pytest.raises(ValueError, match="did not run"):
            attached.latents[first]


def _start(model, residual, layer):
    try:
        return model(residual, start_at_layer=layer)
    except NotImplementedError as error:
        return error


def test_special_tokens_need_token_ids(model):
    embeddings = torch.zeros(1, 4, tiny_models.D_MODEL)
    with attach(model, tiny_models.sae(RESID), skip_special_tokens=True):
        model(tiny_models.tokens(1, 4))
        with pytest.raises(ValueError, match="skip_special_tokens"):
            model(embeddings, start_at_layer=0) if not hasattr(model, "original_model") else model(embeddings)


def test_transcoder_reads_at_one_point_and_writes_at_another(model):
    read, write = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    coder = tiny_models.sae(read, hook_out=write, skip=True)
    tokens = tiny_models.tokens()
    seen = {}
    with hook_points.editing(
        model, {read: lambda a: seen.update(x=a.clone()), write: lambda a: seen.update(y=a.clone())}
    ):
        clean = model(tokens)
    want = model.run_with_hooks(tokens, fwd_hooks=[(write, lambda a, hook: coder(seen["x"]))])
    with attach(model, coder) as attached:
        torch.testing.assert_close(model(tokens), want)
        torch.testing.assert_close(attached.latents[coder], coder.encode(seen["x"]))
    with attach(model, coder, error_term=True):
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, clean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache[f"{write}.hook_sae_error"], seen["y"] - coder(seen["x"]))


def test_an_activation_changed_in_place_after_it_was_read(model):
    read = "blocks.1.hook_resid_pre"
    coder, tokens = tiny_models.sae(read, hook_out="blocks.1.hook_mlp_out"), tiny_models.tokens()
    x = model.run_with_cache(tokens)[1][read].clone()

    def double(activation, hook):
        activation.mul_(2)  # what stands at the read point is this very tensor

    with torch.no_grad(), attach(model, coder) as attached:
        model.run_with_hooks(tokens, fwd_hooks=[(read, double)])
        torch.testing.assert_close(attached.latents[coder], coder.encode(x))


def test_transcoder_of_other_width(model):
    coder = tiny_models.sae(
        "blocks.1.mlp.hook_post", d_in=tiny_models.D_MLP, d_out=tiny_models.D_MODEL, hook_out="blocks.1.hook_mlp_out"
    )
    with attach(model, coder):
        assert model(tiny_models.tokens()).shape == (2, 7, tiny_models.VOCAB)


def test_one_head_of_hook_z(model):
    point, tokens = "blocks.1.attn.hook_z", tiny_models.tokens()
    sae = tiny_models.sae(point, d_in=tiny_models.D_MODEL // tiny_models.HEADS, head=2)

    def write(z, hook):
        z = z.clone()
        z[:, :, 2] = sae(z[:, :, 2])
        return z

    want = model.run_with_hooks(tokens, fwd_hooks=[(point, write)])
    with attach(model, sae) as attached:
        torch.testing.assert_close(model(tokens), want)
        assert attached.latents[sae].shape == (2, 7, 40)


def test_generate_with_a_cache_of_keys_and_values(model):
    sae, prompt = tiny_models.sae(RESID, "topk", k=6), tiny_models.tokens(1, 4)
    with torch.no_grad(), attach(model, sae, skip_special_tokens=True) as attached:
        out = model.generate(prompt, max_new_tokens=5, do_sample=False, verbose=False, stop_at_eos=False)
        assert attached.latents[sae].shape[:2] == (1, 1)  # the last step of a generation sees one token
        step = prompt
        for _ in range(5):
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, step)


def test_a_temporal_sae_generates_without_a_cache_only(model):
    """From a cached step alone it would compute its latents as if the sentence began there."""
    sae = TemporalSAE(TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID))
    prompt, how = (
        tiny_models.tokens(1, 4),
        {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False},
    )
    with torch.no_grad(), attach(model, sae):
        with pytest.raises(ValueError, match="use_past_kv_cache=False"):
            model.generate(prompt, **how)
        out = model.generate(prompt, use_past_kv_cache=False, **how)
        step = prompt
        for _ in range(4):
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, step)


def test_bf16_model_gets_bf16_back():
    model = tiny_models.new_bridge(torch.bfloat16)
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    with torch.no_grad(), attach(model, sae) as attached:
        logits, cache = model.run_with_cache(tokens)
        assert logits.dtype == cache[f"{RESID}.hook_sae_output"].dtype == torch.bfloat16
        assert attached.latents[sae].dtype == torch.float32


def test_under_inference_mode(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    with torch.inference_mode(), attach(model, sae, error_term=True):
        clean = model(tokens)
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, clean, atol=1e-4, rtol=1e-4)
        assert cache[f"{RESID}.hook_sae_error"].abs().max() > 0


def test_reset_hooks_does_not_detach(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    want = by_hand(model, sae, tokens)
    with attach(model, sae):
        model.reset_hooks()
        torch.testing.assert_close(model(tokens), want)
        model.reset_hooks(including_permanent=True)
        torch.testing.assert_close(model(tokens), want)


def test_one_sae_at_two_points(model):
    sae = tiny_models.sae(RESID)
    with attach(model, [sae, sae], hook=[RESID, OTHER]) as attached:
        model(tiny_models.tokens())
        with pytest.raises(ValueError, match="more than once"):
            attached.latents[sae]
        assert not torch.equal(attached.latents[RESID], attached.latents[OTHER])
        with pytest.raises(ValueError, match="is not attached here"):
            attached.latents["blocks.0.hook_mlp_out"]


def test_whoever_comes_from_another_thread_waits(model):
    order = []

    def other():
        with attach(model, tiny_models.sae(OTHER)):
            order.append("other")

    with attach(model, tiny_models.sae(RESID)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("this")
    thread.join(5)
    assert order == ["this", "other"]


def test_model_and_sae_can_be_collected():
    import gc
    import weakref

    model, sae = tiny_models.new_bridge(), tiny_models.sae(RESID)
    attach(model, sae)
    model(tiny_models.tokens())
    gone = weakref.ref(model), weakref.ref(sae)
    del model, sae
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_bridge_in_compatibility_mode():
    model = tiny_models.new_bridge()
    model.enable_compatibility_mode(no_processing=True)
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean, want = model(tokens), by_hand(model, sae, tokens)
    points = dict(model.hook_dict)
    with attach(model, sae) as attached:
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, want)
        assert torch.equal(cache[f"{RESID}.hook_sae_acts_post"], attached.latents[sae])
    assert torch.equal(model(tokens), clean)
    assert {name: id(p) for name, p in points.items()} == {name: id(p) for name, p in model.hook_dict.items()}


def test_compatibility_mode_switched_on_while_attached():
    """The Bridge scans its points anew."""
    model, sae, tokens = tiny_models.new_bridge(), tiny_models.sae(RESID), tiny_models.tokens()
    want = by_hand(model, sae, tokens)
    attached = attach(model, sae)
    model.enable_compatibility_mode(no_processing=True)
    torch.testing.assert_close(model(tokens), want)
    attached.detach()
    assert not any("hook_sae" in name for name in model.hook_dict)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_name_names_the_near_ones(model):
    with pytest.raises(
        ValueError, match=r"no hook named 'blocks.1.hook_resid_pots'[\s\S]*near: blocks.1.hook_resid_post"
    ):
        attach(model, tiny_models.sae("blocks.1.hook_resid_pots"))


def test_a_point_that_is_switched_off(model):
    with pytest.raises(ValueError, match=r"never fires[\s\S]*mlp.hook_in[\s\S]*set_use_hook_mlp_in\(True\)"):
        attach(model, tiny_models.sae("blocks.1.hook_mlp_in"))


def test_a_width_that_does_not_fit(model):
    with (
        attach(model, tiny_models.sae(RESID, d_in=12)),
        pytest.raises(ValueError, match=r"\(2, 7, 16\)[\s\S]*want: \[batch, pos, 12\]"),
    ):
        model(tiny_models.tokens())


def test_nothing_is_left_when_one_of_several_is_wrong(model):
    for wrong in (tiny_models.sae("nowhere"), tiny_models.sae(RESID), "no sae"):
        with pytest.raises((ValueError, TypeError)):
            attach(model, [tiny_models.sae(RESID), wrong])
    assert attachments(model) == []


def test_no_hook_known(model):
    with pytest.raises(ValueError, match="does not say where it belongs"):
        attach(model, tiny_models.sae(None))
    with pytest.raises(ValueError, match="does not say where it writes"):
        attach(model, tiny_models.sae(RESID, d_out=12))
    with pytest.raises(ValueError, match="2 names, in a list"):
        attach(model, [tiny_models.sae(RESID), tiny_models.sae(OTHER)], hook=RESID)
    with pytest.raises(ValueError, match="no SAE"):
        attach(model, [])


def test_a_model_without_hook_points():
    with pytest.raises(TypeError, match=r"saewb.load_model\(model"):
        attach(tiny_models.hf_llama(), tiny_models.sae(RESID))
    with pytest.raises(TypeError, match="Linear as an SAE"):
        attach(tiny_models.bridge(), nn.Linear(2, 2))


def test_a_point_the_model_never_reaches(model):
    """A HookPoint that exists and no forward pass goes through."""
    dead = hook_points.inner_points(model, hook_points.resolve(model, RESID), ["x"]).by_key["x"]
    dead.name = "blocks.1.hook_dead"
    (model._hook_registry if hasattr(model, "_hook_registry") else model.hook_dict)["blocks.1.hook_dead"] = dead
    try:
        with (
            attach(model, tiny_models.sae("blocks.1.hook_dead")),
            pytest.raises(ValueError, match="did not fire in a whole forward pass"),
        ):
            model(tiny_models.tokens())
    finally:
        del (model._hook_registry if hasattr(model, "_hook_registry") else model.hook_dict)["blocks.1.hook_dead"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.mps.is_available() and not torch.cuda.is_available(), reason="needs two devices")
def test_sae_on_another_device(model):
    device = "cuda" if torch.cuda.is_available() else "mps"
    with attach(model, tiny_models.sae(RESID).to(device)), pytest.raises(ValueError, match="sae.to"):
        model(tiny_models.tokens())


def test_sae_on_the_meta_device(model):
    with (
        attach(model, tiny_models.sae(RESID).to("meta")),
        pytest.raises(ValueError, match=r"is on meta[\s\S]*sae.to\('cpu'\)"),
    ):
        model(tiny_models.tokens())
