"""One SAE in training: weights, optimizer, dead latents, coefficients; a step, a checkpoint, an export.

A step, given one batch in training units:
1. coefficients are warmed up, dead latents marked; losses and gradients are computed (`saewb.training.paths`);
2. with unit rows, gradients lose their part along the rows; gradients are clipped;
3. Adam steps; rows are made unit length again;
4. silence, density, threshold and controlled coefficients are brought up to date, all on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain
from saewb.metrics import ReconstructionStream
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.stats.firing import FiringStream
from saewb.training.combined import combined
from saewb.training.config import TrainConfig, Trainee
from saewb.training.normalization import AnySAE, Units, to_model, to_training
from saewb.training.objectives import (
    BatchTopK,
    JumpReLU,
    Losses,
    Matryoshka,
    Params,
    State,
    constrain,
    next_threshold,
    project_gradient,
    revives,
    steered,
    warmed,
)
from saewb.training.objectives.sparsity_coefficient import SMOOTHING
from saewb.training.paths import choose
from saewb.training.sparse_step import clipped_step
from saewb.training.step_metrics import Figures, HeldOut

TOLERANCE = 1e-5  # of a row's length, by which an exported SAE may differ from the training's own output
TIES = 0.05  # share of probe rows that may differ more: a latent at its threshold may fall the other way by rounding


@final
class Learner:
    """A Trainee with its weights and everything that changes while it learns.

    Args:
        trainee: what is trained; `read` is a point's name.
        config: how.
        read: units of what is read.
        write: units of what is written.
        d_in: width of what is read.
        d_out: width of what is written.
        device: where all of it lives.
        start: mean of what is written, in training units, for b_dec; None starts from zeros (or from `init`).
        team: processes that share each batch.
    """

    def __init__(
        self,
        trainee: Trainee,
        config: TrainConfig,
        read: Units,
        write: Units,
        *,
        d_in: int,
        d_out: int,
        device: torch.device,
        start: Float[Tensor, " d_out"] | None = None,
        team: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self.trainee, self.config, self.read, self.write, self._team = trainee, config, read, write, team
        self.params = _first_weights(trainee, config, read, write, d_in, d_out, device)
        if start is not None and trainee.init is None:
            with torch.no_grad():
                self.params.b_dec.copy_(start)
        self.watch = trainee.objective.coefficients()
        self.state: State = replace(trainee.objective.state(device), team=team)
        self._weights = dict(self.state.coefficients)  # before warm-up, as the controller has left them
        d_sae = trainee.objective.d_sae
        self._silent = torch.zeros(d_sae, dtype=torch.int64, device=device)  # tokens since each latent fired
        self._looked = torch.zeros(d_sae, dtype=torch.bool, device=device)  # dead when the host last looked
        self._density = torch.zeros(d_sae, device=device)
        self._l0 = torch.zeros((), device=device)  # of about the last ten batches
        self._n_batches = 0
        self._gradients = choose(trainee.objective, config)
        self._optimizer = _optimizer(self.params, config)

    def fit(self, batches: Sequence[Float[Tensor, "tokens d_in"]]) -> None:
        """Take from the first batches, in the model's units, what the objective starts with."""
        if starts_from_data(self.trainee):
            self.trainee.objective.fit(self.params, [self.read.apply(self._placed(x)) for x in batches])

    def learn(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], n_tokens: int) -> Figures:
        """One step on (this process's share of) a batch in training units, after `n_tokens` tokens."""
        objective, config, batch = self.trainee.objective, self.config, len(x) * self._team.size
        self._prepare(n_tokens)
        losses = combined(self._gradients(objective, self.params, x, y, self.state), y, self._team)
        rate = config.rate(n_tokens) * (1 if self.trainee.lr is None else self.trainee.lr / config.lr)
        self._step(rate)
        used = self.state.coefficients
        self._account(losses, batch, n_tokens)
        silent = self._silent > config.dead_after
        return Figures(
            loss=losses.total.detach(),
            losses={name: value.detach() for name, value in losses.terms.items()},
            l0=losses.l0,
            fvu=losses.fvu,
            dead_frac=silent.float().mean(),
            n_dense=(self._density > config.dense_above).sum(),
            lr=rate,
            coefficients=used,
            extra=losses.extra,
            densities=self._density,
            watch=self.watch,
            n_tokens=n_tokens + batch,
            d_sae=objective.d_sae,
        )

    def _prepare(self, n_tokens: int) -> None:
        state, after = self.state, self.config.dead_after
        coefficients = {name: self._weights[name] * warmed(c, n_tokens) for name, c in self.watch.items()}
        if n_tokens <= after or not revives(self.trainee.objective):  # nothing can be dead, or nobody asks
            self.state = replace(state, coefficients=coefficients)
            return
        rows = state.dead_rows
        if self._n_batches % self.config.look_every(self._silent.device) == 0:
            self._looked = self._silent > after
            rows = self._looked.nonzero()[:, 0]  # waits for the device
        dead = self._looked & (self._silent > after)
        self.state = replace(state, coefficients=coefficients, dead=dead, dead_rows=rows)

    def _step(self, rate: float) -> None:
        rows = self.trainee.objective.rows
        parameters = list(self.params.parameters())
        for p in parameters:  # the fused Adam walks memory: a gradient in another order would be applied crosswise
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
            self._team.mean_(p.grad)
        if rows == "unit":
            project_gradient(self.params)
        self._optimizer.param_groups[0]["lr"] = rate
        clipped_step(self._optimizer, parameters, self.config.clip)
        constrain(self.params, rows)

    @torch.no_grad()
    def _account(self, losses: Losses, batch: int, n_tokens: int) -> None:
        objective, config, first = self.trainee.objective, self.config, 1 / (self._n_batches + 1)
        self._silent = torch.where(losses.fired > 0, 0, self._silent + batch)
        share = max(first, min(1.0, batch / config.density_tokens))
        self._density = self._density + share * (losses.fired / batch - self._density)
        self._l0 = self._l0 + max(first, SMOOTHING) * (losses.l0 - self._l0)
        for name, c in self.watch.items():
            if c.target_l0 is not None and n_tokens >= c.warmup_tokens:
                self._weights[name] = steered(self._weights[name], self._l0, c, batch=batch, tau=config.control)
        if isinstance(objective, (BatchTopK, Matryoshka)):
            self.state = next_threshold(self.state, losses.extra["kept_min"], objective.threshold_rate)
        self._n_batches += 1

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> HeldOut:
        """How the SAE does, as it would be exported now, on activations in the model's units."""
        reconstruction, firing = ReconstructionStream(), FiringStream()
        for rows, target in zip(x.split(self.config.batch_tokens), y.split(self.config.batch_tokens), strict=True):
            rows, target = self._placed(rows), self._placed(target)
            latents, recon = self._forward(rows)
            reconstruction.update(target, recon)
            firing.update(latents)
        return HeldOut(reconstruction.result(), firing.result(dense_above=self.config.dense_above))

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self._silent.device, self.params.W_dec.dtype)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.read.apply(x)
        latents = self.trainee.objective.latents(self.params, inner, self.state)
        return latents, self.write.undo(self.params.decoded(latents, inner), x)

    @torch.no_grad()
    def export(self, probe: Float[Tensor, "rows d_in"], metadata: Mapping[str, Any]) -> AnySAE:
        """The SAE so far, in the model's units, proved on `probe` (model's units) to do what training does.

        Raises:
            RuntimeError: if on more than 1 row in 20 its output differs from the training's by more than 1e-5 of the
                row's length.
        """
        objective = self.trainee.objective
        sae = to_model(objective.export(self.params, self.state), self.read, self.write)
        hooks = {"hook": self.trainee.read, "metadata": metadata}
        if self.trainee.is_transcoder:
            hooks["hook_out"] = self.trainee.write
        made = type(sae).from_tensors(replace(sae.cfg, **hooks), dict(sae.named_parameters()))
        self._prove(made, self._placed(probe))
        return made

    def _prove(self, sae: SAE | PursuitSAE, x: Tensor) -> None:
        want, got = self._forward(x)[1], sae(x)
        off = (got - want).norm(dim=1) / torch.maximum(want.norm(dim=1), x.norm(dim=1)).clamp_min(1e-30)
        wrong = int((~(off <= TOLERANCE)).sum())
        if wrong > TIES * len(x):
            what = f"the exported {sae!r} differs from training by more than {TOLERANCE} on {wrong} of {len(x)} rows"
            worst = f"{what} (worst {float(off.max()):.2g} of a row's length); it was not handed out."
            raise RuntimeError(explain(worst, want="finite weights; float32 products (no TF32)"))

    def snapshot(self) -> dict[str, Any]:
        """Everything that changes, copied to the host: plain values and tensors."""
        moments = {
            name: {key: _copied(value) for key, value in self._optimizer.state[p].items()}
            for name, p in self.params.named_parameters()
        }
        threshold = self.state.threshold
        return {
            "params": {name: _copied(p) for name, p in self.params.named_parameters()},
            "pre_bias": self.params.pre_bias,
            "optimizer": moments,
            "weights": {name: _copied(value) for name, value in self._weights.items()},
            "threshold": None if threshold is None else _copied(threshold),
            "n_thresholds": self.state.n_thresholds,
            "silent": _copied(self._silent),
            "looked": _copied(self._looked),
            "density": _copied(self._density),
            "l0": _copied(self._l0),
            "n_batches": self._n_batches,
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes up a snapshot, bit for bit, on this learner's own device."""
        device = self._silent.device
        for name, p in self.params.named_parameters():
            p.copy_(saved["params"][name])
            self._optimizer.state[p] = {k: _like(p, v) for k, v in saved["optimizer"][name].items()}
        self._weights = {name: value.to(device) for name, value in saved["weights"].items()}
        self._silent, self._looked, self._density, self._l0 = (
            saved[name].to(device, copy=True) for name in ("silent", "looked", "density", "l0")
        )
        self._n_batches = saved["n_batches"]
        threshold = saved["threshold"]
        self.state = replace(
            self.state,
            threshold=None if threshold is None else threshold.to(device, copy=True),
            n_thresholds=saved["n_thresholds"],
            dead_rows=self._looked.nonzero()[:, 0],
        )


def starts_from_data(trainee: Trainee) -> bool:
    """Whether something of it besides its units is taken from the first tokens: thresholds."""
    objective = trainee.objective
    return isinstance(objective, JumpReLU) and objective.start_l0 is not None and trainee.init is None


def described(trainee: Trainee) -> dict[str, Any]:
    """An objective as plain values, for metadata and checkpoints."""
    return {"objective": type(trainee.objective).__name__, **asdict(trainee.objective)}


def _first_weights(
    trainee: Trainee, config: TrainConfig, read: Units, write: Units, d_in: int, d_out: int, device: torch.device
) -> Params:
    objective = trainee.objective
    if trainee.init is not None:
        _check_init(trainee, d_in, d_out)
        params = objective.resume(to_training(trainee.init, read, write), device=device)
        constrain(params, objective.rows)
        return params
    seed = config.seed if trainee.seed is None else trainee.seed
    return objective.start(d_in, d_out if trainee.is_transcoder else None, seed=seed, device=device)


def _check_init(trainee: Trainee, d_in: int, d_out: int) -> None:
    got = (trainee.init.cfg.d_in, trainee.init.cfg.d_sae, trainee.init.cfg.d_out)
    want = (d_in, trainee.objective.d_sae, d_out)
    if got != want:
        text = "init has d_in, d_sae, d_out = {}, {}, {}.".format(*got)
        raise ValueError(explain(text, want="{}, {}, {} of the stream and the objective".format(*want)))


def _optimizer(params: Params, config: TrainConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    fused = params.W_dec.device.type in ("cpu", "cuda")
    made = kind(
        params.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    for p in params.parameters():  # as Adam would at its first step, so that a snapshot before it is complete
        made.state[p] = {
            "step": torch.zeros((), device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return made


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _like(p: Tensor, value: Tensor) -> Tensor:
    """A moment in the memory order of its parameter; a step count as it is."""
    return torch.empty_like(p).copy_(value) if value.shape == p.shape else value.to(p.device, copy=True)
