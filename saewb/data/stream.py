"""Streams of activations in batches of an exact size: shuffled, prefetched, resumed bit for bit.

A stream is an iterator over `Activations` with `state()` and `restore()`. Its stages:

1. A source yields chunks of any size (`saewb.data.sources`).
2. A buffer cuts them into batches of exactly n tokens, in order or shuffled (`saewb.data.shuffle_buffer`).
3. A thread computes the next batches while the consumer works on this one, if `prefetch` is set.

Six functions make one, by source: `stream_activations` (a model), `stream_pair` (several models), `stream_tensors`,
`stream_iterable`, `stream_draws`, and `ActivationCache.stream`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from saewb.data.packing import TokenStream, token_matrix
from saewb.data.shuffle_buffer import FifoBuffer, ShuffleBuffer, Source, batch_from_state, batch_state
from saewb.data.sources import IterableSource, ModelSource, PairSource, SameTokens, SyntheticSource, TensorSource
from saewb.data.tokens import PASS_TOKENS, model_tokens
from saewb.errors import explain
from saewb.models.capture import Activations
from saewb.models.tokenizer import special_ids


@final
class ActivationStream:
    """Batches of `batch_tokens` tokens from a source; iterate once, from where it stands.

    `state()`, after any batch, is complete: an equal stream that restores it yields the same batches bit for bit. It
    holds the shuffle buffer itself (`buffer_tokens` tokens, on the host) and the prefetched batches.

    Memory: the buffer, `prefetch` batches, and the last batch, for `put_back`.

    Args:
        source: of chunks of any size, see `saewb.data.sources`; not to be used otherwise.
        batch_tokens: tokens per batch; an incomplete last batch is left out.
        buffer_tokens: tokens shuffled over, rounded up to whole batches; 0 keeps the order.
        seed: of the shuffling.
        prefetch: batches computed ahead in a thread; 0 for no thread.
    """

    def __init__(
        self, source: Source, batch_tokens: int, *, buffer_tokens: int = 0, seed: int = 0, prefetch: int = 0
    ) -> None:
        if buffer_tokens < 0 or prefetch < 0:
            what = f"got buffer_tokens={buffer_tokens}, prefetch={prefetch}."
            raise ValueError(explain(what, want="0 or more tokens, 0 or more batches"))
        self.source, self.batch_tokens = source, batch_tokens
        self._buffer = (
            ShuffleBuffer(source, batch_tokens, buffer_tokens, seed)
            if buffer_tokens
            else FifoBuffer(source, batch_tokens)
        )
        self._prefetcher = _Prefetcher(self._buffer, prefetch) if prefetch else None
        self._ahead: deque[Activations] = deque()  # put back, or prefetched batches of a restored state
        self._last: Activations | None = None

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        if self._ahead:
            self._last = self._ahead.popleft()
        else:
            self._last = next(self._prefetcher or self._buffer)
        return self._last

    def put_back(self) -> None:
        """Make the last batch the next one again, so that nothing is lost after a step that failed."""
        if self._last is not None:
            self._ahead.appendleft(self._last)
            self._last = None

    def fill(self) -> bool:
        """Take one chunk of the source towards a full shuffle buffer; whether there was something to take.

        The first batch fills it in one go: this is for callers that look, or stop, in between.
        """
        if not isinstance(self._buffer, ShuffleBuffer) or self._in_a_thread:
            return False
        return self._buffer.fill()

    @property
    def filling(self) -> tuple[int, int] | None:
        """(tokens now, tokens when full) of a shuffle buffer that is not full yet; else None. Safe from any thread."""
        buffer = self._buffer
        return (buffer.n_filled, buffer.size) if isinstance(buffer, ShuffleBuffer) and not buffer.full else None

    def peek(self) -> Activations | None:
        """Peek at some of the next tokens without taking them; None if there are none, or a thread reads ahead."""
        if self._ahead:
            return self._ahead[0]
        return None if self._in_a_thread else self._buffer.peek()

    @property
    def _in_a_thread(self) -> bool:
        return self._prefetcher is not None and self._prefetcher.started

    @property
    def stop_layer(self) -> int | None:
        """The first layer of the model that does not run; None if all do, or if there is no model."""
        return self.source.stop_layer if isinstance(self.source, ModelSource) else None

    def digest(self) -> str | None:
        """Digest of the tokens or tensors it reads, wherever it stands; None where they cannot be looked at."""
        digest = getattr(self.source, "digest", None)  # a source of somebody else's may have none
        return None if digest is None else digest()

    def state(self) -> dict[str, Any]:
        """Plain values, lists, dictionaries and tensors on the host, copied; the same with a thread as without."""
        if self._prefetcher is None:
            source, ahead = self._buffer.state(), []
        else:
            source, ahead = self._prefetcher.state()
        return {"source": source, "ahead": [*map(batch_state, self._ahead), *ahead]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        if "again" in state:  # 0.1.0 saved the batch that was put back beside the stream
            returned = [] if state["again"] is None else [state["again"]]
            state = {**state["stream"], "ahead": returned + state["stream"]["ahead"]}
        if self._prefetcher is not None:
            self._prefetcher.restart(state["source"])
        else:
            self._buffer.restore(state["source"])
        self._ahead, self._last = deque(map(batch_from_state, state["ahead"])), None

    def close(self) -> None:
        """End the prefetch thread, if there is one; the stream then yields nothing more."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class _End:
    """The last item a prefetch thread leaves: the source ended, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Channel:
    """State shared by thread and consumer. Holds no reference to the consumer, so that it can be collected."""

    def __init__(self, source: Source, depth: int) -> None:
        self.source, self.depth = source, depth
        self.ready: deque[Activations | _End] = deque()
        self.change = threading.Condition()
        self.busy = self.held = self.closed = False
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.work, name="saewb-prefetch", daemon=True)
        self.thread.start()

    def work(self) -> None:
        while self._wait_for_room():
            try:
                item = next(self.source)
            except StopIteration:
                item = _End(None)
            except BaseException as error:  # raised again in the consumer, where it belongs
                item = _End(error)
            with self.change:
                self.busy = False
                self.ready.append(item)
                self.change.notify_all()
            if isinstance(item, _End):
                return
            del item

    def _wait_for_room(self) -> bool:
        """Wait for room; whether to compute another batch."""
        with self.change:
            self.change.wait_for(lambda: self.closed or not (self.held or len(self.ready) >= self.depth))
            self.busy = not self.closed
            return self.busy

    def end(self) -> None:
        """Signal the thread to end without waiting: whoever drops a stream may hold a lock that the thread needs."""
        with self.change:
            self.closed = True
            self.change.notify_all()


@final
class _Prefetcher:
    """The batches of a buffer in order, up to `depth` of them computed ahead in a daemon thread.

    The thread starts with the first batch that is requested. Its errors are raised when the next batch is requested,
    after the batches before it. It ends with the source, on `close()`, when this object is collected, and at exit.
    """

    def __init__(self, buffer: FifoBuffer | ShuffleBuffer, depth: int) -> None:
        self._buffer, self._depth = buffer, depth
        self._open()

    def _open(self) -> None:
        self._channel = _Channel(self._buffer, self._depth)
        self._finalizer = weakref.finalize(self, self._channel.end)

    def __next__(self) -> Activations:
        channel = self._channel
        with channel.change:
            if channel.closed:
                raise StopIteration
            if channel.thread is None:
                channel.start()
            channel.change.wait_for(lambda: channel.ready or channel.closed)
            if not channel.ready:
                raise StopIteration
            item = channel.ready[0]
            if isinstance(item, _End):  # stays, so that the next request gives the same answer
                raise StopIteration if item.error is None else item.error
            channel.ready.popleft()
            channel.change.notify_all()
            return item

    @property
    def started(self) -> bool:
        """Whether a batch has been requested."""
        return self._channel.thread is not None

    def state(self) -> tuple[dict[str, Any], list[Any]]:
        """State of the buffer, between two batches, and of the batches that are ready."""
        channel = self._channel
        with channel.change:
            channel.held = True
            try:
                channel.change.wait_for(lambda: not channel.busy)
                ready = [batch_state(item) for item in channel.ready if not isinstance(item, _End)]
                return self._buffer.state(), ready
            finally:
                channel.held = False
                channel.change.notify_all()

    def restart(self, state: dict[str, Any]) -> None:
        """End the thread and continue from a state of the buffer."""
        self.close()
        self._buffer.restore(state)
        self._open()

    def close(self) -> None:
        """End the thread; waits for the batch it is computing."""
        self._finalizer()
        if self._channel.thread not in (None, threading.current_thread()):
            self._channel.thread.join()


def stream_activations(
    model: nn.Module,
    tokens: Any,
    points: str | Iterable[str],
    *,
    batch_tokens: int = 4096,
    buffer_tokens: int = 0,
    seed: int = 0,
    prefetch: int = 0,
    ctx_len: int = 128,
    pass_tokens: int = PASS_TOKENS,
    skip_special_tokens: bool | Sequence[int] = True,
    positions: slice = slice(None),
    repeat: bool = False,
    column: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ActivationStream:
    """Stream a model's activations at one or several points, in batches of `batch_tokens` tokens.

    Row t of every point is the same token.

    One forward pass serves all points; it stops after the last layer that is needed and computes no logits. The model's
    lock is held for one pass at a time.

    The residual stream of many models is enormous at position 0. With rows that begin with BOS, which is special, it is
    left out by default; for models without BOS pass `positions=slice(1, None)`.

    Args:
        model: any kind.
        tokens: int ids `[rows, ctx]`, or whatever `saewb.stream_tokens` takes (texts, files, datasets, chats), or a
            TokenStream; texts are packed for this model.
        points: names of hook points. Heads lie side by side; "blocks.0.attn.hook_z[3]" is head 3 alone.
        batch_tokens: tokens per batch.
        buffer_tokens: tokens shuffled over; 0 keeps the order.
        seed: of the shuffling.
        prefetch: batches computed ahead in a thread; 0 for no thread.
        ctx_len: tokens per row, if they are packed here.
        pass_tokens: approximate tokens per forward pass (rows are whole).
        skip_special_tokens: leave out BOS, EOS, padding, ...: True, False, or the ids.
        positions: of each row, those kept.
        repeat: begin the next epoch at the end, if tokens are packed here and are no iterator.
        column: of a dataset; None takes the first known one.
        device: of the activations; None leaves them on the model's.
        dtype: of the activations; None keeps the model's.

    Returns:
        An iterator of Activations that can be saved and resumed.

    Raises:
        TypeError: for tokens of an unknown kind.
        ValueError: for a point that does not exist or cannot fire; for sizes that make no sense.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> batch = next(stream_activations(model, texts, "blocks.2.hook_resid_post", batch_tokens=100))
        >>> batch
        Activations(100 tokens: blocks.2.hook_resid_post 128)
    """
    rows = model_tokens(model, tokens, ctx_len=ctx_len, pass_tokens=pass_tokens, repeat=repeat, column=column)
    names = [points] if isinstance(points, str) else list(points)
    skipped = special_ids(model, skip_special_tokens)
    source = ModelSource(model, rows, names, positions=positions, skipped=skipped, device=device, dtype=dtype)
    return ActivationStream(source, batch_tokens, buffer_tokens=buffer_tokens, seed=seed, prefetch=prefetch)


def stream_pair(
    models: Mapping[str, nn.Module],
    tokens: Any,
    hook: str | Mapping[str, str],
    *,
    skip_first: int = 1,
    difference: bool = False,
    batch_tokens: int = 4096,
    buffer_tokens: int = 0,
    seed: int = 0,
    prefetch: int = 0,
    ctx_len: int = 128,
    pass_tokens: int = PASS_TOKENS,
    skip_special_tokens: bool | Sequence[int] = True,
    repeat: bool = False,
    column: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ActivationStream:
    """Stream the activations of several models on the same tokens, by the models' names: for crosscoders.

    Row t of every model is the same token. For several points of one model: `stream_activations(model, tokens,
    points)`. Activations are in each model's own units; training scales them to equal lengths (`normalization`).

    Args:
        models: by name, e.g. {"base": a, "chat": b}; their tokenizers must give the same ids for the texts.
        tokens: as for `stream_activations`.
        hook: name of the hook point; or one for each model, by its name.
        skip_first: first positions of each row that are left out, where activations are enormous in many models.
        difference: stream the second model's activations less the first's as the one point "difference", on which any
            SAE can be trained.
        batch_tokens: as for `stream_activations`, like all that follow.
        buffer_tokens: see there.
        seed: see there.
        prefetch: see there.
        ctx_len: see there.
        pass_tokens: see there.
        skip_special_tokens: see there.
        repeat: see there.
        column: see there.
        device: see there.
        dtype: see there.

    Returns:
        An iterator of Activations that can be saved and resumed.

    Raises:
        ValueError: for fewer than two models, or other than two for a difference; for tokenizers that give different
            ids, before the activations of these rows; and as `stream_activations`.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> stream = stream_pair({"a": model, "b": model}, texts, "blocks.2.hook_resid_post", batch_tokens=100)
        >>> next(stream)
        Activations(100 tokens: a 128, b 128)
    """
    names = list(models)
    if len(names) < 2 or (difference and len(names) != 2):
        what = f"stream_pair got {len(names)} models{' for a difference' if difference else ''}."
        raise ValueError(
            explain(what, want="two, by name", fix='saewb.stream_pair({"base": a, "chat": b}, texts, hook)')
        )
    hooks = dict.fromkeys(names, hook) if isinstance(hook, str) else dict(hook)
    if set(hooks) != set(names):
        what = f"stream_pair got hooks of {', '.join(hooks)} for models {', '.join(names)}."
        raise ValueError(explain(what, want="one name, or one for each model"))
    if skip_first < 0:
        raise ValueError(explain(f"stream_pair got skip_first={skip_first}.", want="0 or more positions"))
    sizes = {"ctx_len": ctx_len, "pass_tokens": pass_tokens, "repeat": repeat, "column": column}
    rows = _same_rows(models, tokens, sizes)
    skipped = sorted({id for model in models.values() for id in special_ids(model, skip_special_tokens)})
    how = {"skipped": skipped, "device": device, "dtype": dtype, "difference": difference}
    source = PairSource(models, rows, hooks, positions=slice(skip_first, None), **how)
    return ActivationStream(source, batch_tokens, buffer_tokens=buffer_tokens, seed=seed, prefetch=prefetch)


def _same_rows(models: Mapping[str, nn.Module], tokens: Any, sizes: Mapping[str, Any]) -> TokenStream | SameTokens:
    """Rows for all models: of the first one's tokenizer where all are alike, else of each, to be compared."""
    first, *others = models.values()
    packed = isinstance(tokens, TokenStream) or token_matrix(tokens) is not None
    mine = tokenizer_content(first)
    if packed or all(mine == tokenizer_content(model) for model in others):
        rows = model_tokens(first, tokens, **sizes)
        for model in others:  # their vocabulary and context
            model_tokens(model, rows.matrix if rows.matrix is not None else rows, **sizes)
        return rows
    if isinstance(tokens, Iterator):
        what = f"the tokenizers of {', '.join(models)} differ, and an iterator can be read by one only."
        raise ValueError(explain(what, want="texts that can be read twice, such as a list"))
    return SameTokens({name: model_tokens(model, tokens, **sizes) for name, model in models.items()})


