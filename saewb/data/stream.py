"""Streams of activations in batches of exactly so many tokens, mixed, computed ahead, resumed bit for bit.

A stream is an iterator over `Activations` with `state()` and `restore()`. Five functions make one, by where activations
come from: `stream_activations` (a model), `stream_tensors`, `stream_iterable`, `stream_draws`, `stream_cache`.

    source (saewb.data.sources)  ->  batches of exactly n, mixed (saewb.data.shuffle_buffer)  ->  computed ahead (saewb.data.prefetch)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from saewb.data.prefetch import Prefetched
from saewb.data.shuffle_buffer import Exact, Mixed, Source, packed, unpacked
from saewb.data.sources import DrawnSource, IterableSource, ModelSource, TensorSource
from saewb.data.token_streams import TokenStream, stream_tokens
from saewb.errors import explain
from saewb.models.capture import Activations
from saewb.models.tokenizer import special_ids

PASS_TOKENS = 4096  # of one forward pass


@final
class ActivationStream:
    """Batches of `batch_tokens` tokens from a source; iterate once, from where it stands.

    `state()`, after any batch, is all there is: an equal stream that restores it gives the same batches bit for bit. It
    holds the mixing buffer itself (`buffer_tokens` tokens, on the host) and what was computed ahead.

    Args:
        source: of chunks of any size, see `saewb.data.sources`; nobody else takes from it.
        batch_tokens: tokens of a batch; the last ones of a source that fill none are left out.
        buffer_tokens: mixed over so many tokens, rounded up to whole batches; 0 keeps the order. See `saewb.data.shuffle_buffer`.
        seed: of the mixing.
        prefetch: batches computed ahead in a thread; 0 for no thread.
    """

    def __init__(
        self, source: Source, batch_tokens: int, *, buffer_tokens: int = 0, seed: int = 0, prefetch: int = 0
    ) -> None:
        if buffer_tokens < 0 or prefetch < 0:
            what = f"got buffer_tokens={buffer_tokens}, prefetch={prefetch}."
            raise ValueError(explain(what, want="0 or more tokens, 0 or more batches"))
        self.source, self.batch_tokens = source, batch_tokens
        batches = Mixed(source, batch_tokens, buffer_tokens, seed) if buffer_tokens else Exact(source, batch_tokens)
        self._cut = batches
        self._batches = Prefetched(batches, prefetch) if prefetch else batches
        self._ahead: deque[Activations] = deque()  # of a state with a thread, restored without one

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        return self._ahead.popleft() if self._ahead else next(self._batches)

    def fill(self) -> bool:
        """Take one chunk of the source towards a full mixing buffer; whether there was something to take.

        The first batch fills it in one go: this is for who wants to look, or to stop, in between.
        """
        return isinstance(self._cut, Mixed) and not self._in_a_thread and self._cut.fill()

    @property
    def filling(self) -> tuple[int, int] | None:
        """(tokens there, tokens wanted) of a mixing buffer that is not full yet; else None. For any thread."""
        cut = self._cut
        return (cut.n_filled, cut.size) if isinstance(cut, Mixed) and not cut.full else None

    def look(self) -> Activations | None:
        """Some tokens of those to come, which stay where they are. None if there are none, or a thread is at them."""
        if self._ahead:
            return self._ahead[0]
        return None if self._in_a_thread else self._cut.look()

    @property
    def _in_a_thread(self) -> bool:
        return isinstance(self._batches, Prefetched) and self._batches.started

    @property
    def stop_layer(self) -> int | None:
        """The first layer of the model that does not run; None if all do, or if there is no model."""
        return self.source.stop_layer if isinstance(self.source, ModelSource) else None

    def state(self) -> dict[str, Any]:
        """Plain values, lists, dictionaries and tensors on the host, copied; the same with a thread as without."""
        state = self._batches.state()
        if isinstance(self._batches, Prefetched):
            return state
        return {"source": state, "ahead": [packed(batch) for batch in self._ahead]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        if isinstance(self._batches, Prefetched):
            self._batches.restore(state)
            return
        self._batches.restore(state["source"])
        self._ahead = deque(unpacked(batch) for batch in state["ahead"])

    def close(self) -> None:
        """End the thread that computes ahead, if there is one; the stream gives nothing more."""
        if isinstance(self._batches, Prefetched):
            self._batches.close()


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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ActivationStream:
    """A model's activations at one or several points, row by row of the same token, in batches of `batch_tokens`.

    One forward pass serves all points; it stops after the last layer that is needed and computes no logits. The model's
    lock is held for one pass at a time.

    At position 0 the residual stream of many models is enormous. With rows that begin with BOS, which is special, it is
    left out by default; for models without BOS say `positions=slice(1, None)`.

    Args:
        model: any kind.
        tokens: int ids `[rows, ctx]`, or whatever `saewb.stream_tokens` takes (texts, files, datasets, chats), or a
            TokenStream; texts are packed for this model.
        points: names of hook points. Heads lie side by side; "blocks.0.attn.hook_z[3]" is head 3 alone.
        batch_tokens: tokens of a batch.
        buffer_tokens: mixed over so many tokens; 0 keeps the order.
        seed: of the mixing.
        prefetch: batches computed ahead in a thread; 0 for no thread.
        ctx_len: tokens of a row, if they are packed here.
        pass_tokens: about so many tokens in one forward pass (rows are whole).
        skip_special_tokens: leaves out BOS, EOS, padding, ...: True, False, or the ids.
        positions: of each row, those kept.
        repeat: goes through the tokens again and again, if they are packed here and are no iterator.
        device: where activations are put; None leaves them on the model's.
        dtype: of activations; None keeps the model's.

    Returns:
        A stream: an iterator of Activations that can be saved and resumed.

    Raises:
        TypeError: for tokens that are none.
        ValueError: for a point that does not exist or cannot fire; for sizes that make no sense.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> batch = next(stream_activations(model, texts, "blocks.2.hook_resid_post", batch_tokens=100))
        >>> batch
        Activations(100 tokens: blocks.2.hook_resid_post 128)
    """
    rows = model_tokens(model, tokens, ctx_len=ctx_len, pass_tokens=pass_tokens, repeat=repeat)
    names = [points] if isinstance(points, str) else list(points)
    skipped = special_ids(model, skip_special_tokens)
    source = ModelSource(model, rows, names, positions=positions, skipped=skipped, device=device, dtype=dtype)
    return ActivationStream(source, batch_tokens, buffer_tokens=buffer_tokens, seed=seed, prefetch=prefetch)


def model_tokens(
    model: nn.Module, tokens: Any, *, ctx_len: int, pass_tokens: int = PASS_TOKENS, repeat: bool = False
) -> TokenStream:
    """What functions that stream a model mean by tokens: a TokenStream as it is; else packed for the model."""
    if isinstance(tokens, TokenStream):
        return tokens
    ready = isinstance(tokens, Tensor) and tokens.ndim == 2
    rows = max(1, pass_tokens // (tokens.shape[1] if ready else ctx_len))
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None) is not None and model.cfg.default_prepend_bos is not False
    return stream_tokens(tokens, tokenizer, ctx_len=ctx_len, rows=rows, bos=bos, repeat=repeat)


def stream_tensors(
    values: Tensor | Mapping[str, Tensor] | Activations,
    *,
    batch_tokens: int = 4096,
    repeat: bool = False,
    shuffle_seed: int | None = None,
    point: str = "activations",
) -> ActivationStream:
    """Activations that are in memory.

    Args:
        values: `[tokens, d]`, or several by point, with as many rows each.
        batch_tokens: tokens of a batch.
        repeat: goes through them again and again.
        shuffle_seed: of a random order of all tokens, another one each time round; None keeps their order.
        point: name for a plain tensor.

    Returns:
        A stream that can be gone through once, saved and resumed; it ends with the tensors unless `repeat`.

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
    """Activations from any iterable of tensors `[tokens, d]`, dictionaries of them by point, or Activations.

    To resume, the iterable has to be at its start and to give the same again: as many chunks are taken and forgotten.

    Args:
        chunks: of any sizes.
        batch_tokens: tokens of a batch.
        buffer_tokens: mixed over so many tokens; 0 keeps the order.
        seed: of the mixing.
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
    """Activations drawn at random, without end: synthetic data.

    Args:
        draw: called with a number of tokens and a seeded `torch.Generator` on the CPU, from which everything random has
            to come; gives a tensor `[tokens, d]`, a dictionary of them by point, or Activations.
        seed: of that generator.
        batch_tokens: tokens of a batch.
        prefetch: batches drawn ahead in a thread; 0 for no thread.
        point: name for plain tensors.

    Returns:
        A stream without end, the same for the same seed and batch size.

    Example:
        >>> draw = lambda n, rng: torch.randn(n, 8, generator=rng)
        >>> next(stream_draws(draw, seed=0, batch_tokens=16))
        Activations(16 tokens: activations 8)
    """
    return ActivationStream(DrawnSource(draw, seed, point, batch_tokens), batch_tokens, prefetch=prefetch)
