"""Something of saewb that is on a language model, from its making until `detach` or the end of the `with` block.

What attachments and interventions have in common: they hold a model's lock while they come and go, watch its forward
passes, leave the model as it was, and are kept in a list by model so that one whose variable is lost can be taken off.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import forward, hook_points

_there: weakref.WeakKeyDictionary[nn.Module, list[OnModel]] = weakref.WeakKeyDictionary()  # oldest first

Self = TypeVar("Self", bound="OnModel")


def on_model(model: nn.Module) -> tuple[OnModel, ...]:
    """What saewb has on this model now, oldest first."""
    return tuple(_there.get(model, ()))


class OnModel(ABC):
    """To be told how to go on and off, and what to do in a pass."""

    _again: ClassVar[str]  # the line to type for another one, once this is over

    def __init__(self, model: nn.Module) -> None:
        self._model, self._lock = weakref.ref(model), hook_points.lock(model)
        self._stop_watching = None

    @property
    def is_attached(self) -> bool:
        """False once detached."""
        return self._stop_watching is not None

    def detach(self) -> None:
        """Take it off; the model, and every hook on it, is as before. In any order, and again, without harm."""
        with self._lock:
            if not self.is_attached:
                return
            self._stop_watching()
            self._stop_watching = None
            self._take_off()
            if (model := self._model()) is not None:
                _there[model].remove(self)

    def __enter__(self: Self) -> Self:
        if not self.is_attached:
            raise ValueError(explain(f"{self!r} is over.", fix=self._again))
        self._lock.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.detach()
        finally:
            self._lock.release()

    def _install(self) -> None:
        """All of it, or nothing."""
        model = self._model()
        with self._lock:
            try:
                self._put_on()
                self._stop_watching = forward.watch(model, self._announce, self._begin, self._end)
            except BaseException:
                self._take_off()
                raise
            _there.setdefault(model, []).append(self)

    @abstractmethod
    def _put_on(self) -> None:
        """Place the hooks; one that fails leaves it to `_take_off` to remove those before it."""

    @abstractmethod
    def _take_off(self) -> None:
        """Remove the hooks that are there, newest first."""

    @abstractmethod
    def _announce(self, tokens: Tensor | None) -> None:
        """The model was called, with these token ids if it was with ids."""

    @abstractmethod
    def _begin(self, cached_tokens: int) -> None:
        """Its first layer runs; so many tokens of the text are in the cache of keys and values."""

    @abstractmethod
    def _end(self) -> None:
        """The pass is over."""
