"""Forward passes of each kind of model: callbacks around them, KV-cache offsets, passes that start at a later layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.models import hook_points
from saewb.models.load import key_value_cache, repeat_key_value_cache


class KVCachedText:
    """Growing texts of one length, and the logits of their next tokens; a KV cache lets each token be read once.

    Hooks on the model during a pass affect the tokens of that pass, and later ones through its keys and values.
    """

    def __init__(self, model: nn.Module, ids: Tensor, use_past_kv_cache: bool = True) -> None:
        """Prepare; the first `logits()` runs the model.

        Args:
            model: a TransformerBridge or HookedTransformer.
            ids: `[batch, pos]`, without padding, on the model's device.
            use_past_kv_cache: read every token once; else each pass reads the whole texts, as it always does for models
                with another state than keys and values (Mamba).
        """
        self._model, self.ids, self._kv_cache, self._kv_cache_offset = model, ids, None, 0
        self._uses_cache = use_past_kv_cache and not getattr(model.cfg, "is_stateful", False)

    def append(self, tokens: int | Int[Tensor, " batch"]) -> None:
        """Append a token to each text: the same one, or one for each."""
        column = torch.as_tensor(tokens, dtype=self.ids.dtype, device=self.ids.device).expand(len(self.ids))
        self.ids = torch.cat([self.ids, column[:, None]], dim=1)

    def repeat(self, n: int) -> KVCachedText:
        """`n` copies of a single text, with what is in its cache: nothing is run."""
        copies, is_bridge = KVCachedText(self._model, self.ids.expand(n, -1)), hook_points.is_bridge(self._model)
        copies._uses_cache = self._uses_cache
        # A cache of another kind than keys and values cannot be repeated: the copies read their texts themselves.
        if self._kv_cache is not None and (not is_bridge or hasattr(self._kv_cache, "batch_repeat_interleave")):
            copies._kv_cache, copies._kv_cache_offset = copy.deepcopy(self._kv_cache), self._kv_cache_offset
            if is_bridge:
                copies._kv_cache.batch_repeat_interleave(n)
            else:
                repeat_key_value_cache(copies._kv_cache, n)
        return copies

    def logits(self) -> Tensor:
        """Logits of the next tokens, `[batch, d_vocab]`: a pass over the tokens that are not in the cache."""
        if not self._uses_cache:
            return self._model(self.ids)[:, -1]
        tokens, self._kv_cache_offset = self.ids[:, self._kv_cache_offset :], self.ids.shape[1]
        run = self._run_bridge if hook_points.is_bridge(self._model) else self._run_hooked_transformer
        return run(tokens)[:, -1]

    def _run_bridge(self, tokens: Tensor) -> Tensor:
        past = {} if self._kv_cache is None else {"past_key_values": self._kv_cache}
        logits, self._kv_cache = self._model(tokens, return_type="logits_and_cache", use_cache=True, **past)
        if self._kv_cache is None:  # the model has no KV cache: read the whole texts from now on
            self._uses_cache = False
        return logits

    def _run_hooked_transformer(self, tokens: Tensor) -> Tensor:
        if self._kv_cache is None:
            self._kv_cache = key_value_cache(self._model, len(tokens))
        # Without an explicit mask, EOS tokens at the end would count as padding.
        return self._model(tokens, past_kv_cache=self._kv_cache, attention_mask=torch.ones_like(tokens))


class PassWatcher:
    """Callbacks before, in and after each forward pass, from `start` until `stop`."""

    def __init__(
        self,
        model: nn.Module,
        before_forward: Callable[[Tensor | None], None],
        at_first_block: Callable[[int, Tensor | None], None],
        after_forward: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            model: any kind. `model.forward` itself is not watched: run_with_cache and run_with_hooks call it past the
                hooks of the module.
            before_forward: gets the token ids `[batch, pos]` of the pass to come, or None if the model was given
                embeddings. For a HookedTransformer it is called when it embeds, also outside of a pass, and not for a
                pass that starts at a later layer.
            at_first_block: gets the KV-cache offset, how many earlier tokens are in the cache, and `left_padding` of
                the rows, when the first block is reached; a HookedTransformer's embedding points have fired by then.
            after_forward: called after each pass that ran to its end: without `stop_at_layer`, without an exception.
        """

        @hook_points.mark_as_saewb_hook
        def on_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", kwargs.get("input", args[0] if args else None))
            before_forward(ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None)

        @hook_points.mark_as_saewb_hook
        def on_begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            at_first_block(kv_cache_offset(kwargs), left_padding(kwargs))

        @hook_points.mark_as_saewb_hook
        def on_end(module: nn.Module, args: tuple, output: object) -> None:
            after_forward()

        self._functions = (on_tokens, on_begin, on_end)
        self._model = weakref.ref(model)

    def _modules(self) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        """Where the pass begins, reaches the first block, and ends."""
        model = self._model()
        if model is None:
            return None, None, None
        if hook_points.is_bridge(model):
            return (model.original_model,) * 3
        first_block = model.blocks[0] if len(getattr(model, "blocks", ())) else None
        return getattr(model, "embed", None), first_block, getattr(model, "unembed", None)

    def start(self) -> None:
        """Add the callbacks."""
        (first, second, last), (on_tokens, on_begin, on_end) = self._modules(), self._functions
        if first is not None:
            first.register_forward_pre_hook(on_tokens, with_kwargs=True)
        if second is not None:
            second.register_forward_pre_hook(on_begin, with_kwargs=True)
        if last is not None:
            last.register_forward_hook(on_end)

    def stop(self) -> None:
        """Remove the callbacks; harmless a second time."""
        for module in {module for module in self._modules() if module is not None}:
            hook_points.remove_from(module, lambda function: function in self._functions)


def run_to_layer(model: nn.Module, tokens: Tensor, stop_at_layer: int | None) -> None:
    """Run a model up to a layer, and leave it as it was, also if the pass is interrupted.

    A Bridge marks its blocks with the layer first; interrupted between that and its own `finally`, every later pass
    would end there.
    """
    try:
        model(tokens, return_type=None, stop_at_layer=stop_at_layer)
    except BaseException:
        if hook_points.is_bridge(model):
            for block in getattr(model, "blocks", ()):
                block._stop_at_layer_idx = None
        raise


def first_layer(model: nn.Module) -> int:
    """The block at which the current pass starts: not 0 under `start_at_layer`.

    A Bridge of transformer-lens 4 runs the blocks before it too, on something else than their input, and discards the
    result.
    """
    blocks = getattr(model, "blocks", None)
    return getattr(blocks[0], "_start_at_layer_idx", None) or 0 if blocks is not None and len(blocks) else 0


def kv_cache_offset(kwargs: Mapping[str, Any]) -> int:
    """Number of tokens in the KV cache with which a Hugging Face model, or a HookedTransformer's block, is called."""
    cache, entry = kwargs.get("past_key_values"), kwargs.get("past_kv_cache_entry")
    if cache is not None:
        return int(cache.get_seq_length())
    return 0 if entry is None else entry.past_keys.shape[1]


def left_padding(kwargs: Mapping[str, Any]) -> Int[Tensor, " batch"] | None:
    """Padding tokens before each row's text, by the attention mask of a pass and its cache; None without a mask."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # four axes: which token looks at which
        return None
    return (mask.cumsum(1) == 0).sum(1)
