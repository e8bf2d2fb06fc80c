"""Weight of a sparsity loss: warm-up, control to a target L0, and warnings about ineffective settings.

Warm-up: `value * min(1, tokens / warmup_tokens)`.

Controller, after the warm-up, once per batch of B tokens, with time constant tau in tokens:

    log c += (B / tau) * clip(log(L0 / target), -1, 1),    L0: mean over about the last ten batches

L0 falls as c grows, so this settles where L0 is the target. It is an integral controller in log space: the same
settings serve coefficients of 1e-5 and of 10. Within tau tokens c moves at most by a factor e. It stays within 1e-4 to
1e4 times `value`; at either bound a warning says that no coefficient gives the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RANGE = 1e4  # largest factor by which the controller changes the coefficient
SMOOTHING = 0.1  # weight of the newest batch in the mean L0 that the controller uses


@dataclass(frozen=True)
class Coefficient:
    """Schedule of the weight of one loss term."""

    value: float
    """The weight, or where the controller starts."""
    warmup_tokens: int = 0
    """Tokens over which it rises linearly from 0."""
    target_l0: float | None = None
    """Latents per token that a controller steers to by changing the weight; None keeps it constant."""

    def warmup_factor(self, n_tokens: int) -> float:
        """Factor in 0..1 of the weight in the batch that starts after `n_tokens` tokens.

        Example:
            >>> [Coefficient(3.0, warmup_tokens=100).warmup_factor(n) for n in (0, 50, 100, 1000)]
            [0.0, 0.5, 1.0, 1.0]
        """
        return 1.0 if n_tokens >= self.warmup_tokens else n_tokens / self.warmup_tokens

    def control(self, value: Float[Tensor, ""], l0: Float[Tensor, ""], *, batch: int, tau: float) -> Float[Tensor, ""]:
        """The controlled weight after a batch of `batch` tokens with smoothed L0 `l0`, computed on the device."""
        pull = (l0.clamp_min(1e-3) / self.target_l0).log().clamp(-1, 1)
        return (value * torch.exp(pull * (batch / tau))).clamp(self.value / RANGE, self.value * RANGE)


@dataclass(frozen=True)
class CoefficientWarning:
    """Warning about a loss weight that has no effect, or too much."""

    name: str
    """Name of the loss term."""
    value: float
    """The weight now."""
    reason: str
    """Observation, with numbers."""
    advice: str
    """Suggested change."""

    def __str__(self) -> str:
        return f"coefficient {self.name}={self.value:.3g}: {self.reason}; {self.advice}"


def coefficient_warnings(
    coefficient: Coefficient,
    name: str,
    value: float,
    *,
    n_tokens: int,
    l0: float,
    d_sae: int,
    in_band: float | None = None,
) -> tuple[CoefficientWarning, ...]:
    """Warnings about a weight, from the last batches; none during its warm-up.

    1. The controller is at its bound: no weight gives the target.
    2. L0 is below 0.5: nearly all latents are off, a larger weight changes nothing.
    3. L0 is above a third of d_sae: the weight has hardly any effect.
    4. No pre-activation is within the straight-through window, so that thresholds have no gradient at all.

    Args:
        coefficient: schedule of the weight.
        name: of the loss term.
        value: the weight now.
        n_tokens: tokens trained on so far.
        l0: active latents per token.
        d_sae: number of latents.
        in_band: pre-activations per token within the straight-through window (JumpReLU).

    Example:
        >>> [w.name for w in coefficient_warnings(Coefficient(5.0), "l1", 5.0, n_tokens=10, l0=0.1, d_sae=64)]
        ['l1']
    """
    if n_tokens < coefficient.warmup_tokens:
        return ()
    problems = []
    if coefficient.target_l0 is not None and not 1.001 / RANGE < value / coefficient.value < RANGE / 1.001:
        problems.append(
            (f"at the end of its range, L0 {l0:.1f}, target {coefficient.target_l0:g}", "try another target")
        )
    elif l0 < 0.5:
        problems.append((f"saturated: L0 is {l0:.2f}, nearly nothing is on", f"try {value / 10:.3g}"))
    elif l0 > d_sae / 3:
        problems.append((f"has no effect: L0 is {l0:.0f} of {d_sae} latents", f"try {value * 10:.3g}"))
    if in_band == 0:
        problems.append(("no pre-activation is near its threshold, which has no gradient", "widen the bandwidth"))
    return tuple(CoefficientWarning(name, value, reason, advice) for reason, advice in problems)
