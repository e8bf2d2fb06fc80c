"""Resolve the arguments of `load_sae`: a local folder or file, a release of the catalogue, a repository of the hub.

Nothing here reads weights or the network; an unknown name is an error that lists similar ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from saewb._files import absolute, finish_replacing
from saewb.errors import explain, near
from saewb.pretrained import catalogue
from saewb.pretrained.formats import Provenance, is_readable

REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Location of an SAE, on this machine or on the hub, with its entry in the catalogue."""

    call: str
    """The call as typed, for errors."""
    local: Path | None = None
    """Folder or file on this machine; None for one on the hub."""
    repo: str = ""
    """Repository on the hub, "owner/name"."""
    path: str = ""
    """Folder or file in the repository; "" for its root."""
    published: catalogue.PublishedSAE | None = None
    """Entry in the catalogue; None if there is none."""

    def provenance(self, scaling_factor: float | None = None) -> Provenance:
        """Information beyond the files; the argument takes precedence over the catalogue's factor."""
        published = self.published
        if self.local is not None:
            return Provenance(scaling_factor=scaling_factor)
        if published is None:
            return Provenance(repo=self.repo, path=self.path, scaling_factor=scaling_factor)
        return Provenance(
            repo=self.repo,
            path=self.path,
            model=published.model,
            hook=published.hook,
            hook_out=published.hook_out,
            layer=published.layer,
            scaling_factor=published.norm_factor if scaling_factor is None else scaling_factor,
            overrides=published.overrides,
        )

    def record(self, metadata: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a configuration that record the source.

        Args:
            metadata: of the configuration.
            files: revision, commit and hashes of the downloaded files; empty for local ones, which record nothing.

        Returns:
            `metadata`, completed by the source; and the model, if the catalogue has it.
        """
        if not files:
            return {}
        source, published = {"repo": self.repo, "path": self.path, **files}, self.published
        if published is None:
            return {"metadata": {**metadata, "source": source}}
        source = {"release": published.release, "id": published.id, **source}
        pages = {} if published.neuronpedia is None else {"neuronpedia_id": published.neuronpedia}
        return {"model": published.model, "metadata": {**metadata, "source": source, **pages}}


def resolve(source: str | Path, id: str | None) -> Source:
    """Resolve a folder, a release and its id, or a repository and a folder in it, to the location of the files.

    Raises:
        ValueError: if the release has no such id, or `id` is missing; or if the two arguments are swapped.
        FileNotFoundError: if `source` is neither a local folder or file, nor a release, nor a repository's name.
        TypeError: if it is neither a name nor a path.
    """
    if id is not None:
        inside(id)  # refuse a bad id before any path is opened
    local = _local(source, id)
    call = f"saewb.load_sae({str(source)!r}{f', {id!r}' if id else ''})"
    if local is not None:
        return Source(call, local)
    source = str(source)
    if source in catalogue.releases():
        published = catalogue.find(source, id)
        return Source(call, repo=published.repo, path=published.path, published=published)
    if id in catalogue.releases():
        what = f"load_sae got {source!r} as release and {id!r} as id."
        raise ValueError(explain(what, want="the release first", fix=f"saewb.load_sae({id!r}, {source!r})"))
    if REPO.fullmatch(source):
        path = inside(id) if id else ""
        return Source(call, repo=source, path=path, published=catalogue.at(source, path))
    _raise_unknown(source, id)


def inside(id: str) -> str:
    """Convert an id to a path inside a repository.

    Raises:
        ValueError: if the path leaves the repository.
    """
    parts = PurePosixPath(id).parts
    if not parts or ".." in parts or PurePosixPath(id).is_absolute() or "\\" in id:
        what = f"id={id!r} is no folder inside a repository."
        raise ValueError(explain(what, want="a name such as 'blocks.8.hook_resid_pre'"))
    return "/".join(parts)


def _local(source: str | Path, id: str | None) -> Path | None:
    """The local folder or file; None if `source` can only be a name."""
    if source == "tiny":
        source = Path(str(files("saewb.tiny") / "sae"))
    if not isinstance(source, (str, os.PathLike)):
        what = f"load_sae got a {type(source).__name__}."
        want = "a name, a folder, or a repository on the hub"
        raise TypeError(explain(what, want=want, fix="saewb.load_sae('tiny')"))
    root = Path(source).expanduser()
    sae = absolute(root / (id or ""))
    for anchor in (
        sae,
        sae.parent.parent / "checkpoint.pt",
    ):  # a kill while it, or it and its run's checkpoint, changed
        finish_replacing(anchor)
    if root.is_file() and id is None:
        return root
    if root.is_dir():
        path = root / (id or "")
        if path.exists() or is_readable(path):
            return path
        _raise_missing(path, f"saewb.load_sae({str(source)!r}, {{!r}})")
    if isinstance(source, Path) or _looks_like_a_path(source):
        _raise_missing(root, "saewb.load_sae({!r})")
    return None


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1 or Path(source).exists()


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _raise_missing(folder: Path, fix: str) -> NoReturn:
    neighbors = near(folder.name, _subfolders(folder.parent))
    kind = "is a file, not a folder" if folder.exists() else "does not exist"
    best = neighbors[0] if neighbors else ""
    if best and fix.startswith("saewb.load_sae({"):
        best = str(folder.parent / best)
    others = ", ".join(_subfolders(folder.parent)[:12]) or f"nothing: {folder.parent} has no folders"
    want, fix = "" if neighbors else f"one of {others}", fix.format(best) if best else ""
    raise FileNotFoundError(explain(f"the folder {folder} {kind}.", near=neighbors, want=want, fix=fix))


def _raise_unknown(source: str, id: str | None) -> NoReturn:
    models = catalogue.catalogue()["model"].str.rpartition("/")[2].unique() if id is None else ()
    if source in models:
        what = f"{source!r} is a language model, not an SAE."
        raise FileNotFoundError(explain(what, want="one of its SAEs", fix=f"saewb.catalogue(model={source!r})"))
    close = near(source, ["tiny", *_subfolders(Path()), *catalogue.releases()])
    what = f"no SAE named {source!r}: neither the embedded one, nor a folder here, nor a release of the catalogue, nor "
    what += "a hub repository's name."
    want = "'tiny', a folder, a release of saewb.catalogue(), or 'owner/name' on the hub"
    fix = f"saewb.load_sae({close[0]!r}{f', {id!r}' if id else ''})" if close else ""
    raise FileNotFoundError(explain(what, near=close, want=want, fix=fix))
