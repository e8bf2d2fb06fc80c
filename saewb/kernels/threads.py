"""How torch's threads wait for one another: awake on free cores, asleep on contended ones.

At the end of each parallel region the threads of GNU OpenMP, torch's runtime on Linux, wait awake for milliseconds. On
free cores that saves a few microseconds per region. Where another process or cell needs a core too, a waiting thread
keeps it from the very thread that it waits for: a training step of 60 ms then takes a second. OpenMP decides how to
wait when it is loaded (`OMP_WAIT_POLICY`), with one exception: with more threads than cores in the process, they wait
awake for about a microsecond only. So `sleep_while_contended` lets spare threads sleep in the process while threads
of this process wait for cores, which Linux counts per thread (`/proc/self/task/*/schedstat`).

Source: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TASKS = Path("/proc/self/task")
_PERIOD = 0.25  # seconds between two looks
_CONTENDED, _FREE = 0.05, 0.01  # seconds of waiting per second, summed over threads: asleep above, awake below
_QUIET_LOOKS = 8  # in a row, before threads wait awake again

_lock = threading.Lock()
_n_users = 0
_monitor: _Monitor | None = None


@contextmanager
def sleep_while_contended() -> Iterator[None]:
    """Let torch's threads wait asleep while others compete for the cores; nested and concurrent uses share a monitor.

    Results do not change: the number of threads and the order of sums stay the same. Without GNU OpenMP or Linux' task
    statistics this does nothing.

    Example:
        >>> import torch
        >>> with sleep_while_contended():
        ...     torch.ones(1000).sum()
        tensor(1000.)
    """
    global _n_users, _monitor
    with _lock:
        _n_users += 1
        if _monitor is None and (libgomp := _libgomp()) is not None:
            _monitor = _Monitor(libgomp)
    try:
        yield
    finally:
        with _lock:
            _n_users -= 1
            last, _monitor = (_monitor, None) if _n_users == 0 else (None, _monitor)
        if last is not None:
            last.close()


class _Monitor:
    """Thread that looks at how long threads waited for cores, and lets spare threads sleep accordingly."""

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._libgomp, self._spare = libgomp, None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="saewb-threads", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        waited, at, n_quiet = run_delay(), time.monotonic(), 0
        spare: _SpareThreads | None = _SpareThreads(self._libgomp)  # until the first look shows that cores are free
        while not self._closed.wait(_PERIOD):
            now, delay = time.monotonic(), run_delay()
            share, waited, at = (delay - waited) / (now - at), delay, now
            n_quiet = n_quiet + 1 if share < _FREE else 0
            if spare is None and share > _CONTENDED:
                spare = _SpareThreads(self._libgomp)
            elif spare is not None and n_quiet >= _QUIET_LOOKS:
                spare.close()
                spare = None
        if spare is not None:
            spare.close()


class _SpareThreads:
    """As many sleeping OpenMP threads as there are cores, beside those that compute."""

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._closed, ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(libgomp, ready), name="saewb-spare", daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()  # OpenMP ends a thread's spare threads with it

    def _work(self, libgomp: ctypes.CDLL, ready: threading.Event) -> None:
        nothing = _REGION(lambda _: None)
        libgomp.GOMP_parallel(nothing, None, ctypes.c_uint(len(os.sched_getaffinity(0)) + 1), ctypes.c_uint(0))
        ready.set()
        self._closed.wait()


_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_delay() -> float:
    """Seconds that this process's threads have been ready to run without a core, since they started.

    Example:
        >>> run_delay() >= 0
        True
    """
    total = 0
    for task in os.listdir(_TASKS):
        try:
            total += int((_TASKS / task / "schedstat").read_bytes().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    return total / 1e9


def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, if it is GNU's and Linux counts waiting."""
    if not (_TASKS / str(os.getpid()) / "schedstat").exists():
        return None
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    # Other packages bring copies of their own.
    files = sorted(files, key=lambda file: "/torch/" not in file)
    return ctypes.CDLL(files[0]) if files and len(os.sched_getaffinity(0)) > 1 else None
