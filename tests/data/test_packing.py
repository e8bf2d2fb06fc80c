"""Token streams: every kind of document, the same rows as `pack`, exact resume."""

import gzip

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.data.documents import TextFiles
from saewb.data.packing import stream_tokens

TEXTS = [" ".join(f"w{(i * 7 + j) % 20}" for j in range(3 + i % 9)) for i in range(150)]
BOS = tiny_models.BOS


def rows(stream):
    return torch.cat(list(stream))


def ids_of(texts):
    return tiny_models.tokenizer()(texts, add_special_tokens=False)["input_ids"]


class Dataset:
    """As `datasets.Dataset` behaves: rows by number, a length; and counts what is read."""

    def __init__(self, **columns):
        self.columns, self.read = columns, 0

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        self.read += 1
        return {name: values[i] for name, values in self.columns.items()}

    def __iter__(self):
        return (self[i] for i in range(len(self)))


class Streamed:
    """As `datasets.IterableDataset` behaves: no length, can skip."""

    def __init__(self, texts, skipped=0):
        self.texts, self.skipped, self.skips = texts, skipped, []

    def skip(self, n):
        self.skips.append(n)
        return Streamed(self.texts, n)

    def __iter__(self):
        return ({"text": text} for text in self.texts[self.skipped :])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("ctx_len", [2, 5, 16])
def test_rows_are_those_of_pack(bos, ctx_len):
    got = rows(stream_tokens(TEXTS, tiny_models.tokenizer(), ctx_len=ctx_len, rows=3, bos=bos))
    assert torch.equal(got, saewb.pack(TEXTS, tiny_models.tokenizer(), ctx_len, bos=bos))


def test_batches_have_the_rows_asked_for_and_the_last_what_is_left():
    sizes = [len(batch) for batch in stream_tokens(TEXTS, tiny_models.tokenizer(), ctx_len=8, rows=10)]
    assert sizes[:-1] == [10] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 10


@pytest.mark.parametrize(
    "documents",
    [
        tuple(TEXTS),
        iter(TEXTS),
        (text for text in TEXTS),
        Dataset(text=TEXTS, label=[0] * len(TEXTS)),
        Dataset(body=TEXTS, input_ids=ids_of(TEXTS)),
        Dataset(tokens=[np.array(ids) for ids in ids_of(TEXTS)]),
        Streamed(TEXTS),
        ids_of(TEXTS),
        [torch.tensor(ids, dtype=torch.int32) for ids in ids_of(TEXTS)],
        [np.array(ids, dtype=np.uint16) for ids in ids_of(TEXTS)],
    ],
    ids=["tuple", "iterator", "generator", "texts", "ids", "arrays", "streamed", "lists", "tensors", "uint16"],
)
def test_every_kind_of_document_gives_the_same_rows(documents):
    want = saewb.pack(TEXTS, tiny_models.tokenizer(), 8)
    assert torch.equal(rows(stream_tokens(documents, tiny_models.tokenizer(), ctx_len=8)), want)


def test_a_column_that_is_named():
    data = Dataset(text=["w1 w1 w1 w1"] * 3, other=["w2 w2 w2 w2"] * 3)
    assert 6 in rows(stream_tokens(data, tiny_models.tokenizer(), ctx_len=4, column="other"))
    with pytest.raises(ValueError, match=r"no column 'x' in a dataset with 'text', 'other'"):
        next(stream_tokens(data, tiny_models.tokenizer(), ctx_len=4, column="x"))


def test_rows_that_are_ready_are_taken_as_they_are():
    ids = torch.arange(24, dtype=torch.int32).reshape(6, 4)
    stream = stream_tokens(ids, rows=4)
    assert torch.equal(rows(stream), ids.long())
    shuffled = rows(stream_tokens(ids, rows=4, shuffle_seed=3))
    assert not torch.equal(shuffled, ids)
    assert sorted(shuffled[:, 0].tolist()) == ids[:, 0].tolist()


def test_files_in_pieces_gzip_and_blank_lines(tmp_path, monkeypatch):
    text = "\n\n".join(TEXTS) + "\n\n\n\n"
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(text)
    assert list(TextFiles(tmp_path / "a.txt")) == TEXTS
    assert list(TextFiles([tmp_path / "a.txt", tmp_path / "b.txt.gz"])) == TEXTS * 2
    assert list(TextFiles(tmp_path / "a.txt", separator=None)) == [text.strip()]
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        TextFiles(tmp_path / "missing.txt")


def test_a_separator_across_the_blocks_that_are_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * (2**20 - 1) + "\n\n" + "w2")  # the blank line lies across the first block of 2**20 characters
    assert [len(text) for text in TextFiles(path)] == [2**20 - 1, 2]


def test_a_source_is_not_read_ahead():
    items = []

    def endless():
        while True:
            items.append(1)
            yield "w1 w2 w3"

    next(stream_tokens(endless(), tiny_models.tokenizer(), ctx_len=8, rows=2))
    assert len(items) == 64  # one group


def test_chats_go_through_the_template():
    tokenizer = tiny_models.tokenizer()
    template = "{% for m in messages %}{{ '<eos> ' if m.role == 'user' else '' }}{{ m.content }} {% endfor %}"
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    tokenizer.chat_template = template
    try:
        want = [BOS, 2, 5, 6, 7] * 4
        for documents in ([chat] * 4, Dataset(messages=[chat] * 4), Dataset(conversations=[chat] * 4)):
            assert rows(stream_tokens(documents, tokenizer, ctx_len=5)).flatten().tolist() == want
    finally:
        tokenizer.chat_template = None


