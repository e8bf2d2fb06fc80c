"""The n best contexts of each latent, from a stream of candidates that come in any order and any batches.

Every candidate has an `order` (smaller is better) and a `position` (its token's number among all tokens), which breaks
ties. So what is kept is a function of the set of candidates, not of how they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

EMPTY = 2**31 - 1  # order of a slot that holds nothing
BLOCK = 2048  # latents merged at a time
WAITING = 2**15  # candidates kept aside before they are merged


@dataclass(frozen=True, eq=False)
class Entries:
    """Contexts, one a row. `tokens` is -1, and `acts` 0, where the window leaves the row of text."""

    latent: Int[Tensor, " n"]
    order: Int[Tensor, " n"]  # 0 .. EMPTY - 1, smaller is better
    position: Int[Tensor, " n"]  # row * ctx_len + place in the row, of the token the context is about
    content: Int[Tensor, " n"]  # equal contents of one latent are kept once, the best of them
    value: Float[Tensor, " n"]  # the latent's activation there
    tokens: Int[Tensor, "n window"]  # ids
    acts: Float[Tensor, "n window"]  # the latent's activation at each of them

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, which: Tensor) -> Entries:
        """These rows, in this order."""
        return Entries(*(getattr(self, f.name)[which] for f in fields(self)))


def joined(parts: list[Entries]) -> Entries:
    """All of them in one."""
    return Entries(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Entries)))


def best(latent: Tensor, order: Tensor, position: Tensor, content: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Which candidates are among the n best of their latent, equal contents counted once, and their ranks.

    Args:
        latent: of each candidate; with the others int64, `[candidates]`.
        order: smaller is better; 0 to 2**31 - 1.
        position: breaks ties; the smaller wins.
        content: of each candidate.
        n: kept per latent.

    Returns:
        Indices of those kept, sorted by latent and rank; and each one's rank.
    """
    which = position.argsort(stable=True)
    which = which[(latent[which] << 31 | order[which]).argsort(stable=True)]
    which = which[_first_of_each(_mixed(latent[which]) ^ content[which])]
    rank = _rank_in_run(latent[which])
    kept = rank < n
    return which[kept], rank[kept]


def _first_of_each(key: Tensor) -> Tensor:
    """A mask of those whose key has not occurred before."""
    if len(key) == 0:
        return key.bool()
    by_key = key.argsort(stable=True)
    found = key[by_key]
    first = torch.ones_like(found, dtype=torch.bool)
    first[1:] = found[1:] != found[:-1]
    return torch.zeros_like(first).scatter_(0, by_key, first)


def _rank_in_run(sorted_key: Tensor) -> Tensor:
    """How many of the same key stand before each."""
    _, inverse, counts = sorted_key.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(sorted_key), device=sorted_key.device) - starts[inverse]


def _mixed(x: Tensor) -> Tensor:
    # Odd and large: neighboring latents come to lie far apart, so that xor with a content hash does not collide.
    return (x + 1) * -7046029254386353131


class Shelf:
    """The n best contexts of each latent.

    Keeps `d_sae * n * (8 window + 32)` bytes; beside them 32,768 candidates may wait, and what one call adds.
    """

    def __init__(self, d_sae: int, n: int, window: int, device: torch.device | str = "cpu") -> None:
        self.n, self.window = n, window
        full, wide = (d_sae, n), (d_sae, n, window)
        self.order = torch.full(full, EMPTY, dtype=torch.int32, device=device)
        self.position = torch.full(full, -1, dtype=torch.int64, device=device)
        self.content = torch.zeros(full, dtype=torch.int64, device=device)
        self.value = torch.zeros(full, device=device)
        self.tokens = torch.full(wide, -1, dtype=torch.int32, device=device)
        self.acts = torch.zeros(wide, device=device)
        self._waiting: list[Entries] = []

    @property
    def limit(self) -> Int[Tensor, " d_sae"]:
        """No candidate of a latent whose order is above this can be kept."""
        return self.order[:, -1]

    def add(self, entries: Entries) -> None:
        """Offer candidates."""
        if len(entries):
            self._waiting.append(entries)
            if sum(map(len, self._waiting)) >= WAITING:
                self.flush()

    def flush(self) -> None:
        """Put in place what waits."""
        if not self._waiting:
            return
        new = joined(self._waiting)
        new = new.take(new.latent.argsort(stable=True))
        touched = new.latent.unique()
        starts = torch.searchsorted(new.latent, touched)
        ends = [*starts[BLOCK::BLOCK].tolist(), len(new)]
        begin = 0
        for block, end in zip(touched.split(BLOCK), ends, strict=True):
            self._merge(block, new.take(torch.arange(begin, end, device=touched.device)))
            begin = end
        self._waiting = []

    def _merge(self, block: Tensor, new: Entries) -> None:
        both = joined([self.entries(block), new])
        kept, rank = best(both.latent, both.order, both.position, both.content, self.n)
        both, latent = both.take(kept), both.latent[kept]
        self.order[block], self.position[block], self.tokens[block] = EMPTY, -1, -1
        self.content[block], self.value[block], self.acts[block] = 0, 0, 0
        for name in ("order", "position", "content", "value", "tokens", "acts"):
            mine = getattr(self, name)
            mine[latent, rank] = getattr(both, name).to(mine.dtype)

    def entries(self, latents: Int[Tensor, " some"]) -> Entries:
        """What these latents have."""
        some, rank = (self.order[latents] != EMPTY).nonzero(as_tuple=True)
        at = latents[some]
        names = ("order", "position", "content", "value", "tokens", "acts")
        order, *rest = (getattr(self, name)[at, rank] for name in names)
        return Entries(at, order.long(), *rest)

    def tensors(self) -> dict[str, Tensor]:
        """All it keeps, by name; what waits is put in place first."""
        self.flush()
        return {k: getattr(self, k) for k in ("order", "position", "content", "value", "tokens", "acts")}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; copied."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.order.device, copy=True))

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Offer all that another shelf keeps."""
        other = Shelf(len(self.order), 1, self.window)
        other.restore(tensors)
        for block in torch.arange(len(self.order), device=self.order.device).split(BLOCK):
            self.add(other.entries(block))
        self.flush()
