"""Final norm and unembedding: from the residual stream to logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models.capture import capturing, eval_mode
from saewb.models.hook_points import is_bridge
from saewb.models.shared_copy import shared_copy


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
    """Logits, less their mean, of a residual stream of RMS 1: W_U with all that is between the stream and the logits.

        W = scale * gain * P W_U;  W -= W.mean(over d_model)  where the final norm centers;  W -= W.mean(over d_vocab)

    gain is the weight of the final norm, which is not in the `W_U` of a TransformerBridge; P the projection of models
    that unembed from fewer dimensions (OPT-350m), else 1; scale that of the logits (Granite, Cohere), else 1. Where
    logits have a soft cap (Gemma), these are the logits before it.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).

    Returns:
        float32, on the model's device. `sae.W_dec @ unembedding(model)` are the logit effects of an SAE on the residual
        stream, for `saewb.enrich`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> effects = sae.W_dec @ unembedding(model)
        >>> model.tokenizer.decode(effects[748].argmax())
        ' who'
    """
    gain, centers = _final_norm(model)
    w_u = model.W_U.detach().float()
    w = gain[:, None] * (w_u if (p := _projection(model)) is None else p @ w_u) * logit_scale(model)
    if centers:
        w -= w.mean(0)
    w -= w.mean(1, keepdim=True)
    return w


def unembedding_column(model: nn.Module, token: int) -> Float[Tensor, " d_model"]:
    """Column of `unembedding` for one token, computed without the others."""
    w_u = model.W_U.detach()
    gain, centers = _final_norm(model)
    w = w_u[:, token].float() - w_u.mean(1, dtype=torch.float32)
    w = (w if (p := _projection(model)) is None else p @ w) * gain * logit_scale(model)
    return w - w.mean() if centers else w


_scales: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


@torch.no_grad()
def logit_scale(model: nn.Module) -> float:
    """Factor between the unembedding's output and the logits, where these are small: a soft cap flattens larger ones.

    Hugging Face models apply it outside of the unembedding, under a different name each, so it is measured: by a pass
    over one token of a copy without hooks, once for each model.
    """
    if not is_bridge(model):  # a HookedTransformer has soft caps only
        return 1.0
    if model not in _scales:
        clean, point = shared_copy(model), "unembed.hook_out"
        with eval_mode(clean), capturing(clean, [point]) as outputs:
            logits = clean(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        before, after = (t.flatten().cpu().float() for t in (outputs[point], logits))  # a spread model's are apart
        usable = (before.abs() > 1e-3 * before.abs().max()).nonzero()[:, 0]
        smallest = usable[before[usable].abs().argsort()[:64]]
        _scales[model] = float((after[smallest] / before[smallest]).median()) if len(smallest) else 1.0
    return _scales[model]


def _projection(model: nn.Module) -> Float[Tensor, "d_model d_embed"] | None:
    """Projection from the residual stream to a narrower unembedding; None if that is as wide as the stream.

    Raises:
        ValueError: if the widths differ, and the model has no such projection.
    """
    width, d_model = model.W_U.shape[0], model.cfg.d_model
    if width == d_model:
        return None
    for name, module in model.original_model.named_modules() if is_bridge(model) else ():
        if name.endswith("project_out") and tuple(module.weight.shape) == (width, d_model):
            return module.weight.detach().float().T
    what = f"the unembedding of {model.cfg.model_name} reads {width} dimensions, its residual stream has {d_model}."
    raise ValueError(explain(what, want="a projection between them named project_out", fix="n_logits=0"))


def final_norm_scale(model: nn.Module, final: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos"]:
    """Scale that the final norm divides by: RMS of the final residual stream, centered where the norm centers."""
    final = final.float()
    if getattr(model, "ln_final", None) is None:
        return torch.ones_like(final[..., 0])
    centered = final - final.mean(-1, keepdim=True) if _final_norm(model)[1] else final
    return centered.square().mean(-1).sqrt()


def _final_norm(model: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    like = model.W_U.detach().new_zeros(model.cfg.d_model, dtype=next(model.parameters()).dtype)
    gain, centers = norm_gain(getattr(model, "ln_final", None), like)
    return gain.float(), centers
