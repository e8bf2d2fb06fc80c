"""Hook points of a model: resolve them by any of their names, add and remove hooks.

Differences between kinds and versions of models are handled here and, for forward passes, in `saewb.models.forward`.

Kinds of model are distinguished by their attributes, not by their class, so that transformer_lens is not imported:
TransformerBridge (transformer-lens 3.x and 4.x; points in `_hook_registry`, aliases computed), HookedTransformer and
other HookedRootModules (points in `hook_dict` and `mod_dict`).

No module or method of the model is replaced: hooks are added to the points it has, and removed again.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType

import torch
from torch import Tensor, nn

from saewb.errors import explain, near
from saewb.models.model_lock import ModelLock, calling_function, running_functions

Edit = Callable[[Tensor], "Tensor | None"]
"""Function of an activation; a tensor that it returns replaces the activation."""

INNER = ".hook_sae_"
"""Part of the name of every point that an attachment adds."""
_SAEWB_HOOK = "_saewb_hook"
"""Attribute of the functions that saewb registers as hooks: whether `remove_all` removes them."""

_Names = tuple[str, ...]
# Names and module of each point, by any of its names. The modules of a Bridge lead back to the model, so a table that
# held them would keep the model, its key, for ever.
_tables: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[_Names, weakref.ref[nn.Module]]]] = (
    weakref.WeakKeyDictionary()
)
_locks: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_blocks: weakref.WeakKeyDictionary[nn.Module, list[_Block]] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class HookPoint:
    """A point of a model where an activation can be read and replaced."""

    name: str
    """Canonical name, as in the model itself."""
    names: tuple[str, ...]
    """Canonical name and aliases, `name` first."""
    module: nn.Module
    """transformer-lens HookPoint; or the module whose input it is, where the model has no HookPoint there."""

    @property
    def layer(self) -> int | None:
        """Index of its block; None outside of blocks."""
        match = re.match(r"blocks\.(\d+)\.", self.name)
        return int(match[1]) if match else None

    def is_before(self, layer: int) -> bool:
        """Whether it is in a block before `layer`: a pass that starts at `layer` computes no activation of it."""
        return layer > 0 and self.layer is not None and self.layer < layer

    @cached_property
    def is_module_input(self) -> bool:
        """Whether it is the input of a module rather than a transformer-lens HookPoint."""
        return not hasattr(self.module, "fwd_hooks")

    def add(self, edit: Edit) -> Hook:
        """Apply `edit` to the activation whenever it is computed, after the hooks already on the point."""
        hook = Hook(self, edit, passing=False)
        hook.install()
        return hook


@dataclass(frozen=True, eq=False)
class InnerPoints:
    """HookPoints that an attachment adds at a point of the model, `<point>.hook_sae_<key>`."""

    names: tuple[str, ...]
    """Names of the point."""
    by_key: dict[str, nn.Module]
    by_attribute: dict[str, nn.Module]
    """By attribute of the point's own module."""
    by_name: dict[str, nn.Module]
    """Under every name of the point."""


class Hook:
    """An `Edit` on a `HookPoint`, from `install` until `remove`. Survives `model.reset_hooks()`.

    It is recorded nowhere: whoever makes one keeps it before it is installed, so that an interrupt at any moment leaves
    a hook that is known, and `remove`, which looks at the point itself, removes whatever part of it is there.
    """

    def __init__(self, point: HookPoint, edit: Edit, *, passing: bool = True) -> None:
        """Prepare.

        Args:
            point: where.
            edit: function of the activation.
            passing: whether it belongs to an attachment or a block, so that `remove_all` removes it.
        """
        self._point = point
        if point.is_module_input:

            def function(module: nn.Module, args: tuple) -> tuple | None:
                edited = edit(args[0])
                return None if edited is None else (edited, *args[1:])
        else:

            def function(activation: Tensor, hook: nn.Module) -> Tensor | None:
                return edit(activation)

        self._function = mark_as_saewb_hook(function, passing=passing)

    def install(self) -> None:
        """Add the hook (again) after all others on the point."""
        if self._point.is_module_input:
            self._point.module.register_forward_pre_hook(self._function)
        else:
            self._point.module.add_hook(self._function, is_permanent=True)

    @property
    def is_on(self) -> bool:
        """Whether the hook is on the point: not after `remove` or `model.reset_hooks(including_permanent=True)`."""
        module = self._point.module
        hooks = module._forward_pre_hooks if self._point.is_module_input else module._forward_hooks
        return any(_marked(hook) is self._function for hook in list(hooks.values()))

    def remove(self) -> None:
        """Remove this hook and no other; harmless if it was removed already."""
        remove_from(self._point.module, lambda function: function is self._function)


