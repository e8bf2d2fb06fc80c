"""A model's activations at its hook points.

`capture` is one forward pass that stops after the last layer anybody asked for: no logits, no copies. `Activations` is
what streams of them (`saewb.data.stream`) are made of: tokens by rows, at one or several points.
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


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """Tokens at one or several points of a model: row t of every tensor is the same token.

    Raises:
        ValueError: if a tensor is no matrix, or they have different numbers of rows.

    Example:
        >>> batch = Activations({"blocks.0.hook_resid_post": torch.zeros(5, 8)}, ids=torch.arange(5))
        >>> len(batch), batch.rows(slice(0, 2)).ids.tolist(), batch
        (5, [0, 1], Activations(5 tokens: blocks.0.hook_resid_post 8))
    """

    values: Mapping[str, Tensor]
    """By point: [tokens, d], in the dtype and on the device they were made."""
    ids: Tensor | None = None
    """[tokens], which token of the vocabulary; integers, on the CPU; None: not known."""

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
        """Bytes that the rows take."""
        tensors = [*self.values.values(), *([] if self.ids is None else [self.ids])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def rows(self, which: slice | Tensor) -> Activations:
        """Some of the tokens: views for a slice, copies for indices (int64, on the CPU)."""
        if isinstance(which, slice):
            return Activations(
                {n: v[which] for n, v in self.values.items()}, None if self.ids is None else self.ids[which]
            )
        values = {n: v.index_select(0, which.to(v.device, non_blocking=True)) for n, v in self.values.items()}
        return Activations(values, None if self.ids is None else self.ids.index_select(0, which))


def joined(parts: Sequence[Activations]) -> Activations:
    """The tokens of several, in order; of one part, itself. Ids are kept if all parts have them."""
    if len(parts) == 1:
        return parts[0]
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    known = all(part.ids is not None for part in parts)
    return Activations(values, torch.cat([part.ids for part in parts]) if known else None)


def capture(model: nn.Module, tokens: Int[Tensor, "batch pos"], points: Iterable[str]) -> dict[str, Tensor]:
    """Activations at several points from one forward pass, which stops after the last layer that is needed.

    The model's lock is held for the pass, and its hooks are afterwards as before. Hooks and SAEs that are on it have
    their effect, as in any pass. Gradients are recorded unless the caller says `torch.no_grad()`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        tokens: ids, on the model's device.
        points: names of hook points, by any of their names; each once or more.

    Returns:
        By the names given: `[batch, pos, d]`, or `[batch, pos, heads, d_head]` where the point has heads; the model's
        own tensors, in its dtype and on its device. Clone what must outlive a hook that changes it in place.

    Raises:
        ValueError: for a point that does not exist, is switched off, or did not fire.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny")
        >>> seen = capture(model, model.to_tokens("A cat sat."), ["blocks.2.hook_resid_post"])
        >>> seen["blocks.2.hook_resid_post"].shape
        torch.Size([1, 5, 128])
    """
    names = dict.fromkeys(points)
    with capturing(model, names) as seen:
        model(tokens, return_type=None, stop_at_layer=stop_layer(model, names))
    return {name: seen[name] for name in names}


@contextmanager
def capturing(model: nn.Module, points: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the last pass inside gives at several points; for who runs the model, and wants more of it than `capture`.

    Args:
        model: as for `capture`; its lock is held.
        points: as for `capture`.

    Raises:
        ValueError: as `capture`, at the end.
    """
    seen: dict[str, Tensor] = {}
    names = dict.fromkeys(points)
    with hook_points.editing(model, {name: _noting(seen, name) for name in names}):
        yield seen
    for name in names:
        if name not in seen:
            raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))


def stop_layer(model: nn.Module, points: Iterable[str]) -> int | None:
    """The first layer that need not run for these points, for `stop_at_layer`; None if one is outside of blocks."""
    layers = [hook_points.resolve(model, name).layer for name in points]
    return None if None in layers or not layers else max(layers) + 1


def _noting(seen: dict[str, Tensor], name: str) -> hook_points.Edit:
    def edit(activation: Tensor) -> None:
        seen[name] = activation

    return edit


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """These modules in eval mode (no dropout), each part back in its own mode afterwards."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
