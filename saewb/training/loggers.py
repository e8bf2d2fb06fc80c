"""Where a run's figures go besides its own history: anything that can be called with an `Event`.

    saewb.train(..., sinks=[saewb.training.loggers.Wandb(project="my-saes")])
    saewb.train(..., sinks=[lambda event: print(event.row) if event.kind == "step" else None])

A sink is called on the run's thread, between two steps. One that raises does not end the run: what it raised is kept in
`run.notes`, and after three failures in a row it is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    kind: Literal["begin", "step", "checkpoint", "end"]  # of the run
    step: int  # steps done
    n_tokens: int  # trained on
    row: Mapping[str, Any] = field(default_factory=dict)  # "step": the history's row; "begin": what was asked for
    folder: Path | None = None  # "checkpoint", "end": of the run; None if it has none
    names: tuple[str, ...] = ()  # of the SAEs
    state: str = "running"  # "end": finished, stopped or failed


Sink = Callable[[Event], object]


@final
class Sinks:
    """The sinks of one run; one that fails three times in a row is not called again."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks, self._failures = list(sinks), [0] * len(sinks)

    def tell(self, event: Event) -> list[str]:
        """Call them; what they raised, in words."""
        notes = []
        for i, sink in enumerate(self._sinks):
            if self._failures[i] >= 3:
                continue
            try:
                sink(event)
                self._failures[i] = 0
            except Exception as error:
                self._failures[i] += 1
                notes.append(f"{sink!r} failed at step {event.step}: {type(error).__name__}: {error}")
        return notes


_TERMS = {  # objectives' names of loss terms: SAELens' keys
    "mse": "mse_loss",
    "l1": "l1_loss",
    "l0": "l0_loss",
    "aux": "auxiliary_reconstruction_loss",
    "pre_act": "pre_act_loss",
}
_OWN = {"held_out/fvu", "held_out/l0", "held_out/mse"}


def saelens_keys(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """A row of the history under SAELens' names for Weights & Biases, the SAE's name first where there are several.

    Args:
        row: of `run.history`.
        names: of the run's SAEs; with one only, its name is left out.

    Returns:
        Numbers by SAELens' names; quantities it has no name for keep ours.

    Example:
        >>> saelens_keys({"step": 1, "n_tokens": 64, "fvu": 0.25, "losses/mse": 2.0}, ("sae",))
        {'details/n_training_samples': 64, 'metrics/explained_variance': 0.75, 'losses/mse_loss': 2.0}
    """
    found: dict[str, float] = {"details/n_training_samples": row["n_tokens"]}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        for key, value in row.items():
            if key.startswith(prefix) and (theirs := _key(key.removeprefix(prefix), value)):
                found[prefix + theirs[0]] = theirs[1]
    return found


def _key(key: str, value: Any) -> tuple[str, float] | None:
    group, _, term = key.partition("/")
    fixed = {
        "loss": "losses/overall_loss",
        "l0": "metrics/l0",
        "n_dead": "sparsity/dead_features",
        "lr": "details/current_learning_rate",
        "extra/kept_min": "metrics/topk_threshold",
    }
    if key == "fvu":
        return "metrics/explained_variance", 1 - value
    if key in fixed:
        return fixed[key], value
    if group == "losses":
        return f"losses/{_TERMS.get(term, term)}", value
    if group == "coefficients":
        return f"details/{term}_coefficient", value
    return (key, value) if key in _OWN else None


@final
class Wandb:
    """Weights & Biases, with SAELens' keys. The package is imported when a run begins, and only then.

    Args:
        project: of wandb.
        name: of the run; None lets wandb choose.
        log_weights: uploads the SAEs as artifacts, at checkpoints of runs that have a folder.
        options: any other argument of `wandb.init`.
    """

    def __init__(self, project: str = "saewb", name: str | None = None, *, log_weights: bool = False, **options: Any):
        self._options = {"project": project, "name": name, **options}
        self._log_weights, self._run = log_weights, None

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        import wandb

        if self._run is None:
            self._run = wandb.init(config=dict(event.row) if event.kind == "begin" else {}, **self._options)
        if event.kind == "step":
            self._run.log(saelens_keys(event.row, event.names), step=event.step)
        elif event.kind in ("checkpoint", "end"):
            if event.kind == "checkpoint" and self._log_weights and event.folder is not None:
                self._upload(wandb, event)
            if event.kind == "end":
                self._run.finish(exit_code=int(event.state == "failed"))
                self._run = None

    def _upload(self, wandb: Any, event: Event) -> None:
        for name in event.names:
            artifact = wandb.Artifact(name, type="model", metadata={"n_tokens": event.n_tokens})
            artifact.add_dir(str(event.folder / "saes" / name))
            self._run.log_artifact(artifact)


@final
class TensorBoard:
    """TensorBoard event files, under the history's own names. Imported when a run begins, and only then.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder, self._writer = folder, None

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for key, value in event.row.items() if event.kind == "step" else ():
            if isinstance(value, (int, float)) and key not in ("step", "n_tokens"):
                self._writer.add_scalar(key, value, event.n_tokens)
        if event.kind == "end":
            self._writer.close()
            self._writer = None
