"""One page about an index for anyone with a browser: one file, no network, no kernel.

The data are JSON, with tokens and activations of all contexts packed in two binary tables: 500 features of 40 contexts
take about 4 MB. The page has a content policy that forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import json
import os
import secrets
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saewb.errors import explain
from saewb.features.page_script import SCRIPT
from saewb.features.page_style import STYLE

if TYPE_CHECKING:
    from saewb.features.index import FeatureIndex
    from saewb.features.latent import Context, Latent

SHOWN = 500  # features on a page if none are named
_FULL = 32767  # an activation as large as a feature's largest one, as an int16

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>
<body><aside><div class="head"><h1>{title}</h1><p>{about}</p></div>
<div class="find"><input id="search" type="search" placeholder="Search text, words, a number"
 aria-label="Search features" autocomplete="off" spellcheck="false">
<button id="theme" aria-label="Light or dark" title="Light or dark">&#9680;</button></div>
<div class="count"><span id="count"></span></div><ol id="list" role="listbox" aria-label="Features"></ol></aside>
<main id="page" tabindex="-1"></main><div id="tip"></div>
<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>
"""


def write_page(index: FeatureIndex, path: Path, latents: Sequence[int] | None, title: str | None) -> Path:
    """See `FeatureIndex.save_html`."""
    chosen = index.ranking(SHOWN) if latents is None else [int(i) for i in latents]
    if not chosen:
        raise ValueError(explain("save_html got no latents.", want="at least one", fix="latents=[0]"))
    if path.is_dir():
        raise IsADirectoryError(explain(f"{str(path)!r} is a folder.", fix=f"save_html({str(path / 'index.html')!r})"))
    facts = index.facts
    title = title or f"Features of {facts.model} at {facts.hook}"
    about = f"{len(index):,} latents on {facts.n_tokens:,} tokens. {facts.sae}"
    filled = _PAGE.format(
        title=html.escape(title), about=html.escape(about), style=STYLE, script=SCRIPT, data=_data(index, chosen)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(filled, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path.resolve()


def _data(index: FeatureIndex, latents: Sequence[int]) -> str:
    packed = _Packed()
    features = [packed.feature(index.latent(i)) for i in latents]
    wide = len(packed.words) > 2**16
    said = {
        "words": list(packed.words),
        "wide": wide,
        "special": [index.words.of(i) for i in index.facts.special],
        "tokens": _base64(array("I" if wide else "H", packed.tokens)),
        "acts": _base64(packed.acts),
        "starts": index.latent(latents[0]).positions.starts,
        "features": features,
    }
    # No "<" in it, so that nothing in it can end the script element it is in.
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _base64(values: array) -> str:
    import sys

    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


class _Packed:
    """Words, each once, and the tokens and activations of all contexts one after another."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.tokens: list[int] = []
        self.acts = array("h")

    def feature(self, latent: Latent) -> dict[str, Any]:
        contexts = [*latent.top, *(c for group in latent.quantiles for c in group)]
        scale = max((abs(a) for c in contexts for a in c.acts), default=0.0) or 1.0
        histogram, logits = latent.histogram, latent.logit_histogram
        return {
            "i": latent.index,
            "n": latent.n_active,
            "density": _short(latent.density),
            "max": _short(latent.max),
            "mean": _short(latent.mean),
            "norm": _short(latent.decoder_norm) if latent.decoder_norm == latent.decoder_norm else 0,
            "scale": scale,
            "h": {"w": histogram.edges[1] if histogram.counts else 1, "c": histogram.counts},
            "lh": logits and {"a": _short(logits.edges[0]), "b": _short(logits.edges[-1]), "c": logits.counts},
            "lt": [[self._word(x.token), _short(x.effect)] for x in latent.logits_top],
            "lb": [[self._word(x.token), _short(x.effect)] for x in latent.logits_bottom],
            "nd": [[x.latent, _short(x.cosine)] for x in latent.nearest_by_decoder],
            "co": [[x.latent, x.together, _short(x.given)] for x in latent.coactive],
            "p": [_short(d) for d in latent.positions.density],
            "top": [self._context(c, scale) for c in latent.top],
            "groups": [[self._context(c, scale) for c in group[::-1]] for group in latent.quantiles[::-1]],
        }

    def _context(self, context: Context, scale: float) -> dict[str, Any]:
        packed: dict[str, Any] = {"o": len(self.tokens), "n": len(context.tokens), "at": context.at}
        self.tokens += map(self._word, context.tokens)
        self.acts.extend(_level(a / scale) for a in context.acts)
        if context.loss_effects is not None:
            packed["l"] = [_short(x) for x in context.loss_effects]
        return packed

    def _word(self, text: str) -> int:
        return self.words.setdefault(text, len(self.words))


def _level(share: float) -> int:
    level = round(share * _FULL)
    return level or (0 if share == 0 else 1 if share > 0 else -1)  # however weak, it fires


def _short(value: float) -> float:
    return float(f"{value:.4g}")
