"""What is attached to a model or steers it now: whether it may be measured, and its fingerprint.

The objects themselves are of `saewb.interventions`; they enter themselves in `registry`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from saewb.errors import explain
from saewb.fingerprint import tensors_digest, unknown, values_digest
from saewb.models import hook_points
from saewb.models.hook_points import HookPoint

# Fields of a configuration that change no activation, or change with the version of a library.
_LABELS = {
    *("transformers_version", "torch_dtype", "dtype", "architectures", "use_cache", "initializer_range", "id2label"),
    *("label2id", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "name_or_path", "return_dict"),
    *("device", "model_name", "tokenizer_name", "original_architecture", "from_checkpoint", "checkpoint_index"),
    *("checkpoint_label_type", "checkpoint_value", "n_devices", "seed", "init_mode", "init_weights", "n_params"),
    *("use_hook_tokens", "use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in"),
    *("tokenizer_prepends_bos", "default_prepend_bos", "trust_remote_code", "n_ctx", "max_position_embeddings"),
}
_LIBRARIES = {"transformers", "transformer_lens", "accelerate", "torch"}


class Active(Protocol):
    """An attachment or an intervention on a model."""

    @property
    def steers(self) -> bool:
        """Whether it changes latents rather than puts an SAE's output in place of an activation."""
        ...

    @property
    def written(self) -> tuple[HookPoint, ...]:
        """Points whose activation it changes."""
        ...

    def content(self) -> list[Any]:
        """Plain values, digests among them: two that change the model alike have the same."""
        ...


registry: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""Those on each model, oldest first."""

_digests_of_hooks: weakref.WeakKeyDictionary[Callable, str] = weakref.WeakKeyDictionary()


def check_unmodified(model: nn.Module, points: Iterable[HookPoint | str], *, steered: bool = False) -> None:
    """Check that the activations at these points are the model's own, before something is measured there.

    What is attached elsewhere is part of the model: the points read what it makes of it.

    Args:
        model: any kind.
        points: that are read or written by what is measured, or names of them.
        steered: whether latents of the model may be steered, at whatever point.

    Raises:
        ValueError: if an attachment writes to one of the points; if the model is steered, unless `steered`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> check_unmodified(model, [sae.cfg.hook])
        >>> with saewb.attach(model, sae):
        ...     check_unmodified(model, [sae.cfg.hook])
        Traceback (most recent call last):
        ...
        ValueError: Attachment(attached: blocks.2.hook_resid_post) writes to 'blocks.2.hook_out' already, so the activation there is not the model's own.
          want: the model without it
          fix:  saewb.detach_all(model)
    """  # noqa: E501
    others: list[Any] = registry.get(model, [])
    if not others:
        return
    resolved = [hook_points.resolve(model, point) if isinstance(point, str) else point for point in points]
    modules = {id(point.module) for point in resolved}
    for other in list(others):
        if other.steers:
            if not steered:
                what = f"{other!r} is on the model, so its activations are not its own."
                raise ValueError(explain(what, want="the model without it", fix="saewb.detach_all(model)"))
        elif taken := [point for point in other.written if id(point.module) in modules]:
            what = f"{other!r} writes to {taken[0].name!r} already, so the activation there is not the model's own."
            raise ValueError(explain(what, want="the model without it", fix="saewb.detach_all(model)"))


def model_digest(model: nn.Module, *, reuse: bool = False, in_training: bool = False) -> str:
    """Digest of a model as it computes now: all its weights, its configuration, what is attached, steers or hooks it.

    A hook of the user is a function that cannot be compared: its digest is a random one, the same while it is on.

    Args:
        model: any kind.
        reuse: as for `saewb.fingerprint.tensors_digest`.
        in_training: whether it is run in its own mode, in which dropout may be on.

    Example:
        >>> import saewb, torch
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> before = model_digest(model)
        >>> _ = saewb.attach(model, saewb.load_sae("tiny"))
        >>> during, _ = model_digest(model), saewb.detach_all(model)
        >>> during == before, model_digest(model) == before
        (False, True)
    """
    original = model.original_model if hook_points.is_bridge(model) else model
    weights: dict[str, Any] = dict(model.state_dict(keep_vars=True))  # a Bridge's own names are the same everywhere
    named = {id(t) for t in weights.values()}
    others = {} if original is model else original.state_dict(keep_vars=True)
    weights |= {f"original {name}": t for name, t in others.items() if id(t) not in named}
    active = [[type(one).__name__, one.content()] for one in list(registry.get(model, []))]
    dropout = [name for name, module in original.named_modules() if _drops(module)] if in_training else []
    weights = {name: t for name, t in weights.items() if isinstance(t, Tensor)}  # quantized ones have other values too
    parts = [tensors_digest(weights, reuse=reuse), _configuration(model, original), active, dropout]
    return values_digest([type(original).__name__, *parts, sorted(_hooks(model))])


def _configuration(model: nn.Module, original: nn.Module) -> dict[str, Any]:
    """Fields that are not the default ones of the architecture: a newer version of a library has more of those."""
    config: Any = getattr(original, "config", None)
    if hasattr(config, "to_diff_dict"):
        values = config.to_diff_dict()
    else:
        values = dict(vars(getattr(model, "cfg", object()))) if hasattr(model, "cfg") else {}
    return {k: v for k, v in values.items() if k not in _LABELS and not k.startswith("_") and v is not None}


def _drops(module: nn.Module) -> bool:
    return module.training and bool(getattr(module, "p", 0)) and "Dropout" in type(module).__name__


def _hooks(model: nn.Module) -> Iterator[str]:
    """Where hooks of the user are, with a digest of each that lasts as long as the function."""
    modules = {*model.modules(), *(model.original_model.modules() if hook_points.is_bridge(model) else ())}
    modules |= set(hook_points._registered(model).values())
    blocks = {hook._function for block in hook_points._blocks.get(model, ()) for hook in block.hooks}
    for module in modules:
        if not (module._forward_hooks or module._forward_pre_hooks):
            continue
        for function in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            marked, library = hook_points._marked(function), str(getattr(function, "__module__", "")).partition(".")[0]
            is_point = hasattr(module, "fwd_hooks")
            if marked in blocks if marked is not None else is_point or library not in _LIBRARIES:
                yield f"{getattr(module, 'name', type(module).__name__)} {_digest_of_hook(marked or function)}"


def _digest_of_hook(function: Callable) -> str:
    try:
        return _digests_of_hooks.setdefault(function, unknown())
    except TypeError:  # one that cannot be referred to weakly
        return unknown()
