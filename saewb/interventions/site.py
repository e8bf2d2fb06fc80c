"""Site: the read point and write point of an SAE in a model, resolved from its hook names.

1. Names: `hook` and `hook_out` of the caller take precedence over the SAE's configuration.
2. Points: each name, canonical or alias, is resolved to a `HookPoint` of the model.
3. Checks: both points exist and can fire, and an activation replaced at the write point goes on through the model.
4. Shapes: an activation at the points, with or without a head axis, becomes `[batch, pos, d]` and back.

Nothing is attached or run.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.hook_points import HookPoint
from saewb.sae.activation_functions import Latents
from saewb.sae.base import SparseCoder
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.crosscoder import CrossCoderSAE


@dataclass(frozen=True, eq=False)
class Site:
    """Read point and write point of one SAE, or of one layer of a cross-layer transcoder, in one model.

    Example:
        >>> import saewb
        >>> site = Site.of(saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny"))
        >>> site.hook_name, site.read.name, site.layer, site.d_in
        ('blocks.2.hook_resid_post', 'blocks.2.hook_out', 2, 128)
    """

    sae: SparseCoder
    """SAE, transcoder, or the cross-layer transcoder that has this layer."""
    read: HookPoint
    """Its activation is encoded."""
    write: HookPoint
    """Its activation is reconstructed: the read point for an SAE, another one for a transcoder."""
    hook_name: str
    """Name of the read point, as the caller or the configuration spells it."""
    hook_name_out: str
    """Name of the write point, spelled likewise."""
    clt_layer: int | None = None
    """Which layer of the cross-layer transcoder; None for any other SAE."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sae: SparseCoder,
        hook: str | None = None,
        hook_out: str | None = None,
        *,
        writable: bool = True,
    ) -> Site:
        """Resolve where `sae` reads and writes.

        Args:
            model: a TransformerBridge or HookedTransformer.
            sae: an SAE or transcoder with one read point and one write point.
            hook: name of the read point, instead of `sae.cfg.hook`. An SAE also writes there; a transcoder keeps its
                own write point.
            hook_out: name of the write point, instead of `sae.cfg.hook_out`.
            writable: require that an activation replaced at the write point goes on through the model; False where the
                SAE is only encoded.

        Raises:
            TypeError: if `sae` is no SAE, or a cross-layer transcoder (see `Site.of_layers`).
            ValueError: for a name that neither the caller nor the SAE gives, an unknown or switched-off point, a write
                point from which nothing goes on.
        """
        check_is_sae(sae)
        if isinstance(sae, CrossCoderSAE):
            what = f"{sae!r} reads {' and '.join(sae.cfg.points)} at once; what it writes to one depends on the other."
            fix = 'z = cross.encode({"a": x, "b": y}); cross.split(cross.decode(z))'
            raise TypeError(explain(what, want="an SAE of one point", fix=fix))
        if isinstance(sae, CrossLayerTranscoder):
            what = f"{sae!r} reads and writes at every layer; this works on SAEs and transcoders with one point each."
            raise TypeError(explain(what, fix="saewb.attach(model, clt), and hooks on its inner points"))
        hook_name = hook or sae.cfg.hook
        if hook_name is None:
            what = f"{sae!r} does not say where it belongs."
            raise ValueError(explain(what, fix='saewb.attach(model, sae, hook="blocks.4.hook_resid_post")'))
        # An SAE moved to another point reads and writes there; a transcoder keeps the point it writes to.
        hook_name_out = hook_out or (sae.cfg.hook_out if sae.cfg.hook_out != sae.cfg.hook else None) or hook_name
        if sae.cfg.is_transcoder and hook_name_out == hook_name:
            what = f"{sae!r} is a transcoder and does not say where it writes."
            raise ValueError(explain(what, fix='saewb.attach(model, sae, hook_out="blocks.4.hook_mlp_out")'))
        return cls(sae, *_resolve(model, hook_name, hook_name_out, writable), hook_name, hook_name_out)

    @classmethod
    def of_layers(cls, model: nn.Module, clt: CrossLayerTranscoder, *, writable: bool = True) -> list[Site]:
        """Resolve where each layer of a cross-layer transcoder reads, and the first point it writes to.

        Args:
            model: as for `of`.
            clt: with one read and one write point per layer.
            writable: as for `of`.

        Raises:
            ValueError: as for `of`.
        """
        names = enumerate(zip(clt.cfg.hooks, clt.cfg.hooks_out, strict=True))
        return [cls(clt, *_resolve(model, *pair, writable), *pair, layer) for layer, pair in names]

    @property
    def name(self) -> str:
        """`"read point"`, or `"read point => write point"` for a transcoder."""
        return self.hook_name if self.hook_name == self.hook_name_out else f"{self.hook_name} => {self.hook_name_out}"

    @property
    def layer(self) -> int | None:
        """Transformer block of the read point; None outside of blocks."""
        return self.read.layer

    @property
    def head(self) -> int | None:
        """Attention head it reads and writes; None for all of them."""
        return _head(self.sae)

    @property
    def d_in(self) -> int:
        """Width of what the SAE reads."""
        return self.sae.cfg.d_in

    @property
    def d_out(self) -> int:
        """Width of what the SAE writes."""
        return self.sae.cfg.d_out

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.cfg.d_sae if self.clt_layer is None else self.sae.cfg.d_sae[self.clt_layer]

    @property
    def points(self) -> tuple[HookPoint, HookPoint]:
        """Where it reads and where it writes."""
        return self.read, self.write

    @property
    def is_one_point(self) -> bool:
        """Whether it reads where it writes, as an SAE does."""
        return self.read.module is self.write.module

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Latents | None = None
    ) -> Float[Tensor, "*batch latents"]:
        """Latents of the SAE, or of the layer, on what `read_input` gives; all, or a subset of them."""
        if self.clt_layer is None:
            return self.sae.encode(x, latents=latents)
        return self.sae.encode_layer(x, self.clt_layer, latents=latents)

    def read_input(self, activation: Tensor) -> Float[Tensor, "batch pos d_in"]:
        """The activation at the read point as the SAE takes it; errors as `flatten_heads`."""
        return flatten_heads(self.sae, activation, self.d_in, self.hook_name)

    def read_target(self, activation: Tensor) -> Float[Tensor, "batch pos d_out"]:
        """The activation at the write point in the shape of a reconstruction; errors as `flatten_heads`."""
        return flatten_heads(self.sae, activation, self.d_out, self.hook_name_out)

    def write_output(self, out: Float[Tensor, "batch pos d_out"], activation: Tensor) -> Tensor:
        """`out` in the shape of the activation it replaces: the inverse of `read_target`, other heads unchanged."""
        if self.head is None:
            return out.reshape(activation.shape)
        replaced = activation.clone()
        replaced[:, :, self.head] = out
        return replaced


