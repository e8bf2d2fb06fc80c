"""Attach SAEs and transcoders to a language model.

Nothing of the model is replaced: hooks are added to the HookPoints it has, and exactly those are removed again.
`saewb.interventions.splice` computes what one attached SAE puts in place of an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from saewb.errors import explain
from saewb.fingerprint import sae_digest
from saewb.interventions.base import ActiveIntervention, active_interventions, check_kv_cache, mask_special_tokens
from saewb.interventions.cross_layer import TranscoderLayer, transcoder_layers
from saewb.interventions.site import Site, check_is_sae, check_reconstructs
from saewb.interventions.splice import Splice
from saewb.models import forward, hook_points
from saewb.models.tokenizer import special_ids
from saewb.sae.cross_layer import CrossLayerTranscoder


def attach(
    model: nn.Module,
    saes: nn.Module | Sequence[nn.Module],
    hook: str | Sequence[str] | None = None,
    *,
    hook_out: str | Sequence[str] | None = None,
    error_term: bool = False,
    skip_special_tokens: bool | Sequence[int] = False,
) -> Attachment:
    """Run the model with the output of these SAEs in place of its activations, until `detach`.

    Works like `open`: at once, and until the `with` block ends or `detach()` is called, across notebook cells.

        SAE:         activation at hook  <-  sae(activation at hook)
        transcoder:  activation at hook_out  <-  sae(activation at hook)
        cross-layer transcoder, at each layer j:
                     activation at hooks_out[j]  <-  output of its layers 0 to j for the activations at their hooks

    While attached, the inner points `<point>.hook_sae_input`, `.hook_sae_acts_pre`, `.hook_sae_acts_post`,
    `.hook_sae_recons`, `.hook_sae_error`, `.hook_sae_output` can be cached, hooked and edited like any other, under
    every name of the point that is written to. Hooks run in the order they were added: one added before sees the
    model's own activation there, one added later (and `run_with_cache`) the SAE's output. A second attachment
    writing to the same point overrides the first until it is detached. `model.reset_hooks()` does not detach. A `with`
    block holds the model's lock: another thread that attaches to the model waits for its end.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: one, or several that write to different points.
        hook: read points, instead of `cfg.hook`: one name, or one per SAE.
        hook_out: write points, instead of `cfg.hook_out`; for transcoders.
        error_term: add the reconstruction error of each SAE, so that the model computes what it would without it. It
            is computed without edits of hooks and detached: edits of latents, and their gradients, have their full
            effect (those of a cross-layer transcoder at every layer that the latent writes to).
        skip_special_tokens: pass the model's own activation on at these tokens: True for the tokenizer's BOS, EOS, PAD
            and the like, or a list of token ids.

    Returns:
        An Attachment: `.latents[sae]`, `.detach()`, and a context manager.

    Raises:
        ValueError: for an unknown or switched-off point (with near names), two SAEs writing to one point, an SAE that
            has no hook; in the forward pass for a shape or device that does not fit, a point that is never reached, a
            transcoder whose read point did not fire before its write point, a temporal SAE in a generation with a
            cache of keys and values.
        TypeError: if `model` has no hook points, or something in `saes` is no SAE.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> with saewb.attach(model, sae) as attached:
        ...     logits = model("The Eiffel Tower is in")
        >>> attached
        Attachment(detached: blocks.2.hook_resid_post)
    """
    attachment = Attachment(model, _splices(model, saes, hook, hook_out, error_term), skip_special_tokens)
    attachment._activate()
    return attachment


def attachments(model: nn.Module) -> list[Attachment]:
    """List the attachments of this model, oldest first.

    Args:
        model: any, with or without something attached.

    Returns:
        Attachments that have not been detached; steering is not among them.

    Example:
        >>> import saewb
        >>> attachments(saewb.load_model("tiny"))
        []
    """
    return [active for active in active_interventions(model) if isinstance(active, Attachment)]


def detach_all(model: nn.Module) -> None:
    """Detach all attachments and steering from this model, newest first, also those whose variable is lost.

    Hooks that saewb was adding or removing when an interrupt (Ctrl-C, the notebook's stop button) came are removed too.

    Args:
        model: any; one with nothing attached stays as it is.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> _ = saewb.attach(model, sae)
        >>> detach_all(model)
        >>> saewb.attachments(model)
        []
    """
    with hook_points.lock(model):
        for active in reversed(active_interventions(model)):
            active.detach()
        if hasattr(model, "hook_dict"):
            hook_points.remove_all(model)


class Attachment(ActiveIntervention):
    """SAEs on a model, until `detach` or the end of the `with` block: the result of `saewb.attach`."""

    steers = False
    _how_to_repeat = "with saewb.attach(model, sae) as attached:"

    def __init__(self, model: nn.Module, splices: list[Splice], skip_special_tokens: bool | Sequence[int]) -> None:
        super().__init__(model)
        self._splices = splices
        self._installed: list[Splice] = []
        self._tokens: Tensor | None = None
        self._pending: tuple[Tensor | None] | None = None  # tokens of a pass that no splice has seen yet
        self._pass: Literal["over", "whole", "partial"] = "over"  # the current pass, or one that stopped early
        self._special = None if skip_special_tokens is False else special_ids(model, skip_special_tokens)
        for splice in splices:
            splice.on_fire = self._on_fire
            splice.special_mask = None if self._special is None else self._special_mask

    @property
    def saes(self) -> list[nn.Module]:
        """The attached SAEs, in the order they were passed."""
        return list(dict.fromkeys(_sae_of(splice) for splice in self._splices))

    @property
    def latents(self) -> LatentsView:
        """Latents of the last forward pass, by SAE or by hook name: `attached.latents[sae]`, `[batch, pos, d_sae]`.

        Of a cross-layer transcoder a list, one for each layer; by the name of a point it writes to, that layer's.
        After hooks on `hook_sae_acts_post`; part of the graph if the pass recorded one.
        """
        return LatentsView(self._splices)

    @property
    def written(self) -> tuple[hook_points.HookPoint, ...]:
        """Points at which the output of an SAE is in place of the activation."""
        return tuple(splice.write for splice in self._splices)

    def content(self) -> list[Any]:
        """Digests of the SAEs, where each reads and writes, and how."""
        saes = {id(sae): sae_digest(sae) for sae in self.saes}
        splices = [
            [saes[id(_sae_of(s))], getattr(s.sae, "layer", None), s.read.name, s.write.name, s.error_term, s.is_active]
            for s in self._splices
        ]
        return [splices, None if self._special is None else list(self._special)]

    def __repr__(self) -> str:
        sites = [s.site.name for s in self._splices]
        if len(sites) > 8:
            sites = [*sites[:2], f"and {len(sites) - 2} more"]
        notes = []
        if self.is_attached:
            overridden = [s.site.name for s in self._splices if not s.is_active]
            overriding = [s.site.name for s in self._splices if s.is_active and s.overrides]
            notes += [f"overridden at {', '.join(overridden)}"] if overridden else []
            notes += [f"made for {name}, which this is not" for name in self._other_models()]
            notes += [f"overrides an earlier one at {', '.join(overriding)}"] if overriding else []
        state = "attached" if self.is_attached else "detached"
        return f"Attachment({'; '.join([state + ': ' + ', '.join(sites), *notes])})"

    def _other_models(self) -> list[str]:
        """Names of models the SAEs were trained on that do not fit this one's, which may be fine-tuned."""
        model_name = str(getattr(getattr(self._model(), "cfg", None), "model_name", None) or "").lower()
        trained_on = [sae.cfg.model for sae in self.saes]
        names = {name.lower().rpartition("/")[2] for name in trained_on if name}
        short = model_name.rpartition("/")[2]
        return sorted(name for name in names if model_name and name not in model_name and short not in name)

    def _install(self) -> None:
        for splice in self._splices:
            self._installed.append(splice)
            splice.install()

    def _remove(self) -> None:
        for splice in reversed(self._installed):
            splice.uninstall()
        self._installed.clear()

    def _before_forward(self, tokens: Tensor | None) -> None:
        self._pending = (tokens,)
        first_layer = forward.first_layer(self._model())
        for splice in self._splices:
            splice.restore_hooks()
            splice.first_layer = first_layer

    def _at_first_block(self, kv_cache_offset: int, n_padding: Tensor | None) -> None:
        self._on_fire()
        for splice in self._splices:
            if splice.is_active:
                check_kv_cache(splice.sae, kv_cache_offset)

    def _on_fire(self) -> None:
        """At the first event of a new pass, clear the latents of the last one.

        A pass without `_before_forward` starts at a later layer: it continues the last one, if that stopped early.
        """
        if self._pending is not None or self._pass == "over":
            self._pass = "whole" if self._pending is not None else "partial"
            (self._tokens,) = self._pending or (None,)
            self._pending = None
            for splice in self._splices:
                splice.clear()

    def _after_forward(self) -> None:
        whole, self._pass = self._pass == "whole", "over"
        for splice in self._splices:
            expected = whole and splice.is_active and not splice.write.is_before(splice.first_layer)
            if expected and not splice.fired:
                what = f"{splice.write.name!r} did not fire in a whole forward pass: {splice.sae!r} had no effect."
                fix = "saewb.models.hook_points.point_names(model)"
                raise ValueError(explain(what, want="a point that this model computes", fix=fix))

    def _special_mask(self, activation: Tensor) -> Tensor:
        """`[batch, pos]`, True at special tokens."""
        return mask_special_tokens(activation, self._tokens, self._special)


class LatentsView:
    """`view[sae]` or `view["blocks.4.hook_resid_post"]`: latents of the last forward pass, `[batch, pos, d_sae]`."""

    def __init__(self, splices: list[Splice]) -> None:
        self._splices = splices

    def __getitem__(self, key: nn.Module | str) -> Tensor | list[Tensor]:
        splices = [s for s in self._splices if (key in s.write.names if isinstance(key, str) else _sae_of(s) is key)]
        if isinstance(key, CrossLayerTranscoder) and len(splices) == key.cfg.n_layers:
            return [splice.latents() for splice in splices]
        if len(splices) != 1:
            what = f"{key!r} is {'attached more than once' if splices else 'not attached'} here."
            raise ValueError(explain(what, want="one of " + ", ".join(self)))
        return splices[0].latents()

    def __iter__(self) -> Iterator[str]:
        return (splice.write.name for splice in self._splices)

    def __len__(self) -> int:
        return len(self._splices)

    def __repr__(self) -> str:
        return f"LatentsView({', '.join(self)})"


def _sae_of(splice: Splice) -> nn.Module:
    """SAE that was passed to `attach`; the splice may have one layer of it."""
    return splice.sae.clt if isinstance(splice.sae, TranscoderLayer) else splice.sae


def _splices(model: nn.Module, saes: object, hook: object, hook_out: object, error_term: bool) -> list[Splice]:
    """One per SAE, and per layer of a cross-layer transcoder; none is installed yet."""
    saes = list(saes) if isinstance(saes, (list, tuple)) else [saes]
    if not saes:
        raise ValueError(explain("attach got no SAE.", fix="saewb.attach(model, sae)"))
    hooks, hooks_out = _one_per_sae(hook, len(saes), "hook"), _one_per_sae(hook_out, len(saes), "hook_out")
    splices: list[Splice] = []
    for sae, name, name_out in zip(saes, hooks, hooks_out, strict=True):
        check_is_sae(sae)
        if isinstance(sae, CrossLayerTranscoder):
            _check_not_moved(sae, name, name_out)
            sites = [
                replace(site, sae=layer, clt_layer=None)
                for layer, site in zip(transcoder_layers(sae), Site.of_layers(model, sae), strict=True)
            ]
        else:
            check_reconstructs(sae)
            sites = [Site.of(model, sae, name, name_out)]
        splices += [Splice(model, site, error_term) for site in sites]
    _check_distinct(splices)
    return splices


def _one_per_sae(names: object, n: int, argument: str) -> list[str | None]:
    if names is None or (isinstance(names, str) and n == 1):
        return [names] * n
    if isinstance(names, (list, tuple)) and len(names) == n:
        return list(names)
    want = "a name, e.g. 'blocks.2.hook_resid_post'" if n == 1 else f"{n} names, in a list"
    raise ValueError(explain(f"attach got {argument}={names!r} for {n} SAE{'s' * (n > 1)}.", want=want))


def _check_not_moved(clt: CrossLayerTranscoder, hook: str | None, hook_out: str | None) -> None:
    if hook is not None or hook_out is not None:
        what = f"attach got hook={hook!r}, hook_out={hook_out!r} for {clt!r}, which has points for every layer."
        fix = "CrossLayerTranscoder.from_tensors(dataclasses.replace(clt.cfg, hooks=...), ...)"
        raise ValueError(explain(what, want="None: it reads cfg.hooks and writes cfg.hooks_out", fix=fix))


def _check_distinct(splices: list[Splice]) -> None:
    by_point: dict[nn.Module, Splice] = {}
    for splice in splices:
        if (other := by_point.setdefault(splice.write.module, splice)) is not splice:
            what = f"{other.sae!r} and {splice.sae!r} both write to {splice.write.name!r}."
            raise ValueError(explain(what, want="one SAE for each point; nest a second `attach` to override the first"))
