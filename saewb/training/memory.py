"""Estimate the memory of a training run, and list its options."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saewb._config import choices, descriptions, parse_field
from saewb.data.cache import ActivationCache
from saewb.data.packing import stream_tokens
from saewb.data.sources import ModelSource
from saewb.errors import explain
from saewb.models.hook_points import device_at
from saewb.models.shared_copy import shared_copy
from saewb.training.config import OBJECTIVES, DataConfig, RunConfig, RunSpec, TrainConfig

_FLOAT = 4  # weights and arithmetic are float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training run in bytes, by purpose; `step` and `forward` are within about a factor of two."""

    weights: int
    """Weights of all SAEs, with gradients and Adam's two moments; exact."""
    step: int
    """Step of the largest SAE: pre-activations, latents and their gradients, if computed densely."""
    buffer: int
    """Shuffle buffer and batches computed ahead; exact."""
    checkpoint: int
    """A copy of weights, moments and buffer while a checkpoint is written."""
    forward: int
    """One forward pass of the model, beyond its weights."""
    available: int | None
    """Free memory of the training device now; None if unknown."""

    @property
    def total(self) -> int:
        """Peak memory, beyond the weights of the model."""
        return self.weights + self.buffer + max(self.step + self.forward, self.checkpoint)

    @property
    def fits(self) -> bool:
        """Whether the estimate fits into free memory; True where that is unknown."""
        return self.available is None or self.total <= self.available

    @property
    def weights_fit(self) -> bool:
        """Whether `weights` alone fits into free memory; if not, training cannot begin."""
        return self.available is None or self.weights <= self.available

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("weights", "step", "buffer", "checkpoint", "forward", "total")]
        rows += [] if self.available is None else [("available", self.available)]
        return "\n".join(f"{name:<12}{size / 2**20:>12,.1f} MiB" for name, size in rows)


def estimate_memory(
    saes: Iterable[tuple[int, int, int]],
    widths: Mapping[str, int],
    *,
    batch_tokens: int,
    buffer_tokens: int = 0,
    prefetch: int = 0,
    pass_tokens: int = 0,
    itemsize: int = _FLOAT,
    model: Any = None,
    device: torch.device | str = "cpu",
) -> MemoryEstimate:
    """Estimate the memory of training SAEs on a stream.

        weights      16 bytes for each of d_sae (d_in + d_out + 1) + d_out: weight, gradient, two moments
        step         4 (4 d_sae + 4 (d_in + d_out)) bytes per token of a batch
        buffer       (buffer_tokens + (prefetch + 2) batch_tokens) tokens of all points
        forward      pass_tokens (12 d_model + 3 d_mlp + ctx n_heads) numbers, of the layer being computed

    Args:
        saes: (d_in, d_sae, d_out) of each.
        widths: by point of the stream: numbers per token.
        batch_tokens: tokens of a step.
        buffer_tokens: of the shuffle buffer.
        prefetch: batches computed ahead.
        pass_tokens: of one forward pass of the model; 0 without a model.
        itemsize: bytes of one number in the stream.
        model: for the sizes of a forward pass.
        device: where training happens.

    Example:
        >>> print(estimate_memory([(768, 24_576, 768)], {"x": 768}, batch_tokens=4096).weights)
        604385280
    """
    shapes = list(saes)
    weights = sum(16 * (d_sae * (d_in + d_out + 1) + d_out) for d_in, d_sae, d_out in shapes)
    step = max(_FLOAT * batch_tokens * (4 * d_sae + 4 * (d_in + d_out)) for d_in, d_sae, d_out in shapes)
    row = sum(widths.values()) * itemsize
    buffer = (buffer_tokens + (prefetch + 2) * batch_tokens) * row
    checkpoint, forward = weights * 3 // 4 + buffer, _forward_bytes(model, pass_tokens)
    return MemoryEstimate(weights, step, buffer, checkpoint, forward, available(device))


def _forward_bytes(model: Any, pass_tokens: int) -> int:
    if model is None:
        return 0
    cfg = model.cfg
    d_mlp, heads = cfg.d_mlp or 4 * cfg.d_model, cfg.n_heads or 0
    per_token = 12 * cfg.d_model + 3 * d_mlp + 2 * heads * min(pass_tokens, cfg.n_ctx or pass_tokens)
    return pass_tokens * per_token * next(model.parameters()).element_size()


