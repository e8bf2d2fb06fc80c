"""Cards of a graph's latents: lines from the feature index of their transcoder, for what draws graphs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saewb.errors import explain

if TYPE_CHECKING:
    import pandas as pd

    from saewb.features import FeatureIndex

_TOKENS, _BEFORE, _AFTER = 5, 8, 3


def index_list(index: FeatureIndex | Iterable[FeatureIndex]) -> list[FeatureIndex]:
    """One index or several, as a list."""
    return [index] if hasattr(index, "label_texts") else list(index)


def latents_of(index: FeatureIndex, latents: pd.DataFrame) -> pd.DataFrame:
    """Those of a graph's latents that are of the transcoder of an index: of the layer that it writes to.

    Raises:
        ValueError: if there are none.
    """
    here = latents[latents["layer"] == _layer(index)]
    if here.empty:
        want = f"an index of layer {', '.join(map(str, sorted(latents['layer'].unique())))}"
        raise ValueError(explain(f"{index!r} is of no layer of this graph.", want=want))
    return here


def latent_cards(
    nodes: pd.DataFrame, indexes: Sequence[FeatureIndex], known: dict[tuple[int, int], list[str]] | None = None
) -> dict[str, list[str]]:
    """Lines on each latent, by node id: what it raises, how often it fires, and where it is strongest.

    Args:
        nodes: of a graph.
        indexes: feature indexes of its transcoders.
        known: lines by layer and latent that are there already; new ones are added.
    """
    known = {} if known is None else known
    cards: dict[str, list[str]] = {}
    latents = nodes[nodes["kind"] == "latent"]
    for index in indexes:
        here = latents[latents["layer"] == _layer(index)]
        for node, layer, latent in zip(here["id"], here["layer"], here["latent"], strict=True):
            if (layer, latent) not in known:
                known[layer, latent] = _lines(index.latent(int(latent)))
            cards[node] = known[layer, latent]
    return cards


def _layer(index: FeatureIndex) -> int:
    """Transformer block that its transcoder writes to; -1 outside of blocks."""
    block = re.match(r"blocks\.(\d+)\.", index.info.hook_out or index.info.hook)
    return int(block[1]) if block else -1


def _lines(latent: Any) -> list[str]:
    if not latent.top:
        return ["never fires in the texts of the index"]
    lines = []
    if latent.logits_top:
        lines.append("makes likelier " + ", ".join(repr(logit.token) for logit in latent.logits_top[:_TOKENS]))
    lines.append(f"fires on {100 * latent.density:.3g} % of tokens, largest {latent.max:.3g}")
    context = latent.top[0]
    before = "".join(context.tokens[max(0, context.at - _BEFORE) : context.at])
    after = "".join(context.tokens[context.at + 1 : context.at + 1 + _AFTER])
    token = context.tokens[context.at]
    space = token[: len(token) - len(token.lstrip())]
    text = f"{before}{space}\u00ab{token[len(space) :]}\u00bb{after}"
    lines.append("strongest in: " + text.replace("\n", "\u21b5").strip())
    return lines
