"""Matching pursuit SAEs: latents chosen one at a time by their dot product with the residual.

1. r = normalize(x) - b_dec, and no latent is active.
2. i = argmax_i <r, W_dec[i]>, v = max(<r, W_dec[i]>, 0); z_i += v, r -= v * W_dec[i].
3. Repeat step 2 until latent i was already active, or |r| < `residual_threshold`, or after `max_iterations`.

Encoder and decoder share one matrix, and step 2 compares all latents, so this is not one feed-forward pass.
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
    """Configuration of a matching pursuit SAE. Invalid or unknown fields raise."""

    d_in: int
    """Width of the input and the output."""
    d_sae: int
    """Number of latents."""
    residual_threshold: float = 0.01
    """Residual norm below which a token is finished; 0: no threshold."""
    max_iterations: int | None = None
    """Largest number of choices per token; None means d_in."""
    stop_on_duplicate: bool = True
    """Whether a token is finished when it chooses an active latent again."""
    pre_bias: Literal["none", "tied"] = "tied"
    """"none": b_dec is neither subtracted nor added."""
    normalization: TokenNormalization = "none"
    """Per-token normalization, undone on the output."""
    hook: str | None = None
    """Hook point of the input and the output."""
    head: int | None = None
    """Attention head that it reads and writes; None means all."""
    model: str | None = None
    """Name of the language model it was trained on."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its file, unchanged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.residual_threshold >= 0, "residual_threshold", "a length, 0 or more")
        if self.max_iterations is not None:
            self._check_counts("max_iterations")

    def tensor_shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors of an SAE with this configuration, by name."""
        return {"W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}


@final
class PursuitSAE(SparseCoder):
    """A matching pursuit sparse autoencoder: `W_dec [d_sae, d_in]`, `b_dec [d_in]`, and no encoder of its own.

    Initially the decoder rows are random unit directions and the bias is zero. Rows should have unit norm: only then is
    the value v of a chosen latent the length of the residual along its row.

    Args:
        cfg: configuration to build.
        seed: of the initial directions; the global random state is not used.
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
        """Encoder directions: the decoder, transposed."""
        return self.W_dec.T

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations by matching pursuit, in the units of the (normalized) input; 0 or more.

        The choice of latents has no gradient; their values have. The backward pass needs one `d_in` vector per choice,
        and no `d_sae` one.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: subset to return: any index of the last axis. All are still searched, in row tiles of 64 MiB.
            tap: called with ("acts_post", latents); its return value replaces them.

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
        latents = self._subset(latents, self.cfg.d_sae)
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
            x: the input of the latents; only used, and required, with a normalization.
            tap: called with ("recons", latents @ W_dec + b_dec), before normalization is undone; its return value
                replaces it.

        Raises:
            TypeError: if `latents` is no tensor.
            ValueError: if its last axis is not d_sae; if a required `x` is missing.
        """
        self._check_latents(latents, self.cfg.d_sae)
        recons = latents.to(self.dtype) @ self.W_dec
        recons = tapped(tap, "recons", recons + self.b_dec if self.cfg.pre_bias == "tied" else recons)
        return self.denormalize(recons, x)

    def fold_decoder_norm(self) -> PursuitSAE:
        """Not supported: rows of other norms would be chosen in another order.

        Raises:
            ValueError: always.
        """
        raise ValueError(explain("decoder norms cannot be folded into a PursuitSAE.", want="an SAE with an encoder"))

    @torch.no_grad()
    def fold_scaling(self, factor: float) -> PursuitSAE:
        """Convert a PursuitSAE trained on `factor * x` into one that reads `x`.

            b_dec /= factor;  residual_threshold /= factor;  W_dec stays

        Unlike `SAE.fold_scaling` latents become smaller by `factor`: the pursuit is homogeneous, and the one matrix
        cannot be scaled up as encoder and down as decoder. Returns a new object; this one is not changed.

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
        # Finished tokens leave `residual` and `token`, so that later rounds cost less. The choices are collected and
        # written once: autograd would keep a tensor [tokens, d_sae] for each write.
        token = torch.arange(len(residual), device=residual.device)
        is_active = torch.zeros(len(residual), self.cfg.d_sae, dtype=torch.bool, device=residual.device)
        acts = residual.new_zeros(is_active.shape)
        choices: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.cfg.max_iterations or self.cfg.d_in):
            if not len(token):
                break
            latent = self._best(residual)
            rows = self.W_dec[latent]
            value = torch.relu((residual * rows).sum(-1))
            choices.append((token, latent, value))
            residual = residual - value[:, None] * rows
            unfinished = self._is_unfinished(residual.detach(), value.detach(), is_active[token, latent])
            is_active[token, latent] = True
            rest = unfinished.nonzero()[:, 0]  # one wait for the device in each round
            token, residual = token.index_select(0, rest), residual.index_select(0, rest)
        if not choices:
            return acts
        tokens, latents, values = (torch.cat(parts) for parts in zip(*choices, strict=True))
        return acts.index_put((tokens, latents), values, accumulate=True)

    @torch.no_grad()
    def _best(self, residual: Tensor) -> Tensor:
        tiles = residual.split(max(1, TILE // self.cfg.d_sae))
        return torch.cat([(tile @ self.W_dec.T).argmax(dim=1) for tile in tiles])

    def _is_unfinished(self, residual: Tensor, value: Tensor, is_duplicate: Tensor) -> Tensor:
        unfinished = value != 0  # no row points along the residual: every further round would choose 0 again
        if self.cfg.stop_on_duplicate:
            unfinished = unfinished & ~is_duplicate
        if self.cfg.residual_threshold > 0:
            unfinished = unfinished & (residual.norm(dim=-1) >= self.cfg.residual_threshold)
        return unfinished

    @property
    def _kind(self) -> str:
        return "matching pursuit"
