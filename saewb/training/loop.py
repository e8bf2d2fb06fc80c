"""The training loop: a generator of TrainStep over one stream of activations, for one SAE or many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Union, final

import torch
from torch import Tensor

from saewb._config import dump
from saewb._finite import FiniteCheck, check_finite
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain, near
from saewb.training.config import TrainConfig, Trainee
from saewb.training.normalization import (
    ActivationNormalizer,
    AnySAE,
    JointNormalizer,
    estimate_factor_and_mean,
    estimate_whitening,
)
from saewb.training.objectives import Objective
from saewb.training.step_metrics import HeldOut, RunUp, TrainStep
from saewb.training.trainer import SAETrainer, check_state, check_trainee

PROBE_ROWS = 256  # rows of the last batch on which an export is checked
_ESTIMATED = ("constant", "centered", "whitened")  # normalizations estimated from the first batches


class Batch(Protocol):
    """Activations of the same tokens at several points: what a stream yields (`saewb.models.capture.Activations`)."""

    values: Mapping[str, Tensor]
    """By point, [tokens, d]; row t of each is the same token."""

    def __len__(self) -> int: ...


class Stream(Protocol):
    """Source of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches, from the current position on."""
        ...

    def state(self) -> dict[str, Any]:
        """The position after the last batch that was yielded."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position; a new iterator continues from there."""
        ...


def side_by_side(values: Mapping[str, Tensor], points: Sequence[str]) -> Tensor:
    """Activations of several points next to each other, `[tokens, sum of d]`; of a single point the tensor itself."""
    if len(points) == 1:
        return values[points[0]]
    first = values[points[0]]
    return torch.cat([values[point].to(first.device, first.dtype) for point in points], dim=1)


