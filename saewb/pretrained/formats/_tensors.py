"""Lazily read tensor files, and small JSON and YAML files; all treated as untrusted data.

- .safetensors: memory-mapped.
- .npz: numpy's `load(allow_pickle=False)`, one array at a time.
- .pt, .pth, .bin: zip files of torch >= 1.6, memory-mapped by `torch.load(weights_only=True)`: no code is run.

Sizes in headers must agree with the file's length before anything is allocated. Symbolic links are followed, since the
hub's cache consists of them, but must end at a regular file.

Weights that are not finite are refused: tensors of up to 2^20 numbers (biases, thresholds) are checked completely; of
larger ones the first and the last 4096 numbers, so that an SAE of 20 GB is opened without being read. `check_finite`
checks all numbers.
"""

from __future__ import annotations

import json
import math
import pickle
import stat
import struct
import sys
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saewb._files import read_json, read_yaml
from saewb.errors import FormatError, explain, near

_MAX_HEADER = 8 << 20  # bytes of a safetensors header; 700 tensors need 80 kB
_MAX_NESTING = 4  # dictionaries inside dictionaries of a .pt file
# Weights compress to about half at best: a file that declares much more is meant to exhaust memory.
_MAX_EXPANSION, _SMALL_ARCHIVE = 20, 16 << 20
_CHECKED_WHOLE, _CHECKED_ENDS = 1 << 20, 4096  # numbers


