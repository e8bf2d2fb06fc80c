"""Read llama.cpp's GGUF files: metadata and tensors. (`saewb.models.gguf_llama` makes a language model of them.)

A GGUF file is: a header, key-value metadata, a table of tensors (name, shape, type, offset), padding, the data.

1. `read_gguf` reads header, metadata and table, checks every offset against the file's size, and maps the data.
2. `GGUFFile.tensor` turns one tensor into float32: dense types, and blocks of 32 quantized numbers (`_DECODERS`).

What it does not read is an error, never a guess. Only numpy is needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saewb.errors import FormatError, explain, near

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # numbers per quantized block


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, as a float32 column."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """16 bytes -> 32 numbers of 4 bits: all low halves first, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].copy().view(np.int8) * _half(blocks, 0)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.copy().view("<f4")


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.copy().view("<f2").astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    # A bfloat16 is the upper half of a float32.
    return (blocks.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class _Decoder:
    name: str  # llama.cpp's name of the type
    numbers: int  # per block
    nbytes: int  # per block
    decode: Callable[[np.ndarray], np.ndarray]  # uint8 [blocks, nbytes] -> float32 [blocks, numbers]


_DECODERS = {
    0: _Decoder("F32", 1, 4, _f32),
    1: _Decoder("F16", 1, 2, _f16),
    2: _Decoder("Q4_0", _BLOCK, 18, _q4_0),  # scale, 16 bytes
    3: _Decoder("Q4_1", _BLOCK, 20, _q4_1),  # scale, minimum, 16 bytes
    8: _Decoder("Q8_0", _BLOCK, 34, _q8_0),  # scale, 32 bytes
    30: _Decoder("BF16", 1, 2, _bf16),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file, and how it is written."""

    shape: tuple[int, ...]  # slowest axis first, as in numpy (the file has it the other way round)
    kind: int  # llama.cpp's number of the type
    start: int  # bytes from the beginning of the file


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: metadata read, tensors decoded when asked for."""

    path: Path  # where it is
    metadata: Mapping[str, Any]  # numbers, strings and lists of them, by llama.cpp's keys
    tensors: Mapping[str, TensorInfo]  # by llama.cpp's names
    data: np.ndarray  # the whole file as bytes, mapped, not read

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as a new float32 array, dequantized: scale * number (+ minimum), per block of 32.

        Args:
            name: llama.cpp's name, one of `tensors`.

        Raises:
            ValueError: if there is no tensor of this name.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(
                explain(f"no tensor {name!r} in {self.path.name} ({len(self.tensors)}).", near=near(name, self.tensors))
            )
        how = _DECODERS[info.kind]
        blocks = math.prod(info.shape) // how.numbers
        raw = np.asarray(self.data[info.start : info.start + blocks * how.nbytes])
        return how.decode(raw.reshape(blocks, how.nbytes)).reshape(info.shape)


class _Cursor:
    """Reads little-endian values one after the other; running past the end is a FormatError."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.buffer, self.path, self.at = memoryview(data), path, 0

    def bytes(self, n: int) -> memoryview:
        if self.at + n > len(self.buffer):
            raise FormatError(
                explain(
                    f"{self.path.name} ends at byte {len(self.buffer)}, but {n} more are called for at byte {self.at}.",
                    want="a whole GGUF file",
                    fix="download it again",
                )
            )
        self.at += n
        return self.buffer[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start, raw = self.at, self.bytes(self.number("Q"))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(explain(f"{self.path.name}: string at byte {start} is not UTF-8: {error}.")) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.number(self.scalar(kind))

    def array(self, kind: int, n: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(n)]
        code = self.scalar(kind)
        return list(struct.unpack(f"<{n}{code}", self.bytes(n * struct.calcsize("<" + code))))

    def scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise FormatError(
                explain(f"{self.path.name}: metadata value of type {kind}.", want="types 0 to 12 of GGUF version 3")
            )
        return _SCALARS[kind]


def read_gguf(path: str | Path) -> GGUFFile:
    """A GGUF file's metadata and table of tensors; the numbers stay on disk until `GGUFFile.tensor` asks for them.

    Reads versions 2 and 3, little-endian, tensors of type F32, F16, BF16, Q8_0, Q4_0 and Q4_1.

    Args:
        path: the file. It is mapped into memory, so it must stay where it is while the result is in use.

    Returns:
        Metadata and table, every tensor's place checked against the size of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is not GGUF, is cut short, or has a version or a tensor type that is not read.

    References:
        The GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md; block layouts: ggml-common.h there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a .gguf file"))
    # An empty file cannot be mapped, and has no magic number either.
    data = np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.empty(0, np.uint8)
    cursor = _Cursor(data, path)
    if bytes(data[:4]) != b"GGUF":
        raise FormatError(explain(f"{path.name} begins with {bytes(data[:4])!r}.", want="b'GGUF'"))
    cursor.bytes(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise FormatError(explain(f"{path.name} is GGUF version {version}.", want="version 2 or 3, little-endian"))
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(n_values)}
    return GGUFFile(path, metadata, _table(cursor, n_tensors, metadata.get("general.alignment", 32)), data)


def _table(cursor: _Cursor, n: int, alignment: int) -> dict[str, TensorInfo]:
    entries = {}
    for _ in range(n):
        name = cursor.string()
        axes = [cursor.number("Q") for _ in range(cursor.number("I"))]
        entries[name] = (tuple(reversed(axes)), cursor.number("I"), cursor.number("Q"))
    if not (isinstance(alignment, int) and alignment > 0):
        raise FormatError(explain(f"{cursor.path.name}: alignment {alignment!r}.", want="a positive integer"))
    begin = -(-cursor.at // alignment) * alignment
    for name, (shape, kind, offset) in entries.items():
        _check_tensor(cursor, name, shape, kind, begin + offset)
    return {name: TensorInfo(shape, kind, begin + offset) for name, (shape, kind, offset) in entries.items()}


def _check_tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, start: int) -> None:
    file, known = cursor.path.name, ", ".join(d.name for d in _DECODERS.values())
    if kind not in _DECODERS:
        raise FormatError(
            explain(
                f"{file}: tensor {name!r} is of ggml type {kind}.", want=known, fix="take the file's Q8_0 or F16 sister"
            )
        )
    how = _DECODERS[kind]
    if (shape[-1] if shape else 1) % how.numbers:
        raise FormatError(
            explain(f"{file}: {name!r} of type {how.name} has shape {shape}.", want=f"rows of a multiple of {_BLOCK}")
        )
    end = start + math.prod(shape) // how.numbers * how.nbytes
    if end > len(cursor.buffer):
        raise FormatError(
            explain(
                f"{file} has {len(cursor.buffer)} bytes, but {name!r} ends at byte {end}.",
                want="a whole GGUF file",
                fix="download it again",
            )
        )