def available(device: torch.device | str) -> int | None:
    """Free bytes on a device, caches included; None where that is unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return free[0] if free else None


def training_memory(
    model: nn.Module | None,
    saes: Any,
    *,
    n_tokens: int,
    tokens: Any = None,
    hook: str | None = None,
    hook_out: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> MemoryEstimate:
    """Estimate the memory of `saewb.train` with the same arguments, and check these.

    Formulas in `saewb.training.memory.estimate_memory`. Runs the model on two tokens, for the widths of the points.

    Args:
        model: as for `saewb.train`.
        saes: as for `saewb.train`.
        n_tokens: as for `saewb.train`.
        tokens: as for `saewb.train`; needed only if they are an ActivationCache.
        hook: as for `saewb.train`.
        hook_out: as for `saewb.train`.
        device: as for `saewb.train`.
        options: as for `saewb.train`.

    Returns:
        A MemoryEstimate, in bytes; `print` it.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for an invalid value, or a point that does not exist.

    Example:
        >>> import saewb
        >>> memory = training_memory(saewb.load_model("tiny"), saewb.TopK(1024, k=16),
        ...                          hook="blocks.2.hook_resid_post", n_tokens=100_000)
        >>> memory.weights
        4212736
    """
    spec = RunSpec.from_options(saes, n_tokens=n_tokens, hook=hook, hook_out=hook_out, **options)
    if isinstance(tokens, ActivationCache):
        widths = {name: tokens.points[name] for name in spec.points or tokens.points}
    elif model is None:
        raise ValueError(explain("got no model.", want="a model, or an ActivationCache for tokens"))
    elif any(sae.read is None for sae in spec.saes.values()):
        raise ValueError(explain("got no hook.", want="where to read", fix='hook="blocks.4.hook_resid_post"'))
    else:
        rows = stream_tokens(torch.zeros(1, 2, dtype=torch.int64))
        widths = ModelSource(shared_copy(model), rows, spec.points).widths()
    if device is None and model is not None:
        device = device_at(model, next(iter(spec.saes.values())).reads[0])
    return run_memory(spec.with_widths(widths), model, device)


def run_memory(spec: RunSpec, model: nn.Module | None, device: torch.device | str | None) -> MemoryEstimate:
    """Estimate the memory of a run whose spec has widths."""
    return estimate_memory(
        [
            (sum(spec.widths[p] for p in sae.reads), sae.objective.d_sae, sum(spec.widths[p] for p in sae.writes))
            for sae in spec.saes.values()
        ],
        spec.widths,
        batch_tokens=spec.train.batch_tokens,
        buffer_tokens=spec.buffer_tokens,
        prefetch=spec.data.prefetch,
        pass_tokens=0 if model is None else spec.data.pass_tokens,
        itemsize=_FLOAT if model is None else next(model.parameters()).element_size(),
        model=model,
        device=device or "cpu",
    )


@dataclass(frozen=True)
class TrainOption:
    """An option of `saewb.train`, or a field of an objective."""

    name: str
    """Name of the keyword argument."""
    default: Any
    """Default value; dataclasses.MISSING if there is none."""
    note: str
    """Description, with the unit."""
    owner: type
    """Config class or objective that has the field."""
    choices: tuple[str, ...] = ()
    """Allowed strings, if the value is one of a few."""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    def __str__(self) -> str:
        default = "" if self.required else f" = {self.default!r}"
        choices = f" ({', '.join(map(repr, self.choices))})" if self.choices else ""
        return f"{self.name}{default}: {self.note}{choices}"

    def value(self, text: str) -> Any:
        """Parse a value typed as a Python literal; quotes may be left out.

        Args:
            text: e.g. "3e-4", "None", "(0.9, 0.999)", "cosine", "torch.bfloat16".

        Returns:
            The value.

        Raises:
            ValueError: for a value that this option does not allow.

        Example:
            >>> batch = next(option for option in training_options() if option.name == "batch_tokens")
            >>> batch.note, batch.value("8_192")
            ('Tokens per optimizer step.', 8192)
        """
        text = text.strip()
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text  # not a literal: a choice, or the name of a dtype
        return parse_field(self.owner, self.name, value)


def training_options(objective: Any = None) -> tuple[TrainOption, ...]:
    """List the options of `saewb.train`, or of an objective, with their defaults and descriptions.

    Args:
        objective: a class, e.g. `saewb.TopK`, or an instance; None means the options of `saewb.train` itself.

    Returns:
        Each option once, in the order in which it is documented; `print(*saewb.training_options(), sep="\\n")`.

    Raises:
        TypeError: for anything else than an objective.

    Example:
        >>> import saewb
        >>> [(option.name, option.default) for option in training_options(saewb.TopK)][1:3]
        [('k', 32), ('aux', 0.03125)]
        >>> print(training_options(saewb.TopK)[1])
        k = 32: Active latents per token.
    """
    if objective is None:
        options = [option for owner in (TrainConfig, DataConfig, RunConfig) for option in _options(owner)]
        return tuple(option for option in options if option.name != "positions")  # an argument of `train` itself
    kind = objective if isinstance(objective, type) else type(objective)
    if kind not in OBJECTIVES.values():
        raise TypeError(explain(f"got {objective!r}.", want="an objective", fix="training_options(saewb.TopK)"))
    return _options(kind)


def _options(owner: type) -> tuple[TrainOption, ...]:
    defaults = {f.name: f.default for f in fields(owner)}
    return tuple(
        TrainOption(name, defaults[name], note, owner, choices(owner, name))
        for name, note in descriptions(owner).items()
    )
