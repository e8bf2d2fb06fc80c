"""Pack documents into rows of one length, and stream them in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from saewb.data.documents import Documents, EpochCursor, encode
from saewb.errors import explain
from saewb.fingerprint import tensor_digest, values_digest

_GROUP = 64
"""Documents tokenized at once."""

Marker = Literal["bos", "eos"] | int | None


@final
class Packer:
    """Concatenates documents and cuts them into full rows; an unfinished row is kept for the next document.

    No marker is doubled: it is left out where the next token is the same one. A document that does not fit continues in
    the next row without a token lost or repeated. Empty documents leave no trace.

    Args:
        ctx_len: tokens in a row, markers included; at least 2.
        row_start: the token every row begins with (BOS); None for none.
        separator: between two documents in a row; None for none.
        document_start: before every document; None for none.
        whole: do not join documents: a row is the beginning of one, after `document_start` or else `row_start`;
            documents too short to fill a row are left out.

    References:
        The rows are those of SAELens' `concat_and_batch_sequences` with the same markers.

    Example:
        >>> packer = Packer(4, row_start=0, separator=0)
        >>> [row for document in ([5, 6, 7, 8], [9], [5, 5]) for row in packer.rows(document)]
        [[0, 5, 6, 7], [0, 8, 0, 9]]
        >>> packer.unfinished
        [0, 5, 5]
    """

    def __init__(
        self,
        ctx_len: int,
        row_start: int | None = None,
        separator: int | None = None,
        document_start: int | None = None,
        whole: bool = False,
    ) -> None:
        if ctx_len < 2:
            what, want = f"got ctx_len={ctx_len}.", "at least 2: a BOS and a token"
            raise ValueError(explain(what, want=want, fix="ctx_len=128"))
        self.ctx_len, self.row_start, self.separator = ctx_len, row_start, separator
        self.document_start, self.whole = document_start, whole
        self.unfinished: list[int] = []  # the row being filled

    def rows(self, document: Sequence[int]) -> Iterator[list[int]]:
        """Rows completed by this document."""
        return self._whole(list(document)) if self.whole else self._joined(list(document))

    def _whole(self, ids: list[int]) -> Iterator[list[int]]:
        marker = self.row_start if self.document_start is None else self.document_start
        row = ([] if marker is None or ids[:1] == [marker] else [marker]) + ids
        if ids and len(row) >= self.ctx_len:
            yield row[: self.ctx_len]

    def _joined(self, ids: list[int]) -> Iterator[list[int]]:
        position, at_start = 0, True
        while position < len(ids):
            start = [self.document_start] if at_start and self.document_start not in (None, ids[position]) else []
            lead = self.separator if self.unfinished else self.row_start
            markers = [lead] * (lead not in (None, *(start or [ids[position]]))) + start
            room = self.ctx_len - len(self.unfinished)
            end = position + max(0, room - len(markers))
            self.unfinished += markers[:room] + ids[position:end]
            position, at_start = end, bool(start) and len(markers) > room
            if len(self.unfinished) == self.ctx_len:
                yield self.unfinished
                self.unfinished = []


def stream_tokens(
    documents: Any,
    tokenizer: Any = None,
    *,
    ctx_len: int = 128,
    rows: int = 32,
    bos: bool = True,
    separator: Marker | Literal["auto"] = "auto",
    document_start: Marker = None,
    whole_documents: bool = False,
    column: str | None = None,
    repeat: bool = False,
    shuffle_seed: int | None = None,
) -> TokenStream:
    """Stream rows of `ctx_len` tokens from documents of any kind and number, read as rows are needed.

    The rows are those of `saewb.pack`: documents end to end, BOS at the start of every row and document; or without
    BOS, with EOS between documents where there is one. A matrix of token ids is taken as packed rows.

    Args:
        documents: texts, chats (lists of messages with "role" and "content"), or token ids; as a list, a Series, a
            dataset, any iterable, or `saewb.TextFiles`. Or packed rows: int ids `[rows, ctx_len]`, of torch or numpy. A
            dataset's rows are dictionaries; `saewb.data.documents.COLUMNS` lists the columns looked for.
        tokenizer: of the model; not needed for token ids, unless for their markers.
        ctx_len: tokens in a row, markers included, at least 2. Packed rows keep their own length.
        rows: rows per batch.
        bos: begin rows with BOS; wrong only for models trained without it.
        separator: between documents of a row: "bos", "eos", an id, or None. "auto": BOS with `bos`, else EOS.
        document_start: before every document: as `separator`.
        whole_documents: do not join documents: each row is the beginning of one; those too short for a row are left
            out.
        column: of a dataset; None takes the first known one.
        repeat: begin the next epoch at the end, without limit; an iterator cannot and ends.
        shuffle_seed: of a random order of documents (or packed rows), a new one every epoch; None keeps their order.
            Not for iterables, which shuffle themselves.

    Returns:
        An iterator over int64 ids `[rows, ctx_len]` on the CPU, with `state()` and `restore()`; the last batch may be
        smaller. Memory: 64 documents and one batch.

    Raises:
        TypeError: for a single string, or an unknown kind of document.
        ValueError: for a marker that the tokenizer does not have; for ctx_len < 2.

    Example:
        >>> import saewb
        >>> tokens = stream_tokens(["A cat.", "A dog sat."], saewb.load_model("tiny").tokenizer, ctx_len=4)
        >>> next(tokens)[:, 0].tolist()
        [0, 0]
    """
    if rows < 1:
        raise ValueError(explain(f"got rows={rows}.", want="1 or more rows in a batch", fix="rows=32"))
    if isinstance(documents, TokenStream):
        fix = "tokens=documents, without ctx_len and the like"
        raise TypeError(explain("stream_tokens got a TokenStream.", want="documents", fix=fix))
    if (matrix := token_matrix(documents)) is not None:
        check_token_ids(matrix, min_length=1)
        return TokenStream(_MatrixRows(matrix, repeat, shuffle_seed), rows, matrix.shape[1])
    row_start = _marker_id("bos", tokenizer, "bos=False") if bos else None
    if separator == "auto":
        separator = row_start if bos else getattr(tokenizer, "eos_token_id", None)
    between = _marker_id(separator, tokenizer, "separator=None")
    start = _marker_id(document_start, tokenizer, "document_start=None")
    packer = Packer(ctx_len, row_start, between, start, whole_documents)
    cursor = Documents(documents, repeat=repeat, seed=shuffle_seed)
    cursor.check(tokenizer, column)
    return TokenStream(_PackedRows(cursor, packer, tokenizer, column), rows, ctx_len)


@final
class TokenStream:
    """Resumable batches of token rows: the result of `stream_tokens`.

    `state()` is small and exact: the position in the documents, and the row being filled. `restore()` seeks without
    tokenizing what came before, and without reading it where documents are indexable or a dataset can skip.
    """

    def __init__(self, source: _MatrixRows | _PackedRows, rows: int, ctx_len: int) -> None:
        self._source, self.rows, self.ctx_len = source, rows, ctx_len

    def __iter__(self) -> Iterator[Int[Tensor, "rows ctx"]]:
        return self

    def __next__(self) -> Int[Tensor, "rows ctx"]:
        return self._source.batch(self.rows)

    @property
    def repeats(self) -> bool:
        """Whether it begins again at the end, without limit."""
        return self._source.repeats

    @property
    def matrix(self) -> Int[Tensor, "rows ctx"] | None:
        """All its rows, if it was made from packed ones."""
        return self._source.ids if isinstance(self._source, _MatrixRows) else None

    @property
    def n_unfinished(self) -> int:
        """Tokens of the row that is being filled."""
        return 0 if isinstance(self._source, _MatrixRows) else self._source.n_unfinished

    @property
    def epoch(self) -> int:
        """Number of complete passes over the documents."""
        return self._source.epoch

    def digest(self) -> str | None:
        """Digest of its rows from where it stands on: of the documents, and how they are tokenized and packed.

        None for an iterator over documents, which cannot be looked at; of an iterable that is no list, file or dataset,
        64 documents count.
        """
        content = self._source.digest()
        return None if content is None else values_digest([content, self.ctx_len, self._source.state()])

    def state(self) -> dict[str, Any]:
        """Position in the documents: numbers and a list of ids."""
        return self._source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`, over the same documents with the same options."""
        self._source.restore(state)


