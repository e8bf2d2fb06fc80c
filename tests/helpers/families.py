"""Models of random weights of four families, as Bridges and (transformer-lens 3.x) as HookedTransformers."""

import functools

import torch

from helpers import tiny_models
from helpers.transformer_lens_3 import has_hooked_transformer
from saewb.models.load import load_model

COMMON = {"vocab_size": tiny_models.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
GROUPED = {
    **COMMON,
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24},
    **{"num_key_value_heads": 2, "head_dim": 4},
}
BRIDGES = {
    "gpt2": ("GPT2", {**COMMON, "n_embd": 16, "n_layer": 3, "n_head": 4}),
    "llama": ("Llama", GROUPED),
    "gemma2": ("Gemma2", {**GROUPED, "query_pre_attn_scalar": 4, "final_logit_softcapping": 5.0}),
    "qwen3": ("Qwen3", GROUPED),
    "neox": ("GPTNeoX", {**{k: v for k, v in GROUPED.items() if k not in ("num_key_value_heads", "head_dim")}}),
}
ROTARY = {
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "gated_mlp": True,
    "act_fn": "silu",
    "final_rms": True,
}
HOOKED = {
    "gpt2": {"normalization_type": "LN", "act_fn": "gelu"},
    "llama": {"normalization_type": "RMS", **ROTARY, "n_key_value_heads": 2},
    "gemma2": {
        **{"normalization_type": "RMS", **ROTARY, "act_fn": "gelu_pytorch_tanh", "n_key_value_heads": 2},
        **{"use_normalization_before_and_after": True, "output_logits_soft_cap": 5.0, "attn_scores_soft_cap": 20.0},
    },
    "qwen3": {"normalization_type": "RMS", **ROTARY, "n_key_value_heads": 2, "use_qk_norm": True},
}
FAMILIES = [f"bridge-{name}" for name in BRIDGES] + [f"hooked-{name}" for name in HOOKED] * has_hooked_transformer()


def _far_from_zero(module):
    """Weights so large that every part of the model matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return module


@functools.cache
def family(name):
    """One for all tests: leave it as you found it."""
    kind, _, shape = name.partition("-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "hooked":
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            sizes = {"n_layers": 3, "d_model": 16, "n_ctx": 64, "d_head": 4, "n_heads": 4, "d_mlp": 24}
            cfg = HookedTransformerConfig(
                **sizes, d_vocab=tiny_models.VOCAB, model_name=name, device="cpu", **HOOKED[shape]
            )
            return _far_from_zero(HookedTransformer(cfg)).eval()
        import transformers

        config, options = BRIDGES[shape]
        cls = transformers.GPT2LMHeadModel if config == "GPT2" else getattr(transformers, f"{config}ForCausalLM")
        hf = _far_from_zero(cls(getattr(transformers, f"{config}Config")(**options)).eval())
        model = load_model(hf, tokenizer=tiny_models.tokenizer(), device="cpu")
        model.run_with_cache(tiny_models.tokens())  # the first one leaves traces of its own
        return model
