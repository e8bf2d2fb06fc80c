"""Documents, as token ids, into rows of one length, one document after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from saewb.errors import explain


@final
class Packer:
    """Lays documents end to end and cuts them into full rows; what does not fill a row yet is kept for the next.

    No marker is doubled: where the token it would stand before is the same one, it is left out. A document that does
    not fit goes on in the next row without a token lost or repeated. Empty documents leave no trace.

    Args:
        ctx_len: tokens in a row, markers included; at least 2.
        row_start: the token every row begins with (BOS); None for none.
        separator: between two documents in a row; None for none.
        document_start: before every document; None for none.
        whole: no document is joined to another: a row is the beginning of one document, and documents too short to fill
            a row are left out. They begin with `document_start`, or else `row_start`.

    References:
        The rows are those of SAELens' `concat_and_batch_sequences` with the same markers.

    Example:
        >>> packer = Packer(4, row_start=0, separator=0)
        >>> [row for document in ([5, 6, 7, 8], [9], [5, 5]) for row in packer.rows(document)]
        [[0, 5, 6, 7], [0, 8, 0, 9]]
        >>> packer.unfinished
        [0, 5, 5]
    """

    def __init__(
        self,
        ctx_len: int,
        row_start: int | None = None,
        separator: int | None = None,
        document_start: int | None = None,
        whole: bool = False,
    ) -> None:
        if ctx_len < 2:
            what, want = f"got ctx_len={ctx_len}.", "at least 2: a BOS and a token"
            raise ValueError(explain(what, want=want, fix="ctx_len=128"))
        self.ctx_len, self.row_start, self.separator = ctx_len, row_start, separator
        self.document_start, self.whole = document_start, whole
        self.unfinished: list[int] = []  # the row that is being filled

    def rows(self, document: Sequence[int]) -> Iterator[list[int]]:
        """The rows that this document completes."""
        return self._whole(list(document)) if self.whole else self._joined(list(document))

    def _whole(self, ids: list[int]) -> Iterator[list[int]]:
        mark = self.row_start if self.document_start is None else self.document_start
        row = ([] if mark is None or ids[:1] == [mark] else [mark]) + ids
        if ids and len(row) >= self.ctx_len:
            yield row[: self.ctx_len]

    def _joined(self, ids: list[int]) -> Iterator[list[int]]:
        at, begins = 0, True
        while at < len(ids):
            front = [self.document_start] if begins and self.document_start not in (None, ids[at]) else []
            lead = self.separator if self.unfinished else self.row_start
            marks = [lead] * (lead not in (None, *(front or [ids[at]]))) + front
            room = self.ctx_len - len(self.unfinished)
            taken = max(0, room - len(marks))
            self.unfinished += marks[:room] + ids[at : at + taken]
            at, begins = at + taken, bool(front) and len(marks) > room
            if len(self.unfinished) == self.ctx_len:
                yield self.unfinished
                self.unfinished = []
