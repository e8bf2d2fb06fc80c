"""GGUF files: a small Llama of every shape that matters, its tokenizer, and files that are refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from helpers.gguf_files import WORDS, converted, hf_llama, llama_metadata, llama_tensors, write_gguf

from saewb.errors import FormatError
from saewb.models.gguf import gguf_folder
from saewb.models.load import load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEWB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_the_model_it_was_written_from(tmp_path, tied):
    original = hf_llama(tied)
    path = write_gguf(tmp_path / "small.gguf", llama_metadata(), llama_tensors(original))
    model, tokenizer = converted(path)
    ids = torch.arange(20)[None] % len(WORDS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    model.save_pretrained(tmp_path / "saved")  # refused for a model with marks of quantization
    tokenizer.save_pretrained(tmp_path / "saved")


def test_it_is_converted_once_for_its_content(tmp_path, monkeypatch):
    import saewb.models.gguf as gguf

    path = write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True)))
    folder = gguf_folder(path, tmp_path / "cache")
    conversions = []
    real = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda *args: conversions.append(args) or real(*args))
    assert gguf_folder(path, tmp_path / "cache") == folder
    assert not conversions
    write_gguf(path, llama_metadata(), llama_tensors(hf_llama(False)))  # another model under the same name
    assert gguf_folder(path, tmp_path / "cache") != folder
    assert len(conversions) == 1


def test_llama_in_bfloat16_keeps_its_frequencies_in_float32(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True)))
    model = load_model(path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.original_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_llama_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True)))
    tokenizer = load_model(path, device="cpu").tokenizer
    ids = tokenizer("ab c<eos>é").input_ids
    assert [WORDS[i] for i in ids] == ["<bos>", "ab", "Ġc", "<eos>", "Ã", "©"]
    assert tokenizer.decode(ids) == "<bos>ab c<eos>é"
    assert tokenizer("ab", add_special_tokens=False).input_ids == [WORDS.index("ab")]
    assert tokenizer.init_kwargs["add_bos_token"] is True


def test_a_damaged_file_is_a_format_error(tmp_path):
    whole = write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True))).read_bytes()
    for n in (0, 3, 20, 300, 1500, len(whole) - 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            load_model(tmp_path / "cut.gguf", device="cpu")
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]  # no half of a conversion stays


def test_wrong_magic_and_missing_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(FormatError, match="begins with"):
        load_model(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_model(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "nothing"}, "cannot be read"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.block_count": 3}, r"missing model\.layers\.2"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "a.gguf", llama_metadata(**changes), llama_tensors(hf_llama(True)))
    with pytest.raises(FormatError, match=message):
        load_model(path)


def test_rotary_frequencies_that_would_go_unused_are_refused(tmp_path):
    tensors = {**llama_tensors(hf_llama(True)), "rope_freqs.weight": np.ones(4, np.float32)}
    with pytest.raises(FormatError, match="rope_freqs"):
        load_model(write_gguf(tmp_path / "a.gguf", llama_metadata(), tensors))


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_sizes_that_no_tensor_has_are_refused_before_anything_is_made(name, tmp_path):
    metadata = {**llama_metadata(), f"llama.{name}": 2**31 - 1}
    tensors = llama_tensors(hf_llama(False))
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    began = time.monotonic()
    with pytest.raises(FormatError, match=f"llama.{name} is 2147483647"):
        gguf_folder(path, tmp_path / "cache")
    assert time.monotonic() - began < 2