@dataclass
class StreamPosition:
    """Position of a group of documents, and the number of its rows that were taken."""

    epoch: int = 0
    """Complete passes over the documents."""
    document: int = 0
    """Index of the group's first document in its epoch."""
    unfinished: tuple[int, ...] = ()
    """Token ids of the row that was being filled when the group began."""
    rows_given: int = 0
    """Rows of the group that were taken."""


class _PackedRows:
    """Rows packed from documents, tokenized group by group."""

    def __init__(self, documents: Documents, packer: Packer, tokenizer: Any, column: str | None) -> None:
        self._documents, self._packer, self._tokenizer, self._column = documents, packer, tokenizer, column
        self._position = StreamPosition()
        self._rows: Iterator[list[int]] = iter(())
        self._n_rows, self._size_at_epoch = 0, (-1, -1)

    @property
    def repeats(self) -> bool:
        return self._documents.repeats

    @property
    def n_unfinished(self) -> int:
        return len(self._packer.unfinished)

    @property
    def epoch(self) -> int:
        return self._documents.epoch

    def batch(self, n: int) -> Tensor:
        batch: list[list[int]] = []
        while len(batch) < n:
            rows = list(itertools.islice(self._rows, n - len(batch)))
            self._position.rows_given += len(rows)
            self._n_rows += len(rows)
            batch += rows
            if len(batch) < n and not self._next_group():
                break
        if not batch:
            raise StopIteration
        return torch.tensor(batch, dtype=torch.int64)

    def _next_group(self) -> bool:
        group = encode(self._documents.take(_GROUP), self._tokenizer, self._column)
        first = self._documents.n_yielded - len(group)
        if first == 0 and group:
            self._check_progress()
        self._position = StreamPosition(self._documents.epoch, first, tuple(self._packer.unfinished))
        self._rows = (row for document in group for row in self._packer.rows(document))
        return bool(group)

    def _check_progress(self) -> None:
        """Refuse to repeat documents without end if a whole epoch added no token."""
        size = (self._n_rows, len(self._packer.unfinished))
        if self._documents.epoch > 0 and size == self._size_at_epoch:
            what = f"all documents together gave no token for rows of {self._packer.ctx_len}."
            want = "documents with tokens; with whole_documents, some of at least ctx_len - 1"
            raise ValueError(explain(what, want=want))
        self._size_at_epoch = size

    def digest(self) -> str | None:
        if (of_documents := self._documents.digest()) is None:
            return None
        packer, first = self._packer, self._documents.first(_GROUP)
        markers = [packer.row_start, packer.separator, packer.document_start, packer.whole, self._column]
        vocabulary = getattr(self._tokenizer, "get_vocab", dict)()
        ids = encode(first, self._tokenizer, self._column)  # by which tokenizers of one vocabulary differ
        return values_digest([of_documents, markers, values_digest(vocabulary), ids])

    def state(self) -> dict[str, Any]:
        return {**asdict(self._position), "unfinished": list(self._position.unfinished)}

    def restore(self, state: dict[str, Any]) -> None:
        self._documents.seek(state["epoch"], state["document"])
        self._packer.unfinished = list(state["unfinished"])
        self._next_group()
        self._position.rows_given = len(list(itertools.islice(self._rows, state["rows_given"])))