def remove_from(module: nn.Module, is_meant: Callable[[Callable], bool]) -> None:
    """Remove hooks of saewb from a module: those whose marked function is meant."""
    removed = False
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, function in list(hooks.items()):
            if (marked := _marked(function)) is not None and is_meant(marked):
                hooks.pop(key, None)  # torch's call options for it stay behind and have no effect
                removed = True
    handles = getattr(module, "fwd_hooks", None)
    if handles and (removed or any(handle.hook.id not in module._forward_hooks for handle in handles)):
        handles[:] = [handle for handle in handles if handle.hook.id in module._forward_hooks]


def remove_all(model: nn.Module) -> None:
    """Remove every hook of attachments and blocks, also those of which an interrupt left no record.

    Blocks that are going on, of this thread, keep theirs.
    """
    running = running_functions(threading.get_ident()) or set()
    blocks = [block for block in _blocks.get(model, ()) if block.function in running]
    going_on = {hook._function for block in blocks for hook in block.hooks}
    modules = {*model.modules(), *(model.original_model.modules() if is_bridge(model) else ())}
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            remove_from(module, lambda function: getattr(function, _SAEWB_HOOK) and function not in going_on)


def lock(model: nn.Module) -> ModelLock:
    """Re-entrant lock of the model: hold it to add hooks, run the model and remove them."""
    with _locks_lock:
        return _locks.setdefault(model, ModelLock())


def resolve(model: nn.Module, name: str) -> HookPoint:
    """Resolve a hook name, canonical or alias, to a point of the model.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        name: e.g. "blocks.4.hook_resid_post"; on a HookedTransformer also "blocks.4.mlp.hook_in", the input of the MLP.

    Raises:
        TypeError: if `model` has no hook points.
        ValueError: for an unknown name (the error lists near ones); for a point that is switched off and cannot fire.
    """
    points = _registered(model)
    point = _from_table(model, name)
    if point is None or not (point.is_module_input or points.get(point.name) is point.module):
        _tables[model] = {n: (point.names, weakref.ref(point.module)) for n, point in _table(model).items()}
        point = _from_table(model, name)
    if point is None:
        raise ValueError(_unknown_name_message(model, name))
    _check_switched_on(model, point, name)
    return point


def _from_table(model: nn.Module, name: str) -> HookPoint | None:
    names, module = _tables.get(model, {}).get(name, ((), None))
    module = module and module()
    return None if module is None else HookPoint(names[0], names, module)


def split_head(name: str) -> tuple[str, int | None]:
    """Split "name[3]" into hook name and head index; the index is None for a plain name.

    Example:
        >>> split_head("blocks.0.attn.hook_z[3]"), split_head("hook_embed")
        (('blocks.0.attn.hook_z', 3), ('hook_embed', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def device_at(model: nn.Module, name: str) -> torch.device:
    """Device of the activation at a hook point: that of its block's weights, where a model is spread over several.

    Args:
        model: any kind.
        name: of a hook point, also with a head, "name[3]".

    Example:
        >>> import saewb
        >>> device_at(saewb.load_model("tiny", device="cpu"), "blocks.0.attn.hook_z[3]")
        device(type='cpu')
    """
    layer = resolve(model, split_head(name)[0]).layer
    module = model if layer is None else model.blocks[layer]
    return next(module.parameters()).device


def resolve_writable(model: nn.Module, name: str) -> HookPoint:
    """Resolve a hook name to a point where a replaced activation goes on through the model.

    Raises:
        ValueError: as `resolve`; and for `hook_resid_mid` of a TransformerBridge, which is the input of the second
            norm: a replacement there reaches the MLP, but not the residual stream.
    """
    point = resolve(model, name)
    resid_mid = [alias for alias in point.names[1:] if alias.endswith("hook_resid_mid")]
    if resid_mid and is_bridge(model):
        what = f"{name!r} of a TransformerBridge is what the MLP reads: written there, nothing reaches the stream."
        want = f"a HookedTransformer (transformer-lens 3.x), whose {resid_mid[0]!r} is in the stream; or another point"
        fix = f"saewb.attach(model, sae, hook={resid_mid[0].replace('resid_mid', 'resid_post')!r})"
        raise ValueError(explain(what, want=want, fix=fix))
    return point


def point_names(model: nn.Module) -> list[str]:
    """Names of the model's hook points, aliases included, sorted; inner points of attached SAEs are left out."""
    return sorted(_table(model))


