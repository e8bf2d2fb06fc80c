"""Which latents fire on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

N_COACTIVE = 10  # latents kept that fire together with each
PAIRS = 2**18  # pairs of latents that fire together, sorted at a time (2 MiB in int64, up to 32 times over)


def coactive(active: Int[Tensor, "tokens most"], d_sae: int, n: int) -> dict[str, Tensor]:
    """Per latent the `n` that fire on the same tokens, by the correlation phi of whether they fire.

        phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))

    Args:
        active: latents that fire on each of N tokens, -1 for none.
        d_sae: latents.
        n: kept; fewer than n that ever fire together leave -1.
    """
    latent, place = active.flatten().sort(stable=True)
    unused = int((latent < 0).sum())
    latent, token = latent[unused:], (place[unused:] // max(1, active.shape[1])).int()
    del place
    fired, total = torch.bincount(latent, minlength=d_sae), len(active)
    made = {"latent": torch.full((d_sae, n), -1, dtype=torch.int32), "together": torch.zeros(d_sae, n).int()}
    made["phi"] = torch.zeros(d_sae, n)
    made = {name: t.to(active.device) for name, t in made.items()}
    for i, j, both in _pairs(latent, token, active, d_sae):
        n_i, n_j, both_ = fired[i].double(), fired[j].double(), both.double()
        spread = (n_i * (total - n_i) * n_j * (total - n_j)).sqrt()
        phi = torch.where(spread > 0, (total * both_ - n_i * n_j) / spread.clamp_min(1e-30), 0)
        order = (-phi).argsort(stable=True)
        order = order[i[order].argsort(stable=True)]
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(i[order], i[order])
        order, place = order[place < n], place[place < n]
        for name, value in (("latent", j), ("together", both), ("phi", phi)):
            made[name][i[order], place] = value[order].to(made[name].dtype)
    return {f"coactive.{name}": t for name, t in made.items()} | {"coactive.fired": fired.int()}


def _pairs(
    latent: Tensor, token: Tensor, active: Tensor, d_sae: int
) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
    """(latent, another, on how many tokens both fire), some latents at a time, ascending; `latent` is sorted."""
    step = max(1, PAIRS // max(1, active.shape[1]))
    for part in _runs(latent, step):
        if part.stop - part.start > step:  # one latent, too frequent for its pairs to be listed
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
    """Slices of at most `step`, never between equal keys; longer ones where there are more of one key than that."""
    begin, n = 0, len(sorted_key)
    while begin < n:
        end = n
        if begin + step < n:
            key = sorted_key[begin + step]
            end = int(torch.searchsorted(sorted_key, key))
            end = end if end > begin else int(torch.searchsorted(sorted_key, key, right=True))
        yield slice(begin, end)
        begin = end
