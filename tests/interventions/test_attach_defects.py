"""Each defect of attaching that was seen in the peer (named after it), shown absent here."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.interventions.attachment import attach
from saewb.models import hook_points

RESID = "blocks.1.hook_resid_post"


def test_transcoder_whose_read_point_never_fires_does_not_fall_back_to_its_write_point(model):
    """The peer feeds it the output of the very MLP it is to replace, without a word."""
    coder = tiny_models.sae("blocks.2.mlp.hook_in", hook_out="blocks.1.hook_mlp_out")
    with attach(model, coder), pytest.raises(ValueError, match="did not fire before"):
        model(tiny_models.tokens())


def test_gemma_scope_2_transcoder_at_the_gated_mlp_in_is_refused_with_the_point_that_works(model):
    with pytest.raises(ValueError, match=r"e\.g\. 'blocks\.1\.mlp\.hook_in'"):
        attach(model, tiny_models.sae("blocks.1.hook_mlp_in", hook_out="blocks.1.hook_mlp_out"))
    with attach(model, tiny_models.sae("blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out")):
        model(tiny_models.tokens())


def test_missing_hook_is_an_error_and_not_a_clean_run(model):
    with pytest.raises(ValueError, match="no hook named"):
        attach(model, tiny_models.sae("blocks.7.hook_resid_post"))


def test_restore_order_when_a_point_repeats(model):
    """The peer restores forwards and leaves the first of two on the model."""
    tokens = tiny_models.tokens()
    clean = model(tokens)
    with attach(model, tiny_models.sae(RESID, seed=1)):
        with attach(model, tiny_models.sae(RESID, seed=2)), attach(model, tiny_models.sae(RESID, seed=3)):
            model(tokens)
    assert torch.equal(model(tokens), clean)


def test_same_sae_nested_with_another_error_term_keeps_the_outer_one(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean = model(tokens)
    with attach(model, sae, error_term=True):
        with attach(model, sae, error_term=False):
            assert not torch.allclose(model(tokens), clean)
        torch.testing.assert_close(model(tokens), clean, atol=1e-4, rtol=1e-4)


def test_alias_and_canonical_name_are_one_point():
    model = tiny_models.bridge()
    with pytest.raises(ValueError, match="both write to 'blocks.1.hook_out'"):
        attach(model, [tiny_models.sae(RESID), tiny_models.sae("blocks.1.hook_out")])
    outer = attach(model, tiny_models.sae(RESID))
    with attach(model, tiny_models.sae("blocks.1.hook_out", seed=4)):
        assert "overridden" in repr(outer)
    outer.detach()


def test_cache_keys_by_alias_as_well_as_by_canonical_name():
    model = tiny_models.bridge()
    with attach(model, tiny_models.sae(RESID)):
        cache = model.run_with_cache(tiny_models.tokens())[1]
    assert torch.equal(cache[f"{RESID}.hook_sae_acts_post"], cache["blocks.1.hook_out.hook_sae_acts_post"])


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("permanent", [True, False])
def test_hooks_of_the_user_at_the_attached_point_survive(model, when, permanent):
    """The peer puts a new HookPoint there, and the user's hooks are gone for good."""
    seen = []
    point = hook_points.resolve(model, RESID).module
    if when == "before":
        point.add_hook(lambda a, hook: seen.append(a), is_permanent=permanent)
    with attach(model, tiny_models.sae(RESID)):
        if when == "while":
            point.add_hook(lambda a, hook: seen.append(a), is_permanent=permanent)
        model(tiny_models.tokens())
        assert len(seen) == 1
    model(tiny_models.tokens())
    assert len(seen) == 2
    point.remove_hooks(including_permanent=True)


def test_permanent_hooks_at_a_transcoders_read_point_survive(model):
    """The peer removes every hook there, permanent ones included, when it detaches."""
    seen = []
    read = "blocks.1.hook_resid_pre"
    model.add_hook(read, lambda a, hook: seen.append(a), is_permanent=True)
    with attach(model, tiny_models.sae(read, hook_out="blocks.1.hook_mlp_out")):
        model(tiny_models.tokens())
    model(tiny_models.tokens())
    assert len(seen) == 2
    model.reset_hooks(including_permanent=True)


