"""The volcano plot of a contrast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

COLORS = {"a": "#d95f02", "b": "#1f78b4", "": "#999999"}
"""Color-blind safe, on light and dark: latents of a, of b, and those beyond the limit."""
_FLOOR = 1e-300


def minus_log10(q: np.ndarray) -> np.ndarray:
    """-log10 q, at most 300.

    Example:
        >>> minus_log10(np.array([0.01, 0.0])).tolist()
        [2.0, 300.0]
    """
    return np.abs(np.log10(np.maximum(q, _FLOOR)))


def volcano(table: pd.DataFrame, title: str, q: float, n_marks: int) -> go.Figure:
    """Log odds against -log10 q, for the tested latents of smallest q.

    Args:
        table: of a contrast, a row per latent.
        title: of the figure.
        q: false discovery rate of the dashed line.
        n_marks: latents at most.
    """
    import plotly.graph_objects as go

    tested = table[table.q.notna()]
    shown = tested.sort_values("q", kind="stable").head(n_marks)
    side = np.where(shown.q > q, "", np.where(shown.auc > 0.5, "a", "b"))
    figure = go.Figure()
    for name, color in COLORS.items():
        part = shown[side == name]
        figure.add_scatter(
            x=part.log_odds,
            y=minus_log10(part.q.to_numpy()),
            mode="markers",
            name={"a": "larger in a", "b": "larger in b", "": f"q > {q:g}"}[name],
            marker={"color": color, "size": 6, "opacity": 0.8},
            customdata=part[["latent", "auc", "auc_held_out", "freq_a", "freq_b"]].to_numpy(),
            hovertemplate="latent %{customdata[0]:.0f}<br>AUC %{customdata[1]:.3f}, held out %{customdata[2]:.3f}<br>"
            "fires on %{customdata[3]:.0%} of a, %{customdata[4]:.0%} of b<extra></extra>",
        )
    figure.add_hline(y=float(minus_log10(np.array([q]))[0]), line={"dash": "dash", "width": 1, "color": "#999999"})
    left_out = f", {len(shown):,} of {len(tested):,} latents" if len(shown) < len(tested) else ""
    layout = {"width": 700, "height": 440, "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
    titles = {"xaxis_title": "log odds of firing, a against b (nats)", "yaxis_title": "-log10 q"}
    return figure.update_layout(title=f"{title}{left_out}", **titles, **layout)
