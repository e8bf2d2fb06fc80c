"""Tensors of a .pt file: a zip file of torch >= 1.6 with one pickle that names them, and their numbers beside it."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._zipped import data_offset, members, refusing

_MOST_PICKLE = 4 << 20  # bytes; numbers are not in it
_MOST_DEPTH = 4  # dictionaries inside dictionaries
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# All that a pickle may name. torch's own list is longer, and has what reserves memory by a number in the file.
_ALLOWED = frozenset(
    (
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        "torch device",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in _KINDS),
    )
)
_CALLS = frozenset(("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"))


def open_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, memory-mapped, and its numbers, strings and lists, by name; those in dictionaries as "outer/inner".

    Raises:
        FormatError: if the file is damaged, of torch before 1.6, or its pickle names anything but tensors.
    """
    with refusing(path, "a .pt file of torch 1.6 or later"):
        with zipfile.ZipFile(path) as archive:
            infos = _look_through(archive, path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise FormatError(explain(f"{path.name} holds more than tensors: {error}.")) from error
        if not isinstance(content, Mapping):
            raise FormatError(explain(f"{path.name} holds a {type(content).__name__}.", want="a dictionary of tensors"))
        found = dict(_flat(content, path))
        _check_storages([value for value in found.values() if isinstance(value, Tensor)], infos, path)
    for name, value in found.items():
        if isinstance(value, Tensor):
            _check(value, name, path)
    tensors = {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in found.items() if name not in tensors}


def _look_through(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    infos = members(archive, path)
    pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise FormatError(explain(f"{path.name} is a zip file, but not one that torch.save wrote."))
    if pickles[0].file_size > _MOST_PICKLE:
        raise FormatError(explain(f"the pickle in {path.name} has {pickles[0].file_size} bytes.", want="tensors only"))
    for code, argument, _ in pickletools.genops(archive.read(pickles[0])):
        if (code.name == "GLOBAL" and argument not in _ALLOWED) or code.name in _CALLS:
            named = str(argument).replace(" ", ".") if code.name == "GLOBAL" else code.name
            raise FormatError(
                explain(
                    f"the pickle in {path.name} asks for {named}, which may be code to run. Nothing was run.",
                    want="a file with tensors, numbers and strings only",
                )
            )
    return infos


def _flat(content: Mapping[Any, Any], path: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _MOST_DEPTH:
        raise FormatError(explain(f"{path.name} has dictionaries inside dictionaries, {depth} deep."))
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{prefix}{name}/", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _check(tensor: Tensor, name: str, path: Path) -> None:
    size = path.stat().st_size
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.numel() * tensor.itemsize > size:
        raise FormatError(
            explain(f"{name} in {path.name} has shape {tuple(tensor.shape)}.", want=f"what {size} bytes can hold")
        )


def _check_storages(tensors: list[Tensor], infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Each one's numbers must be one whole member: torch maps as many as the pickle says, from wherever it begins."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided
    }
    storages = {start: size for start, size in storages.items() if size}
    if not storages:
        return
    sizes = {data_offset(path, info): info.file_size for info in infos if "/data/" in info.filename}
    first = next(iter(storages))
    for base in (first - offset for offset in sizes):
        if all(sizes.get(start - base) == size for start, size in storages.items()):
            return
    raise FormatError(explain(f"{path.name} is damaged: its pickle and its numbers do not agree in size."))
