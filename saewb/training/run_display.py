"""Display of a run: progress, notebook tables, and the history as data frame, curves and histograms."""

from __future__ import annotations

import html
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from saewb.errors import explain
from saewb.training.code_export import train_code
from saewb.training.config import RunSpec
from saewb.training.step_metrics import DENSITY_EDGES, RunUp

if TYPE_CHECKING:
    import pandas as pd

CURVES = ("loss", "l0", "fvu", "dead_frac", "n_dense", "lr", "held_out/fvu")
DENSITY_COUNTS = "density_counts"
"""Column of the history with `Densities.counts`, prefixed by the SAE's name if there are several."""


@final
class Pace:
    """Speed in tokens per second over about the last ten seconds; updated by one thread, read by any."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=1000)

    def update(self, n_tokens: int) -> None:
        """Record the number of tokens so far."""
        self._recent.append((time.monotonic(), n_tokens))
        while self._recent[-1][0] - self._recent[0][0] > 10:
            self._recent.popleft()

    def speed(self) -> float | None:
        """Tokens per second; None if not known yet."""
        recent = list(self._recent)
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])


@dataclass(frozen=True)
class Progress:
    """Progress of a run."""

    state: str
    """Running, paused, stopped, finished or failed."""
    step: int
    """Optimizer steps done."""
    n_steps: int
    """Optimizer steps in all."""
    n_tokens: int
    """Tokens trained on."""
    total_tokens: int
    """Tokens in all."""
    tokens_per_s: float | None
    """Speed over about the last ten seconds (during the run-up: tokens read); None if unknown."""
    seconds_left: float | None
    """Seconds to the end at that speed; None if unknown."""
    stop_layer: int | None
    """First layer of the model that does not run; None if all do, or there is no model."""
    n_layers: int | None
    """Layers of the model."""
    run_up: RunUp | None = None
    """Reading before the first step; None once that has begun."""

    @property
    def frac(self) -> float:
        """Fraction of all steps that is done."""
        return self.step / self.n_steps

    def __str__(self) -> str:
        done = f"{self.n_tokens:,} of {self.total_tokens:,} tokens ({self.frac:.0%})"
        parts = [f"{self.state}: {self.run_up or done}"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{_duration(self.seconds_left)} left")
        if self.n_layers is not None:
            ran = self.n_layers if self.stop_layer is None else self.stop_layer
            parts.append(f"{ran} of {self.n_layers} layers run")
        return ", ".join(parts)


def run_repr(progress: Progress, locations: Sequence[str]) -> str:
    """One line about a run, without anything that depends on time."""
    saes = locations[0] if len(locations) == 1 else f"{len(locations)} SAEs"
    where = progress.run_up or f"{progress.n_tokens:,} of {progress.total_tokens:,} tokens"
    return f"Run({progress.state}, {where}, {saes})"


def run_html(progress: Progress, locations: Mapping[str, str], row: Mapping[str, Any], notes: Sequence[str]) -> str:
    """HTML of a progress bar and the last metrics of each SAE."""
    frac = (progress.run_up or progress).frac
    bar = f'<progress value="{frac:.4f}" max="1" style="width:100%"></progress>'
    out = [f"<div><div>{html.escape(str(progress))}</div>{bar}"]
    columns = ("loss", "l0", "fvu", "dead_frac", "held_out/fvu")
    shown = [c for c in columns if any(_value(row, name, c, len(locations)) is not None for name in locations)]
    if shown:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in ("SAE", "place", *shown))
        out.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
        for name, location in locations.items():
            cells = [name, location, *(_number(_value(row, name, c, len(locations))) for c in shown)]
            out.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        out.append("</tbody></table>")
    out += [f"<div>{html.escape(note)}</div>" for note in notes[-3:]]
    return "".join([*out, "</div>"])


def _value(row: Mapping[str, Any], name: str, column: str, n: int) -> float | None:
    return row.get(column if n == 1 else f"{name}/{column}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# -- the history -----------------------------------------------------------------------------------------------------


class RunRecord:
    """Base of Run and PastRun: what follows from the spec and the history of a run."""

    spec: RunSpec
    """Which SAEs are trained, and how."""
    rows: tuple[Mapping[str, Any], ...]
    """History: one row per logged step, as plain values."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its SAEs."""
        return tuple(self.spec.saes)

    @property
    def history(self) -> pd.DataFrame:
        """One row per logged step; with several SAEs, columns begin with their names. Also in `history.jsonl`.

        Histograms of densities are left out, see `saewb.run_densities`.
        """
        import pandas as pd

        return pd.DataFrame([{name: v for name, v in row.items() if not isinstance(v, list)} for row in self.rows])

    @property
    def code(self) -> str:
        """Python source of an equal run; needs `model` and `tokens` (and `held_out`, if it evaluates on them)."""
        return train_code(self.spec, held_out=any("held_out/" in column for row in self.rows[-1:] for column in row))


