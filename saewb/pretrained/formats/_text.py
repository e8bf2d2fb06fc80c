"""Small files of text from the internet: JSON and YAML."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from saewb.errors import FormatError, explain

_MOST = 16 << 20  # bytes
# A parser in Python needs a second for this many bytes; the configuration of a training run has some 5 kB.
_MOST_YAML, _MOST_DEPTH = 1 << 17, 32


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FormatError: if it is not there, is not JSON, is nested absurdly deep, or has more than 16 MiB.
    """
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(explain(f"{path.name} is not JSON: {error}.")) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values only, tags that make objects are refused.

    Raises:
        FormatError: if it is not there, is not such YAML, has references, is nested deep, or has more than 128 KiB.
    """
    import yaml

    try:
        text = _text(path, _MOST_YAML)
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # stops before depth costs time, and before any content
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEPTH or isinstance(event, yaml.AliasEvent):
                # References to references are short to write, and fill the memory when printed.
                raise FormatError(explain(f"{path.name} has references, or is nested {_MOST_DEPTH} deep."))
        return yaml.safe_load(text)
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(explain(f"{path.name} is not YAML of plain values: {error}.")) from error


def object_of(content: Any, path: Path) -> dict[str, Any]:
    """The same, if it is an object.

    Raises:
        FormatError: if it is a list, a number or text.
    """
    if not isinstance(content, dict):
        raise FormatError(explain(f"{path.name} holds a {type(content).__name__}.", want="an object"))
    return content


def positive(value: object, name: str) -> float:
    """The number, checked.

    Raises:
        FormatError: if it is no positive, finite number.
    """
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise FormatError(explain(f"{name} is {value!r}.", want="a positive number"))
    return float(value)


def _text(path: Path, most: int = _MOST) -> str:
    try:
        size = path.stat().st_size
        if not path.is_file() or size > most:
            raise FormatError(explain(f"{path.name} has {size} bytes.", want=f"a file of at most {most}"))
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(explain(f"{path.name} cannot be read in {path.parent}.")) from error
