"""What the front end is sent about latents: JSON, with each word of a page once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_QUARTERS = 24  # of decades of density, from 1e-6 to 1
_BEFORE, _AFTER = 14, 6  # of a row's snippet: characters before the token it is about, tokens from it on


def latent_row(latent: Any, special: frozenset[int]) -> dict[str, Any]:
    """A latent's row of the table: its figures and the heart of its strongest context (about 300 bytes).

    Args:
        latent: as `index.latent` gives it.
        special: ids of tokens to show as a mark.
    """
    made = {"latent": latent.index, "density": short(latent.density), "max": short(latent.max), "tokens": []}
    if latent.logits_top:
        made["word"] = latent.logits_top[0].token
    if latent.top:
        c = latent.top[0]
        begin, end, room = c.at, c.at + _AFTER, _BEFORE
        while begin > 0 and (room := room - len(c.tokens[begin - 1])) >= 0:
            begin -= 1
        pieces = zip(c.tokens[begin:end], c.ids[begin:end], c.acts[begin:end], strict=True)
        largest = max(map(abs, c.acts)) or 1.0
        # [text, share of the largest activation, 1 if special]
        made["tokens"] = [[s, round(abs(a) / largest, 3), int(i in special)] for s, i, a in pieces]
        made["at"] = c.at - begin
    return made


def latent_page(latent: Any, special: frozenset[int], url: str | None) -> dict[str, Any]:
    """Everything about a latent, about 30 kB for 40 contexts of 31 tokens."""
    words: dict[str, int] = {}
    groups = [latent.top, *latent.quantiles[::-1]]
    packed = [[_context(c, words, special) for c in sorted(g, key=lambda c: -abs(c.value))] for g in groups]
    logits = latent.logit_histogram
    return {
        "latent": latent.index,
        "n_active": latent.n_active,
        "density": short(latent.density),
        "max": short(latent.max),
        "mean": short(latent.mean),
        "norm": short(latent.decoder_norm) if latent.decoder_norm == latent.decoder_norm else None,
        "scale": max((abs(a) for g in groups for c in g for a in c.acts), default=0.0) or 1.0,
        "histogram": _histogram(latent.histogram),
        "positions": {"starts": latent.positions.starts, "density": list(map(short, latent.positions.density))},
        "logits": logits and _histogram(logits),
        "raised": [[x.token, x.id, short(x.effect)] for x in latent.logits_top],
        "lowered": [[x.token, x.id, short(x.effect)] for x in latent.logits_bottom],
        "by_decoder": [[x.latent, short(x.cosine)] for x in latent.nearest_by_decoder],
        "by_encoder": [[x.latent, short(x.cosine)] for x in latent.nearest_by_encoder],
        "coactive": [[x.latent, short(x.given), short(x.phi), x.together] for x in latent.coactive],
        "words": list(words),
        "top": packed[0],
        "groups": packed[1:],
        "url": url,
    }


def _histogram(histogram: Any) -> dict[str, Any]:
    edges: Sequence[float] = histogram.edges
    return {"low": short(edges[0]), "high": short(edges[-1]), "counts": list(histogram.counts)}


def _context(context: Any, words: dict[str, int], special: frozenset[int]) -> dict[str, Any]:
    made = {
        "at": context.at,
        "row": context.row,
        "position": context.position,
        "words": [words.setdefault(text, len(words)) for text in context.tokens],
        "ids": list(context.ids),
        "acts": [short(a) for a in context.acts],
        "special": [j for j, i in enumerate(context.ids) if i in special],
    }
    if context.loss_effects is not None:
        made["loss"] = [short(x) for x in context.loss_effects]
    return made


def short(value: float) -> float:
    """Four digits: what the eye can use."""
    return float(f"{value:.4g}")


def densities(density: Any) -> dict[str, Any]:
    """How many latents fire how often: counts of log10 density in bins of a quarter, and of those that never fire.

    Args:
        density: of each latent, a pandas Series of fractions.
    """
    fires = density[density > 0]
    quarter = (fires.map(math.log10) * 4).map(math.floor).clip(-_QUARTERS, -1)
    counts = quarter.value_counts()
    return {"counts": [int(counts.get(q, 0)) for q in range(-_QUARTERS, 0)], "silent": int((density == 0).sum())}


def tried(tokens: Sequence[str], special: Sequence[int], found: Any) -> dict[str, Any]:
    """A prompt's tokens, and for each latent that fires on it where and how much, those nearest to their largest first.

    Args:
        tokens: their texts.
        special: places of those to show as a mark.
        found: `index.find(...)`.
    """
    best = found.sort_values("of_max", ascending=False, kind="stable").latent.drop_duplicates()
    fired = {
        i: [[int(p), short(a)] for p, a in zip(g.position, g.activation, strict=True)]
        for i, g in found.groupby("latent")
    }
    return {"tokens": list(tokens), "special": list(special), "latents": [[int(i), fired[i]] for i in best]}
