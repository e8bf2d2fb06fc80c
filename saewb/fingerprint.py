"""Fingerprints: of which SAE, model, tokens and settings something on disk is.

1. The digest of a tensor is the sha256 of its dtype, its shape and its bytes, in blocks that are hashed in parallel. It
   is the same on every device and for every layout in memory.
2. The digest of a thing is that of its parts by name. What is unknown (a hook of the user, say) gets a random one: it
   equals nothing that was written before.
3. `differences` says which parts of two sets of digests differ.

Speed: about 1.5 GB/s per thread on CPUs with instructions for sha256, `torch.get_num_threads()` threads; tensors
elsewhere are copied in blocks of 16 MiB.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.errors import explain

_BLOCK = 1 << 24  # bytes hashed at a time
_SMALL = 1 << 22  # bytes up to which a tensor is always hashed
_SAMPLE = 1 << 16  # elements of a larger one that are compared before its last digest is used again
_LABELS = ("metadata", "model")  # fields of an SAE's configuration that change no number
_WHOLE_FILE = 1 << 30  # bytes up to which a file is hashed whole

Digests = Mapping[str, Union[str, None]]
"""Digests by part: "SAE", "model", "tokens"; None where a part cannot be looked at, such as an iterator."""


# -- tensors ---------------------------------------------------------------------------------------------------------


def tensor_digest(tensor: Tensor) -> str:
    """Digest of one tensor: of its dtype, shape and bytes.

    Args:
        tensor: on any device, contiguous or not. One without data (on the device "meta") has only dtype and shape.

    Example:
        >>> a = torch.arange(6.0).reshape(2, 3)
        >>> tensor_digest(a) == tensor_digest(a.T.contiguous().T), tensor_digest(a) == tensor_digest(a.double())
        (True, False)
    """
    return tensors_digest({"": tensor})


def tensors_digest(tensors: Mapping[str, Tensor], *, reuse: bool = False) -> str:
    """Digest of several tensors with their names; their order is of no matter, and shared ones are hashed once.

    Args:
        tensors: by name.
        reuse: whether the digest of a tensor above 4 MiB that looks unchanged is taken from the last time: the same
            memory, torch's count of changes in place, and 65,536 of its elements. A write through `.data` is not
            counted: only look-ups may reuse, and nothing that is written to disk.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(2)
        >>> tensors_digest({"a": a, "b": b}) == tensors_digest({"b": b, "a": a})
        True
        >>> tensors_digest({"a": a, "b": b}) == tensors_digest({"a": b, "b": a})
        False
    """
    distinct = {_place(t): t for t in tensors.values()}
    digests = {place: _reusable(t) if reuse else None for place, t in distinct.items()}
    missing = {place: distinct[place] for place, digest in digests.items() if digest is None}
    # All blocks of all tensors in one queue, so that one large tensor keeps every thread busy.
    blocks = [(place, block) for place, t in missing.items() for block in _blocks(t)]
    running = {place: hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode()) for place, t in missing.items()}
    is_small = sum(t.numel() * t.element_size() for t in missing.values()) <= _BLOCK
    with ThreadPoolExecutor(1 if is_small else max(1, torch.get_num_threads())) as threads:
        hashed = (map if is_small else threads.map)(lambda item: _hash_block(*item[1]), blocks)
        for (place, _), of_block in zip(blocks, hashed, strict=True):
            running[place].update(of_block)
    for place, t in missing.items():
        digests[place] = running[place].hexdigest()
        _remember(t, digests[place])
    return values_digest(sorted((name, digests[_place(t)]) for name, t in tensors.items()))


def _place(t: Tensor) -> tuple[Any, ...]:
    """Which tensors are the same memory."""
    storage = id(t) if t.is_meta or t.numel() == 0 else t.data_ptr()
    return (str(t.device), storage, tuple(t.shape), t.stride(), t.dtype)


def _blocks(t: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Rows of about 16 MiB, the same however the tensor lies in memory."""
    if t.is_meta or t.numel() == 0:
        return
    n = t.shape[0] if t.ndim else 1
    step = max(1, _BLOCK * n // max(1, t.numel() * t.element_size()))
    yield from ((t, slice(begin, min(n, begin + step))) for begin in range(0, n, step))


def _hash_block(t: Tensor, rows: slice) -> bytes:
    with torch.no_grad():
        part = t.detach()[rows] if t.ndim else t.detach().reshape(1)
        part = part.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return hashlib.sha256(part.view(torch.uint8).numpy()).digest()


def _reusable(t: Tensor) -> str | None:
    """The digest of the last time, if the tensor looks as it did then."""
    known = _last().get(t)
    return known[1] if known is not None and known[0] == _look(t) else None


def _remember(t: Tensor, digest: str) -> None:
    if (look := _look(t)) is not None:
        _last()[t] = (look, digest)


def _look(t: Tensor) -> tuple[Any, ...] | None:
    """What is cheap to see of a large tensor; None where it is hashed anew each time."""
    if t.is_meta or t.is_inference() or not t.is_contiguous() or t.numel() * t.element_size() <= _SMALL:
        return None
    with torch.no_grad():
        sample = t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLE)]
        return (*_place(t), t._version, _hash_block(sample, slice(None)))


def _last() -> Any:
    """Digest of tensors by identity; held no longer than they are."""
    if not _last_digests:
        from torch.utils.weak import WeakIdKeyDictionary

        _last_digests.append(WeakIdKeyDictionary())
    return _last_digests[0]


_last_digests: list[Any] = []


# -- values, SAEs, tokens, files -------------------------------------------------------------------------------------


