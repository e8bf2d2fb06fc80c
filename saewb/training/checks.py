"""What goes together in a training, and what may change when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from saewb.errors import explain
from saewb.training.config import TrainConfig, Trainee
from saewb.training.objectives import MatchingPursuit

MAY_CHANGE = {"n_tokens", "eval_every_tokens", "compile", "step", "look_every_steps"}  # when training is resumed


def check_trainee(name: str, trainee: Trainee, config: TrainConfig) -> None:
    """Raises where a normalization says nothing about what an SAE is trained for."""
    per_token = config.normalization in ("layer_norm", "constant_norm")
    skip = "skip" in {f.name for f in fields(trainee.objective)} and trainee.objective.skip
    if per_token and (skip or trainee.is_transcoder):
        what = f"normalization={config.normalization!r} with {name!r}, a transcoder or with a skip matrix."
        raise ValueError(explain(what, want="'none', 'constant' or 'centered': a scale per token says nothing about y"))
    if config.normalization == "whitened" and isinstance(trainee.objective, MatchingPursuit):
        what = f"normalization='whitened' with {name!r}, which does matching pursuit."
        raise ValueError(explain(what, want="'constant' or 'centered': its encoder is its decoder, whitened it is not"))


def plain(config: TrainConfig) -> dict[str, Any]:
    """As plain values, for a state."""
    told = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    return {**told, "autocast": None if config.autocast is None else str(config.autocast)}


def check_state(state: Mapping[str, Any], trainees: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises if a state is not one of these SAEs (described as the state does), or of another config."""
    if state["trainees"] != trainees:
        what = f"the state is of other SAEs: {state['trainees']}."
        raise ValueError(explain(what, want=str(trainees)))
    mine = plain(config)
    changed = {k for k, v in state["config"].items() if mine.get(k) != v} - MAY_CHANGE
    if changed:
        text = ", ".join(f"{k}={state['config'][k]!r}, now {mine.get(k)!r}" for k in sorted(changed))
        raise ValueError(explain(f"the state was made with {text}.", want="the same config"))
