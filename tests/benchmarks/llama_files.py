"""A Llama in files, for a peer's environment: weights and shapes, written here and read there.

`llama` needs torch, transformers and a transformer-lens of the peer's, and nothing of saewb.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

SHAPES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"


def write_llama(folder: Path, theirs: Any) -> None:
    """Write a transformers Llama: model.json and model.safetensors."""
    report = theirs.config.to_dict()
    saved = {key: report[key] for key in (*SHAPES.split(), "max_position_embeddings", "rms_norm_eps")}
    saved["tie_word_embeddings"], saved["rope_theta"] = (
        report["tie_word_embeddings"],
        report["rope_parameters"]["rope_theta"],
    )
    saved["head_dim"] = report.get("head_dim") or report["hidden_size"] // report["num_attention_heads"]
    (folder / "model.json").write_text(json.dumps(saved))
    weights = {key: value.contiguous() for key, value in theirs.state_dict().items() if key != "lm_head.weight"}
    if not saved["tie_word_embeddings"]:
        weights["lm_head.weight"] = theirs.lm_head.weight.detach()
    save_file(weights, folder / "model.safetensors")


def llama(folder: Path, n_ctx: int | None = None) -> tuple[Any, Any]:
    """What was written: a transformers Llama, and the HookedTransformerConfig of it."""
    from transformer_lens import HookedTransformerConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    content = json.loads((folder / "model.json").read_text())
    theirs = LlamaForCausalLM(LlamaConfig(**content))
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    theirs.tie_weights()
    heads, keys = content["num_attention_heads"], content["num_key_value_heads"]
    cfg = HookedTransformerConfig(
        n_layers=content["num_hidden_layers"],
        d_model=content["hidden_size"],
        d_head=content["head_dim"],
        n_heads=heads,
        n_key_value_heads=None if keys == heads else keys,
        d_mlp=content["intermediate_size"],
        d_vocab=content["vocab_size"],
        n_ctx=min(content["max_position_embeddings"], n_ctx or 10**9),
        eps=content["rms_norm_eps"],
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=content["head_dim"],
        rotary_base=content["rope_theta"],
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    return theirs, cfg
