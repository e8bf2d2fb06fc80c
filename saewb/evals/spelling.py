"""Words, their classes, and the prompts at whose last word token an SAE is read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import nn

from saewb.data.documents import encode
from saewb.errors import explain, near
from saewb.models.tokenizer import special_token_ids, tokenizer_of
from saewb.probing.pooling import TokenizedTexts

Labels = Union[str, Mapping[str, Hashable], Callable[[str], Hashable]]

SPELLING = "{word} has the first letter:"
"""SAEBench's template."""
_ATTEMPTS = 1000
_LETTERS = re.compile(r" ?[A-Za-z]+")
_WORD = re.compile(r" ?\w+")


def first_letter(word: str) -> str | None:
    """The first letter of a word, in lower case; None if it has none.

    Example:
        >>> first_letter(" River")
        'r'
    """
    return next((letter.lower() for letter in word if letter.isalpha()), None)


def label_function(labels: Labels) -> Callable[[str], Hashable]:
    """The class of a word, None for a word that has none; raises for labels of an unknown kind."""
    if isinstance(labels, str):
        if labels != "first_letter":
            what = f"got labels={labels!r}."
            want = "'first_letter', a dictionary {word: class}, or a function of a word"
            raise ValueError(explain(what, near=near(labels, ["first_letter"]), want=want))
        return first_letter
    if isinstance(labels, Mapping):
        return labels.get
    if not callable(labels):
        want = "'first_letter', a dictionary {word: class}, or a function of a word"
        raise TypeError(explain(f"got labels of type {type(labels).__name__}.", want=want))
    return labels


def vocabulary(model: nn.Module, labels: Labels) -> list[str]:
    """Words to label: the keys of a dictionary; else tokens that are ASCII letters, with or without a space before.

    For a function they are all tokens of letters, digits and underscores. In the order of their ids.
    """
    if isinstance(labels, Mapping):
        return list(labels)
    tokenizer, pattern = tokenizer_of(model), _LETTERS if isinstance(labels, str) else _WORD
    special = set(special_token_ids(tokenizer))
    by_id = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i not in special)
    words = (tokenizer.convert_tokens_to_string([token]) for _, token in by_id)
    return list(dict.fromkeys(word for word in words if pattern.fullmatch(word)))


def prompts(
    words: Sequence[str],
    examples: Sequence[str],
    answer: Callable[[str], str],
    template: str,
    n_examples: int,
    rng: random.Random,
) -> list[tuple[str, str]]:
    """Text up to the word, and the rest: lines of other words with their answers, then the word's without.

    The draws are those of SAEBench with the same state of the random numbers.

    Raises:
        ValueError: if every draw of examples has the word.
    """
    head, tail = template.split("{word}")
    result = []
    for word in words:
        lines: list[str] = []
        if n_examples:
            for _ in range(_ATTEMPTS):
                lines = rng.sample(examples, n_examples)
                if word not in lines:
                    break
            else:
                raise ValueError(explain(f"no {n_examples} words without {word!r} were drawn.", want="more words"))
        before = "".join(f"\n{head}{line}{tail} {answer(line)}" for line in lines) + ("\n" if lines else "")
        result.append((before + head + word, tail))
    return result


def at_the_word(model: nn.Module, texts: Sequence[tuple[str, str]]) -> TokenizedTexts:
    """Tokenize prompts; the token that counts is the last one of the word.

    Raises:
        ValueError: where the tokens of the word depend on the text after it.
    """
    whole = TokenizedTexts.of(model, [before + after for before, after in texts], name="prompts")
    tokenizer, masks = tokenizer_of(model), []
    befores = encode([before for before, _ in texts], tokenizer)
    bos = len(whole.ids[0]) - len(encode(["".join(texts[0])], tokenizer)[0])
    for (before, after), ids, head in zip(texts, whole.ids, befores, strict=True):
        end = bos + len(head)
        if ids[bos:end].tolist() != list(head):
            what = f"the tokens of {before[-40:]!r} change where {after!r} follows."
            raise ValueError(explain(what, want="a template with a space after {word}, or nothing"))
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[end - 1] = True
        masks.append(mask)
    return TokenizedTexts(whole.ids, masks)


def check_template(template: Any) -> None:
    """Raise a ValueError for a template without exactly one place for the word."""
    if not isinstance(template, str) or template.count("{word}") != 1:
        raise ValueError(explain(f"got template={template!r}.", want="one {word}", fix="template='{word}'"))
