"""Logistic regression with an L1 or L2 penalty to machine precision, in float64 on the CPU.

    minimize over w, b:   penalty(w) + C sum_i c_i ln(1 + exp(-s_i (x_i . w + b))),  s_i = 1 for label 1, -1 for label 0
    penalty:              ||w||^2 / 2 (l2)   or   ||w||_1 (l1);   b is free
    weights c_i:          1, or as given

as scikit-learn's LogisticRegression with its solvers lbfgs and saga (liblinear penalizes b too), whose solution this is
without their tolerance. Newton's method; for L1 within the orthant that the gradient points to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.errors import explain

Penalty = Literal["l1", "l2"]

_STEPS = 200
_TOLERANCE = 1e-10  # of the gradient, relative to that at the start
_RIDGE = 1e-12  # added to the Hessian, relative to its diagonal


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A fitted classifier of two classes."""

    weight: Float[Tensor, " d"]
    """Coefficients, float64."""
    bias: float
    """Intercept."""
    converged: bool
    """Whether the gradient vanished; False where weights still grow, as of separable classes with a large C."""

    def scores(self, x: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
        """Log odds of label 1: x . weight + bias."""
        return x.double() @ self.weight + self.bias


def fit_logistic(
    x: Float[Tensor, "texts d"],
    y: Bool[Tensor, " texts"],
    *,
    penalty: Penalty = "l2",
    C: float = 1.0,
    weights: Float[Tensor, " texts"] | None = None,
    start: LogisticFit | None = None,
) -> LogisticFit:
    """Fit the classifier; see the module for what is minimized.

    Args:
        x: features, used as they are: not centered, not scaled.
        y: labels of two classes.
        penalty: "l1" or "l2".
        C: inverse strength of the penalty.
        weights: how often each text counts, > 0; None: once. See `balancing_weights`.
        start: of another C on the same features, to begin from; for L1.

    Returns:
        Coefficients and intercept.

    Raises:
        ValueError: for labels of one class, an unknown penalty, C <= 0, or features that are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> fit = fit_logistic(x, torch.tensor([False, False, True, True]))
        >>> round(fit.weight.item(), 6), round(fit.bias, 6)    # as scikit-learn's, to all digits
        (0.958286, -1.437429)
    """
    x, y = x.detach().to("cpu", torch.float64), y.cpu().bool()
    if penalty not in get_args(Penalty):
        raise ValueError(explain(f"got penalty={penalty!r}.", want="'l1' or 'l2'"))
    if not C > 0 or not bool(x.isfinite().all()):
        raise ValueError(explain(f"got C={C}, features {tuple(x.shape)}.", want="C > 0, and finite features"))
    if not 0 < int(y.sum()) < len(y):
        what = f"got {int(y.sum())} of {len(y)} texts with label 1."
        raise ValueError(explain(what, want="texts of both classes"))
    cost = x.new_full((len(y),), C) if weights is None else C * weights.detach().to("cpu", torch.float64)
    if len(cost) != len(y) or not bool((cost > 0).all()):
        raise ValueError(explain(f"got {len(cost)} weights for {len(y)} texts.", want="one for each text, > 0"))
    if penalty == "l1":
        weight, bias, converged = _newton(x, y, cost, l1=True, start=start)
        return LogisticFit(weight, float(bias), converged)
    # The weights are a combination of the texts: fit in their coordinates where these are fewer.
    basis = None
    if x.shape[1] > len(x):
        basis, coordinates = torch.linalg.qr(x.T)
        x = coordinates.T.contiguous()
    weight, bias, converged = _newton(x, y, cost, l1=False)
    return LogisticFit(weight if basis is None else basis @ weight, float(bias), converged)


def balancing_weights(groups: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Weights with which all groups count alike, 1 on average: n / (groups * texts of the group).

    For two classes those of scikit-learn's `class_weight="balanced"`.

    Example:
        >>> balancing_weights(torch.tensor([0, 0, 0, 1]))
        tensor([0.6667, 0.6667, 0.6667, 2.0000], dtype=torch.float64)
    """
    _, group, size = groups.long().unique(return_inverse=True, return_counts=True)
    return len(groups) / (len(size) * size.double())[group]


def _newton(
    x: Tensor, y: Tensor, cost: Tensor, *, l1: bool, start: LogisticFit | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Weights, bias, whether it converged. Features are scaled for conditioning; the penalty is scaled with them.

    `cost` is C times the weight of each text.
    """
    n, d = x.shape
    scale = x.abs().amax(0)
    scale = torch.where(scale > 0, scale, 1.0)
    design = torch.cat([x / scale, x.new_ones(n, 1)], 1)
    sign = torch.where(y, 1.0, -1.0).double()
    strength = torch.cat([1 / scale if l1 else 1 / scale**2, x.new_zeros(1)])  # of the penalty of each scaled weight
    w = x.new_zeros(d + 1)
    share = cost[y].sum() / cost.sum()
    w[-1] = torch.log(share / (1 - share))
    if start is not None:
        w = torch.cat([start.weight * scale, x.new_tensor([start.bias])])

    def loss(w: Tensor) -> Tensor:
        penalty = strength @ (w.abs() if l1 else w.square() / 2)
        return penalty - cost @ torch.nn.functional.logsigmoid(sign * (design @ w))

    value, first = loss(w), None
    for _ in range(_STEPS):
        p = torch.sigmoid(-sign * (design @ w))
        gradient = -(design.T @ (cost * sign * p))
        if l1:
            gradient = _subgradient(w, gradient, strength)
            orthant = torch.where(w == 0, -gradient.sign(), w.sign())
            orthant[-1] = 0
            free = (w != 0) | (gradient != 0)
        else:
            gradient = gradient + strength * w
            free = torch.ones(d + 1, dtype=torch.bool)
        size = float(gradient.abs().max())
        first = max(first or 0.0, size, float(cost.mean()) * 1e-3)
        if size <= _TOLERANCE * first:
            return w[:-1] / scale, w[-1], True
        direction = torch.zeros_like(w)
        part = design[:, free]
        hessian = (part.T * (cost * p * (1 - p))) @ part
        diagonal = hessian.diagonal()
        diagonal += (0 if l1 else strength[free]) + _RIDGE * diagonal.max().clamp_min(1e-300)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            direction[free] = -gradient[free] / hessian.diagonal().clamp_min(1e-300)
        else:
            direction[free] = -torch.cholesky_solve(gradient[free, None], factor)[:, 0]
        if l1:  # a weight at 0 may leave it only into its orthant
            direction = torch.where((w == 0) & (orthant != 0) & (direction.sign() != orthant), 0.0, direction)
        step, improved = _line_search(loss, w, value, gradient, direction, orthant if l1 else None)
        if improved is None and l1:  # along the gradient, which always descends
            step, improved = _line_search(loss, w, value, gradient, -gradient / hessian.diagonal().max(), orthant)
        if improved is None:  # as far as float64 goes
            return w[:-1] / scale, w[-1], size <= 1e-6 * first
        w, value = step, improved
    return w[:-1] / scale, w[-1], False


def _subgradient(w: Tensor, gradient: Tensor, strength: Tensor) -> Tensor:
    """The steepest of the subgradients of the loss with the L1 penalty."""
    at_zero = gradient.sign() * (gradient.abs() - strength).clamp_min(0)
    return torch.where(w == 0, torch.where(strength > 0, at_zero, gradient), gradient + strength * w.sign())


def _line_search(loss, w, value, gradient, direction, orthant):  # type: ignore[no-untyped-def]
    """The first of the steps 1, 1/2, ... that lowers the loss enough; (w, None) if none does."""
    t = 1.0
    for _ in range(40):
        new = w + t * direction
        if orthant is not None:
            leaves = (orthant != 0) & (new.sign() != orthant)
            new = torch.where(leaves, 0.0, new)
        new_value = loss(new)
        expected = gradient @ (new - w)
        if expected < 0 and new_value <= value + 1e-4 * expected and new_value < value:
            return new, new_value
        t /= 2
    return w, None
