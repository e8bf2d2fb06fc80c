"""Searching by pairs of tokens first gives what spelling out every context gives."""

import pytest
import torch
from helpers import tiny_models
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.features import build_index, search
from saewb.features.search import TokenPairFilter
from saewb.features.token_texts import TokenTexts

LETTERS = st.text(alphabet="abAB kK\u212aſsß🙂", max_size=3)


@examples(50)
@given(st.lists(LETTERS, min_size=1, max_size=6), st.text(alphabet="abA kKsS", min_size=1, max_size=7), st.data())
def test_no_context_that_has_the_text_is_left_out(strings, asked, data):
    words = TokenTexts(dict(enumerate(strings)))
    n = len(strings) + 1  # the last one is unknown to words
    ids = data.draw(st.lists(st.lists(st.integers(-1, n), min_size=5, max_size=5), min_size=1, max_size=8))
    ids = torch.tensor(ids)[None]
    result = TokenPairFilter(asked, words).contexts(ids)
    pattern = search._pattern(asked)
    for slot, row in enumerate(ids[0].tolist()):
        text = "".join(words.decode([i for i in row if i >= 0]))
        # A window's missing tokens are at its ends only.
        inside = [p for p, i in enumerate(row) if i >= 0]
        if inside == list(range(inside[0], inside[-1] + 1) if inside else []) and pattern.search(text):
            assert result[0, slot]


def test_a_context_of_plain_words_without_it_is_left_out():
    words = TokenTexts({1: " Par", 2: "is", 3: " in", 4: "p"})
    ids = torch.tensor([[[1, 2, -1], [-1, 3, 1], [4, 4, 4], [1, 3, 2]]])
    assert TokenPairFilter("paris", words).contexts(ids).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("text", ["w1", "1 w2", "w", "x"])
def test_the_search_is_the_same(text, monkeypatch):
    index = build_index(tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(8, 9))
    quick = index.search(text)
    monkeypatch.setattr(search, "TokenPairFilter", lambda *_: None)
    assert quick.equals(index.search(text))
    assert (len(quick) == 0) == (text == "x")
