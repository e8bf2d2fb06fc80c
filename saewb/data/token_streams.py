"""Rows of tokens from documents of any kind and number, a batch of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from saewb.data.documents import Documents, encoded
from saewb.data.orders import shuffled
from saewb.data.packing import Packer
from saewb.errors import explain

_GROUP = 64  # documents tokenized at once

Marker = Literal["bos", "eos"] | int | None


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
    """Rows of `ctx_len` tokens from documents of any kind, however many: they are read as rows are asked for.

    The rows are those of `saewb.pack`: documents end to end, BOS at the start of every row and document; or without
    BOS, with EOS between documents where there is one. A matrix of token ids is taken as rows that are ready.

    Args:
        documents: texts, chats (lists of messages with "role" and "content"), or token ids; as a list, a dataset, any
            iterable, or `saewb.TextFiles`. Or rows that are ready: int ids `[rows, ctx_len]`. A dataset's rows are
            dictionaries; `saewb.data.documents.COLUMNS` says which columns are looked for.
        tokenizer: of the model; not needed for token ids, unless for their markers.
        ctx_len: tokens in a row, markers included, at least 2. Rows that are ready keep their own length.
        rows: rows in a batch.
        bos: whether rows begin with BOS; wrong only for models that were trained without.
        separator: between documents of a row: "bos", "eos", an id, or None. "auto": BOS with `bos`, else EOS.
        document_start: before every document: as `separator`.
        whole_documents: joins no documents: each row is the beginning of one; those too short for a row are left out.
        column: of a dataset; None finds it.
        repeat: begins again at the end, for ever; an iterator cannot and ends.
        shuffle_seed: of a random order of documents (or of rows that are ready), another one each time round; None
            keeps their order. Not for iterables, which shuffle themselves.

    Returns:
        An iterator over int64 ids `[rows, ctx_len]` on the CPU, the last batch perhaps smaller, with `state()` and
        `restore()`. Memory: 64 documents and one batch.

    Raises:
        TypeError: for one string, or what is no document.
        ValueError: for a marker that the tokenizer does not have; for ctx_len < 2.

    Example:
        >>> import saewb
        >>> tokens = stream_tokens(["A cat.", "A dog sat."], saewb.load_model("tiny").tokenizer, ctx_len=4)
        >>> next(tokens)[:, 0].tolist()
        [0, 0]
    """
    if rows < 1:
        raise ValueError(explain(f"got rows={rows}.", want="1 or more rows in a batch", fix="rows=32"))
    if isinstance(documents, Tensor) and documents.ndim == 2:
        return TokenStream(_Ready(_checked(documents), repeat, shuffle_seed), rows, documents.shape[1])
    mark = _id("bos", tokenizer, "bos=False") if bos else None
    between = (mark if bos else getattr(tokenizer, "eos_token_id", None)) if separator == "auto" else separator
    between = _id(between, tokenizer, "separator=None")
    packer = Packer(ctx_len, mark, between, _id(document_start, tokenizer, "document_start=None"), whole_documents)
    cursor = Documents(documents, repeat=repeat, seed=shuffle_seed)
    return TokenStream(_Packed(cursor, packer, tokenizer, column), rows, ctx_len)


@final
class TokenStream:
    """Batches of token rows; made by `stream_tokens`.

    `state()` is small and exact: where it is in the documents, and the row that was being filled. `restore()` goes
    there without tokenizing what was given, and without reading it where documents have numbers or a dataset can skip.
    """

    def __init__(self, source: _Ready | _Packed, rows: int, ctx_len: int) -> None:
        self._source, self.rows, self.ctx_len = source, rows, ctx_len

    def __iter__(self) -> Iterator[Int[Tensor, "rows ctx"]]:
        return self

    def __next__(self) -> Int[Tensor, "rows ctx"]:
        return self._source.batch(self.rows)

    @property
    def epoch(self) -> int:
        """How often the documents have been gone through."""
        return self._source.epoch

    def state(self) -> dict[str, Any]:
        """Numbers and a list of ids."""
        return self._source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`, over the same documents with the same options."""
        self._source.restore(state)


