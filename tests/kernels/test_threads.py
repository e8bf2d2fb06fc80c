"""Waiting threads: asleep while cores are contended, awake on free ones, and none left behind."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from saewb.kernels import select, threads
from saewb.kernels.pairs import by_latent, combine, dots, gather_rows

pytestmark = pytest.mark.skipif(threads._libgomp() is None, reason="needs GNU OpenMP on Linux and two cores")


def n_tasks():
    return len(os.listdir("/proc/self/task"))


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def delay(monkeypatch):
    """Seconds that threads waited for cores, as the test sets them."""
    torch.ones(10).sum()
    seconds = [0.0]
    monkeypatch.setattr(threads, "run_delay", lambda: seconds[0])
    monkeypatch.setattr(threads, "_PERIOD", 0.01)
    return seconds


def test_spare_threads_come_with_contention_and_go_without(delay):
    before, spare = n_tasks(), len(os.sched_getaffinity(0))
    with threads.sleep_while_contended(), threads.sleep_while_contended():
        until(lambda: n_tasks() == before + 1)  # the monitor alone: nothing waited
        for _ in range(2):
            with threads.sleep_while_contended():
                stop = threading.Event()

                def contend(stop=stop):
                    while not stop.wait(0.002):
                        delay[0] += 1.0

                contender = threading.Thread(target=contend)
                contender.start()
                until(lambda: n_tasks() == before + 2 + 1 + spare)  # contender; the thread that keeps them, and they
                stop.set()
                contender.join()
            until(lambda: n_tasks() == before + 1)
    until(lambda: n_tasks() == before)
    assert threads._monitor is None


def test_an_exception_ends_it_too(delay):
    before = n_tasks()
    with pytest.raises(ZeroDivisionError), threads.sleep_while_contended():
        _ = 1 / 0
    until(lambda: n_tasks() == before)
    assert threads._monitor is None


@pytest.fixture
def two_threads():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


def test_tiles_are_shared_by_threads_of_one_core_each(two_threads):
    before, libgomp, seen = n_tasks(), threads._libgomp(), []

    def work(part):
        seen.append((threading.current_thread().name, libgomp.omp_get_max_threads(), torch.is_grad_enabled()))
        time.sleep(0.01)
        return part.start, part.stop

    with threads.sleep_while_contended(), torch.no_grad():
        assert threads.map_tiles(work, 33, 4, 33) == [(i, min(33, i + 4)) for i in range(0, 33, 4)]
        assert {name for name, _, _ in seen} == {"saewb-tiles"}
        assert {(n, grad) for _, n, grad in seen} == {(1, False)}
        assert torch.get_num_threads() == 2
        seen.clear()
        assert threads.map_tiles(work, 31, 4, 20) == [(0, 20), (20, 31)]  # too few: torch's threads share each
        assert threading.current_thread().name == seen[0][0]
    until(lambda: n_tasks() <= before)


def test_an_error_in_a_tile_is_raised_and_the_next_call_works(two_threads):
    def work(part):
        if part.start >= 8:
            raise ZeroDivisionError(part.start)
        return part.start

    with threads.sleep_while_contended():
        with pytest.raises(ZeroDivisionError):
            threads.map_tiles(work, 32, 2, 32)
        assert threads.map_tiles(lambda part: part.start, 16, 2, 16) == list(range(0, 16, 2))


def test_a_forked_child_computes_tiles_by_itself(two_threads):
    with threads.sleep_while_contended():
        threads.map_tiles(lambda part: part, 32, 2, 32)
        if not (child := os.fork()):
            os._exit(threads.map_tiles(lambda part: part.stop, 32, 2, 32) != [32])
        assert os.waitpid(child, 0)[1] == 0


def test_shared_or_not_a_step_selects_and_sums_the_same(two_threads, monkeypatch):
    x, W, b = torch.randn(2048, 16), torch.randn(2304, 16), torch.zeros(2304)
    pairs = select.top_per_token(x, select.Readout(W, b), 32)
    order = by_latent(pairs, 2304)

    def results():
        above = select.above_zero(x, select.Readout(W, b - 12), 10**6)
        of_batch = select.top_of_batch(x, select.Readout(W, b), 5000, 10**6)
        sums = combine(pairs, pairs.pre, W), gather_rows(order, pairs.pre, x, torch.empty(2304, 16)), dots(pairs, x, W)
        return [above.latents, above.tokens, of_batch.latents, of_batch.tokens, *sums]

    alone = results()
    with threads.sleep_while_contended():
        calls, map_ = [], threads._Monitor.map
        monkeypatch.setattr(threads._Monitor, "map", lambda self, *a: calls.append(1) or map_(self, *a))
        shared = results()
    assert len(calls) >= 5
    for one, other in zip(alone, shared, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_waiting_threads_use_no_processor_time():
    """After each parallel region the second thread waits awake for milliseconds, or sleeps."""
    code = """
import contextlib, time, torch
from saewb.kernels import select, threads
from saewb.kernels.pairs import by_latent, combine, dots, gather_rows
x = torch.ones(2**20)
def used():
    x.add(1)
    start = time.process_time()
    for _ in range(40):
        x.add(1)
        time.sleep(0.004)
    return time.process_time() - start
awake = used()
threads._QUIET_LOOKS = 10**9  # asleep, however quiet
with threads.sleep_while_contended():
    time.sleep(0.1)
    asleep = used()
print(awake, asleep)
"""
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=Path.cwd()).stdout
    awake, asleep = map(float, out.split())
    assert asleep < awake / 2


def test_what_waits_is_counted():
    """Two threads more than cores spin: some of them wait."""
    n, before = len(os.sched_getaffinity(0)) + 2, threads.run_delay()
    stop = time.monotonic() + 0.3

    def spin():
        x = torch.ones(2000)
        while time.monotonic() < stop:
            x.sum()  # without the interpreter's lock

    spinning = [threading.Thread(target=spin) for _ in range(n)]
    for thread in spinning:
        thread.start()
    time.sleep(0.25)
    assert threads.run_delay() > before
    for thread in spinning:
        thread.join()
