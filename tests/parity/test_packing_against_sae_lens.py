"""Rows of tokens: the same as SAELens makes of the same documents and markers."""

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.data.packing import Packer

pytest.importorskip("sae_lens", reason="the oracle has an environment of its own")
concat = pytest.importorskip("sae_lens.tokenization_and_batching").concat_and_batch_sequences

IDS = st.integers(0, 4)  # few, so that documents often begin with a marker
MARK = st.none() | IDS


@examples(300)
@given(st.lists(st.lists(IDS, max_size=12), max_size=12), st.integers(2, 7), MARK, MARK, MARK, st.booleans())
def test_rows_are_those_of_sae_lens(documents, ctx_len, row_start, separator, document_start, whole):
    packer = Packer(ctx_len, row_start, separator, document_start, whole)
    got = [row for document in documents for row in packer.rows(document)]
    tensors = (torch.tensor(document, dtype=torch.long) for document in documents)
    want = list(concat(tensors, ctx_len, row_start, document_start, separator, whole))
    assert got == [row.tolist() for row in want]
