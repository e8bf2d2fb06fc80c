"""The figures of a whole batch, from those of each process's share of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.distributed import ParallelContext
from saewb.training.objectives import Losses


@torch.no_grad()
def combined(losses: Losses, y: Float[Tensor, "share d_out"], team: ParallelContext) -> Losses:
    """Losses of the batch of all processes: what one process would have measured on it.

        terms, l0, in_band: means;   fired: sums;   kept_min: the least;   fvu = B mse / (sum |y|^2 - |sum y|^2 / B)

    All but `kept_min` in one exchange of d_sae + d_out numbers, in float64, so that the variance keeps its digits. No
    gradient goes through it: gradients are averaged by themselves.

    Args:
        losses: of this process's share.
        y: what was to be written, this process's share.
        team: the processes; with one alone, nothing is done.
    """
    if team.size == 1:
        return losses
    means = {**losses.terms, "/l0": losses.l0, **{k: v for k, v in losses.extra.items() if k != "kept_min"}}
    y = y.double()
    scalars = torch.stack([value.detach().double() for value in means.values()]) / team.size
    parts = [scalars, y.square().sum()[None], losses.fired.double(), y.sum(0)]
    sums = team.sum_(torch.cat(parts))
    scalars, square, fired, total = sums.split([len(part) for part in parts])
    named = dict(zip(means, scalars.to(losses.total.dtype), strict=True))
    n = len(y) * team.size
    spread = square[0] - total.square().sum() / n
    mse = scalars[list(means).index("mse")]
    terms = {name: named[name] for name in losses.terms}
    extra = {name: named[name] for name in losses.extra if name != "kept_min"}
    if "kept_min" in losses.extra:
        extra["kept_min"] = team.min_(losses.extra["kept_min"].detach().clone())
    return replace(
        losses,
        terms=terms,
        total=torch.stack(list(terms.values())).sum(),
        l0=named["/l0"],
        fvu=(n * mse / spread).to(losses.fvu.dtype),
        fired=fired.round().long(),
        extra=extra,
    )
