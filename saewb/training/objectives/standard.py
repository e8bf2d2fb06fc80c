"""The standard SAE: ReLU, and a penalty on the lengths that active latents write."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import NonNegativeInt, PositiveFloat, config
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, squared_error, with_metrics
from saewb.training.objectives.params import Params, Rows
from saewb.training.objectives.sparsity_coefficient import Coefficient


@final
@config
class Standard(Objective):
    """ReLU latents under an L1 (or Lp) penalty on the lengths they write.

        a = max((x - b_pre) @ W_enc + b_enc, 0);   recons = a @ W_dec + b_dec (+ x @ W_skip)
        mse + l1 * mean over tokens of (sum_i (a_i |W_dec[i]|)^p)^(1/p)

    The row lengths in the penalty count, so that small latents with long rows cannot evade it. For p < 1 the slope of
    the penalty at 0 is infinite; inactive latents get no gradient from it.

    References:
        Conerly et al. 2024, "Update on how we train SAEs", Transformer Circuits, April 2024 (penalty, free rows);
        Bricken et al. 2023 (unit rows).

    Example:
        >>> objective = Standard(d_sae=32, l1=0.1)
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.initial_state()).terms)
        ['l1', 'mse']
    """

    l1: PositiveFloat = 5.0
    """Weight of the penalty, per unit of activation."""
    p: PositiveFloat = 1.0
    """Exponent of the penalty's norm; 1 is L1."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which `l1` rises from 0."""
    target_l0: PositiveFloat | None = None
    """Latents per token that a controller steers to by changing `l1`; None keeps it constant."""
    _: KW_ONLY
    rows: Rows = "free"
    """Decoder rows: of unit length, or free."""
    init_norm: PositiveFloat = 0.1
    """Length of the decoder rows at the start; 1 for unit rows."""

    activation: ClassVar[str] = "relu"
    trainable: ClassVar[tuple[str, ...]] = ("relu",)

    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of the penalty."""
        return {"l1": Coefficient(self.l1, self.warmup_tokens, self.target_l0)}

    def losses(
        self,
        params: Params,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter."""
        acts = torch.relu(params.pre_acts(x))
        recons = params.decode(acts, x)
        lengths = lp_norm(acts * params.norms(), self.p)
        terms = {"mse": squared_error(recons, y), "l1": state.coefficients["l1"] * lengths.sum() / len(y)}
        return with_metrics(terms, y, recons, acts)

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as in training."""
        return torch.relu(params.pre_acts(x))


def lp_norm(values: Float[Tensor, "tokens d_sae"], p: float) -> Float[Tensor, " tokens"]:
    """`(sum_i values_i^p)^(1/p)` of values >= 0, per token, with no gradient where a value (or a whole token) is 0."""
    if p == 1:
        return values.sum(1)
    active = values > 0
    powers = torch.where(active, torch.where(active, values, 1).pow(p), 0).sum(1)
    some = active.any(1)
    return torch.where(some, torch.where(some, powers, 1).pow(1 / p), 0)
