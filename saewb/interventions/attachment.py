"""Attach SAEs and transcoders to a language model, and leave the model as it was.

Nothing of the model is replaced: hooks go onto the HookPoints that are there, and exactly those come off again.
What one attached SAE does in a forward pass is in `saewb.interventions.splice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions.base import OnModel, on_model
from saewb.interventions.site import splices
from saewb.interventions.splice import Splice
from saewb.models import forward
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
                     activation at hooks_out[j]  <-  what its layers 0 to j make of the activations at their hooks

    While attached, the inner points `<point>.hook_sae_input`, `.hook_sae_acts_pre`, `.hook_sae_acts_post`,
    `.hook_sae_recons`, `.hook_sae_error`, `.hook_sae_output` can be cached, hooked and edited like any other, under
    every name of the point that is written to. Hooks run in the order they were added: one added before sees the
    model's own activation there, one added later (and `run_with_cache`) what the SAE made of it. A second attachment
    writing to the same point overrides the first until it is detached. `model.reset_hooks()` does not detach. A `with`
    block holds the model's lock: whoever attaches to the model from another thread waits for its end.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: one, or several that write to different points.
        hook: where they read, instead of their own `cfg.hook`: one name, or one for each.
        hook_out: where they write, instead of `cfg.hook_out`; for transcoders.
        error_term: add what each SAE gets wrong, so that the model computes what it would without it. It is taken
            from an undisturbed pass and detached: edits of latents, and their gradients, have their full effect (those
            of a cross-layer transcoder at every layer that the latent writes to).
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
    attachment = Attachment(model, splices(model, saes, hook, hook_out, error_term), skip_special_tokens)
    attachment._install()
    return attachment


def attachments(model: nn.Module) -> list[Attachment]:
    """What is attached to this model now, oldest first.

    Args:
        model: any, with or without something attached.

    Returns:
        Attachments that have not been detached; steering is not among them.

    Example:
        >>> import saewb
        >>> attachments(saewb.load_model("tiny"))
        []
    """
    return [found for found in on_model(model) if isinstance(found, Attachment)]


def detach_all(model: nn.Module) -> None:
    """Take everything of saewb off this model, newest first: for attachments and steering whose variable is lost.

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
    for found in reversed(on_model(model)):
        found.detach()


