"""The base class of all SAE architectures."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import wraps
from typing import Any, ClassVar, Union

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import as_tensor, index_of, index_slice
from saewb.errors import FormatError, explain
from saewb.kernels.select import ApproximateTopK
from saewb.sae.activation_functions import Latents, Tap, denormalized, normalized
from saewb.sae.config import CoderConfig
from saewb.sae.sparse import SparseLatents

_TILE = 2**23  # latents computed at a time (32 MiB in float32), unless one row of tokens has more


def _without_autocast(method: Any) -> Any:
    @wraps(method)
    def in_own_dtype(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return in_own_dtype


class SparseCoder(nn.Module, ABC):
    """Base class of SAEs of all architectures: a configuration, an encoder into sparse latents, a decoder.

    `isinstance(x, SparseCoder)` tests whether an object is an SAE. Subclasses are final.

    Example:
        >>> import saewb
        >>> sae = saewb.load_sae("tiny")
        >>> isinstance(sae, SparseCoder), sae.d_in, sae.d_sae, sae.d_out, sae.dtype
        (True, 128, 1024, 128, torch.float32)
    """

    taps: ClassVar[tuple[str, ...]]
    """Names of the values that `encode` and `decode` pass to `tap`, in this order."""
    looks_back: ClassVar[bool] = False
    """Whether the latents of a token depend on the tokens before it."""

    cfg: CoderConfig
    """Configuration of the weights."""
    W_dec: nn.Parameter
    """Decoder directions, one row per latent."""
    b_dec: nn.Parameter
    """Decoder bias."""

    def __init_subclass__(cls) -> None:
        """Encoding and decoding are in the SAE's own dtype, also inside of `torch.autocast`, which is the model's."""
        for name in (
            "encode",
            "encode_topk",
            "encode_layer",
            "decode",
            "decode_layer",
            "_encode_tokens",
            "_approximation",
        ):
            if name in cls.__dict__:
                setattr(cls, name, _without_autocast(cls.__dict__[name]))

    @classmethod
    def from_tensors(
        cls, cfg: CoderConfig, tensors: Mapping[str, Union[Tensor, Sequence[Tensor]]]
    ) -> Any:  # of the class it is called on
        """Build an SAE from its weights, without copying them.

        Args:
            cfg: configuration of the weights.
            tensors: by parameter name, exactly those of `cfg.tensor_shapes()`; a list with one per layer where the SAE
                has several layers.

        Raises:
            FormatError: if a tensor is missing, left over, or of another shape than in `cfg`.

        Example:
            >>> import saewb
            >>> a = saewb.SAE(saewb.SAEConfig(d_in=2, d_sae=4))
            >>> saewb.SAE.from_tensors(a.cfg, a.state_dict())
            SAE(relu, 2 -> 4 latents, float32 on cpu)
        """
        shapes = cfg.tensor_shapes()
        if set(tensors) != set(shapes):
            missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
            what = f"weights do not fit {cfg!r}: missing {missing}, left over {extra}."
            raise FormatError(explain(what, want=", ".join(shapes)))
        for name, shape in shapes.items():
            if isinstance(shape, list):
                got = [tuple(tensor.shape) for tensor in tensors[name]]
                what = f"the layers of {name} have shapes {got}."
            else:
                got = tuple(tensors[name].shape)
                what = f"{name} has shape {got}."
            if got != shape:
                raise FormatError(explain(what, want=f"{shape} for d_in={cfg.d_in}, d_sae={cfg.d_sae}"))
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae._set_weights(cfg, tensors)
        return sae

    def _set_weights(self, cfg: CoderConfig, tensors: Mapping[str, Tensor]) -> None:
        self.cfg = cfg
        for name in cfg.tensor_shapes():
            # Written past `register_parameter`, which refuses a name that is also a property of the class (`b_pre`).
            self._parameters[name] = nn.Parameter(
                tensors[name].detach(), requires_grad=tensors[name].is_floating_point()
            )

    def tensors(self) -> dict[str, Any]:
        """The weights by name, not copied: the input of `from_tensors`."""
        return dict(self.named_parameters())

    def with_config(self, **changes: Any) -> Any:  # of the same class
        """An SAE with the same weights, not copied, and other fields of the configuration: hooks, model or metadata.

        Args:
            changes: fields of the configuration and their new values.

        Raises:
            TypeError: for a field that the configuration does not have.

        Example:
            >>> import saewb
            >>> saewb.SAE(saewb.SAEConfig(2, 4)).with_config(model="tiny")
            SAE(relu, 2 -> 4 latents, tiny, float32 on cpu)
        """
        names = [f.name for f in fields(self.cfg)]
        if unknown := sorted(set(changes) - set(names)):
            raise TypeError(
                explain(f"{type(self.cfg).__name__} has no field {unknown}.", want=", ".join(sorted(names)))
            )
        return self.from_tensors(replace(self.cfg, **changes), self.tensors())

    # -- sizes and description -----------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.cfg.d_sae

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.cfg.d_out

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and outputs; inputs are cast to it."""
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters, where inputs must be."""
        return self.b_dec.device

    @property
    @abstractmethod
    def _kind(self) -> str:
        """Name of the architecture for the repr."""

    def __repr__(self) -> str:
        cfg, normalization = self.cfg, getattr(self.cfg, "normalization", "none")
        parts = [self._kind, f"{cfg.d_in} -> {cfg.d_sae} latents" + (f" -> {cfg.d_out}" if cfg.is_transcoder else "")]
        parts += ["skip"] if getattr(cfg, "skip", False) else []
        parts += [normalization] if normalization != "none" else []
        parts += [f"head {cfg.head}"] if cfg.head is not None else []
        if cfg.hook is not None:
            parts.append(cfg.hook if cfg.hook_out in (None, cfg.hook) else f"{cfg.hook} => {cfg.hook_out}")
        return self._named(parts)

    def _named(self, parts: list[str]) -> str:
        parts = [*parts, self.cfg.model] if self.cfg.model else parts
        return f"{type(self).__name__}({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    # -- encoding and decoding -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations `[..., d_sae]`, in the units of the (normalized) input.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: only these: anything that may index the last axis.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); its return values replace them.
        """

    @abstractmethod
    def decode(
        self,
        latents: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """The reconstruction `[..., d_out]` in the model's units.

        Args:
            latents: activations, `[..., d_sae]`.
            x: the input they came from, where the output depends on it beyond the latents.
            tap: called with ("recons", the reconstruction before normalization is undone); its return value is used.
        """

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "..."]:
        """`decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    def encode_sparse(
        self, x: Float[Tensor, "*batch d_in"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> SparseLatents:
        """Active latents of `encode(x)`, in memory proportional to their number; no gradients.

        Args:
            x: activations of the model, as for `encode`.
            mask: tokens to encode; latents of others are left out. None means all.

        Example:
            >>> import saewb
            >>> sae = saewb.load_sae("tiny")
            >>> x = torch.randn(2, 3, sae.d_in, generator=torch.Generator().manual_seed(0))
            >>> torch.allclose(sae.encode_sparse(x).dense(), sae.encode(x), atol=1e-5)
            True
        """
        rows = x if x.ndim > 1 else x[None]
        tiles = [latents for _, latents in SparseEncoder(self).tiles(rows, mask)]
        return SparseLatents.cat(tiles or [SparseLatents.from_dense(rows.new_zeros(0, self.d_sae))]).view(*x.shape[:-1])

    def normalize_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Activations of the model in this SAE's dtype, normalized per token by `cfg.normalization`."""
        self._check_input(x)
        return normalized(x.to(self.dtype), self.cfg.normalization)

    def denormalize(
        self, recons: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """Undo `normalize_input` on a reconstruction: return it in the units of the input `x`."""
        if self.cfg.normalization == "none":
            return recons
        return denormalized(recons, self._decoder_input(x), self.cfg.normalization)

    def _decoder_input(self, x: Tensor | None) -> Tensor:
        """The input that decoding depends on, in this SAE's dtype; ValueError if it is missing."""
        if x is None:
            parts = [f"normalization={self.cfg.normalization!r}"]
            parts += [f"skip={self.cfg.skip}"] if hasattr(self.cfg, "skip") else []
            what = f"decode of an SAE with {', '.join(parts)} needs its input."
            raise ValueError(explain(what, fix="sae.decode(latents, x)"))
        self._check_input(x)
        return x.to(self.dtype)

    # -- sparse encoding: overridden where an architecture has something faster than dense encoding --------------------

    def _approximation(self, x: Float[Tensor, "tokens d_in"]) -> ApproximateTopK | None:
        """A low-precision copy of the encoder for inputs like these; None where it would not be faster."""
        return None

    def _encode_tokens(
        self, x: Float[Tensor, "tokens d_in"], approximate: ApproximateTopK | None
    ) -> SparseLatents | None:
        """Active latents of tokens without all pre-activations in memory; None where that would not be faster."""
        return None

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_tap(self, latents: Latents | None, tap: Tap | None) -> None:
        if tap is not None and latents is not None:
            raise ValueError(explain("encode got both latents= and tap=.", want="one of them; a tap sees all latents"))

    def _check_input(self, x: object) -> None:
        """Check that these are activations `[..., d_in]`; raise a TypeError or ValueError with a fix otherwise."""
        want = f"[..., d_in={self.cfg.d_in}]"
        if not isinstance(x, Tensor):
            raise self._not_a_tensor(x, "x", want)
        if x.shape[-1:] == (self.cfg.d_in,):
            return
        fix = ""
        if not x.is_floating_point() and x.ndim < 3:  # probably token ids
            want, fix = f"activations of a model, {want}", "saewb.read_prompt(model, tokens, sae)"
        raise ValueError(explain(f"{self!r} got x of shape {tuple(x.shape)}.", want=want, fix=fix))

    def _subset(self, latents: Latents | None, d_sae: int) -> int | slice | Tensor | None:
        """The argument `latents` of `encode`, of any library, as an index of PyTorch; a tensor stays on its device."""
        if latents is None or isinstance(latents, Tensor):
            return latents
        if isinstance(latents, slice):
            return index_slice(latents, "latents")
        if isinstance(latents, int) or getattr(latents, "ndim", None) == 0:
            return index_of(latents, "latent", d_sae, from_end=True, of=self)
        return as_tensor(latents, "latents").to(self.device)

    def _check_latents(self, latents: object, d_sae: int) -> None:
        """Check that these are latents `[..., d_sae]`; raise a TypeError or ValueError with a fix otherwise."""
        want = f"[..., d_sae={d_sae}]"
        if not isinstance(latents, Tensor):
            raise self._not_a_tensor(latents, "latents", want)
        if latents.shape[-1:] == (d_sae,):
            return
        fix = "sae.decode(sae.encode(x), x)" if latents.shape[-1:] == (self.cfg.d_in,) else ""
        raise ValueError(explain(f"{self!r} got latents of shape {tuple(latents.shape)}.", want=want, fix=fix))

    def _not_a_tensor(self, value: object, role: str, want: str) -> TypeError:
        """The error for a text, a list or an array in place of a tensor."""
        verb = "encode" if role == "x" else "decode"
        got, fix = f"a {type(value).__name__} for {role}", ""
        if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
            text = value if isinstance(value, str) else value[0]
            got = f"the text {reprlib.repr(text)}"
            argument = repr(text) if len(text) <= 40 else "text"
            fix = f"saewb.read_prompt(model, {argument}, sae)"
        elif isinstance(value, (list, tuple)):
            function = "stack" if value and isinstance(value[0], Tensor) else "tensor"
            fix = f"sae.{verb}(torch.{function}({role}))"
        elif type(value).__module__ == "numpy":
            fix = f"sae.{verb}(torch.from_numpy({role}))"
        what = "activations of a model" if role == "x" else "latents, as sae.encode(x) gives them"
        return TypeError(explain(f"{self!r} got {got}.", want=f"{what}: a torch.Tensor {want}", fix=fix))


class SparseEncoder:
    """Encoder of many batches into sparse latents with one SAE.

    On a CPU with bf16 instructions a product in bf16 selects candidates, which are computed in float32
    (`saewb.kernels.select`); this holds one and a half times W_enc from the first tokens on. The SAE's weights must not
    change while the encoder is in use.

    Example:
        >>> import saewb
        >>> sae = saewb.load_sae("tiny")
        >>> x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
        >>> [(rows, latents)] = SparseEncoder(sae).tiles(x)
        >>> torch.allclose(latents.dense(), sae.encode(x), atol=1e-5)
        True
    """

    def __init__(self, sae: SparseCoder) -> None:
        self.sae = sae
        self._prepared = False
        self._approximate: ApproximateTopK | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now in addition to the SAE."""
        return 0 if self._approximate is None else self._approximate.nbytes

    @torch.no_grad()
    def tiles(
        self, x: Float[Tensor, "*rows d_in"], mask: Bool[Tensor, "*rows"] | None = None
    ) -> Iterator[tuple[slice, SparseLatents]]:
        """Encode consecutive rows tile by tile into active latents, where `sae.encode(x)` is not 0.

        One tile of all rows, computed in blocks of 32 MiB of latents, for a top-k activation and for a threshold that
        few latents exceed; else as many rows per tile as have 32 MiB of latents, at least one.

        Args:
            x: activations of the model; for a temporal SAE the middle axis is time.
            mask: tokens to encode; latents of others are left out. None means all.

        Returns:
            For each tile its rows and their latents, of shape `(rows, *ctx, d_sae)`.
        """
        self.sae._check_input(x)
        rows, d_sae = x.flatten(0, -2), self.sae.d_sae
        token = None if mask is None else mask.flatten().nonzero()[:, 0]
        rows = rows if token is None or len(token) == len(rows) else rows[token]
        check_finite(f"activations that {self.sae!r} reads", rows)
        if not self._prepared and len(rows):
            self._approximate, self._prepared = self.sae._approximation(rows), True
        latents = self.sae._encode_tokens(rows, self._approximate)
        if latents is not None:
            if token is not None and len(token) < mask.numel():
                latents = SparseLatents(token[latents.token], latents.latent, latents.act, (mask.numel(), d_sae))
            yield slice(0, len(x)), latents.view(*x.shape[:-1])
            return
        size = max(1, _TILE // max(1, x[:1].numel() // x.shape[-1] * d_sae))
        for begin in range(0, len(x), size):
            part = slice(begin, begin + size)
            acts = self.sae.encode(x[part])
            yield part, SparseLatents.from_dense(acts if mask is None else torch.where(mask[part][..., None], acts, 0))
