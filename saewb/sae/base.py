"""The base class of all SAE architectures."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Union

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saewb.errors import FormatError, explain
from saewb.kernels.select import ApproximateTopK
from saewb.sae.activation_functions import Latents, Tap, denormalized, normalized
from saewb.sae.config import CoderConfig
from saewb.sae.sparse import SparseLatents

_TILE = 2**23  # latents computed at a time, unless one row of tokens has more (32 MiB in float32)


class SparseCoder(nn.Module, ABC):
    """What SAEs of all architectures have in common: a configuration, an encoder into sparse latents, a decoder.

    `isinstance(x, SparseCoder)` says whether something is an SAE. Subclasses are final.

    Example:
        >>> import saewb
        >>> sae = saewb.load_sae("tiny")
        >>> isinstance(sae, SparseCoder), sae.d_in, sae.d_sae, sae.d_out, sae.dtype
        (True, 128, 1024, 128, torch.float32)
    """

    taps: ClassVar[tuple[str, ...]]
    """The values `encode` and `decode` hand to `tap`, in this order."""
    looks_back: ClassVar[bool] = False
    """Whether the latents of a token depend on the tokens before it."""

    cfg: CoderConfig
    """What the weights are of."""
    W_dec: nn.Parameter
    """Decoder directions, a row for each latent."""
    b_dec: nn.Parameter
    """Decoder bias."""

    @classmethod
    def from_tensors(
        cls, cfg: CoderConfig, tensors: Mapping[str, Union[Tensor, Sequence[Tensor]]]
    ) -> Any:  # of the class it is called on
        """An SAE around these very tensors: no copy, every one accounted for.

        Args:
            cfg: what they are the weights of.
            tensors: by the names of this class, exactly those that `cfg` calls for; a list of one per layer for
                several layers.

        Raises:
            FormatError: if one is missing, left over, or of another shape than `cfg` says.

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
        """The weights by name, shared, as `from_tensors` takes them."""
        return dict(self.named_parameters())

    def with_config(self, **changes: Any) -> Any:  # of the same class
        """The same weights, shared, under a configuration with other hooks, model or metadata.

        Args:
            changes: fields of its configuration and their new values.

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

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.cfg.d_sae

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.cfg.d_out

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of what comes out; inputs are cast to it."""
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters; inputs must be there."""
        return self.b_dec.device

    @property
    @abstractmethod
    def _kind(self) -> str:
        """What to call the architecture in one line."""

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

    # -- what it does --------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations `[..., d_sae]`, in the units of the (normalized) input.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: only these: anything that may index the last axis.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); what it returns is used on.
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
            tap: called with ("recons", the reconstruction before normalization is undone); what it returns is used on.
        """

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "..."]:
        """`decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    def encode_sparse(
        self, x: Float[Tensor, "*batch d_in"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> SparseLatents:
        """`encode(x)` without its zeros, in memory of what is active; no gradients.

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
        """Activations of the model in this SAE's dtype, normalized per token as `cfg.normalization` says."""
        self._check_input(x)
        return normalized(x.to(self.dtype), self.cfg.normalization)

    def denormalize(
        self, recons: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """A reconstruction back in the units of the input `x`: undoes `normalize_input`."""
        if self.cfg.normalization == "none":
            return recons
        return denormalized(recons, self._needed(x), self.cfg.normalization)

    def _needed(self, x: Tensor | None) -> Tensor:
        """The input that decoding depends on, in this SAE's dtype."""
        if x is None:
            parts = [f"normalization={self.cfg.normalization!r}"]
            parts += [f"skip={self.cfg.skip}"] if hasattr(self.cfg, "skip") else []
            what = f"decode of an SAE with {', '.join(parts)} needs its input."
            raise ValueError(explain(what, fix="sae.decode(latents, x)"))
        self._check_input(x)
        return x.to(self.dtype)

    # -- sparse encoding: what an architecture may do better than to encode densely ------------------------------------

    def _approximation(self, x: Float[Tensor, "tokens d_in"]) -> ApproximateTopK | None:
        """A low-precision copy of the encoder for inputs like these; None where there is no use for one."""
        return None

    def _encode_tokens(
        self, x: Float[Tensor, "tokens d_in"], approximate: ApproximateTopK | None
    ) -> SparseLatents | None:
        """Active latents of single tokens, without their pre-activations in memory; None if that does not pay."""
        return None

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_tap(self, latents: Latents | None, tap: Tap | None) -> None:
        if tap is not None and latents is not None:
            raise ValueError(explain("encode got both latents= and tap=.", want="one of them; a tap sees all latents"))

    def _check_input(self, x: object) -> None:
        """That these are activations `[..., d_in]`; else a TypeError or ValueError that says what to type."""
        want = f"[..., d_in={self.cfg.d_in}]"
        if not isinstance(x, Tensor):
            raise self._not_a_tensor(x, "x", want)
        if x.shape[-1:] == (self.cfg.d_in,):
            return
        fix = ""
        if not x.is_floating_point() and x.ndim < 3:  # token ids, it seems
            want, fix = f"activations of a model, {want}", "saewb.read_prompt(model, tokens, sae)"
        raise ValueError(explain(f"{self!r} got x of shape {tuple(x.shape)}.", want=want, fix=fix))

    def _check_latents(self, latents: object, d_sae: int) -> None:
        """That these are latents `[..., d_sae]`; else a TypeError or ValueError that says what to type."""
        want = f"[..., d_sae={d_sae}]"
        if not isinstance(latents, Tensor):
            raise self._not_a_tensor(latents, "latents", want)
        if latents.shape[-1:] == (d_sae,):
            return
        fix = "sae.decode(sae.encode(x), x)" if latents.shape[-1:] == (self.cfg.d_in,) else ""
        raise ValueError(explain(f"{self!r} got latents of shape {tuple(latents.shape)}.", want=want, fix=fix))

    def _not_a_tensor(self, value: object, role: str, want: str) -> TypeError:
        """The error for a text, a list or an array where a tensor goes."""
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
    """Encodes many batches with one SAE, without the zeros.

    On a CPU with bf16 instructions a product in bf16 says which latents may be active, and those are computed in
    float32 (`saewb.kernels.select`): for that it holds one and a half times W_enc from the first tokens on. The SAE's
    weights must not change while it is used.

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
        """What it holds now besides the SAE, in bytes."""
        return 0 if self._approximate is None else self._approximate.nbytes

    @torch.no_grad()
    def tiles(
        self, x: Float[Tensor, "*rows d_in"], mask: Bool[Tensor, "*rows"] | None = None
    ) -> Iterator[tuple[slice, SparseLatents]]:
        """Active latents of some rows, and of the next ones, until all are done: where `sae.encode(x)` is not 0.

        All rows at once, in tiles of 32 MiB of latents, for a top-k activation, and for a threshold that few latents
        are above; else as many rows at a time as have 32 MiB of latents, or one.

        Args:
            x: activations of the model; of a temporal SAE the middle axis is time.
            mask: tokens to encode; latents of others are left out. None means all.

        Returns:
            Of each tile its rows and their latents, of shape `(rows, *ctx, d_sae)`.
        """
        self.sae._check_input(x)
        rows, d_sae = x.flatten(0, -2), self.sae.d_sae
        token = None if mask is None else mask.flatten().nonzero()[:, 0]
        rows = rows if token is None or len(token) == len(rows) else rows[token]
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
