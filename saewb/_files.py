"""Atomic writes of files and folders, and state files (plain values and tensors)."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    """Flush a file or folder to disk; a file that its writer kept from everybody else gets the mode of new files."""
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    if os.name != "nt" and path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o600:
        path.chmod(_mode_of_new_files(path.parent))  # safetensors writes a temporary file of its own
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode_of_new_files(folder: Path) -> int:
    """Mode that the umask (or the folder's default access list) gives to a new file; os.umask would change it."""
    probe = folder / f".{secrets.token_hex(8)}.new"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


# -- reading ---------------------------------------------------------------------------------------------------------

MAX_TEXT = 16 << 20
"""Bytes of a JSON file of settings, at most."""
# Python's YAML parser takes a second for this many bytes; the configuration of a training run has about 5 kB.
_MAX_YAML, _MAX_YAML_DEPTH = 1 << 17, 32
HASHED_BYTES = 64 << 20
"""Bytes up to which a file of numbers is hashed when it is opened, in about 50 ms; larger ones only on request."""


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a text file of settings, which may come from anybody.

    Raises:
        FormatError: if it cannot be read, is not UTF-8, or has more bytes than `limit`.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > limit:
            raise FormatError(explain(f"{path.name} has {size} bytes.", want=f"a file of at most {limit}"))
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(explain(f"{path.name} cannot be read in {path.parent}.")) from error
    except UnicodeDecodeError as error:
        raise FormatError(explain(f"{path.name} in {path.parent} is no text: {error}.")) from error


def read_json(path: Path, limit: int = MAX_TEXT) -> Any:
    """Read a JSON file.

    Raises:
        FormatError: as `read_text`, or if it is not JSON, or is nested too deep.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            explain(f"{path.name} is not JSON: {error}.", want=f"the file whole, in {path.parent}")
        ) from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; tags that create objects are refused.

    Raises:
        FormatError: if it does not exist, is not such YAML, has references, is nested deep, or has more than 128 KiB.
    """
    import yaml

    try:
        text, depth = read_text(path, _MAX_YAML), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # refuses depth before any content is built
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_YAML_DEPTH or isinstance(event, yaml.AliasEvent):
                # Nested references are short, and exhaust memory when expanded.
                raise FormatError(explain(f"{path.name} has references, or is nested {_MAX_YAML_DEPTH} deep."))
        return yaml.safe_load(text)
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(explain(f"{path.name} is not YAML of plain values: {error}.")) from error


@contextmanager
def refuse_damage(what: str, want: str) -> Iterator[None]:
    """Convert errors that damaged or hostile content causes to a FormatError; those of saewb and the system pass.

    Args:
        what: that is read, the subject of the message.
        want: for the message.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise FormatError(explain(f"{what} is damaged, or not from saewb ({reason}).", want=want)) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, about 1 s per GB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: Path, expected: object, *, fix: str, verify: bool | None = None) -> None:
    """Check a file against the hash that was written with it.

    Args:
        path: the file.
        expected: its sha256; None for a file of before hashes were written.
        fix: for the message.
        verify: whether to check; None checks files of up to `HASHED_BYTES`.

    Raises:
        FormatError: if the file has another hash.
    """
    if expected is None or not (path.stat().st_size <= HASHED_BYTES if verify is None else verify):
        return
    if (got := sha256_of(path)) != expected:
        what = f"{path} is damaged: its sha256 is {got[:12]}..., not {str(expected)[:12]}..., as it was written."
        raise FormatError(explain(what, want="the file as it was written", fix=fix))
