"""The gated SAE: one path decides which latents are active, another how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import NonNegativeInt, PositiveFloat, config
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, squared_error, with_metrics
from saewb.training.objectives.params import Params, safe_norms
from saewb.training.objectives.sparsity_coefficient import Coefficient


@final
@config
class Gated(Objective):
    """Gate and magnitude with shared directions; only the gate is penalized, so that magnitudes do not shrink.

        u = (x - b_pre) @ W_enc;   gate = u + b_gate;   a = 1[gate > 0] * max(exp(r_mag) u + b_mag, 0)
        mse + l1 * mean sum_i max(gate_i, 0) |W_dec[i]| + mean |y - (max(gate, 0) @ frozen W_dec + frozen b_dec)|^2

    The third term trains the gate (the step has no gradient). Its decoder is frozen, as in the paper: gradients
    reach the encoder but not `W_dec`, `b_dec`, or `W_skip` through it. SAELens leaves them in, which pulls the decoder
    towards reconstructing from penalized latents; `frozen=False` does the same.

    References:
        Rajamanoharan et al. 2024, arXiv:2404.16014, eqs. 5 to 8.

    Example:
        >>> objective = Gated(d_sae=32, l1=0.1)
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.initial_state()).terms)
        ['gate_mse', 'l1', 'mse']
    """

    l1: PositiveFloat = 1.0
    """Weight of the penalty, per unit of gate pre-activation."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which `l1` rises from 0."""
    target_l0: PositiveFloat | None = None
    """Latents per token that a controller steers to by changing `l1`; None keeps it constant."""
    frozen: bool = True
    """Whether the loss of the gate's reconstruction has no gradient in the decoder."""

    activation: ClassVar[str] = "jumprelu"
    trainable: ClassVar[tuple[str, ...]] = ("jumprelu", "relu")

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
        u = params.center(x) @ params.W_enc
        gate = torch.relu(u + params.b_gate)
        acts = gated_activations(params, u)
        recons = params.decode(acts, x)
        if self.frozen:
            offset = params.offset(x).detach()
            gate_recons = gate @ params.W_dec.detach() + offset
        else:
            gate_recons = params.decode(gate, x)
        terms = {
            "mse": squared_error(recons, y),
            "l1": state.coefficients["l1"] * (gate * params.norms()).sum() / len(y),
            "gate_mse": squared_error(gate_recons, y),
        }
        return with_metrics(terms, y, recons, acts)

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as in training."""
        return gated_activations(params, params.center(x) @ params.W_enc)

    def _initial_values(self) -> Mapping[str, float]:
        return {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}

    def _trained_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the threshold to the bias of the gate."""
        b_mag = tensors.pop("b_enc")
        threshold = tensors.pop("threshold", torch.zeros_like(b_mag))
        return {**tensors, "b_mag": b_mag, "b_gate": b_mag - threshold, "r_mag": torch.zeros_like(b_mag)}

    def _sae_tensors(self, params: Params, state: ObjectiveState) -> dict[str, Tensor]:
        """The exactly equal JumpReLU SAE, of threshold `max(b_mag - exp(r_mag) b_gate, 0)`."""
        stretch = params.r_mag.exp()
        threshold = torch.relu(params.b_mag - stretch * params.b_gate) * safe_norms(params)
        return {"W_enc": params.W_enc * stretch, "b_enc": params.b_mag, "threshold": threshold}


def gated_activations(params: Params, u: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "tokens d_sae"]:
    """`1[u + b_gate > 0] max(exp(r_mag) u + b_mag, 0)`."""
    return torch.relu(params.r_mag.exp() * u + params.b_mag) * (u + params.b_gate > 0)
