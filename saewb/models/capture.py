"""Capture a model's activations at its hook points.

`capture` runs one forward pass that stops after the last layer it needs: no logits, no copies. `Activations` holds the
activations of some tokens at one or several points, as the streams of `saewb.data.stream` yield them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.forward import run_to_layer


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of some tokens at one or several hook points: row t of every tensor is the same token.

    Raises:
        ValueError: if a tensor is no matrix, or they have different numbers of rows.

    Example:
        >>> batch = Activations({"blocks.0.hook_resid_post": torch.zeros(5, 8)}, ids=torch.arange(5))
        >>> len(batch), batch.rows(slice(0, 2)).ids.tolist(), batch
        (5, [0, 1], Activations(5 tokens: blocks.0.hook_resid_post 8))
    """

    values: Mapping[str, Tensor]
    """Activations by point, [tokens, d], in the dtype and on the device they were computed in."""
    ids: Tensor | None = None
    """Token ids, [tokens], integers on the CPU; None if unknown."""

    def __post_init__(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        counts = {shape[0] if len(shape) == 2 else None for shape in shapes.values()}
        counts |= set() if self.ids is None else {self.ids.shape[0] if self.ids.ndim == 1 else None}
        if len(counts) != 1 or None in counts:
            ids = None if self.ids is None else tuple(self.ids.shape)
            what = f"Activations got shapes {shapes}" + (f" and ids of shape {ids}." if ids else ".")
            raise ValueError(explain(what, want="one or more [tokens, d], and ids [tokens], all with as many rows"))

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __repr__(self) -> str:
        points = ", ".join(f"{name} {value.shape[1]}" for name, value in self.values.items())
        return f"Activations({len(self)} tokens: {points})"

    @property
    def n_bytes(self) -> int:
        """Size of activations and ids, in bytes."""
        tensors = [*self.values.values(), *([] if self.ids is None else [self.ids])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def rows(self, which: slice | Tensor) -> Activations:
        """Select tokens: views for a slice, copies for indices (int64, on the CPU)."""
        if isinstance(which, slice):
            return Activations(
                {n: v[which] for n, v in self.values.items()}, None if self.ids is None else self.ids[which]
            )
        values = {n: v.index_select(0, which.to(v.device, non_blocking=True)) for n, v in self.values.items()}
        return Activations(values, None if self.ids is None else self.ids.index_select(0, which))


def concatenate(parts: Sequence[Activations]) -> Activations:
    """Concatenate along the token axis; a single part is returned itself. Ids are kept if all parts have them."""
    if len(parts) == 1:
        return parts[0]
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    ids = [part.ids for part in parts]
    return Activations(values, None if any(part is None for part in ids) else torch.cat(ids))


def capture(model: nn.Module, tokens: Int[Tensor, "batch pos"], points: Iterable[str]) -> dict[str, Tensor]:
    """Capture activations at several points in one forward pass, which stops after the last layer that is needed.

    The model's lock is held for the pass, and its hooks are afterwards as before. Hooks and SAEs on the model take
    effect as in any pass. Gradients are recorded unless under `torch.no_grad()`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        tokens: ids, on the model's device.
        points: names of hook points, canonical or aliases; repeats are allowed.

    Returns:
        Activations by the names passed: `[batch, pos, d]`, or `[batch, pos, heads, d_head]` where the point has heads.
        They are the model's tensors, in its dtype and on its device: clone what must outlive an in-place hook.

    Raises:
        ValueError: for a point that does not exist, is switched off, or did not fire.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny")
        >>> activations = capture(model, model.to_tokens("A cat sat."), ["blocks.2.hook_resid_post"])
        >>> activations["blocks.2.hook_resid_post"].shape
        torch.Size([1, 5, 128])
    """
    names = dict.fromkeys(points)
    with capturing(model, names) as activations:
        run_to_layer(model, tokens, stop_layer(model, names))
    return {name: activations[name] for name in names}


@contextmanager
def capturing(model: nn.Module, points: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Capture activations of the last pass inside the block, which the caller runs, e.g. for its logits too.

    Args:
        model: as for `capture`; its lock is held.
        points: as for `capture`.

    Raises:
        ValueError: as `capture`, at the end of the block.
    """
    activations: dict[str, Tensor] = {}
    names = dict.fromkeys(points)

    def record(name: str) -> hook_points.Edit:
        return lambda activation: activations.update({name: activation})  # None: the activation stays as it is

    with hook_points.editing(model, {name: record(name) for name in names}):
        yield activations
    for name in names:
        if name not in activations:
            raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))


def stop_layer(model: nn.Module, points: Iterable[str]) -> int | None:
    """First layer that these points do not need, for `stop_at_layer`; None if a point is outside of the blocks."""
    layers = [hook_points.resolve(model, name).layer for name in points]
    return None if None in layers or not layers else max(layers) + 1


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode (no dropout); every submodule returns to its previous mode afterwards.

    The Hugging Face model that a TransformerBridge wraps is no submodule of it: its parts that the bridge has no
    component for, such as a dropout after the embedding, are put into eval mode too.
    """
    wrapped = [module.original_model for module in modules if hook_points.is_bridge(module)]
    training = [part for module in (*modules, *wrapped) for part in module.modules() if part.training]
    try:
        _set_training(training, False)
        yield
    finally:
        try:
            _set_training(training, True)
        except BaseException:  # an interrupt on the way
            _set_training(training, True)
            raise


def _set_training(parts: Iterable[nn.Module], training: bool) -> None:
    for part in parts:
        part.training = training
