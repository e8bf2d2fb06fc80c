"""Texts of the tokens of an index, stored with it so that it opens without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from saewb.models.tokenizer import single_texts, token_strings

MAX_TOKEN_ID = 2**22
"""No vocabulary has so many tokens; tables by token id take 8 bytes for each up to the largest."""
_ROWS = 2**14  # contexts decoded at a time
_PARTIAL = "\ufffd"  # text of a token that is part of a character


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """Texts of token ids.

    Most tokens have the same text in every context. Parts of characters do not: a run of such tokens is decoded as a
    whole (`saewb.token_strings`).

    Example:
        >>> TokenTexts({7: " sun", 1: "\\ufffd", 2: "\\ufffd"}, {(1, 2): ("", "🙂")}).decode([7, 1, 2, 9])
        [' sun', '', '🙂', '<9>']
    """

    strings: dict[int, str] = field(default_factory=dict)
    """Text by token id; that of a part of a character contains U+FFFD."""
    runs: dict[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict)
    """Texts by ids, for runs of parts of characters."""

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Decode consecutive tokens, each to its text."""
        texts = list(map(self.decode_token, ids))
        if _PARTIAL not in "".join(texts):
            return texts
        texts.clear()
        for is_partial, group in groupby(ids, key=lambda i: _PARTIAL in self.strings.get(i, "")):
            run = tuple(group)
            texts += self.runs.get(run, ()) if is_partial and run in self.runs else map(self.decode_token, run)
        return texts

    def decode_token(self, token: int) -> str:
        """Decode a single token."""
        return self.strings.get(token, f"<{token}>")

    def merge(self, other: TokenTexts) -> TokenTexts:
        """Merge with the texts of another index."""
        return TokenTexts(self.strings | other.strings, self.runs | other.runs)


def collect_token_texts(tokenizer: Any, contexts: Iterable[Tensor], single: Iterable[Tensor]) -> TokenTexts:
    """Decode all tokens in these contexts (`[..., window]`, -1 for none) and these single ids."""
    contexts = [c.reshape(-1, c.shape[-1]) for c in contexts]
    used = torch.cat([_unique_ids(t) for t in (*contexts, *single)] or [torch.zeros(0, dtype=torch.long)]).unique()
    if tokenizer is None:
        return TokenTexts()
    strings = single_texts(tokenizer, used[used >= 0].tolist(), inside=True)
    partial = torch.tensor([i for i, text in strings.items() if _PARTIAL in text], dtype=torch.int32)
    runs: dict[tuple[int, ...], tuple[str, ...]] = {}
    for windows in (part for c in contexts for part in c.split(_ROWS)) if len(partial) else ():
        for row in windows[torch.isin(windows.cpu(), partial).any(1)].tolist():
            for is_partial, group in groupby(row, key=lambda i: _PARTIAL in strings.get(i, "")):
                run = tuple(group)
                if is_partial and run not in runs:
                    runs[run] = tuple(token_strings(tokenizer, run))
    return TokenTexts(strings, runs)


def _unique_ids(ids: Tensor) -> Tensor:
    # A tile at a time: `unique` of 40 million ids at once would copy them to int64.
    parts = [part.unique().long().cpu() for part in ids.flatten().split(2**20)]
    return torch.cat(parts or [torch.zeros(0, dtype=torch.long)])
