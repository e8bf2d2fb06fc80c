"""The n best contexts of each latent, from a stream of candidates in any order and any batches.

Every candidate has an `order` (smaller is better) and a `position` (number of its token among all tokens), which breaks
ties. So the result depends on the set of candidates only, not on their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

EMPTY = 2**31 - 1  # order of an empty slot
BLOCK = 2048  # latents merged at a time
PENDING = 2**15  # candidates collected before they are merged


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidate contexts, one per row."""

    latent: Int[Tensor, " n"]
    """Latent of the context."""
    order: Int[Tensor, " n"]
    """Sort key, 0 .. EMPTY - 1; smaller is better."""
    position: Int[Tensor, " n"]
    """Number of the peak token among all tokens: row * ctx_len + position in the row."""
    content: Int[Tensor, " n"]
    """Hash of the content; of equal contents of a latent, only the best counts."""
    value: Float[Tensor, " n"]
    """Activation of the latent at that token."""
    tokens: Int[Tensor, "n window"]
    """Token ids, -1 outside the row of text."""
    acts: Float[Tensor, "n window"]
    """Activation of the latent at each token, 0 outside the row."""

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, which: Tensor) -> Candidates:
        """Select rows by index, in this order."""
        return Candidates(*(getattr(self, f.name)[which] for f in fields(self)))


def concatenate(parts: list[Candidates]) -> Candidates:
    """Concatenate candidates."""
    return Candidates(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Candidates)))


def select_best(latent: Tensor, order: Tensor, position: Tensor, content: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Select the n best candidates of each latent, equal contents counted once, and rank them.

    Args:
        latent: of each candidate; like the others int64, `[candidates]`.
        order: smaller is better; 0 to 2**31 - 1.
        position: breaks ties; smaller is better.
        content: of each candidate.
        n: contexts per latent.

    Returns:
        Indices of the n best, sorted by latent and rank; and the rank of each.
    """
    which = position.argsort(stable=True)
    which = which[(latent[which] << 31 | order[which]).argsort(stable=True)]
    which = which[_first_of_each(_mixed(latent[which]) ^ content[which])]
    rank = _rank_in_run(latent[which])
    among_best = rank < n
    return which[among_best], rank[among_best]


def _first_of_each(key: Tensor) -> Tensor:
    """Mask of the first occurrence of each key."""
    if len(key) == 0:
        return key.bool()
    by_key = key.argsort(stable=True)
    ordered = key[by_key]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(first).scatter_(0, by_key, first)


def _rank_in_run(sorted_key: Tensor) -> Tensor:
    """Number of equal keys before each."""
    _, inverse, counts = sorted_key.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(sorted_key), device=sorted_key.device) - starts[inverse]


def _mixed(x: Tensor) -> Tensor:
    # Odd and large, so that neighboring latents lie far apart and xor with a content hash does not collide.
    return (x + 1) * -7046029254386353131


class TopContexts:
    """Accumulator of the n best contexts of each latent.

    Takes `d_sae * n * (8 window + 32)` bytes, and up to 32,768 pending candidates plus those of one call.
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
        self._pending: list[Candidates] = []

    @property
    def limit(self) -> Int[Tensor, " d_sae"]:
        """Largest order per latent at which a new candidate can enter."""
        return self.order[:, -1]

    def add(self, candidates: Candidates) -> None:
        """Add candidates; they are merged once enough are pending."""
        if len(candidates):
            self._pending.append(candidates)
            if sum(map(len, self._pending)) >= PENDING:
                self.flush()

    def flush(self) -> None:
        """Merge the pending candidates."""
        if not self._pending:
            return
        new = concatenate(self._pending)
        new = new.take(new.latent.argsort(stable=True))
        touched = new.latent.unique()
        starts = torch.searchsorted(new.latent, touched)
        ends = [*starts[BLOCK::BLOCK].tolist(), len(new)]
        begin = 0
        for block, end in zip(touched.split(BLOCK), ends, strict=True):
            self._merge(block, new.take(torch.arange(begin, end, device=touched.device)))
            begin = end
        self._pending = []

    def _merge(self, block: Tensor, new: Candidates) -> None:
        both = concatenate([self.candidates(block), new])
        best, rank = select_best(both.latent, both.order, both.position, both.content, self.n)
        both, latent = both.take(best), both.latent[best]
        self.order[block], self.position[block], self.tokens[block] = EMPTY, -1, -1
        self.content[block], self.value[block], self.acts[block] = 0, 0, 0
        for name in ("order", "position", "content", "value", "tokens", "acts"):
            slots = getattr(self, name)
            slots[latent, rank] = getattr(both, name).to(slots.dtype)

    def candidates(self, latents: Int[Tensor, " some"]) -> Candidates:
        """Current contexts of these latents."""
        some, rank = (self.order[latents] != EMPTY).nonzero(as_tuple=True)
        latent = latents[some]
        names = ("order", "position", "content", "value", "tokens", "acts")
        order, *rest = (getattr(self, name)[latent, rank] for name in names)
        return Candidates(latent, order.long(), *rest)

    def tensors(self) -> dict[str, Tensor]:
        """State by name, after a flush."""
        self.flush()
        return {k: getattr(self, k) for k in ("order", "position", "content", "value", "tokens", "acts")}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state given by `tensors`; copied."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.order.device, copy=True))

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the contexts of another state."""
        other = TopContexts(len(self.order), 1, self.window, self.order.device)
        other.restore(tensors)
        for block in torch.arange(len(self.order), device=self.order.device).split(BLOCK):
            self.add(other.candidates(block))
        self.flush()
