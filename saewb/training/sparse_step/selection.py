"""Which latents are on: the one dense product of a step, in row tiles, its results never kept.

    top_per_token   the k largest scores of each token          (TopK, AbsTopK)
    top_of_batch    the n largest scores of the whole batch     (BatchTopK, Matryoshka)
    above_zero      every pre-activation above a threshold      (ReLU, JumpReLU, Gated)

With a low-precision product (see `precision`) the product only selects: candidates with a margin are scored again in
the parameters' own dtype, so values and gradients are as exact as without. How far the product was off is measured on
the candidates themselves, beyond what rounding the result moves it, which is small for small scores; where the margin
is smaller than that, tokens are selected again in a better precision: a batch for which 8 or 16 bits are too coarse
costs time, not latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.kernels.pairs import Pairs, dots, pairs_of, rectangular
from saewb.kernels.precision import MARGIN, SLACK, SPARE, Multiply, Precision, finer, multiplier, tile_rows
from saewb.kernels.topk import above, largest

_SAMPLE = 64  # tokens from which the batch's threshold is guessed
_ROUNDING = 2**-8  # of a score: as far as its being bf16 may move it, twice over
_ALIKE = 256  # tokens whose scores are taken to be equally far off
_UNSURE = 1 / 16  # share of the first tile's tokens to be selected again, from which on a better precision is used


@dataclass(frozen=True)
class Readout:
    """How pre-activations come from (centered) inputs, and how they are compared."""

    W: Float[Tensor, "d_sae d_in"]  # reading directions, one latent a contiguous row: W_enc.T
    b: Float[Tensor, " d_sae"]
    norms: Float[Tensor, " d_sae"] | None = None  # lengths of decoder rows: latents compete by pre * norm
    precision: Precision = "full"
    scratch: Float[Tensor, "d_sae d_in"] | None = None  # memory that may be overwritten
    lift: float = 0.0  # added to every score by the product, with no norms

    def score(self, pre: Tensor, latents: Tensor) -> Tensor:
        """What a pre-activation competes with."""
        return pre if self.norms is None else pre * _taken(self.norms, latents)

    def unscored(self, score: Tensor, latents: Tensor) -> Tensor:
        """The pre-activation that a score comes from; a row of length 0 competes with 0."""
        if self.norms is None:
            return score
        return score / _taken(torch.where(self.norms == 0, torch.ones_like(self.norms), self.norms), latents)

    def pre(self, pairs: Pairs, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " pairs"]:
        """Pre-activations of these pairs, in full precision."""
        return dots(pairs, x, self.W).add_(self.b.index_select(0, pairs.latents))

    def multiplier(self, x: Float[Tensor, "batch d_in"]) -> Multiply:
        """What gives scores of rows of `x`."""
        return multiplier(self.W, self.b + self.lift, self.norms, x, self.precision, self.scratch)

    def better(self) -> Readout:
        """The same in a better precision."""
        return replace(self, precision=finer(self.precision, self.W.device))


def top_per_token(x: Float[Tensor, "batch d_in"], readout: Readout, k: int, *, signed: bool = False) -> Pairs:
    """The k largest scores of each token (in magnitude, if signed), exactly.

    Args:
        x: centered inputs.
        readout: how they are read.
        k: pairs per token.
        signed: compare magnitudes.
    """
    multiply, size = readout.multiplier(x), tile_rows(len(readout.W), x.device)
    if readout.precision == "full":
        scores, latents = _largest(x, multiply, size, k, signed)
        return rectangular(latents, readout.unscored(scores, latents))
    wanted, parts = min(len(readout.W), k + MARGIN[readout.precision]), []
    for rows in (x[:size], x[size:]):  # the first tile shows whether the precision will do
        scores, latents = _largest(rows, multiply, size, wanted, signed)
        parts.append(_rescored(rows, readout, latents, scores, k, signed))
        if len(parts) == 1 and readout.precision == "int8" and int(parts[0][2].sum()) > _UNSURE * len(rows):
            return top_per_token(x, readout.better(), k, signed=signed)
    pre, latents, unsure = (torch.cat(both) for both in zip(*parts, strict=True))
    if len(again := unsure.nonzero()[:, 0]):
        exact = top_per_token(x[again], replace(readout, precision="full"), k, signed=signed)
        pre[again], latents[again] = exact.pre.view(-1, k), exact.latents.view(-1, k)
    return rectangular(latents, pre)


def top_of_batch(x: Float[Tensor, "batch d_in"], readout: Readout, n: int, limit: int) -> Pairs | None:
    """The n largest positive scores of the batch, or all positive ones if fewer; None if over `limit` must be read.

    A threshold that lets somewhat more than n pass is guessed from 64 tokens; the pairs above it are listed and the n
    best kept. If the guess was too high, a lower one is tried. The result does not depend on the guess.

    Args:
        x: centered inputs.
        readout: how they are read.
        n: pairs to keep.
        limit: pairs to list at most, which bounds memory.
    """
    multiply, spare = readout.multiplier(x), SPARE[readout.precision]
    threshold = _guess(x, multiply, n, spare)
    while True:
        listed = _listed(x, readout, multiply, threshold, limit)
        if listed is None:
            return None
        pairs, off = listed
        scores = readout.score(pairs.pre, pairs.latents)
        kept, least = _best(scores, n)
        if least >= _reach(threshold, off):  # what was not listed scores at most that
            return pairs.where(kept)
        if readout.precision == "int8" and off > least - threshold:
            return top_of_batch(x, readout.better(), n, limit)
        spare *= 2
        threshold = min(_guess(x, multiply, n, spare), threshold - 2 * off)


def above_zero(x: Float[Tensor, "batch d_in"], readout: Readout, limit: int) -> Pairs | None:
    """Every pair whose pre-activation is > 0; None if they are over `limit`. Thresholds belong into the bias.

    Args:
        x: centered inputs.
        readout: how they are read.
        limit: pairs at most, which bounds memory; of candidates up to twice as many are listed.
    """
    slack = _slack(x, readout)
    while True:
        # lifted rather than a threshold below 0: scores from 0 up are quicker to compare (`tiles`)
        lifted = replace(readout, lift=slack)
        listed = _listed(x, lifted, lifted.multiplier(x), 0.0, int(limit * SPARE[readout.precision]), slack)
        if listed is None:
            return None
        pairs, off = listed
        if off <= slack:  # what was not listed is at most off - slack
            pairs = pairs if readout.precision == "full" else pairs.where(pairs.pre > 0)
            return pairs if len(pairs) <= limit else None
        if readout.precision == "int8" and off > 2 * slack:
            return above_zero(x, readout.better(), limit)
        slack = 1.5 * off


def _largest(
    x: Float[Tensor, "tokens d_in"], multiply: Multiply, size: int, k: int, signed: bool
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest scores of each token, tile by tile, and whose they are."""
    scores, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        scores[rows], latents[rows] = largest(multiply(x[rows]), k, signed=signed)
    return scores, latents


