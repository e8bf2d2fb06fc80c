"""Documents to tokenize: texts, chats or token ids, from memory, files or datasets.

All documents are of the kind of the first one:

- a text;
- a chat: a list of messages, dictionaries with "role" and "content", which go through the tokenizer's chat template;
- token ids: a list, an array or a tensor of integers;
- a row of a dataset: a dictionary with one of these in a column, see `COLUMNS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from saewb._files import absolute
from saewb.errors import explain

COLUMNS = ("input_ids", "tokens", "messages", "conversations", "conversation", "text", "content", "problem")


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Random permutation of 0..n-1 for one epoch, int64; the same for the same seed and epoch.

    Example:
        >>> sorted(epoch_order(5, seed=3, epoch=0).tolist())
        [0, 1, 2, 3, 4]
        >>> bool((epoch_order(99, seed=3, epoch=0) == epoch_order(99, seed=3, epoch=1)).all())
        False
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


@final
class EpochCursor:
    """Resumable cursor over the indices 0..n-1, epoch after epoch.

    Args:
        n: number of indices.
        seed: of a random order, a new one every epoch; None keeps them ascending.
    """

    def __init__(self, n: int, seed: int | None) -> None:
        self._n, self._seed = n, seed
        self.restore({"epoch": 0, "at": 0})

    def take(self, size: int, *, repeat: bool) -> Tensor | slice:
        """The next indices of this epoch, at most `size`; StopIteration at its end unless `repeat`."""
        if self._position >= self._n:
            if not repeat:
                raise StopIteration
            self.restore({"epoch": self.epoch + 1, "at": 0})
        indices = slice(self._position, self._position + size)
        self._position += size
        return indices if self._order is None else self._order[indices]

    def state(self) -> dict[str, Any]:
        """Epoch and position."""
        return {"epoch": self.epoch, "at": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.epoch, self._position = state["epoch"], state["at"]
        self._order = None if self._seed is None else epoch_order(self._n, self._seed, self.epoch)


@final
class TextFiles:
    """Documents in text files, in order, read block by block, so that files may be of any size.

    Args:
        paths: UTF-8 files, `.gz` ones too; one path, or several.
        separator: between two documents, e.g. a blank line; None makes one document of each file. Documents are
            stripped of white space, and empty ones left out.

    Raises:
        FileNotFoundError: for a path that is not a file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("One cat.\\n\\nTwo dogs.\\n")
        >>> list(TextFiles(path))
        ['One cat.', 'Two dogs.']
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], separator: str | None = "\n\n") -> None:
        self.paths = [absolute(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.separator = separator
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(explain(f"{str(path)!r} is not a file.", want="text files, UTF-8 or gzipped"))

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            yield from filter(None, (text.strip() for text in self._split(path)))

    def _split(self, path: Path) -> Iterator[str]:
        import gzip

        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            if self.separator is None:
                yield file.read()
                return
            rest = ""
            while block := file.read(2**20):
                *whole, rest = (rest + block).split(self.separator)
                yield from whole
            yield rest


@final
class Documents:
    """Resumable cursor over documents, for one epoch or several.

    Args:
        source: a list, a dataset (anything with `__getitem__` and `__len__`, or `__iter__`), an iterable or iterator.
        repeat: begin the next epoch at the end; an iterator cannot, and ends.
        seed: of a random order, a new one every epoch; only for documents that can be indexed.
    """

    def __init__(self, source: Any, *, repeat: bool, seed: int | None) -> None:
        if isinstance(source, (str, bytes)):
            raise TypeError(explain("got one string.", want="a list of documents", fix="[text]"))
        if isinstance(source, Mapping) or not hasattr(source, "__iter__"):
            what = f"got a {type(source).__name__} for documents."
            raise TypeError(explain(what, want="texts, token ids or chats: a list, a dataset or any iterable"))
        if hasattr(source, "__len__") and len(source) == 0:
            raise ValueError(explain("got no documents.", want="at least one"))
        self._source, self._repeat, self._seed = source, repeat, seed
        self._indexable = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if seed is not None and not self._indexable:
            what = f"a {type(source).__name__} cannot be shuffled: its documents have no index."
            raise ValueError(explain(what, want="a list, or an iterable that shuffles itself", fix="shuffle_seed=None"))
        self.epoch = self.n_yielded = 0  # complete epochs; documents of the current one
        self._open(0)

    def take(self, n: int) -> list[Any]:
        """The next documents of one epoch, at most `n`; an empty list at the end."""
        batch = list(itertools.islice(self._documents, n))
        if not batch and self._begin_epoch():
            batch = list(itertools.islice(self._documents, n))
        self.n_yielded += len(batch)
        return batch

    def seek(self, epoch: int, n_yielded: int) -> None:
        """Go to a document without reading those before it if the source is indexable or can skip."""
        self.epoch, self.n_yielded = epoch, n_yielded
        self._open(n_yielded)

    def _begin_epoch(self) -> bool:
        if not self._repeat or iter(self._source) is self._source or self.n_yielded == 0:
            return False
        self.seek(self.epoch + 1, 0)
        return True

    def _open(self, skip: int) -> None:
        if self._indexable:
            n = len(self._source)
            order: Sequence[int] = range(n) if self._seed is None else epoch_order(n, self._seed, self.epoch).tolist()
            self._documents = (self._source[i] for i in order[skip:])
        elif skip and hasattr(self._source, "skip"):
            self._documents = iter(self._source.skip(skip))
        else:
            self._documents = itertools.islice(self._source, skip, None)


def encode(documents: Sequence[Any], tokenizer: Any, column: str | None = None) -> list[list[int]]:
    """Token ids of documents of one kind, without the special tokens that a tokenizer adds to a text.

    Raises:
        TypeError: for an unknown kind of document, or documents of two kinds.
        ValueError: without a tokenizer where one is needed; for a dataset without a known column.
    """
    if not documents:
        return []
    if isinstance(documents[0], Mapping):
        name = _column(documents[0], column)
        documents = [document[name] for document in documents]
    kinds = {_kind(document) for document in documents}
    if len(kinds) > 1 or None in kinds:
        other = next(d for d in documents if _kind(d) is None or _kind(d) != _kind(documents[0]))
        fix = "[document.text for document in documents]" if type(other).__name__ == "Document" else ""
        what = f"got a {type(other).__name__} among the documents."
        raise TypeError(explain(what, want="all texts, all token ids, or all chats", fix=fix))
    kind = kinds.pop()
    if kind != "ids" and tokenizer is None:
        raise ValueError(explain(f"no tokenizer for a {kind}.", want="token ids, or a tokenizer", fix="tokenizer=..."))
    if kind == "ids":
        return [[int(i) for i in document] for document in documents]
    if kind == "text":
        return tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in documents]


def _kind(document: Any) -> str | None:
    if isinstance(document, str):
        return "text"
    if isinstance(document, Tensor) or hasattr(document, "__array__"):
        return "ids" if document.ndim == 1 and "int" in str(document.dtype) else None
    if not isinstance(document, Sequence) or isinstance(document, (bytes, bytearray, memoryview)):
        return None  # bytes are a sequence of integers, but no token ids
    if len(document) == 0 or isinstance(document[0], int):
        return "ids"
    return "chat" if isinstance(document[0], Mapping) and "role" in document[0] else None


def _column(row: Mapping[str, Any], column: str | None) -> str:
    names = [column] if column is not None else [name for name in COLUMNS if name in row]
    if not names or names[0] not in row:
        what = f"no column {column!r}" if column is not None else "no known column of texts, tokens or messages"
        want = "column= one of " + ", ".join(map(repr, row))
        raise ValueError(explain(f"{what} in a dataset with {', '.join(map(repr, row))}.", want=want))
    return names[0]
