"""(token, latent) pairs, and the four sparse products of a training step.

combine     recon[t]  = sum over the pairs of token t    of acts * W_dec[latent]           (embedding_bag)
dots        d_acts    = per pair                         grad[token] . W_dec[latent]       (sampled, sorted by latent)
gather_rows dW[j]     = sum over the pairs of latent j   of value * rows[token]            (embedding_bag, sorted)
per_latent  d_b[j]    = sum over the pairs of latent j   of value
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from saewb.kernels.threads import map_tiles

_SUM = 0  # embedding_bag's mode, as its backward spells it
_LATENTS = 1024  # latents summed at a time into existing memory
_BAGS, _PRODUCTS = 256, 2**13  # sums and products that one thread computes at a time
_CACHED = 5_000_000  # bytes of the batch that sampled dot products read at a time
_CHUNK = 2**16  # pairs at a time for sampled dot products without the private operation


@dataclass(frozen=True)
class Pairs:
    """Active (token, latent) pairs, sorted by token."""

    tokens: Int[Tensor, " pairs"]
    """Row of the batch, ascending."""
    latents: Int[Tensor, " pairs"]
    """Latent that is active on the token."""
    pre: Float[Tensor, " pairs"]
    """Its pre-activation, x_centered @ W_enc + b_enc, in the dtype of the parameters."""
    starts: Int[Tensor, " batch"]
    """Position of each token's first pair."""

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, index: Tensor) -> Pairs:
        """Select pairs by ascending indices or by a mask."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        tokens, latents, pre = (t.index_select(0, index) for t in (self.tokens, self.latents, self.pre))
        return pairs_of(tokens, latents, pre, len(self.starts))


@dataclass(frozen=True)
class ByLatent:
    """Pairs sorted by latent, then token: the order in which gradients of weights are summed."""

    order: Int[Tensor, " pairs"]
    """Indices into the pairs sorted by token."""
    tokens: Int[Tensor, " pairs"]
    """Row of the batch, ascending within a latent."""
    starts: Int[Tensor, " d_sae"]
    """Position of each latent's first pair."""

    def sorted(self, values: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Sort values of the pairs into this order."""
        return values.index_select(0, self.order)


def starts_of(sorted_ids: Int[Tensor, " pairs"], n: int) -> Int[Tensor, " n"]:
    """First position of each of 0 ... n-1 in an ascending list.

    Example:
        >>> starts_of(torch.tensor([0, 0, 2]), 4)
        tensor([0, 2, 2, 3])
    """
    return torch.searchsorted(sorted_ids, torch.arange(n, device=sorted_ids.device, dtype=sorted_ids.dtype))


def pairs_of(tokens: Tensor, latents: Tensor, pre: Tensor, batch: int) -> Pairs:
    """Build pairs from lists sorted by token."""
    return Pairs(tokens, latents, pre, starts_of(tokens, batch))


def rectangular(latents: Int[Tensor, "batch k"], pre: Float[Tensor, "batch k"]) -> Pairs:
    """Build pairs from k latents per token."""
    batch, k = latents.shape
    starts = torch.arange(batch, device=latents.device) * k
    tokens = torch.arange(batch, device=latents.device).repeat_interleave(k)
    return Pairs(tokens, latents.reshape(-1), pre.reshape(-1), starts)


def by_latent(pairs: Pairs, d_sae: int) -> ByLatent:
    """Sort pairs by latent; stable, so that sums depend on the pairs only."""
    latents, order = torch.sort(pairs.latents.int(), stable=True)  # int32: half the bytes to sort
    return ByLatent(order, pairs.tokens.index_select(0, order), starts_of(latents, d_sae))


def combine(pairs: Pairs, values: Float[Tensor, " pairs"], rows: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
    """Weighted sum of the rows of each token's latents; zeros for a token without pairs.

    Example:
        >>> pairs = pairs_of(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), torch.ones(3), batch=3)
        >>> combine(pairs, torch.tensor([1.0, 2.0, 3.0]), torch.eye(2))
        tensor([[2., 1.],
                [0., 0.],
                [0., 3.]])
    """
    return _summed(pairs.latents, rows, pairs.starts, values)


def gather_rows(
    order: ByLatent,
    values: Float[Tensor, " pairs"],
    rows: Float[Tensor, "batch d"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """Weighted sum of the rows of each latent's tokens: `dense(values).T @ rows`.

    With `out`, some latents at a time are summed and copied there: page faults of a new result of the size of a weight
    matrix cost more than the copy.
    """
    return _summed(order.tokens, rows, order.starts, order.sorted(values), out)


def _summed(indices: Tensor, rows: Tensor, starts: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Weighted sum of rows for each bag of indices, which begin at `starts`; on a CPU, threads share the bags."""
    n = len(starts)
    if not len(indices):
        return rows.new_zeros(n, rows.shape[1]) if out is None else out.zero_()
    if out is None and (rows.device.type != "cpu" or n < _BAGS):
        return embedding_bag(indices, rows, starts, per_sample_weights=weights, mode="sum")
    sums = rows.new_empty(n, rows.shape[1]) if out is None else out

    def add_up(bags: slice) -> None:
        low, high = (int(starts[i]) if i < n else len(indices) for i in (bags.start, bags.stop))
        of_bags, own = indices[low:high], starts[bags] - low
        sums[bags] = embedding_bag(of_bags, rows, own, per_sample_weights=weights[low:high], mode="sum")

    map_tiles(add_up, n, _BAGS if rows.device.type == "cpu" else n + 1, _LATENTS, lazy=True)
    return sums


def per_latent(pairs: Pairs, values: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    """Sum of the values of each latent's pairs."""
    return values.new_zeros(d_sae).index_add_(0, pairs.latents, values)


def has_sampled_dots() -> bool:
    """Whether this torch has the private operation that `dots` prefers (a test pins its result)."""
    return hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward")


def dots(
    pairs: Pairs, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"], private: bool | None = None
) -> Float[Tensor, " pairs"]:
    """`left[token] . right[latent]` of each pair, without a dense product or a gathered copy.

    The gradient of embedding_bag for its per-sample weights is this product, fused; it is private to torch. Without it
    the rows are gathered 65,536 pairs at a time: equal, and about ten times slower. The pairs are visited latent by
    latent, 5 MB of the batch at a time, so that one side stays in a cache and the other is read in order: two to three
    times faster than token by token.
    """
    if not len(pairs):
        return left.new_zeros(0)
    block = max(1, _CACHED // (left.shape[1] * left.element_size()))
    key = torch.add(pairs.latents, torch.div(pairs.tokens, block, rounding_mode="floor"), alpha=len(right))
    order = torch.sort(key.int() if len(right) * (len(left) // block + 1) < 2**31 else key).indices
    tokens, latents = pairs.tokens.index_select(0, order), pairs.latents.index_select(0, order)
    if has_sampled_dots() if private is None else private:
        unused = tokens.new_zeros(1)  # the offsets, which follow from `latents`
        products = left.new_empty(len(pairs))

        def multiply(some: slice) -> None:
            of_some = tokens[some], unused, latents[some], _SUM
            products[some] = torch.ops.aten._embedding_bag_per_sample_weights_backward(right, left, *of_some)

        map_tiles(
            multiply, len(pairs), _PRODUCTS if left.device.type == "cpu" else len(pairs) + 1, len(pairs) + 1, lazy=True
        )
    else:
        chunks = zip(tokens.split(_CHUNK), latents.split(_CHUNK), strict=True)
        products = torch.cat([torch.linalg.vecdot(left[tokens], right[latents]) for tokens, latents in chunks])
    return torch.empty_like(products).scatter_(0, order, products)
