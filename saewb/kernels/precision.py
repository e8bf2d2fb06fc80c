"""Dense matrix products in the precision that the hardware multiplies fastest.

    full    the parameters' own dtype
    bf16    both factors and the result rounded to bf16
    int8    weights in 127 steps per latent, inputs in 127 steps of the batch's largest value; the result in bf16

The last two only select candidates (`saewb.kernels.select`). They use private or new operations of torch and oneDNN,
which are detected at run time, pinned by tests, and replaced by others where missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Precision = Literal["full", "bf16", "int8"]
Multiply = Callable[[Tensor], Tensor]
"""Inputs [rows, d_in] -> scores [rows, d_sae], in a buffer that the next call overwrites."""

MARGIN = {"bf16": 12, "int8": 24}  # candidates per token beyond k
SPARE = {"full": 1.3, "bf16": 1.4, "int8": 1.5}  # candidates per pair selected in a whole batch
SLACK = {"full": 0.0, "bf16": 1 / 32, "int8": 5 / 64}  # first estimate of the largest error, in typical scores

# Bytes of scores on a CPU: below the size for which malloc maps new pages at every call.
TILE_BYTES_CPU = 20 * 2**20
TILE_BYTES_CUDA = 2**29
_BLOCK = 1024  # latents whose weights are converted at a time
_COPIED = 2**20  # products copied to the output at a time
_ROWS = 256  # latents converted to int8 at a time, in several passes


def best_precision(device: torch.device) -> Precision:
    """Fastest precision for selection on this device.

    A CPU: "int8" if torch reports VNNI instructions and has oneDNN's quantized product, else "bf16" if it reports
    avx512_bf16 or amx, else "full". A CUDA device: "bf16" from compute capability 8.0 on. Others: "full".

    Example:
        >>> best_precision(torch.device("cpu")) in ("full", "bf16", "int8")
        True
    """
    if device.type == "cpu" and _reports("_is_vnni_supported") and has_int8():
        return "int8"
    return next_higher_precision("int8", device)


def next_higher_precision(precision: Precision, device: torch.device) -> Precision:
    """Next higher precision that is worthwhile on this device."""
    if precision == "bf16" or device.type not in ("cpu", "cuda"):
        return "full"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "full"
    has_bf16 = _reports("_is_avx512_bf16_supported") or _reports("_is_amx_tile_supported")
    return "bf16" if has_bf16 else "full"


def has_int8() -> bool:
    """Whether this torch has oneDNN's quantized product as used here."""
    return hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()


