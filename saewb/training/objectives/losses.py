"""What one step is told and what it answers: State in, Losses out. Both hold tensors on the device; nothing waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class State:
    """What a step needs to know beyond weights and activations. Replaced after each step, never changed.

    Two figures on dead latents, since reading a number from a GPU stops it: `dead` is exact and stays on the device;
    `dead_rows` are the latents that were dead when the host last looked, so that work can be limited to them. A latent
    counts as dead if it is both: silent now, and silent at the last look.
    """

    dead: Bool[Tensor, " d_sae"]  # latents in the auxiliary loss; only at `dead_rows` may it be true
    dead_rows: Int[Tensor, " n_dead"]  # latents dead at the last look, ascending; none: skip the auxiliary loss
    coefficients: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)  # by name of the loss term
    threshold: Float[Tensor, ""] | None = None  # BatchTopK, Matryoshka: what a latent must exceed after training
    n_thresholds: int = 0  # batches that `threshold` is the mean of so far
    team: ParallelContext = SINGLE_PROCESS  # processes among which the batch is shared; what is chosen over a batch is over all of it


@dataclass(frozen=True)
class Losses:
    """One batch's losses and figures, as 0-d tensors on the device unless said otherwise."""

    terms: Mapping[str, Float[Tensor, ""]]  # by name, each as it enters `total`; "mse" is always there
    total: Float[Tensor, ""]  # their sum: what is differentiated
    l0: Float[Tensor, ""]  # active latents per token
    fvu: Float[Tensor, ""]  # fraction of the batch's variance that is not explained; no gradient
    fired: Int[Tensor, " d_sae"]  # per latent, on how many tokens of the batch it was active
    extra: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)  # "kept_min", "in_band": see the objectives


def fresh_state(d_sae: int, coefficients: Mapping[str, Coefficient], device: torch.device | str = "cpu") -> State:
    """A state in which nothing is dead and no coefficient is warmed up any more.

    Example:
        >>> fresh_state(4, {"l1": Coefficient(0.5, warmup_tokens=10)}).coefficients["l1"].item()
        0.5
    """
    return State(
        dead=torch.zeros(d_sae, dtype=torch.bool, device=device),
        dead_rows=torch.zeros(0, dtype=torch.int64, device=device),
        coefficients={name: torch.tensor(c.value, device=device) for name, c in coefficients.items()},
    )


def with_dead(state: State, dead: Bool[Tensor, " d_sae"]) -> State:
    """The same state with exactly these latents dead."""
    return replace(state, dead=dead, dead_rows=dead.nonzero()[:, 0])


def squared_error(recon: Float[Tensor, "tokens d_out"], y: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Squared length of the error per token: summed over coordinates, averaged over tokens."""
    return (recon.to(y.dtype) - y).square().sum() / len(y)


def measured(
    terms: Mapping[str, Float[Tensor, ""]],
    y: Float[Tensor, "tokens d_out"],
    recon: Float[Tensor, "tokens d_out"],
    latents: Float[Tensor, "tokens d_sae"],
    **extra: Float[Tensor, ""],
) -> Losses:
    """Losses from their terms, and the figures that every objective reports."""
    with torch.no_grad():
        fired = latents.detach().count_nonzero(0)
        spread = (y - y.mean(0)).square().sum()
        fvu = (recon.to(y.dtype) - y).square().sum() / spread
    return Losses(dict(terms), torch.stack(list(terms.values())).sum(), fired.sum() / len(y), fvu, fired, extra)
