"""Jupyter panels for saewb: they show what saewb computes, and compute nothing themselves.

    from saewb_widgets import FeatureBrowser

    FeatureBrowser(saewb.load_index("my.index"))

Every panel has `code()`, Python code that reproduces its view; `error`, the exception of the last callback; and traits
that can be set from Python.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {  # public name: the module that defines it
    "CataloguePicker": "catalogue_picker.panel",
    "ContrastPanel": "contrast.panel",
    "CorrelationPanel": "correlation.panel",
    "FeatureBrowser": "feature_browser.panel",
    "GraphPanel": "graph.panel",
    "PromptExplorer": "prompt_explorer.panel",
    "SteeringPanel": "steering.panel",
    "SuperpositionPanel": "superposition.panel",
    "TrainingPanel": "training.panel",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"saewb_widgets.{_HOME[name]}"), name)
    raise AttributeError(f"module 'saewb_widgets' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
