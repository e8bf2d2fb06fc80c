"""Whitened activations: every direction as large as every other, so that the loss no longer favors the largest.

    z = (x - m) M,   M = C_s^(-1/2),   C_s = (1 - s) C + s tr(C) / d I,     C: covariance of x

M is the symmetric root (ZCA): z is as near to x as whitened activations can be. With shrinkage s = 0 the covariance of
z is the identity; a direction of C with eigenvalue c keeps the variance c / ((1 - s) c + s tr(C) / d), so that
directions in which nothing varies are not blown up. All in float64, from one pass over the tokens of the estimate.

An SAE trained on z is folded: it reads x and writes x, and needs no scaling at inference.

References: Saraswatula and Klindt 2025, arXiv:2511.13981 (whitening before SAEs); Ledoit and Wolf 2004 (shrinkage to
tr(C) / d I).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import explain
from saewb.sae.sae import SAE

_FLAT = 1e-12  # of the largest eigenvalue: below, a direction has no variance


@dataclass(frozen=True, eq=False)
class Whitening:
    """The two matrices of one point; its mean is taken out before, and put back after."""

    matrix: Float[Tensor, "d d"]  # z = (x - m) @ matrix
    inverse: Float[Tensor, "d d"]  # x = z @ inverse + m


def whitening(
    point: str, batches: Iterable[Float[Tensor, "tokens d"]], mean: Float[Tensor, " d"], shrinkage: float
) -> Whitening:
    """What whitens these activations.

    Args:
        point: their name, for messages.
        batches: in the model's units; gone through once.
        mean: of all of them.
        shrinkage: s, 0 to 1.

    Raises:
        ValueError: if some direction does not vary and nothing shrinks the covariance.

    Example:
        >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])
        >>> z = (x - x.mean(0)) @ whitening("x", [x], x.mean(0), 0.0).matrix
        >>> torch.allclose(z.T @ z / 1000, torch.eye(3), atol=1e-5)
        True
    """
    products, n = torch.zeros((), dtype=torch.float64), 0
    for x in batches:
        centered = x.double() - mean.double()
        products, n = products.to(x.device) + centered.T @ centered, n + len(x)
    covariance = products / n
    d = len(covariance)
    values, axes = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.trace() / d
    flat = int((values <= _FLAT * values.max()).sum())
    if flat:
        what = f"{flat} of {d} directions of {point!r} do not vary over {n} tokens, and shrinkage={shrinkage:g}."
        fix = "TrainConfig(..., normalization='whitened', shrinkage=1e-3)"
        raise ValueError(explain(what, want=f"more than {d} tokens, or a shrinkage above 0", fix=fix))
    root = values.sqrt()
    return Whitening(((axes / root) @ axes.T).float(), ((axes * root) @ axes.T).float())


def unwhitened(sae: SAE, read: Whitening, write: Whitening) -> SAE:
    """An SAE of whitened activations made to read and write centered ones: exactly the same function.

        W_enc' = M_r W_enc;   W_dec' = W_dec M_w^-1;   W_skip' = M_r W_skip M_w^-1
        b_dec' = b_dec M_w^-1;   b_pre' = b_pre M_r^-1

    Rows of W_dec get unit length again where that changes nothing. A top-k activation chose by lengths in whitened units, so
    its rows have unit length there, and other lengths in the model's.
    """
    made = _moved(sae, read.matrix, read.inverse, write.inverse)
    return made if sae.cfg.k is not None else made.fold_decoder_norm()


def whitened(sae: SAE, read: Whitening, write: Whitening) -> SAE:
    """The inverse of `unwhitened`, with rows of unit length in whitened units.

    A top-k SAE that was not trained in these units then keeps other latents here and there: the lengths they write are
    compared in whitened units from now on.
    """
    made = _moved(sae, read.inverse, read.matrix, write.matrix)
    if sae.cfg.k is None:
        return made.fold_decoder_norm()
    norm = made.W_dec.norm(dim=1)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    tensors = {name: p.detach() for name, p in made.named_parameters()}
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm
    return SAE.from_tensors(made.cfg, {**tensors, "W_dec": tensors["W_dec"] / norm[:, None]})


@torch.no_grad()
def _moved(sae: SAE, reads: Tensor, back: Tensor, writes: Tensor) -> SAE:
    """Encoder directions through `reads`, what is taken from the input through `back`, what is written by `writes`."""
    old = {name: p.detach() for name, p in sae.named_parameters()}
    reads, back, writes = (m.to(sae.device, torch.float64) for m in (reads, back, writes))
    new = {"W_enc": reads @ old["W_enc"].double(), "W_dec": old["W_dec"].double() @ writes}
    new["b_dec"] = old["b_dec"].double() @ writes
    if "b_pre" in old:
        new["b_pre"] = old["b_pre"].double() @ back
    if "W_skip" in old:
        new["W_skip"] = reads @ old["W_skip"].double() @ writes
    return SAE.from_tensors(sae.cfg, {**old, **{name: t.to(sae.dtype) for name, t in new.items()}})