def tokenizer_content(model: nn.Module) -> tuple[Any, ...]:
    """What decides the ids that texts get: equal for two models whose tokenizers give the same."""
    tokenizer = getattr(model, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if hasattr(backend, "to_str") else id(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None), model.cfg.default_prepend_bos
    return content, bos, getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "chat_template", None)


def stream_widths(stream: ActivationStream) -> dict[str, int]:
    """Width of the activations at each point of a stream; no tokens are taken from it.

    Args:
        stream: a model's, which then runs on two tokens, or another one, whose next tokens are read.

    Raises:
        ValueError: if the stream is empty.
    """
    if isinstance(stream.source, (ModelSource, PairSource)):
        return stream.source.widths()
    first = stream.peek()
    if first is None and (first := next(stream, None)) is not None:
        stream.put_back()
    if first is None:
        raise ValueError(explain("the stream is empty.", want="one batch or more"))
    return {name: value.shape[1] for name, value in first.values.items()}


def stream_tensors(
    values: Tensor | Mapping[str, Tensor] | Activations,
    *,
    batch_tokens: int = 4096,
    repeat: bool = False,
    shuffle_seed: int | None = None,
    point: str = "activations",
) -> ActivationStream:
    """Stream activations that are in memory.

    Args:
        values: `[tokens, d]`, or several by point, with as many rows each.
        batch_tokens: tokens per batch.
        repeat: begin the next epoch at the end.
        shuffle_seed: of a random order of all tokens, a new one every epoch; None keeps their order.
        point: name for a plain tensor.

    Returns:
        A stream that can be saved and resumed; it ends with the tensors unless `repeat`.

    Raises:
        ValueError: if the numbers of rows differ, or sizes make no sense.

    Example:
        >>> next(stream_tensors(torch.eye(4), batch_tokens=2)).values["activations"].tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    named = {point: values} if isinstance(values, Tensor) else values
    return ActivationStream(TensorSource(named, repeat=repeat, seed=shuffle_seed), batch_tokens)


def stream_iterable(
    chunks: Iterable[Any],
    *,
    batch_tokens: int = 4096,
    buffer_tokens: int = 0,
    seed: int = 0,
    prefetch: int = 0,
    point: str = "activations",
) -> ActivationStream:
    """Stream activations from an iterable of tensors `[tokens, d]`, dictionaries of them by point, or Activations.

    To resume, the iterable has to be at its start and to yield the same again: as many chunks are taken and dropped.

    Args:
        chunks: of any sizes.
        batch_tokens: tokens per batch.
        buffer_tokens: tokens shuffled over; 0 keeps the order.
        seed: of the shuffling.
        prefetch: batches taken ahead in a thread; 0 for no thread.
        point: name for plain tensors.

    Returns:
        A stream that ends with the iterable.

    Raises:
        TypeError: for a chunk that is none of these.

    Example:
        >>> chunks = (torch.full((3, 2), float(i)) for i in range(4))
        >>> [batch.values["activations"][0, 0].item() for batch in stream_iterable(chunks, batch_tokens=6)]
        [0.0, 2.0]
    """
    source = IterableSource(chunks, point)
    return ActivationStream(source, batch_tokens, buffer_tokens=buffer_tokens, seed=seed, prefetch=prefetch)


def stream_draws(
    draw: Callable[[int, torch.Generator], Any],
    *,
    seed: int,
    batch_tokens: int = 4096,
    prefetch: int = 0,
    point: str = "activations",
) -> ActivationStream:
    """Stream activations drawn at random, without end: synthetic data.

    Args:
        draw: called with a number of tokens and a seeded `torch.Generator` on the CPU, from which everything random has
            to come; returns a tensor `[tokens, d]`, a dictionary of them by point, or Activations.
        seed: of that generator.
        batch_tokens: tokens per batch.
        prefetch: batches drawn ahead in a thread; 0 for no thread.
        point: name for plain tensors.

    Returns:
        A stream without end, the same for the same seed and batch size.

    Example:
        >>> draw = lambda n, rng: torch.randn(n, 8, generator=rng)
        >>> next(stream_draws(draw, seed=0, batch_tokens=16))
        Activations(16 tokens: activations 8)
    """
    return ActivationStream(SyntheticSource(draw, seed, point, batch_tokens), batch_tokens, prefetch=prefetch)
