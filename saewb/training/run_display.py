"""How a run shows itself: one line, a few lines, a table for the notebook. No widgets here."""

from __future__ import annotations

import html
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final


@dataclass(frozen=True)
class RunUp:
    """What a run reads before its first step. `print` it."""

    what: str  # "filling the buffer", "estimating the normalization", ...
    n_tokens: int  # read
    total_tokens: int  # to be read

    @property
    def frac(self) -> float:
        """Tokens read, of all."""
        return self.n_tokens / self.total_tokens

    def __str__(self) -> str:
        return f"{self.what}, {self.n_tokens:,} of {self.total_tokens:,} tokens"


def run_up(filling: tuple[int, int] | None, ahead: tuple[str, int, int] | None) -> RunUp | None:
    """What comes before the first step: of a mixing buffer, (tokens there, wanted); then of the training."""
    if filling is not None:
        return RunUp("filling the buffer", *filling)
    return None if ahead is None else RunUp(*ahead)


@final
class Pace:
    """Tokens per second over about the last ten seconds; noted by one thread, asked of any."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=1000)

    def note(self, n_tokens: int) -> None:
        """So many tokens by now."""
        self._recent.append((time.monotonic(), n_tokens))
        while self._recent[-1][0] - self._recent[0][0] > 10:
            self._recent.popleft()

    def speed(self) -> float | None:
        """None if that is not known yet."""
        recent = list(self._recent)
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])


@dataclass(frozen=True)
class Progress:
    """How far a run is. `print` it."""

    state: str  # running, paused, stopped, finished, failed
    step: int  # optimizer steps done
    n_steps: int  # in all
    n_tokens: int  # trained on
    total_tokens: int  # in all
    tokens_per_s: float | None  # over about the last ten seconds (of the run-up: read); None if that is not known
    seconds_left: float | None  # at that speed; None if that is not known
    stop_layer: int | None  # first layer of the model that is not run; None if all are, or there is no model
    n_layers: int | None  # of the model
    run_up: RunUp | None = None  # what comes before the first step, until that has begun

    @property
    def frac(self) -> float:
        """Steps done, of all."""
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


def line(progress: Progress, places: Sequence[str]) -> str:
    """One line that is the same whenever the run is at the same place."""
    saes = places[0] if len(places) == 1 else f"{len(places)} SAEs"
    where = progress.run_up or f"{progress.n_tokens:,} of {progress.total_tokens:,} tokens"
    return f"Run({progress.state}, {where}, {saes})"


def page(progress: Progress, places: Mapping[str, str], row: Mapping[str, Any], notes: Sequence[str]) -> str:
    """A table: a bar, and the last figures of each SAE."""
    frac = (progress.run_up or progress).frac
    bar = f'<progress value="{frac:.4f}" max="1" style="width:100%"></progress>'
    out = [f"<div><div>{html.escape(str(progress))}</div>{bar}"]
    columns = ("loss", "l0", "fvu", "dead_frac", "held_out/fvu")
    known = [c for c in columns if any(_value(row, name, c, len(places)) is not None for name in places)]
    if known:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in ("SAE", "place", *known))
        out.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
        for name, place in places.items():
            cells = [name, place, *(_number(_value(row, name, c, len(places))) for c in known)]
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
