"""Batches of exactly so many tokens out of chunks of any size, mixed or in order.

Mixing works in rounds over a buffer of B tokens. Each round visits the places of the buffer once, in a random order; a
batch takes the tokens at the next places and puts fresh ones there. So a token that came in during one round leaves at
a random moment of the next one: a batch is drawn from B tokens, evenly, and work is the same at every step (a buffer
that is refilled by halves stands still for each refill). When the source ends, what is left leaves in random order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, final

import torch

from saewb.errors import explain
from saewb.models.capture import Activations, joined


class Source(Protocol):
    """What gives Activations in chunks of any size, and can say and take up where it is."""

    def __iter__(self) -> Iterator[Activations]: ...

    def __next__(self) -> Activations: ...

    def state(self) -> dict[str, Any]:
        """Where it is: numbers, strings, lists and tensors."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@final
class Exact:
    """The tokens of a source, in its order, in batches of exactly `n`; the last few that fill none are dropped."""

    def __init__(self, source: Source, n: int) -> None:
        if n < 1:
            raise ValueError(explain(f"got batch_tokens={n}.", want="1 or more", fix="batch_tokens=4096"))
        self._source, self.n = source, n
        self._left: list[Activations] = []

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return self.take(self.n, whole=True)

    def take(self, n: int, *, whole: bool) -> Activations:
        """The next `n` tokens; fewer at the end unless `whole`."""
        have = sum(map(len, self._left))
        while have < n:
            chunk = next(self._source, None)
            if chunk is None:
                if whole or have == 0:
                    raise StopIteration
                break
            self._left.append(chunk)
            have += len(chunk)
        return self._cut(min(n, have))

    def some(self, n: int) -> Activations | None:
        """1 to `n` of the next tokens, for which at most one chunk is computed; None at the end."""
        first = self.look()
        return None if first is None else self._cut(min(n, len(first)))

    def look(self) -> Activations | None:
        """One or more of the next tokens, which stay where they are; None at the end."""
        while not self._left:
            chunk = next(self._source, None)
            if chunk is None:
                return None
            self._left += [chunk] if len(chunk) else []
        return self._left[0]

    def _cut(self, n: int) -> Activations:
        parts = []
        while n > 0:
            first = self._left.pop(0)
            if len(first) > n:
                self._left.insert(0, first.rows(slice(n, None)))
                first = first.rows(slice(0, n))
            parts.append(first)
            n -= len(first)
        return joined(parts)

    def state(self, before: Activations | None = None) -> dict[str, Any]:
        """With the tokens that were computed and not given yet; `before` are such that were given and come back."""
        left = [part for part in (before, *self._left) if part is not None]
        return {"source": self._source.state(), "left": packed(joined(left) if left else None)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._source.restore(state["source"])
        left = unpacked(state["left"])
        self._left = [] if left is None else [left]


@final
class Mixed:
    """The tokens of a source in batches of exactly `n`, mixed over `size` tokens; each token once.

    Memory: `size` tokens, allocated once, on the device and in the dtype of the source; as much again on the host while
    a `state()` is kept. The first batch fills it; `fill()` does so a chunk at a time, for who wants to stop in between.

    Args:
        source: of chunks of any size.
        n: tokens of a batch.
        size: tokens of the buffer, rounded up to whole batches.
        seed: of the order.
    """

    def __init__(self, source: Source, n: int, size: int, seed: int) -> None:
        self._fresh = Exact(source, n)
        self.n, self.size = n, -(-size // n) * n
        self._rng = torch.Generator().manual_seed(seed)
        self._buffer: Activations | None = None
        self.n_filled, self.full = 0, False  # tokens there, until there are `size`, or all that the source has
        self._order = torch.empty(0, dtype=torch.int64)  # places still to be visited in this round
        self._filling = True

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        while self.fill():
            pass
        if self._buffer is None:
            raise StopIteration
        if len(self._order) == 0:
            if not self._filling:
                raise StopIteration
            self._order = torch.randperm(len(self._buffer), generator=self._rng)
        fresh = next(self._fresh, None) if self._filling else None
        if fresh is None and self._filling:  # the source has ended: what the buffer holds leaves in one more order
            self._filling = False
            self._drain()
        places, self._order = self._order[: self.n], self._order[self.n :]
        if len(places) < self.n:
            self._order = self._order[:0]
            raise StopIteration
        batch = self._buffer.rows(places)
        if fresh is not None:
            _put(self._buffer, places, fresh)
        return batch

    def fill(self) -> bool:
        """Take one chunk of the source towards a full buffer; whether there was something to take."""
        if self.full:
            return False
        some = self._fresh.some(self.size - self.n_filled)
        if some is None:  # the source has ended
            self._buffer = None if self._buffer is None else self._buffer.rows(torch.arange(self.n_filled))  # a copy
            self.full = True
            return False
        if self._buffer is None:
            self._buffer = _room(some, self.size)
        _put(self._buffer, torch.arange(self.n_filled, self.n_filled + len(some)), some)
        self.n_filled += len(some)
        self.full = self.n_filled == self.size
        return True

    def look(self) -> Activations | None:
        """Some tokens of it, or of those that come first; None if there are none."""
        return self._fresh.look() if self._buffer is None else self._buffer

    def _drain(self) -> None:
        self._order = torch.randperm(len(self._buffer), generator=self._rng)

    def state(self) -> dict[str, Any]:
        """With the buffer itself: exact, at the price of its size. (To compute it anew would take all passes since the
        round before last, and a model that is still the same.) What is there while it fills counts as not given yet."""
        part = None if self.full or self._buffer is None else self._buffer.rows(slice(0, self.n_filled))
        return {
            "fresh": self._fresh.state(part),
            "buffer": packed(self._buffer if self.full else None),
            "order": self._order.clone(),
            "filling": self._filling,
            "rng": self._rng.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._fresh.restore(state["fresh"])
        self._buffer = unpacked(state["buffer"])
        self.full, self.n_filled = self._buffer is not None, 0 if self._buffer is None else len(self._buffer)
        self._order, self._filling = state["order"].clone(), bool(state["filling"])
        self._rng.set_state(state["rng"].cpu())


def _room(like: Activations, size: int) -> Activations:
    values = {name: value.new_empty(size, value.shape[1]) for name, value in like.values.items()}
    return Activations(values, None if like.ids is None else like.ids.new_empty(size))


def _put(buffer: Activations, places: torch.Tensor, fresh: Activations) -> None:
    for name, value in buffer.values.items():
        value.index_copy_(0, places.to(value.device, non_blocking=True), fresh.values[name])
    if buffer.ids is not None:
        buffer.ids.index_copy_(0, places, fresh.ids)


def packed(batch: Activations | None) -> dict[str, Any] | None:
    """A batch as plain values and tensors on the host: copies, so that what comes next does not change them."""
    if batch is None:
        return None
    values = {name: value.to("cpu", copy=True) for name, value in batch.values.items()}
    devices = {name: str(value.device) for name, value in batch.values.items()}
    return {"values": values, "devices": devices, "ids": None if batch.ids is None else batch.ids.clone()}


def unpacked(state: dict[str, Any] | None) -> Activations | None:
    """The batch again, copied to the devices it was on."""
    if state is None:
        return None
    values = {name: value.to(state["devices"][name], copy=True) for name, value in state["values"].items()}
    return Activations(values, None if state["ids"] is None else state["ids"].clone())
