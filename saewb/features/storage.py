"""Read and write an index on disk: `index.json`, and tensors in one safetensors file that it names.

`index.json` is renamed into place last, so a folder always holds the old index or the new one, and tensors that an open
index has mapped are never overwritten. Tensors that no `index.json` names, of a process that was killed in between, are
removed by the next one that writes.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from saewb._files import (
    FolderLock,
    atomic_write,
    check_sha256,
    read_json,
    refuse_damage,
    remove_orphans,
    sha256_of,
    write_text,
)
from saewb.errors import FormatError, explain
from saewb.features.accumulate import N_BINS
from saewb.features.config import IndexInfo
from saewb.features.labels import check_labels
from saewb.features.token_texts import MAX_TOKEN_ID, TokenTexts

FILE = "index.json"
_TENSORS = re.compile(r"tensors-[0-9a-f]{12}\.safetensors")
_MAX_BYTES = 256 << 20  # of index.json: the texts of 262,144 tokens take 10 MB
_MAX_EXPONENT = 1000  # of the width of a histogram's bins: 2 to this power is a finite number


def lock_index(folder: Path, wait_s: float = 0.1) -> FolderLock:
    """Lock the folder of an index, created if it does not exist, for one writer.

    Raises:
        FileExistsError: if it holds other things than an index.
        RuntimeError: if another thread or process writes there.
    """
    _check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder, "an index is being written", wait_s=wait_s)


def write_index(
    folder: Path,
    info: IndexInfo,
    tensors: dict[str, Tensor],
    texts: TokenTexts,
    labels: Mapping[int, str] = MappingProxyType({}),
) -> Path:
    """Write an index to `folder`, atomically; the caller holds its lock."""
    from safetensors.torch import save_file

    remove_orphans(folder)
    name = f"tensors-{secrets.token_hex(6)}.safetensors"
    try:
        # Contiguous copies: safetensors refuses tensors that share storage.
        distinct = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        atomic_write(folder / name, lambda fresh: save_file(distinct, fresh))
        hashed = {"tensors": name, "tensors_sha256": sha256_of(folder / name)}
        values = info.to_json() | hashed | {"words": _texts_to_json(texts)}
        values |= {"labels": {str(i): text for i, text in labels.items()}} if labels else {}
        write_text(folder / FILE, json.dumps(values, ensure_ascii=False))
    except BaseException:
        if _tensors_named(folder) != name:  # else an interrupt came after the rename: the new index is in place
            (folder / name).unlink(missing_ok=True)
        raise
    for old in folder.iterdir():
        if old.name != name and _TENSORS.fullmatch(old.name):
            old.unlink(missing_ok=True)
    return folder


def move_aside(folder: Path) -> Path:
    """Move the index in a folder, whose lock the caller holds, to a new folder beside it, and return that.

    The tensors get a second name first, so that a kill at any moment leaves a whole index in one of the folders.
    """
    name, n = _tensors_named(folder), 1
    while (aside := folder.with_name(f"{folder.name}-earlier{n}")).exists():
        n += 1
    aside.mkdir()
    try:
        os.link(folder / name, aside / name)
    except OSError:  # a file system without such names
        shutil.copy2(folder / name, aside / name)
    os.replace(folder / FILE, aside / FILE)
    return aside


def read_index(
    folder: Path, verify: bool | None = None
) -> tuple[IndexInfo, dict[str, Tensor], TokenTexts, dict[int, str]]:
    """Read what `write_index` wrote; tensors are memory-mapped.

    Args:
        folder: of the index.
        verify: whether to compare the hash of the tensors; None does for a file of up to 64 MiB.

    Raises:
        FileNotFoundError: if there is no index in the folder.
        FormatError: if it is damaged, of another version, or tensors are missing.
    """
    from safetensors import SafetensorError, safe_open

    while True:
        info, name, digest, texts, labels = _read_description(folder)
        path = folder / name
        try:
            check_sha256(path, digest, fix="saewb.build_index(...) into a new folder", verify=verify)
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            break
        except FileNotFoundError as error:
            if _tensors_named(folder) == name:  # else a writer has replaced the index meanwhile: read it anew
                raise FormatError(explain(f"{folder / FILE} names tensors {name!r}, which are not there.")) from error
        except SafetensorError as error:
            raise FormatError(explain(f"{path} is no safetensors file: {error}.")) from error
    _check_tensors(info, tensors, folder)
    return info, tensors, texts, labels


def _read_description(folder: Path) -> tuple[IndexInfo, str, str | None, TokenTexts, dict[int, str]]:
    """What an index is of, the name of its tensors and their hash, the texts of its tokens, and labels."""
    if not (folder / FILE).is_file():
        want = f"a folder with {FILE}, as index.save(folder) writes it"
        raise FileNotFoundError(explain(f"no index at {str(folder)!r}.", want=want))
    values = read_json(folder / FILE, _MAX_BYTES)
    if not isinstance(values, dict) or not {"tensors", "words"} <= set(values):
        raise FormatError(explain(f"{folder / FILE} is no index of saewb's.", want="what index.save(folder) writes"))
    with refuse_damage(str(folder / FILE), "an index that saewb wrote"):
        name, digest, texts = values.pop("tensors"), values.pop("tensors_sha256", None), values.pop("words")
        texts, labels = _texts_from_json(texts), values.pop("labels", {})
        info = IndexInfo.from_json(values)
        labels = _labels_from_json(labels, info.d_sae)
    if not isinstance(name, str) or Path(name).name != name or (folder / name).is_symlink():
        raise FormatError(explain(f"{folder / FILE} names tensors {name!r}.", want="a file in the same folder"))
    return info, name, digest, texts, labels


def _tensors_named(folder: Path) -> str | None:
    """Name of the tensors of the index in a folder; None if there is no index."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8")).get("tensors")
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _check_tensors(info: IndexInfo, tensors: dict[str, Tensor], folder: Path) -> None:
    """Check names, shapes and dtypes of all tensors, and the values of short ones; long ones are read on access."""
    expected = _expected(info)
    groups = ("logits.", "jacobian.", "nearest.", "coactive.", "loss", "decoder")
    optional = [name for name in expected if name.startswith(groups)]
    for name in (*expected, *tensors):
        if name not in tensors and name in optional:
            continue
        dtype, shape = expected.get(name, (None, ()))
        tensor = tensors.get(name)
        fits = tensor is not None and tensor.dtype == dtype and len(tensor.shape) == len(shape)
        if not fits or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True)):
            got = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, {tensor.dtype}"
            want = f"{shape}, {dtype}, as {FILE} says" if dtype else ", ".join(expected)
            raise FormatError(explain(f"{folder}: {name} {got}.", want=want))
    for group in ("logits.", "jacobian.", "nearest.", "coactive.", "active."):  # parts of one table
        parts = [name for name in expected if name.startswith(group)]
        inside = [name for name in parts if name in tensors]
        lengths = {tensors[name].shape[0] for name in inside}
        if inside and (len(lengths) > 1 or (group == "coactive." and len(inside) < len(parts))):
            raise FormatError(explain(f"{folder}: {', '.join(inside)} do not belong together.", want=", ".join(parts)))
    exponent = tensors["counts.exponent"]
    if bool((exponent.abs() > _MAX_EXPONENT).any()):
        raise FormatError(
            explain(f"{folder}: counts.exponent is up to {int(exponent.abs().max())}.", want="a power of 2")
        )


