"""A training that runs in the background: a daemon thread that steps, logs, and keeps checkpoints.

1. Between two steps the thread lets others in: pausing, stopping, exporting, reading. A step is never interrupted.
2. It runs the same weights through hook points of its own (`saewb.models.shared_copy.shared_copy`), so other cells use the model at any
   time, and neither sees the other's hooks.
3. On every way out (the end, `stop()`, an exception, the interpreter's exit) a checkpoint is written, if the run has a
   folder. An interrupt (Ctrl-C, the notebook's stop button) reaches the main thread alone: in `wait()` it stops the run
   cleanly, in another cell it does nothing to it. There are no signal handlers; a script that wants a checkpoint on
   SIGTERM calls `saewb.training.run_record.exit_on_sigterm()`.
4. Nothing is printed. What went wrong is in `run.error`, what is worth knowing in `run.notes`.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, final

from saewb.data.stream import ActivationStream
from saewb.distributed import ALONE, Team
from saewb.errors import explain
from saewb.training import Training, TrainStep
from saewb.training.journal import Journal
from saewb.training.loggers import Sink
from saewb.training.memory import MemoryEstimate
from saewb.training.past_run import code_of, frame_of
from saewb.training.run_display import Pace, Progress, line, page, run_up
from saewb.training.run_folder import RunFolder
from saewb.training.run_record import RunOptions, before_failed_step, out_of_memory

if TYPE_CHECKING:
    import pandas as pd

RunState = Literal["running", "paused", "stopped", "finished", "failed"]

_live: weakref.WeakSet[Run] = weakref.WeakSet()  # to be stopped when the interpreter exits


@final
class Run:
    """A training in the background; made by `saewb.train` and `saewb.resume_run`.

    All of it at any time, from any thread. `run.memory` is the estimate before it started.
    """

    def __init__(
        self,
        training: Training,
        stream: ActivationStream,
        *,
        places: Mapping[str, str],
        finish: Callable[[Any], Any],
        folder: RunFolder | None,
        options: RunOptions,
        sinks: Sequence[Sink],
        memory: MemoryEstimate,
        facts: Mapping[str, Any],
        layers: tuple[int | None, int | None],
        rows: Sequence[Mapping[str, Any]] = (),
        seconds: float = 0.0,
        team: Team = ALONE,
    ) -> None:
        self.memory, self._team = memory, team
        self.error: BaseException | None = None
        self._training, self._stream, self._places, self._finish = training, stream, dict(places), finish
        self._folder, self._options, self._facts = folder, options, facts
        self._journal = Journal(list(places), folder, sinks, rows, lambda: self.state)
        self._rows, self.notes = self._journal.rows, self._journal.notes
        self._layers, self._config = layers, training.config
        self._gate = threading.Condition(threading.RLock())  # held during a step, and by whoever comes in between
        self._waiting, self._ended = 0, threading.Event()
        self._paused, self._stopping = False, False
        self._final: RunState | None = None
        self._saes: dict[str, Any] | None = None
        self._done = self._from = (training.n_steps, training.n_tokens)
        self._run_up = run_up(stream.filling, training.ahead)
        self._seconds = seconds  # of work, without pauses, over all sessions
        self._pace = Pace()
        self._thread = threading.Thread(target=self._work, name="saewb-train", daemon=True)
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        _live.add(self)
        self._thread.start()

    # -- control -----------------------------------------------------------------------------------------------------

    def pause(self) -> Run:
        """Rest after the step under way, or the forward pass before the first one; returns when it does."""
        with self._between():
            self._paused = True
        return self

    def resume(self) -> Run:
        """Go on after `pause()`.

        Raises:
            RuntimeError: if the run has ended.
        """
        if self._final is not None:
            fix = f"saewb.resume_run({str(self.folder)!r}, model=model, tokens=tokens)" if self.folder else ""
            raise RuntimeError(explain(f"{self!r} has ended.", want="a run that is paused", fix=fix))
        with self._between():
            self._paused = False
            self._pace = Pace()
        return self

    def stop(self) -> Run:
        """End after the step under way, with a checkpoint; returns when that is done. One that ended stays so.

        Before the first step: after the forward pass under way, and then there is no SAE.
        """
        self._stopping = True
        with self._between():
            pass
        self._join(None)
        return self

    def wait(self, timeout: float | None = None) -> Run:
        """Block until the run has ended, or for `timeout` seconds.

        Raises:
            KeyboardInterrupt: on an interrupt, after the run was stopped cleanly and its checkpoint written. A second
                one does not wait for that.
            Exception: what the run failed of.
        """
        try:
            self._join(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        if self.error is not None:
            raise self.error
        return self

    def _join(self, timeout: float | None) -> None:
        """Waits for an Event: an interrupt in `Thread.join` makes Pythons before 3.13 believe that the thread ended."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        if threading.current_thread() is not self._thread:
            while not self._ended.wait(min(0.2, max(0.0, until - time.monotonic()))):  # in pieces, to be interruptible
                if time.monotonic() >= until:
                    return
            self._thread.join()

    # -- to look at --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """running, paused, stopped, finished or failed."""
        return self._final or ("paused" if self._paused else "running")

    @property
    def progress(self) -> Progress:
        """How far it is, how fast, and which layers of the model run."""
        (step, n_tokens), ahead, speed = self._done, self._run_up, None if self._final else self._pace.speed()
        left = None if speed is None or ahead else (self._config.n_steps - step) * self._config.batch_tokens / speed
        total = self._config.n_steps * self._config.batch_tokens
        return Progress(self.state, step, self._config.n_steps, n_tokens, total, speed, left, *self._layers, ahead)

    @property
    def history(self) -> pd.DataFrame:
        """A row per logged step; with several SAEs their columns begin with their names. Also in `history.jsonl`."""
        return frame_of(self._rows)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The history as plain values, without pandas."""
        return tuple(self._rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its SAEs."""
        return tuple(self._places)

    @property
    def code(self) -> str:
        """The cell that starts an equal run; needs `model` and `tokens` (and `held_out`, if it measures on them)."""
        return code_of(self._facts, self._rows)

    @property
    def saes(self) -> dict[str, Any]:
        """The SAEs so far, by name: copies, in the model's units, proved to do what training does.

        Raises a RuntimeError if the run was stopped before there were any.
        """
        if self._saes is not None:
            return dict(self._saes)
        with self._between():
            return dict(self._saes) if self._saes is not None else self._exported()

    @property
    def sae(self) -> Any:
        """The one SAE, so far.

        Raises:
            ValueError: if several are trained.
        """
        if len(self._places) != 1:
            want, what = ", ".join(map(repr, self._places)), f"this run trains {len(self._places)} SAEs."
            raise ValueError(explain(what, want=want, fix="run.saes[name]"))
        return next(iter(self.saes.values()))

    @property
    def folder(self) -> Any:
        """Where it is kept, or None."""
        return None if self._folder is None else self._folder.path

    def checkpoint(self) -> Run:
        """Write a checkpoint now, between two steps; of several processes, the first does.

        Raises:
            ValueError: if the run has no folder, or has ended.
        """
        if not self._team.leads:
            return self
        if self._folder is None or self._final is not None:
            what = f"{self!r} has nothing to write."
            raise ValueError(explain(what, want="a run with a folder", fix="folder='runs/a'"))
        with self._between():
            self._keep()
        return self

    def __repr__(self) -> str:
        return line(self.progress, list(self._places.values()))

    def _repr_html_(self) -> str:
        last = self._rows[-1] if self._rows else {}
        error = [] if self.error is None else [f"{type(self.error).__name__}: {self.error}"]
        return page(self.progress, self._places, last, [*self.notes, *error])

    # -- the thread --------------------------------------------------------------------------------------------------

    @contextmanager
    def _between(self) -> Iterator[None]:
        self._waiting += 1  # the thread gives way to those who wait
        with self._gate:
            self._waiting -= 1
            try:
                yield
            finally:
                self._gate.notify_all()

    def _work(self) -> None:
        error: BaseException | None = None
        self._journal.tell("begin", self._done, self._facts)
        try:
            steps = iter(self._training)
            while self._runs_up():
                pass
            while (step := self._next(steps)) is not None:
                self._after(step)
        except BaseException as caught:  # a thread that died must not look like one that runs
            error = out_of_memory(caught, self._done[0] + 1, self._config.batch_tokens, self.memory)
        self._end(error)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._gate:
            self._gate.wait_for(lambda: self._stopping or not (self._paused or self._waiting))
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began

    def _runs_up(self) -> bool:
        """A forward pass, or a batch, of what the first step needs; whether it needs more."""
        with self._turn():
            more = not self._stopping and self._training.read_ahead(self._stream.fill)
            now = run_up(self._stream.filling, self._training.ahead)
            self._pace = self._pace if now and self._run_up and now.what == self._run_up.what else Pace()
            if now:
                self._pace.note(now.n_tokens)
            self._run_up = now
            return more

    def _next(self, steps: Iterator[TrainStep]) -> TrainStep | None:
        with self._turn():
            step = None if self._team.any(self._stopping) else next(steps, None)
            if step is not None:
                self._done = (step.step, step.n_tokens)
                self._pace.note(step.n_tokens)
            return step

    def _after(self, step: TrainStep) -> None:
        last = step.step == self._config.n_steps
        measured = any(figures.held_out is not None for figures in step.saes.values())
        if step.step == 1 or last or measured or step.step % self._options.log_every_steps == 0:
            self._journal.log(step, self._seconds, self._config.lr)
        every = self._options.checkpoint_every_tokens
        due = every is not None and step.n_tokens // every > (step.n_tokens - self._config.batch_tokens) // every
        if due and not last and self._team.leads:
            with self._gate:
                try:
                    self._keep()
                except OSError as error:  # e.g. a full disk: the checkpoint before is whole, training need not stop
                    self.notes.append(f"no checkpoint at {step.n_tokens:,} tokens: {type(error).__name__}: {error}")

    def _exported(self) -> dict[str, Any]:
        if self._training is None:
            raise RuntimeError(explain(f"{self!r} has no SAE.", want="a run that came to its first step"))
        return {name: self._finish(sae) for name, sae in self._training.saes.items()}

    def _keep(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write a checkpoint. SAEs first: if one cannot be proved, the checkpoint before stays in its place."""
        saes = self._exported()
        state = {"training": self._training.state() if state is None else state, "seconds": self._seconds}
        self._folder.checkpoint(state, saes, self._done[1] if self._options.keep_saes else None)
        self._journal.tell("checkpoint", self._done)
        return saes

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._team.leave()  # the others must not wait for this process
        with self._gate:
            try:
                if error is None or self._done[0] > 0:
                    self._last(error)
            except BaseException as caught:
                error = error or out_of_memory(caught, self._done[0] + 1, self._config.batch_tokens, self.memory)
                if error is not caught:
                    self.notes.append(f"no last checkpoint: {type(caught).__name__}: {caught}")
            self.error, finished = error, self._done[0] >= self._config.n_steps
            final: RunState = "failed" if error is not None else "finished" if finished else "stopped"
            self._journal.end(final, self._done, self._seconds, error)
            self._final = final  # after the folder, for who waits for it and then reads there
        self._journal.tell("end", self._done)
        if self._folder is not None:
            self._folder.close()
        self._stream.close()
        if self._saes is not None or error is None:
            self._training = self._stream = None  # weights, moments and buffers go; the SAEs stay
        _live.discard(self)
        self._ended.set()

    def _last(self, error: BaseException | None) -> None:
        if self._done[0] == 0 and self._training.ahead is not None:  # stopped before there were weights
            return
        if self._folder is None or self._done == self._from or isinstance(error, FloatingPointError):
            self._saes = self._exported()  # a checkpoint that there was stays
            return
        half = error is not None and not self._stream.failed
        self._saes = self._keep(before_failed_step(self._training, self._stream) if half else None)


def _at_exit() -> None:
    for run in list(_live):
        run.stop()
