"""A panel runs a twin of the model, without what cells have put on it: how its title line and its code say so."""

from __future__ import annotations

from typing import Any

import saewb


def about(saes: Any, model: Any) -> str:
    """The line under the title: the SAEs and, if something is on the model now, that it has no effect here."""
    made = "; ".join(map(repr, saes))
    return made if saewb.models.hook_points.is_bare(model) else f"{made} — the model without what cells have put on it"


def named(model: Any) -> tuple[str, list[str]]:
    """The variable by which code runs what the panel runs, and the lines that make it of `model`."""
    if saewb.models.hook_points.is_bare(model):
        return "model", []
    return "bare", [
        "bare = saewb.models.shared_copy.shared_copy(model)  # the same weights, without what is on the model now"
    ]
