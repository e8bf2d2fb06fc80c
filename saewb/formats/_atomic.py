"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from saewb.errors import explain


def write_folder(target: Path, fill: Callable[[Path], None], *, ours: Iterable[str], overwrite: bool) -> Path:
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
