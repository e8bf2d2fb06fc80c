"""The public names and their signatures are those of a golden file.

After a change that is meant, renew it with `python tests/test_public_api.py` and note the difference under "Changes".
"""

import inspect
import json
import re
from pathlib import Path

from helpers.public_names import public

FILE = Path(__file__).parent / "fixtures" / "public_api.json"


def surface():
    """By name: the signature of a function; of a class, also those of its methods, and its properties."""
    return {name: members(value) if inspect.isclass(value) else signature(value) for name, value in sorted(public())}


def members(owner):
    lines = {"()": signature(owner)}
    for key in dir(owner):
        value = inspect.getattr_static(owner, key)
        value = getattr(value, "__func__", value)  # of a static method or a class method
        if key.startswith("_") or not getattr(value, "__module__", owner.__module__).startswith("saewb"):
            continue
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            lines[key] = "property"
        elif inspect.isfunction(value):
            lines[key] = signature(value)
    return lines


def signature(value):
    """Without annotations, which versions of Python spell differently, and addresses in defaults."""
    try:
        full = inspect.signature(value)
    except ValueError:
        return ""
    plain = [parameter.replace(annotation=parameter.empty) for parameter in full.parameters.values()]
    return re.sub(r" at 0x\w+", "", str(full.replace(parameters=plain, return_annotation=full.empty)))


def test_the_public_surface_is_the_recorded_one():
    assert surface() == json.loads(FILE.read_text()), "if it is meant: python tests/test_public_api.py"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(surface(), indent=1) + "\n")
