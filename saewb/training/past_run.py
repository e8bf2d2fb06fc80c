"""Runs told again: the cell that starts an equal one, and what a folder says of one without its model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saewb.errors import FormatError, explain
from saewb.training import DENSITY_EDGES, TrainConfig
from saewb.training import objectives as all_objectives
from saewb.training.run_folder import read_end, read_facts
from saewb.training.run_plan import Reading
from saewb.training.run_record import COUNTS, RunOptions

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("loss", "l0", "fvu", "dead_frac", "n_dense", "lr", "held_out/fvu")  # that curves are drawn of
_OWN = ("read", "write", "lr", "seed")  # of a Trainee, not of its objective


@dataclass(frozen=True, eq=False, repr=False)
class PastRun:
    """A run as its folder tells it: what was asked for, and its history. Nothing is locked, the run may be going on."""

    folder: Path  # where it is
    facts: Mapping[str, Any]  # what was asked for, as plain values
    rows: tuple[Mapping[str, Any], ...]  # the history, a row per logged step
    state: str  # finished, stopped, failed; running; cut off: it ended without a word; unfinished: not known
    error: str = ""  # what it failed of
    notes: tuple[str, ...] = ()  # the last of `run.notes`, once it has ended
    _seen: tuple[int, int] = (0, 0)  # the history's file, and how many bytes of it have been read

    @property
    def names(self) -> tuple[str, ...]:
        """Of its SAEs."""
        return tuple(self.facts["saes"])

    @property
    def history(self) -> pd.DataFrame:
        """As `run.history`."""
        return frame_of(self.rows)

    @property
    def frac(self) -> float:
        """Steps logged, of all."""
        config = self.facts["config"]
        n_steps = config["n_tokens"] // config["batch_tokens"]
        return self.rows[-1]["step"] / n_steps if self.rows else 0.0

    @property
    def code(self) -> str:
        """The cell that starts an equal run; needs `model` and `tokens` (and `held_out`, if it measured on them)."""
        return code_of(self.facts, self.rows)

    @property
    def before_first_step(self) -> bool:
        """Whether it goes on and has not come to a step: it reads what that needs, e.g. fills its mixing buffer."""
        return self.state == "running" and not self.rows

    def again(self) -> PastRun:
        """As the folder tells it now: of the history, only what has been added is read.

        Raises:
            FileNotFoundError, FormatError: as `read_run`.
        """
        return _read(self.folder, self)

    @property
    def resumable(self) -> bool:
        """Whether it came to a checkpoint."""
        return (self.folder / "checkpoint.safetensors").is_file()

    def __repr__(self) -> str:
        n_tokens = self.rows[-1]["n_tokens"] if self.rows else 0
        where = "before its first step" if self.before_first_step else f"{n_tokens:,} tokens"
        return f"PastRun({self.folder.name}, {self.state}, {where}, {', '.join(self.names)})"


@dataclass(frozen=True)
class Densities:
    """How frequent the latents of an SAE in training are."""

    n_tokens: int  # trained on by then
    edges: tuple[float, ...]  # shares of tokens, ascending, the last one 1
    counts: tuple[int, ...]  # of latents: counts[0] below edges[0], or silent; counts[i] in [edges[i-1], edges[i])


def read_run(folder: str | Path) -> PastRun:
    """What is known of a run from its folder alone; it may have ended, or be going on in another process.

    Args:
        folder: as given to `saewb.train`.

    Returns:
        A PastRun: its history, and how it ended, if it did.

    Raises:
        FileNotFoundError: if there is no run.
        FormatError: if the folder is not one of saewb's.

    Example:
        >>> read_run("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no run in 'nowhere'.
          want: a folder with run.json
    """
    return _read(Path(folder).expanduser())


def _read(path: Path, before: PastRun | None = None) -> PastRun:
    facts, end = read_facts(path), read_end(path)  # the end first: what is read after it is all there is
    rows, at = _rows(path / "history.jsonl", () if before is None else before.rows, before and before._seen)
    return PastRun(path, facts, rows, end["state"], end["error"], tuple(end["notes"]), at)


def _rows(
    history: Path, rows: tuple[Mapping[str, Any], ...], read: tuple[int, int] | None
) -> tuple[tuple[Mapping[str, Any], ...], tuple[int, int]]:
    """The rows, and what has been read; a run that is resumed gives its history a new file."""
    if not history.is_file():
        return (), (0, 0)
    with history.open("rb") as file:
        here = os.fstat(file.fileno())
        if read is None or read[0] != here.st_ino or read[1] > here.st_size:
            rows, read = (), (here.st_ino, 0)
        file.seek(read[1])
        fresh = file.read()
    fresh = fresh[: fresh.rfind(b"\n") + 1]  # what follows the last line's end was cut off, or is being written
    made = []
    for number, line in enumerate(fresh.splitlines(), len(rows) + 1):
        try:
            made.append(json.loads(line))
        except ValueError as error:
            raise FormatError(explain(f"line {number} of {history} is no JSON.", want="a row of a history")) from error
    return (*rows, *made), (read[0], read[1] + len(fresh))


def run_curves(run: Any, *, points: int = 300) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """The history as curves to draw: of each SAE and figure, tokens and values, thinned out evenly.

    Every row is taken, or every second, fourth, ... , and always the last; so a curve that grows does not jump. Values
    that are not finite are left out. Of 10^5 rows: about 10 ms.

    Args:
        run: a Run, or what `read_run` gives.
        points: at most, of each curve.

    Returns:
        By SAE and figure ("loss", "l0", "fvu", "dead_frac", "n_dense", "lr", "held_out/fvu"): (tokens, values).

    Raises:
        ValueError: for fewer than two points.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> run = saewb.train(model, texts, saewb.TopK(d_sae=256, k=8), hook="blocks.2.hook_resid_post",
        ...                   n_tokens=2_048, batch_tokens=512, buffer_tokens=2_048)
        >>> run_curves(run.wait())["sae"]["l0"]
        ([512, 2048], [8.0, 8.0])
    """
    if points < 2:
        raise ValueError(explain(f"got points={points}.", want="2 or more"))
    rows, names = run.rows, run.names
    all_steps = _thinned(rows, points)
    made: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        held = [row for row in rows if f"{prefix}held_out/fvu" in row]
        made[name] = {
            figure: _curve(_thinned(held, points) if figure.startswith("held_out/") else all_steps, prefix + figure)
            for figure in FIGURES
        }
    return made


def run_densities(run: Any) -> dict[str, Densities]:
    """How frequent the latents of each SAE are, as of the last logged step: a histogram of their densities.

    A latent's density is the share of about the last `density_tokens` tokens on which it is on. Bins are a quarter of a
    factor of ten wide, from 10^-7 to 1.

    Args:
        run: a Run, or what `read_run` gives.

    Returns:
        By SAE; without those of which nothing has been logged yet.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> run = saewb.train(model, texts, saewb.TopK(d_sae=256, k=8), hook="blocks.2.hook_resid_post",
        ...                   n_tokens=2_048, batch_tokens=512, buffer_tokens=2_048).wait()
        >>> found = run_densities(run)["sae"]
        >>> found.n_tokens, len(found.edges), sum(found.counts)
        (2048, 29, 256)
    """
    found = {}
    for name in run.names:
        column = COUNTS if len(run.names) == 1 else f"{name}/{COUNTS}"
        for row in run.rows[-1:]:
            if column in row:
                found[name] = Densities(row["n_tokens"], DENSITY_EDGES, tuple(row[column]))
    return found


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a history as a table of numbers: without the histograms, for which there is `run_densities`."""
    import pandas as pd

    return pd.DataFrame([{name: v for name, v in row.items() if not isinstance(v, list)} for row in rows])


def _thinned(rows: Sequence[Any], points: int) -> list[Any]:
    stride = 1
    while len(rows) > stride * (points - 1) + 1:
        stride *= 2
    kept = list(rows[::stride])
    return kept if not rows or (len(rows) - 1) % stride == 0 else [*kept, rows[-1]]


def _curve(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[list[int], list[float]]:
    known = [(row["n_tokens"], row[column]) for row in rows if row.get(column) is not None]
    pairs = [(at, value) for at, value in known if math.isfinite(value)]
    return [at for at, _ in pairs], [value for _, value in pairs]


def train_code(facts: Mapping[str, Any], *, folder: str | None = None, held_out: bool = False) -> str:
    """The `saewb.train` cell of what was asked for; `model` and `tokens` are the reader's.

    Args:
        facts: as `run.json` has them.
        folder: of the new run.
        held_out: whether there is a `held_out` of the reader's too.

    Returns:
        Python that needs `model` and `tokens`; defaults are left out.
    """
    shown, options = _saes(facts["saes"])
    options |= {"n_tokens": facts["config"]["n_tokens"]}
    options |= {} if folder is None else {"folder": folder}
    for kind, key in ((TrainConfig, "config"), (RunOptions, "options"), (Reading, "reading")):
        defaults = {f.name: f.default for f in fields(kind)}
        for name, value in facts[key].items():
            value = _plain(value)
            if name in defaults and value != defaults[name] and name != "n_tokens":
                options[name] = slice(*value) if name == "positions" else value
    lines = [f"{name}={_literal(name, value)}," for name, value in options.items()]
    lines += ["held_out=held_out,"] if held_out else []
    model = f"  # {facts['model']}" if facts.get("model") else ""
    body = "\n".join(f"    {line}" for line in [f"model,{model}", "tokens,", f"{shown},", *lines])
    return f"import saewb\n\nrun = saewb.train(\n{body}\n)\n"


def code_of(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """`train_code` of a run with this history."""
    return train_code(facts, held_out=any("held_out/" in column for row in rows[-1:] for column in row))


def _saes(told: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The third argument of `saewb.train`, and the hooks, if all SAEs have the same."""
    places = {(said.get("read"), said.get("write")) for said in told.values()}
    read, write = next(iter(places)) if len(places) == 1 else (None, None)
    shared = {name: value for name, value in (("hook", read), ("hook_out", write)) if value is not None}
    made = {name: _trainee({**said, "read": None, "write": None} if shared else said) for name, said in told.items()}
    if list(made) == ["sae"]:
        return made["sae"], shared
    return "{" + ", ".join(f"{name!r}: {each}" for name, each in made.items()) + "}", shared


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _trainee(told: Mapping[str, Any]) -> str:
    kind = told["objective"]
    defaults = {f.name: f.default for f in fields(getattr(all_objectives, kind))}
    given = {n: _plain(v) for n, v in told.items() if n in defaults and _plain(v) != defaults[n]}
    made = f"saewb.{kind}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    own = {name: told[name] for name in _OWN if told.get(name) is not None}
    return f"saewb.Trainee({', '.join([made, *(f'{name}={value!r}' for name, value in own.items())])})" if own else made


def _literal(name: str, value: Any) -> str:
    if name == "autocast":
        return f"{value}"  # torch.bfloat16, as it is told
    if isinstance(value, slice):
        return f"slice({value.start}, {value.stop}, {value.step})"
    return f"{value:_}" if type(value) is int and value >= 10_000 else repr(value)
