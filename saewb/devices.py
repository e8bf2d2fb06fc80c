"""Devices by name: one that is not there is told apart from one that is full, with the line to type."""

from __future__ import annotations

import torch

from saewb.errors import explain


def usable(device: torch.device | str) -> torch.device:
    """The device of that name, if tensors can be put there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", ...; or a torch.device.
    Returns:
        A torch.device.
    Raises:
        ValueError: if torch knows no such device, was built without it, or finds none.
    Example:
        >>> usable("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(explain(f"there is no device {device!r}.", want="'cpu', 'cuda', 'cuda:1', 'mps'")) from None
    if why := _missing(found):
        raise ValueError(explain(f"device {str(device)!r}: {why}.", want="'cpu'", fix="saewb doctor    # in a shell"))
    return found


def _missing(device: torch.device) -> str:
    """Why nothing can be put there; empty if it can."""
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is built for the CPU only"
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        n = torch.cuda.device_count()
        return f"there are {n}, counted from 0" if (device.index or 0) >= n else ""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "torch finds no Apple GPU"
    return ""
