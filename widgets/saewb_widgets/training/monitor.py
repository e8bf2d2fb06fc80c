"""Runs as the front end is sent them: where each is, what it failed of, and its curves."""

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
    "fvu": ("FVU", "share of variance not explained, in the batch"),
    "held_out/fvu": ("held-out FVU", "on activations not trained on"),
    "dead_frac": ("dead latents", "share that has been silent for too long"),
    "n_dense": ("dense latents", "on more often than dense_above"),
    "lr": ("learning rate", "of the step"),
}
LOGS = ("loss", "l0", "fvu", "held_out/fvu")  # that may be drawn on a log scale
_LIVE, _ENDED = ("running", "paused", "unfinished"), ("stopped", "failed", "cut off", "unfinished")
CUT_OFF = "its process ended without a word: killed, out of memory, or the machine went down"


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
        self._gone = False
        self._resume: str | None = None

    @property
    def here(self) -> bool:
        """Whether it is of this kernel, so that it can be paused."""
        return isinstance(self.run, saewb.Run)

    @property
    def alive(self) -> bool:
        """Whether there may be news."""
        return self.run.state in _LIVE and (self.here or not self._gone)

    def look(self) -> None:
        """See whether the folder is there; of a run that is not of this kernel, read it again."""
        self._gone = self.run.folder is not None and not Path(self.run.folder).is_dir()
        if not (self.here or self._gone):
            self.run = self.run.again()

    def status(self, name: str) -> dict[str, Any]:
        """Where it is."""
        run = self.run
        made = {"name": name, "here": self.here, "saes": list(run.names), "folder": str(run.folder or "")}
        made |= {"notes": list(run.notes[-3:]), "resume": "", **(self._here() if self.here else self._elsewhere())}
        if made["state"] in _ENDED and run.folder is not None and not self._gone:
            self._resume = self._resume or self._resumed()
            made["resume"] = self._resume
        return made

    def _here(self) -> dict[str, Any]:
        run, p = self.run, self.run.progress
        made = {"state": p.state, "frac": round((p.run_up or p).frac, 4)}
        made |= {"n_tokens": p.n_tokens, "total": p.total_tokens, "before": str(p.run_up or "")}
        made["speed"] = p.tokens_per_s and float(f"{p.tokens_per_s:.3g}")
        made["left"] = None if p.seconds_left is None else round(p.seconds_left)
        if run.error is not None:
            made["error"] = f"{type(run.error).__name__}: {run.error}"
        elif self._gone:
            made["error"] = f"{self._missing()}; its SAEs are in run.saes"
        return made

    def _elsewhere(self) -> dict[str, Any]:
        run = self.run
        step, total = run.facts["config"]["batch_tokens"], run.facts["config"]["n_tokens"]
        made = {"state": run.state, "frac": round(run.frac, 4), "total": total // step * step}
        made |= {"n_tokens": run.rows[-1]["n_tokens"] if run.rows else 0, "before": ""}
        if run.before_first_step:
            made["before"] = "before its first step: its buffer fills, or means are estimated"
        if self._gone:
            return made | {"state": "gone", "error": self._missing()}
        said = {"failed": run.error, "cut off": CUT_OFF}.get(run.state)
        return made | ({"error": said} if said else {})

    def _missing(self) -> str:
        return f"the folder {str(self.run.folder)!r} is not there any more"

    def _resumed(self) -> str:
        folder = self.run.folder
        past = saewb.read_run(folder) if self.here else self.run
        return f"saewb.resume_run({str(folder)!r}, model=model, tokens=tokens)" if past.resumable else ""

    def series(self, name: str) -> list[dict[str, Any]]:
        """Its curves, those with the same tokens sharing them; and how frequent its latents are."""
        made = []
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
            if found := densities.get(sae):
                line["density"] = {"at": found.n_tokens, "edges": list(found.edges), "counts": list(found.counts)}
            made.append(line)
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
