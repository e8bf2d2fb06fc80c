"""Within one tile of pre-activations: the k largest of each row, or everything above a threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A top-k activation must see every latent of a token to know which ones to keep. It does so in row tiles of at most
# this many pre-activations (64 MiB in float32), so that asking for a few latents stays small.
TILE = 2**24
BLOCK = 2**23  # pre-activations of a block of latents (32 MiB in float32)
_SLABS = 16  # elements of a group where there is no k
_NARROW = 3  # groups per element wanted, below which looking at groups first is not worth it


def largest(
    tile: Float[Tensor, "rows d_sae"], k: int, *, signed: bool = False, slabs: int = 4
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row (by magnitude, if signed), exactly, several times faster than `topk` on the whole row.

    Cut each row into groups of `slabs` elements: the k largest elements lie in the k groups with the largest maxima.
    So: maxima of all groups; the k largest of those, found the same way; top-k of the winners' elements. `topk` itself
    costs 20 times what a maximum does per element, and only sees 3 to 12 k of them at a time. No order within a row; of
    equal values any may be kept.

    Args:
        tile: pre-activations, any float dtype.
        k: how many, 1 to d_sae.
        signed: compare magnitudes; the values keep their sign.
        slabs: elements of a group.

    Returns:
        Values and column indices.

    Example:
        >>> values, columns = largest(torch.tensor([[0.0, 5.0, 1.0, 4.0]]), k=2)
        >>> sorted(columns[0].tolist()), sorted(values[0].tolist())
        ([1, 3], [4.0, 5.0])
    """
    whole = _integers(tile)
    if whole is None:
        return _largest(tile, k, signed, slabs)
    columns = _largest(whole & 0x7FFF if signed else whole, k, False, slabs)[1]  # without the sign: a magnitude
    values = tile.gather(1, columns)
    again = (values < 0).any(1).nonzero()[:, 0] if not signed else ()
    if len(again):  # fewer than k from 0 up: among negative numbers integers rank the other way
        values[again], columns[again] = _largest(tile[again], k, False, slabs)
    return values, columns


def _largest(tile: Tensor, k: int, signed: bool, slabs: int) -> tuple[Tensor, Tensor]:
    rows, d_sae = tile.shape
    groups = d_sae // slabs
    if groups < _NARROW * k:  # groups would not narrow it down
        return _top(tile, k, signed)
    grouped = tile[:, : slabs * groups].unflatten(1, (slabs, groups))  # group g is columns g, g + groups, ...
    winners = _largest(_maxima(grouped, signed), k, False, slabs)[1]
    step = torch.arange(slabs, device=tile.device).mul_(groups)
    columns = (winners.unsqueeze(1) + step[:, None]).flatten(1)
    if rest := d_sae - slabs * groups:  # fewer columns than a group has: they go straight to the final
        extra = torch.arange(d_sae - rest, d_sae, device=tile.device).expand(rows, rest)
        columns = torch.cat([columns, extra], dim=1)
    values, best = _top(tile.gather(1, columns), k, signed)
    return values, columns.gather(1, best)


def _integers(tile: Tensor) -> Tensor | None:
    """The bits of bf16 numbers on a CPU as int16, whose maxima cost a fifth; None for others, where nothing is gained.

    Numbers from 0 up rank alike in both, and above all negative ones and -0.0, which rank the other way round.
    """
    return tile.view(torch.int16) if tile.dtype == torch.bfloat16 and tile.device.type == "cpu" else None


def above(
    tile: Float[Tensor, "rows d_sae"], threshold: float, limit: int, *, slabs: int = _SLABS
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row, column and value of each element strictly above the threshold, rows ascending; None if over `limit` of them.

    Looks at the maxima of groups first, so that the tile is read once and only groups with a hit again.

    Args:
        tile: pre-activations.
        threshold: one number for all; what differs per latent goes into the bias.
        limit: elements to list at most, so that memory is bounded where nothing is sparse.
        slabs: elements of a group.
    """
    d_sae = tile.shape[1]
    slabs = slabs if d_sae % slabs == 0 else 1
    grouped = tile.unflatten(1, (slabs, d_sae // slabs))
    whole = _integers(grouped) if threshold >= 0 else None
    maxima = grouped.amax(1) if whole is None else whole.amax(1).view(tile.dtype)
    hit = (maxima > threshold).nonzero()
    if len(hit) > limit:
        return None
    row, group = hit.unbind(1)
    elements = grouped[row, :, group]
    on = elements > threshold
    if slabs * len(hit) > limit and int(on.count_nonzero()) > limit:
        return None
    which, slab = on.nonzero().unbind(1)
    return row[which], group[which] + slab * (d_sae // slabs), elements[which, slab]


def _top(values: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    if not signed:
        return values.topk(k, dim=1, sorted=False)
    best = values.abs().topk(k, dim=1, sorted=False).indices
    return values.gather(1, best), best


def _maxima(grouped: Tensor, signed: bool) -> Tensor:
    return torch.maximum(grouped.amax(1), grouped.amin(1).neg_()) if signed else grouped.amax(1)


def top(pre: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Values and indices along the last axis, those that are not > 0 as 0 ("abstopk": with their sign).

    "topk" keeps the k largest, "abstopk" the k largest in magnitude, "groupmax" the largest of each of k equal groups
    of neighbors.
    """
    if activation == "groupmax":
        values, within = pre.unflatten(-1, (k, -1)).max(dim=-1)
        return torch.relu(values), within + torch.arange(k, device=pre.device) * (pre.shape[-1] // k)
    if activation == "abstopk":
        indices = pre.abs().topk(k, dim=-1, sorted=False).indices
        return pre.gather(-1, indices), indices
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.relu(values), indices


@torch.no_grad()
def top_of_product(
    h: Float[Tensor, "tokens d_in"], W: Float[Tensor, "d_in d_sae"], b: Float[Tensor, " d_sae"], k: int, activation: str
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`top(h @ W + b, k, activation)` for "topk" and "abstopk", a block of latents at a time; no gradients.

    Holds at most 32 MiB of pre-activations (or those of 1,024 latents), in one buffer: new memory for each product
    would cost as much time as the product of a wide SAE.
    """
    width = max(1024, k, BLOCK // max(1, len(h)))
    buffer = h.new_empty(len(h), min(width, W.shape[1]))
    tops: list[tuple[Tensor, Tensor]] = []
    for start in range(0, W.shape[1], width):
        columns = slice(start, start + width)
        pre = torch.mm(h, W[:, columns], out=buffer[:, : W[:, columns].shape[1]]).add_(b[columns])
        values, indices = top(pre, min(k, pre.shape[1]), activation)
        tops.append((values, indices + start))
    values, indices = (torch.cat(parts, 1) for parts in zip(*tops, strict=True))
    if len(tops) > 1:
        values, which = top(values, k, activation)
        indices = indices.gather(1, which)
    return values, indices
