"""Runs told again: the cell that starts an equal one, and what a folder says of one without its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saewb import objectives as all_objectives
from saewb.errors import FormatError, explain
from saewb.run_folder import read_facts
from saewb.run_plan import Reading
from saewb.run_record import RunOptions
from saewb.training import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

_OWN = ("read", "write", "lr", "seed")  # of a Trainee, not of its objective


@dataclass(frozen=True, eq=False, repr=False)
class PastRun:
    """A run as its folder tells it: what was asked for, and its history. Nothing is locked, the run may be going on."""

    folder: Path  # where it is
    facts: Mapping[str, Any]  # what was asked for, as plain values
    rows: tuple[Mapping[str, Any], ...]  # the history, a row per logged step

    @property
    def names(self) -> tuple[str, ...]:
        """Of its SAEs."""
        return tuple(self.facts["saes"])

    @property
    def history(self) -> pd.DataFrame:
        """As `run.history`."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    @property
    def frac(self) -> float:
        """Steps logged, of all."""
        config = self.facts["config"]
        n_steps = config["n_tokens"] // config["batch_tokens"]
        return self.rows[-1]["step"] / n_steps if self.rows else 0.0

    @property
    def code(self) -> str:
        """The cell that starts an equal run."""
        return train_code(self.facts)

    def __repr__(self) -> str:
        n_tokens = self.rows[-1]["n_tokens"] if self.rows else 0
        return f"PastRun({self.folder.name}, {n_tokens:,} tokens, {', '.join(self.names)})"


def read_run(folder: str | Path) -> PastRun:
    """What is known of a run from its folder alone; it may have ended, or be going on in another process.

    Args:
        folder: as given to `saewb.train`.
    Returns:
        A PastRun.
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
    path = Path(folder).expanduser()
    facts = read_facts(path)
    history = path / "history.jsonl"
    lines = history.read_text(encoding="utf-8").split("\n") if history.is_file() else []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end was cut off
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise FormatError(explain(f"line {number} of {history} is no JSON.", want="a row of a history")) from error
    return PastRun(path, facts, tuple(rows))


def train_code(facts: Mapping[str, Any]) -> str:
    """The `saewb.train` cell of what was asked for; `model` and `tokens` are the reader's.

    Args:
        facts: as `run.json` has them.
    Returns:
        Python that needs `model` and `tokens`; defaults are left out.
    """
    saes = {name: _trainee(told) for name, told in facts["saes"].items()}
    lone = len(saes) == 1 and "sae" in saes
    shown = saes["sae"] if lone else "{" + ", ".join(f"{name!r}: {made}" for name, made in saes.items()) + "}"
    options: dict[str, Any] = {"n_tokens": facts["config"]["n_tokens"]}
    for kind, key in ((TrainConfig, "config"), (RunOptions, "options"), (Reading, "reading")):
        defaults = {f.name: f.default for f in fields(kind)}
        for name, value in facts[key].items():
            value = tuple(value) if isinstance(value, list) else value
            if name in defaults and value != defaults[name] and name != "n_tokens":
                options[name] = slice(*value) if name == "positions" else value
    lines = [f"{name}={_literal(name, value)}," for name, value in options.items()]
    model = f"    # model: {facts['model']}" if facts.get("model") else ""
    body = "\n".join(f"    {line}" for line in ["model,", "tokens,", f"{shown},", *lines])
    return f"import saewb{model}\n\nrun = saewb.train(\n{body}\n)\n"


def _trainee(told: Mapping[str, Any]) -> str:
    kind = told["objective"]
    defaults = {f.name: f.default for f in fields(getattr(all_objectives, kind))}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in told.items()
        if name in defaults and (tuple(value) if isinstance(value, list) else value) != defaults[name]
    }
    made = f"saewb.{kind}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    own = {name: told[name] for name in _OWN if told.get(name) is not None}
    return f"saewb.Trainee({', '.join([made, *(f'{name}={value!r}' for name, value in own.items())])})" if own else made


def _literal(name: str, value: Any) -> str:
    if name == "autocast":
        return f"{value}"  # torch.bfloat16, as it is told
    if isinstance(value, slice):
        return f"slice({value.start}, {value.stop}, {value.step})"
    return f"{value:_}" if type(value) is int and value >= 10_000 else repr(value)
