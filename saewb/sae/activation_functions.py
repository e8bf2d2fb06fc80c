"""Arithmetic that the SAE classes share: gates, scaling per token, taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

import torch
from torch import Tensor

from saewb.sae.config import TokenNormalization

Latents = Union[int, slice, Sequence[int], Tensor]  # whatever may stand in `full[..., latents]`
Tap = Callable[[str, Tensor], Tensor]  # (name, value) -> the value to go on with


def threshold_gate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """Keep what is > 0 and, given a threshold per latent, strictly greater than it."""
    kept = torch.relu(pre)
    return kept if threshold is None else kept * (pre > threshold)


def scaled(x: Tensor, normalization: TokenNormalization) -> Tensor:
    """`x` in the units an SAE with this scaling encodes, token by token."""
    if normalization == "layer_norm":
        centered = x - x.mean(-1, keepdim=True)
        return centered / (_std(centered) + 1e-5)
    if normalization == "constant_norm":
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    if normalization == "centered":
        return x - x.mean(-1, keepdim=True)
    return x


def unscaled(recon: Tensor, x: Tensor, normalization: TokenNormalization) -> Tensor:
    """A reconstruction back in the units of `x`: the inverse of `scaled`, with the scale of `x`."""
    if normalization == "layer_norm":
        return recon * _std(x) + x.mean(-1, keepdim=True)
    if normalization == "constant_norm":
        return recon * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    if normalization == "centered":
        return recon + x.mean(-1, keepdim=True)
    return recon


def tapped(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    """The value, or what the tap makes of it."""
    return value if tap is None else tap(name, value)


def _std(x: Tensor) -> Tensor:
    return x.std(-1, keepdim=True) if x.numel() else x[..., :1]  # torch warns of an empty batch
