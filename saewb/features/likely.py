"""Which contexts may have a text in them, told from pairs of tokens, without spelling them out.

The first token that a match touches has all of the text, or ends with its first k letters, and then the next token
goes on where that one stops. So a context without such a token or pair cannot have it. Both sides are bits of one
number per token, bit k for k letters: a look at all pairs of all contexts is two look-ups and an "and".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saewb.features.token_texts import Words

_LETTERS = 60  # of the text that are looked at: the bits of an int64


class Likely:
    """Finds contexts worth spelling out; it may name too many, never too few.

    Tokens that are not ASCII (other case folding, parts of characters) may be anything, and so may unknown ones.

    Example:
        >>> words = Words({1: " Par", 2: "is", 3: " in"})
        >>> Likely("paris", words).contexts(torch.tensor([[[3, 1, 2], [2, 1, 3]]]))
        tensor([[ True, False]])
    """

    def __init__(self, text: str, words: Words) -> None:
        size = max(words.strings, default=0) + 2  # the last one stands for all that are unknown
        cut = range(1, min(len(text), _LETTERS))
        anything = sum(1 << k for k in cut)
        self.has = torch.ones(size, dtype=torch.bool)
        self.ends, self.goes_on = torch.full((size,), anything), torch.full((size,), anything)
        asked = text.lower()
        starts, rests = [asked[:k] for k in cut], [asked[k:] for k in cut]
        for token, string in words.strings.items():
            said = string.lower()
            if not string.isascii() or not said or not text.isascii():
                continue
            self.has[token] = asked in said
            self.ends[token] = sum(1 << k for k, s in zip(cut, starts, strict=True) if said.endswith(s))
            on = (k for k, r in zip(cut, rests, strict=True) if r.startswith(said) or said.startswith(r))
            self.goes_on[token] = sum(1 << k for k in on)

    def contexts(self, ids: Int[Tensor, "latents slots window"]) -> Bool[Tensor, "latents slots"]:
        """Those that may have it; -1 is no token."""
        token = ids.clamp(-1, len(self.has) - 1).long().where(ids >= 0, 0)
        there = ids >= 0
        whole = (self.has[token] & there).any(2)
        pairs = (self.ends[token[..., :-1]] & self.goes_on[token[..., 1:]]) != 0
        return whole | (pairs & there[..., :-1] & there[..., 1:]).any(2)
