"""Cache activations on disk: computed once, read in any order by any number of trainings.

A cache is a folder:

    index.json               points with widths and dtypes, number of tokens, tokens per shard; written last
    shard_00000.safetensors  by point: [tokens, d]; "token_ids": [tokens], int32
    progress.safetensors     while the cache is written: number of shards, and position of the stream

Every file is written atomically. A cache whose writing was interrupted, or killed, continues after the last shard, on
any number of processes: of n, each runs one of n forward passes and sends its activations to the others
(`saewb.data.sources.ModelSource`), and process 0 writes what a single process would.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from saewb._files import (
    FolderLock,
    absolute,
    atomic_write,
    check_sha256,
    is_temporary,
    load_state,
    read_json,
    refuse_damage,
    remove_orphans,
    save_state,
    sha256_of,
    write_json,
)
from saewb._indices import index_slice
from saewb.data.documents import EpochCursor
from saewb.data.shuffle_buffer import FifoBuffer
from saewb.data.sources import ModelSource
from saewb.data.stream import ActivationStream
from saewb.data.tokens import PASS_TOKENS, model_tokens
from saewb.distributed import ParallelContext, shared_call
from saewb.errors import FormatError, explain
from saewb.fingerprint import check_same, listed, tensors_digest, values_digest
from saewb.models.active import check_unmodified, model_digest
from saewb.models.capture import Activations
from saewb.models.hook_points import split_head
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

    Called again with the same arguments it continues an interrupted cache, and opens a finished one; the model (all its
    weights, and what is attached to it) and the tokens are compared by content. Memory: one shard and one forward pass.

    Under torchrun or accelerate (or after `torch.distributed.init_process_group`) every process makes this call, with
    the same arguments, and opens the cache, so the folder has to be one that all of them see: each runs a share of the
    forward passes, and process 0 writes. The files are those of a single process, to the byte. If one fails, all raise
    after their current pass, with its reason. Where only some processes call this:
    `with saewb.distributed.one_process():`.

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
        ValueError: if a row is longer than `n_tokens`; if the tokens end before; if the folder holds a cache of another
            model, other tokens or settings; if an SAE is attached at one of the points, or the model is steered.
        FileExistsError: if the folder holds other files.
        RuntimeError: if another thread or process writes a cache to the folder; if another process of a launch failed.
        OSError: if the disk is full; complete shards stay, and a later call continues from them.

    Example:
        >>> import saewb, tempfile
        >>> model, texts = saewb.load_model("tiny", device="cpu"), ["The river flows through the city."] * 40
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache_activations(model, texts, "blocks.1.hook_resid_post", folder, 200, ctx_len=16)
        ActivationCache(200 tokens: blocks.1.hook_resid_post 128)
    """
    folder, names = absolute(folder), [points] if isinstance(points, str) else list(points)
    with shared_call() as parallel, ExitStack() as locks:
        with parallel.raise_together():
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
            check_unmodified(model, [split_head(name)[0] for name in names])
            how = {"positions": positions, "skipped": skipped, "device": "cpu", "dtype": dtype}
            digests = {"model": model_digest(model, in_training=True), "tokens": rows.digest()}
        _check_same_call(parallel, model, digests["tokens"], request, folder)
        source, complete = ModelSource(model, rows, names, parallel=parallel, **how), False
        with parallel.raise_together():
            if parallel.is_main:
                alone = ModelSource(model, rows, names, **how)
                complete = _is_complete(folder, request, digests, alone)
                if not complete:
                    folder.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(FolderLock(folder, "a cache is being written"))
                    complete = _is_complete(folder, request, digests, alone)  # another may have finished it meanwhile
        if not parallel.broadcast_object(complete):
            _write(folder, source, request | {"digests": digests}, parallel)
        with parallel.raise_together():
            return ActivationCache(folder)


def _check_same_call(
    parallel: ParallelContext, model: nn.Module, tokens: str | None, request: dict[str, Any], folder: Path
) -> None:
    """Check that all processes of a launch write the same cache."""
    if parallel.size > 1:
        weights = tensors_digest(model.state_dict(keep_vars=True), reuse=True)  # hooks cannot be compared
        parallel.check_same({"model": weights, "text": tokens, "settings": [request, str(folder)]})


def _check_sizes(n_tokens: int, shard_tokens: int, ctx_len: int) -> None:
    if n_tokens < 1 or shard_tokens < 1:
        raise ValueError(explain(f"got n_tokens={n_tokens}, shard_tokens={shard_tokens}.", want="1 or more of each"))
    if ctx_len > n_tokens:
        what = f"a row has {ctx_len} tokens (ctx_len), more than the n_tokens={n_tokens} that are to be cached."
        raise ValueError(explain(what, want="at least one row", fix=f"n_tokens={ctx_len}"))


