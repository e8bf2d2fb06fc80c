"""Activation functions, normalization per token, and taps, as the SAE classes share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

import torch
from torch import Tensor

from saewb.sae.config import TokenNormalization

Latents = Union[int, slice, Sequence[int], Tensor]
"""Whatever may stand in `acts[..., latents]`."""
Tap = Callable[[str, Tensor], Tensor]
"""Called with a name and a value; returns the value to go on with."""


def thresholded(pre_acts: Tensor, threshold: Tensor | None) -> Tensor:
    """ReLU; with a threshold per latent JumpReLU: what is > 0 and strictly greater than the threshold."""
    acts = torch.relu(pre_acts)
    return acts if threshold is None else acts * (pre_acts > threshold)


def normalized(x: Tensor, normalization: TokenNormalization) -> Tensor:
    """Activations of a model as an SAE with this normalization encodes them, token by token."""
    if normalization == "layer_norm":
        centered = x - x.mean(-1, keepdim=True)
        return centered / (_std(centered) + 1e-5)
    if normalization == "constant_norm":
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    if normalization == "centered":
        return x - x.mean(-1, keepdim=True)
    return x


def denormalized(recons: Tensor, x: Tensor, normalization: TokenNormalization) -> Tensor:
    """A reconstruction back in the units of `x`: the inverse of `normalized`, with the scale of `x`."""
    if normalization == "layer_norm":
        return recons * _std(x) + x.mean(-1, keepdim=True)
    if normalization == "constant_norm":
        return recons * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    if normalization == "centered":
        return recons + x.mean(-1, keepdim=True)
    return recons


def tapped(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    """The value, or what the tap returns for it."""
    return value if tap is None else tap(name, value)


def _std(x: Tensor) -> Tensor:
    return x.std(-1, keepdim=True) if x.numel() else x[..., :1]  # torch warns of an empty batch
