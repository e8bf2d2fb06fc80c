"""Atomic writes of files and folders, locks of folders, and state files (plain values and tensors).

Whatever moment a process is killed at, and whichever write fails, a path holds its old content or its new one:

- New content is written beside the path under a temporary name, flushed to disk, and renamed. The temporary name says
  which process wrote it; the next writer removes those of processes that are gone.
- Several paths, and folders, take more than one rename. A record of the renames is written first, and whoever opens one
  of the paths after a kill makes the renames that are left (`finish_replacing`).
- A lock of a folder (`FolderLock`) is the operating system's own, which releases it when the process ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from types import TracebackType
from typing import IO, Any, final

if os.name != "nt":
    import fcntl

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
    with fresh_state(path, state) as fresh:
        os.replace(fresh, path)
    _flush(path.parent)


def fresh_state(path: Path, state: Any) -> AbstractContextManager[Path]:
    """A state for a file, written under a temporary name beside it and flushed to disk; removed after the block.

    Raises:
        TypeError, OSError: as `save_state`.
    """
    content = {"saewb_state": _FORMAT, "state": _on_cpu(state)}

    def fill(fresh: Path) -> None:
        try:
            torch.save(content, fresh)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{path.name} could not be written: {str(error).splitlines()[0]}") from error

    return fresh_file(path, fill)


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
        except (
            *(RuntimeError, OSError, UnpicklingError, EOFError, ValueError),  # all of them torch's own
            *(LookupError, TypeError, AttributeError, ArithmeticError, MemoryError),  # of damaged files
        ) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
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


def absolute(path: str | Path) -> Path:
    """The path with "~" expanded and without "..", independent of later changes of the working directory.

    Raises:
        ValueError: for an empty text, which would be the working directory.
    """
    if path == "":
        raise ValueError(explain("got an empty path.", want="that of a folder", fix="'runs/first'"))
    return Path(os.path.abspath(Path(path).expanduser()))


# -- temporary names -------------------------------------------------------------------------------------------------

_TEMPORARY = re.compile(r"\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-)?[0-9a-f]{8}\.(?:new|old)")


def is_temporary(name: str) -> bool:
    """Whether a file name is one that this module gives to content it has not renamed yet."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_orphans(folder: Path, target: str = "") -> None:
    """Remove temporary files and folders of processes that are gone.

    Args:
        folder: where to look; not in its subfolders.
        target: name of the file or folder they were to become; "" for any.
    """
    with os.scandir(folder) as entries:
        orphans = [entry.path for entry in entries if entry.name.startswith(f".{target}") and _is_orphan(entry.name)]
    for path in orphans:
        _remove(Path(path))


def temporary_path(path: Path) -> Path:
    """A new temporary name beside a path."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.new")


@lru_cache(1)
def _machine() -> str:
    """Name of what process numbers are unique in: a machine, or a container on it."""
    import hashlib

    namespace = os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _is_orphan(name: str) -> bool:
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match["machine"] == _machine() and not _is_running(int(match["pid"]))


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        return True  # signal 0 would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    else:
        path.unlink(missing_ok=True)


# -- atomic writes ---------------------------------------------------------------------------------------------------


def atomic_write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file atomically: `fill` writes a temporary file beside it, which is flushed to disk and renamed.

    Raises:
        FileNotFoundError: if the folder does not exist: one that was deleted is not created again.
        OSError: as `fill` does, also where safetensors has an error of its own for a full disk.
    """
    with fresh_file(path, fill) as fresh:
        os.replace(fresh, path)
    _flush(path.parent)


@contextmanager
def fresh_file(path: Path, fill: Callable[[Path], object]) -> Iterator[Path]:
    """Content for a file, written under a temporary name beside it and flushed to disk; removed after the block.

    Raises:
        OSError: as `atomic_write`.
    """
    from safetensors import SafetensorError

    remove_orphans(path.parent, path.name)
    fresh = temporary_path(path)
    try:
        try:
            fill(fresh)
        except SafetensorError as error:
            raise OSError(f"{path.name} could not be written: {error}") from error
        _flush(fresh)
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    atomic_write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=1))


