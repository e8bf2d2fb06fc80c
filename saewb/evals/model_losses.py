"""The passes over the model that an evaluation is made of.

1. `at_hooks`: the model runs once to the last point any SAE needs; reconstruction, firing and the mean activation of
   all SAEs come from that pass.
2. `in_model`: each batch runs as it is, with each SAE's output, and with zeros and the mean at each point that is
   written to; losses and KL divergences.

Memory is bounded by one batch: the latents of one SAE in the first, two logits tensors in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions.attachment import attach, attachments
from saewb.interventions.site import places
from saewb.interventions.splice import flat
from saewb.metrics import ReconstructionStream, float64
from saewb.models import hook_points
from saewb.models.capture import capture
from saewb.sae.sae import SAE
from saewb.sae.sparse import SparseLatents
from saewb.stats.firing import FiringStream

# Probabilities of at most this many (token, word) pairs are held at a time (64 MiB in float32).
_TILE = 2**24


# -- what is evaluated, and on what ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """An SAE and where it belongs, by the names the caller used."""

    model: nn.Module
    sae: nn.Module
    read: str
    write: str
    skipped: list[int] | Literal[False]

    @property
    def written(self) -> tuple[str, int | None]:
        """What ablating means here: the point, and the one head if it is one."""
        return hook_points.resolve(self.model, self.write).name, self.sae.cfg.head


def place(model: nn.Module, sae: nn.Module, hook: str | None, hook_out: str | None, special: Sequence[int]) -> Place:
    """Where the SAE belongs; whatever does not fit is said here."""
    # `attach` knows where an SAE goes and says what is wrong with it; its view of latents names the point it writes to.
    places(sae, hook, hook_out)  # says what is wrong with an SAE of many points
    with hook_points.lock(model):
        before = {name: found for found in attachments(model) for name in found.latents}
        with attach(model, sae, hook=hook, hook_out=hook_out) as attached:
            (write,) = attached.latents
    if write in before:
        what = f"{before[write]!r} writes to {write!r} already, so the model there is not as it is."
        raise ValueError(explain(what, fix="saewb.detach_all(model)"))
    read = hook or sae.cfg.hook
    names = hook_points.resolve(model, write).names
    typed = next((name for name in (hook_out, sae.cfg.hook_out, read) if name in names), write)
    return Place(model, sae, read, typed, list(special) or False)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of tokens, and which of them count."""

    ids: Int[Tensor, "batch pos"]
    plain: Bool[Tensor, "batch pos"]  # not special
    kept: Int[Tensor, " kept"] | None  # those tokens, counted through the batch; None if all are
    lengths: list[int]  # how many of them are in each row
    targets: Int[Tensor, "batch pos"]  # the next token; 0 at the end of a row
    predicts: Bool[Tensor, "batch pos"]  # neither it nor its target is special

    def keep(self, per_token: Float[Tensor, "batch pos d"]) -> Float[Tensor, "kept d"]:
        """The tokens that count."""
        rows = per_token.flatten(0, 1)
        return rows if self.kept is None else rows[self.kept]

    def keep_latents(self, latents: Tensor | SparseLatents) -> Tensor | SparseLatents:
        """The tokens that count, of either form of latents."""
        if not isinstance(latents, SparseLatents):
            return self.keep(latents)
        if self.kept is None:
            return latents
        return latents.select(self.kept)


class Batches:
    """Rows of tokens, a batch at a time. Masks are made, and counted, on the CPU, so that nobody waits for a device."""

    def __init__(self, ids: Tensor, plain: Tensor, batch_size: int, device: torch.device) -> None:
        if batch_size < 1:
            raise ValueError(explain(f"evaluate got batch_size={batch_size}.", want="at least 1", fix="batch_size=8"))
        targets, predicts = torch.zeros_like(ids), torch.zeros_like(plain)
        targets[:, :-1], predicts[:, :-1] = ids[:, 1:], plain[:, :-1] & plain[:, 1:]
        self.n_tokens, self.n_predictions = int(plain.sum()), int(predicts.sum())
        if self.n_predictions == 0:
            what = f"of {ids.numel()} tokens {self.n_tokens} are not special, and no two of them follow one another."
            raise ValueError(explain(what, want="text to predict", fix="evaluate(..., skip_special_tokens=False)"))
        self._parts = [t.split(batch_size) for t in (ids, plain, targets, predicts)]
        self._device = device

    def __len__(self) -> int:
        return len(self._parts[0])

    def __iter__(self) -> Iterator[Batch]:
        for ids, plain, targets, predicts in zip(*self._parts, strict=True):
            kept = None if plain.all() else plain.flatten().nonzero()[:, 0].to(self._device)
            lengths = plain.sum(1).tolist()
            ids, plain, targets, predicts = (t.to(self._device) for t in (ids, plain, targets, predicts))
            yield Batch(ids, plain, kept, lengths, targets, predicts)


@contextmanager
def bar(shown: bool, total: int) -> Iterator[Callable[[Iterable], Iterator]]:
    """A function that counts what is taken from an iterable, on one bar of `total`."""
    if not shown:
        yield iter
        return
    from tqdm.auto import tqdm  # comes with transformers

    with tqdm(total=total, desc="evaluate", unit="batch", leave=False) as shown_bar:

        def tick(items: Iterable) -> Iterator:
            for item in items:
                yield item
                shown_bar.update()

        yield tick


