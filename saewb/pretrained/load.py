"""Load SAEs by name, from a folder, from the hub or from the package itself; save them into a folder.

1. `resolve` the arguments: the SAE inside the package ("tiny"), a folder or file, a release of the catalogue and one of
   its ids, or a repository of the hub and a folder in it.
2. `hub.snapshot` downloads the files that are not in the hub's cache; without a network, only the cache is used.
3. `formats.read` detects the layout and reads the files; the catalogue completes their configuration.
4. `Source.record` adds the source to `cfg.metadata["source"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saewb.errors import check_device, explain
from saewb.hub import Progress, snapshot
from saewb.pretrained import formats
from saewb.pretrained.formats import saelens
from saewb.pretrained.resolve import Source, resolve
from saewb.sae.config import SAEConfig
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.crosscoder import CrossCoderSAE
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE

AnySAE = SAE | PursuitSAE | TemporalSAE | CrossCoderSAE | CrossLayerTranscoder


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
    """Load an SAE by name, folder or hub repository; its layout is recognized by its files.

    For an SAE from the hub, `sae.cfg.metadata["source"]` holds repo, path, revision, commit, the files with their
    sha256, and release and id where the catalogue has them. Saved SAEs keep it.

    Args:
        source: "tiny", a folder or file, a release of `saewb.catalogue()`, or "owner/name" on the hub. A folder of that
            name, if there is one, comes first.
        id: of the SAE in the release; or the folder or file inside `source`, e.g. "blocks.8.hook_resid_pre", None
            meaning `source` itself.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.
        scaling_factor: factor that multiplied training inputs, for files that need it and do not have it; takes
            precedence over the catalogue's.
        revision: branch, tag or commit of the hub repository; None means "main".
        force_download: download again files that are in the hub's cache.
        token: of the hub; None means that of the login.
        progress: called with (bytes downloaded, total bytes) during a download, from other threads; an exception in it
            (except OSError) cancels the download. Complete files stay; of parts, huggingface_hub 2 keeps none. With it,
            files come over plain HTTP: slower than Xet, the hub's own protocol, which cannot be cancelled.

    Returns:
        An SAE; a PursuitSAE, TemporalSAE, CrossCoderSAE or CrossLayerTranscoder for those architectures.

    Raises:
        FileNotFoundError: if there is no such folder, release or repository, or it cannot be reached and is not in the
            cache.
        ConnectionError: if a download was interrupted; calling again downloads the incomplete files.
        FormatError: if the files are of no known layout, or do not fit their layout.

    Example:
        >>> import tempfile
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_sae(SAE(SAEConfig(d_in=4, d_sae=9)), Path(parent) / "mine")
        ...     load_sae(folder)
        SAE(relu, 4 -> 9 latents, float32 on cpu)
    """
    device = check_device(device or "cpu")
    origin = resolve(source, id)
    files = _download(origin, formats.is_readable, revision, force_download, token, progress)
    sae = formats.read(files.path, origin.provenance(scaling_factor), dtype=dtype, device=device)
    return sae.with_config(**origin.record(sae.cfg.metadata, files.record))


def load_config(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | None = None,
) -> SAEConfig | PursuitConfig | TemporalConfig:
    """Load the configuration of an SAE in the SAELens layout, from cfg.json alone: kilobytes, no weights.

    Other layouts hold part of it in their weights; `saewb.pretrained.catalogue.find(release, id)` describes a published
    SAE without its files.

    Args:
        source: as for `load_sae`.
        id: as for `load_sae`.
        revision: branch, tag or commit of the hub repository; None means "main".
        force_download: download again files that are in the hub's cache.
        token: of the hub; None means that of the login.

    Returns:
        The same as `load_sae(source, id).cfg`, but `metadata["source"]["files"]` has cfg.json alone.

    Raises:
        FileNotFoundError: as `load_sae`.
        FormatError: if cfg.json does not fit the layout.
        ValueError: if it is not in the SAELens layout; with the line that loads it.

    Example:
        >>> load_config("tiny").d_sae
        1024
    """
    origin = resolve(source, id)
    _check_saelens(origin.published is None or origin.published.format in saelens.SAELens.aliases, origin)
    files = _download(origin, _has_config, revision, force_download, token, names=(saelens.CONFIG, saelens.SCALER))
    _check_saelens(_has_config(files.path), origin)
    cfg = saelens.read_config(files.path, origin.provenance())
    return replace(cfg, **origin.record(cfg.metadata, files.record))


def save_sae(sae: AnySAE, folder: str | Path, overwrite: bool = False) -> Path:
    """Save an SAE into a folder, atomically, in the SAELens layout; `load_sae(folder)` reads it back.

    Crosscoders, which that layout does not have, are saved as `crosscoder.json` and `crosscoder.safetensors`.

    Args:
        sae: any of saewb's classes except CrossLayerTranscoder; a separate b_pre is folded into b_enc.
        folder: new or empty; parents are created.
        overwrite: replace an SAE in the folder. A folder with any other files is never replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: if the folder holds something that may not be replaced.
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
    return formats.write(sae, folder, overwrite=overwrite)


class _Files(NamedTuple):
    """Local files of an SAE."""

    path: Path
    """Folder or file on this machine."""
    record: Mapping[str, Any]
    """Revision, commit and hashes of files from the hub; empty for local ones."""


def _download(
    origin: Source,
    is_complete: Callable[[Path], bool],
    revision: str | None,
    force_download: bool,
    token: str | None,
    progress: Progress | None = None,
    names: tuple[str, ...] = ("",),
) -> _Files:
    """Get the files of a source whose patterns end with one of these names; local ones are there already."""
    if origin.local is not None:
        return _Files(origin.local, {})
    published = origin.published
    layout_files = formats.patterns(origin.path, None if published is None else published.format)
    files = snapshot(
        origin.repo,
        origin.path,
        [pattern for pattern in layout_files if pattern.endswith(names)],
        revision=revision,
        force_download=force_download,
        token=token,
        call=origin.call,
        is_complete=is_complete,
        n_bytes=None if published is None else published.bytes,
        progress=progress,
    )
    if not files.hashes:
        raise FileNotFoundError(formats.absence(origin.repo, origin.path, files.names))
    record = {"revision": revision or "main", "commit": files.commit, "files": dict(files.hashes)}
    return _Files(files.root / origin.path, record)


def _has_config(path: Path) -> bool:
    return (path / saelens.CONFIG).is_file()


def _check_saelens(is_saelens: bool, origin: Source) -> None:
    if not is_saelens:
        what = str(origin.local or f"{origin.repo}/{origin.path}")
        what += " is not in the SAELens layout, and others keep part of their configuration in the weights."
        want = "saewb.pretrained.catalogue.find(release, id) for what is known without its files"
        raise ValueError(explain(what, want=want, fix=f"{origin.call}.cfg"))
