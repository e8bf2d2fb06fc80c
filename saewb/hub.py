"""What the hub says about a name, quickly and in four words; what is here without it.

transformers tries an unreachable hub six times for each of several files (23 s per name); here one request decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HubAnswer:
    """What one request for a repository's file found out."""

    state: Literal["there", "missing", "closed", "unreachable"]  # closed: gated, and our token does not open it
    detail: str = ""  # the error's first line


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
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return HubAnswer("unreachable", "HF_HUB_OFFLINE is set")
    # The bases are the errors of whichever HTTP library this huggingface_hub stands on (requests, httpx, ...).
    network = (OSError, *HfHubHTTPError.__bases__)
    try:
        get_hf_file_metadata(hf_hub_url(repo, file), timeout=timeout)
    except GatedRepoError as error:  # before its base class RepositoryNotFoundError
        return HubAnswer("closed", first_line(error))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        return HubAnswer("missing", first_line(error))
    except network as error:
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
