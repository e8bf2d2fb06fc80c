"""All latents of an index at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.index.facts import IndexFacts
from saewb.index.shelf import EMPTY
from saewb.index.words import Words

if TYPE_CHECKING:
    import pandas as pd


def table(facts: IndexFacts, tensors: Mapping[str, Tensor], words: Words) -> pd.DataFrame:
    """One row per latent; see `FeatureIndex.table`."""
    import pandas as pd

    n_active = tensors["counts.by_position"].sum(1)
    token, share = commonest(about(facts, tensors))
    columns = {
        "latent": range(facts.d_sae),
        "density": (n_active.double() / max(1, facts.n_tokens)).numpy(),
        "n_active": n_active.numpy(),
        "max": tensors["top.value"][:, 0].clone().numpy(),
        "mean": (tensors["counts.total"] / n_active.clamp_min(1)).numpy(),
        "top_token": [words.of(t) if t >= 0 else "" for t in token.tolist()],
        "single_token_share": share.numpy(),
    }
    if "logits.top_ids" in tensors:
        columns["top_logit"] = [words.of(t) for t in tensors["logits.top_ids"][:, 0].tolist()]
        columns["top_logit_effect"] = tensors["logits.top"][:, 0].clone().numpy()
    if "decoder_norm" in tensors:
        columns["decoder_norm"] = tensors["decoder_norm"].clone().numpy()
    columns["contextual"] = readable(facts, tensors, words).numpy()
    return pd.DataFrame(columns).set_index("latent")


def about(facts: IndexFacts, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tokens that all contexts of each latent are about, -1 for none, `[d_sae, contexts]`."""
    parts = [tensors[f"{s}.tokens"][:, :, facts.before].where(tensors[f"{s}.order"] != EMPTY, -1) for s in _SHELVES]
    return torch.cat(parts, 1)


_SHELVES = ("top", "sample")


def commonest(tokens: Tensor) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """Of each row the number that occurs most (the smallest of equals) and its share; -1 counts as nothing."""
    ordered = tokens.long().sort(1).values
    there = ordered >= 0
    starts = torch.ones_like(there)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Length of the run so far at each place: its place less that of the last start.
    place = torch.arange(ordered.shape[1]).expand_as(ordered)
    length = (place - torch.where(starts, place, 0).cummax(1).values + 1).where(there, 0)
    longest, where = length.max(1)
    token = ordered.gather(1, where[:, None])[:, 0].where(longest > 0, -1)
    return token, longest / there.sum(1).clamp_min(1)


def readable(facts: IndexFacts, tensors: Mapping[str, Tensor], words: Words) -> Float[Tensor, " d_sae"]:
    """How likely a person can name each latent from its contexts, where one token is not all there is to it."""
    return 1 - commonest(about(facts, tensors))[1]
