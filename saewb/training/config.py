"""The description of a training run: which SAEs, how to train them, on which activations, what to write.

    RunSpec(saes={name: Trainee}, train=TrainConfig, data=DataConfig, run=RunConfig)

`RunSpec.from_options` makes one from the arguments of `saewb.train` or a YAML file, `RunSpec.from_dict` from run.json;
`to_dict` is run.json, `saewb.training.code_export.train_code` the cell of code.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, InstanceOf, PlainSerializer, Strict

from saewb._config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
    descriptions,
    dump,
    parse,
    parse_value,
    require,
)
from saewb._indices import index_slice
from saewb.data.tokens import PASS_TOKENS
from saewb.errors import explain, near
from saewb.sae.crosscoder import CrossCoderSAE
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.training.objectives import OBJECTIVES, JumpReLU, Objective

Schedule = Literal["constant", "linear", "cosine", "restarts"]
Normalization = Literal["none", "constant", "centered", "whitened", "layer_norm", "constant_norm"]
Step = Literal["auto", "plain", "sparse"]

FORMAT = 2
"""Format number of run.json; 1, of saewb 0.1.0, is read as well."""


def _dtype(value: Any) -> Any:
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in (None, torch.bfloat16):
        want = "torch.bfloat16 or None; float16 loses small gradients, and nothing here rescales them"
        raise ValueError(explain(f"TrainConfig got autocast={value!r}.", want=want, fix="autocast=torch.bfloat16"))
    return dtype


Autocast = Annotated[torch.dtype | None, BeforeValidator(_dtype), PlainSerializer(str, when_used="json-unless-none")]
Seed = Annotated[int, Ge(-(2**63)), Lt(2**63)]
Beta = Annotated[float, Ge(0), Lt(1)]


@config
class TrainConfig:
    """Training hyperparameters, shared by all SAEs of a stream; sizes are in tokens. Wrong or unknown fields raise.

    Example:
        >>> config = TrainConfig(n_tokens=1_000_000, batch_tokens=4096, warmup_tokens=50_000)
        >>> config.n_steps, round(config.rate(0), 8), config.rate(500_000)
        (244, 2.458e-05, 0.0003)
    """

    n_tokens: PositiveInt
    """Tokens to train on; a last batch that would not be full is left out."""
    batch_tokens: PositiveInt = 4096
    """Tokens per optimizer step."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW), per unit of learning rate; 0 is Adam."""
    schedule: Schedule = "constant"
    """Learning rate between warm-up and decay."""
    lr_end: NonNegativeFloat | None = None
    """Learning rate at the end of linear, cosine and restarts; None means lr / 10."""
    n_cycles: PositiveInt = 1
    """Cycles of the schedule "restarts"."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay_tokens: NonNegativeInt = 0
    """Last tokens, over which the learning rate falls linearly to 0 from where the schedule has brought it."""
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm, over all weights of an SAE; None does not clip."""
    autocast: Autocast = None
    """Dtype of matrix products in the plain losses: torch.bfloat16, or None; weights stay float32."""
    compile: str | None = None
    """Backend of torch.compile for the plain losses, e.g. "inductor"."""
    step: Step = "auto"
    """How gradients are computed: "plain" by autograd, "sparse" on active latents only, "auto" whichever is faster."""
    normalization: Normalization = "centered"
    """Normalization of activations, see `saewb.training.normalization`; "none" for synthetic ones."""
    shrinkage: Annotated[float, Ge(0), Le(1)] = 1e-3
    """Shrinkage of the covariance for "whitened", 0 to 1; 0 needs every direction to vary."""
    estimate_tokens: PositiveInt | None = None
    """Tokens on which normalizations are estimated, held in memory until then; None means 8 batches."""
    b_dec: Literal["zeros", "mean"] = "zeros"
    """Initial decoder bias."""
    dead_after_tokens: PositiveInt | None = None
    """Tokens after which a silent latent is dead; None means a tenth of n_tokens, at least 50 batches and at most
    10,000,000 tokens: in the first steps most latents are silent, and to revive them is the larger part of a step."""
    look_every_steps: PositiveInt | None = None
    """Steps between looks at the dead latents, for the auxiliary losses; None means 1 on a CPU, 16 elsewhere."""
    dense_above: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Fraction of tokens; a latent that is active on more counts as dense."""
    density_tokens: PositiveInt = 100_000
    """Tokens over which the frequency of latents is averaged, about."""
    control_tokens: PositiveInt | None = None
    """Time constant of the target-L0 controller, in tokens; None means a twentieth of n_tokens."""
    eval_every_tokens: PositiveInt | None = None
    """Tokens between measurements on held-out activations; None means only after the last step."""
    seed: Seed = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        require(self, self.batch_tokens <= self.n_tokens, "batch_tokens", f"at most n_tokens={self.n_tokens}")
        lr_end = self.lr_end is None or self.lr_end <= self.lr
        require(self, lr_end, "lr_end", f"0 to lr={self.lr}, or None for a tenth of it")
        ramps = self.warmup_tokens + self.decay_tokens <= self.n_tokens
        want = f"with decay_tokens={self.decay_tokens} together at most n_tokens={self.n_tokens}"
        require(self, ramps, "warmup_tokens", want)

    @property
    def n_steps(self) -> int:
        """Optimizer steps: whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_tokens

    @property
    def dead_after(self) -> int:
        """Tokens after which a silent latent counts as dead, with the default filled in."""
        return self.dead_after_tokens or min(10_000_000, max(50 * self.batch_tokens, self.n_tokens // 10))

    @property
    def control(self) -> int:
        """The controller's time constant in tokens, with the default filled in."""
        return self.control_tokens or max(self.batch_tokens, self.n_tokens // 20)

    def look_every(self, device: torch.device) -> int:
        """Steps between counts of dead latents, with the default filled in."""
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


@config
class DataConfig:
    """How activations are read, shuffled and batched."""

    buffer_tokens: NonNegativeInt | None = None
    """Tokens of the shuffle buffer; 0 keeps the order, None means 16 batches."""
    prefetch: NonNegativeInt = 2
    """Batches computed ahead."""
    ctx_len: PositiveInt = 128
    """Tokens of a row."""
    pass_tokens: PositiveInt = PASS_TOKENS
    """Tokens of one forward pass of the model."""
    skip_special_tokens: bool | Annotated[list[int], Strict(False)] = True
    """Whether special tokens (BOS, EOS, padding) are left out; or the token ids to leave out."""
    positions: Annotated[tuple[int | None, int | None, int | None], Strict(False)] = (None, None, None)
    """Start, stop and step of the positions of each row that are kept."""
    column: str | None = None
    """Column of a dataset with the texts, tokens or messages; None means the first known one."""
    held_out_tokens: PositiveInt = 16_384
    """Tokens of held-out texts, at most."""


@config
class RunConfig:
    """Checkpoints and logging of a run."""

    checkpoint_every_tokens: PositiveInt | None = None
    """Tokens between checkpoints; None writes them by the clock, see `checkpoint_every_s`."""
    checkpoint_every_s: PositiveFloat | None = 600.0
    """Seconds between checkpoints, if `checkpoint_every_tokens` is None; at least 20 times as long as one takes to be
    written. None for both writes one at the end only."""
    keep_saes: bool = False
    """Whether the SAEs of every checkpoint are kept, not only those of the last."""
    log_every_steps: PositiveInt = 10
    """Steps between rows of the history; the first and the last step are always logged."""


@dataclass(frozen=True)
class Trainee:
    """One SAE to train: its objective, the points it reads and writes, its initial weights."""

    objective: Objective
    """Training objective."""
    read: str | tuple[str, ...] | None = None
    """Point of the stream it reads; None means the only one. An objective over several points reads several, side by
    side; None then means those of the objective, or all."""
    write: str | tuple[str, ...] | None = None
    """Point it predicts; None or `read` makes it an autoencoder, another one a transcoder."""
    lr: float | None = None
    """Its own peak learning rate; None means the config's."""
    seed: int | None = None
    """Its own seed; None means the config's, and SAEs of one seed and size begin alike."""
    init: SAE | PursuitSAE | CrossCoderSAE | None = None
    """A trained SAE to continue from, in the model's units; None means random weights."""

    def __post_init__(self) -> None:
        if self.read is None and getattr(self.objective, "points", ()):
            object.__setattr__(self, "read", self.objective.points)

    @property
    def reads(self) -> tuple[str, ...]:
        """The points it reads, side by side; empty if they are not known yet."""
        return _points(self.read)

    @property
    def writes(self) -> tuple[str, ...]:
        """The points it predicts, side by side; empty if they are not known yet."""
        return _points(self.read if self.write is None else self.write)

    def at(self, points: Iterable[str], name: str) -> Trainee:
        """This trainee on a stream with these points: where it names none, it reads the only one, or all.

        Args:
            points: of the stream.
            name: of this trainee, for error messages.

        Raises:
            ValueError: if it names none and there are several, of which it reads one; or for a point that is not there.
        """
        points, read = tuple(points), self.read
        if read is None and not self.objective.multi_point and len(points) > 1:
            what = f"{name!r} does not say which of {len(points)} points it reads."
            fix = f"saewb.Trainee(..., read={points[0]!r})"
            raise ValueError(explain(what, want=", ".join(points), fix=fix))
        if read is None:
            read = points if self.objective.multi_point else points[0]
        placed = replace(self, read=read)
        for point in (*placed.reads, *placed.writes):
            if point not in points:
                what = f"the stream has no point {point!r}, which {name!r} asks for."
                raise ValueError(explain(what, near=near(point, points), want=", ".join(points)))
        placed.check_points()
        return placed

    def check_points(self) -> None:
        """Check that it reads and writes as many points as its objective does.

        Raises:
            ValueError: if it does not.
        """
        kind, n = type(self.objective).__name__, len(self.reads)
        if self.objective.multi_point and (n < 2 or self.reads != self.writes):
            what = f"{kind} reads {', '.join(self.reads)} and writes {', '.join(self.writes)}."
            raise ValueError(
                explain(
                    what, want="two points or more, which it reconstructs", fix=f"saewb.{kind}(..., points=('a', 'b'))"
                )
            )
        if not self.objective.multi_point and max(n, len(self.writes)) > 1:
            what = f"{kind} got several points: {', '.join((*self.reads, *self.writes))}."
            raise ValueError(
                explain(what, want="one, or saewb.CrossCoder", fix=f"saewb.Trainee(..., read={self.reads[0]!r})")
            )

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another point than it reads."""
        return self.write not in (None, self.read)

    @property
    def fits_thresholds(self) -> bool:
        """Whether its initial thresholds are fitted to the first tokens."""
        objective = self.objective
        return isinstance(objective, JumpReLU) and objective.start_l0 is not None and self.init is None

    @property
    def location(self) -> str:
        """The point it reads, and "=> point" for the one it writes if that is set."""
        read = " + ".join(self.reads) or "None"
        return f"{read} => {' + '.join(self.writes)}" if self.write else read

    def objective_fields(self) -> dict[str, Any]:
        """Its objective as plain values, for metadata and checkpoints."""
        return {"objective": type(self.objective).__name__, **asdict(self.objective)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the objective's name and fields, `read`, `write`, `lr` and `seed`; not `init`."""
        return {**self.objective_fields(), "read": self.read, "write": self.write, "lr": self.lr, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trainee:
        """The inverse of `to_dict`; numbers may be text, `hook` and `hook_out` mean `read` and `write`.

        Raises:
            ValueError: for an objective that does not exist or a wrong value.
            TypeError: for an unknown field.
        """
        values = {{"hook": "read", "hook_out": "write"}.get(name, name): value for name, value in values.items()}
        for point in ("read", "write"):
            value = values.get(point)
            if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
                values[point] = tuple(value)
            elif not isinstance(value, str | None):
                raise ValueError(explain(f"got {point}={reprlib.repr(value)}.", want="a hook's name, or several"))
        name = str(values.pop("objective", None))
        if name not in OBJECTIVES:
            names = list(OBJECTIVES)
            raise ValueError(explain(f"got objective {name!r}.", near=near(name, names), want=", ".join(names)))
        fields = {key: values.pop(key) for key in ("read", "write", "lr", "seed") if key in values}
        for key, kind in (("lr", PositiveFloat), ("seed", Seed)):
            if fields.get(key) is not None:
                fields[key] = parse_value(kind, fields[key], key)
        return cls(parse(OBJECTIVES[name], values), **fields)


def check_name(name: Any) -> str:
    """Check that a name of an SAE is also one of a folder, inside the run's.

    Raises:
        ValueError: if it is not.
    """
    is_text = isinstance(name, str) and 0 < len(name) <= 128
    if not (is_text and all(c.isalnum() or c in "._-" for c in name)) or name.startswith("."):
        what = f"got an SAE named {reprlib.repr(name)}."
        raise ValueError(explain(what, want="letters, digits, '_', '-', '.'", fix="'sae_1'"))
    return name


def _sae(value: Any) -> Any:
    return Trainee.from_dict(value) if isinstance(value, Mapping) else value


SAESpec = Annotated[InstanceOf[Trainee], BeforeValidator(_sae), PlainSerializer(Trainee.to_dict)]
"""A Trainee; in run.json its `to_dict()`."""


@config
class RunSpec:
    """A training run as data: the arguments of `saewb.train` without model, tokens, folder, loggers and device."""

    saes: dict[Annotated[str, AfterValidator(check_name)], SAESpec]
    """The SAEs by name."""
    train: TrainConfig
    """Training hyperparameters."""
    data: DataConfig = DataConfig()
    """How activations are read."""
    run: RunConfig = RunConfig()
    """Checkpoints and logging."""
    model: str | None = None
    """Name of the language model."""
    widths: dict[str, int] = field(default_factory=dict)
    """Width of the activations, by point of the stream."""
    digests: dict[str, str | None] = field(default_factory=dict)
    """By content: "model", "tokens", "held-out tokens", for `saewb.resume_run`; None for tokens of an iterator."""

    @classmethod
    def from_options(
        cls,
        saes: Any,
        *,
        n_tokens: int,
        hook: str | None = None,
        hook_out: str | None = None,
        positions: slice = slice(None),
        strict: bool = True,
        **options: Any,
    ) -> RunSpec:
        """Sort the arguments of `saewb.train` into the parts of a spec.

        Args:
            saes: as for `saewb.train`.
            n_tokens: as for `saewb.train`.
            hook: as for `saewb.train`.
            hook_out: as for `saewb.train`.
            positions: as for `saewb.train`.
            **options: fields of `TrainConfig`, `DataConfig` and `RunConfig`.
            strict: False takes numbers as text and lists as tuples, as they come from YAML.

        Raises:
            TypeError: for an option that does not exist.
            ValueError: for a wrong value.
        """
        owners = {name: owner for owner in (TrainConfig, DataConfig, RunConfig) for name in descriptions(owner)}
        for name in options:
            if name not in owners:
                close = [_ALIASES[name]] if name in _ALIASES else near(name, owners)
                fix = f"train(..., {close[0]}=...)" if close else 'print(*saewb.training_options(), sep="\\n")'
                raise TypeError(explain(f"train has no option {name!r}.", near=close, fix=fix))
        positions = index_slice(positions, "positions")
        options |= {"n_tokens": n_tokens, "positions": (positions.start, positions.stop, positions.step)}
        parts = []
        for owner in (TrainConfig, DataConfig, RunConfig):
            values = {name: value for name, value in options.items() if owners[name] is owner}
            parts.append(owner(**values) if strict else parse(owner, values))
        return cls(trainees(saes, hook, hook_out), *parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """The spec in run.json, also in that of saewb 0.1.0.

        Raises:
            ValueError, TypeError: if it is not a spec.
        """
        content = {name: value for name, value in values.items() if name != "saewb_run"}
        spec = parse(cls, _upgraded(content) if values["saewb_run"] == 1 else content)
        if not spec.saes:
            raise ValueError(explain("it trains no SAE.", want="one or more, by name"))
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as run.json holds them."""
        return {"saewb_run": FORMAT, **dump(self)}

    @property
    def points(self) -> list[str]:
        """All points that SAEs read or write, without duplicates."""
        return list(dict.fromkeys(point for sae in self.saes.values() for point in (*sae.reads, *sae.writes)))

    @property
    def buffer_tokens(self) -> int:
        """Tokens of the shuffle buffer, with the default filled in; at most `train.n_tokens`."""
        n_tokens = self.data.buffer_tokens
        return min(self.train.n_tokens, 16 * self.train.batch_tokens if n_tokens is None else n_tokens)

    def with_widths(self, widths: Mapping[str, int]) -> RunSpec:
        """The spec with the widths of a stream; SAEs that name no point read the only one, or all: `Trainee.at`.

        Raises:
            ValueError: for a point that the stream does not have, or of several if an SAE names none.
        """
        saes = {name: sae.at(widths, name) for name, sae in self.saes.items()}
        return replace(self, saes=saes, widths=dict(widths))


def _points(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


# Names of these options in other libraries, for error messages.
_ALIASES = {
    "learning_rate": "lr",
    "batch_size": "batch_tokens",
    "context_size": "ctx_len",
    "warmup_steps": "warmup_tokens",
}


def trainees(saes: Any, hook: str | None = None, hook_out: str | None = None) -> dict[str, Trainee]:
    """Convert objectives or Trainees, one or several by name, to Trainees; those that name no point read `hook`.

    Raises:
        TypeError: for anything else than an objective.
        ValueError: for no SAE at all, or a name that cannot name a folder.
    """
    by_name = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not by_name:
        raise ValueError(explain("train got no SAE.", want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
    specs = {}
    for name, sae in by_name.items():
        check_name(name)
        trainee = sae if isinstance(sae, Trainee) else Trainee(sae)
        objective = trainee.objective
        if isinstance(objective, type):
            what, fix = f"train got the class {objective.__name__}.", f"saewb.{objective.__name__}(d_sae=4096)"
            raise TypeError(explain(what, want="an instance of it", fix=fix))
        if not isinstance(objective, Objective):
            what = f"train got a {type(objective).__name__} for {name!r}."
            raise TypeError(explain(what, want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
        read = trainee.read or hook
        write = trainee.write or (hook_out if trainee.read is None else None)
        specs[name] = replace(trainee, read=read, write=None if write == read else write)
    return specs


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the fields of format 1 of run.json to the current ones."""
    parts = {"config": "train", "reading": "data", "options": "run"}
    values = {parts.get(name, name): value for name, value in values.items()}
    normalization = values["train"].pop("normalisation", "none")
    values["train"]["normalization"] = "centered" if normalization == "centred" else normalization
    return values
