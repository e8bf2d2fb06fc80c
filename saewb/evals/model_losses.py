"""Passes over the model for an evaluation.

1. `evaluate_at_hooks`: the model runs once to the last point any SAE needs; reconstruction, firing and the mean
   activation of all SAEs come from that pass.
2. `evaluate_in_model`: each batch runs through the clean model, with each SAE's output, and with zeros and the mean at
   each write point; losses and KL divergences.

Of n processes each runs every n-th batch; sums are merged in float64.

Memory is bounded by one batch: the latents of one SAE in the first, two logits tensors in the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from saewb._finite import FiniteCheck
from saewb.distributed import ParallelContext
from saewb.errors import explain
from saewb.interventions.attachment import attach
from saewb.interventions.site import Site, check_reconstructs
from saewb.metrics import ReconstructionStream, float64
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capture
from saewb.models.tokenizer import special_mask
from saewb.sae.sae import SAE
from saewb.sae.sparse import SparseLatents
from saewb.stats.firing import FiringStream

_TILE = 2**24
"""Probabilities held at a time at most (64 MiB in float32)."""


# -- sites and tokens ------------------------------------------------------------------------------------------------


def clean_site(model: nn.Module, sae: nn.Module, hook: str | None, hook_out: str | None) -> Site:
    """Resolve the SAE's site, and check that nothing attached writes to its points.

    Raises:
        ValueError: if the SAE does not fit the model, or something attached writes to one of its points.
        TypeError: as `Site.of`.
    """
    site = Site.of(model, sae, hook, hook_out)
    check_reconstructs(sae)
    check_unmodified(model, site.points, steered=True)
    return site


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, with masks of those that count."""

    ids: Int[Tensor, "batch pos"]
    plain: Bool[Tensor, "batch pos"]
    """True at tokens that are not special: those that count."""
    plain_index: Int[Tensor, " plain"] | None
    """Indices of plain tokens in the flattened batch; None if all are plain."""
    lengths: list[int]
    """Number of plain tokens in each row."""
    targets: Int[Tensor, "batch pos"]
    """Next token; 0 at the end of a row."""
    predicts: Bool[Tensor, "batch pos"]
    """True where neither the token nor its target is special."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device: a model may be spread over several."""
        if self.ids.device == device:
            return self
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})

    def select(self, per_token: Float[Tensor, "batch pos d"]) -> Float[Tensor, "plain d"]:
        """Rows of the tokens that count."""
        rows = per_token.flatten(0, 1)
        return rows if self.plain_index is None else rows[self.plain_index]

    def select_latents(self, acts: Tensor | SparseLatents) -> Tensor | SparseLatents:
        """Latents of the tokens that count, in either form."""
        if not isinstance(acts, SparseLatents):
            return self.select(acts)
        return acts if self.plain_index is None else acts.select(self.plain_index)


class Batches:
    """Batches of token rows. Masks are computed and counted on the CPU, so that nothing waits for a device."""

    def __init__(self, ids: Tensor, special: Sequence[int], batch_size: int, device: torch.device) -> None:
        if batch_size < 1:
            raise ValueError(explain(f"evaluate got batch_size={batch_size}.", want="at least 1", fix="batch_size=8"))
        plain = ~special_mask(ids, special)
        targets, predicts = torch.zeros_like(ids), torch.zeros_like(plain)
        targets[:, :-1], predicts[:, :-1] = ids[:, 1:], plain[:, :-1] & plain[:, 1:]
        self.n_tokens, self.n_predictions = int(plain.sum()), int(predicts.sum())
        if self.n_predictions == 0:
            what = f"of {ids.numel()} tokens {self.n_tokens} are not special, and no two of them follow one another."
            raise ValueError(explain(what, want="text to predict", fix="evaluate(..., skip_special_tokens=False)"))
        self.special = special
        self._parts = [t.split(batch_size) for t in (ids, plain, targets, predicts)]
        self._device = device

    def __len__(self) -> int:
        return len(self._parts[0])

    def __getitem__(self, number: int) -> Batch:
        ids, plain, targets, predicts = (parts[number] for parts in self._parts)
        plain_index = None if plain.all() else plain.flatten().nonzero()[:, 0].to(self._device)
        lengths = plain.sum(1).tolist()
        ids, plain, targets, predicts = (t.to(self._device) for t in (ids, plain, targets, predicts))
        return Batch(ids, plain, plain_index, lengths, targets, predicts)

    def rounds(self, parallel: ParallelContext, bar: tqdm) -> Iterator[Batch | None]:
        """This process's batch of each round, in which every process has one; None at the end if there is none left."""
        for begin in range(0, len(self), parallel.size):
            number = begin + parallel.rank
            yield self[number] if number < len(self) else None
            bar.update(min(parallel.size, len(self) - begin))


