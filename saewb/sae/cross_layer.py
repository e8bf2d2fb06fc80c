"""Cross-layer transcoders and weakly causal crosscoders: latents that read at one layer and write at it and later ones.

    z_i  = activation(x_i @ W_enc[i] + b_enc[i])                                          at each layer i
    y_j  = sum over i <= j of z_i @ W_dec[i][:, j - i]  +  b_dec[j]  (+ x_j @ W_skip[j])

x_i is the model's activation at `hooks[i]`, y_j reconstructs the one at `hooks_out[j]`. In a crosscoder `hooks_out` is
`hooks`: its latents describe the residual stream from their layer on. Because a layer never writes to an earlier one,
y_j can be computed as soon as layer j has been read, so both kinds can be attached to a model during a forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.sae.activation_functions import Latents, Tap, tapped, thresholded
from saewb.sae.base import SparseCoder
from saewb.sae.config import CoderConfig, Shape
from saewb.sae.sparse import SparseLatents

CrossLayerActivation = Literal["relu", "jumprelu"]


@dataclass(frozen=True)
class CrossLayerConfig(CoderConfig):
    """Configuration of a cross-layer transcoder. Invalid or unknown fields raise."""

    d_in: int
    """Width of the input of every layer."""
    d_sae: tuple[int, ...]
    """Number of latents of each layer, first to last."""
    hooks: tuple[str, ...]
    """Hook points of the inputs, one for each layer, in the order of the model."""
    hooks_out: tuple[str, ...] | None = None
    """Hook points of the outputs; None means `hooks` (a crosscoder)."""
    d_out: int | None = None
    """Width of the output of every layer; None means d_in."""
    activation: CrossLayerActivation = "relu"
    """Activation function."""
    skip: bool = False
    """Adds x_j @ W_skip[j] to the output of layer j."""
    model: str | None = None
    """Name of the language model it was trained on."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of its files, unchanged."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "hooks", "hooks_out"):
            if isinstance(getattr(self, name), list):
                self._replace(**{name: tuple(getattr(self, name))})
        self._replace(
            d_out=self.d_in if self.d_out is None else self.d_out,
            hooks_out=self.hooks if self.hooks_out is None else self.hooks_out,
            metadata=dict(self.metadata),
        )
        self._check_counts("d_in", "d_out")
        counts = isinstance(self.d_sae, tuple) and len(self.d_sae) > 0
        counts = counts and all(type(width) is int and width > 0 for width in self.d_sae)
        self._check(counts, "d_sae", "a positive integer for each layer")
        for name in ("hooks", "hooks_out"):
            hooks, want = getattr(self, name), f"{len(self.d_sae)} different names, one for each layer of d_sae"
            fits = isinstance(hooks, tuple) and all(isinstance(hook, str) for hook in hooks)
            self._check(fits and len(set(hooks)) == len(hooks) == len(self.d_sae), name, want)
        self._check_choice("activation", CrossLayerActivation)
        self._check(type(self.skip) is bool, "skip", "True or False")

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.d_sae)

    @property
    def is_transcoder(self) -> bool:
        """Whether its outputs predict other activations than its inputs; False for a crosscoder."""
        return self.d_out != self.d_in or self.hooks_out != self.hooks

    def tensor_shapes(self) -> dict[str, list[Shape]]:
        """Shapes of the tensors of this configuration, by name, one per layer."""
        n, d_in, d_out = self.n_layers, self.d_in, self.d_out
        shapes: dict[str, list[Shape]] = {
            "W_enc": [(d_in, width) for width in self.d_sae],
            "b_enc": [(width,) for width in self.d_sae],
            "W_dec": [(width, n - i, d_out) for i, width in enumerate(self.d_sae)],
            "b_dec": [(d_out,)] * n,
        }
        if self.activation == "jumprelu":
            shapes["threshold"] = [(width,) for width in self.d_sae]
        if self.skip:
            shapes["W_skip"] = [(d_in, d_out)] * n
        return shapes


