"""Build a feature index: one streamed pass of the model over text, for one SAE or several.

1. Tokenize, and resolve the site of each SAE.
2. Run the model batch by batch to the hook points, encode, accumulate; save at intervals. Of n processes each takes
   every n-th batch; all of them keep account of the rows that any has read, and process 0 merges what they accumulated.
3. Add logit effects and nearest latents, from the weights alone, and the texts of the tokens.
"""

from __future__ import annotations

import inspect
import itertools
import reprlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from saewb._files import absolute
from saewb.data.tokens import token_rows
from saewb.distributed import DisconnectedError, ParallelContext, shared_call
from saewb.errors import explain
from saewb.features import storage
from saewb.features.accumulate import LatentAccumulator, TokenRows
from saewb.features.config import PARTS, IndexInfo
from saewb.features.index import FeatureIndex, load_index
from saewb.features.jacobian_lens import JacobianLens, fit_jacobian_lens
from saewb.features.logit_effects import logit_effects, loss_effects, project_to_residual
from saewb.features.neighbors import nearest
from saewb.features.token_texts import TokenTexts, collect_token_texts
from saewb.fingerprint import check_same, differences, listed, rows_digest, sae_digest, tensors_digest
from saewb.interventions.site import Site, check_reconstructs
from saewb.kernels.threads import sleep_while_contended
from saewb.models import hook_points
from saewb.models.active import check_unmodified, model_digest
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_ids, special_mask
from saewb.models.unembed import unembedding
from saewb.sae.base import SparseEncoder
from saewb.sae.sae import SAE

_LENS_ROWS = 16  # that logits="jacobian" fits a lens on


