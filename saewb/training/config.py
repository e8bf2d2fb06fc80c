"""How to train, in tokens: sizes, schedule, optimizer, units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from saewb.errors import explain
from saewb.sae.config import checker

Schedule = Literal["constant", "linear", "cosine", "restarts"]
Normalization = Literal["none", "constant", "centered", "whitened", "layer_norm", "constant_norm"]
Step = Literal["auto", "plain", "sparse"]

_check = checker("TrainConfig")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; one for all SAEs of a stream. All sizes are in tokens. Wrong or unknown fields raise.

    Example:
        >>> config = TrainConfig(n_tokens=1_000_000, batch_tokens=4096, warmup_tokens=50_000)
        >>> config.n_steps, round(config.rate(0), 8), config.rate(500_000)
        (244, 2.458e-05, 0.0003)
    """

    n_tokens: int  # to train on; a last batch that would not be full is left out
    batch_tokens: int = 4096  # per optimizer step
    lr: float = 3e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    eps: float = 1e-8  # of Adam
    weight_decay: float = 0.0  # decoupled (AdamW), per unit of learning rate; 0 is Adam
    schedule: Schedule = "constant"  # between warm-up and decay
    lr_end: float | None = None  # what linear, cosine and restarts fall to; None means lr / 10
    n_cycles: int = 1  # of "restarts"
    warmup_tokens: int = 0  # learning rate rises linearly from 0
    decay_tokens: int = 0  # at the end: falls linearly to 0 from where the schedule has brought it
    clip: float | None = 1.0  # longest gradient, over all weights of an SAE; None does not clip
    autocast: torch.dtype | None = None  # of products in the plain losses: torch.bfloat16; weights stay float32
    compile: str | None = None  # backend of torch.compile for the plain losses, e.g. "inductor"
    step: Step = "auto"  # how gradients are computed: see `saewb.training.trainer.choose_gradients`
    normalization: Normalization = (
        "centered"  # of activations: see `saewb.training.normalization`; "none" for synthetic ones
    )
    shrinkage: float = 1e-3  # of the covariance, for "whitened": see `saewb.training.normalization`
    estimate_tokens: int | None = None  # that means and factors are estimated on; held meanwhile; None means 8 batches
    b_dec: Literal["zeros", "mean"] = "zeros"  # where the decoder's bias starts
    dead_after_tokens: int | None = None  # silent for longer: dead. None means a tenth of n_tokens, at most 10,000,000
    look_every_steps: int | None = None  # how often the host counts the dead; None means 1 on a CPU, 16 elsewhere
    dense_above: float = 0.1  # of tokens; a latent that is on more often counts as dense
    density_tokens: int = 100_000  # about how many of the last tokens that frequency is taken over
    control_tokens: int | None = None  # time constant of the target-L0 controller; None means a twentieth of n_tokens
    eval_every_tokens: int | None = None  # measure on the held-out activations; None means only after the last step
    seed: int = 0  # of the initial weights

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_tokens", "n_cycles", "density_tokens"):
            _check(_positive(getattr(self, name)), name, getattr(self, name), "a positive integer")
        for name in ("estimate_tokens", "dead_after_tokens", "look_every_steps", "control_tokens", "eval_every_tokens"):
            value = getattr(self, name)
            _check(value is None or _positive(value), name, value, "a positive integer, or None")
        for name in ("warmup_tokens", "decay_tokens"):
            value = getattr(self, name)
            _check(type(value) is int and value >= 0, name, value, "a number of tokens, 0 or more")
        for name, choices in (("schedule", Schedule), ("normalization", Normalization), ("step", Step)):
            known = ", ".join(map(repr, get_args(choices)))
            _check(getattr(self, name) in get_args(choices), name, getattr(self, name), f"one of {known}")
        _check(self.b_dec in ("zeros", "mean"), "b_dec", self.b_dec, "'zeros' or 'mean'")
        _check(
            0 <= self.shrinkage <= 1, "shrinkage", self.shrinkage, "a share, 0 to 1; 0 needs every direction to vary"
        )
        self._check_rates()
        fits = self.batch_tokens <= self.n_tokens
        _check(fits, "batch_tokens", self.batch_tokens, f"at most n_tokens={self.n_tokens}")
        ramps = self.warmup_tokens + self.decay_tokens
        what = f"{self.warmup_tokens} + decay_tokens={self.decay_tokens}"
        _check(ramps <= self.n_tokens, "warmup_tokens", what, f"together at most n_tokens={self.n_tokens}")

    def _check_rates(self) -> None:
        _check(self.lr > 0, "lr", self.lr, "a positive learning rate, such as 3e-4")
        _check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in 0..1")
        _check(self.eps > 0, "eps", self.eps, "a small positive number, such as 1e-8")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        end = self.lr_end
        _check(end is None or 0 <= end <= self.lr, "lr_end", end, f"0 to lr={self.lr}, or None for a tenth of it")
        _check(self.clip is None or self.clip > 0, "clip", self.clip, "a positive length, or None")
        if self.autocast not in (None, torch.bfloat16):
            want = "torch.bfloat16 or None; float16 loses small gradients, and nothing here rescales them"
            what = f"TrainConfig got autocast={self.autocast!r}."
            raise ValueError(explain(what, want=want, fix="autocast=torch.bfloat16"))
        _check(0 < self.dense_above < 1, "dense_above", self.dense_above, "a share of tokens, between 0 and 1")

    @property
    def n_steps(self) -> int:
        """Optimizer steps: whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_tokens

    @property
    def dead_after(self) -> int:
        """Tokens after which a silent latent is dead, with the default filled in."""
        return self.dead_after_tokens or max(1, min(10_000_000, self.n_tokens // 10))

    @property
    def control(self) -> int:
        """The controller's time constant in tokens, with the default filled in."""
        return self.control_tokens or max(self.batch_tokens, self.n_tokens // 20)

    def look_every(self, device: torch.device) -> int:
        """Steps between counts of the dead, with the default filled in."""
        return self.look_every_steps or (1 if device.type == "cpu" else 16)

    def rate(self, n_tokens: int) -> float:
        """The learning rate of the step that starts after `n_tokens` tokens.

        With t = n_tokens, B the batch, e = lr_end / lr, and p = (t - warmup) / (n_tokens - warmup - decay) in 0..1:

            lr * min(1, (t + B) / warmup) * f(p) * min(1, (n_tokens - t) / decay)
            f: constant 1; linear 1 - (1 - e) p; cosine e + (1 - e) (1 + cos pi p) / 2; restarts: of p n_cycles mod 1
        """
        up = min(1.0, (n_tokens + self.batch_tokens) / self.warmup_tokens) if self.warmup_tokens else 1.0
        down = min(1.0, max(0, self.n_tokens - n_tokens) / self.decay_tokens) if self.decay_tokens else 1.0
        span = self.n_tokens - self.warmup_tokens - self.decay_tokens
        progress = min(1.0, max(0.0, (n_tokens - self.warmup_tokens) / span)) if span else 1.0
        return self.lr * up * down * self._shape(progress)

    def _shape(self, progress: float) -> float:
        if self.schedule == "constant":
            return 1.0
        end = 0.1 if self.lr_end is None else self.lr_end / self.lr
        if self.schedule == "linear":
            return 1 - (1 - end) * progress
        if self.schedule == "restarts":
            progress = 1.0 if progress == 1.0 else progress * self.n_cycles % 1.0
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def _positive(value: object) -> bool:
    return type(value) is int and value > 0
