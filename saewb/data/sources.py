"""Where activations come from: a model, tensors in memory, an iterator, a generator of synthetic ones.

Each gives chunks of any size and can say where it is; `saewb.data.stream` cuts them into batches.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from saewb.data.orders import shuffled
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.capture import Activations, capture, stop_layer
from saewb.models.tokenizer import special_mask

_HEAD = re.compile(r"(.+)\[(\d+)\]")


class TokenRows(Protocol):
    """What gives token rows `[rows, ctx]` and can say and take up where it is: `saewb.data.token_streams.TokenStream`."""

    def __next__(self) -> Tensor: ...

    def state(self) -> dict[str, Any]:
        """Where it is."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@final
class ModelSource:
    """A model's activations: one forward pass for all points, which stops after the last layer that is needed.

    The model's lock is held for one pass at a time, so others use the model in between, and whatever is attached to it
    during a pass has its effect on what is read.

    Args:
        model: any kind.
        tokens: of rows `[rows, ctx]`, without padding that is not among `skipped`.
        points: names of hook points, by any of their names. Heads are laid side by side, `[tokens, heads * d_head]`;
            "blocks.0.attn.hook_z[3]" is head 3 alone.
        positions: of each row, those kept.
        skipped: ids whose tokens are left out.
        device: where activations are put; None leaves them where the model computed them.
        dtype: of activations; None keeps the model's.
        team: processes that share the passes: of as many batches of rows as there are processes, each computes one and
            hands it to the others. All give the same chunks, those of one process, and their `state()` is its too.

    Raises:
        ValueError: for a point that does not exist, is switched off, did not fire, or has no token axis.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: TokenRows,
        points: Iterable[str],
        *,
        positions: slice = slice(None),
        skipped: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        team: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self.model, self._tokens, self._team = model, tokens, team
        self._round: deque[tuple[dict[str, Any], Activations | None]] = deque()  # place before each chunk; the chunk
        self._unsure: dict[str, Any] | None = None  # place before a round that was begun and not ended
        self.points = {name: _parsed(name) for name in points}
        if not self.points:
            raise ValueError(explain("got no points.", want="one or more names of hook points"))
        self._names = list(dict.fromkeys(name for name, _ in self.points.values()))
        for name in self._names:
            hook_points.resolve(model, name)
        self._positions, self._skipped, self._device, self._dtype = positions, tuple(skipped), device, dtype
        self._ids: Tensor | None = None  # rows that were taken and are not computed yet

    @property
    def stop_layer(self) -> int | None:
        """The first layer that does not run; None if all do."""
        return stop_layer(self.model, self._names)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        for _ in range(1000):
            chunk = self._alone() if self._team.size == 1 else self._shared()
            if chunk is not None:
                return chunk
        what = (
            f"1000 batches of rows gave no token that is kept (positions {self._positions}, skipped {self._skipped})."
        )
        raise ValueError(explain(what, want="rows with other tokens", fix="positions=slice(1, None)"))

    def _alone(self) -> Activations | None:
        if self._ids is None:
            self._ids = next(self._tokens)
        chunk = self._computed(self._ids)
        self._ids = None
        return chunk

    def _shared(self) -> Activations | None:
        if not self._round:
            rows = list(self._rounds())
            if not rows:
                raise StopIteration
            self._unsure = rows[0][0]
            chunks = self._handed_round([ids for _, ids in rows])
            self._unsure = None
            self._round.extend((place, chunk) for (place, _), chunk in zip(rows, chunks, strict=True))
        return self._round.popleft()[1]

    def _rounds(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """A batch of rows for each process, fewer at the end, each with the place before it."""
        if self._ids is not None:  # from a state
            yield {"tokens": self._tokens.state(), "ids": self._ids}, self._ids
            self._ids = None
        for _ in range(self._team.size):
            place = {"tokens": self._tokens.state(), "ids": None}
            ids = next(self._tokens, None)
            if ids is None:
                return
            yield place, ids

    def _handed_round(self, rows: list[Tensor]) -> list[Activations | None]:
        """The chunks of these rows: one computed here, the others handed over. Too few for all: all computed here."""
        kept = [self._kept(ids) for ids in rows]
        if len(rows) != self._team.size or not all(map(len, kept)):
            return [self._computed(ids) for ids in rows]
        own = self._computed(rows[self._team.rank])
        chunks: list[Activations | None] = []
        for rank, (ids, where) in enumerate(zip(rows, kept, strict=True)):
            mine = rank == self._team.rank
            values = {
                name: self._team.broadcast(x.contiguous() if mine else x.new_empty(len(where), x.shape[1]), rank)
                for name, x in own.values.items()
            }
            chunks.append(Activations(values, ids.flatten()[where].to(torch.int32)))
        return chunks

    @torch.no_grad()
    def _computed(self, ids: Tensor) -> Activations | None:
        kept = self._kept(ids)
        if len(kept) == 0:
            return None
        seen = capture(self.model, ids.to(_device(self.model)), self._names)
        values = {key: self._rows(seen[name], head, ids, kept, key) for key, (name, head) in self.points.items()}
        return Activations(values, ids.flatten()[kept].to(torch.int32))

    def _kept(self, ids: Tensor) -> Tensor:
        """Where the kept tokens are in the flattened rows. Told on the CPU, so that a GPU is not waited for."""
        keep = torch.zeros_like(ids, dtype=torch.bool)
        keep[:, self._positions] = True
        return (keep & ~special_mask(ids, self._skipped)).flatten().nonzero()[:, 0]

    def _rows(self, activation: Tensor, head: int | None, ids: Tensor, kept: Tensor, name: str) -> Tensor:
        if activation.shape[:2] != ids.shape or activation.ndim not in (3, 4):
            what = f"{name!r} gives {tuple(activation.shape)} for tokens {tuple(ids.shape)}."
            raise ValueError(explain(what, want="a point of shape [batch, pos, d] or [batch, pos, heads, d_head]"))
        if head is not None:
            if activation.ndim != 4 or head >= activation.shape[2]:
                what = f"{name!r}: no head {head} in activations of shape {tuple(activation.shape)}."
                raise ValueError(explain(what, want="[batch, pos, heads, d_head] and a head that is there"))
            activation = activation[:, :, head]
        rows = activation.flatten(0, 1).flatten(1)
        rows = rows.index_select(0, kept.to(rows.device, non_blocking=True))
        return rows.to(device=self._device, dtype=self._dtype)

    def state(self) -> dict[str, Any]:
        """With the rows that were taken and are not computed yet: there are some after a failure."""
        if self._round:
            return dict(self._round[0][0])
        return dict(self._unsure or {"tokens": self._tokens.state(), "ids": self._ids})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._tokens.restore(state["tokens"])
        self._ids = state["ids"]
        self._round.clear()
        self._unsure = None


@final
class TensorSource:
    """Tensors in memory, token by token; no copy but of what is given.

    Args:
        values: `[tokens, d]` by point, or Activations.
        repeat: goes on with the first token after the last, for ever.
        seed: of a random order, another one each time round; None keeps the order.
        chunk: tokens of a chunk.
    """

    def __init__(
        self, values: Activations | Mapping[str, Tensor], *, repeat: bool, seed: int | None, chunk: int = 4096
    ) -> None:
        self._all = values if isinstance(values, Activations) else Activations(dict(values))
        if len(self._all) == 0:
            raise ValueError(explain("got tensors of no tokens.", want="[tokens, d] with one token or more"))
        self._repeat, self._seed, self._chunk = repeat, seed, chunk
        self._epoch = self._at = 0
        self._order = self._permuted()

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        if self._at >= len(self._all):
            if not self._repeat:
                raise StopIteration
            self._epoch, self._at = self._epoch + 1, 0
            self._order = self._permuted()
        which = slice(self._at, self._at + self._chunk)
        self._at += self._chunk
        return self._all.rows(which if self._order is None else self._order[which])

    def _permuted(self) -> Tensor | None:
        return None if self._seed is None else shuffled(len(self._all), self._seed, self._epoch)

    def state(self) -> dict[str, Any]:
        """Its place; the tensors themselves have to be there again."""
        return {"epoch": self._epoch, "at": self._at}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._epoch, self._at = state["epoch"], state["at"]
        self._order = self._permuted()


@final
class IterableSource:
    """Whatever an iterable gives: tensors `[tokens, d]`, dictionaries of them by point, or Activations.

    Args:
        chunks: iterated once, from where it stands.
        point: name for plain tensors.
    """

    def __init__(self, chunks: Iterable[Tensor | Mapping[str, Tensor] | Activations], point: str) -> None:
        self._chunks, self._point, self._given = iter(chunks), point, 0

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        chunk = next(self._chunks)
        self._given += 1
        return _activations(chunk, self._point)

    def state(self) -> dict[str, Any]:
        """How many chunks were taken."""
        return {"given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        """Take and forget as many chunks; the iterable has to be at its start and to give the same again.

        Raises:
            ValueError: if it has already given more.
        """
        if state["given"] < self._given:
            what = f"an iterable cannot go back: {self._given} chunks were taken, {state['given']} are asked for."
            raise ValueError(explain(what, want="a new one, at its start"))
        for _ in itertools.islice(self._chunks, state["given"] - self._given):
            pass
        self._given = state["given"]


@final
class DrawnSource:
    """Tokens drawn at random by a function, e.g. synthetic ones; endless.

    Args:
        draw: called with a number of tokens and a seeded generator; gives as many: a tensor `[tokens, d]`, a dictionary
            of them, or Activations. Everything random in it has to come from that generator.
        seed: of the generator.
        point: name for plain tensors.
        chunk: tokens asked for at once.
    """

    def __init__(self, draw: Callable[[int, torch.Generator], Any], seed: int, point: str, chunk: int = 4096) -> None:
        self._draw, self._point, self._chunk = draw, point, chunk
        self._rng = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return _activations(self._draw(self._chunk, self._rng), self._point)

    def state(self) -> dict[str, Any]:
        """The generator's."""
        return {"rng": self._rng.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._rng.set_state(state["rng"].cpu())


def _activations(chunk: Any, point: str) -> Activations:
    if isinstance(chunk, Activations):
        return chunk
    if isinstance(chunk, Tensor):
        return Activations({point: chunk})
    if isinstance(chunk, Mapping):
        return Activations(dict(chunk))
    want = "tensors [tokens, d], dictionaries of them by point, or Activations"
    raise TypeError(explain(f"got a {type(chunk).__name__} instead of activations.", want=want))


def _parsed(point: str) -> tuple[str, int | None]:
    found = _HEAD.fullmatch(point)
    return (found[1], int(found[2])) if found else (point, None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
