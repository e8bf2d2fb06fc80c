"""One SAE at one place of one model: what happens there in a forward pass.

1. The read point gives x, the write point gives what stands there now (the target; the same tensor for an SAE).
2. x is flattened over heads where it has them, and passes `hook_sae_input`.
3. The SAE encodes (`hook_sae_acts_pre`, `hook_sae_acts_post`) and decodes (`hook_sae_recons`).
4. With the error term, `hook_sae_error` gets target - reconstruction of an undisturbed pass, detached, and is added;
   so a hook that changes latents changes the output by just what it did to the reconstruction.
5. At special tokens the target goes through as it is, with error 0.
6. The result, in the target's shape, dtype and device, passes `hook_sae_output` and goes on through the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import hook_points
from saewb.sae.sae import SAE
from saewb.sae.sparse import SparseLatents

_INNER = ("input", "acts_pre", "acts_post", "recons", "error", "output")


@dataclass(frozen=True, eq=False)
class _Place:
    """A point that is or was written to. It does not hold its module, so that a forgotten model can go."""

    stack: list[weakref.ref[Splice]] = field(default_factory=list)  # innermost attachment last: only that one runs
    # Given back by earlier attachments: making HookPoints costs more than attaching.
    spare: list[hook_points.InnerPoints] = field(default_factory=list)

    @property
    def top(self) -> Splice | None:
        """Who is in force."""
        return self.stack[-1]() if self.stack else None


_places: weakref.WeakKeyDictionary[nn.Module, _Place] = weakref.WeakKeyDictionary()


class Splice:
    """An SAE on its read and write point. Made by `saewb.attach`; not for users."""

    def __init__(
        self,
        model: nn.Module,
        sae: nn.Module,
        read: hook_points.Point,
        write: hook_points.Point,
        place: str,
        error_term: bool,
    ) -> None:
        self.sae, self.read, self.write, self.error_term = sae, read, write, error_term
        self.place = place  # as the user named it
        self.same_point = read.module is write.module
        self.fired = False
        self.first_layer = 0  # at which the pass under way starts
        self.enter = _nobody  # called whenever a point fires
        self.token_mask: Callable[[Tensor], Tensor] | None = None
        self._model = weakref.ref(model)
        self._latents: Tensor | SparseLatents | None = None
        self._x: Tensor | None = None
        self._touched = False
        self._carries_on = getattr(sae, "carries_on", False)  # later layers of the same object need its latents
        self._hooks: list[hook_points.Hook] = []
        self._here = _places.get(write.module) or _places.setdefault(write.module, _Place())

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put it on the model, on top of whoever writes there already."""
        model, spare = self._model(), self._here.spare
        found = spare.pop() if spare else None
        if found is None or found.names != self.write.names:  # the point has other names by now
            found = hook_points.inner_points(model, self.write, _INNER)
        self._published, self._inner = found, found.by_key
        if not self.same_point:
            self._hooks.append(self.read.add(self._on_read))
        self._hooks.append(self.write.add(self._on_write))
        if (outer := self._here.top) is not None:
            hook_points.unpublish(model, self.write, outer._published)
        self._here.stack.append(weakref.ref(self))
        hook_points.publish(model, self.write, self._published)

    def uninstall(self) -> None:
        """Take it off again; whoever it was put on top of is back in force."""
        model, stack = self._model(), self._here.stack
        while self._hooks:
            self._hooks.pop().remove()
        self.enter, self.token_mask = _nobody, None  # what is over holds nobody
        was_top = self.is_top
        stack[:] = [ref for ref in stack if ref() not in (None, self)]
        if model is not None and was_top:
            hook_points.unpublish(model, self.write, self._published)
            if (outer := self._here.top) is not None:
                hook_points.publish(model, self.write, outer._published)
        hooked = [point for point in self._inner.values() if _hooked(point)]
        for point in hooked:
            point.remove_hooks(dir="both", including_permanent=True)
        if not any(_hooked(point) for point in hooked):  # a hook past transformer-lens stays, and goes with its point
            self._here.spare.append(self._published)
        self.clear()

    @property
    def is_top(self) -> bool:
        """Whether no later attachment writes at the same point."""
        return self._here.top is self

    @property
    def overrides(self) -> bool:
        """Whether another attachment that writes at the same point is still there."""
        return len(self._here.stack) > 1

    # -- in a forward pass -------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put hooks back that someone took off with reset_hooks(including_permanent=True)."""
        for hook in self._hooks:
            if not hook.is_on:
                hook.restore()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.fired = False
        self._latents = self._x = None
        if self._carries_on:
            self.sae.forget()

    def latents(self) -> Tensor:
        """The latents of the last forward pass, `[..., d_sae]`."""
        if self._latents is None and not any(ref() is self for ref in self._here.stack):
            what = f"{self.sae!r} is detached, and its latents are forgotten."
            raise ValueError(explain(what, fix="read attached.latents inside the with block"))
        if self._latents is None:
            overridden = "" if self.is_top else "; another SAE is attached on top of it"
            raise ValueError(
                explain(f"{self.sae!r} did not run in the last forward pass{overridden}.", fix="model(tokens)")
            )
        return self._latents.dense() if isinstance(self._latents, SparseLatents) else self._latents

    def is_early(self, point: hook_points.Point) -> bool:
        """Whether the point is in a block that the pass under way leaves out: what fires there is no activation."""
        return self.first_layer > 0 and point.layer is not None and point.layer < self.first_layer

    def _on_read(self, activation: Tensor) -> None:
        if self.is_early(self.read):
            return
        self.enter()
        self._x = activation.clone()  # the model, or a hook of the user's, may change it in place before it is used

    def _on_write(self, target: Tensor) -> Tensor | None:
        if self.is_early(self.write) or not (self.is_top or self._carries_on):
            return None
        self.enter()
        x = target if self.same_point else self._x
        if x is None:
            what = f"{self.read.name!r} did not fire before {self.write.name!r}: the transcoder has nothing to read."
            raise ValueError(
                explain(
                    what,
                    want="a read point that the model computes before the write point",
                    fix="saewb.attach(model, sae, hook=<read point>, hook_out=<write point>)",
                )
            )
        self.fired, self._x = True, None
        x = flat(self.sae, x, self.sae.cfg.d_in, self.read.name)
        if self.is_top:
            return self._run(x, target)
        self._latents = self.sae.encode(x)  # what it writes here is overridden, and its inner points with it
        return None

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        flat_target = flat(self.sae, target, self.sae.cfg.d_out, self.write.name)
        self._touched = self._carries_on and self.sae.disturbed
        given, token_mask = x, self.token_mask  # a hook inside may detach this
        if _hooked(self._inner["input"]):
            x = self._pass("input", x.clone())  # an edit in place there must not reach the target
        recon = self._reconstruct(x)
        mask = None if token_mask is None else token_mask(target)[..., None]
        if recon is None:  # nobody looks inside and the error term makes it whole
            out = flat_target
        else:
            out = self._with_error(recon, given, flat_target, mask) if self.error_term else recon
            out = out.to(target.dtype)
            if mask is not None:
                out = torch.where(mask, flat_target, out)
        return self._pass("output", unflat(self.sae, out, target))

    def _reconstruct(self, x: Tensor) -> Tensor | None:
        """The reconstruction; or None if it is not needed, since the output is the target itself."""
        if torch.is_grad_enabled() or any(_hooked(self._inner[k]) for k in _INNER[1:5]):
            return self.sae.decode(self.sae.encode(x, tap=self._tap), x, tap=self._tap)
        sparse = isinstance(self.sae, SAE) and self.sae.cfg.k is not None and self.sae.dtype == torch.float32
        self._latents = self.sae.encode_topk(x) if sparse else self.sae.encode(x)
        return None if self.error_term and not self._touched else self.sae.decode(self._latents, x)

    def _with_error(self, recon: Tensor, given: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            clean = self.sae(given) if self._touched else recon.detach()
            error = target.to(clean.dtype) - clean
            if mask is not None:
                error = torch.where(mask, torch.zeros_like(error), error)
        return recon + self._pass("error", error)

    def _tap(self, name: str, value: Tensor) -> Tensor:
        value = self._pass(name, value)
        if name == "acts_post":
            self._latents = value
        return value

    def _pass(self, name: str, value: Tensor) -> Tensor:
        """Send `value` through the inner point, and note whether a hook there may have changed it."""
        point = self._inner[name]
        if not _hooked(point):
            return value
        version = _version(value)
        result = point(value)
        self._touched |= result is not value or version is None or _version(value) != version
        return result


def flat(sae: nn.Module, activation: Tensor, width: int, name: str) -> Tensor:
    """An activation as an SAE takes it, `[batch, pos, width]`: its one head, or all heads side by side, or as it is.

    Args:
        sae: reads or writes it; its `cfg.head` says which head.
        activation: of the model, `[batch, pos, width]` or `[batch, pos, heads, d_head]`.
        width: `cfg.d_in` or `cfg.d_out`.
        name: of the point, for the message.

    Returns:
        A view where there can be one.

    Raises:
        ValueError: if it does not fit, or is on another device than the SAE.
    """
    head, shape = sae.cfg.head, tuple(activation.shape)
    if activation.device != sae.device:
        what = f"{sae!r} is on {sae.device}, the activation at {name!r} on {activation.device}."
        raise ValueError(explain(what, fix=f"sae.to({str(activation.device)!r})"))
    if head is not None and len(shape) == 4 and head < shape[2] and shape[3] == width:
        return activation[:, :, head]
    if head is None and shape[-1] == width:
        return activation
    if head is None and len(shape) == 4 and shape[2] * shape[3] == width:
        return activation.flatten(2)
    one = "" if head is None else f", or [batch, pos, heads > {head}, {width}] for head {head}"
    what = f"{name!r} gives activations of shape {shape}, which do not fit {sae!r}."
    raise ValueError(explain(what, want=f"[batch, pos, {width}]{one}"))


def unflat(sae: nn.Module, out: Tensor, activation: Tensor) -> Tensor:
    """`out [batch, pos, width]` in the shape of the activation: the inverse of `flat`, other heads as they were."""
    if sae.cfg.head is None:
        return out.reshape(activation.shape)
    whole = activation.clone()
    whole[:, :, sae.cfg.head] = out
    return whole


def top(point: hook_points.Point) -> Splice | None:
    """The splice in force at this write point."""
    here = _places.get(point.module)
    return None if here is None else here.top


def _nobody() -> None:
    """Is told of nothing."""


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _hooked(point: nn.Module) -> bool:
    """Whether anything at all, of transformer-lens or of torch, is hooked to the point."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)
