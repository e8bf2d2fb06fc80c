"""Where an SAE is meant to be: a folder or file here, a release of the catalogue, a repository of the hub.

Nothing here reads weights or the network; every name that leads nowhere is an error with the names near it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import NoReturn

from saewb.errors import explain, near
from saewb.hub_files import Listing, size
from saewb.pretrained import catalogue
from saewb.pretrained.formats import FORMATS

REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """A place on the hub, and what the catalogue knows about it."""

    repo: str
    path: str  # in the repository; "" for its root
    call: str  # what was typed, for errors
    entry: catalogue.Entry | None = None


def origin_of(source: str, id: str | None) -> Origin:
    """The place on the hub that a release and its id, or a repository and a folder or file in it, stand for.

    Raises:
        ValueError: if the release has no such id, or none was given.
        ValueError: if the two are the wrong way round.
        FileNotFoundError: if `source` is neither a release nor a repository's name.
    """
    call = f"saewb.load_sae({source!r}{f', {id!r}' if id else ''})"
    if source in catalogue.releases():
        if id is None:
            known = catalogue.ids(source)
            raise ValueError(
                explain(
                    f"load_sae got the release {source!r} and no id ({len(known)} SAEs).",
                    want=", ".join(known[:6]) + (", ..." if len(known) > 6 else ""),
                    fix=f"saewb.load_sae({source!r}, {known[0]!r})",
                )
            )
        entry = catalogue.find(source, id)
        return Origin(entry.repo, entry.path, call, entry)
    if id in catalogue.releases():
        what = f"load_sae got {source!r} as release and {id!r} as id."
        raise ValueError(explain(what, want="the release first", fix=f"saewb.load_sae({id!r}, {source!r})"))
    if not REPO.fullmatch(source):
        models = catalogue.catalogue()["model"].str.rpartition("/")[2].unique() if id is None else ()
        if source in models:
            what = f"{source!r} is a language model, not an SAE."
            raise FileNotFoundError(explain(what, want="one of its SAEs", fix=f"saewb.catalogue(model={source!r})"))
        close = near(source, ["tiny", *_names(Path()), *catalogue.releases()])
        raise FileNotFoundError(
            explain(
                f"no SAE named {source!r}: neither the embedded one, nor a folder here, nor a release of the "
                "catalogue, nor a hub repository's name.",
                near=close,
                want="'tiny', a folder, a release of saewb.catalogue(), or 'owner/name' on the hub",
                fix=f"saewb.load_sae({close[0]!r}{f', {id!r}' if id else ''})" if close else "",
            )
        )
    path = inside(id) if id else ""
    return Origin(source, path, call, catalogue.at(source, path))


def inside(id: str) -> str:
    """The path inside a repository that an id stands for.

    Raises:
        ValueError: if it leads out of it.
    """
    parts = PurePosixPath(id).parts
    if not parts or ".." in parts or PurePosixPath(id).is_absolute() or "\\" in id:
        raise ValueError(
            explain(f"id={id!r} is no folder inside a repository.", want="a name such as 'blocks.8.hook_resid_pre'")
        )
    return "/".join(parts)


def local(source: str | Path, id: str | None) -> Path | None:
    """The folder or file meant, if it is one of this machine; None if `source` can only be a name."""
    if id is not None:
        inside(id)  # before anything is looked at
    if source == "tiny":
        source = Path(str(files("saewb.tiny") / "sae"))
    if not isinstance(source, (str, os.PathLike)):
        what = f"load_sae got a {type(source).__name__}."
        want = "a name, a folder, or a repository on the hub"
        raise TypeError(explain(what, want=want, fix="saewb.load_sae('tiny')"))
    root = Path(source).expanduser()
    if root.is_file() and id is None:
        return root
    if root.is_dir():
        place = root / (id or "")
        if place.exists() or any(layout.matches(place) for layout in FORMATS):
            return place
        _no_folder(place, f"saewb.load_sae({str(source)!r}, {{!r}})", place.parent)
    if isinstance(source, Path) or _looks_like_a_path(source):
        _no_folder(root, "saewb.load_sae({!r})", root.parent)
    return None


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1 or Path(source).exists()


def _names(folder: Path) -> list[str]:
    return (
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if folder.is_dir()
        else []
    )


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


def not_in_repo(origin: Origin, listing: Listing) -> NoReturn:
    """Raises the FileNotFoundError for a folder that the repository does not have, with those it has."""
    marks = {name for layout in FORMATS for name in layout.MARKS}
    folders = sorted({str(PurePosixPath(name).parent) for name in listing.sizes if PurePosixPath(name).name in marks})
    folders = [name for name in folders if name != "."]
    found = near(origin.path, folders) or folders[:3]
    where = f"in folder {origin.path!r}" if origin.path else "at its top"
    raise FileNotFoundError(
        explain(
            f"the hub repository {origin.repo} has no SAE {where} ({len(folders)} folders with one).",
            near=found,
            want="" if found else "; ".join(f"{layout.NAME}: {' + '.join(layout.MARKS)}" for layout in FORMATS),
            fix=f"saewb.load_sae({origin.repo!r}, {found[0]!r})" if found else "",
        )
    )


def unreachable(origin: Origin, reason: str) -> str:
    """The text for a place that is neither in the hub's cache nor to be had now."""
    what = f"{origin.repo}, folder {origin.path!r}," if origin.path else origin.repo
    known = "" if origin.entry is None or origin.entry.bytes is None else f", {size(origin.entry.bytes)}"
    return explain(
        f"{what} is not in the hub's cache on this machine, and the hub cannot be reached ({reason}).",
        want=f"a network connection once{known} (and no HF_HUB_OFFLINE); 'tiny' and folders need none",
        fix=origin.call,
    )
