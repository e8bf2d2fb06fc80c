"""One streamed pass over what latents do: everything an index knows that does not come from the weights.

1. Where each latent is strongest: the strongest token of each row of text is a candidate for its top contexts; texts
   that look alike in the window are kept once.
2. Where it fires at all: a uniform sample of its firings, the smallest hashes of (seed, token's number, latent).
3. Histogram, sum, firings by position.
4. Which latents are active together: the active latents of a uniform sample of tokens, again the smallest hashes.

Whether a token is sampled depends on its number among all tokens and the seed, so that the result is the same for any
batches, in any order, in any number of parts that are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saewb.features.counts import Counts
from saewb.features.together import N_COACTIVE, PAIRS
from saewb.features.top_contexts import BLOCK, EMPTY, WAITING, Entries, Shelf
from saewb.sae.sparse import Firings

_TOKENS = 2**13  # tokens whose active latents are kept aside before they are merged
_AT_ONCE = 2**13  # candidates whose windows are read at a time
_INFINITE = 0x7F800000  # bits of float32 infinity: above those of every number


@dataclass(frozen=True)
class Plan:
    """What a pass gathers."""

    d_sae: int  # latents
    ctx_len: int  # tokens in a row
    n_top: int  # strongest contexts kept of each latent
    n_sample: int  # contexts sampled of each latent
    before: int  # tokens of a context before the one it is about
    after: int  # tokens of a context after it
    coactive_tokens: int  # tokens whose active latents are noted
    active: int  # active latents noted of each, the strongest
    l0_most: int  # latents that can fire on one token
    seed: int  # of the samples

    @property
    def window(self) -> int:
        """Tokens in a context."""
        return self.before + 1 + self.after

    @property
    def drops_active(self) -> bool:
        """Whether more latents may fire on a token than are noted."""
        return self.active < min(self.d_sae, self.l0_most)

    @property
    def nbytes(self) -> int:
        """What a pass holds at most, in bytes, besides the model's forward and one batch's latents and firings.

        What is kept, and the larger of what waits to be put in place, with what that takes, and of what finding the
        latents that fire together takes.
        """
        longest = 8 * self.window
        contexts = self.d_sae * (self.n_top + self.n_sample) * (longest + 32)
        figures = self.d_sae * (64 * 8 + 8 * (self.ctx_len.bit_length() + 1) + 20 + N_COACTIVE * 12 + 4)
        token = 4 * self.active + 16
        candidate = longest + 100  # with the numbers to sort it by
        merged = 3 * BLOCK * max(self.n_top, self.n_sample) * candidate + _AT_ONCE * (5 * longest + 100)
        waiting = 4 * (WAITING + _AT_ONCE) * candidate + 2 * self.coactive_tokens * token + 3 * _TOKENS * token
        together = self.coactive_tokens * self.active * 40 + 32 * 8 * PAIRS
        return contexts + figures + self.coactive_tokens * token + max(merged + waiting, together)


class Gathering:
    """What has been gathered so far.

    Example:
        >>> from saewb.sae.sparse import Firings
        >>> plan = Plan(3, 4, n_top=1, n_sample=2, before=1, after=1, coactive_tokens=8, active=3, l0_most=3, seed=0)
        >>> ids = torch.tensor([[5, 6, 7, 8]]); fires = torch.tensor([1, 2]); latent = torch.tensor([2, 2])
        >>> gathered = Gathering(plan)
        >>> gathered.update(Firings(ids, ids > 0, 0, 3, fires, latent, torch.tensor([0.5, 4.0])))
        >>> top = gathered.tensors()
        >>> top["top.value"][2].tolist(), top["top.tokens"][2].tolist(), top["top.acts"][2].tolist()
        ([4.0], [[6, 7, 8]], [[0.5, 4.0, 0.0]])
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.top = Shelf(plan.d_sae, plan.n_top, plan.window, device)
        self.sample = Shelf(plan.d_sae, plan.n_sample, plan.window, device)
        self.counts = Counts(plan.d_sae, plan.ctx_len, device)
        self.token_hash = torch.zeros(0, dtype=torch.int64, device=device)
        self.token_position = torch.zeros(0, dtype=torch.int64, device=device)
        self.token_active = torch.zeros(0, plan.active, dtype=torch.int32, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._latent_hash = _mixed(torch.arange(plan.d_sae, device=device) + 1)

    def update(self, seen: Firings) -> None:
        """Add what latents did on some rows."""
        self.counts.update(seen.latent, seen.value, seen.token % self.plan.ctx_len, seen.plain)
        hashes = self._hashes(seen)
        self._note_active(seen, hashes)
        if len(seen.token):
            self._offer(self.top, seen, *_strongest(seen, self.top.limit))
            order = _order(hashes[seen.token] ^ self._latent_hash[seen.latent])
            kept = (order <= self.sample.limit[seen.latent]).nonzero()[:, 0]
            self._offer(self.sample, seen, kept, order[kept])

    def _offer(self, shelf: Shelf, seen: Firings, which: Tensor, order: Tensor) -> None:
        for some, their_order in zip(which.split(_AT_ONCE), order.split(_AT_ONCE), strict=True):
            shelf.add(self._entries(seen, some, their_order, distinct=shelf is self.top))

    def _hashes(self, seen: Firings) -> Int[Tensor, " tokens"]:
        n = seen.ids.numel()
        position = seen.first_row * self.plan.ctx_len + torch.arange(n, device=seen.ids.device)
        return _mixed(_mixed(position) + self.plan.seed)

    def _entries(self, seen: Firings, which: Tensor, order: Tensor, *, distinct: bool) -> Entries:
        token, latent = seen.token[which], seen.latent[which]
        around, inside = seen.window(token, self.plan.before, self.plan.after)
        ids = torch.where(inside, seen.ids.flatten()[around], -1)
        position = token + seen.first_row * self.plan.ctx_len
        return Entries(
            latent,
            order,
            position,
            _content(ids) if distinct else position,
            seen.value[which],
            ids.to(torch.int32),
            torch.where(inside, seen.at(latent, around), 0) if len(which) else around.float(),
        )

    def _note_active(self, seen: Firings, hashes: Tensor) -> None:
        """The latents that fire on tokens which may be among those with the smallest hashes."""
        hashed, wanted = _order(hashes), seen.plain.flatten()
        if len(self.token_hash) >= self.plan.coactive_tokens > 0:
            wanted = wanted & (hashed <= self.token_hash[-1])
        chosen = wanted.nonzero()[:, 0]
        number = torch.full_like(hashes, -1).scatter_(0, chosen, torch.arange(len(chosen), device=chosen.device))
        which = (number[seen.token] >= 0).nonzero()[:, 0]
        if self.plan.drops_active:
            which = which[seen.value[which].abs().argsort(descending=True, stable=True)]
            which = which[seen.token[which].argsort(stable=True)]
        token = number[seen.token[which]]
        fired = torch.bincount(token, minlength=len(chosen))
        rank = torch.arange(len(token), device=token.device) - (fired.cumsum(0) - fired)[token]
        kept = (rank < self.plan.active).nonzero()[:, 0]
        active = self.token_active.new_full((len(chosen), self.plan.active), -1)
        active[token[kept], rank[kept]] = seen.latent[which[kept]].to(torch.int32)
        self._waiting.append((hashed[chosen], seen.first_row * self.plan.ctx_len + chosen, active))
        if sum(len(part[0]) for part in self._waiting) >= _TOKENS:
            self._keep_active()

    def _keep_active(self) -> None:
        kept = (self.token_hash, self.token_position, self.token_active)
        hashed, position, active = (torch.cat(parts) for parts in zip(kept, *self._waiting, strict=True))
        order = position.argsort(stable=True)
        order = order[hashed[order].argsort(stable=True)][: self.plan.coactive_tokens]
        self.token_hash, self.token_position, self.token_active = hashed[order], position[order], active[order]
        self._waiting = []

    def tensors(self) -> dict[str, Tensor]:
        """All that was gathered, by name."""
        parts = {"top": self.top, "sample": self.sample, "counts": self.counts}
        self._keep_active()
        named = {f"{part}.{k}": t for part, held in parts.items() for k, t in held.tensors().items()}
        names = ("token_hash", "token_position", "token_active")
        return named | {f"active.{name}": getattr(self, name) for name in names}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; copied."""
        for part in (self.top, self.sample, self.counts):
            part.restore(_part(tensors, {self.top: "top", self.sample: "sample"}.get(part, "counts")))
        for name, tensor in _part(tensors, "active").items():
            setattr(self, name, tensor.to(self.token_hash.device, copy=True))

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what another one, over other rows of text, has gathered."""
        self.top.merge(_part(tensors, "top"))
        self.sample.merge(_part(tensors, "sample"))
        self.counts.merge(_part(tensors, "counts"))
        active = _part(tensors, "active")
        self._waiting.append((active["token_hash"], active["token_position"], active["token_active"]))
        self._keep_active()


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def _strongest(seen: Firings, limit: Int[Tensor, " d_sae"]) -> tuple[Tensor, Tensor]:
    """Of each latent and row the strongest firing, the first of equals, if it may be kept; and its order."""
    rows, ctx = seen.ids.shape
    order = _INFINITE - seen.value.abs().view(torch.int32).long()
    may = (order <= limit[seen.latent]).nonzero()[:, 0]
    cell = (seen.token[may] // ctx) * len(limit) + seen.latent[may]
    best = torch.full((rows * len(limit),), EMPTY << 31, dtype=torch.int64, device=order.device)
    best.scatter_reduce_(0, cell, order[may] << 31 | may, "amin")
    found = best[best != EMPTY << 31]
    return found & (2**31 - 1), found >> 31


def _content(ids: Int[Tensor, "n window"]) -> Int[Tensor, " n"]:
    """A hash of what stands where in each window, and where the row ends (-1)."""
    width = ids.shape[1]
    return _mixed(_mixed(ids * width + torch.arange(width, device=ids.device)).sum(1))


def _order(hashed: Tensor) -> Tensor:
    """31 well mixed bits, below EMPTY."""
    return ((_mixed(hashed) >> 32) & 0x7FFFFFFF).clamp_(max=EMPTY - 1)


def _mixed(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Each bit of the result depends on all bits of `x`: the finalizer of SplitMix64, in wrapping int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
