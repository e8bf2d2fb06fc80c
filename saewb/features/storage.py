"""An index on disk: `index.json`, and tensors in one safetensors file that it names.

`index.json` is renamed into place last. So a folder holds the old index or the new one, whatever happens in between,
and tensors that an open index is looking at are never written over.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.features.config import IndexFacts
from saewb.features.token_texts import Words

FILE = "index.json"
_PREFIX = "tensors-"


def write(folder: Path, facts: IndexFacts, tensors: dict[str, Tensor], words: Words) -> Path:
    """Make `folder` hold this index; whole or not at all."""
    from safetensors.torch import save_file

    _may_write(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{_PREFIX}{secrets.token_hex(6)}.safetensors"
    said = facts.to_json() | {"tensors": name, "words": _words_to_json(words)}
    fresh = folder / f".{name}.json"
    try:
        # Distinct storage for each: safetensors refuses tensors that share it.
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / name)
        fresh.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        for path in (folder / name, fresh):
            _flush(path)
        os.replace(fresh, folder / FILE)
    except BaseException:
        for path in (folder / name, fresh):
            path.unlink(missing_ok=True)
        raise
    for old in folder.glob(f"{_PREFIX}*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return folder


def read(folder: Path) -> tuple[IndexFacts, dict[str, Tensor], Words]:
    """What `write` wrote. Tensors are mapped, not read.

    Raises:
        FileNotFoundError: if there is no index in the folder.
        FormatError: if it is not one of ours, of another version, or tensors are missing.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / FILE).is_file():
        want = f"a folder with {FILE}, as index.save(folder) writes it"
        raise FileNotFoundError(explain(f"no index at {str(folder)!r}.", want=want))
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        name, words = said.pop("tensors"), _words_from_json(said.pop("words"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(explain(f"{folder / FILE} is no index of saewb: {error!r}.")) from error
    facts = IndexFacts.from_json(said)
    if Path(name).name != name or not (folder / name).is_file():
        raise FormatError(explain(f"{folder / FILE} names tensors {name!r}, which are not there."))
    try:
        with safe_open(folder / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise FormatError(explain(f"{folder / name} is no safetensors file: {error}.")) from error
    _check(facts, tensors, folder)
    return facts, tensors, words


def _check(facts: IndexFacts, tensors: dict[str, Tensor], folder: Path) -> None:
    want = {"top.tokens": (facts.d_sae, facts.n_top, facts.plan.window), "counts.total": (facts.d_sae,)}
    want |= {"sample.tokens": (facts.d_sae, facts.plan.n_sample, facts.plan.window)}
    for name, shape in want.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise FormatError(explain(f"{folder}: {name} has shape {got}.", want=f"{shape}, as {FILE} says"))


def _may_write(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(explain(f"{str(folder)!r} is a file.", want="a folder, new or of an index"))
    if folder.is_dir() and not (folder / FILE).exists() and any(p.name[:1] != "." for p in folder.iterdir()):
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise FileExistsError(explain(f"{str(folder)!r} holds other things: {inside}.", want="a new folder"))


def _words_to_json(words: Words) -> dict:
    runs = [[list(ids), list(texts)] for ids, texts in words.runs.items()]
    return {"ids": list(words.strings), "strings": list(words.strings.values()), "runs": runs}


def _words_from_json(said: dict) -> Words:
    strings = dict(zip(said["ids"], said["strings"], strict=True))
    return Words(strings, {tuple(ids): tuple(texts) for ids, texts in said["runs"]})


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
