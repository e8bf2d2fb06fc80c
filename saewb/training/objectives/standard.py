"""The standard SAE: ReLU, and a penalty on how much the active latents write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.sae.sae import SAE
from saewb.training.objectives.checks import check_coefficient, checked
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, exported, from_sae, started
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class Standard:
    """ReLU latents under an L1 (or Lp) penalty on the lengths they write.

        a = max((x - b_pre) @ W_enc + b_enc, 0);   recon = a @ W_dec + b_dec (+ x @ W_skip)
        mse + l1 * mean over tokens of (sum_i (a_i |W_dec[i]|)^p)^(1/p)

    The row lengths in the penalty keep the optimizer from writing the same with small latents and long rows. For p < 1
    the penalty's slope at 0 is infinite; a latent that is off gets none of it.

    References:
        Conerly et al. 2024, "Update on how we train SAEs", Transformer Circuits, April 2024 (penalty, free rows);
        Bricken et al. 2023 (unit rows).

    Example:
        >>> objective = Standard(d_sae=32, l1=0.1)
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.state()).terms)
        ['l1', 'mse']
    """

    d_sae: int  # latents
    l1: float = 5.0  # weight of the penalty, per unit of activation
    p: float = 1.0  # of the norm, 0 < p
    warmup_tokens: int = 0  # tokens over which `l1` rises from 0
    target_l0: float | None = None  # latents per token that a controller steers to by changing `l1`
    rows: Rows = "free"  # decoder rows: kept at length 1, or free
    init_norm: float = 0.1  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        check = checked(self, self.d_sae, self.rows, self.init_norm)
        check(self.p > 0, "p", self.p, "a positive number; 1 is L1")
        check_coefficient(check, "l1", self.l1, self.warmup_tokens, self.target_l0)

    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of the penalty."""
        return {"l1": Coefficient(self.l1, self.warmup_tokens, self.target_l0)}

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step at full weight: nothing is dead."""
        return fresh_state(self.d_sae, self.coefficients(), device)

    def start(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Weights to begin with; `d_out` makes it a transcoder, whose input is not centered by b_dec."""
        return started(
            d_in, self.d_sae, d_out, seed=seed, norm=self.init_norm, skip=self.skip, dtype=dtype, device=device
        )

    def resume(self, sae: SAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Weights to go on with, from a trained ReLU SAE."""
        return from_sae(sae, ("relu",), None, dtype=dtype, device=device)

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter."""
        latents = torch.relu(params.pre(x))
        recon = params.decoded(latents, x)
        lengths = lp_norm(latents * params.norms(), self.p)
        terms = {"mse": squared_error(recon, y), "l1": state.coefficients["l1"] * lengths.sum() / len(y)}
        return measured(terms, y, recon, latents)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them, but in units of the training's own decoder rows."""
        return torch.relu(params.pre(x))

    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far, in training units, with unit rows."""
        return exported(params, "relu")


def lp_norm(values: Float[Tensor, "tokens d_sae"], p: float) -> Float[Tensor, " tokens"]:
    """`(sum_i values_i^p)^(1/p)` of values >= 0, per token, with no gradient where a value (or a whole token) is 0."""
    if p == 1:
        return values.sum(1)
    on = values > 0
    powers = torch.where(on, torch.where(on, values, 1).pow(p), 0).sum(1)
    some = on.any(1)
    return torch.where(some, torch.where(some, powers, 1).pow(1 / p), 0)
