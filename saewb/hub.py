"""Hugging Face Hub: look up model names, inspect the local cache, download repository files with checked hashes.

`ask_hub` looks up a model's name in one request. (transformers tries an unreachable hub six times for each of several
files, 23 s per name.) `snapshot` gets files of a repository:

1. One request lists the repository: commit, names, sizes, hashes. Without an answer only the local cache is used.
2. huggingface_hub downloads files that are not in its cache, several at a time, retries a broken connection a few
   times, and shows its progress bar. A partial file is never read from the cache, and from version 2 on it is deleted.
3. huggingface_hub does not compare hashes, so new files are hashed here (about 1 s per GB).
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
"""Called with (bytes downloaded, bytes in all); raises to cancel."""
_LOGIN = "hf auth login    # in a shell"
LARGE = 50_000_000
"""Bytes from which on a download prints its size before it begins."""


@dataclass(frozen=True)
class HubAnswer:
    """Outcome of one request for a file of a repository."""

    state: Literal["there", "missing", "closed", "unreachable"]
    """State of the file; "closed": gated, and this machine's token has no access."""
    detail: str = ""
    """First line of the error."""


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
    """All files of the repository; those in the cache if the hub does not answer."""


def ask_hub(repo: str, file: str = "config.json", timeout: float = 10.0) -> HubAnswer:
    """Look up whether a model repository has a file that this machine may read.

    A private repository is "missing" to those who may not see it. HF_HUB_OFFLINE=1 makes every answer "unreachable".

    Args:
        repo: "name" or "owner/name".
        file: name of a file that it must have.
        timeout: seconds to wait.

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
    return cached_file(repo, file) is not None


def cached_file(repo: str, file: str) -> Path | None:
    """Path of a file of a model repository in the local hub cache; None if it is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE)
    return Path(path) if isinstance(path, str) else None


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
    """Restrict huggingface_hub and transformers to the cache inside the block, as under HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def first_line(error: BaseException) -> str:
    """First non-empty line of an error's text, or the name of its type."""
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
    """Get files of a repository; those that are not in the local cache are downloaded and checked.

    Args:
        repo: "owner/name".
        path: folder or file inside the repository; "" for its root.
        patterns: glob patterns of the files to get.
        revision: branch, tag or commit; None means "main".
        force_download: download cached files again.
        token: access token of the hub; None means that of the login.
        call: line of code to paste, for error texts.
        is_complete: whether the cache has enough at `path`, if the hub does not answer.
        n_bytes: approximate size of the download, for the error text without a network.
        progress: called with (bytes downloaded, bytes in all) by the download threads, which then use plain HTTP.

    Returns:
        The files; empty if none of the repository's files match.

    Raises:
        FileNotFoundError: if the hub refuses, or cannot be reached and the cache does not have enough.
        Exception: what `progress` raises, unless an OSError: it cancels, and no file counts as complete.
        ConnectionError: if the connection broke; complete files stay, and the next call downloads the others.
        OSError: if a file does not have the hash on the hub (it is deleted from the cache), or if the disk is full.
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
                    fix="saewb.load_sae('tiny')",
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
    """Format a number of bytes with a unit.

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
    cached = {name: blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None for name, blob in blobs.items()}
    return Snapshot(root, commit, {name: hashes.get(name) or cached[name] for name in names}, tuple(all_names))


def _cached_root(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """Folder of this revision in the local cache; None if there is none. Uses no network."""
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
    """Turn refusals of the hub inside the block into FileNotFoundErrors with a fix; other errors pass."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:  # before its base class RepositoryNotFoundError
        what = f"{repo} on the hub is there for those only who accepted its terms."
        want = f"accept them at the repository's page, log in, and call it again ({type(error).__name__})"
        raise FileNotFoundError(explain(what, want=want, fix=_LOGIN)) from error
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
        raise FileNotFoundError(
            explain(what, want="the token of a login that may, or token=...", fix=_LOGIN)
        ) from error


@contextlib.contextmanager
def _explain_failures(repo: str, n_bytes: int, call: str) -> Iterator[None]:
    """Turn a broken connection inside the block into a ConnectionError, and disk errors into an OSError, with a fix."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError  # raised when the hub stops answering

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
    """Download without Xet inside the block: its thread swallows what a callback raises, so nothing could be canceled.

    The setting belongs to the process: of several downloads at once the last one restores it.
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
            _http_settings.pop()  # the first one stays: later ones read True


def _byte_counter(progress: Progress, total: int) -> type:
    """Create a hidden progress bar for huggingface_hub that calls `progress` (its other bars count files)."""
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
    """Connection errors, including those of huggingface_hub's HTTP library (requests or httpx)."""
    from huggingface_hub.errors import HfHubHTTPError

    return (ConnectionError, TimeoutError, *(base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"))


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    if _status(error) != 429:
        return first_line(error).rstrip(".")
    wait = error.response.headers.get("Retry-After")  # type: ignore[attr-defined]
    return "it answers too many requests for now (HTTP 429)" + (f"; try again in {wait} s" if wait else "")
