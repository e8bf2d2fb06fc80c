"""Load SAEs by name, from a folder, from the hub or from the package itself; save them into a folder.

1. `resolve` finds out what the arguments mean: the SAE inside the package ("tiny"), a folder or file, a release of the
   catalogue and one of its ids, or a repository of the hub and a folder in it.
2. `hub.snapshot` has its files. What is in the hub's cache is not fetched again, and is all there is without a network.
3. `detect` recognizes their layout, and that reads them; the catalogue completes what the files do not say.
4. `cfg.metadata["source"]` says where the SAE is from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from saewb.errors import check_device, explain
from saewb.hub import Progress, Snapshot, snapshot
from saewb.pretrained.formats import absence, detect, is_readable, layouts_named, saelens
from saewb.pretrained.resolve import Source, resolve
from saewb.sae.config import SAEConfig
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE

AnySAE = SAE | PursuitSAE | TemporalSAE | CrossLayerTranscoder
_Config = TypeVar("_Config", bound=Any)


def load_sae(
    source: str | Path,
    id: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    scaling_factor: float | None = None,
    revision: str | None = None,
    force_download: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> AnySAE:
    """An SAE by name, folder or hub repository; its layout is recognized by its files.

    What comes from the hub says where from in `sae.cfg.metadata["source"]`: repo, path, revision, commit, the files
    with their sha256, and release and id where the catalogue has them. Saving keeps that.

    Args:
        source: "tiny", a folder or file, a release of `saewb.catalogue()`, or "owner/name" on the hub. A folder of that
            name, if there is one, comes first.
        id: of the SAE in the release; or the folder or file inside `source`, e.g. "blocks.8.hook_resid_pre", None
            meaning `source` itself.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.
        scaling_factor: what training inputs were multiplied with, for files that need it and do not have it; comes
            before the catalogue's.
        revision: branch, tag or commit of the hub repository; None means "main".
        force_download: fetch again what is in the hub's cache.
        token: of the hub; None means the one logged in with.
        progress: called with (bytes that came, bytes in all) as a download goes on, from other threads; what it raises
            (no OSError) cancels the download. Files that came whole are kept; of parts, huggingface_hub 2 keeps none.
            With it, files come over plain HTTP: slower than Xet, the hub's own way, which cannot be cancelled.

    Returns:
        An SAE; a PursuitSAE, TemporalSAE or CrossLayerTranscoder for those architectures.

    Raises:
        FileNotFoundError: if there is no such folder, release or repository, or it cannot be reached and is not in the
            cache.
        ConnectionError: if a download broke off; calling again fetches the files that did not come whole.
        FormatError: if the files are of no known layout, or not what their layout promises.

    Example:
        >>> import tempfile
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_sae(SAE(SAEConfig(d_in=4, d_sae=9)), Path(parent) / "mine")
        ...     load_sae(folder)
        SAE(relu, 4 -> 9 latents, float32 on cpu)
    """
    device = check_device(device or "cpu")
    place = resolve(source, id)
    files = _fetch(place, _patterns(place), is_readable, revision, force_download, token, progress)
    sae = detect(files.path).read(files.path, place.provenance(scaling_factor), dtype=dtype, device=device)
    sae.cfg = _with_source(sae.cfg, place, files)
    return sae


def load_config(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | None = None,
) -> SAEConfig | PursuitConfig | TemporalConfig:
    """The configuration of an SAE in the SAELens layout, from cfg.json alone: kilobytes, no weights.

    Other layouts say part of it in their weights only; what is known of a published one without its files is
    `saewb.pretrained.catalogue.find(release, id)`.

    Args:
        source: as for `load_sae`.
        id: as for `load_sae`.
        revision: branch, tag or commit of the hub repository; None means "main".
        force_download: fetch again what is in the hub's cache.
        token: of the hub; None means the one logged in with.

    Returns:
        What `load_sae(source, id).cfg` would be, but for `metadata["source"]["files"]`, which has cfg.json alone.

    Raises:
        FileNotFoundError: as `load_sae`.
        FormatError: if cfg.json is not what the layout promises.
        ValueError: if it is not in the SAELens layout; with the line that loads it.

    Example:
        >>> load_config("tiny").d_sae
        1024
    """
    place, names = resolve(source, id), (saelens.CONFIG, saelens.SCALER)
    _check_saelens(place.published is None or place.published.format in saelens.SAELens.aliases, place)
    patterns = [pattern for pattern in saelens.SAELens().patterns(place.path) if pattern.endswith(names)]
    files = _fetch(place, patterns, _has_config, revision, force_download, token)
    _check_saelens(_has_config(files.path), place)
    return _with_source(saelens.read_config(files.path, place.provenance()), place, files)


def save_sae(sae: AnySAE, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an SAE into a folder, in the SAELens layout: all of it or nothing. `load_sae(folder)` reads it back.

    Args:
        sae: any of saewb's classes but a CrossLayerTranscoder; a b_pre of its own is folded into b_enc.
        folder: a new or empty one; parents are made.
        overwrite: replace an SAE that is there. A folder with any other files in it is never replaced.

    Returns:
        The folder's full path.

    Raises:
        FileExistsError: if there is something that may not be replaced.
        ValueError: if the layout cannot express this SAE.
        TypeError: for a CrossLayerTranscoder.

    Example:
        >>> import saewb, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_sae(saewb.load_sae("tiny"), folder)
        ...     saewb.load_sae(path).cfg.d_sae
        1024
    """
    folder = Path(folder).expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    return saelens.write(sae, folder, overwrite=overwrite)


