"""Building an index: one streamed pass of the model over text, for one SAE or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from saewb.data.tokens import token_rows
from saewb.errors import explain
from saewb.features import storage
from saewb.features.accumulate import Gathering
from saewb.features.config import IndexFacts
from saewb.features.index import FeatureIndex, load_index
from saewb.features.logit_effects import logit_effects, written
from saewb.features.loss_effects import loss_effects
from saewb.features.neighbors import nearest
from saewb.features.text import Text
from saewb.features.token_texts import Words, words_of
from saewb.interventions.attachment import attach
from saewb.interventions.splice import flat
from saewb.models import hook_points
from saewb.models.capture import capture
from saewb.models.tokenizer import special_ids
from saewb.models.unembed import unembedding
from saewb.sae.base import SparseEncoder
from saewb.sae.encoding import firings
from saewb.sae.sae import SAE


@overload
def build_index(model: nn.Module, sae: nn.Module, tokens: Tensor | Sequence[str], **how: object) -> FeatureIndex: ...
@overload
def build_index(
    model: nn.Module, sae: Sequence[nn.Module], tokens: Tensor | Sequence[str], **how: object
) -> list[FeatureIndex]: ...
def build_index(
    model: nn.Module,
    sae: nn.Module | Sequence[nn.Module],
    tokens: Tensor | Sequence[str],
    *,
    hook: str | None = None,
    n_top: int = 20,
    window: int | tuple[int, int] = (20, 10),
    n_quantiles: int = 5,
    per_quantile: int = 4,
    n_logits: int = 10,
    n_nearest: int = 8,
    coactive_tokens: int = 2**16,
    loss_effect_tokens: int = 0,
    batch_size: int = 8,
    ctx_len: int = 128,
    skip_special_tokens: bool | Sequence[int] = True,
    folder: str | Path | None = None,
    save_every_s: float = 300.0,
    first_row: int = 0,
    seed: int = 0,
    progress: bool = False,
    neuronpedia: str | None = None,
) -> FeatureIndex | list[FeatureIndex]:
    """What every latent of an SAE does on text, from one pass over it: contexts, histogram, density, and the weights'.

    The model runs to the hook only, once for all SAEs. What is held does not grow with the text. The pass takes
    `index.facts.plan.nbytes` of each SAE: `d_sae * (n_top + n_quantiles * per_quantile) * (8 * window + 32)` bytes of
    contexts, about 750 per latent and at most 528 per coactive token beside them, and about 130 MiB to put them in
    place (380 where 128 latents or more may fire on a token). A batch adds what fires on
    it, about 150 bytes each, and at most 32 MiB of latents (or one row's); where bf16 chooses which latents are worked
    out (`saewb.kernels.select`: CPUs with instructions for it), the pass holds `rough_bytes(d_in, d_sae)` too, one and
    a half times W_enc and 72 MiB. Then the weights' figures take
    `saewb.features.logit_effects.weights_bytes(d_sae, d_model, d_vocab)`: the unembedding or one matrix of the SAE once more,
    and 64 MiB of products; no `[d_sae, d_vocab]` or `[d_sae, d_sae]` at a time. The result is the same for any
    `batch_size` and any number of interruptions, up to rounding of the model's activations.

    A latent's top contexts are about its strongest token in each row of text, and texts with equal windows are there
    once. Its sampled contexts are firings chosen uniformly, sorted by size and cut into groups of equal size: the first
    group stands for its weakest fifth, and so on.

    Ctrl-C stops the pass and returns what there is (`index.is_complete` is False then).

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        sae: an SAE or transcoder, or a list of them.
        tokens: ids, `[rows, ctx]`, without padding; or texts, to be packed into rows of `ctx_len`.
        hook: where it reads, instead of `sae.cfg.hook`.
        n_top: strongest contexts kept of each latent.
        window: tokens of a context before and after the one it is about; one number for both.
        n_quantiles: groups of sampled contexts.
        per_quantile: contexts in each.
        n_logits: words at each end of the logit effects; 0 to leave them out.
        n_nearest: latents nearest by decoder and by encoder; 0 to leave them out.
        coactive_tokens: tokens whose active latents (the 128 strongest) say which fire together: all, if there are no
            more, else a uniform sample.
        loss_effect_tokens: tokens to run with one latent switched off, to see what its top contexts lose by it. They go
            to the strongest context of each latent, first latent first, then to the second strongest ones.
        batch_size: rows run at a time.
        ctx_len: tokens in a row, if `tokens` are texts.
        skip_special_tokens: True for the tokenizer's BOS, EOS, PAD and the like, False to treat all tokens alike, or a
            list of ids. What latents do there is neither counted nor shown.
        folder: save there, at the end, when stopped, and every `save_every_s`; a folder with an unfinished index of the
            same model, SAE and settings is gone on with. With several SAEs, in a folder of its number each.
        save_every_s: seconds.
        first_row: the number of the first row of `tokens`, for a part of a text that will be merged with others.
        seed: of the samples.
        progress: show a bar.
        neuronpedia: "model/source" of the SAE's page there; None looks in `sae.cfg.metadata`.

    Returns:
        A FeatureIndex; a list of them for a list of SAEs.

    Raises:
        ValueError: if all tokens are special, if a number is out of range, or for an SAE that does not fit, as
            `saewb.attach`; if `folder` has an index of something else.
        TypeError: if `tokens` are not integers.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = build_index(model, sae, ["The river flows through the city."] * 20, ctx_len=16)
        >>> index.n_tokens, index.latent(int(index.table().density.idxmax())).top[0].text[:14]
        (140, '<|endoftext|>T')
    """
    several = not isinstance(sae, nn.Module)
    saes = list(sae) if several else [sae]
    before, after = (window, window) if isinstance(window, int) else window
    positive = {"n_top": n_top, "n_quantiles": n_quantiles, "per_quantile": per_quantile, "batch_size": batch_size}
    _check_sizes(positive, before=before, after=after, first_row=first_row, coactive_tokens=coactive_tokens)
    ids = token_rows(model, tokens, ctx_len)
    special = special_ids(model, skip_special_tokens)
    text = Text(ids, special, first_row, batch_size, next(model.parameters()).device)
    sizes = (ids.shape[1], n_top, n_quantiles, per_quantile, before, after, coactive_tokens)
    plans = [_facts(model, s, hook, sizes, seed, special, neuronpedia) for s in saes]
    places = _places(folder, len(saes), several)
    builds = [_started(s, f, p) for s, f, p in zip(saes, plans, places, strict=True)]
    _pass(model, builds, text, progress, save_every_s)
    found = [_finished(model, b, text, n_logits, n_nearest, loss_effect_tokens) for b in builds]
    return found if several else found[0]


def extend_index(
    index: FeatureIndex,
    model: nn.Module,
    sae: nn.Module,
    tokens: Tensor | Sequence[str],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> FeatureIndex:
    """See `FeatureIndex.extend`."""
    text = Text(
        token_rows(model, tokens, index.facts.ctx_len),
        index.facts.special,
        index.facts.next_row,
        batch_size,
        next(model.parameters()).device,
    )
    if text.ids.shape[1] != index.facts.ctx_len:
        what = f"rows of {text.ids.shape[1]} tokens for {index!r}."
        raise ValueError(explain(what, want=f"rows of {index.facts.ctx_len}, as those before"))
    if sae.cfg.d_sae != index.facts.d_sae or repr(sae) != index.facts.sae:
        raise ValueError(explain(f"{index!r} cannot go on with {sae!r}.", want=index.facts.sae))
    build = _Build(sae, index.facts, Gathering(index.facts.plan, sae.device), None, index)
    build.gathering.restore(index.tensors)
    _pass(model, [build], text, progress, float("inf"))
    return _indexed(model, build, text)


@dataclass
class _Build:
    sae: nn.Module
    facts: IndexFacts
    gathering: Gathering
    folder: Path | None
    base: FeatureIndex | None = None  # what it goes on from


def _check_sizes(positive: dict[str, int], **others: int) -> None:
    for name, got in {**positive, **others}.items():
        least = 1 if name in positive else 0
        if type(got) is not int or got < least:
            raise ValueError(explain(f"build_index got {name}={got!r}.", want=f"an integer, at least {least}"))


def _facts(
    model: nn.Module,
    sae: nn.Module,
    hook: str | None,
    sizes: tuple[int, ...],  # as IndexFacts has them, from ctx_len to coactive_tokens
    seed: int,
    special: Sequence[int],
    neuronpedia: str | None,
) -> IndexFacts:
    with hook_points.lock(model), attach(model, sae, hook=hook) as attached:  # says what is wrong with it
        (write,) = attached.latents
    read = hook or sae.cfg.hook
    names = hook_points.resolve(model, write).names
    typed = next((name for name in (sae.cfg.hook_out, read) if name in names), write)
    page = neuronpedia or sae.cfg.metadata.get("neuronpedia_id") or sae.cfg.metadata.get("neuronpedia")
    l0_most = sae.cfg.k if isinstance(sae, SAE) and sae.cfg.k is not None else sae.cfg.d_sae
    made = (sae.cfg.d_sae, *sizes, l0_most, seed, tuple(special), (), 0, repr(sae), str(model.cfg.model_name))
    return IndexFacts(*made, read, typed, None, page or None)


def _places(folder: str | Path | None, n: int, several: bool) -> list[Path | None]:
    if folder is None:
        return [None] * n
    root = Path(folder).expanduser()
    return [root / str(i) for i in range(n)] if several else [root]


def _started(sae: nn.Module, facts: IndexFacts, folder: Path | None) -> _Build:
    build = _Build(sae, facts, Gathering(facts.plan, sae.device), folder)
    if folder is not None and (folder / storage.FILE).exists():
        before = load_index(folder)
        replace(before.facts, rows=()).check_same(facts, f"folder={str(folder)!r} has an index already")
        build.gathering.restore(before.tensors)
        build.facts = before.facts
    return build


def _pass(model: nn.Module, builds: list[_Build], text: Text, progress: bool, save_every_s: float) -> None:
    """Run the model over what is still to be seen; stopped by Ctrl-C, between two batches' worth of gathering."""
    for build in builds:
        seen = build.facts.rows
        if seen and build.folder is not None and (len(seen) > 1 or seen[0][0] != text.first_row):
            what = f"{build.folder} has rows {seen}, which is no beginning of this text ({text.first_row} on)."
            raise ValueError(explain(what, fix="index.extend(model, sae, tokens)"))
        if seen and build.folder is not None and not _same_text(build, text):
            what = f"{build.folder} has an index of another text."
            raise ValueError(
                explain(what, want="the same text, or a new folder", fix="index.extend(model, sae, tokens)")
            )
    first, encoders = min(_next(build, text) for build in builds), [SparseEncoder(build.sae) for build in builds]
    saved = time.monotonic()
    # Gathering runs on a thread of its own: an interrupt reaches the main thread only, so no batch is half counted.
    with _bar(progress, text.end - first) as advance, ThreadPoolExecutor(1) as aside:
        pending: Future | None = None
        try:
            for row, ids, plain in text.batches(first):
                seen = _captured(model, builds, ids)
                pending = aside.submit(_gather, builds, encoders, text, seen, row, ids, plain)
                pending.result()  # at once: two threads that compute would only get in each other's way
                advance(len(ids))
                if time.monotonic() - saved > save_every_s:
                    pending = aside.submit(_checkpoint, builds, text)
                    pending.result()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if pending is not None:
                pending.result()  # what there is is kept; `is_complete` tells


def _same_text(build: _Build, text: Text) -> bool:
    """Whether every token that a context found so far is about is the one in this text."""
    top = build.gathering.top
    place = (top.position[top.position >= 0] - text.first_row * build.facts.ctx_len).cpu()
    there = top.tokens[..., build.facts.before][top.position >= 0].long().cpu()
    inside = bool((place < text.ids.numel()).all())
    return inside and torch.equal(text.ids.flatten()[place], there)


def _next(build: _Build, text: Text) -> int:
    return max(text.first_row, build.facts.next_row)


@torch.no_grad()
def _captured(model: nn.Module, builds: list[_Build], ids: Tensor) -> dict[str, Tensor]:
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        return capture(model, ids, [build.facts.hook for build in builds])
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def _gather(
    builds: list[_Build],
    encoders: list[SparseEncoder],
    text: Text,
    seen: dict[str, Tensor],
    row: int,
    ids: Tensor,
    plain: Tensor,
) -> None:
    for build, encoder in zip(builds, encoders, strict=True):
        if row < _next(build, text):
            continue
        x = flat(build.sae, seen[build.facts.hook], build.sae.cfg.d_in, build.facts.hook)
        for part in firings(encoder, x, ids, plain, row):
            build.gathering.update(part)
        build.facts = build.facts.with_rows([(row, row + len(ids))], int(plain.sum()))


def _checkpoint(builds: list[_Build], text: Text) -> None:
    for build in builds:
        if build.folder is not None:
            tensors = {k: t.cpu() for k, t in build.gathering.tensors().items()}
            facts = replace(build.facts, n_planned=len(text.ids))
            storage.write(build.folder, facts, tensors, Words())


def _finished(
    model: nn.Module, build: _Build, text: Text, n_logits: int, n_nearest: int, loss_effect_tokens: int
) -> FeatureIndex:
    figures = _weights(model, build, n_logits, n_nearest)
    build.base = FeatureIndex(build.facts, figures, Words())
    index = _indexed(model, build, text)
    if loss_effect_tokens and index.is_complete:
        effects = loss_effects(model, build.sae, index.facts, index.tensors, text.row, loss_effect_tokens)
        index = replace(index, tensors={**index.tensors, "loss_effects": effects})
    if build.folder is not None:
        index.save(build.folder)
    return index


def _indexed(model: nn.Module, build: _Build, text: Text) -> FeatureIndex:
    complete = build.facts.next_row >= text.end
    facts = replace(build.facts, n_planned=None if complete else build.facts.n_rows + text.end - build.facts.next_row)
    made = build.base.with_gathered(facts, build.gathering, Words())
    contexts = [made.tensors["top.tokens"], made.tensors["sample.tokens"]]
    single = [t for name, t in made.tensors.items() if name in ("logits.top_ids", "logits.bottom_ids")]
    return replace(made, words=words_of(getattr(model, "tokenizer", None), contexts, single))


@torch.no_grad()
def _weights(model: nn.Module, build: _Build, n_logits: int, n_nearest: int) -> dict[str, Tensor]:
    made = {"decoder_norm": build.sae.W_dec.float().norm(dim=1)}
    directions = written(model, build.sae.W_dec, build.facts.hook_out, build.sae.cfg.head) if n_logits else None
    if directions is not None:
        made |= logit_effects(directions, unembedding(model).to(build.sae.device), n_logits)
    if n_nearest and len(build.sae.W_dec) > 1:
        made |= nearest(build.sae.W_dec, n_nearest, "decoder")
        if "W_enc" in (weights := dict(build.sae.named_parameters())):
            made |= nearest(weights["W_enc"].T, n_nearest, "encoder")
    return {name: t.detach().cpu() for name, t in made.items()}


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda n: None
        return
    from tqdm.auto import tqdm  # comes with transformers

    with tqdm(total=total, desc="index", unit="row", leave=False) as bar:
        yield bar.update
