"""Training SAEs on streams of activations, one or many at once.

    stream -> Training -> TrainStep, TrainStep, ...     and at any time    training.saes, training.state()

`config` says how, `units` in which units, `learner` is one SAE's step, `paths` the two ways to its gradients, `loop`
drives all SAEs over one stream, `checks` is what goes together, `record` what a step reports.
"""

from __future__ import annotations

import lazy_loader

from saewb.training.config import TrainConfig, Trainee
from saewb.training.loop import Batch, Stream, Training
from saewb.training.step_metrics import DENSITY_EDGES, Diverged, Figures, HeldOut, TrainStep

__all__ = [
    "DENSITY_EDGES",
    "Batch",
    "Diverged",
    "Figures",
    "HeldOut",
    "Stream",
    "TrainConfig",
    "TrainStep",
    "Trainee",
    "Training",
]

__getattr__, _, _ = lazy_loader.attach(__name__, submodules=["loggers", "objectives", "memory"])
