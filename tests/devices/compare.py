"""Compare the results of one case on two devices, and name where they differ."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch


def differences(a, b, tolerance, at=""):
    """Lines that say where two results differ: integers and texts at all, numbers by more than the tolerance."""
    if isinstance(a, torch.nn.Module):
        a, b = dict(a.state_dict()), dict(b.state_dict())
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.detach().cpu(), b.detach().cpu()
        a, b = (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in (a, b))
        yield from _arrays(a.numpy(), b.numpy(), tolerance, at)
    elif type(a) is not type(b):
        yield f"{at}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, np.ndarray):
        yield from _arrays(a, b, tolerance, at)
    elif isinstance(a, pd.DataFrame):
        if list(a.columns) != list(b.columns) or len(a) != len(b):
            yield f"{at}: tables of {a.shape} and {b.shape}"
            return
        for column in a.columns:
            yield from differences(a[column].to_list(), b[column].to_list(), tolerance, f"{at}.{column}")
    elif isinstance(a, pd.Series):
        yield from differences(a.to_dict(), b.to_dict(), tolerance, at)
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield f"{at}: keys {list(a)[:5]} and {list(b)[:5]}"
            return
        for key in a:
            yield from differences(a[key], b[key], tolerance, f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{at}: {len(a)} and {len(b)} entries"
            return
        if a and all(isinstance(value, float) for value in (*a, *b)):
            yield from _arrays(np.array(a), np.array(b), tolerance, at)
            return
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, tolerance, f"{at}[{i}]")
    elif isinstance(a, float):
        if not (math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(a) and math.isnan(b))):
            yield f"{at}: {a!r} and {b!r}"
    elif dataclasses.is_dataclass(a) and not isinstance(a, type):
        for field in dataclasses.fields(a):
            yield from differences(getattr(a, field.name), getattr(b, field.name), tolerance, f"{at}.{field.name}")
    elif isinstance(a, str):
        if _without_device(a) != _without_device(b):
            yield f"{at}: {a!r} and {b!r}"
    elif a is not None and hasattr(a, "__dict__") and not callable(a):
        yield from differences(vars(a), vars(b), tolerance, at)
    elif a != b and not callable(a):
        yield f"{at}: {a!r} and {b!r}"


def _arrays(a, b, tolerance, at):
    if a.shape != b.shape or a.dtype != b.dtype:
        yield f"{at}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    elif a.dtype.kind == "f":
        scale = max(1.0, float(np.nanmax(np.abs(a[np.isfinite(a)]), initial=0.0)))
        if not np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            yield f"{at}: differ by {np.nanmax(np.abs(a - b)):.3g} of {scale:.3g}"
    elif not (a == b).all():
        yield f"{at}: {int((a != b).sum())} of {a.size} integers differ"


def _without_device(text):
    return re.sub(r"\bon (cpu|cuda|second)(:\d+)?", "on a device", text)


def misplaced(result, device, at="", seen=None):
    """Where tensors of a result are on another device than this; keys that begin with "host " are of the CPU."""
    seen = set() if seen is None else seen
    if id(result) in seen or isinstance(result, (str, int, float, np.ndarray, pd.DataFrame, type(None))):
        return
    seen.add(id(result))
    if isinstance(result, torch.Tensor):
        if result.device.type != device.type:
            yield f"{at} is on {result.device}, not on {device}"
    elif isinstance(result, torch.nn.Module):
        yield from misplaced(dict(result.named_parameters()), device, at, seen)
    elif isinstance(result, Mapping):
        for key, value in result.items():
            host = torch.device("cpu") if str(key).startswith("host ") else device
            yield from misplaced(value, host, f"{at}.{key}", seen)
    elif isinstance(result, (list, tuple)):
        for i, value in enumerate(result):
            yield from misplaced(value, device, f"{at}[{i}]", seen)
    elif hasattr(result, "__dict__") and not callable(result):
        yield from misplaced(vars(result), device, at, seen)
