"""A Hugging Face Llama and its tokenizer from a GGUF file, without the `gguf` package and without a hub.

1. The config comes from the metadata; whatever a plain Llama does not have (experts, rope scaling, ...) is refused.
2. The tensors get their Hugging Face names. llama.cpp stores each head's query and key rows as (pair, half), Hugging
   Face as (half, pair): put back here. Every tensor of the file must be used.
3. The tokenizer is byte-level BPE built from the vocabulary and merges in the metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saewb.errors import FormatError, explain, near
from saewb.models.gguf import GGUFFile, read_gguf

_BLOCK_NAMES = {  # llama.cpp: Hugging Face, inside one block
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What would change the function computed, and which this reader does not build.
_NOT_PLAIN = ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.clamp_kqv")
_CONTROL, _USER = 3, 4  # token types of llama.cpp: special, and added by the model's makers


def _words() -> dict[str, pre_tokenizers.PreTokenizer]:
    """How text is cut before BPE, by llama.cpp's name for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one_digit = pre_tokenizers.Digits(individual_digits=True)
    return {"gpt-2": byte_level, "smollm": pre_tokenizers.Sequence([one_digit, byte_level])}


def llama_from_gguf(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The language model and the tokenizer in a GGUF file of the llama architecture.

    All weights are dense afterwards: an ordinary model, with no mark of quantization on its config.
    The tokenizer puts BOS in front of what it encodes, whatever the file says: transformer-lens would otherwise load it
    again by name. `add_special_tokens=False` encodes without.

    Args:
        path: the file.
        dtype: of the parameters.

    Returns:
        The model, on the CPU and in eval mode, with eager attention; and its tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it cannot be read, is of another architecture, or has a tensor, a rope scaling or a tokenizer
            that this reader does not know.

    References:
        llama.cpp, convert_hf_to_gguf.py (names, and `permute` for queries and keys).
    """
    file = read_gguf(path)
    cfg = _config(file)
    names = _names(file, cfg)
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        model = LlamaForCausalLM(cfg)
    wanted = dict(model.named_parameters())
    weights = {}
    for ours, theirs in names.items():
        if file.tensors[ours].shape != tuple(wanted[theirs].shape):
            got, want = file.tensors[ours].shape, tuple(wanted[theirs].shape)
            raise FormatError(explain(f"{file.path.name}: {ours!r} has shape {got}.", want=f"{want}"))
        weights[theirs] = torch.from_numpy(_unpermuted(ours, file.tensor(ours), cfg)).to(dtype)
    model.load_state_dict(weights, strict=False, assign=True)  # not strict: a tied lm_head is not among them
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(cfg)  # its frequencies are a buffer, still on meta
    model.config.dtype = dtype
    return model.eval(), _tokenizer(file)


def _fact(file: GGUFFile, key: str) -> Any:
    if key not in file.metadata:
        raise FormatError(explain(f"{file.path.name} has no {key!r}.", near=near(key, file.metadata)))
    return file.metadata[key]


def _config(file: GGUFFile) -> LlamaConfig:
    meta = file.metadata
    _refuse(file, "general.architecture", _fact(file, "general.architecture"), ["llama"])
    width, heads = _fact(file, "llama.embedding_length"), _fact(file, "llama.attention.head_count")
    head = meta.get("llama.attention.key_length", width // heads)
    _refuse(file, "llama.rope.dimension_count", meta.get("llama.rope.dimension_count", head), [head])
    _refuse(file, "llama.attention.value_length", meta.get("llama.attention.value_length", head), [head])
    for key in _NOT_PLAIN:
        _refuse(file, key, meta.get(key), [None, 0, "none"])
    return LlamaConfig(
        vocab_size=len(_fact(file, "tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=_fact(file, "llama.feed_forward_length"),
        num_hidden_layers=_fact(file, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get("llama.attention.head_count_kv", heads),
        head_dim=head,
        max_position_embeddings=_fact(file, "llama.context_length"),
        rms_norm_eps=_fact(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        name_or_path=file.path.stem,
        attn_implementation="eager",  # the only one whose attention patterns can be read
    )


def _refuse(file: GGUFFile, key: str, got: Any, want: list[Any]) -> None:
    if got not in want:
        wanted = ", ".join(repr(w) for w in want)
        fix = (
            "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), then saewb.load_model(model, tokenizer=...)"
        )
        raise FormatError(explain(f"{file.path.name}: {key} is {got!r}.", want=wanted, fix=fix))


def _names(file: GGUFFile, cfg: LlamaConfig) -> dict[str, str]:
    """llama.cpp's name of every tensor -> Hugging Face's; each is there, and nothing is left over."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not cfg.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for block in range(cfg.num_hidden_layers):
        for ours, theirs in _BLOCK_NAMES.items():
            names[f"blk.{block}.{ours}.weight"] = f"model.layers.{block}.{theirs}.weight"
    missing, extra = sorted(set(names) - set(file.tensors)), sorted(set(file.tensors) - set(names))
    if missing or extra:
        raise FormatError(
            explain(f"{file.path.name}: missing {missing[:5]}, left over {extra[:5]}.", want="the tensors of a Llama")
        )
    return names


def _unpermuted(name: str, weight: np.ndarray, cfg: LlamaConfig) -> np.ndarray:
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    heads = cfg.num_attention_heads if "attn_q" in name else cfg.num_key_value_heads
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    meta, tokens = file.metadata, _fact(file, "tokenizer.ggml.tokens")
    words = _words()
    _refuse(file, "tokenizer.ggml.model", _fact(file, "tokenizer.ggml.model"), ["gpt2"])
    _refuse(file, "tokenizer.ggml.pre", _fact(file, "tokenizer.ggml.pre"), list(words))
    merges = [tuple(pair.split(" ")) for pair in _fact(file, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = words[meta["tokenizer.ggml.pre"]]
    backend.decoder = decoders.ByteLevel()
    roles = _roles(file, tokens)
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=[t for t in special if t not in roles.values()], **roles
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    prepend_bos(tokenizer, file.path.stem)
    return tokenizer


def _roles(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    if any(i is not None and i >= len(tokens) for i in ids.values()):
        raise FormatError(explain(f"{file.path.name}: special tokens {ids}.", want=f"ids below {len(tokens)}"))
    return {role: tokens[i] for role, i in ids.items() if i is not None}


def prepend_bos(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Makes a tokenizer put its BOS token in front, and say so to transformer-lens. Changes it.

    transformer-lens wants a tokenizer that adds BOS, and loads one that does not anew by `init_kwargs["name_or_path"]`:
    a KeyError for a tokenizer made in memory, a download for one from the hub.

    Args:
        tokenizer: fast or slow; one that has no BOS token, or adds it already, keeps its post-processing. A slow one
            keeps it too: `to_tokens` then writes BOS into the text.
        name: what transformer-lens shall call it, if it has no name yet.
    """
    tokenizer.init_kwargs.setdefault("name_or_path", name)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or bos_id is None:
        return
    tokenizer.init_kwargs["add_bos_token"] = True
    if not tokenizer.is_fast or tokenizer.encode("a")[:1] == [bos_id]:
        return
    backend = tokenizer.backend_tokenizer
    ahead = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
    )
    before = backend.post_processor
    backend.post_processor = ahead if before is None else processors.Sequence([before, ahead])
