"""SAEs from a folder, from the hub or from the package itself; and back. With models.py, all that uses the network.

1. "tiny" is the SAE inside the package.
2. An existing folder is read as it lies there; `id` is a folder in it.
3. "owner/name" is a repository of the Hugging Face hub; `id` is a folder in it. What is in its cache is not fetched
   again, and is all there is without a network.
"""

from __future__ import annotations

import os
import re
import tempfile
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import NoReturn

import torch

from saewb.errors import explain, near
from saewb.formats import FORMATS, Facts, read, saelens
from saewb.hub import ask_hub
from saewb.pursuit import PursuitSAE
from saewb.sae import SAE
from saewb.temporal import TemporalSAE

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def load_sae(
    source: str | Path,
    id: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    scaling_factor: float | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> SAE | PursuitSAE | TemporalSAE:
    """An SAE by name, folder or hub repository; its layout is recognised by its files.

    Args:
        source: "tiny", a folder, or "owner/name" on the hub. A folder of that name, if there is one, comes first.
        id: the folder inside `source`, e.g. "blocks.8.hook_resid_pre"; None means `source` itself.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.
        scaling_factor: what training inputs were multiplied with, for files that need it and do not have it.
        revision: branch, tag or commit of the hub repository; None means "main".
        force_download: fetch again what is in the hub's cache.
    Returns:
        An SAE; a PursuitSAE or TemporalSAE for those two architectures.
    Raises:
        FileNotFoundError: if there is no such folder or repository, or it cannot be reached and is not in the cache.
        FormatError: if the files are of no known layout, or not what their layout promises.
    Example:
        >>> import tempfile
        >>> from saewb.sae import SAE, SAEConfig
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = save_sae(SAE(SAEConfig(d_in=4, d_sae=9)), Path(place) / "mine")
        ...     load_sae(folder)
        SAE(relu, 4 -> 9 latents, float32 on cpu)
    """
    if id is not None:
        _inside(id)
    folder = _local(source, id)
    if folder is None:
        folder = _from_hub(str(source), id, revision, force_download)
    return read(folder, Facts(scaling_factor=scaling_factor), dtype=dtype, device=device)


def save_sae(sae: SAE | PursuitSAE | TemporalSAE, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an SAE into a folder, in the SAELens layout: all of it or nothing. `load_sae(folder)` reads it back.

    Args:
        sae: any of saewb's classes; a b_pre of its own is folded into b_enc.
        folder: a new or empty one; parents are made.
        overwrite: replace an SAE that is there. A folder with any other files in it is never replaced.
    Returns:
        The folder's full path.
    Raises:
        FileExistsError: if there is something that may not be replaced.
        ValueError: if the layout cannot express this SAE.
    """
    return saelens.write(sae, Path(folder), overwrite=overwrite)


def push_to_hub(
    sae: SAE | PursuitSAE | TemporalSAE,
    repo_id: str,
    id: str | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Put an SAE into a repository of the hub, in one commit; `load_sae(repo_id, id)` reads it back, sae-lens too.

    The repository is made if it is not there, and gets a short model card if it has none.

    Args:
        sae: any of saewb's classes.
        repo_id: "owner/name".
        id: the folder in it; None means its hook's name.
        private: for a repository that is made now.
        revision: an existing branch; None means "main".
        token: of the hub; None means the one logged in with.
        commit_message: None means one that names the SAE.
    Returns:
        The commit's address.
    Raises:
        ValueError: if `repo_id` or `id` is no such name, or there is neither an id nor a hook.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
    """
    from huggingface_hub import HfApi

    if not _REPO.fullmatch(repo_id):
        raise ValueError(explain(f"push_to_hub got repo_id={repo_id!r}.", want="'owner/name'"))
    where = _inside(id or sae.cfg.hook or "")
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        save_sae(sae, Path(place) / where)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            (Path(place) / "README.md").write_text(_card(sae, repo_id, where), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=place, revision=revision, commit_message=commit_message or f"{where}: {sae!r}"
        )
    return commit.commit_url


def _card(sae: SAE | PursuitSAE | TemporalSAE, repo_id: str, where: str) -> str:
    return f"""---
library_name: saewb
tags: [sparse-autoencoder, saewb, saelens]
---
# {repo_id.split("/")[1]}

Sparse autoencoders of {sae.cfg.model or "a language model"}, one per folder, in the SAELens layout.

```python
import saewb
sae = saewb.load_sae({repo_id!r}, {where!r})   # {sae!r}
```
"""


def _inside(id: str) -> str:
    parts = PurePosixPath(id).parts
    if not parts or ".." in parts or PurePosixPath(id).is_absolute() or "\\" in id:
        raise ValueError(
            explain(f"id={id!r} is no folder inside a repository.", want="a name such as 'blocks.8.hook_resid_pre'")
        )
    return "/".join(parts)


def _local(source: str | Path, id: str | None) -> Path | None:
    """The folder meant, if it is one of this machine; None if `source` can only be a name."""
    if source == "tiny":
        source = Path(str(files("saewb.embedded") / "sae"))
    root = Path(source).expanduser()
    if root.is_dir():
        folder = root / (id or "")
        if folder.is_dir():
            return folder
        _no_folder(folder, f"saewb.load_sae({str(source)!r}, {{!r}})", folder.parent)
    if isinstance(source, Path) or _looks_like_a_path(source):
        _no_folder(root, "saewb.load_sae({!r})", root.parent)
    if not _REPO.fullmatch(source):
        raise FileNotFoundError(
            explain(
                f"no SAE named {source!r}: neither the embedded one, nor a folder here, nor a hub repository's name.",
                near=near(source, ["tiny", *_names(Path())]),
                want="'tiny', a folder, or 'owner/name' on the hub",
                fix=f"saewb.load_sae('owner/{source}', {id or 'folder in it'!r})",
            )
        )
    return None


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1 or Path(source).exists()


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _no_folder(folder: Path, fix: str, parent: Path) -> NoReturn:
    found = near(folder.name, _names(parent))
    kind = "is a file, not a folder" if folder.exists() else "does not exist"
    best = found[0] if found else ""
    if best and fix.startswith("saewb.load_sae({"):
        best = str(parent / best)
    raise FileNotFoundError(
        explain(
            f"the folder {folder} {kind}.",
            near=found,
            want="" if found else f"one of {', '.join(_names(parent)[:12]) or f'nothing: {parent} has no folders'}",
            fix=fix.format(best) if best else "",
        )
    )


def _from_hub(repo_id: str, id: str | None, revision: str | None, force_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [pattern for layout in FORMATS for pattern in layout.files(_inside(id) if id else "")]
    call = f"saewb.load_sae({repo_id!r}{f', {id!r}' if id else ''})"
    try:
        root = snapshot_download(repo_id, allow_patterns=wanted, revision=revision, force_download=force_download)
    except GatedRepoError as error:
        raise FileNotFoundError(
            explain(
                f"{repo_id} on the hub is there for those only who accepted its terms.",
                want=f"accept them at the repository's page, then log in: hf auth login ({error.__class__.__name__})",
                fix=call,
            )
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(explain(f"{repo_id} on the hub has no revision {revision!r}.", fix=call)) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            explain(
                f"no SAE at {repo_id!r}: there is no such folder in {os.getcwd()} and no such repository on the hub "
                "(or it is private and you are not logged in).",
                want="'tiny', a folder, or 'owner/name' on the hub",
            )
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(repo_id, id, call)) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(explain(f"the hub did not give {repo_id}: {error}.", fix=call)) from error
    folder = Path(root) / (id or "")
    if not any(layout.matches(folder) for layout in FORMATS):
        _not_in_repo(repo_id, id, revision, call)
    return folder


def _not_in_repo(repo_id: str, id: str | None, revision: str | None, call: str) -> NoReturn:
    from huggingface_hub import HfApi

    # Without a network a snapshot is whatever the cache has: one quick question tells that from a wrong `id`.
    if ask_hub(repo_id, f"{id}/{saelens.CONFIG}" if id else saelens.CONFIG).state == "unreachable":
        raise FileNotFoundError(_unreachable(repo_id, id, call))
    listed = HfApi().list_repo_files(repo_id, revision=revision)
    folders = sorted({str(PurePosixPath(name).parent) for name in listed if PurePosixPath(name).name in saelens.MARKS})
    folders = [name for name in folders if name != "."]
    found = near(id or "", folders) or folders[:3]
    raise FileNotFoundError(
        explain(
            f"the hub repository {repo_id} has no SAE {f'in folder {id!r}' if id else 'at its top'} "
            f"({len(folders)} folders with one).",
            near=found,
            want="" if found else "; ".join(f"{layout.NAME}: {' + '.join(layout.MARKS)}" for layout in FORMATS),
            fix=f"saewb.load_sae({repo_id!r}, {found[0]!r})" if found else "",
        )
    )


def _unreachable(repo_id: str, id: str | None, call: str) -> str:
    what = f"{repo_id}, folder {id!r}," if id else repo_id
    return explain(
        f"{what} is not in the hub's cache on this machine, and the hub cannot be reached.",
        want="a network connection once (and no HF_HUB_OFFLINE); 'tiny' and folders need none",
        fix=call,
    )
