"""Other families than Llama, of random weights, as TransformerBridges: their points are elsewhere."""

import functools

import pytest
import torch
from helpers import tiny_models

from saewb.interventions.attachment import attach
from saewb.models.load import load_model

COMMON = {"vocab_size": tiny_models.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 4}
FAMILIES = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 3, "n_head": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", WIDE),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED),
}
PLACES = ["hook_resid_post", "hook_resid_pre", "hook_mlp_out", "hook_attn_out", "attn.hook_z", "mlp.hook_in"]


@functools.cache
def bridge(family):
    import transformers

    config, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = getattr(transformers, family)(getattr(transformers, config)(**COMMON, **options)).eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
    model = load_model(hf, tokenizer=tiny_models.tokenizer())
    model.run_with_cache(tiny_models.tokens())
    return model


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_place_of_every_family(family, place):
    model, name, tokens = bridge(family), f"blocks.1.{place}", tiny_models.tokens()
    sae, before = tiny_models.sae(name), tiny_models.snapshot(model)

    def write(activation, hook):
        flat = activation.flatten(2) if activation.ndim == 4 else activation
        return sae(flat).reshape(activation.shape)

    with torch.no_grad():
        clean = model(tokens)
        want = model.run_with_hooks(tokens, fwd_hooks=[(name, write)])
        with attach(model, sae) as attached:
            torch.testing.assert_close(model(tokens), want)
            assert attached.latents[sae].shape == (2, 7, 40)
        with attach(model, sae, error_term=True, skip_special_tokens=True):
            torch.testing.assert_close(model.run_with_cache(tokens)[0], clean, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(tokens), clean)
    assert (want - clean).abs().max() > 1e-4
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transcoder_and_generation(family):
    model, coder = bridge(family), tiny_models.sae("blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out")
    with torch.no_grad(), attach(model, [coder, tiny_models.sae("blocks.0.hook_resid_post", "topk", k=4)]):
        out = model.generate(
            tiny_models.tokens(1, 4), max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False
        )
    assert out.shape == (1, 7)
