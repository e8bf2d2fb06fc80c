"""Copy a model for another thread: shared weights, separate hook points."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saewb.models.hook_points import _SAEWB_HOOK, _registered, is_bridge, lock


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a model with separate hook points and modules that share its weights, to run in another thread.

    A forward pass stores state in the modules (where to stop, cached activations), so two threads cannot run one model
    at a time. Attachments and hooks on hook points are not copied; the model's other module hooks are.

    Raises:
        TypeError: if `model` has no hook points.
    """
    _registered(model)  # raises for a model without hook points
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tokenizer = getattr(model, "tokenizer", None)
    memo[id(tokenizer)] = tokenizer
    with lock(model), _SharedTensors():
        for point in model.hook_dict.values():
            for name in ("fwd_hooks", "bwd_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                memo[id(getattr(point, name))] = type(getattr(point, name))()
        clone = copy.deepcopy(model, memo)
    # The Hugging Face model that a Bridge wraps is no submodule of it.
    for module in (*clone.modules(), *(clone.original_model.modules() if is_bridge(clone) else ())):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, function in hooks.items() if hasattr(function, _SAEWB_HOOK)]:
                del hooks[key]  # torch's call options for it stay behind and have no effect
    return clone


class _SharedTensors(TorchFunctionMode):
    """Share tensors instead of copying: those a pass left in a module may be part of a graph, which has no copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
