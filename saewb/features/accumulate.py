"""Accumulate the contexts and statistics of an index, in one streamed pass over rows of tokens.

1. Top contexts: the strongest token of each row of text is a candidate; equal windows count once.
2. Sampled contexts: a uniform sample of activations, the smallest hashes of (seed, token's number, latent).
3. Counts: histogram, sum, active tokens by position.
4. Coactivation: the active latents of a uniform sample of tokens, again the smallest hashes.

Whether a token is sampled depends only on its number among all tokens and the seed, so the result is the same for any
batches in any order, and for any parts that are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.features.config import CANDIDATES, PENDING_TOKENS, IndexConfig
from saewb.features.top_contexts import EMPTY, Candidates, TopContexts
from saewb.metrics import float64, widest_float
from saewb.sae.sparse import SparseLatents

N_BINS = 64
_SMALLEST = -40  # exponent of a bin's width before the latent is active
_INFINITE = 0x7F800000  # bits of float32 infinity, larger than those of any finite number


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Whole rows of text."""

    ids: Int[Tensor, "rows ctx"]
    """Token ids."""
    mask: Bool[Tensor, "rows ctx"]
    """True at tokens that are not special."""
    first_row: int = 0
    """Number of the first of these rows in the text."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> TokenRows:
        return TokenRows(self.ids[rows], self.mask[rows], self.first_row + (rows.start or 0))

    @property
    def end(self) -> int:
        """Number of the last row, plus 1."""
        return self.first_row + len(self)

    def to(self, device: torch.device) -> TokenRows:
        """Move the rows to a device."""
        return TokenRows(self.ids.to(device), self.mask.to(device), self.first_row)

    def row(self, number: int) -> Int[Tensor, " ctx"]:
        """Ids of a row, by its number in the text."""
        return self.ids[number - self.first_row]

    def window(self, token: Int[Tensor, " n"], before: int, after: int) -> tuple[Tensor, Tensor]:
        """Flat indices of the tokens around each of these, and a mask of those in the same row."""
        ctx = self.ids.shape[1]
        offsets = torch.arange(-before, after + 1, device=token.device)
        position = (token % ctx)[:, None] + offsets
        inside = (position >= 0) & (position < ctx)
        return torch.where(inside, token[:, None] + offsets, 0), inside


class LatentAccumulator:
    """Accumulates contexts, counts and coactivation of every latent.

    Example:
        >>> config = IndexConfig(3, 4, n_top=1, n_sample=2, before=1, after=1, coactive_tokens=8, active=3, l0_most=3,
        ...     seed=0)
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> acts = torch.zeros(1, 4, 3); acts[0, 1:3, 2] = torch.tensor([0.5, 4.0])
        >>> accumulator = LatentAccumulator(config)
        >>> accumulator.update(TokenRows(ids, ids > 0), SparseLatents.from_dense(acts))
        >>> top = accumulator.tensors()
        >>> top["top.value"][2].tolist(), top["top.tokens"][2].tolist(), top["top.acts"][2].tolist()
        ([4.0], [[6, 7, 8]], [[0.5, 4.0, 0.0]])
    """

    def __init__(self, config: IndexConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.top = TopContexts(config.d_sae, config.n_top, config.window, device)
        self.sample = TopContexts(config.d_sae, config.n_sample, config.window, device)
        self.counts = CountAccumulator(config.d_sae, config.ctx_len, device)
        self.token_hash = torch.zeros(0, dtype=torch.int64, device=device)
        self.token_position = torch.zeros(0, dtype=torch.int64, device=device)
        self.token_active = torch.zeros(0, config.active, dtype=torch.int32, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._latent_hash = _mix(torch.arange(config.d_sae, device=device) + 1)

    def update(self, rows: TokenRows, latents: SparseLatents) -> None:
        """Add the active latents of some rows of text, which has none at special tokens."""
        self.counts.update(latents.latent, latents.act, latents.token % self.config.ctx_len, rows.mask)
        position = rows.first_row * self.config.ctx_len + torch.arange(rows.ids.numel(), device=rows.ids.device)
        hashes = _mix(_mix(position) + self.config.seed)
        self._sample_tokens(rows, latents, hashes)
        if len(latents.token):
            self._offer(self.top, rows, latents, *_strongest(latents, *rows.ids.shape, self.top.limit))
            order = _order(hashes[latents.token] ^ self._latent_hash[latents.latent])
            which = (order <= self.sample.limit[latents.latent]).nonzero()[:, 0]
            self._offer(self.sample, rows, latents, which, order[which])

    def _offer(
        self, contexts: TopContexts, rows: TokenRows, latents: SparseLatents, which: Tensor, order: Tensor
    ) -> None:
        for part, part_order in zip(which.split(CANDIDATES), order.split(CANDIDATES), strict=True):
            contexts.add(self._candidates(rows, latents, part, part_order, distinct=contexts is self.top))

    def _candidates(
        self, rows: TokenRows, latents: SparseLatents, which: Tensor, order: Tensor, *, distinct: bool
    ) -> Candidates:
        token, latent = latents.token[which], latents.latent[which]
        window, inside = rows.window(token, self.config.before, self.config.after)
        ids = torch.where(inside, rows.ids.flatten()[window], -1)
        position = token + rows.first_row * self.config.ctx_len
        return Candidates(
            latent.long(),
            order,
            position,
            _hash_content(ids) if distinct else position,
            latents.act[which],
            ids.to(torch.int32),
            torch.where(inside, latents.lookup(latent[:, None].expand_as(window), window), 0),
        )

    def _sample_tokens(self, rows: TokenRows, latents: SparseLatents, hashes: Tensor) -> None:
        """Record the active latents of tokens that may be among those with the smallest hashes."""
        order, mask = _order(hashes), rows.mask.flatten()
        if len(self.token_hash) >= self.config.coactive_tokens > 0:
            mask = mask & (order <= self.token_hash[-1])
        sampled = mask.nonzero()[:, 0]
        number = torch.full_like(hashes, -1).scatter_(0, sampled, torch.arange(len(sampled), device=sampled.device))
        which = (number[latents.token] >= 0).nonzero()[:, 0]
        if self.config.drops_active:
            which = which[latents.act[which].abs().argsort(descending=True, stable=True)]
            which = which[latents.token[which].argsort(stable=True)]
        token = number[latents.token[which]]
        n_active = torch.bincount(token, minlength=len(sampled))
        rank = torch.arange(len(token), device=token.device) - (n_active.cumsum(0) - n_active)[token]
        strongest = (rank < self.config.active).nonzero()[:, 0]
        active = self.token_active.new_full((len(sampled), self.config.active), -1)
        active[token[strongest], rank[strongest]] = latents.latent[which[strongest]].to(torch.int32)
        self._pending.append((order[sampled], rows.first_row * self.config.ctx_len + sampled, active))
        if sum(len(part[0]) for part in self._pending) >= PENDING_TOKENS:
            self._merge_tokens()

    def _merge_tokens(self) -> None:
        sample = (self.token_hash, self.token_position, self.token_active)
        hashes, position, active = (torch.cat(parts) for parts in zip(sample, *self._pending, strict=True))
        order = position.argsort(stable=True)
        order = order[hashes[order].argsort(stable=True)][: self.config.coactive_tokens]
        self.token_hash, self.token_position, self.token_active = hashes[order], position[order], active[order]
        self._pending = []

    def tensors(self) -> dict[str, Tensor]:
        """State by name."""
        self._merge_tokens()
        parts = {"top": self.top, "sample": self.sample, "counts": self.counts}
        named = {f"{part}.{k}": t for part, state in parts.items() for k, t in state.tensors().items()}
        names = ("token_hash", "token_position", "token_active")
        return named | {f"active.{name}": getattr(self, name) for name in names}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state given by `tensors`; copied."""
        self.top.restore(_part(tensors, "top"))
        self.sample.restore(_part(tensors, "sample"))
        self.counts.restore(_part(tensors, "counts"))
        for name, tensor in _part(tensors, "active").items():
            setattr(self, name, tensor.to(self.token_hash.device, copy=True))

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the state of another accumulator, over other rows of text; on any device."""
        device = self.token_hash.device
        tensors = {k: t if k == "counts.total" else t.to(device) for k, t in tensors.items()}
        self.top.merge(_part(tensors, "top"))
        self.sample.merge(_part(tensors, "sample"))
        self.counts.merge(_part(tensors, "counts"))
        active = _part(tensors, "active")
        self._pending.append((active["token_hash"], active["token_position"], active["token_active"]))
        self._merge_tokens()


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def _strongest(latents: SparseLatents, rows: int, ctx: int, limit: Int[Tensor, " d_sae"]) -> tuple[Tensor, Tensor]:
    """Select each latent's strongest activation in each row, if within `limit`; and its order."""
    order = _INFINITE - latents.act.abs().view(torch.int32).long()
    allowed = (order <= limit[latents.latent]).nonzero()[:, 0]
    cell = (latents.token[allowed] // ctx) * len(limit) + latents.latent[allowed]
    best = torch.full((rows * len(limit),), EMPTY << 31, dtype=torch.int64, device=order.device)
    best.scatter_reduce_(0, cell, order[allowed] << 31 | allowed, "amin")
    best = best[best != EMPTY << 31]
    return best & (2**31 - 1), best >> 31


def _hash_content(ids: Int[Tensor, "n window"]) -> Int[Tensor, " n"]:
    """Hash of the tokens of each window and where the row ends (-1)."""
    width = ids.shape[1]
    return _mix(_mix(ids * width + torch.arange(width, device=ids.device)).sum(1))


def _order(hashes: Tensor) -> Tensor:
    """Reduce hashes to 31 well mixed bits, below EMPTY."""
    return ((_mix(hashes) >> 32) & 0x7FFFFFFF).clamp_(max=EMPTY - 1)


def _mix(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Finalizer of SplitMix64, in wrapping int64: each bit of the result depends on all bits of `x`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


class Histograms:
    """Histogram of |activation| for each latent, in up to 64 bins whose width is a power of two.

    Bin b of latent i counts `b * 2**e_i <= |value| < (b + 1) * 2**e_i`, e_i the least exponent for which the largest
    value so far fits. For a larger value, pairs of bins are summed. As floor(floor(x) / 2) = floor(x / 2), the result
    equals that of all values at once. The narrowest bins are 2**-40 wide.

    Example:
        >>> one = Histograms(1); one.update(torch.tensor([0, 0, 0]), torch.tensor([1.0, 3.0, 63.0]))
        >>> one.exponent.tolist(), one.counts[0].nonzero()[:, 0].tolist()
        ([0], [1, 3, 63])
        >>> one.update(torch.tensor([0]), torch.tensor([64.0]))
        >>> one.exponent.tolist(), one.counts[0].nonzero()[:, 0].tolist()
        ([1], [0, 1, 31, 32])
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.exponent = torch.full((d_sae,), _SMALLEST, dtype=torch.int32, device=device)
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int64, device=device)

    def update(self, latent: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> None:
        """Add activations."""
        size = value.abs().float()
        exponent = torch.frexp(size).exponent - 6  # size < 2**frexp, and 64 bins are 2**6
        largest = self.exponent.clone().scatter_reduce_(0, latent, exponent.to(torch.int32), "amax")
        self._widen(largest)
        bins = torch.ldexp(size, -self.exponent[latent]).long().clamp_(max=N_BINS - 1)
        self.counts.view(-1).index_add_(0, latent * N_BINS + bins, torch.ones_like(bins))

    def merge(self, exponent: Tensor, counts: Tensor) -> None:
        """Add the counts of other histograms."""
        other = Histograms(0)
        other.exponent, other.counts = exponent.clone(), counts.clone()
        largest = torch.maximum(self.exponent, exponent)
        self._widen(largest)
        other._widen(largest)
        self.counts = self.counts + other.counts

    def _widen(self, exponent: Tensor) -> None:
        which = (exponent > self.exponent).nonzero()[:, 0]
        if len(which):
            shift = (exponent[which] - self.exponent[which]).clamp(max=6).long()
            bins = torch.arange(N_BINS, device=which.device) >> shift[:, None]
            self.counts[which] = torch.zeros_like(self.counts[which]).scatter_add_(1, bins, self.counts[which])
            self.exponent[which] = exponent[which]


class CountAccumulator:
    """Histogram, sum, and number of active tokens by position of each latent.

    Positions are counted in groups: 0, 1, 2-3, 4-7, 8-15, ... The same for any batches, except that the float64 sums
    depend on them by rounding.
    """

    def __init__(self, d_sae: int, ctx_len: int, device: torch.device | str = "cpu") -> None:
        self.histograms = Histograms(d_sae, device)
        self.total = torch.zeros(d_sae, dtype=widest_float(torch.device(device)), device=device)
        self.group = position_group(torch.arange(ctx_len, device=device))
        self.n_groups = int(self.group[-1]) + 1
        self.by_position = torch.zeros(d_sae, self.n_groups, dtype=torch.int64, device=device)
        self.n_by_position = torch.zeros(self.n_groups, dtype=torch.int64, device=device)

    def update(self, latent: Tensor, value: Tensor, position: Tensor, mask: Tensor) -> None:
        """Add activations at their positions in the row; `mask [rows, ctx]` is False at special tokens."""
        self.n_by_position.index_add_(0, self.group, mask.sum(0))
        if len(latent):
            self.histograms.update(latent, value)
            self.total.index_add_(0, latent, value.to(self.total.dtype))
            cell = latent * self.n_groups + self.group[position]
            self.by_position.view(-1).index_add_(0, cell, torch.ones_like(cell))

    def tensors(self) -> dict[str, Tensor]:
        """State by name."""
        return {
            "exponent": self.histograms.exponent,
            "counts": self.histograms.counts,
            "total": float64(self.total),
            "by_position": self.by_position,
            "n_by_position": self.n_by_position,
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state given by `tensors`; copied."""
        state = {k: t.to(self.total.device, copy=True) for k, t in tensors.items() if k != "total"}
        state["total"] = tensors["total"].to(self.total.device, self.total.dtype, copy=True)
        self.histograms.exponent, self.histograms.counts = state["exponent"], state["counts"]
        self.total, self.by_position, self.n_by_position = state["total"], state["by_position"], state["n_by_position"]

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the counts of another state."""
        self.histograms.merge(tensors["exponent"], tensors["counts"])
        self.total = self.total + tensors["total"].to(self.total)
        self.by_position = self.by_position + tensors["by_position"]
        self.n_by_position = self.n_by_position + tensors["n_by_position"]


def position_group(position: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Group of each position: 0 for 0, 1 for 1, 2 for 2-3, 3 for 4-7, ..."""
    return torch.frexp(position.float()).exponent.long()
