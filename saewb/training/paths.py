"""Two ways to the same gradients, and which one is taken.

plain     `objective.losses` and autograd: the reference, for every objective, device, autocast and compile
sparse    by hand, touching only active latents (`saewb.sparse_step`): many times faster where few are active
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.objectives import Losses, Objective, Params, State
from saewb.training.config import TrainConfig

# Fills `.grad` of every parameter with the gradient of the total, in the parameter's own memory order.
Gradients = Callable[
    [Objective, Params, Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"], State],
    Losses,
]


def choose(objective: Objective, config: TrainConfig) -> Gradients:
    """The way this SAE's gradients are computed.

    The rule: what `config.step` says; "auto" means plain.

    Raises:
        ValueError: if "sparse" is asked for and this objective has no sparse step.
    """
    if config.step == "sparse":
        what = f"{type(objective).__name__} has no sparse step."
        raise ValueError(explain(what, want="step 'auto' or 'plain'", fix="TrainConfig(..., step='auto')"))
    return plain(config)


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
