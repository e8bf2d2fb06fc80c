"""The form that starts a training: its fields from the dataclasses, what was typed as values, what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

import saewb
from saewb import errors

KINDS = ("TopK", "BatchTopK", "Matryoshka", "JumpReLU", "Standard", "Gated", "AbsTopK", "MatchingPursuit")
TEXTS = {  # taken as they are typed
    "hook": "the point of the model that is read, e.g. blocks.2.hook_resid_post",
    "hook_out": "the point predicted, for a transcoder; empty: the same",
    "folder": "for history, checkpoints and SAEs; a new one; empty: kept in memory only",
}
_FIRST = ("n_tokens", "batch_tokens", "lr", "schedule", "warmup_tokens", "decay_tokens", "normalization", "seed")
_PREFIX = "objective."
_GOT = re.compile(r"got (\w+)=")


def kind_of(objective: Any) -> str:
    """The name of an objective's class.

    Raises:
        TypeError: for what is none of them.
    """
    kind = type(objective).__name__
    if kind not in KINDS or not isinstance(objective, getattr(saewb, kind)):
        what = f"TrainingPanel got objective={objective!r}."
        raise TypeError(errors.explain(what, want=", ".join(KINDS), fix="objective=saewb.TopK(512, k=16)"))
    return kind


def options_of(kind: str) -> dict[str, Any]:
    """All options by key, those of the objective with a prefix."""
    own = {_PREFIX + option.name: option for option in saewb.training_options(getattr(saewb, kind))}
    return own | {option.name: option for option in saewb.training_options()}


def groups(kind: str) -> list[dict[str, Any]]:
    """The fields, as the front end is sent them."""
    options = options_of(kind)
    own = [key for key in options if key.startswith(_PREFIX)]
    rest = [key for key in options if key not in own and key not in _FIRST]
    where = [{"key": key, "name": key, "default": "", "note": note} for key, note in TEXTS.items()]
    return [
        {"title": "Where", "fields": where},
        {"title": kind, "kind": True, "fields": [_field(key, options[key]) for key in own]},
        {"title": "Training", "fields": [_field(key, options[key]) for key in _FIRST]},
        {"title": "More", "folded": True, "fields": [_field(key, options[key]) for key in rest]},
    ]


def _field(key: str, option: Any) -> dict[str, Any]:
    made = {"key": key, "name": option.name, "note": option.note.replace("`", "")}
    made["default"] = "" if option.required else text_of(option.default)
    choices = ["False", "True"] if isinstance(option.default, bool) and not _takes_more(option) else option.choices
    return made | ({"choices": list(choices)} if choices else {})


def _takes_more(option: Any) -> bool:
    return option.name == "skip_special_tokens"


def text_of(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, str):
        return value if value.isidentifier() else repr(value)
    return f"{value:_}" if type(value) is int and value >= 10_000 else str(value)


def typed_of(objective: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """What would have been typed for this objective and these arguments: all that differs from the defaults.

    Raises:
        TypeError: for an argument that `saewb.train` does not know.
    """
    options = options_of(kind_of(objective))
    typed = {}
    for key, option in options.items():
        if key.startswith(_PREFIX):
            value = getattr(objective, option.name)
            if option.required or value != option.default:
                typed[key] = text_of(value)
    for name, value in given.items():
        if name not in options and name not in TEXTS:
            known = [key for key in options if not key.startswith(_PREFIX)] + [*TEXTS]
            raise TypeError(errors.explain(f"TrainingPanel got {name}=.", near=errors.near(name, known)))
        if value is not None:
            typed[name] = str(value) if name in TEXTS else text_of(value)
    return typed


def read(kind: str, typed: Mapping[str, str]) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The objective and the arguments that were typed, and what is wrong, by key.

    Returns:
        (objective, or None if something is wrong with it; arguments of `saewb.train`; messages).
    """
    options, values, problems = options_of(kind), {}, {}
    for key, option in options.items():
        text = str(typed.get(key, "")).strip()
        if text:
            try:
                values[key] = option.value(text)
            except ValueError as error:
                problems[key] = beside(error)
        elif option.required:
            problems[key] = "needed"
    made = {}
    for owner in dict.fromkeys(option.owner for option in options.values()):
        keys = {key: option.name for key, option in options.items() if option.owner is owner}
        made[owner] = _built(owner, keys, values, problems)
    if not typed.get("hook", "").strip():
        problems["hook"] = "needed"
    arguments = {name: text for name in TEXTS if (text := str(typed.get(name, "")).strip())}
    arguments |= {key: value for key, value in values.items() if not key.startswith(_PREFIX)}
    return made[getattr(saewb, kind)], arguments, problems


def beside(error: Exception) -> str:
    """An error's message for a form, where the line to paste is no help."""
    return "\n".join(line.strip() for line in str(error).splitlines() if not line.startswith("  fix:"))


def _built(owner: type, keys: Mapping[str, str], values: Mapping[str, Any], problems: dict[str, str]) -> Any:
    """One of `owner` of the values that are its own; what it does not take is noted, and left out."""
    given = {key: values[key] for key in keys if key in values}
    if any(key in problems and _needed(owner, keys[key]) for key in keys if key not in given):
        return None  # what is needed is missing, which has been said
    while True:
        try:
            return owner(**{keys[key]: value for key, value in given.items()})
        except (ValueError, TypeError) as error:
            wrong = _blamed(owner, keys, given, error)
            problems.setdefault(wrong, beside(error))
            if wrong not in given or _needed(owner, keys[wrong]):
                return None
            del given[wrong]


def _blamed(owner: type, keys: Mapping[str, str], given: Mapping[str, Any], error: Exception) -> str:
    """The field that an error is about: the one it names, else the first that is wrong by itself."""
    found = _GOT.search(str(error))
    named = [key for key, name in keys.items() if found and name == found[1]]
    if named:
        return named[0]
    base = {key: value for key, value in given.items() if _needed(owner, keys[key])}
    for key in given:
        if key not in base:
            try:
                owner(**{keys[k]: v for k, v in {**base, key: given[key]}.items()})
            except (ValueError, TypeError):
                return key
    return next(iter(base), next(iter(keys)))


def _needed(owner: type, name: str) -> bool:
    return owner.__dataclass_fields__[name].default is MISSING
