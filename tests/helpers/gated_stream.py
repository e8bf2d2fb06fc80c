"""Activations that come one chunk at a time, when a test lets them through: nothing is timed."""

import threading

import torch

from saewb.data.stream import ActivationStream, stream_iterable

PATIENCE = 30  # seconds, after which a test that hangs fails


class Gated:
    """Chunks of 40 tokens: `asked` says when the next one is wanted, `let()` gives it."""

    def __init__(self, n: int = 1000) -> None:
        self._n, self._permits, self._asked = n, threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self):
        rng = torch.Generator().manual_seed(0)
        for _ in range(self._n):
            self._asked.release()
            assert self._permits.acquire(timeout=PATIENCE), "nobody lets it through"
            yield torch.randn(40, 8, generator=rng)

    def let(self, n: int = 1) -> None:
        """Give the next `n` chunks."""
        for _ in range(n):
            self._permits.release()

    def until_asked(self, n: int = 1) -> None:
        """Wait until `n` more chunks have been asked for: all before the last one have been dealt with."""
        for _ in range(n):
            assert self._asked.acquire(timeout=PATIENCE), "nobody asks"

    @property
    def wanted(self) -> bool:
        """Whether a chunk has been asked for since."""
        return self._asked.acquire(blocking=False)

    def stream(self, batch_tokens: int = 40, buffer_tokens: int = 200, prefetch: int = 2) -> ActivationStream:
        """In batches of one chunk, mixed."""
        return stream_iterable(self, batch_tokens=batch_tokens, buffer_tokens=buffer_tokens, prefetch=prefetch)