def sites_of(model: nn.Module, sae: SparseCoder, *, writable: bool = True) -> list[Site]:
    """The site of an SAE or transcoder, or one for each layer of a cross-layer transcoder.

    Raises:
        TypeError, ValueError: as `Site.of`.
    """
    check_is_sae(sae)
    if isinstance(sae, CrossLayerTranscoder):
        return Site.of_layers(model, sae, writable=writable)
    return [Site.of(model, sae, writable=writable)]


def check_is_sae(sae: object) -> None:
    """Check that this is one of the SAE classes.

    Raises:
        TypeError: if it is anything else, such as the name of an SAE.
    """
    if not isinstance(sae, SparseCoder):
        fix = f"sae = saewb.load_sae({sae!r})" if isinstance(sae, str) else "sae = saewb.load_sae(...)"
        raise TypeError(explain(f"got {type(sae).__name__} as an SAE.", want="an SAE, or a list of them", fix=fix))


def check_reconstructs(sae: SparseCoder) -> None:
    """Check that the SAE's output by itself stands for the activation at its write point.

    Raises:
        ValueError: for one layer of a cross-layer transcoder, read alone.
    """
    if sae.cfg.metadata.get("summed_over_layers"):
        what = f"{sae!r} is one layer of a cross-layer transcoder, which reconstructs nothing by itself."
        raise ValueError(explain(what, want="the whole", fix="saewb.attach(model, saewb.load_sae(<its folder>))"))


def flatten_heads(sae: SparseCoder, activation: Tensor, width: int, hook_name: str) -> Tensor:
    """An activation in the shape an SAE takes, `[batch, pos, width]`: one head, all heads side by side, or as it is.

    Args:
        sae: encodes or reconstructs it.
        activation: of the model, `[batch, pos, width]` or `[batch, pos, heads, d_head]`.
        width: `d_in` or `d_out` of the SAE.
        hook_name: of the point, for the error message.

    Returns:
        A view where there can be one.

    Raises:
        ValueError: if the shapes do not fit, or the SAE is on another device.
    """
    head, shape = _head(sae), tuple(activation.shape)
    if activation.device != sae.device:
        what = f"{sae!r} is on {sae.device}, the activation at {hook_name!r} on {activation.device}."
        raise ValueError(explain(what, fix=f"sae.to({str(activation.device)!r})"))
    if head is not None and len(shape) == 4 and head < shape[2] and shape[3] == width:
        return activation[:, :, head]
    if head is None and shape[-1] == width:
        return activation
    if head is None and len(shape) == 4 and shape[2] * shape[3] == width:
        return activation.flatten(2)
    one = "" if head is None else f", or [batch, pos, heads > {head}, {width}] for head {head}"
    what = f"{hook_name!r} gives activations of shape {shape}, which do not fit {sae!r}."
    raise ValueError(explain(what, want=f"[batch, pos, {width}]{one}"))


def _head(sae: SparseCoder) -> int | None:
    return None if isinstance(sae, CrossLayerTranscoder) else sae.cfg.head


def _resolve(model: nn.Module, hook_name: str, hook_name_out: str, writable: bool) -> tuple[HookPoint, HookPoint]:
    """Read point and write point; one object if the names are one."""
    read = None if hook_name == hook_name_out else hook_points.resolve(model, hook_name)
    write = (hook_points.resolve_writable if writable else hook_points.resolve)(model, hook_name_out)
    return read or write, write