@final
class Training:
    """Training of SAEs on one stream: an iterator that makes one optimizer step of each SAE per batch.

        for step in saewb.Training(stream, saewb.TopK(d_sae=4096, k=32), config):
            ...

    Each SAE has its own optimizer and learns exactly what it would learn alone; they share the batches. `state()` after
    any step is complete: a new Training over an equal stream that restores it continues bit for bit.

    Args:
        stream: yields batches of exactly `config.batch_tokens` tokens.
        saes: an objective or a `Trainee`; several of them in a dictionary by the SAE's name.
        config: how to train.
        held_out: activations by point, `[tokens, d]`, in the model's units, to measure on every `eval_every_tokens` and
            after the last step.
        device: of weights and arithmetic; None means that of the first batch.
        parallel: processes that train together, each on its shard of every batch (`saewb.distributed`); each gets the
            same stream of whole batches. None trains alone.

    Raises:
        ValueError: on a batch of another size, a point the stream does not have, or a stream that ends too early.

    Example:
        >>> import saewb
        >>> x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        >>> stream = saewb.stream_tensors({"hook": x}, batch_tokens=256, repeat=True)
        >>> training = Training(stream, saewb.TopK(d_sae=32, k=4), TrainConfig(n_tokens=1024, batch_tokens=256))
        >>> [step.n_tokens for step in training], training.saes["sae"]
        ([256, 512, 768, 1024], SAE(topk k=4, 8 -> 32 latents, hook, float32 on cpu))
    """

    def __init__(
        self,
        stream: Stream,
        saes: Union[Objective, Trainee, Mapping[str, Union[Objective, Trainee]]],
        config: TrainConfig,
        *,
        held_out: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        parallel: ParallelContext | None = None,
    ) -> None:
        by_name = saes if isinstance(saes, Mapping) else {"sae": saes}
        if not by_name:
            raise ValueError(explain("Training got no SAE.", want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
        self._parallel = parallel or SINGLE_PROCESS
        self._rows = self._parallel.shard(config.batch_tokens)  # of a batch, for this process
        self.config = config
        self.n_steps = 0  # done
        self.n_tokens = 0  # trained on
        self._stream = stream
        self._trainees = {name: s if isinstance(s, Trainee) else Trainee(s) for name, s in by_name.items()}
        for name, trainee in self._trainees.items():
            check_trainee(name, trainee, config)
        self._signature = {
            name: {**t.objective_fields(), "read": t.read, "write": t.write, "lr": t.lr}
            for name, t in self._trainees.items()
        }
        self._held_out = None if held_out is None else dict(held_out)
        self._device = None if device is None else torch.device(device)
        self._iterator: Iterator[Batch] | None = None  # of the stream, one for the whole training
        self._pending: deque[Batch] = deque()  # read for estimates, to be trained on next
        self._stream_state: dict[str, Any] = {}  # before the first batch that was pending
        self.mid_step = False
        """Whether a batch was taken from the stream that has not been trained on to the end of its step."""
        self._n_taken = 0  # pending batches trained on since then
        self._n_skip = self._skipped = 0  # batches to skip after a restore; those skipped so far
        # Of the batches. On a CPU each is checked before its step, unless there is to be no look at each.
        self._finite = FiniteCheck(deferred=config.look_every_steps not in (None, 1))
        self._normalizers: dict[str, ActivationNormalizer] = {}
        self._trainers: dict[str, SAETrainer] = {}
        self._probe: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[TrainStep]:
        """Train up to `config.n_steps`; may be interrupted and continued between any two steps."""
        self.begin()
        while self.n_steps < self.config.n_steps:
            batch = self._next()
            if batch is None:
                what = f"the stream ended after {self.n_tokens} tokens, of n_tokens={self.config.n_tokens}."
                raise ValueError(explain(what, want="more data, or a stream of several epochs"))
            yield self._step(batch)

    def _next(self) -> Batch | None:
        if self._pending:
            self._n_taken += 1
            batch = self._pending.popleft()
        else:
            batch = next(self._iterator, None)
        self.mid_step = batch is not None
        return batch

    def _step(self, batch: Batch) -> TrainStep:
        values = self._check_batch(batch)
        for point in self._normalizers:
            self._finite.add(f"activations at {point!r}", values[point], f" in batch {self.n_steps + 1:,}")
        inputs = {p: n.normalize(self._to_device(values[p][self._rows])) for p, n in self._normalizers.items()}
        metrics = {}
        for name, trainer in self._trainers.items():
            trainee = self._trainees[name]
            x = side_by_side(inputs, trainee.reads)
            y = side_by_side(inputs, trainee.writes) if trainee.is_transcoder else x
            metrics[name] = trainer.step(x, y, self.n_tokens)
        before, self.n_tokens = self.n_tokens, self.n_tokens + self.config.batch_tokens
        self.n_steps += 1
        self.mid_step = False
        self._probe = {point: values[point][:PROBE_ROWS].clone() for point in self._normalizers}
        every = self.config.eval_every_tokens
        is_due = every is not None and before // every != self.n_tokens // every
        if self._held_out is not None and (is_due or self.n_steps == self.config.n_steps):
            metrics = {name: replace(m, held_out=self._evaluate(name)) for name, m in metrics.items()}
        return TrainStep(self.n_steps, self.n_tokens, metrics)

    def check_finite(self) -> None:
        """Check the batches since the last call; waits for the device, unless each was checked before its step.

        Raises:
            FloatingPointError: if activations in one were not finite.
        """
        self._finite.look()

    def _evaluate(self, name: str) -> HeldOut:
        trainee = self._trainees[name]
        x = side_by_side(self._held_out, trainee.reads)
        y = side_by_side(self._held_out, trainee.writes) if trainee.is_transcoder else x
        return self._trainers[name].measure(x, y)

    @property
    def saes(self) -> dict[str, AnySAE]:
        """The SAEs so far, by name: in the model's own units, with unit decoder rows, checked on the last batch.

        Copies: training goes on undisturbed.

        Raises:
            FloatingPointError: if weights of one are not finite; `export(name)` has the others.
            RuntimeError: if an SAE's output is not that of the training to 1e-5 of a row's length.
        """
        if not self._trainers:
            self.begin()
        return {name: self.export(name) for name in self._trainers}

    def export(self, name: str) -> AnySAE:
        """One of the SAEs so far, see `saes`."""
        trainer = self._trainers[name]
        if not all(bool(p.isfinite().all()) for p in trainer.params.parameters()):
            fix = f"lr={(self._trainees[name].lr or self.config.lr) / 10:g}"
            raise FloatingPointError(explain(f"{name!r} diverged: its weights are not finite.", fix=fix))
        metadata = {
            "objective": self._trainees[name].objective_fields(),
            "n_training_tokens": self.n_tokens,
            "normalization": self.config.normalization,
            "trained_with": "saewb",
        }
        return trainer.export(side_by_side(self._probe, self._trainees[name].reads), metadata)

    def state(self) -> dict[str, Any]:
        """State from which training resumes: a dict of plain values and of tensors copied to the host.

        `torch.save` writes it, and `torch.load(weights_only=True)` reads it if it reads the stream's own state.
        """
        self.begin()
        return {
            "config": dump(self.config),
            "trainees": self._signature,
            "points": {name: [t.read, t.write] for name, t in self._trainees.items()},
            "n_steps": self.n_steps,
            "n_tokens": self.n_tokens,
            "units": {point: normalizer.state() for point, normalizer in self._normalizers.items()},
            "probe": {point: rows.to("cpu", copy=True) for point, rows in self._probe.items()},
            "learners": {name: trainer.state() for name, trainer in self._trainers.items()},
            "device": str(self._device),
            "stream": self._stream_state if self._pending else self._stream.state(),
            "n_taken": self._n_taken if self._pending else 0,  # batches to take from there first
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a `state()`: weights, optimizers, schedules, estimates, position in the stream.

        Raises:
            ValueError: if the SAEs, or a field of the config that must not change, differ from those of the state.
        """
        check_state(state, self._signature, self.config)
        self._device = self._device or torch.device(state["device"])
        for name, (read, write) in state["points"].items():
            self._trainees[name] = replace(self._trainees[name], read=read, write=write)
        self._normalizers = {
            point: ActivationNormalizer.from_state(saved, self._device) for point, saved in state["units"].items()
        }
        self._probe = dict(state["probe"])
        self._make_trainers({point: rows.shape[1] for point, rows in self._probe.items()}, {})
        for name, trainer in self._trainers.items():
            trainer.restore(state["learners"][name])
        self.n_steps, self.n_tokens = state["n_steps"], state["n_tokens"]
        self._pending.clear()
        self._stream.restore(state["stream"])
        self._iterator = iter(self._stream)
        self._n_skip, self._skipped = state["n_taken"], 0

    def begin(self) -> None:
        """Estimate normalizations and initialize weights from the first batches, which are then trained on.

        The first step does it, or whatever needs weights. With several processes that share the model's passes, all of
        them must call it before one alone exports SAEs.
        """
        while self.read_ahead():
            pass

    def read_ahead(self, fill: Callable[[], bool] = lambda: False) -> bool:
        """Read one batch that `begin()` needs, so that a caller may stop in between; True if there is more to do.

        Args:
            fill: called before a batch is read until it returns False, e.g. `stream.fill`.
        """
        if self._iterator is None:
            self._stream_state, self._iterator = self._stream.state(), iter(self._stream)
        if fill():
            return True
        if self._skipped < self._n_skip:
            next(self._iterator)
            self._skipped += 1
            return self.ahead is not None
        if self._trainers:
            return False
        if len(self._pending) < self._n_estimate_batches and (batch := next(self._iterator, None)) is not None:
            for point, x in batch.values.items():
                check_finite(f"activations at {point!r}", x)
            self._pending.append(batch)
            return True
        self._initialize()
        return False

    @property
    def ahead(self) -> RunUp | None:
        """What is read before the first step; None once that can be taken.

        Any thread may read it at any time.
        """
        size, normalizes = self.config.batch_tokens, self.config.normalization in _ESTIMATED
        if self._skipped < self._n_skip:
            return RunUp("going back to its place", self._skipped * size, self._n_skip * size)
        if self._trainers:
            return None
        purpose = "estimating " + ("the normalization" if normalizes else "on the first tokens")
        purpose = purpose if self._estimates else "reading the first batch"
        return RunUp(purpose, len(self._pending) * size, self._n_estimate_batches * size)

    @property
    def _n_estimate_batches(self) -> int:
        """Batches that are read before the first step."""
        config = self.config
        tokens = min(config.n_tokens, config.estimate_tokens or 8 * config.batch_tokens) if self._estimates else 1
        return -(-tokens // config.batch_tokens)

    @property
    def _estimates(self) -> bool:
        fits = any(trainee.fits_thresholds for trainee in self._trainees.values())
        return self.config.normalization in _ESTIMATED or self.config.b_dec == "mean" or fits

    def _initialize(self) -> None:
        if not self._pending:
            raise ValueError(explain("the stream is empty.", want="at least one batch"))
        values = self._check_batch(self._pending[0])
        self._resolve_points(values)
        points = sorted({point for trainee in self._trainees.values() for point in (*trainee.reads, *trainee.writes)})
        for point in points:
            if self._held_out is not None and point not in self._held_out:
                what = f"held_out has no activations of {point!r}."
                raise ValueError(explain(what, near=near(point, self._held_out), want=", ".join(points)))
        self._device = self._device or values[points[0]].device
        self._probe = {point: values[point][:PROBE_ROWS].clone() for point in points}
        means = {}
        for point in points:
            self._normalizers[point], means[point] = self._estimate(point)
        self._make_trainers({point: values[point].shape[1] for point in points}, means)
        for name, trainer in self._trainers.items():
            reads = self._trainees[name].reads
            trainer.fit_thresholds([side_by_side(batch.values, reads) for batch in self._pending])

    def _resolve_points(self, values: Mapping[str, Tensor]) -> None:
        self._trainees = {name: trainee.at(values, name) for name, trainee in self._trainees.items()}

    def _estimate(self, point: str) -> tuple[ActivationNormalizer, Tensor | None]:
        """Normalizer of a point and, if anything is estimated, the mean of its output over the pending batches."""
        normalization = self.config.normalization
        if not self._estimates:
            return ActivationNormalizer.from_estimates(normalization, 1.0, torch.zeros(0)), None
        batches = [self._to_device(batch.values[point]) for batch in self._pending]
        factor, mean = estimate_factor_and_mean(point, batches, centered=normalization == "centered")
        if normalization == "whitened":
            whitening = estimate_whitening(point, batches, mean, self.config.shrinkage)
            normalizer = ActivationNormalizer(mean=mean, whitening=whitening)
        else:
            normalizer = ActivationNormalizer.from_estimates(normalization, factor, mean)
        return normalizer, torch.cat([normalizer.normalize(x).mean(0, keepdim=True) for x in batches]).mean(0)

    def _make_trainers(self, widths: Mapping[str, int], means: Mapping[str, Tensor | None]) -> None:
        for name, trainee in self._trainees.items():
            starts_at_mean = self.config.b_dec == "mean" and all(means.get(p) is not None for p in trainee.writes)
            self._trainers[name] = SAETrainer(
                trainee,
                self.config,
                JointNormalizer.of({point: (self._normalizers[point], widths[point]) for point in trainee.reads}),
                JointNormalizer.of({point: (self._normalizers[point], widths[point]) for point in trainee.writes}),
                widths_in=tuple(widths[point] for point in trainee.reads),
                widths_out=tuple(widths[point] for point in trainee.writes),
                device=self._device,
                b_dec=torch.cat([means[point] for point in trainee.writes]) if starts_at_mean else None,
                parallel=self._parallel,
            )

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, torch.float32)

    def _check_batch(self, batch: Batch) -> Mapping[str, Tensor]:
        if len(batch) != self.config.batch_tokens:
            what = f"the stream yields {len(batch)} tokens per batch, the config asks for {self.config.batch_tokens}."
            raise ValueError(explain(what, want="the same", fix=f"TrainConfig(..., batch_tokens={len(batch)})"))
        return batch.values
