"""The form that starts a training: fields from `saewb.training_options`, and typed text parsed into arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import saewb
from saewb import errors

KINDS = ("TopK", "BatchTopK", "Matryoshka", "JumpReLU", "Standard", "Gated", "AbsTopK", "MatchingPursuit")
TEXTS = {  # taken as they are typed
    "hook": "The point of the model that is read, e.g. blocks.2.hook_resid_post.",
    "hook_out": "The point predicted, for a transcoder; empty: the same.",
    "folder": "A new folder for history, checkpoints and SAEs; empty: kept in memory only.",
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
    default = "" if option.required else text_of(option.default)
    is_flag = isinstance(option.default, bool) and option.name != "skip_special_tokens"  # which also takes a list
    choices = ["False", "True"] if is_flag else list(option.choices)
    field = {"key": key, "name": option.name, "note": option.note.replace("`", ""), "default": default}
    return field | ({"choices": choices} if choices else {})


def text_of(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, str):
        return value if value.isidentifier() else repr(value)
    return f"{value:_}" if type(value) is int and value >= 10_000 else str(value)


def typed_text(objective: Any, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The form's text for this objective and these arguments: all that differs from the defaults.

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
    for name, value in arguments.items():
        if name not in options and name not in TEXTS:
            known = [key for key in options if not key.startswith(_PREFIX)] + [*TEXTS]
            raise TypeError(errors.explain(f"TrainingPanel got {name}=.", near=errors.near(name, known)))
        if value is not None:
            typed[name] = str(value) if name in TEXTS else text_of(value)
    return typed


def parse(kind: str, typed: Mapping[str, str]) -> tuple[Any, dict[str, Any], dict[str, str]]:
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
                problems[key] = message(error)
        elif option.required:
            problems[key] = "needed"
    configs = {owner: _build(owner, options, values, problems) for owner in {o.owner: None for o in options.values()}}
    if not typed.get("hook", "").strip():
        problems["hook"] = "needed"
    arguments = {name: text for name in TEXTS if (text := str(typed.get(name, "")).strip())}
    arguments |= {key: value for key, value in values.items() if not key.startswith(_PREFIX)}
    return configs[getattr(saewb, kind)], arguments, problems


def message(error: Exception) -> str:
    """An error's message for a form, where the line to paste is no help."""
    return "\n".join(line.strip() for line in str(error).splitlines() if not line.startswith("  fix:"))


def _build(owner: type, options: Mapping[str, Any], values: Mapping[str, Any], problems: dict[str, str]) -> Any:
    """A config of the values that are its own; None if they do not go together, which is noted at one field each."""
    keys = {option.name: key for key, option in options.items() if option.owner is owner}
    arguments = {name: values[key] for name, key in keys.items() if key in values}
    required = {name for name, key in keys.items() if options[key].required}
    while required <= arguments.keys():
        try:
            config = owner(**arguments)
        except ValueError as error:
            match = _GOT.search(str(error))
            name = match[1] if match and match[1] in keys else next(iter(keys))
            problems.setdefault(keys[name], message(error))
            if arguments.pop(name, None) is None:
                return None
        else:
            return None if problems.keys() & keys.values() else config
    return None
