"""The one list of objectives, and data to train them on: a new objective is added here, and every test runs on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import saewb

D_IN, D_SAE, D_OUT = 8, 24, 6

OBJECTIVES: dict[str, Any] = {
    "standard": saewb.Standard(D_SAE, l1=0.3, warmup_tokens=400),
    "standard_lp": saewb.Standard(D_SAE, l1=0.05, p=0.5),
    "standard_unit": saewb.Standard(D_SAE, l1=0.3, rows="unit", init_norm=1.0, target_l0=4.0),
    "gated": saewb.Gated(D_SAE, l1=0.3),
    "gated_free": saewb.Gated(D_SAE, l1=0.3, rows="free", init_norm=0.5, frozen=False),
    "topk": saewb.TopK(D_SAE, k=4),
    "topk_free": saewb.TopK(D_SAE, k=4, rows="free", init_norm=0.3, aux=1.0, k_aux=3, aux_relu=True),
    "abstopk": saewb.AbsTopK(D_SAE, k=4),
    "abstopk_free": saewb.AbsTopK(D_SAE, k=3, rows="free", init_norm=0.3, aux=0.0),
    "batchtopk": saewb.BatchTopK(D_SAE, k=4.0),
    "batchtopk_free": saewb.BatchTopK(D_SAE, k=3.5, rows="free", init_norm=0.3, aux=1.0),
    "matryoshka": saewb.Matryoshka(D_SAE, k=4.0, widths=(5, 12)),
    "matryoshka_by_level": saewb.Matryoshka(
        D_SAE, k=4.0, widths=(5, 12), rows="free", init_norm=0.3, aux=1.0, aux_by_level=True
    ),
    "jumprelu_step": saewb.JumpReLU(D_SAE, l0=0.05, init_threshold=0.1, bandwidth=0.3),
    "jumprelu_log": saewb.JumpReLU(D_SAE, l0=0.05, init_threshold=0.1, bandwidth=0.3, threshold="log"),
    "jumprelu_tanh": saewb.JumpReLU(
        D_SAE, l0=0.05, sparsity="tanh", to_input=True, bandwidth=1.0, pre_act=1e-3, rows="free", init_norm=0.5
    ),
    "jumprelu_quadratic": saewb.JumpReLU(
        D_SAE, l0=0.05, sparsity="quadratic", target_l0=4.0, bandwidth=0.5, pre_act=1e-3, pre_act_on="all"
    ),
    "pursuit": saewb.MatchingPursuit(D_SAE, max_iterations=4),
}
TRANSCODERS = {name: o for name, o in OBJECTIVES.items() if name != "pursuit"}
SKIPS = {
    "topk": saewb.TopK(D_SAE, k=4, skip=True),
    "matryoshka": saewb.Matryoshka(D_SAE, k=4.0, widths=(5, 12), skip=True),
    "jumprelu_step": saewb.JumpReLU(D_SAE, l0=0.05, init_threshold=0.1, bandwidth=0.3, skip=True),
    "standard": saewb.Standard(D_SAE, l1=0.3, skip=True),
    "gated": saewb.Gated(D_SAE, l1=0.3, skip=True),
}


def drawn(objective: Any, d_out: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 5) -> Any:
    """An objective's parameters with random values in all of them: no zero biases, rows of different lengths."""
    params = objective.init_params(D_IN, d_out, dtype=dtype)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in params.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(dtype)
            p.copy_(noise.abs() * 0.3 if name == "threshold" else p + 0.3 * noise)
        if objective.rows == "unit":
            params.W_dec.copy_(nn.functional.normalize(params.W_dec, dim=1))
    return params


def batch(n: int = 40, d: int = D_IN, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Activations with a mean, `[n, d]`."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=rng, dtype=torch.float64) * 1.2 + 0.3).to(dtype)


def true_features(n_features: int, d: int, n_tokens: int, p: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features `[n_features, d]`, and activations `[n_tokens, d]` in which each is on with probability p."""
    rng = torch.Generator().manual_seed(seed)
    features = nn.functional.normalize(torch.randn(n_features, d, generator=rng), dim=1)
    on = torch.rand(n_tokens, n_features, generator=rng) < p
    return features, (on * (1 + 0.3 * torch.randn(n_tokens, n_features, generator=rng)).abs()) @ features


def recovered(W_dec: Tensor, features: Tensor) -> float:
    """Mean over features of the largest cosine with a decoder row."""
    rows = nn.functional.normalize(W_dec.detach(), dim=1)
    return float((features @ rows.T).amax(1).mean())


@dataclass(frozen=True, eq=False)
class Rows:
    """Stands for `saewb.models.capture.Activations`."""

    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))


class InMemory:
    """A shuffled stream over tensors, for ever, with a place that can be saved."""

    def __init__(self, values: Mapping[str, Tensor], batch_tokens: int, seed: int = 0, epochs: int | None = None):
        self.values, self.batch_tokens, self.seed, self.epochs = dict(values), batch_tokens, seed, epochs
        self.epoch = self.row = 0

    def __iter__(self) -> Iterator[Rows]:
        n = len(next(iter(self.values.values())))
        while self.epochs is None or self.epoch < self.epochs:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            while self.row + self.batch_tokens <= n:
                rows = order[self.row : self.row + self.batch_tokens]
                self.row += self.batch_tokens
                yield Rows({name: value[rows] for name, value in self.values.items()})
            self.epoch, self.row = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.row = state["epoch"], state["row"]
