"""Mutations of files: bytes, and values in JSON, YAML and headers of safetensors; the same ones for the same seed."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

VALUES = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "\n__import__('os')", "</script>", "\x00", "é" * 3, "1" * 5000, "\ud83d"),
    *([], {}, [1], ["x"], {"x": 1}, [[1, 2], [3]], [None], {"a": {"b": {}}}, [-1] * 3),
)


def mutations(folder: Path, seed: int, n: int) -> Iterator[tuple[str, Path]]:
    """Folders like `folder`, each with one file mutated, next to it; each is deleted when the next is asked for."""
    rng = random.Random(seed)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    for i in range(n):
        file = rng.choice(files)
        target = folder.with_name(f"{folder.name}_{i}")
        shutil.copytree(folder, target)
        how = _mutate(target / file, rng)
        yield f"{i}: {file}: {how}", target
        shutil.rmtree(target, ignore_errors=True)


def _mutate(path: Path, rng: random.Random) -> str:
    kinds: dict[str, Callable[[Path, random.Random], str]] = {".json": _values, ".yaml": _values, ".jsonl": _values}
    structured = kinds.get(path.suffix, _header if path.suffix == ".safetensors" else None)
    if structured is not None and rng.random() < 0.7:
        return structured(path, rng)
    return _bytes(path, rng)


def _bytes(path: Path, rng: random.Random) -> str:
    raw, kind = bytearray(path.read_bytes()), rng.choice(("flip", "flip", "cut", "zeros", "double", "gone", "empty"))
    if kind == "gone":
        path.unlink()
        return kind
    at = rng.randrange(len(raw)) if raw else 0
    if kind == "flip" and raw:
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(min(len(raw), 600) if rng.random() < 0.5 else len(raw))
            raw[at] ^= rng.randrange(1, 256)
    elif kind == "cut":
        del raw[at:]
    elif kind == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif kind == "double":
        raw += raw[at:]
    elif kind == "empty":
        raw.clear()
    path.write_bytes(raw)
    return f"{kind} at {at}"


def _values(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        content, what = _replaced(json.loads(lines[i]), rng)
        path.write_text("\n".join([*lines[:i], json.dumps(content), *lines[i + 1 :]]) + "\n", encoding="utf-8")
        return what
    content, what = _replaced(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text), rng)
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else _json(content), encoding="utf-8")
    return what


def _json(content: Any) -> str:
    return json.dumps(content)


def _header(path: Path, rng: random.Random) -> str:
    """A value in the header of a safetensors file, whose length is corrected."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    content, what = _replaced(json.loads(raw[8 : 8 + size]), rng)
    header = json.dumps(content).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    return f"header {what}"


def _replaced(content: Any, rng: random.Random) -> tuple[Any, str]:
    """The content with one value replaced, removed or added."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places or rng.random() < 0.02:
        value = copy.deepcopy(rng.choice(VALUES))
        return value, f"all = {value!r:.40}"
    parent, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del parent[key]
        return content, f"{key} removed"
    if kind < 0.2 and isinstance(parent, dict):
        parent["unknown"] = 1
        return content, "unknown = 1"
    old = parent[key]
    if kind < 0.4 and type(old) in (int, float):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 10**6, float(old), str(old)))
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return content, f"{key} = {parent[key]!r:.40}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value; of long lists the first few."""
    if isinstance(content, (dict, list)):
        keys = list(content) if isinstance(content, dict) else range(min(len(content), 4))
        for key in keys:
            yield content, key
            yield from _places(content[key])
