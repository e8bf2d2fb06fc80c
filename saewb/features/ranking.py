"""How likely a person can name the latents of an index."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.features.config import IndexFacts
from saewb.features.token_texts import Words
from saewb.features.top_contexts import EMPTY

_SHELVES = ("top", "sample")
_FOR_RANK = 10  # strongest contexts whose words are compared
_BLOCK = 2048  # latents looked at at a time
_PAIRS = 4096  # (latent, token) pairs at a time: what fits the processor's cache
_SIGNS = 256  # numbers that stand for the latents a token is found with


def about(facts: IndexFacts, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tokens that all contexts of each latent are about, -1 for none, `[d_sae, contexts]`."""
    parts = [tensors[f"{s}.tokens"][:, :, facts.before].where(tensors[f"{s}.order"] != EMPTY, -1) for s in _SHELVES]
    return torch.cat(parts, 1)


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

        coherence * kinship * (1 - single_token_share) * (1 - single_token_share of the strongest contexts)^2 * words

    coherence: how much more often than by chance two of its ten strongest contexts share a token up to where it fires,
    each token weighted with its -log frequency among the contexts of all latents. kinship: whether the tokens that it
    fires on are of a kind, as "west" and "southeast" are, judged by the other latents; see `kinship`. words: the share
    of the tokens it fires on that have three letters or more, since features of digits and initials are many and say
    little.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> texts = [d.text for d in saewb.tiny.held_out_texts()[:12]]
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
    tokens = about(facts, tensors)
    single, single_of_top = commonest(tokens)[1], commonest(peaks)[1]
    return coherence * kinship(tokens) * (1 - single) * (1 - single_of_top).square() * of_words


def kinship(tokens: Tensor) -> Float[Tensor, " d_sae"]:
    """How much of a kind the tokens are that each latent fires on, by what other latents fire on; 0 to 1.

        sum_{t != u} p_t p_u cos(c_t, c_u) / sum_{t != u} p_t p_u

    p_t: share of the latent's contexts that are about token t. c_t: of each other latent, how many of its contexts are
    about t. Tokens of a kind ("west", "southeast") have other latents in common; what a latent fires on at random has
    none. The cosine is of 256 random sums of c_t with signs, the same ones each time: .06 off for one pair of tokens,
    .01 for a latent of the embedded SAE. Memory: 1 kB for each latent and each token that a context is about.

    Args:
        tokens: that all contexts of each latent are about, -1 for none, `[d_sae, contexts]`.
    """
    latent, token, n = _counted(tokens)
    share = n / torch.zeros(len(tokens)).index_add_(0, latent, n)[latent]
    signs = torch.randint(0, 2, (len(tokens), _SIGNS), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    sums = torch.zeros(int(token.max()) + 1 if len(token) else 0, _SIGNS)
    parts = torch.arange(len(latent)).split(_PAIRS)
    for part in parts:
        sums.index_add_(0, token[part], n[part, None] * signs[latent[part]])
    total, alone = torch.zeros(len(tokens), _SIGNS), torch.zeros(len(tokens))
    for part in parts:
        others = sums[token[part]] - n[part, None] * signs[latent[part]]  # exact: sums of small integers
        known = torch.nn.functional.normalize(others, dim=1) * share[part, None]
        total.index_add_(0, latent[part], known)
        alone.index_add_(0, latent[part], known.square().sum(1))
    pairs = 1 - torch.zeros(len(tokens)).index_add_(0, latent, share.square())
    return ((total.square().sum(1) - alone) / pairs.clamp_min(1e-6)).clamp(0, 1)


def _counted(tokens: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, " pairs"]]:
    """Each latent with each token it fires on, numbered from 0, and in how many of its contexts."""
    vocabulary, place = tokens.unique(return_inverse=True)
    key, n = (torch.arange(len(tokens))[:, None] * len(vocabulary) + place)[tokens >= 0].unique(return_counts=True)
    return key // len(vocabulary), key % len(vocabulary), n.float()


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
