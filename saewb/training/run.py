"""Training in the background: a daemon thread that steps, logs, and writes checkpoints.

1. Between two steps other threads can take the lock: to pause, stop, export, read. A step is never interrupted.
2. The run has its own hook points on the same weights (`saewb.models.shared_copy`), so other cells can use the model
   at any time, and hooks on one do not affect the other.
3. However it ends (last step, `stop()`, an exception, the interpreter's exit), a checkpoint is written, if the run has
   a folder. An interrupt (Ctrl-C, the notebook's stop button) reaches the main thread alone: in `wait()` it stops the
   run cleanly, in another cell it does not affect it. There are no signal handlers; a script that needs a checkpoint
   on SIGTERM calls `saewb.training.run.exit_on_sigterm()`.
4. Nothing is printed. The error is in `run.error`, warnings in `run.notes`.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, final

from saewb.data.stream import ActivationStream
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain
from saewb.kernels.threads import sleep_while_contended
from saewb.models.hook_points import split_head
from saewb.sae.sae import SAE
from saewb.training import Diverged, Training, TrainStep
from saewb.training.config import RunSpec
from saewb.training.loggers import Event, Logger
from saewb.training.memory import MemoryEstimate
from saewb.training.run_display import (
    DENSITY_COUNTS,
    Pace,
    Progress,
    RunRecord,
    run_html,
    run_repr,
)
from saewb.training.run_folder import RunFolder
from saewb.training.step_metrics import RunUp

RunState = Literal["running", "paused", "stopped", "finished", "failed"]

_live: weakref.WeakSet[Run] = weakref.WeakSet()  # runs to stop when the interpreter exits


@final
class Run(RunRecord):
    """A training run in the background, started by `saewb.train` or `saewb.resume_run`.

    Any thread may use it at any time. `run.spec` describes the training, `run.memory` is its memory estimate.
    """

    def __init__(
        self,
        training: Training,
        stream: ActivationStream,
        spec: RunSpec,
        *,
        memory: MemoryEstimate,
        folder: RunFolder | None = None,
        loggers: Sequence[Logger] = (),
        layers: tuple[int | None, int | None] = (None, None),
        rows: Sequence[Mapping[str, Any]] = (),
        seconds: float = 0.0,
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self.spec, self.memory = spec, memory
        self.error: BaseException | None = None
        if parallel.size > 1:
            training.begin()
        if not parallel.is_main:
            folder, loggers = None, ()
        self._training, self._stream, self._folder, self._parallel = training, stream, folder, parallel
        self._layers, self._config = layers, training.config
        self._log = _RunLog(tuple(spec.saes), folder, loggers, rows, lambda: self.state)
        self.notes = self._log.notes
        self._lock = threading.Condition(threading.RLock())  # held during a step, and by other threads in between
        self._waiting, self._ended = 0, threading.Event()
        self._paused, self._stopping = False, False
        self._final: RunState | None = None
        self._saes: dict[str, Any] | None = None
        self._done = self._from = (training.n_steps, training.n_tokens)
        self._run_up = self._reading()
        self._seconds = seconds  # spent training, without pauses, over all sessions
        self._pace = Pace()
        self._checkpoint_after = time.monotonic() + self._checkpoint_every_s  # of those that are due by the clock
        self._thread = threading.Thread(target=self._work, name="saewb-train", daemon=True)
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        _live.add(self)
        try:
            self._thread.start()
        except BaseException:  # an interrupt, and nobody gets this run to stop it
            self._stopping = True
            while self._thread.is_alive():
                self._ended.wait(0.1)
            raise

    # -- control -----------------------------------------------------------------------------------------------------

    def pause(self) -> Run:
        """Pause after the current step, or forward pass before the first one; returns once paused."""
        with self._between_steps():
            self._paused = True
        return self

    def resume(self) -> Run:
        """Continue after `pause()`.

        Raises:
            RuntimeError: if the run has ended.
        """
        if self._final is not None:
            fix = f"saewb.resume_run({str(self.folder)!r}, model=model, tokens=tokens)" if self.folder else ""
            raise RuntimeError(explain(f"{self!r} has ended.", want="a run that is paused", fix=fix))
        with self._between_steps():
            self._paused = False
            self._pace = Pace()
        return self

    def stop(self) -> Run:
        """Stop after the current step, with a checkpoint; returns once that is written. No effect on an ended run.

        Before the first step it stops after the current forward pass, and there is no SAE.
        """
        self._stopping = True
        with self._between_steps():
            pass
        self._join(None)
        return self

    def wait(self, timeout: float | None = None) -> Run:
        """Block until the run has ended, or for `timeout` seconds.

        Raises:
            KeyboardInterrupt: on an interrupt, after the run stopped cleanly and wrote its checkpoint. A second
                interrupt does not wait for that.
            Exception: the error of the run.
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
        """Wait for an Event first: before Python 3.13, an interrupted `Thread.join` marks the thread as ended."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        if threading.current_thread() is not self._thread:
            while not self._ended.wait(min(0.2, max(0.0, until - time.monotonic()))):  # in pieces, to be interruptible
                if time.monotonic() >= until:
                    return
            self._thread.join()

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """running, paused, stopped, finished or failed."""
        return self._final or ("paused" if self._paused else "running")

    @property
    def progress(self) -> Progress:
        """Steps, tokens and speed so far, and which layers of the model run."""
        (step, n_tokens), ahead, speed = self._done, self._run_up, None if self._final else self._pace.speed()
        left = None if speed is None or ahead else (self._config.n_steps - step) * self._config.batch_tokens / speed
        total = self._config.n_steps * self._config.batch_tokens
        return Progress(self.state, step, self._config.n_steps, n_tokens, total, speed, left, *self._layers, ahead)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The history as plain values, without pandas."""
        return tuple(self._log.rows)

    @property
    def saes(self) -> dict[str, Any]:
        """The current SAEs by name: copies in the model's units, checked against the outputs in training.

        Of a run that failed because one of several diverged, the others.

        Raises a RuntimeError if the run stopped before its first step.
        """
        if self._saes is not None:
            return dict(self._saes)
        with self._between_steps():
            return dict(self._saes) if self._saes is not None else self._export()

    @property
    def sae(self) -> Any:
        """The current SAE of a run that trains one.

        Raises:
            ValueError: if several are trained.
        """
        if len(self.names) != 1:
            want, what = ", ".join(map(repr, self.names)), f"this run trains {len(self.names)} SAEs."
            raise ValueError(explain(what, want=want, fix="run.saes[name]"))
        return next(iter(self.saes.values()))

    @property
    def folder(self) -> Path | None:
        """Path of its folder, or None."""
        return None if self._folder is None else self._folder.path

    def checkpoint(self) -> Run:
        """Write a checkpoint now, between two steps; of several processes, the first one writes it.

        Raises:
            ValueError: if the run has no folder, or has ended.
        """
        if not self._parallel.is_main:
            return self
        if self._folder is None or self._final is not None:
            what = f"{self!r} has nothing to write."
            raise ValueError(explain(what, want="a run with a folder", fix="folder='runs/a'"))
        with self._between_steps():
            self._write_checkpoint()
        return self

    def __repr__(self) -> str:
        return run_repr(self.progress, [sae.location for sae in self.spec.saes.values()])

    def _repr_html_(self) -> str:
        last = self._log.rows[-1] if self._log.rows else {}
        error = [] if self.error is None else [f"{type(self.error).__name__}: {self.error}"]
        locations = {name: sae.location for name, sae in self.spec.saes.items()}
        return run_html(self.progress, locations, last, [*self.notes, *error])

    # -- the thread --------------------------------------------------------------------------------------------------

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Hold the lock between two steps; for other threads than the run's."""
        self._waiting += 1  # the run's thread lets waiting threads go first
        with self._lock:
            self._waiting -= 1
            try:
                yield
            finally:
                self._lock.notify_all()

    def _work(self) -> None:
        error: BaseException | None = None
        self._log.notify("begin", self._done, self.spec.to_dict())
        try:
            with sleep_while_contended():
                steps = iter(self._training)
                while self._read_ahead():
                    pass
                while (step := self._next_step(steps)) is not None:
                    self._log_and_checkpoint(step)
        except BaseException as caught:  # a dead thread must not look like a running one
            error = out_of_memory(caught, self._done[0] + 1, self._config.batch_tokens, self.memory)
        try:
            self._end(error)
        except BaseException as caught:  # nobody waits for ever, whatever fails here
            self.error, self._final = self.error or error or caught, "failed"
        finally:
            self._close()
            _live.discard(self)
            self._ended.set()

    @contextmanager
    def _step_turn(self) -> Iterator[None]:
        """Hold the lock for a step, once the run is not paused and no other thread waits."""
        with self._lock:
            self._lock.wait_for(lambda: self._stopping or not (self._paused or self._waiting))
            began = time.monotonic()
            yield
            self._seconds += time.monotonic() - began

    def _read_ahead(self) -> bool:
        """Run one forward pass, or read one batch, for the first step; return whether it needs more."""
        with self._step_turn():
            more = not self._stopping and self._training.read_ahead(self._stream.fill)
            now = self._reading()
            self._pace = self._pace if now and self._run_up and now.what == self._run_up.what else Pace()
            if now:
                self._pace.update(now.n_tokens)
            self._run_up = now
            return more

    def _reading(self) -> RunUp | None:
        filling = self._stream.filling
        return self._training.ahead if filling is None else RunUp("filling the buffer", *filling)

    def _next_step(self, steps: Iterator[TrainStep]) -> TrainStep | None:
        with self._step_turn():
            step = None if self._parallel.any(self._stopping) else next(steps, None)
            if step is not None:
                self._done = (step.step, step.n_tokens)
                self._pace.update(step.n_tokens)
            return step

    def _log_and_checkpoint(self, step: TrainStep) -> None:
        last = step.step == self._config.n_steps
        measured = any(metrics.held_out is not None for metrics in step.saes.values())
        if step.step == 1 or last or measured or step.step % self.spec.run.log_every_steps == 0:
            self._training.check_finite()
            self._log.add_step(step, self._seconds, self._config.lr)
        if self._folder is None or last or not self._is_checkpoint_due(step.n_tokens):
            return
        with self._lock:
            began = time.monotonic()
            try:
                self._write_checkpoint()
            except OSError as error:  # e.g. a full disk: the last checkpoint is intact, so training goes on
                self.notes.append(f"no checkpoint at {step.n_tokens:,} tokens: {type(error).__name__}: {error}")
            self._checkpoint_after = time.monotonic() + max(self._checkpoint_every_s, 20 * (time.monotonic() - began))

    @property
    def _checkpoint_every_s(self) -> float:
        return math.inf if self.spec.run.checkpoint_every_s is None else self.spec.run.checkpoint_every_s

    def _is_checkpoint_due(self, n_tokens: int) -> bool:
        every = self.spec.run.checkpoint_every_tokens
        if every is None:
            return time.monotonic() >= self._checkpoint_after
        return n_tokens // every > (n_tokens - self._config.batch_tokens) // every

    def _export(self) -> dict[str, Any]:
        if self._training is None:
            raise RuntimeError(explain(f"{self!r} has no SAE.", want="a run that came to its first step"))
        return {name: _with_model(sae, self.spec.model) for name, sae in self._training.saes.items()}

    def _export_finite(self) -> dict[str, Any]:
        """Export the SAEs that have not diverged; the notes name the others.

        Raises:
            FloatingPointError: if all have.
        """
        saes, failure = {}, None
        for name in self.names:
            try:
                saes[name] = _with_model(self._training.export(name), self.spec.model)
            except (FloatingPointError, RuntimeError, ValueError) as error:
                failure = error
                self.notes.append(f"no SAE {name!r}: {str(error).splitlines()[0]}")
        if failure is not None and not saes:
            raise failure
        return saes

    def _write_checkpoint(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write a checkpoint; SAEs are exported first, so that a failed check leaves the last one in place."""
        saes = self._export()
        state = self._training.state() if state is None else state
        at_tokens = self._done[1] if self.spec.run.keep_saes else None
        self._folder.write_checkpoint(state, self._seconds, saes, at_tokens)
        self._log.notify("checkpoint", self._done)
        return saes

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._parallel.destroy()  # or the other processes would wait for this one
        with self._lock:
            try:
                if error is None or self._done[0] > 0:
                    self._export_last(error)
            except BaseException as caught:
                error = error or out_of_memory(caught, self._done[0] + 1, self._config.batch_tokens, self.memory)
                if error is not caught:
                    self.notes.append(f"no last checkpoint: {type(caught).__name__}: {caught}")
            if error is not None:
                self._done = (self._training.n_steps, self._training.n_tokens)  # a step may have ended, then failed
            self.error, finished = error, self._done[0] >= self._config.n_steps
            final: RunState = "failed" if error is not None else "finished" if finished else "stopped"
            self._log.end(final, self._done, self._seconds, error)
            self._final = final  # after the folder is written, which others then read
        self._log.notify("end", self._done)

    def _close(self) -> None:
        """Release the folder and the stream, however the run ended."""
        try:
            if self._folder is not None:
                self._folder.close()
            self._stream.close()
        except BaseException as caught:
            self.notes.append(f"not closed: {type(caught).__name__}: {caught}")
        if self._saes is not None or self.error is None:
            self._training = self._stream = None  # free weights, moments and buffers; the SAEs remain

    def _export_last(self, error: BaseException | None) -> None:
        if self._done[0] == 0 and self._training.ahead is not None:  # stopped before there were weights
            return
        if self._folder is None or self._done == self._from or isinstance(error, FloatingPointError):
            finite = isinstance(error, FloatingPointError) and len(self.names) > 1
            self._saes = self._export_finite() if finite else self._export()  # an existing checkpoint remains
            return
        state = _state_before_failed_step(self._training, self._stream) if self._training.mid_step else None
        self._saes = self._write_checkpoint(state)


@final
class _RunLog:
    """History and notes of a run, forwarded to its folder and loggers."""

    def __init__(
        self,
        names: tuple[str, ...],
        folder: RunFolder | None,
        loggers: Sequence[Logger],
        rows: Sequence[Mapping[str, Any]],
        state: Callable[[], str],
    ) -> None:
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]
        self.notes: list[str] = []
        self._names, self._folder, self._state = names, folder, state
        self._loggers, self._failures = list(loggers), [0] * len(loggers)
        self._warned: set[tuple[str, str]] = set()

    def notify(self, kind: Any, done: tuple[int, int], row: Mapping[str, Any] | None = None) -> None:
        """Call the loggers after `done` steps and tokens; one that fails three times in a row is not called again."""
        path = None if self._folder is None else self._folder.path
        event = Event(kind, *done, row or {}, path, self._names, self._state())
        for i, logger in enumerate(self._loggers):
            if self._failures[i] >= 3:
                continue
            try:
                logger(event)
                self._failures[i] = 0
            except Exception as error:
                self._failures[i] += 1
                self.notes.append(f"{logger!r} failed at step {event.step}: {type(error).__name__}: {error}")

    def add_step(self, step: TrainStep, seconds: float, lr: float) -> None:
        """Add a row to the history, and each new warning to the notes.

        Raises:
            FloatingPointError: if the loss is not finite; the message suggests a tenth of `lr`.
        """
        self._warn(step, lr)
        row = row_of(step, seconds)
        self.rows.append(row)
        if self._folder is not None:
            self._append(row)
        self.notify("step", (step.step, step.n_tokens), row)

    def _append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the folder's history; a disk that is full delays it to the next row."""
        try:
            self._folder.append_row(row)
        except OSError as error:
            note = f"the history could not be written: {type(error).__name__}: {error}"
            if note not in self.notes:
                self.notes.append(note)

    def end(self, state: str, done: tuple[int, int], seconds: float, error: BaseException | None) -> None:
        """Write the end record to the folder."""
        if self._folder is None:
            return
        end = {"state": state, "step": done[0], "n_tokens": done[1], "seconds": round(seconds, 3)}
        end["error"] = "" if error is None else f"{type(error).__name__}: {error}"
        try:
            self._folder.write_end({**end, "notes": self.notes[-20:]})
        except OSError as failure:  # a full disk, a folder that is gone
            self.notes.append(f"its folder does not say how it ended: {type(failure).__name__}: {failure}")

    def _warn(self, step: TrainStep, lr: float) -> None:
        for name, warnings in step.warnings.items():
            for warning in warnings:
                if isinstance(warning, Diverged):
                    raise FloatingPointError(explain(f"{name!r} diverged: {warning}.", fix=f"lr={lr / 10:g}"))
                if (name, warning.name) not in self._warned:
                    self._warned.add((name, warning.name))
                    self.notes.append(f"{name}: {warning}")


def row_of(step: TrainStep, seconds: float) -> dict[str, Any]:
    """Convert a step to a row of the history: plain numbers, prefixed by the SAE's name if there are several.

    `density_counts` is a list (see `StepMetrics.numbers_and_density`), for the folder and `run_densities`.
    """
    row: dict[str, Any] = {"step": step.step, "n_tokens": step.n_tokens, "seconds": round(seconds, 3)}
    for name, metrics in step.saes.items():
        numbers: dict[str, Any]
        numbers, counts = metrics.numbers_and_density()
        numbers["n_dead"] = round(numbers["dead_frac"] * metrics.d_sae) if math.isfinite(numbers["dead_frac"]) else None
        if metrics.held_out is not None:
            held_out = {**asdict(metrics.held_out.reconstruction), **asdict(metrics.held_out.firing)}
            numbers |= {f"held_out/{key}": float(v) for key, v in held_out.items() if isinstance(v, (int, float))}
            numbers |= {f"held_out/{point}/fvu": one.fvu for point, one in metrics.held_out.points.items()}
        prefix = "" if len(step.saes) == 1 else f"{name}/"
        row |= {prefix + key: value for key, value in numbers.items()} | {f"{prefix}{DENSITY_COUNTS}": counts}
    return row


def out_of_memory(error: BaseException, step: int, batch_tokens: int, memory: MemoryEstimate) -> BaseException:
    """Convert an out-of-memory error to a MemoryError that says what to reduce; return other errors unchanged."""
    text = str(error)
    if not (isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text):
        return error
    first = text.splitlines()[0] if text else "no memory"
    want = f"less of batch_tokens={batch_tokens}, buffer_tokens, pass_tokens or d_sae; the estimate was\n{memory}"
    what = f"out of memory at step {step}: {first}"
    explained = MemoryError(explain(what, want=want, fix=f"batch_tokens={max(1, batch_tokens // 2)}"))
    explained.__cause__ = error
    return explained


def exit_on_sigterm() -> None:
    """Make SIGTERM end this process by `sys.exit`, so that runs stop with a checkpoint. Meant for scripts.

    Replaces the process's handler; call it in the main thread.
    """
    import signal
    import sys

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _state_before_failed_step(training: Training, stream: ActivationStream) -> dict[str, Any]:
    """State before a step that failed, whose batch will be trained on again.

    Raises:
        RuntimeError: if some SAEs have made the step and others not: then the last checkpoint remains.
    """
    state = training.state()
    if any(learner["n_batches"] != state["n_steps"] for learner in state["learners"].values()):
        raise RuntimeError("the step failed half way through its SAEs")
    if state["n_taken"] > 0:
        return {**state, "n_taken": state["n_taken"] - 1}
    stream.put_back()
    return training.state()


def _with_model(sae: Any, model: str | None) -> Any:
    """Add the model's name to an exported SAE, and split the head off its hook."""
    hook, head = split_head(sae.cfg.hook or "")
    location = {"hook": hook, "head": head} if head is not None and isinstance(sae, SAE) else {}
    return sae.with_config(model=model, **location)


def _stop_all() -> None:
    for run in list(_live):
        run.stop()