class Attachment(OnModel):
    """SAEs on a model, until `detach` or the end of the `with` block. Made by `saewb.attach`."""

    _again = "with saewb.attach(model, sae) as attached:"

    def __init__(self, model: nn.Module, splices: list[Splice], skip_special_tokens: bool | Sequence[int]) -> None:
        super().__init__(model)
        self._splices = splices
        self._placed: list[Splice] = []
        self._tokens: Tensor | None = None
        self._announced: tuple[Tensor | None] | None = None  # the tokens of a pass that has not begun
        self._state = "over"  # of the last pass: "whole" or "partial" while it runs, or after it stopped early
        for splice in splices:
            splice.enter = self._enter
        self._special = _special_ids(model, skip_special_tokens)
        if self._special is not None:
            for splice in splices:
                splice.token_mask = self._token_mask

    @property
    def saes(self) -> list[nn.Module]:
        """The attached SAEs, in the order given."""
        return list(dict.fromkeys(_whole(splice) for splice in self._splices))

    @property
    def latents(self) -> LatentsView:
        """Latents of the last forward pass, by SAE or by hook name: `attached.latents[sae]`, `[batch, pos, d_sae]`.

        Of a cross-layer transcoder a list, one for each layer; by the name of a point it writes to, that layer's.
        After hooks on `hook_sae_acts_post`; part of the graph if the pass recorded one.
        """
        return LatentsView(self._splices)

    def __repr__(self) -> str:
        places = [s.place for s in self._splices]
        if len(places) > 8:
            places = [*places[:2], f"and {len(places) - 2} more"]
        notes = []
        if self.is_attached:
            hidden = [s.place for s in self._splices if not s.is_top]
            hiding = [s.place for s in self._splices if s.is_top and s.overrides]
            notes += [f"overridden at {', '.join(hidden)}"] if hidden else []
            notes += [f"made for {name}, which this is not" for name in self._strangers()]
            notes += [f"overrides an earlier one at {', '.join(hiding)}"] if hiding else []
        state = "attached" if self.is_attached else "detached"
        return f"Attachment({'; '.join([state + ': ' + ', '.join(places), *notes])})"

    def _strangers(self) -> list[str]:
        """Models that SAEs here name and that have another name than this one: a fine-tuned one may be meant."""
        own = str(getattr(getattr(self._model(), "cfg", None), "model_name", None) or "").lower()
        made_for = [getattr(_whole(splice).cfg, "model", None) for splice in self._splices]
        named = {name.lower().rpartition("/")[2] for name in made_for if name}
        return sorted(name for name in named if own and name not in own and own.rpartition("/")[2] not in name)

    def _put_on(self) -> None:
        for splice in self._splices:
            self._placed.append(splice)
            splice.install()

    def _take_off(self) -> None:
        while self._placed:
            self._placed.pop().uninstall()

    def _announce(self, tokens: Tensor | None) -> None:
        self._announced = (tokens,)
        first = forward.first_layer(self._model())
        for splice in self._splices:
            splice.restore()
            splice.first_layer = first

    def _begin(self, cached_tokens: int) -> None:
        self._enter()
        for splice in self._splices:
            if cached_tokens and splice.is_top and getattr(splice.sae, "looks_back", False):
                what = f"{splice.sae!r} looks at earlier tokens, and this pass has them in its cache only."
                raise ValueError(explain(what, fix="model.generate(..., use_past_kv_cache=False)"))

    def _enter(self) -> None:
        """A pass is under way: if this is the first sign of it, forget the pass before.

        One that was not announced starts at a later layer: it goes on with what the one before left, if that stopped
        early.
        """
        if self._announced is not None or self._state == "over":
            self._state = "whole" if self._announced is not None else "partial"
            (self._tokens,) = self._announced or (None,)
            self._announced = None
            for splice in self._splices:
                splice.clear()

    def _end(self) -> None:
        state, self._state = self._state, "over"
        for splice in self._splices:
            expected = state == "whole" and splice.is_top and not splice.is_early(splice.write)
            if expected and not splice.fired:
                raise ValueError(
                    explain(
                        f"{splice.write.name!r} did not fire in a whole forward pass: {splice.sae!r} had no effect.",
                        want="a point that this model computes",
                        fix="saewb.models.hook_points.point_names(model)",
                    )
                )

    def _token_mask(self, activation: Tensor) -> Tensor:
        """`[batch, pos]`, True at special tokens."""
        if self._tokens is None or self._tokens.shape != activation.shape[:2]:
            seen = "no token ids" if self._tokens is None else f"token ids of shape {tuple(self._tokens.shape)}"
            what = f"skip_special_tokens: the model got {seen}, the activation has shape {tuple(activation.shape)}."
            raise ValueError(explain(what, want="one token id for each position", fix="skip_special_tokens=False"))
        return torch.isin(self._tokens.to(activation.device), self._special.to(activation.device))


class LatentsView:
    """`view[sae]` or `view["blocks.4.hook_resid_post"]`: latents of the last forward pass, `[batch, pos, d_sae]`."""

    def __init__(self, splices: list[Splice]) -> None:
        self._splices = splices

    def __getitem__(self, key: nn.Module | str) -> Tensor | list[Tensor]:
        found = [s for s in self._splices if (key in s.write.names if isinstance(key, str) else _whole(s) is key)]
        if isinstance(key, CrossLayerTranscoder) and len(found) == key.cfg.n_layers:
            return [splice.latents() for splice in found]
        if len(found) != 1:
            what = f"{key!r} is {'attached more than once' if found else 'not attached'} here."
            raise ValueError(explain(what, want="one of " + ", ".join(self)))
        return found[0].latents()

    def __iter__(self) -> Iterator[str]:
        return (splice.write.name for splice in self._splices)

    def __len__(self) -> int:
        return len(self._splices)

    def __repr__(self) -> str:
        return f"LatentsView({', '.join(self)})"


def _whole(splice: Splice) -> nn.Module:
    """What was given to `attach`, of which this may be one layer."""
    return getattr(splice.sae, "whole", splice.sae)


def _special_ids(model: nn.Module, skip: bool | Sequence[int]) -> Tensor | None:
    return None if skip is False else torch.tensor(special_ids(model, skip), dtype=torch.long)
