"""Which latents point the same way: for each the others of largest |cosine|, of all pairs, a few rows at a time.

Where the processor multiplies bf16 quickly, the products are taken in it, and only choose candidates, whose cosines are
then taken in float32. What a cosine in bf16 may be off by is known, so a row says itself whether a latent that is no
candidate could be among the nearest; such rows (latents that are copies of one another) are done in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.sparse_step.precision import finer

_TILE = 2**24  # cosines held at a time, at most (64 MiB in float32)
_PICKED = 2**22  # numbers of the candidates' directions held at a time (16 MiB)
_U = 2.0**-8  # a number rounded to bf16 is off by this share of it at most


def nearest(rows: Float[Tensor, "d_sae d"], n: int, name: str) -> dict[str, Tensor]:
    """Per latent the `n` others with the largest |cosine|; rows of norm 0 have cosine 0 with all.

    Holds the rows in float32, and in bf16 where that is used, and 64 MiB of cosines.
    """
    n = min(n, len(rows) - 1)
    unit, found = _unit(rows.detach()), torch.empty(len(rows), n, dtype=torch.int32, device=rows.device)
    cosines = torch.empty(len(rows), n, device=rows.device)
    coarse = unit.bfloat16() if _quick(unit) else None
    buffer = torch.empty(min(len(unit), max(1, _TILE // len(unit))), len(unit), device=unit.device)
    for part in torch.arange(len(unit), device=unit.device).split(len(buffer)):
        at, open_ = slice(int(part[0]), int(part[-1]) + 1), part
        if coarse is not None:
            found[at], cosines[at], sure = _by_candidates(unit, coarse, part, n, buffer)
            open_ = part[~sure]
        if len(open_):
            picked = _largest(unit, open_, n, buffer).indices
            found[open_], cosines[open_] = _ranked(unit, open_, picked, n)
    return {f"nearest.{name}": found, f"nearest.{name}_cosine": cosines}


def nearest_bytes(d_sae: int, d: int) -> int:
    """What `nearest` takes at most, in bytes, besides its result."""
    return 6 * d_sae * d + 4 * max(_TILE, d_sae) + 3 * 4 * max(_PICKED, 200 * d)


def _unit(rows: Tensor) -> Float[Tensor, "d_sae d"]:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    return torch.div(rows, norm, out=torch.empty(rows.shape, device=rows.device))


def _quick(unit: Tensor) -> bool:
    # Not on a GPU: there, sums may be rounded to bf16 on the way, and float32 is quick.
    return unit.device.type == "cpu" and len(unit) >= 1024 and finer("int8", unit.device) == "bf16"


def _largest(rows: Tensor, which: Tensor, n: int, buffer: Tensor) -> torch.return_types.topk:
    """The n largest |row . other| of these rows, and whose; of its own -1."""
    own = torch.arange(len(which), device=which.device)
    into = buffer.view(-1).view(rows.dtype)[: len(which) * len(rows)].view(len(which), len(rows))
    product = torch.mm(rows[which], rows.T, out=into).abs_()
    return product.index_put_((own, which), product.new_tensor(-1.0)).topk(n, dim=1)


def _by_candidates(
    unit: Tensor, coarse: Tensor, which: Tensor, n: int, buffer: Tensor
) -> tuple[Int[Tensor, "rows n"], Float[Tensor, "rows n"], Tensor]:
    """The n nearest of some candidates, their cosines, and where no other latent can be nearer.

    With u = 2^-8 and rows of length 1, bf16 gives c' of a true cosine c: both factors rounded, a sum in float32 of d
    terms whose sizes add up to 1 at most, the result rounded. So |c| <= |c'| / (1 - u) + 2 u + u^2 + d 2^-24, and |c'|
    of one that is no candidate is at most the last candidate's. (A little more is allowed for, for the lengths.)
    """
    d = unit.shape[1]
    rough = _largest(coarse, which, min(len(unit) - 1, n + 24 + d // 32), buffer)
    indices, cosines = _ranked(unit, which, rough.indices, n)
    most = rough.values[:, -1].float() / (1 - _U) + 2 * _U + 2 * _U**2 + d * 2.0**-23
    all_seen = rough.values.shape[1] == len(unit) - 1
    return indices, cosines, (cosines[:, -1].abs() >= most) | all_seen


def _ranked(unit: Tensor, which: Tensor, picked: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n of those picked for each row whose |cosine| is largest, and their cosines, in float32."""
    step = max(1, _PICKED // max(1, picked.shape[1] * unit.shape[1]))
    parts = zip(which.split(step), picked.split(step), strict=True)
    cosines = torch.cat([torch.bmm(unit[some], unit[w][:, :, None])[:, :, 0] for w, some in parts])
    order = cosines.abs().topk(n, dim=1).indices
    return picked.gather(1, order).int(), cosines.gather(1, order)