def inner_points(model: nn.Module, point: HookPoint, keys: Iterable[str]) -> InnerPoints:
    """Create HookPoints of the class this model uses; `publish` makes them part of the model."""
    kind = type(next(iter(_registered(model).values())))
    by_key = {key: kind() for key in keys}
    for key, hook_point in by_key.items():
        hook_point.name = f"{point.name}{INNER}{key}"
    by_attribute = {INNER[1:] + key: hook_point for key, hook_point in by_key.items()}
    by_name = {f"{name}{INNER}{key}": hook_point for key, hook_point in by_key.items() for name in point.names}
    return InnerPoints(point.names, by_key, by_attribute, by_name)


def publish(model: nn.Module, point: HookPoint, inner: InnerPoints) -> None:
    """Make `inner` visible to the model's run_with_cache, run_with_hooks, add_hook and hook_dict, under every name."""
    # `add_hook` of a 3.x Bridge walks attributes. In __dict__, since setattr would register a submodule.
    point.module.__dict__.update(inner.by_attribute)
    for mapping in _mappings(model):
        mapping.update(inner.by_name)


def unpublish(model: nn.Module, point: HookPoint, inner: InnerPoints) -> None:
    """Undo `publish`; names that refer to another point by now are left alone."""
    published = [(point.module.__dict__, inner.by_attribute), *((m, inner.by_name) for m in _mappings(model))]
    for mapping, entries in published:
        for name, value in entries.items():
            if mapping.get(name) is value:
                del mapping[name]


