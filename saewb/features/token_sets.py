"""Token sets of a vocabulary, by form, script and meaning, and custom ones."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from saewb.errors import explain
from saewb.models.tokenizer import single_texts

_SCRIPTS = (
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI",
    "TAMIL", "TELUGU", "KANNADA", "MALAYALAM", "THAI", "LAO", "TIBETAN", "GEORGIAN", "HANGUL", "ETHIOPIC", "KHMER",
    "HIRAGANA", "KATAKANA", "CJK",
)  # fmt: skip  # as the names of their characters begin in Unicode

_WORDS = {
    "pronouns": "i me my mine we us our ours you your yours he him his she her hers it its they them their theirs",
    "articles": "a an the",
    "prepositions": "in on at by for with from to of into over under between through during before after about against",
    "conjunctions": "and or but nor so yet because although while if unless",
    "forms of be": "be am is are was were been being",
    "question words": "who whom whose what which when where why how",
    "negations": "no not never none nothing nobody neither nor cannot",
    "weekdays": "monday tuesday wednesday thursday friday saturday sunday",
    "months": "january february march april may june july august september october november december",
    "number words": "one two three four five six seven eight nine ten eleven twelve hundred thousand million billion",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "colors": "red green blue yellow black white brown orange purple pink grey gray",
}


def token_sets(
    tokenizer: Any, custom: Mapping[str, Iterable[str]] | None = None, *, min_tokens: int = 5
) -> dict[str, list[int]]:
    """Built-in token sets of a vocabulary, for `enrich`: no download, any tokenizer.

    By form: starts with a space, goes on a word (letters, no space before), capitalized, all capitals, lower case,
    single letter, digits, years (1000 to 2099), punctuation, white space, part of a character. By script, as Unicode
    names it (Latin letters beyond a to z are "accented latin"). By meaning: some closed classes of English words.

    Words are compared without the space before a token. Special tokens are in no set.

    Args:
        tokenizer: of the model, or the model itself.
        custom: words of further sets by name; a word stands for all tokens of that text, in any case.
        min_tokens: built-in sets with fewer tokens, too small for a test, are left out.

    Returns:
        Ascending ids by name.

    Raises:
        ValueError: if no token is a word of a set of `custom`.

    Example:
        >>> from saewb.models.load import load_model
        >>> sets = token_sets(load_model("tiny", device="cpu"), {"rivers": ["river", "rivers", "lake"]})
        >>> {"digits", "capitalized", "rivers"} <= set(sets)
        True
    """
    texts = token_texts(tokenizer)
    sets = {name: [i for i, text in texts.items() if fits(text)] for name, fits in _FORMS.items()}
    words = {i: text.strip().lower() for i, text in texts.items()}
    sets |= {name: _ids_of_words(words, members.split()) for name, members in _WORDS.items()}
    sets |= _by_script(texts)
    sets = {name: ids for name, ids in sets.items() if min_tokens <= len(ids) < len(texts)}
    for name, members in (custom or {}).items():
        sets[name] = _ids_of_words(words, [word.strip().lower() for word in members])
        if not sets[name]:
            raise ValueError(explain(f"no token reads as a word of the set {name!r}.", want="words that are one token"))
    return sets


def tokens_where(tokenizer: Any, fits: str | Callable[[str], bool]) -> list[int]:
    """Ids of the tokens whose text matches a regular expression or a predicate.

    The text includes the space before a word, if the token has one. Special tokens never match.

    Args:
        tokenizer: of the vocabulary; or a model that has one.
        fits: a pattern for `re.search`, or a predicate of a token's text.

    Returns:
        Token ids, ascending.

    Example:
        >>> from saewb.models.load import load_model
        >>> tiny = load_model("tiny", device="cpu")
        >>> {token_texts(tiny)[i] for i in tokens_where(tiny, r"^ physic")} >= {" physicist"}
        True
    """
    predicate = re.compile(fits).search if isinstance(fits, str) else fits
    return [i for i, text in token_texts(tokenizer).items() if predicate(text)]


def token_texts(tokenizer: Any) -> dict[int, str]:
    """Text of each token of a vocabulary by id, including the space before a word; without special tokens.

    A token that is only part of a character's bytes is U+FFFD.

    Args:
        tokenizer: of the vocabulary; or a model that has one.

    Returns:
        Text by token id.

    Example:
        >>> import saewb
        >>> texts = token_texts(saewb.load_model("tiny", device="cpu"))
        >>> " physicist" in texts.values(), "<|endoftext|>" in texts.values()
        (True, False)
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    ids = [i for i in range(len(tokenizer)) if i not in special]
    return single_texts(tokenizer, ids)


def _ids_of_words(words: Mapping[int, str], members: Iterable[str]) -> list[int]:
    members = set(members)
    return [i for i, word in words.items() if word in members]


def _word(fits: Callable[[str], bool]) -> Callable[[str], bool]:
    """Apply a predicate to the stripped text; False for an empty one."""
    return lambda text: bool(word := text.strip()) and fits(word)


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(c)[0] in "PS" for c in word) and "�" not in word


_FORMS: dict[str, Callable[[str], bool]] = {
    "starts with space": lambda text: text.startswith(" ") and bool(text.strip()),
    "goes on a word": lambda text: text[:1].isalpha(),
    "capitalized": _word(lambda word: word[0].isupper() and (len(word) == 1 or word[1:].islower())),
    "all capitals": _word(lambda word: len(word) > 1 and word.isalpha() and word.isupper()),
    "lower case": _word(lambda word: word.isalpha() and word.islower()),
    "single letter": _word(lambda word: len(word) == 1 and word.isalpha()),
    "digits": _word(lambda word: word.isdecimal()),
    "years": _word(lambda word: re.fullmatch(r"(1\d|20)\d\d", word) is not None),
    "punctuation": _word(_is_punctuation),
    "white space": lambda text: bool(text) and not text.strip(),
    "part of a character": lambda text: "�" in text,
}


def _by_script(texts: Mapping[int, str]) -> dict[str, list[int]]:
    """Sets by script of all letters of a token; "accented latin" if one of them is not a to z."""
    sets: dict[str, list[int]] = {}
    for i, text in texts.items():
        letters = [c for c in text if c.isalpha()]
        scripts = {_script(c) for c in letters}
        if len(scripts) == 1 and None not in scripts:
            sets.setdefault(scripts.pop(), []).append(i)
            if not "".join(letters).isascii() and _script(letters[0]) == "latin":
                sets.setdefault("accented latin", []).append(i)
    return sets


def _script(letter: str) -> str | None:
    name = unicodedata.name(letter, "")
    return next((script.lower() for script in _SCRIPTS if name.startswith(script)), None)
