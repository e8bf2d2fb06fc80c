"""Waiting threads: asleep while cores are contended, awake on free ones, and none left behind."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from saewb.kernels import threads

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


def test_waiting_threads_use_no_processor_time():
    """After each parallel region the second thread waits awake for milliseconds, or sleeps."""
    code = """
import contextlib, time, torch
from saewb.kernels import threads
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
