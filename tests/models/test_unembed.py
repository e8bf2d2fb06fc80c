"""Logit effects against the logits themselves, on random models of architectures that treat them differently."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.features.logit_effects import project_to_residual
from saewb.models.capture import capturing
from saewb.models.unembed import final_norm_scale, unembedding, unembedding_column

SIZES = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GLU = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24}


def boot(name, dtype=torch.float32, **fields):
    import transformers

    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return saewb.load_model(hf.to(dtype), tokenizer=tiny_models.tokenizer())


MODELS = {
    "Granite": lambda: boot("Granite", **GLU, logits_scaling=8.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "Cohere": lambda: boot("Cohere", **GLU, logit_scale=0.0625),
    "Gemma2": lambda: boot("Gemma2", **GLU, head_dim=4, final_logit_softcapping=None),
    "OPT": lambda: boot("OPT", **{**SIZES, "ffn_dim": 24}, word_embed_proj_dim=8, do_layer_norm_before=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_times_the_unembedding_is_the_logits_less_their_mean(name):
    model, ids = MODELS[name](), tiny_models.tokens(1, 5)
    with torch.no_grad(), capturing(model, ["blocks.1.hook_resid_post"]) as cache:
        logits = model(ids)
    final, w = cache["blocks.1.hook_resid_post"][0], unembedding(model)
    got = final @ w / final_norm_scale(model, final)[:, None]
    b_u = getattr(model, "b_U", torch.zeros(1))
    norm_bias = getattr(getattr(model, "ln_final", None), "bias", None)
    expected = logits[0] - logits[0].mean(-1, keepdim=True)
    if norm_bias is None and not b_u.any():
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(unembedding_column(model, 7), w[:, 7], rtol=1e-4, atol=1e-5)


def test_a_soft_cap_leaves_the_scale_of_small_logits():
    capped = boot("Gemma2", **GLU, head_dim=4, final_logit_softcapping=30.0)
    torch.testing.assert_close(unembedding(capped), unembedding(MODELS["Gemma2"]()), rtol=1e-3, atol=1e-4)


def test_float16_has_finite_logit_effects():
    half, full = boot("Llama", torch.float16, **GLU), boot("Llama", **GLU)
    torch.testing.assert_close(unembedding(half), unembedding(full), rtol=2e-2, atol=1e-2)


def test_what_a_point_adds_to_the_stream():
    """resid_post - resid_pre is what attention and MLP write there, in each model's own way."""
    model, ids = MODELS["Granite"](), tiny_models.tokens(1, 5)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    change = (cache["blocks.1.hook_resid_post"] - cache["blocks.1.hook_resid_pre"])[0]
    z, post = cache["blocks.1.attn.hook_z"][0].flatten(1), cache["blocks.1.mlp.hook_post"][0]
    for written in (
        (("hook_attn_out", cache["blocks.1.hook_attn_out"][0]), ("hook_mlp_out", cache["blocks.1.hook_mlp_out"][0])),
        (("attn.hook_z", z), ("mlp.hook_post", post)),
    ):
        parts = [project_to_residual(model, x, f"blocks.1.{name}") for name, x in written]
        torch.testing.assert_close(sum(parts), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("Granite", "blocks.1.mlp.hook_in"),
        ("Granite", "blocks.1.ln2.hook_normalized"),
        ("Granite", "ln_final.hook_normalized"),
        ("Granite", "blocks.1.attn.hook_out"),  # before it is scaled
        ("Gemma2", "blocks.1.attn.hook_out"),  # before a norm
        ("OPT", "blocks.0.hook_resid_post"),  # norms of later blocks rescale it
    ],
)
def test_points_whose_way_to_the_logits_is_not_linear_have_no_direct_effect(name, point):
    assert project_to_residual(MODELS[name](), torch.eye(16), point) is None


def test_an_mlp_of_experts_has_no_one_output_matrix():
    model = boot("Mixtral", **GLU, num_local_experts=2)
    assert project_to_residual(model, torch.eye(24), "blocks.0.mlp.hook_post") is None
