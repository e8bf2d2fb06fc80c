"""How good an SAE is in the model it belongs to.

1. The model runs to the hook only, over all batches: reconstruction, firing, and the mean activation.
2. Each batch then runs four times: as it is, with the SAE's output, with zeros, with the mean; losses and KL.

Memory is bounded by one batch: its latents in the first part, two logits tensors in the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb import hooks
from saewb.activations import capture
from saewb.attachment import attach, attachments
from saewb.errors import explain
from saewb.evaluation import Evaluation
from saewb.metrics import DEAD_BELOW, DENSE_ABOVE, Firing, FiringStream, Reconstruction, ReconstructionStream, float64
from saewb.splice import flat
from saewb.tokens import special_ids, special_mask, token_rows

# Probabilities of at most this many (token, word) pairs are held at a time (64 MiB in float32).
_TILE = 2**24


def evaluate(
    model: nn.Module,
    sae: nn.Module,
    tokens: Int[Tensor, "rows ctx"] | Sequence[str],
    *,
    hook: str | None = None,
    hook_out: str | None = None,
    batch_size: int = 8,
    ctx_len: int = 128,
    skip_special_tokens: bool | Sequence[int] = True,
    dead_below: float = DEAD_BELOW,
    dense_above: float = DENSE_ABOVE,
    progress: bool = False,
) -> Evaluation:
    """How good an SAE is, by its reconstruction and by what the model does with it: CE recovered 1 is perfect.

        ce_recovered = (ce_ablated - ce_with_sae) / (ce_ablated - ce_clean)
        kl           = mean over tokens of KL(p_clean || p_with_sae)

    Special tokens are no part of it: there the model's own activation goes on, under the SAE and under either ablation
    (where activations are often a hundred times as long as elsewhere, which no SAE is meant to write), and every figure
    leaves them out. l0, fvu and the like, and kl, are about the other tokens (`n_tokens`). A loss is about a prediction
    from one of them of another (`n_predictions`): neither the token predicted from nor the token predicted is special;
    the same ones in all four losses.

    "Ablated" means that zeros, or the mean activation over the tokens that count, stand at the point the SAE writes to
    (the one head it writes to). For a transcoder the figures compare what it writes with what the model has there. All
    else is the model as it is, with hooks and SAEs that are on it elsewhere.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        sae: an SAE or transcoder.
        tokens: ids, `[rows, ctx]`, without padding; or texts, to be packed into rows of `ctx_len`.
        hook: where it reads, instead of `sae.cfg.hook`.
        hook_out: where it writes, instead of `sae.cfg.hook_out`; for transcoders.
        batch_size: rows run at a time.
        ctx_len: tokens in a row, if `tokens` are texts.
        skip_special_tokens: True for the tokenizer's BOS, EOS, PAD and the like, False to treat all tokens alike, or a
            list of ids.
        dead_below: a latent is dead that fires on fewer than this fraction of tokens. The default means "never" on
            fewer than a million tokens.
        dense_above: a latent is dense that fires on more than this fraction of tokens.
        progress: show a bar.
    Returns:
        An Evaluation. ce_recovered is nan where ablating does not change the loss.
    Raises:
        ValueError: if no tokens are left to evaluate, or rows have fewer than two; for a hook or SAE that does not fit,
            as `saewb.attach`; if another SAE writes to the same point; if the activation never varies.
        TypeError: if `tokens` are not integers.
    Source:
        Figures: Gao et al. 2024, arXiv:2406.04093; Rajamanoharan et al. 2024, arXiv:2404.16014.
    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> found = saewb.evaluate(model, sae, ["The river flows through the city."] * 8, ctx_len=16)
        >>> found.n_tokens > 30, 0 < found.fvu < 1, found.ce_zero_ablated > found.ce_clean
        (True, True, True)
    """
    ids = token_rows(model, tokens, ctx_len)
    special = special_ids(model, skip_special_tokens)
    place = _place(model, sae, hook, hook_out, special)
    batches = _Batches(ids, ~special_mask(ids, special), batch_size, next(model.parameters()).device)
    with torch.no_grad(), hooks.eval_mode(model, sae), _bar(progress, 2 * len(batches)) as tick:
        written, fired, mean = _at_hook(place, tick(batches), dead_below, dense_above)
        sums = torch.stack([_in_model(place, batch, mean) for batch in tick(batches)]).sum(0).tolist()
    kl = sums.pop(2) / batches.n_tokens
    clean, spliced, zero, mean_ablated = (total / batches.n_predictions for total in sums)
    figures = {**asdict(written), "l0": fired.l0, "dead_frac": fired.dead_frac, "dense_frac": fired.dense_frac}
    return Evaluation(
        **figures,
        ce_clean=clean,
        ce_with_sae=spliced,
        ce_zero_ablated=zero,
        ce_mean_ablated=mean_ablated,
        ce_recovered_zero=_recovered(zero, spliced, clean),
        ce_recovered_mean=_recovered(mean_ablated, spliced, clean),
        kl=kl,
        n_predictions=batches.n_predictions,
        dead_below=dead_below,
        dense_above=dense_above,
        hook=place.read,
        hook_out=place.write,
        model=str(model.cfg.model_name),
        sae=repr(sae),
    )


# -- what is evaluated, and on what ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    model: nn.Module
    sae: nn.Module
    read: str
    write: str
    skipped: list[int] | Literal[False]


@dataclass(frozen=True, eq=False)
class _Batch:
    ids: Int[Tensor, "batch pos"]
    plain: Bool[Tensor, "batch pos"]  # not special
    kept: Int[Tensor, " kept"] | None  # those tokens, counted through the batch; None if all are
    targets: Int[Tensor, "batch pos"]  # the next token; 0 at the end of a row
    predicts: Bool[Tensor, "batch pos"]  # neither it nor its target is special

    def keep(self, per_token: Float[Tensor, "batch pos d"]) -> Float[Tensor, "kept d"]:
        flat = per_token.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]


class _Batches:
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

    def __iter__(self) -> Iterator[_Batch]:
        for ids, plain, targets, predicts in zip(*self._parts, strict=True):
            kept = None if plain.all() else plain.flatten().nonzero()[:, 0].to(self._device)
            ids, plain, targets, predicts = (t.to(self._device) for t in (ids, plain, targets, predicts))
            yield _Batch(ids, plain, kept, targets, predicts)


def _place(
    model: nn.Module, sae: nn.Module, hook: str | None, hook_out: str | None, special: tuple[int, ...]
) -> _Place:
    # `attach` knows where an SAE goes and says what is wrong with it; its view of latents names the point it writes to.
    with hooks.lock(model):
        before = {name: found for found in attachments(model) for name in found.latents}
        with attach(model, sae, hook=hook, hook_out=hook_out) as attached:
            (write,) = attached.latents
    if write in before:
        what = f"{before[write]!r} writes to {write!r} already, so the model there is not as it is."
        raise ValueError(explain(what, fix="saewb.detach_all(model)"))
    read = hook or sae.cfg.hook
    names = hooks.resolve(model, write).names
    typed = next((name for name in (hook_out, sae.cfg.hook_out, read) if name in names), write)
    return _Place(model, sae, read, typed, list(special) or False)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[Iterable], Iterator]]:
    """A function that counts what is taken from an iterable, on one bar of `total`."""
    if not shown:
        yield iter
        return
    from tqdm.auto import tqdm  # comes with transformers

    with tqdm(total=total, desc="evaluate", unit="batch", leave=False) as bar:

        def tick(items: Iterable) -> Iterator:
            for item in items:
                yield item
                bar.update()

        yield tick


# -- at the hook -----------------------------------------------------------------------------------------------------


def _at_hook(
    place: _Place, batches: Iterable[_Batch], dead_below: float, dense_above: float
) -> tuple[Reconstruction, Firing, Float[Tensor, " d_out"]]:
    written, fired = ReconstructionStream(), FiringStream()
    for batch in batches:
        x, target = _activations(place, batch)
        latents = place.sae.encode(x)  # at all positions, special ones too: a temporal SAE looks back at them
        written.update(batch.keep(target), batch.keep(place.sae.decode(latents, x)))
        fired.update(batch.keep(latents))
    return written.result(), fired.result(dead_below, dense_above), written.mean()


def _activations(place: _Place, batch: _Batch) -> tuple[Tensor, Tensor]:
    """What the SAE reads, and what stands where it writes."""
    seen = capture(place.model, batch.ids, (place.read, place.write))
    x = flat(place.sae, seen[place.read], place.sae.cfg.d_in, place.read)
    return x, flat(place.sae, seen[place.write], place.sae.cfg.d_out, place.write)


# -- in the model ----------------------------------------------------------------------------------------------------


def _in_model(place: _Place, batch: _Batch, mean: Float[Tensor, " d_out"]) -> Float[Tensor, "5"]:
    """Sums over this batch: loss as it is, with the SAE, KL; loss with zeros, with the mean."""
    with hooks.lock(place.model):
        clean = place.model(batch.ids)
        with attach(place.model, place.sae, place.read, hook_out=place.write, skip_special_tokens=place.skipped):
            spliced = place.model(batch.ids)
        compared = _compared(clean, spliced, batch)
        del clean, spliced
        ablated = [_loss(_ablated(place, batch, value), batch) for value in (torch.zeros_like(mean), mean)]
    return torch.stack([*compared, *ablated])


def _ablated(place: _Place, batch: _Batch, value: Float[Tensor, " d_out"]) -> Float[Tensor, "batch pos d_vocab"]:
    def edit(activation: Tensor) -> Tensor:
        new = activation.clone(memory_format=torch.contiguous_format)  # so that all heads side by side are a view of it
        flat(place.sae, new, place.sae.cfg.d_out, place.write)[:] = value
        return torch.where(batch.plain.view(*batch.plain.shape, *[1] * (new.ndim - 2)), new, activation)

    with hooks.editing(place.model, {place.write: edit}):
        return place.model(batch.ids)


def _compared(clean: Tensor, spliced: Tensor, batch: _Batch) -> Float[Tensor, "3"]:
    """Sums: loss of each where it counts, and KL(p_clean || p_spliced) over tokens that are not special."""
    parts = []
    for p, q, targets, predicts, plain in _tiles(clean, spliced, batch.targets, batch.predicts, batch.plain):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl = torch.where(plain, (p.exp() * (p - q)).sum(-1), 0)
        parts.append(torch.stack([_nll(p, targets, predicts), _nll(q, targets, predicts), kl]))
    return float64(torch.cat(parts, 1)).sum(1)


def _loss(logits: Float[Tensor, "batch pos d_vocab"], batch: _Batch) -> Float[Tensor, ""]:
    """Sum of -log p(next token) where it counts."""
    tiles = _tiles(logits, batch.targets, batch.predicts)
    return float64(torch.cat([_nll(rows.float().log_softmax(-1), *what) for rows, *what in tiles])).sum()


def _nll(logp: Float[Tensor, "tokens d_vocab"], targets: Tensor, counted: Tensor) -> Float[Tensor, " tokens"]:
    return torch.where(counted, -logp.gather(1, targets[:, None])[:, 0], 0)


def _tiles(logits: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few tokens of each of these `[batch, pos, ...]`, until all have been given."""
    n = max(1, _TILE // logits.shape[-1])
    return zip(*(t.flatten(0, 1).split(n) for t in (logits, *per_token)), strict=True)


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else math.nan
