"""Dead latents listed for the host at intervals, without making it wait for the device."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@final
class DeadRows:
    """Indices of the latents that were dead at a look, to which the auxiliary losses are limited.

    How many there are has to be known on the host, and reading it makes the host wait for all work on the device. So
    the count of a look is copied while the device goes on, and the list of that look is used from the next one on.

    Args:
        d_sae: number of latents.
        device: of the masks.
        waits: use the list of a look at once: where nothing has to wait, or looks are at every step.

    Example:
        >>> dead = DeadRows(4, torch.device("cpu"), waits=True)
        >>> dead.look(torch.tensor([True, False, True, False]))
        >>> dead.rows
        tensor([0, 2])
    """

    def __init__(self, d_sae: int, device: torch.device, *, waits: bool) -> None:
        self.mask: Bool[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.bool, device=device)
        """Latents that are listed."""
        self.rows: Int[Tensor, " n_dead"] = torch.zeros(0, dtype=torch.int64, device=device)
        """Their indices, ascending."""
        self._waits = waits
        self._counted: tuple[Tensor, _Count] | None = None  # of the last look; listed from the next one on

    def look(self, dead: Bool[Tensor, " d_sae"]) -> None:
        """Look at the latents that are dead now."""
        if self._waits:
            self._list(dead)
            return
        if self._counted is not None:
            self.mask, count = self._counted
            self.rows = self.mask.logical_not().to(torch.uint8).argsort(stable=True)[: count.read()]
        self._counted = dead, _Count(dead)

    def state(self) -> dict[str, Tensor | None]:
        """State on the device: the latents that are listed, and those of the last look."""
        return {"looked": self.mask, "counted": None if self._counted is None else self._counted[0]}

    def restore(self, looked: Bool[Tensor, " d_sae"], counted: Bool[Tensor, " d_sae"] | None) -> None:
        """Load a `state()`, on the device."""
        self._list(looked)
        self._counted = None if counted is None else (counted, _Count(counted))

    def _list(self, dead: Bool[Tensor, " d_sae"]) -> None:
        self.mask, self.rows = dead, dead.nonzero()[:, 0]


@final
class _Count:
    """Number of true entries, on its way to the host."""

    def __init__(self, mask: Tensor) -> None:
        self._host = torch.empty((), dtype=torch.int64, pin_memory=mask.is_cuda)
        # Only CUDA has the event with which to know that a copy is finished; others wait here.
        self._host.copy_(mask.sum(), non_blocking=mask.device.type not in ("mps", "xpu"))
        self._copied = torch.cuda.Event() if mask.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()  # begun many steps ago
        return int(self._host)
