"""Token-set enrichment analysis (TSEA): which sets of tokens a latent promotes.

1. Sort the vocabulary by the latent's logit effects, the most promoted token first; equal ones count at once.
2. Compute a running sum along it: plus 1 / hits at a token of the set, minus 1 / misses at any other.
3. The score is the sum farthest from 0: near 1 if the set is at the top, near -1 if at the bottom.
4. Random sets of the same size give the null distribution.

The sum has its extremes at tokens of the set, so they follow from the ranks of those, without the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb._indices import Indices, indices_of
from saewb.errors import explain
from saewb.metrics import has_float64

if TYPE_CHECKING:
    import pandas as pd

_TILE = 2**23  # effects sorted at a time, random numbers drawn at a time


@torch.no_grad()
def enrich(
    effects: Float[Tensor, "latents d_vocab"],
    sets: Mapping[str, Indices],
    *,
    latents: Indices = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score how high or low each token set ranks in the vocabulary, sorted by each latent's logit effects.

        score = the extreme of  #{hits so far} / hits - #{misses so far} / misses      (with its sign, -1..1)
        p     = (1 + #{random sets of that size with |score| at least as large}) / (1 + n_permutations)
        q     = smallest false discovery rate, among all tests, at which this one is significant (Benjamini-Hochberg)

    1 is the whole set at the top, 0 the expectation of a random large set. Tokens of equal effect count at once, so
    that their order does not matter: a latent of no effect scores 0. A random set's score depends on its size only, so
    sets of one size share their permutations, and so do latents; p is never 0, and never below
    1 / (1 + n_permutations).

    Args:
        effects: logit effects of each latent, `sae.W_dec @ saewb.models.unembed.unembedding(model)` for an SAE on the
            residual stream, at any scale: only their order matters.
        sets: token ids by name, as from `token_sets`, or masks of the vocabulary; each with some tokens, but not all.
        latents: indices of the rows of `effects`; None is 0, 1, ...
        n_permutations: random sets for each size.
        seed: of the random sets.

    Returns:
        A row per latent and set, sorted by p and then by |score|: latent, set, size, score, p, q.

    Raises:
        TypeError: for effects that are not a matrix.
        ValueError: for a set of no or all tokens, ids outside the vocabulary, nan in effects, or no permutations.

    References:
        Subramanian et al. 2005, "Gene set enrichment analysis", with weight 0 (a Kolmogorov-Smirnov statistic).

    Example:
        >>> effects = torch.arange(10.0)[None].repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
        >>> table = enrich(effects, {"last three": [7, 8, 9]}, n_permutations=99)
        >>> table.sort_values("latent").score.tolist()
        [1.0, -1.0]
    """
    import pandas as pd

    if not isinstance(effects, Tensor) or effects.ndim != 2:
        what = f"enrich got {type(effects).__name__}{list(getattr(effects, 'shape', [])) or ''} for effects."
        fix = "saewb.enrich(sae.W_dec @ saewb.models.unembed.unembedding(model), sets)"
        raise TypeError(explain(what, want="a tensor [latents, d_vocab]", fix=fix))
    names = list(range(len(effects))) if latents is None else indices_of(latents, "latents", repeats=True).tolist()
    members = {name: _members(name, ids, effects.shape[1]) for name, ids in sets.items()}
    _check(effects, names, members, n_permutations)
    scores = enrichment_scores(effects, list(members.values()))
    sizes = [len(ids) for ids in members.values()]
    distinct = sorted(set(sizes))
    null = dict(
        zip(distinct, _null_scores(distinct, effects.shape[1], n_permutations, seed, effects.device), strict=True)
    )
    p = torch.stack([_p_values(scores[:, i], null[size]) for i, size in enumerate(sizes)], 1)
    columns = {
        "latent": [name for name in names for _ in members],
        "set": list(members) * len(names),
        "size": sizes * len(names),
        "score": scores.flatten().tolist(),
        "p": p.flatten().tolist(),
        "q": q_values(p.flatten()).tolist(),
    }
    table = pd.DataFrame(columns)
    order = (
        table.assign(magnitude=table.score.abs())
        .sort_values(["p", "magnitude"], ascending=[True, False], kind="stable")
        .index
    )
    return table.loc[order].reset_index(drop=True)


