"""Exact selection by a low-precision product: it chooses candidates, full precision decides among them.

Two kinds, for two purposes, over the same listing of tiles and the same rescoring of candidates:

`ApproximateTopK`  weights that stay as they are, bf16, an error bound that is proven
`Readout`          weights of one training step, int8 or bf16, the error measured on the candidates

**Proven.** A processor with bf16 instructions multiplies in it five times as fast as in float32. How far the rough
value of any latent can be off is known before the product is taken: with c a fixed center, g = h - c, and ^ for
rounded to bf16

    h . w + b  -  (g^ . w^ + (c . w + b)^^)  =  (g - g^) . w  +  g^ . (w - w^)  +  what sums and the bias round
    |...|  <=  |g - g^| |w|  +  2^-9 |g^| |w|  +  ...   =:  off(h),   with |w| the longest column of W

(the bias is carried in two bf16 numbers, ^^). So a latent that is no candidate is at most the last candidate's rough
value, plus its rounding, plus off(h). Where the k-th largest of the candidates, in float32, is above that, the k are
proven; other rows are looked at again with four times the candidates, then in float32 altogether. The same bound says
which latents can be above a threshold. The center is near most rows, so that what is common to all of them is in the
bias and rounds nothing.

**Measured.** Preparing such a bound at each step would cost more than it saves, and int8 has none so narrow. How far
the product was off is measured on the candidates themselves, beyond what rounding the result moves it, which is small
for small scores; where the margin is smaller than that, tokens are selected again in a higher precision: a batch for
which 8 or 16 bits are too coarse costs time, not latents.

    top_per_token   the k largest scores of each token          (TopK, AbsTopK)
    top_of_batch    the n largest scores of the whole batch     (BatchTopK, Matryoshka)
    above_zero      every pre-activation above a threshold      (ReLU, JumpReLU, Gated)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.kernels.pairs import Pairs, dots, pairs_of, rectangular
from saewb.kernels.precision import (
    MARGIN,
    SLACK,
    SPARE,
    Multiply,
    Precision,
    low_precision_matmul,
    next_higher_precision,
    tile_rows,
)
from saewb.kernels.topk import BLOCK, above, largest, top, top_of_product

_TILE = 2**24  # rough values held at a time (32 MiB in bf16)
_PICKED = 2**20  # candidates scored again at a time
_MANY, _SMALL = 512, 2**28  # tokens from which on, and bytes of W up to which, it is prepared for a single call
_REST = 2**13  # tokens done in float32 at a time
_PAD = 32  # rows that the rough factors have beyond d_in: bias, its rest, slack; a multiple that products like
_U, _E = 2.0**-9, 2.0**-24  # rounding to bf16 and to float32, as a share of the number
_TINY = 2.0**-125  # bf16 products lose numbers below this
_NARROW = 12  # latents per candidate, below which float32 is as quick
_FEW = 1 / 4  # share of rows left open, from which on the rest is done in float32
_SAMPLE = 64  # tokens from which the batch's threshold is guessed
_ROUNDING = 2**-8  # of a score: as far as its being bf16 may move it, twice over
_ROWS_PER_ERROR_BOUND = 256  # tokens whose scores are taken to be equally far off
_REFINE_FRACTION = 1 / 16  # share of the first tile's tokens left undecided, from which on a higher precision is used


@dataclass(frozen=True, eq=False)
class ApproximateTopK:
    """`h @ W + b`, prepared to be asked many times for its largest entries. Holds W once more and once in bf16.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> h, W, b = torch.randn(8, 16, generator=rng), torch.randn(16, 4096, generator=rng), torch.zeros(4096)
        >>> values, latents = ApproximateTopK.of(W, b, like=h).top(h, 5, "topk")
        >>> torch.allclose(values.sort().values, (h @ W + b).topk(5).values.sort().values, atol=1e-5)
        True
    """

    W: Float[Tensor, "d_in d_sae"]
    """Weights, float32."""
    b: Float[Tensor, " d_sae"]
    """Bias of each latent."""
    rows: Float[Tensor, "d_sae d_in"]
    """W transposed, one latent after another in memory."""
    coarse: Tensor
    """bf16 [d_in + 32, d_sae]: W, the bias at the center, what that lacks, ones, zeros."""
    center: Float[Tensor, " d_in"]
    """Subtracted from inputs before they are rounded."""
    longest: float
    """No column of W is longer."""
    bias: float
    """None of |c . w + b| and |b| is larger."""
    bound: float
    """Of what float32 and bf16 lose on the bias and its sums."""

    @classmethod
    def of(
        cls, W: Tensor, b: Tensor, like: Float[Tensor, "n d_in"], floor: Tensor | None = None
    ) -> ApproximateTopK | None:
        """Prepared for rows like these; None where float32 is as good: not a CPU with bf16, odd numbers, few latents.

        Args:
            W: float32, not to be changed while this is used.
            b: of each latent.
            like: some of the rows to come; only how quick it is depends on them.
            floor: of each latent; what `over` compares with.
        """
        if not is_worthwhile(W):
            return None
        rows = W.T.contiguous()
        norms = torch.linalg.vector_norm(rows, dim=1)
        longest = float(norms.max()) * (1 + len(W) * _E) + len(W) ** 0.5 * 2.0**-60  # squares below 2^-126 are lost
        center = _center(like)
        biases = torch.addmv(b, W.T, center)
        size = float(torch.stack([biases.abs().max(), b.abs().max()]).max())
        if not (longest < 2.0**60 and size < 2.0**100):  # so that no square overflows; NaN, too
            return None
        if floor is not None:
            size += float(floor.abs().max())
            biases = biases - floor
        coarse = torch.empty(len(W) + _PAD, W.shape[1], dtype=torch.bfloat16)
        coarse[: len(W)] = W
        coarse[len(W) :] = 0
        coarse[len(W)] = biases
        coarse[len(W) + 1] = biases - coarse[len(W)].float()
        coarse[len(W) + 2] = 1
        n = len(W) + _PAD
        lost = 2 * n * _E * (float(center.double().norm()) * longest + 2 * size) + 4 * _U**2 * size
        return cls(W, b, rows, coarse, center, longest, size, lost + n * _TINY)

    @property
    def nbytes(self) -> int:
        """What it holds besides `W`, in bytes."""
        return self.coarse.nbytes + (0 if self.rows.data_ptr() == self.W.data_ptr() else self.rows.nbytes)

    @staticmethod
    def max_bytes(d_in: int, d_sae: int) -> int:
        """What one holds and takes at most, in bytes, besides the weights."""
        return (4 * d_in + 2 * (d_in + _PAD)) * d_sae + 2 * max(_TILE, d_sae) + 40 * _PICKED

    @torch.no_grad()
    def top(self, h: Float[Tensor, "tokens d_in"], k: int, activation: str) -> tuple[Tensor, Tensor]:
        """`topk.top(h @ W + b, k, activation)` for "topk" and "abstopk"; values in float32. No gradients.

        Holds 32 MiB of rough values (or those of a token), and 20 bytes and a float32 per candidate of a tile.
        """
        n_candidates, d_sae = k + k // 2 + 24, len(self.rows)
        if n_candidates * _NARROW > d_sae:
            return top_of_product(h, self.W, self.b, k, activation)
        values, indices = h.new_empty(len(h), k), torch.empty(len(h), k, dtype=torch.int64)
        open_, done = torch.zeros(len(h), dtype=torch.bool), 0
        size = max(1, min(_TILE // d_sae, _PICKED // n_candidates))
        buffer = torch.empty(min(size, len(h)), d_sae, dtype=torch.bfloat16)
        for start in range(0, len(h), size):
            at = slice(start, start + size)
            scores, off = self._scores(h[at], buffer)
            values[at], indices[at], sure = self._decided(h[at], scores, off, k, n_candidates, activation)
            if not sure.all() and 4 * n_candidates * _NARROW <= d_sae:
                again = (~sure).nonzero()[:, 0]
                more = self._decided(h[at][again], scores[again], off[again], k, 4 * n_candidates, activation)
                values[start + again], indices[start + again], sure[again] = more
            open_[at], done = ~sure, min(len(h), start + size)
            if open_[at].sum() > _FEW * len(sure):
                break
        open_[done:] = True
        for rest in open_.nonzero()[:, 0].split(_REST):
            if len(rest):
                values[rest], indices[rest] = top_of_product(h[rest], self.W, self.b, k, activation)
        return values, indices

    @torch.no_grad()
    def over(self, h: Float[Tensor, "tokens d_in"], limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(token, latent, h . w + b) of every pair that can be above its floor; a few that are not are among them.

        Tokens ascend, and latents of a token. None if more than `limit` would have to be looked at.
        """
        size, parts = max(1, _TILE // len(self.rows)), []
        buffer = torch.empty(min(size, len(h)), len(self.rows), dtype=torch.bfloat16)

        def scores(rows: Tensor) -> Tensor | None:
            rough, off = self._scores(rows, buffer, raised=True)
            return rough if off.isfinite().all() else None

        for listed in _listed_tiles(h, size, scores, 0.0, limit):
            if listed is None:
                return None
            parts.append(listed[:2])
        token, latent = (torch.cat(of_tiles) for of_tiles in zip(*parts, strict=True))
        order = (token * len(self.rows) + latent).argsort()
        token, latent = token[order], latent[order]
        return token, latent, _rescored(pairs_of(token, latent, latent, len(h)), h, self.rows, self.b)

    def _scores(self, h: Tensor, buffer: Tensor, *, raised: bool = False) -> tuple[Tensor, Float[Tensor, " tokens"]]:
        """Rough values, and by how much each may be off before rounding; `raised` by so much, none is too low."""
        d, exact = h.shape[1], h.double() - self.center.double()
        rounded = torch.zeros(len(h), len(self.coarse), dtype=torch.bfloat16)
        rounded[:, :d] = h - self.center
        rough = rounded[:, :d].double()
        length, n = rough.norm(dim=1), len(self.coarse)
        off = (exact - rough).norm(dim=1) + _U * (1 + _U) * length  # rounding h, W
        off += 2 * n * _E * (1 + _U) * length + 2 * n * _E * h.double().norm(dim=1)  # sums: the rough one, float32's
        off = (off * self.longest + self.bound + n * _TINY * (1 + length + self.longest)) * (1 + 2 * n * _E)
        rounded[:, d : d + 2] = 1
        if raised:
            off = off * (1 + 4 * _U)
            rounded[:, d + 2] = off * (1 + 4 * _U)
        return torch.mm(rounded, self.coarse, out=buffer[: len(h)]), off

    def _decided(
        self, h: Tensor, scores: Tensor, off: Float[Tensor, " tokens"], k: int, n_candidates: int, activation: str
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"], Bool[Tensor, " tokens"]]:
        """The k best of the `n_candidates` roughly largest of each token, and where these are proven to be the ones."""
        signed = activation == "abstopk"
        rough, latents = largest(scores, n_candidates, signed=signed)
        full = _rescored(rectangular(latents, rough), h, self.rows, self.b).view(latents.shape)
        least = (rough.abs() if signed else rough).amin(1).double()
        reach = least + 2 * _U * (1 + 2 * _U) * least.abs() + off  # the most that one not among them can be
        best, which = (full.abs() if signed else full).topk(k, dim=1, sorted=False)
        worst = best.amin(1).double()
        sure = (worst > reach) & worst.isfinite()
        if signed:
            return full.gather(1, which), latents.gather(1, which), sure
        return torch.relu(best), latents.gather(1, which), sure | (reach <= 0)


def quickest_topk(
    h: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, " d_sae"],
    k: int,
    activation: str,
    approximate: ApproximateTopK | None = None,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`topk.top(h @ W + b, k, activation)` in the way that is quickest here; with gradients, where they are wanted.

    `approximate` is of these weights; without it one is made for this call where that is worth its time, and its
    memory: one and a half times a `W` of up to 256 MiB.
    """
    wide = h.device.type == "cpu" and len(h) * W.shape[1] > BLOCK and activation != "groupmax"
    if torch.is_grad_enabled() or not (wide or approximate):
        return top(torch.addmm(b, h, W), k, activation)
    if approximate is None and len(h) >= _MANY and W.nbytes <= _SMALL:
        approximate = ApproximateTopK.of(W, b, like=h)
    return top_of_product(h, W, b, k, activation) if approximate is None else approximate.top(h, k, activation)


def is_worthwhile(W: Float[Tensor, "d_in d_sae"]) -> bool:
    """Whether bf16 products choose more quickly than float32 ones decide: a CPU with instructions for them.

    Not a GPU: there, sums may be rounded to bf16 on the way, and float32 is quick.
    """
    here = W.device.type == "cpu" and W.dtype == torch.float32
    return here and W.shape[1] >= 1024 and next_higher_precision("int8", W.device) == "bf16"


def _center(like: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_in"]:
    """Near most of these rows, whatever a few very long ones are: the mean weighted by 1 / length."""
    length = torch.linalg.vector_norm(like, dim=1)
    usual = (length > 1e-15) & (length < 1e15)
    if not usual.any():
        return like.new_zeros(like.shape[1])
    weight = 1 / length[usual]
    return (weight @ like[usual]) / weight.sum()


# -- of a training step ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """How pre-activations come from (centered) inputs, and how they are compared."""

    W: Float[Tensor, "d_sae d_in"]
    """Reading directions, one latent a contiguous row: W_enc.T."""
    b: Float[Tensor, " d_sae"]
    """Bias of each latent."""
    norms: Float[Tensor, " d_sae"] | None = None
    """Lengths of decoder rows: latents compete by pre * norm; None means by pre."""
    precision: Precision = "full"
    """Of the product that selects."""
    scratch: Float[Tensor, "d_sae d_in"] | None = None
    """Memory that may be overwritten."""
    lift: float = 0.0
    """Added to every score by the product, with no norms."""

    def score(self, pre: Tensor, latents: Tensor) -> Tensor:
        """What a pre-activation competes with."""
        return pre if self.norms is None else pre * _of_latents(self.norms, latents)

    def unscored(self, score: Tensor, latents: Tensor) -> Tensor:
        """The pre-activation that a score comes from; a row of length 0 competes with 0."""
        if self.norms is None:
            return score
        return score / _of_latents(torch.where(self.norms == 0, torch.ones_like(self.norms), self.norms), latents)

    def pre(self, pairs: Pairs, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " pairs"]:
        """Pre-activations of these pairs, in full precision."""
        return _rescored(pairs, x, self.W, self.b)

    def matmul(self, x: Float[Tensor, "batch d_in"]) -> Multiply:
        """What gives scores of rows of `x`."""
        return low_precision_matmul(self.W, self.b + self.lift, self.norms, x, self.precision, self.scratch)

    def refined(self) -> Readout:
        """The same in a higher precision."""
        return replace(self, precision=next_higher_precision(self.precision, self.W.device))


def top_per_token(x: Float[Tensor, "batch d_in"], readout: Readout, k: int, *, signed: bool = False) -> Pairs:
    """The k largest scores of each token (in magnitude, if signed), exactly.

    Args:
        x: centered inputs.
        readout: how they are read.
        k: pairs per token.
        signed: compare magnitudes.
    """
    multiply, size = readout.matmul(x), tile_rows(len(readout.W), x.device)
    if readout.precision == "full":
        scores, latents = _largest(x, multiply, size, k, signed)
        return rectangular(latents, readout.unscored(scores, latents))
    n_candidates, parts = min(len(readout.W), k + MARGIN[readout.precision]), []
    for rows in (x[:size], x[size:]):  # the first tile shows whether the precision will do
        scores, latents = _largest(rows, multiply, size, n_candidates, signed)
        parts.append(_decided(rows, readout, latents, scores, k, signed))
        if len(parts) == 1 and readout.precision == "int8" and int(parts[0][2].sum()) > _REFINE_FRACTION * len(rows):
            return top_per_token(x, readout.refined(), k, signed=signed)
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
    multiply, spare = readout.matmul(x), SPARE[readout.precision]
    threshold = _guessed_threshold(x, multiply, n, spare)
    while True:
        listed = _list_above(x, readout, multiply, threshold, limit)
        if listed is None:
            return None
        pairs, off = listed
        scores = readout.score(pairs.pre, pairs.latents)
        best, least = _best(scores, n)
        if least >= _reach(threshold, off):  # what was not listed scores at most that
            return pairs.where(best)
        if readout.precision == "int8" and off > least - threshold:
            return top_of_batch(x, readout.refined(), n, limit)
        spare *= 2
        threshold = min(_guessed_threshold(x, multiply, n, spare), threshold - 2 * off)


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
        listed = _list_above(x, lifted, lifted.matmul(x), 0.0, int(limit * SPARE[readout.precision]), slack)
        if listed is None:
            return None
        pairs, off = listed
        if off <= slack:  # what was not listed is at most off - slack
            pairs = pairs if readout.precision == "full" else pairs.where(pairs.pre > 0)
            return pairs if len(pairs) <= limit else None
        if readout.precision == "int8" and off > 2 * slack:
            return above_zero(x, readout.refined(), limit)
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


def _decided(
    x: Float[Tensor, "tokens d_in"],
    readout: Readout,
    latents: Int[Tensor, "tokens n_candidates"],
    rough: Float[Tensor, "tokens n_candidates"],
    k: int,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best candidates by their full scores, and whether a token's margin does not cover the product's error."""
    pre = readout.pre(rectangular(latents, rough), x).view_as(rough)
    full = readout.score(pre, latents)
    off = _off(full, rough).amax(1)
    off = torch.cat([part.max().expand(len(part)) for part in off.split(_ROWS_PER_ERROR_BOUND) if len(part)] or [off])
    if signed:
        full, rough = full.abs(), rough.abs()
    values, best = full.topk(k, dim=1, sorted=False)
    least = rough.amin(1)
    unsure = _reach(least, off) > values.amin(1).clamp(min=0)
    return pre.gather(1, best), latents.gather(1, best), unsure & (latents.shape[1] < len(readout.W))


def _list_above(
    x: Tensor, readout: Readout, multiply: Multiply, threshold: float, limit: int, tolerance: float = torch.inf
) -> tuple[Pairs, float] | None:
    """The pairs scored above the threshold with their full pre-activations, and how far scores were off at most.

    None if they are over the limit. Stops after the first tile if it is off by more than the tolerance.
    """
    parts, size = [], tile_rows(len(readout.W), x.device)
    for listed in _listed_tiles(x, size, multiply, threshold, limit):
        if listed is None:
            return None
        parts.append(listed)
        if len(parts) == 1 and tolerance < torch.inf and readout.precision != "full":
            first = _exact(pairs_of(*listed, min(size, len(x))), readout, x[:size])
            if first[1] > tolerance:
                return first
    tokens, latents, scores = (torch.cat(of_tiles) for of_tiles in zip(*parts, strict=True))
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


def _of_latents(values: Float[Tensor, " d_sae"], latents: Tensor) -> Tensor:
    """Each latent's value, in the shape of `latents`."""
    return values.index_select(0, latents.reshape(-1)).view_as(latents)


def _best(scores: Float[Tensor, " pairs"], n: int) -> tuple[Tensor, float]:
    """Indices of the n largest scores, ascending, and the least of these (0 if there are fewer positive than n)."""
    if len(scores) > n:
        largest_n = scores.topk(n, sorted=False)
        least = float(largest_n.values.min())
        if least > 0:
            return largest_n.indices.sort().values, least
    return (scores > 0).nonzero()[:, 0], 0.0


def _guessed_threshold(x: Tensor, multiply: Multiply, n: int, spare: float) -> float:
    """A threshold that about spare * n scores exceed, from tokens spread over the batch; at least 0."""
    sample = x[:: -(-len(x) // _SAMPLE)]
    scores = multiply(sample).flatten()
    n_candidates = int(spare * n * len(sample) / len(x)) + 1
    if n_candidates >= len(scores):
        return 0.0
    return max(0.0, float(scores.topk(n_candidates, sorted=False).values.min()))


def _slack(x: Tensor, readout: Readout) -> float:
    """A first guess at the product's largest error, in units of the pre-activation."""
    if readout.precision == "full":
        return 0.0
    typical = x.norm(dim=1).mean() * readout.W.norm(dim=1).mean() / x.shape[1] ** 0.5
    return float(typical) * SLACK[readout.precision]


# -- both ------------------------------------------------------------------------------------------------------------


def _rescored(
    pairs: Pairs, x: Float[Tensor, "tokens d_in"], rows: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, " pairs"]:
    """Pre-activations of candidates in full precision."""
    return dots(pairs, x, rows).add_(b.index_select(0, pairs.latents))


def _listed_tiles(
    x: Tensor, size: int, scores: Callable[[Tensor], Tensor | None], threshold: float, limit: int
) -> Iterator[tuple[Tensor, Tensor, Tensor] | None]:
    """(token, latent, score) of all scores above the threshold, tile by tile; None, and no more, if over the limit."""
    total = 0
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        share = max(256, 2 * limit * len(rows) // len(x))  # many at once are known by the first tile
        tile = scores(rows)
        listed = None if tile is None else above(tile, threshold, min(share, limit - total))
        if listed is None:
            yield None
            return
        total += len(listed[0])
        yield listed[0] + start, *listed[1:]
