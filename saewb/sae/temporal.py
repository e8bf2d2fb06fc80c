"""Temporal SAEs: attention predicts a token's codes from earlier tokens; only the residual is encoded sparsely.

1. r = normalize(x) - b_dec, predicted = 0, and l = 1 / (4 d_in).
2. For each attention layer: z = relu(l r W_enc); keys and values come from z one position earlier, queries from z;
   a = relu(causal attention); g = a @ W_dec; s = <g, r> / (|g| + 1e-6)^2; predicted += s a; r -= s g.
3. Latents (the novel codes) = the k largest of relu(l r W_enc).
4. Output = denormalize((latents + predicted) @ W_dec + b_dec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.sae.activation_functions import Latents, Tap, normalized, tapped
from saewb.sae.base import SparseCoder
from saewb.sae.config import OnePointConfig, Shape, TokenNormalization


@dataclass(frozen=True)
class TemporalConfig(OnePointConfig):
    """Configuration of a temporal SAE. Invalid or unknown fields raise."""

    d_in: int
    """Width of the input and the output."""
    d_sae: int
    """Number of latents."""
    activation: Literal["relu", "topk"] = "relu"
    """Activation function of the novel codes."""
    k: int | None = None
    """Active novel codes per token; only for "topk"."""
    n_heads: int = 8
    """Heads of each attention layer."""
    n_attn_layers: int = 1
    """Attention layers, each predicting the residual of the layers before it."""
    bottleneck_factor: int = 64
    """Ratio of d_sae to the width of queries and keys."""
    tied: bool = True
    """Whether the encoder is the decoder, transposed."""
    pre_bias: Literal["none", "tied"] = "tied"
    """"tied": b_dec is subtracted before encoding."""
    factor: float = 1.0
    """Factor that inputs are multiplied with and outputs divided by."""
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
        self._check_counts("n_heads", "bottleneck_factor")
        self._check(type(self.n_attn_layers) is int and self.n_attn_layers >= 0, "n_attn_layers", ">= 0")
        want = f"a multiple of n_heads * bottleneck_factor = {self.n_heads} * {self.bottleneck_factor}"
        self._check(self.d_sae % (self.n_heads * self.bottleneck_factor) == 0, "d_sae", want)
        self._check_choice("activation", Literal["relu", "topk"])
        if self.activation == "topk":
            fits = type(self.k) is int and 0 < self.k <= self.d_sae
            self._check(fits, "k", f"1 to d_sae={self.d_sae} for 'topk'")
        else:
            self._check(self.k is None, "k", "None, since activation 'relu' keeps no fixed number of latents")
        self._check(self.factor > 0, "factor", "a positive number")
        self._check(self.factor == 1 or self.normalization == "none", "factor", "1 together with a normalization")

    @property
    def adds_bias(self) -> bool:
        """Whether b_dec is added to the output: always, except with a tied encoder that does not subtract it."""
        return self.pre_bias == "tied" or not self.tied

    def tensor_shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors of an SAE with this configuration, by name."""
        shapes: dict[str, Shape] = {"W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}
        if not self.tied:
            shapes["W_enc"] = (self.d_in, self.d_sae)
        d_key = self.d_sae // self.bottleneck_factor
        for layer in range(self.n_attn_layers):
            for name, width in (("k_ctx", d_key), ("q_target", d_key), ("v_ctx", self.d_sae), ("c_proj", self.d_sae)):
                shapes[f"attn_layers.{layer}.{name}.weight"] = (width, self.d_sae)
                shapes[f"attn_layers.{layer}.{name}.bias"] = (width,)
        return shapes


class _Attention(nn.Module):
    """Attention of each token's codes over the codes of earlier tokens; weights are set by `load_state_dict`."""

    def __init__(self, d_sae: int, d_key: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.k_ctx = nn.Linear(d_sae, d_key, device="meta")
        self.q_target = nn.Linear(d_sae, d_key, device="meta")
        self.v_ctx = nn.Linear(d_sae, d_sae, device="meta")
        self.c_proj = nn.Linear(d_sae, d_sae, device="meta")

    def forward(self, z: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
        earlier = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)
        q, k, v = (
            t.unflatten(-1, (self.n_heads, t.shape[-1] // self.n_heads)).transpose(1, 2)
            for t in (self.q_target(z), self.k_ctx(earlier), self.v_ctx(earlier))
        )
        if z.numel() == 0:  # some kernels refuse an empty batch
            return self.c_proj(z)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(-2))


@final
class TemporalSAE(SparseCoder):
    """A temporal sparse autoencoder. It reads whole sequences, `[batch, pos, d_in]`, and is causal in `pos`.

    Parameters: `W_dec [d_sae, d_in]`, `b_dec [d_in]`, `W_enc [d_in, d_sae]` (the decoder, transposed, if tied), and for
    each layer `attn_layers.i.{k_ctx,q_target,v_ctx,c_proj}.{weight,bias}`. Initially the decoder rows are random unit
    directions and attention weights small random numbers. Codes are small numbers because of l = 1 / (4 d_in).

    Args:
        cfg: configuration to build.
        seed: of the initial weights; the global random state is not used.
        dtype: of the parameters.
        device: of the parameters.

    References:
        Lubana et al. 2025, arXiv:2511.01836.

    Example:
        >>> sae = TemporalSAE(TemporalConfig(d_in=8, d_sae=32, activation="topk", k=3, n_heads=2, bottleneck_factor=4))
        >>> x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> sae.encode(x).shape, sae(x).shape, int((sae.encode(x) != 0).sum(-1).max())
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 8]), 3)
    """

    looks_back = True
    taps = ("acts_pre", "acts_post", "recons")

    def __init__(
        self,
        cfg: TemporalConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in cfg.tensor_shapes().items():
            is_bias = len(shape) == 1
            tensors[name] = torch.zeros(shape) if is_bias else torch.randn(shape, generator=rng) / shape[-1] ** 0.5
        tensors["W_dec"] = nn.functional.normalize(tensors["W_dec"], dim=1)
        if not cfg.tied:
            tensors["W_enc"] = tensors["W_dec"].T.contiguous()
        self._set_weights(cfg, {name: t.to(device, dtype) for name, t in tensors.items()})

    def _set_weights(self, cfg: TemporalConfig, tensors: Mapping[str, Tensor]) -> None:
        prefix = "attn_layers."
        attention = {n.removeprefix(prefix): t.detach() for n, t in tensors.items() if n.startswith(prefix)}
        self.cfg = cfg
        for name in set(tensors) - {prefix + n for n in attention}:
            # Written past `register_parameter`, which refuses a name that is also a property of the class (`W_enc`).
            self._parameters[name] = nn.Parameter(tensors[name].detach())
        d_key = cfg.d_sae // cfg.bottleneck_factor
        self.attn_layers = nn.ModuleList(_Attention(cfg.d_sae, d_key, cfg.n_heads) for _ in range(cfg.n_attn_layers))
        self.attn_layers.load_state_dict(attention, assign=True)

    @property
    def W_enc(self) -> Tensor:
        """Encoder `[d_in, d_sae]`: a separate parameter, or the decoder, transposed, if tied."""
        return self.W_dec.T if self.cfg.tied else self._parameters["W_enc"]

    def encode(
        self, x: Float[Tensor, "*batch_pos d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Novel codes: sparse, 0 or more, of the part that earlier tokens do not predict.

        Args:
            x: activations of the model, `[batch, pos, d_in]` from the start of the text, in the model's own units.
            latents: subset to return: any index of the last axis. The attention still reads all.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); its return values replace them.

        Returns:
            `[batch, pos, d_sae]`, or exactly `encode(x)[..., latents]`.

        Raises:
            ValueError: if `x` is not `[batch, pos, d_in]`, or if `tap` is given together with `latents`.
        """
        self._check_tap(latents, tap)
        codes = self._novel(self._predict(self._cast(x))[1], tap)
        return codes if latents is None else codes[..., self._subset(latents, self.cfg.d_sae)]

    def predict(self, x: Float[Tensor, "*batch_pos d_in"]) -> Float[Tensor, "*batch_pos d_sae"]:
        """Predicted codes: dense, predicted from earlier tokens, in the units of the novel codes."""
        return self._predict(self._cast(x))[0]

    def decode(
        self,
        latents: Float[Tensor, "*batch_pos d_sae"],
        x: Float[Tensor, "*batch_pos d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "*batch_pos d_in"]:
        """The reconstruction in the model's units, from novel codes and the predicted codes of `x`.

            denormalize((latents + predict(x)) @ W_dec + b_dec)

        Args:
            latents: novel codes, `[batch, pos, d_sae]`.
            x: the whole input of the codes, which determines the predicted part and the scale.
            tap: called with ("recons", (latents + predicted) @ W_dec + b_dec); its return value replaces it.

        Raises:
            TypeError: if one of them is no tensor.
            ValueError: if `x` is missing or is not `[batch, pos, d_in]`, or `latents` of another width.
        """
        if x is None:
            raise ValueError(
                explain(
                    "decode of a TemporalSAE needs its input: part of the output is predicted from it.",
                    fix="sae.decode(latents, x)",
                )
            )
        x = self._cast(x)
        self._check_latents(latents, self.cfg.d_sae)
        return self._decode(latents.to(self.dtype), self._predict(x)[0], x, tap)

    def forward(self, x: Float[Tensor, "*batch_pos d_in"]) -> Float[Tensor, "*batch_pos d_in"]:
        """`decode(encode(x), x)`, computing the attention once."""
        x = self._cast(x)
        predicted, residual = self._predict(x)
        return self._decode(self._novel(residual), predicted, x)

    def fold_decoder_norm(self) -> TemporalSAE:
        """Not supported: the attention mixes codes of all latents.

        Raises:
            ValueError: always.
        """
        raise ValueError(explain("decoder norms cannot be folded into a TemporalSAE.", want="a feed-forward SAE"))

    def fold_scaling(self, factor: float) -> TemporalSAE:
        """Convert a TemporalSAE trained on `factor * x` into one that reads `x`: `cfg.factor *= factor`.

        Latents do not change. Returns a new object; this one is not changed.

        Raises:
            ValueError: if the factor is not positive, or if this SAE also normalizes per token.
        """
        cfg = replace(self.cfg, factor=self.cfg.factor * factor)
        return TemporalSAE.from_tensors(cfg, {name: t.clone() for name, t in self.state_dict().items()})

    def _cast(self, x: Tensor) -> Tensor:
        want = f"[batch, pos, d_in={self.cfg.d_in}]"
        if not isinstance(x, Tensor):
            raise self._not_a_tensor(x, "x", want)
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                explain(
                    f"{self!r} got x of shape {tuple(x.shape)}.",
                    want=f"{want}, since it predicts each token from those before it",
                    fix="sae(x[None])" if x.ndim == 2 else "",
                )
            )
        return x.to(self.dtype)

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted codes, and the residual of the input."""
        residual = normalized(x * self.cfg.factor if self.cfg.factor != 1 else x, self.cfg.normalization)
        if self.cfg.pre_bias == "tied":
            residual = residual - self.b_dec
        predicted = residual.new_zeros(*x.shape[:-1], self.cfg.d_sae)
        for layer in self.attn_layers:
            codes = torch.relu(layer(torch.relu(self._pre_acts(residual))))
            direction = codes @ self.W_dec
            scale = (direction * residual).sum(-1, keepdim=True) / (
                direction.norm(dim=-1, keepdim=True) + 1e-6
            ).square()
            predicted = predicted + scale * codes
            residual = residual - scale * direction
        return predicted, residual

    def _pre_acts(self, residual: Tensor) -> Tensor:
        return (residual / (4 * self.cfg.d_in)) @ self.W_enc

    def _novel(self, residual: Tensor, tap: Tap | None = None) -> Tensor:
        codes = torch.relu(tapped(tap, "acts_pre", self._pre_acts(residual)))
        if self.cfg.k is not None:
            values, indices = codes.topk(self.cfg.k, dim=-1, sorted=False)
            codes = torch.zeros_like(codes).scatter(-1, indices, values)
        return tapped(tap, "acts_post", codes)

    def _decode(self, novel: Tensor, predicted: Tensor, x: Tensor, tap: Tap | None = None) -> Tensor:
        recons = (novel + predicted) @ self.W_dec
        recons = tapped(tap, "recons", recons + self.b_dec if self.cfg.adds_bias else recons)
        recons = self.denormalize(recons, x)
        return recons / self.cfg.factor if self.cfg.factor != 1 else recons

    @property
    def _kind(self) -> str:
        return "temporal" if self.cfg.k is None else f"temporal topk k={self.cfg.k}"