def atomic_folder(target: Path, fill: Callable[[Path], None], *, ours: Iterable[str], overwrite: bool) -> Path:
    """Write a folder atomically: `fill` writes into a temporary one beside it, which is flushed to disk and renamed.

    The temporary folder is a hidden sibling until then, so a failure, an interrupt or a full disk leaves neither half a
    folder nor a lost old one. Replacing an old one takes two renames: killed between them, `finish_replacing` makes the
    second.

    Args:
        target: the folder; its parent must exist.
        fill: writes plain files into the folder it is given.
        ours: names of the files that may be replaced. A target with anything else in it is left alone.
        overwrite: whether a target that is not empty may be replaced.

    Raises:
        FileExistsError: if the target is there and may not be replaced.
    """
    target = absolute(target)
    finish_replacing(target)
    check_replaceable(target, ours, overwrite)
    remove_orphans(target.parent, target.name)
    fresh = temporary_path(target)
    try:
        fresh.mkdir()
        fill(fresh)
        for file in fresh.iterdir():
            _flush(file)
        _flush(fresh)
        if os.path.lexists(target):
            replace_together(target, {target: fresh})
        else:
            fresh.rename(target)
            _flush(target.parent)
    finally:
        discard(target, [fresh])
    return target


def check_replaceable(target: Path, ours: Iterable[str], overwrite: bool) -> None:
    """Raise a FileExistsError if `target` is there and `atomic_folder` would not replace it."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise FileExistsError(explain(f"{target} is a file or a link.", want="a new folder"))
    there = {entry.name for entry in target.iterdir() if not is_temporary(entry.name)}
    if strangers := there - set(ours):
        raise FileExistsError(
            explain(
                f"{target} holds other things than an SAE: {', '.join(sorted(strangers)[:8])}.",
                want="a new folder, since replacing this one would delete them",
            )
        )
    if there and not overwrite:
        raise FileExistsError(
            explain(f"{target} holds an SAE already.", fix=f"saewb.save_sae(sae, {str(target)!r}, overwrite=True)")
        )


# -- several renames as one ------------------------------------------------------------------------------------------


def replace_together(anchor: Path, fresh: Mapping[Path, Path]) -> None:
    """Replace files and folders, all or none: killed in between, `finish_replacing(anchor)` replaces the others.

    Args:
        anchor: one of the paths, under whose name the record of the renames is written.
        fresh: the new content of each path, flushed to disk, below the same folder as `anchor`.

    Raises:
        OSError: before the record is written: nothing is replaced then. After it the rest is left for later.
    """
    finish_replacing(anchor)
    record, root = _record(anchor), anchor.parent
    renames = {os.path.relpath(path, root): os.path.relpath(new, root) for path, new in fresh.items()}
    content = json.dumps(renames)
    with fresh_file(record, lambda file: file.write_text(content, encoding="utf-8")) as unnamed, _locked(unnamed):
        os.replace(unnamed, record)  # from here on all of them are replaced, now or by whoever comes next
        try:
            _rename_all(record)
        except BaseException:  # an interrupt: make the renames that are left, then pass it on
            _rename_all(record)
            raise


def discard(anchor: Path, fresh: Iterable[Path]) -> None:
    """Remove new content, unless a `replace_together` that failed half way is to use it yet."""
    if not _record(anchor).is_file():
        for path in fresh:
            _remove(path)


def finish_replacing(anchor: Path) -> None:
    """Make the renames of a `replace_together` that was killed; one that is going on is waited for.

    In a folder that may only be read, what is there stays: the content before, whole.
    """
    record = _record(anchor)
    while record.is_file():
        try:
            with _locked(record) as is_same:
                if is_same():
                    _rename_all(record)
        except FileNotFoundError:  # another process has finished it
            continue
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return


def _record(anchor: Path) -> Path:
    return anchor.with_name(f".{anchor.name}.replacing")


@contextmanager
def _locked(record: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a record; yields a function that says whether that file is still the record."""
    with record.open("r+b") as file:
        if os.name != "nt":
            _flock(file, fcntl.LOCK_EX)
        yield lambda: record.is_file() and os.path.samestat(os.fstat(file.fileno()), record.stat())


