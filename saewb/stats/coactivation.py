"""Co-activation counts of latents over a stream of activations: exact, in memory known in advance.

1. Each batch is reduced to its active latents: (token, latent, activation).
2. Tokens of about equally many active latents are taken together, so that their pairs make full rectangles.
3. Pairs are added to a table of half of n * n counts (and sums of products).

Time goes with the pairs that fire, L0² per token, not with n². The tables are not sparse: over millions of tokens most
pairs of an SAE's latents meet at least once, and 12 bytes each is less than any sparse form takes that also has to name
the pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import has_float64
from saewb.sae.sparse import SparseLatents
from saewb.stats.cooccurrence import Coactivation, Side, triangle

MAX_BYTES = 2 * 10**9
_PAIRS = 2**19  # pairs added at a time
_DENSE = 2**21  # activations scanned at a time
_WORK = _PAIRS * 96 + _DENSE * 48  # bytes that steps 1 to 3 take, whatever the batch


def coactivation(
    batches: Iterable[Float[Tensor, "_ d_sae"] | SparseLatents], *, products: bool = True, max_bytes: int = MAX_BYTES
) -> Coactivation:
    """Count on how many tokens each two latents of an SAE fire together, over all batches.

    Args:
        batches: activations from `sae.encode` or `sae.encode_topk`; any number of tokens each.
        products: whether to sum products of activations as well, for `Coactivation.correlation`.
        max_bytes: of memory, beyond the batch: 4 bytes per pair of latents, 12 with products, and 0.2 GB.
            The default is enough for 16,384 latents with products and 28,000 without.

    Returns:
        Counts of all pairs, exactly, with phi, Jaccard and correlation; for two SAEs see `CoactivationStream`.

    Raises:
        TypeError: for batches of something else.
        ValueError: if there are no tokens, or the tables do not fit into `max_bytes`.

    Example:
        >>> counts = coactivation([torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])])
        >>> counts.counts([0, 1, 2], [0, 1, 2]).tolist()
        [[2, 2, 0], [2, 3, 0], [0, 0, 0]]
    """
    stream = None
    for batch in batches:
        if not isinstance(batch, (Tensor, SparseLatents)):
            what = f"coactivation got a {type(batch).__name__} for a batch."
            raise TypeError(explain(what, want="activations [tokens, d_sae]", fix="coactivation([sae.encode(x)])"))
        if stream is None:
            how = {"products": products, "max_bytes": max_bytes, "device": batch.device}
            stream = CoactivationStream(batch.shape[-1], **how)
        stream.update(batch)
    if stream is None:
        raise ValueError(explain("coactivation got no batches.", want="at least one token"))
    return stream.result()


class CoactivationStream:
    """Accumulator of joint firing counts over batches of tokens, within one SAE or between two.

    Counts are exact, whatever the batches; sums of products are in float64. An activation other than 0 counts as
    firing, whatever its sign. Each batch waits for its device once or twice, since how many latents fire decides
    how much memory the next step takes.

    Args:
        d_sae: latents.
        d_sae_b: latents of the second SAE; None counts pairs within the first.
        products: whether to sum products of activations as well, for `Coactivation.correlation`.
        max_bytes: of memory, beyond the batch.
        device: of the tables.

    Raises:
        ValueError: if the tables do not fit into `max_bytes`.

    Example:
        >>> stream = CoactivationStream(2, 3)
        >>> stream.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0, 5.0]]))
        >>> stream.result().counts([0, 1], [0, 1, 2]).tolist()
        [[0, 1, 1], [0, 0, 0]]
    """

    def __init__(
        self,
        d_sae: int,
        d_sae_b: int | None = None,
        *,
        products: bool = True,
        max_bytes: int = MAX_BYTES,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_fits(d_sae, d_sae_b, products, max_bytes)
        device = device if has_float64(torch.device(device)) else "cpu"
        self.n_tokens = 0
        self._a = Side.empty(d_sae, device)
        self._b = self._a if d_sae_b is None else Side.empty(d_sae_b, device)
        n = n_pairs(d_sae, d_sae_b)
        # The last place is not a pair: padding of a rectangle is added there.
        self._together: Tensor | None = torch.zeros(n + 1, dtype=torch.int32, device=device)
        self._products = torch.zeros(n + 1, dtype=torch.float64, device=device) if products else None

    @torch.no_grad()
    def update(
        self,
        latents: Float[Tensor, "tokens d_sae"] | SparseLatents,
        latents_b: Float[Tensor, "tokens d_sae_b"] | SparseLatents | None = None,
    ) -> None:
        """Add a batch of tokens, which may be empty.

        Args:
            latents: of the first SAE.
            latents_b: of the second, on the same tokens, if there is one.

        Raises:
            ValueError: if the shapes do not fit, if a second SAE's latents are missing or too many, if `result` has
                been called, or after 2**31 tokens, past which counts would not fit.
        """
        self._check(latents, latents_b)
        sides = [(self._a, latents)] + ([] if latents_b is None else [(self._b, latents_b)])
        step = max(1, _DENSE // max(_width(acts) for _, acts in sides))
        for start in range(0, latents.shape[0], step):
            active = [_active(acts, slice(start, start + step), self._together.device) for _, acts in sides]
            for (side, _), acts in zip(sides, active, strict=True):
                side.add(acts.latent, acts.act)
            self._add_pairs(active[0], active[-1])
            self.n_tokens += active[0].n_tokens

    def merge(self, other: CoactivationStream) -> None:
        """Add the tokens of `other`, which is not changed.

        Raises:
            ValueError: if it counts other pairs, or the result of either has been taken.
        """
        self._check_open()
        other._check_open()
        mine, others = self._shape(), other._shape()
        if mine != others:
            raise ValueError(explain(f"a stream of {others} cannot go into one of {mine}.", want="the same of both"))
        self._check_countable(other.n_tokens)
        self._together += other._together.to(self._together.device)
        if self._products is not None:
            self._products += other._products.to(self._products.device)
        self._a.merge(other._a)
        if self._b is not self._a:
            self._b.merge(other._b)
        self.n_tokens += other.n_tokens

    def result(self) -> Coactivation:
        """Counts of all tokens so far. The tables are not copied: the stream accepts no tokens afterwards.

        Raises:
            ValueError: if there were no tokens, or it has been called before.
        """
        self._check_open()
        if self.n_tokens == 0:
            raise ValueError(explain("no tokens to measure.", want="at least one row"))
        together, products = self._together, self._products
        self._together = self._products = None
        second = None if self._b is self._a else self._b
        return Coactivation(self.n_tokens, self._a, second, together[:-1], None if products is None else products[:-1])

    def _add_pairs(self, a: SparseLatents, b: SparseLatents) -> None:
        n_a = torch.bincount(a.token, minlength=a.n_tokens)
        n_b = n_a if b is a else torch.bincount(b.token, minlength=b.n_tokens)
        for tokens, width_a, width_b in _rectangles(n_a, n_b):
            latent_a, act_a, mask_a = _pad(a, n_a, tokens, width_a)
            latent_b, act_b, mask_b = (latent_a, act_a, mask_a) if b is a else _pad(b, n_b, tokens, width_b)
            for i, j in _slots(width_a, width_b, a is b, _PAIRS // len(tokens), a.device):
                first, second = latent_a[:, i], latent_b[:, j]
                pair = triangle(first, second, a.d_sae) if b is a else first * b.d_sae + second
                pair = torch.where(mask_a[:, i] & mask_b[:, j], pair, len(self._together) - 1).flatten()
                self._together.scatter_add_(0, pair, pair.new_ones((), dtype=torch.int32).expand(len(pair)))
                if self._products is not None:
                    self._products.scatter_add_(0, pair, (act_a[:, i] * act_b[:, j]).flatten())

    def _shape(self) -> str:
        second = "" if self._b is self._a else f" x {len(self._b.fired):,}"
        return f"{len(self._a.fired):,}{second} latents {'with' if self._products is not None else 'without'} products"

    def _check_open(self) -> None:
        if self._together is None:
            fix = "CoactivationStream(...), one per result; merge() adds streams"
            raise ValueError(explain("the result of this stream has been taken, and its tables with it.", fix=fix))

    def _check_countable(self, more: int) -> None:
        if self.n_tokens + more >= 2**31:
            raise ValueError(explain(f"{self.n_tokens + more:,} tokens are too many to count.", want="under 2**31"))

    def _check(self, latents: Tensor | SparseLatents, latents_b: Tensor | SparseLatents | None) -> None:
        self._check_open()
        two = self._b is not self._a
        if two != (latents_b is not None):
            got, want = ("one SAE", "two") if two else ("two SAEs", "one")
            raise ValueError(explain(f"update got the latents of {got}.", want=f"those of {want}, as at the start"))
        d, n = len(self._a.fired), latents.shape[0]
        shapes = [tuple(latents.shape)] + ([tuple(latents_b.shape)] if two else [])
        if shapes != [(n, d)] + ([(n, len(self._b.fired))] if two else []):
            want = f"[tokens, {d}]" + (f" and [tokens, {len(self._b.fired)}], the same tokens" if two else "")
            raise ValueError(explain(f"update got latents of shape {', '.join(map(str, shapes))}.", want=want))
        self._check_countable(n)


def n_pairs(d_sae: int, d_sae_b: int | None = None) -> int:
    """Number of pairs of different latents of one SAE, or of latents of one SAE with those of another."""
    return d_sae * (d_sae - 1) // 2 if d_sae_b is None else d_sae * d_sae_b


def needed_bytes(d_sae: int, d_sae_b: int | None = None, products: bool = True) -> int:
    """Bytes that a CoactivationStream takes at most, beyond the batch.

    Example:
        >>> needed_bytes(16_384) < 2 * 10**9, needed_bytes(32_768, products=False) < 2.4 * 10**9
        (True, True)
    """
    return n_pairs(d_sae, d_sae_b) * (12 if products else 4) + 24 * (d_sae + (d_sae_b or 0)) + _WORK


# -- active latents --------------------------------------------------------------------------------------------------


def _active(latents: Tensor | SparseLatents, tokens: slice, device: torch.device) -> SparseLatents:
    """Active latents of some tokens, in float64 on `device`."""
    if isinstance(latents, Tensor):
        latents = SparseLatents.from_dense(latents[tokens])
    else:
        latents = latents.select(torch.arange(latents.n_tokens, device=latents.device)[tokens])
    return SparseLatents(latents.token, latents.latent.long(), latents.act, latents.shape).to(device).to(torch.float64)


def _pad(
    latents: SparseLatents, n_active: Tensor, tokens: Int[Tensor, " some"], width: int
) -> tuple[Int[Tensor, "some width"], Float[Tensor, "some width"], Tensor]:
    """Latents and activations of some tokens side by side, and a mask of those that are active."""
    slot = torch.arange(width, device=tokens.device)
    mask = slot < n_active[tokens][:, None]
    index = torch.where(mask, latents.starts[tokens][:, None] + slot, 0)
    return latents.latent[index], latents.act[index], mask


def _width(latents: Tensor | SparseLatents) -> int:
    is_topk = isinstance(latents, SparseLatents) and latents.topk is not None
    return latents.topk.values.shape[1] if is_topk else latents.shape[1]


def _rectangles(a: Int[Tensor, " tokens"], b: Int[Tensor, " tokens"]) -> Iterator[tuple[Tensor, int, int]]:
    """Group tokens of similar L0, with the largest L0 on each side: little padding, and at most `_PAIRS` pairs."""
    order = a.argsort(descending=True)
    counts_a, max_b = a[order].tolist(), max(b.tolist(), default=0)
    start = 0
    while start < len(counts_a) and counts_a[start] and max_b:
        width_a, width_b = counts_a[start], counts_a[start] if a is b else max_b
        n = max(1, _PAIRS // (width_a * width_b))
        yield order[start : start + n], width_a, width_b
        start += n


def _slots(
    width_a: int, width_b: int, square: bool, limit: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of slots, i before j if both are of one SAE, about `limit` at a time."""
    step = max(1, limit // width_b)
    for start in range(0, width_a, step):
        rows = torch.arange(start, min(start + step, width_a), device=device)
        i, j = rows.repeat_interleave(width_b), torch.arange(width_b, device=device).repeat(len(rows))
        mask = j > i if square else slice(None)
        yield i[mask], j[mask]


def _check_fits(d_sae: int, d_sae_b: int | None, products: bool, max_bytes: int) -> None:
    if d_sae < 1 or (d_sae_b is not None and d_sae_b < 1):
        raise ValueError(explain(f"CoactivationStream got d_sae={d_sae}, d_sae_b={d_sae_b}.", want="at least 1"))
    needed = needed_bytes(d_sae, d_sae_b, products)
    if needed > max_bytes:
        second = "" if d_sae_b is None else f" x {d_sae_b:,}"
        what = f"pairs of {d_sae:,}{second} latents take {needed:,} bytes, and max_bytes is {max_bytes:,}."
        want = "more memory, no products (a third), or latents[:, chosen] of the ones you ask about"
        raise ValueError(explain(what, want=want, fix=f"max_bytes={needed}" + (", products=False" * products)))