@overload
def build_index(model: nn.Module, sae: nn.Module, tokens: Tensor | Sequence[str], **how: object) -> FeatureIndex: ...
@overload
def build_index(
    model: nn.Module, sae: Sequence[nn.Module], tokens: Tensor | Sequence[str], **how: object
) -> list[FeatureIndex]: ...
@torch.inference_mode(False)
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
    logits: str | JacobianLens = "direct",
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
    extend: FeatureIndex | None = None,
) -> FeatureIndex | list[FeatureIndex]:
    """Build an index of every latent of an SAE in one pass over text: contexts, histograms, density, logit effects.

    The model runs to the hook only, once for all SAEs. Memory does not grow with the text. The pass takes
    `index.info.config.nbytes` of each SAE: `d_sae * (n_top + n_quantiles * per_quantile) * (8 * window + 32)` bytes of
    contexts, also about 750 per latent and at most 528 per coactive token, and about 130 MiB to merge them (380
    where 128 latents or more may be active on a token). A batch adds its active latents, about 150 bytes each, and at
    most 32 MiB of latents (or one row's); where a product in bf16 chooses which latents are computed
    (`saewb.kernels.select`: CPUs with instructions for it), the pass holds `ApproximateTopK.max_bytes(d_in, d_sae)`
    too, one and a half times W_enc and 72 MiB. Then logit effects and neighbors take
    `saewb.features.logit_effects.weights_bytes(d_sae, d_model, d_vocab)`: the unembedding or one matrix of the SAE once
    more, and 64 MiB of products; no `[d_sae, d_vocab]` or `[d_sae, d_sae]` at a time. A lens adds the decoder once
    more. The result is the same for any `batch_size` and any number of interruptions, up to rounding of the model's
    activations.

    Each top context of a latent is around its strongest token in a row of text; equal windows count once. Its sampled
    contexts are drawn uniformly from its active tokens, sorted by activation and split into groups of equal size: the
    first group represents the weakest fifth of its activations, and so on.

    Ctrl-C stops the pass and returns the index so far, with `index.is_complete` False.

    Under torchrun or accelerate (or after `torch.distributed.init_process_group`) every process makes this call, with
    the same arguments, and returns the whole index: each runs a share of the batches, which are those of a single
    process. Counts and contexts are equal, the float64 sums to rounding. Process 0 alone writes, after merging, which
    takes a second time the memory of contexts there; it also computes logit effects, neighbors and loss effects, while
    the others wait. A folder is continued by any number of processes. If one fails, all raise after their current
    batch, with its reason. Where only some processes call this: `with saewb.distributed.one_process():`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        sae: an SAE or transcoder, or a list of them.
        tokens: ids, `[rows, ctx]`, without padding; or texts, to be packed into rows of `ctx_len`.
        hook: hook point the SAE reads, instead of `sae.cfg.hook`.
        n_top: top contexts per latent.
        window: tokens of a context before and after its peak token; one number for both.
        n_quantiles: groups of sampled contexts.
        per_quantile: contexts in each group.
        n_logits: tokens at each end of the logit effects; 0 leaves them out.
        logits: "direct" for the words of the decoder directions themselves; a Jacobian lens, from
            `saewb.fit_jacobian_lens` or `saewb.JacobianLens.load`, for those through later layers beside them, which
            say more of early layers; "jacobian" fits one on the first 16 rows of `tokens` before the pass (Ctrl-C then:
            on fewer). The lens must have the hook points that the SAEs write.
        n_nearest: latents nearest by decoder and by encoder; 0 leaves them out.
        coactive_tokens: size of the uniform sample of tokens, of whose active latents (the 128 strongest) coactivation
            is counted; all tokens, if there are no more.
        loss_effect_tokens: tokens to run with one latent ablated, for the effect on the loss in top contexts: the
            strongest context of each latent, first latent first, then the second strongest ones.
        batch_size: rows run at a time.
        ctx_len: tokens in a row, if `tokens` are texts.
        skip_special_tokens: True for the tokenizer's BOS, EOS, PAD and the like, False to treat all tokens alike, or a
            list of ids. Activations at special tokens are neither counted nor shown.
        folder: where to save the index: at the end, when stopped, and every `save_every_s`; an unfinished index of the
            same model, SAE, text and settings in it, by content, is continued. One of another SAE or model (as after a
            training) is moved to a folder beside it, with a warning. With several SAEs, in subfolders named by number.
        save_every_s: seconds between saves.
        first_row: number of the first row of `tokens`, for a part of a text that will be merged with others.
        seed: of the samples.
        progress: whether to show a progress bar.
        neuronpedia: "model/source" of the SAE's pages on Neuronpedia; None uses `sae.cfg.metadata`.
        extend: an index of the same model and SAE, which is not modified. The result covers its text and `tokens`, as
            if built from both at once, with its settings; only `batch_size` and `progress` may be passed as well.

    Returns:
        A FeatureIndex; a list of them for a list of SAEs.

    Raises:
        RuntimeError: if another thread or process writes an index to `folder`; if another process of a launch failed.
        ValueError: if all tokens are special, if a number is out of range, or for an SAE that does not fit the model,
            as `saewb.attach`; if `folder` has an index of other text or settings, or `extend` is of another SAE, model
            or row length, or either of saewb 0.1.0; if an SAE is attached where one reads or writes, or the model is
            steered.
        TypeError: if `tokens` are not integers, or `logits` is neither.
        FloatingPointError: if the model's activations are not finite; what was read before is in `folder`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = build_index(model, sae, ["The river flows through the city."] * 20, ctx_len=16)
        >>> index.n_tokens, index.latent(int(index.table().density.idxmax())).top[0].text[:14]
        (140, '<|endoftext|>T')
    """
    if extend is not None:
        _check_only_extends(locals())
        with shared_call() as parallel:
            return _extend(extend, model, sae, tokens, batch_size, progress, parallel)
    several = isinstance(sae, (list, tuple))
    saes = list(sae) if several else [sae]
    folders = _folders(folder, len(saes), several)
    with shared_call() as parallel, ExitStack() as locks:
        with parallel.raise_together():
            before, after = (window, window) if isinstance(window, int) else window
            positive = {
                "n_top": n_top,
                "n_quantiles": n_quantiles,
                "per_quantile": per_quantile,
                "batch_size": batch_size,
            }
            _check_sizes(positive, before=before, after=after, first_row=first_row, coactive_tokens=coactive_tokens)
            special = special_ids(model, skip_special_tokens)
            text = _tokenize(model, tokens, ctx_len, special, first_row)
            sizes = (text.ids.shape[1], n_top, n_quantiles, per_quantile, before, after, coactive_tokens)
            sites = [Site.of(model, s, hook) for s in saes]
            check_unmodified(model, [point for site in sites for point in site.points])
            # Process 0 alone computes what follows from weights.
            lens = _lens(model, logits, sites, text, special, progress) if n_logits and parallel.is_main else None
            of_model = model_digest(model)
            infos = [_index_info(model, site, sizes, seed, special, neuronpedia, of_model) for site in sites]
        from_weights = (n_logits, n_nearest, loss_effect_tokens)
        _check_same_call(parallel, model, infos, text, (batch_size, *from_weights, [str(f) for f in folders]))
        builds = [_Build.empty(site, info) for site, info in zip(sites, infos, strict=True)]
        with parallel.raise_together():
            if parallel.is_main:
                for one in filter(None, folders):
                    locks.enter_context(storage.lock_index(one))
                builds = [_Build.start(*parts) for parts in zip(sites, infos, folders, strict=True)]
        _share_rows(builds, parallel)
        _run(model, builds, text, batch_size, progress, save_every_s, parallel)
        indexes = [_finish(model, b, text, *from_weights, lens, parallel) for b in builds]
    return indexes if several else indexes[0]


