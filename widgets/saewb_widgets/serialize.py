"""Serialize latents as JSON for the front end, with each distinct token text of a page once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_QUARTERS = 24  # bins of a quarter decade of density, from 1e-6 to 1
_BEFORE, _AFTER = 14, 6  # of a snippet: characters before the strongest token, tokens from it on


def latent_row(latent: Any, special: frozenset[int]) -> dict[str, Any]:
    """Table row of a latent: its statistics and a snippet of its strongest context (about 300 bytes).

    Args:
        latent: result of `index.latent`.
        special: ids of tokens to show as a mark.
    """
    row = {"latent": latent.index, "density": short(latent.density), "max": short(latent.max), "tokens": []}
    if latent.is_explained:
        row["label"] = latent.label
    if latent.logits_top:
        row["word"] = latent.logits_top[0].token
    if latent.top:
        c = latent.top[0]
        begin, end, room = c.at, c.at + _AFTER, _BEFORE
        while begin > 0 and (room := room - len(c.tokens[begin - 1])) >= 0:
            begin -= 1
        pieces = zip(c.tokens[begin:end], c.ids[begin:end], c.acts[begin:end], strict=True)
        largest = max(map(abs, c.acts)) or 1.0
        # [text, share of the largest activation, 1 if special]
        row["tokens"] = [[s, round(abs(a) / largest, 3), int(i in special)] for s, i, a in pieces]
        row["at"] = c.at - begin
    return row


def latent_page(latent: Any, special: frozenset[int], url: str | None) -> dict[str, Any]:
    """Everything about a latent, each token text once; about 30 kB for 40 contexts of 31 tokens.

    Args:
        latent: result of `index.latent`.
        special: ids of tokens to show as a mark.
        url: address of its page on Neuronpedia, if it has one.
    """
    page, words = latent.to_dict(digits=4), {}
    for context in (*page["top"], *(c for group in page["groups"] for c in group)):
        context["words"] = [words.setdefault(text, len(words)) for text in context.pop("tokens")]
        context["special"] = [j for j, i in enumerate(context["ids"]) if i in special]
    return page | {"words": list(words), "url": url}


def short(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def densities(density: Any) -> dict[str, Any]:
    """Histogram of log10 density in bins of 0.25, and the number of latents that never fire.

    Args:
        density: density of each latent, a pandas Series of fractions.
    """
    fires = density[density > 0]
    quarter = (fires.map(math.log10) * 4).map(math.floor).clip(-_QUARTERS, -1)
    counts = quarter.value_counts()
    return {"counts": [int(counts.get(q, 0)) for q in range(-_QUARTERS, 0)], "silent": int((density == 0).sum())}


def tried(tokens: Sequence[str], special: Sequence[int], active: Any) -> dict[str, Any]:
    """A prompt's tokens and active latents with their activations, sorted by share of their largest activation.

    Args:
        tokens: texts of the tokens.
        special: positions of the tokens to show as a mark.
        active: `index.find(...)`.
    """
    best = active.sort_values("of_max", ascending=False, kind="stable").latent.drop_duplicates()
    acts = {
        i: [[int(p), short(a)] for p, a in zip(g.position, g.activation, strict=True)]
        for i, g in active.groupby("latent")
    }
    labels = {str(i): label for i, label in zip(active.latent, active.label, strict=True)}
    listed = [[int(i), acts[i]] for i in best]
    return {"tokens": list(tokens), "special": list(special), "latents": listed, "labels": labels}