def test_norm_internal_points(model):
    """The peer crashes there on a Bridge: its splice is no HookPoint."""
    tokens = tiny_models.tokens()
    for name in ("blocks.1.ln2.hook_normalized", "blocks.0.ln1.hook_normalized", "hook_embed"):
        sae = tiny_models.sae(name)
        want = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda a, hook, sae=sae: sae(a))])
        with attach(model, sae):
            torch.testing.assert_close(model(tokens), want)


def test_class_methods_parameters_and_modules_of_the_model_are_untouched(model):
    """The peer swaps the class of a Bridge, patches `mlp.forward`, and makes the SAE a submodule."""
    before = (
        type(model),
        [(name, id(module), type(module)) for name, module in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        list(model.state_dict()),
        [sorted(vars(module)) for module in model.modules() if not hasattr(module, "fwd_hooks")],
    )
    with attach(model, tiny_models.sae("blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out")):
        after = (
            type(model),
            [(name, id(module), type(module)) for name, module in model.named_modules()],
            [name for name, _ in model.named_parameters()],
            list(model.state_dict()),
            [sorted(vars(module)) for module in model.modules() if not hasattr(module, "fwd_hooks")],
        )
    assert before == after


def test_interleaved_use_of_a_scaling_sae(model):
    """The peer keeps the norm of the last input on the SAE, so a second call spoils the first's scale."""
    sae = tiny_models.sae(RESID, normalization="layer_norm", pre_bias="tied")
    x, y = torch.randn(3, 16) * 5 + 2, torch.randn(4, 16)
    latents, want = sae.encode(x), sae(x)
    sae.encode(y)
    torch.testing.assert_close(sae.decode(latents, x), want)
    torch.testing.assert_close(sae.decode(latents, x), want)
    with attach(model, [sae, sae], hook=[RESID, "blocks.0.hook_resid_post"]):
        model(tiny_models.tokens())


def test_hook_z_keeps_its_four_axes_after_detach(model):
    """The peer leaves (batch, pos, heads * d_head) behind on a Bridge."""
    name, tokens = "blocks.1.attn.hook_z", tiny_models.tokens()
    shape = model.run_with_cache(tokens)[1][name].shape
    assert len(shape) == 4
    with attach(model, tiny_models.sae(name)):
        assert model.run_with_cache(tokens)[1][name].shape == shape
    assert model.run_with_cache(tokens)[1][name].shape == shape


def test_hook_z_is_a_matter_of_the_attachment_and_not_a_mode_of_the_sae(model):
    sae = tiny_models.sae("blocks.1.attn.hook_z")
    before = copy.deepcopy(vars(sae)["cfg"])
    with attach(model, sae):
        model(tiny_models.tokens())
        assert sae(torch.randn(5, tiny_models.D_MODEL)).shape == (5, tiny_models.D_MODEL)
    assert sae.cfg == before


def test_no_hook_is_left_on_the_sae(model):
    """In the peer a hook on an inner point sits on the SAE, and stays there."""
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    want = sae(torch.ones(2, tiny_models.D_MODEL))
    with attach(model, sae):
        model.add_hook(f"{RESID}.hook_sae_acts_post", lambda a, hook: a * 0)
        model(tokens)
    assert torch.equal(sae(torch.ones(2, tiny_models.D_MODEL)), want)
    with attach(model, sae) as attached:
        model(tokens)
        assert attached.latents[sae].abs().max() > 0


def test_ablation_has_an_effect_with_the_error_term(model):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    clean = model(tokens)
    with attach(model, sae, error_term=True):
        got = model.run_with_hooks(tokens, fwd_hooks=[(f"{RESID}.hook_sae_acts_post", lambda a, hook: a * 0)])
    assert (got - clean).abs().max() > 1e-2


def test_skip_matrix_is_used_when_attached(model):
    """The peer's attachment decodes without it."""
    read, write, tokens = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", tiny_models.tokens()
    with_skip = tiny_models.sae(read, hook_out=write, skip=True)
    with attach(model, with_skip):
        got = model(tokens)
    with torch.no_grad():
        with_skip.W_skip.zero_()
    with attach(model, with_skip):
        assert not torch.allclose(model(tokens), got)


def test_special_tokens_are_passed_by_on_a_bridge():
    """The peer can do so on a HookedTransformer only."""
    model, sae, tokens = tiny_models.bridge(), tiny_models.sae(RESID), tiny_models.tokens()
    clean = model.run_with_cache(tokens)[1][RESID]
    with attach(model, sae, skip_special_tokens=True):
        got = model.run_with_cache(tokens)[1][RESID]
    assert torch.equal(got[:, 0], clean[:, 0])
    assert not torch.equal(got[:, 1:], clean[:, 1:])


def test_dtype_of_the_model_is_kept(model):
    """The peer gives a bf16 model float32 activations back."""
    sae = tiny_models.sae(RESID).to(torch.float64)
    with attach(model, sae):
        assert model.run_with_cache(tiny_models.tokens())[1][RESID].dtype == torch.float32


def test_attached_twice_under_different_options_at_once(model):
    """The peer keeps the error term as an attribute of the SAE."""
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    one = attach(model, sae, error_term=True)
    two = attach(model, sae, hook="blocks.0.hook_resid_post")
    _, cache = model.run_with_cache(tokens)
    assert f"{RESID}.hook_sae_error" in cache
    assert "blocks.0.hook_resid_post.hook_sae_error" not in cache
    one.detach()
    two.detach()


@pytest.mark.parametrize("verb", ["attach", "steer", "attribute"])
def test_hook_resid_mid_of_a_bridge_is_not_the_residual_stream(model, verb):
    """Written there, only the MLP would see it: the SAE would seem to recover nearly everything."""
    sae, tokens = tiny_models.sae("blocks.1.hook_resid_mid"), tiny_models.tokens(1)
    work = {
        "attach": lambda: attach(model, sae).detach(),
        "steer": lambda: saewb.steer(model, sae, {1: 2.0}).detach(),
        "attribute": lambda: saewb.attribute(model, tokens, sae, 5),
    }[verb]
    if hasattr(model, "original_model"):
        with pytest.raises(ValueError, match=r"nothing reaches the stream[\s\S]*hook_resid_post"):
            work()
    else:
        work()


@pytest.mark.parametrize("how", [{}, {"error_term": True}, {"skip_special_tokens": [1]}])
def test_what_is_detached_is_freed_at_once_and_not_when_cycles_are_looked_for(model, how):
    sae = tiny_models.sae(RESID)
    gc.disable()
    try:
        with attach(model, sae, **how) as attached:
            model(tiny_models.tokens())
        there = [weakref.ref(sae), weakref.ref(attached), weakref.ref(attached._splices[0])]
        del sae, attached
        assert [ref() for ref in there] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("past", ["transformer-lens", "torch", "torch, before it"])
def test_what_was_hooked_inside_one_attachment_is_not_in_the_next(model, past):
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    with attach(model, sae):
        want = model(tokens)
        inside = model.hook_dict[f"{RESID}.hook_sae_acts_post"]
        if past == "transformer-lens":
            inside.add_hook(lambda latents, hook: latents * 0, is_permanent=True)
        elif past == "torch":
            inside.register_forward_hook(lambda module, given, latents: latents * 0)
        else:
            inside.register_forward_pre_hook(lambda module, given: (given[0] * 0,))
        assert not torch.equal(model(tokens), want)
    with attach(model, sae):
        assert torch.equal(model(tokens), want)


def test_a_point_that_got_another_name_is_known_by_it_in_the_next_attachment(model):
    sae, point = tiny_models.sae(RESID), hook_points.resolve(model, RESID)
    attach(model, sae).detach()
    mapping = model._hook_registry if hasattr(model, "_hook_registry") else model.hook_dict
    mapping["blocks.1.hook_new_name"] = point.module
    try:
        with pytest.raises(ValueError, match="no hook named"):  # for which the names are looked up again
            attach(model, tiny_models.sae("nowhere"))
        with attach(model, sae):
            assert "blocks.1.hook_new_name.hook_sae_input" in model.hook_dict
        assert "blocks.1.hook_new_name.hook_sae_input" not in model.hook_dict
    finally:
        del mapping["blocks.1.hook_new_name"]