@dataclass
class _Place:
    """Where a group of documents begins, and how far we are in it."""

    epoch: int = 0
    document: int = 0
    unfinished: tuple[int, ...] = ()  # the row that was being filled when the group began
    rows_given: int = 0  # of the group


class _Packed:
    """Rows from documents."""

    def __init__(self, documents: Documents, packer: Packer, tokenizer: Any, column: str | None) -> None:
        self._documents, self._packer, self._tokenizer, self._column = documents, packer, tokenizer, column
        self._place = _Place()
        self._rows: Iterator[list[int]] = iter(())
        self._n_rows, self._reached = 0, (-1, -1)

    @property
    def epoch(self) -> int:
        return self._documents.epoch

    def batch(self, n: int) -> Tensor:
        got: list[list[int]] = []
        while len(got) < n:
            more = list(itertools.islice(self._rows, n - len(got)))
            self._place.rows_given += len(more)
            self._n_rows += len(more)
            got += more
            if len(got) < n and not self._next_group():
                break
        if not got:
            raise StopIteration
        return torch.tensor(got, dtype=torch.int64)

    def _next_group(self) -> bool:
        group = encoded(self._documents.take(_GROUP), self._tokenizer, self._column)
        begins = self._documents.given - len(group)
        if begins == 0 and group:
            self._check_progress()
        self._place = _Place(self._documents.epoch, begins, tuple(self._packer.unfinished))
        self._rows = (row for document in group for row in self._packer.rows(document))
        return bool(group)

    def _check_progress(self) -> None:
        """At the start of each time round: documents that add nothing would be repeated for ever."""
        reached = (self._n_rows, len(self._packer.unfinished))
        if self._documents.epoch > 0 and reached == self._reached:
            want = "documents with tokens; with whole_documents, some of at least ctx_len - 1"
            raise ValueError(
                explain(f"all documents together gave no token for rows of {self._packer.ctx_len}.", want=want)
            )
        self._reached = reached

    def state(self) -> dict[str, Any]:
        return {**asdict(self._place), "unfinished": list(self._place.unfinished)}

    def restore(self, state: dict[str, Any]) -> None:
        self._documents.seek(state["epoch"], state["document"])
        self._packer.unfinished = list(state["unfinished"])
        self._next_group()
        self._place.rows_given = len(list(itertools.islice(self._rows, state["rows_given"])))


class _Ready:
    """Rows that are there."""

    def __init__(self, ids: Tensor, repeat: bool, seed: int | None) -> None:
        self._ids, self._repeat, self._seed = ids, repeat, seed
        self.restore({"epoch": 0, "at": 0})

    def batch(self, n: int) -> Tensor:
        if self._at >= len(self._ids):
            if not self._repeat:
                raise StopIteration
            self.restore({"epoch": self.epoch + 1, "at": 0})
        which = slice(self._at, self._at + n)
        self._at += n
        return (self._ids[which] if self._order is None else self._ids[self._order[which]]).long()

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self._at}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self._at = state["epoch"], state["at"]
        self._order = None if self._seed is None else shuffled(len(self._ids), self._seed, self.epoch)


def _id(marker: Marker, tokenizer: Any, fix: str) -> int | None:
    if marker is None or (isinstance(marker, int) and not isinstance(marker, bool)):
        return marker
    if marker not in ("bos", "eos"):
        raise ValueError(explain(f"got the marker {marker!r}.", want="'bos', 'eos', an id, or None", fix=fix))
    found = getattr(tokenizer, f"{marker}_token_id", None)
    if found is None:
        what = f"this tokenizer has no {marker.upper()} token." if tokenizer is not None else "there is no tokenizer."
        raise ValueError(explain(what, want=f"an id for {marker!r}, or none", fix=fix))
    return found


def _checked(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(explain(f"got tokens of {ids.dtype}.", want="integer token ids, [rows, ctx]"))
    if ids.shape[0] == 0 or ids.shape[1] < 1:
        raise ValueError(explain(f"got tokens of shape {tuple(ids.shape)}.", want="[rows, ctx] with a row or more"))
    return ids.detach().cpu()
