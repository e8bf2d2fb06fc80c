"""Temporal SAEs: what the tokens before could foretell is set apart, and only the rest is encoded sparsely.

1. r = scale(x) - b_dec, predicted = 0, and l = 1 / (4 d_in).
2. For each attention layer: z = relu(l r W_enc); keys and values come from z one position earlier, queries from z;
   a = relu(causal attention); g = a @ W_dec; s = <g, r> / (|g| + 1e-6)^2; predicted += s a; r -= s g.
3. Latents (the novel codes) = the k largest of relu(l r W_enc).
4. Output = unscale((latents + predicted) @ W_dec + b_dec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import FormatError, explain
from saewb.sae.activation_functions import Latents, Tap, scaled, tapped, unscaled
from saewb.sae.base import fitting, not_a_tensor
from saewb.sae.config import TokenNormalization, WritesWhereItReads, checker, describe

_check = checker("TemporalConfig")


@dataclass(frozen=True)
class TemporalConfig(WritesWhereItReads):
    """What a temporal SAE is, without its weights. Wrong or unknown fields raise."""

    d_in: int  # width of what it reads and writes
    d_sae: int  # number of latents
    activation: Literal["relu", "topk"] = "relu"  # which novel codes survive
    k: int | None = None  # novel codes kept per token; for "topk", and only there
    n_heads: int = 8  # of each attention layer
    n_attn_layers: int = 1  # attention layers, each predicting from what those before left
    bottleneck_factor: int = 64  # queries and keys are d_sae / bottleneck_factor wide
    tied: bool = True  # the encoder is the decoder, transposed
    pre_bias: Literal["none", "tied"] = "tied"  # "tied": b_dec is subtracted before encoding
    factor: float = 1.0  # inputs are multiplied with this, outputs divided by it
    normalization: TokenNormalization = "none"  # per token, undone on the output
    hook: str | None = None  # the point of the model it reads and writes
    head: int | None = None  # reads and writes this attention head only; None means all
    model: str | None = None  # name of the language model it was trained on
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever else its file says, kept as read

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", dict(self.metadata))
        for name in ("d_in", "d_sae", "n_heads", "bottleneck_factor"):
            size = getattr(self, name)
            _check(isinstance(size, int) and size > 0, name, size, "a positive integer")
        _check(
            isinstance(self.n_attn_layers, int) and self.n_attn_layers >= 0, "n_attn_layers", self.n_attn_layers, ">= 0"
        )
        _check(
            self.d_sae % (self.n_heads * self.bottleneck_factor) == 0,
            "d_sae",
            self.d_sae,
            f"a multiple of n_heads * bottleneck_factor = {self.n_heads} * {self.bottleneck_factor}",
        )
        _check(self.activation in ("relu", "topk"), "activation", self.activation, "'relu' or 'topk'")
        if self.activation == "topk":
            _check(
                isinstance(self.k, int) and 0 < self.k <= self.d_sae, "k", self.k, f"1 to d_sae={self.d_sae} for 'topk'"
            )
        else:
            _check(self.k is None, "k", self.k, "None, since activation 'relu' keeps no fixed number of latents")
        _check(self.pre_bias in ("none", "tied"), "pre_bias", self.pre_bias, "'none' or 'tied'")
        _check(
            self.normalization in get_args(TokenNormalization),
            "normalization",
            self.normalization,
            ", ".join(get_args(TokenNormalization)),
        )
        _check(self.factor > 0, "factor", self.factor, "a positive number")
        _check(self.factor == 1 or self.normalization == "none", "factor", self.factor, "1 together with a scaling")

    @property
    def adds_bias(self) -> bool:
        """Whether b_dec is added to the output: always, but for a tied one that does not subtract it."""
        return self.pre_bias == "tied" or not self.tied


class _Attention(nn.Module):
    """Queries of each token's codes over the codes of the tokens before it; made empty, filled by `assign`."""

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
class TemporalSAE(nn.Module):
    """A temporal sparse autoencoder. It reads whole sequences, `[batch, pos, d_in]`, and is causal in `pos`.

    Parameters: `W_dec [d_sae, d_in]`, `b_dec [d_in]`, `W_enc [d_in, d_sae]` (the decoder, transposed, if tied), and for
    each layer `attn_layers.i.{k_ctx,q_target,v_ctx,c_proj}.{weight,bias}`. A new one has unit decoder rows in random
    directions and small random attention weights. Mind that l = 1 / (4 d_in) makes codes small numbers.

    Args:
        cfg: what to build.
        seed: of the initial weights; the global random state is neither read nor changed.
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

    looks_back = True  # the latents of a token depend on the tokens before it
    taps = ("acts_pre", "acts_post", "recons")  # the values `encode` and `decode` hand to `tap`, in this order

    W_dec: nn.Parameter
    b_dec: nn.Parameter

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
        made = {}
        for name, shape in temporal_shapes(cfg).items():
            is_bias = len(shape) == 1
            made[name] = torch.zeros(shape) if is_bias else torch.randn(shape, generator=rng) / shape[-1] ** 0.5
        made["W_dec"] = nn.functional.normalize(made["W_dec"], dim=1)
        if not cfg.tied:
            made["W_enc"] = made["W_dec"].T.contiguous()
        self._declare(cfg, {name: t.to(device, dtype) for name, t in made.items()})

    @classmethod
    def from_tensors(cls, cfg: TemporalConfig, tensors: Mapping[str, Tensor]) -> TemporalSAE:
        """A TemporalSAE around these very tensors: no copy, every one accounted for.

        Raises:
            FormatError: if one is missing, left over, or of another shape than `cfg` says.
        """
        want = temporal_shapes(cfg)
        if set(tensors) != set(want):
            missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - set(want))
            raise FormatError(
                explain(
                    f"weights do not fit a temporal SAE with tied={cfg.tied}, n_attn_layers={cfg.n_attn_layers}: "
                    f"missing {missing}, left over {extra}.",
                    want=", ".join(want),
                )
            )
        for name, shape in want.items():
            if tuple(tensors[name].shape) != shape:
                raise FormatError(explain(f"{name} has shape {tuple(tensors[name].shape)}.", want=str(shape)))
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae._declare(cfg, tensors)
        return sae

    def _declare(self, cfg: TemporalConfig, tensors: Mapping[str, Tensor]) -> None:
        self.cfg = cfg
        d_key = cfg.d_sae // cfg.bottleneck_factor
        self.attn_layers = nn.ModuleList(_Attention(cfg.d_sae, d_key, cfg.n_heads) for _ in range(cfg.n_attn_layers))
        self.W_dec = nn.Parameter(tensors["W_dec"].detach())
        self.b_dec = nn.Parameter(tensors["b_dec"].detach())
        if not cfg.tied:
            # Written past `register_parameter`, which refuses a name that is also a property of the class.
            self._parameters["W_enc"] = nn.Parameter(tensors["W_enc"].detach())
        prefix = "attn_layers."
        attention = {n.removeprefix(prefix): t.detach() for n, t in tensors.items() if n.startswith(prefix)}
        self.attn_layers.load_state_dict(attention, assign=True)

    @property
    def W_enc(self) -> Tensor:
        """Its own encoder `[d_in, d_sae]`, or the decoder, transposed, if tied."""
        return self.W_dec.T if self.cfg.tied else self._parameters["W_enc"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; inputs are cast to it."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.W_dec.device

    def encode(
        self, x: Float[Tensor, "*batch_pos d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """The novel codes: sparse, 0 or more, of what the tokens before do not foretell.

        Args:
            x: activations of the model, `[batch, pos, d_in]` from the start of the text, in the model's own units.
            latents: only these: anything that may index the last axis. The attention still sees all.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); what it returns is used on.

        Returns:
            `[batch, pos, d_sae]`, or exactly `encode(x)[..., latents]`.

        Raises:
            ValueError: if `x` is not `[batch, pos, d_in]`, or if `tap` is given together with `latents`.
        """
        if tap is not None and latents is not None:
            raise ValueError(explain("encode got both latents= and tap=.", want="one of them; a tap sees all latents"))
        codes = self._novel(self._foretold(self._fitting(x))[1], tap)
        return codes if latents is None else codes[..., latents]

    def predict(self, x: Float[Tensor, "*batch_pos d_in"]) -> Float[Tensor, "*batch_pos d_sae"]:
        """The predicted codes: what the tokens before foretell, in the units of the novel ones; dense."""
        return self._foretold(self._fitting(x))[0]

    def decode(
        self,
        latents: Float[Tensor, "*batch_pos d_sae"],
        x: Float[Tensor, "*batch_pos d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "*batch_pos d_in"]:
        """The reconstruction in the model's units: of the novel codes given, and the predicted ones of `x`.

            unscale((latents + predict(x)) @ W_dec + b_dec)

        Args:
            latents: novel codes, `[batch, pos, d_sae]`.
            x: the input they came from, whole: the predicted part and the scale come from it.
            tap: called with ("recons", (latents + predicted) @ W_dec + b_dec); what it returns is used on.

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
        x = self._fitting(x)
        latents = fitting(self, latents, self.cfg.d_sae, "latents")
        return self._decoded(latents, self._foretold(x)[0], x, tap)

    def forward(self, x: Float[Tensor, "*batch_pos d_in"]) -> Float[Tensor, "*batch_pos d_in"]:
        """`decode(encode(x), x)`, with the attention done once."""
        x = self._fitting(x)
        predicted, residual = self._foretold(x)
        return self._decoded(self._novel(residual), predicted, x)

    def fold_decoder_norm(self) -> TemporalSAE:
        """Refused: the attention mixes codes of all latents.

        Raises:
            ValueError: always.
        """
        raise ValueError(explain("decoder norms cannot be folded into a TemporalSAE.", want="a feed-forward SAE"))

    def fold_scaling(self, factor: float) -> TemporalSAE:
        """A TemporalSAE that was trained on `factor * x`, made to read `x` itself: `cfg.factor *= factor`.

        Latents keep their values. A new object; this one is not changed.

        Raises:
            ValueError: if the factor is not positive, or if this SAE also scales per token.
        """
        cfg = replace(self.cfg, factor=self.cfg.factor * factor)
        return TemporalSAE.from_tensors(cfg, {name: t.clone() for name, t in self.state_dict().items()})

    def _fitting(self, x: Tensor) -> Tensor:
        want = f"[batch, pos, d_in={self.cfg.d_in}]"
        if not isinstance(x, Tensor):
            raise not_a_tensor(self, x, "x", want)
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                explain(
                    f"{self!r} got x of shape {tuple(x.shape)}.",
                    want=f"{want}, since it predicts each token from those before it",
                    fix="sae(x[None])" if x.ndim == 2 else "",
                )
            )
        return x.to(self.dtype)

    def _foretold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = scaled(x * self.cfg.factor if self.cfg.factor != 1 else x, self.cfg.normalization)
        if self.cfg.pre_bias == "tied":
            residual = residual - self.b_dec
        predicted = residual.new_zeros(*x.shape[:-1], self.cfg.d_sae)
        for layer in self.attn_layers:
            codes = torch.relu(layer(torch.relu(self._compared(residual))))
            along = codes @ self.W_dec
            share = (along * residual).sum(-1, keepdim=True) / (along.norm(dim=-1, keepdim=True) + 1e-6).square()
            predicted = predicted + share * codes
            residual = residual - share * along
        return predicted, residual

    def _compared(self, residual: Tensor) -> Tensor:
        return (residual / (4 * self.cfg.d_in)) @ self.W_enc

    def _novel(self, residual: Tensor, tap: Tap | None = None) -> Tensor:
        codes = torch.relu(tapped(tap, "acts_pre", self._compared(residual)))
        if self.cfg.k is not None:
            values, indices = codes.topk(self.cfg.k, dim=-1, sorted=False)
            codes = torch.zeros_like(codes).scatter(-1, indices, values)
        return tapped(tap, "acts_post", codes)

    def _decoded(self, novel: Tensor, predicted: Tensor, x: Tensor, tap: Tap | None = None) -> Tensor:
        recon = (novel + predicted) @ self.W_dec
        recon = tapped(tap, "recons", recon + self.b_dec if self.cfg.adds_bias else recon)
        recon = unscaled(recon, x, self.cfg.normalization)
        return recon / self.cfg.factor if self.cfg.factor != 1 else recon

    def __repr__(self) -> str:
        return describe(self, "temporal" if self.cfg.k is None else f"temporal topk k={self.cfg.k}")


def temporal_shapes(cfg: TemporalConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a temporal SAE of this configuration has, by name, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    if not cfg.tied:
        shapes["W_enc"] = (cfg.d_in, cfg.d_sae)
    d_key = cfg.d_sae // cfg.bottleneck_factor
    for layer in range(cfg.n_attn_layers):
        for name, width in (("k_ctx", d_key), ("q_target", d_key), ("v_ctx", cfg.d_sae), ("c_proj", cfg.d_sae)):
            shapes[f"attn_layers.{layer}.{name}.weight"] = (width, cfg.d_sae)
            shapes[f"attn_layers.{layer}.{name}.bias"] = (width,)
    return shapes
