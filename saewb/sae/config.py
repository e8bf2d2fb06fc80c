"""Configurations of SAEs: sizes, activation function, hooks and metadata, without the weights.

Frozen dataclasses, not pydantic models: most checks concern several fields (k with d_sae and the activation, pre_bias
with d_out), so pydantic would save little and cost its import (0.3 s) whenever a first SAE is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args

from saewb.errors import explain

Activation = Literal["relu", "jumprelu", "topk", "lineartopk", "abstopk", "groupmax"]
TOP_K = ("topk", "lineartopk", "abstopk", "groupmax")
"""Activations that keep a fixed number of latents per token."""
TokenNormalization = Literal["none", "layer_norm", "constant_norm", "centered"]
PreBias = Literal["none", "tied", "own"]
Shape = tuple[int, ...]


class CoderConfig(ABC):
    """Base of the configurations of all architectures; each is a frozen dataclass."""

    d_in: int
    d_sae: Any
    d_out: int | None
    model: str | None
    metadata: Mapping[str, Any]

    @property
    @abstractmethod
    def is_transcoder(self) -> bool:
        """Whether its output predicts another activation than its input."""

    @abstractmethod
    def tensor_shapes(self) -> Mapping[str, Union[Shape, list[Shape]]]:
        """Shapes of the tensors of an SAE with this configuration, by name; a list where it has several layers."""

    def _check(self, ok: bool, name: str, want: str) -> None:
        if not ok:
            owner, value = type(self).__name__, getattr(self, name)
            raise ValueError(explain(f"{owner} got {name}={value!r}.", want=want, fix=f"{owner}(..., {name}=...)"))

    def _check_counts(self, *names: str) -> None:
        for name in names:
            self._check(_is_count(getattr(self, name)), name, "a positive integer")

    def _check_choice(self, name: str, choices: Any) -> None:
        values = get_args(choices)
        self._check(getattr(self, name) in values, name, "one of " + ", ".join(map(repr, values)))

    def _replace(self, **values: Any) -> None:
        """Set fields of the frozen dataclass in `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _is_count(n: object) -> bool:
    return type(n) is int and n > 0


@dataclass(frozen=True)
class SAEConfig(CoderConfig):
    """Configuration of an SAE or transcoder, immutable. Invalid or unknown fields raise."""

    d_in: int
    """Width of the input."""
    d_sae: int
    """Number of latents."""
    activation: Activation = "relu"
    """Activation function."""
    k: int | None = None
    """Active latents per token; only for "topk", "lineartopk", "abstopk" and "groupmax"."""
    d_out: int | None = None
    """Width of the output; None means d_in."""
    skip: bool = False
    """Adds x @ W_skip to the output (skip transcoders)."""
    pre_bias: PreBias = "none"
    """Bias subtracted before encoding: none, b_dec ("tied"), or a separate b_pre ("own")."""
    normalization: TokenNormalization = "none"
    """Per-token normalization, undone on the output: mean and standard deviation ("layer_norm"), norm
    ("constant_norm"), or mean alone ("centered", for SAEs of models with centered writing weights). A constant factor
    is folded into the weights instead."""
    hook: str | None = None
    """Hook point of the input."""
    hook_out: str | None = None
    """Hook point of the output; None means `hook`; a different one makes it a transcoder."""
    head: int | None = None
    """Attention head that it reads and writes; None means all."""
    model: str | None = None
    """Name of the language model it was trained on."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its file, unchanged."""

    def __post_init__(self) -> None:
        self._replace(d_out=self.d_in if self.d_out is None else self.d_out, metadata=dict(self.metadata))
        self._check_counts("d_in", "d_sae", "d_out")
        self._check_choice("activation", Activation)
        self._check_choice("normalization", TokenNormalization)
        self._check_choice("pre_bias", PreBias)
        if self.activation in TOP_K:
            fits = _is_count(self.k) and self.k <= self.d_sae
            self._check(fits, "k", f"1 to d_sae={self.d_sae} for activation {self.activation!r}")
            whole = self.activation != "groupmax" or self.d_sae % self.k == 0
            self._check(whole, "k", f"a divisor of d_sae={self.d_sae}, since groupmax makes k equal groups")
        else:
            want = f"None, since activation {self.activation!r} keeps no fixed number of latents"
            self._check(self.k is None, "k", want)
        if self.d_out != self.d_in:
            want = f"'none' or 'own', since b_dec has d_out={self.d_out}, not d_in={self.d_in} numbers"
            self._check(self.pre_bias != "tied", "pre_bias", want)
        if self.is_transcoder:
            want = "'none' for a transcoder, since the scale of its input says nothing about its output"
            self._check(self.normalization == "none", "normalization", want)

    @property
    def is_transcoder(self) -> bool:
        """Whether its output predicts another activation than its input."""
        return self.d_out != self.d_in or self.hook_out not in (None, self.hook)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors of an SAE with this configuration, by name."""
        shapes: dict[str, Shape] = {
            "W_enc": (self.d_in, self.d_sae),
            "b_enc": (self.d_sae,),
            "W_dec": (self.d_sae, self.d_out),
            "b_dec": (self.d_out,),
        }
        if self.pre_bias == "own":
            shapes["b_pre"] = (self.d_in,)
        if self.activation == "jumprelu":
            shapes["threshold"] = (self.d_sae,)
        if self.skip:
            shapes["W_skip"] = (self.d_in, self.d_out)
        return shapes


class OnePointConfig(CoderConfig):
    """Base of the configurations of architectures whose output is at the hook point of the input."""

    def __post_init__(self) -> None:
        self._replace(metadata=dict(self.metadata))
        self._check_counts("d_in", "d_sae")
        self._check_choice("pre_bias", Literal["none", "tied"])
        self._check_choice("normalization", TokenNormalization)

    @property
    def d_out(self) -> int:
        """Width of the output: d_in."""
        return self.d_in

    @property
    def hook_out(self) -> None:
        """Always None: the output is at `hook`."""
        return None

    @property
    def is_transcoder(self) -> bool:
        """Always False."""
        return False
