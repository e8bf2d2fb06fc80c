"""Tables of several runs and devices as one of markdown, for the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .measure import Row, Table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


@dataclass(frozen=True)
class Result:
    """What one benchmark gave on one device."""

    name: str  # of the benchmark
    device: str  # "cpu", "cuda"
    tables: tuple[Table, ...]
    facts: dict[str, str] = field(default_factory=dict)
    failed: str = ""  # the last line of what it said, if it did


def markdown(results: Sequence[Result], date: str) -> str:
    """All of them: medians by device, and how many times as long as the row with 1 each took."""
    devices = [d for d in ("cpu", "cuda") if any(r.device == d for r in results)] or ["cpu"]
    head = ["work", ""]
    for device in devices:
        head += [device.upper(), "ratio"]
    lines = [_about(results, date), "", _line([*head, ""]), _line(["--", "--", *(["--:"] * (2 * len(devices))), "--"])]
    for name in dict.fromkeys(result.name for result in results):
        mine = {result.device: result for result in results if result.name == name}
        lines += _rows(mine, devices)
        for result in mine.values():
            if result.failed:
                blank = [""] * (2 * len(devices))
                lines.append(_line([f"**{name}** ({result.device})", "failed", *blank, _text(result.failed)]))
    return "\n".join(lines) + "\n"


def _about(results: Sequence[Result], date: str) -> str:
    facts: dict[str, str] = {}
    for result in results:
        facts |= result.facts
    machine = facts.pop("machine", "unknown machine")
    versions = ", ".join(f"{name} {value}" for name, value in facts.items())
    return (
        f"Measured on {date}: {machine}; {versions}. Medians of calls taken in turn in one run; ratios are to the row "
        "with 1. `python -m tests.benchmarks`"
    )


def _rows(by_device: dict[str, Result], devices: Sequence[str]) -> list[str]:
    outcome: dict[str, dict[str, dict[str, tuple[Table, Row]]]] = {}  # title, row, device
    for device, result in by_device.items():
        for table in result.tables:
            for row in table.rows:
                outcome.setdefault(table.title, {}).setdefault(row.name, {})[device] = (table, row)
    lines = []
    for title, rows in outcome.items():
        for n, (name, cells) in enumerate(rows.items()):
            line, notes = ["" if n else _text(title), _text(name)], []
            for device in devices:
                table, row = cells.get(device, (None, None))
                line += ["", ""] if table is None else [duration(row.seconds), _ratio(table.ratio(row))]
                notes += [row.note] if row is not None and row.note else []
            lines.append(_line([*line, _text(" / ".join(notes))]))
    return lines


def duration(seconds: float | None) -> str:
    """Three digits and a unit.

    Example:
        >>> duration(0.0000631), duration(0.0446), duration(12.04), duration(2000)
        ('0.0631 ms', '44.6 ms', '12 s', '2000 s')
    """
    if seconds is None:
        return ""
    return f"{_digits(seconds * 1e3)} ms" if seconds < 1 else f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else _digits(value)


def _text(words: str) -> str:
    return " ".join(words.replace("|", "\\|").split())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def put_into(readme: Path, made: str) -> None:
    """Replace what stands between the two markers in a file.

    Raises:
        ValueError: if it does not have both, in order.
    """
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{readme.name} has no place for the table.\n  want: a line {BEGIN} and below it a line {END}")
    readme.write_text(text[: begin + len(BEGIN)] + "\n" + made + text[end:])
