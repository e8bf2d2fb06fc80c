"""Random orders, each told by a seed and the number of times round."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n things in one time round: 0..n-1, each once, int64; the same for the same seed and epoch.

    Example:
        >>> sorted(shuffled(5, seed=3, epoch=0).tolist()), bool((shuffled(99, 3, 0) == shuffled(99, 3, 1)).all())
        ([0, 1, 2, 3, 4], False)
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))
