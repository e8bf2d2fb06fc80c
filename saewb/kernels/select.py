"""Exact selection of latents: a low-precision product selects candidates, full precision decides among them.

Two classes share the listing of tiles and the rescoring of candidates:

`ApproximateTopK`  for fixed weights, bf16, with a proven error bound
`Readout`          for the weights of one training step, int8 or bf16, with the error measured on the candidates

**Proven bound.** A processor with bf16 instructions multiplies in bf16 five times as fast as in float32. The error of
the approximate value of any latent is bounded before the product is computed: with c a fixed center, g = h - c, and ^
for rounding to bf16

    h . w + b  -  (g^ . w^ + (c . w + b)^^)  =  (g - g^) . w  +  g^ . (w - w^)  +  rounding of sums and the bias
    |...|  <=  |g - g^| |w|  +  2^-9 |g^| |w|  +  ...   =:  off(h),   with |w| the longest column of W

(the bias is the sum of two bf16 numbers, ^^). So a latent that is no candidate is at most the last candidate's
approximate value, plus its rounding, plus off(h). Where the k-th largest of the candidates, in float32, is above that,
the selection is proven; other rows are repeated with four times the candidates, then in float32. The same bound
decides which latents can be above a threshold. The center is near most rows, so that their common part is in the bias
and adds no rounding error.

**Measured error.** Preparing such a bound at each step would cost more than it saves, and int8 has no bound this
narrow. The error of the product is measured on the candidates themselves, beyond the rounding of the result, which is
small for small scores; where the margin is smaller than the error, tokens are selected again in a higher precision: a
batch for which 8 or 16 bits are too coarse costs time, not latents.

    top_per_token   the k largest scores of each token          (TopK, AbsTopK)
    top_of_batch    the n largest scores of the whole batch     (BatchTopK, Matryoshka)
    above_zero      every pre-activation above a threshold      (ReLU, JumpReLU, Gated)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
    shared_tile_rows,
    tile_rows,
)
from saewb.kernels.threads import map_tiles
from saewb.kernels.topk import BLOCK, above, largest, top, top_of_product

T = TypeVar("T")
_TILE = 2**24  # approximate values held at a time (32 MiB in bf16)
_PICKED = 2**20  # candidates rescored at a time
_MANY, _SMALL = 512, 2**28  # fewest tokens and most bytes of W for which a single call prepares an ApproximateTopK
_REST = 2**13  # tokens computed in float32 at a time
_PAD = 32  # rows of the bf16 factors beyond d_in: bias, its rounding error, slack; a multiple for fast products
_U, _E = 2.0**-9, 2.0**-24  # relative rounding errors of bf16 and float32
_TINY = 2.0**-125  # bf16 products lose numbers below this
_NARROW = 12  # latents per candidate, below which float32 is as fast
_FEW = 1 / 4  # fraction of unproven rows above which the remaining rows are computed in float32
_SAMPLE = 64  # tokens from which the threshold of the batch is estimated
_ROUNDING = 2**-8  # twice the relative rounding error of a bf16 score
_ROWS_PER_ERROR_BOUND = 256  # tokens that share one measured error
_REFINE_FRACTION = 1 / 16  # fraction of undecided tokens in the first tile above which a higher precision is used


@dataclass(frozen=True, eq=False)
class ApproximateTopK:
    """Prepared weights for many top-k selections from `h @ W + b`. Holds another copy of W and one in bf16.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> h, W, b = torch.randn(8, 16, generator=rng), torch.randn(16, 4096, generator=rng), torch.zeros(4096)
        >>> prepared = ApproximateTopK.of(W, b, like=h)  # None where float32 is as fast
        >>> values, latents = (top_of_product(h, W, b, 5, "topk") if prepared is None else prepared.top(h, 5, "topk"))
        >>> torch.allclose(values.sort().values, (h @ W + b).topk(5).values.sort().values, atol=1e-5)
        True
    """

    W: Float[Tensor, "d_in d_sae"]
    """Weights, float32."""
    b: Float[Tensor, " d_sae"]
    """Bias of each latent."""
    rows: Float[Tensor, "d_sae d_in"]
    """W transposed, each latent contiguous in memory."""
    coarse: Tensor
    """bf16 [d_in + 32, d_sae]: W, the bias at the center, its rounding error, ones, zeros."""
    center: Float[Tensor, " d_in"]
    """Subtracted from inputs before they are rounded."""
    longest: float
    """Upper bound of the column norms of W."""
    bias: float
    """Upper bound of |c . w + b| and |b|."""
    bound: float
    """Upper bound of the rounding errors of the bias and its sums."""

    @classmethod
    def of(
        cls, W: Tensor, b: Tensor, like: Float[Tensor, "n d_in"], floor: Tensor | None = None
    ) -> ApproximateTopK | None:
        """Prepare for rows like these; None where float32 is as good: no bf16 on this CPU, huge numbers, few latents.

        Args:
            W: float32, not to be changed while this is used.
            b: bias of each latent.
            like: some of the rows to come; only the speed depends on them.
            floor: threshold of each latent in `over`.
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
        """Bytes that it holds in addition to `W`."""
        return self.coarse.nbytes + (0 if self.rows.data_ptr() == self.W.data_ptr() else self.rows.nbytes)

    @staticmethod
    def max_bytes(d_in: int, d_sae: int) -> int:
        """Bytes that it holds and uses at most, in addition to the weights."""
        return (4 * d_in + 2 * (d_in + _PAD)) * d_sae + 2 * max(_TILE, d_sae) + 40 * _PICKED

    @torch.no_grad()
    def top(self, h: Float[Tensor, "tokens d_in"], k: int, activation: str) -> tuple[Tensor, Tensor]:
        """`topk.top(h @ W + b, k, activation)` except for "groupmax"; values in float32. No gradients.

        Holds 32 MiB of approximate values (or those of a token), and 24 bytes per candidate of a tile.
        """
        n_candidates, d_sae = k + k // 2 + 24, len(self.rows)
        if n_candidates * _NARROW > d_sae:
            return top_of_product(h, self.W, self.b, k, activation)
        values, indices = h.new_empty(len(h), k), torch.empty(len(h), k, dtype=torch.int64)
        unproven, n_done = torch.zeros(len(h), dtype=torch.bool), 0
        size = max(1, min(_TILE // d_sae, _PICKED // n_candidates))
        buffer = torch.empty(min(size, len(h)), d_sae, dtype=torch.bfloat16)
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            scores, off = self._scores(h[rows], buffer)
            values[rows], indices[rows], proven = self._decided(h[rows], scores, off, k, n_candidates, activation)
            if not proven.all() and 4 * n_candidates * _NARROW <= d_sae:
                retry = (~proven).nonzero()[:, 0]
                result = self._decided(h[rows][retry], scores[retry], off[retry], k, 4 * n_candidates, activation)
                values[start + retry], indices[start + retry], proven[retry] = result
            unproven[rows], n_done = ~proven, min(len(h), start + size)
            if unproven[rows].sum() > _FEW * len(proven):
                break
        unproven[n_done:] = True
        for rest in unproven.nonzero()[:, 0].split(_REST):
            if len(rest):
                values[rest], indices[rest] = top_of_product(h[rest], self.W, self.b, k, activation)
        return values, indices

    @torch.no_grad()
    def over(self, h: Float[Tensor, "tokens d_in"], limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(token, latent, h . w + b) of every pair that can be above its floor, and a few pairs that are not.

        Sorted by token, then latent. None if there are more than `limit` candidates.
        """
        size = max(1, _TILE // len(self.rows))
        buffer = torch.empty(min(size, len(h)), len(self.rows), dtype=torch.bfloat16)

        def scores(rows: Tensor) -> Tensor | None:
            rough, off = self._scores(rows, buffer, raised=True)
            return rough if off.isfinite().all() else None

        listed = _listed(h, scores, 0.0, limit, lambda work: map_tiles(work, len(h), len(h) + 1, size))
        if listed is None:
            return None
        token, latent, _ = listed
        order = (token * len(self.rows) + latent).argsort()
        token, latent = token[order], latent[order]
        return token, latent, _rescored(pairs_of(token, latent, latent, len(h)), h, self.rows, self.b)

    def _scores(self, h: Tensor, buffer: Tensor, *, raised: bool = False) -> tuple[Tensor, Float[Tensor, " tokens"]]:
        """Approximate values and their error bound before rounding; `raised` by the bound, no value is too low."""
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
        """The k best of `n_candidates` approximately largest latents per token, and where this selection is proven."""
        signed = activation == "abstopk"
        rough, latents = largest(scores, n_candidates, signed=signed)
        full = _rescored(rectangular(latents, rough), h, self.rows, self.b).view(latents.shape)
        least = (rough.abs() if signed else rough).amin(1).double()
        reach = least + 2 * _U * (1 + 2 * _U) * least.abs() + off  # upper bound of the values of other latents
        best, index = (full.abs() if signed else full).topk(k, dim=1, sorted=False)
        worst = best.amin(1).double()
        proven = (worst > reach) & worst.isfinite()
        if signed:
            return full.gather(1, index), latents.gather(1, index), proven
        if activation == "lineartopk":
            return best, latents.gather(1, index), proven
        return torch.relu(best), latents.gather(1, index), proven | (reach <= 0)


def quickest_topk(
    h: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, " d_sae"],
    k: int,
    activation: str,
    approximate: ApproximateTopK | None = None,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`topk.top(h @ W + b, k, activation)` by the fastest method for the input; with gradients where enabled.

    `approximate` is of these weights; without it one is prepared for this call where worthwhile, in one and a half
    times the memory of a `W` of up to 256 MiB.
    """
    wide = h.device.type == "cpu" and len(h) * W.shape[1] > BLOCK and activation != "groupmax"
    if torch.is_grad_enabled() or not (wide or approximate):
        return top(torch.addmm(b, h, W), k, activation)
    if approximate is None and len(h) >= _MANY and W.nbytes <= _SMALL:
        approximate = ApproximateTopK.of(W, b, like=h)
    return top_of_product(h, W, b, k, activation) if approximate is None else approximate.top(h, k, activation)


def is_worthwhile(W: Float[Tensor, "d_in d_sae"]) -> bool:
    """Whether selection in bf16 is faster than float32: on a CPU with bf16 instructions.

    Not on a GPU: intermediate sums may be rounded to bf16 there, and float32 is fast.
    """
    is_float32_cpu = W.device.type == "cpu" and W.dtype == torch.float32
    return is_float32_cpu and W.shape[1] >= 1024 and next_higher_precision("int8", W.device) == "bf16"


def _center(like: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_in"]:
    """Mean of rows weighted by 1 / length, which is near most rows despite a few very long ones."""
    length = torch.linalg.vector_norm(like, dim=1)
    mask = (length > 1e-15) & (length < 1e15)
    if not mask.any():
        return like.new_zeros(like.shape[1])
    weight = 1 / length[mask]
    return (weight @ like[mask]) / weight.sum()


# -- for a training step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readout:
    """Encoder weights of a training step, and how the scores of latents are computed and compared."""

    W: Float[Tensor, "d_sae d_in"]
    """Encoder directions, one contiguous row per latent: W_enc.T."""
    b: Float[Tensor, " d_sae"]
    """Bias of each latent."""
    norms: Float[Tensor, " d_sae"] | None = None
    """Norms of decoder rows: scores are pre * norm; None means scores are pre."""
    precision: Precision = "full"
    """Precision of the product that selects candidates."""
    scratch: Float[Tensor, "d_sae d_in"] | None = None
    """Buffer that may be overwritten."""
    lift: float = 0.0
    """Constant that the product adds to every score; only without norms."""

    def score(self, pre: Tensor, latents: Tensor) -> Tensor:
        """Scores of pre-activations, by which latents compete."""
        return pre if self.norms is None else pre * _of_latents(self.norms, latents)

    def unscored(self, score: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations of scores; a latent with a zero decoder row has score 0."""
        if self.norms is None:
            return score
        return score / _of_latents(torch.where(self.norms == 0, torch.ones_like(self.norms), self.norms), latents)

    def pre(self, pairs: Pairs, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " pairs"]:
        """Pre-activations of pairs in full precision."""
        return _rescored(pairs, x, self.W, self.b)

    def matmul(self, x: Float[Tensor, "batch d_in"]) -> Multiply:
        """Prepare the product that computes scores of rows of `x`."""
        return low_precision_matmul(self.W, self.b + self.lift, self.norms, x, self.precision, self.scratch)

    def refined(self) -> Readout:
        """The same readout in the next higher precision."""
        return replace(self, precision=next_higher_precision(self.precision, self.W.device))


def top_per_token(x: Float[Tensor, "batch d_in"], readout: Readout, k: int, *, signed: bool = False) -> Pairs:
    """The k largest scores of each token (in magnitude, if signed), exactly.

    Args:
        x: centered inputs.
        readout: encoder weights and scores.
        k: pairs per token.
        signed: compare magnitudes.
    """
    multiply, size = readout.matmul(x), tile_rows(len(readout.W), x.device)
    if readout.precision == "full":
        scores, latents = _largest(x, multiply, len(readout.W), k, signed)
        return rectangular(latents, readout.unscored(scores, latents))
    n_candidates, parts = min(len(readout.W), k + MARGIN[readout.precision]), []
    for rows in (x[:size], x[size:]):  # the first tile shows whether the precision suffices
        scores, latents = _largest(rows, multiply, len(readout.W), n_candidates, signed)
        parts.append(_decided(rows, readout, latents, scores, k, signed))
        if len(parts) == 1 and readout.precision == "int8" and int(parts[0][2].sum()) > _REFINE_FRACTION * len(rows):
            return top_per_token(x, readout.refined(), k, signed=signed)
    pre, latents, undecided = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(retry := undecided.nonzero()[:, 0]):
        exact = top_per_token(x[retry], replace(readout, precision="full"), k, signed=signed)
        pre[retry], latents[retry] = exact.pre.view(-1, k), exact.latents.view(-1, k)
    return rectangular(latents, pre)


def top_of_batch(x: Float[Tensor, "batch d_in"], readout: Readout, n: int, limit: int) -> Pairs | None:
    """The n largest positive scores of the batch, or all positive ones if fewer; None if candidates exceed `limit`.

    A threshold that somewhat more than n scores exceed is estimated from 64 tokens; the pairs above it are listed and
    the n best selected. If it was too high, a lower one is tried. The result does not depend on the estimate.

    Args:
        x: centered inputs.
        readout: encoder weights and scores.
        n: pairs to select.
        limit: largest number of listed pairs, which bounds memory.
    """
    multiply, spare = readout.matmul(x), SPARE[readout.precision]
    threshold = _estimate_threshold(x, multiply, n, spare)
    while True:
        listed = _list_above(x, readout, multiply, threshold, limit)
        if listed is None:
            return None
        pairs, off = listed
        if not math.isfinite(off):
            return None
        scores = readout.score(pairs.pre, pairs.latents)
        best, least = _best(scores, n)
        if least >= _reach(threshold, off):  # upper bound of the scores of unlisted pairs
            return pairs.where(best)
        if readout.precision == "int8" and off > least - threshold:
            return top_of_batch(x, readout.refined(), n, limit)
        spare *= 2
        threshold = min(_estimate_threshold(x, multiply, n, spare), threshold - 2 * off)


def above_zero(x: Float[Tensor, "batch d_in"], readout: Readout, limit: int) -> Pairs | None:
    """All pairs with a pre-activation > 0; None if more than `limit`, or not finite. Thresholds belong into the bias.

    Args:
        x: centered inputs.
        readout: encoder weights and scores.
        limit: largest number of pairs, which bounds memory; up to twice as many candidates are listed.
    """
    slack = _slack(x, readout)
    while True:
        # Lifted scores rather than a threshold below 0: comparing scores >= 0 is faster (`topk.above`).
        lifted = replace(readout, lift=slack)
        listed = _list_above(x, lifted, lifted.matmul(x), 0.0, int(limit * SPARE[readout.precision]), slack)
        if listed is None:
            return None
        pairs, off = listed
        if not math.isfinite(off):  # nothing bounds what was not listed, and no slack ever will
            return None
        if off <= slack:  # unlisted pre-activations are at most off - slack
            pairs = pairs if readout.precision == "full" else pairs.where(pairs.pre > 0)
            return pairs if len(pairs) <= limit else None
        if readout.precision == "int8" and off > 2 * slack:
            return above_zero(x, readout.refined(), limit)
        slack = 1.5 * off


def _largest(
    x: Float[Tensor, "tokens d_in"], multiply: Multiply, d_sae: int, k: int, signed: bool
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest scores of each token and their latents, tile by tile."""
    scores, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)

    def select(rows: slice) -> None:
        scores[rows], latents[rows] = largest(multiply(x[rows]), k, signed=signed)

    _map_tiles(select, x, d_sae)
    return scores, latents


def _map_tiles(work: Callable[[slice], T], x: Tensor, d_sae: int) -> list[T]:
    """Results of tiles of tokens; on a CPU, threads share them."""
    whole = tile_rows(d_sae, x.device)
    return map_tiles(work, len(x), shared_tile_rows(d_sae) if x.device.type == "cpu" else len(x) + 1, whole)


def _decided(
    x: Float[Tensor, "tokens d_in"],
    readout: Readout,
    latents: Int[Tensor, "tokens n_candidates"],
    rough: Float[Tensor, "tokens n_candidates"],
    k: int,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best candidates by their full scores, and tokens whose margin is smaller than the product's error."""
    pre = readout.pre(rectangular(latents, rough), x).view_as(rough)
    full = readout.score(pre, latents)
    off = _off(full, rough).amax(1)
    off = torch.cat([part.max().expand(len(part)) for part in off.split(_ROWS_PER_ERROR_BOUND) if len(part)] or [off])
    if signed:
        full, rough = full.abs(), rough.abs()
    values, best = full.topk(k, dim=1, sorted=False)
    least = rough.amin(1)
    undecided = _reach(least, off) > values.amin(1).clamp(min=0)
    return pre.gather(1, best), latents.gather(1, best), undecided & (latents.shape[1] < len(readout.W))


def _list_above(
    x: Tensor, readout: Readout, multiply: Multiply, threshold: float, limit: int, tolerance: float = torch.inf
) -> tuple[Pairs, float] | None:
    """Pairs scored above the threshold, with full pre-activations, and the largest error of their scores.

    None if more than the limit. Stops after the first tile if its error exceeds the tolerance.
    """
    parts, d_sae = [], len(readout.W)
    is_checked = tolerance < torch.inf and readout.precision != "full"
    first = min(len(x), tile_rows(d_sae, x.device)) if is_checked else len(x)
    for start, end in ((0, first), (first, len(x))):
        if start == end:
            continue
        rows = x[start:end]
        listed = _listed(rows, multiply, threshold, limit, lambda work, rows=rows: _map_tiles(work, rows, d_sae))
        if listed is None:
            return None
        if is_checked and start == 0:
            exact = _exact(pairs_of(*listed, end), readout, rows)
            if exact[1] > tolerance:
                return exact
        parts.append((listed[0] + start, *listed[1:]))
        limit -= len(listed[0])
    tokens, latents, scores = (torch.cat(of_rows) for of_rows in zip(*parts, strict=True))
    return _exact(pairs_of(tokens, latents, scores, len(x)), readout, x)


def _exact(pairs: Pairs, readout: Readout, x: Float[Tensor, "tokens d_in"]) -> tuple[Pairs, float]:
    """Replace the scores of pairs by full pre-activations, and return the largest error of the scores."""
    if readout.precision == "full":
        return replace(pairs, pre=readout.unscored(pairs.pre, pairs.latents)), 0.0
    pre = readout.pre(pairs, x)
    off = _off(readout.score(pre, pairs.latents) + readout.lift, pairs.pre.to(pre.dtype))
    return replace(pairs, pre=pre), float(off.max()) if len(pairs) else 0.0


def _off(full: Tensor, rough: Tensor) -> Tensor:
    """Errors of scores beyond the rounding of the result."""
    return (full - rough).abs().sub_(rough.abs(), alpha=_ROUNDING)


def _reach(rough: Any, off: Any) -> Any:
    """Upper bound of a score from its approximate value, of tensors or numbers."""
    return rough + off + _ROUNDING * abs(rough)


def _of_latents(values: Float[Tensor, " d_sae"], latents: Tensor) -> Tensor:
    """Values of latents, in the shape of `latents`."""
    return values.index_select(0, latents.reshape(-1)).view_as(latents)


def _best(scores: Float[Tensor, " pairs"], n: int) -> tuple[Tensor, float]:
    """Ascending indices of the n largest scores, and the smallest of these (0 if fewer than n are positive)."""
    if len(scores) > n:
        largest_n = scores.topk(n, sorted=False)
        least = float(largest_n.values.min())
        if least > 0:
            return largest_n.indices.sort().values, least
    return (scores > 0).nonzero()[:, 0], 0.0


def _estimate_threshold(x: Tensor, multiply: Multiply, n: int, spare: float) -> float:
    """Threshold >= 0 that about spare * n scores exceed, from tokens spread over the batch."""
    sample = x[:: -(-len(x) // _SAMPLE)]
    scores = multiply(sample).flatten()
    n_candidates = int(spare * n * len(sample) / len(x)) + 1
    if n_candidates >= len(scores):
        return 0.0
    return max(0.0, float(scores.topk(n_candidates, sorted=False).values.min()))


def _slack(x: Tensor, readout: Readout) -> float:
    """First estimate of the product's largest error, in units of the pre-activation."""
    if readout.precision == "full":
        return 0.0
    typical = x.norm(dim=1).mean() * readout.W.norm(dim=1).mean() / x.shape[1] ** 0.5
    return float(typical) * SLACK[readout.precision]


# -- shared ----------------------------------------------------------------------------------------------------------


def _rescored(
    pairs: Pairs, x: Float[Tensor, "tokens d_in"], rows: Float[Tensor, "d_sae d_in"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, " pairs"]:
    """Pre-activations of candidates in full precision."""
    return dots(pairs, x, rows).add_(b.index_select(0, pairs.latents))


def _listed(
    x: Tensor,
    scores: Callable[[Tensor], Tensor | None],
    threshold: float,
    limit: int,
    run: Callable[[Callable[[slice], Any]], list[Any]],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(token, latent, score) of scores above the threshold, from the tiles that `run` calls; None beyond the limit."""
    counts: list[int] = []

    def tile(rows: slice) -> tuple[Tensor, Tensor, Tensor] | None:
        if sum(counts) > limit:
            return None
        n = rows.stop - rows.start
        of_tile = max(256, 2 * limit * n // len(x))  # so that the first tile shows if there are too many
        pre = scores(x[rows])
        listed = None if pre is None else above(pre, threshold, min(of_tile, limit))
        counts.append(limit + 1 if listed is None else len(listed[0]))
        return None if listed is None else (listed[0] + rows.start, *listed[1:])

    tiles = run(tile)
    if sum(counts) > limit:
        return None
    tokens, latents, values = (torch.cat(of_tiles) for of_tiles in zip(*tiles, strict=True))
    return tokens, latents, values
