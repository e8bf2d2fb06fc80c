"""Arrays of an .npz file: a zip file of .npy members, each a header and the numbers."""

from __future__ import annotations

import ast
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._zipped import data_offset, members, refusing

_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "|b1": torch.bool,
}
_MOST_HEADER = 10_000  # bytes, as numpy has it
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Member:
    path: Path
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    descr: str
    fortran: bool  # columns are contiguous
    skip: int  # bytes of the header, within the member

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.descr).itemsize


def open_npz(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
    """Shape, dtype and a function that reads it, of each array by name. Reads the headers only.

    Raises:
        FormatError: if the file is damaged, is no zip file of arrays of numbers, or its sizes contradict each other.
    """
    found = {}
    with refusing(path, "an npz file"), zipfile.ZipFile(path) as archive:
        for info in members(archive, path):
            if not info.filename.endswith(".npy"):
                raise FormatError(explain(f"{path.name} has a member {info.filename!r}.", want="arrays, *.npy"))
            member = _described(archive, path, info)
            found[info.filename.removesuffix(".npy")] = (member.shape, _DTYPES[member.descr], _loader(member))
    return found


def _described(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo) -> _Member:
    with archive.open(info) as file:
        start = file.read(8)
        width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(start, 0)
        length = int.from_bytes(file.read(width), "little")
        if not width or length > _MOST_HEADER:
            raise FormatError(explain(f"{info.filename} in {path.name} is no array of numbers.", want="a .npy header"))
        said = ast.literal_eval(file.read(length).decode("latin1"))
    shape, descr, fortran = said["shape"], said["descr"], said["fortran_order"]
    if descr not in _DTYPES or type(fortran) is not bool or set(said) != {"shape", "descr", "fortran_order"}:
        raise FormatError(explain(f"{info.filename} in {path.name} is of kind {descr!r}.", want=", ".join(_DTYPES)))
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(explain(f"{info.filename} in {path.name} has shape {shape!r}."))
    member = _Member(path, info, shape, descr, fortran, 8 + width + length)
    if member.n_bytes + member.skip != info.file_size:
        raise FormatError(
            explain(
                f"{info.filename} in {path.name} has {info.file_size} bytes.",
                want=f"{member.n_bytes + member.skip} for {descr} of shape {shape}",
            )
        )
    return member


def _loader(member: _Member) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with refusing(member.path, "an npz file"):
            stored = member.info.compress_type == zipfile.ZIP_STORED
            flat = _stored(member) if stored else _unpacked(member)
        if member.fortran and len(member.shape) > 1:
            return flat.view(member.shape[::-1]).permute(*reversed(range(len(member.shape))))
        return flat.view(member.shape)

    return load


def _stored(member: _Member) -> Tensor:
    offset, count = data_offset(member.path, member.info) + member.skip, math.prod(member.shape)
    kind = np.dtype(member.descr)
    # Numbers must lie at a multiple of their size to be mapped: compiled loops may rely on it.
    if offset % kind.itemsize or not count:
        return torch.from_numpy(np.fromfile(member.path, kind, count, offset=offset))
    return torch.from_numpy(np.asarray(np.memmap(member.path, kind, mode="c", offset=offset, shape=(count,))))


def _unpacked(member: _Member) -> Tensor:
    flat = torch.empty(member.n_bytes, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    with zipfile.ZipFile(member.path) as archive, archive.open(member.info) as file:
        file.read(member.skip)
        for at in range(0, member.n_bytes, _CHUNK):
            part = view[at : at + _CHUNK]
            if file.readinto(part) != len(part):
                raise zlib.error(f"{member.info.filename} ends early")
        file.read(1)  # checks the sum over all of it
    return flat.view(_DTYPES[member.descr])