def _check_same_call(
    parallel: ParallelContext, model: nn.Module, infos: list[IndexInfo], text: TokenRows, settings: Any
) -> None:
    """Check that all processes of a launch build the same index."""
    if parallel.size > 1:
        values = {"model": tensors_digest(model.state_dict(keep_vars=True), reuse=True)}  # hooks cannot be compared
        values["SAE"] = [(info.digests or {}).get("SAE") for info in infos]
        values["text"] = (len(text), rows_digest(text.ids, text.first_row))
        values["settings"] = ([replace(info, digests=None).to_json() for info in infos], settings)
        parallel.check_same(values)


def _share_rows(builds: list[_Build], parallel: ParallelContext) -> None:
    """Let all processes know which rows process 0 begins with."""
    for build, info in zip(builds, parallel.broadcast_object([build.info for build in builds]), strict=True):
        build.info = info


@dataclass
class _Build:
    """State of one SAE in a pass."""

    site: Site
    """Where it reads and writes."""
    info: IndexInfo
    """Settings, and rows read so far, by all processes."""
    accumulator: LatentAccumulator
    """Contexts and statistics so far, of this process."""
    folder: Path | None = None
    """Where to save."""

    @classmethod
    def empty(cls, site: Site, info: IndexInfo, folder: Path | None = None) -> _Build:
        """Start with nothing accumulated."""
        return cls(site, info, LatentAccumulator(info.config, site.sae.device), folder)

    @classmethod
    def start(cls, site: Site, info: IndexInfo, folder: Path | None = None) -> _Build:
        """Start empty, or from the unfinished index in the folder."""
        build = cls.empty(site, info, folder)
        if folder is not None and (folder / storage.FILE).exists():
            unfinished = load_index(folder)
            if _is_of_another(unfinished.info, info, folder):
                return build
            what = f"folder={str(folder)!r} has an index already"
            replace(unfinished.info, rows=()).check_mergeable(info, what)
            build.accumulator.restore(unfinished.tensors)
            build.info = unfinished.info
        return build

    def unread(self, text: TokenRows) -> list[tuple[int, int]]:
        """Ranges of rows of the text that are not read yet."""
        ranges, begin = [], text.first_row
        for a, b in (*self.info.rows, (text.end, text.end)):
            if begin < min(a, text.end):
                ranges.append((begin, min(a, text.end)))
            begin = max(begin, b)
        return ranges

    def has_read(self, row: int) -> bool:
        """Whether this row is read."""
        return any(a <= row < b for a, b in self.info.rows)

    def merge(self, parallel: ParallelContext) -> None:
        """Bring what all processes accumulated together in process 0; the others begin anew."""
        parallel.merge_to_main(self.accumulator.tensors, self.accumulator.merge)
        if not parallel.is_main:
            self.accumulator = LatentAccumulator(self.info.config, self.site.sae.device)


