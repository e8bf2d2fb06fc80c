"""What an SAE is trained for: one frozen dataclass per published objective, all with the same methods.

    objective.start(d_in, d_out=None, seed=, dtype=, device=) -> Params     weights to begin with
    objective.resume(sae) -> Params                                         or to go on with
    objective.state(device) -> State                                        what a first step is told
    objective.losses(params, x, y, state) -> Losses                         one batch; differentiable; the reference
    objective.latents(params, x, state) -> Tensor                           activations as after training
    objective.export(params, state) -> SAE                                  the result, with unit decoder rows
    objective.coefficients() -> {term: weight}                              those that are warmed up or controlled

`saewb.training.Training` does the rest: optimizer, schedules, dead latents, row lengths, many SAEs from one stream. For
a transcoder `start` is given `d_out`, and `losses` another `y` than `x`.
"""

from __future__ import annotations

from typing import Union

from saewb.objectives.losses import Losses, State, fresh_state, with_dead
from saewb.objectives.topk import AbsTopK, TopK
from saewb.objectives.weights import Params, project_gradient, unit_rows

Objective = Union[TopK, AbsTopK]

__all__ = [
    "AbsTopK",
    "Losses",
    "Objective",
    "Params",
    "State",
    "TopK",
    "fresh_state",
    "project_gradient",
    "unit_rows",
    "with_dead",
]
