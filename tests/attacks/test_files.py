"""Each file operation of whatever writes fails once: by a kill, a full disk, an interrupt. What is there opens; called
again it comes to what it would have been.
"""

import os
import random
import shutil
import time

import pytest
import torch
from helpers import faults
from helpers.writers import WRITERS, Cache, Download, Save, serve_download

from saewb._files import is_locked
from saewb.errors import FormatError

TRIES = int(os.environ.get("SAEWB_ATTACK_TRIES", 200))
FEW = 3  # with the other tests


def _orphans(folder):
    temporary = (".new", ".old", ".replacing")
    return [path for path in folder.rglob("*") if path.name.endswith(temporary) or is_locked(path.parent)]


def _attack(writer, tmp_path, how, stride, start=0):
    """Fail every `stride`-th operation; the number of them."""
    writer.prepare(whole := _new(tmp_path / "whole"))
    expected, n, tries = writer.work(whole), start, 0
    while True:
        writer.prepare(folder := _new(tmp_path / f"{n}"))
        failed = _fail(writer, folder, n, how)
        writer.look(folder)
        assert torch.equal(writer.work(folder), expected), f"operation {n}"
        if how == "kill" and failed:
            assert _orphans(folder) == [], f"operation {n}"
        if not failed:
            return tries
        n, tries = n + stride, tries + 1


def _new(folder):
    folder.mkdir()
    return folder


def _fail(writer, folder, n, how):
    if how == "kill":
        return faults.killed_at(folder, n, lambda: writer.work(folder))
    fail = faults.interrupt if how == "interrupt" else faults.full_disk
    with faults.failing(folder, n, fail, persistent=how == "full disk") as layer:
        try:
            writer.work(folder)
        except (OSError, KeyboardInterrupt, FormatError):  # the last: an error while reading
            pass
        except RuntimeError as error:
            if "cannot" not in str(error) and "SAE" not in str(error):
                raise
    return layer.count > n


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_kill_loses_nothing_that_was_written(writer, tmp_path):
    assert _attack(writer, tmp_path, "kill", stride=29, start=5) > 0


@pytest.mark.parametrize("writer", [Save, Cache], ids=lambda writer: writer.__name__)
def test_a_full_disk_loses_nothing_that_was_written(writer, tmp_path):
    assert _attack(writer, tmp_path, "full disk", stride=17, start=3) > 0


@pytest.mark.attack
@pytest.mark.parametrize("how", ["kill", "full disk", "one error", "interrupt"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_every_file_operation_fails(writer, how, tmp_path):
    print(writer.__name__, how, _attack(writer, tmp_path, how, stride=1), "operations")


def _kill_at_random(writer, tmp_path, tries, seed=0):
    """SIGKILL at uniformly random moments of the work; how many of `tries` came before its end."""
    writer.prepare(whole := _new(tmp_path / "whole"))
    expected, rng, n_killed = writer.work(whole), random.Random(seed), 0
    writer.prepare(again := _new(tmp_path / "again"))
    began = time.monotonic()
    assert not faults.killed_after(60.0, lambda: writer.work(again))
    seconds = time.monotonic() - began
    for n in range(tries):
        writer.prepare(folder := _new(tmp_path / f"{n}"))
        was_killed = faults.killed_after(rng.uniform(0.0, seconds), lambda folder=folder: writer.work(folder))
        n_killed += was_killed
        writer.look(folder)
        assert torch.equal(writer.work(folder), expected), f"kill {n}"
        assert writer is Download or _orphans(folder) == [], f"kill {n}"  # huggingface_hub leaves its own
        shutil.rmtree(folder)
    return n_killed


@pytest.fixture
def served(tmp_path):
    with serve_download(_new(tmp_path / "hub")):
        yield


@pytest.mark.parametrize("writer", [*WRITERS, Download], ids=lambda writer: writer.__name__)
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_kill_at_a_random_moment_loses_nothing_that_was_written(writer, tmp_path, served):
    _kill_at_random(writer, tmp_path, FEW)


@pytest.mark.attack
@pytest.mark.parametrize("writer", [*WRITERS, Download], ids=lambda writer: writer.__name__)
def test_kills_at_random_moments_lose_nothing(writer, tmp_path, served):
    print(writer.__name__, _kill_at_random(writer, tmp_path, TRIES, seed=1), "kills in", TRIES, "tries")
