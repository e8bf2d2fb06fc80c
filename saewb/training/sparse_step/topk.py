"""The top-k objectives by hand: what `objective.losses(...).total.backward()` gives, from the pairs that are kept.

All are one computation over levels (a single one but for Matryoshka), with latents low..high of each:

    recon_l = recon_(l-1) + acts[low:high] @ W_dec[low:high];     error_l = recon_l - y
    d_recon_l = sum over levels m >= l of d error_m:  what the activations and decoder rows of level l get as gradient
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Union

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.distributed import Team
from saewb.kernels.pairs import Pairs, by_latent, combine, dots, pairs_of
from saewb.kernels.precision import MARGIN
from saewb.kernels.select import Readout, top_of_batch, top_per_token
from saewb.training.objectives import AbsTopK, BatchTopK, Losses, Matryoshka, Params, State, TopK
from saewb.training.objectives.dead import auxk
from saewb.training.sparse_step.auxiliary import DeadLoss, add_dead_gradients
from saewb.training.sparse_step.gradients import Batch, coded_gradients, figures, leave, squared

_PER_PAIR = 25  # scores that a low-precision product must save for each pair it has scored again, to be worth it

AnyTopK = Union[TopK, AbsTopK, BatchTopK, Matryoshka]


@dataclass(frozen=True)
class Level:
    """The pairs of latents low..high, counted from low, and how far off the reconstruction up to here is."""

    low: int
    high: int
    pairs: Pairs
    error: Float[Tensor, "batch d_out"]  # recon - y


def topk_step(objective: AnyTopK, batch: Batch, state: State) -> Losses | None:
    """Losses of one batch; gradients are left in the parameters' `.grad`. None if too many latents are on."""
    signed = isinstance(objective, AbsTopK)
    kept = _kept(objective, batch, signed, state.team)
    if kept is None:
        return None
    pairs = kept if signed else replace(kept, pre=kept.pre.clamp(min=0))
    levels = _levels(batch, pairs, (0, *getattr(objective, "widths", ()), objective.d_sae))
    terms = {_name(level, objective): squared(level.error) / len(batch.y) for level in levels}
    made, d_recon = _gradients(batch, levels, signed)
    if objective.aux:
        terms["aux"] = _dead(objective, batch, levels, state, made)
    leave(batch, made, d_recon)
    extra = {}
    if isinstance(objective, (BatchTopK, Matryoshka)):
        lengths = pairs.pre * batch.params.norms()[pairs.latents]
        extra["kept_min"] = lengths.min() if len(pairs) else lengths.new_tensor(torch.inf)
    return figures(terms, batch, pairs, pairs.pre, levels[-1].error, **extra)


def _kept(objective: AnyTopK, batch: Batch, signed: bool, team: Team) -> Pairs | None:
    readout, n_pairs = batch.readout(norms=batch.params.norms()), int(objective.k * len(batch.x))
    if not 0 < n_pairs <= batch.limit:
        return None
    if objective.k + MARGIN.get(batch.precision, 0) > objective.d_sae / _PER_PAIR:
        readout = replace(readout, precision="full")
    if isinstance(objective, (BatchTopK, Matryoshka)):
        every = int(objective.k * len(batch.x) * team.size)
        pairs = top_of_batch(batch.x, readout, every, 4 * batch.limit)
        return pairs if pairs is None or team.size == 1 else _among_all(pairs, readout, every, team)
    return top_per_token(batch.x, readout, objective.k, signed=signed)


def _among_all(pairs: Pairs, readout: Readout, n: int, team: Team) -> Pairs:
    """Of these pairs, those among the `n` best of all processes."""
    scores = readout.score(pairs.pre, pairs.latents).clamp(min=0)
    return pairs.where(team.chosen(scores, n).nonzero()[:, 0])


def _levels(batch: Batch, pairs: Pairs, limits: tuple[int, ...]) -> list[Level]:
    """Forward through the levels; `pairs.pre` are the activations."""
    levels: list[Level] = []
    for low, high in pairwise(limits):
        own = pairs if len(limits) == 2 else _between(pairs, low, high)
        written = combine(own, own.pre, batch.params.W_dec[low:high])
        error = written.add_(levels[-1].error) if levels else batch.error(written)
        levels.append(Level(low, high, own, error))
    return levels


def _between(pairs: Pairs, low: int, high: int) -> Pairs:
    inside = (pairs.latents >= low) & (pairs.latents < high)
    return pairs_of(pairs.tokens[inside], pairs.latents[inside] - low, pairs.pre[inside], len(pairs.starts))


def _gradients(batch: Batch, levels: list[Level], signed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Backward through the levels: gradients by parameter, and that of what every level's reconstruction contains."""
    parts, d_recon = [], torch.zeros((), device=batch.y.device)
    for level in reversed(levels):
        span = slice(level.low, level.high)
        d_recon = batch.d_error(level.error).add_(d_recon)
        order = by_latent(level.pairs, level.high - level.low)
        d_pre = dots(level.pairs, d_recon, batch.params.W_dec[span])
        d_pre = d_pre if signed else d_pre * (level.pairs.pre > 0)
        parts.insert(0, coded_gradients(batch, level.pairs, order, level.pairs.pre, d_pre, d_recon, span))
    return {name: _joined(batch.memory(name), [part[name] for part in parts]) for name in parts[0]}, d_recon


def _joined(memory: Tensor | None, parts: list[Tensor]) -> Tensor:
    """Gradients of all latents from those of each level: already together where they were put into memory."""
    return torch.cat(parts) if memory is None else memory


def _name(level: Level, objective: AnyTopK) -> str:
    return "mse" if level.high == objective.d_sae else f"inner_mse_{level.high}"


def _dead(
    objective: AnyTopK, batch: Batch, levels: list[Level], state: State, made: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """Auxiliary loss of the dead latents; its gradients are added to `made`."""
    loss, params, rows = _dead_loss(objective), batch.params, state.dead_rows
    if not getattr(objective, "aux_by_level", False):
        return add_dead_gradients(loss, params, batch.x, -levels[-1].error, state, made)
    parts = []
    for level in levels:
        own = replace(state, dead_rows=rows[(rows >= level.low) & (rows < level.high)])
        parts.append(add_dead_gradients(loss, params, batch.x, -level.error, own, made))
    return torch.stack(parts).sum()


def _dead_loss(objective: AnyTopK) -> DeadLoss:
    signed, relu = isinstance(objective, AbsTopK), getattr(objective, "aux_relu", False)

    def loss(dead: Params, pre: Tensor, error: Tensor, state: State) -> Tensor:
        k_aux = objective.k_aux or max(1, error.shape[1] // 2)
        return objective.aux * auxk(dead, pre, error, state, k_aux=k_aux, signed=signed, relu=relu)

    return loss