def _rescored(
    x: Float[Tensor, "tokens d_in"],
    readout: Readout,
    latents: Int[Tensor, "tokens wanted"],
    rough: Float[Tensor, "tokens wanted"],
    k: int,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best candidates by their full scores, and whether a token's margin does not cover the product's error."""
    pre = readout.pre(rectangular(latents, rough), x).view_as(rough)
    full = readout.score(pre, latents)
    off = _off(full, rough).amax(1)
    off = torch.cat([part.max().expand(len(part)) for part in off.split(_ALIKE) if len(part)] or [off])
    if signed:
        full, rough = full.abs(), rough.abs()
    values, best = full.topk(k, dim=1, sorted=False)
    least = rough.amin(1)
    unsure = _reach(least, off) > values.amin(1).clamp(min=0)
    return pre.gather(1, best), latents.gather(1, best), unsure & (latents.shape[1] < len(readout.W))


def _listed(
    x: Tensor, readout: Readout, multiply: Multiply, threshold: float, limit: int, tolerance: float = torch.inf
) -> tuple[Pairs, float] | None:
    """The pairs scored above the threshold with their full pre-activations, and how far scores were off at most.

    None if they are over the limit. Stops after the first tile if it is off by more than the tolerance.
    """
    found, total, size = [], 0, tile_rows(len(readout.W), x.device)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        share = max(256, 2 * limit * len(rows) // len(x))  # a dense batch is known by its first tile
        listed = above(multiply(rows), threshold, min(share, limit - total))
        if listed is None:
            return None
        tokens, latents, scores = listed
        found.append((tokens + start, latents, scores))
        total += len(tokens)
        if start == 0 and tolerance < torch.inf and readout.precision != "full":
            first = _exact(pairs_of(*listed, len(rows)), readout, rows)
            if first[1] > tolerance:
                return first
    tokens, latents, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _exact(pairs_of(tokens, latents, scores, len(x)), readout, x)


def _exact(pairs: Pairs, readout: Readout, x: Float[Tensor, "tokens d_in"]) -> tuple[Pairs, float]:
    """Pairs that come with scores, with their full pre-activations instead, and how far scores were off at most."""
    if readout.precision == "full":
        return replace(pairs, pre=readout.unscored(pairs.pre, pairs.latents)), 0.0
    pre = readout.pre(pairs, x)
    off = _off(readout.score(pre, pairs.latents) + readout.lift, pairs.pre.to(pre.dtype))
    return replace(pairs, pre=pre), float(off.max()) if len(pairs) else 0.0


def _off(full: Tensor, rough: Tensor) -> Tensor:
    """By how much scores are off, beyond what rounding the result explains."""
    return (full - rough).abs().sub_(rough.abs(), alpha=_ROUNDING)


def _reach(rough: Any, off: Any) -> Any:
    """How large a score may be whose rough one is at most this: of tensors or numbers."""
    return rough + off + _ROUNDING * abs(rough)


def _taken(values: Float[Tensor, " d_sae"], latents: Tensor) -> Tensor:
    """Each latent's value, in the shape of `latents`."""
    return values.index_select(0, latents.reshape(-1)).view_as(latents)


def _best(scores: Float[Tensor, " pairs"], n: int) -> tuple[Tensor, float]:
    """Which of the pairs are kept, ascending, and the least score among them (0 if there are fewer positive than n)."""
    if len(scores) > n:
        kept = scores.topk(n, sorted=False)
        least = float(kept.values.min())
        if least > 0:
            return kept.indices.sort().values, least
    return (scores > 0).nonzero()[:, 0], 0.0


def _guess(x: Tensor, multiply: Multiply, n: int, spare: float) -> float:
    """A threshold that about spare * n scores exceed, from tokens spread over the batch; at least 0."""
    sample = x[:: -(-len(x) // _SAMPLE)]
    scores = multiply(sample).flatten()
    wanted = int(spare * n * len(sample) / len(x)) + 1
    if wanted >= len(scores):
        return 0.0
    return max(0.0, float(scores.topk(wanted, sorted=False).values.min()))


def _slack(x: Tensor, readout: Readout) -> float:
    """A first guess at the product's largest error, in units of the pre-activation."""
    if readout.precision == "full":
        return 0.0
    typical = x.norm(dim=1).mean() * readout.W.norm(dim=1).mean() / x.shape[1] ** 0.5
    return float(typical) * SLACK[readout.precision]
