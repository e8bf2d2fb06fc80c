"""Read a finished, interrupted or running run from its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saewb._files import absolute, finish_replacing
from saewb.training.config import RunSpec
from saewb.training.run_display import RunRecord
from saewb.training.run_folder import CHECKPOINT, HISTORY, parse_rows, read_end, read_spec


@dataclass(frozen=True, eq=False, repr=False)
class PastRun(RunRecord):
    """A run as read from its folder, without a lock: its spec, history and state."""

    folder: Path
    """Folder of the run."""
    spec: RunSpec
    """Which SAEs are trained, and how."""
    rows: tuple[Mapping[str, Any], ...]
    """History: one row per logged step."""
    state: str
    """Finished, stopped, failed or running; interrupted (its process died); unfinished (running or interrupted)."""
    error: str = ""
    """Error that it failed with."""
    notes: tuple[str, ...] = ()
    """Last `run.notes`, once it has ended."""
    _offset: tuple[int, int] = (0, 0)
    """Inode of the history file, and number of its bytes read."""

    @property
    def frac(self) -> float:
        """Fraction of all steps that is logged."""
        return self.rows[-1]["step"] / self.spec.train.n_steps if self.rows else 0.0

    @property
    def before_first_step(self) -> bool:
        """Whether it is running and has not logged a step, e.g. while it fills its shuffle buffer."""
        return self.state == "running" and not self.rows

    def again(self) -> PastRun:
        """Read the run anew; of the history, only added rows are read.

        Raises:
            FileNotFoundError, FormatError: as `read_run`.
        """
        return _read(self.folder, self)

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint that `saewb.resume_run` continues from."""
        return (self.folder / CHECKPOINT).is_file()

    def __repr__(self) -> str:
        n_tokens = self.rows[-1]["n_tokens"] if self.rows else 0
        where = "before its first step" if self.before_first_step else f"{n_tokens:,} tokens"
        return f"PastRun({self.folder.name}, {self.state}, {where}, {', '.join(self.names)})"


def read_run(folder: str | Path) -> PastRun:
    """Read a run from its folder alone; it may have ended, or be running in another process.

    Args:
        folder: as for `saewb.train`.

    Returns:
        A PastRun: spec, history and state.

    Raises:
        FileNotFoundError: if there is no run.
        FormatError: if its files are damaged, or not from saewb.

    Example:
        >>> read_run("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no run in '...nowhere'.
          want: a folder with run.json
    """
    path = absolute(folder)
    finish_replacing(path / CHECKPOINT)
    return _read(path)


def _read(path: Path, before: PastRun | None = None) -> PastRun:
    spec, end = read_spec(path), read_end(path)  # the end first, so that no row is written after it
    rows, offset = _read_rows(path / HISTORY, before)
    return PastRun(path, spec, rows, end["state"], end["error"], tuple(end["notes"]), offset)


def _read_rows(history: Path, before: PastRun | None) -> tuple[tuple[Mapping[str, Any], ...], tuple[int, int]]:
    """Read the rows added since `before`; a resumed run has a new history file, which is read from its start."""
    if not history.is_file():
        return (), (0, 0)
    rows, (inode, n_bytes) = ((), (0, 0)) if before is None else (before.rows, before._offset)
    with history.open("rb") as file:
        status = os.fstat(file.fileno())
        if inode != status.st_ino or n_bytes > status.st_size:
            rows, n_bytes = (), 0
        file.seek(n_bytes)
        new_rows, n_added = parse_rows(history, file.read(), len(rows))
    return (*rows, *new_rows), (status.st_ino, n_bytes + n_added)
