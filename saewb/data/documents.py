"""Documents to tokenize: texts, chats or token ids, from memory, files or datasets.

All documents are of the kind of the first one:

- a text;
- a chat: a list of messages, dictionaries with "role" and "content", which go through the tokenizer's chat template;
- token ids: a list, an array or a tensor of integers;
- a row of a dataset: a dictionary with one of these in a column, see `COLUMNS`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from saewb._files import absolute
from saewb.errors import explain
from saewb.fingerprint import files_digest, texts_digest, values_digest

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
        self._n, self.seed = n, seed
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
        self._order = None if self.seed is None else epoch_order(self._n, self.seed, self.epoch)


@final
class TextFiles:
    """Documents in text files, in order, read block by block, so that files may be of any size.

    Args:
        paths: UTF-8 files, `.gz` ones too; one path, or several.
        separator: between two documents, e.g. a blank line; None makes one document of each file. Documents are
            stripped of white space, and empty ones left out.

    Raises:
        FileNotFoundError: for a path that is not a file.
        ValueError: for an empty separator.

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
        if separator == "":
            what = "TextFiles got separator=''."
            raise ValueError(explain(what, want="text between two documents, or None for a document per file"))
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(explain(f"{str(path)!r} is not a file.", want="text files, UTF-8 or gzipped"))

    def digest(self) -> str:
        """Digest of the content of the files, in their order, and of the separator."""
        suffixes = [path.suffix == ".gz" for path in self.paths]
        return values_digest([files_digest(self.paths), suffixes, self.separator])

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
            pieces: list[str] = []  # of the document so far, joined once: it may be the whole file
            tail = ""  # the last letters read, which may begin a separator
            while block := file.read(2**20):
                first, *others = (tail + block).split(self.separator)
                if others:
                    yield "".join((*pieces, first))
                    yield from others[:-1]
                    pieces = []
                rest = others[-1] if others else first
                cut = max(0, len(rest) - len(self.separator) + 1)
                pieces.append(rest[:cut])
                tail = rest[cut:]
            yield "".join((*pieces, tail))


