"""A model's activations at its hook points.

`capture` is one forward pass that stops after the last layer anybody asked for: no logits, no copies.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Int
from torch import Tensor, nn

from saewb import hooks
from saewb.errors import explain


def capture(model: nn.Module, tokens: Int[Tensor, "batch pos"], points: Iterable[str]) -> dict[str, Tensor]:
    """Activations at several points from one forward pass, which stops after the last layer that is needed.

    The model's lock is held for the pass, and its hooks are afterwards as before. Hooks and SAEs that are on it have
    their effect, as in any pass. Gradients are recorded unless the caller says `torch.no_grad()`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        tokens: ids, on the model's device.
        points: names of hook points, by any of their names; each once or more.
    Returns:
        By the names given: `[batch, pos, d]`, or `[batch, pos, heads, d_head]` where the point has heads; the model's
        own tensors, in its dtype and on its device. Clone what must outlive a hook that changes it in place.
    Raises:
        ValueError: for a point that does not exist, is switched off, or did not fire.
    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny")
        >>> seen = capture(model, model.to_tokens("A cat sat."), ["blocks.2.hook_resid_post"])
        >>> seen["blocks.2.hook_resid_post"].shape
        torch.Size([1, 5, 128])
    """
    seen: dict[str, Tensor] = {}
    names = dict.fromkeys(points)
    with hooks.editing(model, {name: _noting(seen, name) for name in names}):
        model(tokens, return_type=None, stop_at_layer=stop_layer(model, names))
    for name in names:
        if name not in seen:
            raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))
    return {name: seen[name] for name in names}


def stop_layer(model: nn.Module, points: Iterable[str]) -> int | None:
    """The first layer that need not run for these points, for `stop_at_layer`; None if one is outside of blocks."""
    layers = [hooks.resolve(model, name).layer for name in points]
    return None if None in layers or not layers else max(layers) + 1


def _noting(seen: dict[str, Tensor], name: str) -> hooks.Edit:
    def edit(activation: Tensor) -> None:
        seen[name] = activation

    return edit
