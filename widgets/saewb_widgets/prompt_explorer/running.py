"""The model that a PromptExplorer runs: a twin of its own, watched block by block, so that a pass can be followed
and ended.

A thread does the work; `said` and `stop` are for the thread that shows the panel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import saewb


class Stopped(Exception):
    """The work was stopped: nobody waits for its result."""


@dataclass(eq=False)
class Work:
    """One thread's work on the model."""

    what: str  # shown while it runs
    n_layers: int
    n_done: int = 0  # blocks, over all its passes
    stopped: bool = False

    def tick(self) -> None:
        """Another block is computed."""
        if self.stopped:
            raise Stopped(self.what)
        self.n_done += 1

    def said(self) -> str:
        """How far it is."""
        if not self.n_done:
            return self.what
        passes, layer = divmod(self.n_done - 1, self.n_layers)
        return f"{self.what}: layer {layer + 1} of {self.n_layers}" + (f", pass {passes + 1}" if passes else "")


class Runner:
    """A twin of a model and what is being done with it."""

    def __init__(self, model: Any) -> None:
        self.model = saewb.models.shared_copy.shared_copy(model)
        self._mine = threading.local()
        self._works: dict[str, Work] = {}
        n = model.cfg.n_layers
        for layer in range(n):
            saewb.models.hook_points.resolve(self.model, f"blocks.{layer}.hook_resid_post").add(self._tick)

    def begun(self, key: str, what: str, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work`, for a thread to do; earlier work of this key ends at its next block.

        Args:
            key: which kind of work it is.
            what: shown while it runs.
            work: runs the model.
        """
        self.stop(key)
        mine = self._works[key] = Work(what, self.model.cfg.n_layers)

        def run() -> Any:
            self._mine.work = mine
            return work()

        return run

    def said(self, key: str) -> str:
        """How far the work of this key is."""
        return self._works[key].said()

    def stop(self, key: str) -> None:
        """End what is being done of this key, at the next block."""
        if key in self._works:
            self._works[key].stopped = True

    def _tick(self, activation: Any) -> None:
        if (work := getattr(self._mine, "work", None)) is not None:
            work.tick()
