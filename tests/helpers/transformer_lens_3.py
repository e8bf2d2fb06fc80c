"""Models for tests: the embedded one as a TransformerBridge, and as a HookedTransformer where there still is one."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from saewb.models.load import load_model, tiny_path
from saewb.models.tokenizer import prepend_bos

GONE = "HookedTransformer is gone in transformer-lens 4"


def has_hooked_transformer() -> bool:
    """Whether the installed transformer-lens is a 3.x."""
    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


def hooked_transformer(hf_model: Any, tokenizer: Any) -> Any:
    """A HookedTransformer with the weights of an in-memory Llama that was not booted; nothing folded or centered."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    theirs = hf_model.config
    cfg = HookedTransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_ctx=min(2048, theirs.max_position_embeddings),
        d_head=theirs.head_dim,
        n_heads=theirs.num_attention_heads,
        n_key_value_heads=theirs.num_key_value_heads,
        d_mlp=theirs.intermediate_size,
        d_vocab=theirs.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=theirs.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=theirs.head_dim,
        rotary_adjacent_pairs=False,
        rotary_base=int(theirs.rope_parameters["rope_theta"]),
        original_architecture="LlamaForCausalLM",
        model_name="in-memory llama",
        device="cpu",
        dtype=hf_model.dtype,
    )
    tokenizer = copy.deepcopy(tokenizer)
    prepend_bos(tokenizer, cfg.model_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it goes in 4.0 is why this file exists
        model = HookedTransformer(cfg, tokenizer=tokenizer)
    weights = convert_llama_weights(hf_model, cfg)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


@cache
def tiny_bridge(folder: Path | None = None) -> Any:
    """The embedded model (or one in `folder`) as `load_model` gives it. One for all tests: leave it as you found it."""
    return load_model("tiny" if folder is None else folder, device="cpu", dtype=torch.float32)


@cache
def tiny_hooked(folder: Path | None = None) -> Any:
    """The same as a HookedTransformer; skips the test on transformer-lens 4. Leave it as you found it."""
    if not has_hooked_transformer():
        pytest.skip(GONE)
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tiny_path() if folder is None else folder
    hf_model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return hooked_transformer(hf_model, AutoTokenizer.from_pretrained(folder))
