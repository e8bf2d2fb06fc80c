"""The sparse autoencoder: one class for every published feed-forward architecture.

    latents = activation((normalize(x) - b_pre) @ W_enc + b_enc)
    recons  = denormalize(latents @ W_dec + b_dec) (+ x @ W_skip)

The activation is a threshold per latent (ReLU, JumpReLU) or a top-k (by value, by magnitude or within groups). Other
differences between papers concern file formats (`saewb.pretrained.formats`) or training
(`saewb.training.objectives`), not the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from saewb.errors import explain
from saewb.kernels.select import ApproximateTopK, quickest_topk
from saewb.kernels.topk import TILE, top
from saewb.sae.activation_functions import Latents, Tap, tapped, thresholded
from saewb.sae.base import SparseCoder
from saewb.sae.config import SAEConfig
from saewb.sae.sparse import SparseLatents

__all__ = ["SAE", "SAEConfig"]

_SPARSE = 1 / 32  # fraction of active latents above which candidates from a bf16 product are not worthwhile


@final
class SAE(SparseCoder):
    """A sparse autoencoder or transcoder.

    Parameters, where they apply: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_out]` (row i is the direction
    latent i writes), `b_dec [d_out]`, `b_pre [d_in]` (None, or `b_dec` itself when tied), `threshold [d_sae]`,
    `W_skip [d_in, d_out]`. All have one dtype and device; inputs are cast to that dtype.

    Initially the decoder rows are random unit directions, the encoder is their transpose, biases and thresholds are 0.

    Args:
        cfg: configuration to build.
        seed: of the initial directions; the global random state is not used.
        dtype: of the parameters.
        device: of the parameters.

    References:
        Activation functions: Bricken et al. 2023 (ReLU); Rajamanoharan et al. 2024, arXiv:2407.14435 eq. 1 (JumpReLU);
        Gao et al. 2024, arXiv:2406.04093 (TopK); arXiv:2510.00404 (AbsTopK). Transcoders: Dunefsky et al. 2024,
        arXiv:2406.11944.

    Example:
        >>> sae = SAE(SAEConfig(d_in=8, d_sae=32, activation="topk", k=3))
        >>> x = torch.ones(2, 5, 8)
        >>> sae.encode(x).shape, sae(x).shape, int((sae.encode(x) != 0).sum(-1).max())
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 8]), 3)
    """

    taps = ("acts_pre", "acts_post", "recons")

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self, cfg: SAEConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self._set_weights(cfg, _initial(cfg, seed, dtype, device))

    @property
    def b_pre(self) -> nn.Parameter | None:
        """Bias subtracted from the (normalized) input before encoding: None, `b_dec` when tied, or a separate one."""
        return self.b_dec if self.cfg.pre_bias == "tied" else self._parameters.get("b_pre")

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations, in the units of the (normalized) input.

            activation((normalize(x) - b_pre) @ W_enc + b_enc)

        ReLU keeps what is > 0, JumpReLU what is strictly > threshold (and > 0), TopK the k largest that are > 0,
        LinearTopK the k largest of any sign, AbsTopK the k largest in magnitude, with their sign, GroupMax the largest
        of each of k groups that is > 0.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: subset to return: any index of the last axis. ReLU and JumpReLU compute those columns only;
                a top-k activation must compare all latents of a token, in tiles of 64 MiB.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); its return values replace them.

        Returns:
            `[..., d_sae]`, or exactly `encode(x)[..., latents]`.

        Raises:
            TypeError: if `x` is no tensor.
            ValueError: if the last axis of `x` is not d_in, or if `tap` is given together with `latents`.

        Example:
            >>> sae = SAE(SAEConfig(d_in=4, d_sae=9)); x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
            >>> torch.equal(sae.encode(x, latents=[7, 2]), sae.encode(x)[:, [7, 2]])
            True
        """
        self._check_tap(latents, tap)
        latents = self._subset(latents, self.cfg.d_sae)
        h = self.encoder_input(x)
        if latents is None:
            pre_acts = h @ self.W_enc + self.b_enc
            return tapped(tap, "acts_post", self._activation(tapped(tap, "acts_pre", pre_acts)))
        if self.cfg.k is not None:
            return self._topk_subset(h, latents)
        threshold = self.threshold[latents] if self.cfg.activation == "jumprelu" else None
        return thresholded(torch.tensordot(h, self.W_enc[:, latents], 1) + self.b_enc[latents], threshold)

    def encode_topk(self, x: Float[Tensor, "*batch d_in"], approximate: ApproximateTopK | None = None) -> SparseLatents:
        """Active latents of a top-k activation: `encode(x)` without its zeros, with gradients.

        The result holds k values and indices per token (`.topk`).

        On a CPU, without gradients, it computes a block of latents at a time: twice as fast as the product with all of
        a wide SAE, with at most 32 MiB of pre-activations. Where the processor multiplies bf16 fast, bf16 selects
        candidates and float32 decides: the same latents, three times as fast again, for one and a half times the memory
        of a W_enc of up to 256 MiB (see `saewb.kernels.select`).

        Args:
            x: activations of the model, as for `encode`.
            approximate: of these weights, for many calls (`saewb.sae.base.SparseEncoder`).

        Raises:
            ValueError: if the activation is a threshold, which has no fixed number of active latents.
        """
        if self.cfg.k is None:
            what = f"encode_topk on a {self.cfg.activation!r} SAE."
            raise ValueError(explain(what, want="a top-k activation", fix="sae.encode(x)"))
        h = self.encoder_input(x)
        rows, shape = h.reshape(-1, h.shape[-1]), (*h.shape[:-1], self.cfg.d_sae)
        topk = quickest_topk(rows, self.W_enc, self.b_enc, self.cfg.k, self.cfg.activation, approximate)
        return SparseLatents.from_topk(*topk, shape)

    def decode(
        self,
        latents: Float[Tensor, "*batch d_sae"] | SparseLatents,
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """The reconstruction (or, for a transcoder, the prediction) in the model's units.

            denormalize(latents @ W_dec + b_dec) (+ x @ W_skip)

        Args:
            latents: `[..., d_sae]`, or sparse ones of `encode_topk` or `encode_sparse`.
            x: the input of the latents. Required, and only used, where the output depends on it beyond the latents:
                with a normalization (to undo it) and with a skip matrix.
            tap: called with ("recons", latents @ W_dec + b_dec), before normalization is undone; its return value
                replaces it.

        Returns:
            `[..., d_out]`.

        Raises:
            TypeError: if `latents` is no tensor.
            ValueError: if its last axis is not d_sae; if a required `x` is missing.
        """
        if not isinstance(latents, SparseLatents):
            self._check_latents(latents, self.cfg.d_sae)
            latents = latents.to(self.dtype)
        recons = self.denormalize(tapped(tap, "recons", latents @ self.W_dec + self.b_dec), x)
        return recons + self._decoder_input(x) @ self.W_skip if self.cfg.skip else recons

    @torch.no_grad()
    def fold_decoder_norm(self) -> SAE:
        """Scale decoder rows to unit norm, so that an activation is a length in the model's units.

            n_i = ||W_dec[i]||:  W_dec[i] /= n_i,  W_enc[:, i] *= n_i,  b_enc[i] *= n_i,  threshold[i] *= n_i

        The output is the same. Rows of norm 0 are not scaled. Returns a new SAE; this one is not changed.

        Raises:
            ValueError: for a top-k activation whose rows differ in norm: scaling would change which latents are active.
        """
        norm = self.W_dec.norm(dim=1)
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        if self.cfg.k is not None and not torch.allclose(norm, norm[:1].expand_as(norm), rtol=1e-4):
            span = f"decoder norms from {norm.min():.3g} to {norm.max():.3g}"
            what = f"{span} cannot be folded into a {self.cfg.activation!r} SAE: other latents would be kept."
            raise ValueError(explain(what, want="rows of one norm, or activation 'relu' or 'jumprelu'"))
        new = {"W_enc": self.W_enc * norm, "b_enc": self.b_enc * norm, "W_dec": self.W_dec / norm[:, None]}
        if self.cfg.activation == "jumprelu":
            new["threshold"] = self.threshold * norm
        return self._with(new)

    @torch.no_grad()
    def fold_scaling(self, factor: float, factor_out: float | None = None) -> SAE:
        """Convert an SAE trained on `factor * x` into one that reads `x`.

            W_enc *= factor;  W_dec, b_dec /= factor_out;  b_pre /= factor;  W_skip *= factor / factor_out

        Latents do not change. Returns a new SAE; this one is not changed.

        Args:
            factor: factor of its training inputs.
            factor_out: factor of a transcoder's targets; None means `factor`.

        Raises:
            ValueError: if a factor is not positive, if this SAE normalizes per token by more than subtracting a mean,
                or if b_pre is tied to b_dec and the factors differ.
        """
        out = factor if factor_out is None else factor_out
        if not (factor > 0 and out > 0):
            raise ValueError(
                explain(f"fold_scaling got factor={factor}, factor_out={factor_out}.", want="positive numbers")
            )
        linear = self.cfg.normalization in ("none", "centered")  # subtracting a mean commutes with a factor
        if not linear or (out != factor and (self.cfg.pre_bias == "tied" or self.cfg.normalization != "none")):
            fields = f"normalization={self.cfg.normalization!r}, pre_bias={self.cfg.pre_bias!r}"
            what = f"a factor cannot be folded into {self!r} with {fields}."
            raise ValueError(explain(what, want="normalization 'none' or 'centered', one factor where b_pre is b_dec"))
        new = {"W_enc": self.W_enc * factor, "W_dec": self.W_dec / out, "b_dec": self.b_dec / out}
        if self.cfg.pre_bias == "own":
            new["b_pre"] = self.b_pre / factor
        if self.cfg.skip:
            new["W_skip"] = self.W_skip * (factor / out)
        return self._with(new)

    def _with(self, new: Mapping[str, Tensor]) -> SAE:
        return SAE.from_tensors(
            self.cfg, {name: new[name] if name in new else p.clone() for name, p in self._parameters.items()}
        )

    def encoder_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Input of the encoder matrix: normalize(x) - b_pre."""
        h = self.normalize_input(x)
        return h if self.b_pre is None else h - self.b_pre

    def _activation(self, pre_acts: Tensor) -> Tensor:
        if self.cfg.k is None:
            return thresholded(pre_acts, self.threshold if self.cfg.activation == "jumprelu" else None)
        values, indices = top(pre_acts, self.cfg.k, self.cfg.activation)
        return torch.zeros_like(pre_acts).scatter(-1, indices, values)

    def _topk_subset(self, h: Tensor, latents: Latents) -> Tensor:
        tiles = h.reshape(-1, h.shape[-1]).split(max(1, TILE // self.cfg.d_sae))
        acts = torch.cat([self._activation(tile @ self.W_enc + self.b_enc)[:, latents] for tile in tiles])
        return acts.reshape(*h.shape[:-1], *acts.shape[1:])

    def _threshold(self, latents: Tensor | slice) -> Tensor:
        return self.threshold[latents] if self.cfg.activation == "jumprelu" else torch.zeros_like(self.b_enc[latents])

    def _approximation(self, x: Float[Tensor, "tokens d_in"]) -> ApproximateTopK | None:
        if self.cfg.activation == "groupmax":
            return None
        floor = None if self.cfg.k is not None else torch.relu(self._threshold(slice(None)))
        return ApproximateTopK.of(self.W_enc.detach(), self.b_enc.detach(), self.encoder_input(x), floor)

    def _encode_tokens(
        self, x: Float[Tensor, "tokens d_in"], approximate: ApproximateTopK | None
    ) -> SparseLatents | None:
        if self.cfg.k is not None:
            return self.encode_topk(x, approximate)
        return None if approximate is None else encode_above(self.encoder_input(x), approximate, self._threshold)

    @property
    def _kind(self) -> str:
        return self.cfg.activation if self.cfg.k is None else f"{self.cfg.activation} k={self.cfg.k}"


def encode_above(
    h: Float[Tensor, "tokens d_in"], approximate: ApproximateTopK, threshold: Callable[[Tensor], Tensor]
) -> SparseLatents | None:
    """Latents above their thresholds (and 0), from candidates of an approximate product; None if they are many.

    Args:
        h: input of the encoder matrix.
        approximate: of its weights.
        threshold: function of the indices of latents.
    """
    d_sae = len(approximate.rows)
    candidates = approximate.over(h, int(_SPARSE * len(h) * d_sae))
    if candidates is None:
        return None
    token, latent, pre_acts = candidates
    acts = thresholded(pre_acts, threshold(latent))
    active = acts.nonzero()[:, 0]
    return SparseLatents(token[active], latent[active], acts[active], (len(h), d_sae))


def _initial(cfg: SAEConfig, seed: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Random unit decoder rows, the encoder their transpose (random if widths differ), and zeros."""
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()}
    rng = torch.Generator().manual_seed(seed)
    rows = tensors["W_dec"]
    normalize(rows.normal_(generator=rng), dim=1, out=rows)
    if cfg.d_in != cfg.d_out:
        rows = torch.randn(cfg.d_sae, cfg.d_in, generator=rng)
        normalize(rows, dim=1, out=rows)
    tensors["W_enc"].copy_(rows.T)
    return {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
