"""Shared parts of the sparse steps: inputs, weight gradients from pairs, losses of dead latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.kernels.pairs import ByLatent, Pairs, by_latent, combine, dots, gather_rows, per_latent, rectangular
from saewb.kernels.precision import Precision
from saewb.kernels.select import Readout
from saewb.kernels.topk import largest
from saewb.training.objectives import Losses, ObjectiveState, Params

_PRE_ACTS_AT_ONCE = 2**23  # tokens times dead latents
_PAIRS_AT_ONCE = 2**22  # selected dead latents: about 200 MB
_MANY = 16  # dead latents per selected one, from which selecting first is quicker than dense products

# (dead latents' weights, their pre-activations, error, state of them alone) -> loss, a mean over these tokens
DeadLoss = Callable[[Params, Tensor, Tensor, ObjectiveState], Tensor]


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a sparse step: one batch and the weights."""

    params: Params
    raw_x: Float[Tensor, "batch d_in"]
    """Inputs, not centered."""
    x: Float[Tensor, "batch d_in"]
    """Centered inputs of the encoder."""
    y: Float[Tensor, "batch d_out"]
    """Targets."""
    precision: Precision
    """Precision of the product that selects latents."""
    limit: int
    """Maximum of pairs."""
    _buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Memory for gradients of parameters that have none."""

    @property
    def W(self) -> Float[Tensor, "d_sae d_in"]:
        """Encoder directions, one contiguous row per latent."""
        return self.params.W_enc.T

    def gradient_buffer(self, name: str) -> Tensor | None:
        """Memory for the gradient of W_enc (as `[d_sae, d_in]`) or W_dec: on a CPU, that of the last step.

        Its contents may be overwritten. None on other devices, whose allocators cache memory.
        """
        parameter = self.params.get_parameter(name)
        if parameter.device.type != "cpu" or name not in ("W_enc", "W_dec"):
            return None
        if parameter.grad is None or parameter.grad.stride() != parameter.stride():
            return self._buffers.setdefault(name, torch.empty_like(self.W if name == "W_enc" else parameter))
        return parameter.grad.T if name == "W_enc" else parameter.grad

    def readout(self, b: Tensor | None = None, norms: Tensor | None = None) -> Readout:
        """Readout of the pre-activations, with `b_enc` unless another bias is passed."""
        bias = self.params.b_enc if b is None else b
        return Readout(self.W, bias, norms, self.precision, self.gradient_buffer("W_enc"))

    def error(self, decoded: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Recons - y; overwrites the decoded latents."""
        return decoded.add_(self.params.offset(self.raw_x)).sub_(self.y)

    def d_error(self, error: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Gradient of the squared error (summed over coordinates, averaged over tokens) by recons."""
        return error * (2 / len(error))


def encoder_decoder_gradients(
    inputs: StepInputs,
    pairs: Pairs,
    order: ByLatent,
    acts: Float[Tensor, " pairs"],
    d_pre: Float[Tensor, " pairs"],
    d_recons: Float[Tensor, "batch d_out"],
    span: slice = slice(None),
) -> dict[str, Tensor]:
    """Gradients of W_enc (as `[d_sae, d_in]`), b_enc and W_dec from the active pairs.

    Args:
        inputs: of the step.
        pairs: active latents, counted from the first of `span`.
        order: the pairs sorted by latent.
        acts: their activations.
        d_pre: gradient of their pre-activations.
        d_recons: gradient of the reconstruction.
        span: range of latents in the pairs, which the gradients cover.
    """
    buffers = {name: inputs.gradient_buffer(name) for name in ("W_enc", "W_dec")}
    buffers = {name: None if buffer is None else buffer[span] for name, buffer in buffers.items()}
    return {
        "W_enc": gather_rows(order, d_pre, inputs.x, buffers["W_enc"]),
        "b_enc": per_latent(pairs, d_pre, len(order.starts)),
        "W_dec": gather_rows(order, acts, d_recons, buffers["W_dec"]),
    }


def sum_of_squares(values: Tensor) -> Float[Tensor, ""]:
    """Sum of squares, without a tensor of squares; by rows, since over all elements at once float32 loses digits."""
    return torch.linalg.vector_norm(values, dim=-1).square().sum()


def per_token(pairs: Pairs, values: Float[Tensor, " pairs"]) -> Float[Tensor, " batch"]:
    """Sum of values per token."""
    return values.new_zeros(len(pairs.starts)).index_add_(0, pairs.tokens, values)


def add_norm_gradient(
    gradients: dict[str, Tensor],
    params: Params,
    norms: Float[Tensor, " d_sae"] | Float[Tensor, "blocks d_sae"],
    d_norms: Float[Tensor, " d_sae"],
) -> None:
    """Add the gradient of W_dec through its row lengths: `d_norms * W_dec / norms`, 0 for rows of 0.

    With the lengths of the blocks of each row (`Params.block_norms`), through each of them.
    """
    safe = torch.where(norms == 0, torch.ones_like(norms), norms)
    if norms.ndim == 1:
        gradients["W_dec"].addcmul_(params.W_dec, (d_norms / safe)[:, None])
        return
    blocks = (W.split(params.blocks, dim=1) for W in (gradients["W_dec"], params.W_dec))
    for gradient, W_dec, of_block in zip(*blocks, safe, strict=True):
        gradient.addcmul_(W_dec, (d_norms / of_block)[:, None])


def set_gradients(
    inputs: StepInputs, gradients: Mapping[str, Tensor], d_recons: Tensor, d_bias: Tensor | None = None
) -> None:
    """Set the `.grad` of all parameters, including b_dec and W_skip.

        d b_dec = sum_t d_recons[t] - d_bias @ W_enc.T        (the second part only where b_dec also centers the input)

    since every pre-activation contains -b_dec @ W_enc, as it contains its bias: no dense product is needed.

    Args:
        inputs: of the step.
        gradients: by parameter, W_enc's as `[d_sae, d_in]`.
        d_recons: gradient of the (sum of the) reconstructions.
        d_bias: summed gradient of the pre-activations; None means that of b_enc.
    """
    params = inputs.params
    grads = dict(gradients)
    grads["W_enc"] = grads["W_enc"].T
    grads["b_dec"] = d_recons.sum(0)
    if params.pre_bias == "tied":
        grads["b_dec"] -= (gradients["b_enc"] if d_bias is None else d_bias) @ inputs.W
    if params.skip:
        grads["W_skip"] = inputs.raw_x.T @ d_recons
    for name, parameter in params.named_parameters():
        parameter.grad = grads[name]


def with_metrics(
    terms: Mapping[str, Tensor], inputs: StepInputs, pairs: Pairs, acts: Tensor, error: Tensor, **extra: Tensor
) -> Losses:
    """Build Losses from the terms, with metrics as in `objectives.losses.with_metrics`."""
    active = (acts != 0).to(error.dtype)
    fired = per_latent(pairs, active, inputs.params.d_sae).long()
    variance = sum_of_squares(inputs.y - inputs.y.mean(0))
    total = torch.stack(list(terms.values())).sum()
    fvu = sum_of_squares(error) / variance
    return Losses(dict(terms), total, fired.sum() / len(error), fvu, fired, extra)


def add_dead_gradients(
    loss: DeadLoss,
    params: Params,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    state: ObjectiveState,
    gradients: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """Compute the loss of the dead latents, dense over them alone, by autograd, and add its gradients.

    `loss` gets copies of the dead rows, and the tokens in tiles of at most 8 million pre-activations.

    Args:
        loss: the objective's loss of dead latents, differentiable.
        params: all weights.
        x: centered inputs.
        error: y - recons.
        state: which latents are dead.
        gradients: "W_enc" `[d_sae, d_in]`, "W_dec", "b_enc", and others, changed in place.
    """
    rows = state.dead_rows
    if not len(rows):
        return error.new_zeros(())
    names = [name for name in ("W_enc", "W_dec", "b_enc", "threshold", "log_threshold") if name in params._parameters]
    tensors = {n: params.W_enc.T if n == "W_enc" else params.get_parameter(n) for n in names}
    copies = {n: t.detach()[rows].requires_grad_() for n, t in tensors.items()}
    dead = Params({n: c.T if n == "W_enc" else c for n, c in copies.items()} | {"b_dec": params.b_dec}, "none")
    leaves = [dead.get_parameter(n) for n in names]
    dead_state = replace(state, dead=state.dead[rows], dead_rows=torch.arange(len(rows), device=rows.device))
    total, step = error.new_zeros(()), max(1, _PRE_ACTS_AT_ONCE // len(rows))
    with torch.enable_grad():
        for start in range(0, len(x), step):
            tile = x[start : start + step]
            part = loss(dead, torch.addmm(dead.b_enc, tile, dead.W_enc), error[start : start + step], dead_state)
            part = part * (len(tile) / len(x))
            part.backward(inputs=leaves)
            total += part.detach()
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.grad is not None:
            gradients[name].index_add_(0, rows, leaf.grad.T if name == "W_enc" else leaf.grad)
    return total


def has_many_dead(n_dead: int, k_aux: int) -> bool:
    """Whether `add_auxk_gradients` is quicker than `add_dead_gradients`."""
    return n_dead >= _MANY * k_aux


@torch.no_grad()
def add_auxk_gradients(
    params: Params,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    state: ObjectiveState,
    gradients: dict[str, Tensor],
    *,
    weight: float,
    k_aux: int,
    signed: bool,
    relu: bool,
) -> Float[Tensor, ""]:
    """Compute `objectives.losses.auxk_loss` of many dead latents, times a weight, and add its gradients.

    One dense product selects k_aux dead latents of each token; what follows is over these pairs alone, where autograd
    makes four more dense products. With T tokens and n dead latents that is 2 T n d_in + 8 T k_aux d instead of
    10 T n d multiplications and additions. Nothing waits for the device.

    Args:
        params: all weights.
        x: centered inputs.
        error: y - recons.
        state: which latents are dead; at least k_aux listed.
        gradients: "W_enc" `[d_sae, d_in]`, "W_dec" and "b_enc", changed in place.
        weight: of the loss.
        k_aux: dead latents per token.
        signed: select by magnitude.
        relu: as for `auxk_loss`.
    """
    rows = state.dead_rows
    dead, W_enc, W_dec, b_enc = state.dead[rows], params.W_enc.T[rows], params.W_dec[rows], params.b_enc[rows]
    norms = W_dec.norm(dim=1)
    scale = (dead.to(error.dtype).sum() / k_aux).clamp(max=1.0) * (weight / len(x))
    total, step = error.new_zeros(()), max(1, _PAIRS_AT_ONCE // k_aux)
    for some, some_error in zip(x.split(step), error.split(step), strict=True):
        latents, pre = _select_dead(some, W_enc, b_enc, norms, dead, k_aux, signed)
        values = pre * dead[latents]
        pairs = rectangular(latents, values.clamp(min=0) if relu else values)
        residual = combine(pairs, pairs.pre, W_dec).sub_(some_error)
        total += scale * sum_of_squares(residual)
        d_recons = residual.mul_(2 * scale)
        d_pre = dots(pairs, d_recons, W_dec) * dead[pairs.latents]
        d_pre = d_pre * (pairs.pre > 0) if relu else d_pre
        order = by_latent(pairs, len(rows))
        gradients["W_enc"].index_add_(0, rows, gather_rows(order, d_pre, some))
        gradients["W_dec"].index_add_(0, rows, gather_rows(order, pairs.pre, d_recons))
        gradients["b_enc"].index_add_(0, rows, per_latent(pairs, d_pre, len(rows)))
    return total


def _select_dead(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor, dead: Tensor, k: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """The k dead latents of each token that would write the most, and their pre-activations."""
    latents, pre = [], []
    for tile in x.split(max(1, _PRE_ACTS_AT_ONCE // len(b_enc))):
        pre_acts = torch.addmm(b_enc, tile, W_enc.T)
        score = pre_acts * norms
        score = (score.abs_() if signed else score).masked_fill_(~dead, -torch.inf)
        best = largest(score, k)[1]
        latents.append(best)
        pre.append(pre_acts.gather(1, best))
    return torch.cat(latents), torch.cat(pre)
