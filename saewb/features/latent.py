"""One latent of an index: contexts, histograms, logit effects, neighbors; also as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saewb.features.accumulate import N_BINS
from saewb.features.config import IndexInfo
from saewb.features.labels import label_texts
from saewb.features.token_texts import TokenTexts
from saewb.features.top_contexts import EMPTY


@dataclass(frozen=True)
class Context:
    """A window of text around a peak token, with the activation of the latent at each token."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    ids: tuple[int, ...]
    """Token ids."""
    acts: tuple[float, ...]
    """Activation of the latent at each token, 0 at special ones."""
    at: int
    """Index of the peak token in `tokens`."""
    row: int
    """Number of the row in the text."""
    position: int
    """Position of the peak token in the row."""
    loss_effects: tuple[float, ...] | None = None
    """Loss at each token with the latent ablated, minus loss with it, in nats; None if not computed."""

    @property
    def value(self) -> float:
        """Activation at the peak token."""
        return self.acts[self.at]

    @property
    def token(self) -> str:
        """Text of the peak token."""
        return self.tokens[self.at]

    @property
    def text(self) -> str:
        """Text of the context, as one string."""
        return "".join(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `loss` only if it was computed."""
        values = {
            "at": self.at,
            "row": self.row,
            "position": self.position,
            "tokens": list(self.tokens),
            "ids": list(self.ids),
            "acts": list(self.acts),
        }
        return values if self.loss_effects is None else values | {"loss": list(self.loss_effects)}


@dataclass(frozen=True)
class Logit:
    """A token that a latent makes more or less likely."""

    token: str
    """Text of the token."""
    id: int
    """Token id."""
    effect: float
    """Logit effect per unit of activation at a final RMS of 1; see `FeatureIndex.latent`."""


@dataclass(frozen=True)
class Neighbor:
    """A latent with a similar direction."""

    latent: int
    """Index of the latent."""
    cosine: float
    """Cosine of the two directions, -1..1."""
    label: str = ""
    """Label of the latent; see `FeatureIndex.label`."""


@dataclass(frozen=True)
class Coactive:
    """A latent that is active on the same tokens."""

    latent: int
    """Index of the latent."""
    together: int
    """Sampled tokens on which both are active."""
    share: float
    """Fraction of this latent's sampled tokens on which the other is active too."""
    phi: float
    """Correlation phi of their activity, -1..1."""
    label: str = ""
    """Label of the latent; see `FeatureIndex.label`."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width."""

    edges: tuple[float, ...]
    """Edges of the bins, ascending; one more than `counts`."""
    counts: tuple[int, ...]
    """Number of values in [edges[i], edges[i + 1])."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"low": self.edges[0], "high": self.edges[-1], "counts": list(self.counts)}


@dataclass(frozen=True)
class PositionDensity:
    """Density of a latent by position in the row, in groups 0, 1, 2-3, 4-7, ..."""

    starts: tuple[int, ...]
    """First position of each group."""
    density: tuple[float, ...]
    """Fraction of the tokens in each group on which it is active; 0 for a group without tokens."""
    n_tokens: tuple[int, ...]
    """Number of tokens in each group."""


@dataclass(frozen=True)
class Latent:
    """One latent of an index, with all its contexts, statistics and neighbors."""

    index: int
    """Index of the latent."""
    n_active: int
    """Number of tokens on which it is active."""
    density: float
    """Fraction of tokens on which it is active."""
    max: float
    """Strongest activation, with its sign; 0 if it is never active."""
    mean: float
    """Mean of the activations that are not 0; 0 if it is never active."""
    histogram: Histogram = field(repr=False)
    """Histogram of |activation| where it is not 0."""
    positions: PositionDensity = field(repr=False)
    """Density by position in the row."""
    top: tuple[Context, ...] = field(repr=False)
    """Top contexts, strongest first."""
    quantiles: tuple[tuple[Context, ...], ...] = field(repr=False)
    """Sampled contexts in groups by activation, weakest group first."""
    logits_top: tuple[Logit, ...] = field(repr=False)
    """Tokens with the largest logit effects; empty if there are none."""
    logits_bottom: tuple[Logit, ...] = field(repr=False)
    """Tokens with the smallest logit effects."""
    jacobian_top: tuple[Logit, ...] = field(repr=False)
    """Tokens with the largest logit effects through later layers, by a Jacobian lens; empty without one."""
    jacobian_bottom: tuple[Logit, ...] = field(repr=False)
    """Tokens with the smallest logit effects through later layers."""
    logit_histogram: Histogram | None = field(repr=False)
    """Histogram of the logit effects on all tokens of the vocabulary."""
    nearest_by_decoder: tuple[Neighbor, ...] = field(repr=False)
    """Latents of largest |cosine| of the decoder directions."""
    nearest_by_encoder: tuple[Neighbor, ...] = field(repr=False)
    """Latents of largest |cosine| of the encoder directions."""
    coactive: tuple[Coactive, ...] = field(repr=False)
    """Latents active on the same tokens, largest phi first."""
    decoder_norm: float
    """Norm of the decoder direction; nan if unknown."""
    label: str = ""
    """Label of the latent; see `FeatureIndex.label`."""
    is_explained: bool = field(default=False, repr=False)
    """Whether the label is an explanation, and not the strongest token."""

    def to_dict(self, digits: int | None = None) -> dict[str, Any]:
        """Plain JSON values, the source of the HTML page, the panels and Neuronpedia's JSON.

        Groups and their contexts come strongest first; `scale` is the largest |activation| in any context; `raised` and
        `lowered` are `[token, id, effect]`, and so are `jacobian_raised` and `jacobian_lowered`, through later layers;
        `by_decoder` and `by_encoder` `[latent, cosine, label]`, `coactive` `[latent, share, phi, together, label]`.

        Args:
            digits: significant digits of all floats; None does not round.
        """
        contexts = [*self.top, *(c for group in self.quantiles for c in group)]
        values = {
            "latent": self.index,
            "label": self.label,
            "explained": self.is_explained,
            "n_active": self.n_active,
            "density": self.density,
            "max": self.max,
            "mean": self.mean,
            "norm": None if self.decoder_norm != self.decoder_norm else self.decoder_norm,
            "scale": max((abs(a) for c in contexts for a in c.acts), default=0.0) or 1.0,
            "histogram": self.histogram.to_dict(),
            "positions": {"starts": list(self.positions.starts), "density": list(self.positions.density)},
            "logits": self.logit_histogram and self.logit_histogram.to_dict(),
            "raised": [[x.token, x.id, x.effect] for x in self.logits_top],
            "lowered": [[x.token, x.id, x.effect] for x in self.logits_bottom],
            "jacobian_raised": [[x.token, x.id, x.effect] for x in self.jacobian_top],
            "jacobian_lowered": [[x.token, x.id, x.effect] for x in self.jacobian_bottom],
            "by_decoder": [[x.latent, x.cosine, x.label] for x in self.nearest_by_decoder],
            "by_encoder": [[x.latent, x.cosine, x.label] for x in self.nearest_by_encoder],
            "coactive": [[x.latent, x.share, x.phi, x.together, x.label] for x in self.coactive],
            "top": [c.to_dict() for c in self.top],
            "groups": [[c.to_dict() for c in group[::-1]] for group in self.quantiles[::-1]],
        }
        return values if digits is None else round_floats(values, digits)


def round_floats(value: Any, digits: int) -> Any:
    """Round every float in plain JSON values to this number of significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: v if isinstance(v, int) else round_floats(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [v if isinstance(v, int) else round_floats(v, digits) for v in value]
    return value


def read_latent(
    info: IndexInfo, tensors: Mapping[str, Tensor], texts: TokenTexts, i: int, labels: Mapping[int, str]
) -> Latent:
    """Read latent `i` of an index, from its rows of the tensors only, and one token of each of its neighbors."""
    n_active = int(tensors["counts.by_position"][i].sum())
    top = _contexts(info, tensors, texts, "top", i)
    by_decoder, by_encoder = (_neighbors(tensors, side, i) for side in ("decoder", "encoder"))
    together = _coactive(tensors, i)
    named = list({i, *(x.latent for x in (*by_decoder, *by_encoder, *together))})
    names = dict(zip(named, label_texts(labels, info, tensors, texts, named), strict=True))
    return Latent(
        index=i,
        n_active=n_active,
        density=n_active / info.n_tokens if info.n_tokens else 0.0,
        max=top[0].value if top else 0.0,
        mean=float(tensors["counts.total"][i]) / n_active if n_active else 0.0,
        histogram=_histogram(tensors, i),
        positions=_positions(tensors, i),
        top=top,
        quantiles=quantile_groups(_contexts(info, tensors, texts, "sample", i), info.n_quantiles),
        logits_top=_logits(tensors, texts, "logits.top", i),
        logits_bottom=_logits(tensors, texts, "logits.bottom", i),
        jacobian_top=_logits(tensors, texts, "jacobian.top", i),
        jacobian_bottom=_logits(tensors, texts, "jacobian.bottom", i),
        logit_histogram=_logit_histogram(tensors, i),
        nearest_by_decoder=tuple(replace(x, label=names[x.latent]) for x in by_decoder),
        nearest_by_encoder=tuple(replace(x, label=names[x.latent]) for x in by_encoder),
        coactive=tuple(replace(x, label=names[x.latent]) for x in together),
        decoder_norm=float(tensors["decoder_norm"][i]) if "decoder_norm" in tensors else float("nan"),
        label=names[i],
        is_explained=i in labels,
    )


def quantile_groups(sample: tuple[Context, ...], n: int) -> tuple[tuple[Context, ...], ...]:
    """Split sampled contexts by |activation| into `n` groups of equal size (up to one), weakest first."""
    ordered = sorted(sample, key=lambda c: (abs(c.value), c.row, c.position))
    cuts = [round(j * len(ordered) / n) for j in range(n + 1)]
    return tuple(tuple(ordered[a:b]) for a, b in pairwise(cuts))


def _contexts(
    info: IndexInfo, tensors: Mapping[str, Tensor], texts: TokenTexts, name: str, i: int
) -> tuple[Context, ...]:
    n = int((tensors[f"{name}.order"][i] != EMPTY).sum())
    ids, acts, positions = (tensors[f"{name}.{part}"][i, :n].tolist() for part in ("tokens", "acts", "position"))
    losses = _losses(tensors, i, n) if name == "top" else [None] * n
    contexts = []
    for row, act, position, loss in zip(ids, acts, positions, losses, strict=True):
        first = next(j for j, token in enumerate(row) if token >= 0)
        inside = slice(first, first + len(row) - row.count(-1))
        tokens = tuple(row[inside])
        contexts.append(
            Context(
                tokens=tuple(texts.decode(tokens)),
                ids=tokens,
                acts=tuple(act[inside]),
                at=info.before - first,
                row=position // info.ctx_len,
                position=position % info.ctx_len,
                loss_effects=tuple(loss[inside]) if loss else None,
            )
        )
    return tuple(contexts)


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
    n_active, n_tokens = tensors["counts.by_position"][i].tolist(), tensors["counts.n_by_position"].tolist()
    starts = tuple((1 << g) // 2 for g in range(len(n_tokens)))
    density = tuple(a / n if n else 0.0 for a, n in zip(n_active, n_tokens, strict=True))
    return PositionDensity(starts, density, tuple(n_tokens))


def _logits(tensors: Mapping[str, Tensor], texts: TokenTexts, name: str, i: int) -> tuple[Logit, ...]:
    if name not in tensors:
        return ()
    pairs = zip(tensors[f"{name}_ids"][i].tolist(), tensors[name][i].tolist(), strict=True)
    return tuple(Logit(texts.decode_token(token), token, effect) for token, effect in pairs)


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
    n_active = int(tensors["coactive.fired"][i])
    rows = (tensors[f"coactive.{name}"][i].tolist() for name in ("latent", "together", "phi"))
    return tuple(Coactive(j, both, both / n_active, phi) for j, both, phi in zip(*rows, strict=True) if j >= 0)