@dataclass(frozen=True)
class _Files:
    """Where the files of an SAE are now."""

    path: Path
    """Folder or file on this machine."""
    snapshot: Snapshot | None = None
    """Of the repository they came from; None for files that were here."""
    revision: str = "main"
    """Branch, tag or commit that was asked for."""


def _patterns(place: Source) -> list[str]:
    layouts = layouts_named(None if place.published is None else place.published.format)
    return [pattern for layout in layouts for pattern in layout.patterns(place.path)]


def _fetch(
    place: Source,
    patterns: list[str],
    is_complete: Callable[[Path], bool],
    revision: str | None,
    force_download: bool,
    token: str | None,
    progress: Progress | None = None,
) -> _Files:
    if place.local is not None:
        return _Files(place.local)
    files = snapshot(
        place.repo,
        place.path,
        patterns,
        revision=revision,
        force_download=force_download,
        token=token,
        call=place.call,
        is_complete=is_complete,
        n_bytes=None if place.published is None else place.published.bytes,
        progress=progress,
    )
    if not files.hashes:
        raise FileNotFoundError(absence(place.repo, place.path, files.names))
    return _Files(files.root / place.path, files, revision or "main")


def _has_config(path: Path) -> bool:
    return (path / saelens.CONFIG).is_file()


def _with_source(cfg: _Config, place: Source, files: _Files) -> _Config:
    """The configuration with where it is from, and the names that the catalogue has."""
    if files.snapshot is None:
        return cfg
    origin = {"revision": files.revision, "commit": files.snapshot.commit, "files": dict(files.snapshot.hashes)}
    metadata = {**cfg.metadata, "source": {**place.metadata(), **origin}}
    if place.published is None:
        return replace(cfg, metadata=metadata)
    if place.published.neuronpedia is not None:
        metadata["neuronpedia_id"] = place.published.neuronpedia
    return replace(cfg, model=place.published.model, metadata=metadata)


def _check_saelens(is_saelens: bool, place: Source) -> None:
    if not is_saelens:
        what = str(place.local or f"{place.repo}/{place.path}")
        raise ValueError(
            explain(
                f"{what} is not in the SAELens layout, and others keep part of their configuration in the weights.",
                want="saewb.pretrained.catalogue.find(release, id) for what is known without its files",
                fix=f"{place.call}.cfg",
            )
        )
