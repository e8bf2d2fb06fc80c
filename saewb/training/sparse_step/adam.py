"""Gradient clipping inside the fused Adam step, without a separate pass over the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adam import adam


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float | None
) -> Float[Tensor, ""]:
    """One optimizer step with gradients clipped to a length over all parameters, as by `clip_grad_norm_`.

        g / max(1, (|g| + 1e-6) / clip)

    A fused Adam or AdamW divides while it reads (`grad_scale`, as for torch's gradient scaler, checked by a test), and
    gets parameters that are transposed in memory as their contiguous transposes, which it would copy otherwise. For
    other optimizers, gradients are divided first.

    Args:
        optimizer: of these parameters.
        parameters: with gradients.
        clip: maximum length of the gradient; None does not clip.

    Returns:
        Length of the whole gradient before clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    length = torch.stack([_length(g) for g in gradients]).norm()
    scale = None if clip is None else ((length + 1e-6) / clip).clamp(min=1)
    if clips_in_fused_step(optimizer):
        for group in optimizer.param_groups:
            _fused(optimizer, group, None if scale is None else scale.float())  # whatever the parameters' dtype
        return length
    if scale is not None:
        torch._foreach_div_(gradients, scale)
    optimizer.step()
    return length


def _fused(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], scale: Tensor | None) -> None:
    """The optimizer's fused step on views in memory order: four times faster for a transposed parameter."""
    parameters = [p for p in group["params"] if p.grad is not None]
    states = [optimizer.state[p] for p in parameters]
    for p, state in zip(parameters, states, strict=True):
        if not state:  # as at Adam's own first step
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    beta1, beta2 = group["betas"]
    adam(
        [_match_memory_layout(p, p) for p in parameters],
        [_match_memory_layout(p.grad, p) for p in parameters],
        [_match_memory_layout(state["exp_avg"], p) for p, state in zip(parameters, states, strict=True)],
        [_match_memory_layout(state["exp_avg_sq"], p) for p, state in zip(parameters, states, strict=True)],
        [],
        [state["step"] for state in states],
        fused=True,
        grad_scale=scale,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=isinstance(optimizer, torch.optim.AdamW),
    )


def _match_memory_layout(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Transpose a tensor if the parameter is transposed in memory, as its gradient and moments then are."""
    return tensor if parameter.is_contiguous() else tensor.mT


def _length(gradient: Tensor) -> Float[Tensor, ""]:
    """Length of a gradient, by rows in memory order: without a copy or loss of digits."""
    rows = gradient if gradient.is_contiguous() else gradient.mT
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1))


def clips_in_fused_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is an Adam or AdamW whose fused step divides gradients itself."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return False
    return all(group["fused"] and not group["amsgrad"] for group in optimizer.param_groups)
