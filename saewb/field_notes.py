"""What each field of a dataclass is: read from the comment beside it, for `help()` and for forms.

A field is described once, where it stands (`k: int = 32  # latents kept per token`). Python forgets comments, so they
are read from the source, when somebody asks.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

_FIELD = re.compile(r"^    (\w+): [^#\n]*(?:#[ ]*(.*))?$")
_DOCSTRING = re.compile(r'^    """(.+?)\.?"""$')
_COMMENT = re.compile(r"^    #[ ]*(.*)$")


def field_notes(owner: type) -> dict[str, str]:
    """The note of each field of a dataclass that has one: beside, above or below it, or in its metadata.

    Args:
        owner: the dataclass.

    Returns:
        By name, in the fields' order.

    Example:
        >>> from saewb.sae.config import SAEConfig
        >>> field_notes(SAEConfig)["d_sae"]
        'number of latents'
    """
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(owner).splitlines():
        if comment := _COMMENT.match(line):
            above.append(comment[1])
            continue
        if field := _FIELD.match(line):
            found[field[1]] = field[2] or " ".join(above)
        elif found and (text := _DOCSTRING.match(line)):
            found[list(found)[-1]] = text[1]
        above = []
    told = {f.name: f"{f.metadata['meaning']} ({f.metadata['unit']})" for f in fields(owner) if f.metadata.get("unit")}
    notes = {f.name: told.get(f.name) or f.metadata.get("meaning") or found.get(f.name) for f in fields(owner)}
    return {name: note for name, note in notes.items() if note}


def field_choices(owner: type) -> dict[str, tuple[str, ...]]:
    """What a field takes that takes one of a few texts; by name, empty for other fields.

    Args:
        owner: the dataclass.

    Returns:
        The texts of each field.

    Example:
        >>> from saewb.sae.config import SAEConfig
        >>> field_choices(SAEConfig)["pre_bias"]
        ('none', 'tied', 'own')
    """
    try:
        hints = get_type_hints(owner)
    except NameError:  # a type that only type checkers import: never one of a choice
        hints = {}
    return {f.name: _texts(hints.get(f.name)) for f in fields(owner)}


def _texts(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


class _Described:
    """A class's docstring with a line for each field after its first paragraph, made when it is asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __get__(self, instance: Any, owner: type) -> str:
        if self.text is None or not (notes := field_notes(owner)):
            return self.text
        choices = {name: f" ({', '.join(map(repr, texts))})" for name, texts in field_choices(owner).items() if texts}
        lines = [f"    {name}: {note}{choices.get(name, '')}" for name, note in notes.items()]
        return "\n".join([inspect.cleandoc(self.text), "", "Fields:", *lines, ""])


def described(value: Any) -> Any:
    """The same object; a dataclass of saewb's now says in `help()` what its fields are."""
    if isinstance(value, type) and is_dataclass(value) and value.__module__.startswith("saewb"):
        text = vars(value).get("__doc__")
        if isinstance(text, str):
            value.__doc__ = _Described(text)
    return value
