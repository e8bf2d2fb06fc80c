"""Tests and benchmarks on a GPU, in one command: python -m tests.gpu [--device cuda] [--minutes 8] [--small]

From the root of a clone, after `pip install -e ".[test]"`; no network. In this order, until the time is up:

1. Every case of `tests/devices` on the device, compared with the CPU; training steps that must not wait for the
   device; the tests marked `gpu`.
2. Benchmarks at the sizes of a GPU: training steps, attached SAEs, an index, training end to end. Sizes are halved
   until they fit into the free memory.

Prints one table. "limit" is the least time that the work can take: the bytes that any implementation has to move at
the bandwidth of a copy, or the one product that has to be dense at the speed of a product, as measured here; "of it"
is how many times as long it takes. The exit status is 1 if a test fails. `--device cpu --small` shows that the script
runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from gpu import bench  # noqa: E402
from gpu.table import Clock, Table  # noqa: E402


def main() -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new begins")
    parser.add_argument("--small", action="store_true", help="sizes of a test, a few cases")
    parser.add_argument("--no-tests", action="store_true", help="benchmarks only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no GPU here: saewb doctor says why; --device cpu --small tries the script")
    clock, table = Clock(60 * options.minutes, device), Table()
    print(facts(device), flush=True)
    failures = [] if options.no_tests else list(tests(device, options.small, clock, table))
    bench.run(device, options.small, clock, table)
    print(f"\n{facts(device)}\n\n{table}\n\n{clock.seconds:.0f} s; {len(failures)} tests failed")
    for failure in failures:
        print(f"  {failure}")
    return int(bool(failures))


def facts(device: torch.device) -> str:
    """Date, device and versions, in a line."""
    import transformers

    import saewb

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    memory = f", {torch.cuda.mem_get_info(device)[1] / 2**30:.0f} GiB" if device.type == "cuda" else ""
    versions = f"saewb {saewb.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{time.strftime('%Y-%m-%d')}, {name}{memory}, {versions}"


# -- tests -------------------------------------------------------------------------------------------------------------

SMALL_CASES = ("cross_layer", "sparse_latents", "attach", "build_index", "reconstruction", "streams", "transcoders")
TOLERANCE = 5e-3  # relative: a GPU sums in another order, and Adam enlarges what that changes, by up to lr a step


def tests(device, small, clock, table):
    """Run the tests; yields a line for each failure."""
    for name, run in (("cases", cases), ("steps without waits", waits), ("tests marked gpu", marked)):
        if clock.is_over:
            table.add(f"**{name}**", note="left out: no time")
            continue
        start, failures = clock.seconds, []
        n = 0
        for what, failed in run(device, small, clock):
            n += 1
            if failed:
                failures.append(f"{what}: {failed}")
        yield from failures
        table.add(f"**{name}**", clock.seconds - start, note=f"{n - len(failures)} of {n} pass")


def cases(device, small, clock):
    """(name, problems) of each case of `tests/devices`."""
    from devices.__main__ import problems
    from devices.cases import CASES

    for name in SMALL_CASES if small else CASES:
        if clock.is_over:
            return
        try:
            yield name, "; ".join(problems(CASES[name], device, TOLERANCE, repeat=1)[:3])
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"


def waits(device, small, clock):
    """(objective, error) of training steps that torch stops if they wait for the device (CUDA), but at a look."""
    from devices.world import World
    from helpers.objective_registry import OBJECTIVES

    import saewb

    world = World(device, TESTS)
    for name, objective in OBJECTIVES.items():
        if name == "pursuit":  # asks in each round which tokens go on
            continue
        config = saewb.TrainConfig(10**6, batch_tokens=60, dead_after_tokens=60, look_every_steps=10**6)
        stream = saewb.stream_tensors(world.activations, batch_tokens=60, repeat=True)
        steps = iter(saewb.Training(stream, objective, config))
        for _ in range(3):
            next(steps)
        try:
            _never_waiting(device, lambda steps=steps: [next(steps) for _ in range(3)])
            yield name, ""
        except RuntimeError as error:
            yield name, str(error)


def _never_waiting(device, run):
    if device.type != "cuda":
        run()
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def marked(device, small, clock):
    """(pytest, its last lines) of the tests marked `gpu`; without pytest's plugins."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = files[:1] if small else files
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib", *files]
    left = max(30.0, clock.left)
    try:
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        yield "pytest", f"took longer than {left:.0f} s"
        return
    yield "pytest", "" if done.returncode == 0 else " ".join(done.stdout.splitlines()[-4:])


if __name__ == "__main__":
    sys.exit(main())
