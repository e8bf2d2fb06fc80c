"""Named tensors of a file, each read when asked for; a file that lies is refused before anything is allocated.

- .safetensors: memory-mapped.
- .npz: a member that is stored and aligned is memory-mapped; others are read, one at a time, into their final place.
  (numpy's own `savez` aligns within a member, not within the file, so most are read.)
- .pt, .pth, .bin: zip files of torch >= 1.6, memory-mapped; the pickle in them may name tensors and nothing else.

Files come from the internet and are data. Their pickles are looked through before torch sees them, sizes and offsets
must agree with the file's length, and what would unpack to far more than the file holds is refused. The path itself is
followed through symbolic links, since the hub's cache is made of them, but must end at a regular file.

A weight that is not finite is refused by name: tensors of up to 2^20 numbers (biases, thresholds) are looked at whole;
of larger ones the first and the last 4096, so that an SAE of 20 GB is opened without being read. `finite` looks at all.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saewb.errors import FormatError, explain, near

_MOST_HEADER = 8 << 20  # bytes of a safetensors header; that of a model with 700 tensors has 80 kB
_WHOLE, _ENDS = 1 << 20, 4096  # numbers
_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@final
class TensorFile:
    """The tensors of a .safetensors, .npz or .pt file by name. Opening one reads its header only.

    Tensors in dictionaries inside a .pt file have names with a slash, "ae/encoder.weight"; what is no tensor
    (numbers, strings, lists) is in `values`, by the same kind of names.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if it is not there.
        FormatError: if it is not a file of its kind, is damaged, or asks for more than tensors.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_file({"W": torch.ones(2, 3)}, Path(place) / "a.safetensors")
        ...     file = TensorFile(Path(place) / "a.safetensors")
        ...     file.names, file.shape("W"), file.dtype("W"), file.tensor("W").sum().item()
        (('W',), (2, 3), torch.float32, 6.0)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _regular(self.path)
        self._entries, self.values = _OPENERS[_kind(self.path)](self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored; mapped where the file allows. Writing to it does not change the file.

        Raises:
            FormatError: if there is none of that name, it is damaged, or (as far as looked at) holds NaN or infinity.
        """
        tensor = self._entry(name).load()
        if not _looks_finite(tensor):
            raise FormatError(explain(f"{self.path.name} has NaN or infinity in {name}.", want="finite weights"))
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.tensor(name) for name in self.names}

    def fit(self, want: Mapping[str, tuple[int, ...]], ignore: Iterable[str] = ()) -> None:
        """Check that the file has exactly these tensors, of these shapes, all of floating point numbers.

        Args:
            want: shapes by name.
            ignore: names of tensors that may be there and are not looked at.

        Raises:
            FormatError: naming each one that is missing, left over, of another shape or of integers.
        """
        looked_at = {name: entry for name, entry in self._entries.items() if name not in set(ignore) - set(want)}
        fit({name: entry.shape for name, entry in looked_at.items()}, want, self.path.name)
        for name, entry in looked_at.items():
            if entry.dtype not in FLOATS:
                raise FormatError(
                    explain(
                        f"{self.path.name} stores {name} as {entry.dtype}.",
                        want=", ".join(map(str, FLOATS)),
                    )
                )

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise FormatError(
                explain(
                    f"{self.path.name} has no tensor {name!r}.",
                    near=near(name, self._entries),
                    want=f"one of {', '.join(self.names[:12])}" if self._entries else "a file with tensors",
                )
            )
        return self._entries[name]

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self._entries)} tensors)"


def fit(got: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], where: str = "the file") -> None:
    """Check that names and shapes are the same.

    Raises:
        FormatError: naming each tensor that is missing, left over or of another shape.
    """
    wrong = [f"{name} missing" for name in want if name not in got]
    wrong += [f"{name} left over" for name in got if name not in want]
    wrong += [f"{n} {tuple(got[n])} instead of {want[n]}" for n in want if n in got and tuple(got[n]) != want[n]]
    if wrong:
        raise FormatError(explain(f"the tensors of {where} do not fit: {', '.join(wrong)}.", want=", ".join(want)))


def finite(tensors: Mapping[str, Tensor]) -> None:
    """Look at every number of every tensor; reads all of a mapped file.

    Raises:
        FormatError: naming the first tensor with NaN or infinity in it.
    """
    for name, tensor in tensors.items():
        if not all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_WHOLE)):
            raise FormatError(explain(f"there is NaN or infinity in {name}.", want="finite weights"))


def _looks_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.numel() <= _WHOLE:
        return bool(tensor.isfinite().all())
    rows = max(1, _ENDS // max(1, tensor[0].numel()))
    ends = (tensor[:rows].reshape(-1)[:_ENDS], tensor[-rows:].reshape(-1)[-_ENDS:])
    return all(bool(end.isfinite().all()) for end in ends)


def _regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileNotFoundError(explain(f"there is no file {path}.")) from error
    if not stat.S_ISREG(mode):
        raise FormatError(explain(f"{path} is not a regular file.", want="a file with weights"))


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in _OPENERS:
        raise FormatError(explain(f"{path.name} is of no kind that holds tensors.", want=", ".join(_OPENERS)))
    return kind


Opened = tuple[dict[str, Entry], dict[str, Any]]


def _open_safetensors(path: Path) -> Opened:
    what = f"{path.name} is damaged or not a safetensors file"
    try:
        header = _safetensors_header(path)
        file = safe_open(path, framework="pt", device="cpu")  # checks every offset against the file's length
        entries = {name: _safe_entry(file, name, said) for name, said in header.items() if name != "__metadata__"}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise FormatError(explain(f"{what}: {error}.")) from error
    return entries, {}


def _safetensors_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > size - 8:
            raise FormatError(f"its header of {n} bytes does not fit into {size}")
        if n > _MOST_HEADER:
            raise FormatError(f"its header has {n} bytes, more than {_MOST_HEADER}")
        return json.loads(file.read(n), object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise FormatError("it names something twice")
    return made


def _safe_entry(file: Any, name: str, said: Mapping[str, Any]) -> Entry:
    if said["dtype"] not in _SAFE_DTYPES:
        raise FormatError(f"{name} is of kind {said['dtype']!r}")
    return Entry(tuple(said["shape"]), _SAFE_DTYPES[said["dtype"]], lambda: file.get_tensor(name))


def _open_npz(path: Path) -> Opened:
    from saewb.pretrained.formats._npz import open_npz

    return {name: Entry(*found) for name, found in open_npz(path).items()}, {}


def _open_pickled(path: Path) -> Opened:
    from saewb.pretrained.formats._pickled import open_pickled

    tensors, values = open_pickled(path)
    return {name: _held(tensor) for name, tensor in tensors.items()}, values


def _held(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


_OPENERS: dict[str, Callable[[Path], Opened]] = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".pt": _open_pickled,
    ".pth": _open_pickled,
    ".bin": _open_pickled,
}
