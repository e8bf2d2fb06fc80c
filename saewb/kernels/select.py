"""The largest of `h @ W + b`, exactly: a product in bf16 chooses candidates, float32 decides among them.

A processor with bf16 instructions multiplies in it five times as fast as in float32. How far the rough value of any
latent can be off is known before the product is taken: with c a fixed center, g = h - c, and ^ for rounded to bf16

    h . w + b  -  (g^ . w^ + (c . w + b)^^)  =  (g - g^) . w  +  g^ . (w - w^)  +  what sums and the bias round
    |...|  <=  |g - g^| |w|  +  2^-9 |g^| |w|  +  ...   =:  off(h),   with |w| the longest column of W

(the bias is carried in two bf16 numbers, ^^). So a latent that is no candidate is at most the last candidate's rough
value, plus its rounding, plus off(h). Where the k-th largest of the candidates, in float32, is above that, the k are
proven; other rows are looked at again with four times the candidates, then in float32 altogether. The same bound says
which latents can be above a threshold.

The center is near most rows, so that what is common to all of them is in the bias and rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.kernels.pairs import dots, pairs_of, rectangular
from saewb.kernels.precision import finer
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


@dataclass(frozen=True, eq=False)
class Rough:
    """`h @ W + b`, prepared to be asked many times for its largest entries. Holds W once more and once in bf16.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> h, W, b = torch.randn(8, 16, generator=rng), torch.randn(16, 4096, generator=rng), torch.zeros(4096)
        >>> values, latents = Rough.of(W, b, like=h).top(h, 5, "topk")
        >>> torch.allclose(values.sort().values, (h @ W + b).topk(5).values.sort().values, atol=1e-5)
        True
    """

    W: Float[Tensor, "d_in d_sae"]
    b: Float[Tensor, " d_sae"]
    rows: Float[Tensor, "d_sae d_in"]  # of W's transpose, one after another in memory
    coarse: Tensor  # bf16 [d_in + 32, d_sae]: W, the bias at the center, what that lacks, ones, zeros
    center: Float[Tensor, " d_in"]
    longest: float  # no column of W is longer
    bias: float  # none of |c . w + b| and |b| is larger
    bound: float  # of what float32 and bf16 lose on the bias and its sums

    @classmethod
    def of(cls, W: Tensor, b: Tensor, like: Float[Tensor, "n d_in"], floor: Tensor | None = None) -> Rough | None:
        """Prepared for rows like these; None where float32 is as good: not a CPU with bf16, odd numbers, few latents.

        Args:
            W: float32, not to be changed while this is used.
            b: of each latent.
            like: some of the rows to come; only how quick it is depends on them.
            floor: of each latent; what `over` compares with.
        """
        if not pays(W):
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

    @torch.no_grad()
    def top(self, h: Float[Tensor, "tokens d_in"], k: int, activation: str) -> tuple[Tensor, Tensor]:
        """`topk.top(h @ W + b, k, activation)` for "topk" and "abstopk"; values in float32. No gradients.

        Holds 32 MiB of rough values (or those of a token), and 20 bytes and a float32 per candidate of a tile.
        """
        wanted, d_sae = k + k // 2 + 24, len(self.rows)
        if wanted * _NARROW > d_sae:
            return top_of_product(h, self.W, self.b, k, activation)
        values, indices = h.new_empty(len(h), k), torch.empty(len(h), k, dtype=torch.int64)
        open_, done = torch.zeros(len(h), dtype=torch.bool), 0
        size = max(1, min(_TILE // d_sae, _PICKED // wanted))
        buffer = torch.empty(min(size, len(h)), d_sae, dtype=torch.bfloat16)
        for start in range(0, len(h), size):
            at = slice(start, start + size)
            scores, off = self._scores(h[at], buffer)
            values[at], indices[at], sure = self._decided(h[at], scores, off, k, wanted, activation)
            if not sure.all() and 4 * wanted * _NARROW <= d_sae:
                again = (~sure).nonzero()[:, 0]
                more = self._decided(h[at][again], scores[again], off[again], k, 4 * wanted, activation)
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
        found: list[tuple[Tensor, Tensor]] = []
        size, total = max(1, _TILE // len(self.rows)), 0
        buffer = torch.empty(min(size, len(h)), len(self.rows), dtype=torch.bfloat16)
        for start in range(0, len(h), size):
            part = h[start : start + size]
            scores, off = self._scores(part, buffer, raised=True)
            share = max(256, 2 * limit * len(part) // len(h))  # many at once are known by the first tile
            listed = above(scores, 0.0, min(limit - total, share)) if off.isfinite().all() else None
            if listed is None:
                return None
            total += len(listed[0])
            found.append((listed[0] + start, listed[1]))
        token, latent = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = (token * len(self.rows) + latent).argsort()
        token, latent = token[order], latent[order]
        pre = dots(pairs_of(token, latent, latent, len(h)), h, self.rows)
        return token, latent, pre.add_(self.b[latent])

    def _scores(self, h: Tensor, buffer: Tensor, *, raised: bool = False) -> tuple[Tensor, Float[Tensor, " tokens"]]:
        """Rough values, and by how much each may be off before it was rounded; `raised` by so much, none is too low."""
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
        self, h: Tensor, scores: Tensor, off: Float[Tensor, " tokens"], k: int, wanted: int, activation: str
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"], Bool[Tensor, " tokens"]]:
        """The k best of the `wanted` roughly largest of each token, and where these are proven to be the ones."""
        signed = activation == "abstopk"
        rough, latents = largest(scores, wanted, signed=signed)
        full = dots(rectangular(latents, rough), h, self.rows).view(latents.shape).add_(self.b[latents])
        least = (rough.abs() if signed else rough).amin(1).double()
        reach = least + 2 * _U * (1 + 2 * _U) * least.abs() + off  # the most that one not among them can be
        best, which = (full.abs() if signed else full).topk(k, dim=1, sorted=False)
        worst = best.amin(1).double()
        sure = (worst > reach) & worst.isfinite()
        if signed:
            return full.gather(1, which), latents.gather(1, which), sure
        return torch.relu(best), latents.gather(1, which), sure | (reach <= 0)


def chosen(
    h: Float[Tensor, "tokens d_in"],
    W: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, " d_sae"],
    k: int,
    activation: str,
    rough: Rough | None = None,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """`topk.top(h @ W + b, k, activation)` in the way that is quickest here; with gradients, where they are wanted.

    `rough` is of these weights; without it one is made for this call where that is worth its time, and its memory: one
    and a half times a `W` of up to 256 MiB.
    """
    wide = h.device.type == "cpu" and len(h) * W.shape[1] > BLOCK and activation != "groupmax"
    if torch.is_grad_enabled() or not (wide or rough):
        return top(torch.addmm(b, h, W), k, activation)
    if rough is None and len(h) >= _MANY and W.nbytes <= _SMALL:
        rough = Rough.of(W, b, like=h)
    return top_of_product(h, W, b, k, activation) if rough is None else rough.top(h, k, activation)


def pays(W: Float[Tensor, "d_in d_sae"]) -> bool:
    """Whether bf16 products choose more quickly than float32 ones decide: a CPU with instructions for them.

    Not a GPU: there, sums may be rounded to bf16 on the way, and float32 is quick.
    """
    here = W.device.type == "cpu" and W.dtype == torch.float32
    return here and W.shape[1] >= 1024 and finer("int8", W.device) == "bf16"


def rough_bytes(d_in: int, d_sae: int) -> int:
    """What a `Rough` holds and takes at most, in bytes, besides the weights."""
    return (4 * d_in + 2 * (d_in + _PAD)) * d_sae + 2 * max(_TILE, d_sae) + 40 * _PICKED


def _center(like: Float[Tensor, "n d_in"]) -> Float[Tensor, " d_in"]:
    """Near most of these rows, whatever a few very long ones are: the mean weighted by 1 / length."""
    length = torch.linalg.vector_norm(like, dim=1)
    usual = (length > 1e-15) & (length < 1e15)
    if not usual.any():
        return like.new_zeros(like.shape[1])
    weight = 1 / length[usual]
    return (weight @ like[usual]) / weight.sum()
