"""Read and write the user's pins and notes, in a JSON file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from saewb import errors

_WANT = '{"pins": [748], "notes": {"748": "who did it"}}'


def read(path: Path) -> tuple[list[int], dict[int, str]]:
    """Read pins and notes; none if there is no file yet.

    Raises:
        FormatError: if it is another file.
    """
    if not path.exists():
        return [], {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        pins, notes = [int(i) for i in values["pins"]], {int(i): str(text) for i, text in values["notes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path.name} is no file of pins and notes: {error!r}."
        raise errors.FormatError(errors.explain(what, want=_WANT)) from error
    return pins, notes


def write(path: Path, pins: Sequence[int], notes: Mapping[int, str]) -> None:
    """Write pins and notes, whole or not at all."""
    values = {"pins": list(pins), "notes": {str(i): notes[i] for i in sorted(notes)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
