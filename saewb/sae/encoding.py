"""Encoding many tokens with one SAE, without the zeros: which latents fire, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb.kernels.select import Rough, pays
from saewb.sae.activation_functions import threshold_gate
from saewb.sae.sae import SAE
from saewb.sae.sparse import Firings

_TILE = 2**23  # latents computed at a time, unless one row of tokens has more (32 MiB in float32)
_SPARSE = 1 / 32  # share of latents that may fire, above which a product in bf16 is not asked which do


@dataclass(frozen=True, eq=False)
class Fired:
    """Latents that are not 0."""

    token: Int[Tensor, " firings"]  # ascending
    latent: Int[Tensor, " firings"]  # ascending among those of a token
    value: Float[Tensor, " firings"]  # its activation, float32


class Encoder:
    """An SAE of any architecture, to be asked many times what fires.

    On a CPU with bf16 instructions a product in bf16 says which latents may fire, and those are computed in float32
    (`saewb.kernels.select`): for that it holds one and a half times W_enc from the first tokens on. The SAE's weights
    must not change while it is used.

    Example:
        >>> import saewb
        >>> sae = saewb.load_sae("tiny")
        >>> x = torch.randn(3, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
        >>> [(rows, fired)] = Encoder(sae).parts(x)
        >>> torch.allclose(fired.value, sae.encode(x)[fired.token, fired.latent], atol=1e-5)
        True
    """

    def __init__(self, sae: nn.Module) -> None:
        self.sae = sae
        self.is_topk = isinstance(sae, SAE) and sae.cfg.k is not None
        self._may = isinstance(sae, SAE) and sae.cfg.activation != "groupmax" and pays(sae.W_enc)
        self._rough: Rough | None = None

    @property
    def nbytes(self) -> int:
        """What it holds now besides the SAE, in bytes."""
        return 0 if self._rough is None else self._rough.nbytes

    @torch.no_grad()
    def parts(
        self, x: Float[Tensor, "rows *ctx d_in"], plain: Bool[Tensor, "..."] | None = None
    ) -> Iterator[tuple[slice, Fired]]:
        """What fires on some rows, and on the next ones, until all are done: exactly where `sae.encode(x)` is not 0.

        All rows at once, in tiles of 32 MiB of latents, for a top-k activation, and for a threshold that few latents are
        above; else as many rows at a time as have 32 MiB of latents, or one.

        Args:
            x: what the SAE reads; of a temporal SAE the middle axis is time.
            plain: tokens that count; None means all. What latents do on others is left out.

        Returns:
            Of each part its rows, and what fires there; tokens are counted through the part.
        """
        plain = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if plain is None else plain
        token = plain.flatten().nonzero()[:, 0]
        if (fired := self._sparse(x, token)) is not None:
            yield slice(0, len(x)), Fired(token[fired.token], fired.latent, fired.value)
            return
        rows = max(1, _TILE // max(1, plain[:1].numel() * self.sae.cfg.d_sae))
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            yield part, _dense(self.sae, x[part], plain[part])

    def _sparse(self, x: Tensor, token: Tensor) -> Fired | None:
        if not (self.is_topk or self._may):
            return None
        x = x.flatten(0, -2)
        x = x if len(token) == len(x) else x[token]
        rough = self._prepared(x)
        if self.is_topk:
            return _of_top(self.sae, x, rough)
        return None if rough is None else _above(self.sae, x, rough)

    def _prepared(self, x: Tensor) -> Rough | None:
        if self._may and self._rough is None and len(x):
            floor = None if self.is_topk else torch.relu(_threshold(self.sae, slice(None)))
            self._rough = Rough.of(self.sae.W_enc.detach(), self.sae.b_enc.detach(), self.sae.centered(x), floor)
            self._may = self._rough is not None
        return self._rough


def _of_top(sae: SAE, x: Float[Tensor, "tokens d_in"], rough: Rough | None) -> Fired:
    top = sae.encode_topk(x, rough)
    latents, order = top.indices.sort(1)
    values = top.values.gather(1, order)
    token, rank = values.nonzero(as_tuple=True)
    return Fired(token, latents[token, rank], values[token, rank].float())


def _above(sae: SAE, x: Float[Tensor, "tokens d_in"], rough: Rough) -> Fired | None:
    found = rough.over(sae.centered(x), int(_SPARSE * len(x) * sae.cfg.d_sae))
    if found is None:
        return None
    token, latent, pre = found
    value = threshold_gate(pre, _threshold(sae, latent))
    on = value.nonzero()[:, 0]
    return Fired(token[on], latent[on], value[on])


def _dense(sae: nn.Module, x: Tensor, plain: Tensor) -> Fired:
    dense = sae.encode(x).flatten(0, -2)
    token, latent = ((dense != 0) & plain.reshape(-1, 1)).nonzero(as_tuple=True)
    return Fired(token, latent, dense[token, latent].float())


def _threshold(sae: SAE, latent: Tensor | slice) -> Tensor:
    return sae.threshold[latent] if sae.cfg.activation == "jumprelu" else torch.zeros_like(sae.b_enc[latent])


def firings(
    encoder: Encoder, x: Float[Tensor, "rows ctx d_in"], ids: Tensor, plain: Tensor, first_row: int
) -> Iterator[Firings]:
    """Encode rows, a few at a time: what fires there.

    Args:
        encoder: of an SAE of any architecture.
        x: what it reads.
        ids: the tokens, `[rows, ctx]`, on the same device.
        plain: those that count.
        first_row: the number of the first row.
    """
    for rows, on in encoder.parts(x, plain):
        first = first_row + rows.start
        yield Firings(ids[rows], plain[rows], first, encoder.sae.cfg.d_sae, on.token, on.latent, on.value)
