"""Serialize the view of a PromptExplorer for the front end: a window of the prompt, table rows, next tokens."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from saewb_widgets.html import grid, latent_html, token
from saewb_widgets.serialize import short

_COLUMNS = ("activation", "of_max", "logit_effect", "attribution")


def window(reading: Any, offset: int, size: int, roles: Sequence[str] = ()) -> dict[str, Any]:
    """A window of tokens, with the number of active latents on each.

    Args:
        reading: a PromptReading.
        offset: position of the first token.
        size: number of tokens, at most.
        roles: of the tokens of a chat.
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
        "roles": list(roles[offset:end]),
    }


def trace(activations: Any, offset: int, size: int) -> dict[str, Any]:
    """Activations of one latent in the window, and its largest activation over the whole prompt."""
    whole = activations.tolist()
    at = max(range(len(whole)), key=lambda j: abs(whole[j]))
    acts = [short(a) for a in whole[offset : offset + size]]
    return {"acts": acts, "largest": short(whole[at]), "at": at, "active": sum(a != 0 for a in whole)}


def rows(frame: Any, names: Sequence[str], n: int, hint: Callable[[int, int], Any]) -> dict[str, Any]:
    """The first rows of the table.

    Args:
        frame: `reading.to_frame(...)`.
        names: names of the parts, by number.
        n: number of rows.
        hint: function of part and latent that returns a row of the index, or None.
    """
    columns = [c for c in _COLUMNS if c in frame]
    listed = []
    for row in frame.head(n).itertuples(index=False):
        part = names.index(row.sae)
        item = {"sae": part, "latent": int(row.latent), "position": int(row.position), "token": row.token}
        item |= {c: _number(getattr(row, c)) for c in columns}
        if "density" in frame:
            item["density"] = _number(row.density)
        item["hint"] = hint(part, int(row.latent))
        listed.append(item)
    largest = {c: frame[c].abs().max() for c in columns}  # for the bars
    largest = {c: short(float(v)) if v == v else 0.0 for c, v in largest.items()}
    return {"rows": listed, "total": len(frame), "columns": columns, "largest": largest}


def words(answer: Any) -> dict[str, Any]:
    """Next tokens at the position, and the target and prompt of the view.

    Args:
        answer: a `worker.Answer`.
    """
    at, frame, kl = answer.at, answer.words.to_frame(answer.at), answer.words.kl
    with_saes = frame["with_saes"] if "with_saes" in frame else [None] * len(frame)
    listed = zip(frame["token"], frame["id"], frame["probability"], with_saes, strict=True)
    return {
        "words": [[text, int(i), short(float(p)), None if q is None else short(float(q))] for text, i, p, q in listed],
        "kl": None if kl is None else short(float(kl[at])),
        "at": at,
        "token": answer.reading.tokens[at],
        "target": answer.reading.target_token,
        "target_id": answer.reading.target,
        "compared": answer.compared,
        "comparable": answer.comparable,
        "prompt": answer.question.prompt,
    }


def pins(reading: Any, at: int, pinned: Sequence[tuple[int, int]], hint: Callable[[int, int], Any]) -> list[dict]:
    """Activations of the pinned latents at one position."""
    return [
        {"sae": k, "latent": i, "activation": short(float(reading.activations(k, i)[at])), "hint": hint(k, i)}
        for k, i in pinned
    ]


def _number(value: float) -> float | None:
    return short(float(value)) if value == value else None


def summary(inputs: Any, answer: Any, n: int, everywhere: bool) -> str:
    """One line about the listed latents.

    Args:
        inputs: an `inputs.Inputs`.
        answer: a `worker.Answer`, or None.
        n: number of latents listed.
        everywhere: whether they are of the whole prompt.
    """
    names = ", ".join(inputs.names[:2]) + (f" and {len(inputs.names) - 2} more" if len(inputs.names) > 2 else "")
    of = f"{names} of {inputs.model.cfg.model_name}"
    if answer is None:
        return f"no prompt, {of}"
    where = "in the whole prompt" if everywhere else f"at {answer.at} {answer.reading.tokens[answer.at]!r}"
    return f"{n} latents {where}, {of}"


def static_html(tokens: dict, trace: dict, listing: dict, words: dict, page: dict, names: Sequence[str]) -> str:
    """The current view as HTML without scripts.

    Args:
        tokens: the trait `window`.
        trace: the trait `trace`.
        listing: the trait `listing`.
        words: the trait `words`.
        page: the trait `page`.
        names: names of the parts, by number.
    """
    if not tokens:
        return "<div>no prompt yet</div>"
    largest = abs(trace.get("largest", 0.0)) or 1.0
    acts = trace.get("acts") or [0.0] * len(tokens["tokens"])
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
    next_tokens = [(repr(text), p, "" if q is None else q) for text, _, p, q in words["words"][:6]]
    next_head = ("next token", "probability", "with the SAEs" if words["compared"] else "")
    return (
        f'<div style="white-space:pre-wrap;margin:6px 0">{strip}</div>{grid(head, body)}'
        + grid(next_head, next_tokens)
        + (latent_html(page) if page else "")
    )
