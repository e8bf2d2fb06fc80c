"""Frozen dataclasses that check their fields, with errors in saewb's template (pydantic underneath).

Constraints stand in the type, the meaning of a field in a docstring under it:

    @config
    class Options:
        k: PositiveInt = 32
        \"\"\"Latents per token.\"\"\"

`dataclasses.fields`, `replace` and `asdict` work as ever; `field.metadata["description"]` is the docstring, also of
inherited fields.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Sequence
from dataclasses import field, fields
from functools import wraps
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from saewb.errors import explain, near

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]

_CONFIG = ConfigDict(
    extra="forbid", strict=True, use_attribute_docstrings=True, arbitrary_types_allowed=True, allow_inf_nan=False
)
_ARGUMENT_ERRORS = {
    "missing": "needs a {}",
    "unexpected_keyword_argument": "has no {}",
    "unexpected_positional_argument": "got more positional arguments than fields; the last is {}",
    "multiple_argument_values": "got {} twice",
}

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config(owner: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are checked against their types when one is made.

    Types are strict: an int is taken for a float, nothing else for anything else. Checks that concern several fields
    belong in `__post_init__`: see `require`.

    Args:
        owner: a class with annotated fields, each with a docstring under it.

    Returns:
        The class. Making one raises a ValueError for a wrong value, a TypeError for an unknown or missing field.

    Example:
        >>> @config
        ... class Options:
        ...     d_sae: PositiveInt
        ...     rows: Literal["unit", "free"] = "unit"
        >>> Options(4)
        Options(d_sae=4, rows='unit')
        >>> Options(4, rows="short")
        Traceback (most recent call last):
        ValueError: Options got rows='short'.
          want: 'unit' or 'free'
          fix:  Options(..., rows=...)
    """
    checked = dataclass(owner, frozen=True, config=_CONFIG)
    for f in fields(checked):  # in the metadata, from where a subclass inherits it
        if (text := checked.__pydantic_fields__[f.name].description) is not None:
            f.metadata = MappingProxyType({**f.metadata, "description": " ".join(text.split())})
    init = checked.__init__

    @wraps(init)
    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        except ValidationError as error:
            raise _translated(type(self), error) from None

    checked.__init__ = __init__
    lines = [f"    {name}: {text}{_choices_note(checked, name)}" for name, text in descriptions(checked).items()]
    checked.__doc__ = "\n".join([inspect.cleandoc(owner.__doc__ or ""), "", "Fields:", *lines, ""])
    return checked