class _MatrixRows:
    """Rows of a matrix of token ids."""

    def __init__(self, ids: Tensor, repeat: bool, seed: int | None) -> None:
        self.ids, self.repeats = ids, repeat
        self._cursor = EpochCursor(len(ids), seed)

    @property
    def epoch(self) -> int:
        return self._cursor.epoch

    def batch(self, n: int) -> Tensor:
        return self.ids[self._cursor.take(n, repeat=self.repeats)].long()

    def digest(self) -> str:
        return values_digest([tensor_digest(self.ids.long()), self._cursor.seed])

    def state(self) -> dict[str, Any]:
        return self._cursor.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._cursor.restore(state)


def _marker_id(marker: Marker, tokenizer: Any, fix: str) -> int | None:
    if marker is None or (isinstance(marker, int) and not isinstance(marker, bool)):
        return marker
    if marker not in ("bos", "eos"):
        raise ValueError(explain(f"got the marker {marker!r}.", want="'bos', 'eos', an id, or None", fix=fix))
    token_id = getattr(tokenizer, f"{marker}_token_id", None)
    if token_id is None:
        what = f"this tokenizer has no {marker.upper()} token." if tokenizer is not None else "there is no tokenizer."
        raise ValueError(explain(what, want=f"an id for {marker!r}, or none", fix=fix))
    return token_id


def token_matrix(tokens: Any) -> Tensor | None:
    """Packed rows of torch or numpy as a tensor on the CPU; None for documents."""
    if isinstance(tokens, Tensor):
        return tokens.detach().cpu()
    if type(tokens).__module__ == "numpy" and tokens.ndim == 2:
        return torch.from_numpy(tokens.copy())
    return None


def check_token_ids(ids: Tensor, *, min_length: int) -> None:
    """Check that a tensor holds integer rows of at least `min_length` tokens."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(explain(f"got tokens of {ids.dtype}.", want="integer token ids, [rows, ctx]"))
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < min_length:
        rows = "a row or more" if min_length < 2 else "rows of at least two tokens: one to predict the next from"
        raise ValueError(explain(f"got tokens of shape {tuple(ids.shape)}.", want=f"[rows, ctx], with {rows}"))
