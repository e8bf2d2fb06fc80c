"""The matching pursuit SAE: latents chosen one after the other; only reconstruction is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.training.objectives.checks import checked
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, started
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class MatchingPursuit:
    """Latents by matching pursuit over the decoder's own rows (see `saewb.sae.matching_pursuit`); gradients through the values.

        a = pursuit(x - b_dec);   recon = a @ W_dec + b_dec;   mse

    Which latent is chosen has no gradient. Encoder and decoder are one matrix, so there is no transcoder of this kind,
    and rows must keep unit length: with longer ones the pursuit may diverge.

    References:
        Costa et al. 2025, arXiv:2506.03093, algorithm 1.

    Example:
        >>> objective = MatchingPursuit(d_sae=32, max_iterations=3)
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> float(objective.losses(params, x, x, objective.state()).l0) <= 3
        True
    """

    d_sae: int  # latents
    max_iterations: int | None = None  # latents chosen per token at most; None means d_in
    residual_threshold: float = 0.01  # stop a token when its residual is shorter; in training units
    stop_on_duplicate: bool = True  # stop a token when it would choose a latent that is already on
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start

    def __post_init__(self) -> None:
        check = checked(self, self.d_sae, self.rows, self.init_norm)
        most = self.max_iterations
        check(most is None or (type(most) is int and most > 0), "max_iterations", most, "a positive integer, or None")
        left = self.residual_threshold
        check(left >= 0, "residual_threshold", left, "a length, 0 or more")

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
        """Weights to begin with: `W_dec` and `b_dec` alone.

        Raises:
            ValueError: for a `d_out`.
        """
        if d_out is not None:
            what = f"MatchingPursuit cannot be a transcoder from {d_in} to {d_out}: it reads with its decoder rows."
            raise ValueError(explain(what, want="one point to read and write", fix="saewb.TopK(d_sae=..., k=...)"))
        norm = self.init_norm
        made = started(d_in, self.d_sae, None, seed=seed, norm=norm, skip=False, dtype=dtype, device=device)
        return Params({"W_dec": made.W_dec, "b_dec": made.b_dec}, "tied")

    def resume(
        self, sae: PursuitSAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Params:
        """Weights to go on with, from a trained PursuitSAE.

        Raises:
            ValueError: if it is another kind of SAE, has a scale per token, or does not subtract b_dec.
        """
        if not isinstance(sae, PursuitSAE) or sae.cfg.normalization != "none" or sae.cfg.pre_bias != "tied":
            what = f"MatchingPursuit cannot go on from {sae!r}."
            raise ValueError(explain(what, want="a PursuitSAE with normalization 'none' and pre_bias 'tied'"))
        return Params({n: t.detach().to(device, dtype, copy=True) for n, t in sae.named_parameters()}, "tied")

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The loss of one batch, differentiable in both parameters."""
        latents = self.latents(params, x, state)
        recon = params.decoded(latents, x)
        return measured({"mse": squared_error(recon, y)}, y, recon, latents)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them."""
        sae = self._around(params)
        sae.W_dec, sae.b_dec = params.W_dec, params.b_dec  # the very parameters, so that gradients arrive there
        return sae.encode(x)

    @torch.no_grad()
    def export(self, params: Params, state: State) -> PursuitSAE:
        """The SAE so far, in training units; a copy."""
        sae = self._around(params)
        return PursuitSAE.from_tensors(sae.cfg, {name: t.clone() for name, t in sae.named_parameters()})

    def _around(self, params: Params) -> PursuitSAE:
        cfg = PursuitConfig(
            d_in=params.d_in,
            d_sae=params.d_sae,
            residual_threshold=self.residual_threshold,
            max_iterations=self.max_iterations,
            stop_on_duplicate=self.stop_on_duplicate,
        )
        return PursuitSAE.from_tensors(cfg, {"W_dec": params.W_dec, "b_dec": params.b_dec})
