"""Where tokens come from: texts, chats, token ids, in memory, in files, in datasets. One document at a time.

What a document may be, told by its first one:

- a text;
- a chat: a list of messages, dictionaries with "role" and "content", which go through the tokenizer's chat template;
- token ids: a list, an array or a tensor of integers;
- a row of a dataset: a dictionary with one of these under a column, see `COLUMNS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from torch import Tensor

from saewb.data.orders import shuffled
from saewb.errors import explain

COLUMNS = ("input_ids", "tokens", "messages", "conversations", "conversation", "text", "content", "problem")


@final
class TextFiles:
    """Documents read from text files, in their order, a block at a time: files of any size.

    Args:
        paths: UTF-8 files, `.gz` ones too; one path, or several.
        separator: what stands between two documents, e.g. a blank line; None makes one document of each file. Empty
            documents are left out, and blanks at their ends.

    Raises:
        FileNotFoundError: for a path that is no file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("One cat.\\n\\nTwo dogs.\\n")
        >>> list(TextFiles(path))
        ['One cat.', 'Two dogs.']
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], separator: str | None = "\n\n") -> None:
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.separator = separator
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(explain(f"{str(path)!r} is no file.", want="text files, UTF-8 or gzipped"))

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            yield from filter(None, (text.strip() for text in self._pieces(path)))

    def _pieces(self, path: Path) -> Iterator[str]:
        import gzip

        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
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
    """A cursor over documents, time round after time round if asked to.

    Args:
        source: a list, a dataset (anything with `__getitem__` and `__len__`, or `__iter__`), an iterable or iterator.
        repeat: begins again at its end; an iterator cannot, and ends.
        seed: of a random order, another one each time round; only where documents can be had by number.
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
        self._numbered = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if seed is not None and not self._numbered:
            what = f"a {type(source).__name__} cannot be shuffled: its documents have no numbers."
            raise ValueError(explain(what, want="a list, or an iterable that shuffles itself", fix="shuffle_seed=None"))
        self.epoch = self.given = 0  # times round that are over; documents of this one
        self._open(0)

    def take(self, n: int) -> list[Any]:
        """The next documents, at most `n`, of one time round; none at the end."""
        taken = list(itertools.islice(self._documents, n))
        if not taken and self._again():
            taken = list(itertools.islice(self._documents, n))
        self.given += len(taken)
        return taken

    def seek(self, epoch: int, given: int) -> None:
        """Go to that document without reading those before it where they have numbers, or where a dataset can skip."""
        self.epoch, self.given = epoch, given
        self._open(given)

    def _again(self) -> bool:
        once = iter(self._source) is self._source
        if not self._repeat or once or self.given == 0:
            return False
        self.epoch, self.given = self.epoch + 1, 0
        self._open(0)
        return True

    def _open(self, skip: int) -> None:
        if self._numbered:
            n = len(self._source)
            order: Sequence[int] = range(n) if self._seed is None else shuffled(n, self._seed, self.epoch).tolist()
            self._documents = (self._source[i] for i in order[skip:])
        elif skip and hasattr(self._source, "skip"):
            self._documents = iter(self._source.skip(skip))
        else:
            self._documents = itertools.islice(self._source, skip, None)


def encoded(documents: Sequence[Any], tokenizer: Any, column: str | None = None) -> list[list[int]]:
    """Token ids of documents of one kind, without the special tokens that the tokenizer would add to a text.

    Raises:
        TypeError: for a document that is none, or a text where the first one was something else.
        ValueError: without a tokenizer where one is needed; for a dataset without a column that is known.
    """
    if not documents:
        return []
    if isinstance(documents[0], Mapping):
        name = _column(documents[0], column)
        documents = [document[name] for document in documents]
    kinds = {_kind(document) for document in documents}
    if len(kinds) > 1 or None in kinds:
        odd = next(d for d in documents if _kind(d) is None or _kind(d) != _kind(documents[0]))
        fix = "[document.text for document in documents]" if type(odd).__name__ == "Document" else ""
        what = f"got a {type(odd).__name__} among the documents."
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
        whole = document.ndim == 1 and "int" in str(document.dtype)
        return "ids" if whole else None
    if not isinstance(document, Sequence):
        return None
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
