"""Losses of dead latents: dense, but over the dead ones only, and by autograd through the reference itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.training.objectives import Params, State

_TILE = 2**23  # tokens times dead latents at a time

# (dead latents' weights, their pre-activations, error, state of them alone) -> loss, a mean over the tokens given
DeadLoss = Callable[[Params, Tensor, Tensor, State], Tensor]


def add_dead_gradients(
    loss: DeadLoss,
    params: Params,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    state: State,
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """The loss of the dead latents; its gradients are added to those of `W_enc` (transposed), `W_dec` and `b_enc`.

    `loss` sees copies of the dead rows, and the tokens in tiles of at most 8 million pre-activations.

    Args:
        loss: the objective's own loss of dead latents, differentiable.
        params: all weights.
        x: centered inputs.
        error: y - recon.
        state: says who is dead.
        gradients: "W_enc" `[d_sae, d_in]`, "W_dec", "b_enc", and others, changed in place.
    """
    rows = state.dead_rows
    if not len(rows):
        return error.new_zeros(())
    names = [name for name in ("W_enc", "W_dec", "b_enc", "threshold", "log_threshold") if name in params._parameters]
    copies = {n: _row_major(params, n).detach()[rows].requires_grad_() for n in names}
    dead = Params({n: c.T if n == "W_enc" else c for n, c in copies.items()} | {"b_dec": params.b_dec}, "none")
    leaves = [dead.get_parameter(n) for n in names]
    own = replace(state, dead=state.dead[rows], dead_rows=torch.arange(len(rows), device=rows.device))
    total, step = error.new_zeros(()), max(1, _TILE // len(rows))
    with torch.enable_grad():
        for start in range(0, len(x), step):
            tile = x[start : start + step]
            part = loss(dead, torch.addmm(dead.b_enc, tile, dead.W_enc), error[start : start + step], own)
            part = part * (len(tile) / len(x))
            part.backward(inputs=leaves)
            total += part.detach()
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.grad is not None:
            gradients[name].index_add_(0, rows, leaf.grad.T if name == "W_enc" else leaf.grad)
    return total


def _row_major(params: Params, name: str) -> Tensor:
    tensor = params.get_parameter(name)
    return tensor.T if name == "W_enc" else tensor
