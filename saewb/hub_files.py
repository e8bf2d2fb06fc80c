"""Files of a repository on the hub, through huggingface_hub: what there is, how large, fetched once, checked, cached.

1. One request lists the repository: commit, names, sizes, hashes. Where the hub does not answer, its cache is all.
2. huggingface_hub fetches what is not in its cache, several files at a time, takes up a broken connection a few times,
   and shows its progress bar. A file that came in part only is in its cache under no name that is read, and from
   version 2 on it is thrown away. Nothing here downloads.
3. It does not compare hashes, so what was fetched just now is hashed here (about 1 s for each GB).
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saewb.errors import explain
from saewb.hub import first_line

Progress = Callable[[int, int], None]  # bytes that came, bytes in all; raises to cancel
LARGE = 50_000_000  # bytes; from here on a download says how large it is before it begins


@dataclass(frozen=True)
class Listing:
    """What a repository has at one commit."""

    commit: str
    sizes: Mapping[str, int]  # bytes of each file, by its name
    hashes: Mapping[str, str]  # sha256 of each large file (those the hub keeps in its large file storage)

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """The names that fit any of these patterns, sorted."""
        patterns = list(patterns)
        return sorted(name for name in self.sizes if any(fnmatch.fnmatchcase(name, one) for one in patterns))


@dataclass(frozen=True)
class Unreachable:
    """Why the hub gave no listing."""

    reason: str


def listed(repo: str, revision: str | None, token: str | None, call: str) -> Listing | Unreachable:
    """What the hub has, in one request of at most ten seconds.

    Args:
        repo: "owner/name".
        revision: branch, tag or commit; None means "main".
        token: of the hub; None means the one logged in with.
        call: the line to paste, for errors.

    Raises:
        FileNotFoundError: if the hub says that there is no such repository or revision, or that it is closed to us.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return Unreachable("HF_HUB_OFFLINE is set")
    try:
        with refusals(repo, revision, call):
            info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except _network() as error:
        return Unreachable(_status(error))
    files = info.siblings or []
    hashes = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
    return Listing(info.sha or "", {file.rfilename: file.size or 0 for file in files}, hashes)


