"""A copy of a model that shares its weights and has hook points of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saewb.models.hook_points import _SAEWB_HOOK, _registered, is_bridge, lock


def shared_copy(model: nn.Module) -> nn.Module:
    """The same model once more, for another thread: the same weights, not copied, and points of its own.

    A pass keeps notes in the modules it runs through (where to stop, what was seen), so two threads cannot run one
    model at a time. What is attached to the model, and hooks on its points, are not on the twin. Other hooks on its
    modules are: the model's own.
    """
    _registered(model)  # says if it has no points
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tokenizer = getattr(model, "tokenizer", None)
    memo[id(tokenizer)] = tokenizer
    with lock(model), _SharedTensors():
        for point in model.hook_dict.values():
            for name in ("fwd_hooks", "bwd_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                memo[id(getattr(point, name))] = type(getattr(point, name))()
        made = copy.deepcopy(model, memo)
    for module in _modules(made):
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, function in registered.items() if hasattr(function, _SAEWB_HOOK)]:
                del registered[key]  # torch's notes on how to call it stay, and are of no hook
    return made


class _SharedTensors(TorchFunctionMode):
    """Copying shares tensors: a pass leaves notes in its modules, and those that are part of a graph have no copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All of them, those of the model that a Bridge is made around included, which is no submodule of it."""
    yield from model.modules()
    if is_bridge(model):
        yield from model.original_model.modules()
