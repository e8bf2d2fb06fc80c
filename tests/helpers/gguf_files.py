"""Writes GGUF files for tests with the `gguf` package, and a small Llama of random weights."""

from __future__ import annotations

import itertools

import numpy as np
import torch


def write_gguf(path, metadata, tensors):
    """tensors: {name: array}."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, metadata["general.architecture"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(path, cache=None):
    """The Hugging Face model and tokenizer that `load_model` boots for a GGUF file; not booted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saewb.models.gguf import gguf_folder
    from saewb.models.load import cache_folder
    from saewb.models.tokenizer import prepend_bos

    folder = gguf_folder(path, cache_folder() / "gguf" if cache is None else cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepend_bos(tokenizer, path.stem)
    return model.eval(), tokenizer


WORDS = ["<bos>", "<eos>", *(chr(c) for c in range(97, 123)), "Ġ", "ab", "Ġc", "Ã", "©"]


def llama_metadata(**changes):
    meta = {
        "general.architecture": "llama",
        "llama.embedding_length": 12,
        "llama.attention.head_count": 3,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 8,  # not 12 / 3, and 3 * 8 is not 12
        "llama.rope.dimension_count": 8,
        "llama.block_count": 2,
        "llama.feed_forward_length": 20,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 0.0009765625,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.token_type": [3, 3, *([1] * (len(WORDS) - 2))],
        "tokenizer.ggml.merges": ["a b", "Ġ c"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return {k: v for k, v in {**meta, **changes}.items() if v is not None}


def hf_llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=20,
        max_position_embeddings=64,
        rms_norm_eps=0.0009765625,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return model


def permuted(weight, heads):
    """What llama.cpp's converter does to query and key rows: row (half h, pair p) of a head becomes row (p, h)."""
    out, size = np.empty_like(weight), len(weight) // heads
    for head, half, pair in itertools.product(range(heads), range(2), range(size // 2)):
        out[head * size + 2 * pair + half] = weight[head * size + half * (size // 2) + pair]
    return out


def llama_tensors(model):
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    out = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        out["output.weight"] = state["lm_head.weight"]
    for i in range(2):
        at = f"model.layers.{i}."
        out[f"blk.{i}.attn_norm.weight"] = state[at + "input_layernorm.weight"]
        out[f"blk.{i}.ffn_norm.weight"] = state[at + "post_attention_layernorm.weight"]
        out[f"blk.{i}.attn_q.weight"] = permuted(state[at + "self_attn.q_proj.weight"], 3)
        out[f"blk.{i}.attn_k.weight"] = permuted(state[at + "self_attn.k_proj.weight"], 1)
        out[f"blk.{i}.attn_v.weight"] = state[at + "self_attn.v_proj.weight"]
        out[f"blk.{i}.attn_output.weight"] = state[at + "self_attn.o_proj.weight"]
        for name in ("gate", "up", "down"):
            out[f"blk.{i}.ffn_{name}.weight"] = state[at + f"mlp.{name}_proj.weight"]
    return out
