"""BatchTopK and Matryoshka: k latents per token on average, chosen over the whole batch, saved with one threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.sae.sae import SAE
from saewb.training.objectives.checks import Check, check_aux, checked
from saewb.training.objectives.dead import auxk
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, exported, from_sae, started
from saewb.training.objectives.sparsity_coefficient import Coefficient


@dataclass(frozen=True)
class BatchTopK:
    """Keeps the k N largest latents of a batch of N tokens: k per token on average, more where there is more to say.

        z = (x - b_pre) @ W_enc + b_enc;   S = the int(k N) pairs (token, i) with the largest max(z_i, 0) |W_dec[i]|
        a_i = z_i in S, else 0;   losses as TopK

    After training there is no batch, but a threshold: t = mean over batches of the smallest length kept, and
    `z_i |W_dec[i]| > t`. It is a running mean over the first 1 / threshold_rate batches and an exponential one from
    then on, so that it does not creep up from 0 (SAELens' does: after n batches it is at 1 - 0.99^n of its value).

    References:
        Bussmann et al. 2024, arXiv:2412.06410 (activation, threshold); AuxK as TopK.
    """

    d_sae: int  # latents
    k: float = 32.0  # latents kept per token on average
    aux: float = 1 / 32  # weight of the auxiliary loss; 0 leaves dead latents dead
    k_aux: int | None = None  # dead latents per token in the auxiliary loss; None means half of d_out
    aux_relu: bool = False  # whether a dead latent's negative pre-activation counts as 0 there
    threshold_rate: float = 0.01  # share of the newest batch in the threshold
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        _check(self)

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of loss terms that are warmed up or controlled: none."""
        return {}

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step: nothing is dead, and there is no threshold."""
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
        """Weights to go on with, from an SAE with a threshold; the threshold itself is measured anew."""
        return _without_threshold(from_sae(sae, ("jumprelu",), None, dtype=dtype, device=device))

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable; `extra["kept_min"]` is the smallest length kept."""
        pre = params.pre(x)
        latents, kept_min = kept_in_batch(params, pre, self.k, state.team)
        recon = params.decoded(latents, x)
        terms = {"mse": squared_error(recon, y)}
        if self.aux:
            k_aux = self.k_aux or max(1, y.shape[1] // 2)
            error = (y - recon).detach()
            terms["aux"] = self.aux * auxk(params, pre, error, state, k_aux=k_aux, relu=self.aux_relu)
        return measured(terms, y, recon, latents, kept_min=kept_min)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations above the threshold, in units of the training's own decoder rows."""
        return above(params, params.pre(x), state)

    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far as a JumpReLU one, in training units, with unit rows and one threshold for all latents."""
        return exported(params, "jumprelu", threshold=_threshold(params, state))


@dataclass(frozen=True)
class Matryoshka:
    """BatchTopK whose first latents must also reconstruct alone, at several widths, so that they stay general.

        a as BatchTopK;   recon_w = a[:, :w] @ W_dec[:w] + b_dec (+ x @ W_skip)
        sum over w in (*widths, d_sae) of mean |y - recon_w|^2  +  aux * auxk

    `aux_by_level`: in place of one AuxK over all dead latents and the whole error, one per level, between its dead
    latents and the error of its own reconstruction.

    References:
        Bussmann et al. 2025, arXiv:2503.17547 (nested losses, BatchTopK activation).

    Example:
        >>> objective = Matryoshka(d_sae=32, k=4, widths=(4, 8))
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.state()).terms)
        ['aux', 'inner_mse_4', 'inner_mse_8', 'mse']
    """

    d_sae: int  # latents
    k: float = 32.0  # latents kept per token on average
    widths: tuple[int, ...] = ()  # inner widths, rising, each below d_sae
    aux: float = 1 / 32  # weight of the auxiliary loss; 0 leaves dead latents dead
    aux_by_level: bool = False  # one auxiliary loss per level
    k_aux: int | None = None  # dead latents per token in each auxiliary loss; None means half of d_out
    aux_relu: bool = False  # whether a dead latent's negative pre-activation counts as 0 there
    threshold_rate: float = 0.01  # share of the newest batch in the threshold
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        check = _check(self)
        steps = (0, *self.widths, self.d_sae)
        rising = len(steps) > 2 and all(low < high for low, high in pairwise(steps))
        check(rising, "widths", self.widths, f"one or more rising widths from 1 to {self.d_sae - 1}, below d_sae")

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of loss terms that are warmed up or controlled: none."""
        return {}

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step: nothing is dead, and there is no threshold."""
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
        """Weights to go on with, from an SAE with a threshold; the threshold itself is measured anew."""
        return _without_threshold(from_sae(sae, ("jumprelu",), None, dtype=dtype, device=device))

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable; `extra["kept_min"]` is the smallest length kept."""
        pre = params.pre(x)
        latents, kept_min = kept_in_batch(params, pre, self.k, state.team)
        recon, terms, aux = params.offset(x), {}, []
        k_aux, limits = self.k_aux or max(1, y.shape[1] // 2), (0, *self.widths, self.d_sae)
        for low, high in pairwise(limits):
            recon = recon + latents[:, low:high] @ params.W_dec[low:high]
            terms["mse" if high == self.d_sae else f"inner_mse_{high}"] = squared_error(recon, y)
            if self.aux and (self.aux_by_level or high == self.d_sae):
                error, low = (y - recon).detach(), low if self.aux_by_level else 0
                dead = auxk(params, pre, error, state, k_aux=k_aux, relu=self.aux_relu, low=low, high=high)
                aux.append(self.aux * dead)
        if aux:
            terms["aux"] = torch.stack(aux).sum()
        return measured(terms, y, recon, latents, kept_min=kept_min)

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations above the threshold, in units of the training's own decoder rows."""
        return above(params, params.pre(x), state)

    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far as a JumpReLU one, in training units, with unit rows and one threshold for all latents."""
        return exported(params, "jumprelu", threshold=_threshold(params, state))


def kept_in_batch(
    params: Params, pre: Float[Tensor, "tokens d_sae"], k: float, team: ParallelContext = SINGLE_PROCESS
) -> tuple[Float[Tensor, "tokens d_sae"], Float[Tensor, ""]]:
    """The latents kept over a whole batch, and the smallest length z_i |W_dec[i]| > 0 among them (inf if none is).

    With several processes: this one's share of what is kept over the batch of all, and its own smallest length.
    """
    score = (torch.relu(pre.detach()) * params.norms().detach()).flatten()
    n = int(k * len(pre) * team.size)
    best = score.topk(min(n, len(score)), sorted=False)
    lengths, places = best.values, best.indices
    value = torch.relu(pre.flatten()[places])
    if team.size > 1:
        kept = team.topk_mask(lengths, n)
        lengths, value = torch.where(kept, lengths, 0), torch.where(kept, value, 0)
    latents = torch.zeros_like(pre).flatten().scatter(0, places, value).view_as(pre)
    return latents, torch.where(lengths > 0, lengths, torch.inf).min()


@torch.no_grad()
def next_threshold(state: State, kept_min: Float[Tensor, ""], rate: float) -> State:
    """The state with the threshold after one more batch; unchanged by a batch in which nothing was kept."""
    wide = torch.float32 if kept_min.device.type == "mps" else torch.float64
    kept_min = kept_min.to(wide)
    old = torch.zeros_like(kept_min) if state.threshold is None else state.threshold
    share = max(rate, 1 / (state.n_thresholds + 1))
    new = torch.where(torch.isfinite(kept_min), old + share * (kept_min - old), old)
    return replace(state, threshold=new, n_thresholds=state.n_thresholds + 1)


def above(params: Params, pre: Float[Tensor, "tokens d_sae"], state: State) -> Float[Tensor, "tokens d_sae"]:
    """The latents whose length z_i |W_dec[i]| exceeds the threshold; all that are > 0 before there is one."""
    return torch.relu(pre) * (pre * params.norms() > _threshold(params, state))


def _threshold(params: Params, state: State) -> Tensor:
    value = 0.0 if state.threshold is None else state.threshold.to(params.W_dec.dtype)
    return torch.ones_like(params.b_enc.detach()) * value


def _without_threshold(params: Params) -> Params:
    tensors = {name: p for name, p in params.named_parameters() if name != "threshold"}
    return Params(tensors, params.pre_bias)


def _check(objective: BatchTopK | Matryoshka) -> Check:
    d_sae, k = objective.d_sae, objective.k
    check = checked(objective, d_sae, objective.rows, objective.init_norm)
    check(0 < k <= d_sae, "k", k, f"more than 0, up to d_sae={d_sae} latents per token on average")
    rate = objective.threshold_rate
    check(0 < rate <= 1, "threshold_rate", rate, "a share, more than 0 and up to 1")
    check_aux(check, objective.aux, objective.k_aux)
    return check