@final
class CrossLayerTranscoder(SparseCoder):
    """A cross-layer transcoder or weakly causal crosscoder, all layers in one object for `saewb.attach`.

    Parameters, each a list with one tensor per layer i: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae,
    n_layers - i, d_out]` (`W_dec[i][:, t]` writes to layer i + t), `b_dec [d_out]` (of the layer written to), and where
    they apply `threshold [d_sae]`, `W_skip [d_in, d_out]`. They take no gradients; gradients pass through them.

    The matrices may be larger than memory: they stay as stored, memory-mapped if `load_sae` read them, and are cast to
    `dtype` (that of the biases) one at a time: a whole encoder matrix, and of the decoders only the rows of latents
    that are active somewhere in the batch (all rows where the latents carry gradients).

    Created by `from_tensors`, and by `saewb.load_sae` from a folder.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders; Ameisen et al. 2025,
        transformer-circuits.pub/2025/attribution-graphs/methods.html, section "Cross-layer transcoder".

    Example:
        >>> cfg = CrossLayerConfig(d_in=4, d_sae=(9, 7), hooks=("blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"),
        ...     hooks_out=("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"))
        >>> shapes = cfg.tensor_shapes()
        >>> clt = CrossLayerTranscoder.from_tensors(cfg, {n: [torch.ones(s) for s in of] for n, of in shapes.items()})
        >>> first, second = clt.encode([torch.ones(3, 4), torch.ones(3, 4)])
        >>> first.shape, second.shape, [y[0, 0].item() for y in clt.decode([first, second])]
        (torch.Size([3, 9]), torch.Size([3, 7]), [46.0, 81.0])
    """

    taps = ("acts_pre", "acts_post", "recons")

    W_enc: nn.ParameterList
    b_enc: nn.ParameterList
    W_dec: nn.ParameterList
    b_dec: nn.ParameterList

    def _set_weights(self, cfg: CrossLayerConfig, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        self.cfg = cfg
        for name in cfg.tensor_shapes():
            layers = [nn.Parameter(tensor.detach(), requires_grad=False) for tensor in tensors[name]]
            self.add_module(name, nn.ParameterList(layers))

    def tensors(self) -> dict[str, list[Tensor]]:
        """The weights by name, one per layer, not copied: the input of `from_tensors`."""
        return {name: list(getattr(self, name)) for name in self.cfg.tensor_shapes()}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation and outputs; matrices may be stored in another."""
        return self.b_dec[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters, where inputs must be."""
        return self.b_dec[0].device

    def encode_layer(
        self, x: Float[Tensor, "*batch d_in"], layer: int, latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latents of one layer: `activation(x @ W_enc[layer] + b_enc[layer])`.

        Args:
            x: activations of the model at `cfg.hooks[layer]`, in the model's units; cast to this object's dtype.
            layer: from 0, an index into `cfg.hooks`, which may differ from the layer number of the model.
            latents: subset to return: any index of the last axis.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); its return values replace them.

        Returns:
            `[..., d_sae[layer]]`, or exactly that indexed with `latents`.

        Raises:
            ValueError: if the last axis of `x` is not d_in, or if `tap` is given together with `latents`.
        """
        self._check_tap(latents, tap)
        self._check_input(x)
        columns = slice(None) if latents is None else self._subset(latents, self.cfg.d_sae[layer])
        W_enc, b_enc = self.W_enc[layer][:, columns].to(self.dtype), self.b_enc[layer][columns]
        threshold = self.threshold[layer][columns] if self.cfg.activation == "jumprelu" else None
        pre_acts = tapped(tap, "acts_pre", torch.tensordot(x.to(self.dtype), W_enc, 1) + b_enc)
        return tapped(tap, "acts_post", thresholded(pre_acts, threshold))

    def decode_layer(
        self,
        latents: Sequence[Float[Tensor, "..."]],
        layer: int,
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """Output of one layer from the latents of all layers up to it.

            sum over i <= layer of latents[i] @ W_dec[i][:, layer - i]  +  b_dec[layer]  (+ x @ W_skip[layer])

        Args:
            latents: of layers 0 to `layer` (more are ignored), each `[..., d_sae[i]]`.
            layer: the layer of the output.
            x: input of that layer; only used, and required, with a skip matrix.
            tap: called with ("recons", the sum without the skip); its return value replaces it.

        Returns:
            `[..., d_out]`.

        Raises:
            ValueError: if latents of an earlier layer, or a required `x`, are missing.
        """
        return self._decode(self._sources(latents[: layer + 1]), layer, x, tap)

    def encode(self, xs: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
        """`encode_layer` of every layer.

        Args:
            xs: activations of the model at each of `cfg.hooks`, `[..., d_in]`.

        Returns:
            For each layer `[..., d_sae[i]]`.
        """
        return [self.encode_layer(x, layer) for layer, x in enumerate(self._one_each(xs))]

    def decode(
        self, latents: Sequence[Float[Tensor, "..."]], xs: Sequence[Float[Tensor, "..."]] | None = None
    ) -> list[Tensor]:
        """`decode_layer` of every layer.

        Args:
            latents: of every layer.
            xs: the inputs of the latents; only used, and required, with a skip matrix.

        Returns:
            For each of `cfg.hooks_out` `[..., d_out]`.
        """
        sources = self._sources(self._one_each(latents, "latents"))
        xs = [None] * len(sources) if xs is None else self._one_each(xs)
        return [self._decode(sources, layer, x) for layer, x in enumerate(xs)]

    def encode_sparse(
        self, xs: Sequence[Float[Tensor, "..."]], masks: Sequence[Bool[Tensor, "..."] | None] | None = None
    ) -> list[SparseLatents]:
        """Active latents of `encode`, with the dense latents of one layer in memory at a time.

        Args:
            xs: activations of the model at each of `cfg.hooks`, `[..., d_in]`.
            masks: of each layer, the tokens to encode; None means all.
        """
        masks = [None] * self.cfg.n_layers if masks is None else masks
        layers = zip(self._one_each(xs), masks, range(self.cfg.n_layers), strict=True)
        acts = ((self.encode_layer(x, layer), mask) for x, mask, layer in layers)
        return [SparseLatents.from_dense(z if mask is None else torch.where(mask[..., None], z, 0)) for z, mask in acts]

    def _decode(self, sources: Sequence[LayerActs], layer: int, x: Tensor | None, tap: Tap | None = None) -> Tensor:
        if len(sources) <= layer:
            what = f"{self!r} got latents of {len(sources)} layers to decode layer {layer}."
            raise ValueError(explain(what, want=f"those of layers 0 to {layer}"))
        recons: Tensor = self.b_dec[layer]
        for i, source in enumerate(sources[: layer + 1]):
            recons = recons + source.decode(self.W_dec[i][:, layer - i], self.dtype)
        recons = tapped(tap, "recons", recons)
        if not self.cfg.skip:
            return recons
        if x is None:
            what = "decode of a cross-layer transcoder with a skip matrix needs its input."
            raise ValueError(explain(what, fix="clt.decode(latents, xs)"))
        self._check_input(x)
        return recons + x.to(self.dtype) @ self.W_skip[layer].to(self.dtype)

    def _sources(self, latents: Sequence[Tensor]) -> list[LayerActs]:
        for z, width in zip(latents, self.cfg.d_sae, strict=False):
            self._check_latents(z, width)
        return [LayerActs.of(z) for z in latents]

    def _one_each(self, tensors: Sequence[Tensor], role: str = "x") -> Sequence[Tensor]:
        has_text = isinstance(tensors, (list, tuple)) and any(isinstance(item, str) for item in tensors)
        if has_text or isinstance(tensors, str) or not hasattr(tensors, "__len__"):
            raise self._not_a_tensor(tensors, role, f"for each of its {self.cfg.n_layers} layers, in a list")
        if isinstance(tensors, Tensor) or len(tensors) != self.cfg.n_layers:
            got = f"one tensor {tuple(tensors.shape)}" if isinstance(tensors, Tensor) else f"{len(tensors)} tensors"
            raise ValueError(explain(f"{self!r} got {got}.", want=f"a list of {self.cfg.n_layers}, one for each layer"))
        return tensors

    @property
    def _kind(self) -> str:
        return self.cfg.activation

    def __repr__(self) -> str:
        cfg, widths = self.cfg, sorted(set(self.cfg.d_sae))
        each = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        parts = [self._kind, f"{cfg.n_layers} layers of {cfg.d_in} -> {each} latents -> {cfg.d_out}"]
        parts += ["skip"] * cfg.skip
        parts.append(f"{cfg.hooks[0]} to {cfg.hooks[-1]}")
        parts[-1] += f" => {cfg.hooks_out[0]} to {cfg.hooks_out[-1]}" * (cfg.hooks_out != cfg.hooks)
        return self._named(parts)


@dataclass(frozen=True, eq=False)
class LayerActs:
    """Dense activations of one layer, and which latents are active on any token: only their decoder rows are read.

    Not SparseLatents: they carry gradients, and decoding is one dense product over the active latents.
    """

    acts: Float[Tensor, "..."]
    """Activations, `[..., d_sae]`."""
    active: Tensor | None
    """Indices of the latents that are active on any token; None means all."""

    @classmethod
    def of(cls, acts: Tensor) -> LayerActs:
        """Find the active latents; all where gradients are recorded, since an inactive latent has one too."""
        if acts.requires_grad and torch.is_grad_enabled():
            return cls(acts, None)
        return cls(acts, (acts.reshape(-1, acts.shape[-1]) != 0).any(0).nonzero()[:, 0])

    def decode(self, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
        """`acts @ W_dec` in this dtype."""
        if self.active is None:
            return self.acts.to(dtype) @ W_dec.to(dtype)
        return self.acts[..., self.active].to(dtype) @ W_dec[self.active].to(dtype)
