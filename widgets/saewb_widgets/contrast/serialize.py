"""What the front end of ContrastPanel gets: table, volcano, baselines, one latent on the given texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from saewb_widgets.serialize import short

if TYPE_CHECKING:
    import pandas as pd

LISTED = 200
MARKS = 2000
COLUMNS = ("auc", "auc_held_out", "q", "p_family", "freq_a", "freq_b", "d")
"""Of the table, beside the latent."""


def number(value: float) -> float | None:
    """A number of four digits; None if it is not defined."""
    return short(float(value)) if math.isfinite(value) else None


def minus_log10(q: float) -> float:
    """-log10 q, at most 300."""
    return -math.log10(max(q, 1e-300))


def rows(table: pd.DataFrame) -> list[list[Any]]:
    """The first latents of the table."""
    listed = table.head(LISTED)[["latent", *COLUMNS]]
    return [[int(latent), *map(number, values)] for latent, *values in listed.itertuples(index=False)]


def volcano(table: pd.DataFrame, limit: float) -> dict[str, Any]:
    """Tested latents of smallest q: log odds, -log10 q, and the set in which they are larger, "" beyond the limit."""
    tested = table[table.q.notna()].sort_values("q", kind="stable")
    drawn = tested.head(MARKS)
    sides = ["" if q > limit else "a" if auc > 0.5 else "b" for q, auc in zip(drawn.q, drawn.auc, strict=True)]
    return {
        "latents": drawn.latent.astype(int).tolist(),
        "x": [short(float(x)) for x in drawn.log_odds],
        "y": [short(minus_log10(q)) for q in drawn.q],
        "auc": [number(x) for x in drawn.auc],
        "sides": sides,
        "limit": short(minus_log10(limit)),
        "caption": f"{len(drawn):,} of {len(tested):,} tested latents, those of smallest q"
        if len(drawn) < len(tested)
        else "",
    }


def baselines(result: Any) -> list[list[Any]]:
    """Name, AUC and note of what tells the sets apart without latents."""
    best = result.baselines
    token = best.token_auc_held_out if result.has_held_out else best.token_auc
    figures = (
        ("length", best.length_auc, "number of tokens"),
        ("token", token, f"presence of {best.best_token!r}"),
        ("direction", best.direction_auc, "difference of residual means"),
        ("residual", best.residual_auc, "logistic regression"),
    )
    return [[name, number(auc), note] for name, auc, note in figures]


def latent_page(row: pd.Series, maxima: Iterable[Any] | None, label: str = "") -> dict[str, Any]:
    """Figures of one latent with its label, and the texts on which it is largest (None: not computed yet)."""
    texts = None if maxima is None else [text(one) for one in maxima]
    figures = {name: number(row[name]) for name in (*COLUMNS, "ci_low", "ci_high", "mean_a", "mean_b", "log_odds")}
    return {"latent": int(row.latent), "label": label, "figures": figures, "n_texts": int(row.n_texts), "texts": texts}


def text(one: Any) -> dict[str, Any]:
    """One text, token by token."""
    most = max((abs(a) for a in one.activations), default=0.0) or 1.0
    shares = [round(abs(a) / most, 3) for a in one.activations]
    return {"side": one.side, "index": one.index, "value": number(one.value), "tokens": one.tokens, "shares": shares}
