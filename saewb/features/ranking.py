"""Interpretability score of latents, by which they are ranked, and the table of all latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.features.config import IndexInfo
from saewb.features.token_texts import MAX_TOKEN_ID, TokenTexts
from saewb.features.top_contexts import EMPTY

if TYPE_CHECKING:
    import pandas as pd

_N_COMPARED = 10  # top contexts whose tokens are compared
_BLOCK = 2048  # latents at a time
_PAIRS = 4096  # (latent, token) pairs at a time: what fits the processor's cache
_N_SIGNS = 256  # dimensions of the random projection of a token's latents


def latent_table(info: IndexInfo, tensors: Mapping[str, Tensor], texts: TokenTexts) -> pd.DataFrame:
    """Table with one row per latent; see `FeatureIndex.table`."""
    import pandas as pd

    n_active = tensors["counts.by_position"].sum(1)
    token, share = modal_token(peak_tokens(info, tensors))
    columns = {
        "latent": range(info.d_sae),
        "density": (n_active.double() / max(1, info.n_tokens)).numpy(),
        "n_active": n_active.numpy(),
        "max": tensors["top.value"][:, 0].clone().numpy(),
        "mean": (tensors["counts.total"] / n_active.clamp_min(1)).numpy(),
        "top_token": [texts.decode_token(t) if t >= 0 else "" for t in token.tolist()],
        "single_token_share": share.numpy(),
    }
    if "logits.top_ids" in tensors:
        columns["top_logit"] = [texts.decode_token(t) for t in tensors["logits.top_ids"][:, 0].tolist()]
        columns["top_logit_effect"] = tensors["logits.top"][:, 0].clone().numpy()
    if "decoder_norm" in tensors:
        columns["decoder_norm"] = tensors["decoder_norm"].clone().numpy()
    columns["contextual"] = interpretability_score(info, tensors, texts).numpy()
    return pd.DataFrame(columns).set_index("latent")


def peak_tokens(info: IndexInfo, tensors: Mapping[str, Tensor]) -> Tensor:
    """Peak token of each context of each latent, -1 for none, `[d_sae, contexts]`."""
    return torch.cat([_peaks(info, tensors, name) for name in ("top", "sample")], 1)


def _peaks(info: IndexInfo, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.tokens"][:, :, info.before].where(tensors[f"{name}.order"] != EMPTY, -1)


def modal_token(tokens: Tensor) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """Most frequent token of each row (the smallest of equals) and its share; -1 is ignored."""
    ordered = tokens.long().sort(1).values
    is_token = ordered >= 0
    starts = torch.ones_like(is_token)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Length of the run of equal tokens so far: the column minus that of its start.
    column = torch.arange(ordered.shape[1]).expand_as(ordered)
    length = (column - torch.where(starts, column, 0).cummax(1).values + 1).where(is_token, 0)
    longest, end = length.max(1)
    token = ordered.gather(1, end[:, None])[:, 0].where(longest > 0, -1)
    return token, longest / is_token.sum(1).clamp_min(1)


def interpretability_score(
    info: IndexInfo, tensors: Mapping[str, Tensor], texts: TokenTexts
) -> Float[Tensor, " d_sae"]:
    """Interpretability score: how likely a person can name a latent that depends on several tokens; 0 and up.

        shared_token * token_coherence * (1 - single_token_share) * (1 - single_token_share of top contexts)^2 * words

    shared_token: how much more often than by chance two of its ten top contexts share a token up to the peak, each
    token weighted with its -log frequency among the contexts of all latents. token_coherence: whether its peak tokens
    are related, as "west" and "southeast" are, by the other latents; see `token_coherence`. words: the share of peak
    tokens of three letters or more, since the many features of digits and initials are of little interest.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> texts = [d.text for d in saewb.tiny.held_out_texts()[:12]]
        >>> len(saewb.build_index(model, sae, texts).ranking(10))
        10
    """
    ids = tensors["top.tokens"][:, : min(_N_COMPARED, info.n_top), : info.before + 1].long()
    frequency = _token_frequency(ids)
    shared = torch.cat([shared_token(part, frequency) for part in ids.split(_BLOCK)])
    peaks = _peaks(info, tensors, "top")
    is_word = torch.zeros(len(frequency) + 1)  # the last entry, for no token, stays 0
    is_word[[t for t, text in texts.strings.items() if t < len(frequency) and sum(map(str.isalpha, text)) >= 3]] = 1
    words = is_word[peaks.long().clamp_min(-1)].sum(1) / (peaks >= 0).sum(1).clamp_min(1)
    tokens = peak_tokens(info, tensors)
    single, single_of_top = modal_token(tokens)[1], modal_token(peaks)[1]
    return shared * token_coherence(tokens) * (1 - single) * (1 - single_of_top).square() * words


def token_coherence(tokens: Tensor) -> Float[Tensor, " d_sae"]:
    """How related the peak tokens of each latent are, by the other latents that share them; 0 to 1.

        sum_{t != u} p_t p_u cos(c_t, c_u) / sum_{t != u} p_t p_u

    p_t: share of the latent's contexts with peak token t. c_t: for each other latent, the number of its contexts with
    peak token t. Related tokens ("west", "southeast") have other latents in common; random ones have none. The cosine
    is of 256 random projections of c_t with fixed signs: its error is .06 for one pair of tokens, .01 for a latent of
    the tiny SAE. Memory: 1 kB for each latent and each peak token.

    Args:
        tokens: peak tokens of the contexts of each latent, -1 for none, `[d_sae, contexts]`.
    """
    latent, token, n = _count_pairs(tokens)
    share = n / torch.zeros(len(tokens)).index_add_(0, latent, n)[latent]
    signs = torch.randint(0, 2, (len(tokens), _N_SIGNS), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    sums = torch.zeros(int(token.max()) + 1 if len(token) else 0, _N_SIGNS)
    parts = torch.arange(len(latent)).split(_PAIRS)
    for part in parts:
        sums.index_add_(0, token[part], n[part, None] * signs[latent[part]])
    total, squares = torch.zeros(len(tokens), _N_SIGNS), torch.zeros(len(tokens))
    for part in parts:
        others = sums[token[part]] - n[part, None] * signs[latent[part]]  # exact: sums of small integers
        unit = torch.nn.functional.normalize(others, dim=1) * share[part, None]
        total.index_add_(0, latent[part], unit)
        squares.index_add_(0, latent[part], unit.square().sum(1))
    pairs = 1 - torch.zeros(len(tokens)).index_add_(0, latent, share.square())
    return ((total.square().sum(1) - squares) / pairs.clamp_min(1e-6)).clamp(0, 1)


def _count_pairs(tokens: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, " pairs"]]:
    """Pairs of latent and peak token, both numbered from 0, and their number of contexts."""
    vocabulary, number = tokens.unique(return_inverse=True)
    key, n = (torch.arange(len(tokens))[:, None] * len(vocabulary) + number)[tokens >= 0].unique(return_counts=True)
    return key // len(vocabulary), key % len(vocabulary), n.float()


def _occurrences(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(latent, token) for each context and each of its distinct tokens; `ids [latents, slots, window]`."""
    latents, slots, _ = ids.shape
    slot = torch.arange(latents * slots).view(latents, slots, 1)
    key = (slot * size + ids)[ids >= 0].unique()
    return key // size // slots, key % size


