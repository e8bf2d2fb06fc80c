"""The second device behaves as a GPU does where it matters: what it refuses, what it allows, what it counts."""

from __future__ import annotations

import copy

import torch
from helpers.second_device import DEVICE, transfers

X = torch.arange(12.0).view(4, 3)


def refused(run):
    try:
        run()
    except (RuntimeError, TypeError):
        return True
    return False


def problems():
    """Lines that say what is not as it should be."""
    x, ids = X.to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    refusals = {
        "an operand on the CPU": lambda: x + X,
        "a value on the CPU, written by index": lambda: x.clone().__setitem__(ids, X[:2]),
        "indices of the device for a CPU tensor": lambda: X[ids],
        "a result written to a number of the CPU": lambda: torch.zeros(()).add_(x.sum()),
        "a generator of the CPU": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
    }
    yield from (f"not refused: {name}" for name, run in refusals.items() if not refused(run))
    zeros = torch.empty(0, device=DEVICE)
    torch.mm(x, x.T, out=zeros)
    values = {
        "factories": (torch.arange(5, device=DEVICE), torch.arange(5)),
        "eye": (torch.eye(3, device=DEVICE)[:2], torch.eye(3)[:2]),
        "a vector times a matrix": (x[0] @ x.T, X[0] @ X.T),
        "out= of another size": (zeros, X @ X.T),
        "resize_": (x.clone().resize_(6), X.flatten()[:6]),
        "a list as index": (x[[2, 0]], X[[2, 0]]),
        "a list of bools as index": (x[[True, False, False, True]], X[[0, 3]]),
        "an index on the CPU": (x[torch.tensor([1])], X[1:2]),
        "a number of the CPU": (x * torch.tensor(2.0), X * 2),
        "tensors of numbers": (x.new_tensor([1, 2]), torch.tensor([1.0, 2.0])),
        "a copy": (copy.deepcopy(x), X),
        "draws": (
            torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)),
            torch.randn(3, generator=torch.Generator().manual_seed(1)),
        ),
    }
    for name, (got, want) in values.items():
        if got.device.type != DEVICE.type or got.shape != want.shape or not torch.equal(got.cpu(), want):
            yield f"{name}: {got} on {got.device}, not {want}"
    parameter = torch.nn.Parameter(x.clone())
    parameter.data = torch.zeros_like(x)
    if parameter.sum().item() or parameter.grad is not None:
        yield "`.data = ` does not change the parameter"
    (parameter[0] @ x.T).sum().backward()
    if not torch.equal(parameter.grad.cpu()[0], X.sum(0)) or parameter.grad.device != DEVICE:
        yield f"a gradient is {parameter.grad}"
    with torch.device("meta"):
        if torch.tensor([1.0]).device.type != "meta":
            yield "torch.tensor does not follow `with torch.device(...)`"
    with DEVICE:
        if {torch.tensor([1.0]).device, torch.zeros(2).device} != {DEVICE}:
            yield "factories do not follow `with torch.device(...)`"
    mask = x > 4
    reads = {
        "number": lambda: (x.sum().item(), bool(mask.any())),
        "copy": lambda: (x.cpu(), x.tolist(), X.clone().copy_(x)),
        "upload": lambda: (X.to(DEVICE), x.clone().copy_(X), torch.tensor([1], device=DEVICE), x[torch.tensor([1])]),
        "nonzero": lambda: mask.nonzero(),
        "mask": lambda: x[mask],
        "size": lambda: (torch.bincount(ids), ids.unique()),
        None: lambda: (x.sum(), x.clone().__setitem__(mask, 0.0), torch.where(mask, x, 0), x[ids], x.sort(), x.topk(2)),
    }
    for kind, run in reads.items():
        with transfers() as counts:
            n = len(done) if isinstance(done := run(), tuple) else 1
        if dict(counts) != ({} if kind is None else {kind: n}):
            yield f"{n} of kind {kind} were counted as {dict(counts)}"
