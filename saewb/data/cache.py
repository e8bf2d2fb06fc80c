"""Cache activations on disk: computed once, read in any order by any number of trainings.

A cache is a folder:

    index.json               points with widths and dtypes, number of tokens, tokens per shard; written last
    shard_00000.safetensors  by point: [tokens, d]; "token_ids": [tokens], int32
    progress.safetensors     while the cache is written: number of shards, and position of the stream

Every file is written atomically. A cache whose writing was interrupted, or killed, continues after the last shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from saewb._files import (
    FolderLock,
    absolute,
    atomic_write,
    is_temporary,
    load_state,
    remove_orphans,
    save_state,
    write_json,
)
from saewb._indices import index_slice
from saewb.data.documents import EpochCursor
from saewb.data.shuffle_buffer import FifoBuffer
from saewb.data.sources import ModelSource
from saewb.data.stream import ActivationStream
from saewb.data.tokens import PASS_TOKENS, model_tokens
from saewb.errors import FormatError, explain
from saewb.models.capture import Activations
from saewb.models.tokenizer import special_ids

_IDS = "token_ids"
_INDEX, _PROGRESS = "index.json", "progress.safetensors"
_SHARD = re.compile(r"shard_\d{5,}\.safetensors")
_VERSION = 1
"""Version of the format."""


def cache_activations(
    model: nn.Module,
    tokens: Any,
    points: str | Iterable[str],
    folder: str | Path,
    n_tokens: int,
    *,
    dtype: torch.dtype | None = None,
    shard_tokens: int = 65_536,
    ctx_len: int = 128,
    pass_tokens: int = PASS_TOKENS,
    skip_special_tokens: bool | Sequence[int] = True,
    positions: slice = slice(None),
    repeat: bool = False,
    column: str | None = None,
) -> ActivationCache:
    """Write a model's activations to a folder: exactly `n_tokens` tokens, with their ids.

    Called again with the same arguments it continues an interrupted cache, and opens a finished one. Memory: one shard
    and one forward pass.

    Args:
        model: any kind.
        tokens: as for `saewb.stream_activations`.
        points: names of hook points; heads as there.
        folder: a new or empty one, or that of the same cache.
        n_tokens: number of tokens, not counting special tokens and positions that are left out.
        dtype: on disk; None keeps the model's. float16 ends at 65,504 and bfloat16 has 8 bits of precision.
        shard_tokens: tokens per file.
        ctx_len: tokens per row, if texts are packed here.
        pass_tokens: approximate tokens per forward pass.
        skip_special_tokens: leave out BOS, EOS, padding, ...: True, False, or the ids.
        positions: of each row, those kept.
        repeat: begin the next epoch where the tokens are fewer.
        column: of a dataset; None takes the first known one.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if a row is longer than `n_tokens`; if the tokens end before; if the folder holds another cache.
        FileExistsError: if the folder holds other files.
        RuntimeError: if another thread or process writes a cache to the folder.
        OSError: if the disk is full; complete shards stay, and a later call continues from them.

    Example:
        >>> import saewb, tempfile
        >>> model, texts = saewb.load_model("tiny", device="cpu"), ["The river flows through the city."] * 40
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache_activations(model, texts, "blocks.1.hook_resid_post", folder, 200, ctx_len=16)
        ActivationCache(200 tokens: blocks.1.hook_resid_post 128)
    """
    folder, names = absolute(folder), [points] if isinstance(points, str) else list(points)
    rows = model_tokens(model, tokens, ctx_len=ctx_len, pass_tokens=pass_tokens, repeat=repeat, column=column)
    _check_sizes(n_tokens, shard_tokens, rows.ctx_len)
    skipped, positions = special_ids(model, skip_special_tokens), index_slice(positions, "positions")
    request = {
        "points": names,
        "n_tokens": n_tokens,
        "shard_tokens": shard_tokens,
        "ctx_len": rows.ctx_len,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "skipped": list(skipped),
        "positions": [positions.start, positions.stop, positions.step],
    }
    if not _is_complete(folder, request):
        folder.mkdir(parents=True, exist_ok=True)
        source = ModelSource(model, rows, names, positions=positions, skipped=skipped, device="cpu", dtype=dtype)
        with FolderLock(folder, "a cache is being written"):
            if not _is_complete(folder, request):  # another process may have finished it meanwhile
                _write(folder, source, request)
    return ActivationCache(folder)


def _check_sizes(n_tokens: int, shard_tokens: int, ctx_len: int) -> None:
    if n_tokens < 1 or shard_tokens < 1:
        raise ValueError(explain(f"got n_tokens={n_tokens}, shard_tokens={shard_tokens}.", want="1 or more of each"))
    if ctx_len > n_tokens:
        what = f"a row has {ctx_len} tokens (ctx_len), more than the n_tokens={n_tokens} that are to be cached."
        raise ValueError(explain(what, want="at least one row", fix=f"n_tokens={ctx_len}"))


def _is_complete(folder: Path, request: dict[str, Any]) -> bool:
    """Whether the folder holds the whole cache.

    Raises:
        FileExistsError, ValueError: if it holds something else.
    """
    complete = (folder / _INDEX).is_file()
    if complete:
        written = _read_index(folder).get("asked", {})
    elif (folder / _PROGRESS).is_file():
        written = load_state(folder / _PROGRESS)["asked"]
    else:
        others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = sorted(n for n in others if n[:1] != "." and not _SHARD.fullmatch(n) and not is_temporary(n))
        if others:
            what = f"{str(folder)!r} holds other things: {', '.join(others[:5])}."
            raise FileExistsError(explain(what, want="a new folder"))
        return False
    if written != request:
        differs = ", ".join(f"{k}={written.get(k)!r}, not {v!r}" for k, v in request.items() if written.get(k) != v)
        raise ValueError(explain(f"{str(folder)!r} holds a cache made with {differs}.", want="a new folder"))
    return complete


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache.

    Raises:
        FormatError: if it is not an index, or of an unknown version.
    """
    try:
        index = json.loads((folder / _INDEX).read_text())
        if (version := int(index["saewb_cache"])) != _VERSION:
            what = f"the cache in {str(folder)!r} has format {version}; this saewb reads {_VERSION}."
            raise FormatError(explain(what, fix="saewb.cache_activations(...) into a new folder"))
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        what = f"{_INDEX} in {str(folder)!r} is no index: {error!r}."
        raise FormatError(explain(what, want="a cache that saewb wrote")) from error
    return index