_SAFETENSORS_DTYPES = {
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
_NUMPY_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "|b1": torch.bool,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, not yet read."""

    shape: tuple[int, ...]
    """Shape in the header."""
    dtype: torch.dtype
    """dtype in the header."""
    load: Callable[[], Tensor]
    """Reads or maps the tensor."""


@final
class TensorFile:
    """Tensors of a .safetensors, .npz or .pt file by name; opening one reads its header only.

    Tensors in nested dictionaries of a .pt file have names with a slash, "ae/encoder.weight"; other values (numbers,
    strings, lists) are in `values`, by names of the same form.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if it does not exist.
        FormatError: if it is not of the type of its suffix, is damaged, or holds more than tensors.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"W": torch.ones(2, 3)}, Path(folder) / "a.safetensors")
        ...     file = TensorFile(Path(folder) / "a.safetensors")
        ...     file.names, file.shape("W"), file.dtype("W"), file.tensor("W").sum().item()
        (('W',), (2, 3), torch.float32, 6.0)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _check_regular(self.path)
        if self.path.suffix.lower() not in _OPENERS:
            raise FormatError(explain(f"{self.path.name} is of no kind that holds tensors.", want=", ".join(_OPENERS)))
        self._entries, self.values = _OPENERS[self.path.suffix.lower()](self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as stored."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, as stored."""
        return self._entry(name).dtype

    def tensor(self, name: str, *, finite: bool = True) -> Tensor:
        """Read one tensor as stored, on the CPU, memory-mapped if possible. Writes to it do not change the file.

        Args:
            name: of the tensor.
            finite: False for tensors in which NaN means "none".

        Raises:
            FormatError: if there is no such tensor, it is damaged, or (as far as checked) holds NaN or infinity.
        """
        tensor = self._entry(name).load()
        if finite and not _ends_are_finite(tensor):
            raise FormatError(explain(f"{self.path.name} has NaN or infinity in {name}.", want="finite weights"))
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors."""
        return {name: self.tensor(name) for name in self.names}

    def subset(self, prefix: str) -> TensorFile:
        """Select the tensors and values whose names start with `prefix`, which is removed."""
        part = object.__new__(TensorFile)
        part.path, cut = self.path, len(prefix)
        part._entries = {name[cut:]: entry for name, entry in self._entries.items() if name.startswith(prefix)}
        part.values = {name[cut:]: value for name, value in self.values.items() if name.startswith(prefix)}
        return part

    def check(self, shapes: Mapping[str, tuple[int, ...]], any_dtype: Iterable[str] = ()) -> None:
        """Check that the file has exactly these tensors and shapes, all of floating point numbers.

        Args:
            shapes: expected shapes by name.
            any_dtype: names of tensors that may be of integers.

        Raises:
            FormatError: naming each tensor that is missing, unexpected, of another shape or of integers.
        """
        check_shapes({name: entry.shape for name, entry in self._entries.items()}, shapes, self.path.name)
        for name, entry in self._entries.items():
            if entry.dtype not in FLOATS and name not in any_dtype:
                what = f"{self.path.name} stores {name} as {entry.dtype}."
                raise FormatError(explain(what, want=", ".join(map(str, FLOATS))))

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            want = f"one of {', '.join(self.names[:12])}" if self._entries else "a file with tensors"
            what = f"{self.path.name} has no tensor {name!r}."
            raise FormatError(explain(what, near=near(name, self._entries), want=want))
        return self._entries[name]

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self._entries)} tensors)"


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str = "the file"
) -> None:
    """Check that names and shapes are equal.

    Raises:
        FormatError: naming each tensor that is missing, unexpected or of another shape.
    """
    wrong = [f"{name} missing" for name in expected if name not in shapes]
    wrong += [f"{name} left over" for name in shapes if name not in expected]
    wrong += [
        f"{name} {tuple(shapes[name])} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if wrong:
        what = f"the tensors of {where} do not fit: {', '.join(wrong)}."
        raise FormatError(explain(what, want=", ".join(expected)))


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that every number of every tensor is finite; reads all of a mapped file.

    Raises:
        FormatError: naming the first tensor with NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_CHECKED_WHOLE)):
            raise FormatError(explain(f"there is NaN or infinity in {name}.", want="finite weights"))


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON or YAML file.

    Raises:
        FormatError: as `read_json` and `read_yaml`, or if it holds a list, a number or text.
    """
    content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(content, dict):
        raise FormatError(explain(f"{path.name} holds a {type(content).__name__}.", want="an object"))
    return content


def positive(value: object, name: str) -> float:
    """Check that a value is a positive, finite number, and return it.

    Raises:
        FormatError: if it is not.
    """
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise FormatError(explain(f"{name} is {value!r}.", want="a positive number"))
    return float(value)


def _ends_are_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.numel() <= _CHECKED_WHOLE:
        return bool(tensor.isfinite().all())
    rows = max(1, _CHECKED_ENDS // max(1, tensor[0].numel()))
    ends = (tensor[:rows].reshape(-1)[:_CHECKED_ENDS], tensor[-rows:].reshape(-1)[-_CHECKED_ENDS:])
    return all(bool(end.isfinite().all()) for end in ends)


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileNotFoundError(explain(f"there is no file {path}.")) from error
    if not stat.S_ISREG(mode):
        raise FormatError(explain(f"{path} is not a regular file.", want="a file with weights"))


_Content = tuple[dict[str, TensorEntry], dict[str, Any]]


@contextmanager
def _refuse_damage(path: Path, kind: str) -> Iterator[None]:
    """Convert the errors that a damaged or hostile file causes to a FormatError."""
    try:
        yield
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        raise FormatError(explain(f"{path.name} holds more than tensors; nothing in it was run: {error}.")) from error
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, OSError, EOFError),
        *(ValueError, TypeError, LookupError, OverflowError, MemoryError, AttributeError, SafetensorError),
        *(SyntaxError, tokenize.TokenError),  # numpy parses array headers as Python literals
    ) as error:
        raise FormatError(explain(f"{path.name} is damaged or not {kind}: {error}.")) from error


def _open_safetensors(path: Path) -> _Content:
    with _refuse_damage(path, "a safetensors file"):
        header = _read_safetensors_header(path)
        file = safe_open(path, framework="pt", device="cpu")  # checks every offset against the file's length
        return {name: _mapped_entry(file, name, header[name]) for name in header if name != "__metadata__"}, {}


def _read_safetensors_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header of {length} bytes does not fit into {size}")
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length} bytes, more than {_MAX_HEADER}")
        return json.loads(file.read(length), object_pairs_hook=_unique_names)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("it names something twice")
    return dict(pairs)


