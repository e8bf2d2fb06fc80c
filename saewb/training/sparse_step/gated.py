"""The gated SAE by hand: what `objective.losses(...).total.backward()` gives, from the pairs whose gate is open."""

from __future__ import annotations

from saewb.kernels.pairs import by_latent, combine, dots, gather_rows, per_latent
from saewb.kernels.select import above_zero
from saewb.training.objectives import Gated, Losses, State
from saewb.training.sparse_step.gradients import Batch, add_norm_gradient, figures, leave, squared


def gated_step(objective: Gated, batch: Batch, state: State) -> Losses | None:
    """Losses of one batch; gradients are left in the parameters' `.grad`. None if too many gates are open."""
    params, n, d_sae = batch.params, len(batch.x), batch.params.d_sae
    pairs = above_zero(batch.x, batch.readout(params.b_gate), batch.limit)
    if pairs is None:
        return None
    gate, norms, weight = pairs.pre, params.norms(), state.coefficients["l1"]
    stretch, u = params.r_mag.exp()[pairs.latents], gate - params.b_gate[pairs.latents]
    acts = (stretch * u + params.b_mag[pairs.latents]).clamp(min=0)
    error = batch.error(combine(pairs, acts, params.W_dec))
    gate_error = batch.error(combine(pairs, gate, params.W_dec))
    terms = {
        "mse": squared(error) / n,
        "l1": weight * (gate * norms[pairs.latents]).sum() / n,
        "gate_mse": squared(gate_error) / n,
    }
    d_recon, d_gated = batch.d_error(error), batch.d_error(gate_error)
    order = by_latent(pairs, d_sae)
    d_act = dots(pairs, d_recon, params.W_dec) * (acts > 0)
    d_gate = dots(pairs, d_gated, params.W_dec) + norms[pairs.latents] * (weight / n)
    d_u = d_act * stretch + d_gate
    made = {
        "W_enc": gather_rows(order, d_u, batch.x, batch.memory("W_enc")),
        "W_dec": gather_rows(order, acts, d_recon, batch.memory("W_dec")),
        "b_gate": per_latent(pairs, d_gate, d_sae),
        "b_mag": per_latent(pairs, d_act, d_sae),
        "r_mag": per_latent(pairs, d_act * stretch * u, d_sae),
    }
    add_norm_gradient(made, params, norms, per_latent(pairs, gate, d_sae) * (weight / n))
    if not objective.frozen:  # the decoder also learns from what the gate alone reconstructs
        made["W_dec"] += gather_rows(order, gate, d_gated)
        d_recon = d_recon + d_gated
    leave(batch, made, d_recon, d_bias=per_latent(pairs, d_u, d_sae))
    return figures(terms, batch, pairs, acts, error)
