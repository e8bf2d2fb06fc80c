"""Trainable SAE parameters: initialization, decoder-norm constraint, conversion from and to an SAE.

    pre_acts = (x - b_pre) @ W_enc + b_enc                  (b_pre is b_dec when tied, else 0)
    recons = acts @ W_dec + b_dec (+ x @ W_skip)

`W_enc` is `[d_in, d_sae]` and its transpose is contiguous: the encoder direction of a latent is contiguous in memory,
as its decoder direction is. Sparse steps and Adam read and write whole latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.sae.config import Activation, SAEConfig
from saewb.sae.sae import SAE

PreBias = Literal["none", "tied"]
Rows = Literal["unit", "free"]


@final
class Params(nn.Module):
    """The trainable parameters of one SAE, by the names of its tensors.

    Args:
        tensors: `W_enc [d_in, d_sae]` (its transpose is made contiguous), `W_dec [d_sae, d_out]`, `b_dec [d_out]`,
            `b_enc [d_sae]`, and where they apply `W_skip [d_in, d_out]`, `threshold` or `log_threshold [d_sae]`, and
            the gate's `r_mag`, `b_mag`, `b_gate [d_sae]`. Not copied.
        pre_bias: "tied": b_dec is subtracted from the input before encoding; "none": nothing is.
        blocks: widths of the points that lie side by side in the output; None means a single one.

    Example:
        >>> p = Params({"W_enc": torch.ones(3, 5), "W_dec": torch.ones(5, 3), "b_dec": torch.zeros(3)}, "tied")
        >>> p.W_enc.shape, p.W_enc.T.is_contiguous(), p.d_in, p.d_sae, p.d_out
        (torch.Size([3, 5]), True, 3, 5, 3)
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, tensors: Mapping[str, Tensor], pre_bias: PreBias, blocks: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.pre_bias = pre_bias
        self.blocks = (tensors["W_dec"].shape[1],) if blocks is None else blocks
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            self.register_parameter(name, nn.Parameter(tensor.T.contiguous().T if name == "W_enc" else tensor))

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0] if "W_enc" in self._parameters else self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.W_dec.shape[1]

    @property
    def skip(self) -> bool:
        """Whether there is a W_skip."""
        return "W_skip" in self._parameters

    def center(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """Centered input of the encoder, `x - b_pre`."""
        return x - self.b_dec if self.pre_bias == "tied" else x

    def pre_acts(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_sae"]:
        """Pre-activations, `(x - b_pre) @ W_enc + b_enc`."""
        return self.center(x) @ self.W_enc + self.b_enc

    def decode(
        self, acts: Float[Tensor, "tokens d_sae"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "tokens d_out"]:
        """Reconstruction, `acts @ W_dec + b_dec (+ x @ W_skip)`."""
        return acts @ self.W_dec + self.offset(x)

    def offset(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Output when no latent is active: `b_dec (+ x @ W_skip)`."""
        return self.b_dec + x @ self.W_skip if self.skip else self.b_dec

    def norms(self) -> Float[Tensor, " d_sae"]:
        """Length of each decoder row, in units of the output per unit of activation."""
        return self.W_dec.norm(dim=1)

    def block_norms(self) -> Float[Tensor, "blocks d_sae"]:
        """Length of each block of each decoder row: what a latent writes at each point."""
        return torch.stack([block.norm(dim=1) for block in self.W_dec.split(self.blocks, dim=1)])


def init_params(
    d_in: int,
    d_sae: int,
    d_out: int | None,
    *,
    seed: int,
    norm: float,
    skip: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    per_latent: Mapping[str, float],
) -> Params:
    """Random decoder rows of equal length, the encoder their transpose, zero biases and skip matrix.

    Args:
        d_in: width of the input.
        d_sae: number of latents.
        d_out: width of a transcoder's output; None makes an autoencoder, whose b_dec is also subtracted from the input.
            A transcoder's is not, and where d_out differs from d_in its encoder is drawn separately.
        seed: of the directions; the global random state is neither read nor changed.
        norm: length of every decoder (and encoder) row.
        skip: whether to add `W_skip`.
        dtype: of all tensors.
        device: of all tensors. The directions are the same on every device.
        per_latent: further tensors `[d_sae]`, by name, with the number that fills them.
    """
    rng = torch.Generator().manual_seed(seed)
    width = d_in if d_out is None else d_out
    W_dec = nn.functional.normalize(torch.randn(d_sae, width, generator=rng), dim=1) * norm
    reads = W_dec if width == d_in else nn.functional.normalize(torch.randn(d_sae, d_in, generator=rng), dim=1) * norm
    tensors = {"W_enc": reads.clone().T, "W_dec": W_dec, "b_dec": torch.zeros(width)}
    tensors |= {name: torch.full((d_sae,), value) for name, value in per_latent.items()}
    if skip:
        tensors["W_skip"] = torch.zeros(d_in, width)
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    return Params(tensors, "tied" if d_out is None else "none")


@torch.no_grad()
def project_gradient(params: Params) -> None:
    """Remove from the gradient of each decoder row its part along the row, in place, for rows of unit length.

        g_i -= <g_i, w_i> w_i / |w_i|^2

    The normalization after the step would undo that part, which would only distort Adam's moments.

    References:
        Bricken et al. 2023 ("Towards Monosemanticity", appendix on training); Gao et al. 2024, arXiv:2406.04093,
        appendix A.1.
    """
    # On a CPU some rows at a time: products the size of all weights cost more in page faults than in arithmetic.
    step = 1024 if params.W_dec.device.type == "cpu" else params.d_sae
    for w, g in zip(params.W_dec.split(step), params.W_dec.grad.split(step), strict=True):
        along = (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        g.addcmul_(along, w, value=-1)


@torch.no_grad()
def constrain(params: Params, rows: Rows) -> None:
    """Restore the constraints on the weights after an optimizer step, in place.

    With "unit", each decoder row is scaled to length 1 (a row of zeros stays zero). A `threshold` is raised to at least
    0: projected, not clamped in the loss, where a latent at 0 would lose its gradient and stay there.
    """
    if rows == "unit":
        params.W_dec.div_(safe_norms(params)[:, None])
    if "threshold" in params._parameters:
        params.threshold.clamp_(min=0)


@torch.no_grad()
def safe_norms(params: Params) -> Float[Tensor, " d_sae"]:
    """Length of each decoder row, with 1 in place of 0, to divide by."""
    norm = params.norms()
    return torch.where(norm == 0, torch.ones_like(norm), norm)


@torch.no_grad()
def to_sae(params: Params, activation: Activation, k: int | None = None, **replaced: Tensor) -> SAE:
    """The trained weights as an SAE with unit decoder rows, in training units; a copy, training continues undisturbed.

    Args:
        params: with `W_enc, b_enc, W_dec, b_dec` and perhaps `W_skip`, unless replaced.
        activation: of the SAE.
        k: for the two top-k activations. Training selects by activation times row length; with the lengths folded into
            the encoder, the SAE selects the same latents.
        replaced: tensors to use instead or in addition: `W_enc` and `b_enc` before folding, `threshold` after it, in
            units of z_i |W_dec[i]|.
    """
    norm = safe_norms(params)
    tensors = {
        "W_enc": replaced.get("W_enc", params.W_enc) * norm,
        "b_enc": replaced.get("b_enc", params._parameters.get("b_enc")) * norm,
        "W_dec": params.W_dec / norm[:, None],
        "b_dec": params.b_dec.clone(),
    }
    if "threshold" in replaced:
        tensors["threshold"] = replaced["threshold"].to(norm.dtype)
    if params.skip:
        tensors["W_skip"] = params.W_skip.clone()
    cfg = SAEConfig(
        d_in=params.d_in,
        d_sae=params.d_sae,
        d_out=params.d_out,
        activation=activation,
        k=k,
        skip=params.skip,
        pre_bias=params.pre_bias,
    )
    return SAE.from_tensors(cfg, tensors)


def params_from_sae(
    sae: SAE, activations: tuple[str, ...], k: int | None, *, dtype: torch.dtype, device: torch.device | str
) -> Params:
    """The weights of an SAE, copied, as parameters, in the SAE's own units.

    Raises:
        ValueError: if the SAE has another activation or k, a normalization per token, or a separate b_pre.
    """
    if not isinstance(sae, SAE) or sae.cfg.activation not in activations or (k is not None and sae.cfg.k != k):
        want = f"an SAE with activation {' or '.join(activations)}, k={k}"
        raise ValueError(explain(f"this objective cannot go on from {sae!r}.", want=want))
    if sae.cfg.normalization != "none" or sae.cfg.pre_bias == "own":
        fields = f"normalization={sae.cfg.normalization!r}, pre_bias={sae.cfg.pre_bias!r}"
        want = "normalization 'none', and pre_bias 'tied' or 'none'"
        raise ValueError(explain(f"{sae!r} with {fields} cannot be trained further.", want=want))
    tensors = {name: sae.get_parameter(name).detach().to(device, dtype, copy=True) for name in sae.cfg.tensor_shapes()}
    return Params(tensors, sae.cfg.pre_bias)
