"""Data-parallel training and reading over torch.distributed: several processes, each on its share.

    torchrun --nproc-per-node 2 -m saewb train config.yaml      or      accelerate launch -m saewb train config.yaml
    torchrun --nproc-per-node 2 read.py                         which calls build_index, evaluate, ... in every process

Training. n processes train what one process trains, up to the order in which floats are summed:

1. The stream. Every process holds the same shuffle buffer and sees the same batches. The expensive part, the language
   model's forward passes, is divided: of every n passes each process computes one and broadcasts its activations
   (`saewb.data.sources.ModelSource`). They are the passes of a single process, so activations are the same bits.
2. The batch. `batch_tokens` counts all processes together; process r takes rows r * B / n up to (r + 1) * B / n.
3. The step. Every loss is a mean over tokens, so gradients and losses are averaged over processes, `fired` is summed;
   fvu is computed from the error and the variance of the whole batch. A selection over a batch (BatchTopK, Matryoshka:
   the int(k B) largest) is over the whole one: each process gathers the int(k B) largest scores of every process and
   keeps those of its own that are among the int(k B) largest of all. Exact, for 4 k B n bytes.
4. All else (clipping, Adam, dead latents, thresholds, coefficients, norm estimates, held-out metrics) is a function of
   these numbers, and so is the same in every process without communication.

Process 0 alone writes history and checkpoints and calls loggers. A stop in one process stops all before the next step.
If a process fails, its end closes the connections and the others end with an error that says so.

Reading (`build_index`, `evaluate`, `evaluate_many`, `cache_activations`). Of every n batches of rows each process runs
one, the same batches as a single process, so activations are the same bits; what they accumulate is merged in process
0, which alone writes, and every process returns the merged result. After each of these rounds all processes hear
whether one has failed, and why. A call that only some processes make stands in `with one_process():`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributed as dist

from saewb.errors import explain

_TIMEOUT = timedelta(hours=12)  # long: a pause in one process blocks all others in their next collective
_CPU = torch.device("cpu")


class DisconnectedError(RuntimeError):
    """A collective failed, since another process ended: no further one can succeed."""


@final
class ParallelContext:
    """The process group of a training, from one process. `ParallelContext()` is a single process: no communication.

    Every method is a collective: all processes must call it, in the same order.

    Args:
        group: of torch.distributed; None for a single process.

    Example:
        >>> context = ParallelContext()
        >>> context.size, context.shard(100), context.any(True)
        (1, slice(0, 100, None), True)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    def from_environment(cls) -> ParallelContext:
        """All processes that torchrun or accelerate started with this one; a single process if neither did.

        Calls `torch.distributed.init_process_group` unless that has been done. On machines with CUDA, process i of a
        machine takes device i.
        """
        launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        if not dist.is_available() or not (dist.is_initialized() or (launched and int(os.environ["WORLD_SIZE"]) > 1)):
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not dist.is_initialized():
            dist.init_process_group()
        if dist.get_world_size() == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        return cls(dist.new_group(backend=backend, timeout=_TIMEOUT))

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which writes."""
        return self.rank == 0

    def shard(self, n: int) -> slice:
        """This process's rows of a batch of `n`.

        Raises:
            ValueError: if `n` is not a multiple of the number of processes.
        """
        if n % self.size:
            what = f"got batch_tokens={n} for {self.size} processes."
            fix = f"batch_tokens={max(1, round(n / self.size)) * self.size}"
            raise ValueError(explain(what, want=f"a multiple of {self.size}, so that all shards are equal", fix=fix))
        rows = n // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return flag if self.size == 1 else bool(self.sum_(torch.tensor(float(flag))) > 0)

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over processes, in place; the same bits in each."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over processes, in place."""
        return self.sum_(values) if self.size == 1 else self.sum_(values).div_(self.size)

    def min_(self, values: Tensor) -> Tensor:
        """The minimum over processes, in place."""
        return self._all_reduce(values, dist.ReduceOp.MIN)

    @torch.compiler.disable
    def _all_reduce(self, values: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            flat = values if values.is_contiguous() else values.mT  # a matrix whose columns lie in memory
            with _explain_disconnect():
                dist.all_reduce(flat, op, group=self._group)
        return values

    @torch.compiler.disable
    def topk_mask(self, scores: Float[Tensor, " pairs"], n: int) -> Bool[Tensor, " pairs"]:
        """Which of this process's scores are among the `n` largest of all processes.

        Args:
            scores: 0 or more; at most n of them.
            n: to keep over all processes.
        """
        padded = scores.new_full((n,), -1.0)  # below every score, so padding is never selected before one
        padded[: len(scores)] = scores
        gathered = padded.new_empty(n * self.size)
        with _explain_disconnect():
            dist.all_gather_into_tensor(gathered, padded, group=self._group)
        mask = torch.zeros(n * self.size, dtype=torch.bool, device=scores.device)
        mask[gathered.topk(n, sorted=False).indices] = True
        return mask.view(self.size, n)[self.rank, : len(scores)]

    def broadcast(self, values: Tensor, rank: int) -> Tensor:
        """The tensor of process `rank`, in place: the others pass one of the same shape, dtype and device."""
        if self.size > 1:
            with _explain_disconnect():
                dist.broadcast(values, group=self._group, group_src=rank)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The plain value of process 0."""
        if self.size == 1:
            return value
        objects = [value]
        with _explain_disconnect():
            dist.broadcast_object_list(objects, group=self._group, group_src=0)
        return objects[0]

    def destroy(self) -> None:
        """Close the connections after a failure: whoever waits for this process ends with an error."""
        if self.size > 1:
            with suppress(RuntimeError, ValueError):  # closed already, or the other end is
                dist.destroy_process_group(self._group)
            self._group, self.size = None, 1  # the last reference: with it the connections close

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A block without communication that succeeds in all processes or raises in all.

        Raises:
            RuntimeError: if it failed in others and not in this one.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            messages = self.gather_objects(None if error is None else f"{error}" or type(error).__name__)
            failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
            if error is None:
                raise RuntimeError(f"process {failed[0][0]} failed: {failed[0][1]}")
        if error is not None:
            raise error

    def gather_objects(self, value: Any) -> list[Any]:
        """The plain values of all processes, in each."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _explain_disconnect():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Check that all processes pass the same.

        Args:
            values: plain ones, by what they are, for the message.

        Raises:
            ValueError: in all processes, naming what differs.
        """
        first, *others = self.gather_objects(dict(values))
        for rank, theirs in enumerate(others, 1):
            if different := [name for name in first if theirs.get(name) != first[name]]:
                what = f"process {rank} has another {', '.join(different)} than process 0."
                fix = "torch.manual_seed(0)    # before what is random; or load it from a file"
                raise ValueError(explain(what, want="the same call in every process", fix=fix))

    def merge_to_main(
        self, state: Callable[[], Mapping[str, Tensor]], merge: Callable[[Mapping[str, Tensor]], None]
    ) -> None:
        """Merge the states of all processes into that of process 0, in pairs: log2(size) steps, always in one order.

        Args:
            state: this process's, as tensors by name; sent from the CPU.
            merge: adds the state of other processes to this one's.
        """
        step = 1
        while step < self.size:
            if self.rank % (2 * step) == step:
                self._send(state(), self.rank - step)
                return
            if self.rank + step < self.size:
                merge(self._receive(self.rank + step))
            step *= 2

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of process 0, by name, on the CPU; those of the others are not looked at."""
        if self.size == 1:
            return dict(tensors)
        local = {name: t.detach().cpu().contiguous() for name, t in tensors.items()} if self.is_main else {}
        sizes = self.broadcast_object([(name, t.dtype, tuple(t.shape)) for name, t in local.items()])
        result = local or {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in sizes}
        for t in result.values():
            self.broadcast(_bytes_of(t), 0)
        return result

    def _send(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        local = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        sizes = [(name, t.dtype, tuple(t.shape)) for name, t in local.items()]
        with _explain_disconnect():
            dist.send_object_list([sizes], group=self._group, device=_CPU, group_dst=rank)
            for t in local.values():
                dist.send(_bytes_of(t), group=self._group, group_dst=rank)

    def _receive(self, rank: int) -> dict[str, Tensor]:
        sizes: list[Any] = [None]
        with _explain_disconnect():
            dist.recv_object_list(sizes, group=self._group, device=_CPU, group_src=rank)
            tensors = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in sizes[0]}
            for t in tensors.values():
                dist.recv(_bytes_of(t), group=self._group, group_src=rank)
        return tensors


def _bytes_of(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: no backend knows all dtypes."""
    return t.view(-1).view(torch.uint8)


_is_alone: ContextVar[bool] = ContextVar("_is_alone", default=False)


@contextmanager
def one_process() -> Iterator[None]:
    """Calls in this block, and this thread, do not share their work: for what only some processes of a launch do.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> with one_process():  # in process 0 alone, say
        ...     result = saewb.evaluate(model, sae, ["The river flows."] * 8, ctx_len=16, losses=False)
    """
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


@contextmanager
def shared_call() -> Iterator[ParallelContext]:
    """The processes that torchrun or accelerate launched, for one call that all of them make; closed at its end.

    However the call ends in one process, the others do not wait for it any longer.
    """
    parallel = SINGLE_PROCESS if _is_alone.get() else ParallelContext.from_environment()
    try:
        yield parallel
        parallel.any(False)  # nobody closes before all are here
    finally:
        parallel.destroy()


@contextmanager
def _explain_disconnect() -> Iterator[None]:
    """Explain the error of a collective that fails."""
    try:
        yield
    except RuntimeError as error:
        what = f"another process of this launch failed or ended: {str(error).splitlines()[0]}"
        raise DisconnectedError(
            explain(what, want="all to run to the end", fix="read what the other one printed")
        ) from error


SINGLE_PROCESS = ParallelContext()
