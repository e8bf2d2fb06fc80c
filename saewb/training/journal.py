"""What a run notes as it goes: rows, notes and its end, for who looks at it, for its folder and for its sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from saewb.errors import explain
from saewb.training import Diverged, TrainStep
from saewb.training.loggers import Event, Sink, Sinks
from saewb.training.run_folder import RunFolder
from saewb.training.run_record import row_of


@final
class Journal:
    """The rows and notes of one run.

    Args:
        names: of its SAEs.
        folder: also written there; None keeps all in memory.
        sinks: also told.
        rows: of earlier sessions.
        state: gives the run's state at any time.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: RunFolder | None,
        sinks: Sequence[Sink],
        rows: Sequence[Mapping[str, Any]],
        state: Callable[[], str],
    ) -> None:
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]
        self.notes: list[str] = []
        self._names, self._folder, self._sinks, self._state = tuple(names), folder, Sinks(sinks), state
        self._warned: set[tuple[str, str]] = set()

    def tell(self, kind: str, done: tuple[int, int], row: Mapping[str, Any] | None = None) -> None:
        """Tell the sinks of an event, after `done` steps and tokens."""
        path = None if self._folder is None else self._folder.path
        self.notes += self._sinks.tell(Event(kind, *done, row or {}, path, self._names, self._state()))

    def log(self, step: TrainStep, seconds: float, lr: float) -> None:
        """Note a step, and what is wrong with its settings, each thing once.

        Raises:
            FloatingPointError: if the loss is no longer a number; `lr` is the learning rate to go below.
        """
        self._warn(step, lr)
        row = row_of(step, seconds)
        self.rows.append(row)
        if self._folder is not None:
            self._folder.log(row)
        self.tell("step", (step.step, step.n_tokens), row)

    def end(self, state: str, done: tuple[int, int], seconds: float, error: BaseException | None) -> None:
        """Note in the folder how the run ended."""
        if self._folder is None:
            return
        told = {"state": state, "step": done[0], "n_tokens": done[1], "seconds": round(seconds, 3)}
        told["error"] = "" if error is None else f"{type(error).__name__}: {error}"
        try:
            self._folder.end({**told, "notes": self.notes[-20:]})
        except OSError as wrong:  # a full disk, a folder that is gone
            self.notes.append(f"its folder does not tell how it ended: {type(wrong).__name__}: {wrong}")

    def _warn(self, step: TrainStep, lr: float) -> None:
        for name, warnings in step.warnings.items():
            for warning in warnings:
                if isinstance(warning, Diverged):
                    raise FloatingPointError(explain(f"{name!r} diverged: {warning}.", fix=f"lr={lr / 10:g}"))
                if (name, warning.name) not in self._warned:
                    self._warned.add((name, warning.name))
                    self.notes.append(f"{name}: {warning}")
