"""Crosscoders: one set of latents that reads and reconstructs the activations at several points, or of several models.

    u^m   = scale^m (x^m - mean^m)                                    at each point m, or in each model
    z     = activation(sum over m of u^m @ W_enc^m + b_enc)
    y^m   = (z @ W_dec^m + b_dec^m) / scale^m + mean^m                reconstructs x^m

The blocks of all points lie side by side: `W_enc [d_in, d_sae]` and `W_dec [d_sae, d_in]` with d_in the sum of the
widths. Mean and scale are not folded into the weights, since what a latent writes at one point is compared with what it
writes at another: lengths of decoder blocks say something in units in which the points have equal lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain, near
from saewb.kernels.select import ApproximateTopK
from saewb.sae.activation_functions import Latents, Tap, tapped, thresholded
from saewb.sae.base import SparseCoder
from saewb.sae.config import CoderConfig, SAEConfig, Shape
from saewb.sae.sae import SAE, encode_above
from saewb.sae.sparse import SparseLatents

CrossCoderActivation = Literal["relu", "jumprelu"]


@dataclass(frozen=True)
class CrossCoderConfig(CoderConfig):
    """Configuration of a crosscoder, immutable. Invalid or unknown fields raise."""

    points: tuple[str, ...]
    """Name of each point or model, two or more, in the order of the weights."""
    widths: tuple[int, ...]
    """Width of the activations at each of them."""
    d_sae: int
    """Number of latents."""
    activation: CrossCoderActivation = "relu"
    """Activation function."""
    model: str | None = None
    """Name of the language model, where all points are of one."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its file, unchanged."""

    def __post_init__(self) -> None:
        self._replace(points=tuple(self.points), widths=tuple(self.widths), metadata=dict(self.metadata))
        named = all(isinstance(point, str) and point for point in self.points)
        several = named and len(set(self.points)) == len(self.points) > 1
        self._check(several, "points", "two or more different names")
        counts = len(self.widths) == len(self.points) and all(type(d) is int and d > 0 for d in self.widths)
        self._check(counts, "widths", f"a positive integer for each of {', '.join(self.points)}")
        self._check_counts("d_sae")
        self._check_choice("activation", CrossCoderActivation)

    @property
    def d_in(self) -> int:
        """Width of all points together."""
        return sum(self.widths)

    @property
    def d_out(self) -> int:
        """Width of all reconstructions together: d_in."""
        return self.d_in

    @property
    def hook(self) -> None:
        """Always None: it reads several points."""
        return None

    @property
    def hook_out(self) -> None:
        """Always None: it writes several points."""
        return None

    @property
    def head(self) -> None:
        """Always None."""
        return None

    @property
    def is_transcoder(self) -> bool:
        """Always False."""
        return False

    @property
    def spans(self) -> dict[str, slice]:
        """Coordinates of each point among all of them, by name."""
        ends = [0]
        for width in self.widths:
            ends.append(ends[-1] + width)
        return {point: slice(*ends) for point, ends in zip(self.points, pairwise(ends), strict=True)}

    def tensor_shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors of a crosscoder with this configuration, by name."""
        shapes: dict[str, Shape] = {
            "W_enc": (self.d_in, self.d_sae),
            "b_enc": (self.d_sae,),
            "W_dec": (self.d_sae, self.d_in),
            "b_dec": (self.d_in,),
            "mean": (self.d_in,),
            "scale": (self.d_in,),
        }
        if self.activation == "jumprelu":
            shapes["threshold"] = (self.d_sae,)
        return shapes


@final
class CrossCoderSAE(SparseCoder):
    """A crosscoder of several points of a model, or of one point in several models, in the models' own units.

    Parameters, with all points side by side: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec
    [d_in]`, `mean [d_in]` and `scale [d_in]` of the input, and for "jumprelu" `threshold [d_sae]`. Wherever activations
    are taken, they may also be a mapping by point: `cross.encode({"base": x, "chat": y})`.

    Created by `from_tensors`, `saewb.load_sae`, and by training with `saewb.CrossCoder` or `saewb.L1CrossCoder`. It
    cannot be attached to a model: the reconstruction of one model depends on the activations of the other.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders; Minder et al. 2025, arXiv:2504.02922.

    Example:
        >>> cfg = CrossCoderConfig(points=("a", "b"), widths=(2, 3), d_sae=7)
        >>> cross = CrossCoderSAE.from_tensors(cfg, {n: torch.ones(s) for n, s in cfg.tensor_shapes().items()})
        >>> z = cross.encode({"a": torch.ones(4, 2), "b": torch.ones(4, 3) * 2})
        >>> z.shape, z[0, 0].item(), {point: y.shape for point, y in cross.split(cross.decode(z)).items()}
        (torch.Size([4, 7]), 4.0, {'a': torch.Size([4, 2]), 'b': torch.Size([4, 3])})
    """

    taps = ("acts_pre", "acts_post", "recons")

    cfg: CrossCoderConfig
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    mean: nn.Parameter
    scale: nn.Parameter

    def join(self, x: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "*batch d_in"]:
        """Activations of all points side by side, in this crosscoder's dtype.

        Args:
            x: `[..., d]` by point; or all side by side already, `[..., d_in]`.

        Raises:
            ValueError: if a point is missing, or has another width.
        """
        if not isinstance(x, Mapping):
            self._check_input(x)
            return x.to(self.dtype)
        for point, width in zip(self.cfg.points, self.cfg.widths, strict=True):
            if point not in x:
                what = f"{self!r} got no activations of {point!r}."
                raise ValueError(explain(what, near=near(point, x), want=", ".join(self.cfg.points)))
            if x[point].shape[-1:] != (width,):
                what = f"{self!r} got activations of {point!r} of shape {tuple(x[point].shape)}."
                raise ValueError(explain(what, want=f"[..., {width}]"))
        return torch.cat([x[point].to(self.dtype) for point in self.cfg.points], dim=-1)

    def split(self, x: Float[Tensor, "*batch d_in"]) -> dict[str, Tensor]:
        """Views of a tensor `[..., d_in]` by point: the inverse of `join`."""
        return {point: x[..., span] for point, span in self.cfg.spans.items()}

    def normalize_input(self, x: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "*batch d_in"]:
        """The input of the encoder, `scale (x - mean)`: activations in units in which points have equal lengths."""
        return (self.join(x) - self.mean) * self.scale

    def denormalize(
        self, recons: Float[Tensor, "*batch d_in"], x: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Undo `normalize_input` on a reconstruction."""
        return recons / self.scale + self.mean

    def with_scale(self, scale: Mapping[str, float]) -> CrossCoderSAE:
        """The same weights reading activations that are multiplied by these factors; a published file may lack them.

        Args:
            scale: a positive factor for each point.

        Raises:
            ValueError: if a point is missing, or a factor is not positive.
        """
        if set(scale) != set(self.cfg.points) or not all(factor > 0 for factor in scale.values()):
            what = f"{self!r} got scale={dict(scale)}."
            raise ValueError(explain(what, want=f"a positive factor for each of {', '.join(self.cfg.points)}"))
        factors = [torch.full((d,), float(scale[p])) for p, d in zip(self.cfg.points, self.cfg.widths, strict=True)]
        tensors = {**self.tensors(), "scale": torch.cat(factors).to(self.scale)}
        return CrossCoderSAE.from_tensors(self.cfg, tensors)

    def norms(self) -> Float[Tensor, "points d_sae"]:
        """Length of what each latent writes at each point per unit of activation, in the units of `normalize_input`."""
        return torch.stack([self.W_dec[:, span].norm(dim=1) for span in self.cfg.spans.values()])

    def encode(
        self, x: Tensor | Mapping[str, Tensor], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations `[..., d_sae]`: `activation(scale (x - mean) @ W_enc + b_enc)`.

        Args:
            x: activations by point, `[..., d]`; or all side by side, `[..., d_in]`.
            latents: only these: anything that may index the last axis.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); its return values replace them.

        Raises:
            ValueError: if a point is missing or of another width, or if `tap` is given together with `latents`.
        """
        self._check_tap(latents, tap)
        columns = slice(None) if latents is None else self._subset(latents, self.cfg.d_sae)
        threshold = self.threshold[columns] if self.cfg.activation == "jumprelu" else None
        pre_acts = torch.tensordot(self.normalize_input(x), self.W_enc[:, columns], 1) + self.b_enc[columns]
        return tapped(tap, "acts_post", thresholded(tapped(tap, "acts_pre", pre_acts), threshold))

    def decode(
        self,
        latents: Float[Tensor, "*batch d_sae"] | SparseLatents,
        x: Tensor | Mapping[str, Tensor] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """The reconstructions of all points side by side, `[..., d_in]`, in the models' units; `split` divides them.

        Args:
            latents: `[..., d_sae]`, or sparse ones.
            x: not used.
            tap: called with ("recons", the reconstruction before mean and scale are undone); its return value is used.
        """
        if not isinstance(latents, SparseLatents):
            self._check_latents(latents, self.cfg.d_sae)
            latents = latents.to(self.dtype)
        return self.denormalize(tapped(tap, "recons", latents @ self.W_dec + self.b_dec))

    @torch.no_grad()
    def as_sae(self) -> SAE:
        """The same function of activations side by side as one SAE, with mean and scale in its weights; a copy."""
        cfg = self.cfg
        tensors = {
            "W_enc": self.W_enc * self.scale[:, None],
            "b_enc": self.b_enc.clone(),
            "W_dec": self.W_dec / self.scale,
            "b_dec": self.b_dec / self.scale + self.mean,
            "b_pre": self.mean.clone(),
        }
        if cfg.activation == "jumprelu":
            tensors["threshold"] = self.threshold.clone()
        options = {"activation": cfg.activation, "pre_bias": "own", "model": cfg.model, "metadata": cfg.metadata}
        return SAE.from_tensors(SAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, **options), tensors)

    def encode_sparse(self, x: Tensor | Mapping[str, Tensor], mask: Tensor | None = None) -> SparseLatents:
        """Active latents of `encode(x)`, in memory proportional to their number; no gradients.

        Args:
            x: activations by point, or all side by side, as for `encode`.
            mask: tokens to encode; latents of others are left out. None means all.
        """
        return super().encode_sparse(self.join(x), mask)

    def _approximation(self, x: Float[Tensor, "tokens d_in"]) -> ApproximateTopK | None:
        floor = torch.relu(self._threshold(slice(None)))
        return ApproximateTopK.of(self.W_enc.detach(), self.b_enc.detach(), self.normalize_input(x), floor)

    def _encode_tokens(
        self, x: Float[Tensor, "tokens d_in"], approximate: ApproximateTopK | None
    ) -> SparseLatents | None:
        return None if approximate is None else encode_above(self.normalize_input(x), approximate, self._threshold)

    def _threshold(self, latents: Tensor | slice) -> Tensor:
        return self.threshold[latents] if self.cfg.activation == "jumprelu" else torch.zeros_like(self.b_enc[latents])

    @property
    def _kind(self) -> str:
        return self.cfg.activation

    def __repr__(self) -> str:
        cfg = self.cfg
        blocks = " + ".join(f"{point} {width}" for point, width in zip(cfg.points, cfg.widths, strict=True))
        return self._named([cfg.activation, f"{blocks} -> {cfg.d_sae} latents"])