@final
class Documents:
    """Resumable cursor over documents, for one epoch or several.

    Args:
        source: a list, a dataset (anything with `__getitem__` and `__len__`, or `__iter__`), an iterable or iterator.
        repeat: begin the next epoch at the end; an iterator cannot, and ends.
        seed: of a random order, a new one every epoch; only for documents that can be indexed.
    """

    def __init__(self, source: Any, *, repeat: bool, seed: int | None) -> None:
        source = _check_source(source)
        self._source, self.repeats, self._seed = source, repeat, seed
        self._indexable = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if seed is not None and not self._indexable:
            what = f"a {type(source).__name__} cannot be shuffled: its documents have no index."
            raise ValueError(explain(what, want="a list, or an iterable that shuffles itself", fix="shuffle_seed=None"))
        self.epoch = self.n_yielded = 0  # complete epochs; documents of the current one
        self._open(0)

    def check(self, tokenizer: Any, column: str | None) -> None:
        """Check the documents in memory, or else the first one, before anything is computed; none is taken.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        if isinstance(self._source, (list, tuple)):
            if not set(map(type, self._source)) <= {str} or tokenizer is None:
                kind, documents = _resolve(self._source, tokenizer, column)
                for document in documents if kind == "ids" else ():
                    _whole_ids(document)
            return
        first = list(itertools.islice(self._documents, 1))
        if iter(self._source) is self._source:
            self._source = itertools.chain(first, self._source)
            self._open(0)
        else:
            self._documents = itertools.chain(first, self._documents)
        if first:
            _resolve(first, tokenizer, column)

    def digest(self) -> str | None:
        """Digest of the documents: of all in memory or in files, of 64 of other ones; None for an iterator."""
        source = self._source
        if self._is_iterator:
            return None
        if isinstance(source, TextFiles):
            content: Any = source.digest()
        elif isinstance(source, (list, tuple)):
            content = texts_digest(source)
        elif isinstance(known := getattr(source, "_fingerprint", None), str):  # of Hugging Face's datasets
            content = known
        elif self._indexable:
            n = len(source)
            content = [n, texts_digest(source[i * (n - 1) // 63] for i in range(64))]
        else:
            content = texts_digest(self.first(64))
        return values_digest([content, self._seed])

    def first(self, n: int) -> list[Any]:
        """The first documents in the order of the source; none is taken. Not of an iterator."""
        return list(itertools.islice(self._source, n))

    @property
    def _is_iterator(self) -> bool:
        return not self._indexable and iter(self._source) is self._source

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
        if not self.repeats or self._is_iterator or self.n_yielded == 0:
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


def _check_source(source: Any) -> Any:
    """Documents as something to iterate over; a Series as the list of its values."""
    if isinstance(source, (str, bytes, Path)):
        is_file = len(str(source)) < 1000 and Path(str(source)).expanduser().is_file()
        what = (
            "got one string." if isinstance(source, (str, bytes)) and not is_file else f"got the path {str(source)!r}."
        )
        fix = f"saewb.TextFiles({str(source)!r})" if is_file or isinstance(source, Path) else "[text]"
        raise TypeError(explain(what, want="a list of documents", fix=fix))
    if hasattr(source, "columns") and hasattr(source, "dtypes"):  # of pandas or polars
        columns = [str(column) for column in source.columns]
        known = next((column for column in COLUMNS if column in columns), columns[0] if columns else "text")
        raise TypeError(explain("got a DataFrame for documents.", want="one column of it", fix=f"table[{known!r}]"))
    if isinstance(source, Mapping) or not hasattr(source, "__iter__"):
        what = f"got a {type(source).__name__} for documents."
        split = next(iter(source), None) if isinstance(source, Mapping) else None
        fix = f"documents[{split!r}]" if isinstance(split, str) else ""
        raise TypeError(explain(what, want="texts, token ids or chats: a list, a dataset or any iterable", fix=fix))
    if hasattr(source, "iloc"):  # would be indexed by label
        source = source.tolist()
    if hasattr(source, "__len__") and len(source) == 0:
        raise ValueError(explain("got no documents.", want="at least one"))
    return source


def encode(documents: Sequence[Any], tokenizer: Any, column: str | None = None) -> list[list[int]]:
    """Token ids of documents of one kind, without the special tokens that a tokenizer adds to a text.

    Raises:
        TypeError: for an unknown kind of document, or documents of two kinds.
        ValueError: without a tokenizer where one is needed; for a dataset without a known column.
    """
    if not documents:
        return []
    kind, documents = _resolve(documents, tokenizer, column)
    if kind == "ids":
        return [_whole_ids(document) for document in documents]
    if kind == "text":
        return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in documents]


def _resolve(documents: Sequence[Any], tokenizer: Any, column: str | None) -> tuple[str, list[Any]]:
    """Kind of these documents, and they themselves, out of the rows of a dataset."""
    documents = list(documents)
    if isinstance(documents[0], Mapping):
        name = _column(documents[0], column)
        if others := [d for d in documents if not isinstance(d, Mapping) or name not in d]:
            raise TypeError(explain(f"got {_short(others[0])} among rows with a column {name!r}.", want="such rows"))
        documents = [document[name] for document in documents]
    kinds = {_kind(document) for document in documents}
    if len(kinds) > 1 or None in kinds:
        odd = next(d for d in documents if _kind(d) is None or _kind(d) != _kind(documents[0]))
        fix = "[document.text for document in documents]" if type(odd).__name__ == "Document" else ""
        fix = f"saewb.TextFiles([{str(odd)!r}, ...])" if isinstance(odd, Path) else fix
        what = f"got {_short(odd)} among the documents."
        raise TypeError(explain(what, want="all texts, all token ids, or all chats", fix=fix))
    kind = kinds.pop()
    if kind != "ids" and tokenizer is None:
        raise ValueError(explain(f"no tokenizer for a {kind}.", want="token ids, or a tokenizer", fix="tokenizer=..."))
    if kind == "chat" and getattr(tokenizer, "chat_template", None) is None:
        what, fix = "this tokenizer has no chat template.", "tokenizer.chat_template = ..."
        raise ValueError(explain(what, want="texts, or a tokenizer of a chat model", fix=fix))
    return kind, documents


def _short(document: Any) -> str:
    text = repr(document)
    return f"a {type(document).__name__}" + (f", {text}," if document is not None and len(text) <= 40 else "")


def _whole_ids(document: Any) -> list[int]:
    ids = document.tolist() if hasattr(document, "tolist") else document
    try:
        return list(map(operator.index, ids))
    except TypeError:
        raise TypeError(explain(f"got {_short(ids)} for token ids.", want="whole numbers")) from None


def _kind(document: Any) -> str | None:
    if isinstance(document, str):
        return "text"
    if isinstance(document, Tensor) or hasattr(document, "__array__"):
        return "ids" if document.ndim == 1 and "int" in str(document.dtype).lower() else None
    if not isinstance(document, Sequence) or isinstance(document, (bytes, bytearray, memoryview)):
        return None  # bytes are a sequence of integers, but no token ids
    if len(document) == 0 or (isinstance(document[0], Integral) and not isinstance(document[0], bool)):
        return "ids"
    return "chat" if isinstance(document[0], Mapping) and "role" in document[0] else None


def _column(row: Mapping[str, Any], column: str | None) -> str:
    names = [column] if column is not None else [name for name in COLUMNS if name in row]
    if not names or names[0] not in row:
        what = f"no column {column!r}" if column is not None else "no known column of texts, tokens or messages"
        columns = ", ".join(map(repr, row))
        text = next((c for c, value in row.items() if isinstance(value, str)), next(iter(row), "text"))
        fix = f"[row[{text!r}] for row in documents]"
        raise ValueError(
            explain(f"{what} in a dataset with {columns}.", want=f"one of these, or column={columns}", fix=fix)
        )
    return names[0]