def _rename_all(record: Path) -> None:
    """Make the renames of a record that are left, whatever state a kill left, and remove the record."""
    if not record.is_file():
        return
    for path, fresh in _read_record(record):
        if os.path.lexists(fresh):
            if fresh.is_dir() and os.path.lexists(path):
                path.rename(fresh.with_suffix(".old"))
            os.replace(fresh, path)
            _flush(path.parent)
        _remove(fresh.with_suffix(".old"))
    record.unlink(missing_ok=True)
    _flush(record.parent)


def _read_record(record: Path) -> list[tuple[Path, Path]]:
    """Pairs of a path and its new content.

    Raises:
        FormatError: if it is not a record, or would rename something outside of its folder: a stranger wrote it.
    """
    root = absolute(record.parent)
    try:
        pairs = [
            (absolute(root / name), absolute(root / fresh)) for name, fresh in json.loads(record.read_text()).items()
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(explain(f"{record} is no record of renames: {error!r}.", want="none, or ours")) from error
    for path, fresh in pairs:
        if not (_is_inside(path, root) and _is_inside(fresh, root) and is_temporary(fresh.name)):
            raise FormatError(explain(f"{record} renames {fresh} to {path}.", want="files inside its folder"))
    return pairs


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a path is below a folder, and no link on the way leads out of it."""
    if path == root or not path.is_relative_to(root):
        return False
    return Path(os.path.realpath(path.parent)) == Path(os.path.realpath(root)) / path.parent.relative_to(root)


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


# -- locks of folders ------------------------------------------------------------------------------------------------

_LOCK = ".lock"


@final
class FolderLock:
    """Lock of a folder for one writer, of this process or another, until `release()` or the end of the process.

    On Windows, and where the file system has no locks, it excludes nobody.

    Args:
        folder: exists.
        what: what is going on while it is held, for the error: "a run is going on".
        fix: what to do about it.
        wait_s: how long to wait for it.

    Raises:
        RuntimeError: if another writer holds it.
    """

    def __init__(self, folder: Path, what: str, *, fix: str = "", wait_s: float = 0.1) -> None:
        self._path, self._file = folder / _LOCK, None
        if os.name == "nt":
            return
        until = time.monotonic() + wait_s
        while (file := _open_lock(self._path)) is None:
            if time.monotonic() > until:  # `is_locked` of another process holds it for a moment
                want = "another folder, or the end of that"
                raise RuntimeError(explain(f"{what} in {str(folder)!r}.", want=want, fix=fix))
            time.sleep(0.01)
        self._file: IO[bytes] | None = file
        _held.add(self)

    def release(self) -> None:
        """Release it and remove its file; harmless a second time."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if self._path.is_file() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                self._path.unlink(missing_ok=True)
        except OSError as error:  # the folder cannot be written any more; the lock ends all the same
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
                raise
        finally:
            file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _leave_to_parent(self) -> None:
        """In a forked child: else the lock would last until the child ends too."""
        if self._file is not None:
            self._file.close()
            self._file = None


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()
if os.name != "nt":
    os.register_at_fork(after_in_child=lambda: [lock._leave_to_parent() for lock in list(_held)])


def is_locked(folder: Path) -> bool | None:
    """Whether a writer holds the lock of a folder; None where that is unknown."""
    if os.name == "nt":
        return None
    try:
        with (folder / _LOCK).open("rb") as file:
            return not _flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False


def _open_lock(path: Path) -> IO[bytes] | None:
    """The locked file of a lock; None while another holds it."""
    file = path.open("ab")
    try:
        # The holder before may have removed the file after it was opened here.
        if _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _flock(file: IO[bytes], how: int) -> bool:
    """Lock an open file; False if another holds it. True too where the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK):
            raise
    return True


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
        content = json.loads(text)
        if "\\ud" in text.lower():  # half of a character beyond U+FFFF, which no file can hold, may be escaped in JSON
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except (ValueError, RecursionError) as error:
        raise FormatError(explain(f"{path.name} in {str(path.parent)!r} is not JSON: {error}.")) from error


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
