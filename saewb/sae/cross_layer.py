"""Cross-layer transcoders and weakly causal crosscoders: latents that read at one layer and write at it and later ones.

    z_i  = activation(x_i @ W_enc[i] + b_enc[i])                                          at each layer i
    y_j  = sum over i <= j of z_i @ W_dec[i][:, j - i]  +  b_dec[j]  (+ x_j @ W_skip[j])

x_i is what the model has at `hooks[i]`, y_j stands for what it has at `hooks_out[j]`. A crosscoder is the same with
`hooks_out` being `hooks`: its latents describe the residual stream from their layer on. Because a layer never writes
to an earlier one, y_j is known as soon as layer j has been read, so both can be attached to a model that is running.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import FormatError, explain
from saewb.sae.activation_functions import Latents, Tap, tapped, threshold_gate
from saewb.sae.base import check_fit, fitting, not_a_tensor
from saewb.sae.config import checker

CrossLayerActivation = Literal["relu", "jumprelu"]

_check = checker("CrossLayerConfig")


@dataclass(frozen=True)
class CrossLayerConfig:
    """What a cross-layer transcoder is, without its weights. Wrong or unknown fields raise."""

    d_in: int  # width of what every layer reads
    d_sae: tuple[int, ...]  # number of latents of each layer, first to last
    hooks: tuple[str, ...]  # the points of the model it reads, one for each layer, in the order the model computes them
    hooks_out: tuple[str, ...] | None = None  # the points it writes; None means `hooks` (a crosscoder)
    d_out: int | None = None  # width of what every layer writes; None means d_in
    activation: CrossLayerActivation = "relu"  # which latents survive
    skip: bool = False  # adds x_j @ W_skip[j] to the output of layer j
    model: str | None = None  # name of the language model it was trained on
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever else its files say, kept as read

    def __post_init__(self) -> None:
        for name in ("d_sae", "hooks", "hooks_out"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "d_out", self.d_in if self.d_out is None else self.d_out)
        object.__setattr__(self, "hooks_out", self.hooks if self.hooks_out is None else self.hooks_out)
        object.__setattr__(self, "metadata", dict(self.metadata))
        for name in ("d_in", "d_out"):
            _check(_count(getattr(self, name)), name, getattr(self, name), "a positive integer")
        counts = isinstance(self.d_sae, tuple) and len(self.d_sae) > 0 and all(map(_count, self.d_sae))
        _check(counts, "d_sae", self.d_sae, "a positive integer for each layer")
        for name in ("hooks", "hooks_out"):
            got, want = getattr(self, name), f"{len(self.d_sae)} different names, one for each layer of d_sae"
            fits = isinstance(got, tuple) and all(isinstance(hook, str) for hook in got)
            _check(fits and len(set(got)) == len(got) == len(self.d_sae), name, got, want)
        _check(self.activation in get_args(CrossLayerActivation), "activation", self.activation, "'relu' or 'jumprelu'")
        _check(type(self.skip) is bool, "skip", self.skip, "True or False")

    @property
    def n_layers(self) -> int:
        """How many layers it reads, and writes."""
        return len(self.d_sae)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts something else than what it reads; False for a crosscoder."""
        return self.d_out != self.d_in or self.hooks_out != self.hooks


def _count(n: object) -> bool:
    return type(n) is int and n > 0


def cross_layer_shapes(cfg: CrossLayerConfig) -> dict[str, list[tuple[int, ...]]]:
    """The tensors of this configuration: by name, the shape of each layer's."""
    n, d_in, d_out = cfg.n_layers, cfg.d_in, cfg.d_out
    shapes: dict[str, list[tuple[int, ...]]] = {
        "W_enc": [(d_in, width) for width in cfg.d_sae],
        "b_enc": [(width,) for width in cfg.d_sae],
        "W_dec": [(width, n - i, d_out) for i, width in enumerate(cfg.d_sae)],
        "b_dec": [(d_out,)] * n,
    }
    if cfg.activation == "jumprelu":
        shapes["threshold"] = [(width,) for width in cfg.d_sae]
    if cfg.skip:
        shapes["W_skip"] = [(d_in, d_out)] * n
    return shapes


