"""Linear probes of many classes at once, trained by Adam, as SAEBench trains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """One against all, for each class."""

    weight: Float[Tensor, "classes d"]
    """Directions."""
    bias: Float[Tensor, " classes"]
    """Intercepts."""

    def scores(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows classes"]:
        """Log odds of each class."""
        return nn.functional.linear(x, self.weight, self.bias)


@torch.enable_grad()
def train_probe(
    rows: Callable[[Tensor], Tensor],
    y: Bool[Tensor, "rows classes"],
    d: int,
    rng: torch.Generator,
    *,
    batch: int,
    weight_decay: float,
    l1: float = 0.0,
    epochs: int = 50,
    lr: tuple[float, float] = (1e-2, 1e-5),
    zero_start: bool = False,
) -> LinearProbe:
    """Minimize the cross entropy of each class against all others, positives weighted by negatives / positives.

    Args:
        rows: features `[len(index), d]` of rows by their index.
        y: classes of each row.
        d: number of features.
        rng: for the start and the order; drawn from as a `DataLoader` that shuffles does.
        batch: rows per step.
        weight_decay: of Adam, which adds it to the gradient.
        l1: factor of the mean over classes of ||weight||_1.
        epochs: passes over the rows.
        lr: at the first and, exponentially, towards the end.
        zero_start: start from zeros instead of `nn.Linear`'s random weights.

    Returns:
        The probe after the last epoch, float32 on the CPU.
    """
    n, n_classes = y.shape
    target = y.float()
    positives = target.sum(0)
    bound = 1 / math.sqrt(d)
    weight = torch.empty(n_classes, d).uniform_(-bound, bound, generator=rng)
    bias = torch.empty(n_classes).uniform_(-bound, bound, generator=rng)
    if zero_start:
        weight, bias = weight.zero_(), bias.zero_()
    weight.requires_grad_(), bias.requires_grad_()
    loss_of = nn.BCEWithLogitsLoss(pos_weight=(n - positives) / positives)
    optimizer = torch.optim.Adam([weight, bias], lr=lr[0], weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(math.log(lr[1] / lr[0]) / epochs))
    for _ in range(epochs):
        for index in _shuffled_as_a_loader(n, rng).split(batch):
            loss = loss_of(nn.functional.linear(rows(index), weight, bias), target[index])
            if l1:
                loss = loss + l1 * weight.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return LinearProbe(weight.detach(), bias.detach())


def _shuffled_as_a_loader(n: int, rng: torch.Generator) -> Tensor:
    """The order of an epoch of torch's DataLoader, which draws a seed for workers and one for its sampler."""
    torch.empty((), dtype=torch.int64).random_(generator=rng)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=rng))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
