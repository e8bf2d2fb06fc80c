"""Splice an SAE into a model: its output in place of the activation at one hook point.

1. The read point gives x; the write point gives the target, the model's own activation there (x itself for an SAE).
2. x is flattened over heads where it has them, and passes `hook_sae_input`.
3. The SAE encodes (`hook_sae_acts_pre`, `hook_sae_acts_post`) and decodes (`hook_sae_recons`).
4. With the error term, `hook_sae_error` gets target - reconstruction without edits of hooks, detached, and is added: a
   hook that edits latents changes the output by exactly what it does to the reconstruction.
5. At special tokens the target goes through unchanged, with error 0.
6. The result, in the target's shape, dtype and device, passes `hook_sae_output` and goes on through the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions.cross_layer import TranscoderLayer
from saewb.interventions.site import Site
from saewb.models import hook_points
from saewb.models.hook_points import HookPoint, InnerPoints
from saewb.sae.sae import SAE
from saewb.sae.sparse import SparseLatents

_INNER_KEYS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


@dataclass(frozen=True, eq=False)
class _SpliceStack:
    """Splices at one write point. It does not hold the point's module, so that an unused model can be collected."""

    splices: list[weakref.ref[Splice]] = field(default_factory=list)
    """Oldest first; only the last one replaces the activation."""
    spare_points: list[InnerPoints] = field(default_factory=list)
    """Points of removed splices, for reuse: creating HookPoints costs more than attaching."""

    @property
    def active(self) -> Splice | None:
        """The splice that replaces the activation."""
        return self.splices[-1]() if self.splices else None


_stacks: weakref.WeakKeyDictionary[nn.Module, _SpliceStack] = weakref.WeakKeyDictionary()


def active_splice(point: HookPoint) -> Splice | None:
    """The splice that replaces the activation at this write point."""
    stack = _stacks.get(point.module)
    return None if stack is None else stack.active