def tile_rows(d_sae: int, device: torch.device) -> int:
    """Tokens per tile, a multiple of 64, with 20 MiB of float32 scores on a CPU, 512 MiB on a GPU."""
    size = TILE_BYTES_CPU if device.type == "cpu" else TILE_BYTES_CUDA
    return max(64, min(2048, size // (256 * d_sae) * 64))


def shared_tile_rows(d_sae: int) -> int:
    """Tokens of a tile that one CPU thread computes, a multiple of 64, with 10 MiB of float32 scores."""
    return max(64, min(256, TILE_BYTES_CPU // (512 * d_sae) * 64))


def low_precision_matmul(
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    norms: Float[Tensor, " d_sae"] | None,
    x: Float[Tensor, "batch d_in"],
    precision: Precision,
    scratch: Float[Tensor, "d_sae d_in"] | None = None,
) -> Multiply:
    """Prepare `(rows @ W.T + b) * norms` for rows of `x`. A call may overwrite the result of the thread's last one.

    Args:
        W: encoder directions.
        b: biases.
        norms: factor per latent; None means 1.
        x: all rows to come, for their largest value.
        precision: of the factors and the result; sums are accumulated in a wider format.
        scratch: memory for scaled weights in full precision; None allocates it.
    """
    if precision == "full" and norms is not None and len(x) < W.shape[1]:  # fewer scores than weights to scale
        plain = _product(W, b, x)
        return lambda rows: plain(rows).mul_(norms)
    b = b if norms is None else b * norms
    if precision == "int8":
        return _int8(W, b, norms, x)
    if precision == "full" and norms is None:
        return _product(W, b, x)
    weights = scratch if scratch is not None and precision == "full" else None
    if weights is None:
        weights = torch.empty_like(W, dtype=torch.bfloat16 if precision == "bf16" else W.dtype)
    for start, block in _blocks(W, norms):
        weights[start : start + len(block)] = block
    return _product(weights, b.to(weights.dtype), x)


def multiply_into(
    out: Float[Tensor, "rows d_sae"], x: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows d_sae"]:
    """Write `x @ W.T` to `out`, in full precision, with the faster library for these.

    oneDNN's product has no output argument, so its results are copied, at most 4 MiB at a time.

    Example:
        >>> multiply_into(torch.empty(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([[3., 8.]])
    """
    if not _has_linear(W):
        return torch.mm(x, W.T, out=out)
    x, step = x.contiguous(), max(1, _COPIED // max(1, len(x)))
    for start in range(0, len(W), step):
        span = slice(start, start + step)
        out[:, span] = torch.ops.mkldnn._linear_pointwise(x, W[span], None, "none", [], "")
    return out


def _product(W: Tensor, b: Tensor, x: Tensor) -> Multiply:
    if _has_linear(W):  # adds biases without another pass
        return lambda rows: torch.ops.mkldnn._linear_pointwise(rows.to(W.dtype).contiguous(), W, b, "none", [], "")
    shape, own = (max(1, min(len(x), tile_rows(len(W), x.device))), len(W)), threading.local()

    def multiply(rows: Tensor) -> Tensor:
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(shape, dtype=W.dtype, device=x.device)
        return torch.addmm(b, rows.to(W.dtype), W.T, out=own.buffer[: len(rows)])

    return multiply


def _has_linear(W: Tensor) -> bool:
    """Whether oneDNN's product supports these: in float32 a quarter to a half faster than the BLAS of addmm."""
    if W.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if W.dtype == torch.float32:
        return True
    # In half precision it needs instructions that not every CPU has (AVX-512; for float16 more), and fails at run time.
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(W.dtype)
    return supported is not None and bool(getattr(torch.ops.mkldnn, supported, bool)())


def _int8(W: Tensor, b: Tensor, norms: Tensor | None, x: Tensor) -> Multiply:
    """`127 rows / x_max` as uint8 around 128, `127 W / max |W|` as int8, accumulated in int32, scaled to bf16.

    The weights are passed transposed but not in oneDNN's blocked layout: reordering them at every step costs more than
    it saves.
    """
    weights, steps = torch.empty(W.shape[1], len(W), dtype=torch.int8), torch.empty_like(b)
    buffer, quantized = torch.empty_like(W[:_ROWS]), torch.empty_like(W[:_ROWS], dtype=torch.int8)
    for start in range(0, len(W), _ROWS):
        block, span = W[start : start + _ROWS], slice(start, start + _ROWS)
        scaled = torch.abs(block, out=buffer[: len(block)])
        step = scaled.amax(1).clamp_(min=torch.finfo(W.dtype).tiny) / 127
        scaled = torch.mul(block, 1 / step[:, None], out=scaled).round_()
        weights[:, span] = quantized[: len(block)].copy_(scaled).T
        steps[span] = step if norms is None else step * norms[span]
    packed = weights.to_mkldnn()
    step = max(float(x.abs().amax()), 1e-30) / 127 if len(x) else 1.0
    steps, b, zeros = steps.float(), b.float(), torch.zeros(len(W), dtype=torch.int64)

    def multiply(rows: Tensor) -> Tensor:
        inputs = rows.mul(1 / step).round_().add_(128).clamp_(1, 255).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            inputs, step, 128, packed, steps, zeros, b, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    return multiply


def _blocks(W: Tensor, norms: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Blocks of weights times norms that fit in the caches, each with its first latent."""
    for start in range(0, len(W), _BLOCK):
        block = W[start : start + _BLOCK]
        yield start, block if norms is None else block * norms[start : start + _BLOCK, None]


def _reports(name: str) -> bool:
    return bool(getattr(torch.cpu, name, bool)())  # private to torch; if absent, unknown
