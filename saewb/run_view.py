"""How a run shows itself: one line, a few lines, a table for the notebook. No widgets here."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run is. `print` it."""

    state: str  # running, paused, stopped, finished, failed
    step: int  # optimizer steps done
    n_steps: int  # in all
    n_tokens: int  # trained on
    total_tokens: int  # in all
    tokens_per_s: float | None  # over about the last ten seconds; None before the second step, and when it has ended
    seconds_left: float | None  # at that speed; None if that is not known
    stop_layer: int | None  # first layer of the model that is not run; None if all are, or there is no model
    n_layers: int | None  # of the model

    @property
    def frac(self) -> float:
        """Steps done, of all."""
        return self.step / self.n_steps

    def __str__(self) -> str:
        parts = [f"{self.state}: {self.n_tokens:,} of {self.total_tokens:,} tokens ({self.frac:.0%})"]
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
    return f"Run({progress.state}, {progress.n_tokens:,} of {progress.total_tokens:,} tokens, {saes})"


def page(progress: Progress, places: Mapping[str, str], row: Mapping[str, Any], notes: Sequence[str]) -> str:
    """A table: a bar, and the last figures of each SAE."""
    bar = f'<progress value="{progress.frac:.4f}" max="1" style="width:100%"></progress>'
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