def fetched(
    repo: str,
    listing: Listing,
    names: list[str],
    *,
    revision: str | None,
    force_download: bool,
    token: str | None,
    call: str,
    progress: Progress | None = None,
) -> Path:
    """The folder in the hub's cache with these files of the repository, those that were not there fetched and checked.

    Args:
        repo: "owner/name".
        listing: of the same revision.
        names: of the files.
        revision: branch, tag or commit; None means "main".
        force_download: fetch again what is there.
        token: of the hub; None means the one logged in with.
        call: the line to paste, for errors.
        progress: called with (bytes that came, bytes in all) while files come, from the threads that fetch them; they
            then come over plain HTTP.

    Raises:
        FileNotFoundError: if the hub refuses.
        Exception: what `progress` raises, if that is no OSError: it cancels, and no file is taken for whole.
        ConnectionError: if the connection broke; files that came whole are kept, and the next call fetches the others.
        OSError: if a file is not what the hub says (it is then taken out of the cache), or if the disk is full.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError  # how it says that the hub stopped answering

    new = [name for name in names if force_download or not _cached(repo, name, listing.commit)]
    missing = sum(listing.sizes[name] for name in new)
    if missing >= LARGE:
        print(f"{repo}: {size(missing)} to download ({', '.join(new[:3])}{', ...' * (len(new) > 3)})", file=sys.stderr)
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    how: dict[str, Any] = {} if progress is None else {"tqdm_class": _told(progress, missing)}
    try:
        with refusals(repo, revision, call), contextlib.nullcontext() if progress is None else _PLAIN.http():
            root = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, force_download=force_download, token=token, **how
            )
    except (LocalEntryNotFoundError, *_network()) as error:
        raise ConnectionError(
            explain(
                f"{repo}: the download of {size(missing)} broke off: {_status(error)}.",
                want="to call it again: the files that came whole are kept, the others are fetched",
                fix=call,
            )
        ) from error
    except FileNotFoundError:
        raise
    except OSError as error:  # a file of another length than the hub says; a full disk; a cache that is not ours
        raise OSError(
            explain(
                f"{repo}: the download of {size(missing)} failed: {first_line(error).rstrip('.')}.",
                want=f"room for it and leave to write in {constants.HF_HUB_CACHE}; then call it again",
                fix=call,
            )
        ) from error
    _check(Path(root), {name: listing.hashes[name] for name in new if name in listing.hashes}, call)
    return Path(root)


def in_cache(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The folder in the hub's cache with what there is of this revision; None if there is nothing. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except OSError:  # newer ones raise others of that family for a snapshot that lacks files
        return None


def hashes_of(root: Path, names: Iterable[str], listing: Listing | None) -> dict[str, str | None]:
    """The sha256 of each file as the hub gave it: in the listing, or as the name of the blob in its cache."""
    found = {}
    for name in names:
        blob = (root / name).resolve().name
        known = listing.hashes.get(name) if listing is not None else None
        found[name] = known or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None)
    return found


def size(n_bytes: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(302_130_176), size(4_831_838_208), size(950)
        ('302.1 MB', '4.8 GB', '950 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} bytes"


@contextlib.contextmanager
def refusals(repo: str, revision: str | None, call: str) -> Iterator[None]:
    """Inside, what the hub refuses for good is a FileNotFoundError that says what to do; anything else passes."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            explain(
                f"{repo} on the hub is there for those only who accepted its terms.",
                want=f"accept them at the repository's page, then log in: hf auth login ({type(error).__name__})",
                fix=call,
            )
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(explain(f"{repo} on the hub has no revision {revision!r}.", fix=call)) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            explain(
                f"no SAE at {repo!r}: there is no such folder in {Path.cwd()} and no such repository on the hub "
                "(or it is private and you are not logged in).",
                want="'tiny', a folder, a release of saewb.catalogue(), or 'owner/name' on the hub",
            )
        ) from error
    except HfHubHTTPError as error:
        if _code(error) in (401, 403):
            raise FileNotFoundError(
                explain(
                    f"the hub does not let us read {repo} (HTTP {_code(error)}).",
                    want="a token that may: hf auth login, or token=...",
                    fix=call,
                )
            ) from error
        raise


class _PlainHttp:
    """huggingface_hub without Xet, whose thread swallows what a callback raises, so that nothing could be cancelled.

    Its setting is the process's: counted, so that of several downloads at once the last one puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    @contextlib.contextmanager
    def http(self) -> Iterator[None]:
        """Inside, downloads go over plain HTTP."""
        from huggingface_hub import constants

        with self._lock:
            if self._inside == 0:
                self._before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    constants.HF_HUB_DISABLE_XET = self._before


_PLAIN = _PlainHttp()


def _told(progress: Progress, total: int) -> type:
    """A bar for huggingface_hub that shows nothing and tells `progress` of bytes (its other bars count files)."""
    from tqdm.auto import tqdm

    class Told(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.came, self.counts_bytes = 0, kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.came += int(n or 0)
            if self.counts_bytes:
                progress(min(self.came, total), total)

    return Told


def _network() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Among what it stands on is the error of whichever HTTP library this huggingface_hub uses (requests, httpx, ...).
    below = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"]
    return (ConnectionError, TimeoutError, *below)


def _code(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if _code(error) == 429:
        wait = response.headers.get("Retry-After") if response is not None else None
        return "it answers too many requests for now (HTTP 429)" + (f"; try again in {wait} s" if wait else "")
    return first_line(error).rstrip(".")


def _cached(repo: str, name: str, commit: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE, revision=commit)
    return isinstance(found, str)


def _check(root: Path, hashes: Mapping[str, str], call: str) -> None:
    for name, want in hashes.items():
        path = root / name
        got = _sha256(path)
        if got != want:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise OSError(
                explain(
                    f"{name} came damaged: its sha256 is {got[:12]}..., the hub's {want[:12]}... It was thrown away.",
                    want="to call it again; if it stays so, the repository itself is damaged",
                    fix=call,
                )
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
