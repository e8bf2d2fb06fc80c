"""Activations on the disk: computed once, read in any order, by any number of trainings.

A cache is a folder:

    index.json               points with their widths and dtypes, number of tokens, tokens of a shard; there when all is
    shard_00000.safetensors  by point: [tokens, d]; "token_ids": [tokens], int32
    progress.safetensors     while it is being made: how many shards are there, and where the stream is

Every file is there whole or not at all. A cache whose making was interrupted, or killed, goes on where the last whole
shard ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from saewb._files import atomic_write, load_state, save_state, write_text
from saewb.data.orders import shuffled
from saewb.data.shuffle_buffer import Exact
from saewb.data.sources import ModelSource
from saewb.data.stream import PASS_TOKENS, ActivationStream, model_tokens
from saewb.errors import FormatError, explain
from saewb.models.capture import Activations
from saewb.models.tokenizer import special_ids

_IDS = "token_ids"
_INDEX, _PROGRESS = "index.json", "progress.safetensors"


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
) -> ActivationCache:
    """Write a model's activations to a folder: exactly `n_tokens` tokens, with their ids.

    Called again with the same arguments after an interruption it goes on; on a finished cache it just opens it. Memory:
    one shard and one forward pass.

    Args:
        model: any kind.
        tokens: as for `saewb.stream_activations`.
        points: names of hook points; heads as there.
        folder: a new or empty one, or the same cache.
        n_tokens: to keep, after special tokens and positions are left out.
        dtype: on the disk; None keeps the model's. float16 ends at 65,504 and bfloat16 has 8 bits of precision: neither
            touches the ids.
        shard_tokens: tokens of a file.
        ctx_len: tokens of a row, if texts are packed here.
        pass_tokens: about so many tokens in one forward pass.
        skip_special_tokens: leaves out BOS, EOS, padding, ...: True, False, or the ids.
        positions: of each row, those kept.
        repeat: goes through the tokens again where they are fewer.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if a row is longer than `n_tokens`; if the tokens end before; if the folder holds another cache.
        FileExistsError: if the folder holds other things.
        OSError: if the disk is full; what was written stays, and goes on from there.

    Example:
        >>> import saewb, tempfile
        >>> model, texts = saewb.load_model("tiny", device="cpu"), ["The river flows through the city."] * 40
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache_activations(model, texts, "blocks.1.hook_resid_post", folder, 200, ctx_len=16)
        ActivationCache(200 tokens: blocks.1.hook_resid_post 128)
    """
    folder, names = Path(folder).expanduser(), [points] if isinstance(points, str) else list(points)
    rows = model_tokens(model, tokens, ctx_len=ctx_len, pass_tokens=pass_tokens, repeat=repeat)
    _check_sizes(n_tokens, shard_tokens, rows.ctx_len)
    skipped = special_ids(model, skip_special_tokens)
    asked = {
        "points": names,
        "n_tokens": n_tokens,
        "shard_tokens": shard_tokens,
        "ctx_len": rows.ctx_len,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "skipped": list(skipped),
        "positions": [positions.start, positions.stop, positions.step],
    }
    if _there(folder, asked):
        return ActivationCache(folder)
    source = ModelSource(model, rows, names, positions=positions, skipped=skipped, device="cpu", dtype=dtype)
    _write(folder, source, asked)
    return ActivationCache(folder)


def _check_sizes(n_tokens: int, shard_tokens: int, ctx_len: int) -> None:
    if n_tokens < 1 or shard_tokens < 1:
        raise ValueError(explain(f"got n_tokens={n_tokens}, shard_tokens={shard_tokens}.", want="1 or more of each"))
    if ctx_len > n_tokens:
        what = f"a row has {ctx_len} tokens (ctx_len), more than the n_tokens={n_tokens} that are to be cached."
        raise ValueError(explain(what, want="at least one row", fix=f"n_tokens={ctx_len}"))


def _there(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the cache is complete.

    Raises:
        FileExistsError, ValueError: if something else is there.
    """
    if (folder / _INDEX).is_file():
        made = json.loads((folder / _INDEX).read_text())["asked"]
    elif (folder / _PROGRESS).is_file():
        made = load_state(folder / _PROGRESS)["asked"]
    else:
        odd = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        odd = [name for name in odd if not name.startswith((".shard_", ".progress", "shard_"))]
        if odd:
            what = f"{str(folder)!r} holds other things: {', '.join(sorted(odd)[:5])}."
            raise FileExistsError(explain(what, want="a new folder"))
        return False
    if made != asked:
        differs = ", ".join(f"{k}={made.get(k)!r}, not {v!r}" for k, v in asked.items() if made.get(k) != v)
        raise ValueError(explain(f"{str(folder)!r} holds a cache made with {differs}.", want="a new folder"))
    return (folder / _INDEX).is_file()