@dataclass(frozen=True)
class Densities:
    """Histogram of the densities of an SAE's latents in training."""

    n_tokens: int
    """Tokens trained on so far."""
    edges: tuple[float, ...]
    """Fractions of tokens, ascending, the last one 1."""
    counts: tuple[int, ...]
    """Number of latents: counts[0] below edges[0] or silent, counts[i] in [edges[i - 1], edges[i])."""


def run_curves(run: RunRecord, *, points: int = 300) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Curves of the history: for each SAE and metric, tokens and values, thinned out evenly.

    Every row is used, or every second, fourth, ..., and always the last, so that a growing curve does not jump. Values
    that are not finite are left out. About 10 ms for 10^5 rows.

    Args:
        run: a Run or a PastRun.
        points: maximum of each curve.

    Returns:
        By SAE and metric ("loss", "l0", "fvu", "dead_frac", "n_dense", "lr", "held_out/fvu"): (tokens, values).

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
    all_steps = _thin(rows, points)
    curves = {}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        evaluated = _thin([row for row in rows if f"{prefix}held_out/fvu" in row], points)
        curves[name] = {c: _curve(evaluated if "held_out/" in c else all_steps, prefix + c) for c in CURVES}
    return curves


def run_densities(run: RunRecord) -> dict[str, Densities]:
    """Histogram of the densities of each SAE's latents, as of the last logged step.

    A latent's density is the fraction of about the last `density_tokens` tokens on which it is active. Bins are a
    quarter of a factor of ten wide, from 10^-7 to 1.

    Args:
        run: a Run or a PastRun.

    Returns:
        By SAE, for those with a logged step.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> run = saewb.train(model, texts, saewb.TopK(d_sae=256, k=8), hook="blocks.2.hook_resid_post",
        ...                   n_tokens=2_048, batch_tokens=512, buffer_tokens=2_048).wait()
        >>> densities = run_densities(run)["sae"]
        >>> densities.n_tokens, len(densities.edges), sum(densities.counts)
        (2048, 29, 256)
    """
    densities = {}
    for name in run.names:
        column = DENSITY_COUNTS if len(run.names) == 1 else f"{name}/{DENSITY_COUNTS}"
        for row in run.rows[-1:]:
            if column in row:
                densities[name] = Densities(row["n_tokens"], DENSITY_EDGES, tuple(row[column]))
    return densities


def _thin(rows: Sequence[Any], points: int) -> list[Any]:
    stride = 1
    while len(rows) > stride * (points - 1) + 1:
        stride *= 2
    thinned = list(rows[::stride])
    return thinned if not rows or (len(rows) - 1) % stride == 0 else [*thinned, rows[-1]]


def _curve(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[list[int], list[float]]:
    pairs = [(row["n_tokens"], row[column]) for row in rows if row.get(column) is not None]
    pairs = [(n_tokens, value) for n_tokens, value in pairs if math.isfinite(value)]
    return [n_tokens for n_tokens, _ in pairs], [value for _, value in pairs]