@contextmanager
def editing(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Hold the model's lock and apply edits, by hook name, inside the block; afterwards all of them are removed.

    Raises:
        ValueError: for a name that does not exist or cannot fire.
    """
    with lock(model):
        block = _Block([Hook(resolve(model, name), edit) for name, edit in edits.items()], calling_function())
        try:
            block.begin(model)
            yield
        finally:
            try:
                block.end(model)
            except BaseException:  # an interrupt on the way
                block.end(model)
                raise


def in_order(edits: Iterable[tuple[int, Edit]]) -> Edit:
    """Edits of one point as one, by ascending number: each gets the activation that the one before it leaves."""
    ordered = [edit for _, edit in sorted(edits, key=lambda pair: pair[0])]

    def edit(activation: Tensor) -> Tensor:
        for step in ordered:
            changed = step(activation)
            activation = activation if changed is None else changed
        return activation

    return edit


@dataclass(frozen=True, eq=False)
class _Block:
    """The hooks of one `editing`."""

    hooks: list[Hook]
    function: FrameType | None
    """Function in which the block is."""

    def begin(self, model: nn.Module) -> None:
        _blocks[model] = [*_blocks.get(model, ()), self]
        for hook in self.hooks:
            hook.install()

    def end(self, model: nn.Module) -> None:
        for hook in reversed(self.hooks):
            hook.remove()
        _blocks[model] = [block for block in _blocks.get(model, ()) if block is not self]


def has_no_hooks(model: nn.Module) -> bool:
    """Whether no hook is on any point: no SAE, no steering, no user hook."""
    return not any(point.fwd_hooks for point in model.hook_dict.values())


def mark_as_saewb_hook(function: Callable, *, passing: bool = True) -> Callable:
    """Mark a function as a hook of saewb: `shared_copy` leaves it out, `remove_all` removes it if it is `passing`."""
    setattr(function, _SAEWB_HOOK, passing)
    return function


def _marked(function: Callable) -> Callable | None:
    """The marked function that a torch hook is, or calls (transformer-lens wraps it); None if there is none."""
    if hasattr(function, _SAEWB_HOOK):
        return function
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if hasattr(content, _SAEWB_HOOK) and callable(content):
            return content
    return None


def is_bridge(model: nn.Module) -> bool:
    """Whether it is a TransformerBridge."""
    return "_hook_registry" in getattr(model, "__dict__", {})


def _registered(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own dictionary of points; only `publish` and `unpublish` change it."""
    return _mappings(model)[0]


def _mappings(model: nn.Module) -> Iterable[dict[str, nn.Module]]:
    if is_bridge(model):
        return [model._hook_registry]
    mappings = [getattr(model, "hook_dict", None), getattr(model, "mod_dict", None)]
    if not all(isinstance(mapping, dict) for mapping in mappings):
        what = f"{type(model).__name__} has no hook points: it is no model of TransformerLens."
        want = "a TransformerBridge (transformer-lens 3.x, 4.x) or a HookedTransformer (3.x)"
        raise TypeError(explain(what, want=want, fix="model = saewb.load_model(model, tokenizer=tokenizer)"))
    return mappings


def _table(model: nn.Module) -> dict[str, HookPoint]:
    """Point of every name. Takes milliseconds on a Bridge, which computes its aliases anew."""
    _registered(model)  # raises for an object that is no such model
    names_of: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.hook_dict.items():
        if INNER not in name:
            names_of.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    table: dict[str, HookPoint] = {}
    for key, names in names_of.items():
        canonical = modules[key].name if modules[key].name in names else names[0]
        point = HookPoint(canonical, (canonical, *(name for name in names if name != canonical)), modules[key])
        table.update(dict.fromkeys(names, point))
    return table if is_bridge(model) else {**_module_inputs(model), **table}


def _module_inputs(model: nn.Module) -> dict[str, HookPoint]:
    """Points of a Bridge that a HookedTransformer has no HookPoint for.

    The inputs of its MLPs, which published transcoders read (`blocks.L.mlp.hook_in`), and `unembed.hook_in`, the output
    of the final norm.
    """
    meant = (name for name in model.mod_dict if name == "unembed" or name.endswith(".mlp"))
    inputs = {f"{name}.hook_in": model.mod_dict[name] for name in meant}
    return {name: HookPoint(name, (name,), module) for name, module in inputs.items()}


def _unknown_name_message(model: nn.Module, name: str) -> str:
    names = point_names(model)
    close = near(name, names) or near(f"blocks.{(re.findall('[0-9]+', name) or [0])[0]}.hook_resid_post", names)
    what = f"no hook named {name!r} on this model ({len({names for names, _ in _tables[model].values()})} points)."
    return explain(what, near=close, fix=f"saewb.attach(model, sae, hook={(close or names)[0]!r})")


def _check_switched_on(model: nn.Module, point: HookPoint, name: str) -> None:
    switch = None if point.is_module_input else _off_switch(model, point)
    if switch is None:
        return
    want = "a point that fires"
    if switch == "use_hook_mlp_in":
        want += f", e.g. {name.replace('.hook_mlp_in', '.mlp.hook_in')!r}, what the MLP itself reads"
    what = f"hook {name!r} is switched off on this model and never fires."
    raise ValueError(explain(what, want=want, fix=f"model.set_{switch}(True)"))


def _off_switch(model: nn.Module, point: HookPoint) -> str | None:
    """Configuration flag that keeps the point from firing; None if it fires."""
    if is_bridge(model):
        return model._gated_hook_reason(point.name)
    try:
        model.check_hooks_to_add(point.module, point.name, None)
    except AssertionError as refusal:
        return re.sub(r".* if (use_\w+) is False.*", r"\1", str(refusal)).replace(
            "use_attn_result_hook", "use_attn_result"
        )
    return None
