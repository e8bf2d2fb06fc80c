"""Several processes that train together, each on its share of every batch: data parallel over torch.distributed.

    torchrun --nproc-per-node 2 -m saewb train config.yaml      or      accelerate launch -m saewb train config.yaml

What n processes train is what one process trains, up to the order in which floats are summed:

1. The stream. Every process holds the same mixing buffer and sees the same batches. What costs, the language model's
   forward passes, is shared: of every n passes each process makes one and gives its activations to the others
   (`saewb.data.sources.ModelSource`). Passes are those of one process, so activations are the same bits.
2. The batch. `batch_tokens` is of all processes together; each takes rows rank * B / n up to (rank + 1) * B / n.
3. The step. Every loss is a mean over tokens, so gradients and losses are averaged over processes, `fired` is summed;
   fvu is made anew from the error and the variance of the whole batch. What is chosen over a batch (BatchTopK,
   Matryoshka: the int(k B) largest) is chosen over the whole one: each process gathers the int(k B) largest scores of
   every process and keeps those of its own that are among the int(k B) largest of all. Exact, for 4 k B n bytes.
4. All else (clipping, Adam, dead latents, thresholds, coefficients, estimates of norms, held-out figures) follows from
   these numbers, and so is the same in every process without a word between them.

Process 0 alone writes: history, checkpoints, sinks. A stop in one process stops all before the next step. If a process
fails, its end closes the connections and the others end with an error that says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributed as dist

from saewb.errors import explain

_PATIENCE = timedelta(hours=12)  # how long one process waits for another that lives: a pause in one holds all


@final
class Team:
    """The processes that train together, seen from one of them. `Team()` is one process alone: nothing is exchanged.

    Every method must be called by all processes, in the same order.

    Args:
        group: of torch.distributed; None for a process alone.

    Example:
        >>> team = Team()
        >>> team.size, team.share(100), team.any(True)
        (1, slice(0, 100, None), True)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)  # 0 is the one that writes

    @classmethod
    def joined(cls) -> Team:
        """All processes that torchrun or accelerate started with this one; alone if it was started by neither.

        Joins them first if nobody has yet (`torch.distributed.init_process_group`). On machines with CUDA, process i of
        a machine takes device i.
        """
        started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        if not dist.is_available() or not (dist.is_initialized() or (started and int(os.environ["WORLD_SIZE"]) > 1)):
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not dist.is_initialized():
            dist.init_process_group()
        if dist.get_world_size() == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        return cls(dist.new_group(backend=backend, timeout=_PATIENCE))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's rows of a batch of `n`.

        Raises:
            ValueError: if the shares would not be equal.
        """
        if n % self.size:
            what = f"got batch_tokens={n} for {self.size} processes."
            fix = f"batch_tokens={max(1, round(n / self.size)) * self.size}"
            raise ValueError(explain(what, want=f"a multiple of {self.size}, of which each takes its share", fix=fix))
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag))) > 0)

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over processes, in place; the same bits in each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over processes, in place."""
        return self.sum_(values) if self.size == 1 else self.sum_(values).div_(self.size)

    def min_(self, values: Tensor) -> Tensor:
        """The least over processes, in place."""
        return self._reduced(values, dist.ReduceOp.MIN)

    @torch.compiler.disable
    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            flat = values if values.is_contiguous() else values.mT  # a matrix whose columns lie in memory
            with _together():
                dist.all_reduce(flat, how, group=self._group)
        return values

    @torch.compiler.disable
    def chosen(self, scores: Float[Tensor, " pairs"], n: int) -> Bool[Tensor, " pairs"]:
        """Which of this process's scores are among the `n` largest of all processes.

        Args:
            scores: 0 or more; at most n of them.
            n: to keep over all processes.
        """
        own = scores.new_full((n,), -1.0)  # places that nobody fills; they lose against every score
        own[: len(scores)] = scores
        everyones = [torch.empty_like(own) for _ in range(self.size)]
        with _together():
            dist.all_gather(everyones, own, group=self._group)
        kept = torch.zeros(n * self.size, dtype=torch.bool, device=scores.device)
        kept[torch.cat(everyones).topk(n, sorted=False).indices] = True
        return kept.view(self.size, n)[self.rank, : len(scores)]

    def handed(self, values: Tensor, rank: int) -> Tensor:
        """One process's tensor, given to all, in place: the others bring one of the same shape, dtype and device."""
        if self.size > 1:
            with _together():
                dist.broadcast(values, group=self._group, group_src=rank)
        return values

    def told(self, value: Any) -> Any:
        """What the leading process says: a plain value."""
        if self.size == 1:
            return value
        said = [value]
        with _together():
            dist.broadcast_object_list(said, group=self._group, group_src=0)
        return said[0]

    def leave(self) -> None:
        """Close the connections, after a failure: whoever waits for this process ends with an error."""
        if self.size > 1:
            with suppress(RuntimeError, ValueError):  # closed already, or the other end is
                dist.destroy_process_group(self._group)
            self._group, self.size = None, 1  # the last reference: with it the connections close

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block without any exchange, that ends well in all processes or with an error in all.

        Raises:
            RuntimeError: if it failed in others and not in this one.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            said: list[Any] = [None] * self.size
            with _together():
                dist.all_gather_object(said, None if error is None else f"{error}", group=self._group)
            failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
            if failed and error is None:
                raise RuntimeError(explain(f"process {failed[0][0]} failed: {failed[0][1]}", want="all to do the same"))
        if error is not None:
            raise error


@contextmanager
def _together() -> Iterator[None]:
    """Says what it means when an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        what = f"another process of this training failed or ended: {str(error).splitlines()[0]}"
        raise RuntimeError(
            explain(what, want="all to run to the end", fix="read what the other one printed")
        ) from error


ALONE = Team()
