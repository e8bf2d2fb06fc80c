"""Gradients for a step: zero almost everywhere, so a ramp's is used instead.

    d/d theta  1[z > theta]    ->  -(1 / w) rect((z - theta) / w)
    d/d theta  z 1[z > theta]  ->  -(theta / w) rect((z - theta) / w)          rect = 1 within (-1/2, 1/2), else 0

By z the jump has its own gradient, 1[z > theta]; `to_input` adds the negative of the estimate by theta to it, as a
function of z - theta would have.

References: Rajamanoharan et al. 2024, arXiv:2407.14435, eqs. 11 and 12; Conerly et al. 2025 (to the input).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def gate(
    pre: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"], width: float, to_input: bool
) -> Float[Tensor, "tokens d_sae"]:
    """`pre * (pre > theta)`, with the estimated gradient by theta."""
    return _Gate.apply(pre, theta, width, to_input)


def step(
    pre: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"], width: float, to_input: bool
) -> Float[Tensor, "tokens d_sae"]:
    """`1[pre > theta]`, with the estimated gradient by theta."""
    return _Step.apply(pre, theta, width, to_input)


def _window(pre: Tensor, theta: Tensor, width: float) -> Tensor:
    return (pre - theta).abs() < width / 2


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.to_input = width, to_input
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre, theta = ctx.saved_tensors
        jump = grad * _window(pre, theta, ctx.width) * (theta / ctx.width)
        to_pre = grad * (pre > theta)
        to_pre = to_pre + jump if ctx.to_input else to_pre
        return to_pre.to(pre.dtype), -jump.sum(0).to(theta.dtype), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.to_input = width, to_input
        return (pre > theta).to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, theta = ctx.saved_tensors
        jump = grad * _window(pre, theta, ctx.width) / ctx.width
        return jump.to(pre.dtype) if ctx.to_input else None, -jump.sum(0).to(theta.dtype), None, None
