"""Plotly figures of what saewb computes: plain `go.Figure` objects, to show, change or save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

import saewb
from saewb.errors import explain

if TYPE_CHECKING:
    import plotly.graph_objects as go

LARGEST = 500  # rows and columns: beyond that a plotly heat map takes seconds to paint


def feature_similarity(
    latents: nn.Module | Tensor,
    features: Tensor,
    *,
    ordered: bool = True,
    title: str = "Cosine of latents and features",
) -> go.Figure:
    """Which latent found which true feature: their cosines as a heat map, a diagonal if a dictionary was recovered.

    Args:
        latents: an SAE, whose decoder is taken, or directions `[n, d]`.
        features: the true directions, `[m, d]`.
        ordered: put latents in the order of the features they are nearest to (`saewb.synthetic.best_ordering`).
        title: above it.
    Returns:
        A figure: a row per latent, a column per feature; blue is -1, white 0, red 1; hover tells both numbers.
    Raises:
        ValueError: if there are more than 500 rows or columns, which a browser would take long to draw.
    """
    import plotly.graph_objects as go

    rows = latents.W_dec.detach() if isinstance(latents, nn.Module) else latents
    if max(len(rows), len(features)) > LARGEST:
        what = f"feature_similarity got {len(rows)} latents and {len(features)} features."
        raise ValueError(
            explain(what, want=f"{LARGEST} at most", fix="feature_similarity(sae.W_dec[:500], features[:500])")
        )
    order = saewb.synthetic.best_ordering(rows, features).cpu() if ordered else range(len(rows))
    names = [str(int(i)) for i in order]
    unit, true = (nn.functional.normalize(t.detach().float().cpu(), dim=1) for t in (rows, features))
    cosines = (unit[[int(i) for i in order]] @ true.T).numpy()
    figure = go.Figure(
        go.Heatmap(
            z=cosines.round(3),
            y=names,
            zmin=-1,
            zmax=1,
            colorscale=[[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]],
            hovertemplate="latent %{y}, feature %{x}<br>cosine %{z:.2f}<extra></extra>",
        )
    )
    layout = {"title": title, "width": 460, "height": 420, "margin": {"l": 50, "r": 10, "t": 40, "b": 40}}
    figure.update_layout(template="none", xaxis_title="feature", yaxis_title="latent", **layout)
    figure.update_yaxes(type="category", autorange="reversed", showticklabels=len(rows) <= 40)
    return figure
