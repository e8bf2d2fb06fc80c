"""The sparse autoencoder: one class for every published feed-forward architecture.

    latents = gate((scale(x) - b_pre) @ W_enc + b_enc)
    recon   = unscale(latents @ W_dec + b_dec) (+ x @ W_skip)

The gate is a threshold per latent (ReLU, JumpReLU) or a top-k (by value or by magnitude). What else differs between
papers is a matter of reading a file (`saewb.formats`) or of training (`saewb.objectives`), not of another class here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Union, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.errors import FormatError, explain

Gate = Literal["relu", "jumprelu", "topk", "abstopk"]
Scaling = Literal["none", "layer_norm", "constant_norm"]
PreBias = Literal["none", "tied", "own"]
Latents = Union[int, slice, Sequence[int], Tensor]  # whatever may stand in `full[..., latents]`
Tap = Callable[[str, Tensor], Tensor]

# A top-k gate must see every latent of a token to know which ones to keep. It does so in row tiles of at most this
# many pre-activations (64 MiB in float32), so that asking for a few latents stays small.
_TILE = 2**24


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, without its weights. Wrong or unknown fields raise; nothing is shared or changed afterwards."""

    d_in: int  # width of what it reads
    d_sae: int  # number of latents
    gate: Gate = "relu"  # which latents survive
    k: int | None = None  # latents kept per token; for the two top-k gates, and only there
    d_out: int | None = None  # width of what it writes; None means d_in
    skip: bool = False  # adds x @ W_skip to the output (skip transcoders)
    pre_bias: PreBias = "none"  # subtracted before encoding: nothing, b_dec itself, or a b_pre of its own
    scaling: Scaling = "none"  # per token, undone on the output; a constant factor is folded into the weights instead
    hook: str | None = None  # the point of the model it reads
    hook_out: str | None = None  # the point it writes; None means `hook`; another one makes it a transcoder
    head: int | None = None  # reads and writes this attention head only; None means all
    model: str | None = None  # name of the language model it was trained on
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever else its file says, kept as read

    def __post_init__(self) -> None:
        if self.d_out is None:
            object.__setattr__(self, "d_out", self.d_in)
        object.__setattr__(self, "metadata", dict(self.metadata))
        for name in ("d_in", "d_sae", "d_out"):
            _check(
                isinstance(getattr(self, name), int) and getattr(self, name) > 0,
                name,
                getattr(self, name),
                "a positive integer",
            )
        for name, choices in (
            ("gate", get_args(Gate)),
            ("scaling", get_args(Scaling)),
            ("pre_bias", get_args(PreBias)),
        ):
            _check(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        if self.gate in ("topk", "abstopk"):
            _check(
                isinstance(self.k, int) and 0 < self.k <= self.d_sae,
                "k",
                self.k,
                f"1 to d_sae={self.d_sae} for gate {self.gate!r}",
            )
        else:
            _check(self.k is None, "k", self.k, f"None, since gate {self.gate!r} keeps no fixed number of latents")
        if self.d_out != self.d_in:
            _check(
                self.pre_bias != "tied",
                "pre_bias",
                self.pre_bias,
                f"'none' or 'own', since b_dec has d_out={self.d_out}, not d_in={self.d_in} numbers",
            )
        if self.is_transcoder:
            _check(
                self.scaling == "none",
                "scaling",
                self.scaling,
                "'none' for a transcoder, since the scale of its input says nothing about its output",
            )

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts something else than what it reads."""
        return self.d_out != self.d_in or self.hook_out not in (None, self.hook)


def _check(ok: bool, name: str, got: object, want: str) -> None:
    if not ok:
        raise ValueError(explain(f"SAEConfig got {name}={got!r}.", want=want, fix=f"SAEConfig(..., {name}=...)"))


@dataclass(frozen=True)
class TopLatents:
    """The latents a top-k gate kept, without the zeros: k values and k indices per token."""

    values: Float[Tensor, "tokens k"]  # activations, 0 where fewer than k were positive
    indices: Int[Tensor, "tokens k"]  # which latent each value belongs to
    shape: tuple[int, ...]  # of the dense tensor: leading axes of the input, then d_sae

    def dense(self) -> Tensor:
        """The same as one tensor `[..., d_sae]`."""
        flat = self.values.new_zeros(len(self.values), self.shape[-1])
        return flat.scatter_(1, self.indices, self.values).view(self.shape)


@final
class SAE(nn.Module):
    """A sparse autoencoder or transcoder.

    Parameters, where they apply: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_out]` (row i is the direction
    latent i writes), `b_dec [d_out]`, `b_pre [d_in]` (None, or `b_dec` itself when tied), `threshold [d_sae]`,
    `W_skip [d_in, d_out]`. All have one dtype and device; inputs are cast to that dtype.

    A new one has unit decoder rows in random directions, the encoder their transpose, and zero biases and thresholds.

    Args:
        cfg: what to build.
        seed: of the initial directions; the global random state is neither read nor changed.
        dtype: of the parameters.
        device: of the parameters.
    Source:
        Gates: Bricken et al. 2023 (ReLU); Rajamanoharan et al. 2024, arXiv:2407.14435 eq. 1 (JumpReLU); Gao et al.
        2024, arXiv:2406.04093 (TopK); arXiv:2510.00404 (AbsTopK). Transcoders: Dunefsky et al. 2024, arXiv:2406.11944.
    Example:
        >>> sae = SAE(SAEConfig(d_in=8, d_sae=32, gate="topk", k=3))
        >>> x = torch.ones(2, 5, 8)
        >>> sae.encode(x).shape, sae(x).shape, int((sae.encode(x) != 0).sum(-1).max())
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 8]), 3)
    """

    taps = ("acts_pre", "acts_post", "recons")  # the values `encode` and `decode` hand to `tap`, in this order

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self, cfg: SAEConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self._declare(cfg, _initial(cfg, seed, dtype, device))

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: Mapping[str, Tensor]) -> SAE:
        """An SAE around these very tensors: no copy, every one accounted for.

        Args:
            cfg: what they are the weights of.
            tensors: by the names of this class; exactly those that `cfg` calls for.
        Raises:
            FormatError: if one is missing, left over, or of another shape than `cfg` says.
        Example:
            >>> a = SAE(SAEConfig(d_in=2, d_sae=4))
            >>> SAE.from_tensors(a.cfg, a.state_dict())
            SAE(relu, 2 -> 4 latents, float32 on cpu)
        """
        want = tensor_shapes(cfg)
        if set(tensors) != set(want):
            missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - set(want))
            raise FormatError(
                explain(f"weights do not fit {cfg.gate!r}: missing {missing}, left over {extra}.", want=", ".join(want))
            )
        for name, shape in want.items():
            if tuple(tensors[name].shape) != shape:
                raise FormatError(
                    explain(
                        f"{name} has shape {tuple(tensors[name].shape)}.",
                        want=f"{shape} for d_in={cfg.d_in}, d_sae={cfg.d_sae}, d_out={cfg.d_out}",
                    )
                )
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae._declare(cfg, tensors)
        return sae

    def _declare(self, cfg: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
        self.cfg = cfg
        for name in tensor_shapes(cfg):
            # Written past `register_parameter`, which refuses a name that is also a property of the class (`b_pre`).
            self._parameters[name] = nn.Parameter(
                tensors[name].detach(), requires_grad=tensors[name].is_floating_point()
            )

    @property
    def b_pre(self) -> nn.Parameter | None:
        """What is subtracted from the (scaled) input before encoding: None, `b_dec` itself when tied, or its own."""
        return self.b_dec if self.cfg.pre_bias == "tied" else self._parameters.get("b_pre")

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None, tap: Tap | None = None
    ) -> Float[Tensor, "..."]:
        """Latent activations, in the units of the (scaled) input.

            gate((scale(x) - b_pre) @ W_enc + b_enc)

        ReLU keeps what is > 0, JumpReLU what is strictly > threshold (and > 0), TopK the k largest that are > 0, AbsTopK
        the k largest in magnitude, with their sign.

        Args:
            x: activations of the model, `[..., d_in]`, in the model's own units; cast to this SAE's dtype.
            latents: only these: anything that may index the last axis. ReLU and JumpReLU compute those columns only;
                a top-k gate must look at all latents of a token, and does so in tiles of 64 MiB.
            tap: called with ("acts_pre", pre-activations) and ("acts_post", latents); what it returns is used on.
        Returns:
            `[..., d_sae]`, or exactly `encode(x)[..., latents]`.
        Raises:
            ValueError: if the last axis of `x` is not d_in, or if `tap` is given together with `latents`.
        Example:
            >>> sae = SAE(SAEConfig(d_in=4, d_sae=9)); x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
            >>> torch.equal(sae.encode(x, latents=[7, 2]), sae.encode(x)[:, [7, 2]])
            True
        """
        if tap is not None and latents is not None:
            raise ValueError(explain("encode got both latents= and tap=.", want="one of them; a tap sees all latents"))
        h = self._centred(x)
        if latents is None:
            pre = h @ self.W_enc + self.b_enc
            return _tapped(tap, "acts_post", self._gate(_tapped(tap, "acts_pre", pre)))
        if self.cfg.k is not None:
            return self._topk_subset(h, latents)
        threshold = self.threshold[latents] if self.cfg.gate == "jumprelu" else None
        return _threshold_gate(h @ self.W_enc[:, latents] + self.b_enc[latents], threshold)

    def encode_topk(self, x: Float[Tensor, "*batch d_in"]) -> TopLatents:
        """What a top-k gate keeps, as k values and indices per token: `encode(x)` without its zeros.

        Raises:
            ValueError: if the gate is a threshold, which keeps no fixed number.
        """
        if self.cfg.k is None:
            raise ValueError(
                explain(
                    f"encode_topk on a {self.cfg.gate!r} SAE.", want="gate 'topk' or 'abstopk'", fix="sae.encode(x)"
                )
            )
        h = self._centred(x)
        pre = torch.addmm(self.b_enc, h.reshape(-1, h.shape[-1]), self.W_enc)
        values, indices = _top(pre, self.cfg.k, signed=self.cfg.gate == "abstopk")
        return TopLatents(values, indices, (*h.shape[:-1], self.cfg.d_sae))

    def decode(
        self,
        latents: Float[Tensor, "*batch d_sae"] | TopLatents,
        x: Float[Tensor, "*batch d_in"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Tensor, "..."]:
        """The reconstruction (or, for a transcoder, the prediction) in the model's units.

            unscale(latents @ W_dec + b_dec) (+ x @ W_skip)

        Args:
            latents: `[..., d_sae]`, or what `encode_topk` gave.
            x: the input they came from. Needed, and only used, where the output depends on it beyond the latents: with
                layer_norm or constant_norm scaling (to undo it) and with a skip matrix.
            tap: called with ("recons", latents @ W_dec + b_dec), before scaling is undone; what it returns is used on.
        Returns:
            `[..., d_out]`.
        Raises:
            ValueError: if `x` is needed and missing.
        """
        recon = _tapped(tap, "recons", self._decoded(latents))
        if self.cfg.scaling == "none" and not self.cfg.skip:
            return recon
        if x is None:
            raise ValueError(
                explain(
                    f"decode of an SAE with scaling={self.cfg.scaling!r}, skip={self.cfg.skip} needs its input.",
                    fix="sae.decode(latents, x)",
                )
            )
        x = self._fitting(x)
        recon = _unscaled(recon, x, self.cfg.scaling)
        return recon + x @ self.W_skip if self.cfg.skip else recon

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "..."]:
        """`decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def fold_decoder_norm(self) -> SAE:
        """The same function with unit decoder rows, so that an activation is a length in the model's units.

            n_i = ||W_dec[i]||:  W_dec[i] /= n_i,  W_enc[:, i] *= n_i,  b_enc[i] *= n_i,  threshold[i] *= n_i

        Rows of norm 0 stay as they are. A new SAE; this one is not changed.

        Raises:
            ValueError: for a top-k gate whose rows differ in norm: rescaling would change which latents are kept.
        """
        norm = self.W_dec.norm(dim=1)
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        if self.cfg.k is not None and not torch.allclose(norm, norm[:1].expand_as(norm), rtol=1e-4):
            raise ValueError(
                explain(
                    f"decoder norms from {norm.min():.3g} to {norm.max():.3g} cannot be folded into a {self.cfg.gate!r} SAE: the k kept latents would change.",
                    want="all rows of one norm, or gate 'relu' or 'jumprelu'",
                )
            )
        new = {"W_enc": self.W_enc * norm, "b_enc": self.b_enc * norm, "W_dec": self.W_dec / norm[:, None]}
        if self.cfg.gate == "jumprelu":
            new["threshold"] = self.threshold * norm
        return self._with(new)

    @torch.no_grad()
    def fold_scaling(self, factor: float, factor_out: float | None = None) -> SAE:
        """An SAE that was trained on `factor * x`, made to read `x` itself.

            W_enc *= factor;  W_dec, b_dec /= factor_out;  b_pre /= factor;  W_skip *= factor / factor_out

        Latents keep their values. A new SAE; this one is not changed.

        Args:
            factor: what its training inputs were multiplied with.
            factor_out: the same for a transcoder's targets; None means `factor`.
        Raises:
            ValueError: if a factor is not positive, if this SAE also scales per token, or if b_pre is tied to b_dec and the factors differ.
        """
        out = factor if factor_out is None else factor_out
        if not (factor > 0 and out > 0):
            raise ValueError(
                explain(f"fold_scaling got factor={factor}, factor_out={factor_out}.", want="positive numbers")
            )
        if self.cfg.scaling != "none" or (self.cfg.pre_bias == "tied" and out != factor):
            raise ValueError(
                explain(
                    f"a factor cannot be folded into {self!r} (scaling={self.cfg.scaling!r}, pre_bias={self.cfg.pre_bias!r}).",
                    want="scaling 'none', and one factor where b_pre is b_dec",
                )
            )
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

    def _fitting(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(explain(f"{self!r} got x of shape {tuple(x.shape)}.", want=f"[..., d_in={self.cfg.d_in}]"))
        return x.to(self.dtype)

    def _centred(self, x: Tensor) -> Tensor:
        h = _scaled(self._fitting(x), self.cfg.scaling)
        return h if self.b_pre is None else h - self.b_pre

    def _gate(self, pre: Tensor) -> Tensor:
        if self.cfg.k is None:
            return _threshold_gate(pre, self.threshold if self.cfg.gate == "jumprelu" else None)
        values, indices = _top(pre, self.cfg.k, signed=self.cfg.gate == "abstopk")
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def _topk_subset(self, h: Tensor, latents: Latents) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        tiles = rows.split(max(1, _TILE // self.cfg.d_sae))
        kept = torch.cat([self._gate(tile @ self.W_enc + self.b_enc)[:, latents] for tile in tiles])
        return kept.reshape(*h.shape[:-1], *kept.shape[1:])

    def _decoded(self, latents: Tensor | TopLatents) -> Tensor:
        if not isinstance(latents, TopLatents):
            return latents.to(self.dtype) @ self.W_dec + self.b_dec
        summed = nn.functional.embedding_bag(latents.indices, self.W_dec, per_sample_weights=latents.values, mode="sum")
        return (summed + self.b_dec).view(*latents.shape[:-1], self.cfg.d_out)

    def __repr__(self) -> str:
        return describe(self, self.cfg.gate if self.cfg.k is None else f"{self.cfg.gate} k={self.cfg.k}")


def tensor_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """The tensors an SAE of this configuration has, by name, with their shapes."""
    d_in, d_sae, d_out = cfg.d_in, cfg.d_sae, cfg.d_out
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if cfg.pre_bias == "own":
        shapes["b_pre"] = (d_in,)
    if cfg.gate == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if cfg.skip:
        shapes["W_skip"] = (d_in, d_out)
    return shapes


def describe(sae: nn.Module, kind: str) -> str:
    """One line on any of the SAE classes: what it is, its widths, where it reads and writes, dtype and device."""
    cfg = sae.cfg
    widths = f"{cfg.d_in} -> {cfg.d_sae} latents" + (f" -> {cfg.d_out}" if cfg.is_transcoder else "")
    place = cfg.hook if cfg.hook_out in (None, cfg.hook) else f"{cfg.hook} => {cfg.hook_out}"
    extras = [
        name
        for name, on in (
            ("skip", getattr(cfg, "skip", False)),
            (getattr(cfg, "scaling", "none"), getattr(cfg, "scaling", "none") != "none"),
            (f"head {cfg.head}", cfg.head is not None),
        )
        if on
    ]
    where = f"{str(sae.dtype).removeprefix('torch.')} on {sae.device}"
    return f"{type(sae).__name__}({', '.join([kind, widths, *extras, *([place] if place else []), *([cfg.model] if cfg.model else []), where])})"


def replace_config(sae: SAE, **changes: Any) -> SAE:
    """The same weights, shared, under a configuration with other hooks, model or metadata.

    Raises:
        TypeError: for a field that SAEConfig does not have.
    """
    known = {f.name for f in fields(SAEConfig)}
    if not set(changes) <= known:
        raise TypeError(
            explain(f"SAEConfig has no field {sorted(set(changes) - known)}.", want=", ".join(sorted(known)))
        )
    return SAE.from_tensors(replace(sae.cfg, **changes), dict(sae._parameters))


def _initial(cfg: SAEConfig, seed: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    made = {name: torch.zeros(shape) for name, shape in tensor_shapes(cfg).items()}
    rng = torch.Generator().manual_seed(seed)
    made["W_dec"] = nn.functional.normalize(torch.randn(cfg.d_sae, cfg.d_out, generator=rng), dim=1)
    reads = (
        made["W_dec"]
        if cfg.d_in == cfg.d_out
        else nn.functional.normalize(torch.randn(cfg.d_sae, cfg.d_in, generator=rng), dim=1)
    )
    made["W_enc"] = reads.T.contiguous()
    return {name: t.to(device=device, dtype=dtype) for name, t in made.items()}


def _threshold_gate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    kept = torch.relu(pre)
    return kept if threshold is None else kept * (pre > threshold)


def _top(pre: Tensor, k: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    if signed:
        indices = pre.abs().topk(k, dim=-1, sorted=False).indices
        return pre.gather(-1, indices), indices
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.relu(values), indices


def _scaled(x: Tensor, scaling: Scaling) -> Tensor:
    if scaling == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.std(-1, keepdim=True) + 1e-5)
    if scaling == "constant_norm":
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    return x


def _unscaled(recon: Tensor, x: Tensor, scaling: Scaling) -> Tensor:
    if scaling == "layer_norm":
        return recon * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    if scaling == "constant_norm":
        return recon * (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    return recon


def _tapped(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    return value if tap is None else tap(name, value)
