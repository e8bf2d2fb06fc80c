"""Correlation of latents from what fires on a sample of tokens: any block of it, in memory of what fires.

1. Firings are kept twice: token by token, and latent by latent.
2. For some rows and columns, each firing of a row's latent meets the columns' latents that fire on its token.
3. Their products are added up; means and spreads, known for each latent, make a correlation of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.stats._entries import Entries, diagonal

_PAIRS = 2**20  # added at a time, about 50 bytes each
_MEANS = 2**24  # numbers of [tokens, blocks] held at a time


@dataclass(frozen=True, eq=False)
class Ragged:
    """Lists of different lengths, one after another."""

    starts: Int[Tensor, " lists_and_1"]
    item: Int[Tensor, " items"]
    value: Float[Tensor, " items"]  # float64

    @classmethod
    def of(cls, of_list: Tensor, item: Tensor, value: Tensor, n_lists: int) -> Ragged:
        """From (list, item, value) in any order."""
        order = of_list.argsort(stable=True)
        ends = torch.bincount(of_list, minlength=n_lists).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        return cls(starts, item[order], value[order])

    def chosen(self, lists: Int[Tensor, " some"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of some lists: the place in `lists`, item and value of each entry."""
        at, place = expand(self.starts[lists], self.starts[lists + 1] - self.starts[lists])
        return at, self.item[place], self.value[place]


def expand(starts: Int[Tensor, " runs"], lengths: Int[Tensor, " runs"]) -> tuple[Tensor, Tensor]:
    """All places of runs `starts .. starts + lengths`, and which run each is of.

    Example:
        >>> expand(torch.tensor([5, 9]), torch.tensor([2, 1]))
        (tensor([0, 0, 1]), tensor([5, 6, 9]))
    """
    run = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return run, torch.arange(len(run), device=lengths.device) - before[run] + starts[run]