def _is_of_another(written: IndexInfo, info: IndexInfo, folder: Path) -> bool:
    """Whether the index in a folder is of another SAE or model, as after a training: then it is moved aside."""
    if written.digests is None or not (different := differences(written.digests, info.digests or {}, PARTS[:2])):
        return False
    aside = storage.move_aside(folder)
    parts = [part for part in PARTS[:2] if written.digests[part] != (info.digests or {})[part]]
    what = f"the index in {str(folder)!r} is of {listed(parts, 'another ')} (by content: {'; '.join(different)}): "
    what += f"it is moved to {str(aside)!r}, and one of {info.sae}, {info.model} is built."
    fix = f"saewb.load_index({str(aside)!r})    # the old one"
    warnings.warn(explain(what, fix=fix), stacklevel=_frames_of_libraries())
    return True


def _frames_of_libraries() -> int:
    """Number of frames from the caller of this function up to the user's code, for a warning."""
    n, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("saewb", "torch"):
        n, frame = n + 1, frame.f_back
    return n


def _check_only_extends(arguments: dict[str, Any]) -> None:
    """Raise for an argument that is not allowed with `extend`."""
    parameters = inspect.signature(build_index).parameters.values()
    takes = {"extend", "batch_size", "progress"}
    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in takes]
    if others := [p.name for p in settings if arguments[p.name] != p.default]:
        what = f"build_index got extend and {', '.join(others)}."
        want = "the settings of the index: only batch_size and progress beside extend"
        raise ValueError(explain(what, want=want, fix="build_index(model, sae, tokens, extend=index)"))


def _extend(
    index: FeatureIndex,
    model: nn.Module,
    sae: Any,
    tokens: Tensor | Sequence[str],
    batch_size: int,
    progress: bool,
    parallel: ParallelContext,
) -> FeatureIndex:
    info = index.info
    with parallel.raise_together():
        text = _tokenize(model, tokens, info.ctx_len, info.special, info.next_row)
        if text.ids.shape[1] != info.ctx_len:
            what = f"rows of {text.ids.shape[1]} tokens for {index!r}."
            raise ValueError(explain(what, want=f"rows of {info.ctx_len}, as those before"))
        site = Site.of(model, sae, info.hook, info.hook_out)
        check_unmodified(model, site.points)
        now = {"SAE": sae_digest(sae), "model": model_digest(model)}
        want = f"the SAE and the model of the index: {info.sae}, {info.model}"
        check_same(repr(index), info.digests, now, want=want, fix="saewb.build_index(model, sae, tokens)    # anew")
    _check_same_call(parallel, model, [info], text, batch_size)
    build = _Build.empty(site, info)
    if parallel.is_main:
        build.accumulator.restore(index.tensors)
    _run(model, [build], text, batch_size, progress, float("inf"), parallel)
    build.merge(parallel)
    with parallel.raise_together():
        index = _to_index(model, build, index, text) if parallel.is_main else index
    return _broadcast(index, parallel)


def _check_sizes(positive: dict[str, int], **others: int) -> None:
    for name, got in {**positive, **others}.items():
        least = 1 if name in positive else 0
        if type(got) is not int or got < least:
            raise ValueError(explain(f"build_index got {name}={got!r}.", want=f"an integer, at least {least}"))


def _tokenize(
    model: nn.Module, tokens: Tensor | Sequence[str], ctx_len: int, special: Sequence[int], first_row: int
) -> TokenRows:
    ids = token_rows(model, tokens, ctx_len)
    mask = ~special_mask(ids, special)
    if not mask.any():
        what = f"all {ids.numel()} tokens are special."
        raise ValueError(explain(what, want="text", fix="build_index(..., skip_special_tokens=False)"))
    return TokenRows(ids, mask, first_row)


def _index_info(
    model: nn.Module,
    site: Site,
    sizes: tuple[int, ...],  # IndexInfo.ctx_len to IndexInfo.coactive_tokens
    seed: int,
    special: Sequence[int],
    neuronpedia: str | None,
    of_model: str,
) -> IndexInfo:
    sae, metadata = site.sae, site.sae.cfg.metadata
    check_reconstructs(sae)
    page = neuronpedia or metadata.get("neuronpedia_id") or metadata.get("neuronpedia")
    l0_most = sae.cfg.k if isinstance(sae, SAE) and sae.cfg.k is not None else sae.cfg.d_sae
    values = (sae.cfg.d_sae, *sizes, l0_most, seed, tuple(special), (), 0, repr(sae), str(model.cfg.model_name))
    digests = {"SAE": sae_digest(sae), "model": of_model, "tokens": "0"}
    return IndexInfo(*values, site.hook_name, site.hook_name_out, None, page or None, digests)


