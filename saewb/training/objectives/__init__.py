"""What an SAE is trained for: one frozen dataclass per published objective, all with the same methods.

    objective.start(d_in, d_out=None, seed=, dtype=, device=) -> Params     weights to begin with
    objective.resume(sae) -> Params                                         or to go on with
    objective.state(device) -> State                                        what a first step is told
    objective.losses(params, x, y, state) -> Losses                         one batch; differentiable; the reference
    objective.latents(params, x, state) -> Tensor                           activations as after training
    objective.export(params, state) -> SAE                                  the result, with unit decoder rows
    objective.coefficients() -> {term: Coefficient}                         weights that are warmed up or controlled

`saewb.training.Training` does the rest: optimizer, schedules, dead latents, row lengths, many SAEs from one stream. For
a transcoder `start` is given `d_out`, and `losses` another `y` than `x`.
"""

from __future__ import annotations

from typing import Union

from saewb.training.objectives.batchtopk import BatchTopK, Matryoshka, next_threshold
from saewb.training.objectives.gated import Gated
from saewb.training.objectives.jumprelu import JumpReLU
from saewb.training.objectives.losses import Losses, State, fresh_state, with_dead
from saewb.training.objectives.matching_pursuit import MatchingPursuit
from saewb.training.objectives.params import Params, constrain, project_gradient
from saewb.training.objectives.sparsity_coefficient import (
    Coefficient,
    CoefficientWarning,
    coefficient_warnings,
    steered,
    warmed,
)
from saewb.training.objectives.standard import Standard
from saewb.training.objectives.topk import AbsTopK, TopK

Objective = Union[Standard, Gated, TopK, AbsTopK, BatchTopK, Matryoshka, JumpReLU, MatchingPursuit]


def revives(objective: Objective) -> bool:
    """Whether a loss of this objective looks at the dead latents, so that somebody must count them."""
    if isinstance(objective, JumpReLU):
        return objective.pre_act > 0 and objective.pre_act_on == "dead"
    return isinstance(objective, (TopK, AbsTopK, BatchTopK, Matryoshka)) and objective.aux > 0


__all__ = [
    "AbsTopK",
    "BatchTopK",
    "Coefficient",
    "CoefficientWarning",
    "Gated",
    "JumpReLU",
    "Losses",
    "MatchingPursuit",
    "Matryoshka",
    "Objective",
    "Params",
    "Standard",
    "State",
    "TopK",
    "coefficient_warnings",
    "constrain",
    "fresh_state",
    "next_threshold",
    "project_gradient",
    "revives",
    "steered",
    "warmed",
    "with_dead",
]
