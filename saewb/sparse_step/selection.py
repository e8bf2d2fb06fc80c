"""Which latents are on: the one dense product of a step, in row tiles, its results never kept.

    top_per_token   the k largest scores of each token          (TopK, AbsTopK)
    top_of_batch    the n largest scores of the whole batch     (BatchTopK, Matryoshka)
    above_zero      every pre-activation above a threshold      (ReLU, JumpReLU, Gated)

With a low-precision product (see `precision`) the product only selects: candidates with a margin are scored again in
the parameters' own dtype, so values and gradients are as exact as without. How far the product was off is measured on
the candidates themselves; where a token's margin is smaller than that, the token is selected again in full precision: a
batch for which bf16 is too coarse costs time, not latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.sparse_step.pairs import Pairs, dots, pairs_of, rectangular
from saewb.sparse_step.precision import MARGIN, Precision, multiplier, tile_rows
from saewb.sparse_step.tiles import above, largest

_SAMPLE = 64  # tokens from which the batch's threshold is guessed
_SPARE = 1.5  # candidates wanted for each pair kept of a batch


@dataclass(frozen=True)
class Readout:
    """How pre-activations come from (centred) inputs, and how they are compared."""

    W: Float[Tensor, "d_sae d_in"]  # reading directions, one latent a contiguous row: W_enc.T
    b: Float[Tensor, " d_sae"]
    norms: Float[Tensor, " d_sae"] | None = None  # lengths of decoder rows: latents compete by pre * norm
    precision: Precision = "full"

    def score(self, pre: Tensor, latents: Tensor) -> Tensor:
        """What a pre-activation competes with."""
        return pre if self.norms is None else pre * self.norms[latents]

    def scored(self) -> tuple[Tensor, Tensor]:
        """Weights and biases of the product that gives scores."""
        return (self.W, self.b) if self.norms is None else (self.W * self.norms[:, None], self.b * self.norms)


def top_per_token(x: Float[Tensor, "batch d_in"], readout: Readout, k: int, *, signed: bool = False) -> Pairs:
    """The k largest scores of each token (in magnitude, if signed), exactly.

    Args:
        x: centred inputs.
        readout: how they are read.
        k: pairs per token.
        signed: compare magnitudes.
    """
    d_sae = len(readout.W)
    wanted = k if readout.precision == "full" else min(d_sae, k + MARGIN[readout.precision])
    latents = torch.empty(len(x), wanted, dtype=torch.int64, device=x.device)
    scores = torch.empty(len(x), wanted, dtype=x.dtype, device=x.device)
    for start, tile in scored_tiles(x, readout):
        stop = start + len(tile)
        scores[start:stop], latents[start:stop] = largest(tile, wanted, signed=signed)
    if readout.precision == "full":
        pre = scores if readout.norms is None else scores / _nonzero(readout.norms)[latents]
        return rectangular(latents, pre)
    pre, latents, unsure = _rescored(x, readout, latents, scores, k, signed)
    if len(unsure):
        exact = top_per_token(x[unsure], replace(readout, precision="full"), k, signed=signed)
        pre[unsure], latents[unsure] = exact.pre.view(-1, k), exact.latents.view(-1, k)
    return rectangular(latents, pre)


def top_of_batch(x: Float[Tensor, "batch d_in"], readout: Readout, n: int, limit: int) -> Pairs | None:
    """The n largest positive scores of the batch, or all positive ones if fewer; None if over `limit` must be read.

    A threshold that lets about 1.5 n pass is guessed from 64 tokens; the pairs above it are listed and the n best kept.
    If the guess was too high, a lower one is tried. The result does not depend on the guess.

    Args:
        x: centred inputs.
        readout: how they are read.
        n: pairs to keep.
        limit: pairs to list at most, which bounds memory.
    """
    threshold, spare = _guess(x, readout, n, _SPARE), _SPARE
    while True:
        listed = _listed(x, readout, threshold, limit)
        if listed is None:
            return None
        tokens, latents, scores = listed
        pairs, off = _in_full(x, readout, tokens, latents, scores)
        best = readout.score(pairs.pre, pairs.latents)
        n_kept = min(n, int((best > 0).sum()))
        kept = best.topk(n_kept, sorted=False)
        least = kept.values.min() if n_kept == n else best.new_zeros(())
        if float(least) >= threshold + off:  # what was not listed scores at most that
            return pairs.where(kept.indices.sort().values)
        spare *= 2
        threshold = min(_guess(x, readout, n, spare), threshold - 2 * off)


def above_zero(x: Float[Tensor, "batch d_in"], readout: Readout, limit: int) -> Pairs | None:
    """Every pair whose pre-activation is > 0; None if over `limit` are read. Thresholds belong into the bias.

    Args:
        x: centred inputs.
        readout: how they are read.
        limit: pairs to list at most, which bounds memory.
    """
    slack = 0.0 if readout.precision == "full" else _slack(x, readout)
    while True:
        listed = _listed(x, readout, -slack, limit)
        if listed is None:
            return None
        pairs, off = _in_full(x, readout, *listed)
        if off <= slack:
            return pairs if readout.precision == "full" else pairs.where(pairs.pre > 0)
        slack = 2 * off


def scored_tiles(x: Tensor, readout: Readout) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores of the tile); the tile's memory is used again for the next one."""
    multiply = multiplier(*readout.scored(), x, readout.precision)
    rows = tile_rows(len(readout.W), x.device)
    for start in range(0, len(x), rows):
        yield start, multiply(start, min(start + rows, len(x)))


