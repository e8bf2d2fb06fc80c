"""The Hugging Face Hub: whether a name exists there, what its cache has, and downloads that are checked.

`ask_hub` says of a model's name whether it exists, in one request. (transformers tries an unreachable hub six times for
each of several files, 23 s per name.) `snapshot` has files of a repository:

1. One request lists the repository: commit, names, sizes, hashes. Where the hub does not answer, its cache is all.
2. huggingface_hub fetches what is not in its cache, several files at a time, takes up a broken connection a few times,
   and shows its progress bar. A file that came in part only is in its cache under no name that is read, and from
   version 2 on it is thrown away. Nothing here downloads.
3. It does not compare hashes, so what was fetched just now is hashed here (about 1 s for each GB).
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saewb.errors import explain

Progress = Callable[[int, int], None]
"""Called with (bytes fetched, bytes in all); raises to cancel."""
LARGE = 50_000_000
"""Bytes; from here on a download says how large it is before it begins."""


@dataclass(frozen=True)
class HubAnswer:
    """The outcome of one request for a repository's file."""

    state: Literal["there", "missing", "closed", "unreachable"]
    """What is there; "closed": gated, and our token does not open it."""
    detail: str = ""
    """The error's first line."""


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository in the hub's cache, at one commit."""

    root: Path
    """Folder in the cache that stands for the repository."""
    commit: str
    """Commit hash."""
    hashes: Mapping[str, str | None]
    """sha256 of each file that matches, by its name; None for small ones, which the hub keeps in git."""
    names: tuple[str, ...]
    """All files of the repository; those in the cache where the hub does not answer."""


def ask_hub(repo: str, file: str = "config.json", timeout: float = 10.0) -> HubAnswer:
    """Whether a model repository has a file that this machine may read.

    A private repository is "missing" to those who may not see it. HF_HUB_OFFLINE=1 makes every answer "unreachable".

    Args:
        repo: "name" or "owner/name".
        file: what must be in it.
        timeout: seconds.

    References:
        The hub's error header X-Error-Code, as huggingface_hub reads it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return HubAnswer("unreachable", "HF_HUB_OFFLINE is set")
    try:
        get_hf_file_metadata(hf_hub_url(repo, file), timeout=timeout)
    except GatedRepoError as error:  # before its base class RepositoryNotFoundError
        return HubAnswer("closed", first_line(error))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        return HubAnswer("missing", first_line(error))
    except (OSError, *_network_errors()) as error:
        return HubAnswer("unreachable", first_line(error))
    return HubAnswer("there")


def is_cached(repo: str, file: str = "config.json") -> bool:
    """Whether the local hub cache has this file of a model repository."""
    from huggingface_hub import constants, try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE), str)


def cached_models() -> list[str]:
    """Names of the models in the local hub cache, sorted."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(repo.repo_id for repo in repos if repo.repo_type == "model")


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Inside, huggingface_hub and transformers use the cache only, as under HF_HUB_OFFLINE=1. Put back as it was."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def first_line(error: BaseException) -> str:
    """An error's first line that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def snapshot(
    repo: str,
    path: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | None = None,
    call: str = "",
    is_complete: Callable[[Path], bool] = Path.exists,
    n_bytes: int | None = None,
    progress: Progress | None = None,
) -> Snapshot:
    """Files of a repository: those that are not in the hub's cache are fetched and checked.

    Args:
        repo: "owner/name".
        path: folder or file inside it that is wanted; "" for its root.
        patterns: of the files to have.
        revision: branch, tag or commit; None means "main".
        force_download: fetch again what is there.
        token: of the hub; None means the one logged in with.
        call: the line to paste, for errors.
        is_complete: whether the cache has enough of what is at `path`, where the hub does not answer.
        n_bytes: about how large a download is, for the error where there is no network.
        progress: called with (bytes fetched, bytes in all) by the threads that fetch; files come over plain HTTP then.

    Returns:
        The files; without any, if the repository has none that match.

    Raises:
        FileNotFoundError: if the hub refuses, or cannot be reached and the cache has not enough.
        Exception: what `progress` raises, if that is no OSError: it cancels, and no file is taken for whole.
        ConnectionError: if the connection broke; files that came whole are kept, and the next call fetches the others.
        OSError: if a file is not what the hub says (it is then taken out of the cache), or if the disk is full.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with _explain_refusals(repo, revision, call):
            info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except _network_errors() as error:
        root = _cached_root(repo, revision, patterns)
        if root is None or not is_complete(root / path):
            what = f"{repo}, folder {path!r}," if path else repo
            size = "" if n_bytes is None else f", {format_bytes(n_bytes)}"
            raise FileNotFoundError(
                explain(
                    f"{what} is not in the hub's cache on this machine, and the hub cannot be reached "
                    f"({_reason(error)}).",
                    want=f"a network connection once{size} (and no HF_HUB_OFFLINE); 'tiny' and folders need none",
                    fix=call,
                )
            ) from error
        cached = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*")) if file.is_file()]
        return _snapshot(root, root.name, _matching(cached, patterns), cached, {})
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
    names, commit = _matching(sizes, patterns), info.sha or ""
    if not names:
        return Snapshot(Path(), commit, {}, tuple(sizes))
    new = {name: sizes[name] for name in names}
    if not force_download:
        cached = {
            name: try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE, revision=commit) for name in new
        }
        new = {name: size for name, size in new.items() if not isinstance(cached[name], str)}
    with _explain_refusals(repo, revision, call), _explain_failures(repo, sum(new.values()), call):
        root = _download(repo, revision, names, new, force_download, token, progress)
    for name in new:
        if name in hashes:
            _check_hash(root / name, name, hashes[name], call)
    return _snapshot(root, commit, names, sizes, hashes)


