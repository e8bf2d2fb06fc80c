"""Sparse latents in coordinate format: token, latent and activation of each active latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from saewb.errors import explain
from saewb.kernels.pairs import ByLatent, starts_of

if TYPE_CHECKING:
    import scipy.sparse


class TopK(NamedTuple):
    """k activations per token, unsorted."""

    values: Float[Tensor, "tokens k"]
    """Activations; 0 where fewer than k are active."""
    indices: Int[Tensor, "tokens k"]
    """Latent of each value."""


class SparseLatents:
    """Active latents: a sparse matrix `[tokens, d_sae]` in coordinate format, sorted by token, then latent.

    Tokens are numbered over the flattened leading axes of `shape`. The result of a top-k activation is stored as
    `topk`, k values and k indices per token, and expanded to coordinates on first use. Immutable; gradients pass.

    Args:
        token: token of each active latent, ascending.
        latent: index of each active latent; ascending within a token, each once.
        act: activation of each active latent, not 0.
        shape: of the dense tensor, `(*batch, d_sae)`.

    Example:
        >>> acts = SparseLatents.from_dense(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 2.0]]))
        >>> acts, acts.token.tolist(), acts.latent.tolist(), acts.act.tolist()
        (SparseLatents([2, 3], 3 active), [0, 1, 1], [1, 0, 2], [3.0, 1.0, 2.0])
        >>> acts.lookup(torch.tensor([2, 1]), torch.tensor([1, 1])).tolist()
        [2.0, 0.0]
        >>> (acts @ torch.eye(3)).tolist() == acts.dense().tolist()
        True
    """

    topk: TopK | None = None
    """Values and indices of a top-k activation; None for other activations."""

    def __init__(
        self,
        token: Int[Tensor, " active"],
        latent: Int[Tensor, " active"],
        act: Float[Tensor, " active"],
        shape: tuple[int, ...],
    ) -> None:
        self.shape = tuple(shape)
        self._coordinates = (token, latent, act)  # shadows the cached property

    # -- constructors --------------------------------------------------------------------------------------------------

    @classmethod
    def from_topk(
        cls, values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], shape: Sequence[int]
    ) -> SparseLatents:
        """Active latents from k values and indices per token; values of 0 are inactive.

        Args:
            values: activations.
            indices: latent of each value; different latents within a token.
            shape: of the dense tensor, `(*batch, d_sae)`.
        """
        latents = cls.__new__(cls)
        latents.shape, latents.topk = tuple(shape), TopK(values, indices)
        return latents

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "*batch d_sae"]) -> SparseLatents:
        """Nonzero entries of a dense tensor."""
        rows = acts.reshape(-1, acts.shape[-1])
        token, latent = rows.nonzero(as_tuple=True)
        return cls(token, latent, rows[token, latent], tuple(acts.shape))

    @classmethod
    def cat(cls, parts: Sequence[SparseLatents]) -> SparseLatents:
        """Concatenate the tokens of all parts, as `[tokens, d_sae]`.

        Raises:
            ValueError: if there is no part, or if parts differ in d_sae.
        """
        widths = sorted({part.d_sae for part in parts})
        if len(widths) != 1:
            raise ValueError(explain(f"SparseLatents.cat got parts with d_sae of {widths}.", want="parts of one d_sae"))
        shape = (sum(part.n_tokens for part in parts), widths[0])
        if all(part.topk is not None for part in parts) and len({part.topk.values.shape[1] for part in parts}) == 1:
            return cls.from_topk(*(torch.cat(of) for of in zip(*(part.topk for part in parts), strict=True)), shape)
        token, latent, act, start = [], [], [], 0
        for part in parts:
            token.append(part.token + start)
            latent.append(part.latent)
            act.append(part.act)
            start += part.n_tokens
        return cls(torch.cat(token), torch.cat(latent), torch.cat(act), shape)

    # -- coordinates ---------------------------------------------------------------------------------------------------

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        latents, order = self.topk.indices.sort(1)
        values = self.topk.values.gather(1, order)
        token, rank = values.nonzero(as_tuple=True)
        return token, latents[token, rank], values[token, rank]

    @property
    def token(self) -> Int[Tensor, " active"]:
        """The token of each active latent, ascending."""
        return self._coordinates[0]

    @property
    def latent(self) -> Int[Tensor, " active"]:
        """The index of each active latent, ascending within a token."""
        return self._coordinates[1]

    @property
    def act(self) -> Float[Tensor, " active"]:
        """The activation of each active latent, not 0."""
        return self._coordinates[2]

    @cached_property
    def starts(self) -> Int[Tensor, " tokens"]:
        """Position of each token's first active latent."""
        return starts_of(self.token, self.n_tokens)

    @cached_property
    def _by_latent(self) -> ByLatent:
        latent, order = torch.sort(self.latent, stable=True)
        return ByLatent(order, self.token.index_select(0, order), starts_of(latent, self.d_sae))

    def by_latent(self) -> ByLatent:
        """Sort by latent, then token: order, tokens in it, and position of each latent's first token. Cached."""
        return self._by_latent

    @property
    def d_sae(self) -> int:
        """Number of latents, active or not."""
        return self.shape[-1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, with or without active latents."""
        return math.prod(self.shape[:-1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.topk.values.dtype if self.topk is not None else self.act.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.topk.values.device if self.topk is not None else self.act.device

    def __len__(self) -> int:
        """Number of active latents, over all tokens."""
        return len(self.token)

    # -- conversions ---------------------------------------------------------------------------------------------------

    def dense(self) -> Float[Tensor, "*batch d_sae"]:
        """Dense tensor `[*batch, d_sae]`, with zeros."""
        zeros = torch.zeros(self.n_tokens, self.d_sae, dtype=self.dtype, device=self.device)
        if self.topk is not None:
            return zeros.scatter_(1, self.topk.indices, self.topk.values).view(self.shape)
        return zeros.index_put_((self.token, self.latent), self.act).view(self.shape)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """Convert to a `scipy.sparse.csr_array` `[tokens, d_sae]` on the CPU; bf16 and float16 become float32."""
        import scipy.sparse

        act = self.act.detach().cpu()
        act = act.float() if act.dtype in (torch.bfloat16, torch.float16) else act
        pointers = torch.cat([self.starts, self.starts.new_tensor([len(self)])]).cpu().numpy()
        return scipy.sparse.csr_array(
            (act.numpy(), self.latent.cpu().numpy(), pointers), shape=(self.n_tokens, self.d_sae)
        )

    def to(self, target: torch.device | str | torch.dtype) -> SparseLatents:
        """Move to another device, or cast the activations to another dtype."""
        if target == self.dtype:
            return self
        index = None if isinstance(target, torch.dtype) else target
        if self.topk is not None:
            return SparseLatents.from_topk(self.topk.values.to(target), self.topk.indices.to(index), self.shape)
        return SparseLatents(self.token.to(index), self.latent.to(index), self.act.to(target), self.shape)

    def view(self, *batch: int) -> SparseLatents:
        """Reshape the leading axes.

        Raises:
            ValueError: if their sizes do not multiply to the number of tokens.
        """
        if math.prod(batch) != self.n_tokens:
            raise ValueError(explain(f"{self!r}.view{batch}.", want=f"axes of {self.n_tokens:,} tokens"))
        shape = (*batch, self.d_sae)
        if self.topk is not None:
            return SparseLatents.from_topk(*self.topk, shape)
        return SparseLatents(*self._coordinates, shape)

    def select(
        self,
        tokens: Int[Tensor, " some"] | Bool[Tensor, " tokens"] | None = None,
        latents: Int[Tensor, " some"] | Bool[Tensor, " d_sae"] | None = None,
    ) -> SparseLatents:
        """Select and renumber tokens and latents: `dense().flatten(0, -2)[tokens][:, latents]`.

        Args:
            tokens: indices, which may repeat, or a mask; None means all.
            latents: indices, each once, or a mask; None means all.

        Returns:
            Of shape `(len(tokens), len(latents))`.
        """
        part = self if tokens is None else self._select_tokens(_indices(tokens))
        return part.view(part.n_tokens) if latents is None else part._select_latents(_indices(latents))

    def _select_tokens(self, tokens: Tensor) -> SparseLatents:
        shape = (len(tokens), self.d_sae)
        if self.topk is not None:
            return SparseLatents.from_topk(self.topk.values[tokens], self.topk.indices[tokens], shape)
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self)])])
        starts, counts = self.starts[tokens], (ends - self.starts)[tokens]
        token = torch.arange(len(tokens), device=self.device).repeat_interleave(counts)
        rank = torch.arange(len(token), device=self.device) - (counts.cumsum(0) - counts)[token]
        index = starts[token] + rank
        return SparseLatents(token, self.latent[index], self.act[index], shape)

    def _select_latents(self, latents: Tensor) -> SparseLatents:
        number = torch.full((self.d_sae,), -1, dtype=torch.long, device=self.device)
        number[latents] = torch.arange(len(latents), device=self.device)
        latent = number[self.latent]
        index = (latent >= 0).nonzero()[:, 0]
        token, latent = self.token[index], latent[index]
        order = (token * len(latents) + latent).argsort()
        return SparseLatents(token[order], latent[order], self.act[index[order]], (self.n_tokens, len(latents)))

    def lookup(self, latent: Int[Tensor, "*#any"], token: Int[Tensor, "*#any"]) -> Float[Tensor, "*#any"]:
        """Look up activations, 0 where inactive: `dense().flatten(0, -2)[token, latent]`.

        Args:
            latent: indices.
            token: indices that broadcast with them.
        """
        keys = self.token * self.d_sae + self.latent  # ascending
        key = torch.as_tensor(token * self.d_sae + latent)
        if not len(keys):
            return torch.zeros(key.shape, dtype=self.dtype, device=self.device)
        index = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        return torch.where(keys[index] == key, self.act[index], 0)

    def __matmul__(self, matrix: Float[Tensor, "d_sae d"]) -> Float[Tensor, "*batch d"]:
        """`dense() @ matrix`, in time and memory proportional to the active latents."""
        if self.topk is not None:
            rows = embedding_bag(self.topk.indices, matrix, per_sample_weights=self.topk.values, mode="sum")
        elif len(self):
            rows = embedding_bag(self.latent, matrix, self.starts, per_sample_weights=self.act, mode="sum")
        else:
            rows = matrix.new_zeros(self.n_tokens, matrix.shape[1])
        return rows.view(*self.shape[:-1], matrix.shape[1])

    def __repr__(self) -> str:
        active = f"top {self.topk.values.shape[1]}" if self.topk is not None else f"{len(self):,} active"
        return f"SparseLatents({list(self.shape)}, {active})"


def _indices(selection: Tensor) -> Tensor:
    return selection.nonzero()[:, 0] if selection.dtype == torch.bool else selection
