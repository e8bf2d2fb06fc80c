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
    """How likely a person can name each latent from its contexts, where one token is not all there is to it; 0 and up.

        coherence * (1 - single_token_share) * (1 - single_token_share of the strongest contexts)^2 * words

    coherence: how much more often than by chance two of its ten strongest contexts share a token up to where it fires,
    each token weighted with its -log frequency among the contexts of all latents. words: the share of the tokens it
    fires on that have three letters or more, since features of digits and initials are many and say little.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> texts = [d.text for d in saewb.embedded.held_out_texts()[:12]]
        >>> len(saewb.build_index(model, sae, texts).ranking(10))
        10
    """
    ids = tensors["top.tokens"][:, : min(_FOR_RANK, facts.n_top), : facts.before + 1].long()
    frequency = _frequency(ids)
    coherence = torch.cat([_coherence(part, frequency) for part in ids.split(_BLOCK)])
    peaks = tensors["top.tokens"][:, :, facts.before].where(tensors["top.order"] != EMPTY, -1)
    wordy = torch.zeros(len(frequency) + 1)
    wordy[[t for t, text in words.strings.items() if t < len(frequency) and sum(map(str.isalpha, text)) >= 3]] = 1
    of_words = wordy[peaks.long()].sum(1) / (peaks >= 0).sum(1).clamp_min(1)  # the last one, at -1, is 0
    single, single_of_top = commonest(about(facts, tensors))[1], commonest(peaks)[1]
    return coherence * (1 - single) * (1 - single_of_top).square() * of_words


_FOR_RANK = 10  # strongest contexts that the ranking looks at
_BLOCK = 2048  # latents looked at at a time


def _occurrences(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(latent, token) for each context of a latent that has the token, once per context; `ids [latents, slots, w]`."""
    latents, slots, _ = ids.shape
    slot = torch.arange(latents * slots).view(latents, slots, 1)
    key = (slot * size + ids)[ids >= 0].unique()
    return key // size // slots, key % size


def _frequency(ids: Tensor) -> Float[Tensor, " d_vocab"]:
    """Of all contexts, the share that have each token."""
    size = int(ids.max().clamp_min(0)) + 1
    counts = torch.zeros(size, dtype=torch.long)
    for part in ids.split(_BLOCK):
        counts += torch.bincount(_occurrences(part, size)[1], minlength=size)
    return counts.float() / (ids.shape[0] * ids.shape[1])


def _coherence(ids: Tensor, frequency: Tensor) -> Float[Tensor, " latents"]:
    latents, slots, size = *ids.shape[:2], len(frequency)
    if slots < 2:
        return torch.zeros(latents)
    latent, token = _occurrences(ids, size)
    pair, n = (latent * size + token).unique(return_counts=True)
    latent, chance = pair // size, frequency[pair % size]
    excess = (n * (n - 1) / (slots * (slots - 1)) - chance.square()).clamp_min(0)
    return torch.zeros(latents).index_add_(0, latent, excess * -chance.log())
