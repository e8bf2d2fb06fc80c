"""Figures of scores: confusions, intervals, areas under the curve, correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_N_RESAMPLES = 1000


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion k of n; (0, 1) for n = 0.

        center = (p + z^2 / 2n) / (1 + z^2 / n),  half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Example:
        >>> [round(x, 3) for x in wilson(8, 10)]
        [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p, scale = k / n, 1 + _Z**2 / n
    center = (p + _Z**2 / (2 * n)) / scale
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / scale
    return center - half if k else 0.0, center + half if k < n else 1.0  # exact where rounding would miss them


def classification_figures(tp: int, fn: int, tn: int, fp: int) -> dict[str, Any]:
    """Figures of a confusion.

        balanced_accuracy = (tp / (tp + fn) + tn / (tn + fp)) / 2

    Its interval combines Wilson's intervals of both rates (Newcombe's method of variance estimates recovery). Precision
    and F1 are 0 where nothing is called active; balanced accuracy is nan without both kinds.

    References:
        Zou and Donner (2008), "Construction of confidence limits about effect measures: A general approach".
    """
    rates = [(tp, tp + fn), (tn, tn + fp)]
    value, low, high = math.nan, math.nan, math.nan
    if all(n for _, n in rates):
        shares = [k / n for k, n in rates]
        ends = [wilson(k, n) for k, n in rates]
        value = sum(shares) / 2
        low = value - math.hypot(*(p - end[0] for p, end in zip(shares, ends, strict=True))) / 2
        high = value + math.hypot(*(end[1] - p for p, end in zip(shares, ends, strict=True))) / 2
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    named = {"value": value, "low": low, "high": high, "balanced_accuracy": value}
    named |= {"n": tp + fn + tn + fp, "tp": tp, "fn": fn, "tn": tn, "fp": fp}
    return named | {"precision": precision, "recall": recall, "f1": f1}


def auc(probability: Sequence[float], is_true: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a true one is above a false one, ties half; nan without both kinds.

    Example:
        >>> auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
        0.75
    """
    p, truth = np.asarray(probability, dtype=float), np.asarray(is_true, dtype=bool)
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not n_true or not n_false:
        return math.nan
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal ones, from 1
    return float((rank[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def area_figures(scores: Sequence[float], is_true: Sequence[bool]) -> dict[str, Any]:
    """Figures of an area under the ROC curve, with its 95 % interval by Hanley and McNeil; nan without both kinds.

        se^2 = (A (1 - A) + (n_1 - 1) (Q_1 - A^2) + (n_0 - 1) (Q_0 - A^2)) / (n_1 n_0),  Q_1 = A / (2 - A),
        Q_0 = 2 A^2 / (1 + A)

    References:
        Hanley and McNeil (1982), "The meaning and use of the area under a receiver operating characteristic curve".
    """
    value, n_true = auc(scores, is_true), sum(map(bool, is_true))
    n_false, half = len(is_true) - n_true, math.nan
    if n_true and n_false:
        more, less = value / (2 - value) - value**2, 2 * value**2 / (1 + value) - value**2
        square = value * (1 - value) + (n_true - 1) * more + (n_false - 1) * less
        half = _Z * math.sqrt(max(0.0, square) / (n_true * n_false))
    low, high = max(0.0, value - half), min(1.0, value + half)
    low, high = (math.nan, math.nan) if math.isnan(half) else (low, high)
    return {"value": value, "low": low, "high": high, "auc": value, "n": len(is_true)}


def share_figures(n_right: int, n: int, chance: float) -> dict[str, Any]:
    """Figures of a share of right answers, with Wilson's interval, and what chance gives; nan for none."""
    low, high = wilson(n_right, n)
    return {"value": n_right / n if n else math.nan, "low": low, "high": high, "n": n, "chance": chance}


def correlation_figures(
    true: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]], seed: int
) -> dict[str, Any]:
    """Pearson correlation of predicted and true activations over all tokens of all windows, and per window.

    `value` is that of the concatenation, with a 95 % bootstrap interval over windows; nan where a side is constant.
    `per_window` is the mean over windows in which it is defined.
    """
    sums = np.array([_sums(x, y) for x, y in zip(true, predicted, strict=True)]).reshape(-1, 6)
    value = float(_pearson(sums.sum(0)))
    rng = np.random.default_rng(seed)
    n = len(sums)
    weights = rng.multinomial(n, np.full(n, 1 / n), _N_RESAMPLES) if n else np.zeros((0, 0))
    again = _pearson(weights @ sums) if n > 1 else np.array([math.nan])
    again = again[np.isfinite(again)]
    low, high = np.quantile(again, [0.025, 0.975]).tolist() if len(again) else (math.nan, math.nan)
    each = _pearson(sums)
    each = each[np.isfinite(each)]
    mean = float(each.mean()) if len(each) else math.nan
    return {"value": value, "low": low, "high": high, "n": n, "ev_correlation": value, "per_window": mean}


def _sums(x: Sequence[float], y: Sequence[float]) -> list[float]:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return [len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from n and the sums of x, y, xx, yy, xy; nan where a side is constant, up to rounding."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        var_x, var_y = n * xx - x * x, n * yy - y * y
        is_constant = (var_x <= 1e-12 * n * xx) | (var_y <= 1e-12 * n * yy)
        return np.where(is_constant, math.nan, np.clip((n * xy - x * y) / np.sqrt(var_x * var_y), -1, 1))


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON values: None for nan."""
    return {
        name: plain(value) if isinstance(value, Mapping) else None if _is_nan(value) else value
        for name, value in figures.items()
    }


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
