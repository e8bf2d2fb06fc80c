"""Abstract base of all objectives: shared fields, initial weights, state, conversion from and to an SAE.

An objective is a frozen dataclass. In the order in which a training uses it:

1. `init_params` (or `from_sae`) gives the weights to train, `initial_state` the state before the first step;
2. `losses` of a batch, differentiable: the reference implementation, which `saewb.training.sparse_step` reproduces;
3. `next_state` after each step: the activation threshold of objectives that select latents over a whole batch;
4. `latents` and `to_sae` give the result at any time, with unit decoder rows.

A subclass defines `losses`, `latents` and the `activation` of its SAEs, and overrides the rest where it differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import PositiveFloat, PositiveInt, config, require
from saewb.sae.sae import SAE
from saewb.training.objectives.losses import Losses, ObjectiveState
from saewb.training.objectives.params import Params, Rows, init_params, params_from_sae, to_sae
from saewb.training.objectives.sparsity_coefficient import Coefficient


@config
class Objective(ABC):
    """Abstract base of all training objectives."""

    d_sae: PositiveInt
    """Number of latents."""
    _: KW_ONLY
    rows: Rows = "unit"
    """Decoder rows: of unit length, or free."""
    init_norm: PositiveFloat = 1.0
    """Length of the decoder rows at the start; 1 for unit rows."""
    skip: bool = False
    """Whether x @ W_skip is added to the output."""

    activation: ClassVar[str]
    """Activation function of the SAEs it trains."""
    trainable: ClassVar[tuple[str, ...]]
    """Activation functions of the SAEs it can continue training."""
    multi_point: ClassVar[bool] = False
    """Whether it trains on several points of a stream at once, side by side."""

    def __post_init__(self) -> None:
        unit = self.rows == "free" or self.init_norm == 1
        require(self, unit, "init_norm", "1 with rows='unit'; or rows='free'")

    @property
    def fixed_k(self) -> int | None:
        """Active latents per token, if every token has the same number."""
        return None

    @property
    def revives_dead(self) -> bool:
        """Whether one of its losses is over dead latents, which must then be tracked."""
        return False

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of loss terms that are warmed up or controlled, by term."""
        return {}

    def initial_state(self, device: torch.device | str = "cpu") -> ObjectiveState:
        """State before the first step: nothing is dead, coefficients are at full weight, there is no threshold."""
        return ObjectiveState(
            dead=torch.zeros(self.d_sae, dtype=torch.bool, device=device),
            dead_rows=torch.zeros(0, dtype=torch.int64, device=device),
            coefficients={name: torch.tensor(c.value, device=device) for name, c in self.coefficients().items()},
        )

    def restrict_gradients(self, params: Params) -> None:
        """Set gradients of weights that are not trained to 0, in place, before the optimizer steps."""
        return

    def next_state(self, state: ObjectiveState, losses: Losses) -> ObjectiveState:
        """State after a batch with these losses."""
        return state

    def init_params(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Random initial weights; `d_out` makes a transcoder, whose input is not centered by b_dec."""
        return init_params(
            d_in,
            self.d_sae,
            d_out,
            seed=seed,
            norm=self.init_norm,
            skip=self.skip,
            dtype=dtype,
            device=device,
            per_latent=self._initial_values(),
        )

    def from_sae(self, sae: SAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Weights of a trained SAE, copied, to continue training from.

        Raises:
            ValueError: if the SAE has another activation or k than the objective, a normalization per token, or a
                separate b_pre.
        """
        params = params_from_sae(sae, self.trainable, self.fixed_k, dtype=dtype, device=device)
        tensors = {name: parameter.detach() for name, parameter in params.named_parameters()}
        return Params(self._trained_tensors(tensors), params.pre_bias)

    @abstractmethod
    def losses(
        self,
        params: Params,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter; `y` is `x` except for transcoders."""

    @abstractmethod
    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """Activations of the exported SAE, in units of the decoder rows in training."""

    @torch.no_grad()
    def to_sae(self, params: Params, state: ObjectiveState) -> SAE:
        """The current SAE, as a copy, in training units, with unit decoder rows."""
        return to_sae(params, self.activation, self.fixed_k, **self._sae_tensors(params, state))

    def _initial_values(self) -> Mapping[str, float]:
        """Initial value of each parameter `[d_sae]`."""
        return {"b_enc": 0.0}

    def _trained_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the tensors of an SAE to trainable parameters."""
        return tensors

    def _sae_tensors(self, params: Params, state: ObjectiveState) -> dict[str, Tensor]:
        """Tensors of the SAE that are not parameters, see `params.to_sae`."""
        return {}
