"""What all benchmarks share: calls taken in turn, tables of medians and ratios, peak memory, facts on the machine.

It needs torch only, so that it runs in a peer's environment too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("saewb", "torch", "transformer-lens", "transformers", "sae-lens", "sae-dashboard", "eai-sparsify")


@dataclass(frozen=True)
class Row:
    """One candidate."""

    name: str  # e.g. "saewb", "sae-lens", "bare forward"
    seconds: float | None  # median; None where there is only a note
    note: str = ""  # a few words: memory, agreement


@dataclass(frozen=True)
class Table:
    """Candidates that did the same work in the same run."""

    title: str  # the work and its size
    rows: tuple[Row, ...]
    of: str  # the name of the row that ratios refer to

    @staticmethod
    def made(title: str, seconds: Mapping[str, float], of: str, notes: Mapping[str, str] | None = None) -> Table:
        """A table of medians by name."""
        notes = notes or {}
        return Table(title, tuple(Row(name, value, notes.get(name, "")) for name, value in seconds.items()), of)

    def ratio(self, row: Row) -> float | None:
        """How many times as long as the row of that name it took."""
        base = next((r.seconds for r in self.rows if r.name == self.of), None)
        return None if row.seconds is None or not base else row.seconds / base

    def __str__(self) -> str:
        lines = [self.title]
        for row in self.rows:
            ratio = self.ratio(row)
            took = "" if row.seconds is None else f"{row.seconds * 1e3:12.3f} ms"
            lines.append(f"  {row.name:<28} {took:>15} {'' if ratio is None else f'{ratio:9.3g} x':>11}   {row.note}")
        return "\n".join(line.rstrip() for line in lines)


@dataclass
class Report:
    """Tables, printed as they come; with `--json` written too, also when the benchmark fails later."""

    options: argparse.Namespace
    tables: list[Table] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Print a table and keep it."""
        print(f"\n{table}", flush=True)
        self.tables.append(table)
        if self.options.json:
            self.options.json.write_text(json.dumps({"facts": facts(self.options.device), "tables": self.saved()}))

    def saved(self) -> list[dict[str, Any]]:
        """The tables as JSON can say them; `loaded` reads them."""
        return [asdict(table) for table in self.tables]


def loaded(saved: list[dict[str, Any]]) -> list[Table]:
    """What `Report.saved` gave."""
    return [Table(t["title"], tuple(Row(**row) for row in t["rows"]), t["of"]) for t in saved]


def arguments(about: str) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try whether it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the tables there")
    return parser


def has(peer: str) -> bool:
    """Whether a peer can be imported here."""
    return importlib.util.find_spec(peer) is not None


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm: Callable[[str], bool] = bool
) -> dict[str, list[float]]:
    """Seconds of each round of each call, the calls taken in turn so that a busy machine troubles all alike.

    Args:
        calls: by name.
        rounds: after one round that warms up and does not count.
        device: waited for if it is a GPU.
        warm: which names take part in the warming round; all by default.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            if n == 0 and not warm(name):
                continue
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if n:
                times[name].append(time.perf_counter() - start)
    return times


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", **how) -> dict[str, float]:
    """Median seconds of each call; see `in_turn`."""
    return {name: statistics.median(took) for name, took in in_turn(calls, rounds, device, **how).items()}


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def busy_process(busy: bool = True) -> Iterator[None]:
    """Another process that computes on one core all the time, as a neighbor on a shared machine does."""
    code = "import torch; torch.set_num_threads(1); x = torch.randn(512, 512)\nwhile True: x @ x"
    process = subprocess.Popen([sys.executable, "-c", code]) if busy else None
    try:
        if process is not None:
            time.sleep(3)  # its imports
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def peak_mb() -> float:
    """Most memory this process has held since `reset_peak`, in MB (Linux; else 0)."""
    if not Path("/proc/self/status").exists():
        return 0.0
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def reset_peak() -> float:
    """Start measuring anew; returns what is held now, in MB."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def facts(device: str = "cpu") -> dict[str, str]:
    """The machine and the versions, by name."""
    result = {"machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB"}
    if device.startswith("cuda"):
        result["GPU"] = torch.cuda.get_device_name()
    result |= {"threads": str(torch.get_num_threads()), "Python": platform.python_version()}
    for name in VERSIONS:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
