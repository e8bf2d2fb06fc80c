"""What a page about one latent shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from saewb.features.counts import N_BINS
from saewb.features.token_texts import Words
from saewb.features.top_contexts import EMPTY


@dataclass(frozen=True)
class Context:
    """A piece of text and how strongly the latent fires on each of its tokens."""

    tokens: tuple[str, ...]  # their text; joined it is the text of the piece
    ids: tuple[int, ...]  # token ids
    acts: tuple[float, ...]  # the latent's activation at each, 0 at special tokens
    at: int  # which of them the context is about
    row: int  # number of the row of text it is from
    position: int  # in that row, of the token it is about
    # Loss at each token without the latent, less loss with it, in nats; None where it was not asked for.
    loss_effects: tuple[float, ...] | None = None

    @property
    def value(self) -> float:
        """The activation at the token it is about."""
        return self.acts[self.at]

    @property
    def token(self) -> str:
        """The text of the token it is about."""
        return self.tokens[self.at]

    @property
    def text(self) -> str:
        """The piece, as one string."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Logit:
    """A word that a latent makes more or less likely."""

    token: str  # its text
    id: int  # its token id
    effect: float  # logits per unit of activation, where the final norm divides by 1; see `FeatureIndex.latent`


@dataclass(frozen=True)
class Neighbor:
    """A latent with a direction near to this one's."""

    latent: int  # its index
    cosine: float  # -1..1


@dataclass(frozen=True)
class Coactive:
    """A latent that fires on the same tokens as this one."""

    latent: int  # its index
    together: int  # sampled tokens on which both fire
    given: float  # share of this one's (sampled) firings on which that one fires too
    phi: float  # correlation of whether they fire, -1..1


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width."""

    edges: tuple[float, ...]  # one more than counts, ascending
    counts: tuple[int, ...]  # values in [edges[i], edges[i + 1])


@dataclass(frozen=True)
class PositionDensity:
    """How often a latent fires by position in the row, in groups 0, 1, 2-3, 4-7, ..."""

    starts: tuple[int, ...]  # first position of each group
    density: tuple[float, ...]  # fraction of the group's tokens on which it fires; 0 where the group has none
    n_tokens: tuple[int, ...]  # tokens of each group


@dataclass(frozen=True)
class Latent:
    """Everything an index knows about one latent."""

    index: int  # which latent
    n_active: int  # tokens on which it fires
    density: float  # the same as a fraction of all tokens
    max: float  # its strongest activation (with its sign), 0 if it never fires
    mean: float  # of the activations that are not 0; 0 if it never fires
    histogram: Histogram = field(repr=False)  # of |activation|, where it is not 0
    positions: PositionDensity = field(repr=False)  # how often it fires by position in the row
    top: tuple[Context, ...] = field(repr=False)  # where it is strongest, strongest first
    quantiles: tuple[tuple[Context, ...], ...] = field(repr=False)  # sampled firings, weakest group first
    logits_top: tuple[Logit, ...] = field(repr=False)  # most raised first; empty where it has no effect on logits
    logits_bottom: tuple[Logit, ...] = field(repr=False)  # most lowered first
    logit_histogram: Histogram | None = field(repr=False)  # of the effects on all words
    nearest_by_decoder: tuple[Neighbor, ...] = field(repr=False)  # largest |cosine| of decoder rows first
    nearest_by_encoder: tuple[Neighbor, ...] = field(repr=False)  # the same of encoder columns
    coactive: tuple[Coactive, ...] = field(repr=False)  # largest phi first
    decoder_norm: float  # length of its decoder row


def page(tensors: Mapping[str, Tensor], words: Words, i: int, n_tokens: int, before: int, ctx: int, n_q: int) -> Latent:
    """Latent `i` of an index's tensors; reads its rows of them only."""
    n_active = int(tensors["counts.by_position"][i].sum())
    top = _contexts(tensors, "top", words, i, before, ctx)
    return Latent(
        index=i,
        n_active=n_active,
        density=n_active / n_tokens if n_tokens else 0.0,
        max=top[0].value if top else 0.0,
        mean=float(tensors["counts.total"][i]) / n_active if n_active else 0.0,
        histogram=_histogram(tensors, i),
        positions=_positions(tensors, i),
        top=top,
        quantiles=quantile_groups(_contexts(tensors, "sample", words, i, before, ctx), n_q),
        logits_top=_logits(tensors, "top", words, i),
        logits_bottom=_logits(tensors, "bottom", words, i),
        logit_histogram=_logit_histogram(tensors, i),
        nearest_by_decoder=_neighbors(tensors, "decoder", i),
        nearest_by_encoder=_neighbors(tensors, "encoder", i),
        coactive=_coactive(tensors, i),
        decoder_norm=float(tensors["decoder_norm"][i]) if "decoder_norm" in tensors else float("nan"),
    )