def _plain(value: Any) -> Any:
    """A number of numpy as the number of Python that it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def descriptions(owner: type) -> dict[str, str]:
    """The docstring of each field that has one, on one line, in the order of the signature."""
    ordered = sorted(fields(owner), key=lambda f: f.kw_only)
    return {f.name: f.metadata["description"] for f in ordered if "description" in f.metadata}


def _choices_note(owner: type, name: str) -> str:
    texts = choices(owner, name)
    return f" ({', '.join(map(repr, texts))})" if texts else ""


def choices(owner: type, name: str) -> tuple[str, ...]:
    """The texts that a field takes, if it takes one of a few; else empty."""
    annotation = owner.__pydantic_fields__[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def parse(owner: type[T], values: Any) -> T:
    """A config class, or another type, of plain values as they come from JSON, YAML or a form.

    Args:
        owner: the type. Dictionaries become config classes, lists tuples, and text numbers where the type says so.
        values: what is to be one.

    Returns:
        One of `owner`.

    Raises:
        ValueError: for a wrong value.
        TypeError: for an unknown or missing field.

    Example:
        >>> parse(tuple[int, float], ["1_000", "3e-4"])
        (1000, 0.0003)
    """
    try:
        return TypeAdapter(owner).validate_python(values, strict=False)
    except ValidationError as error:
        raise _translated(owner, error) from None


def dump(options: Any) -> Any:
    """A config class, or a type that holds some, as plain values for JSON: what `parse` reads."""
    return TypeAdapter(type(options)).dump_python(options, mode="json")


def parse_value(kind: Any, value: Any, name: str) -> Any:
    """As `parse`, for a single value.

    Raises:
        ValueError: for a wrong value; `name` is that of the value in the message.
    """
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=False)
    except ValidationError as error:
        want = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        raise ValueError(explain(f"got {name}={reprlib.repr(value)}.", want=want)) from None


def parse_field(owner: type, name: str, value: Any) -> Any:
    """As `parse`, for one field of a config class; checks that concern several fields are not made.

    Raises:
        ValueError: for a wrong value.
    """
    info = owner.__pydantic_fields__[name]
    kind = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if "error" in first.get("ctx", {}):
            raise first["ctx"]["error"] from None
        raise _wrong_field(owner, name, value, first["msg"]) from None


def require(options: Any, condition: bool, name: str, want: str) -> None:
    """Raise a ValueError about one field of a dataclass unless the condition holds.

    Args:
        options: the dataclass.
        condition: what must be true.
        name: of the field that is at fault.
        want: what its value should be.
    """
    if not condition:
        error = _wrong_value(type(options).__name__, name, getattr(options, name), want)
        error.requirement = (name, want)  # for `_translated`
        raise error


def _wrong_value(owner: str, name: str, value: Any, want: str, close: Sequence[str] = ()) -> ValueError:
    what = f"{owner} got {name}={value!r}."
    return ValueError(explain(what, near=close, want=want, fix=f"{owner}(..., {name}=...)"))


def _translated(owner: type, error: ValidationError) -> Exception:
    """The first of pydantic's errors, in saewb's template."""
    first = error.errors(include_url=False)[0]
    if raised := first.get("ctx", {}).get("error"):  # in `__post_init__`
        typed = getattr(first["input"], "kwargs", None) or {}
        name, want = getattr(raised, "requirement", (None, ""))
        # The value as it was typed: 0 where the field has been converted to 0.0.
        return _wrong_value(owner.__name__, name, typed[name], want) if name in typed else raised
    infos, (at, *rest) = owner.__pydantic_fields__, first["loc"]
    while rest and at in infos and hasattr(infos[at].annotation, "__pydantic_fields__"):  # a config class in another
        owner, (at, *rest) = infos[at].annotation, rest
        infos = owner.__pydantic_fields__
    kind = first["type"]
    positional = [f.name for f in fields(owner) if not f.kw_only]
    name = at if isinstance(at, str) else positional[min(at, len(positional) - 1)]
    if kind in _ARGUMENT_ERRORS:
        what = f"{owner.__name__} {_ARGUMENT_ERRORS[kind].format(name)}."
        close = near(name, infos) if kind == "unexpected_keyword_argument" else ()
        return TypeError(explain(what, near=close, want=", ".join(infos)))
    return _wrong_field(owner, name, first["input"], first["msg"])


def _wrong_field(owner: type, name: str, value: Any, message: str) -> ValueError:
    info = owner.__pydantic_fields__[name]
    want = _want(info.annotation, info.metadata) or message.removeprefix("Input should be ")
    return _wrong_value(owner.__name__, name, value, want, near(str(value), choices(owner, name)))


def _want(annotation: Any, metadata: Any) -> str:
    """What a field takes, in words, from its type and bounds; empty for other types than numbers and choices."""
    args = get_args(annotation)
    if type(None) in args:
        (some,) = (arg for arg in args if arg is not type(None))
        inner = _want(*((some.__origin__, some.__metadata__) if get_origin(some) is Annotated else (some, metadata)))
        return f"{inner}, or None" if inner else ""
    if get_origin(annotation) is Literal:
        choices = [repr(choice) for choice in args]
        return " or ".join(choices) if len(choices) == 2 else "one of " + ", ".join(choices)
    if annotation not in (int, float):
        return ""
    noun = "integer" if annotation is int else "number"
    bounds = [text for bound in metadata if (text := _bound(bound))]
    if bounds[:1] == ["more than 0"]:
        return ", ".join([f"a positive {noun}", *bounds[1:]])
    article = "an" if annotation is int else "a"
    return f"{article} {noun}" + (f", {' and '.join(bounds)}" if bounds else "")


def _bound(bound: Any) -> str:
    if isinstance(bound, Gt):
        return f"more than {bound.gt}"
    if isinstance(bound, Ge):
        return f"{bound.ge} or more"
    if isinstance(bound, Le):
        return f"up to {bound.le}"
    return f"less than {bound.lt}" if isinstance(bound, Lt) else ""