def _expected(info: IndexInfo) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """Dtype and shape of each tensor of an index; None is any length."""
    n, window, positions = info.d_sae, info.config.window, (info.ctx_len - 1).bit_length() + 1
    i32, i64, f32, f64 = torch.int32, torch.int64, torch.float32, torch.float64
    table: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "counts.counts": (i64, (n, N_BINS)),
        "counts.exponent": (i32, (n,)),
        "counts.total": (f64, (n,)),
        "counts.by_position": (i64, (n, positions)),
        "counts.n_by_position": (i64, (positions,)),
        "active.token_hash": (i64, (None,)),
        "active.token_position": (i64, (None,)),
        "active.token_active": (i32, (None, info.config.active)),
        "decoder_norm": (f32, (n,)),
        "loss_effects": (f32, (n, None, window)),
        "logits.range": (f32, (n, 2)),
        "logits.counts": (i32, (n, None)),
    }
    for name, slots in (("top", info.n_top), ("sample", info.config.n_sample)):
        table |= {f"{name}.{part}": (kind, (n, slots, window)) for part, kind in (("tokens", i32), ("acts", f32))}
        kinds = {"order": i32, "position": i64, "content": i64, "value": f32}
        table |= {f"{name}.{part}": (kind, (n, slots)) for part, kind in kinds.items()}
    for end in ("top", "bottom"):
        for group in ("logits", "jacobian"):
            table |= {f"{group}.{end}": (f32, (n, None)), f"{group}.{end}_ids": (i32, (n, None))}
    for side in ("decoder", "encoder"):
        table |= {f"nearest.{side}": (i32, (n, None)), f"nearest.{side}_cosine": (f32, (n, None))}
    table |= {"coactive.fired": (i32, (n,)), "coactive.phi": (f32, (n, None))}
    return table | {f"coactive.{part}": (i32, (n, None)) for part in ("latent", "together")}


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


def _labels_from_json(values: dict, d_sae: int) -> dict[int, str]:
    try:
        return check_labels({int(i): text for i, text in values.items()}, d_sae)
    except (ValueError, TypeError) as error:
        raise FormatError(explain(f"labels of {FILE} are damaged: {str(error).partition(chr(10))[0]}")) from error


def _texts_from_json(values: dict) -> TokenTexts:
    ids, strings, runs = values["ids"], values["strings"], values["runs"]
    pairs = [(ids, strings), *runs]
    if not all(len(numbers) == len(texts) for numbers, texts in pairs):
        raise FormatError(explain(f"words of {FILE} has numbers and texts of different length.", want="pairs"))
    for numbers, texts in pairs:
        if wrong := [i for i in numbers if type(i) is not int or not 0 <= i < MAX_TOKEN_ID]:
            what = f"words of {FILE} has the token id {reprlib.repr(wrong[0])}."
            raise FormatError(explain(what, want=f"0 to {MAX_TOKEN_ID - 1}"))
        if not all(isinstance(text, str) for text in texts):
            raise FormatError(explain(f"words of {FILE} has a text that is none.", want="texts"))
    return TokenTexts(dict(zip(ids, strings, strict=True)), {tuple(ids): tuple(parts) for ids, parts in runs})