def _is_complete(folder: Path, request: dict[str, Any], digests: dict[str, str | None], source: ModelSource) -> bool:
    """Whether the folder holds the whole cache.

    Args:
        folder: of the cache.
        request: settings.
        digests: of model and tokens.
        source: of the activations, to compare with a cache of saewb 0.1.0, which has no digests.

    Raises:
        FileExistsError, ValueError: if it holds something else.
    """
    complete = (folder / _INDEX).is_file()
    if complete:
        written = _read_index(folder).get("asked", {})
    elif (folder / _PROGRESS).is_file():
        written = _read_progress(folder)["asked"]
    else:
        others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = sorted(n for n in others if n[:1] != "." and not _SHARD.fullmatch(n) and not is_temporary(n))
        if others:
            what = f"{str(folder)!r} holds other things: {', '.join(others[:5])}."
            raise FileExistsError(explain(what, want="a new folder"))
        return False
    fix = "saewb.cache_activations(...) into a new folder"
    if differs := ", ".join(f"{k}={written.get(k)!r}, not {v!r}" for k, v in request.items() if written.get(k) != v):
        what = f"{str(folder)!r} holds a cache made with other settings: {differs}."
        raise ValueError(explain(what, want="the same settings, or a new folder", fix=fix))
    if complete and "digests" not in written:
        _compare_beginning(ActivationCache(folder), source, fix)
    else:
        check_same(f"the cache in {str(folder)!r}", written.get("digests"), digests, fix=fix)
    return complete


