"""Clipping as a part of the fused Adam step: no pass over the gradients of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float | None
) -> Float[Tensor, ""]:
    """One optimizer step with the gradients shortened to `clip` over all parameters, as by `clip_grad_norm_`.

        g / max(1, (|g| + 1e-6) / clip)

    A fused Adam or AdamW divides while it reads (the hook torch's gradient scaler uses: `optimizer.grad_scale`, pinned
    by a test). Any other optimizer gets its gradients divided first.

    Args:
        optimizer: over these parameters.
        parameters: with gradients.
        clip: longest gradient; None does not clip.
    Returns:
        Length of the whole gradient before clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    length = torch.stack([_length(g) for g in gradients]).norm()
    if clip is None:
        optimizer.step()
        return length
    scale = ((length + 1e-6) / clip).clamp(min=1)
    if not folds(optimizer):
        torch._foreach_div_(gradients, scale)
        optimizer.step()
        return length
    optimizer.grad_scale = scale.float()  # whatever the dtype of the parameters
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale
    return length


def _length(gradient: Tensor) -> Float[Tensor, ""]:
    """Of a gradient of one or two axes, row by row as it lies in memory: without a copy, and without loss of digits."""
    rows = gradient if gradient.is_contiguous() else gradient.mT
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1))


def folds(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer divides by `grad_scale` itself."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
