"""What an SAE is, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from saewb.errors import explain

Activation = Literal["relu", "jumprelu", "topk", "abstopk", "groupmax"]
TokenNormalization = Literal["none", "layer_norm", "constant_norm", "centered"]
PreBias = Literal["none", "tied", "own"]


def checker(owner: str) -> Callable[[bool, str, object, str], None]:
    """What raises a ValueError for a wrong field of `owner`: called with (ok, name, got, want)."""

    def check(ok: bool, name: str, got: object, want: str) -> None:
        if not ok:
            raise ValueError(explain(f"{owner} got {name}={got!r}.", want=want, fix=f"{owner}(..., {name}=...)"))

    return check


_check = checker("SAEConfig")


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, without its weights. Wrong or unknown fields raise; nothing is shared or changed afterwards."""

    d_in: int  # width of what it reads
    d_sae: int  # number of latents
    activation: Activation = "relu"  # which latents survive
    k: int | None = None  # latents kept per token; for the two top-k gates, and only there
    d_out: int | None = None  # width of what it writes; None means d_in
    skip: bool = False  # adds x @ W_skip to the output (skip transcoders)
    pre_bias: PreBias = "none"  # subtracted before encoding: nothing, b_dec itself, or a b_pre of its own
    # Per token, undone on the output: mean and spread of x, its norm, or its mean alone ("centered", for SAEs of models
    # with centered writing weights). A constant factor is folded into the weights instead.
    normalization: TokenNormalization = "none"
    hook: str | None = None  # the point of the model it reads
    hook_out: str | None = None  # the point it writes; None means `hook`; another one makes it a transcoder
    head: int | None = None  # reads and writes this attention head only; None means all
    model: str | None = None  # name of the language model it was trained on
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever else its file says, kept as read

    def __post_init__(self) -> None:
        if self.d_out is None:
            object.__setattr__(self, "d_out", self.d_in)
        object.__setattr__(self, "metadata", dict(self.metadata))
        for name in ("d_in", "d_sae", "d_out"):
            _check(
                type(getattr(self, name)) is int and getattr(self, name) > 0,
                name,
                getattr(self, name),
                "a positive integer",
            )
        for name, choices in (
            ("activation", get_args(Activation)),
            ("normalization", get_args(TokenNormalization)),
            ("pre_bias", get_args(PreBias)),
        ):
            _check(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        if self.activation in ("topk", "abstopk", "groupmax"):
            _check(
                type(self.k) is int and 0 < self.k <= self.d_sae,
                "k",
                self.k,
                f"1 to d_sae={self.d_sae} for activation {self.activation!r}",
            )
            whole = self.activation != "groupmax" or self.d_sae % self.k == 0
            _check(whole, "k", self.k, f"a divisor of d_sae={self.d_sae}, since groupmax makes k equal groups")
        else:
            _check(
                self.k is None,
                "k",
                self.k,
                f"None, since activation {self.activation!r} keeps no fixed number of latents",
            )
        if self.d_out != self.d_in:
            _check(
                self.pre_bias != "tied",
                "pre_bias",
                self.pre_bias,
                f"'none' or 'own', since b_dec has d_out={self.d_out}, not d_in={self.d_in} numbers",
            )
        if self.is_transcoder:
            _check(
                self.normalization == "none",
                "normalization",
                self.normalization,
                "'none' for a transcoder, since the scale of its input says nothing about its output",
            )

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts something else than what it reads."""
        return self.d_out != self.d_in or self.hook_out not in (None, self.hook)


class WritesWhereItReads:
    """What the configuration of a class that is never a transcoder has in common with SAEConfig."""

    d_in: int

    @property
    def d_out(self) -> int:
        """Width of what it writes: d_in."""
        return self.d_in

    @property
    def hook_out(self) -> None:
        """Always None: it writes where it reads."""
        return None

    @property
    def is_transcoder(self) -> bool:
        """Always False."""
        return False


def tensor_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """The tensors an SAE of this configuration has, by name, with their shapes."""
    d_in, d_sae, d_out = cfg.d_in, cfg.d_sae, cfg.d_out
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if cfg.pre_bias == "own":
        shapes["b_pre"] = (d_in,)
    if cfg.activation == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if cfg.skip:
        shapes["W_skip"] = (d_in, d_out)
    return shapes


def describe(sae: Any, kind: str) -> str:
    """One line on any of the SAE classes: what it is, its widths, where it reads and writes, dtype and device."""
    cfg, scaling = sae.cfg, getattr(sae.cfg, "normalization", "none")
    facts = [kind, f"{cfg.d_in} -> {cfg.d_sae} latents" + (f" -> {cfg.d_out}" if cfg.is_transcoder else "")]
    facts += ["skip"] if getattr(cfg, "skip", False) else []
    facts += [scaling] if scaling != "none" else []
    facts += [f"head {cfg.head}"] if cfg.head is not None else []
    if cfg.hook is not None:
        facts.append(cfg.hook if cfg.hook_out in (None, cfg.hook) else f"{cfg.hook} => {cfg.hook_out}")
    facts += [cfg.model] if cfg.model else []
    facts.append(f"{str(sae.dtype).removeprefix('torch.')} on {sae.device}")
    return f"{type(sae).__name__}({', '.join(facts)})"
