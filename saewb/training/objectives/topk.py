"""TopK and AbsTopK: a fixed number of latents per token, and no sparsity loss at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.sae.sae import SAE
from saewb.training.objectives.checks import check_aux, checked
from saewb.training.objectives.dead import auxk
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, exported, from_sae, started
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest pre-activations of a token.

        z = (x - b_pre) @ W_enc + b_enc;   S = the k latents with the largest z_i |W_dec[i]|
        a_i = max(z_i, 0) for i in S, else 0;   recon = a @ W_dec + b_dec (+ x @ W_skip)
        mse + aux * auxk      (mse: mean over tokens of |y - recon|^2; auxk: `saewb.training.objectives.dead.auxk`)

    Latents are chosen by the length they write, not by z: with rows of unit length the two are the same, and with free
    rows a latent cannot buy its place with a short row. The SAE that comes out has unit rows.

    References:
        Gao et al. 2024, arXiv:2406.04093: activation (section 2.3), AuxK (appendix A.2, there with weight 1/32 on a
        normalized loss), unit rows and gradient projection (appendix A.1).

    Example:
        >>> objective = TopK(d_sae=32, k=4)
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> float(objective.losses(params, x, x, objective.state()).l0) <= 4
        True
    """

    d_sae: int  # latents
    k: int = 32  # latents kept per token
    aux: float = 1 / 32  # weight of the auxiliary loss; 0 leaves dead latents dead
    k_aux: int | None = None  # dead latents per token in the auxiliary loss; None means half of d_out
    aux_relu: bool = False  # whether a dead latent's negative pre-activation counts as 0 there
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        _check(self)

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of loss terms that are warmed up or controlled: none."""
        return {}

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step: nothing is dead."""
        return fresh_state(self.d_sae, {}, device)

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
        """Weights to go on with, from a trained SAE of the same kind."""
        return from_sae(sae, ("topk",), self.k, dtype=dtype, device=device)

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter."""
        return _losses(self, params, x, y, state, signed=False)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them, but in units of the training's own decoder rows."""
        return kept(params, params.pre(x), self.k, signed=False)

    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far, in training units, with unit rows."""
        return exported(params, "topk", self.k)


@dataclass(frozen=True)
class AbsTopK:
    """Keeps the k pre-activations of largest magnitude, with their sign: one latent models two opposite directions.

        S = the k latents with the largest |z_i| |W_dec[i]|;   a_i = z_i for i in S, else 0;   losses as TopK

    Dead latents are chosen by magnitude too.

    References:
        Zhu, Khalili and Zhu 2025, arXiv:2510.00404 (activation); Gao et al. 2024, arXiv:2406.04093 (the rest).
    """

    d_sae: int  # latents
    k: int = 32  # latents kept per token
    aux: float = 1 / 32  # weight of the auxiliary loss; 0 leaves dead latents dead
    k_aux: int | None = None  # dead latents per token in the auxiliary loss; None means half of d_out
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        _check(self)

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of loss terms that are warmed up or controlled: none."""
        return {}

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step: nothing is dead."""
        return fresh_state(self.d_sae, {}, device)

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
        """Weights to go on with, from a trained SAE of the same kind."""
        return from_sae(sae, ("abstopk",), self.k, dtype=dtype, device=device)

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter."""
        return _losses(self, params, x, y, state, signed=True)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them, but in units of the training's own decoder rows."""
        return kept(params, params.pre(x), self.k, signed=True)

    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far, in training units, with unit rows."""
        return exported(params, "abstopk", self.k)


def _check(objective: TopK | AbsTopK) -> None:
    d_sae, k = objective.d_sae, objective.k
    check = checked(objective, d_sae, objective.rows, objective.init_norm)
    check(type(k) is int and 0 < k <= d_sae, "k", k, f"1 to d_sae={d_sae} latents per token")
    check_aux(check, objective.aux, objective.k_aux)


def kept(params: Params, pre: Float[Tensor, "tokens d_sae"], k: int, *, signed: bool) -> Float[Tensor, "tokens d_sae"]:
    """The latents of a top-k activation that chooses by the length a latent writes."""
    score = pre.detach() * params.norms().detach()
    best = (score.abs() if signed else score).topk(k, dim=1, sorted=False).indices
    value = pre.gather(1, best)
    return torch.zeros_like(pre).scatter(1, best, value if signed else torch.relu(value))


def _losses(objective: TopK | AbsTopK, params: Params, x: Tensor, y: Tensor, state: State, *, signed: bool) -> Losses:
    pre = params.pre(x)
    latents = kept(params, pre, objective.k, signed=signed)
    recon = params.decoded(latents, x)
    terms = {"mse": squared_error(recon, y)}
    if objective.aux:
        relu = isinstance(objective, TopK) and objective.aux_relu
        error = (y - recon).detach()
        k_aux = objective.k_aux or max(1, y.shape[1] // 2)
        terms["aux"] = objective.aux * auxk(params, pre, error, state, k_aux=k_aux, signed=signed, relu=relu)
    return measured(terms, y, recon, latents)
