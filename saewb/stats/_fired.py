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
_MEANS = 2**23  # numbers of [tokens, blocks] held at a time


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

    def matrix(self, n_items: int, like: Tensor) -> Tensor:
        """`[lists, n_items]`, sparse."""
        of = torch.arange(len(self.starts) - 1, device=self.item.device).repeat_interleave(self.starts.diff())
        places, shape = torch.stack([of, self.item]), (len(self.starts) - 1, n_items)
        return torch.sparse_coo_tensor(
            places, self.value.to(like.dtype), shape, is_coalesced=True, check_invariants=False
        )

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
    """Correlation over tokens: of activations, or, where all values are 1, of firing (phi).

    r_ij = sum_t z_ti z_tj / N - away_i away_j,    z = activation / its standard deviation,    away = mean of z
    """

    by_latent: Ragged  # tokens, and z / N, of each latent
    by_token: Ragged  # latents, and z, of each token
    away: Float[Tensor, " n"]  # float64; nan where there is too little to go by, and z is 0 there
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
        scale = torch.where(known, variance.rsqrt(), 0)
        z = value * scale[latent]
        by_latent = Ragged.of(latent, token, z / n_tokens, d_sae)
        return cls(by_latent, Ragged.of(token, latent, z, n_tokens), torch.where(known, mean * scale, torch.nan), what)

    @property
    def shape(self) -> tuple[int, int]:
        """Latents, twice."""
        return len(self.away), len(self.away)

    @property
    def device(self) -> torch.device:
        """Of the firings."""
        return self.away.device

    @property
    def n_tokens(self) -> int:
        """Tokens looked at."""
        return len(self.by_token.starts) - 1

    def tile(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> Float[Tensor, "rows cols"]:
        """See Entries. Takes 12 bytes per entry, and 100 MB."""
        return self._products(rows, cols).addr_(self.away[rows], self.away[cols], alpha=-1).float()

    def times(self, x: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """See Entries. Sums in float32."""
        away = self.away.nan_to_num(0).to(x.dtype)
        back = self.by_latent.matrix(self.n_tokens, x) @ (self.by_token.matrix(len(away), x) @ x)
        return back - away[:, None] * (away @ x)

    def cost(self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"]) -> float:
        """See Entries. As if latents fired independently of one another."""
        fires = self.fires().double()
        a, b = fires[rows].sum(), fires[cols].sum()
        setting_up = 20 * b if 2 * len(cols) < len(fires) else 0
        return float(16 * len(rows) * len(cols) + 400 * a * b / max(1, self.n_tokens) + setting_up)

    def means(
        self, rows: Int[Tensor, " rows"], cols: Int[Tensor, " cols"], step: int
    ) -> Float[Tensor, "blocks_r blocks_c"]:
        """Sums of entries without making one, less the diagonal.

            sum_ij r_ij = sum_t (sum_i z_ti - s_i) (sum_j z_tj - s_j) / N - sum_ij (away_i - s_i) (away_j - s_j)

        for any s: products are summed in float32, so s is `away` for latents that mostly fire, of whose z that is the
        most, and 0 for others, whose zeros stay zeros.
        """
        n_r, n_c = -(-len(rows) // step), -(-len(cols) // step)
        in_row, in_col = self._block_of(rows, step), self._block_of(cols, step)
        known, away = (~self.away.isnan()).double(), self.away.nan_to_num(0)
        off = torch.where(2 * self.fires() > self.n_tokens, away, 0)
        off_r, off_c = _by_block(off, in_row, n_r), _by_block(off, in_col, n_c)
        total = self._met(in_row, in_col, off_r, off_c) / self.n_tokens
        total -= (_by_block(away, in_row, n_r) - off_r)[:, None] * (_by_block(away, in_col, n_c) - off_c)
        count = _by_block(known, in_row, n_r)[:, None] * _by_block(known, in_col, n_c)
        here, there = diagonal(rows, cols, len(self.away))
        own = known[rows[here]]  # the entry of a feature with itself is 1
        for table in (total, count):
            table.view(-1).index_add_(0, (here // step) * n_c + there // step, -own)
        return torch.where(count > 0, total / count, torch.nan).float()

    def means_cost(self, n_rows: int, n_cols: int, step: int) -> float:
        """See Entries."""
        n_r, n_c = -(-n_rows // step), -(-n_cols // step)
        return float(self.n_tokens) * (n_r * n_c + 8 * (n_r + n_c)) + 200 * len(self.by_token.item)

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

    def _products(self, rows: Tensor, cols: Tensor) -> Float[Tensor, "rows cols"]:
        """sum_t z_ti z_tj / N, float64."""
        row, token, value = self.by_latent.chosen(rows)
        met, column = self._columns(cols)
        out = self.away.new_zeros(len(rows) * len(cols))
        each = met.starts[token + 1] - met.starts[token]
        for part in _runs(each.cumsum(0), _PAIRS):
            run, place = expand(met.starts[token[part]], each[part])
            col = met.item[place] if column is None else column[met.item[place]]
            found = value[part][run] * met.value[place]
            if column is not None:
                found = torch.where(col >= 0, found, 0)
            out.index_add_(0, row[part][run] * len(cols) + col.clamp_(min=0), found)
        return out.view(len(rows), len(cols))

    def _columns(self, cols: Tensor) -> tuple[Ragged, Tensor | None]:
        """Of each token, the columns that fire; or, if there are many, all latents, and the column of each or -1."""
        if 2 * len(cols) < len(self.away):
            col, token, value = self.by_latent.chosen(cols)
            return Ragged.of(token, col, value * self.n_tokens, self.n_tokens), None
        column = torch.full((len(self.away),), -1, device=self.device)
        column[cols] = torch.arange(len(cols), device=self.device)
        return self.by_token, column

    def _block_of(self, chosen: Tensor, step: int) -> Tensor:
        """Which block each latent is in, -1 for none."""
        block = torch.full((len(self.away),), -1, device=self.device)
        block[chosen] = torch.arange(len(chosen), device=self.device) // step
        return block

    def _met(
        self, in_row: Tensor, in_col: Tensor, off_r: Float[Tensor, " blocks_r"], off_c: Float[Tensor, " blocks_c"]
    ) -> Float[Tensor, "blocks_r blocks_c"]:
        """Sums over tokens of products of blocks' activations, in units of their spread, less `off`."""
        total = self.away.new_zeros(len(off_r), len(off_c))
        at = max(1, _MEANS // max(total.shape))
        for first in range(0, self.n_tokens, at):
            last = min(self.n_tokens, first + at)
            a = self._in_blocks(first, last, in_row, off_r)
            total += (a.T @ (a if in_col is in_row else self._in_blocks(first, last, in_col, off_c))).double()
        return total

    def _in_blocks(
        self, first: int, last: int, block: Tensor, off: Float[Tensor, " blocks"]
    ) -> Float[Tensor, "tokens blocks"]:
        """Of some tokens, sums of z over blocks, less `off`."""
        n = len(off)
        starts = self.by_token.starts[first : last + 1]
        begin, end = int(starts[0]), int(starts[-1])
        token = torch.arange(last - first, device=self.device).repeat_interleave(starts.diff())
        of = block[self.by_token.item[begin:end]]
        place = torch.where(of >= 0, token * n + of, (last - first) * n)  # one place more, for those in no block
        out = self.away.new_zeros((last - first) * n + 1).index_add_(0, place, self.by_token.value[begin:end])
        return out[:-1].view(last - first, n).sub_(off).float()


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
