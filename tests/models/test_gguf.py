"""GGUF files written number by number and read back; then a small Llama of every shape that matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.gguf_files import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q4_1,
    Q8_0,
    WORDS,
    f32,
    hf_llama,
    llama_metadata,
    llama_tensors,
    write_gguf,
)

from saewb.errors import FormatError
from saewb.models.gguf import read_gguf
from saewb.models.gguf_llama import llama_from_gguf

RNG = np.random.default_rng(0)
SCALES = np.array([0.5, -0.03125, 3.0], np.float16)  # one per block; exact in float16
MINIMA = np.array([-1.5, 0.25, 7.0], np.float16)
BYTES = RNG.integers(0, 256, (3, 16), dtype=np.uint8)
INT8 = RNG.integers(-128, 128, (3, 32), dtype=np.int8)
# 32 numbers of 4 bits: number j < 16 is the low half of byte j, number 16 + j its high half.
FOUR_BITS = np.array([[(b[j % 16] >> (4 * (j // 16))) & 15 for j in range(32)] for b in BYTES], np.float64)
DENSE = RNG.normal(size=(3, 32)).astype(np.float32)


def _blocks(*columns):
    return b"".join(b"".join(np.ascontiguousarray(c[i]).tobytes() for c in columns) for i in range(3))


CASES = {
    "F32": (F32, DENSE.tobytes(), DENSE),
    "F16": (F16, DENSE.astype("<f2").tobytes(), DENSE.astype(np.float16)),
    "BF16": (BF16, torch.from_numpy(DENSE).bfloat16().view(torch.int16).numpy().tobytes(), None),
    "Q8_0": (Q8_0, _blocks(SCALES, INT8), SCALES[:, None].astype(float) * INT8),
    "Q4_0": (Q4_0, _blocks(SCALES, BYTES), SCALES[:, None].astype(float) * (FOUR_BITS - 8)),
    "Q4_1": (Q4_1, _blocks(SCALES, MINIMA, BYTES), SCALES[:, None].astype(float) * FOUR_BITS + MINIMA[:, None]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_type_is_its_formula(tmp_path, name):
    kind, raw, expected = CASES[name]
    expected = torch.from_numpy(DENSE).bfloat16().float().numpy() if expected is None else expected
    other = np.arange(5, dtype=np.float32)  # lies before it, so that offsets matter
    file = read_gguf(write_gguf(tmp_path / "a.gguf", {}, {"other": f32(other), "w": ((3, 32), kind, raw)}))
    got = file.tensor("w")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.asarray(expected, np.float32))
    np.testing.assert_array_equal(file.tensor("other"), other)


def test_shape_is_slowest_axis_first_and_the_array_is_our_own(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = read_gguf(write_gguf(tmp_path / "a.gguf", {}, {"x": f32(x)}))
    got = file.tensor("x")
    np.testing.assert_array_equal(got, x)
    got[:] = 0  # writing to it must not write to the file
    np.testing.assert_array_equal(file.tensor("x"), x)


def test_metadata_and_alignment(tmp_path):
    meta = {"general.alignment": 64, "a": "ä", "b": [1, 2, 3], "c": ["x", "yz"], "d": 0.5, "e": True}
    file = read_gguf(write_gguf(tmp_path / "a.gguf", meta, {"t": f32(np.ones(3))}, version=2, alignment=64))
    assert dict(file.metadata) == meta
    np.testing.assert_array_equal(file.tensor("t"), np.ones(3))


def test_every_cut_of_a_file_is_a_format_error(tmp_path):
    meta = {"a": "text", "b": [1, 2], "c": ["x"]}
    whole = write_gguf(tmp_path / "a.gguf", meta, {"t": f32(np.ones(8))}).read_bytes()
    for n in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(FormatError):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 3 << 24}, "little-endian"),
        ({"tensors": {"w": ((256,), 12, b"\0" * 144)}}, "ggml type 12"),  # Q4_K
        ({"tensors": {"w": ((2, 16), Q8_0, b"\0" * 34)}}, "multiple of 32"),
        ({"metadata": {"s": b"\xff\xfe"}}, "UTF-8"),
        ({"metadata": {"general.alignment": 0}}, "alignment 0"),
        ({"metadata": {"nested": [[1], [2]]}}, "type 9"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, change, message):
    path = write_gguf(tmp_path / "a.gguf", **{"metadata": {}, "tensors": {}, **change})
    with pytest.raises(FormatError, match=message):
        read_gguf(path)


def test_wrong_magic_missing_file_and_missing_tensor(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(FormatError, match="begins with"):
        read_gguf(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_gguf(tmp_path / "b.gguf")
    file = read_gguf(write_gguf(tmp_path / "c.gguf", {}, {"token_embd.weight": f32(np.ones((2, 2)))}))
    with pytest.raises(ValueError, match=r"near: token_embd\.weight"):
        file.tensor("token_embed.weight")


# --- a small Llama ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_the_model_it_was_written_from(tmp_path, tied):
    original = hf_llama(tied)
    path = write_gguf(tmp_path / "small.gguf", llama_metadata(), llama_tensors(original))
    model, tokenizer = llama_from_gguf(path)
    ids = torch.arange(20)[None] % len(WORDS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    model.save_pretrained(tmp_path / "saved")  # refused for a model with marks of quantization
    tokenizer.save_pretrained(tmp_path / "saved")


def test_llama_in_bfloat16_keeps_its_frequencies_in_float32(tmp_path):
    model, _ = llama_from_gguf(
        write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True))), torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_llama_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama_metadata(), llama_tensors(hf_llama(True)))
    tokenizer = llama_from_gguf(path)[1]
    ids = tokenizer("ab c<eos>é").input_ids
    assert [WORDS[i] for i in ids] == ["<bos>", "ab", "Ġc", "<eos>", "Ã", "©"]
    assert tokenizer.decode(ids) == "<bos>ab c<eos>é"
    assert tokenizer("ab", add_special_tokens=False).input_ids == [WORDS.index("ab")]
    assert tokenizer.init_kwargs["add_bos_token"] is True
    assert tokenizer.init_kwargs["name_or_path"] == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.bos_token_id": 999}, "ids below"),
        ({"llama.block_count": None}, "has no 'llama.block_count'"),
        ({"llama.block_count": 1}, r"left over \['blk.1"),
        ({"llama.block_count": 3}, r"missing \['blk.2"),
        ({"llama.feed_forward_length": 24}, "has shape"),
    ],
)
def test_another_llama_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "a.gguf", llama_metadata(**changes), llama_tensors(hf_llama(True)))
    with pytest.raises(FormatError, match=message):
        llama_from_gguf(path)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_tensor_that_would_go_unused_is_refused(tmp_path, name):
    tensors = {**llama_tensors(hf_llama(True)), name: f32(np.ones(4))}
    with pytest.raises(FormatError, match=f"left over .*{name}"):
        llama_from_gguf(write_gguf(tmp_path / "a.gguf", llama_metadata(), tensors))
