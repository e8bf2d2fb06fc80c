"""What a training step reports. Figures stay on the device until somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.firing import Firing
from saewb.metrics import Reconstruction
from saewb.objectives import Coefficient, CoefficientWarning, coefficient_warnings


@dataclass(frozen=True)
class HeldOut:
    """How an SAE does on activations it is not trained on, as it would be exported now, in the model's units."""

    reconstruction: Reconstruction  # mse, fvu, cosine, ...
    firing: Firing  # l0, density, dead and dense fractions


@dataclass(frozen=True)
class Diverged:
    """The loss is no longer a number."""

    loss: float  # nan or inf

    def __str__(self) -> str:
        return f"the loss is {self.loss}: lower the learning rate, or go back to a checkpoint"


@dataclass(frozen=True, eq=False)
class Figures:
    """One SAE's step. Tensors are 0-d, on the training's device; `numbers()` reads them all at once."""

    loss: Float[Tensor, ""]  # what was minimised: the sum of `losses`
    losses: Mapping[str, Float[Tensor, ""]]  # by name, as they enter the sum, in training units
    l0: Float[Tensor, ""]  # active latents per token, in this batch
    fvu: Float[Tensor, ""]  # fraction of this batch's variance that is not explained
    dead_frac: Float[Tensor, ""]  # fraction of latents silent for longer than `dead_after_tokens`
    n_dense: Int[Tensor, ""]  # latents on more than `dense_above` of the last tokens
    lr: float  # of this step
    coefficients: Mapping[str, Float[Tensor, ""]]  # weights of sparsity losses in this step
    extra: Mapping[str, Float[Tensor, ""]]  # what else the objective measures: "kept_min", "in_band"
    held_out: HeldOut | None = None  # on steps that measured
    watch: Mapping[str, Coefficient] = field(default_factory=dict, repr=False)  # how the weights were set
    n_tokens: int = 0  # trained on after this step
    d_sae: int = 0  # latents

    def numbers(self) -> dict[str, float]:
        """Every figure as a float, by name ("losses/mse", "coefficients/l1", ...): one wait for the device."""
        named = {"loss": self.loss, "l0": self.l0, "fvu": self.fvu, "dead_frac": self.dead_frac}
        named["n_dense"] = self.n_dense
        for group in ("losses", "coefficients", "extra"):
            named |= {f"{group}/{name}": value for name, value in getattr(self, group).items()}
        values = torch.stack([value.detach().float() for value in named.values()]).tolist()
        return {**dict(zip(named, values, strict=True)), "lr": self.lr}

    @property
    def warnings(self) -> tuple[Union[CoefficientWarning, Diverged], ...]:
        """What is wrong with this step's settings; waits for the device."""
        numbers = self.numbers()
        found: list[Any] = [] if math.isfinite(numbers["loss"]) else [Diverged(numbers["loss"])]
        for name, coefficient in self.watch.items():
            found += coefficient_warnings(
                coefficient,
                name,
                numbers[f"coefficients/{name}"],
                n_tokens=self.n_tokens,
                l0=numbers["l0"],
                d_sae=self.d_sae,
                in_band=numbers.get("extra/in_band"),
            )
        return tuple(found)


@dataclass(frozen=True, eq=False)
class TrainStep:
    """One step of a training: what each SAE did with one batch."""

    step: int  # 1 after the first
    n_tokens: int  # trained on so far, this step's included
    saes: Mapping[str, Figures]  # by the SAE's name

    @property
    def only(self) -> Figures:
        """The figures of the one SAE.

        Raises:
            ValueError: if several are trained.
        """
        if len(self.saes) != 1:
            names = ", ".join(map(repr, self.saes))
            raise ValueError(explain(f"this step has {len(self.saes)} SAEs.", want=names, fix="step.saes[name].l0"))
        return next(iter(self.saes.values()))

    @property
    def warnings(self) -> dict[str, tuple[Union[CoefficientWarning, Diverged], ...]]:
        """What is wrong, by SAE; only those with something; waits for the device."""
        found = {name: figures.warnings for name, figures in self.saes.items()}
        return {name: warnings for name, warnings in found.items() if warnings}
