"""Runs as the front end is sent them: where each is, what it failed of, and its curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import saewb
from saewb import errors
from saewb_widgets import _packing

CHARTS = {  # figure: title and note
    "loss": ("loss", "what is minimised, in training units"),
    "l0": ("L0", "active latents per token"),
    "fvu": ("FVU", "share of variance not explained, in the batch"),
    "held_out/fvu": ("held-out FVU", "on activations not trained on"),
    "dead_frac": ("dead latents", "share that has been silent for too long"),
    "n_dense": ("dense latents", "on more often than dense_above"),
    "lr": ("learning rate", "of the step"),
}
_LIVE = ("running", "paused")


class Watched:
    """A run that is looked at: of this kernel, or what its folder says of it."""

    def __init__(self, run: Any) -> None:
        if isinstance(run, (str, Path)):
            run = saewb.read_run(run)
        if not isinstance(run, (saewb.Run, saewb.PastRun)):
            what = f"TrainingPanel got a {type(run).__name__}."
            want = "a run, a list of them, {name: run}, or a run's folder"
            raise TypeError(errors.explain(what, want=want, fix="TrainingPanel(run)"))
        self.run = run
        self._seen = self._mark()
        self._resume: str | None = None

    @property
    def here(self) -> bool:
        """Whether it is of this kernel, so that it can be paused."""
        return isinstance(self.run, saewb.Run)

    @property
    def alive(self) -> bool:
        """Whether there may be news."""
        return self.run.state in _LIVE if self.here else self.run.frac < 1 and self._seen != "gone"

    def look(self) -> None:
        """Read the folder again, if it has changed; nothing for a run of this kernel."""
        if not self.here and (mark := self._mark()) != self._seen:
            self.run = self.run if mark == "gone" else saewb.read_run(self.run.folder)
            self._seen = mark

    def _mark(self) -> Any:
        if self.here:
            return None
        history = Path(self.run.folder) / "history.jsonl"
        if not Path(self.run.folder).is_dir():
            return "gone"
        return (stat.st_size, stat.st_mtime_ns) if history.is_file() and (stat := history.stat()) else None

    def status(self, name: str) -> dict[str, Any]:
        """Where it is."""
        run = self.run
        made = {"name": name, "here": self.here, "saes": list(run.names), "folder": str(run.folder or "")}
        if not self.here:
            step, total, rows = run.facts["config"]["batch_tokens"], run.facts["config"]["n_tokens"], run.rows
            state = "unfinished" if run.frac < 1 else "finished"
            if self._seen == "gone":
                state, made["error"] = "gone", f"the folder {str(run.folder)!r} is not there any more"
            at = rows[-1]["n_tokens"] if rows else 0
            made |= {"state": state, "frac": round(run.frac, 4), "n_tokens": at, "total": total // step * step}
            return made | {"resume": self._resumed() if state == "unfinished" else ""}
        p = run.progress
        made |= {"state": p.state, "frac": round(p.frac, 4), "n_tokens": p.n_tokens, "total": p.total_tokens}
        made |= {"speed": p.tokens_per_s and float(f"{p.tokens_per_s:.3g}"), "left": p.seconds_left}
        made["left"] = None if p.seconds_left is None else round(p.seconds_left)
        made["notes"] = run.notes[-3:]
        if run.error is not None:
            made["error"] = f"{type(run.error).__name__}: {run.error}"
        if p.state in ("stopped", "failed") and run.folder is not None:
            self._resume = self._resume or self._resumed()
            made["resume"] = self._resume
        return made

    def _resumed(self) -> str:
        folder = self.run.folder
        past = saewb.read_run(folder) if self.here else self.run
        return f"saewb.resume_run({str(folder)!r}, model=model, tokens=tokens)" if past.resumable else ""

    def series(self, name: str) -> list[dict[str, Any]]:
        """Its curves: those with the same tokens share them."""
        made = []
        for sae, curves in saewb.run_curves(self.run).items():
            label = name if len(self.run.names) == 1 else f"{name} / {sae}"
            lines: dict[str, Any] = {}
            xs: list[list[int]] = []
            for figure, (tokens, values) in curves.items():
                if tokens:
                    if tokens not in xs:
                        xs.append(tokens)
                    lines[figure] = [xs.index(tokens), [_packing.short(v) for v in values]]
            made.append({"label": label, "run": name, "sae": sae, "tokens": xs, "lines": lines})
        return made


def named(runs: Any) -> dict[str, Watched]:
    """Runs by name: as given, or by their folders, or by number."""
    if runs is None:
        return {}
    if isinstance(runs, Mapping):
        return {str(name): Watched(run) for name, run in runs.items()}
    found: dict[str, Watched] = {}
    for run in runs if isinstance(runs, (list, tuple)) else [runs]:
        watched = Watched(run)
        found[free_name(watched, found)] = watched
    return found


def free_name(watched: Watched, taken: Mapping[str, Any]) -> str:
    """A name for one more run."""
    folder = watched.run.folder
    base = Path(folder).name if folder is not None else f"run {len(taken) + 1}"
    name, n = base, 1
    while name in taken:
        n += 1
        name = f"{base} ({n})"
    return name
