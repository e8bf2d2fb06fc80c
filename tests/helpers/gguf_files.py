"""Writes GGUF files for tests, number by number: any tensors and metadata, and a small Llama of random weights."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import torch

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


def _string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value):
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", 8) + _string(value)
    items = [_value(v) for v in value]  # an array states the type of its items once
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)


def write_gguf(path, metadata, tensors, version=3, alignment=32):
    """tensors: {name: (shape, slowest axis first; ggml type; bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(_string(k) + _value(v) for k, v in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


def f32(array):
    return array.shape, F32, array.astype("<f4").tobytes()


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
    return {name: f32(array) for name, array in out.items()}
