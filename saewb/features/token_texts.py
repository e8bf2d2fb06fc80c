"""The strings of a tokenizer that an index needs, kept with it so that it opens without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from saewb.models.tokenizer import token_strings

_ROWS = 2**14  # contexts looked at at a time
_OPEN = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True, eq=False)
class Words:
    """The text of token ids.

    Most tokens have one text wherever they stand. Those that are parts of a character do not: a run of such tokens is
    spelled as a whole (`saewb.token_strings`).

    Example:
        >>> Words({7: " sun", 1: "\\ufffd", 2: "\\ufffd"}, {(1, 2): ("", "🙂")}).spelled([7, 1, 2, 9])
        [' sun', '', '🙂', '<9>']
    """

    strings: dict[int, str] = field(default_factory=dict)  # by id; parts of characters have "\\ufffd" in them
    runs: dict[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict)  # of parts of characters

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """The text of each of these tokens, which follow one another."""
        out: list[str] = []
        for is_open, group in groupby(ids, key=lambda i: _OPEN in self.strings.get(i, "")):
            run = tuple(group)
            out += self.runs.get(run, ()) if is_open and run in self.runs else map(self.of, run)
        return out

    def of(self, token: int) -> str:
        """The text of one token by itself."""
        return self.strings.get(token, f"<{token}>")

    def merged(self, other: Words) -> Words:
        """The strings of both."""
        return Words(self.strings | other.strings, self.runs | other.runs)


def words_of(tokenizer: Any, contexts: Iterable[Tensor], single: Iterable[Tensor]) -> Words:
    """The strings of all tokens in these contexts (`[..., window]`, -1 for none) and of these single ids."""
    contexts = [c.reshape(-1, c.shape[-1]) for c in contexts]
    used = torch.cat([_used(t) for t in (*contexts, *single)] or [torch.zeros(0, dtype=torch.long)]).unique()
    if tokenizer is None:
        return Words()
    strings = _strings(tokenizer, used[used >= 0].tolist())
    opened = torch.tensor([i for i, text in strings.items() if _OPEN in text], dtype=torch.int32)
    runs: dict[tuple[int, ...], tuple[str, ...]] = {}
    for windows in (part for c in contexts for part in c.split(_ROWS)) if len(opened) else ():
        for row in windows[torch.isin(windows.cpu(), opened).any(1)].tolist():
            for is_open, group in groupby(row, key=lambda i: _OPEN in strings.get(i, "")):
                run = tuple(group)
                if is_open and run not in runs:
                    runs[run] = tuple(token_strings(tokenizer, run))
    return Words(strings, runs)


def _used(ids: Tensor) -> Tensor:
    # A tile at a time: `unique` of 40 million ids at once would take a copy of them in int64.
    parts = [part.unique().long().cpu() for part in ids.flatten().split(2**20)]
    return torch.cat(parts or [torch.zeros(0, dtype=torch.long)])


def _strings(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    def decode(*tokens: int) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # After another token: some decoders drop the space of a text's first one.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = decode(*anchor)
    texts = {i: decode(*anchor, i) for i in ids}
    return {i: text[len(before) :] if text.startswith(before) else decode(i) for i, text in texts.items()}
