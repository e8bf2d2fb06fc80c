"""The table that `python -m tests.gpu` prints, and its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch


class Clock:
    """Time since the start, and the time that is left."""

    def __init__(self, limit, device):
        self._start, self._limit, self.device = time.perf_counter(), limit, device

    @property
    def seconds(self):
        return time.perf_counter() - self._start

    @property
    def left(self):
        return self._limit - self.seconds

    @property
    def is_over(self):
        return self.left <= 0

    def timed(self, call, rounds):
        """Median seconds of a call, after one that warms up; and the peak of memory in GiB (of a GPU; else 0)."""
        cuda = self.device.type == "cuda"
        call()
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if cuda else 0.0
        return sorted(times)[len(times) // 2], peak


@dataclass
class Table:
    """Rows of a markdown table, printed as they come."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, what, seconds=None, *, limit=None, per_second="", peak=0.0, note=""):
        """Add a row; `limit` is the least time, in seconds."""
        took = "" if seconds is None else _spelled(seconds)
        of_limit = "" if limit is None or not seconds else _spelled(limit)
        ratio = f"{seconds / limit:.1f} x" if of_limit else ""
        row = (what, took, per_second, of_limit, ratio, f"{peak:.1f} GiB" if peak else "", note)
        self.rows.append(row)
        print(" | ".join(cell for cell in row if cell), flush=True)

    def __str__(self):
        head = ("", "time", "per second", "limit", "of it", "peak memory", "")
        lines = [head, ("--",) * len(head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spelled(seconds):
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1e6:,.0f} µs"
