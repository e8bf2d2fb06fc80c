"""How threads share cores that others compete for: torch's wait asleep, and parts of a product are taken dynamically.

At the end of each parallel region the threads of GNU OpenMP, torch's runtime on Linux, wait awake for milliseconds. On
free cores that saves a few microseconds per region. Where another process or cell needs a core too, a waiting thread
keeps it from the very thread that it waits for: a training step of 60 ms then takes a second. OpenMP decides how to
wait when it is loaded (`OMP_WAIT_POLICY`), with one exception: with more threads than cores in the process, they wait
awake for about a microsecond only. So `sleep_while_contended` lets spare threads sleep in the process while threads
of this process wait for cores, which Linux counts per thread (`/proc/self/task/*/schedstat`).

Asleep or not, torch parts a product into as many halves as it has threads, and the half on a contended core takes twice
as long. So `map_tiles` parts work along the tokens into many tiles, of which each thread takes the next when it is
free, and adds a thread while cores are contended.

Source: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_TASKS = Path("/proc/self/task")
_PERIOD = 0.25  # seconds between two looks
_CONTENDED, _FREE = 0.05, 0.01  # seconds of waiting per second, summed over threads: asleep above, awake below
_QUIET_LOOKS = 8  # in a row, before threads wait awake again
_TILES_PER_THREAD = 4  # fewest, so that the last ones to end differ by little

_lock = threading.Lock()
_n_users = 0
_monitor: _Monitor | None = None


@contextmanager
def sleep_while_contended() -> Iterator[None]:
    """Let torch's threads wait asleep while others compete for the cores; nested and concurrent uses share a monitor.

    What else the machine does changes no result: tiles and the order of sums stay the same. Without GNU OpenMP or
    Linux' task statistics this does nothing.

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


def map_tiles(work: Callable[[slice], T], n: int, size: int, whole: int, *, lazy: bool = False) -> list[T]:
    """Results of `work` on slices of 0..n, each a tile that one thread computes, whichever is free.

    Tiles are shared inside of `sleep_while_contended` only, and where there are at least four for each of torch's
    threads; elsewhere torch's threads share each slice of `whole`. Results do not depend on what else the
    machine does. At most `torch.get_num_threads() + 1` tiles are computed at a time.

    Args:
        work: takes a slice, and is called from several threads at once.
        n: end of the last slice.
        size: length of a tile.
        whole: length of a slice where tiles are not shared.
        lazy: share only while cores are contended, for work whose results do not depend on its tiles; on free cores
            torch's threads are somewhat quicker.

    Example:
        >>> map_tiles(lambda rows: rows.stop - rows.start, 10, 2, 4)
        [4, 4, 2]
        >>> with sleep_while_contended():
        ...     sum(map_tiles(lambda rows: rows.stop - rows.start, 1000, 2, 4))
        1000
    """
    monitor, n_threads = _monitor, torch.get_num_threads()
    is_shared = monitor is not None and monitor.pid == os.getpid() and n_threads > 1  # no threads survive a fork
    is_shared = is_shared and n >= _TILES_PER_THREAD * n_threads * size
    if monitor is not None and is_shared and (monitor.is_contended or not lazy):
        return monitor.map(work, _slices(n, size))
    return [work(part) for part in _slices(n, whole)]


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


class _Monitor:
    """Thread that looks at how long threads waited for cores, and lets spare threads sleep accordingly."""

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._libgomp, self.pid, self._n_threads = libgomp, os.getpid(), torch.get_num_threads()
        self.is_contended = True  # until the first look
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._starts = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="saewb-threads", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for _ in self._workers:
            self._jobs.put(None)

    def map(self, work: Callable[[slice], T], slices: list[slice]) -> list[T]:
        """Results of the slices, in order; an error is raised once all threads are idle."""
        results: list[Any] = [None] * len(slices)
        left, errors, idle = iter(range(len(slices))), list[BaseException](), threading.Semaphore(0)
        has_grad, n_threads = torch.is_grad_enabled(), min(len(slices), self._n_threads + self.is_contended)

        def take() -> None:
            try:
                with torch.set_grad_enabled(has_grad):  # a thread's own
                    for i in left:  # the interpreter gives each number to one thread
                        results[i] = work(slices[i])
            except BaseException as error:  # of the caller, who raises it
                errors.append(error)
            finally:
                idle.release()

        self._start_workers()
        try:
            for _ in range(n_threads):
                self._jobs.put(take)
            for _ in range(n_threads):
                idle.acquire()
        finally:
            list(left)  # after an interrupt nobody begins another tile
        if errors:
            raise errors[0]
        return results

    def _start_workers(self) -> None:
        # Not an executor's, which take no work once the interpreter exits: a run then ends its step.
        with self._starts:
            while len(self._workers) <= self._n_threads:
                self._workers.append(threading.Thread(target=self._compute, name="saewb-tiles", daemon=True))
                self._workers[-1].start()

    def _compute(self) -> None:
        torch.get_num_threads()  # sets the number of a new thread, at its first use
        self._libgomp.omp_set_num_threads(1)  # of this thread; torch.set_num_threads is for all
        for job in iter(self._jobs.get, None):
            job()

    def _work(self) -> None:
        waited, at, n_quiet = run_delay(), time.monotonic(), 0
        spare: _SpareThreads | None = _SpareThreads(self._libgomp)  # until the first look shows that cores are free
        while not self._closed.wait(_PERIOD):
            now, delay = time.monotonic(), run_delay()
            share, waited, at = (delay - waited) / (now - at), delay, now
            n_quiet = n_quiet + 1 if share < _FREE else 0
            if spare is None and share > _CONTENDED:
                spare = _SpareThreads(self._libgomp)
                self.is_contended = True
            elif spare is not None and n_quiet >= _QUIET_LOOKS:
                spare.close()
                spare, self.is_contended = None, False
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
