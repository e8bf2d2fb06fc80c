"""Packing, special tokens, masks: on a tokenizer of a dozen words, so that every row can be written down."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saewb.data.tokens import pack
from saewb.models.tokenizer import special_mask, special_token_ids

WORDS = ["<s>", "</s>", "<unk>", "<|user|>", "a", "b", "c", "d", "e", "f"]
BOS, EOS, A, B, C, D, E, F = 0, 1, 4, 5, 6, 7, 8, 9


def words(**roles: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles)


FRAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def test_rows_by_hand_where_documents_end_inside_at_and_after_a_row():
    rows = pack(["a b c d", "e f", "a b c"], words(**FRAMED), 4)
    # stream: <s> a b c d <s> e f <s> a b c
    assert rows.tolist() == [[BOS, A, B, C], [BOS, D, BOS, E], [BOS, F, BOS, A]]  # "b c" fill no row
    assert rows.dtype == torch.int64


def test_a_row_that_starts_at_a_document_has_no_second_bos():
    assert pack(["a b c", "d e f"], words(**FRAMED), 4).tolist() == [[BOS, A, B, C], [BOS, D, E, F]]


@pytest.mark.parametrize("ctx_len", [2, 3, 5, 7, 16])
def test_no_token_is_lost_or_repeated_but_at_the_end(ctx_len):
    texts = ["a b c d e f", "f", "e d c", "", "b a b a b"] * 7
    text_tokens = [token for text in texts for token in words().encode(text)]
    rows = pack(texts, words(**FRAMED), ctx_len)
    assert bool((rows[:, 0] == BOS).all())
    packed = rows[rows != BOS].tolist()
    assert packed == text_tokens[: len(packed)]
    assert len(text_tokens) - len(packed) < ctx_len


def test_without_bos_the_eos_separates_where_there_is_one():
    assert pack(["a b", "c d e"], words(**FRAMED), 3, bos=False).tolist() == [[A, B, EOS], [C, D, E]]
    assert pack(["a b", "c d e"], words(), 2, bos=False).tolist() == [[A, B], [C, D]]


def test_special_tokens_that_the_tokenizer_would_add_are_not_added_twice():
    tokenizer = words(**FRAMED)
    once = pack(["a b c"], tokenizer, 4)
    tokenizer.add_bos_token = True
    assert torch.equal(pack(["a b c"], tokenizer, 4), once)


@pytest.mark.parametrize(
    ("texts", "ctx_len", "roles", "error", "says"),
    [
        ([], 4, FRAMED, ValueError, "no documents"),
        (["a b"], 1, FRAMED, ValueError, "ctx_len=1"),
        (["a b c d"], 4, {}, ValueError, "bos=False"),
        (["a b"], 4, FRAMED, ValueError, "do not fill one row"),
        ("a b c d", 4, FRAMED, TypeError, r"fix:  \[text\]"),
    ],
)
def test_errors_say_what_to_type(texts, ctx_len, roles, error, says):
    with pytest.raises(error, match=says):
        pack(texts, words(**roles), ctx_len)


def test_special_ids_are_those_with_a_role_and_never_unk_or_a_chat_marker():
    assert special_token_ids(words(**FRAMED)) == (0, 1)
    assert special_token_ids(words()) == ()
    assert special_token_ids(words(bos_token="<s>", pad_token="<s>", sep_token="</s>", cls_token="<s>")) == (0, 1)
    extra = words(**FRAMED, extra_special_tokens={"user_token": "<|user|>"})
    assert "<|user|>" in extra.all_special_tokens
    assert special_token_ids(extra) == (0, 1)
    assert special_token_ids(words(bos_token="<|user|>")) == (3,)  # a chat marker that is the BOS


def test_a_decoder_start_token_counts_where_the_tokenizer_names_one():
    named = SimpleNamespace(bos_token_id=None, eos_token_id=1, decoder_start_token_id=7)
    assert special_token_ids(named) == (1, 7)


def test_special_mask_by_hand_for_any_shape_and_for_no_ids():
    tokens = torch.tensor([[[0, 5], [1, 0]]])
    assert special_mask(tokens, (0,)).tolist() == [[[True, False], [False, True]]]
    assert special_mask(tokens, ()).tolist() == [[[False, False], [False, False]]]
    assert special_mask(tokens.int(), [5, 1]).tolist() == [[[False, True], [True, False]]]


@pytest.mark.parametrize("text", [1, None, SimpleNamespace(text="a b")])
def test_texts_that_are_no_strings(text):
    unchecked = inspect.unwrap(pack)  # as a user has it: without the types checked first
    with pytest.raises(TypeError, match=r"got a (int|NoneType|SimpleNamespace).* among the documents"):
        unchecked(["a b", text], words(**FRAMED), 4)
