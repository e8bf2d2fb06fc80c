"""Read and write an index on disk: `index.json`, and tensors in one safetensors file that it names.

`index.json` is renamed into place last, so a folder always holds the old index or the new one, and tensors that an open
index has mapped are never overwritten. Tensors that no `index.json` names, of a process that was killed in between, are
removed by the next one that writes.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from torch import Tensor

from saewb._files import FolderLock, atomic_write, remove_orphans, write_text
from saewb.errors import FormatError, explain
from saewb.features.config import IndexInfo
from saewb.features.token_texts import TokenTexts

FILE = "index.json"
_TENSORS = re.compile(r"tensors-[0-9a-f]{12}\.safetensors")


def lock_index(folder: Path, wait_s: float = 0.1) -> FolderLock:
    """Lock the folder of an index, created if it does not exist, for one writer.

    Raises:
        FileExistsError: if it holds other things than an index.
        RuntimeError: if another thread or process writes there.
    """
    _check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder, "an index is being written", wait_s=wait_s)


def write_index(folder: Path, info: IndexInfo, tensors: dict[str, Tensor], texts: TokenTexts) -> Path:
    """Write an index to `folder`, atomically; the caller holds its lock."""
    from safetensors.torch import save_file

    remove_orphans(folder)
    name = f"tensors-{secrets.token_hex(6)}.safetensors"
    try:
        # Contiguous copies: safetensors refuses tensors that share storage.
        distinct = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        atomic_write(folder / name, lambda fresh: save_file(distinct, fresh))
        values = info.to_json() | {"tensors": name, "words": _texts_to_json(texts)}
        write_text(folder / FILE, json.dumps(values, ensure_ascii=False))
    except BaseException:
        if _tensors_named(folder) != name:  # else an interrupt came after the rename: the new index is in place
            (folder / name).unlink(missing_ok=True)
        raise
    for old in folder.iterdir():
        if old.name != name and _TENSORS.fullmatch(old.name):
            old.unlink(missing_ok=True)
    return folder


def read_index(folder: Path) -> tuple[IndexInfo, dict[str, Tensor], TokenTexts]:
    """Read what `write_index` wrote; tensors are memory-mapped.

    Raises:
        FileNotFoundError: if there is no index in the folder.
        FormatError: if it is damaged, of another version, or tensors are missing.
    """
    from safetensors import SafetensorError, safe_open

    while True:
        info, name, texts = _read_description(folder)
        try:
            with safe_open(folder / name, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            break
        except FileNotFoundError as error:
            if _tensors_named(folder) == name:  # else a writer has replaced the index meanwhile: read it anew
                raise FormatError(explain(f"{folder / FILE} names tensors {name!r}, which are not there.")) from error
        except SafetensorError as error:
            raise FormatError(explain(f"{folder / name} is no safetensors file: {error}.")) from error
    _check_shapes(info, tensors, folder)
    return info, tensors, texts


def _read_description(folder: Path) -> tuple[IndexInfo, str, TokenTexts]:
    if not (folder / FILE).is_file():
        want = f"a folder with {FILE}, as index.save(folder) writes it"
        raise FileNotFoundError(explain(f"no index at {str(folder)!r}.", want=want))
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        name, texts = values.pop("tensors"), _texts_from_json(values.pop("words"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(explain(f"{folder / FILE} is no index of saewb: {error!r}.")) from error
    if Path(name).name != name:
        raise FormatError(explain(f"{folder / FILE} names tensors {name!r}.", want="a file in the same folder"))
    return IndexInfo.from_json(values), name, texts


def _tensors_named(folder: Path) -> str | None:
    """Name of the tensors of the index in a folder; None if there is no index."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8")).get("tensors")
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _check_shapes(info: IndexInfo, tensors: dict[str, Tensor], folder: Path) -> None:
    want = {"top.tokens": (info.d_sae, info.n_top, info.config.window), "counts.total": (info.d_sae,)}
    want |= {"sample.tokens": (info.d_sae, info.config.n_sample, info.config.window)}
    for name, shape in want.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise FormatError(explain(f"{folder}: {name} has shape {got}.", want=f"{shape}, as {FILE} says"))


def _check_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(explain(f"{str(folder)!r} is a file.", want="a folder, new or of an index"))
    if folder.is_dir() and not (folder / FILE).exists():
        names = sorted(p.name for p in folder.iterdir() if p.name[:1] != "." and not _TENSORS.fullmatch(p.name))
        if names:
            what = f"{str(folder)!r} holds other things: {', '.join(names[:5])}."
            raise FileExistsError(explain(what, want="a new folder"))


def _texts_to_json(texts: TokenTexts) -> dict:
    runs = [[list(ids), list(parts)] for ids, parts in texts.runs.items()]
    return {"ids": list(texts.strings), "strings": list(texts.strings.values()), "runs": runs}


def _texts_from_json(values: dict) -> TokenTexts:
    strings = dict(zip(values["ids"], values["strings"], strict=True))
    return TokenTexts(strings, {tuple(ids): tuple(parts) for ids, parts in values["runs"]})
