"""Final norm and unembedding: from the residual stream to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def norm_gain(
    norm: Callable[[Tensor], Tensor] | None, like: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " d_model"], bool]:
    """Per-coordinate gain of a norm after it divides by the RMS, and whether it centers first.

    Measured on a probe, so it is right for weights stored as w, as 1 + w, or folded away: for x of +-100,
    `(norm(x) - norm(-x)) / 2 = gain * (x - mean) / rms`. 100: its square is a number of float16, and large against eps.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    if norm is None:
        return torch.ones_like(like, dtype=wide), False
    x = torch.full_like(like, 100.0)
    x[::2] *= -1
    with torch.no_grad():
        plus, minus, shifted = (norm(v.view(1, 1, -1))[0, 0].to(wide) for v in (x, -x, x + 50))
    centers = bool(torch.allclose(plus, shifted, rtol=1e-2, atol=1e-2))
    x = x.to(wide)
    v = x - x.mean() if centers else x
    return (plus - minus) / 2 * v.square().mean().sqrt() / v, centers


def unembedding(model: nn.Module) -> Float[Tensor, "d_model d_vocab"]:
    """W_U with the final norm's gain folded in, centered as by TransformerLens: logits of a stream of RMS 1.

    W = gain * W_U;  W -= W.mean(over d_model)  where the norm centers;  W -= W.mean(over d_vocab)
    """
    gain, centers = _final_norm(model)
    w = model.W_U.detach().float() * gain[:, None]
    if centers:
        w -= w.mean(0)
    w -= w.mean(1, keepdim=True)
    return w


def unembedding_column(model: nn.Module, token: int) -> Float[Tensor, " d_model"]:
    """Column of `unembedding` for one token, computed without the others."""
    w_u = model.W_U.detach()
    gain, centers = _final_norm(model)
    w = (w_u[:, token].float() - w_u.mean(1, dtype=torch.float32)) * gain
    return w - w.mean() if centers else w


def final_norm_scale(model: nn.Module, final: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos"]:
    """Scale that the final norm divides by: RMS of the final residual stream, centered where the norm centers."""
    final = final.float()
    if getattr(model, "ln_final", None) is None:
        return torch.ones_like(final[..., 0])
    centered = final - final.mean(-1, keepdim=True) if _final_norm(model)[1] else final
    return centered.square().mean(-1).sqrt()


def _final_norm(model: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    like = model.W_U[:, 0].detach().to(next(model.parameters()).dtype)
    gain, centers = norm_gain(getattr(model, "ln_final", None), like)
    return gain.float(), centers
