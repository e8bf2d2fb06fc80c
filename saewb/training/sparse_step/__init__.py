"""The fast training step: `objective.losses(...)` and its backward pass, computed from active latents alone.

A dense step makes six products of batch x d_in x d_sae. Here:

1. Only the encoder's remains, in row tiles whose results are not stored; where the hardware multiplies int8 or bf16
   faster it only preselects latents, which are scored again in full precision (`saewb.kernels.select`).
2. Active latents are listed as (token, latent) pairs; decoding is a sum of k decoder rows per token, the
   gradient of an activation one dot product, the gradients of both matrices sums over pairs sorted by latent (`pairs`).
3. The gradient of b_dec follows from that of the encoder's bias (`gradients`).
4. Losses of dead latents are dense over the dead ones only, by autograd (`gradients`).

No autograd (except in 4), no `[batch, d_sae]` tensor. Memory beyond weights, gradients and Adam's moments: a tile
of 20 MiB, the weights once in low precision, about six tensors of the batch's size, 60 bytes per pair. `sparse_step`
returns None for a batch on which it is slower. On a CPU the same weights and batch give the same bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.precision import Precision, best_precision
from saewb.training.objectives import (
    Gated,
    JumpReLU,
    L1CrossCoder,
    Losses,
    MatchingPursuit,
    Objective,
    ObjectiveState,
    Params,
    Standard,
)
from saewb.training.sparse_step.adam import clipped_step
from saewb.training.sparse_step.gradients import StepInputs
from saewb.training.sparse_step.threshold import gated_step, jumprelu_step, l1_crosscoder_step, standard_step
from saewb.training.sparse_step.topk import topk_step

__all__ = ["MAX_DENSITY", "Precision", "best_precision", "clipped_step", "has_sparse_step", "sparse_step"]

MAX_DENSITY = 1 / 12  # fraction of latents active, above which dense products are faster than pairs


@torch.no_grad()
def sparse_step(
    objective: Objective,
    params: Params,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    state: ObjectiveState,
    precision: Precision = "full",
    max_density: float = MAX_DENSITY,
) -> Losses | None:
    """Compute the losses of one batch and set each parameter's `.grad`; None where a dense step is faster.

    Equal to `objective.losses(params, x, y, state)` and its backward pass up to rounding, whatever the precision. A
    pre-activation within rounding of a threshold, or two equal scores, may fall the other way.

    Args:
        objective: of the training.
        params: its weights, float32 or float64. Gradients replace the old ones, in the same memory on a CPU.
        x: inputs, in training units, of the weights' dtype.
        y: targets; `x` itself for an autoencoder.
        state: as for `objective.losses`.
        precision: of the product that selects: see `best_precision`.
        max_density: fraction of latents active, above which the result is None.

    Returns:
        The losses, without autograd's graph. None if more than `max_density` of the latents are active (the first tile
        of tokens shows it), or if the objective or dtype has no sparse step; old gradients are then void.

    Example:
        >>> from saewb.training.objectives import TopK
        >>> objective, x = TopK(d_sae=512, k=4), torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> params = objective.init_params(16)
        >>> by_hand = sparse_step(objective, params, x, x, objective.initial_state())
        >>> bool(torch.isclose(by_hand.total, objective.losses(params, x, x, objective.initial_state()).total))
        True
        >>> params.W_enc.grad.shape
        torch.Size([16, 512])
    """
    exact = params.W_dec.dtype in (torch.float32, torch.float64) and x.dtype == y.dtype == params.W_dec.dtype
    if not (len(x) and exact and has_sparse_step(objective)):
        return None
    limit = int(max_density * len(x) * params.d_sae)
    inputs = StepInputs(params, x, params.center(x), y, precision, limit)
    if isinstance(objective, Standard):
        return standard_step(objective, inputs, state)
    if isinstance(objective, JumpReLU):
        return jumprelu_step(objective, inputs, state)
    if isinstance(objective, L1CrossCoder):
        return l1_crosscoder_step(objective, inputs, state)
    if isinstance(objective, Gated):
        return gated_step(objective, inputs, state)
    return topk_step(objective, inputs, state)


def has_sparse_step(objective: Objective) -> bool:
    """Whether an objective has a sparse step: not matching pursuit, nor a pre-activation loss of all latents."""
    dense = isinstance(objective, JumpReLU) and objective.pre_act > 0 and objective.pre_act_on == "all"
    return not dense and not isinstance(objective, MatchingPursuit)