def _write(folder: Path, source: ModelSource, request: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    remove_orphans(folder)
    n_tokens, size = request["n_tokens"], request["shard_tokens"]
    batches, n_shards = FifoBuffer(source, size), 0
    if (folder / _PROGRESS).is_file():
        progress = load_state(folder / _PROGRESS)
        n_shards = progress["n_shards"]
        batches.restore(progress["stream"])
    columns: dict[str, Tensor] = {}
    for shard in range(n_shards, -(-n_tokens // size)):
        columns = _take_columns(batches, min(size, n_tokens - shard * size), shard * size, n_tokens)
        atomic_write(_shard(folder, shard), lambda path, tensors=columns: save_file(tensors, str(path)))
        save_state(folder / _PROGRESS, {"asked": request, "n_shards": shard + 1, "stream": batches.state()})
    columns = columns or load_file(str(_shard(folder, n_shards - 1)))  # interrupted between last shard and index
    points = {
        name: {"d": column.shape[1], "dtype": str(column.dtype).removeprefix("torch.")}
        for name, column in columns.items()
        if name != _IDS
    }
    sizes = {"n_tokens": n_tokens, "shard_tokens": size}
    index = {"saewb_cache": _VERSION, **sizes, "points": points, "asked": request}
    write_json(folder / _INDEX, index)
    (folder / _PROGRESS).unlink(missing_ok=True)


def _take_columns(batches: FifoBuffer, size: int, n_written: int, n_tokens: int) -> dict[str, Tensor]:
    try:
        batch = batches.take(size)
    except StopIteration:
        what = f"the tokens ended: there are fewer than n_tokens={n_tokens} ({n_written} are written)."
        raise ValueError(explain(what, want="more text, or a smaller n_tokens", fix="repeat=True")) from None
    columns = {name: value.contiguous() for name, value in batch.values.items()}
    return {**columns, _IDS: batch.ids.to(torch.int32).contiguous()}


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


@final
class ActivationCache:
    """A complete activation cache: `len(cache)` tokens, `cache.stream(...)` to train on, `cache[1000:1010]` to read.

    Args:
        folder: written by `saewb.cache_activations`.

    Raises:
        FileNotFoundError: if there is no complete cache; the error shows how to finish an interrupted one.
        FormatError: if its index cannot be read, or a shard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = absolute(folder)
        if not (self.folder / _INDEX).is_file():
            interrupted = (self.folder / _PROGRESS).is_file()
            what = (
                f"the cache in {str(self.folder)!r} was not finished."
                if interrupted
                else f"no cache in {str(folder)!r}."
            )
            fix = "saewb.cache_activations(...) with the same arguments" + (" goes on" if interrupted else "")
            raise FileNotFoundError(explain(what, want="a folder with index.json", fix=fix))
        index = _read_index(self.folder)
        try:
            self.n_tokens, self.shard_tokens = int(index["n_tokens"]), int(index["shard_tokens"])
            self.points = {name: int(point["d"]) for name, point in index["points"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{_INDEX} in {str(self.folder)!r} is no index: {error!r}."
            raise FormatError(explain(what, want="a cache that saewb wrote")) from error
        n = -(-self.n_tokens // self.shard_tokens)
        if missing := [_shard(self.folder, i).name for i in range(n) if not _shard(self.folder, i).is_file()]:
            raise FormatError(explain(f"{str(self.folder)!r} lacks {', '.join(missing[:3])}.", want=f"{n} shards"))

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        points = ", ".join(f"{name} {d}" for name, d in self.points.items())
        return f"ActivationCache({self.n_tokens:,} tokens: {points})"

    def __getitem__(self, tokens: slice) -> Activations:
        """Read a range of tokens, and no others."""
        start, stop, step = tokens.indices(self.n_tokens)
        if step != 1 or start >= stop:
            raise ValueError(explain(f"got tokens {tokens}.", want="a range of tokens, e.g. cache[0:1000]"))
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self.points, _IDS)}
        for shard in range(start // self.shard_tokens, -(-stop // self.shard_tokens)):
            self._read(shard, start - shard * self.shard_tokens, stop - shard * self.shard_tokens, parts)
        columns = {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in parts.items()}
        ids = columns.pop(_IDS)
        return Activations(columns, ids)

    def _read(self, shard: int, start: int, stop: int, parts: dict[str, list[Tensor]]) -> None:
        from safetensors import safe_open

        with safe_open(str(_shard(self.folder, shard)), framework="pt") as file:
            for name, pieces in parts.items():
                pieces.append(file.get_slice(name)[max(0, start) : min(stop, self.shard_tokens)])

    def stream(
        self,
        *,
        batch_tokens: int = 4096,
        seed: int | None = 0,
        buffer_tokens: int = 0,
        block_tokens: int = 256,
        repeat: bool = True,
        prefetch: int = 0,
        points: Iterable[str] | None = None,
    ) -> ActivationStream:
        """Stream the cache, shuffled without reading it all.

        Blocks of `block_tokens` neighboring tokens are read in a random order over the whole cache, a new one every
        epoch; `buffer_tokens` shuffles within and across them.

        Args:
            batch_tokens: tokens per batch.
            seed: of the orders; None reads from first to last.
            buffer_tokens: tokens shuffled over; 0 leaves blocks as they are.
            block_tokens: tokens read at once.
            repeat: begin the next epoch at the end.
            prefetch: batches read ahead in a thread; 0 for no thread.
            points: names of those to read; None reads all.
        """
        names = list(self.points if points is None else points)
        if unknown := [name for name in names if name not in self.points]:
            raise ValueError(explain(f"no {unknown[0]!r} in {self!r}.", want=", ".join(self.points)))
        source = CacheSource(self, names, block_tokens, repeat=repeat, seed=seed)
        return ActivationStream(
            source, batch_tokens, buffer_tokens=buffer_tokens, seed=0 if seed is None else seed, prefetch=prefetch
        )


@final
class CacheSource:
    """Blocks of a cache, in order or in random order."""

    def __init__(
        self, cache: ActivationCache, points: Sequence[str], block_tokens: int, *, repeat: bool, seed: int | None
    ) -> None:
        if block_tokens < 1:
            raise ValueError(explain(f"got block_tokens={block_tokens}.", want="1 or more", fix="block_tokens=256"))
        self._cache, self._points, self._block, self._repeat = cache, list(points), block_tokens, repeat
        self._cursor = EpochCursor(-(-len(cache) // block_tokens), seed)

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        block = self._cursor.take(1, repeat=self._repeat)
        start = (block.start if isinstance(block, slice) else int(block)) * self._block
        chunk = self._cache[start : start + self._block]
        return Activations({name: chunk.values[name] for name in self._points}, chunk.ids)

    def state(self) -> dict[str, Any]:
        """Epoch and position; the cache itself is not part of it."""
        return self._cursor.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._cursor.restore(state)