def format_bytes(n_bytes: float) -> str:
    """A number of bytes for people.

    Example:
        >>> format_bytes(302_130_176), format_bytes(4_831_838_208), format_bytes(950)
        ('302.1 MB', '4.8 GB', '950 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} bytes"


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _snapshot(
    root: Path, commit: str, names: list[str], all_names: Iterable[str], hashes: Mapping[str, str]
) -> Snapshot:
    blobs = {name: (root / name).resolve().name for name in names}  # the cache names large files by their sha256
    known = {name: blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None for name, blob in blobs.items()}
    return Snapshot(root, commit, {name: hashes.get(name) or known[name] for name in names}, tuple(all_names))


def _cached_root(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder in the hub's cache with what there is of this revision; None if there is nothing. No network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except OSError:  # LocalEntryNotFoundError, and others of that family for a snapshot that lacks files
        return None


def _download(
    repo: str,
    revision: str | None,
    names: list[str],
    new: Mapping[str, int],
    force_download: bool,
    token: str | None,
    progress: Progress | None,
) -> Path:
    from huggingface_hub import snapshot_download

    total, first = sum(new.values()), ", ".join(list(new)[:3])
    if total >= LARGE:
        print(f"{repo}: {format_bytes(total)} to download ({first}{', ...' * (len(new) > 3)})", file=sys.stderr)
    options: dict[str, Any] = {} if progress is None else {"tqdm_class": _byte_counter(progress, total)}
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    with contextlib.nullcontext() if progress is None else _plain_http():
        root = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, force_download=force_download, token=token, **options
        )
    return Path(root)


def _check_hash(path: Path, name: str, expected: str, call: str) -> None:
    from huggingface_hub.utils.sha import sha_fileobj

    with path.open("rb") as file:
        sha256 = sha_fileobj(file).hex()
    if sha256 == expected:
        return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise OSError(
        explain(
            f"{name} came damaged: its sha256 is {sha256[:12]}..., the hub's {expected[:12]}... It was thrown away.",
            want="to call it again; if it stays so, the repository itself is damaged",
            fix=call,
        )
    )


@contextlib.contextmanager
def _explain_refusals(repo: str, revision: str | None, call: str) -> Iterator[None]:
    """Inside, what the hub refuses for good is a FileNotFoundError that says what to do; anything else passes."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:  # before its base class RepositoryNotFoundError
        what = f"{repo} on the hub is there for those only who accepted its terms."
        want = f"accept them at the repository's page, then log in: hf auth login ({type(error).__name__})"
        raise FileNotFoundError(explain(what, want=want, fix=call)) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(explain(f"{repo} on the hub has no revision {revision!r}.", fix=call)) from error
    except RepositoryNotFoundError as error:
        what = f"no SAE at {repo!r}: there is no such folder in {Path.cwd()} and no such repository on the hub"
        want = "'tiny', a folder, a release of saewb.catalogue(), or 'owner/name' on the hub"
        raise FileNotFoundError(explain(f"{what} (or it is private and you are not logged in).", want=want)) from error
    except HfHubHTTPError as error:
        if _status(error) not in (401, 403):
            raise
        what = f"the hub does not let us read {repo} (HTTP {_status(error)})."
        want = "a token that may: hf auth login, or token=..."
        raise FileNotFoundError(explain(what, want=want, fix=call)) from error


