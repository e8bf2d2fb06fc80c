"""TopK, AbsTopK, BatchTopK and Matryoshka: a fixed number of active latents, and no sparsity loss.

All four have one `losses`, over one or (Matryoshka) several nested levels of latents:

    recons_w = acts[:, :w] @ W_dec[:w] + b_dec (+ x @ W_skip)
    sum over levels w of mean over tokens of |y - recons_w|^2  +  aux * auxk

and differ in `activate`, which selects the active latents. `saewb.training.objectives.losses.auxk_loss` revives dead
latents.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, replace
from itertools import pairwise
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saewb._config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config, require
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, auxk_loss, squared_error, with_metrics
from saewb.training.objectives.params import Params


@config
class TopKObjective(Objective):
    """Abstract base of the objectives with a fixed number of active latents and AuxK."""

    k: PositiveFloat = 32.0
    """Active latents per token."""
    aux: NonNegativeFloat = 1 / 32
    """Weight of the auxiliary loss; with 0, dead latents stay dead."""
    k_aux: PositiveInt | None = None
    """Dead latents per token in the auxiliary loss; None means half of d_out."""
    _: KW_ONLY
    k_start: PositiveFloat | None = None
    """Active latents per token at the start, from which k falls linearly; None keeps it constant."""
    k_anneal_tokens: NonNegativeInt = 0
    """Tokens over which it falls from `k_start` to `k`."""

    signed: ClassVar[bool] = False
    """Whether latents are selected by magnitude, with either sign."""
    # Defaults of fields that only some subclasses have:
    aux_relu: ClassVar[bool] = False
    widths: ClassVar[tuple[int, ...]] = ()
    aux_by_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.k <= self.d_sae, "k", f"1 to d_sae={self.d_sae} latents per token")
        anneals = self.k_start is not None
        fits = not anneals or self.k <= self.k_start <= self.d_sae
        require(self, fits, "k_start", f"k={self.k} to d_sae={self.d_sae} latents per token, or None")
        want = "the tokens over which k falls, with k_start=...; 0 without"
        require(self, anneals == (self.k_anneal_tokens > 0), "k_anneal_tokens", want)

    def k_at(self, n_tokens: int) -> int | float:
        """Active latents per token in the step that starts after `n_tokens` tokens.

            k_start + (k - k_start) min(1, n_tokens / k_anneal_tokens)

        Rounded to whole latents where each token has as many.
        """
        if self.k_start is None or n_tokens >= self.k_anneal_tokens:
            return self.k
        k = self.k_start + (self.k - self.k_start) * n_tokens / self.k_anneal_tokens
        return k if self.fixed_k is None else round(k)

    def k_in(self, state: ObjectiveState) -> int | float:
        """Active latents per token in a step with this state."""
        return self.k if state.k is None else state.k

    def lengths(self, params: Params) -> Float[Tensor, " d_sae"]:
        """Weight of each latent in the selection: latents with the largest z_i times this are active."""
        return params.norms()

    @property
    def revives_dead(self) -> bool:
        """Whether there is an auxiliary loss."""
        return self.aux > 0

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Ranges low..high of latents; the latents up to each `high` have a reconstruction loss."""
        return tuple(pairwise((0, *self.widths, self.d_sae)))

    @abstractmethod
    def activate(
        self, params: Params, pre_acts: Float[Tensor, "tokens d_sae"], state: ObjectiveState
    ) -> tuple[Float[Tensor, "tokens d_sae"], dict[str, Tensor]]:
        """Activations in training, and metrics of the selection."""

    def losses(
        self,
        params: Params,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter: see the module."""
        pre_acts = params.pre_acts(x)
        acts, extra = self.activate(params, pre_acts, state)
        recons, terms, aux = params.offset(x), {}, []
        for low, high in self.levels:
            # No slice of the whole tensor: its gradient would be copied once more.
            whole = high - low == self.d_sae
            recons = recons + (acts @ params.W_dec if whole else acts[:, low:high] @ params.W_dec[low:high])
            terms[self.mse_name(high)] = squared_error(recons, y)
            if self.aux and (self.aux_by_level or high == self.d_sae):
                first = low if self.aux_by_level else 0
                aux.append(self.auxiliary_loss(params, pre_acts, (y - recons).detach(), state, low=first, high=high))
        if aux:
            terms["aux"] = aux[0] if len(aux) == 1 else torch.stack(aux).sum()
        return with_metrics(terms, y, recons, acts, **extra)

    def mse_name(self, high: int) -> str:
        """Name of the reconstruction loss of the level that ends at latent `high`."""
        return "mse" if high == self.d_sae else f"inner_mse_{high}"

    def auxiliary_loss(
        self,
        params: Params,
        pre_acts: Float[Tensor, "tokens d_sae"],
        error: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
        *,
        low: int = 0,
        high: int | None = None,
    ) -> Float[Tensor, ""]:
        """AuxK of the dead latents low..high, times its weight."""
        k_aux = self.k_aux or max(1, error.shape[1] // 2)
        auxk = auxk_loss(
            params,
            pre_acts,
            error,
            state,
            k_aux=k_aux,
            signed=self.signed,
            relu=self.aux_relu,
            low=low,
            high=high,
        )
        return self.aux * auxk


@config
class TokenTopKObjective(TopKObjective):
    """Base of the objectives that select k latents of each token."""

    k: PositiveInt = 32
    """Active latents per token."""

    @property
    def fixed_k(self) -> int:
        """Active latents per token."""
        return self.k

    def activate(
        self, params: Params, pre_acts: Float[Tensor, "tokens d_sae"], state: ObjectiveState
    ) -> tuple[Float[Tensor, "tokens d_sae"], dict[str, Tensor]]:
        """The k best latents of each token."""
        return topk_per_token(params, pre_acts, self.k_in(state), signed=self.signed), {}

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as at the end of training."""
        return topk_per_token(params, params.pre_acts(x), self.k, signed=self.signed)


@final
@config
class TopK(TokenTopKObjective):
    """Top-k SAE: the k largest pre-activations of each token.

        z = (x - b_pre) @ W_enc + b_enc;   S = the k latents with the largest z_i |W_dec[i]|
        a_i = max(z_i, 0) for i in S, else 0;   recons = a @ W_dec + b_dec (+ x @ W_skip)
        mse + aux * auxk      (mse: mean over tokens of |y - recons|^2)

    Latents are selected by the length they write, not by z: with unit rows the two are the same, and with free rows a
    short row with a large z has no advantage. The exported SAE has unit rows.

    References:
        Gao et al. 2024, arXiv:2406.04093: activation (section 2.3), AuxK (appendix A.2, there with weight 1/32 on a
        normalized loss), unit rows and gradient projection (appendix A.1).

    Example:
        >>> objective = TopK(d_sae=32, k=4)
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> float(objective.losses(params, x, x, objective.initial_state()).l0) <= 4
        True
    """

    aux_relu: bool = False
    """Whether a dead latent's negative pre-activation counts as 0 in the auxiliary loss."""

    activation: ClassVar[str] = "topk"
    trainable: ClassVar[tuple[str, ...]] = ("topk",)


@final
@config
class AbsTopK(TokenTopKObjective):
    """Top-k SAE by magnitude, with signed latents: each models two opposite directions.

        S = the k latents with the largest |z_i| |W_dec[i]|;   a_i = z_i for i in S, else 0;   losses as TopK

    AuxK selects dead latents by magnitude too.

    References:
        Zhu, Khalili and Zhu 2025, arXiv:2510.00404 (activation); Gao et al. 2024, arXiv:2406.04093 (the rest).
    """

    activation: ClassVar[str] = "abstopk"
    trainable: ClassVar[tuple[str, ...]] = ("abstopk",)
    signed: ClassVar[bool] = True


@config
class BatchTopKObjective(TopKObjective):
    """Abstract base of the objectives that select over a batch in training, and by a threshold afterwards."""

    k: PositiveFloat = 32.0
    """Active latents per token, on average."""
    aux_relu: bool = False
    """Whether a dead latent's negative pre-activation counts as 0 in the auxiliary loss."""
    threshold_rate: Annotated[float, Gt(0), Le(1)] = 0.01
    """Weight of the newest batch in the running mean of the threshold."""

    activation: ClassVar[str] = "jumprelu"
    trainable: ClassVar[tuple[str, ...]] = ("jumprelu",)

    def activate(
        self, params: Params, pre_acts: Float[Tensor, "tokens d_sae"], state: ObjectiveState
    ) -> tuple[Float[Tensor, "tokens d_sae"], dict[str, Tensor]]:
        """The k N best latents of the batch; `extra["kept_min"]` is the smallest length among them."""
        acts, kept_min = topk_over_batch(self.lengths(params), pre_acts, self.k_in(state), state.parallel)
        return acts, {"kept_min": kept_min}

    def next_state(self, state: ObjectiveState, losses: Losses) -> ObjectiveState:
        """State with the threshold after a batch with these losses."""
        new = state.next_threshold(losses.extra["kept_min"], self.threshold_rate)
        # While k falls the threshold rises: it is that of the last batch, and the mean begins with the last k.
        return new if self.k_in(state) == self.k else replace(new, n_thresholds=0)

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """Activations whose length z_i |W_dec[i]| exceeds the threshold; all that are > 0 before there is one."""
        pre_acts = params.pre_acts(x)
        return torch.relu(pre_acts) * (pre_acts * self.lengths(params) > threshold_of(params, state))

    def _trained_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the threshold, which is estimated anew."""
        return {name: tensor for name, tensor in tensors.items() if name != "threshold"}

    def _sae_tensors(self, params: Params, state: ObjectiveState) -> dict[str, Tensor]:
        """One threshold for all latents."""
        return {"threshold": threshold_of(params, state)}


@final
@config
class BatchTopK(BatchTopKObjective):
    """Top-k SAE over a batch of N tokens: its k N largest latents, k per token on average.

        z = (x - b_pre) @ W_enc + b_enc;   S = the int(k N) pairs (token, i) with the largest max(z_i, 0) |W_dec[i]|
        a_i = z_i in S, else 0;   losses as TopK

    After training a threshold replaces the batch: t = mean over batches of the smallest selected length, and
    `z_i |W_dec[i]| > t`. It is a running mean over the first 1 / threshold_rate batches and an exponential one from
    then on, so that it does not rise slowly from 0 (SAELens' does: after n batches it is at 1 - 0.99^n of its value).

    References:
        Bussmann et al. 2024, arXiv:2412.06410 (activation, threshold); AuxK as TopK.
    """


@final
@config
class Matryoshka(BatchTopKObjective):
    """BatchTopK with a reconstruction loss at several nested widths, which makes the first latents general.

        a as BatchTopK;   recons_w = a[:, :w] @ W_dec[:w] + b_dec (+ x @ W_skip)
        sum over w in (*widths, d_sae) of mean |y - recons_w|^2  +  aux * auxk

    `aux_by_level`: instead of one AuxK over all dead latents and the whole error, one per level, over its dead latents
    and the error of its reconstruction.

    References:
        Bussmann et al. 2025, arXiv:2503.17547 (nested losses, BatchTopK activation).

    Example:
        >>> objective = Matryoshka(d_sae=32, k=4, widths=(4, 8))
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.initial_state()).terms)
        ['aux', 'inner_mse_4', 'inner_mse_8', 'mse']
    """

    widths: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Inner widths, ascending; a last one of d_sae, which is always there, may be listed too, as in SAELens."""
    aux_by_level: bool = False
    """Whether each level has its own auxiliary loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.widths[:-1] if self.widths[-1:] == (self.d_sae,) else self.widths
        limits = (0, *inner, self.d_sae)
        rising = len(limits) > 2 and all(low < high for low, high in pairwise(limits))
        want = f"one or more rising widths from 1 to {self.d_sae - 1}, below d_sae, and d_sae after them if you like"
        require(self, rising, "widths", want)
        object.__setattr__(self, "widths", inner)


def topk_per_token(
    params: Params, pre_acts: Float[Tensor, "tokens d_sae"], k: int, *, signed: bool
) -> Float[Tensor, "tokens d_sae"]:
    """Activations of the k latents of each token that write the longest vectors."""
    score = pre_acts.detach() * params.norms().detach()
    best = (score.abs() if signed else score).topk(k, dim=1, sorted=False).indices
    values = pre_acts.gather(1, best)
    return torch.zeros_like(pre_acts).scatter(1, best, values if signed else torch.relu(values))


def topk_over_batch(
    weights: Float[Tensor, " d_sae"],
    pre_acts: Float[Tensor, "tokens d_sae"],
    k: int | float,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> tuple[Float[Tensor, "tokens d_sae"], Float[Tensor, ""]]:
    """Activations of the k N latents of a batch with the largest z_i weights_i, and the smallest such > 0 (or inf).

    With several processes, selection is over the batches of all; activations and smallest length are of this process.
    """
    score = (torch.relu(pre_acts.detach()) * weights.detach()).flatten()
    n = int(k * len(pre_acts) * parallel.size)
    best = score.topk(min(n, len(score)), sorted=False)
    lengths, index = best.values, best.indices
    values = torch.relu(pre_acts.flatten()[index])
    if parallel.size > 1:
        mask = parallel.topk_mask(lengths, n)
        lengths, values = torch.where(mask, lengths, 0), torch.where(mask, values, 0)
    acts = torch.zeros_like(pre_acts).flatten().scatter(0, index, values).view_as(pre_acts)
    return acts, torch.where(lengths > 0, lengths, torch.inf).min()


def threshold_of(params: Params, state: ObjectiveState) -> Tensor:
    """The threshold of every latent; 0 before there is one."""
    value = 0.0 if state.threshold is None else state.threshold.to(params.W_dec.dtype)
    return torch.ones_like(params.b_enc.detach()) * value
