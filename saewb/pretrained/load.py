"""SAEs by name, from a folder, from the hub or from the package itself. With models.py, all that reads the network.

1. "tiny" is the SAE inside the package.
2. An existing folder or file is read as it lies there; `id` is a folder or file in it.
3. A release of the catalogue and one of its ids stand for a place on the hub, and for what its files do not say.
4. "owner/name" is a repository of the Hugging Face hub; `id` is a folder or file in it. What is in its cache is not
   fetched again, and is all there is without a network. Places the catalogue knows are treated as in 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from saewb.errors import check_device, explain
from saewb.hub_files import Listing, Progress, Unreachable, fetched, hashes_of, in_cache, listed
from saewb.pretrained.formats import FORMATS, Facts, read, saelens
from saewb.pretrained.resolve import Origin, local, not_in_repo, origin_of, unreachable
from saewb.sae.config import SAEConfig
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE

AnySAE = SAE | PursuitSAE | TemporalSAE | CrossLayerTranscoder
_Config = TypeVar("_Config", bound=Any)
# The reader of each format of the catalogue, by the name of its module in saewb.pretrained.formats.
READERS = {
    "sae_lens": "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1",
    "dictionary_learning_1": "dictionary_learning",
    "deepseek_r1": "deepseek_r1",
    "mwhanna_transcoder": "mwhanna",
    "mntss_clt_layer_transcoder": "mntss",
    "temporal": "temporal_conf",
    "goodfire": "goodfire",
    "qwen_scope": "qwen_scope",
    "connor_rob_hook_z": "attention_hook_z",
}


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
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = save_sae(SAE(SAEConfig(d_in=4, d_sae=9)), Path(place) / "mine")
        ...     load_sae(folder)
        SAE(relu, 4 -> 9 latents, float32 on cpu)
    """
    device = check_device(device or "cpu")
    place = local(source, id)
    if place is not None:
        return read(place, Facts(scaling_factor=scaling_factor), dtype=dtype, device=device)
    origin = origin_of(str(source), id)
    root, names, listing = _on_disk(origin, _patterns(origin), _readable, revision, force_download, token, progress)
    facts = _facts(origin, scaling_factor)
    sae = read(root / origin.path, facts, dtype=dtype, device=device)
    sae.cfg = _with_source(sae.cfg, origin, _source(origin, revision, root, names, listing))
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
    call = f"saewb.load_sae({str(source)!r}{f', {id!r}' if id else ''}).cfg"
    place = local(source, id)
    if place is not None:
        _only_saelens(_has_config(place), str(place), call)
        return saelens.read_config(place)
    origin = origin_of(str(source), id)
    entry = origin.entry
    _only_saelens(entry is None or entry.format == "sae_lens", f"{origin.repo}/{origin.path}", call)
    patterns = [pattern for pattern in saelens.files(origin.path) if pattern.endswith((saelens.CONFIG, saelens.SCALER))]
    root, names, listing = _on_disk(origin, patterns, _has_config, revision, force_download, token)
    _only_saelens(_has_config(root / origin.path), f"{origin.repo}/{origin.path}", call)
    cfg = saelens.read_config(root / origin.path, _facts(origin, None))
    return _with_source(cfg, origin, _source(origin, revision, root, names, listing))


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


def _facts(origin: Origin, scaling_factor: float | None) -> Facts:
    entry = origin.entry
    if entry is None:
        return Facts(repo=origin.repo, path=origin.path, scaling_factor=scaling_factor)
    return Facts(
        repo=entry.repo,
        path=entry.path,
        model=entry.model,
        hook=entry.hook,
        hook_out=entry.hook_out,
        layer=entry.layer,
        scaling_factor=entry.norm_factor if scaling_factor is None else scaling_factor,
        overrides=entry.overrides,
    )


def _patterns(origin: Origin) -> list[str]:
    layouts = FORMATS
    if origin.entry is not None:
        layouts = [one for one in FORMATS if one.__name__.endswith(f".{READERS[origin.entry.format]}")]
    return [pattern for layout in layouts for pattern in layout.files(origin.path)]


def _on_disk(
    origin: Origin,
    patterns: list[str],
    complete: Callable[[Path], bool],
    revision: str | None,
    force_download: bool,
    token: str | None,
    progress: Progress | None = None,
) -> tuple[Path, list[str], Listing | None]:
    """The repository's folder in the hub's cache, the names of the files, and the hub's own listing if it answered."""
    listing = listed(origin.repo, revision, token, origin.call)
    if isinstance(listing, Unreachable):
        root = in_cache(origin.repo, revision, patterns)
        if root is None or not complete(root / origin.path):
            raise FileNotFoundError(unreachable(origin, listing.reason))
        here = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*")) if file.is_file()]
        return root, Listing("", dict.fromkeys(here, 0), {}).matching(patterns), None
    names = listing.matching(patterns)
    if not names:
        not_in_repo(origin, listing)
    root = fetched(
        origin.repo,
        listing,
        names,
        revision=revision,
        force_download=force_download,
        token=token,
        call=origin.call,
        progress=progress,
    )
    return root, names, listing


def _readable(place: Path) -> bool:
    return any(layout.matches(place) for layout in FORMATS)


def _has_config(place: Path) -> bool:
    return (place / saelens.CONFIG).is_file()


def _source(
    origin: Origin, revision: str | None, root: Path, names: list[str], listing: Listing | None
) -> dict[str, Any]:
    named = {} if origin.entry is None else {"release": origin.entry.release, "id": origin.entry.id}
    return {
        **named,
        "repo": origin.repo,
        "path": origin.path,
        "revision": revision or "main",
        "commit": listing.commit if listing is not None else root.name,
        "files": hashes_of(root, names, listing),
    }


def _with_source(cfg: _Config, origin: Origin, source: dict[str, Any]) -> _Config:
    entry, changes = origin.entry, {"metadata": {**cfg.metadata, "source": source}}
    if entry is not None:
        changes["model"] = entry.model
        if entry.neuronpedia is not None:
            changes["metadata"]["neuronpedia_id"] = entry.neuronpedia
    return replace(cfg, **changes)


def _only_saelens(is_saelens: bool, what: str, call: str) -> None:
    if not is_saelens:
        raise ValueError(
            explain(
                f"{what} is not in the SAELens layout, and others keep part of their configuration in the weights.",
                want="saewb.pretrained.catalogue.find(release, id) for what is known without its files",
                fix=call,
            )
        )