@torch.no_grad()
def enrichment_scores(
    effects: Float[Tensor, "latents d_vocab"], sets: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, "latents sets"]:
    """Scores of `enrich` alone: the extreme of the running sum, with its sign, -1..1; in float64.

    Args:
        effects: logit effect of each latent on each token.
        sets: distinct ids, at least one and not all.

    Example:
        >>> enrichment_scores(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), [torch.tensor([0, 2])]).tolist()
        [[0.5]]
    """
    members = [torch.zeros(effects.shape[1], dtype=torch.bool).index_fill_(0, ids, True) for ids in sets]
    tiles = (tile.sort(dim=1, descending=True) for tile in effects.split(max(1, _TILE // effects.shape[1])))
    return torch.cat([_scores(order, members, values) for values, order in tiles]).cpu()


def _scores(
    order: Int[Tensor, "n d_vocab"],
    members: Sequence[Bool[Tensor, " d_vocab"]],
    values: Float[Tensor, "n d_vocab"] | None = None,
) -> Float[Tensor, "n sets"]:
    """Score each set along each row, an order of all tokens; None for `values` if no two of a row are equal."""
    flat = order.flatten()
    hits = (member.to(order.device).index_select(0, flat).view(order.shape) for member in members)
    ranks = [hit.nonzero()[:, 1].view(len(order), -1) for hit in hits]
    if values is None or not bool((is_equal := values[:, 1:] == values[:, :-1]).any()):
        return torch.stack([_extreme(of_set, of_set, of_set + 1, order.shape[1]) for of_set in ranks], 1)
    # Of equal effects the running sum counts before the first and after the last only.
    place = torch.arange(order.shape[1], device=order.device)
    first, last = place.repeat(len(order), 1), place.repeat(len(order), 1)
    first[:, 1:].masked_fill_(is_equal, 0)
    last[:, :-1].masked_fill_(is_equal, len(place))
    first, last = first.cummax(1).values, last.flip(1).cummin(1).values.flip(1)
    ends = ((of_set, first.gather(1, of_set), last.gather(1, of_set) + 1) for of_set in ranks)
    return torch.stack([_extreme(*of_set, order.shape[1]) for of_set in ends], 1)


def _extreme(
    ranks: Int[Tensor, "n hits"], first: Int[Tensor, "n hits"], end: Int[Tensor, "n hits"], d_vocab: int
) -> Float[Tensor, " n"]:
    """The running sum farthest from 0: its maximum is after the tokens equal to a hit, its minimum before them.

    Args:
        ranks: of the hits, ascending.
        first: rank of the first token of equal effect.
        end: rank after the last one.
        d_vocab: number of tokens.
    """
    if not has_float64(ranks.device):
        ranks, first, end = ranks.cpu(), first.cpu(), end.cpu()
    hits = ranks.shape[1]
    before = torch.arange(hits, device=ranks.device).expand_as(ranks)
    after = before + 1
    if bool((first[:, 1:] == first[:, :-1]).any()):  # hits of equal effect
        before, after = torch.searchsorted(first, first), torch.searchsorted(first, first, right=True)
    top, bottom = (
        n / hits - (rank - n) / (d_vocab - hits) for n, rank in ((after.double(), end), (before.double(), first))
    )
    top, bottom = top.amax(1), bottom.amin(1)
    return torch.where(top >= -bottom, top, bottom)


def _null_scores(
    sizes: Sequence[int], d_vocab: int, n: int, seed: int, device: torch.device
) -> Float[Tensor, "sizes n"]:
    """Sorted |score| of `n` random sets of each size: the first tokens of a random order of the vocabulary.

    Drawn on the CPU, so that they are the same on every device; ordered and scored on `device`.
    """
    rng = torch.Generator().manual_seed(seed)
    members = [torch.arange(d_vocab) < size for size in sizes]
    scores, step = [], max(1, _TILE // d_vocab)
    for start in range(0, n, step):
        # float64, so that there are no ties
        numbers = torch.rand(min(step, n - start), d_vocab, generator=rng, dtype=torch.float64)
        scores.append(_scores(numbers.to(device if has_float64(device) else "cpu").argsort(dim=1), members))
    return torch.cat(scores).abs().T.contiguous().sort(dim=1).values.cpu()


def _p_values(scores: Float[Tensor, " latents"], null: Float[Tensor, " n"]) -> Float[Tensor, " latents"]:
    # Slightly below, so that rounding does not separate equal scores.
    at_least = len(null) - torch.searchsorted(null, scores.abs() - 1e-12)
    return (1 + at_least).double() / (1 + len(null))


def q_values(p: Float[Tensor, " tests"]) -> Float[Tensor, " tests"]:
    """Smallest false discovery rate at which each test is significant, by Benjamini and Hochberg.

    Args:
        p: of all tests, float64.

    Example:
        >>> q_values(torch.tensor([0.01, 0.9, 0.02, 0.03], dtype=torch.float64)).tolist()
        [0.04, 0.9, 0.04, 0.04]
    """
    value, order = p.sort(stable=True)
    scaled = value * len(p) / torch.arange(1, len(p) + 1)
    return torch.empty_like(p).scatter_(0, order, scaled.flip(0).cummin(0).values.flip(0).clamp(max=1))


def _members(name: str, ids: Indices, d_vocab: int) -> Int[Tensor, " tokens"]:
    members = indices_of(ids, f"ids of the set {name!r}", d_vocab).unique()
    if len(members) == 0 or len(members) >= d_vocab:
        what = f"the set {name!r} has {len(members)} of {d_vocab} tokens."
        raise ValueError(explain(what, want="some tokens, and not all"))
    return members


def _check(effects: Tensor, names: list[int], members: Mapping[str, Tensor], n_permutations: int) -> None:
    if len(names) != len(effects):
        what = f"enrich got {len(names)} latents for {len(effects)} rows of effects."
        raise ValueError(explain(what, want="a name per row", fix="enrich(effects[latents], sets, latents=latents)"))
    if not members or len(effects) == 0:
        raise ValueError(explain("enrich got no sets or no latents.", want="some", fix="token_sets(tokenizer)"))
    if n_permutations < 1:
        raise ValueError(explain(f"enrich got n_permutations={n_permutations}.", want="at least 1"))
    if bool(effects.isnan().any()):
        raise ValueError(explain("effects have nan in them, which is in no order.", want="numbers"))
