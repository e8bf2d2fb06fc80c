"""The next batches computed by a thread while the consumer works on this one."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, final

from saewb.data.shuffle_buffer import Source, packed, unpacked
from saewb.errors import explain
from saewb.models.capture import Activations


class _End:
    """What the thread leaves as its last word: the source ended, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Channel:
    """What thread and consumer share. Holds no reference to the consumer, so that a forgotten one can be collected."""

    def __init__(self, source: Source, depth: int) -> None:
        self.source, self.depth = source, depth
        self.ready: deque[Activations | _End] = deque()
        self.change = threading.Condition()
        self.busy = self.held = self.closed = False
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.work, name="saewb-prefetch", daemon=True)
        self.thread.start()

    def work(self) -> None:
        while self._turn():
            try:
                item = next(self.source)
            except StopIteration:
                item = _End(None)
            except BaseException as error:  # told to the consumer, where it belongs
                item = _End(error)
            with self.change:
                self.busy = False
                self.ready.append(item)
                self.change.notify_all()
            if isinstance(item, _End):
                return
            del item

    def _turn(self) -> bool:
        """Wait for room; whether to compute another batch."""
        with self.change:
            self.change.wait_for(lambda: self.closed or not (self.held or len(self.ready) >= self.depth))
            self.busy = not self.closed
            return self.busy

    def end(self) -> None:
        """Tell the thread to end, and do not wait: whoever forgets a stream may hold a lock that it is after."""
        with self.change:
            self.closed = True
            self.change.notify_all()


@final
class Prefetched:
    """The batches of a source in its order, up to `depth` of them computed ahead in a daemon thread.

    The thread starts with the first batch asked for. What goes wrong in it is raised where the next batch is asked for,
    after the batches before it. It ends with the source, with `close()`, when this object is forgotten, and at exit.

    Memory: `depth` batches.

    Args:
        source: from now on to be used through this object only.
        depth: batches computed ahead, at least 1.
    """

    def __init__(self, source: Source, depth: int) -> None:
        if depth < 1:
            raise ValueError(explain(f"got prefetch={depth}.", want="1 or more batches, or 0 for no thread"))
        self._source, self._depth = source, depth
        self._channel = _Channel(source, depth)
        self._finalizer = weakref.finalize(self, self._channel.end)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        channel = self._channel
        with channel.change:
            if channel.closed:
                raise StopIteration
            if channel.thread is None:
                channel.start()
            channel.change.wait_for(lambda: channel.ready or channel.closed)
            if not channel.ready:
                raise StopIteration
            item = channel.ready[0]
            if isinstance(item, _End):  # stays, so that asking again gives the same answer
                raise StopIteration if item.error is None else item.error
            channel.ready.popleft()
            channel.change.notify_all()
            return item

    @property
    def started(self) -> bool:
        """Whether the thread has been started: a batch has been asked for."""
        return self._channel.thread is not None

    def state(self) -> dict[str, Any]:
        """As of the last batch given: with the batches that are ready, and the source behind them, at rest."""
        channel = self._channel
        with channel.change:
            channel.held = True
            try:
                channel.change.wait_for(lambda: not channel.busy)
                ahead = [packed(item) for item in channel.ready if not isinstance(item, _End)]
                return {"source": self._source.state(), "ahead": ahead}
            finally:
                channel.held = False
                channel.change.notify_all()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.close()
        self._source.restore(state["source"])
        self._channel = _Channel(self._source, self._depth)
        self._channel.ready.extend(unpacked(item) for item in state["ahead"])
        self._finalizer = weakref.finalize(self, self._channel.end)

    def close(self) -> None:
        """End the thread; waits for the batch it is at."""
        self._finalizer()
        if self._channel.thread not in (None, threading.current_thread()):
            self._channel.thread.join()