def _mapped_entry(file: Any, name: str, info: Mapping[str, Any]) -> TensorEntry:
    if info["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{name} is of kind {info['dtype']!r}")
    return TensorEntry(tuple(info["shape"]), _SAFETENSORS_DTYPES[info["dtype"]], lambda: file.get_tensor(name))


def _check_members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """List the members of a zip file; refuse implausible names and sizes."""
    infos, size = archive.infolist(), path.stat().st_size
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise FormatError(explain(f"{path.name} has {len(infos)} members, {len(set(names))} different names."))
    for info in infos:
        if ".." in info.filename.split("/") or info.filename.startswith("/") or "\\" in info.filename:
            raise FormatError(explain(f"{path.name} has a member {info.filename!r}.", want="names inside the file"))
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(explain(f"{info.filename} in {path.name} is packed.", want="stored or deflated members"))
    declared = sum(info.file_size for info in infos)
    if declared > max(_SMALL_ARCHIVE, _MAX_EXPANSION * size):
        what = f"{path.name} would unpack its {size} bytes to {declared}."
        raise FormatError(explain(what, want=f"at most {_MAX_EXPANSION} times as many"))
    return infos


def _open_npz(path: Path) -> _Content:
    entries: dict[str, TensorEntry] = {}
    with _refuse_damage(path, "an npz file"), zipfile.ZipFile(path) as archive:
        for info in _check_members(archive, path):
            if not info.filename.endswith(".npy"):
                raise FormatError(explain(f"{path.name} has a member {info.filename!r}.", want="arrays, *.npy"))
            name = info.filename.removesuffix(".npy")
            entries[name] = _array_entry(archive, path, info, name)
    return entries, {}


def _array_entry(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, name: str) -> TensorEntry:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(info) as file:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.str not in _NUMPY_DTYPES:
        raise FormatError(explain(f"{name} in {path.name} is of kind {dtype.str!r}.", want=", ".join(_NUMPY_DTYPES)))
    if min(shape, default=0) < 0 or any(type(n) is not int for n in shape) or expected != info.file_size:
        what = f"{name} in {path.name} has {info.file_size} bytes and shape {shape!r}."
        raise FormatError(explain(what, want=f"{expected} bytes for {dtype}"))

    def load() -> Tensor:
        with _refuse_damage(path, "an npz file"), np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name])

    return TensorEntry(tuple(shape), _NUMPY_DTYPES[dtype.str], load)


def _open_pickled(path: Path) -> _Content:
    with _refuse_damage(path, "a file that torch.save of torch 1.6 or later wrote"):
        with zipfile.ZipFile(path) as archive:
            infos = _check_members(archive, path)
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("it is compressed")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, Mapping):
            raise FormatError(explain(f"{path.name} holds a {type(content).__name__}.", want="a dictionary of tensors"))
        values = dict(_flatten(content, path))
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        _check_sizes(tensors, Counter(info.file_size for info in infos if "/data/" in info.filename), path)
    entries = {name: TensorEntry(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    return entries, {name: value for name, value in values.items() if name not in tensors}


def _flatten(content: Mapping[Any, Any], path: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_NESTING:
        raise FormatError(explain(f"{path.name} has dictionaries inside dictionaries, {depth} deep."))
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, path, f"{prefix}{name}/", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _check_sizes(tensors: Mapping[str, Tensor], members: Counter[int], path: Path) -> None:
    """Check that no tensor is larger than the file, and that every storage is one whole member of it.

    torch maps as many bytes as the pickle declares, even beyond the member.
    """
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.numel() * tensor.itemsize > size:
            what = f"{name} in {path.name} has shape {tuple(tensor.shape)}."
            raise FormatError(explain(what, want=f"what {size} bytes can hold"))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if not Counter(nbytes for nbytes in storages.values() if nbytes) <= members:
        raise FormatError(explain(f"{path.name} is damaged: its pickle and its numbers do not agree in size."))


_OPENERS: dict[str, Callable[[Path], _Content]] = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".pt": _open_pickled,
    ".pth": _open_pickled,
    ".bin": _open_pickled,
}
