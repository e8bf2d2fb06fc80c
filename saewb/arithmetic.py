"""Arithmetic that the SAE classes share: gates, scaling per token, taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.config import Gate, Scaling

Latents = Union[int, slice, Sequence[int], Tensor]  # whatever may stand in `full[..., latents]`
Tap = Callable[[str, Tensor], Tensor]  # (name, value) -> the value to go on with

# A top-k gate must see every latent of a token to know which ones to keep. It does so in row tiles of at most this
# many pre-activations (64 MiB in float32), so that asking for a few latents stays small.
TILE = 2**24
BLOCK = 2**23  # pre-activations of a block of latents (32 MiB in float32)


@dataclass(frozen=True)
class TopLatents:
    """The latents a top-k gate kept, without the zeros: k values and k indices per token."""

    values: Float[Tensor, "tokens k"]  # activations, 0 where fewer than k were positive
    indices: Int[Tensor, "tokens k"]  # which latent each value belongs to
    shape: tuple[int, ...]  # of the dense tensor: leading axes of the input, then d_sae

    def dense(self) -> Tensor:
        """The same as one tensor `[..., d_sae]`."""
        flat = self.values.new_zeros(len(self.values), self.shape[-1])
        return flat.scatter_(1, self.indices, self.values).view(self.shape)


def threshold_gate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """Keep what is > 0 and, given a threshold per latent, strictly greater than it."""
    kept = torch.relu(pre)
    return kept if threshold is None else kept * (pre > threshold)


def top(pre: Tensor, k: int, gate: Gate) -> tuple[Tensor, Tensor]:
    """Values and indices along the last axis, those that are not > 0 as 0 ("abstopk": with their sign).

    "topk" keeps the k largest, "abstopk" the k largest in magnitude, "groupmax" the largest of each of k equal groups
    of neighbours.
    """
    if gate == "groupmax":
        values, within = pre.unflatten(-1, (k, -1)).max(dim=-1)
        return torch.relu(values), within + torch.arange(k, device=pre.device) * (pre.shape[-1] // k)
    if gate == "abstopk":
        indices = pre.abs().topk(k, dim=-1, sorted=False).indices
        return pre.gather(-1, indices), indices
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.relu(values), indices


@torch.no_grad()
def top_of_product(
    h: Float[Tensor, "tokens d_in"], W: Float[Tensor, "d_in d_sae"], b: Float[Tensor, " d_sae"], k: int, gate: Gate
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`top(h @ W + b, k, gate)` for "topk" and "abstopk", a block of latents at a time; no gradients.

    Holds at most 32 MiB of pre-activations (or those of 1,024 latents), in one buffer: new memory for each product
    would cost as much time as the product of a wide SAE.
    """
    width = max(1024, k, BLOCK // max(1, len(h)))
    buffer = h.new_empty(len(h), min(width, W.shape[1]))
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, W.shape[1], width):
        columns = slice(start, start + width)
        pre = torch.mm(h, W[:, columns], out=buffer[:, : W[:, columns].shape[1]]).add_(b[columns])
        values, indices = top(pre, min(k, pre.shape[1]), gate)
        found.append((values, indices + start))
    values, indices = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    if len(found) > 1:
        values, which = top(values, k, gate)
        indices = indices.gather(1, which)
    return values, indices


def scaled(x: Tensor, scaling: Scaling) -> Tensor:
    """`x` in the units an SAE with this scaling encodes, token by token."""
    if scaling == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (_std(centred) + 1e-5)
    if scaling == "constant_norm":
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    if scaling == "centred":
        return x - x.mean(-1, keepdim=True)
    return x


def unscaled(recon: Tensor, x: Tensor, scaling: Scaling) -> Tensor:
    """A reconstruction back in the units of `x`: the inverse of `scaled`, with the scale of `x`."""
    if scaling == "layer_norm":
        return recon * _std(x) + x.mean(-1, keepdim=True)
    if scaling == "constant_norm":
        return recon * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    if scaling == "centred":
        return recon + x.mean(-1, keepdim=True)
    return recon


def tapped(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    """The value, or what the tap makes of it."""
    return value if tap is None else tap(name, value)


def _std(x: Tensor) -> Tensor:
    return x.std(-1, keepdim=True) if x.numel() else x[..., :1]  # torch warns of an empty batch