def test_markers_by_hand():
    documents = [[5, 6], [7, 8, 9]]
    how = {"ctx_len": 3, "tokenizer": tiny_models.tokenizer()}
    assert rows(stream_tokens(documents, separator="eos", **how)).tolist() == [[BOS, 5, 6], [BOS, 7, 8]]
    assert rows(stream_tokens(documents, bos=False, separator=None, **how)).tolist() == [[5, 6, 7]]
    assert rows(stream_tokens(documents, bos=False, document_start="eos", **how)).tolist() == [[2, 5, 6], [2, 7, 8]]
    assert rows(stream_tokens(documents, whole_documents=True, **how)).tolist() == [[BOS, 5, 6], [BOS, 7, 8]]


def test_repeat_goes_on_and_an_iterator_ends():
    short = TEXTS[:3]
    stream = stream_tokens(short, tiny_models.tokenizer(), ctx_len=4, rows=50, repeat=True)
    assert len(next(stream)) == 50
    assert stream.epoch > 0
    once = rows(stream_tokens(iter(short), tiny_models.tokenizer(), ctx_len=4, repeat=True))
    assert torch.equal(once, saewb.pack(short, tiny_models.tokenizer(), 4))


@pytest.mark.parametrize("documents", [["", ""], [[], []]])
def test_documents_that_give_nothing_are_not_repeated_for_ever(documents):
    stream = stream_tokens(documents, tiny_models.tokenizer(), ctx_len=4, repeat=True)
    with pytest.raises(ValueError, match="gave no token"):
        next(stream)
    whole = stream_tokens(["w1"], tiny_models.tokenizer(), ctx_len=9, repeat=True, whole_documents=True)
    with pytest.raises(ValueError, match="whole_documents"):
        next(whole)


def test_shuffling_is_by_seed_and_other_each_time_round():
    def first(seed):
        stream = stream_tokens(list(range_documents()), ctx_len=2, rows=150, bos=False, shuffle_seed=seed, repeat=True)
        return next(stream).flatten().tolist(), next(stream).flatten().tolist()

    one, two = first(1)
    assert first(1) == (one, two)
    assert first(2)[0] != one != two
    assert sorted(one) == sorted(two) == sorted(x for d in range_documents() for x in d)


def range_documents():
    return ([2 * i, 2 * i + 1] for i in range(150))


SOURCES = {
    "list": lambda: TEXTS,
    "shuffled": lambda: TEXTS,
    "dataset": lambda: Dataset(text=TEXTS),
    "streamed": lambda: Streamed(TEXTS),
    "iterator": lambda: iter(TEXTS),
    "ready": lambda: torch.arange(900).reshape(-1, 9),
}


@examples(40)
@given(st.sampled_from(sorted(SOURCES)), st.integers(0, 40), st.integers(1, 9))
def test_restored_streams_go_on_exactly(kind, n, n_rows):
    def new():
        seed = 5 if kind == "shuffled" else None
        repeat = kind != "iterator"
        return stream_tokens(
            SOURCES[kind](), tiny_models.tokenizer(), ctx_len=6, rows=n_rows, repeat=repeat, shuffle_seed=seed
        )

    whole = new()
    for _ in range(n):
        next(whole, None)
    state = whole.state()
    again = new()
    again.restore(state)
    for _ in range(5):
        a, b = next(whole, None), next(again, None)
        assert (a is None and b is None) or torch.equal(a, b)
    assert again.state() == whole.state()


def test_restoring_reads_nothing_that_was_given():
    stream = stream_tokens(Dataset(text=TEXTS), tiny_models.tokenizer(), ctx_len=6, rows=40)
    next(stream), next(stream), next(stream)
    data = Dataset(text=TEXTS)
    again = stream_tokens(data, tiny_models.tokenizer(), ctx_len=6, rows=40)
    again.restore(stream.state())
    assert stream.state()["document"] == 64
    assert data.read == 1 + 64  # the first, to check what documents are; its group alone
    streamed = Streamed(TEXTS)
    stream_tokens(streamed, tiny_models.tokenizer(), ctx_len=6, rows=40).restore(stream.state())
    assert streamed.skips == [stream.state()["document"]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: stream_tokens("w1 w2", t), TypeError, r"\[text\]"),
        (lambda t: stream_tokens({"a": 1}, t), TypeError, "got a dict"),
        (lambda t: stream_tokens(TEXTS, t, ctx_len=1), ValueError, "ctx_len=1"),
        (lambda t: stream_tokens(TEXTS, t, rows=0), ValueError, "rows=0"),
        (lambda t: stream_tokens(TEXTS, None), ValueError, "bos=False"),
        (lambda t: next(stream_tokens(TEXTS, None, bos=False)), ValueError, "no tokenizer for a text"),
        (lambda t: stream_tokens(TEXTS, t, separator="sep"), ValueError, "'sep'"),
        (lambda t: stream_tokens(iter(TEXTS), t, shuffle_seed=1), ValueError, "shuffle"),
        (lambda t: next(stream_tokens(["w1", 3], t)), TypeError, "got a int"),
        (lambda t: next(stream_tokens([["w1"]], t)), TypeError, "got a list"),
        (lambda t: next(stream_tokens([{"x": 1}], t)), ValueError, "no known column"),
        (lambda t: stream_tokens(torch.zeros(2, 3), t), TypeError, "float32"),
        (lambda t: stream_tokens(torch.zeros(0, 3, dtype=torch.long), t), ValueError, r"\(0, 3\)"),
    ],
)
def test_errors_say_what_to_type(call, error, says):
    with pytest.raises(error, match=says):
        call(tiny_models.tokenizer())
