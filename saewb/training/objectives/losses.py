"""Input state and output losses of an objective, and the auxiliary losses that revive dead latents.

`ObjectiveState` and `Losses` hold tensors on the device, and nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.metrics import widest_float
from saewb.training.objectives.params import Params


@dataclass(frozen=True)
class ObjectiveState:
    """State of an objective beyond weights and activations. Replaced after each step, never modified.

    Two fields describe dead latents, since reading a number from a GPU makes it wait: `dead` is exact and stays on the
    device; `dead_rows` are the latents that were dead at a look (`saewb.training.dead_latents`), to which work is
    limited. A latent counts as dead if it is silent now and was at that look.
    """

    dead: Bool[Tensor, " d_sae"]
    """Latents in the auxiliary loss; may be true at `dead_rows` only."""
    dead_rows: Int[Tensor, " n_dead"]
    """Latents dead at a look, ascending; if empty, there is no auxiliary loss."""
    coefficients: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Weights of loss terms, by term."""
    threshold: Float[Tensor, ""] | None = None
    """BatchTopK, Matryoshka: the threshold of a latent's length after training."""
    n_thresholds: int = 0
    """Batches in the running mean `threshold`."""
    k: int | float | None = None
    """Active latents per token in this step, of the top-k objectives; None means their `k`."""
    parallel: ParallelContext = SINGLE_PROCESS
    """Processes that share the batch; selection over a batch is over the shards of all."""

    def with_dead(self, dead: Bool[Tensor, " d_sae"]) -> ObjectiveState:
        """The same state with exactly these latents dead."""
        return replace(self, dead=dead, dead_rows=dead.nonzero()[:, 0])

    @torch.no_grad()
    def next_threshold(self, kept_min: Float[Tensor, ""], rate: float) -> ObjectiveState:
        """The state with the threshold after one more batch; unchanged by a batch in which no latent was active.

        A running mean over the first 1 / rate batches and an exponential one from then on.

        Args:
            kept_min: smallest length that an active latent wrote in the batch.
            rate: share of the newest batch.
        """
        kept_min = kept_min.to(widest_float(kept_min.device))
        old = torch.zeros_like(kept_min) if self.threshold is None else self.threshold
        share = max(rate, 1 / (self.n_thresholds + 1))
        new = torch.where(torch.isfinite(kept_min), old + share * (kept_min - old), old)
        return replace(self, threshold=new, n_thresholds=self.n_thresholds + 1)


@dataclass(frozen=True)
class Losses:
    """One batch's losses and metrics, as 0-d tensors on the device unless said otherwise."""

    terms: Mapping[str, Float[Tensor, ""]]
    """Loss terms by name, as they enter `total`; "mse" is always among them."""
    total: Float[Tensor, ""]
    """Sum of the terms, which is differentiated."""
    l0: Float[Tensor, ""]
    """Active latents per token."""
    fvu: Float[Tensor, ""]
    """Fraction of the batch's variance that is not explained; no gradient."""
    fired: Int[Tensor, " d_sae"]
    """Per latent, number of tokens of the batch on which it is active."""
    extra: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Further metrics of the objective: "kept_min" (top-k over a batch), "in_band" (JumpReLU)."""


def squared_error(recons: Float[Tensor, "tokens d_out"], y: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Squared length of the error per token: summed over coordinates, averaged over tokens."""
    return (recons.to(y.dtype) - y).square().sum() / len(y)


def with_metrics(
    terms: Mapping[str, Float[Tensor, ""]],
    y: Float[Tensor, "tokens d_out"],
    recons: Float[Tensor, "tokens d_out"],
    acts: Float[Tensor, "tokens d_sae"],
    **extra: Float[Tensor, ""],
) -> Losses:
    """Build Losses from the terms, with the metrics that every objective reports."""
    with torch.no_grad():
        fired = acts.detach().count_nonzero(0)
        variance = (y - y.mean(0)).square().sum()
        fvu = (recons.to(y.dtype) - y).square().sum() / variance
    return Losses(dict(terms), torch.stack(list(terms.values())).sum(), fired.sum() / len(y), fvu, fired, extra)


def auxk_loss(
    params: Params,
    pre_acts: Float[Tensor, "tokens d_sae"],
    error: Float[Tensor, "tokens d_out"],
    state: ObjectiveState,
    *,
    k_aux: int,
    signed: bool = False,
    relu: bool = False,
    low: int = 0,
    high: int | None = None,
) -> Float[Tensor, ""]:
    """Auxiliary loss of the top-k objectives: how badly dead latents model the error; 0 when none is dead.

        s * mean over tokens of || error - sum_{i in T} z_i W_dec[i] ||^2,    s = min(n_dead / k_aux, 1)

    T: the min(k_aux, n_dead) dead latents with the largest z_i |W_dec[i]| (signed: in magnitude). b_dec takes no part,
    since the error does not contain it. Few dead latents weigh less (s): three of them would otherwise get the gradient
    of a whole error that they cannot model.

    Args:
        params: the weights.
        pre_acts: pre-activations z of all latents.
        error: y - recons, without gradient.
        state: which latents are dead.
        k_aux: dead latents per token at most.
        signed: select by magnitude (AbsTopK).
        relu: use max(z, 0) instead of z. Gao et al. do; without it also a dead latent that is negative on every token
            gets a gradient, which is what revives it.
        low: only the dead among latents low..high take part (Matryoshka).
        high: end of that range; None means d_sae.

    References:
        Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    rows = state.dead_rows
    if not len(rows):
        return error.new_zeros(())
    dead, W, z = state.dead[rows], params.W_dec[rows], pre_acts[:, rows]
    # A mask rather than a selection: the size of a selection would have to be read from the device.
    dead = dead & (rows >= low) & (rows < (params.d_sae if high is None else high))
    score = z.detach() * W.detach().norm(dim=1)
    score = torch.where(dead, score.abs() if signed else score, -torch.inf)
    best = score.topk(min(k_aux, len(rows)), dim=1, sorted=False).indices
    values = z.gather(1, best) * dead[best]
    values = torch.relu(values) if relu else values
    recons = torch.zeros_like(z).scatter(1, best, values) @ W
    scale = (dead.to(error.dtype).sum() / k_aux).clamp(max=1.0)
    return scale * (recons.to(error.dtype) - error).square().sum() / len(error)


def pre_activation_loss(
    pre_acts: Float[Tensor, "tokens d_sae"],
    threshold: Float[Tensor, " d_sae"],
    norms: Float[Tensor, " d_sae"],
    state: ObjectiveState,
    on: Literal["dead", "all"],
) -> Float[Tensor, ""]:
    """Auxiliary loss of JumpReLU: how far the pre-activations of dead latents lie below their thresholds.

        mean over tokens of sum_i max(threshold_i - z_i, 0) |W_dec[i]|      (i: dead latents; or all)

    References:
        Conerly et al. 2025, "Dictionary Learning Optimization Techniques", Transformer Circuits, January 2025 (over
        all latents; over the dead ones alone it leaves the live ones unbiased).
    """
    if on == "all":
        return (torch.relu(threshold - pre_acts) * norms).sum() / len(pre_acts)
    rows = state.dead_rows
    if not len(rows):
        return pre_acts.new_zeros(())
    gaps = torch.relu(threshold[rows] - pre_acts[:, rows])
    return (gaps * norms[rows] * state.dead[rows]).sum() / len(pre_acts)
