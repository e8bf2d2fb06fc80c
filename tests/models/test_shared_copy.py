"""A twin of a model: the same weights, no hooks, and nothing of what is attached to the model, whenever it was made."""

import pytest
import torch
from helpers import tiny_models

import saewb

MLP = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


def on_points(model):
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


def test_it_is_clean_and_leaves_what_is_attached_to_the_model_alone(model):
    ids, other = tiny_models.tokens(), tiny_models.tokens(seed=5)
    sae, coder = tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.sae(MLP[0], hook_out=MLP[1])
    with torch.no_grad():
        clean = model(other)
    with torch.no_grad(), saewb.attach(model, [sae, coder]) as attached, saewb.steer(model, coder, {3: 5.0}):
        changed, saved = model(ids), attached.latents[sae].clone()
        twin = saewb.models.shared_copy.shared_copy(model)
        assert saewb.models.hook_points.has_no_hooks(twin)
        assert not saewb.models.hook_points.has_no_hooks(model)
        torch.testing.assert_close(twin(other), clean)
        assert torch.equal(attached.latents[sae], saved)
        assert torch.equal(model(ids), changed)
    assert saewb.models.hook_points.has_no_hooks(model)
    assert next(twin.parameters()).data_ptr() == next(model.parameters()).data_ptr()


def test_it_can_be_changed_alone(model):
    ids, sae = tiny_models.tokens(), tiny_models.sae("blocks.1.hook_resid_post")
    twin = saewb.models.shared_copy.shared_copy(model)
    with torch.no_grad(), saewb.steer(twin, sae, {3: 50.0}):
        assert not torch.allclose(twin(ids), model(ids))
        assert saewb.models.hook_points.has_no_hooks(model)


@pytest.mark.parametrize("permanent", [False, True])
def test_a_users_own_hook_is_not_on_it_and_stays_on_the_model(model, permanent):
    seen = []
    model.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda x, hook: seen.append(1), is_permanent=permanent)
    try:
        twin = saewb.models.shared_copy.shared_copy(model)
        with torch.no_grad():
            twin(tiny_models.tokens())
            assert seen == []
            model(tiny_models.tokens())
        assert seen == [1]
        assert on_points(twin) == 0
    finally:
        model.reset_hooks(including_permanent=True)
