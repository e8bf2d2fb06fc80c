"""The gated SAE: one path says which latents are on, another how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.sae.sae import SAE
from saewb.training.objectives.checks import check_coefficient, checked
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, exported, from_sae, safe_norms, started
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class Gated:
    """Gate and magnitude share directions, and only the gate is penalized, so that magnitudes do not shrink.

        u = (x - b_pre) @ W_enc;   gate = u + b_gate;   a = 1[gate > 0] * max(exp(r_mag) u + b_mag, 0)
        mse + l1 * mean sum_i max(gate_i, 0) |W_dec[i]| + mean |y - (max(gate, 0) @ frozen W_dec + frozen b_dec)|^2

    The third term is what trains the gate (the step has no gradient). Its decoder is frozen, as in the paper: gradients
    reach the encoder but not `W_dec`, `b_dec`, or `W_skip` through it. SAELens leaves them in, which pulls the decoder
    towards reconstructing from penalized latents; `frozen=False` does the same.

    References:
        Rajamanoharan et al. 2024, arXiv:2404.16014, eqs. 5 to 8.

    Example:
        >>> objective = Gated(d_sae=32, l1=0.1)
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.state()).terms)
        ['gate_mse', 'l1', 'mse']
    """

    d_sae: int  # latents
    l1: float = 1.0  # weight of the penalty, per unit of gate pre-activation
    warmup_tokens: int = 0  # tokens over which `l1` rises from 0
    target_l0: float | None = None  # latents per token that a controller steers to by changing `l1`
    frozen: bool = True  # whether the gate's own reconstruction leaves the decoder alone
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        check = checked(self, self.d_sae, self.rows, self.init_norm)
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
        gate = {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}
        norm, skip = self.init_norm, self.skip
        return started(d_in, self.d_sae, d_out, seed=seed, norm=norm, skip=skip, dtype=dtype, device=device, extra=gate)

    def resume(self, sae: SAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Weights to go on with, from a trained JumpReLU or ReLU SAE, whose threshold becomes the gate's bias."""
        read = dict(from_sae(sae, ("jumprelu", "relu"), None, dtype=dtype, device=device).named_parameters())
        b_mag = read.pop("b_enc").detach()
        threshold = read.pop("threshold").detach() if "threshold" in read else torch.zeros_like(b_mag)
        gate = {"b_mag": b_mag, "b_gate": b_mag - threshold, "r_mag": torch.zeros_like(b_mag)}
        return Params({**read, **gate}, sae.cfg.pre_bias)

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter."""
        u = params.centered(x) @ params.W_enc
        gate = torch.relu(u + params.b_gate)
        latents = _gated(params, u)
        recon = params.decoded(latents, x)
        if self.frozen:
            offset = params.offset(x).detach()
            by_gate = gate @ params.W_dec.detach() + offset
        else:
            by_gate = params.decoded(gate, x)
        terms = {
            "mse": squared_error(recon, y),
            "l1": state.coefficients["l1"] * (gate * params.norms()).sum() / len(y),
            "gate_mse": squared_error(by_gate, y),
        }
        return measured(terms, y, recon, latents)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them, but in units of the training's own decoder rows."""
        return _gated(params, params.centered(x) @ params.W_enc)

    @torch.no_grad()
    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far as a JumpReLU one, exactly: threshold `max(b_mag - exp(r_mag) b_gate, 0)`, in unit rows."""
        stretch = params.r_mag.exp()
        threshold = torch.relu(params.b_mag - stretch * params.b_gate) * safe_norms(params)
        return exported(params, "jumprelu", W_enc=params.W_enc * stretch, b_enc=params.b_mag, threshold=threshold)


def _gated(params: Params, u: Tensor) -> Tensor:
    return torch.relu(params.r_mag.exp() * u + params.b_mag) * (u + params.b_gate > 0)