def _folders(folder: str | Path | None, n: int, several: bool) -> list[Path | None]:
    if folder is None:
        return [None] * n
    root = absolute(folder)
    return [root / str(i) for i in range(n)] if several else [root]


def _run(
    model: nn.Module,
    builds: list[_Build],
    text: TokenRows,
    batch_size: int,
    progress: bool,
    save_every_s: float,
    parallel: ParallelContext,
) -> None:
    """Run the model over the rows not yet read; Ctrl-C stops it between two batches."""
    from tqdm.auto import tqdm

    with parallel.raise_together():
        for build in builds:
            _check_beginning(build, text)
    batches, encoders = _batches(builds, text, batch_size), [SparseEncoder(b.site.sae) for b in builds]
    n_rows, saved, device = sum(b - a for a, b in batches), time.monotonic(), next(model.parameters()).device
    hidden = not (progress and parallel.is_main)
    bar = tqdm(total=n_rows, desc="index", unit="row", leave=False, disable=hidden)
    # Accumulate on another thread: an interrupt reaches the main thread only, so no batch is half counted.
    with bar, sleep_while_contended(), ThreadPoolExecutor(1) as thread, _defer_interrupt(parallel) as interrupted:
        pending: Future | None = None
        try:
            thread.submit(int).result()  # interrupted while it starts, a thread is not joined: let it have no work yet
            for begin in range(0, len(batches), parallel.size):
                a_round = batches[begin : begin + parallel.size]  # a batch for each process
                own = a_round[parallel.rank : parallel.rank + 1]
                activations, rows = {}, text[:0]
                try:
                    with parallel.raise_together():
                        if own:
                            rows = text[own[0][0] - text.first_row : own[0][1] - text.first_row].to(device)
                            activations = _forward(model, builds, rows)
                except DisconnectedError:
                    raise
                except Exception:
                    # What was read before this batch is not lost.
                    thread.submit(_checkpoint, builds, text, parallel).result()
                    raise
                with parallel.raise_together():
                    pending = thread.submit(_accumulate, builds, encoders, text, activations, rows, a_round)
                    pending.result()  # no overlap with the model: the threads would compete for the CPU
                bar.update(sum(b - a for a, b in a_round))
                due = parallel.is_main and time.monotonic() - saved > save_every_s
                stops, saves = parallel.sum_(torch.tensor([len(interrupted), int(due)])).tolist()
                if stops:
                    return
                if saves:
                    pending = thread.submit(_checkpoint, builds, text, parallel)
                    pending.result()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if pending is not None:
                pending.result()  # finish the batch; the index is incomplete


@contextmanager
def _defer_interrupt(parallel: ParallelContext) -> Iterator[list[int]]:
    """Collect interrupts of a process that others wait for: all stop together, after the same batch."""
    interrupts: list[int] = []
    if parallel.size == 1 or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(builds: list[_Build], text: TokenRows, batch_size: int) -> list[tuple[int, int]]:
    """Ranges of rows to run the model on, such that each build has read all rows of a range or none."""
    ranges = [pair for build in builds for pair in build.unread(text)]
    cuts = sorted({row for pair in ranges for row in pair})
    batches = []
    for begin, end in itertools.pairwise(cuts):
        if not all(build.has_read(begin) for build in builds):
            batches += [(row, min(row + batch_size, end)) for row in range(begin, end, batch_size)]
    return batches


def _forward(model: nn.Module, builds: list[_Build], rows: TokenRows) -> dict[str, Tensor]:
    """Activations of these rows at the hook points of all builds."""
    with hook_points.lock(model), torch.no_grad(), eval_mode(model):
        check_unmodified(model, [point for build in builds for point in build.site.points])
        activations = capture(model, rows.ids, [build.info.hook for build in builds])
    _check_finite(model, activations, rows)
    return activations


