"""Metrics of a training step, whose tensors stay on the device until they are read; progress before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Union

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import Reconstruction
from saewb.stats.firing import Firing
from saewb.training.objectives.sparsity_coefficient import Coefficient, CoefficientWarning, coefficient_warnings

DENSITY_EDGES = tuple(10 ** (i / 4 - 7) for i in range(29))  # 10^-7 to 1, four bins for each factor of ten


@dataclass(frozen=True)
class RunUp:
    """Progress of the reading before the first step of a run."""

    what: str
    """Purpose: "filling the buffer", "estimating the normalization", ..."""
    n_tokens: int
    """Tokens read."""
    total_tokens: int
    """Tokens to read."""

    @property
    def frac(self) -> float:
        """Fraction of the tokens that is read."""
        return self.n_tokens / self.total_tokens

    def __str__(self) -> str:
        return f"{self.what}, {self.n_tokens:,} of {self.total_tokens:,} tokens"


@dataclass(frozen=True)
class HeldOut:
    """Metrics of the SAE, as exported now, on held-out activations in the model's units."""

    reconstruction: Reconstruction
    """Reconstruction metrics: mse, fvu, cosine, ..."""
    firing: Firing
    """Firing statistics: l0, density, dead and dense fractions."""
    points: Mapping[str, Reconstruction] = field(default_factory=dict)
    """Reconstruction metrics of each point, where it writes several."""


@dataclass(frozen=True)
class Diverged:
    """Warning that the loss is no longer finite."""

    loss: float
    """The loss: nan or inf."""

    def __str__(self) -> str:
        return f"the loss is {self.loss}: lower the learning rate, or go back to a checkpoint"


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """Metrics of one SAE in one step. Tensors are 0-d, on the device; `numbers()` reads them all at once."""

    loss: Float[Tensor, ""]
    """Loss that is minimized: the sum of `losses`."""
    losses: Mapping[str, Float[Tensor, ""]]
    """Loss terms by name, as they enter the sum, in training units."""
    l0: Float[Tensor, ""]
    """Active latents per token, in this batch."""
    fvu: Float[Tensor, ""]
    """Fraction of this batch's variance that is not explained."""
    dead_frac: Float[Tensor, ""]
    """Fraction of latents silent for longer than `dead_after_tokens`."""
    n_dense: Int[Tensor, ""]
    """Latents active on more than `dense_above` of the last tokens."""
    lr: float
    """Learning rate of this step."""
    coefficients: Mapping[str, Float[Tensor, ""]]
    """Weights of sparsity losses in this step."""
    extra: Mapping[str, Float[Tensor, ""]]
    """Further metrics of the objective: "kept_min", "in_band"."""
    densities: Float[Tensor, " d_sae"] = field(repr=False)
    """Per latent, the share of about the last `density_tokens` on which it was active."""
    held_out: HeldOut | None = None
    """On steps with an evaluation."""
    schedules: Mapping[str, Coefficient] = field(default_factory=dict, repr=False)
    """Settings of the weights of sparsity losses."""
    n_tokens: int = 0
    """Tokens trained on after this step."""
    d_sae: int = 0
    """Number of latents."""

    def numbers(self) -> dict[str, float]:
        """Every metric as a float, by name ("losses/mse", "coefficients/l1", ...), in one transfer from the device."""
        named = self._named()
        return self._to_dict(named, torch.stack(list(named.values())).tolist())

    def numbers_and_density(self) -> tuple[dict[str, float], list[int]]:
        """`numbers()` and the histogram of latents' densities, in one transfer from the device.

        Returns:
            (numbers, counts): counts[0] latents have a density below `DENSITY_EDGES[0]`, counts[i] one from edge i - 1
            to below edge i; the last ones are active on every token. The counts sum to d_sae.
        """
        named = self._named()
        edges = torch.tensor(DENSITY_EDGES, device=self.densities.device)
        above = (self.densities >= edges[:, None]).sum(1).float()  # exact up to 2^24 latents
        values = torch.cat([torch.stack(list(named.values())), above]).tolist()
        at_least = [self.densities.numel(), *map(int, values[len(named) :]), 0]
        return self._to_dict(named, values[: len(named)]), [a - b for a, b in pairwise(at_least)]

    def _named(self) -> dict[str, Tensor]:
        named = {"loss": self.loss, "l0": self.l0, "fvu": self.fvu, "dead_frac": self.dead_frac}
        named["n_dense"] = self.n_dense
        for group in ("losses", "coefficients", "extra"):
            named |= {f"{group}/{name}": value for name, value in getattr(self, group).items()}
        return {name: value.detach().float() for name, value in named.items()}

    def _to_dict(self, named: Mapping[str, Tensor], values: list[float]) -> dict[str, float]:
        return {**dict(zip(named, values, strict=True)), "lr": self.lr}

    @property
    def warnings(self) -> tuple[Union[CoefficientWarning, Diverged], ...]:
        """Warnings about settings, from the metrics of this step; waits for the device."""
        numbers = self.numbers()
        problems: list[Union[CoefficientWarning, Diverged]] = (
            [] if math.isfinite(numbers["loss"]) else [Diverged(numbers["loss"])]
        )
        for name, coefficient in self.schedules.items():
            problems += coefficient_warnings(
                coefficient,
                name,
                numbers[f"coefficients/{name}"],
                n_tokens=self.n_tokens,
                l0=numbers["l0"],
                d_sae=self.d_sae,
                in_band=numbers.get("extra/in_band"),
            )
        return tuple(problems)


@dataclass(frozen=True, eq=False)
class TrainStep:
    """One step of a training: metrics of each SAE on one batch."""

    step: int
    """Number of the step, 1 for the first."""
    n_tokens: int
    """Tokens trained on so far, including this step."""
    saes: Mapping[str, StepMetrics]
    """Metrics by the SAE's name."""

    @property
    def only(self) -> StepMetrics:
        """The metrics of the one SAE.

        Raises:
            ValueError: if several are trained.
        """
        if len(self.saes) != 1:
            names = ", ".join(map(repr, self.saes))
            raise ValueError(explain(f"this step has {len(self.saes)} SAEs.", want=names, fix="step.saes[name].l0"))
        return next(iter(self.saes.values()))

    @property
    def warnings(self) -> dict[str, tuple[Union[CoefficientWarning, Diverged], ...]]:
        """Warnings by SAE, for those that have any; waits for the device."""
        return {name: warnings for name, metrics in self.saes.items() if (warnings := metrics.warnings)}