# -- at the hooks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HookMetrics:
    """Reconstruction and firing of one SAE at its points."""

    reconstruction: ReconstructionStream
    firing: FiringStream

    def state(self) -> dict[str, Tensor]:
        """The sums of both, by name."""
        streams = {"reconstruction": self.reconstruction, "firing": self.firing}
        return {f"{part}.{name}": t for part, stream in streams.items() for name, t in stream.state().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> HookMetrics:
        """The metrics with that `state()`."""
        parts: dict[str, dict[str, Tensor]] = {"reconstruction": {}, "firing": {}}
        for key, t in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = t
        streams = ReconstructionStream.from_state(parts["reconstruction"]), FiringStream.from_state(parts["firing"])
        return cls(*streams)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the tokens of another's `state()`."""
        other = HookMetrics.from_state(state)
        self.reconstruction.merge(other.reconstruction)
        self.firing.merge(other.firing)

    def of_all(self, parallel: ParallelContext) -> HookMetrics:
        """Those of all processes, the same bits in each."""
        if parallel.size == 1:
            return self
        parallel.merge_to_main(self.state, self.merge)
        return HookMetrics.from_state(parallel.broadcast_tensors(self.state()))


def evaluate_at_hooks(
    model: nn.Module, sites: Sequence[Site], batches: Batches, bar: tqdm, parallel: ParallelContext
) -> list[HookMetrics]:
    """Metrics of all SAEs on the activations of one pass over the model."""
    metrics = [HookMetrics(ReconstructionStream(), FiringStream()) for _ in sites]
    names, finite = {name for site in sites for name in (site.read.name, site.write.name)}, FiniteCheck()
    for batch in batches.rounds(parallel, bar):
        with parallel.raise_together():
            if batch is not None:
                _measure(model, sites, metrics, names, batch, finite)
    with parallel.raise_together():
        finite.look()
    return [of_site.of_all(parallel) for of_site in metrics]


def _measure(
    model: nn.Module,
    sites: Sequence[Site],
    metrics: Sequence[HookMetrics],
    names: set[str],
    batch: Batch,
    finite: FiniteCheck,
) -> None:
    activations = capture(model, batch.ids, names)
    for site, streams in zip(sites, metrics, strict=True):
        x = site.read_input(activations[site.read.name])
        target = site.read_target(activations[site.write.name])
        finite.add(f"activations at {site.hook_name!r}", batch.select(x))
        if not site.is_one_point:
            finite.add(f"activations at {site.hook_name_out!r}", batch.select(target))
        acts = _encode(site.sae, x)  # at special tokens too: a temporal SAE looks back at them
        here = batch.to(target.device)
        streams.reconstruction.update(here.select(target), here.select(site.sae.decode(acts, x)))
        streams.firing.update(here.select_latents(acts), here.lengths)


def _encode(sae: nn.Module, x: Tensor) -> Tensor | SparseLatents:
    sparse = isinstance(sae, SAE) and sae.cfg.k is not None and sae.dtype == torch.float32
    return sae.encode_topk(x) if sparse else sae.encode(x)


# -- in the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Means over the tokens that count, in nats per token."""

    ce_clean: float
    ce_with_sae: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    kl: float
    kl_zero_ablated: float
    kl_mean_ablated: float


def evaluate_in_model(
    model: nn.Module,
    sites: Sequence[Site],
    means: Sequence[Tensor],
    batches: Batches,
    bar: tqdm,
    parallel: ParallelContext,
) -> list[Losses]:
    """Losses of the model with each SAE's output, and with its write point ablated to zeros or to its mean."""
    # SAEs with one write point share its ablations.
    ablations = {(site.write.name, site.head): (site, mean) for site, mean in zip(sites, means, strict=True)}
    sums = None
    for batch in batches.rounds(parallel, bar):
        with parallel.raise_together():
            if batch is not None:
                batch_sums = _run(model, sites, list(ablations.values()), batch, list(batches.special) or False)
                sums = batch_sums if sums is None else sums + batch_sums
    if parallel.size > 1:
        n_runs = 1 + len(sites) + 2 * len(ablations)
        sums = parallel.sum_(torch.zeros(n_runs, 2, dtype=torch.float64) if sums is None else sums.cpu())
    ((ce_clean, _), *runs) = [(ce / batches.n_predictions, kl / batches.n_tokens) for ce, kl in sums.tolist()]
    spliced, ablated = runs[: len(sites)], runs[len(sites) :]
    by_point = dict(zip(ablations, zip(ablated[::2], ablated[1::2], strict=True), strict=True))
    losses = []
    for site, (ce, kl) in zip(sites, spliced, strict=True):
        (ce_zero, kl_zero), (ce_mean, kl_mean) = by_point[site.write.name, site.head]
        losses.append(Losses(ce_clean, ce, ce_zero, ce_mean, kl, kl_zero, kl_mean))
    return losses


def _run(
    model: nn.Module,
    sites: Sequence[Site],
    ablations: Sequence[tuple[Site, Tensor]],
    batch: Batch,
    skip_special_tokens: list[int] | Literal[False],
) -> Float[Tensor, "runs 2"]:
    """Sums over this batch of (loss, KL from the clean model): clean, with each SAE, with zeros, mean, zeros, ..."""
    with hook_points.lock(model):
        clean = model(batch.ids)
        sums = [_loss_and_kl(clean, clean, batch)]
        for site in sites:
            hooks = {"hook": site.hook_name, "hook_out": site.hook_name_out}
            with attach(model, site.sae, **hooks, skip_special_tokens=skip_special_tokens):
                sums.append(_loss_and_kl(clean, model(batch.ids), batch))
        for site, mean in ablations:
            for value in (torch.zeros_like(mean), mean):
                sums.append(_loss_and_kl(clean, _run_ablated(model, site, batch, value), batch))
    return torch.stack(sums)


def _run_ablated(
    model: nn.Module, site: Site, batch: Batch, value: Float[Tensor, " d_out"]
) -> Float[Tensor, "batch pos d_vocab"]:
    def ablate(activation: Tensor) -> Tensor:
        new = activation.clone(memory_format=torch.contiguous_format)  # flattened heads are then a view of it
        site.read_target(new)[:] = value
        plain = batch.plain.to(new.device)
        return torch.where(plain.view(*plain.shape, *[1] * (new.ndim - 2)), new, activation)

    with hook_points.editing(model, {site.write.name: ablate}):
        return model(batch.ids)


def _loss_and_kl(clean: Tensor, logits: Tensor, batch: Batch) -> Float[Tensor, "2"]:
    """Sums of the loss over counted predictions and of KL(p_clean || p) over plain tokens."""
    parts, batch = [], batch.to(logits.device)
    for p, q, targets, predicts, plain in _tiles(clean, logits, batch.targets, batch.predicts, batch.plain):
        q = q.float().log_softmax(-1)
        loss = torch.where(predicts, -q.gather(1, targets[:, None])[:, 0], 0)
        if logits is clean:
            parts.append(torch.stack([loss, torch.zeros_like(loss)]))
            continue
        p = p.float().log_softmax(-1)
        parts.append(torch.stack([loss, torch.where(plain, (p.exp() * (p - q)).sum(-1), 0)]))
    return float64(torch.cat(parts, 1)).sum(1)


def _tiles(logits: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors `[batch, pos, ...]` into tiles of the same few tokens."""
    n = max(1, _TILE // logits.shape[-1])
    return zip(*(t.flatten(0, 1).split(n) for t in (logits, *per_token)), strict=True)
