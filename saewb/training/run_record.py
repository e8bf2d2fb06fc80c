"""What a run writes down: its options, the rows of its history, what it failed of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from saewb.errors import explain
from saewb.training import Training, TrainStep
from saewb.training.memory import MemoryEstimate

COUNTS = "density_counts"  # of a row; after the SAE's name, where there are several


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides training."""

    checkpoint_every_tokens: int | None = None  # None: only on the way out
    keep_saes: bool = False  # keeps the SAEs of every checkpoint, not only of the last
    log_every_steps: int = 10  # and the first and the last

    def __post_init__(self) -> None:
        for name in ("checkpoint_every_tokens", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(explain(f"got {name}={value!r}.", want="a positive number", fix=f"{name}=1_000"))


def row_of(step: TrainStep, seconds: float) -> dict[str, Any]:
    """A step as a row of the history: plain numbers, the SAE's name first where there are several.

    `density_counts` alone is a list (see `StepMetrics.numbers_and_density`): for the folder and `run_densities`.
    """
    row: dict[str, Any] = {"step": step.step, "n_tokens": step.n_tokens, "seconds": round(seconds, 3)}
    for name, figures in step.saes.items():
        numbers: dict[str, Any]
        numbers, counts = figures.numbers_and_density()
        numbers["n_dead"] = round(numbers["dead_frac"] * figures.d_sae) if math.isfinite(numbers["dead_frac"]) else None
        if figures.held_out is not None:
            found = {**asdict(figures.held_out.reconstruction), **asdict(figures.held_out.firing)}
            numbers |= {f"held_out/{key}": float(v) for key, v in found.items() if isinstance(v, (int, float))}
        prefix = "" if len(step.saes) == 1 else f"{name}/"
        row |= {prefix + key: value for key, value in numbers.items()} | {f"{prefix}{COUNTS}": counts}
    return row


def out_of_memory(error: BaseException, step: int, batch_tokens: int, memory: MemoryEstimate) -> BaseException:
    """What to change, if it was memory that was missing; anything else as it is."""
    text = str(error)
    if not (isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text):
        return error
    first = text.splitlines()[0] if text else "no memory"
    want = f"less of batch_tokens={batch_tokens}, buffer_tokens, pass_tokens or d_sae; the estimate was\n{memory}"
    what = f"out of memory at step {step}: {first}"
    told = MemoryError(explain(what, want=want, fix=f"batch_tokens={max(1, batch_tokens // 2)}"))
    told.__cause__ = error
    return told


def before_failed_step(training: Training, feed: Any) -> dict[str, Any]:
    """The state before a step that failed half way: its batch is to be trained on again.

    Raises:
        RuntimeError: if some SAEs have made the step and others not: then the checkpoint before stands.
    """
    state = training.state()
    if any(learner["n_batches"] != state["n_steps"] for learner in state["learners"].values()):
        raise RuntimeError("the step failed half way through its SAEs")
    if state["n_taken"] > 0:
        return {**state, "n_taken": state["n_taken"] - 1}
    feed.put_back()
    return training.state()


def exit_on_sigterm() -> None:
    """Make SIGTERM end this process by `sys.exit`, so that runs are stopped with a checkpoint. For scripts to call.

    Replaces the process's handler; call it in the main thread.
    """
    import signal
    import sys

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
