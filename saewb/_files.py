"""A state, plain values and tensors, in one file that is there whole or not at all.

The file is a safetensors file: tensors as they are, the rest as JSON in its header. No pickle: reading runs no code.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from saewb.errors import FormatError, explain

_TENSOR, _TUPLE = "__tensor__", "__tuple__"
_KEY = "saewb_state"


def save_state(path: Path, state: Any) -> None:
    """Write a state, atomically: on a full disk, or a kill, what was there before stays whole.

    Args:
        path: replaced if it is there.
        state: None, booleans, numbers, strings, tensors; lists, tuples, dictionaries by strings of them. Tensors may be
            strided and on any device; they are read back contiguous and on the CPU.

    Raises:
        TypeError: for anything else.
        OSError: if the disk is full, or the place cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(state, tensors))
    atomic_write(path, lambda fresh: save_file(tensors, str(fresh), metadata={_KEY: text}))


def load_state(path: Path) -> Any:
    """What `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is none of ours, or is cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a state that saewb wrote"))
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise FormatError(explain(f"{path.name} is no state of saewb's.", want="a file that saewb wrote"))
            return _filled(json.loads(text), file.get_tensor)
    except SafetensorError as error:
        raise FormatError(explain(f"{path.name} cannot be read: {error}.", want="a whole file")) from error


def atomic_write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a new file beside `path`, and give it that name once it is on the disk.

    Raises:
        FileNotFoundError: if the folder is not there: one that was deleted is not made anew.
        OSError: as `fill` does; safetensors' own error for a full disk is turned into one.
    """
    from safetensors import SafetensorError

    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        try:
            fill(fresh)
        except SafetensorError as error:
            raise OSError(f"{path.name} could not be written: {error}") from error
        _flush(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    if os.name != "nt":  # where a folder cannot be opened
        _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    atomic_write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # of its own, as safetensors wants it
        return {_TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value) or {_TENSOR, _TUPLE} & set(value):
            raise TypeError(explain(f"a state got a dictionary by {list(value)[:3]}.", want="strings as keys"))
        return {key: _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, tensors) for item in value]
        return items if isinstance(value, list) else {_TUPLE: items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        explain(f"a state got a {type(value).__name__}.", want="plain values, lists, dictionaries, tensors")
    )


def _filled(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        return tensor(value[_TENSOR])
    if isinstance(value, dict) and _TUPLE in value:
        return tuple(_filled(item, tensor) for item in value[_TUPLE])
    if isinstance(value, dict):
        return {key: _filled(item, tensor) for key, item in value.items()}
    return [_filled(item, tensor) for item in value] if isinstance(value, list) else value


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_folder(target: Path, fill: Callable[[Path], None], *, ours: Iterable[str], overwrite: bool) -> Path:
    """Let `fill` write files into a new folder, and make that `target` once they are all on the disk.

    The new folder is a hidden sibling until then, so a failure, an interrupt or a full disk leaves neither half a
    folder nor a lost old one. Between moving the old one aside and the new one in, two renames, `target` is absent.

    Args:
        target: where the folder shall be; in one that is there.
        fill: writes plain files into the folder it is given.
        ours: names of the files that may be replaced. A target with anything else in it is left alone.
        overwrite: whether a target that is not empty may be replaced.

    Raises:
        FileExistsError: if the target is there and may not be replaced.
    """
    target = Path(os.path.abspath(target.expanduser()))
    _may_replace(target, set(ours), overwrite)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    fresh.mkdir()
    try:
        fill(fresh)
        for file in fresh.iterdir():
            _flush(file)
        _flush(fresh)
        _swap(fresh, target)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    _flush(target.parent)
    return target


def _may_replace(target: Path, ours: set[str], overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise FileExistsError(explain(f"{target} is a file or a link.", want="a new folder"))
    there = {entry.name for entry in target.iterdir()}
    if there - ours:
        raise FileExistsError(
            explain(
                f"{target} holds other things than an SAE: {', '.join(sorted(there - ours)[:8])}.",
                want="a new folder, since replacing this one would delete them",
            )
        )
    if there and not overwrite:
        raise FileExistsError(
            explain(f"{target} holds an SAE already.", fix=f"saewb.save_sae(sae, {str(target)!r}, overwrite=True)")
        )


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
