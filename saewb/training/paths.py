"""Two ways to the same gradients, and which one is taken.

plain     `objective.losses` and autograd: the reference, for every objective, device, autocast and compile
sparse    by hand, touching only active latents (`saewb.training.sparse_step`): many times faster where few are active
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.training.config import TrainConfig
from saewb.training.objectives import Losses, Objective, Params, State
from saewb.training.sparse_step import MAX_DENSITY, best_precision, has_sparse_step, sparse_step

# Fills `.grad` of every parameter with the gradient of the total, in the parameter's own memory order.
Gradients = Callable[
    [Objective, Params, Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"], State],
    Losses,
]


def choose(objective: Objective, config: TrainConfig) -> Gradients:
    """The way this SAE's gradients are computed.

    The rule for "auto": sparse on a CPU, batch by batch, unless more than 1 in 12 latents are on in it (ReLU and
    JumpReLU SAEs start so; the first few hundred tokens show it), the objective has no sparse step, or autocast or
    compile are asked for, which concern the plain one. On other devices plain, until it is measured there which is
    quicker. "sparse" is sparse on every device and at every density; "plain" is always plain.

    Which one is taken depends on nothing but weights and batch, so that a resumed training takes the same ones.

    Raises:
        ValueError: if "sparse" is asked for and this objective has no sparse step, or with autocast or compile.
    """
    dense = config.autocast is not None or config.compile is not None
    if config.step == "sparse":
        if not has_sparse_step(objective):
            what = f"{type(objective).__name__} has no sparse step (or not with these losses)."
            raise ValueError(explain(what, want="step 'auto' or 'plain'", fix="TrainConfig(..., step='auto')"))
        if dense:
            what = f"step='sparse' with autocast={config.autocast}, compile={config.compile!r}."
            raise ValueError(explain(what, want="neither: both concern step='plain'", fix="TrainConfig(step='sparse')"))
        return sparse(config, max_density=1.0)
    return plain(config) if config.step == "plain" or dense else sparse(config, max_density=MAX_DENSITY)


def sparse(config: TrainConfig, max_density: float) -> Gradients:
    """Losses and gradients by hand where at most this share of the latents is on; by `plain` where not."""
    otherwise = plain(config)

    def gradients(objective: Objective, params: Params, x: Tensor, y: Tensor, state: State) -> Losses:
        found = None
        if config.step == "sparse" or x.device.type == "cpu":
            found = sparse_step(objective, params, x, y, state, best_precision(x.device), max_density)
        return otherwise(objective, params, x, y, state) if found is None else found

    return gradients


def plain(config: TrainConfig) -> Gradients:
    """Losses by the objective, gradients by autograd, under the config's autocast and compiler."""
    losses = _losses if config.compile is None else torch.compile(_losses, backend=config.compile)

    def gradients(objective: Objective, params: Params, x: Tensor, y: Tensor, state: State) -> Losses:
        params.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=config.autocast, enabled=config.autocast is not None):
            result = losses(objective, params, x, y, state)
        result.total.backward()
        return result

    return gradients


def _losses(objective: Objective, params: Params, x: Tensor, y: Tensor, state: State) -> Losses:
    return objective.losses(params, x, y, state)
