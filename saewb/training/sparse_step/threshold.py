"""Sparse steps of Standard, JumpReLU and Gated, from the pairs above a threshold."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.pairs import Pairs, by_latent, combine, dots, gather_rows, per_latent
from saewb.kernels.select import above_zero
from saewb.training.objectives import Gated, JumpReLU, L1CrossCoder, Losses, ObjectiveState, Params, Standard
from saewb.training.sparse_step.gradients import (
    StepInputs,
    add_dead_gradients,
    add_norm_gradient,
    encoder_decoder_gradients,
    per_token,
    set_gradients,
    sum_of_squares,
    with_metrics,
)


def standard_step(objective: Standard, inputs: StepInputs, state: ObjectiveState) -> Losses | None:
    """Standard: losses of one batch, with gradients in `.grad`; None if too many latents are active."""
    params = inputs.params
    pairs = above_zero(inputs.x, inputs.readout(), inputs.limit)
    if pairs is None:
        return None
    acts, norms = pairs.pre, params.norms()
    error = inputs.error(combine(pairs, acts, params.W_dec))
    penalty, d_length = _penalty(pairs, acts * norms[pairs.latents], objective.p)
    weight = state.coefficients["l1"]
    terms = {"mse": sum_of_squares(error) / len(error), "l1": weight * penalty}
    d_recons, d_length = inputs.d_error(error), d_length * weight
    order = by_latent(pairs, params.d_sae)
    d_pre = dots(pairs, d_recons, params.W_dec) + d_length * norms[pairs.latents]
    grads = encoder_decoder_gradients(inputs, pairs, order, acts, d_pre, d_recons)
    add_norm_gradient(grads, params, norms, per_latent(pairs, d_length * acts, params.d_sae))
    set_gradients(inputs, grads, d_recons)
    return with_metrics(terms, inputs, pairs, acts, error)


def l1_crosscoder_step(objective: L1CrossCoder, inputs: StepInputs, state: ObjectiveState) -> Losses | None:
    """L1CrossCoder: losses of one batch, with gradients in `.grad`; None if too many latents are active."""
    params, n = inputs.params, len(inputs.x)
    pairs = above_zero(inputs.x, inputs.readout(), inputs.limit)
    if pairs is None:
        return None
    acts, norms = pairs.pre, params.block_norms()
    weights = objective.penalties(params) * (state.coefficients["l1"] / n)
    lengths = norms.sum(0) * weights
    error = inputs.error(combine(pairs, acts, params.W_dec))
    terms = {"mse": sum_of_squares(error) / n, "l1": (acts * lengths[pairs.latents]).sum()}
    d_recons = inputs.d_error(error)
    order = by_latent(pairs, params.d_sae)
    d_pre = dots(pairs, d_recons, params.W_dec) + lengths[pairs.latents]
    grads = encoder_decoder_gradients(inputs, pairs, order, acts, d_pre, d_recons)
    add_norm_gradient(grads, params, norms, per_latent(pairs, acts, params.d_sae) * weights)
    set_gradients(inputs, grads, d_recons)
    return with_metrics(terms, inputs, pairs, acts, error)


def jumprelu_step(objective: JumpReLU, inputs: StepInputs, state: ObjectiveState) -> Losses | None:
    """JumpReLU: losses of one batch, with gradients in `.grad`; None if too many latents are active.

    The pairs are those above the lower end of the straight-through window.
    """
    params, width = inputs.params, objective.bandwidth
    thetas, norms = objective.theta(params), params.norms()
    shift = width / 2 - thetas
    pairs = above_zero(inputs.x, inputs.readout(params.b_enc + shift), inputs.limit)
    if pairs is None:
        return None
    theta, norm = thetas[pairs.latents], norms[pairs.latents]
    pairs = replace(pairs, pre=pairs.pre - shift[pairs.latents])
    active, window = pairs.pre > theta, (pairs.pre - theta).abs() < width / 2
    acts = pairs.pre * active
    error = inputs.error(combine(pairs, acts, params.W_dec))
    d_recons = inputs.d_error(error)
    sparsity, d_active, d_length = _sparsity(objective, pairs, active, acts * norm, state.coefficients["l0"])
    order = by_latent(pairs, params.d_sae)
    d_act = dots(pairs, d_recons, params.W_dec) + d_length * norm
    jump = window * (d_act * theta + d_active) / width
    d_pre = d_act * active + jump if objective.to_input else d_act * active
    grads = encoder_decoder_gradients(inputs, pairs, order, acts, d_pre, d_recons)
    add_norm_gradient(grads, params, norms, per_latent(pairs, d_length * acts, params.d_sae))
    d_theta = per_latent(pairs, -jump, params.d_sae)
    grads |= {"log_threshold": d_theta * thetas} if objective.threshold == "log" else {"threshold": d_theta}
    terms = {"mse": sum_of_squares(error) / len(error), "l0": sparsity}
    if objective.pre_act:
        terms["pre_act"] = _dead_loss(objective, inputs, error, state, grads)
    set_gradients(inputs, grads, d_recons)
    return with_metrics(terms, inputs, pairs, acts, error, in_band=window.sum() / len(error))


def gated_step(objective: Gated, inputs: StepInputs, state: ObjectiveState) -> Losses | None:
    """Gated: losses of one batch, with gradients in `.grad`; None if too many gates are open."""
    params, n, d_sae = inputs.params, len(inputs.x), inputs.params.d_sae
    pairs = above_zero(inputs.x, inputs.readout(params.b_gate), inputs.limit)
    if pairs is None:
        return None
    gate, norms, weight = pairs.pre, params.norms(), state.coefficients["l1"]
    stretch, u = params.r_mag.exp()[pairs.latents], gate - params.b_gate[pairs.latents]
    acts = (stretch * u + params.b_mag[pairs.latents]).clamp(min=0)
    error = inputs.error(combine(pairs, acts, params.W_dec))
    gate_error = inputs.error(combine(pairs, gate, params.W_dec))
    terms = {
        "mse": sum_of_squares(error) / n,
        "l1": weight * (gate * norms[pairs.latents]).sum() / n,
        "gate_mse": sum_of_squares(gate_error) / n,
    }
    d_recons, d_gate_recons = inputs.d_error(error), inputs.d_error(gate_error)
    order = by_latent(pairs, d_sae)
    d_act = dots(pairs, d_recons, params.W_dec) * (acts > 0)
    d_gate = dots(pairs, d_gate_recons, params.W_dec) + norms[pairs.latents] * (weight / n)
    d_u = d_act * stretch + d_gate
    grads = {
        "W_enc": gather_rows(order, d_u, inputs.x, inputs.gradient_buffer("W_enc")),
        "W_dec": gather_rows(order, acts, d_recons, inputs.gradient_buffer("W_dec")),
        "b_gate": per_latent(pairs, d_gate, d_sae),
        "b_mag": per_latent(pairs, d_act, d_sae),
        "r_mag": per_latent(pairs, d_act * stretch * u, d_sae),
    }
    add_norm_gradient(grads, params, norms, per_latent(pairs, gate, d_sae) * (weight / n))
    if not objective.frozen:  # the decoder also gets the gradient of the gate's reconstruction
        grads["W_dec"] += gather_rows(order, gate, d_gate_recons)
        d_recons = d_recons + d_gate_recons
    set_gradients(inputs, grads, d_recons, d_bias=per_latent(pairs, d_u, d_sae))
    return with_metrics(terms, inputs, pairs, acts, error)


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
    objective: JumpReLU, pairs: Pairs, active: Tensor, lengths: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """The sparsity loss with its weight, and its gradients by each pair's activity and by the length it writes."""
    n = len(pairs.starts)
    if objective.sparsity == "tanh":
        tanh = torch.tanh(objective.tanh_scale * lengths)
        return weight * tanh.sum() / n, 0.0, (1 - tanh.square()) * (objective.tanh_scale * weight / n)
    l0 = per_token(pairs, active.to(lengths.dtype))
    if objective.sparsity == "step":
        return weight * l0.mean(), weight / n, 0.0
    target = objective.target_l0
    slope = (4 / target * weight / n) * (l0 - target)
    return weight * (2 / target * (l0 - target).square()).mean(), slope[pairs.tokens], 0.0


def _dead_loss(
    objective: JumpReLU, inputs: StepInputs, error: Tensor, state: ObjectiveState, grads: dict[str, Tensor]
) -> Tensor:
    def loss(dead: Params, pre_acts: Tensor, error: Tensor, dead_state: ObjectiveState) -> Tensor:
        return objective.auxiliary_loss(dead, pre_acts, dead_state)

    return add_dead_gradients(loss, inputs.params, inputs.x, error, state, grads)
