"""Lock of a model: who adds hooks to it, runs it and removes them again.

A lock that an interrupt (Ctrl-C) can leave taken would make every other thread wait for ever, and no code in Python can
exclude that: an interrupt may be raised on the way into `__exit__` itself. So a hold of this lock knows the function
that took it, and is over at the latest when that function is.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import final

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_MISSES = 3
"""How often in a row a waiting thread must not see the function of a hold before that hold is over."""


@dataclass(eq=False)
class _Hold:
    """One of the holds of the thread that has the lock."""

    thread: int
    owner: int | None = None
    """`id` of the object it belongs to, which may end it from any function."""
    function: FrameType | None = None
    """Function that took it; None if it is ended by `release` or `drop` alone."""
    until: float | None = None
    """When it ends by itself, on the monotonic clock."""
    misses: int = 0

    def is_over(self, stack: set[FrameType] | None) -> bool:
        """Whether it ended without a release; `stack` are the functions its thread runs, None if it has ended."""
        if stack is None or (self.until is not None and time.monotonic() > self.until):
            return True
        # One miss proves nothing: the thread goes on while its stack is read.
        self.misses = 0 if self.function is None or self.function in stack else self.misses + 1
        return self.misses >= _MISSES


@final
class ModelLock:
    """Re-entrant lock, as `threading.RLock`, for `with` blocks.

    `__enter__` and `__exit__` belong into one function (or generator, or context manager used in one): when that
    function is over the block is, also if an interrupt skipped `__exit__`.

    Example:
        >>> lock = ModelLock()
        >>> with lock, lock:
        ...     lock.is_mine
        True
        >>> lock.is_mine
        False
    """

    def __init__(self) -> None:
        # Holds in force, all of the thread of the first one, then those that wait, in order of arrival. Each change is
        # one call of a list's method: there is no inner lock that an interrupt could leave taken.
        self._queue: list[_Hold] = []

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return self._is_first(threading.get_ident())

    def __enter__(self) -> ModelLock:
        self._take(_Hold(threading.get_ident(), function=calling_function()))
        return self

    def __exit__(self, *exception: object) -> None:
        function = calling_function()
        self._end(lambda hold: hold.owner is None and hold.function is function)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it, until `release`; False if another thread has it for longer than `timeout` seconds."""
        limit = None if blocking and timeout < 0 else max(0.0, timeout) if blocking else 0.0
        return self._take(_Hold(threading.get_ident()), limit)

    def release(self) -> None:
        """End the last `acquire` of this thread.

        Raises:
            RuntimeError: if there is none.
        """
        if not self._end(lambda hold: hold.owner is None and hold.function is None):
            raise RuntimeError("cannot release a lock that this thread has not acquired")

    def enter(self, owner: object) -> None:
        """Take it for an object, until `drop`, or until the calling function is over."""
        self._take(_Hold(threading.get_ident(), id(owner), calling_function(2)))

    def reserve(self, owner: object, seconds: float) -> None:
        """Take it for an object, until `drop`, but no longer than so many seconds."""
        self._take(_Hold(threading.get_ident(), id(owner), until=time.monotonic() + seconds))

    def drop(self, owner: object) -> None:
        """End all holds of an object, of whichever thread."""
        self._remove([hold for hold in list(self._queue) if hold.owner == id(owner)])

    def _is_first(self, thread: int) -> bool:
        soon = time.monotonic() + 0.1  # a reservation that is about to end is no ground for another hold
        first = next(iter(list(self._queue)), None)
        return first is not None and first.thread == thread and (first.until is None or first.until > soon)

    def _take(self, hold: _Hold, timeout: float | None = None) -> bool:
        if self._is_first(hold.thread):
            self._queue.insert(0, hold)
            return True
        until, pause = None if timeout is None else time.monotonic() + timeout, 0.0005
        self._remove([other for other in list(self._queue) if other.thread == hold.thread])  # left by an interrupt
        try:
            self._queue.append(hold)
            while (first := self._queue[0]) is not hold:
                if first.is_over(running_functions(first.thread)):
                    self._remove([first])
                    continue
                if until is not None and time.monotonic() >= until:
                    self._remove([hold])
                    return False
                time.sleep(pause)
                pause = min(0.01, 2 * pause)
        except BaseException:
            self._remove([hold])
            raise
        return True

    def _remove(self, holds: list[_Hold]) -> None:
        for hold in holds:
            with suppress(ValueError):  # another thread has seen that it is over
                self._queue.remove(hold)

    def _end(self, which: Callable[[_Hold], bool]) -> bool:
        """End the latest hold of this thread that is meant; whether there is one."""
        for hold in list(self._queue):
            if hold.thread == threading.get_ident() and which(hold):
                self._remove([hold])
                return True
        return False


def calling_function(depth: int = 1) -> FrameType | None:
    """The function that called the one that asks; of a generator or context manager, the one that runs it."""
    frame = sys._getframe(depth + 1)
    while frame is not None and (frame.f_code.co_flags & _GENERATOR or frame.f_globals.get("__name__") == "contextlib"):
        frame = frame.f_back
    return frame


def running_functions(thread: int) -> set[FrameType] | None:
    """The functions that a thread runs; None if it has ended."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    stack = set()
    while frame is not None:
        stack.add(frame)
        frame = frame.f_back
    return stack
