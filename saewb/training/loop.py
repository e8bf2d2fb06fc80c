"""The training loop: a generator of TrainStep over one stream of activations, for one SAE or many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, Union, final

import torch
from torch import Tensor

from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain, near
from saewb.training.checks import check_state, check_trainee, plain
from saewb.training.config import TrainConfig, Trainee
from saewb.training.normalization import AnySAE, Units, estimated, from_estimates, whitening_units
from saewb.training.objectives import Objective
from saewb.training.step_metrics import TrainStep
from saewb.training.trainer import Learner, described, starts_from_data

PROBE_ROWS = 256  # of the last batch, that an export is proved on
_ESTIMATED = ("constant", "centered", "whitened")  # normalizations that are estimated


class Batch(Protocol):
    """Activations of the same tokens at several points: what a stream yields (`saewb.models.capture.Activations`)."""

    values: Mapping[str, Tensor]  # by point, [tokens, d]; row t of each is the same token

    def __len__(self) -> int: ...


class Stream(Protocol):
    """Where batches come from."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches, from the present place on."""
        ...

    def state(self) -> dict[str, Any]:
        """The place: after the last batch that was taken."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a place; iterating anew goes on from there."""
        ...


@final
class Training:
    """Trains SAEs on a stream, one optimizer step each per batch; iterate over it to make it run.

        for step in saewb.Training(stream, saewb.TopK(d_sae=4096, k=32), config):
            ...

    Each SAE has its own optimizer and learns exactly what it would learn alone; they share the batches. `state()` after
    any step is all there is: a new Training over an equal stream that restores it goes on bit for bit.

    Args:
        stream: yields batches of exactly `config.batch_tokens` tokens.
        saes: an objective, or objectives or `Trainee`s by the names the SAEs are to have.
        config: how to train.
        held_out: activations by point, `[tokens, d]`, in the model's units, to measure on every `eval_every_tokens` and
            after the last step.
        device: of weights and arithmetic; None means that of the first batch.
        team: processes that train together, each on its share of every batch (`saewb.distributed`); each is given the same
            stream of whole batches. None trains alone.

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
        team: ParallelContext | None = None,
    ) -> None:
        named = saes if isinstance(saes, Mapping) else {"sae": saes}
        if not named:
            raise ValueError(explain("Training got no SAE.", want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
        self._team = team or SINGLE_PROCESS
        self._rows = self._team.shard(config.batch_tokens)  # of a batch, this process's
        self.config = config
        self.n_steps = 0  # done
        self.n_tokens = 0  # trained on
        self._stream = stream
        self._trainees = {name: s if isinstance(s, Trainee) else Trainee(s) for name, s in named.items()}
        for name, trainee in self._trainees.items():
            check_trainee(name, trainee, config)
        self._signature = {
            name: {**described(t), "read": t.read, "write": t.write, "lr": t.lr} for name, t in self._trainees.items()
        }
        self._held_out = None if held_out is None else dict(held_out)
        self._device = None if device is None else torch.device(device)
        self._iterator: Iterator[Batch] | None = None  # of the stream, one for the whole training
        self._pending: deque[Batch] = deque()  # taken from the stream for estimates, to be trained on next
        self._place: dict[str, Any] = {}  # of the stream before the first batch that was pending
        self._n_taken = 0  # batches trained on since then
        self._n_skip = self._skipped = 0  # batches that were trained on before it was resumed; those gone by again
        self._units: dict[str, Units] = {}
        self._learners: dict[str, Learner] = {}
        self._probe: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[TrainStep]:
        """Goes on to `config.n_steps`; may be left and taken up again between any two steps."""
        self.begin()
        while self.n_steps < self.config.n_steps:
            batch = self._next()
            if batch is None:
                what = f"the stream ended after {self.n_tokens} tokens, of n_tokens={self.config.n_tokens}."
                raise ValueError(explain(what, want="more data, or a stream of several epochs"))
            yield self._step(self._checked(batch))

    def _next(self) -> Batch | None:
        if not self._pending:
            return next(self._iterator, None)
        self._n_taken += 1
        return self._pending.popleft()

    def _step(self, values: Mapping[str, Tensor]) -> TrainStep:
        inner = {point: units.apply(self._placed(values[point][self._rows])) for point, units in self._units.items()}
        figures = {}
        for name, learner in self._learners.items():
            read, write = self._points(name)
            figures[name] = learner.learn(inner[read], inner[write], self.n_tokens)
        before, self.n_tokens = self.n_tokens, self.n_tokens + self.config.batch_tokens
        self.n_steps += 1
        self._probe = {point: values[point][:PROBE_ROWS].clone() for point in self._units}
        if self._held_out is not None and self._is_due(before):
            figures = {name: replace(f, held_out=self._measured(name)) for name, f in figures.items()}
        return TrainStep(self.n_steps, self.n_tokens, figures)

    def _is_due(self, before: int) -> bool:
        every = self.config.eval_every_tokens
        return self.n_steps == self.config.n_steps or (every is not None and before // every != self.n_tokens // every)

    def _measured(self, name: str) -> Any:
        read, write = self._points(name)
        return self._learners[name].measure(self._held_out[read], self._held_out[write])

    @property
    def saes(self) -> dict[str, AnySAE]:
        """The SAEs so far, by name: in the model's own units, with unit decoder rows, proved on the last batch.

        Copies: training goes on undisturbed.

        Raises:
            RuntimeError: if an SAE's output is not that of the training to 1e-5 of a row's length.
        """
        if not self._learners:
            self.begin()
        made = {}
        for name, learner in self._learners.items():
            metadata = {
                "objective": described(self._trainees[name]),
                "n_training_tokens": self.n_tokens,
                "normalization": self.config.normalization,
                "trained_with": "saewb",
            }
            made[name] = learner.export(self._probe[self._points(name)[0]], metadata)
        return made

    def state(self) -> dict[str, Any]:
        """All that a resumed training needs: a dict of plain values and tensors on the host, copied.

        It can be written with torch.save and read with `weights_only=True` if the stream's own state can.
        """
        self.begin()
        units = {p: u.snapshot() for p, u in self._units.items()}
        return {
            "config": plain(self.config),
            "trainees": self._signature,
            "points": {name: [t.read, t.write] for name, t in self._trainees.items()},
            "n_steps": self.n_steps,
            "n_tokens": self.n_tokens,
            "units": units,
            "probe": {point: rows.to("cpu", copy=True) for point, rows in self._probe.items()},
            "learners": {name: learner.snapshot() for name, learner in self._learners.items()},
            "device": str(self._device),
            "stream": self._place if self._pending else self._stream.state(),
            "n_taken": self._n_taken if self._pending else 0,  # batches to take from there first
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state()` was taken: weights, optimizers, schedules, estimates, place in the stream.

        Raises:
            ValueError: if the SAEs, or a field of the config that must not change, are not those of the state.
        """
        check_state(state, self._signature, self.config)
        self._device = self._device or torch.device(state["device"])
        for name, (read, write) in state["points"].items():
            self._trainees[name] = replace(self._trainees[name], read=read, write=write)
        self._units = {point: Units.restored(saved, self._device) for point, saved in state["units"].items()}
        self._probe = dict(state["probe"])
        self._make_learners({point: rows.shape[1] for point, rows in self._probe.items()}, {})
        for name, learner in self._learners.items():
            learner.restore(state["learners"][name])
        self.n_steps, self.n_tokens = state["n_steps"], state["n_tokens"]
        self._pending.clear()
        self._stream.restore(state["stream"])
        self._iterator = iter(self._stream)
        self._n_skip, self._skipped = state["n_taken"], 0

    def begin(self) -> None:
        """Estimates and first weights, from the stream's first batches, which are then trained on.

        The first step does it, or whatever needs weights. With several processes that share the model's passes: for
        all of them to call, before one asks for SAEs alone.
        """
        while self.read_ahead():
            pass

    def read_ahead(self, fill: Callable[[], bool] = lambda: False) -> bool:
        """A part of what `begin()` does; whether there is more of it. For who wants to look, or to stop, in between.

        Args:
            fill: called before a batch is taken until it says that there is no more to do, e.g. `stream.fill`.
        """
        if self._iterator is None:
            self._place, self._iterator = self._stream.state(), iter(self._stream)
        if fill():
            return True
        if self._skipped < self._n_skip:
            next(self._iterator)
            self._skipped += 1
            return self.ahead is not None
        if self._learners:
            return False
        if len(self._pending) < self._n_wanted and (batch := next(self._iterator, None)) is not None:
            self._pending.append(batch)
            return True
        self._start()
        return False

    @property
    def ahead(self) -> tuple[str, int, int] | None:
        """(what for, tokens there, tokens wanted) of what is read before the first step; None once that may come.

        At any time, of any thread.
        """
        size, normalizes = self.config.batch_tokens, self.config.normalization in _ESTIMATED
        if self._skipped < self._n_skip:
            return "going back to its place", self._skipped * size, self._n_skip * size
        what = "estimating " + ("the normalization" if normalizes else "on the first tokens")
        what = what if self._estimates else "reading the first batch"
        return None if self._learners else (what, len(self._pending) * size, self._n_wanted * size)

    @property
    def _n_wanted(self) -> int:
        """Batches that are read before the first step."""
        config = self.config
        tokens = min(config.n_tokens, config.estimate_tokens or 8 * config.batch_tokens) if self._estimates else 1
        return -(-tokens // config.batch_tokens)

    @property
    def _estimates(self) -> bool:
        fits = any(map(starts_from_data, self._trainees.values()))
        return self.config.normalization in _ESTIMATED or self.config.b_dec == "mean" or fits

    def _start(self) -> None:
        if not self._pending:
            raise ValueError(explain("the stream is empty.", want="at least one batch"))
        values = self._checked(self._pending[0])
        self._resolve(values)
        points = sorted({point for name in self._trainees for point in self._points(name)})
        self._check_held_out(points)
        self._device = self._device or values[points[0]].device
        self._probe = {point: values[point][:PROBE_ROWS].clone() for point in points}
        means = {}
        for point in points:
            self._units[point], means[point] = self._estimated(point) if self._estimates else (self._fixed(), None)
        self._make_learners({point: values[point].shape[1] for point in points}, means)
        for name, learner in self._learners.items():
            learner.fit([batch.values[self._points(name)[0]] for batch in self._pending])

    def _check_held_out(self, points: list[str]) -> None:
        for point in points:
            if self._held_out is not None and point not in self._held_out:
                what = f"held_out has no activations of {point!r}."
                raise ValueError(explain(what, near=near(point, self._held_out), want=", ".join(points)))

    def _resolve(self, values: Mapping[str, Tensor]) -> None:
        for name, trainee in self._trainees.items():
            if trainee.read is None and len(values) > 1:
                what = f"{name!r} does not say which of {len(values)} points it reads."
                fix = f"saewb.Trainee(..., read={next(iter(values))!r})"
                raise ValueError(explain(what, want=", ".join(values), fix=fix))
            trainee = replace(trainee, read=trainee.read or next(iter(values)))
            for point in (trainee.read, trainee.write or trainee.read):
                if point not in values:
                    what = f"the stream has no point {point!r}, which {name!r} asks for."
                    raise ValueError(explain(what, near=near(point, values), want=", ".join(values)))
            self._trainees[name] = trainee

    def _fixed(self) -> Units:
        return from_estimates(self.config.normalization, 1.0, torch.zeros(0))

    def _estimated(self, point: str) -> tuple[Units, Tensor]:
        """Units of a point, and its mean in them, from the pending batches."""
        batches = [self._placed(batch.values[point]) for batch in self._pending]
        factor, mean = estimated(point, batches, centered=self.config.normalization == "centered")
        if self.config.normalization == "whitened":
            units = whitening_units(point, batches, mean, self.config.shrinkage)
        else:
            units = from_estimates(self.config.normalization, factor, mean)
        return units, torch.cat([units.apply(x).mean(0, keepdim=True) for x in batches]).mean(0)

    def _make_learners(self, widths: Mapping[str, int], means: Mapping[str, Tensor | None]) -> None:
        for name, trainee in self._trainees.items():
            read, write = self._points(name)
            self._learners[name] = Learner(
                trainee,
                self.config,
                self._units[read],
                self._units[write],
                d_in=widths[read],
                d_out=widths[write],
                device=self._device,
                start=means.get(write) if self.config.b_dec == "mean" else None,
                team=self._team,
            )

    def _points(self, name: str) -> tuple[str, str]:
        trainee = self._trainees[name]
        return trainee.read, trainee.write or trainee.read

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self._device, torch.float32)

    def _checked(self, batch: Batch) -> Mapping[str, Tensor]:
        if len(batch) != self.config.batch_tokens:
            what = f"the stream yields {len(batch)} tokens per batch, the config asks for {self.config.batch_tokens}."
            raise ValueError(explain(what, want="the same", fix=f"TrainConfig(..., batch_tokens={len(batch)})"))
        return batch.values