@final
@dataclass(frozen=True, eq=False)
class Fired(Entries):
    """Correlation over tokens: of activations, or, where all values are 1, of firing (phi)."""

    by_latent: Ragged  # tokens, and values, of each latent
    by_token: Ragged  # latents, and values, of each token
    mean: Float[Tensor, " n"]  # of each latent over all tokens, float64
    spread: Float[Tensor, " n"]  # standard deviation over all tokens, float64; nan where there is too little to go by
    what: str
    same: bool = True

    @classmethod
    def of(
        cls, token: Tensor, latent: Tensor, value: Tensor, n_tokens: int, d_sae: int, what: str, least: int
    ) -> Fired:
        """From what fires, each (token, latent) once; latents that fire on fewer than `least` tokens are undefined."""
        value = value.double() if what == "correlation" else torch.ones_like(value, dtype=torch.float64)
        total, square = (value.new_zeros(d_sae).index_add_(0, latent, v) for v in (value, value.square()))
        mean = total / n_tokens
        variance = (square / n_tokens - mean.square()).clamp(min=0)
        fires = torch.bincount(latent, minlength=d_sae)
        known = (fires >= max(1, least)) & (variance > 1e-12 * (square / n_tokens))
        spread = torch.where(known, variance.sqrt(), torch.nan)
        by_token = Ragged.of(token, latent, value, n_tokens)
        return cls(Ragged.of(latent, token, value, d_sae), by_token, mean, spread, what)

    @property
    def shape(self) -> tuple[int, int]:
        """Latents, twice."""
        return len(self.mean), len(self.mean)

    @property
    def device(self) -> torch.device:
        """Of the firings."""
        return self.mean.device

    @property
    def n_tokens(self) -> int:
        """Tokens looked at."""
        return len(self.by_token.starts) - 1

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries. Takes 10 bytes per entry, and 50 MB."""
        found = self._products(rows, cols).div_(self.n_tokens)
        found -= self.mean[rows][:, None] * self.mean[cols]
        found /= self.spread[rows][:, None]
        found /= self.spread[cols]
        return found.float()

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries."""
        scale = self.spread.reciprocal().nan_to_num(0)[:, None]
        y = x.double() * scale
        seen = self._gathered(self.by_token, y)
        back = self._gathered(self.by_latent, seen) / self.n_tokens - self.mean[:, None] * (self.mean @ y)
        return (back * scale).to(x.dtype)

    def cost(self, n_rows: int, n_cols: int) -> float:
        """See Entries. As if all latents fired equally often; about 200 for a pair that fires."""
        n, pairs = len(self.mean), float(len(self.by_token.item)) ** 2 / max(1, self.n_tokens)
        return float(n_rows) * n_cols * (32 + 200 * pairs / n**2) + 10 * len(self.by_token.item) * min(1, n_cols / n)

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "blocks_r blocks_c"]:
        """sum_ij r_ij = sum_t (sum_i z_ti) (sum_j z_tj) / N, where z is standardised; less the diagonal."""
        n_r, n_c = -(-len(rows) // step), -(-len(cols) // step)
        in_row, in_col = self._block_of(rows, step), self._block_of(cols, step)
        known, away = (~self.spread.isnan()).double(), (self.mean / self.spread).nan_to_num(0)
        total = self._met(in_row, in_col, n_r, n_c) / self.n_tokens
        total -= _by_block(away, in_row, n_r)[:, None] * _by_block(away, in_col, n_c)
        count = _by_block(known, in_row, n_r)[:, None] * _by_block(known, in_col, n_c)
        here, there = diagonal(rows, cols, len(self.mean))
        own = known[rows[here]]  # the entry of a feature with itself is 1
        for table in (total, count):
            table.view(-1).index_add_(0, (here // step) * n_c + there // step, -own)
        return torch.where(count > 0, total / count, torch.nan).float()

    def means_cost(self, n_rows: int, n_cols: int, step: int) -> float:
        """See Entries."""
        n_r, n_c = -(-n_rows // step), -(-n_cols // step)
        return float(self.n_tokens) * (n_r * n_c + 8 * (n_r + n_c)) + 100 * len(self.by_token.item)

    def fires(self) -> Int[Tensor, " n"]:
        """See Entries."""
        return self.by_latent.starts.diff()

    def together(self, i: int, j: int) -> tuple[int, int]:
        """See Entries."""
        place = torch.tensor([i, j], device=self.device)
        of, token, _ = self.by_latent.chosen(place)
        if i == j:
            return int((of == 0).sum()), self.n_tokens
        return int(torch.isin(token[of == 0], token[of == 1]).sum()), self.n_tokens

    # -- parts -------------------------------------------------------------------------------------------------------

    def _products(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Sums over tokens of products of activations."""
        out = self.mean.new_zeros(len(rows) * len(cols))
        row, token, value = self.by_latent.chosen(rows)
        met = self._restricted(cols)
        each = met.starts[token + 1] - met.starts[token]
        ends = each.cumsum(0)
        for part in _runs(ends, _PAIRS):
            run, place = expand(met.starts[token[part]], each[part])
            at = row[part][run] * len(cols) + met.item[place]
            out.index_add_(0, at, value[part][run] * met.value[place])
        return out.view(len(rows), len(cols))

    def _restricted(self, cols: Tensor) -> Ragged:
        """Of each token, the columns that fire."""
        if 2 * len(cols) < len(self.mean):
            col, token, value = self.by_latent.chosen(cols)
            return Ragged.of(token, col, value, self.n_tokens)
        place = torch.full((len(self.mean),), -1, device=self.device)
        place[cols] = torch.arange(len(cols), device=self.device)
        col = place[self.by_token.item]
        kept = col >= 0
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        return Ragged(before[self.by_token.starts], col[kept], self.by_token.value[kept])

    def _gathered(self, lists: Ragged, x: Tensor) -> Tensor:
        """Per list, the sum over its items of value * x[item]."""
        out = x.new_zeros(len(lists.starts) - 1, x.shape[1])
        of = torch.arange(len(out), device=x.device).repeat_interleave(lists.starts.diff())
        for part in torch.arange(len(of), device=x.device).split(max(1, 2**23 // x.shape[1])):
            out.index_add_(0, of[part], x[lists.item[part]] * lists.value[part][:, None])
        return out

    def _block_of(self, chosen: Tensor, step: int) -> Tensor:
        """Which block each latent is in, -1 for none."""
        block = torch.full((len(self.mean),), -1, device=self.device)
        block[chosen] = torch.arange(len(chosen), device=self.device) // step
        return block

    def _met(self, in_row: Tensor, in_col: Tensor, n_r: int, n_c: int) -> Float[Tensor, "blocks_r blocks_c"]:
        """Sums over tokens of products of blocks' activations, in units of their spread."""
        total = self.mean.new_zeros(n_r, n_c)
        at = max(1, _MEANS // max(n_r, n_c))
        for first in range(0, self.n_tokens, at):
            last = min(self.n_tokens, first + at)
            a = self._in_blocks(first, last, in_row, n_r)
            total += (a.T @ (a if in_col is in_row else self._in_blocks(first, last, in_col, n_c))).double()
        return total

    def _in_blocks(self, first: int, last: int, block: Tensor, n: int) -> Float[Tensor, "tokens blocks"]:
        """Of some tokens, sums over blocks of activations in units of their spread."""
        begin, end = int(self.by_token.starts[first]), int(self.by_token.starts[last])
        item, value = self.by_token.item[begin:end], self.by_token.value[begin:end]
        each = self.by_token.starts[first : last + 1].diff()
        token = torch.arange(last - first, device=self.device).repeat_interleave(each)
        scaled = (value / self.spread[item]).nan_to_num(0).float()
        kept = block[item] >= 0
        out = torch.zeros((last - first) * n, device=self.device)
        return out.index_add_(0, (token * n + block[item])[kept], scaled[kept]).view(last - first, n)


def _by_block(x: Float[Tensor, " n"], block: Int[Tensor, " n"], n: int) -> Float[Tensor, " blocks"]:
    """Sums over the members of each block; -1 is none."""
    inside = block >= 0
    return x.new_zeros(n).index_add_(0, block[inside], x[inside])


def _runs(ends: Tensor, most: int) -> list[slice]:
    """Slices whose lengths, of which `ends` are the running sums, add up to about `most`."""
    total = int(ends[-1]) if len(ends) else 0
    limits = most * torch.arange(1, 1 + total // most, device=ends.device)
    edges = [0, *sorted(set(torch.searchsorted(ends, limits).tolist()) - {0}), len(ends)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
