"""The dense product of a step, in the precision the hardware multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["full", "bf16"]

MARGIN = {"bf16": 12}  # candidates per token beyond k

_TILE_BYTES = 2**23  # elements of a tile on a CPU: a few times the caches, small beside the weights
_CUDA_TILE = 2**27  # and on a GPU, which wants larger products


def best_precision(device: torch.device) -> Precision:
    """ "bf16" where the hardware multiplies bf16 at twice the speed of float32 or more, else "full".

    That is: a CPU whose instruction set torch reports as having avx512_bf16 or amx (its oneDNN uses both), or a CUDA
    device of compute capability 8.0 or above.

    Example:
        >>> best_precision(torch.device("cpu")) in ("full", "bf16")
        True
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "full"
    if device.type != "cpu":
        return "full"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private to torch; absent means not known
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in checks) else "full"


def tile_rows(d_sae: int, device: torch.device) -> int:
    """Tokens per tile, so that a tile has about 8 million scores (128 million on a GPU)."""
    elements = _TILE_BYTES if device.type == "cpu" else _CUDA_TILE
    return max(64, min(2048, elements // d_sae))


def multiplier(W: Tensor, b: Tensor, x: Tensor, precision: Precision) -> Callable[[int, int], Tensor]:
    """What gives `x[start:stop] @ W.T + b`, in one buffer that the next call overwrites.

    Args:
        W: `[d_sae, d_in]`.
        b: `[d_sae]`.
        x: `[batch, d_in]`.
        precision: of the factors and the result; sums are float32 inside either way.
    """
    if precision == "bf16":
        W, b, x = W.bfloat16(), b.bfloat16(), x.bfloat16()
    buffer = torch.empty(min(len(x), tile_rows(len(W), x.device)), len(W), dtype=x.dtype, device=x.device)

    def multiply(start: int, stop: int) -> Tensor:
        return torch.addmm(b, x[start:stop], W.T, out=buffer[: stop - start])

    return multiply
