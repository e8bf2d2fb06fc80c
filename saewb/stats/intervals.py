"""Standard errors and confidence intervals of figures in tables."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided interval of 95 %."""


def wilson_interval(
    count: Float[np.ndarray, " rows"], n: Float[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Interval of 95 % of a share, `count` of `n`: within 0..1, and wider than 0 also for none or all.

    Args:
        count: successes.
        n: trials; the interval is nan where there are none.

    References:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Example:
        >>> low, high = wilson_interval(np.array([0.0, 5.0]), np.array([10.0, 10.0]))
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([0.0, 0.237], [0.278, 0.763])
    """
    count, n = np.asarray(count, np.float64), np.asarray(n, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, square = count / n, Z95**2 / n
        middle = (share + square / 2) / (1 + square)
        half = Z95 * np.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return np.clip(middle - half, 0, share), np.clip(middle + half, share, 1)  # beyond rounding of none and all


def mean_and_error(values: Float[np.ndarray, " rows"]) -> tuple[float, float, int]:
    """Mean, standard error of it and number of the values that are not nan; nan where there are too few.

    Example:
        >>> mean_and_error(np.array([1.0, 3.0, np.nan]))
        (2.0, 1.0, 2)
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    return mean, float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"), n


def normal_interval(mean: float, error: float, least: float = -np.inf, most: float = np.inf) -> tuple[float, float]:
    """Interval of 95 % about a mean, within bounds; nan where the error is.

    Example:
        >>> normal_interval(0.5, 0.5, 0.0, 1.0), normal_interval(0.0, 1.0)[1] == Z95
        ((0.0, 1.0), True)
    """
    low, high = np.clip([mean - Z95 * error, mean + Z95 * error], least, most)
    return float(low), float(high)
