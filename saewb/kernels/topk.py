"""Top-k and thresholding of tiles of pre-activations: the k largest of each row, or all above a threshold."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A top-k activation must compare all latents of a token. It does so in row tiles of at most this many pre-activations
# (64 MiB in float32), so that computing a few latents needs little memory.
TILE = 2**24
BLOCK = 2**23  # pre-activations of a block of latents (32 MiB in float32)
_SLABS = 16  # elements of a group for thresholds
_NARROW = 3  # groups per selected element, below which group maxima are not worthwhile


def largest(
    tile: Float[Tensor, "rows d_sae"], k: int, *, signed: bool = False, slabs: int = 4
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Exact k largest of each row (by magnitude, if signed), several times faster than `topk` on the whole row.

    1. Divide each row into groups of `slabs` elements and compute the maximum of each.
    2. The k largest elements are in the k groups with the largest maxima, which are selected recursively.
    3. Take the top k of the elements of these groups.

    `topk` costs 20 times as much per element as a maximum, and here only reads 3 to 12 k elements at a time. Rows are
    unsorted; of equal values any may be selected.

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
    bits = _integers(tile)
    if bits is None:
        return _largest(tile, k, signed, slabs)
    columns = _largest(bits & 0x7FFF if signed else bits, k, False, slabs)[1]  # without the sign: a magnitude
    values = tile.gather(1, columns)
    retry = (values < 0).any(1).nonzero()[:, 0] if not signed else ()
    if len(retry):  # fewer than k values >= 0: the bits of negative numbers have the reverse order
        values[retry], columns[retry] = _largest(tile[retry], k, False, slabs)
    return values, columns


def _largest(tile: Tensor, k: int, signed: bool, slabs: int) -> tuple[Tensor, Tensor]:
    rows, d_sae = tile.shape
    groups = d_sae // slabs
    if groups < _NARROW * k:  # too few groups
        return _top(tile, k, signed)
    grouped = tile[:, : slabs * groups].unflatten(1, (slabs, groups))  # group g is columns g, g + groups, ...
    winners = _largest(_maxima(grouped, signed), k, False, slabs)[1]
    step = torch.arange(slabs, device=tile.device).mul_(groups)
    columns = (winners.unsqueeze(1) + step[:, None]).flatten(1)
    if rest := d_sae - slabs * groups:  # columns beyond the last group are candidates themselves
        extra = torch.arange(d_sae - rest, d_sae, device=tile.device).expand(rows, rest)
        columns = torch.cat([columns, extra], dim=1)
    values, best = _top(tile.gather(1, columns), k, signed)
    return values, columns.gather(1, best)


def _integers(tile: Tensor) -> Tensor | None:
    """Bits of bf16 numbers on a CPU as int16, whose maxima cost a fifth; None for others, without such a gain.

    Numbers >= 0 have the same order in both, above all negative ones and -0.0, whose order is reversed.
    """
    return tile.view(torch.int16) if tile.dtype == torch.bfloat16 and tile.device.type == "cpu" else None


def above(
    tile: Float[Tensor, "rows d_sae"], threshold: float, limit: int, *, slabs: int = _SLABS
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row, column and value of elements strictly above the threshold, rows ascending; None if more than `limit`.

    Computes the maxima of groups first, so that the tile is read once, and again only groups with a hit.

    Args:
        tile: pre-activations.
        threshold: one number; thresholds per latent belong into the bias.
        limit: largest number of elements, which bounds memory.
        slabs: elements of a group.
    """
    d_sae = tile.shape[1]
    slabs = slabs if d_sae % slabs == 0 else 1
    grouped = tile.unflatten(1, (slabs, d_sae // slabs))
    bits = _integers(grouped) if threshold >= 0 else None
    maxima = grouped.amax(1) if bits is None else bits.amax(1).view(tile.dtype)
    hit = (maxima > threshold).nonzero()
    if len(hit) > limit:
        return None
    row, group = hit.unbind(1)
    elements = grouped[row, :, group]
    mask = elements > threshold
    if slabs * len(hit) > limit and int(mask.count_nonzero()) > limit:
        return None
    index, slab = mask.nonzero().unbind(1)
    return row[index], group[index] + slab * (d_sae // slabs), elements[index, slab]


def _top(values: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    if not signed:
        return values.topk(k, dim=1, sorted=False)
    best = values.abs().topk(k, dim=1, sorted=False).indices
    return values.gather(1, best), best


def _maxima(grouped: Tensor, signed: bool) -> Tensor:
    return torch.maximum(grouped.amax(1), grouped.amin(1).neg_()) if signed else grouped.amax(1)


def top(pre: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Top-k values and indices along the last axis; values <= 0 become 0 (except "abstopk", "lineartopk").

    "topk" and "lineartopk" keep the k largest, "abstopk" the k largest in magnitude, "groupmax" the largest of each of
    k equal groups of neighbors.
    """
    if activation == "groupmax":
        values, within = pre.unflatten(-1, (k, -1)).max(dim=-1)
        return torch.relu(values), within + torch.arange(k, device=pre.device) * (pre.shape[-1] // k)
    if activation == "abstopk":
        indices = pre.abs().topk(k, dim=-1, sorted=False).indices
        return pre.gather(-1, indices), indices
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return (values if activation == "lineartopk" else torch.relu(values)), indices


@torch.no_grad()
def top_of_product(
    h: Float[Tensor, "tokens d_in"], W: Float[Tensor, "d_in d_sae"], b: Float[Tensor, " d_sae"], k: int, activation: str
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`top(h @ W + b, k, activation)` except for "groupmax", a block of latents at a time; no gradients.

    Holds at most 32 MiB of pre-activations (or those of 1,024 latents), in one buffer: allocating memory for each
    product would take as long as the product of a wide SAE.
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
        values, best = top(values, k, activation)
        indices = indices.gather(1, best)
    return values, indices
