"""Run the cases on a device and compare with the CPU: python -m devices [--device second] [--repeat 20] [names].

In `tests/`. Prints a line of JSON for each case: {"case", "problems", "seconds"}; problems are empty if all is well.
With `--transfers` also how often the host waits for the device (`transfers`), and a check of the second device itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_embedding_bag", "_embedding_bag_forward_only", "topk"}
PRODUCTS |= {"sort", "_softmax", "_log_softmax", "native_layer_norm", "cumsum", "linalg_eigh", "searchsorted"}
PRODUCTS |= {"sum", "mean", "amax", "pow", "cumsum", "index_select", "gather"}
MANY = 256  # elements of an operand from which an operation is work that belongs on the device


class HostProducts(TorchDispatchMode):
    """Products, sorts and selections that are computed on CPU tensors."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if all(t.device.type == "cpu" for t in tensors) and max(t.numel() for t in tensors) > MANY:
                shapes = [list(t.shape) for t in tensors]
                self.seen.append(f"{name} of {shapes} on the CPU")
        return func(*args, **(kwargs or {}))


def in_threads(seen):
    """Threads that start from now on are watched too."""
    run = threading.Thread.run

    def watched(self):
        with HostProducts(seen):
            run(self)

    threading.Thread.run = watched
    return lambda: setattr(threading.Thread, "run", run)


def on(device, case, draws_alike, watch=False):
    from devices.world import World

    seen = []
    restore = in_threads(seen) if watch else lambda: None
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            world = World(device, Path(folder), draws_alike)
            world.model, world.topk, world.activations  # noqa: B018  built before it is watched
            if not watch:
                return case.run(world), seen
            with HostProducts(seen):
                return case.run(world), seen
    finally:
        restore()


def problems(case, device, tolerance, repeat):
    from devices.compare import differences, misplaced

    draws_alike = device.type in ("cpu", "second")
    expected, _ = on(torch.device("cpu"), case, draws_alike)
    lines, first = [], None
    for i in range(repeat):
        result, host = on(device, case, draws_alike, watch=device.type != "cpu")
        lines += list(differences(expected, result, tolerance))
        if i == 0:
            lines += [] if device.type == "cpu" else list(misplaced(result, device))
            lines += [] if case.host_products else sorted(set(host))
        else:
            lines += [f"run {i}: {line}" for line in differences(first, result, 0.0)]
        first = first or result
    return lines


def without_float64(case, device, tolerance, repeat):
    """Problems but for float32 in place of float64, and work that is on the CPU for that reason."""
    from helpers import second_device

    import saewb.metrics

    saewb.metrics.NO_FLOAT64.add(device.type)
    second_device.has_float64 = False
    lines = problems(case, device, tolerance, repeat)
    return [
        line
        for line in lines
        if not ("float64" in line and "float32" in line) and "on the CPU" not in line and "is on cpu" not in line
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--device", default="second")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-float64", action="store_true", help="of a second device that has none, as an Apple GPU")
    parser.add_argument("--transfers", action="store_true", help="of the second device only")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.device == "second":
        from helpers.second_device import DEVICE

        device = DEVICE
    else:
        device = torch.device(options.device)
    from devices.cases import CASES

    run = without_float64 if options.no_float64 else problems
    for name in options.names or CASES:
        report(name, lambda name=name: {"problems": run(CASES[name], device, options.tolerance, options.repeat)})
    if options.transfers:
        from devices import mixed, self_check, transfers
        from devices.world import World

        report("device", lambda: {"problems": list(self_check.problems())})
        report("spread", lambda: {"problems": list(mixed.of_a_spread_model())})
        report("elsewhere", lambda: {"problems": list(mixed.of_saes_elsewhere())})
        with tempfile.TemporaryDirectory() as folder:
            report("transfers", lambda: {"counts": transfers.counts(World(device, Path(folder)))})


def report(name, run):
    start = time.perf_counter()
    try:
        result = run()
    except Exception as error:
        result = {"problems": [f"{type(error).__name__}: {error}", traceback.format_exc()[-1500:]]}
    print(json.dumps({"case": name, **result, "seconds": round(time.perf_counter() - start, 2)}), flush=True)


if __name__ == "__main__":
    main()
