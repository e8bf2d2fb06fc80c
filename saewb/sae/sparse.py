"""What an SAE's latents do on some rows of tokens, without the zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Firings:
    """Where latents are not 0 on whole rows of tokens; special tokens left out."""

    ids: Int[Tensor, "rows ctx"]  # the tokens
    plain: Bool[Tensor, "rows ctx"]  # those that count: not special
    first_row: int  # the number of the first row among all rows of text
    d_sae: int  # latents
    token: Int[Tensor, " firings"]  # counted through these rows, ascending
    latent: Int[Tensor, " firings"]  # which latent; ascending among those of a token
    value: Float[Tensor, " firings"]  # its activation, float32

    def window(self, token: Int[Tensor, " n"], before: int, after: int) -> tuple[Tensor, Tensor]:
        """Tokens around each of these, counted through the rows, and which of them are in the same row."""
        ctx = self.ids.shape[1]
        offsets = torch.arange(-before, after + 1, device=token.device)
        place = (token % ctx)[:, None] + offsets
        inside = (place >= 0) & (place < ctx)
        return torch.where(inside, token[:, None] + offsets, 0), inside

    def at(self, latent: Int[Tensor, " n"], token: Int[Tensor, "n window"]) -> Float[Tensor, "n window"]:
        """Activations of a latent at each of its tokens, 0 where it does not fire."""
        key = self.token * self.d_sae + self.latent  # ascending
        wanted = token * self.d_sae + latent[:, None]
        found = torch.searchsorted(key, wanted).clamp_(max=max(0, len(key) - 1))
        return torch.where(key[found] == wanted, self.value[found], 0)


@dataclass(frozen=True)
class TopLatents:
    """The latents a top-k activation kept, without the zeros: k values and k indices per token."""

    values: Float[Tensor, "tokens k"]  # activations, 0 where fewer than k were positive
    indices: Int[Tensor, "tokens k"]  # which latent each value belongs to
    shape: tuple[int, ...]  # of the dense tensor: leading axes of the input, then d_sae

    def dense(self) -> Tensor:
        """The same as one tensor `[..., d_sae]`."""
        flat = self.values.new_zeros(len(self.values), self.shape[-1])
        return flat.scatter_(1, self.indices, self.values).view(self.shape)
