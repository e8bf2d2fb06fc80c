"""ReLU and JumpReLU by hand: what `objective.losses(...).total.backward()` gives, from the pairs above a threshold."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.pairs import Pairs, by_latent, combine, dots, per_latent
from saewb.kernels.select import above_zero
from saewb.training.objectives import JumpReLU, Losses, Params, Standard, State
from saewb.training.objectives.dead import pre_activation
from saewb.training.sparse_step.auxiliary import add_dead_gradients
from saewb.training.sparse_step.gradients import (
    Batch,
    add_norm_gradient,
    coded_gradients,
    figures,
    leave,
    per_token,
    squared,
)


def standard_step(objective: Standard, batch: Batch, state: State) -> Losses | None:
    """Losses of one batch; gradients are left in the parameters' `.grad`. None if too many latents are on."""
    params = batch.params
    pairs = above_zero(batch.x, batch.readout(), batch.limit)
    if pairs is None:
        return None
    acts, norms = pairs.pre, params.norms()
    error = batch.error(combine(pairs, acts, params.W_dec))
    penalty, d_length = _penalty(pairs, acts * norms[pairs.latents], objective.p)
    weight = state.coefficients["l1"]
    terms = {"mse": squared(error) / len(error), "l1": weight * penalty}
    d_recon, d_length = batch.d_error(error), d_length * weight
    order = by_latent(pairs, params.d_sae)
    d_pre = dots(pairs, d_recon, params.W_dec) + d_length * norms[pairs.latents]
    made = coded_gradients(batch, pairs, order, acts, d_pre, d_recon)
    add_norm_gradient(made, params, norms, per_latent(pairs, d_length * acts, params.d_sae))
    leave(batch, made, d_recon)
    return figures(terms, batch, pairs, acts, error)


def jumprelu_step(objective: JumpReLU, batch: Batch, state: State) -> Losses | None:
    """Losses of one batch; gradients are left in the parameters' `.grad`. None if too many latents are on.

    The pairs are those above the lower end of the straight-through window.
    """
    params, width = batch.params, objective.bandwidth
    thetas, norms = objective.theta(params), params.norms()
    shift = width / 2 - thetas
    found = above_zero(batch.x, batch.readout(params.b_enc + shift), batch.limit)
    if found is None:
        return None
    theta, norm = thetas[found.latents], norms[found.latents]
    pairs = replace(found, pre=found.pre - shift[found.latents])
    on, window = pairs.pre > theta, (pairs.pre - theta).abs() < width / 2
    acts = pairs.pre * on
    error = batch.error(combine(pairs, acts, params.W_dec))
    d_recon = batch.d_error(error)
    sparsity, d_on, d_length = _sparsity(objective, pairs, on, acts * norm, state.coefficients["l0"])
    order = by_latent(pairs, params.d_sae)
    d_act = dots(pairs, d_recon, params.W_dec) + d_length * norm
    jump = window * (d_act * theta + d_on) / width
    d_pre = d_act * on + jump if objective.to_input else d_act * on
    made = coded_gradients(batch, pairs, order, acts, d_pre, d_recon)
    add_norm_gradient(made, params, norms, per_latent(pairs, d_length * acts, params.d_sae))
    d_theta = per_latent(pairs, -jump, params.d_sae)
    made |= {"log_threshold": d_theta * thetas} if objective.threshold == "log" else {"threshold": d_theta}
    terms = {"mse": squared(error) / len(error), "l0": sparsity}
    if objective.pre_act:
        terms["pre_act"] = _dead(objective, batch, error, state, made)
    leave(batch, made, d_recon)
    return figures(terms, batch, pairs, acts, error, in_band=window.sum() / len(error))


def _penalty(pairs: Pairs, lengths: Float[Tensor, " pairs"], p: float) -> tuple[Tensor, Tensor]:
    """Mean over tokens of the Lp norm of what the latents write, and its gradient by each length."""
    n = len(pairs.starts)
    if p == 1:
        return lengths.sum() / n, torch.full_like(lengths, 1 / n)
    sums = per_token(pairs, lengths.pow(p))
    some = torch.where(sums > 0, sums, 1)
    norms = torch.where(sums > 0, some.pow(1 / p), 0)
    slope = some.pow(1 / p - 1)[pairs.tokens] * torch.where(lengths > 0, lengths, 1).pow(p - 1)
    return norms.sum() / n, torch.where(lengths > 0, slope, 0) / n


def _sparsity(
    objective: JumpReLU, pairs: Pairs, on: Tensor, lengths: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """The sparsity loss with its weight, and its gradients by each pair's being on and by the length it writes."""
    n = len(pairs.starts)
    if objective.sparsity == "tanh":
        bent = torch.tanh(objective.tanh_scale * lengths)
        return weight * bent.sum() / n, 0.0, (1 - bent.square()) * (objective.tanh_scale * weight / n)
    l0 = per_token(pairs, on.to(lengths.dtype))
    if objective.sparsity == "step":
        return weight * l0.mean(), weight / n, 0.0
    target = objective.target_l0
    slope = (4 / target * weight / n) * (l0 - target)
    return weight * (2 / target * (l0 - target).square()).mean(), slope[pairs.tokens], 0.0


def _dead(objective: JumpReLU, batch: Batch, error: Tensor, state: State, made: dict[str, Tensor]) -> Tensor:
    def loss(dead: Params, pre: Tensor, error: Tensor, own: State) -> Tensor:
        return objective.pre_act * pre_activation(pre, objective.theta(dead), dead.norms(), own, "dead")

    return add_dead_gradients(loss, batch.params, batch.x, error, state, made)
