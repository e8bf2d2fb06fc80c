"""Neighbors of latents: nearest by cosine of directions, and coactive on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.features.config import PAIRS, IndexInfo
from saewb.kernels.select import ApproximateTopK
from saewb.kernels.topk import BLOCK, top_of_product
from saewb.sae.sparse import SparseLatents
from saewb.stats._entries import Sparse
from saewb.stats.correlation_map import MatrixView

_ROWS = 2**13  # latents whose cosines are computed at a time
_CALIBRATION = 2**12  # sampled rows that calibrate the approximate product


def nearest(rows: Float[Tensor, "d_sae d"], n: int, name: str) -> dict[str, Tensor]:
    """Find for each latent the `n` others of largest |cosine|; rows of norm 0 have cosine 0 with all.

    Takes the rows in float32, and in bf16 where the processor multiplies that fast, and 32 MiB of cosines. Products in
    bf16 only select candidates (`saewb.kernels.select`): the neighbors are those of float32.
    """
    n = min(n, len(rows) - 1)
    unit, neighbors = _normalize(rows.detach()), torch.empty(len(rows), n, dtype=torch.int32, device=rows.device)
    cosines, none = torch.empty(len(rows), n, device=rows.device), unit.new_zeros(len(unit))
    rough = ApproximateTopK.of(unit.T, none, like=unit[:: -(-len(unit) // _CALIBRATION)])
    for begin in range(0, len(unit), _ROWS):
        part = slice(begin, begin + _ROWS)
        if rough is None:
            values, latents = top_of_product(unit[part], unit.T, none, n + 1, "abstopk")
        else:
            values, latents = rough.top(unit[part], n + 1, "abstopk")
        itself = torch.arange(begin, begin + len(latents), device=latents.device)[:, None]
        order = values.abs().masked_fill_(latents == itself, -1).topk(n, dim=1).indices
        neighbors[part], cosines[part] = latents.gather(1, order).int(), values.gather(1, order)
    return {f"nearest.{name}": neighbors, f"nearest.{name}_cosine": cosines}


def nearest_bytes(d_sae: int, d: int) -> int:
    """Peak memory of `nearest` in bytes, without its result; `ApproximateTopK.max_bytes` includes the unit rows."""
    return ApproximateTopK.max_bytes(d, d_sae) + 4 * 2 * max(BLOCK, 1024 * _ROWS)


def _normalize(rows: Tensor) -> Float[Tensor, "d_sae d"]:
    rows = rows.float() if rows.dtype == torch.float64 else rows
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    return torch.div(rows, norm, out=torch.empty(rows.shape, device=rows.device))


def coactive(active: Int[Tensor, "tokens most"], d_sae: int, n: int) -> dict[str, Tensor]:
    """Find for each latent the `n` others of largest correlation phi of activity.

        phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))

    Args:
        active: active latents of each of N tokens, -1 for none.
        d_sae: number of latents.
        n: coactive latents per latent; -1 where fewer are active on the same tokens.
    """
    latent, index = active.flatten().sort(stable=True)
    unused = int((latent < 0).sum())
    latent, token = latent[unused:], (index[unused:] // max(1, active.shape[1])).int()
    del index
    n_active, total = torch.bincount(latent, minlength=d_sae), len(active)
    best = {"latent": torch.full((d_sae, n), -1, dtype=torch.int32), "together": torch.zeros(d_sae, n).int()}
    best["phi"] = torch.zeros(d_sae, n)
    best = {name: t.to(active.device) for name, t in best.items()}
    for i, j, both in _count_pairs(latent, token, active, d_sae):
        n_i, n_j, n_ij = n_active[i].double(), n_active[j].double(), both.double()
        spread = (n_i * (total - n_i) * n_j * (total - n_j)).sqrt()
        phi = torch.where(spread > 0, (total * n_ij - n_i * n_j) / spread.clamp_min(1e-30), 0)
        order = (-phi).argsort(stable=True)
        order = order[i[order].argsort(stable=True)]
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(i[order], i[order])
        order, rank = order[rank < n], rank[rank < n]
        for name, value in (("latent", j), ("together", both), ("phi", phi)):
            best[name][i[order], rank] = value[order].to(best[name].dtype)
    return {f"coactive.{name}": t for name, t in best.items()} | {"coactive.fired": n_active.int()}


def _count_pairs(
    latent: Tensor, token: Tensor, active: Tensor, d_sae: int
) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
    """Yield (latent, other latent, tokens on which both are active) by groups of latents; `latent` is sorted."""
    step = max(1, PAIRS // max(1, active.shape[1]))
    for part in _runs(latent, step):
        if part.stop - part.start > step:  # one latent, too frequent to list its pairs
            i, both = int(latent[part.start]), torch.zeros(d_sae, dtype=torch.int64, device=active.device)
            for tokens in token[part].split(step):
                others = active[tokens.long()]
                both += torch.bincount(others[others >= 0], minlength=d_sae)
            both[i] = 0
            j = both.nonzero()[:, 0]
            yield torch.full_like(j, i), j, both[j]
            continue
        i, others = latent[part].long(), active[token[part].long()].long()
        pair = (i[:, None] * d_sae + others)[(others >= 0) & (others != i[:, None])]
        pair, both = pair.unique(return_counts=True)
        yield pair // d_sae, pair % d_sae, both


def _runs(sorted_key: Tensor, step: int) -> Iterator[slice]:
    """Split sorted keys into slices of at most `step`, not between equal keys, or of one key alone."""
    begin, n = 0, len(sorted_key)
    while begin < n:
        end = n
        if begin + step < n:
            key = sorted_key[begin + step]
            end = int(torch.searchsorted(sorted_key, key))
            end = end if end > begin else int(torch.searchsorted(sorted_key, key, right=True))
        yield slice(begin, end)
        begin = end


def firing_matrix(info: IndexInfo, tensors: Mapping[str, Tensor], min_fires: int) -> MatrixView:
    """Correlation phi of all pairs of latents over the sampled tokens; see `FeatureIndex.matrix`."""
    active = tensors["active.token_active"]
    if len(active) == 0:
        what = "this index has no sampled tokens to learn from which latents are active together."
        raise ValueError(explain(what, fix="saewb.build_index(..., coactive_tokens=65_536)"))
    if int(active.max()) >= info.d_sae:
        what = f"this index has latent {int(active.max())} on a sampled token."
        raise FormatError(explain(what, want=f"0 to {info.d_sae - 1}", fix="saewb.build_index(...) anew"))
    token, rank = (active >= 0).nonzero(as_tuple=True)
    latents = SparseLatents(token, active[token, rank].long(), torch.ones(len(token)), (len(active), info.d_sae))
    entries = Sparse.of(latents, "phi", min_fires)
    return MatrixView(entries, tensors["counts.by_position"].sum(1) / max(1, info.n_tokens))
