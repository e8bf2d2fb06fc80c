"""The text of a pass: rows of tokens and their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Int
from torch import Tensor

from saewb.errors import explain
from saewb.models.tokenizer import special_mask


class Text:
    """Rows of tokens and their numbers."""

    def __init__(self, ids: Tensor, special: Sequence[int], first_row: int, batch_size: int, device: object) -> None:
        self.ids, self.first_row, self.batch_size, self.device = ids, first_row, batch_size, device
        self.plain = ~special_mask(ids, special)
        if not self.plain.any():
            what = f"all {ids.numel()} tokens are special."
            raise ValueError(explain(what, want="text", fix="build_index(..., skip_special_tokens=False)"))

    @property
    def end(self) -> int:
        """One more than the number of the last row."""
        return self.first_row + len(self.ids)

    def batches(self, first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the first row, ids, plain), from row number `first` on, on the device."""
        for begin in range(first - self.first_row, len(self.ids), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            yield self.first_row + begin, self.ids[part].to(self.device), self.plain[part].to(self.device)

    def row(self, number: int) -> Int[Tensor, " ctx"]:
        """A row by its number, on the CPU."""
        return self.ids[number - self.first_row]
