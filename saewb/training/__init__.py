"""Training SAEs on streams of activations, one or many at once.

    stream -> Training -> TrainStep, TrainStep, ...     and at any time    training.saes, training.state()

`objectives` holds the training objectives, `config` the settings of a run, `normalization` the units. `loop` trains all
SAEs over one stream; `trainer` makes one SAE's step, `sparse_step` computes its gradients fast, `step_metrics` its
metrics. `train` starts a `run` in the background; `run_folder` writes it, `past_run` reads it, `run_display` shows it.
"""

from __future__ import annotations

import lazy_loader

from saewb.training.config import TrainConfig, Trainee
from saewb.training.loop import Batch, Stream, Training
from saewb.training.step_metrics import DENSITY_EDGES, Diverged, HeldOut, StepMetrics, TrainStep

__all__ = [
    "DENSITY_EDGES",
    "Batch",
    "Diverged",
    "HeldOut",
    "StepMetrics",
    "Stream",
    "TrainConfig",
    "TrainStep",
    "Trainee",
    "Training",
]

__getattr__, _, _ = lazy_loader.attach(__name__, submodules=["loggers", "objectives", "memory"])
