"""Activation functions, per-token normalization, and taps, shared by the SAE classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saewb.sae.config import TokenNormalization

Latents = Any
"""Any index of the last axis, of any library: `acts[..., latents]`; `SparseCoder` resolves it."""
Tap = Callable[[str, Tensor], Tensor]
"""Function of a name and a value that returns the value to continue with."""


def thresholded(pre_acts: Tensor, threshold: Tensor | None) -> Tensor:
    """ReLU; with a threshold per latent JumpReLU: values > 0 and strictly greater than the threshold."""
    acts = torch.relu(pre_acts)
    return acts if threshold is None else acts * (pre_acts > threshold)


def normalized(x: Tensor, normalization: TokenNormalization) -> Tensor:
    """Normalize the activations of a model per token, as an SAE with this normalization reads them."""
    if normalization == "layer_norm":
        centered = x - x.mean(-1, keepdim=True)
        return centered / (_std(centered) + 1e-5)
    if normalization == "constant_norm":
        limits = torch.finfo(x.dtype)  # of a token of zeros: it stays zero
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(limits.tiny)).clamp_max(limits.max)
    if normalization == "centered":
        return x - x.mean(-1, keepdim=True)
    return x


def denormalized(recons: Tensor, x: Tensor, normalization: TokenNormalization) -> Tensor:
    """Undo `normalized` on a reconstruction, with the mean and scale of `x`."""
    if normalization == "layer_norm":
        return recons * _std(x) + x.mean(-1, keepdim=True)
    if normalization == "constant_norm":
        return recons * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    if normalization == "centered":
        return recons + x.mean(-1, keepdim=True)
    return recons


def tapped(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    """Apply a tap to a value; without a tap, the value itself."""
    return value if tap is None else tap(name, value)


def _std(x: Tensor) -> Tensor:
    return x.std(-1, keepdim=True) if x.numel() else x[..., :1]  # torch warns about an empty batch
