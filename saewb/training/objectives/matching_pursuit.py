"""The matching pursuit SAE: latents selected one after the other, trained on reconstruction alone."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import NonNegativeFloat, PositiveInt, config, require
from saewb.errors import explain
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, squared_error, with_metrics
from saewb.training.objectives.params import Params, init_params


@final
@config
class MatchingPursuit(Objective):
    """Latents by matching pursuit over the decoder rows, with gradients through their activations.

        a = pursuit(x - b_dec);   recons = a @ W_dec + b_dec;   mse

    The selection has no gradient. Encoder and decoder are one matrix, so there is no transcoder of this kind, and rows
    must have unit length: with longer ones the pursuit may diverge.

    The algorithm is in `saewb.sae.matching_pursuit`.

    References:
        Costa et al. 2025, arXiv:2506.03093, algorithm 1.

    Example:
        >>> objective = MatchingPursuit(d_sae=32, max_iterations=3)
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> float(objective.losses(params, x, x, objective.initial_state()).l0) <= 3
        True
    """

    max_iterations: PositiveInt | None = None
    """Maximum of latents per token; None means d_in."""
    residual_threshold: NonNegativeFloat = 0.01
    """Length of the residual below which a token stops, in training units."""
    stop_on_duplicate: bool = True
    """Whether a token stops when it would select an active latent again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, not self.skip, "skip", "False: matching pursuit reads with its decoder rows")

    def init_params(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Random initial weights: `W_dec` and `b_dec` alone.

        Raises:
            ValueError: for a `d_out`.
        """
        if d_out is not None:
            what = f"MatchingPursuit cannot be a transcoder from {d_in} to {d_out}: it reads with its decoder rows."
            raise ValueError(explain(what, want="one point to read and write", fix="saewb.TopK(d_sae=..., k=...)"))
        sizes = {"seed": seed, "norm": self.init_norm, "skip": False, "dtype": dtype, "device": device}
        params = init_params(d_in, self.d_sae, None, per_latent={}, **sizes)
        return Params({"W_dec": params.W_dec, "b_dec": params.b_dec}, "tied")

    def from_sae(
        self, sae: PursuitSAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Params:
        """Weights of a trained PursuitSAE, copied, to continue training from.

        Raises:
            ValueError: if it is another kind of SAE, has a normalization per token, or does not subtract b_dec.
        """
        if not isinstance(sae, PursuitSAE) or sae.cfg.normalization != "none" or sae.cfg.pre_bias != "tied":
            what = f"MatchingPursuit cannot go on from {sae!r}."
            raise ValueError(explain(what, want="a PursuitSAE with normalization 'none' and pre_bias 'tied'"))
        return Params({n: t.detach().to(device, dtype, copy=True) for n, t in sae.named_parameters()}, "tied")

    def losses(
        self,
        params: Params,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
    ) -> Losses:
        """The loss of one batch, differentiable in both parameters."""
        acts = self.latents(params, x, state)
        recons = params.decode(acts, x)
        return with_metrics({"mse": squared_error(recons, y)}, y, recons, acts)

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as in training."""
        sae = self._sae(params)
        sae.W_dec, sae.b_dec = params.W_dec, params.b_dec  # the parameters themselves, so that they get gradients
        return sae.encode(x)

    @torch.no_grad()
    def to_sae(self, params: Params, state: ObjectiveState) -> PursuitSAE:
        """The current SAE, as a copy, in training units."""
        sae = self._sae(params)
        return PursuitSAE.from_tensors(sae.cfg, {name: t.clone() for name, t in sae.named_parameters()})

    def _sae(self, params: Params) -> PursuitSAE:
        cfg = PursuitConfig(
            d_in=params.d_in,
            d_sae=params.d_sae,
            residual_threshold=self.residual_threshold,
            max_iterations=self.max_iterations,
            stop_on_duplicate=self.stop_on_duplicate,
        )
        return PursuitSAE.from_tensors(cfg, {"W_dec": params.W_dec, "b_dec": params.b_dec})
