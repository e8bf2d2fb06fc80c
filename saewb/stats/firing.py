"""Firing statistics of latents from a stream of batches: density, activation size, and number of texts.

A latent is active where it is not 0, whatever its sign. Sums are kept in float64, counts as integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.metrics import check_not_empty, check_size, float64
from saewb.sae.sparse import SparseLatents

DEAD_BELOW = 1e-6  # of tokens; on fewer than a million tokens: latents that never fired
DENSE_ABOVE = 0.1  # of tokens
ULTRA_LOW_BELOW = 1e-5  # of tokens


@dataclass(frozen=True, eq=False)
class Firing:
    """Firing statistics of latents: how often and how strongly each was active."""

    n_tokens: int
    """Number of tokens."""
    l0: float
    """Active latents per token."""
    l1: float
    """Sum of |activations| per token, in the unit of latents."""
    density: Float[Tensor, " d_sae"] = field(repr=False)
    """Fraction of tokens on which each latent is active."""
    mean_activation: Float[Tensor, " d_sae"] = field(repr=False)
    """Mean |activation| of each latent where it is active; nan if never."""
    max_activation: Float[Tensor, " d_sae"] = field(repr=False)
    """Largest |activation| of each latent; 0 if never active."""
    consistent_activation: Float[Tensor, " d_sae"] = field(repr=False)
    """Active tokens per row of text in which the latent is active at all; nan if never. 1: single tokens."""
    dead_frac: float
    """Fraction of latents whose density is below `dead_below`."""
    ultra_low_frac: float
    """Fraction of latents that are not dead and whose density is below `ultra_low_below`."""
    dense_frac: float
    """Fraction of latents whose density is above `dense_above`."""

    @property
    def alive_frac(self) -> float:
        """Fraction of latents that are not dead."""
        return 1 - self.dead_frac


class FiringStream:
    """Accumulator of `Firing` over batches of tokens: equal, to float64 rounding, to one batch of all tokens.

    Keeps four numbers per latent, on the device of the first batch, and never waits for the device before `result`. A
    row of text that is split between batches counts as two.

    Example:
        >>> stream = FiringStream()
        >>> stream.update(torch.tensor([[0.0, 2.0, -1.0]])); stream.update(torch.tensor([[0.0, 0.0, 3.0]]))
        >>> stream.result().l0, stream.result().density.tolist(), stream.result().max_activation.tolist()
        (1.5, [0.0, 0.5, 1.0], [0.0, 2.0, 3.0])
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._counts: Int[Tensor, " d_sae"] | None = None
        self._rows: Int[Tensor, " d_sae"] | None = None  # rows of text in which each latent fired
        self._sums: Float[Tensor, " d_sae"] | None = None
        self._max: Float[Tensor, " d_sae"] | None = None

    def update(
        self, latents: Float[Tensor, "tokens d_sae"] | SparseLatents, lengths: Sequence[int] | None = None
    ) -> None:
        """Add a batch of tokens, which may be empty.

        Args:
            latents: activations, dense or sparse.
            lengths: consecutive tokens in each row of text; None: all tokens are one row.

        Raises:
            ValueError: if there are more or fewer latents than in earlier batches; if lengths do not sum to the tokens.
        """
        n = latents.n_tokens if isinstance(latents, SparseLatents) else len(latents)
        lengths = [n] if lengths is None else [length for length in lengths if length]
        if sum(lengths) != n:
            raise ValueError(explain(f"lengths sum to {sum(lengths)}.", want=f"{n}, the number of tokens"))
        if n:
            self._add(n, *(_sum_sparse if isinstance(latents, SparseLatents) else _sum_dense)(latents, lengths))

    def merge(self, other: FiringStream) -> None:
        """Add the tokens of `other`, which is not changed."""
        if other.n_tokens:
            self._add(other.n_tokens, other._counts, other._rows, other._sums, other._max)

    def state(self) -> dict[str, Tensor]:
        """The sums so far, by name; empty before the first token."""
        if self._counts is None:
            return {}
        sums = {"counts": self._counts, "rows": self._rows, "sums": self._sums, "max": self._max}
        return {"n_tokens": torch.tensor(self.n_tokens), **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> FiringStream:
        """The stream with that `state()`."""
        stream = cls()
        if state:
            stream._add(int(state["n_tokens"]), *(state[name] for name in ("counts", "rows", "sums", "max")))
        return stream

    def result(
        self,
        dead_below: float = DEAD_BELOW,
        dense_above: float = DENSE_ABOVE,
        ultra_low_below: float = ULTRA_LOW_BELOW,
    ) -> Firing:
        """Statistics of all tokens so far.

        Args:
            dead_below: a latent is dead if it fires on fewer than this fraction of tokens.
            dense_above: a latent is dense if it fires on more than this fraction of tokens.
            ultra_low_below: a latent is of ultra-low density if it is not dead and fires on fewer than this fraction.

        Raises:
            ValueError: if there were no tokens.
        """
        check_not_empty(self.n_tokens)
        counts = float64(self._counts)
        rate = counts / self.n_tokens
        dead, dense = rate < dead_below, rate > dense_above
        rare = ~dead & (rate < ultra_low_below)
        return Firing(
            n_tokens=self.n_tokens,
            l0=int(self._counts.sum()) / self.n_tokens,
            l1=float(self._sums.sum()) / self.n_tokens,
            density=rate,
            mean_activation=self._sums / counts,
            max_activation=self._max,
            consistent_activation=counts / float64(self._rows),
            dead_frac=float(float64(dead).mean()),
            ultra_low_frac=float(float64(rare).mean()),
            dense_frac=float(float64(dense).mean()),
        )

    def _add(self, n: int, counts: Tensor, rows: Tensor, sums: Tensor, largest: Tensor) -> None:
        if self._counts is None:
            self.n_tokens, self._counts, self._rows, self._sums, self._max = n, counts, rows, sums, largest
            return
        check_size("d_sae", len(counts), len(self._counts))
        device = self._counts.device
        self.n_tokens += n
        self._counts = self._counts + counts.to(device)
        self._rows = self._rows + rows.to(device)
        self._sums = self._sums + sums.to(self._sums.device)
        self._max = torch.maximum(self._max, largest.to(self._max.device))


def _sum_dense(latents: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per latent: active tokens, rows with an active token, sum and maximum of |activations|."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    parts = []
    for row in latents.split(lengths):  # one row at a time stays in the processor's cache: eight times as fast
        size = row.abs()
        largest, total = size.amax(0), size.sum(0, dtype=wide)
        active = size.sign_().nan_to_num_(1.0).sum(0, dtype=wide)
        parts.append((active, active != 0, float64(total), float64(largest)))
    counts, in_rows, totals, largest = (torch.stack(figures) for figures in zip(*parts, strict=True))
    return counts.sum(0).long(), in_rows.sum(0), totals.sum(0), largest.amax(0)


def _sum_sparse(latents: SparseLatents, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same sums, in time and memory of the active latents only."""
    d_sae, rows = latents.d_sae, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(latents.device)
    if latents.topk is None:
        values, indices, row = latents.act, latents.latent, rows[latents.token]
    else:  # unsorted: no sum depends on the order
        values, indices = (tensor.flatten() for tensor in latents.topk)
        row = rows.repeat_interleave(latents.topk.values.shape[1])
    values = float64(values.abs())
    indices, row = indices.to(values.device), row.to(values.device)
    active, none = (values != 0).long(), values.new_zeros(d_sae)
    once = (row * d_sae + indices)[active.bool()].unique() % d_sae  # each (row, latent) once
    return (
        torch.zeros_like(none, dtype=torch.long).index_add(0, indices, active),
        torch.bincount(once, minlength=d_sae),
        none.index_add(0, indices, values),
        none.scatter_reduce(0, indices, values, "amax"),
    )
