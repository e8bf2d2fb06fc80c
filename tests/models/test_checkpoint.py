"""A checkpoint that is not the model its configuration describes is refused, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from saewb.errors import FormatError
from saewb.models.checkpoint import check_loading_info
from saewb.models.load import load_model, tiny_path


@pytest.fixture
def folder(tmp_path):
    """A small Llama with untied weights, and the bundled tokenizer."""
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(tmp_path)
    for file in tiny_path().glob("*token*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply a function of name and tensor, which gives the new name and tensor, or None."""
    path = folder / "model.safetensors"
    pairs = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file({name: tensor.contiguous() for name, tensor in filter(None, pairs)}, path, metadata={"format": "pt"})


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_intact_one_loads_its_own_weights(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(load_model(folder, device="cpu").W_E, embedding, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, t: (f"_orig_mod.{name}", t), r"missing [\s\S]*left over [\s\S]*removeprefix\('_orig_mod\.'\)"),
        (lambda name, t: (f"module.{name}", t), r"removeprefix\('module\.'\)"),
        (lambda name, t: None if "layers.1.mlp" in name else (name, t), r"missing model\.layers\.1\.mlp"),
        (lambda name, t: None if "norm" in name else (name, t), r"missing .*norm"),
        (lambda name, t: None if name == "lm_head.weight" else (name, t), r"missing lm_head\.weight"),
        (lambda name, t: (name, t[:8] if name.endswith("up_proj.weight") else t), r"of another shape .*\(8, 16\), not"),
    ],
    ids=["compiled", "data parallel", "no MLP", "no norms", "untied, without unembedding", "shape"],
)
def test_missing_renamed_and_misshapen_tensors(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(FormatError, match=message):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("n_layers", "message"), [(3, r"missing model\.layers\.2"), (1, r"left over model\.layers\.1")]
)
def test_a_layer_more_or_less_than_the_configuration_says(folder, n_layers, message):
    configure(folder, num_hidden_layers=n_layers)
    with pytest.raises(FormatError, match=message):
        load_model(folder, device="cpu")


def test_scales_of_quantized_weights_are_not_dropped(folder):
    path = folder / "model.safetensors"
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    save_file(load_file(path) | scale, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="left over .*weight_scale_inv"):
        load_model(folder, device="cpu")


def test_float8_cannot_be_computed_with(folder):
    hf = LlamaForCausalLM.from_pretrained(folder).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"float8_e4m3fn, which saewb cannot compute with"):
        load_model(hf, tokenizer=AutoTokenizer.from_pretrained(tiny_path()))


def test_tied_weights_are_not_missing(folder):
    configure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda name, t: None if name == "lm_head.weight" else (name, t))
    model = load_model(folder, device="cpu")
    torch.testing.assert_close(model.W_U, model.W_E.T, rtol=0, atol=0)


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(FormatError, match=r"is an adapter[\s\S]*merge_and_unload"):
        load_model(folder, device="cpu")


def test_a_tokenizer_with_more_tokens_than_the_embedding(folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_tokens(["quixotic", "zephyr"])
    with pytest.raises(FormatError, match=r"embeds 4,096 tokens, its tokenizer has 4,098"):
        load_model(folder, device="cpu", tokenizer=tokenizer)


def test_a_padding_token_beyond_the_embedding_is_allowed(folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert load_model(folder, device="cpu", tokenizer=tokenizer).cfg.d_vocab == 4096


def test_what_models_compute_anew_may_be_left_over():
    """Names in the published files of gpt2, pythia, gpt-neo and llama-2, and parts of other modalities."""
    names = ["h.0.attn.bias", "gpt_neox.layers.1.attention.masked_bias", "transformer.h.0.attn.attention.bias"]
    names += ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.visual.blocks.0.attn.qkv.weight"]
    none = {"missing_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    check_loading_info("a", {**none, "unexpected_keys": set(names)})
    with pytest.raises(FormatError, match=r"left over h\.0\.attn\.c_attn\.bias\."):
        check_loading_info("a", {**none, "unexpected_keys": {*names, "h.0.attn.c_attn.bias"}})