def _compare_beginning(cache: ActivationCache, source: ModelSource, fix: str) -> None:
    """Compare a finished cache of saewb 0.1.0, which has no digests, with the activations of a first pass.

    Raises:
        ValueError: if they differ.
    """
    now = next(source)
    now = now.rows(slice(0, min(len(now), len(cache))))
    written = cache[0 : len(now)]
    parts = [] if torch.equal(written.ids, now.ids) else ["tokens"]
    for name, x in now.values.items():
        close = torch.isclose(written.values[name].float(), x.float(), rtol=1e-2, atol=1e-3 * float(x.abs().max()))
        parts += ["model"] if not parts and not close.all() else []
    if parts:
        what = f"the cache in {str(cache.folder)!r} is of {listed(parts, 'another ')}, by its first {len(now)} tokens."
        raise ValueError(explain(what, want="the same model and tokens", fix=fix))


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache.

    Raises:
        FormatError: if it is not an index, or of an unknown version.
    """
    index = read_json(folder / _INDEX)
    where = f"{_INDEX} in {str(folder)!r}"
    version = index.get("saewb_cache") if isinstance(index, dict) else None
    if version is None:
        raise FormatError(explain(f"{where} is no index.", want="a cache that saewb wrote"))
    if version != _VERSION:
        what = f"the cache in {str(folder)!r} has format {reprlib.repr(version)}; this saewb reads {_VERSION}."
        raise FormatError(explain(what, fix="saewb.cache_activations(...) into a new folder"))
    if not isinstance(index.get("points"), dict):
        raise FormatError(explain(f"{where} is no index: it has no points.", want="a cache that saewb wrote"))
    with refuse_damage(where, "a cache that saewb wrote"):
        sizes = [index["n_tokens"], index["shard_tokens"], *(point["d"] for point in index["points"].values())]
        hashes = index.get("sha256")
        wrong = [n for n in sizes if type(n) is not int or not 0 < n < 2**62]
        dtypes = [point["dtype"] for point in index["points"].values()]
        wrong += [name for name in dtypes if not isinstance(getattr(torch, name, None), torch.dtype)]
        n_shards = -(-sizes[0] // sizes[1]) if not wrong else 0
        if not (hashes is None or (isinstance(hashes, list) and len(hashes) == n_shards)):
            wrong.append(hashes)
        if wrong or not index["points"] or not isinstance(index.get("asked", {}), dict):
            what = f"{where} has {', '.join(map(reprlib.repr, wrong)) or 'no points'}."
            raise FormatError(explain(what, want="sizes, dtypes, and a hash of each shard"))
    return index


def _read_progress(folder: Path) -> dict[str, Any]:
    """The progress of a cache that was interrupted.

    Raises:
        FormatError: if it cannot be read.
    """
    progress = load_state(folder / _PROGRESS)
    with refuse_damage(f"{_PROGRESS} in {str(folder)!r}", "a cache that saewb began"):
        if not isinstance(progress["asked"], dict) or type(progress["n_shards"]) is not int or progress["n_shards"] < 1:
            raise TypeError("asked, n_shards")
        if "sha256" not in progress:  # of before hashes were written
            progress["sha256"] = [sha256_of(_shard(folder, i)) for i in range(progress["n_shards"])]
    return progress


def _write(folder: Path, source: ModelSource, request: dict[str, Any], parallel: ParallelContext) -> None:
    n_tokens, size = request["n_tokens"], request["shard_tokens"]
    batches, hashes, position = FifoBuffer(source, size), [], None
    with parallel.raise_together():
        if parallel.is_main:
            remove_orphans(folder)
            if (folder / _PROGRESS).is_file():
                progress = _read_progress(folder)
                hashes, position = list(progress["sha256"]), progress["stream"]
    hashes, position = parallel.broadcast_object((hashes, position))
    if position is not None:
        with refuse_damage(f"{_PROGRESS} in {str(folder)!r}", "a cache that saewb began"):
            batches.restore(position)
    columns: dict[str, Tensor] = {}
    for shard in range(len(hashes), -(-n_tokens // size)):
        columns = _take_columns(batches, min(size, n_tokens - shard * size), shard * size, n_tokens)
        with parallel.raise_together():
            if parallel.is_main:
                _write_shard(folder, shard, columns, hashes, request, batches.state())
    with parallel.raise_together():
        if parallel.is_main:
            _write_index(folder, columns, hashes, request)


def _write_shard(
    folder: Path,
    shard: int,
    columns: dict[str, Tensor],
    hashes: list[str],
    request: dict[str, Any],
    position: dict[str, Any],
) -> None:
    """Write a shard, add its hash, and write down how far the stream is."""
    from safetensors.torch import save_file

    atomic_write(_shard(folder, shard), lambda path: save_file(columns, str(path)))
    hashes.append(sha256_of(_shard(folder, shard)))
    save_state(folder / _PROGRESS, {"asked": request, "n_shards": shard + 1, "sha256": hashes, "stream": position})


def _write_index(folder: Path, columns: dict[str, Tensor], hashes: list[str], request: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    columns = columns or load_file(str(_shard(folder, len(hashes) - 1)))  # interrupted between last shard and index
    points = {
        name: {"d": column.shape[1], "dtype": str(column.dtype).removeprefix("torch.")}
        for name, column in columns.items()
        if name != _IDS
    }
    sizes = {"n_tokens": request["n_tokens"], "shard_tokens": request["shard_tokens"]}
    index = {"saewb_cache": _VERSION, **sizes, "points": points, "asked": request, "sha256": hashes}
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
        self.n_tokens, self.shard_tokens = index["n_tokens"], index["shard_tokens"]
        self.points = {name: point["d"] for name, point in index["points"].items()}
        self._dtypes = {name: getattr(torch, point["dtype"]) for name, point in index["points"].items()}
        self._sha256, self._checked = index.get("sha256"), set()
        n = -(-self.n_tokens // self.shard_tokens)
        missing = (_shard(self.folder, i).name for i in range(n) if not _shard(self.folder, i).is_file())
        if missing := list(islice(missing, 3)):
            raise FormatError(explain(f"{str(self.folder)!r} lacks {', '.join(missing)}.", want=f"{n} shards"))

    def digest(self) -> str:
        """Digest of its content, from what was written with it: of each shard, and what it is of."""
        return values_digest(_read_index(self.folder))

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
        from safetensors import SafetensorError, safe_open

        path = _shard(self.folder, shard)
        self._check_shard(shard)
        try:
            with safe_open(str(path), framework="pt") as file:
                for name, pieces in parts.items():
                    pieces.append(file.get_slice(name)[max(0, start) : min(stop, self.shard_tokens)])
        except SafetensorError as error:
            raise FormatError(explain(f"{path} is damaged: {error}.", want="the shard as it was written")) from error

    def verify(self) -> None:
        """Compare every shard with the hash of when it was written, about 1 s per GB.

        Without it, a shard of up to 64 MiB is compared when it is first read, and larger ones are not.

        Raises:
            FormatError: naming the first shard that is damaged.
        """
        for shard in range(-(-self.n_tokens // self.shard_tokens)):
            self._checked.discard(shard)
            self._check_shard(shard, verify=True)

    def _check_shard(self, shard: int, verify: bool | None = None) -> None:
        """Check the header of a shard, and its hash, at the first access."""
        from safetensors import SafetensorError, safe_open

        if shard in self._checked:
            return
        path, rows = _shard(self.folder, shard), min(self.shard_tokens, self.n_tokens - shard * self.shard_tokens)
        expected = {name: ([rows, d], self._dtypes[name]) for name, d in self.points.items()}
        expected[_IDS] = [rows], torch.int32
        try:
            with safe_open(str(path), framework="pt") as file:
                names = set(file.keys())
                columns = {name: file.get_slice(name) for name in names & set(expected)}
                headers = {name: (column.get_shape(), column[:0].dtype) for name, column in columns.items()}
        except (SafetensorError, OSError) as error:
            raise FormatError(explain(f"{path} is damaged: {error}.", want="the shard as it was written")) from error
        if headers != expected or names != set(expected):
            wrong = sorted(names ^ set(expected)) or [name for name in expected if headers[name] != expected[name]]
            what = f"{path} does not have the tensors that {_INDEX} says: {', '.join(wrong[:3])}."
            raise FormatError(explain(what, want="the shard as it was written"))
        digest = None if self._sha256 is None else self._sha256[shard]
        check_sha256(path, digest, fix="saewb.cache_activations(...) into a new folder", verify=verify)
        self._checked.add(shard)

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

    def digest(self) -> str:
        """Digest of the cache, and of the order it is read in."""
        return values_digest([self._cache.digest(), self._points, self._block, self._cursor.seed])

    def state(self) -> dict[str, Any]:
        """Epoch and position; the cache itself is not part of it."""
        return self._cursor.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._cursor.restore(state)
