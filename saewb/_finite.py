"""Check activations for infinities and NaN, which float16 gives beyond 65,504.

On the CPU a check costs one sum. On an accelerator nothing waits for it: `FiniteCheck` keeps a flag there, which its
user looks at where results are awaited anyway.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saewb.errors import explain


class FiniteCheck:
    """Checks many tensors; on the CPU each at once, elsewhere all together at `look`.

    Args:
        deferred: wait for `look` on the CPU too.

    Example:
        >>> finite = FiniteCheck()
        >>> finite.add("logits", torch.ones(3))
        >>> finite.add("logits", torch.tensor([1.0, torch.inf]))
        Traceback (most recent call last):
        ...
        FloatingPointError: logits are not finite: 1 of 2 numbers.
          want: a model and data without infinities and NaN; float16 ends at 65,504
          fix:  model = saewb.load_model(..., dtype=torch.bfloat16)
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self._deferred = deferred
        self._flags: dict[str, Tensor] = {}  # on the device, by name: whether all were finite

    def add(self, name: str, x: Tensor, where: str = "") -> None:
        """Check a tensor.

        Args:
            name: of the tensor, in the plural, for the error message.
            x: of any shape.
            where: what part of the data it is, for the error message.

        Raises:
            FloatingPointError: if a number in it is not finite, and it is on the CPU.
        """
        x = x.detach()
        if self._deferred or x.device.type != "cpu":
            flag = x.isfinite().all()
            self._flags[name] = flag if name not in self._flags else self._flags[name] & flag
            return
        total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)  # finite if all of them are
        if not math.isfinite(total.item()) and (n := int((~x.isfinite()).sum())):
            raise _not_finite(f"{name} are not finite: {n:,} of {x.numel():,} numbers{where}.")

    def look(self) -> None:
        """Wait for the device, and raise if a number of a tensor so far was not finite.

        Raises:
            FloatingPointError: if one was not.
        """
        flags, self._flags = self._flags, {}
        for name, flag in flags.items():
            if not bool(flag):
                raise _not_finite(f"{name} are not finite.")


def check_finite(name: str, x: Tensor) -> None:
    """Check one tensor; waits for its device.

    Raises:
        FloatingPointError: if a number in it is not finite.
    """
    check = FiniteCheck()
    check.add(name, x)
    check.look()


def _not_finite(what: str) -> FloatingPointError:
    want = "a model and data without infinities and NaN; float16 ends at 65,504"
    return FloatingPointError(explain(what, want=want, fix="model = saewb.load_model(..., dtype=torch.bfloat16)"))
