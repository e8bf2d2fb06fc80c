"""Two models on the same tokens: what is read, that it resumes, and that other tokenizers are refused."""

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.data.stream import tokenizer_content
from saewb.models.capture import capture

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def models():
    other = tiny_models.new_bridge()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.05)
    return {"base": tiny_models.bridge(), "chat": other}


def test_same_tokens_through_both(models):
    ids = tiny_models.tokens(6, 9)
    batch = next(saewb.stream_pair(models, ids, HOOK, batch_tokens=20, pass_tokens=9, skip_special_tokens=False))
    for name, model in models.items():
        want = capture(model, ids, [HOOK])[HOOK][:, 1:].flatten(0, 1)[:20]
        torch.testing.assert_close(batch.values[name], want.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.ids.long(), ids[:, 1:].flatten()[:20])
    both = saewb.stream_pair(models, ids, HOOK, batch_tokens=20, difference=True, skip_special_tokens=False)
    difference = next(both).values["difference"]
    torch.testing.assert_close(difference, batch.values["chat"] - batch.values["base"], rtol=1e-4, atol=1e-5)


def test_hooks_of_their_own_and_special_tokens(models):
    hooks = {"base": HOOK, "chat": "blocks.2.hook_resid_post"}
    texts = ["w1 w2 w3 w4 w5"] * 8
    batch = next(saewb.stream_pair(models, texts, hooks, batch_tokens=16, ctx_len=6))
    assert list(batch.values) == ["base", "chat"]
    assert not torch.isin(batch.ids, torch.tensor([0, 1, 2, 3])).any()


def test_resumes_bit_for_bit_and_trains(models, tmp_path):
    def fresh():
        return saewb.stream_pair(
            models, tiny_models.tokens(30, 9), HOOK, batch_tokens=20, buffer_tokens=60, repeat=True, pass_tokens=18
        )

    whole, first, second = fresh(), fresh(), fresh()
    batches = [next(whole) for _ in range(6)]
    for _ in range(3):
        next(first)
    second.restore(first.state())
    for batch in batches[3:]:
        again = next(second)
        assert torch.equal(again.ids, batch.ids)
        assert all(torch.equal(again.values[name], x) for name, x in batch.values.items())
    folder = tmp_path / "run"
    how = {"n_tokens": 200, "batch_tokens": 20, "folder": folder}
    run = saewb.train(None, fresh(), saewb.CrossCoder(32, k=4.0), **how).wait()
    assert run.sae.cfg.points == ("base", "chat")
    saewb.resume_run(folder, tokens=fresh(), n_tokens=220).wait()
    other = saewb.stream_pair(
        {"base": models["base"], "chat": models["base"]}, tiny_models.tokens(30, 9), HOOK, batch_tokens=20, repeat=True
    )
    with pytest.raises(ValueError, match="tokens"):  # other models
        saewb.resume_run(folder, tokens=other, n_tokens=240)


@contextmanager
def with_tokenizer(model, words):
    """The model with a tokenizer that gives other ids for some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", "<pad>", *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    mine, before = PreTrainedTokenizerFast(tokenizer_object=inner, **marks), model.tokenizer
    mine.init_kwargs.update(name_or_path="small", add_bos_token=True)  # or transformer-lens loads it by name
    model.tokenizer = mine
    try:
        yield model
    finally:
        model.tokenizer = before


def test_other_tokenizers_are_refused_where_their_ids_differ(models):
    words = [f"w{i}" for i in range(28)]
    base, swapped = models["base"], [*words[:5], "w6", "w5", *words[7:]]
    with with_tokenizer(models["chat"], swapped) as other:
        assert tokenizer_content(base) != tokenizer_content(other)
        pair = {"base": base, "chat": other}
        alike = saewb.stream_pair(pair, ["w1 w2 w3 w4"] * 20, HOOK, batch_tokens=20, ctx_len=8)
        assert len(next(alike)) == 20  # the same ids for these texts
        with pytest.raises(ValueError, match="'base' and 'chat' give different ids for the same texts: 9 and 10"):
            next(saewb.stream_pair(pair, ["w5 w2 w3 w4"] * 20, HOOK, batch_tokens=20, ctx_len=8))
        with pytest.raises(ValueError, match="an iterator can be read by one only"):
            saewb.stream_pair(pair, iter(["w5 w2"] * 20), HOOK)
        next(saewb.stream_pair(pair, tiny_models.tokens(6, 9), HOOK, batch_tokens=20))  # ids are ids


def test_wrong_arguments_say_what_to_type(models):
    ids = tiny_models.tokens(6, 9)
    with pytest.raises(ValueError, match="got 1 models"):
        saewb.stream_pair({"a": models["base"]}, ids, HOOK)
    with pytest.raises(ValueError, match="3 models for a difference"):
        saewb.stream_pair({**models, "c": models["base"]}, ids, HOOK, difference=True)
    with pytest.raises(ValueError, match="hooks of base for models base, chat"):
        saewb.stream_pair(models, ids, {"base": HOOK})
    with pytest.raises(ValueError, match="skip_first=-1"):
        saewb.stream_pair(models, ids, HOOK, skip_first=-1)
