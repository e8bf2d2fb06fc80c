"""The final norm and the unembedding: from the residual stream to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def norm_gain(
    norm: Callable[[Tensor], Tensor] | None, like: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " d_model"], bool]:
    """What the final norm multiplies each coordinate with once it has divided by the length, and if it centers first.

    Found by asking it, so that it is right for norms whose weight is stored as w, as 1 + w, or not at all (folded):
    for x of +-1000, `(norm(x) - norm(-x)) / 2 = gain * (x - mean) / rms`.
    """
    if norm is None:
        return torch.ones_like(like), False
    x = torch.full_like(like, 1000.0)
    x[::2] *= -1
    with torch.no_grad():
        there, back, moved = (norm(v.view(1, 1, -1))[0, 0].to(like.dtype) for v in (x, -x, x + 500))
    centered = bool(torch.allclose(there, moved, rtol=1e-2, atol=1e-2))
    v = x - x.mean() if centered else x
    return (there - back) / 2 * v.square().mean().sqrt() / v, centered


def unembedding(model: nn.Module) -> Float[Tensor, "d_model d_vocab"]:
    """From the residual stream to logits, for a final norm that divides by 1: TransformerLens' folded, centered W_U.

    W = gain * W_U;  W -= W.mean(over d_model)  where the norm centers;  W -= W.mean(over d_vocab)
    """
    gain, centered = _final_norm(model)
    w = model.W_U.detach().float() * gain[:, None]
    if centered:
        w -= w.mean(0)
    w -= w.mean(1, keepdim=True)
    return w


def word_direction(model: nn.Module, token: int) -> Float[Tensor, " d_model"]:
    """One column of `unembedding`, without a copy of the others."""
    w_u = model.W_U.detach()
    gain, centered = _final_norm(model)
    w = (w_u[:, token].float() - w_u.mean(1, dtype=torch.float32)) * gain
    return w - w.mean() if centered else w


def final_length(model: nn.Module, final: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos"]:
    """What the final norm divides the final residual stream by: its RMS, after centering where the norm centers."""
    final = final.float()
    if getattr(model, "ln_final", None) is None:
        return torch.ones_like(final[..., 0])
    centered = final - final.mean(-1, keepdim=True) if _final_norm(model)[1] else final
    return centered.square().mean(-1).sqrt()


def _final_norm(model: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    like = model.W_U[:, 0].detach().to(next(model.parameters()).dtype)
    gain, centered = norm_gain(getattr(model, "ln_final", None), like)
    return gain.float(), centered
