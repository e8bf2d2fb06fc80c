"""What the front end of PromptExplorer is sent: a window of the prompt, some rows, some words."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from saewb_widgets.html import grid, latent_html, token
from saewb_widgets.serialize import short

_COLUMNS = ("activation", "of_max", "logit_effect", "attribution")


def window(reading: Any, offset: int, size: int) -> dict[str, Any]:
    """`size` tokens from `offset` on, with how many latents are active on each.

    Args:
        reading: a PromptReading.
        offset: of the first one.
        size: at most so many.
    """
    end = min(len(reading.tokens), offset + size)
    counts = reading.position.bincount(minlength=len(reading.tokens))[offset:end]
    return {
        "offset": offset,
        "total": len(reading.tokens),
        "tokens": list(reading.tokens[offset:end]),
        "ids": list(reading.ids[offset:end]),
        "special": [int(s) for s in reading.special[offset:end]],
        "active": counts.tolist(),
    }


def trace(activations: Any, offset: int, size: int) -> dict[str, Any]:
    """One latent over the window, and its largest activation over the whole prompt."""
    whole = activations.tolist()
    at = max(range(len(whole)), key=lambda j: abs(whole[j]))
    acts = [short(a) for a in whole[offset : offset + size]]
    return {"acts": acts, "largest": short(whole[at]), "at": at, "active": sum(a != 0 for a in whole)}


def rows(frame: Any, names: Sequence[str], n: int, hint: Callable[[int, int], Any]) -> dict[str, Any]:
    """The first rows of the table.

    Args:
        frame: `reading.to_frame(...)`.
        names: of the SAEs, by number.
        n: rows.
        hint: given part and latent, what an index shows of it, or None.
    """
    columns = [c for c in _COLUMNS if c in frame]
    made = []
    for row in frame.head(n).itertuples(index=False):
        part = names.index(row.sae)
        one = {"sae": part, "latent": int(row.latent), "position": int(row.position), "token": row.token}
        one |= {c: _number(getattr(row, c)) for c in columns}
        if "density" in frame:
            one["density"] = _number(row.density)
        one["hint"] = hint(part, int(row.latent))
        made.append(one)
    return {"rows": made, "total": len(frame), "columns": columns, "largest": _largest(frame, columns)}


def _largest(frame: Any, columns: Sequence[str]) -> dict[str, float]:
    """Of each column the largest size, for the bars."""
    found = {c: frame[c].abs().max() for c in columns}
    return {c: short(float(v)) if v == v else 0.0 for c, v in found.items()}


def words(found: Any) -> dict[str, Any]:
    """What comes next at the position, and what the view as a whole is about.

    Args:
        found: a `worker.Found`.
    """
    at, frame, kl = found.at, found.words.to_frame(found.at), found.words.kl
    with_saes = frame["with_saes"] if "with_saes" in frame else [None] * len(frame)
    listed = zip(frame["token"], frame["id"], frame["probability"], with_saes, strict=True)
    return {
        "words": [[text, int(i), short(float(p)), None if q is None else short(float(q))] for text, i, p, q in listed],
        "kl": None if kl is None else short(float(kl[at])),
        "at": at,
        "token": found.reading.tokens[at],
        "target": found.reading.target_token,
        "target_id": found.reading.target,
        "compared": found.compared,
        "comparable": found.comparable,
        "prompt": found.asked.prompt,
    }


def pins(reading: Any, at: int, pinned: Sequence[tuple[int, int]], hint: Callable[[int, int], Any]) -> list[dict]:
    """The pinned latents at one position."""
    return [
        {"sae": k, "latent": i, "activation": short(float(reading.activations(k, i)[at])), "hint": hint(k, i)}
        for k, i in pinned
    ]


def _number(value: float) -> float | None:
    return short(float(value)) if value == value else None


def summary(given: Any, found: Any, n: int, everywhere: bool) -> str:
    """One line of what is listed.

    Args:
        given: a `inputs.Given`.
        found: a `worker.Found`, or None.
        n: latents listed.
        everywhere: of the whole prompt.
    """
    names = ", ".join(given.names[:2]) + (f" and {len(given.names) - 2} more" if len(given.names) > 2 else "")
    of = f"{names} of {given.model.cfg.model_name}"
    if found is None:
        return f"no prompt, {of}"
    where = "in the whole prompt" if everywhere else f"at {found.at} {found.reading.tokens[found.at]!r}"
    return f"{n} latents {where}, {of}"


def static(tokens: dict, shown: dict, listing: dict, words: dict, page: dict, names: Sequence[str]) -> str:
    """What the traits of those names show, as HTML without scripts.

    Args:
        tokens: `window`.
        shown: `trace`.
        listing: `listing`.
        words: `words`.
        page: `page`.
        names: of the SAEs, by number.
    """
    if not tokens:
        return "<div>no prompt yet</div>"
    next_ones = [(repr(text), p, "" if q is None else q) for text, _, p, q in words["words"][:6]]
    head = ("next token", "probability", "with the SAEs" if words["compared"] else "")
    made = _strip_and_rows(tokens, shown, listing, names) + grid(head, next_ones)
    return made + (latent_html(page) if page else "")


def _strip_and_rows(tokens: dict, shown: dict, listing: dict, names: Sequence[str]) -> str:
    largest = abs(shown.get("largest", 0.0)) or 1.0
    acts = shown.get("acts") or [0.0] * len(tokens["tokens"])
    pieces = zip(tokens["tokens"], acts, tokens["special"], strict=True)
    strip = "".join(
        f'<span style="opacity:.55">{html.escape(text)}</span>'
        if special
        else token(text, abs(a) / largest, False, False)
        for text, a, special in pieces
    )
    head = ["latent", *(["SAE"] if len(names) > 1 else []), "token", *(c.replace("_", " ") for c in listing["columns"])]
    body = [
        [r["latent"], *([names[r["sae"]]] if len(names) > 1 else []), repr(r["token"])]
        + ["" if r[c] is None else r[c] for c in listing["columns"]]
        for r in listing["rows"][:12]
    ]
    return f'<div style="white-space:pre-wrap;margin:6px 0">{strip}</div>{grid(head, body)}'
