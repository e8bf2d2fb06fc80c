"""Loggers of a run: anything that can be called with an `Event`.

    saewb.train(..., loggers=[saewb.training.loggers.Wandb(project="my-saes")])
    saewb.train(..., loggers=[lambda event: print(event.row) if event.kind == "step" else None])

A logger is called on the run's thread, between two steps. An exception in it does not end the run: it is added to
`run.notes`, and after three failures in a row the logger is not called again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from saewb._files import absolute


@dataclass(frozen=True)
class Event:
    """An event of a run: its begin, a logged step, a checkpoint, its end."""

    kind: Literal["begin", "step", "checkpoint", "end"]
    """Kind of the event."""
    step: int
    """Steps done."""
    n_tokens: int
    """Tokens trained on."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """At "step" the row of the history, at "begin" the run's spec as in run.json."""
    folder: Path | None = None
    """Folder of the run; None if it has none."""
    names: tuple[str, ...] = ()
    """The names of the SAEs."""
    state: str = "running"
    """State of the run; at "end": finished, stopped or failed."""


Logger = Callable[[Event], object]


_LOSS_TERMS = {  # names of loss terms in objectives -> SAELens' keys
    "mse": "mse_loss",
    "l1": "l1_loss",
    "l0": "l0_loss",
    "aux": "auxiliary_reconstruction_loss",
    "pre_act": "pre_act_loss",
}
_UNCHANGED = {"held_out/fvu", "held_out/l0", "held_out/mse"}


def saelens_keys(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """Rename a row of the history to SAELens' keys for Weights & Biases, prefixed by the SAE's name if several.

    Args:
        row: of `run.history`.
        names: of the run's SAEs; with one only, its name is left out.

    Returns:
        Numbers by SAELens' names; quantities without one keep their name here.

    Example:
        >>> saelens_keys({"step": 1, "n_tokens": 64, "fvu": 0.25, "losses/mse": 2.0}, ("sae",))
        {'details/n_training_samples': 64, 'metrics/explained_variance': 0.75, 'losses/mse_loss': 2.0}
    """
    keys: dict[str, float] = {"details/n_training_samples": row["n_tokens"]}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        for key, value in row.items():
            if key.startswith(prefix) and (renamed := _saelens_key(key.removeprefix(prefix), value)):
                keys[prefix + renamed[0]] = renamed[1]
    return keys


def _saelens_key(key: str, value: Any) -> tuple[str, float] | None:
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
        return f"losses/{_LOSS_TERMS.get(term, term)}", value
    if group == "coefficients":
        return f"details/{term}_coefficient", value
    return (key, value) if key in _UNCHANGED else None


@final
class Wandb:
    """Logger for Weights & Biases, with SAELens' keys; imports `wandb` when a run begins.

    Args:
        project: of wandb.
        name: of the run; None lets wandb choose.
        log_weights: upload the SAEs as artifacts, at checkpoints of runs that have a folder.
        options: any other argument of `wandb.init`.
    """

    def __init__(self, project: str = "saewb", name: str | None = None, *, log_weights: bool = False, **options: Any):
        self._options = {"project": project, "name": name, **options}
        self._log_weights, self._run = log_weights, None

    def __call__(self, event: Event) -> None:
        """Log an event."""
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
    """Logger that writes TensorBoard event files, with the names of the history; imported when a run begins.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder, self._writer = absolute(folder), None

    def __call__(self, event: Event) -> None:
        """Log an event."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for key, value in event.row.items() if event.kind == "step" else ():
            if isinstance(value, (int, float)) and key not in ("step", "n_tokens"):
                self._writer.add_scalar(key, value, event.n_tokens)
        if event.kind == "end":
            self._writer.close()
            self._writer = None