def _token_frequency(ids: Tensor) -> Float[Tensor, " d_vocab"]:
    """Fraction of all contexts that have each token."""
    size = int(ids.max().clamp_min(0)) + 1 if ids.numel() else 1
    if size > MAX_TOKEN_ID:
        what = f"this index has the token id {size - 1} in a context."
        raise FormatError(explain(what, want=f"0 to {MAX_TOKEN_ID - 1}", fix="saewb.build_index(...) anew"))
    counts = torch.zeros(size, dtype=torch.long)
    for part in ids.split(_BLOCK):
        counts += torch.bincount(_occurrences(part, size)[1], minlength=size)
    return counts.float() / max(1, ids.shape[0] * ids.shape[1])


def shared_token(ids: Tensor, frequency: Float[Tensor, " d_vocab"]) -> Float[Tensor, " latents"]:
    """How much more often than by chance two contexts of a latent share a token, weighted by -log frequency."""
    latents, slots, size = *ids.shape[:2], len(frequency)
    if slots < 2:
        return torch.zeros(latents)
    latent, token = _occurrences(ids, size)
    pair, n = (latent * size + token).unique(return_counts=True)
    latent, chance = pair // size, frequency[pair % size]
    excess = (n * (n - 1) / (slots * (slots - 1)) - chance.square()).clamp_min(0)
    return torch.zeros(latents).index_add_(0, latent, excess * -chance.log())
