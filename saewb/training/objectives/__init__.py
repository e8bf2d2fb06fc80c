"""Training objectives: one frozen dataclass per published objective, a subclass of `base.Objective`.

    Standard            ReLU and an L1 (or Lp) penalty                  `standard`
    Gated               separate paths for gate and magnitude           `gated`
    TopK, AbsTopK       k latents per token                             `topk`
    BatchTopK           k latents per token on average, over a batch    `topk`
    Matryoshka          BatchTopK at several nested widths              `topk`
    JumpReLU            a learned threshold per latent                  `jumprelu`
    MatchingPursuit     latents selected one after the other            `matching_pursuit`
    CrossCoder          BatchTopK over several points or models         `crosscoder`
    L1CrossCoder        the same with ReLU and an L1 penalty            `crosscoder`

Auxiliary losses of dead latents are in `losses`, the weights in `params`, warm-up and target L0 in
`sparsity_coefficient`. `saewb.training.Training` does the rest: optimizer, schedules, dead latents, many SAEs from one
stream.
"""

from __future__ import annotations

from saewb.training.objectives.base import Objective
from saewb.training.objectives.crosscoder import CrossCoder, CrossCoderObjective, L1CrossCoder
from saewb.training.objectives.gated import Gated
from saewb.training.objectives.jumprelu import JumpReLU
from saewb.training.objectives.losses import Losses, ObjectiveState
from saewb.training.objectives.matching_pursuit import MatchingPursuit
from saewb.training.objectives.params import Params, constrain, project_gradient
from saewb.training.objectives.sparsity_coefficient import Coefficient, CoefficientWarning
from saewb.training.objectives.standard import Standard
from saewb.training.objectives.topk import AbsTopK, BatchTopK, Matryoshka, TopK

OBJECTIVES: dict[str, type[Objective]] = {
    kind.__name__: kind
    for kind in (
        Standard,
        Gated,
        TopK,
        AbsTopK,
        BatchTopK,
        Matryoshka,
        JumpReLU,
        MatchingPursuit,
        CrossCoder,
        L1CrossCoder,
    )
}
"""Every objective, by name."""

__all__ = [
    "OBJECTIVES",
    "AbsTopK",
    "BatchTopK",
    "Coefficient",
    "CoefficientWarning",
    "CrossCoder",
    "CrossCoderObjective",
    "Gated",
    "JumpReLU",
    "L1CrossCoder",
    "Losses",
    "MatchingPursuit",
    "Matryoshka",
    "Objective",
    "ObjectiveState",
    "Params",
    "Standard",
    "TopK",
    "constrain",
    "project_gradient",
]
