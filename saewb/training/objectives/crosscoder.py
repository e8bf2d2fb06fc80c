"""CrossCoder and L1CrossCoder: one set of latents for the activations at several points, or of several models.

    z = sum over points m of x^m @ W_enc^m + b_enc;   recons^m = a @ W_dec^m + b_dec^m
    mse = mean over tokens of sum over m of |x^m - recons^m|^2

All points lie side by side, so that a crosscoder is an SAE over their concatenation with its own length of a latent:

    crosscoder   c_i = sum over m of |W_dec^m[i]|          a shared one counts as the two it replaces
    sae          c_i = |W_dec[i]|                          over all points together
    mixed        c_i = |W_dec[i]| + sum over m of |W_dec^m[i]| / 10
    none         c_i = 1

Each point is normalized by itself (`TrainConfig.normalization`), so that they have equal lengths.

References:
    Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders (crosscoders, the L1 loss); Minder et al. 2025,
    arXiv:2504.02922 (BatchTopK, codes); "Insights on crosscoder model diffing", transformer-circuits.pub, February 2025
    (shared latents with a smaller penalty).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Le, Lt
from jaxtyping import Float
from pydantic import Strict
from torch import Tensor

from saewb._config import NonNegativeInt, PositiveFloat, config, require
from saewb.errors import explain
from saewb.sae.crosscoder import CrossCoderConfig, CrossCoderSAE
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, squared_error, with_metrics
from saewb.training.objectives.params import Params, Rows, init_params, safe_norms
from saewb.training.objectives.sparsity_coefficient import Coefficient
from saewb.training.objectives.topk import BatchTopKObjective, threshold_of

Code = Literal["crosscoder", "sae", "mixed", "none"]
Share = Annotated[float, Ge(0), Lt(1)]


@config
class CrossCoderObjective(Objective):
    """Abstract base of the objectives that train crosscoders."""

    _: KW_ONLY
    points: Annotated[tuple[str, ...], Strict(False)] = ()
    """Points of the stream, two or more, in the order of the weights; empty means all of them."""
    exclusive: Share = 0.0
    """Fraction of latents that read and write the first point alone, as many the second alone, and so on."""

    multi_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        different = len(set(self.points)) == len(self.points) != 1
        require(self, different, "points", "two or more different names, or none for all points of the stream")
        require(self, not self.skip, "skip", "False: a crosscoder reconstructs the points that it reads")
        fits = self.exclusive * max(2, len(self.points)) <= 1
        require(self, fits, "exclusive", f"at most {1 / max(2, len(self.points)):g}: so many for each point")

    def init_params(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        blocks: Sequence[int] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Random initial weights: the same decoder rows at all points of one width, the encoder their transpose.

        Args:
            d_in: width of all points together.
            d_out: None, or `d_in`.
            blocks: width of each point; None means equal ones.
            seed: of the directions.
            dtype: of all tensors.
            device: of all tensors.

        Raises:
            ValueError: if the widths do not fit.
        """
        n = len(self.points) or 2
        blocks = tuple(blocks) if blocks is not None else (d_in // n,) * n
        if sum(blocks) != d_in or d_out not in (None, d_in):
            what = f"a crosscoder got d_in={d_in}, d_out={d_out} and points of widths {blocks}."
            raise ValueError(explain(what, want="points whose widths add up to d_in, which is d_out too"))
        sizes = {"norm": self.init_norm, "skip": False, "per_latent": {}, "d_out": None, "seed": seed}
        of_width = {d: init_params(d, self.d_sae, dtype=dtype, device=device, **sizes).W_dec for d in sorted({*blocks})}
        rows = torch.cat([of_width[width] for width in blocks], dim=1).detach()
        for latents, others in self._forbidden(blocks):
            rows[latents, others] = 0
        rows *= self.init_norm / rows.norm(dim=1, keepdim=True)
        tensors = {"W_enc": rows.clone().T, "W_dec": rows, "b_dec": rows.new_zeros(d_in)}
        return Params({**tensors, "b_enc": rows.new_zeros(self.d_sae)}, "none", blocks)

    def from_sae(
        self, sae: CrossCoderSAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Params:
        """Weights of a trained crosscoder in training units, copied, to continue training from.

        Raises:
            ValueError: if it is no crosscoder, or has another activation than the objective.
        """
        if not isinstance(sae, CrossCoderSAE) or sae.cfg.activation not in self.trainable:
            want = f"a crosscoder with activation {' or '.join(self.trainable)}"
            raise ValueError(explain(f"this objective cannot go on from {sae!r}.", want=want))
        tensors = {
            n: getattr(sae, n).detach().to(device, dtype, copy=True) for n in ("W_enc", "b_enc", "W_dec", "b_dec")
        }
        for latents, others in self._forbidden(sae.cfg.widths):
            tensors["W_dec"][latents, others] = tensors["W_enc"][others, latents] = 0
        return Params(tensors, "none", sae.cfg.widths)

    @torch.no_grad()
    def restrict_gradients(self, params: Params) -> None:
        """Set the gradients of what exclusive latents neither read nor write to 0."""
        for latents, others in self._forbidden(params.blocks):
            params.W_dec.grad[latents, others] = 0
            params.W_enc.grad[others, latents] = 0

    def _forbidden(self, blocks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Latents that are exclusive to a point, and coordinates of other points, which they leave alone."""
        n, low = int(self.exclusive * self.d_sae), 0
        for own, width in enumerate(blocks):
            latents = slice(own * n, (own + 1) * n)
            if n:
                yield latents, slice(0, low)
                yield latents, slice(low + width, sum(blocks))
            low += width

    @torch.no_grad()
    def to_sae(self, params: Params, state: ObjectiveState) -> CrossCoderSAE:
        """The current crosscoder, as a copy, in training units, with decoder rows of unit length over all points."""
        norm = safe_norms(params)
        tensors = {
            "W_enc": params.W_enc * norm,
            "b_enc": params.b_enc * norm,
            "W_dec": params.W_dec / norm[:, None],
            "b_dec": params.b_dec.clone(),
            "mean": torch.zeros_like(params.b_dec),
            "scale": torch.ones_like(params.b_dec),
            **self._sae_tensors(params, state),
        }
        names = self.points or tuple(str(i) for i in range(len(params.blocks)))
        cfg = CrossCoderConfig(names, params.blocks, params.d_sae, self.activation)
        return CrossCoderSAE.from_tensors(cfg, {name: t.to(norm.dtype) for name, t in tensors.items()})


@final
@config
class CrossCoder(CrossCoderObjective, BatchTopKObjective):
    """Crosscoder with BatchTopK: the k N latents of a batch of N tokens with the largest activation times length.

        z = sum over m of x^m @ W_enc^m + b_enc;   S = the int(k N) pairs (token, i) with the largest max(z_i, 0) c_i
        a_i = z_i in S, else 0;   losses as BatchTopK, over all points together;   c: `code`, see the module

    A latent of one model alone is one whose decoder block of the other model has length 0. Unlike an L1 penalty,
    selection does not shrink blocks. `k_start` and `k_anneal_tokens` keep latents alive at the start.

    References:
        Minder et al. 2025, arXiv:2504.02922 (BatchTopK, codes); exclusive latents: "designated" ones of dedicated
        feature crosscoders.

    Example:
        >>> objective = CrossCoder(d_sae=32, k=4, points=("base", "chat"))
        >>> params, x = objective.init_params(16), torch.ones(5, 16)
        >>> float(objective.losses(params, x, x, objective.initial_state()).l0) <= 4
        True
    """

    code: Code = "crosscoder"
    """Length of a latent in the selection."""

    def lengths(self, params: Params) -> Float[Tensor, " d_sae"]:
        """Length c of each latent, by `code`."""
        if self.code == "none":
            return torch.ones_like(params.b_enc)
        if self.code == "sae":
            return params.norms()
        summed = params.block_norms().sum(0)
        return summed if self.code == "crosscoder" else params.norms() + summed / 10

    def _sae_tensors(self, params: Params, state: ObjectiveState) -> dict[str, Tensor]:
        """The threshold of z_i c_i as one of each activation, in units of unit rows."""
        lengths = self.lengths(params)
        lengths = torch.where(lengths == 0, torch.ones_like(lengths), lengths)
        return {"threshold": threshold_of(params, state) * (safe_norms(params) / lengths)}


@final
@config
class L1CrossCoder(CrossCoderObjective):
    """Crosscoder with ReLU latents under an L1 penalty on the lengths they write at all points.

        a = max(sum over m of x^m @ W_enc^m + b_enc, 0)
        mse + l1 * mean over tokens of sum over i of s_i a_i sum over m of |W_dec^m[i]|

    s_i is `shared_l1` for the first latents that are not exclusive (`shared` of all), else 1. The penalty shrinks a
    block that writes little to exactly 0, so that many latents look as if they were of one model alone; `saewb.diff`
    tells them apart.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders.

    Example:
        >>> objective = L1CrossCoder(d_sae=32, l1=0.1)
        >>> params, x = objective.init_params(16), torch.ones(5, 16)
        >>> sorted(objective.losses(params, x, x, objective.initial_state()).terms)
        ['l1', 'mse']
    """

    l1: PositiveFloat = 2.0
    """Weight of the penalty, per unit of activation."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which `l1` rises from 0."""
    target_l0: PositiveFloat | None = None
    """Latents per token that a controller steers to by changing `l1`; None keeps it constant."""
    _: KW_ONLY
    shared: Annotated[float, Ge(0), Le(1)] = 0.0
    """Fraction of latents, after the exclusive ones, with a smaller penalty: for what the points have in common."""
    shared_l1: Annotated[float, Ge(0), Le(1)] = 0.15
    """Penalty of those relative to that of the others."""
    rows: Rows = "free"
    """Decoder rows: of unit length, or free."""
    init_norm: PositiveFloat = 0.1
    """Length of the decoder rows at the start; 1 for unit rows."""

    activation: ClassVar[str] = "relu"
    trainable: ClassVar[tuple[str, ...]] = ("relu",)

    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of the penalty."""
        return {"l1": Coefficient(self.l1, self.warmup_tokens, self.target_l0)}

    def penalties(self, params: Params) -> Float[Tensor, " d_sae"]:
        """Penalty of each latent relative to the others: s in the class."""
        first = len(params.blocks) * int(self.exclusive * self.d_sae)
        weights = torch.ones_like(params.b_enc.detach())
        weights[first : first + int(self.shared * self.d_sae)] = self.shared_l1
        return weights

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
        lengths = acts * (params.block_norms().sum(0) * self.penalties(params))
        terms = {"mse": squared_error(recons, y), "l1": state.coefficients["l1"] * lengths.sum() / len(y)}
        return with_metrics(terms, y, recons, acts)

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as in training."""
        return torch.relu(params.pre_acts(x))