def _check_finite(model: nn.Module, activations: dict[str, Tensor], rows: TokenRows) -> None:
    """Raise if an activation at a counted token is not finite, as of a model that overflows in float16."""
    for hook, values in activations.items():
        bad = ~values.flatten(2).isfinite().all(-1) & rows.mask.to(values.device)
        if bool(bad.any()):
            row, position = bad.nonzero()[0].tolist()
            where = f"row {rows.first_row + row}, position {position}"
            what = f"activations at {hook!r} are not finite, first in {where} of the text."
            want = f"finite activations; the model computes in {values.dtype}"
            fix = "model = saewb.load_model(..., dtype=torch.float32)"
            raise FloatingPointError(explain(what, want=want, fix=fix))


def _check_beginning(build: _Build, text: TokenRows) -> None:
    """Raise unless the rows of the folder's index are the beginning of this text."""
    rows, fix = build.info.rows, "saewb.build_index(model, sae, tokens, extend=saewb.load_index(folder))"
    if not rows or build.folder is None:
        return
    if rows[0][0] < text.first_row:
        what = f"{build.folder} has rows {rows}, which are no part of this text ({text.first_row} on)."
        raise ValueError(explain(what, fix=fix))
    digest = "0"
    for a, b in rows:
        digest = rows_digest(text.ids[a - text.first_row : b - text.first_row], a, of_rest=digest)
    if different := differences(build.info.digests or {}, {"tokens": digest}, ["tokens"]):
        first = "first " if rows == ((text.first_row, build.info.next_row),) else ""
        what = f"{build.folder} has an index of another text, by content of its {first}{build.info.n_rows} rows: "
        raise ValueError(explain(f"{what}{different[0]}.", want="the same text, or a new folder", fix=fix))


@torch.no_grad()
def _accumulate(
    builds: list[_Build],
    encoders: list[SparseEncoder],
    text: TokenRows,
    activations: dict[str, Tensor],
    rows: TokenRows,
    a_round: list[tuple[int, int]],
) -> None:
    """Add this process's rows, and take account of those of all processes."""
    texts = [slice(a - text.first_row, b - text.first_row) for a, b in a_round]
    digests = [rows_digest(text.ids[part], a) for part, (a, _) in zip(texts, a_round, strict=True)]
    counts = [int(text.mask[part].sum()) for part in texts]  # on the CPU, so that nothing waits for a device
    for build, encoder in zip(builds, encoders, strict=True):
        unread = [not build.has_read(a) for a, _ in a_round]
        if len(rows) and not build.has_read(rows.first_row):
            x = build.site.read_input(activations[build.info.hook])
            here = rows.to(x.device)  # of the hook point: a model may be spread over several
            for part, latents in encoder.tiles(x, here.mask):
                build.accumulator.update(here[part], latents.to(torch.float32))
        for pair, n_tokens, digest, new in zip(a_round, counts, digests, unread, strict=True):
            build.info = build.info.with_rows([pair], n_tokens, digest) if new else build.info


def _checkpoint(builds: list[_Build], text: TokenRows, parallel: ParallelContext) -> None:
    """Save what all processes have accumulated."""
    if parallel.size > 1 and any(parallel.broadcast_object([build.folder is not None for build in builds])):
        for build in builds:
            build.merge(parallel)
    with parallel.raise_together():
        for build in builds:
            if build.folder is not None:
                tensors = {k: t.cpu() for k, t in build.accumulator.tensors().items()}
                storage.write_index(build.folder, replace(build.info, n_planned=len(text)), tensors, TokenTexts())


