"""Auxiliary losses: what gives dead latents a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.training.objectives.losses import State
from saewb.training.objectives.params import Params


def auxk(
    params: Params,
    pre: Float[Tensor, "tokens d_sae"],
    error: Float[Tensor, "tokens d_out"],
    state: State,
    *,
    k_aux: int,
    signed: bool = False,
    relu: bool = False,
    low: int = 0,
    high: int | None = None,
) -> Float[Tensor, ""]:
    """How badly the dead latents model what the others left over; 0 when none is dead.

        s * mean over tokens of || error - sum_{i in T} z_i W_dec[i] ||^2,    s = min(n_dead / k_aux, 1)

    T: the min(k_aux, n_dead) dead latents with the largest z_i |W_dec[i]| (signed: in magnitude). b_dec takes no part,
    for the error is already free of it. Few dead latents weigh less (s), or three of them would get the gradient of a
    whole error that they cannot model.

    Args:
        params: the weights.
        pre: pre-activations z of all latents.
        error: y - recon, without gradient.
        state: says who is dead.
        k_aux: dead latents per token at most.
        signed: choose by magnitude (AbsTopK).
        relu: use max(z, 0) instead of z. Gao et al. do; without it also a dead latent that is negative on every token
            gets a gradient, which is what revives it.
        low: only the dead among latents low..high take part (Matryoshka).
        high: None means all.

    References:
        Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    rows = state.dead_rows
    if not len(rows):
        return error.new_zeros(())
    dead, W, z = state.dead[rows], params.W_dec[rows], pre[:, rows]
    dead = dead & (rows >= low) & (rows < (params.d_sae if high is None else high))  # a mask: a selection would wait
    score = z.detach() * W.detach().norm(dim=1)
    score = torch.where(dead, score.abs() if signed else score, -torch.inf)
    best = score.topk(min(k_aux, len(rows)), dim=1, sorted=False).indices
    value = z.gather(1, best) * dead[best]
    value = torch.relu(value) if relu else value
    recon = torch.zeros_like(z).scatter(1, best, value) @ W
    scale = (dead.to(error.dtype).sum() / k_aux).clamp(max=1.0)
    return scale * (recon.to(error.dtype) - error).square().sum() / len(error)


def pre_activation(
    pre: Float[Tensor, "tokens d_sae"],
    threshold: Float[Tensor, " d_sae"],
    norms: Float[Tensor, " d_sae"],
    state: State,
    on: str,
) -> Float[Tensor, ""]:
    """How far the pre-activations of dead latents lie below their thresholds.

        mean over tokens of sum_i max(threshold_i - z_i, 0) |W_dec[i]|      (i: dead latents; or all)

    References:
        Conerly et al. 2025, "Dictionary Learning Optimization Techniques", Transformer Circuits, January 2025 (over
        all latents; over the dead ones alone it leaves the live ones unbiased).
    """
    if on == "all":
        return (torch.relu(threshold - pre) * norms).sum() / len(pre)
    rows = state.dead_rows
    if not len(rows):
        return pre.new_zeros(())
    return (torch.relu(threshold[rows] - pre[:, rows]) * norms[rows] * state.dead[rows]).sum() / len(pre)
