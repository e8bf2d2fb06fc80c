"""Token ids as the text of each token, whole characters only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxtyping import Int
from torch import Tensor

from saewb.errors import explain


def token_strings(model_or_tokenizer: Any, ids: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
    """The text of each token, such that joined they are the text of all.

    A character whose UTF-8 bytes are spread over several tokens (emoji, rare CJK) stands at the last of them, and the
    earlier ones are empty: decoded one by one, each would be U+FFFD. Bytes that never become a character are U+FFFD, at
    the token after which that is certain. Special tokens are spelled out.

        "".join(token_strings(t, ids)) == t.decode(ids, clean_up_tokenization_spaces=False)

    Args:
        model_or_tokenizer: what `load_model` returned, or a tokenizer.
        ids: token ids of one text.
    Returns:
        As many strings as ids.
    Raises:
        ValueError: if ids have more than one axis.
    Example:
        >>> from saewb.models import load_model
        >>> tokenizer = load_model("tiny", device="cpu").tokenizer
        >>> strings = token_strings(tokenizer, tokenizer("A 🙂 sun", add_special_tokens=False).input_ids)
        >>> "".join(strings), [s.strip() for s in strings if "🙂" in s]
        ('A 🙂 sun', ['🙂'])
    """
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise ValueError(explain(f"token_strings got ids of shape {tuple(ids.shape)}.", want="[pos]", fix="ids[0]"))
        ids = ids.tolist()
    ids = [int(i) for i in ids]
    strings, whole = _pieces(tokenizer, ids), _decode(tokenizer, ids)
    # A decoder that rewrites earlier text when more comes (none known among byte-level ones) gets the slow, sure way.
    return strings if "".join(strings) == whole else _prefix_pieces(tokenizer, ids, whole)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    # What a token adds is the text of a short window with it, less the text of the window without. The window begins
    # one piece early, since some decoders treat the first token of a text differently (a leading space is dropped).
    strings, before, shown = [], 0, 0
    for i in range(len(ids)):
        old, new = _decode(tokenizer, ids[before:shown]), _decode(tokenizer, ids[before : i + 1])
        open_character = new.endswith("\ufffd") and i + 1 < len(ids)
        strings.append("" if open_character else new[len(old) :])
        if not open_character:
            before, shown = shown, i + 1
    return strings


def _prefix_pieces(tokenizer: Any, ids: list[int], whole: str) -> list[str]:
    ends = [_shared(_decode(tokenizer, ids[: i + 1]), whole) for i in range(len(ids))]
    cuts = [0, *(max(ends[: i + 1]) for i in range(len(ids)))]
    return [whole[a:b] for a, b in pairwise(cuts)]


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
