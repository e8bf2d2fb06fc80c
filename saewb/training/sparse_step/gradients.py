"""What the steps of all objectives share: the batch, gradients of the weights from pairs, the figures of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.pairs import ByLatent, Pairs, gather_rows, per_latent
from saewb.kernels.precision import Precision
from saewb.kernels.select import Readout
from saewb.training.objectives import Losses, Params


@dataclass(frozen=True)
class Batch:
    """One batch and the weights it meets."""

    params: Params
    raw: Float[Tensor, "batch d_in"]  # inputs as they came
    x: Float[Tensor, "batch d_in"]  # centered: what the encoder multiplies
    y: Float[Tensor, "batch d_out"]  # what the output should be
    precision: Precision  # of the product that selects
    limit: int  # pairs to list at most
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False)  # memory for gradients where there was none

    @property
    def W(self) -> Float[Tensor, "d_sae d_in"]:
        """Reading directions, one latent a contiguous row."""
        return self.params.W_enc.T

    def memory(self, name: str) -> Tensor | None:
        """Where the gradient of W_enc (as `[d_sae, d_in]`) or W_dec goes: the one's of the step before, on a CPU.

        Its contents are no longer needed. None on other devices, whose allocators keep memory anyway.
        """
        parameter = self.params.get_parameter(name)
        if parameter.device.type != "cpu" or name not in ("W_enc", "W_dec"):
            return None
        if parameter.grad is None or parameter.grad.stride() != parameter.stride():
            return self._made.setdefault(name, torch.empty_like(self.W if name == "W_enc" else parameter))
        return parameter.grad.T if name == "W_enc" else parameter.grad

    def readout(self, b: Tensor | None = None, norms: Tensor | None = None) -> Readout:
        """How pre-activations come from `x`, with `b_enc` unless another bias is given."""
        bias = self.params.b_enc if b is None else b
        return Readout(self.W, bias, norms, self.precision, self.memory("W_enc"))

    def error(self, written: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """recon - y, in place of what the latents wrote."""
        return written.add_(self.params.offset(self.raw)).sub_(self.y)

    def d_error(self, error: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Gradient of the squared error (summed over coordinates, averaged over tokens) by recon."""
        return error * (2 / len(error))


def coded_gradients(
    batch: Batch,
    pairs: Pairs,
    order: ByLatent,
    acts: Float[Tensor, " pairs"],
    d_pre: Float[Tensor, " pairs"],
    d_recon: Float[Tensor, "batch d_out"],
    span: slice = slice(None),
) -> dict[str, Tensor]:
    """Gradients that go through the pairs: of W_enc (as `[d_sae, d_in]`), of its bias, and of W_dec.

    Args:
        batch: inputs and parameters.
        pairs: which latents are on, counted from the first of `span`.
        order: the same, sorted.
        acts: their activations.
        d_pre: gradient of their pre-activations.
        d_recon: gradient of what they write to.
        span: of the latents the pairs may have; the gradients are of these alone.
    """
    into = {name: batch.memory(name) for name in ("W_enc", "W_dec")}
    into = {name: None if memory is None else memory[span] for name, memory in into.items()}
    return {
        "W_enc": gather_rows(order, d_pre, batch.x, into["W_enc"]),
        "b_enc": per_latent(pairs, d_pre, len(order.starts)),
        "W_dec": gather_rows(order, acts, d_recon, into["W_dec"]),
    }


def squared(values: Tensor) -> Float[Tensor, ""]:
    """Sum of squares, without a tensor of squares; by rows, since over all elements at once float32 loses digits."""
    return torch.linalg.vector_norm(values, dim=-1).square().sum()


def per_token(pairs: Pairs, values: Float[Tensor, " pairs"]) -> Float[Tensor, " batch"]:
    """Per token the sum of its values."""
    return values.new_zeros(len(pairs.starts)).index_add_(0, pairs.tokens, values)


def add_norm_gradient(
    gradients: dict[str, Tensor], params: Params, norms: Float[Tensor, " d_sae"], d_norms: Float[Tensor, " d_sae"]
) -> None:
    """Adds to W_dec's gradient what comes through its rows' lengths: `d_norms * W_dec / norms`, 0 for rows of 0."""
    safe = torch.where(norms == 0, torch.ones_like(norms), norms)
    gradients["W_dec"].addcmul_(params.W_dec, (d_norms / safe)[:, None])


def leave(batch: Batch, gradients: Mapping[str, Tensor], d_recon: Tensor, d_bias: Tensor | None = None) -> None:
    """Writes all gradients to the parameters' `.grad`, replacing what is there, with those of b_dec and W_skip.

        d b_dec = sum_t d_recon[t] - d_bias @ W_enc.T        (the second part only where b_dec also centers the input)

    since every pre-activation reads -b_dec through W_enc exactly as it reads its bias: no dense product.

    Args:
        batch: inputs and parameters.
        gradients: by parameter, W_enc's as `[d_sae, d_in]`.
        d_recon: gradient of the (sum of the) reconstructions.
        d_bias: summed gradient of the pre-activations, if it is not that of b_enc.
    """
    params = batch.params
    made = dict(gradients)
    made["W_enc"] = made["W_enc"].T
    made["b_dec"] = d_recon.sum(0)
    if params.pre_bias == "tied":
        made["b_dec"] -= (gradients["b_enc"] if d_bias is None else d_bias) @ batch.W
    if params.skip:
        made["W_skip"] = batch.raw.T @ d_recon
    for name, parameter in params.named_parameters():
        parameter.grad = made[name]


def figures(
    terms: Mapping[str, Tensor], batch: Batch, pairs: Pairs, acts: Tensor, error: Tensor, **extra: Tensor
) -> Losses:
    """Losses and the figures that every objective reports, as `saewb.training.objectives.losses.measured` has them."""
    on = (acts != 0).to(error.dtype)
    fired = per_latent(pairs, on, batch.params.d_sae).long()
    spread = squared(batch.y - batch.y.mean(0))
    total = torch.stack(list(terms.values())).sum()
    fvu = squared(error) / spread
    return Losses(dict(terms), total, fired.sum() / len(error), fvu, fired, extra)
