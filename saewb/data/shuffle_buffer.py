"""Buffers that rebatch variable-size activation chunks into fixed-size batches, in order or shuffled.

`ShuffleBuffer` works in rounds over B slots:

1. Each round visits every slot once, in a random order.
2. A batch takes the tokens of the next slots and writes fresh tokens of the source into them.
3. When the source ends, what is left leaves in one more random order.

A token that came in during one round thus leaves at a random moment of the next: a batch is a uniform sample of B
tokens, and every step costs the same (a buffer that is refilled by halves stalls at each refill).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, final

import torch
from torch import Tensor

from saewb.errors import explain
from saewb.models.capture import Activations, concatenate


class Source(Protocol):
    """A resumable iterator of Activations in chunks of any size."""

    def __iter__(self) -> Iterator[Activations]: ...

    def __next__(self) -> Activations: ...

    def state(self) -> dict[str, Any]:
        """Position in the data: numbers, strings, lists and tensors."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        ...


@final
class FifoBuffer:
    """The tokens of a source in order, in batches of exactly `batch_tokens`; an incomplete last batch is dropped."""

    def __init__(self, source: Source, batch_tokens: int) -> None:
        if batch_tokens < 1:
            raise ValueError(explain(f"got batch_tokens={batch_tokens}.", want="1 or more", fix="batch_tokens=4096"))
        self._source, self.batch_tokens = source, batch_tokens
        self._pending: list[Activations] = []

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return self.take(self.batch_tokens)

    def take(self, n: int) -> Activations:
        """The next `n` tokens; StopIteration if fewer are left."""
        n_pending = sum(map(len, self._pending))
        while n_pending < n:
            chunk = next(self._source)
            self._pending.append(chunk)
            n_pending += len(chunk)
        return self._pop(n)

    def take_up_to(self, n: int) -> Activations | None:
        """1 to `n` of the next tokens, for which at most one chunk is computed; None at the end."""
        first = self.peek()
        return None if first is None else self._pop(min(n, len(first)))

    def peek(self) -> Activations | None:
        """One or more of the next tokens, without taking them; None at the end."""
        while not self._pending:
            chunk = next(self._source, None)
            if chunk is None:
                return None
            self._pending += [chunk] if len(chunk) else []
        return self._pending[0]

    def _pop(self, n: int) -> Activations:
        parts = []
        while n > 0:
            first = self._pending.pop(0)
            if len(first) > n:
                self._pending.insert(0, first.rows(slice(n, None)))
                first = first.rows(slice(0, n))
            parts.append(first)
            n -= len(first)
        return concatenate(parts)

    def state(self, returned: Activations | None = None) -> dict[str, Any]:
        """Position of the source and the pending tokens, after those `returned` that count as not taken."""
        pending = [part for part in (returned, *self._pending) if part is not None]
        return {"source": self._source.state(), "left": batch_state(concatenate(pending) if pending else None)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._source.restore(state["source"])
        pending = batch_from_state(state["left"])
        self._pending = [] if pending is None else [pending]


@final
class ShuffleBuffer:
    """The tokens of a source in batches of exactly `batch_tokens`, shuffled over `size` tokens; each token once.

    Memory: `size` tokens, allocated once, on the device and in the dtype of the source; as much again on the host while
    a `state()` is kept. The first batch fills the buffer; `fill()` does so chunk by chunk.

    Args:
        source: of chunks of any size.
        batch_tokens: tokens per batch.
        size: tokens in the buffer, rounded up to whole batches.
        seed: of the order.
    """

    def __init__(self, source: Source, batch_tokens: int, size: int, seed: int) -> None:
        self._fresh = FifoBuffer(source, batch_tokens)
        self.batch_tokens, self.size = batch_tokens, -(-size // batch_tokens) * batch_tokens
        self._rng = torch.Generator().manual_seed(seed)
        self._buffer: Activations | None = None
        self.n_filled, self.full = 0, False  # full: `size` tokens, or all that the source has
        self._order = torch.empty(0, dtype=torch.int64)  # slots still to be visited in this round
        self._source_has_more = True

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        while self.fill():
            pass
        if self._buffer is None or (len(self._order) == 0 and not self._source_has_more):
            raise StopIteration
        if len(self._order) == 0:
            self._order = self._new_order()
        fresh = next(self._fresh, None) if self._source_has_more else None
        if fresh is None and self._source_has_more:  # the source has just ended
            self._source_has_more, self._order = False, self._new_order()
        slots, self._order = self._order[: self.batch_tokens], self._order[self.batch_tokens :]
        if len(slots) < self.batch_tokens:
            self._order = self._order[:0]
            raise StopIteration
        batch = self._buffer.rows(slots)
        if fresh is not None:
            _write_rows(self._buffer, slots, fresh)
        return batch

    def fill(self) -> bool:
        """Take one chunk of the source towards a full buffer; whether there was something to take."""
        if self.full:
            return False
        chunk = self._fresh.take_up_to(self.size - self.n_filled)
        if chunk is None:  # the source has ended: copy what it gave, so that the rest of the buffer is freed
            self._buffer = None if self._buffer is None else self._buffer.rows(torch.arange(self.n_filled))
            self.full = True
            return False
        if self._buffer is None:
            self._buffer = _allocate(chunk, self.size)
        _write_rows(self._buffer, torch.arange(self.n_filled, self.n_filled + len(chunk)), chunk)
        self.n_filled += len(chunk)
        self.full = self.n_filled == self.size
        return True

    def peek(self) -> Activations | None:
        """Some tokens of the buffer or of the next chunk, without taking them; None if there are none."""
        return self._fresh.peek() if self._buffer is None else self._buffer

    def _new_order(self) -> Tensor:
        return torch.randperm(len(self._buffer), generator=self._rng)

    def state(self) -> dict[str, Any]:
        """Position, with the buffer itself.

        Exact, at the price of its size: recomputing the buffer would take every pass since the round before last, and
        a model that has not changed. A buffer that is not full yet is saved as pending tokens of the source.
        """
        filled = None if self.full or self._buffer is None else self._buffer.rows(slice(0, self.n_filled))
        return {
            "fresh": self._fresh.state(filled),
            "buffer": batch_state(self._buffer if self.full else None),
            "order": self._order.clone(),
            "filling": self._source_has_more,
            "rng": self._rng.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._fresh.restore(state["fresh"])
        self._buffer = batch_from_state(state["buffer"])
        self.full, self.n_filled = self._buffer is not None, 0 if self._buffer is None else len(self._buffer)
        self._order, self._source_has_more = state["order"].clone(), bool(state["filling"])
        self._rng.set_state(state["rng"].cpu())


def _allocate(like: Activations, size: int) -> Activations:
    values = {name: value.new_empty(size, value.shape[1]) for name, value in like.values.items()}
    return Activations(values, None if like.ids is None else like.ids.new_empty(size))


def _write_rows(buffer: Activations, slots: Tensor, fresh: Activations) -> None:
    for name, value in buffer.values.items():
        value.index_copy_(0, slots.to(value.device, non_blocking=True), fresh.values[name])
    if buffer.ids is not None:
        buffer.ids.index_copy_(0, slots, fresh.ids)


def batch_state(batch: Activations | None) -> dict[str, Any] | None:
    """A batch as plain values and tensors on the host: copies, which later steps do not change."""
    if batch is None:
        return None
    values = {name: value.to("cpu", copy=True) for name, value in batch.values.items()}
    devices = {name: str(value.device) for name, value in batch.values.items()}
    return {"values": values, "devices": devices, "ids": None if batch.ids is None else batch.ids.clone()}


def batch_from_state(state: dict[str, Any] | None) -> Activations | None:
    """The batch of a `batch_state`, copied to the devices it was on."""
    if state is None:
        return None
    values = {name: value.to(state["devices"][name], copy=True) for name, value in state["values"].items()}
    return Activations(values, None if state["ids"] is None else state["ids"].clone())
