"""Activation sources: a model, tensors, an iterator or a synthetic generator.

Each yields chunks of any size and can save and restore its position; `saewb.data.stream` makes batches of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from saewb._finite import FiniteCheck
from saewb._indices import index_slice
from saewb.data.documents import EpochCursor
from saewb.data.packing import TokenStream
from saewb.data.tokens import check_vocabulary
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import explain
from saewb.fingerprint import tensors_digest, values_digest
from saewb.models import hook_points
from saewb.models.active import check_unmodified, model_digest
from saewb.models.capture import Activations, capture, stop_layer
from saewb.models.tokenizer import special_mask


class TokenRows(Protocol):
    """A resumable iterator of token rows `[rows, ctx]`, as `saewb.data.packing.TokenStream`."""

    def __next__(self) -> Tensor: ...

    def state(self) -> dict[str, Any]:
        """Position in the tokens."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        ...


@final
class ModelSource:
    """A model's activations: one forward pass for all points, which stops after the last layer that is needed.

    The model's lock is held for one pass at a time, so others can use the model in between. What is attached to it
    elsewhere during a pass affects what is read; at one of the points, and steering, it is refused.

    Args:
        model: any kind.
        tokens: of rows `[rows, ctx]`, without padding that is not among `skipped`.
        points: names of hook points, canonical or aliases. Heads are concatenated, `[tokens, heads * d_head]`;
            "blocks.0.attn.hook_z[3]" is head 3 alone.
        positions: of each row, those kept.
        skipped: ids of tokens that are left out.
        device: of the activations; None leaves them where the model computed them.
        dtype: of the activations; None keeps the model's.
        parallel: processes that share the passes: of as many batches of rows as there are processes, each computes one
            and sends it to the others. All yield the chunks of a single process, and have its `state()`.

    Raises:
        ValueError: for a point that does not exist, is switched off, did not fire, or has no token axis; in a pass, if
            an SAE is attached at one of the points or the model is steered: the rows are then the next ones again.
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
        parallel: ParallelContext = SINGLE_PROCESS,
    ) -> None:
        self.model, self._tokens, self._parallel = model, tokens, parallel
        self._round: deque[tuple[dict[str, Any], Activations | None]] = deque()  # (position before a chunk, the chunk)
        self._before_round: dict[str, Any] | None = None  # position, while a round is being computed
        self.points = {name: hook_points.split_head(name) for name in points}
        if not self.points:
            raise ValueError(explain("got no points.", want="one or more names of hook points"))
        self._names = list(dict.fromkeys(name for name, _ in self.points.values()))
        for name in self._names:
            hook_points.resolve(model, name)
        self._positions, self._skipped = index_slice(positions, "positions"), tuple(skipped)
        self._device, self._dtype = device, dtype
        self._finite = FiniteCheck()  # on an accelerator, whoever trains on the activations looks
        self._rows: Tensor | None = None  # taken from the tokens and not computed yet

    @property
    def stop_layer(self) -> int | None:
        """The first layer that does not run; None if all do."""
        return stop_layer(self.model, self._names)

    @torch.no_grad()
    def widths(self) -> dict[str, int]:
        """Width of the activations at each point, from a forward pass of two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(self.model.parameters()).device)
        cache = self._capture(ids)
        both = torch.arange(2)
        return {key: self._select(cache[n], head, ids, both, key).shape[1] for key, (n, head) in self.points.items()}

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        for _ in range(1000):
            chunk = self._next_chunk() if self._parallel.size == 1 else self._next_shared_chunk()
            if chunk is not None:
                return chunk
        what = (
            f"1000 batches of rows gave no token that is kept (positions {self._positions}, skipped {self._skipped})."
        )
        raise ValueError(explain(what, want="rows with other tokens", fix="positions=slice(1, None)"))

    def _next_chunk(self) -> Activations | None:
        if self._rows is None:
            self._rows = next(self._tokens)
        chunk = self._compute(self._rows)
        self._rows = None
        return chunk

    def _next_shared_chunk(self) -> Activations | None:
        if not self._round:
            batches = list(self._take_round())
            if not batches:
                raise StopIteration
            self._before_round = batches[0][0]
            chunks = self._compute_round([ids for _, ids in batches])
            self._before_round = None
            self._round.extend((position, chunk) for (position, _), chunk in zip(batches, chunks, strict=True))
        return self._round.popleft()[1]

    def _take_round(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """A batch of rows for each process, fewer at the end, each with the position before it."""
        if self._rows is not None:  # from a state
            yield {"tokens": self._tokens.state(), "ids": self._rows}, self._rows
            self._rows = None
        for _ in range(self._parallel.size):
            position = {"tokens": self._tokens.state(), "ids": None}
            ids = next(self._tokens, None)
            if ids is None:
                return
            yield position, ids

    def _compute_round(self, batches: list[Tensor]) -> list[Activations | None]:
        """The chunks of a round: one computed here, the others received. An incomplete round is computed here."""
        positions = [self._kept_tokens(ids) for ids in batches]
        if len(batches) != self._parallel.size or not all(map(len, positions)):
            return [self._compute(ids) for ids in batches]
        with self._parallel.raise_together():
            local = self._compute(batches[self._parallel.rank])
        chunks: list[Activations | None] = []
        for rank, (ids, tokens) in enumerate(zip(batches, positions, strict=True)):
            is_local = rank == self._parallel.rank
            values = {
                name: self._parallel.broadcast(
                    x.contiguous() if is_local else x.new_empty(len(tokens), x.shape[1]), rank
                )
                for name, x in local.values.items()
            }
            chunks.append(Activations(values, ids.flatten()[tokens].to(torch.int32)))
        return chunks

    @torch.no_grad()
    def _compute(self, ids: Tensor) -> Activations | None:
        tokens = self._kept_tokens(ids)
        if len(tokens) == 0:
            return None
        check_vocabulary(self.model, ids)
        cache = self._capture(ids.to(next(self.model.parameters()).device))
        values = {key: self._select(cache[name], head, ids, tokens, key) for key, (name, head) in self.points.items()}
        for name, x in values.items():
            self._finite.add(f"activations at {name!r}", x)
        return Activations(values, ids.flatten()[tokens].to(torch.int32))

    def _capture(self, ids: Tensor) -> dict[str, Tensor]:
        with hook_points.lock(self.model):
            check_unmodified(self.model, self._names)
            return capture(self.model, ids, self._names)

    def _kept_tokens(self, ids: Tensor) -> Tensor:
        """Indices of the kept tokens in the flattened rows, computed on the CPU so that nothing waits for a GPU."""
        keep = torch.zeros_like(ids, dtype=torch.bool)
        keep[:, self._positions] = True
        return (keep & ~special_mask(ids, self._skipped)).flatten().nonzero()[:, 0]

    def _select(self, activation: Tensor, head: int | None, ids: Tensor, tokens: Tensor, name: str) -> Tensor:
        if activation.shape[:2] != ids.shape or activation.ndim not in (3, 4):
            what = f"{name!r} gives {tuple(activation.shape)} for tokens {tuple(ids.shape)}."
            raise ValueError(explain(what, want="a point of shape [batch, pos, d] or [batch, pos, heads, d_head]"))
        if head is not None:
            if activation.ndim != 4 or head >= activation.shape[2]:
                what = f"{name!r}: no head {head} in activations of shape {tuple(activation.shape)}."
                raise ValueError(explain(what, want="[batch, pos, heads, d_head] and a head that is there"))
            activation = activation[:, :, head]
        rows = activation.flatten(0, 1).flatten(1)
        rows = rows.index_select(0, tokens.to(rows.device, non_blocking=True))
        return rows.to(device=self._device, dtype=self._dtype)

    def digest(self) -> str | None:
        """Digest of the tokens; None where they cannot be looked at."""
        return self._tokens.digest() if isinstance(self._tokens, TokenStream) else None

    def state(self) -> dict[str, Any]:
        """Position in the tokens, with rows that were taken and not computed, as after a failed pass."""
        if self._round:
            return dict(self._round[0][0])
        return dict(self._before_round or {"tokens": self._tokens.state(), "ids": self._rows})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._tokens.restore(state["tokens"])
        self._rows = state["ids"]
        self._round.clear()
        self._before_round = None


@final
class PairSource:
    """The activations of several models on the same tokens, each at a point of its own.

    Args:
        models: by name, which becomes the name of the point.
        tokens: of rows `[rows, ctx]`, the same for all models.
        hooks: hook point of each model, by name.
        positions: of each row, those kept.
        skipped: ids of tokens that are left out.
        device: of the activations; None leaves them where each model computed them.
        dtype: of the activations; None keeps each model's.
        difference: yield the second model's activations less the first's as the one point "difference".

    Raises:
        ValueError: as `ModelSource`; for a difference of points of different widths.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokens: TokenRows,
        hooks: Mapping[str, str],
        *,
        positions: slice = slice(None),
        skipped: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        difference: bool = False,
    ) -> None:
        how = {"positions": positions, "skipped": skipped, "device": device, "dtype": dtype}
        self._sources = {name: ModelSource(model, tokens, [hooks[name]], **how) for name, model in models.items()}
        self._tokens, self._hooks, self._difference = tokens, dict(hooks), difference
        self._rows: Tensor | None = None  # taken from the tokens and not computed yet

    def widths(self) -> dict[str, int]:
        """Width of the activations at each point, from a forward pass of two tokens of each model."""
        widths = {name: source.widths()[self._hooks[name]] for name, source in self._sources.items()}
        return {"difference": next(iter(widths.values()))} if self._difference else widths

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        for _ in range(1000):
            self._rows = next(self._tokens) if self._rows is None else self._rows
            chunk = self._compute(self._rows)
            self._rows = None
            if chunk is not None:
                return chunk
        what = "1000 batches of rows gave no token that is kept."
        raise ValueError(explain(what, want="rows with other tokens", fix="skip_first=1"))

    def _compute(self, ids: Tensor) -> Activations | None:
        chunks = {name: source._compute(ids) for name, source in self._sources.items()}
        first = next(iter(chunks.values()))
        if first is None:
            return None
        values = {name: chunk.values[self._hooks[name]] for name, chunk in chunks.items()}
        if not self._difference:
            return Activations(values, first.ids)
        a, b = values.values()
        if a.shape != b.shape:
            what = f"the models' activations have widths {a.shape[1]} and {b.shape[1]}."
            raise ValueError(explain(what, want="one width for a difference", fix="stream_pair(..., difference=False)"))
        return Activations({"difference": b - a.to(b.device, b.dtype)}, first.ids)

    def digest(self) -> str | None:
        """Digest of the tokens and of the models; None where the tokens cannot be looked at."""
        tokens = self._tokens.digest() if hasattr(self._tokens, "digest") else None
        if tokens is None:
            return None
        models = {name: model_digest(source.model, in_training=True) for name, source in self._sources.items()}
        return values_digest([tokens, sorted(models.items()), sorted(self._hooks.items()), self._difference])

    def state(self) -> dict[str, Any]:
        """Position in the tokens, with rows that were taken and not computed, as after a failed pass."""
        return {"tokens": self._tokens.state(), "ids": self._rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._tokens.restore(state["tokens"])
        self._rows = state["ids"]


@final
class SameTokens:
    """Rows of tokens of several tokenizers, which have to be the same.

    Args:
        streams: of each model, by name: equal texts, rows of one length.
    """

    def __init__(self, streams: Mapping[str, TokenStream]) -> None:
        self._streams = dict(streams)

    def __next__(self) -> Tensor:
        rows = {name: next(stream, None) for name, stream in self._streams.items()}
        (name, ids), *others = rows.items()
        for other, theirs in others:
            if ids is None and theirs is None:
                continue
            if ids is None or theirs is None or ids.shape != theirs.shape or not torch.equal(ids, theirs):
                where = ""
                if ids is not None and theirs is not None and ids.shape == theirs.shape:
                    row, position = (ids != theirs).nonzero()[0].tolist()
                    where = f": {int(ids[row, position])} and {int(theirs[row, position])} at position {position}"
                what = f"the tokenizers of {name!r} and {other!r} give different ids for the same texts{where}."
                want = "models with one tokenizer; or ids that both take"
                raise ValueError(explain(what, want=want, fix="saewb.stream_pair(models, ids, hook=...)"))
        if ids is None:
            raise StopIteration
        return ids

    def digest(self) -> str:
        """Digest of the tokens."""
        return next(iter(self._streams.values())).digest()

    def state(self) -> dict[str, Any]:
        """Position of each stream."""
        return {name: stream.state() for name, stream in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for name, stream in self._streams.items():
            stream.restore(state[name])


@final
class TensorSource:
    """Tensors in memory, in chunks that are views unless they are shuffled.

    Args:
        values: `[tokens, d]` by point, or Activations.
        repeat: begin the next epoch after the last token, without limit.
        seed: of a random order, a new one every epoch; None keeps the order.
        chunk: tokens per chunk.
    """

    def __init__(
        self, values: Activations | Mapping[str, Tensor], *, repeat: bool, seed: int | None, chunk: int = 4096
    ) -> None:
        self._values = values if isinstance(values, Activations) else Activations(dict(values))
        if len(self._values) == 0:
            raise ValueError(explain("got tensors of no tokens.", want="[tokens, d] with one token or more"))
        self._repeat, self._chunk = repeat, chunk
        self._cursor = EpochCursor(len(self._values), seed)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return self._values.rows(self._cursor.take(self._chunk, repeat=self._repeat))

    def digest(self) -> str:
        """Digest of the tensors, and of their order."""
        ids = {} if self._values.ids is None else {"token ids": self._values.ids}
        return values_digest([tensors_digest({**self._values.values, **ids}), self._cursor.seed])

    def state(self) -> dict[str, Any]:
        """Epoch and position; the tensors themselves are not part of it."""
        return self._cursor.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._cursor.restore(state)


@final
class IterableSource:
    """The chunks of an iterable: tensors `[tokens, d]`, dictionaries of them by point, or Activations.

    Args:
        chunks: iterated once, from where it stands.
        point: name for plain tensors.
    """

    def __init__(self, chunks: Iterable[Tensor | Mapping[str, Tensor] | Activations], point: str) -> None:
        self._chunks, self._point, self._n_taken = iter(chunks), point, 0

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        chunk = next(self._chunks)
        self._n_taken += 1
        return _as_activations(chunk, self._point)

    def digest(self) -> None:
        """None: an iterable of chunks cannot be looked at."""
        return None

    def state(self) -> dict[str, Any]:
        """Number of chunks taken."""
        return {"given": self._n_taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Take and drop as many chunks; the iterable has to be at its start and to yield the same again.

        Raises:
            ValueError: if more were taken already.
        """
        n_ahead = state["given"] - self._n_taken
        if n_ahead < 0:
            what = f"an iterable cannot go back: {self._n_taken} chunks were taken, {state['given']} are asked for."
            raise ValueError(explain(what, want="a new one, at its start"))
        for _ in itertools.islice(self._chunks, n_ahead):
            pass
        self._n_taken = state["given"]


@final
class SyntheticSource:
    """Tokens drawn at random by a function, without end.

    Args:
        draw: called with a number of tokens and a seeded generator; returns as many: a tensor `[tokens, d]`, a
            dictionary of them, or Activations. Everything random in it has to come from that generator.
        seed: of the generator.
        point: name for plain tensors.
        chunk: tokens per draw.
    """

    def __init__(self, draw: Callable[[int, torch.Generator], Any], seed: int, point: str, chunk: int = 4096) -> None:
        self._draw, self._point, self._chunk = draw, point, chunk
        self._rng = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return _as_activations(self._draw(self._chunk, self._rng), self._point)

    def digest(self) -> None:
        """None: a function that draws cannot be compared."""
        return None

    def state(self) -> dict[str, Any]:
        """State of the generator."""
        return {"rng": self._rng.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._rng.set_state(state["rng"].cpu())


def _as_activations(chunk: Any, point: str) -> Activations:
    if isinstance(chunk, Activations):
        return chunk
    if isinstance(chunk, Tensor):
        return Activations({point: chunk})
    if isinstance(chunk, Mapping):
        return Activations(dict(chunk))
    want = "tensors [tokens, d], dictionaries of them by point, or Activations"
    raise TypeError(explain(f"got a {type(chunk).__name__} instead of activations.", want=want))
