"""What a training will need, told before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FLOAT = 4  # weights and arithmetic are float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what for; `print` it for a table. `step` and `forward` are rough, within about a factor of two."""

    weights: int  # of all SAEs, with gradients and Adam's two moments; exact
    step: int  # of the largest SAE's step: pre-activations, latents and their gradients, if computed densely
    buffer: int  # mixing buffer and batches computed ahead; exact
    checkpoint: int  # a copy of weights, moments and buffer while a checkpoint is written
    forward: int  # of one pass of the model, beyond its weights
    available: int | None  # free now, where it is needed; None if the system does not say

    @property
    def total(self) -> int:
        """The most that is needed at once, beyond what the model itself takes."""
        return self.weights + self.buffer + max(self.step + self.forward, self.checkpoint)

    @property
    def fits(self) -> bool:
        """Whether that much is free, as far as can be told."""
        return self.available is None or self.total <= self.available

    @property
    def weights_fit(self) -> bool:
        """Whether the part that is exact is free; without it, training cannot begin."""
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
    """What training SAEs on a stream will take.

        weights      16 bytes for each of d_sae (d_in + d_out + 1) + d_out: weight, gradient, two moments
        step         4 (4 d_sae + 4 (d_in + d_out)) bytes per token of a batch
        buffer       (buffer_tokens + (prefetch + 2) batch_tokens) tokens of all points
        forward      pass_tokens (12 d_model + 3 d_mlp + ctx n_heads) numbers, of the one layer that is at work

    Args:
        saes: (d_in, d_sae, d_out) of each.
        widths: by point of the stream: numbers per token.
        batch_tokens: tokens of a step.
        buffer_tokens: of the mixing buffer.
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
    return MemoryEstimate(
        weights, step, buffer, weights * 3 // 4 + buffer, _forward(model, pass_tokens), available(device)
    )


def _forward(model: Any, pass_tokens: int) -> int:
    if model is None:
        return 0
    cfg = model.cfg
    d_mlp, heads = cfg.d_mlp or 4 * cfg.d_model, cfg.n_heads or 0
    per_token = 12 * cfg.d_model + 3 * d_mlp + 2 * heads * min(pass_tokens, cfg.n_ctx or pass_tokens)
    return pass_tokens * per_token * next(model.parameters()).element_size()


def available(device: torch.device | str) -> int | None:
    """Bytes that can still be taken there, caches given up; None where that cannot be known."""
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
