"""Documents of any kind in every function, and what does not fit a model: refused before anything is computed."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.data.documents import Documents
from saewb.data.tokens import prompt_ids, token_rows

TEXTS = [" ".join(f"w{(i * j) % 28}" for j in range(1, 9)) for i in range(1, 30)]
RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    return saewb.TextFiles(path)


def test_the_same_rows_from_documents_of_every_kind(files):
    model = tiny_models.bridge()
    rows = token_rows(model, TEXTS, 16)
    shuffled = pd.Series(TEXTS, index=range(len(TEXTS)))[::-1][::-1].set_axis(range(len(TEXTS), 0, -1))
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for documents in (
        files,
        (text for text in TEXTS),
        [{"text": text} for text in TEXTS],
        shuffled,
        np.array(TEXTS),
        ids,
        saewb.stream_tokens(TEXTS, model.tokenizer, ctx_len=16),
        rows.numpy(),
    ):
        assert torch.equal(token_rows(model, documents, 16), rows), type(documents)


@pytest.mark.parametrize(
    ("documents", "error", "says"),
    [
        (pd.DataFrame({"text": TEXTS}), TypeError, r"table\['text'\]"),
        ({"train": TEXTS}, TypeError, r"documents\['train'\]"),
        ([*TEXTS, None], TypeError, "NoneType among"),
        ([*[{"text": t} for t in TEXTS], {"body": "w1"}], TypeError, "column 'text'"),
        ([{"body": t} for t in TEXTS], ValueError, r"row\['body'\]"),
        ([[4, 5.5, 6]], TypeError, "whole numbers"),
    ],
)
def test_what_is_no_document_is_refused_at_the_start(documents, error, says):
    model = tiny_models.bridge()
    with pytest.raises(error, match=says):
        saewb.train(model, documents, saewb.TopK(d_sae=8, k=2), hook=RESID, n_tokens=64, batch_tokens=32, ctx_len=16)


def test_an_iterator_loses_no_document_to_the_check():
    cursor = Documents(iter(["a", "b", "c"]), repeat=False, seed=None)
    cursor.check(tiny_models.tokenizer(), None)
    assert cursor.take(9) == ["a", "b", "c"]
    again = Documents(iter(["a", "b", "c"]), repeat=False, seed=None)
    again.check(tiny_models.tokenizer(), None)
    again.seek(0, 1)
    assert again.take(9) == ["b", "c"]


def test_rows_that_do_not_fit_the_model():
    model = tiny_models.bridge()  # context 64, rotary; 32 tokens; <pad> is 3
    ids = torch.full((2, 8), 5)
    for tokens, says in (
        (torch.full((2, 65), 5), "takes 64 at most"),
        (torch.full((2, 8), 32), "32 to 32; this model has 32"),
        (torch.full((2, 8), -100), "-100"),
        (torch.cat([torch.full((2, 1), 3), ids], 1), "begins with 1 padding"),
    ):
        for call in (
            lambda tokens: saewb.evaluate(model, tiny_models.sae(RESID), tokens),
            lambda tokens: next(saewb.stream_activations(model, tokens, RESID, batch_tokens=8)),
        ):
            with pytest.raises(ValueError, match=says):
                call(tokens)
    with pytest.raises(ValueError, match="ctx_len=64"):
        saewb.latent_matrix(model, tiny_models.sae(RESID), TEXTS, ctx_len=65)
    with pytest.raises(ValueError, match="without end"):
        saewb.evaluate(model, tiny_models.sae(RESID), saewb.stream_tokens(ids, repeat=True))


def test_bos_that_the_text_begins_with_is_not_doubled():
    model = tiny_models.bridge()
    expected = prompt_ids(model, "w1 w2")
    assert expected[0, 0] == tiny_models.BOS
    assert torch.equal(prompt_ids(model, "<bos> w1 w2"), expected)
    assert prompt_ids(model, "<bos> <bos> w1")[0, :3].tolist().count(tiny_models.BOS) == 2


@pytest.mark.parametrize("separator", ["\n\n", "aba", "x"])
def test_a_separator_across_two_blocks(tmp_path, separator):
    text = ("a" * (2**20 - 1) + separator + "b" * 5 + separator + "ab") * 2
    (tmp_path / "a.txt").write_text(text)
    expected = [part.strip() for part in text.split(separator) if part.strip()]
    assert list(saewb.TextFiles(tmp_path / "a.txt", separator)) == expected
