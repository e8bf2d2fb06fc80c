"""How a CorrelationPanel looks at one matrix or two: what is in view at once, finer, and all of it bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

PIXELS = 384  # cells a side that are sent, at most
AT_ONCE = 2048  # features up to which it takes no thread
_CALM = 0.4  # seconds without a question before a scan goes on, so that zooming is quick meanwhile


def views(seen: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """Of each overview, in the same cells; only of the first while the second has no such cells."""
    made = [one.view(window, PIXELS, cells) for one in seen]
    if len({(view.step, view.cells) for view in made}) == 1:
        return made
    small = span(window) <= AT_ONCE
    return finer(seen, window, cells) if small else made[:1]


def finer(seen: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """The same, made of all entries of the window."""
    return [one.refined(window, PIXELS, cells) for one in seen]


def worth_it(seen: Sequence[Any], window: tuple) -> bool:
    """Whether a window can be made finer in seconds: a larger one is the scan's."""
    return span(window) <= PIXELS * max(one.step for one in seen)


def look_through(seen: Sequence[Any], stop: Event, asked_at: Callable[[], float]) -> None:
    """Scan all, giving way to whoever asks meanwhile.

    Args:
        seen: overviews.
        stop: ends it between two bands.
        asked_at: when somebody last asked, by `time.monotonic`.
    """
    for one in seen:
        for _ in one.scan():
            while time.monotonic() - asked_at() < _CALM and not stop.is_set():
                time.sleep(0.05)
            if stop.is_set():
                return


def span(window: tuple) -> int:
    """Of its longer side."""
    return max(window[1] - window[0], window[3] - window[2])
