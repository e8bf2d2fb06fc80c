"""Every public function and class: saewb's own, and those of the modules that users import from."""

import importlib
import inspect

import saewb

# Modules whose functions users type themselves; the rest is for saewb's own rooms.
MODULES = (
    "tiny",
    "metrics",
    "explanations",
    "features.neuronpedia",
    "training.loggers",
    "synthetic",
    "data.tokens",
    "models.tokenizer",
)
NAMES = [name for name in saewb.__all__ if not inspect.ismodule(getattr(saewb, name))]


def public():
    """(name, object) pairs, each object under its shortest name: saewb.x before saewb.m.x."""
    objects = {name: getattr(saewb, name) for name in NAMES}
    for module in (importlib.import_module(f"saewb.{name}") for name in MODULES):
        for key in getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")]):
            value = getattr(module, key)
            if getattr(value, "__module__", "").startswith(module.__name__):
                objects[f"{module.__name__.removeprefix('saewb.')}.{key}"] = value
    ids, pairs = set(), []
    for name, value in sorted(objects.items(), key=lambda pair: pair[0].count(".")):
        if id(value) not in ids:
            ids.add(id(value))
            pairs.append((name, value))
    return pairs