@final
class CrossLayerTranscoder(nn.Module):
    """All layers of a cross-layer transcoder or a weakly causal crosscoder, as one object for `saewb.attach`.

    Parameters, each a list with one tensor per layer i: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae,
    n_layers - i, d_out]` (`W_dec[i][:, t]` writes to layer i + t), `b_dec [d_out]` (of the layer written to), and where
    they apply `threshold [d_sae]`, `W_skip [d_in, d_out]`. They take no gradients; gradients pass through them.

    The matrices may be larger than memory: they stay as they are stored, memory-mapped if `load_sae` read them, and are
    cast to `dtype` (that of the biases) one at a time: a whole encoder matrix, and of the decoders only the rows of
    latents that are active somewhere in the batch (all rows where the latents carry gradients).

    Made by `from_tensors`, and by `saewb.load_sae` from a folder that holds one.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders; Ameisen et al. 2025,
        transformer-circuits.pub/2025/attribution-graphs/methods.html, section "Cross-layer transcoder".

    Example:
        >>> cfg = CrossLayerConfig(d_in=4, d_sae=(9, 7), hooks=("blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"),
        ...     hooks_out=("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"))
        >>> shapes = cross_layer_shapes(cfg)
        >>> clt = CrossLayerTranscoder.from_tensors(cfg, {n: [torch.ones(s) for s in of] for n, of in shapes.items()})
        >>> first, second = clt.encode([torch.ones(3, 4), torch.ones(3, 4)])
        >>> first.shape, second.shape, [y[0, 0].item() for y in clt.decode([first, second])]
        (torch.Size([3, 9]), torch.Size([3, 7]), [46.0, 81.0])
    """

    taps = ("acts_pre", "acts_post", "recons")  # the values `encode_layer` and `decode_layer` hand to `tap`

    W_enc: nn.ParameterList
    b_enc: nn.ParameterList
    W_dec: nn.ParameterList
    b_dec: nn.ParameterList

    def __init__(self, cfg: CrossLayerConfig, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.cfg = cfg
        for name in cross_layer_shapes(cfg):
            of_layers = [nn.Parameter(tensor.detach(), requires_grad=False) for tensor in tensors[name]]
            self.add_module(name, nn.ParameterList(of_layers))

    @classmethod
    def from_tensors(cls, cfg: CrossLayerConfig, tensors: Mapping[str, Sequence[Tensor]]) -> CrossLayerTranscoder:
        """One around these very tensors: no copy, every one accounted for.

        Args:
            cfg: what they are the weights of.
            tensors: by the names of this class a tensor for each layer; exactly those that `cfg` calls for.

        Raises:
            FormatError: if one is missing, left over, or of another shape than `cfg` says.
        """
        want = cross_layer_shapes(cfg)
        if set(tensors) != set(want):
            missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - set(want))
            what = f"weights do not fit {cfg.activation!r}: missing {missing}, left over {extra}."
            raise FormatError(explain(what, want=", ".join(want)))
        for name, shapes in want.items():
            got = [tuple(tensor.shape) for tensor in tensors[name]]
            if got != shapes:
                raise FormatError(explain(f"the layers of {name} have shapes {got}.", want=str(shapes)))
        return cls(cfg, tensors)

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes, and of what comes out. Matrices may be stored in another."""
        return self.b_dec[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters; inputs must be there."""
        return self.b_dec[0].device

    def encode_layer(
        self, x: Float[Tensor, "*batch d_in"], layer: int, latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latents of one layer: `activation(x @ W_enc[layer] + b_enc[layer])`.

        Args:
            x: what the model has at `cfg.hooks[layer]`, in its own units; cast to this object's dtype.
            layer: from 0, an index into `cfg.hooks`, which need not be the model's number of the layer.
            latents: only these: anything that may index the last axis.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); what it returns is used on.

        Returns:
            `[..., d_sae[layer]]`, or exactly that indexed with `latents`.

        Raises:
            ValueError: if the last axis of `x` is not d_in, or if `tap` is given together with `latents`.
        """
        if tap is not None and latents is not None:
            what = "encode_layer got both latents= and tap=."
            raise ValueError(explain(what, want="one of them; a tap sees all latents"))
        x, chosen = fitting(self, x, self.cfg.d_in), slice(None) if latents is None else latents
        pre = torch.tensordot(x, self.W_enc[layer][:, chosen].to(self.dtype), 1) + self.b_enc[layer][chosen]
        threshold = self.threshold[layer][chosen] if self.cfg.activation == "jumprelu" else None
        return tapped(tap, "acts_post", threshold_gate(tapped(tap, "acts_pre", pre), threshold))

    def decode_layer(
        self,
        latents: Sequence[Float[Tensor, "..."]],
        layer: int,
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """What all layers up to this one write here.

            sum over i <= layer of latents[i] @ W_dec[i][:, layer - i]  +  b_dec[layer]  (+ x @ W_skip[layer])

        Args:
            latents: of layers 0 to `layer` (more are ignored), each `[..., d_sae[i]]`.
            layer: the one written to.
            x: what that layer read; needed, and only used, with a skip matrix.
            tap: called with ("recons", the sum without the skip); what it returns is used on.

        Returns:
            `[..., d_out]`.

        Raises:
            ValueError: if latents of an earlier layer, or `x`, are needed and missing.
        """
        return self._decoded(self._sources(latents[: layer + 1]), layer, x, tap)

    def encode(self, xs: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
        """`encode_layer` of every layer.

        Args:
            xs: what the model has at each of `cfg.hooks`, `[..., d_in]`.

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
            xs: what they came from; needed, and only used, with a skip matrix.

        Returns:
            For each of `cfg.hooks_out` `[..., d_out]`.
        """
        sources = self._sources(self._one_each(latents, "latents"))
        given = [None] * len(sources) if xs is None else self._one_each(xs)
        return [self._decoded(sources, layer, x) for layer, x in enumerate(given)]

    def forward(self, xs: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
        """`decode(encode(xs), xs)`."""
        return self.decode(self.encode(xs), xs)

    def _decoded(self, sources: Sequence[Active], layer: int, x: Tensor | None, tap: Tap | None = None) -> Tensor:
        if len(sources) <= layer:
            what = f"{self!r} got latents of {len(sources)} layers to decode layer {layer}."
            raise ValueError(explain(what, want=f"those of layers 0 to {layer}"))
        recon: Tensor = self.b_dec[layer]
        for i, source in enumerate(sources[: layer + 1]):
            recon = recon + source.written_by(self.W_dec[i][:, layer - i], self.dtype)
        recon = tapped(tap, "recons", recon)
        if not self.cfg.skip:
            return recon
        if x is None:
            what = "decode of a cross-layer transcoder with a skip matrix needs its input."
            raise ValueError(explain(what, fix="clt.decode(latents, xs)"))
        return recon + fitting(self, x, self.cfg.d_in) @ self.W_skip[layer].to(self.dtype)

    def _sources(self, latents: Sequence[Tensor]) -> list[Active]:
        for z, width in zip(latents, self.cfg.d_sae, strict=False):
            check_fit(self, z, width, "latents")
        return [active(z) for z in latents]

    def _one_each(self, given: Sequence[Tensor], role: str = "x") -> Sequence[Tensor]:
        texts = isinstance(given, (list, tuple)) and any(isinstance(one, str) for one in given)
        if texts or isinstance(given, str) or not hasattr(given, "__len__"):
            raise not_a_tensor(self, given, role, f"for each of its {self.cfg.n_layers} layers, in a list")
        if isinstance(given, Tensor) or len(given) != self.cfg.n_layers:
            got = f"one tensor {tuple(given.shape)}" if isinstance(given, Tensor) else f"{len(given)} tensors"
            raise ValueError(explain(f"{self!r} got {got}.", want=f"a list of {self.cfg.n_layers}, one for each layer"))
        return given

    def __repr__(self) -> str:
        cfg, widths = self.cfg, sorted(set(self.cfg.d_sae))
        each = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        facts = [cfg.activation, f"{cfg.n_layers} layers of {cfg.d_in} -> {each} latents -> {cfg.d_out}"]
        facts += ["skip"] * cfg.skip
        facts.append(f"{cfg.hooks[0]} to {cfg.hooks[-1]}")
        facts[-1] += f" => {cfg.hooks_out[0]} to {cfg.hooks_out[-1]}" * (cfg.hooks_out != cfg.hooks)
        facts += [cfg.model] if cfg.model else []
        facts.append(f"{str(self.dtype).removeprefix('torch.')} on {self.device}")
        return f"CrossLayerTranscoder({', '.join(facts)})"


@dataclass(frozen=True, eq=False)
class Active:
    """Latents of one layer, with which of them are active anywhere: only those rows of a decoder are read."""

    latents: Float[Tensor, "..."]  # [..., d_sae]
    rows: Tensor | None  # of the active ones; None means all

    def written_by(self, decoder: Tensor, dtype: torch.dtype) -> Tensor:
        """`latents @ decoder` in this dtype."""
        if self.rows is None:
            return self.latents.to(dtype) @ decoder.to(dtype)
        return self.latents[..., self.rows].to(dtype) @ decoder[self.rows].to(dtype)


def active(latents: Tensor) -> Active:
    """Latents with their active rows; all rows where gradients are wanted, since an inactive latent has one too."""
    if latents.requires_grad and torch.is_grad_enabled():
        return Active(latents, None)
    return Active(latents, (latents.reshape(-1, latents.shape[-1]) != 0).any(0).nonzero()[:, 0])
