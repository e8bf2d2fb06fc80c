"""One feature as Neuronpedia's API gives it and SAEDashboard's exporter writes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saewb.features.latent import Context, Latent


def feature_row(latent: Latent) -> dict[str, Any]:
    """The keys that `saewb.features.neuronpedia.export_json` names, but for the model and the layer."""
    histogram, logits = latent.histogram, latent.logit_histogram
    made = [_activation(c, 0.0, latent.max, -1.0) for c in latent.top]
    for group in latent.quantiles:
        values = [abs(c.value) for c in group]
        made += [_activation(c, min(values), max(values), 1 / len(latent.quantiles)) for c in group]
    return {
        "index": str(latent.index),
        "maxActApprox": latent.max,
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_heights": list(histogram.counts),
        "freq_hist_data_bar_values": _centers(histogram.edges),
        "logits_hist_data_bar_heights": list(logits.counts) if logits else [],
        "logits_hist_data_bar_values": _centers(logits.edges) if logits else [],
        "pos_str": [w.token for w in latent.logits_top],
        "pos_values": [w.effect for w in latent.logits_top],
        "neg_str": [w.token for w in latent.logits_bottom],
        "neg_values": [w.effect for w in latent.logits_bottom],
        "topkCosSimIndices": [n.latent for n in latent.nearest_by_decoder],
        "topkCosSimValues": [n.cosine for n in latent.nearest_by_decoder],
        "activations": made,
    }


def _centers(edges: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


def _activation(context: Context, low: float, high: float, share: float) -> dict[str, Any]:
    largest = max(range(len(context.acts)), key=lambda j: abs(context.acts[j]))
    return {
        "tokens": list(context.tokens),
        "values": list(context.acts),
        "maxValue": context.acts[largest],
        "maxValueTokenIndex": largest,
        "binMin": low,
        "binMax": high,
        "binContains": share,
    }
