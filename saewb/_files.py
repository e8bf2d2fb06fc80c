"""Atomic writes of files and folders, and state files (plain values and tensors)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain

_FORMAT = 2
"""Version of the state file; version 1, of saewb 0.1.0, is a safetensors file."""


def save_state(path: Path, state: Any) -> None:
    """Write a state with `torch.save`, atomically: on a full disk, or a kill, the previous file stays intact.

    Args:
        path: file to write or replace.
        state: None, booleans, numbers, strings, tensors; lists, tuples, dictionaries by strings of them. Tensors may be
            strided and on any device; they are read back contiguous and on the CPU.

    Raises:
        TypeError: for anything else.
        OSError: if the disk is full, or the folder cannot be written.
    """
    content = {"saewb_state": _FORMAT, "state": _on_cpu(state)}

    def fill(fresh: Path) -> None:
        try:
            torch.save(content, fresh)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{path.name} could not be written: {str(error).splitlines()[0]}") from error

    atomic_write(path, fill)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote, with `weights_only=True`: reading runs no code.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is not a state file, or is truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a state that saewb wrote"))
    want = "a whole file that this version of saewb wrote"
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, UnpicklingError, EOFError, ValueError) as error:  # all of them torch's own
            why = str(error).splitlines()[0]
            raise FormatError(explain(f"{path.name} cannot be read: {why}.", want=want)) from error
    if not isinstance(content, dict) or content.get("saewb_state") != _FORMAT:
        raise FormatError(explain(f"{path.name} is no state of saewb's.", want=want))
    return content["state"]


def _on_cpu(value: Any) -> Any:
    """The same state with tensors on the CPU, contiguous, each with a storage of its own size."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(explain(f"a state got a dictionary by {list(value)[:3]}.", want="strings as keys"))
        return {key: _on_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(item) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        explain(f"a state got a {type(value).__name__}.", want="plain values, lists, dictionaries, tensors")
    )


def atomic_write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file atomically: `fill` writes a temporary file beside it, which is flushed to disk and renamed.

    Raises:
        FileNotFoundError: if the folder does not exist: one that was deleted is not created again.
        OSError: as `fill` does, also where safetensors has an error of its own for a full disk.
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
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    atomic_write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=1))


def atomic_folder(target: Path, fill: Callable[[Path], None], *, ours: Iterable[str], overwrite: bool) -> Path:
    """Write a folder atomically: `fill` writes into a temporary one beside it, which is flushed to disk and renamed.

    The temporary folder is a hidden sibling until then, so a failure, an interrupt or a full disk leaves neither half a
    folder nor a lost old one. Between moving the old one aside and the new one in, two renames, `target` is absent.

    Args:
        target: the folder; its parent must exist.
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
