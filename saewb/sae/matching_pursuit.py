"""Matching pursuit: latents chosen one at a time, each from what those before it left unexplained.

1. r = normalize(x) - b_dec, and no latent is on.
2. i = argmax_i <r, W_dec[i]>, v = max(<r, W_dec[i]>, 0); latent i gains v, r loses v * W_dec[i].
3. Again from 2, until latent i was already on, or |r| is below `residual_threshold`, or `max_iterations` are done.

Encoder and decoder are one matrix, and step 2 looks at all latents, so this is not one feed-forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.kernels.topk import TILE
from saewb.sae.activation_functions import Latents, Tap, tapped
from saewb.sae.base import SparseCoder
from saewb.sae.config import OnePointConfig, Shape, TokenNormalization


@dataclass(frozen=True)
class PursuitConfig(OnePointConfig):
    """Configuration of a matching pursuit SAE. Wrong or unknown fields raise."""

    d_in: int
    """Width of what it reads and writes."""
    d_sae: int
    """Number of latents."""
    residual_threshold: float = 0.01
    """A token is done when its residual is shorter than this; 0 means never."""
    max_iterations: int | None = None
    """Latents chosen per token at most; None means d_in."""
    stop_on_duplicate: bool = True
    """A token is done when it would choose a latent that is already on."""
    pre_bias: Literal["none", "tied"] = "tied"
    """"none": b_dec is neither subtracted nor added."""
    normalization: TokenNormalization = "none"
    """Per token, undone on the output."""
    hook: str | None = None
    """The hook point it reads and writes."""
    head: int | None = None
    """Reads and writes this attention head only; None means all."""
    model: str | None = None
    """Name of the language model it was trained on."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Whatever else its file says, kept as read."""

    def __post_init__(self) -> None:
        self._replace(metadata=dict(self.metadata))
        self._check_counts("d_in", "d_sae")
        self._check_choice("pre_bias", Literal["none", "tied"])
        self._check_choice("normalization", TokenNormalization)
        self._check(self.residual_threshold >= 0, "residual_threshold", "a length, 0 or more")
        if self.max_iterations is not None:
            self._check_counts("max_iterations")

    def tensor_shapes(self) -> dict[str, Shape]:
        """The tensors of this configuration, by name, with their shapes."""
        return {"W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}


@final
class PursuitSAE(SparseCoder):
    """A matching pursuit sparse autoencoder: `W_dec [d_sae, d_in]`, `b_dec [d_in]`, and no encoder of its own.

    A new one has unit decoder rows in random directions and a zero bias. Rows should keep unit norm: the value v of a
    chosen latent is the length of the residual along its row only then.

    Args:
        cfg: what to build.
        seed: of the initial directions; the global random state is neither read nor changed.
        dtype: of the parameters.
        device: of the parameters.

    References:
        Costa et al. 2025, arXiv:2506.03093 (MP-SAE); Mallat and Zhang 1993.

    Example:
        >>> sae = PursuitSAE(PursuitConfig(d_in=8, d_sae=32, max_iterations=3))
        >>> x = torch.ones(2, 5, 8)
        >>> sae.encode(x).shape, sae(x).shape, int((sae.encode(x) != 0).sum(-1).max())
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 8]), 3)
    """

    taps = ("acts_post", "recons")

    def __init__(
        self,
        cfg: PursuitConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        rows = nn.functional.normalize(torch.randn(cfg.d_sae, cfg.d_in, generator=rng), dim=1)
        bias = torch.zeros(cfg.d_in, dtype=dtype, device=device)
        self._set_weights(cfg, {"W_dec": rows.to(device, dtype), "b_dec": bias})

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The decoder, transposed: what a residual is compared with."""
        return self.W_dec.T

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations by matching pursuit, in the units of the (normalized) input; 0 or more.

        Which latents are chosen has no gradient; their values have. Memory for the backward pass is one `d_in` vector
        per choice, never a `d_sae` one.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: only these: anything that may index the last axis. All are still searched, in row tiles of 64 MiB.
            tap: called with ("acts_post", latents); what it returns is used on.

        Returns:
            `[..., d_sae]`, or exactly `encode(x)[..., latents]`.

        Raises:
            ValueError: if the last axis of `x` is not d_in, or if `tap` is given together with `latents`.

        Example:
            >>> sae = PursuitSAE(PursuitConfig(d_in=4, d_sae=9))
            >>> x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
            >>> torch.equal(sae.encode(x, latents=[7, 2]), sae.encode(x)[:, [7, 2]])
            True
        """
        self._check_tap(latents, tap)
        h = self.normalize_input(x)
        rows = (h - self.b_dec if self.cfg.pre_bias == "tied" else h).reshape(-1, self.cfg.d_in)
        if latents is None:
            return tapped(tap, "acts_post", self._pursue(rows).reshape(*h.shape[:-1], self.cfg.d_sae))
        tiles = rows.split(max(1, TILE // self.cfg.d_sae))
        acts = torch.cat([self._pursue(tile)[:, latents] for tile in tiles])
        return acts.reshape(*h.shape[:-1], *acts.shape[1:])

    def decode(
        self,
        latents: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction in the model's units, `denormalize(latents @ W_dec + b_dec)`.

        Args:
            latents: `[..., d_sae]`.
            x: the input they came from; needed, and only used, with a normalization.
            tap: called with ("recons", latents @ W_dec + b_dec), before normalization is undone; what it returns is
                used on.

        Raises:
            TypeError: if `latents` is no tensor.
            ValueError: if its last axis is not d_sae; if `x` is needed and missing.
        """
        self._check_latents(latents, self.cfg.d_sae)
        recons = latents.to(self.dtype) @ self.W_dec
        recons = tapped(tap, "recons", recons + self.b_dec if self.cfg.pre_bias == "tied" else recons)
        return self.denormalize(recons, x)

    def fold_decoder_norm(self) -> PursuitSAE:
        """Refused: rows of another norm would be chosen in another order.

        Raises:
            ValueError: always.
        """
        raise ValueError(explain("decoder norms cannot be folded into a PursuitSAE.", want="an SAE with an encoder"))

    @torch.no_grad()
    def fold_scaling(self, factor: float) -> PursuitSAE:
        """A PursuitSAE that was trained on `factor * x`, made to read `x` itself.

            b_dec /= factor;  residual_threshold /= factor;  W_dec stays

        Unlike `SAE.fold_scaling` latents become smaller by `factor`: the pursuit is homogeneous, and the one matrix
        cannot be scaled up as encoder and down as decoder. A new object; this one is not changed.

        Raises:
            ValueError: if the factor is not positive, or if this SAE also rescales per token.
        """
        if not factor > 0 or self.cfg.normalization not in ("none", "centered"):
            raise ValueError(
                explain(
                    f"fold_scaling({factor}) on a PursuitSAE with normalization={self.cfg.normalization!r}.",
                    want="a positive factor, and normalization 'none' or 'centered'",
                )
            )
        cfg = replace(self.cfg, residual_threshold=self.cfg.residual_threshold / factor)
        return PursuitSAE.from_tensors(cfg, {"W_dec": self.W_dec.clone(), "b_dec": self.b_dec / factor})

    def _pursue(self, residual: Tensor) -> Tensor:
        # Tokens that are done leave `residual` and `token`, so later rounds cost only what is still moving. The choices
        # are collected and written once: writing each into [tokens, d_sae] would keep that tensor for every round.
        token = torch.arange(len(residual), device=residual.device)
        is_on = torch.zeros(len(residual), self.cfg.d_sae, dtype=torch.bool, device=residual.device)
        acts = residual.new_zeros(is_on.shape)
        choices: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.cfg.max_iterations or self.cfg.d_in):
            if not len(token):
                break
            latent = self._best(residual)
            rows = self.W_dec[latent]
            value = torch.relu((residual * rows).sum(-1))
            choices.append((token, latent, value))
            residual = residual - value[:, None] * rows
            moving = self._moving(residual.detach(), value.detach(), is_on[token, latent])
            is_on[token, latent] = True
            token, residual = token[moving], residual[moving]
        if not choices:
            return acts
        tokens, latents, values = (torch.cat(parts) for parts in zip(*choices, strict=True))
        return acts.index_put((tokens, latents), values, accumulate=True)

    @torch.no_grad()
    def _best(self, residual: Tensor) -> Tensor:
        tiles = residual.split(max(1, TILE // self.cfg.d_sae))
        return torch.cat([(tile @ self.W_dec.T).argmax(dim=1) for tile in tiles])

    def _moving(self, residual: Tensor, value: Tensor, again: Tensor) -> Tensor:
        moving = value != 0  # nothing left that points along any row: every further round would choose 0 again
        if self.cfg.stop_on_duplicate:
            moving = moving & ~again
        if self.cfg.residual_threshold > 0:
            moving = moving & (residual.norm(dim=-1) >= self.cfg.residual_threshold)
        return moving

    @property
    def _kind(self) -> str:
        return "matching pursuit"
