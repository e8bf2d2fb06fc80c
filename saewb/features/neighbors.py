"""Which latents point the same way: for each the others of largest |cosine|, of all pairs, a few rows at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.select import ApproximateTopK
from saewb.kernels.topk import BLOCK, top_of_product

_AT_ONCE = 2**13  # latents
_LIKE = 2**12  # of them that say what rows are like


def nearest(rows: Float[Tensor, "d_sae d"], n: int, name: str) -> dict[str, Tensor]:
    """Per latent the `n` others with the largest |cosine|; rows of norm 0 have cosine 0 with all.

    Holds the rows in float32, and in bf16 where the processor multiplies that quickly, and 32 MiB of cosines. Products
    in bf16 only choose candidates (`saewb.kernels.select`): the neighbors are those of float32.
    """
    n = min(n, len(rows) - 1)
    unit, found = _unit(rows.detach()), torch.empty(len(rows), n, dtype=torch.int32, device=rows.device)
    cosines, none = torch.empty(len(rows), n, device=rows.device), unit.new_zeros(len(unit))
    rough = ApproximateTopK.of(unit.T, none, like=unit[:: -(-len(unit) // _LIKE)])
    for own in torch.arange(len(unit), device=unit.device).split(_AT_ONCE):
        at = slice(int(own[0]), int(own[-1]) + 1)
        if rough is None:
            values, latents = top_of_product(unit[at], unit.T, none, n + 1, "abstopk")
        else:
            values, latents = rough.top(unit[at], n + 1, "abstopk")
        order = values.abs().masked_fill_(latents == own[:, None], -1).topk(n, dim=1).indices
        found[at], cosines[at] = latents.gather(1, order).int(), values.gather(1, order)
    return {f"nearest.{name}": found, f"nearest.{name}_cosine": cosines}


def nearest_bytes(d_sae: int, d: int) -> int:
    """What `nearest` takes at most, in bytes, besides its result."""
    return ApproximateTopK.max_bytes(d, d_sae) + 4 * 2 * max(BLOCK, 1024 * _AT_ONCE)


def _unit(rows: Tensor) -> Float[Tensor, "d_sae d"]:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    return torch.div(rows, norm, out=torch.empty(rows.shape, device=rows.device))
