"""Checked dataclasses: what they refuse and how they say so, and that they are dataclasses all the same."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, asdict, fields, replace
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Le
from pydantic import Field, TypeAdapter

from saewb._config import (
    NonNegativeInt,
    PositiveInt,
    choices,
    config,
    descriptions,
    dump,
    parse,
    parse_field,
    require,
)


@config
class Base(ABC):
    """An abstract base with fields."""

    d_sae: PositiveInt
    """Number of latents."""
    _: KW_ONLY
    rows: Literal["unit", "free"] = "unit"
    """Decoder rows."""

    @abstractmethod
    def losses(self) -> None: ...


@config
class Options(Base):
    """With fields of its own."""

    k: PositiveInt = 3
    """Latents per token,
    at most."""
    k_aux: PositiveInt | None = None
    rate: Annotated[float, Gt(0), Le(1)] = 0.1
    sizes: Annotated[tuple[int, ...], Field(strict=False)] = ()
    mode: Literal["step", "tanh", "quadratic"] = "step"
    warmup_tokens: NonNegativeInt = 0

    def __post_init__(self) -> None:
        require(self, self.k <= self.d_sae, "k", f"1 to d_sae={self.d_sae}")

    def losses(self) -> None: ...


def test_it_is_a_frozen_dataclass():
    options = Options(5, 3, sizes=[1, 2])
    assert repr(options) == (
        "Options(d_sae=5, rows='unit', k=3, k_aux=None, rate=0.1, sizes=(1, 2), mode='step', warmup_tokens=0)"
    )
    assert replace(options, k=4).k == 4
    assert asdict(options)["sizes"] == (1, 2)
    assert hash(options) == hash(Options(5, 3, sizes=(1, 2)))
    assert list(inspect.signature(Options).parameters)[:2] == ["d_sae", "k"]
    with pytest.raises(AttributeError):
        options.k = 2
    with pytest.raises(TypeError, match="abstract"):
        Base(5)
    with pytest.raises(ValueError, match="got k=9"):
        replace(options, k=9)


def test_descriptions_and_choices_are_inherited():
    expected = {"d_sae": "Number of latents.", "k": "Latents per token, at most.", "rows": "Decoder rows."}
    assert descriptions(Options) == expected
    assert list(descriptions(Options)) == ["d_sae", "k", "rows"]  # as in the signature
    assert {f.name: f.metadata["description"] for f in fields(Options) if f.metadata} == expected
    schema = TypeAdapter(Options).json_schema()["properties"]
    shown = {name: " ".join(p["description"].split()) for name, p in schema.items() if "description" in p}
    assert shown == expected
    assert choices(Options, "rows") == ("unit", "free")
    assert choices(Options, "k") == ()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"d_sae": 0}, r"Options got d_sae=0\.\n  want: a positive integer\n  fix:  Options\(\.\.\., d_sae=\.\.\.\)"),
        ({"k": 2.0}, "got k=2.0.\n  want: a positive integer"),
        ({"k": True}, "got k=True.\n  want: a positive integer"),
        ({"k_aux": 0}, "got k_aux=0.\n  want: a positive integer, or None"),
        ({"rate": 2}, "got rate=2.\n  want: a positive number, up to 1"),
        ({"rows": "x"}, "got rows='x'.\n  want: 'unit' or 'free'"),
        ({"mode": 1}, "got mode=1.\n  want: one of 'step', 'tanh', 'quadratic'"),
        ({"warmup_tokens": -1}, "got warmup_tokens=-1.\n  want: an integer, 0 or more"),
        ({"sizes": ("8",)}, "got sizes='8'"),
        ({"k": 6}, "got k=6.\n  want: 1 to d_sae=5"),
    ],
)
def test_wrong_values(fields, text):
    with pytest.raises(ValueError, match=text):
        Options(**{"d_sae": 5, **fields})


def test_wrong_arguments():
    with pytest.raises(TypeError, match="Options has no kaux.\n  near: k_aux"):
        Options(5, kaux=1)
    with pytest.raises(TypeError, match="Options needs a d_sae"):
        Options()
    with pytest.raises(TypeError, match="more positional arguments"):
        Options(5, 1, 1, 0.5, (), "step", 0, "unit")
    with pytest.raises(ValueError, match="got k_aux=0"):
        Options(5, 1, 0)


def test_plain_values_and_back():
    options = Options(5, sizes=(1, 2), k_aux=4)
    assert parse(Options, dump(options)) == options
    assert parse(Options, {"d_sae": "1_000", "rate": "1e-1", "sizes": [3]}) == Options(1000, sizes=(3,))
    with pytest.raises(ValueError, match="Options got k=9.\n  want: 1 to d_sae=5"):
        parse(Options, {"d_sae": 5, "k": 9})
    with pytest.raises(TypeError, match="Options has no kaux"):
        parse(Options, {"d_sae": 5, "kaux": 9})
    with pytest.raises(TypeError, match="Options needs a d_sae"):
        parse(Options, {})


def test_one_field():
    assert parse_field(Options, "rate", "0.5") == 0.5
    assert parse_field(Options, "sizes", [1]) == (1,)
    with pytest.raises(ValueError, match="Options got mode='tan'.\n  near: tanh\n  want: one of"):
        parse_field(Options, "mode", "tan")


def test_help_shows_the_fields():
    assert "\n    rows: Decoder rows. ('unit', 'free')\n" in Options.__doc__
