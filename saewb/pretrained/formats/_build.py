"""The last step of every reader: weights, as a file has them or folded, become one of saewb's classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from saewb.errors import FormatError
from saewb.sae.sae import SAE, SAEConfig


def built(
    cfg: SAEConfig,
    weights: Mapping[str, Tensor],
    stored: torch.dtype,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> SAE:
    """An SAE around these weights; those that have the dtype and are on the CPU already are not copied.

    Args:
        cfg: what they are the weights of.
        weights: by the names of SAE.
        stored: the dtype that counts as the file's own.
        dtype: asked for; None means `stored`.
        device: asked for; None means the CPU.
    """
    return SAE.from_tensors(cfg, {name: w.to(device or "cpu", dtype or stored) for name, w in weights.items()})


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Inside, what is wrong with a file is a FormatError that names the place."""
    try:
        yield
    except ValueError as error:
        raise FormatError(f"cannot read {place}: {error}") from error