# -- at the hooks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AtHook:
    """What one SAE did with the activations at its points."""

    written: ReconstructionStream
    fired: FiringStream


def at_hooks(places: Sequence[Place], batches: Iterable[Batch]) -> list[AtHook]:
    """All SAEs on the activations of one pass over the model."""
    found = [AtHook(ReconstructionStream(), FiringStream()) for _ in places]
    names = {name for where in places for name in (where.read, where.write)}
    for batch in batches:
        seen = capture(places[0].model, batch.ids, names)
        for where, mine in zip(places, found, strict=True):
            x = flat(where.sae, seen[where.read], where.sae.cfg.d_in, where.read)
            target = flat(where.sae, seen[where.write], where.sae.cfg.d_out, where.write)
            latents = _latents(where.sae, x)  # at all positions, special ones too: a temporal SAE looks back at them
            mine.written.update(batch.keep(target), batch.keep(where.sae.decode(latents, x)))
            mine.fired.update(batch.keep_latents(latents), batch.lengths)
    return found


def _latents(sae: nn.Module, x: Tensor) -> Tensor | SparseLatents:
    sparse = isinstance(sae, SAE) and sae.cfg.k is not None and sae.dtype == torch.float32
    return sae.encode_topk(x) if sparse else sae.encode(x)


# -- in the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Means over what counts, in nats per token."""

    clean: float
    with_sae: float
    zero: float
    mean: float
    kl_with_sae: float
    kl_zero: float
    kl_mean: float


def in_model(places: Sequence[Place], means: Sequence[Tensor], batches: Batches, tick: Callable) -> list[Losses]:
    """What each SAE, and ablating where it writes, does to the model's predictions."""
    ablations = {where.written: (where, mean) for where, mean in zip(places, means, strict=True)}
    total = None
    for batch in tick(batches):
        sums = _in_model(places, list(ablations.values()), batch)
        total = sums if total is None else total + sums
    n_losses, n_kl = batches.n_predictions, batches.n_tokens
    ((clean, _), *rest) = [(loss / n_losses, kl / n_kl) for loss, kl in total.tolist()]
    spliced, ablated = rest[: len(places)], rest[len(places) :]
    pairs = dict(zip(ablations, zip(ablated[::2], ablated[1::2], strict=True), strict=True))
    found = []
    for where, (loss, kl) in zip(places, spliced, strict=True):
        (zero, kl_zero), (mean, kl_mean) = pairs[where.written]
        found.append(Losses(clean, loss, zero, mean, kl, kl_zero, kl_mean))
    return found


def _in_model(
    places: Sequence[Place], ablations: Sequence[tuple[Place, Tensor]], batch: Batch
) -> Float[Tensor, "runs 2"]:
    """Sums over this batch of (loss, KL from the model as it is): as it is, with each SAE, with zeros, mean, ..."""
    model = places[0].model
    with hook_points.lock(model):
        clean = model(batch.ids)
        runs = [_compared(clean, clean, batch)]
        for where in places:
            with attach(model, where.sae, where.read, hook_out=where.write, skip_special_tokens=where.skipped):
                runs.append(_compared(clean, model(batch.ids), batch))
        for where, mean in ablations:
            runs += [_compared(clean, _ablated(where, batch, v), batch) for v in (torch.zeros_like(mean), mean)]
    return torch.stack(runs)


def _ablated(where: Place, batch: Batch, value: Float[Tensor, " d_out"]) -> Float[Tensor, "batch pos d_vocab"]:
    def edit(activation: Tensor) -> Tensor:
        new = activation.clone(memory_format=torch.contiguous_format)  # so that all heads side by side are a view of it
        flat(where.sae, new, where.sae.cfg.d_out, where.write)[:] = value
        return torch.where(batch.plain.view(*batch.plain.shape, *[1] * (new.ndim - 2)), new, activation)

    with hook_points.editing(where.model, {where.write: edit}):
        return where.model(batch.ids)


def _compared(clean: Tensor, other: Tensor, batch: Batch) -> Float[Tensor, "2"]:
    """Sums: the other's loss where it counts, and KL(p_clean || p_other) over tokens that are not special."""
    parts = []
    for p, q, targets, predicts, plain in _tiles(clean, other, batch.targets, batch.predicts, batch.plain):
        q = q.float().log_softmax(-1)
        loss = torch.where(predicts, -q.gather(1, targets[:, None])[:, 0], 0)
        if other is clean:
            parts.append(torch.stack([loss, torch.zeros_like(loss)]))
            continue
        p = p.float().log_softmax(-1)
        parts.append(torch.stack([loss, torch.where(plain, (p.exp() * (p - q)).sum(-1), 0)]))
    return float64(torch.cat(parts, 1)).sum(1)


def _tiles(logits: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few tokens of each of these `[batch, pos, ...]`, until all have been given."""
    n = max(1, _TILE // logits.shape[-1])
    return zip(*(t.flatten(0, 1).split(n) for t in (logits, *per_token)), strict=True)
