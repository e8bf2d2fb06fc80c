"""Adapter for `features` until it has its own rows of tokens: active latents of rows of text."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from saewb.sae.base import SparseEncoder
from saewb.sae.sparse import Firings


def firings(
    encoder: SparseEncoder, x: Float[Tensor, "rows ctx d_in"], ids: Tensor, plain: Tensor, first_row: int
) -> Iterator[Firings]:
    """Encode rows, a few at a time: what fires there.

    Args:
        encoder: of an SAE of any architecture.
        x: what it reads.
        ids: the tokens, `[rows, ctx]`, on the same device.
        plain: those that count.
        first_row: the number of the first row.
    """
    for rows, on in encoder.tiles(x, plain):
        yield Firings(ids[rows], plain[rows], first_row + rows.start, on.d_sae, on.token, on.latent, on.act.float())
