"""TopK and AbsTopK by hand: what `objective.losses(...).total.backward()` gives, from the k pairs of each token."""

from __future__ import annotations

from torch import Tensor

from saewb.objectives import AbsTopK, Losses, Params, State, TopK
from saewb.objectives.dead import auxk
from saewb.sparse_step.auxiliary import DeadLoss, add_dead_gradients
from saewb.sparse_step.backward import Batch, coded_gradients, figures, leave
from saewb.sparse_step.pairs import by_latent, combine, dots
from saewb.sparse_step.selection import top_per_token


def topk_step(objective: TopK | AbsTopK, batch: Batch, state: State) -> Losses:
    """Losses of one batch; gradients are left in the parameters' `.grad`."""
    signed, params = isinstance(objective, AbsTopK), batch.params
    pairs = top_per_token(batch.x, batch.readout(norms=params.norms()), objective.k, signed=signed)
    acts = pairs.pre if signed else pairs.pre.clamp(min=0)
    error = batch.error(combine(pairs, acts, params.W_dec))
    terms = {"mse": error.square().sum() / len(error)}
    d_recon = batch.d_error(error)
    d_pre = dots(pairs, d_recon, params.W_dec)
    d_pre = d_pre if signed else d_pre * (acts > 0)
    made = coded_gradients(batch, pairs, by_latent(pairs, params.d_sae), acts, d_pre, d_recon)
    if objective.aux:
        terms["aux"] = add_dead_gradients(dead_loss(objective, signed), params, batch.x, -error, state, made)
    leave(batch, made, d_recon)
    return figures(terms, batch, pairs, acts, error)


def dead_loss(objective: TopK | AbsTopK, signed: bool) -> DeadLoss:
    """The objective's auxiliary loss, with its weight."""
    relu = isinstance(objective, TopK) and objective.aux_relu

    def loss(dead: Params, pre: Tensor, error: Tensor, state: State) -> Tensor:
        k_aux = objective.k_aux or max(1, error.shape[1] // 2)
        return objective.aux * auxk(dead, pre, error, state, k_aux=k_aux, signed=signed, relu=relu)

    return loss
