"""Forward passes of a model: be told of them, and go on from an earlier one. As `hooks`, for each kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saewb.models import hook_points
from saewb.models.load import key_value_cache


class KVCachedText:
    """One text and what the model says comes next; keys and values of what it has read are kept, if asked for.

    What is on the model during a pass has its effect on the tokens of that pass, and on later ones by way of the keys
    and values that it left.
    """

    def __init__(self, model: nn.Module, ids: Tensor, use_past_kv_cache: bool = True) -> None:
        """Nothing is run yet.

        Args:
            model: a TransformerBridge or HookedTransformer.
            ids: `[1, pos]`, on the model's device.
            use_past_kv_cache: read every token once; else a pass reads the whole text. Models that keep something else
                than keys and values from step to step (Mamba) read the whole text always.
        """
        self._model, self.ids, self._n_read, self._kept = model, ids, 0, None
        self._keeps = use_past_kv_cache and not getattr(model.cfg, "is_stateful", False)

    def append(self, token: int) -> None:
        """The text is a token longer."""
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)

    def logits(self) -> Tensor:
        """What comes next, `[d_vocab]`: a pass over the tokens that were not read."""
        new, self._n_read = (self.ids[:, self._n_read :], self.ids.shape[1]) if self._keeps else (self.ids, 0)
        if not self._keeps:
            return self._model(new)[0, -1]
        return (self._of_bridge if hook_points.is_bridge(self._model) else self._of_hooked)(new)[0, -1]

    def _of_bridge(self, new: Tensor) -> Tensor:
        past = {} if self._kept is None else {"past_key_values": self._kept}
        logits, self._kept = self._model(new, return_type="logits_and_cache", use_cache=True, **past)
        self._keeps = self._kept is not None  # else it has none to give
        return logits

    def _of_hooked(self, new: Tensor) -> Tensor:
        if self._kept is None:
            self._kept = key_value_cache(self._model)
        # Without a mask of its own it would take padding tokens at the end for padding.
        return self._model(new, past_kv_cache=self._kept, attention_mask=torch.ones_like(new))


def watch(
    model: nn.Module,
    announce: Callable[[Tensor | None], None],
    begin: Callable[[int], None],
    end: Callable[[], None],
) -> Callable[[], None]:
    """Be told of forward passes.

    Args:
        model: any kind. `model.forward` itself is not watched: run_with_cache and run_with_hooks call it past the hooks
            of the module.
        announce: gets the token ids `[batch, pos]` of the pass to come, or None if the model was given embeddings. A
            HookedTransformer announces where it embeds, which it also does outside of a pass; and says nothing about a
            pass that starts at a later layer.
        begin: called when the first block is reached, with how many earlier tokens are in a cache of keys and values; a
            HookedTransformer's embedding points have fired by then.
        end: called after each pass that ran to its end: without `stop_at_layer`, without an exception.

    Returns:
        A function that ends the watch.
    """

    @hook_points.mark_as_saewb_hook
    def on_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", kwargs.get("input", args[0] if args else None))
        announce(ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None)

    @hook_points.mark_as_saewb_hook
    def on_begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begin(_cached_tokens(kwargs))

    @hook_points.mark_as_saewb_hook
    def on_end(module: nn.Module, args: tuple, output: object) -> None:
        end()

    if hook_points.is_bridge(model):
        first = second = last = model.original_model
    else:
        first, last = getattr(model, "embed", None), getattr(model, "unembed", None)
        second = model.blocks[0] if len(getattr(model, "blocks", ())) else None
    handles = [] if first is None else [first.register_forward_pre_hook(on_tokens, with_kwargs=True)]
    handles += [] if second is None else [second.register_forward_pre_hook(on_begin, with_kwargs=True)]
    handles += [] if last is None else [last.register_forward_hook(on_end)]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def first_layer(model: nn.Module) -> int:
    """The block at which the pass under way starts: not 0 under `start_at_layer`.

    A Bridge of transformer-lens 4 computes the blocks before it too, on something that is not their input, and throws
    the result away.
    """
    blocks = getattr(model, "blocks", None)
    return getattr(blocks[0], "_start_at_layer_idx", None) or 0 if blocks is not None and len(blocks) else 0


def _cached_tokens(kwargs: Mapping[str, Any]) -> int:
    """How many cached tokens a call of a Hugging Face model, or of a HookedTransformer's block, goes on from."""
    cache, entry = kwargs.get("past_key_values"), kwargs.get("past_kv_cache_entry")
    if cache is not None:
        return int(cache.get_seq_length())
    return 0 if entry is None else entry.past_keys.shape[1]
