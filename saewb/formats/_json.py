"""JSON files from the internet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saewb.errors import FormatError, explain

_MOST = 16 << 20  # bytes


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FormatError: if it is not there, is not JSON, is nested absurdly deep, or has more than 16 MiB.
    """
    try:
        if path.stat().st_size > _MOST:
            raise FormatError(explain(f"{path.name} has {path.stat().st_size} bytes.", want=f"at most {_MOST}"))
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(explain(f"{path.name} is not in {path.parent}.")) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(explain(f"{path.name} is not JSON: {error}.")) from error
