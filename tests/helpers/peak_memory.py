"""How much memory some lines of Python take at their peak, beyond what was there before: measured, in a new process."""

import subprocess
import sys
from pathlib import Path

import pytest

import saewb

_AROUND = """
import torch
torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

{before}
start = peak()
{code}
print(peak() - start)
"""


def peak_bytes(before, code, printed=None):
    """What the code prints is added to `printed`, line by line.

    Not by `getrusage`, whose ru_maxrss a new process inherits from the one that starts it.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    run = subprocess.run(
        [sys.executable, "-c", _AROUND.format(before=before, code=code)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(saewb.__file__).parents[1],
    )
    *lines, took = run.stdout.splitlines()
    if printed is not None:
        printed += lines
    return int(took)
