"""Trainer of one SAE: parameters, optimizer, dead latents, loss coefficients, checkpoint state, export.

A step on one batch in training units:

1. coefficients are warmed up, dead latents marked; losses and gradients are computed, by autograd or by the sparse step
   (`choose_gradients`), and averaged over processes;
2. with unit rows, gradients are projected orthogonal to the rows; gradients are clipped;
3. Adam steps; rows are scaled to unit length again;
4. silence, density, threshold and controlled coefficients are updated, all on the device.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import dump
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain
from saewb.metrics import ReconstructionStream
from saewb.stats.firing import FiringStream
from saewb.training.config import TrainConfig, Trainee
from saewb.training.dead_latents import DeadRows
from saewb.training.normalization import AnyNormalizer, AnySAE, to_model, to_training
from saewb.training.objectives import (
    Losses,
    MatchingPursuit,
    Objective,
    ObjectiveState,
    Params,
    constrain,
    project_gradient,
)
from saewb.training.objectives.sparsity_coefficient import SMOOTHING
from saewb.training.objectives.topk import TopKObjective
from saewb.training.sparse_step import MAX_DENSITY, best_precision, clipped_step, has_sparse_step, sparse_step
from saewb.training.step_metrics import HeldOut, StepMetrics

TOLERANCE = 1e-5  # relative error per row allowed between an exported SAE and the training's own output
MISMATCH_TOLERANCE = 0.05  # fraction of probe rows that may exceed it: rounding can flip a latent at its threshold
MAY_CHANGE = {"n_tokens", "eval_every_tokens", "compile", "step", "look_every_steps"}  # fields a resumed run may change
LATER_FIELDS = {"k_start": None, "k_anneal_tokens": 0}  # of objectives; states of older runs lack them

# Fills `.grad` of every parameter with the gradient of the total, in the parameter's own memory order.
Gradients = Callable[
    [Objective, Params, Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"], ObjectiveState],
    Losses,
]


@final
class SAETrainer:
    """Trainer of one SAE: its weights and all other state that a step changes.

    Args:
        trainee: the SAE to train; its `read` names a point.
        config: of the training.
        read: normalization of the input.
        write: normalization of the output.
        widths_in: width of each point it reads.
        widths_out: width of each point it writes.
        device: of all tensors.
        b_dec: first value of b_dec, in training units; None starts from zeros (or from `init`).
        parallel: processes that share each batch.
    """

    def __init__(
        self,
        trainee: Trainee,
        config: TrainConfig,
        read: AnyNormalizer,
        write: AnyNormalizer,
        *,
        widths_in: tuple[int, ...],
        widths_out: tuple[int, ...],
        device: torch.device,
        b_dec: Float[Tensor, " d_out"] | None = None,
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self.trainee, self.config, self.read, self.write, self._parallel = trainee, config, read, write, parallel
        self._points_out = dict(zip(trainee.writes, widths_out, strict=True))
        self.params = self._initial_params(widths_in, widths_out, device)
        if b_dec is not None and trainee.init is None:
            with torch.no_grad():
                self.params.b_dec.copy_(b_dec)
        self.schedules = trainee.objective.coefficients()
        self.objective_state = replace(trainee.objective.initial_state(device), parallel=parallel)
        self._coefficients = dict(self.objective_state.coefficients)  # as controlled, before the warm-up factor
        d_sae = trainee.objective.d_sae
        self._silent = torch.zeros(d_sae, dtype=torch.int64, device=device)  # tokens since each latent fired
        self._listed = DeadRows(d_sae, device, waits=device.type == "cpu" or config.look_every(device) == 1)
        self._density = torch.zeros(d_sae, device=device)
        self._l0 = torch.zeros((), device=device)  # of about the last ten batches
        self._n_batches = 0
        self._gradients = choose_gradients(trainee.objective, config)
        self._optimizer = _optimizer(self.params, config)

    def _initial_params(self, widths_in: Sequence[int], widths_out: Sequence[int], device: torch.device) -> Params:
        objective, init, seed = self.trainee.objective, self.trainee.init, self.trainee.seed
        d_in, d_out = sum(widths_in), sum(widths_out)
        if init is None:
            seed = self.config.seed if seed is None else seed
            blocks = {"blocks": widths_in} if objective.multi_point else {}
            d_target = d_out if self.trainee.is_transcoder else None
            return objective.init_params(d_in, d_target, seed=seed, device=device, **blocks)
        if (init.d_in, init.d_sae, init.d_out) != (d_in, objective.d_sae, d_out):
            what = f"init has d_in, d_sae, d_out = {init.d_in}, {init.d_sae}, {init.d_out}."
            want = f"{d_in}, {objective.d_sae}, {d_out} of the stream and the objective"
            raise ValueError(explain(what, want=want))
        params = objective.from_sae(to_training(init, self.read, self.write), device=device)
        constrain(params, objective.rows)
        return params

    def fit_thresholds(self, batches: Sequence[Float[Tensor, "tokens d_in"]]) -> None:
        """Set initial thresholds from the first batches, in the model's units, if the objective fits them to data."""
        if self.trainee.fits_thresholds:
            inputs = [self.read.normalize(self._to_device(x)) for x in batches]
            self.trainee.objective.fit_thresholds(self.params, inputs)

    def step(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], n_tokens: int) -> StepMetrics:
        """Make one step on this process's shard of a batch, in training units, after `n_tokens` tokens."""
        objective, config, batch = self.trainee.objective, self.config, len(x) * self._parallel.size
        self._update_objective_state(n_tokens)
        losses = self._gradients(objective, self.params, x, y, self.objective_state)
        losses = combine_shards(losses, y, self._parallel)
        rate = config.rate(n_tokens) * (1 if self.trainee.lr is None else self.trainee.lr / config.lr)
        self._optimize(rate)
        coefficients = self.objective_state.coefficients
        self._update_statistics(losses, batch, n_tokens)
        silent = self._silent > config.dead_after
        return StepMetrics(
            loss=losses.total.detach(),
            losses={name: value.detach() for name, value in losses.terms.items()},
            l0=losses.l0,
            fvu=losses.fvu,
            dead_frac=silent.float().mean(),
            n_dense=(self._density > config.dense_above).sum(),
            lr=rate,
            coefficients=coefficients,
            extra=losses.extra,
            densities=self._density,
            schedules=self.schedules,
            n_tokens=n_tokens + batch,
            d_sae=objective.d_sae,
        )

    def _update_objective_state(self, n_tokens: int) -> None:
        """Warm up coefficients and mark dead latents."""
        objective = self.trainee.objective
        k = objective.k_at(n_tokens) if isinstance(objective, TopKObjective) else None
        state, after = replace(self.objective_state, k=k), self.config.dead_after
        coefficients = {n: self._coefficients[n] * c.warmup_factor(n_tokens) for n, c in self.schedules.items()}
        if n_tokens <= after or not objective.revives_dead:  # no latent can be dead yet, or no loss uses them
            self.objective_state = replace(state, coefficients=coefficients)
            return
        silent = self._silent > after
        if self._n_batches % self.config.look_every(silent.device) == 0:
            self._listed.look(silent)
        dead = self._listed.mask & silent
        self.objective_state = replace(state, coefficients=coefficients, dead=dead, dead_rows=self._listed.rows)

    def _optimize(self, rate: float) -> None:
        rows = self.trainee.objective.rows
        parameters = list(self.params.parameters())
        for p in parameters:  # the fused Adam walks memory: a gradient in another order would be applied crosswise
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
            self._parallel.mean_(p.grad)
        if rows == "unit":
            project_gradient(self.params)
        self.trainee.objective.restrict_gradients(self.params)
        self._optimizer.param_groups[0]["lr"] = rate
        clipped_step(self._optimizer, parameters, self.config.clip)
        constrain(self.params, rows)

    @torch.no_grad()
    def _update_statistics(self, losses: Losses, batch: int, n_tokens: int) -> None:
        config, first = self.config, 1 / (self._n_batches + 1)
        self._silent = torch.where(losses.fired > 0, 0, self._silent + batch)
        share = max(first, min(1.0, batch / config.density_tokens))
        self._density = self._density + share * (losses.fired / batch - self._density)
        self._l0 = self._l0 + max(first, SMOOTHING) * (losses.l0 - self._l0)
        for name, c in self.schedules.items():
            if c.target_l0 is not None and n_tokens >= c.warmup_tokens:
                weight = self._coefficients[name]
                self._coefficients[name] = c.control(weight, self._l0, batch=batch, tau=config.control)
        self.objective_state = self.trainee.objective.next_state(self.objective_state, losses)
        self._n_batches += 1

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> HeldOut:
        """Metrics of the SAE as it would be exported now, on activations in the model's units."""
        reconstruction, firing = ReconstructionStream(), FiringStream()
        by_point = {point: ReconstructionStream() for point in self._points_out if len(self._points_out) > 1}
        for rows, target in zip(x.split(self.config.batch_tokens), y.split(self.config.batch_tokens), strict=True):
            rows, target = self._to_device(rows), self._to_device(target)
            acts, recons = self._forward(rows)
            reconstruction.update(target, recons)
            firing.update(acts)
            if by_point:
                blocks = (values.split(self.params.blocks, dim=1) for values in (target, recons))
                for stream, y_block, recons_block in zip(by_point.values(), *blocks, strict=True):
                    stream.update(y_block, recons_block)
        points = {point: stream.result() for point, stream in by_point.items()}
        return HeldOut(reconstruction.result(), firing.result(dense_above=self.config.dense_above), points)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self._silent.device, self.params.W_dec.dtype)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normalized = self.read.normalize(x)
        acts = self.trainee.objective.latents(self.params, normalized, self.objective_state)
        return acts, self.write.denormalize(self.params.decode(acts, normalized), x)

    @torch.no_grad()
    def export(self, probe: Float[Tensor, "rows d_in"], metadata: Mapping[str, Any]) -> AnySAE:
        """The current SAE in the model's units, checked on `probe` (model's units) against the training's own output.

        Raises:
            RuntimeError: if on more than 1 row in 20 its output differs from the training's by more than 1e-5 of the
                row's length.
        """
        objective = self.trainee.objective
        sae = to_model(objective.to_sae(self.params, self.objective_state), self.read, self.write)
        hooks = {"metadata": metadata}
        if not objective.multi_point:
            hooks["hook"] = self.trainee.read
        if self.trainee.is_transcoder:
            hooks["hook_out"] = self.trainee.write
        sae = sae.with_config(**hooks)
        self._check_export(sae, self._to_device(probe))
        return sae

    def _check_export(self, sae: AnySAE, x: Tensor) -> None:
        expected = self._forward(x)[1]
        off = (sae(x) - expected).norm(dim=1) / torch.maximum(expected.norm(dim=1), x.norm(dim=1)).clamp_min(1e-30)
        wrong = int((~(off <= TOLERANCE)).sum())
        if wrong > MISMATCH_TOLERANCE * len(x):
            what = f"the exported {sae!r} differs from training by more than {TOLERANCE} on {wrong} of {len(x)} rows"
            worst = f"{what} (worst {float(off.max()):.2g} of a row's length); it was not handed out."
            raise RuntimeError(explain(worst, want="finite weights; float32 products (no TF32)"))

    def state(self) -> dict[str, Any]:
        """All state that a step changes: plain values, and tensors copied to the host."""
        moments = {
            name: {key: _to_host(value) for key, value in self._optimizer.state[p].items()}
            for name, p in self.params.named_parameters()
        }
        threshold = self.objective_state.threshold
        return {
            "params": {name: _to_host(p) for name, p in self.params.named_parameters()},
            "pre_bias": self.params.pre_bias,
            "optimizer": moments,
            "weights": {name: _to_host(value) for name, value in self._coefficients.items()},
            "threshold": None if threshold is None else _to_host(threshold),
            "n_thresholds": self.objective_state.n_thresholds,
            "silent": _to_host(self._silent),
            **{name: None if t is None else _to_host(t) for name, t in self._listed.state().items()},
            "density": _to_host(self._density),
            "l0": _to_host(self._l0),
            "n_batches": self._n_batches,
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Load a `state()` onto this trainer's device; training continues bit for bit."""
        device = self._silent.device
        if difference := next(_differences(self.state(), saved), None):
            raise ValueError(explain(f"the state of an SAE does not fit: {difference}.", want="one of this training"))
        for name, p in self.params.named_parameters():
            p.copy_(saved["params"][name])
            self._optimizer.state[p] = {k: _like(p, v) for k, v in saved["optimizer"][name].items()}
        self._coefficients = {name: value.to(device) for name, value in saved["weights"].items()}
        self._silent, looked, self._density, self._l0 = (
            saved[name].to(device, copy=True) for name in ("silent", "looked", "density", "l0")
        )
        counted = saved.get("counted")  # not in older checkpoints
        self._listed.restore(looked, None if counted is None else counted.to(device, copy=True))
        self._n_batches = saved["n_batches"]
        threshold = saved["threshold"]
        self.objective_state = replace(
            self.objective_state,
            threshold=None if threshold is None else threshold.to(device, copy=True),
            n_thresholds=saved["n_thresholds"],
            dead_rows=self._listed.rows,
        )


def choose_gradients(objective: Objective, config: TrainConfig) -> Gradients:
    """Choose how the gradients of an SAE are computed: by autograd ("plain") or by the sparse step.

    Plain is the reference, for every objective, device, autocast and compile; sparse (`saewb.training.sparse_step`)
    works on active latents alone, many times faster where few are active.

    The rule for "auto": sparse on a CPU, batch by batch, unless more than 1 in 12 latents are on in it (ReLU and
    JumpReLU SAEs start so; the first few hundred tokens show it), the objective has no sparse step, or autocast or
    compile are set, which concern the plain one. Plain on other devices, where the two have not been compared.
    "sparse" is sparse on every device and at every density; "plain" is always plain.

    The choice depends on weights and batch alone, so that a resumed training makes the same one.

    Raises:
        ValueError: for "sparse" with an objective that has no sparse step, or with autocast or compile.
    """
    dense = config.autocast is not None or config.compile is not None
    if config.step == "sparse":
        if not has_sparse_step(objective):
            what = f"{type(objective).__name__} has no sparse step (or not with these losses)."
            raise ValueError(explain(what, want="step 'auto' or 'plain'", fix="TrainConfig(..., step='auto')"))
        if dense:
            what = f"step='sparse' with autocast={config.autocast}, compile={config.compile!r}."
            raise ValueError(explain(what, want="neither: both concern step='plain'", fix="TrainConfig(step='sparse')"))
        return sparse_gradients(config, max_density=1.0)
    if config.step == "plain" or dense:
        return autograd_gradients(config)
    return sparse_gradients(config, max_density=MAX_DENSITY)


def sparse_gradients(config: TrainConfig, max_density: float) -> Gradients:
    """Losses and gradients by the sparse step where at most this share of latents is active, by autograd elsewhere."""
    by_autograd = autograd_gradients(config)

    def gradients(objective: Objective, params: Params, x: Tensor, y: Tensor, state: ObjectiveState) -> Losses:
        losses = None
        if config.step == "sparse" or x.device.type == "cpu":
            losses = sparse_step(objective, params, x, y, state, best_precision(x.device), max_density)
        return by_autograd(objective, params, x, y, state) if losses is None else losses

    return gradients


def autograd_gradients(config: TrainConfig) -> Gradients:
    """Losses by the objective, gradients by autograd, under the config's autocast and compiler."""
    forward = _losses if config.compile is None else torch.compile(_losses, backend=config.compile)

    def gradients(objective: Objective, params: Params, x: Tensor, y: Tensor, state: ObjectiveState) -> Losses:
        params.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=config.autocast, enabled=config.autocast is not None):
            losses = forward(objective, params, x, y, state)
        losses.total.backward()
        return losses

    return gradients


