"""Plotly figures of what saewb computes: plain `go.Figure` objects, to show, change or save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import saewb

if TYPE_CHECKING:
    import plotly.graph_objects as go

LARGEST = 500  # rows and columns: beyond that a plotly heat map takes seconds to paint


def feature_similarity(latents: Any, features: Any, *, title: str = "Cosine of latents and features") -> go.Figure:
    """Heat map of the cosines of latents with true features; a diagonal means a recovered dictionary.

    Args:
        latents: an SAE, for its decoder directions, or directions `[n, d]`.
        features: the true directions, `[m, d]`.
        title: title of the figure.

    Returns:
        A figure with a row per latent, sorted by nearest feature (`saewb.synthetic.best_ordering`), and a column per
        feature; blue is -1, white 0, red 1; hover shows latent, feature and cosine.

    Raises:
        ValueError: for more than 500 rows or columns, which a browser takes seconds to draw.
    """
    import plotly.graph_objects as go

    rows = getattr(latents, "W_dec", latents)
    if max(len(rows), len(features)) > LARGEST:
        what = f"feature_similarity got {len(rows)} latents and {len(features)} features."
        fix = "feature_similarity(sae.W_dec[:500], features[:500])"
        raise ValueError(saewb.errors.explain(what, want=f"{LARGEST} at most", fix=fix))
    order, cosines = saewb.synthetic.ordered_cosines(rows, features)
    heat = go.Heatmap(
        z=cosines.cpu().numpy().round(3),
        y=[str(i) for i in order.tolist()],
        zmin=-1,
        zmax=1,
        colorscale=[[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]],
        hovertemplate="latent %{y}, feature %{x}<br>cosine %{z:.2f}<extra></extra>",
    )
    layout = {"title": title, "width": 460, "height": 420, "margin": {"l": 50, "r": 10, "t": 40, "b": 40}}
    figure = go.Figure(heat).update_layout(template="none", xaxis_title="feature", yaxis_title="latent", **layout)
    return figure.update_yaxes(type="category", autorange="reversed", showticklabels=len(rows) <= 40)