def _rescored(
    x: Tensor, readout: Readout, latents: Int[Tensor, "batch wanted"], rough: Tensor, k: int, signed: bool
) -> tuple[Tensor, Tensor, Int[Tensor, " unsure"]]:
    """The k best candidates by their full scores, and the tokens whose margin does not cover the product's error."""
    pairs = rectangular(latents, rough)
    pre = (dots(pairs, x, readout.W) + readout.b[pairs.latents]).view_as(rough)
    full = readout.score(pre, latents)
    off = (full - rough).abs().max() if full.numel() else full.new_zeros(())
    if signed:
        full, rough = full.abs(), rough.abs()
    best = full.topk(k, dim=1, sorted=False)
    worst_kept = best.values.amin(1).clamp(min=0)
    unsure = (rough.amin(1) + off > worst_kept) if latents.shape[1] < len(readout.W) else worst_kept < 0
    return pre.gather(1, best.indices), latents.gather(1, best.indices), unsure.nonzero()[:, 0]


def _listed(x: Tensor, readout: Readout, threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tokens, latents and rough scores of everything above the threshold; None if it is over the limit."""
    found, total = [], 0
    for start, tile in scored_tiles(x, readout):
        share = max(256, 2 * limit * len(tile) // len(x))  # a dense batch is known by its first tile
        listed = above(tile, threshold, min(share, limit - total))
        if listed is None:
            return None
        found.append((listed[0] + start, *listed[1:]))
        total += len(listed[0])
    tokens, latents, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tokens, latents, scores


def _in_full(x: Tensor, readout: Readout, tokens: Tensor, latents: Tensor, rough: Tensor) -> tuple[Pairs, float]:
    """The listed pairs with full pre-activations, and how far their rough scores were off at most."""
    pairs = pairs_of(tokens, latents, rough, len(x))
    if readout.precision == "full":
        pre = rough if readout.norms is None else rough / _nonzero(readout.norms)[latents]
        return replace(pairs, pre=pre), 0.0
    pre = dots(pairs, x, readout.W).add_(readout.b[latents])
    off = (readout.score(pre, latents) - rough).abs()
    return replace(pairs, pre=pre), float(off.max()) if len(off) else 0.0


def _guess(x: Tensor, readout: Readout, n: int, spare: float) -> float:
    """A threshold that about spare * n scores exceed, from tokens spread over the batch; at least 0."""
    sample = x[:: max(1, len(x) // _SAMPLE)]
    W, b = readout.scored()
    scores = torch.addmm(b, sample, W.T).flatten()
    wanted = int(spare * n * len(sample) / len(x)) + 1
    if wanted >= len(scores):
        return 0.0
    return max(0.0, float(scores.topk(wanted, sorted=False).values.min()))


def _slack(x: Tensor, readout: Readout) -> float:
    """About eight times the rounding error of a bf16 product of typical rows, in units of the pre-activation."""
    typical = x.norm(dim=1).mean() * readout.W.norm(dim=1).mean() / x.shape[1] ** 0.5
    return float(typical) * 2**-5


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms == 0, torch.ones_like(norms), norms)