def _losses(objective: Objective, params: Params, x: Tensor, y: Tensor, state: ObjectiveState) -> Losses:
    return objective.losses(params, x, y, state)


@torch.no_grad()
def combine_shards(losses: Losses, y: Float[Tensor, "shard d_out"], parallel: ParallelContext) -> Losses:
    """Losses of the whole batch from those of each process's shard: the values that one process would measure.

        terms, l0, in_band: means;   fired: sums;   kept_min: the least;   fvu = B mse / (sum |y|^2 - |sum y|^2 / B)

    All but `kept_min` in one exchange of d_sae + d_out numbers, in float64, so that the variance keeps its digits. No
    gradient goes through it: parameter gradients are averaged separately.

    Args:
        losses: of this process's shard.
        y: targets of this process's shard.
        parallel: the processes; a single one returns `losses` unchanged.
    """
    if parallel.size == 1:
        return losses
    means = {**losses.terms, "/l0": losses.l0, **{k: v for k, v in losses.extra.items() if k != "kept_min"}}
    y = y.double()
    scalars = torch.stack([value.detach().double() for value in means.values()]) / parallel.size
    parts = [scalars, y.square().sum()[None], losses.fired.double(), y.sum(0)]
    sums = parallel.sum_(torch.cat(parts))
    scalars, square, fired, total = sums.split([len(part) for part in parts])
    named = dict(zip(means, scalars.to(losses.total.dtype), strict=True))
    n = len(y) * parallel.size
    variance = square[0] - total.square().sum() / n
    mse = scalars[list(means).index("mse")]
    terms = {name: named[name] for name in losses.terms}
    extra = {name: named[name] for name in losses.extra if name != "kept_min"}
    if "kept_min" in losses.extra:
        extra["kept_min"] = parallel.min_(losses.extra["kept_min"].detach().clone())
    return replace(
        losses,
        terms=terms,
        total=torch.stack(list(terms.values())).sum(),
        l0=named["/l0"],
        fvu=(n * mse / variance).to(losses.fvu.dtype),
        fired=fired.round().long(),
        extra=extra,
    )