def values_digest(values: Any) -> str:
    """Digest of plain values; numbers, texts, lists, and dictionaries in whatever order.

    Example:
        >>> values_digest({"k": 4, "d_sae": 8}) == values_digest({"d_sae": 8, "k": 4})
        True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def sae_digest(sae: nn.Module, *, reuse: bool = False) -> str:
    """Digest of an SAE: all its weights, and its configuration without metadata and the model's name.

    Args:
        sae: of any architecture.
        reuse: as for `tensors_digest`.

    Example:
        >>> import copy, saewb
        >>> sae = saewb.load_sae("tiny")
        >>> sae_digest(sae) == sae_digest(sae.with_config(metadata={})), sae_digest(sae) == sae_digest(sae.double())
        (True, False)
    """
    cfg = sae.cfg
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in _LABELS}
    weights = tensors_digest(sae.state_dict(keep_vars=True), reuse=reuse)
    return values_digest([type(sae).__name__, values, weights])


def rows_digest(ids: Int[Tensor, "rows ctx"], first_row: int = 0, *, of_rest: str = "") -> str:
    """Digest of numbered rows of tokens, which adds up: those of two parts of a text give that of the whole.

        sum of sha256(number, ids) over the rows, modulo 2^256

    Args:
        ids: token ids.
        first_row: number of the first of them.
        of_rest: digest of other rows, to add these to.

    Example:
        >>> ids = torch.arange(12).reshape(3, 4)
        >>> rows_digest(ids[2:], 2, of_rest=rows_digest(ids[:2])) == rows_digest(ids)
        True
    """
    total, rows = int(of_rest or "0", 16), ids.detach().cpu().to(torch.int64).contiguous().numpy()
    for number, row in enumerate(rows, first_row):  # 2 us each, a thousandth of what running the row takes
        total += int.from_bytes(hashlib.sha256(number.to_bytes(8, "little") + row.tobytes()).digest(), "little")
    return f"{total % 2**256:064x}"


def joined_rows(first: str, second: str) -> str:
    """`rows_digest` of the rows of both."""
    return f"{(int(first, 16) + int(second, 16)) % 2**256:064x}"


def texts_digest(texts: Iterable[Any]) -> str:
    """Digest of documents in memory: texts, token ids, chats or rows of a dataset."""
    digest = hashlib.sha256()
    for text in texts:
        if isinstance(text, Tensor) or hasattr(text, "tolist"):
            text = text.tolist()
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else values_digest(text).encode()
        digest.update(b"%d " % len(content))
        digest.update(content)
    return digest.hexdigest()


def files_digest(paths: Sequence[Path]) -> str:
    """Digest of files in this order, whatever their names; of one above 1 GiB, its size and 65 MiB spread over it."""
    return values_digest([_file_digest(Path(path)) for path in paths])


def _file_digest(path: Path) -> str:
    status = os.stat(path)
    size = status.st_size
    digest = hashlib.sha256(b"%d " % size)
    with path.open("rb") as file:
        if size <= _WHOLE_FILE or not stat.S_ISREG(status.st_mode):
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            for i in range(65):
                file.seek((size - (1 << 20)) * i // 64)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


def unknown() -> str:
    """A digest that equals no other: of what cannot be compared."""
    return secrets.token_hex(32)


# -- comparison ------------------------------------------------------------------------------------------------------


def differences(written: Digests, now: Digests, parts: Iterable[str] | None = None) -> list[str]:
    """Parts that differ, each with both digests; a part that only one of them has differs too.

    Args:
        written: of what is on disk.
        now: of what is asked for.
        parts: those to compare; None for all.

    Example:
        >>> differences({"SAE": "ab" * 32, "model": "cd" * 32}, {"SAE": "ef" * 32, "model": "cd" * 32})
        ['SAE ababababab, not efefefefef']
    """
    names = list(dict.fromkeys([*now, *written])) if parts is None else list(parts)
    pairs = [(name, written.get(name), now.get(name)) for name in names]
    return [f"{name} {_short(a)}, not {_short(b)}" for name, a, b in pairs if a != b]


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else digest[:10]


def check_same(
    what: str, written: Digests | None, now: Digests, *, fix: str, parts: Iterable[str] | None = None, want: str = ""
) -> None:
    """Check that something on disk is of what is asked for.

    Args:
        what: is on disk, the subject of the message.
        written: its digests; None if it is of saewb 0.1.0, which wrote none.
        now: digests of what is asked for.
        fix: line to type if it is of something else.
        parts: as for `differences`.
        want: for the message; "" names the parts.

    Raises:
        ValueError: naming the parts that differ.

    Example:
        >>> check_same("the index", {"SAE": "ab" * 32}, {"SAE": "cd" * 32}, fix="saewb.build_index(...)")
        Traceback (most recent call last):
        ...
        ValueError: the index is of another SAE (by content: SAE ababababab, not cdcdcdcdcd).
          want: the same SAE
          fix:  saewb.build_index(...)
    """
    parts = list(now if parts is None else parts)
    if written is None:
        got = f"{what} is of saewb 0.1.0, which did not write down of which {listed(parts)} it is."
        raise ValueError(explain(got, want=want or "one that this version wrote", fix=fix))
    if different := [name for name in parts if written.get(name) != now.get(name)]:
        by_content = "; ".join(differences(written, now, different))
        got = f"{what} is of {listed(different, 'another ')} (by content: {by_content})."
        raise ValueError(explain(got, want=want or f"the same {listed(different)}", fix=fix))


def listed(parts: Sequence[str], before: str = "") -> str:
    """Names of parts in a sentence.

    Example:
        >>> listed(["SAE", "model", "tokens"], "another ")
        'another SAE, another model and other tokens'
    """
    words = [before.replace("another", "other") + p if p.endswith("s") else before + p for p in parts]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
