"""Serialize training runs for the front end: state, error and curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import saewb
from saewb import errors
from saewb_widgets.serialize import short

CHARTS = {  # figure: title and note
    "loss": ("loss", "what is minimized, in training units"),
    "l0": ("L0", "active latents per token"),
    "fvu": ("FVU", "fraction of variance unexplained, in the batch"),
    "held_out/fvu": ("held-out FVU", "on activations not trained on"),
    "dead_frac": ("dead latents", "fraction that has been silent for dead_after_tokens"),
    "n_dense": ("dense latents", "on more often than dense_above"),
    "lr": ("learning rate", "of the step"),
}
LOG_SCALE = ("loss", "l0", "fvu", "held_out/fvu")  # that may be drawn on one
_LIVE, _ENDED = ("running", "paused", "unfinished"), ("stopped", "failed", "interrupted", "unfinished")
INTERRUPTED = "its process ended without a word: killed, out of memory, or the machine went down"


class WatchedRun:
    """A run that a panel shows: one of this kernel, or one that is read from its folder."""

    def __init__(self, run: Any) -> None:
        if isinstance(run, (str, Path)):
            run = saewb.read_run(run)
        if not isinstance(run, (saewb.Run, saewb.PastRun)):
            what = f"TrainingPanel got a {type(run).__name__}."
            want = "a run, a list of them, {name: run}, or a run's folder"
            raise TypeError(errors.explain(what, want=want, fix="TrainingPanel(run)"))
        self.run = run
        self._gone = False
        self._resume: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is of this kernel, so that it can be paused."""
        return isinstance(self.run, saewb.Run)

    @property
    def alive(self) -> bool:
        """Whether it may still change."""
        return self.run.state in _LIVE and (self.is_local or not self._gone)

    def refresh(self) -> None:
        """Check that the folder exists; read a run that is not of this kernel again."""
        self._gone = self.run.folder is not None and not Path(self.run.folder).is_dir()
        if not (self.is_local or self._gone):
            self.run = self.run.again()

    def status(self, name: str) -> dict[str, Any]:
        """Its state for the front end."""
        run = self.run
        status = {"name": name, "here": self.is_local, "saes": list(run.names), "folder": str(run.folder or "")}
        status |= {"notes": list(run.notes[-3:]), "resume": ""}
        status |= self._local_status() if self.is_local else self._folder_status()
        if status["state"] in _ENDED and run.folder is not None and not self._gone:
            self._resume = self._resume or self._resume_code()
            status["resume"] = self._resume
        return status

    def _local_status(self) -> dict[str, Any]:
        run, p = self.run, self.run.progress
        status = {"state": p.state, "frac": round((p.run_up or p).frac, 4)}
        status |= {"n_tokens": p.n_tokens, "total": p.total_tokens, "before": str(p.run_up or "")}
        status["speed"] = p.tokens_per_s and float(f"{p.tokens_per_s:.3g}")
        status["left"] = None if p.seconds_left is None else round(p.seconds_left)
        if run.error is not None:
            status["error"] = f"{type(run.error).__name__}: {run.error}"
        elif self._gone:
            status["error"] = f"{self._missing()}; its SAEs are in run.saes"
        return status

    def _folder_status(self) -> dict[str, Any]:
        run, config = self.run, self.run.spec.train
        status = {"state": run.state, "frac": round(run.frac, 4), "total": config.n_steps * config.batch_tokens}
        status |= {"n_tokens": run.rows[-1]["n_tokens"] if run.rows else 0, "before": ""}
        if run.before_first_step:
            status["before"] = "before its first step: its buffer fills, or means are estimated"
        if self._gone:
            return status | {"state": "gone", "error": self._missing()}
        error = {"failed": run.error, "interrupted": INTERRUPTED}.get(run.state)
        return status | ({"error": error} if error else {})

    def _missing(self) -> str:
        return f"the folder {str(self.run.folder)!r} is not there any more"

    def _resume_code(self) -> str:
        folder = self.run.folder
        past = saewb.read_run(folder) if self.is_local else self.run
        return f"saewb.resume_run({str(folder)!r}, model=model, tokens=tokens)" if past.resumable else ""

    def series(self, name: str) -> list[dict[str, Any]]:
        """Its curves, those with the same tokens sharing them; and the histogram of latent densities."""
        series = []
        densities = saewb.run_densities(self.run)
        for sae, curves in saewb.run_curves(self.run).items():
            label = name if len(self.run.names) == 1 else f"{name} / {sae}"
            lines: dict[str, Any] = {}
            xs: list[list[int]] = []
            for figure, (tokens, values) in curves.items():
                if tokens:
                    if tokens not in xs:
                        xs.append(tokens)
                    lines[figure] = [xs.index(tokens), [short(v) for v in values]]
            line = {"label": label, "run": name, "sae": sae, "tokens": xs, "lines": lines}
            if density := densities.get(sae):
                line["density"] = {"at": density.n_tokens, "edges": list(density.edges), "counts": list(density.counts)}
            series.append(line)
        return series


def watch(runs: Any) -> dict[str, WatchedRun]:
    """Runs by name: the keys of a mapping, else the names of their folders, or numbers."""
    if runs is None:
        return {}
    if isinstance(runs, Mapping):
        return {str(name): WatchedRun(run) for name, run in runs.items()}
    watched_runs: dict[str, WatchedRun] = {}
    for run in runs if isinstance(runs, (list, tuple)) else [runs]:
        watched = WatchedRun(run)
        watched_runs[free_name(watched, watched_runs)] = watched
    return watched_runs


def free_name(watched: WatchedRun, taken: Mapping[str, Any]) -> str:
    """A name for one more run that is not taken."""
    folder = watched.run.folder
    base = Path(folder).name if folder is not None else f"run {len(taken) + 1}"
    name, n = base, 1
    while name in taken:
        n += 1
        name = f"{base} ({n})"
    return name