def check_trainee(name: str, trainee: Trainee, config: TrainConfig) -> None:
    """Raise if the config's normalization cannot be used with this SAE."""
    if trainee.objective.multi_point and config.normalization not in ("none", "constant", "centered"):
        what = f"normalization={config.normalization!r} with {name!r}, which reads several points."
        raise ValueError(explain(what, want="'centered', 'constant' or 'none': one factor for each point"))
    per_token = config.normalization in ("layer_norm", "constant_norm")
    if per_token and (trainee.objective.skip or trainee.is_transcoder):
        what = f"normalization={config.normalization!r} with {name!r}, a transcoder or with a skip matrix."
        raise ValueError(explain(what, want="'none', 'constant' or 'centered': a scale per token says nothing about y"))
    if config.normalization == "whitened" and isinstance(trainee.objective, MatchingPursuit):
        what = f"normalization='whitened' with {name!r}, which does matching pursuit."
        raise ValueError(explain(what, want="'constant' or 'centered': its encoder is its decoder, whitened it is not"))


def check_state(state: Mapping[str, Any], trainees: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise if a state belongs to other SAEs (compared in the form the state holds) or to another config."""
    later = {name: {k: v for k, v in LATER_FIELDS.items() if k in fields} for name, fields in trainees.items()}
    if {name: {**later.get(name, {}), **fields} for name, fields in state["trainees"].items()} != trainees:
        what = f"the state is of other SAEs: {state['trainees']}."
        raise ValueError(explain(what, want=str(trainees)))
    values = dump(config)
    changed = {k for k, v in state["config"].items() if values.get(k) != v} - MAY_CHANGE
    if changed:
        text = ", ".join(f"{k}={state['config'][k]!r}, now {values.get(k)!r}" for k in sorted(changed))
        raise ValueError(explain(f"the state was made with {text}.", want="the same config"))


def _optimizer(params: Params, config: TrainConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    fused = params.W_dec.device.type in ("cpu", "cuda")
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    optimizer = kind(params.parameters(), fused=fused, **options)
    for p in params.parameters():  # as Adam does at its first step, so that a state saved before it is complete
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def _to_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _differences(current: Any, saved: Any, name: str = "it") -> Iterator[str]:
    """Differences in keys, kinds and shapes between two states; a value that is not there yet may have any."""
    if isinstance(current, Mapping):
        keys = set(saved) if isinstance(saved, Mapping) else None
        if keys != set(current):
            yield f"{name} has {reprlib.repr(saved) if keys is None else sorted(map(str, keys ^ set(current)))}"
            return
        for key, value in current.items():
            yield from _differences(value, saved[key], key)
    elif isinstance(current, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != current.shape or saved.dtype != current.dtype:
            yield f"{name} is {reprlib.repr(saved)}"
    elif current is not None and not isinstance(saved, type(current)) and saved is not None:
        yield f"{name} is {reprlib.repr(saved)}"


def _like(p: Tensor, value: Tensor) -> Tensor:
    """Copy a moment in its parameter's memory order; a step count unchanged."""
    return torch.empty_like(p).copy_(value) if value.shape == p.shape else value.to(p.device, copy=True)