def quantile_groups(sample: tuple[Context, ...], n: int) -> tuple[tuple[Context, ...], ...]:
    """A sample of firings cut into `n` groups of equal size (to one), by size of activation, weakest first."""
    ordered = sorted(sample, key=lambda c: (abs(c.value), c.row, c.position))
    cuts = [round(j * len(ordered) / n) for j in range(n + 1)]
    return tuple(tuple(ordered[a:b]) for a, b in pairwise(cuts))


def _contexts(tensors: Mapping[str, Tensor], shelf: str, words: Words, i: int, before: int, ctx: int) -> tuple:
    n = int((tensors[f"{shelf}.order"][i] != EMPTY).sum())
    ids, acts = tensors[f"{shelf}.tokens"][i, :n].tolist(), tensors[f"{shelf}.acts"][i, :n].tolist()
    positions = tensors[f"{shelf}.position"][i, :n].tolist()
    losses = _losses(tensors, i, n) if shelf == "top" else [None] * n
    made = []
    for row, act, position, loss in zip(ids, acts, positions, losses, strict=True):
        inside = [j for j, token in enumerate(row) if token >= 0]
        kept = [row[j] for j in inside]
        of = tuple(loss[j] for j in inside) if loss else None
        spelled = tuple(words.spelled(kept))
        there = tuple(act[j] for j in inside)
        made.append(Context(spelled, tuple(kept), there, before - inside[0], position // ctx, position % ctx, of))
    return tuple(made)


def _losses(tensors: Mapping[str, Tensor], i: int, n: int) -> list:
    if "loss_effects" not in tensors:
        return [None] * n
    rows = tensors["loss_effects"][i, :n]
    return [None if row[0].isnan() else row.tolist() for row in rows] + [None] * (n - len(rows))


def _histogram(tensors: Mapping[str, Tensor], i: int) -> Histogram:
    counts, width = tensors["counts.counts"][i].tolist(), 2.0 ** int(tensors["counts.exponent"][i])
    used = max((b + 1 for b in range(N_BINS) if counts[b]), default=0)
    return Histogram(tuple(b * width for b in range(used + 1)), tuple(counts[:used]))


def _positions(tensors: Mapping[str, Tensor], i: int) -> PositionDensity:
    fired, n = tensors["counts.by_position"][i].tolist(), tensors["counts.n_by_position"].tolist()
    starts = tuple((1 << g) // 2 for g in range(len(n)))
    return PositionDensity(starts, tuple(f / m if m else 0.0 for f, m in zip(fired, n, strict=True)), tuple(n))


def _logits(tensors: Mapping[str, Tensor], end: str, words: Words, i: int) -> tuple[Logit, ...]:
    if f"logits.{end}" not in tensors:
        return ()
    pairs = zip(tensors[f"logits.{end}_ids"][i].tolist(), tensors[f"logits.{end}"][i].tolist(), strict=True)
    return tuple(Logit(words.of(token), token, effect) for token, effect in pairs)


def _logit_histogram(tensors: Mapping[str, Tensor], i: int) -> Histogram | None:
    if "logits.counts" not in tensors:
        return None
    low, high = tensors["logits.range"][i].tolist()
    counts = tensors["logits.counts"][i].tolist()
    return Histogram(tuple(torch.linspace(low, high, len(counts) + 1).tolist()), tuple(counts))


def _neighbors(tensors: Mapping[str, Tensor], by: str, i: int) -> tuple[Neighbor, ...]:
    if f"nearest.{by}" not in tensors:
        return ()
    pairs = zip(tensors[f"nearest.{by}"][i].tolist(), tensors[f"nearest.{by}_cosine"][i].tolist(), strict=True)
    return tuple(Neighbor(latent, cosine) for latent, cosine in pairs)


def _coactive(tensors: Mapping[str, Tensor], i: int) -> tuple[Coactive, ...]:
    if "coactive.latent" not in tensors:
        return ()
    own = int(tensors["coactive.fired"][i])
    rows = (tensors[f"coactive.{name}"][i].tolist() for name in ("latent", "together", "phi"))
    return tuple(Coactive(j, both, both / own, phi) for j, both, phi in zip(*rows, strict=True) if j >= 0)