def _write(folder: Path, source: ModelSource, asked: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    n_tokens, size = asked["n_tokens"], asked["shard_tokens"]
    batches, done = Exact(source, size), 0
    if (folder / _PROGRESS).is_file():
        progress = load_state(folder / _PROGRESS)
        done = progress["n_shards"]
        batches.restore(progress["stream"])
    written: dict[str, Tensor] = {}
    for shard in range(done, -(-n_tokens // size)):
        wanted = min(size, n_tokens - shard * size)
        written = _columns(batches, wanted, shard * size, n_tokens)
        path = _shard(folder, shard)
        atomic_write(path, lambda fresh, tensors=written: save_file(tensors, str(fresh)))
        save_state(folder / _PROGRESS, {"asked": asked, "n_shards": shard + 1, "stream": batches.state()})
    if not written:  # it was stopped between the last shard and the index
        written = _open(_shard(folder, done - 1))
    kinds = {
        n: {"d": t.shape[1], "dtype": str(t.dtype).removeprefix("torch.")} for n, t in written.items() if n != _IDS
    }
    index = {"saewb_cache": 1, "n_tokens": n_tokens, "shard_tokens": size, "points": kinds, "asked": asked}
    write_text(folder / _INDEX, json.dumps(index, indent=1))
    (folder / _PROGRESS).unlink(missing_ok=True)


def _columns(batches: Exact, wanted: int, have: int, n_tokens: int) -> dict[str, Tensor]:
    try:
        batch = batches.take(wanted, whole=True)
    except StopIteration:
        what = f"the tokens ended: there are fewer than n_tokens={n_tokens} ({have} are written)."
        raise ValueError(explain(what, want="more text, or a smaller n_tokens", fix="repeat=True")) from None
    columns = {name: value.contiguous() for name, value in batch.values.items()}
    return {**columns, _IDS: batch.ids.to(torch.int32).contiguous()}


def _open(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


@final
class ActivationCache:
    """A cache that is complete. `len(cache)` tokens; `cache.stream(...)` to train on; `cache[1000:1010]` to look.

    Args:
        folder: made by `saewb.cache_activations`.

    Raises:
        FileNotFoundError: if there is no complete cache; says how to go on with one that was begun.
        FormatError: if its index is none, or a shard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / _INDEX).is_file():
            begun = (self.folder / _PROGRESS).is_file()
            what = f"the cache in {str(self.folder)!r} was not finished." if begun else f"no cache in {str(folder)!r}."
            fix = "saewb.cache_activations(...) with the same arguments" + (" goes on" if begun else "")
            raise FileNotFoundError(explain(what, want="a folder with index.json", fix=fix))
        try:
            index = json.loads((self.folder / _INDEX).read_text())
            self.n_tokens, self.shard_tokens = int(index["n_tokens"]), int(index["shard_tokens"])
            self.points = {name: int(kind["d"]) for name, kind in index["points"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                explain(f"{_INDEX} in {str(self.folder)!r} is no index: {error!r}.", want="ours")
            ) from error
        n = -(-self.n_tokens // self.shard_tokens)
        if missing := [_shard(self.folder, i).name for i in range(n) if not _shard(self.folder, i).is_file()]:
            raise FormatError(explain(f"{str(self.folder)!r} lacks {', '.join(missing[:3])}.", want=f"{n} shards"))

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        points = ", ".join(f"{name} {d}" for name, d in self.points.items())
        return f"ActivationCache({self.n_tokens:,} tokens: {points})"

    def __getitem__(self, which: slice) -> Activations:
        """The tokens from `which.start` to `which.stop`: only they are read."""
        start, stop, step = which.indices(self.n_tokens)
        if step != 1 or start >= stop:
            raise ValueError(explain(f"got tokens {which}.", want="a range of tokens, e.g. cache[0:1000]"))
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self.points, _IDS)}
        for shard in range(start // self.shard_tokens, -(-stop // self.shard_tokens)):
            self._read(shard, start - shard * self.shard_tokens, stop - shard * self.shard_tokens, parts)
        joined = {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in parts.items()}
        return Activations({name: joined[name] for name in self.points}, joined[_IDS])

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
        """A stream of what is cached, shuffled without reading it all.

        Blocks of `block_tokens` neighbors are read in a random order over the whole cache, another one each time
        round; `buffer_tokens` mixes within and across them.

        Args:
            batch_tokens: tokens of a batch.
            seed: of the orders; None reads from first to last.
            buffer_tokens: mixed over so many tokens; 0 leaves blocks as they are.
            block_tokens: tokens read at once.
            repeat: reads the cache again and again.
            prefetch: batches read ahead in a thread; 0 for no thread.
            points: those to give; None means all.
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
    """Blocks of a cache in a random order."""

    def __init__(
        self, cache: ActivationCache, points: Sequence[str], block_tokens: int, *, repeat: bool, seed: int | None
    ) -> None:
        if block_tokens < 1:
            raise ValueError(explain(f"got block_tokens={block_tokens}.", want="1 or more", fix="block_tokens=256"))
        self._cache, self._points, self._block = cache, list(points), block_tokens
        self._repeat, self._seed = repeat, seed
        self.restore({"epoch": 0, "at": 0})

    def __iter__(self) -> Iterator[Activations]:
        return self

    def __next__(self) -> Activations:
        if self._at >= len(self._order):
            if not self._repeat:
                raise StopIteration
            self.restore({"epoch": self._epoch + 1, "at": 0})
        start = int(self._order[self._at]) * self._block
        chunk = self._cache[start : start + self._block]
        self._at += 1
        return Activations({name: chunk.values[name] for name in self._points}, chunk.ids)

    def state(self) -> dict[str, Any]:
        """Its place; the cache itself has to be there again."""
        return {"epoch": self._epoch, "at": self._at}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._epoch, self._at = state["epoch"], state["at"]
        n = -(-len(self._cache) // self._block)
        self._order = torch.arange(n) if self._seed is None else shuffled(n, self._seed, self._epoch)