def _lens(
    model: nn.Module,
    logits: str | JacobianLens,
    sites: Sequence[Site],
    text: TokenRows,
    special: Sequence[int],
    progress: bool,
) -> JacobianLens | None:
    """The lens for the words of these SAEs; None for "direct"."""
    if isinstance(logits, str) and logits == "direct":
        return None
    if isinstance(logits, str) and logits == "jacobian":
        hooks = list(dict.fromkeys(site.hook_name_out for site in sites))
        skipped = min(16, text.ids.shape[1] // 4)  # of short rows not all
        how = {"n_prompts": _LENS_ROWS, "skip_first": skipped, "skip_special_tokens": special, "progress": progress}
        return fit_jacobian_lens(model, text.ids, hooks, **how)
    if not isinstance(logits, JacobianLens):
        what = f"build_index got logits={reprlib.repr(logits)}."
        fix = "logits=saewb.fit_jacobian_lens(model, texts, sae.cfg.hook)"
        raise TypeError(explain(what, want='"direct", "jacobian" or a JacobianLens', fix=fix))
    logits.check_model(model)
    for site in sites:
        logits.transport(
            site.sae.W_dec[:1], site.hook_name_out, model, site.head
        )  # raises if it does not have the point
    return logits


def _finish(
    model: nn.Module,
    build: _Build,
    text: TokenRows,
    n_logits: int,
    n_nearest: int,
    loss_effect_tokens: int,
    lens: JacobianLens | None,
    parallel: ParallelContext,
) -> FeatureIndex:
    build.merge(parallel)
    index = FeatureIndex(build.info, {}, TokenTexts())
    with parallel.raise_together():
        if parallel.is_main:
            build.info = replace(build.info, lens=None if lens is None else repr(lens))
            weights = FeatureIndex(build.info, _weight_tensors(model, build, n_logits, lens, n_nearest), TokenTexts())
            index = _to_index(model, build, weights, text)
            if loss_effect_tokens and index.is_complete:
                effects = loss_effects(model, build.site.sae, index.info, index.tensors, text.row, loss_effect_tokens)
                index = replace(index, tensors={**index.tensors, "loss_effects": effects})
            if build.folder is not None:
                storage.write_index(build.folder, index.info, dict(index.tensors), index.token_texts, index.labels)
    return _broadcast(index, parallel)


def _broadcast(index: FeatureIndex, parallel: ParallelContext) -> FeatureIndex:
    """The index of process 0, in all."""
    if parallel.size == 1:
        return index
    info, texts, labels = parallel.broadcast_object((index.info, index.token_texts, dict(index.labels)))
    return replace(
        index, info=info, tensors=parallel.broadcast_tensors(index.tensors), token_texts=texts, labels=labels
    )


def _to_index(model: nn.Module, build: _Build, weights: FeatureIndex, text: TokenRows) -> FeatureIndex:
    n_left = sum(b - a for a, b in build.unread(text))
    info = replace(build.info, n_planned=build.info.n_rows + n_left if n_left else None)
    index = weights.with_accumulated(info, build.accumulator, TokenTexts())
    contexts = [index.tensors["top.tokens"], index.tensors["sample.tokens"]]
    single = [t for name, t in index.tensors.items() if name.endswith(("top_ids", "bottom_ids"))]
    return replace(index, token_texts=collect_token_texts(getattr(model, "tokenizer", None), contexts, single))


@torch.no_grad()
def _weight_tensors(
    model: nn.Module, build: _Build, n_logits: int, lens: JacobianLens | None, n_nearest: int
) -> dict[str, Tensor]:
    """Tensors of an index that follow from the weights alone, or from a lens."""
    sae = build.site.sae
    tensors = {"decoder_norm": sae.W_dec.float().norm(dim=1)}
    directions = project_to_residual(model, sae.W_dec, build.site.hook_name_out, build.site.head) if n_logits else None
    if directions is not None:
        tensors |= logit_effects(directions, unembedding(model).to(sae.device), n_logits)
    if lens is not None:
        through = lens.transport(sae.W_dec.detach(), build.site.hook_name_out, model, build.site.head)
        effects = logit_effects(through, unembedding(model).to(sae.device), n_logits)
        ends = [f"{end}{part}" for end in ("top", "bottom") for part in ("", "_ids")]
        tensors |= {f"jacobian.{end}": effects[f"logits.{end}"] for end in ends}
    if n_nearest and len(sae.W_dec) > 1:
        tensors |= nearest(sae.W_dec, n_nearest, "decoder")
        if "W_enc" in (weights := dict(sae.named_parameters())):
            tensors |= nearest(weights["W_enc"].T, n_nearest, "encoder")
    return {name: t.detach().cpu() for name, t in tensors.items()}
