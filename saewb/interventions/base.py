"""Base class of attachments and interventions: a context manager that adds hooks to a model and removes them.

It holds the model's lock while hooks are added and removed, is called around each forward pass, and is listed per
model, so that one whose variable is lost can still be detached.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from jaxtyping import Bool
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import forward, hook_points
from saewb.models.active import registry
from saewb.models.hook_points import HookPoint
from saewb.models.tokenizer import special_mask
from saewb.sae.base import SparseCoder

_TO_ENTER_S = 0.5
"""Seconds after `attach` or `steer` in which a `with` block begins, if it is going to."""

Self = TypeVar("Self", bound="ActiveIntervention")


def active_interventions(model: nn.Module) -> tuple[ActiveIntervention, ...]:
    """Attachments and interventions on this model now, oldest first."""
    return tuple(registry.get(model, ()))


class ActiveIntervention(ABC):
    """Hooks on a model, until `detach` or the end of the `with` block.

    Subclasses implement `written` and `content`, `_install` and `_remove`, and for each forward pass `_before_forward`,
    `_at_first_block` and `_after_forward`. Whoever makes one calls `_activate`.
    """

    steers: ClassVar[bool]
    """Whether it changes latents rather than puts an SAE's output in place of an activation."""
    _how_to_repeat: ClassVar[str]
    """Line of code that makes another one, for the error after this one is detached."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._lock = weakref.ref(model), hook_points.lock(model)
        self._watcher: forward.PassWatcher | None = None
        self._attached = False

    @property
    def is_attached(self) -> bool:
        """False once detached."""
        return self._attached

    def detach(self) -> None:
        """Remove its hooks; the model, and every other hook on it, is as before. Harmless in any order, and twice.

        Interrupted half way, it is still attached, and called again removes the rest.
        """
        with self._lock:
            if self._attached:
                self._take_off()
        self._lock.drop(self)

    def _take_off(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
        self._remove()
        if (model := self._model()) is not None:
            registry[model] = [active for active in registry.get(model, ()) if active is not self]
        self._watcher = None  # it refers to this object: break the cycle
        self._attached = False

    def __enter__(self: Self) -> Self:
        if not self.is_attached:
            raise ValueError(explain(f"{self!r} is over.", fix=self._how_to_repeat))
        self._lock.enter(self)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.detach()
        except KeyboardInterrupt:
            self.detach()
            raise

    def _activate(self) -> None:
        """Install all hooks, or none.

        For a moment more the model's lock stays with this thread: `with saewb.attach(...)` enters its block after the
        call, and no other thread is to come in between.
        """
        model = self._model()
        with self._lock:
            try:
                self._attached = True
                registry[model] = [
                    *registry.get(model, ()),
                    self,
                ]  # before there is a hook, so that `detach_all` finds it
                self._install()
                self._watcher = forward.PassWatcher(
                    model, self._before_forward, self._at_first_block, self._after_forward
                )
                self._watcher.start()
                self._lock.reserve(self, _TO_ENTER_S)
            except BaseException:
                self._take_off()
                self._lock.drop(self)
                raise

    @property
    @abstractmethod
    def written(self) -> tuple[HookPoint, ...]:
        """Points whose activation it changes."""

    @abstractmethod
    def content(self) -> list[Any]:
        """Plain values, digests among them, for `saewb.models.active.model_digest`."""

    @abstractmethod
    def _install(self) -> None:
        """Add the hooks; if one fails, `_remove` takes off those before it."""

    @abstractmethod
    def _remove(self) -> None:
        """Remove the hooks that were added, newest first."""

    @abstractmethod
    def _before_forward(self, tokens: Tensor | None) -> None:
        """Prepare for a pass over these token ids, `[batch, pos]`; None if the model was given embeddings."""

    @abstractmethod
    def _at_first_block(self, kv_cache_offset: int, n_padding: Tensor | None) -> None:
        """Handle the start of the first block: tokens in the KV cache, and padding before each row's text if any."""

    @abstractmethod
    def _after_forward(self) -> None:
        """Check a pass that ran to its end."""


def check_kv_cache(sae: SparseCoder, kv_cache_offset: int) -> None:
    """Check that the SAE can encode a pass whose earlier tokens are only in the KV cache.

    Raises:
        ValueError: for a temporal SAE, which looks back at their activations.
    """
    if kv_cache_offset and sae.looks_back:
        what = f"{sae!r} looks at earlier tokens, and this pass has them in its cache only."
        raise ValueError(explain(what, fix="model.generate(..., use_past_kv_cache=False)"))


def mask_special_tokens(activation: Tensor, tokens: Tensor | None, special: Iterable[int]) -> Bool[Tensor, "batch pos"]:
    """Mask of an activation, `[batch, pos, ...]`: True at special tokens.

    Raises:
        ValueError: if the model did not get one token id for each position.
    """
    shape = activation.shape[:2]
    if tokens is None or tokens.shape != shape:
        ids = "no token ids" if tokens is None else f"token ids of shape {tuple(tokens.shape)}"
        what = f"skip_special_tokens: the model got {ids}, the activation has shape {tuple(activation.shape)}."
        raise ValueError(explain(what, want="one token id for each position", fix="skip_special_tokens=False"))
    return special_mask(tokens.to(activation.device), special)
