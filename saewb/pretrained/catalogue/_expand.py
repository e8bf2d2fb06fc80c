"""Expand the compact form of a release, one line of releases.jsonl, into one value per SAE.

A release is a list of sets; a set is a template with numbered slots and their values. In order:

1. `axes` (a product, last fastest; "0-25" is a range) without `not`, or `table` (leading slots -> values of the last).
2. Text columns are templates of the slots, "=" for the id itself, or {"text": template, "each": "a,b,..."} with a {v}
   that differs by row; `rows` or `where`/`in` restrict a column to some rows.
3. Number columns are a constant, a list, {"slot": i}, {"each": "a,b"}, {"over": c, "each": [x]} for c / x,
   {"of": "path"} for the numbers that "each" of the path holds, or {"ramp": n_layers, small: [lo, hi], ...}:
   floor(lo + (hi - lo) min(1, 3 layer / n_layers)), the target L0 of Gemma Scope 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Columns = dict[str, list[Any]]
Slots = Sequence[tuple[str, ...]]

WIDTHS = {"4k": 12, "16k": 14, "32k": 15, "65k": 16, "131k": 17, "262k": 18, "524k": 19, "1m": 20}  # log2 of d_sae
_BYTES = {"float32": 4, "bfloat16": 2}


def width(label: str) -> int:
    """Number of latents by the label of a width.

    Example:
        >>> width("16k"), width("24576")
        (16384, 24576)
    """
    return 2 ** WIDTHS[label] if label in WIDTHS else int(label)


def expand(release: Mapping[str, Any]) -> Columns:
    """Columns that differ between the SAEs of one release, as equally long lists: id, path, hook, ..., bytes."""
    sets = [_expand_set(one, release) for one in release["sets"]]
    return {name: list(itertools.chain.from_iterable(one[name] for one in sets)) for name in sets[0]}


def _expand_set(one: Mapping[str, Any], release: Mapping[str, Any]) -> Columns:
    slots = _slots(one)
    ids = _texts(one["id"], slots, [])
    columns: Columns = {"id": ids, "path": _texts(one.get("path", "="), slots, ids)}
    for name in ("hook", "hook_out", "neuronpedia"):
        columns[name] = _texts(one.get(name), slots, ids)
    columns["layer"] = _numbers(one.get("layer", {"slot": 0}), slots, one)
    columns["d_sae"] = _numbers(one.get("d_sae"), slots, one)
    columns["l0"] = [None if x is None else float(x) for x in _numbers(one.get("l0"), slots, one)]
    for name in ("variance_explained", "norm_factor"):
        columns[name] = _numbers(one.get(name), slots, one)
    columns["bytes"] = _bytes(columns["d_sae"], one, release)
    return columns


def _slots(one: Mapping[str, Any]) -> Slots:
    if "table" in one:
        return [(*key.split("/"), last) for key, row in one["table"].items() for last in row.split(",")]
    without = {tuple(hole) for hole in one.get("not", ())}
    return [slots for slots in itertools.product(*map(_axis, one.get("axes", ()))) if slots not in without]


def _axis(axis: str | list[str]) -> list[str]:
    if not isinstance(axis, str):
        return axis
    first, last = axis.split("-")
    return [str(i) for i in range(int(first), int(last) + 1)]


def _texts(form: Any, slots: Slots, ids: list[str]) -> list[Any]:
    if form is None:
        return [None] * len(slots)
    if isinstance(form, list):
        return form
    if form == "=":
        return ids
    if isinstance(form, str):
        return list(itertools.starmap(form.format, slots)) if "{" in form else [form] * len(slots)
    if "each" in form:
        values = form["each"].split(",")
        texts = [form["text"].format(*slot, v=v) for slot, v in zip(slots, values, strict=True)]
    else:
        texts = _texts(form["text"], slots, ids)
    if "rows" in form:
        rows = set(form["rows"])
        return [text if i in rows else None for i, text in enumerate(texts)]
    if "where" in form:
        allowed, where = {tuple(row) for row in form["in"]}, form["where"]
        mask = [tuple(slot[i] for i in where) in allowed for slot in slots]
        return [text if is_allowed else None for text, is_allowed in zip(texts, mask, strict=True)]
    return texts


def _numbers(form: Any, slots: Slots, one: Mapping[str, Any]) -> list[Any]:
    if isinstance(form, list):
        return form
    if not isinstance(form, dict):
        return [form] * len(slots)
    if "ramp" in form:
        return _ramp(form, slots)
    if "slot" in form:
        widths = {label: width(label) for label in {slot[form["slot"]] for slot in slots}}
        return [widths[slot[form["slot"]]] for slot in slots]
    if "of" in form:
        form = {"each": one[form["of"]]["each"]}
    if "over" in form:
        return [form["over"] / x for x in form["each"]]
    return [width(label) for label in form["each"].split(",")]


def _ramp(form: Mapping[str, Any], slots: Slots) -> list[int]:
    size, n_layers = form["size"], form["ramp"]
    pairs = [(slot[0], size if isinstance(size, str) else slot[size]) for slot in slots]
    values = {}
    for layer, name in set(pairs):
        low, high = form[name]
        values[layer, name] = math.floor(low + (high - low) * min(1.0, 3 * int(layer) / n_layers))
    return [values[pair] for pair in pairs]


def _bytes(d_sae: list[int | None], one: Mapping[str, Any], release: Mapping[str, Any]) -> list[int | None]:
    """Bytes of W_enc, W_dec, biases, threshold and skip matrix in the published dtype."""
    d, size = release["d_in"], _BYTES[release.get("dtype", "float32")]
    per_latent = 2 * d + 1 + (release.get("architecture") == "jumprelu")
    fixed = d + d * d * bool(one.get("skip"))
    return [None if n is None else (n * per_latent + fixed) * size for n in d_sae]
