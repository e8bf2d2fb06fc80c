"""`python -m tests.gpu` runs, so that it is ready when there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_script_runs_on_the_cpu_at_small_sizes():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 25  # a head and its line, 3 of tests, 20 of benchmarks
    assert not [row for row in rows if "Error" in row or "left out" in row]
    assert "0 tests failed" in done.stdout
