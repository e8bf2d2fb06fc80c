"""Sparse step of the top-k objectives, from the active pairs.

One computation over levels (a single one except for Matryoshka), each of the latents low..high:

    recons_l = recons_(l-1) + acts[low:high] @ W_dec[low:high];     error_l = recons_l - y
    d_recons_l = sum over levels m >= l of d error_m: the gradient for the activations and decoder rows of level l
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.distributed import ParallelContext
from saewb.kernels.pairs import Pairs, by_latent, combine, dots, pairs_of
from saewb.kernels.precision import MARGIN
from saewb.kernels.select import top_of_batch, top_per_token
from saewb.training.objectives import Losses, ObjectiveState
from saewb.training.objectives.topk import BatchTopKObjective, TopKObjective
from saewb.training.sparse_step.gradients import (
    StepInputs,
    add_auxk_gradients,
    add_dead_gradients,
    encoder_decoder_gradients,
    has_many_dead,
    set_gradients,
    sum_of_squares,
    with_metrics,
)

_PER_PAIR = 25  # scores per pair scored again, above which a low-precision product is worthwhile


@dataclass(frozen=True)
class Level:
    """Active pairs of the latents low..high, counted from low, and the error of the reconstruction up to high."""

    low: int
    high: int
    pairs: Pairs
    error: Float[Tensor, "batch d_out"]
    """recons - y."""


def topk_step(objective: TopKObjective, inputs: StepInputs, state: ObjectiveState) -> Losses | None:
    """Losses of one batch, with gradients in the parameters' `.grad`; None if too many latents are active."""
    selected = _select(objective, inputs, objective.k_in(state), state.parallel)
    if selected is None:
        return None
    pairs = selected if objective.signed else replace(selected, pre=selected.pre.clamp(min=0))
    levels = _decode_levels(inputs, pairs, objective.levels)
    terms = {objective.mse_name(level.high): sum_of_squares(level.error) / len(inputs.y) for level in levels}
    grads, d_recons = _gradients(inputs, levels, objective.signed)
    if objective.aux:
        terms["aux"] = _dead_loss(objective, inputs, levels, state, grads)
    set_gradients(inputs, grads, d_recons)
    extra = {}
    if isinstance(objective, BatchTopKObjective):
        lengths = pairs.pre * objective.lengths(inputs.params)[pairs.latents]
        extra["kept_min"] = lengths.min() if len(pairs) else lengths.new_tensor(torch.inf)
    return with_metrics(terms, inputs, pairs, pairs.pre, levels[-1].error, **extra)


def _select(objective: TopKObjective, inputs: StepInputs, k: int | float, parallel: ParallelContext) -> Pairs | None:
    readout, n_pairs = inputs.readout(norms=objective.lengths(inputs.params)), int(k * len(inputs.x))
    if not 0 < n_pairs <= inputs.limit:
        return None
    if k + MARGIN.get(inputs.precision, 0) > objective.d_sae / _PER_PAIR:
        readout = replace(readout, precision="full")
    if isinstance(objective, BatchTopKObjective):
        n = int(k * len(inputs.x) * parallel.size)
        pairs = top_of_batch(inputs.x, readout, n, 4 * inputs.limit)
        if pairs is None or parallel.size == 1:
            return pairs
        scores = readout.score(pairs.pre, pairs.latents).clamp(min=0)
        return pairs.where(parallel.topk_mask(scores, n).nonzero()[:, 0])  # the n best of all processes
    return top_per_token(inputs.x, readout, int(k), signed=objective.signed)


def _decode_levels(inputs: StepInputs, pairs: Pairs, limits: tuple[tuple[int, int], ...]) -> list[Level]:
    """Forward pass through the levels; `pairs.pre` are the activations."""
    levels: list[Level] = []
    for low, high in limits:
        inside = pairs if len(limits) == 1 else _between(pairs, low, high)
        decoded = combine(inside, inside.pre, inputs.params.W_dec[low:high])
        error = decoded.add_(levels[-1].error) if levels else inputs.error(decoded)
        levels.append(Level(low, high, inside, error))
    return levels


def _between(pairs: Pairs, low: int, high: int) -> Pairs:
    inside = (pairs.latents >= low) & (pairs.latents < high)
    return pairs_of(pairs.tokens[inside], pairs.latents[inside] - low, pairs.pre[inside], len(pairs.starts))


def _gradients(inputs: StepInputs, levels: list[Level], signed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Backward pass through the levels: gradients by parameter, and that of the offset."""
    parts, d_recons = [], torch.zeros((), device=inputs.y.device)
    for level in reversed(levels):
        span = slice(level.low, level.high)
        d_recons = inputs.d_error(level.error).add_(d_recons)
        order = by_latent(level.pairs, level.high - level.low)
        d_pre = dots(level.pairs, d_recons, inputs.params.W_dec[span])
        d_pre = d_pre if signed else d_pre * (level.pairs.pre > 0)
        parts.insert(0, encoder_decoder_gradients(inputs, level.pairs, order, level.pairs.pre, d_pre, d_recons, span))
    gradients = {}
    for name in parts[0]:  # the levels of one buffer are already concatenated
        buffer = inputs.gradient_buffer(name)
        gradients[name] = torch.cat([part[name] for part in parts]) if buffer is None else buffer
    return gradients, d_recons


def _dead_loss(
    objective: TopKObjective, inputs: StepInputs, levels: list[Level], state: ObjectiveState, grads: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """Compute the auxiliary loss of the dead latents, and add its gradients."""
    params, rows, parts, of_level = inputs.params, state.dead_rows, [], state
    for level in levels if objective.aux_by_level else levels[-1:]:
        if objective.aux_by_level:
            of_level = replace(state, dead_rows=rows[(rows >= level.low) & (rows < level.high)])
        k_aux = objective.k_aux or max(1, level.error.shape[1] // 2)  # as in `objective.auxiliary_loss`
        if has_many_dead(len(of_level.dead_rows), k_aux):
            how = {"weight": objective.aux, "k_aux": k_aux, "signed": objective.signed, "relu": objective.aux_relu}
            part = add_auxk_gradients(params, inputs.x, -level.error, of_level, grads, **how)
        else:
            part = add_dead_gradients(objective.auxiliary_loss, params, inputs.x, -level.error, of_level, grads)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