@contextlib.contextmanager
def _explain_failures(repo: str, n_bytes: int, call: str) -> Iterator[None]:
    """Inside, a broken connection is a ConnectionError, and a disk that fails an OSError; both say what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError  # how it says that the hub stopped answering

    try:
        yield
    except (LocalEntryNotFoundError, *_network_errors()) as error:
        what = f"{repo}: the download of {format_bytes(n_bytes)} broke off: {_reason(error)}."
        want = "to call it again: the files that came whole are kept, the others are fetched"
        raise ConnectionError(explain(what, want=want, fix=call)) from error
    except OSError as error:  # a file of another length than the hub says; a full disk; a cache that is not ours
        what = f"{repo}: the download of {format_bytes(n_bytes)} failed: {first_line(error).rstrip('.')}."
        want = f"room for it and leave to write in {constants.HF_HUB_CACHE}; then call it again"
        raise OSError(explain(what, want=want, fix=call)) from error


_http_lock, _http_settings = threading.Lock(), []


@contextlib.contextmanager
def _plain_http() -> Iterator[None]:
    """Inside, downloads do without Xet, whose thread swallows what a callback raises: nothing could be canceled.

    The setting is the process's: of several downloads at once the last one puts it back.
    """
    from huggingface_hub import constants

    with _http_lock:
        _http_settings.append(constants.HF_HUB_DISABLE_XET)
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        with _http_lock:
            if len(_http_settings) == 1:
                constants.HF_HUB_DISABLE_XET = _http_settings[0]
            _http_settings.pop()  # the first one stays: whoever came later has seen True


def _byte_counter(progress: Progress, total: int) -> type:
    """A bar for huggingface_hub that shows nothing and calls `progress` (its other bars count files)."""
    from tqdm.auto import tqdm

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.n_bytes, self.counts_bytes = 0, kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n_bytes += int(n or 0)
            if self.counts_bytes:
                progress(min(self.n_bytes, total), total)

    return ByteCounter


def _network_errors() -> tuple[type[BaseException], ...]:
    """Errors of a connection, of the HTTP library that huggingface_hub stands on (requests, httpx) too."""
    from huggingface_hub.errors import HfHubHTTPError

    return (ConnectionError, TimeoutError, *(base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"))


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    if _status(error) != 429:
        return first_line(error).rstrip(".")
    wait = error.response.headers.get("Retry-After")  # type: ignore[attr-defined]
    return "it answers too many requests for now (HTTP 429)" + (f"; try again in {wait} s" if wait else "")
