"""What the weights in a SAELens file need before they are those of `saewb.sae.sae.SAE`: pure functions, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """What a training run applied before the SAE: z = (x - mean) @ matrix, undone by @ inverse + mean."""

    mean: Float[Tensor, " d_in"]
    matrix: Float[Tensor, "d_in d_in"]
    inverse: Float[Tensor, "d_in d_in"]


def ungated(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gated weights as those of a JumpReLU SAE, exactly the same function."""
    # On where s W_enc + b_gate > 0, that is where p = e (s W_enc) + b_mag is above b_mag - e b_gate; its value relu(p).
    e, b_gate, b_mag = w["r_mag"].double().exp(), w["b_gate"].double(), w["b_mag"].double()
    kept = {name: t for name, t in w.items() if name not in ("r_mag", "b_gate", "b_mag")}
    threshold = (b_mag - e * b_gate).clamp_min(0)
    return {**kept, "W_enc": w["W_enc"].double() * e, "b_enc": w["b_mag"], "threshold": threshold}


def scaled_down(w: Mapping[str, Tensor], factor: float, rescale: bool) -> dict[str, Tensor]:
    """Weights trained on `factor * x`, made to read `x`; `rescale`: decoder norms are still to be folded."""
    new = {
        **w,
        "W_enc": w["W_enc"].double() * factor,
        "W_dec": w["W_dec"].double() / factor,
        "b_dec": w["b_dec"].double() / factor,
    }
    if rescale and "threshold" in w:  # it is compared with p |W_dec|, and |W_dec| has just been divided
        new["threshold"] = w["threshold"].double() / factor
    return new


def unit_rows(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder norms moved into the encoder, thresholds kept: they were compared with p |W_dec| already."""
    norm = w["W_dec"].double().norm(dim=1)
    safe = torch.where(norm == 0, torch.ones_like(norm), norm)
    return {
        **w,
        "W_enc": w["W_enc"].double() * norm,
        "b_enc": w["b_enc"].double() * norm,
        "W_dec": w["W_dec"].double() / safe[:, None],
    }


def whitened(w: Mapping[str, Tensor], given: Whitening, *, own: bool) -> dict[str, Tensor]:
    """Weights trained on whitened activations, made to read raw ones; `own`: with a b_pre, since b_dec is not tied."""
    mean, matrix, inverse = given.mean.double(), given.matrix.double(), given.inverse.double()
    new = {
        **w,
        "W_enc": matrix @ w["W_enc"].double(),
        "W_dec": w["W_dec"].double() @ inverse,
        "b_dec": w["b_dec"].double() @ inverse + mean,
    }
    # A tied bias takes the mean along: (x - b_dec') M = (x - mean) M - b_dec.
    return {**new, "b_pre": mean} if own else new
