"""A stream whose last batch can be put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from saewb.data.shuffle_buffer import packed, unpacked
from saewb.data.stream import ActivationStream
from saewb.models.capture import Activations


@final
class Feed:
    """A stream whose last batch can be put back: after a step that failed, nothing is lost."""

    def __init__(self, stream: ActivationStream) -> None:
        self.stream = stream
        self.broke = False  # whether it was the stream that failed
        self._last: Activations | None = None
        self._again: Activations | None = None

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        if self._again is None:
            self.broke = True
            self._last = next(self.stream)
            self.broke = False
        else:
            self._last, self._again = self._again, None
        return self._last

    def fill(self) -> bool:
        """As the stream's."""
        self.broke = True
        more = self._again is None and self.stream.fill()
        self.broke = False
        return more

    def put_back(self) -> None:
        """The next batch is the last one again."""
        self._again = self._last

    def state(self) -> dict[str, Any]:
        """The stream's, and what was put back."""
        return {"stream": self.stream.state(), "again": packed(self._again)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.stream.restore(state["stream"])
        self._again = unpacked(state["again"])