class Splice:
    """An SAE at its read and write point; `saewb.attach` creates it."""

    def __init__(self, model: nn.Module, site: Site, error_term: bool) -> None:
        """Prepare; `install` adds the hooks.

        Args:
            model: the points of `site` are its own.
            site: an SAE and where it reads and writes; its `sae` may be a `TranscoderLayer`.
            error_term: add the reconstruction error to the output.
        """
        self.site, self.sae, self.error_term = site, site.sae, error_term
        self.read, self.write = site.read, site.write
        self.fired = False
        self.first_layer = 0  # block at which the current pass starts
        self.on_fire: Callable[[], None] = _no_op
        self.special_mask: Callable[[Tensor], Tensor] | None = None
        self._model = weakref.ref(model)
        self._acts: Tensor | SparseLatents | None = None
        self._x: Tensor | None = None
        self._edited = False  # whether a hook may have changed something inside in this pass
        self._is_layer = isinstance(site.sae, TranscoderLayer)  # later layers of the same transcoder need its latents
        self._hooks: list[hook_points.Hook] = []
        self._published: InnerPoints | None = None
        self._inner: dict[str, nn.Module] = {}
        self._stack = _stacks.get(self.write.module) or _stacks.setdefault(self.write.module, _SpliceStack())

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Add the hooks, overriding any splice at the same write point."""
        model, spare = self._model(), self._stack.spare_points
        points = spare.pop() if spare else None
        if points is None or points.names != self.write.names:  # the point has other names by now
            points = hook_points.inner_points(model, self.write, _INNER_KEYS)
        self._published, self._inner = points, points.by_key
        if not self.site.is_one_point:
            self._hooks.append(hook_points.Hook(self.read, self._on_read))
        self._hooks.append(hook_points.Hook(self.write, self._on_write))
        if (overridden := self._stack.active) is not None:
            hook_points.unpublish(model, self.write, overridden._published)
        self._stack.splices.append(weakref.ref(self))
        hook_points.publish(model, self.write, points)
        for hook in self._hooks:
            hook.install()

    def uninstall(self) -> None:
        """Remove the hooks; a splice that this one overrode is active again. Harmless a second time."""
        model, splices, points = self._model(), self._stack.splices, self._published
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks.clear()
        self.on_fire, self.special_mask = _no_op, None  # they refer to the attachment: break the cycle
        splices[:] = [ref for ref in splices if ref() not in (None, self)]
        if points is None:
            return
        if model is not None:
            hook_points.unpublish(model, self.write, points)
            if (active := self._stack.active) is not None:
                hook_points.publish(model, self.write, active._published)
        hooked = [point for point in self._inner.values() if _has_hooks(point)]
        for point in hooked:
            point.remove_hooks(dir="both", including_permanent=True)
        self.clear()
        self._published = None
        if not any(_has_hooks(point) for point in hooked):
            self._stack.spare_points.append(points)  # else a torch hook stays: that point is not used again

    @property
    def is_active(self) -> bool:
        """Whether no later attachment writes at the same point."""
        return self._stack.active is self

    @property
    def overrides(self) -> bool:
        """Whether another attachment writes at the same point too."""
        return len(self._stack.splices) > 1

    # -- in a forward pass -------------------------------------------------------------------------------------------

    def restore_hooks(self) -> None:
        """Put hooks back that `reset_hooks(including_permanent=True)` removed."""
        for hook in self._hooks:
            if not hook.is_on:
                hook.install()

    def clear(self) -> None:
        """Clear the state of the last forward pass."""
        self.fired = False
        self._acts = self._x = None
        if self._is_layer:
            self.sae.clear()

    def latents(self) -> Tensor:
        """Latents of the last forward pass, `[..., d_sae]`."""
        if self._acts is None and not any(ref() is self for ref in self._stack.splices):
            what = f"{self.sae!r} is detached, and its latents are forgotten."
            raise ValueError(explain(what, fix="read attached.latents inside the with block"))
        if self._acts is None:
            overridden = "" if self.is_active else "; another SAE is attached on top of it"
            what = f"{self.sae!r} did not run in the last forward pass{overridden}."
            raise ValueError(explain(what, fix="model(tokens)"))
        return self._acts.dense() if isinstance(self._acts, SparseLatents) else self._acts

    def _on_read(self, activation: Tensor) -> None:
        if self.read.is_before(self.first_layer):
            return
        self.on_fire()
        self._x = activation.clone()  # the model, or a user's hook, may change it in place before it is used

    def _on_write(self, target: Tensor) -> Tensor | None:
        if self.write.is_before(self.first_layer) or not (self.is_active or self._is_layer):
            return None
        self.on_fire()
        x = target if self.site.is_one_point else self._x
        if x is None:
            what = f"{self.read.name!r} did not fire before {self.write.name!r}: the transcoder has nothing to read."
            want = "a read point that the model computes before the write point"
            fix = "saewb.attach(model, sae, hook=<read point>, hook_out=<write point>)"
            raise ValueError(explain(what, want=want, fix=fix))
        self.fired, self._x = True, None
        x = self.site.read_input(x)
        if self.is_active:
            return self._run(x, target)
        self._acts = self.sae.encode(x)  # its output here is overridden, and its inner points are not in force
        return None

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        flat_target = self.site.read_target(target)
        self._edited = self._is_layer and self.sae.edited
        clean_x, special_mask = x, self.special_mask  # a hook inside may detach this splice
        if _has_hooks(self._inner["input"]):
            x = self._pass("input", x.clone())  # an edit in place there must not reach the target
        recons = self._reconstruct(x)
        mask = None if special_mask is None else special_mask(target)[..., None]
        if recons is None:  # nothing is hooked inside, and the error term makes up for the reconstruction
            out = flat_target
        else:
            out = self._add_error(recons, clean_x, flat_target, mask) if self.error_term else recons
            out = out.to(target.dtype)
            if mask is not None:
                out = torch.where(mask, flat_target, out)
        return self._pass("output", self.site.write_output(out, target))

    def _reconstruct(self, x: Tensor) -> Tensor | None:
        """The reconstruction; None where it is not needed, since the output is the target itself."""
        if torch.is_grad_enabled() or any(_has_hooks(self._inner[key]) for key in _INNER_KEYS[1:5]):
            return self.sae.decode(self.sae.encode(x, tap=self._tap), x, tap=self._tap)
        sparse = isinstance(self.sae, SAE) and self.sae.cfg.k is not None and self.sae.dtype == torch.float32
        self._acts = self.sae.encode_topk(x) if sparse else self.sae.encode(x)
        return None if self.error_term and not self._edited else self.sae.decode(self._acts, x)

    def _add_error(self, recons: Tensor, clean_x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            clean_recons = self.sae(clean_x) if self._edited else recons.detach()
            error = target.to(clean_recons.dtype) - clean_recons
            if mask is not None:
                error = torch.where(mask, torch.zeros_like(error), error)
        return recons + self._pass("error", error)

    def _tap(self, name: str, value: Tensor) -> Tensor:
        value = self._pass(name, value)
        if name == "acts_post":
            self._acts = value
        return value

    def _pass(self, key: str, value: Tensor) -> Tensor:
        """Send `value` through an inner point, and note whether a hook there may have changed it."""
        point = self._inner[key]
        if not _has_hooks(point):
            return value
        version = _version(value)
        result = point(value)
        self._edited |= result is not value or version is None or _version(value) != version
        return result


def _no_op() -> None:
    pass


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _has_hooks(point: nn.Module) -> bool:
    """Whether any hook, of transformer-lens or of torch, is on the point."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)
