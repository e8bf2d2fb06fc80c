"""Evaluate one SAE, or many on the same tokens, in the model they belong to.

The passes over the model are in `saewb.evals.model_losses`, the result types in `saewb.evals.result`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from saewb.data.tokens import token_rows
from saewb.distributed import ParallelContext, shared_call
from saewb.errors import explain
from saewb.evals.model_losses import (
    Batches,
    HookMetrics,
    Losses,
    clean_site,
    evaluate_at_hooks,
    evaluate_in_model,
)
from saewb.evals.result import Evaluation, EvaluationStore, LatentFigures, named_saes
from saewb.fingerprint import rows_digest, sae_digest, tensors_digest
from saewb.interventions.site import Site
from saewb.kernels.threads import sleep_while_contended
from saewb.metrics import float64
from saewb.models.active import model_digest
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import special_ids
from saewb.sae.sae import SAE
from saewb.stats.firing import DEAD_BELOW, DENSE_ABOVE

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 2**24  # cosines held at a time


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
    losses: bool = True,
    core: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluate an SAE by its reconstruction and by the losses of the model with it; CE recovered 1 is perfect.

        ce_recovered = (ce_ablated - ce_with_sae) / (ce_ablated - ce_clean)
        kl           = mean over tokens of KL(p_clean || p_with_sae)
        kl_recovered = (kl_ablated - kl) / kl_ablated

    Special tokens are excluded: there the model's own activation passes through, with the SAE and with either ablation
    (activations there are often a hundred times as long as elsewhere, and no SAE is meant to write them), and no figure
    counts them. l0, fvu and the like, and kl, average over the other tokens (`n_tokens`). A loss averages over
    predictions of one such token from another (`n_predictions`): neither the token predicted nor the one predicted from
    is special. All four losses use the same predictions.

    "Ablated" means that zeros, or the mean activation over counted tokens, replace the activation at the write point
    (of its head only, if the SAE has one). For a transcoder the figures compare its output with the activation at its
    write point. Hooks, steering and SAEs at other points of the model stay in force.

    Under torchrun or accelerate (or after `torch.distributed.init_process_group`) every process makes this call, with
    the same arguments, and returns the same: each runs a share of the batches. Counts equal those of a single process,
    figures to rounding in float64. If one fails, all raise after their current batch, with its reason. Where only some
    processes call this: `with saewb.distributed.one_process():`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        sae: an SAE or transcoder.
        tokens: ids, `[rows, ctx]`, without padding; or texts, to be packed into rows of `ctx_len`.
        hook: read point, instead of `sae.cfg.hook`.
        hook_out: write point, instead of `sae.cfg.hook_out`; for transcoders.
        batch_size: rows per forward pass.
        ctx_len: tokens per row, if `tokens` are texts.
        skip_special_tokens: True for the tokenizer's BOS, EOS, PAD and the like, False to treat all tokens alike, or a
            list of ids.
        dead_below: a latent is dead that fires on fewer than this fraction of tokens. The default means "never" on
            fewer than a million tokens.
        dense_above: a latent is dense that fires on more than this fraction of tokens.
        losses: also run the whole model; if False it runs once, up to the hook, and the figures of its predictions
            (ce_..., kl_...) are nan.
        core: also compare each latent's encoder column and decoder row with all others, as SAEBench's core evaluation
            does: `d_sae^2 (d_in + d_out)` multiplications. `saewb.compare` has all of its figures then.
        progress: show a progress bar.

    Returns:
        An Evaluation; figures per latent are in its `.latents`. ce_recovered is nan where ablating does not change the
        loss.

    Raises:
        ValueError: if no tokens are left to evaluate, or rows have fewer than two; for a hook or SAE that does not fit,
            as `saewb.attach`; if another SAE writes to one of its points; if the activation never varies.
        TypeError: if `tokens` are not integers.
        RuntimeError: if another process of a launch failed.

    References:
        Figures: Gao et al. 2024, arXiv:2406.04093; Rajamanoharan et al. 2024, arXiv:2404.16014.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> result = saewb.evaluate(model, sae, ["The river flows through the city."] * 8, ctx_len=16)
        >>> result.n_tokens > 30, 0 < result.fvu < 1, result.ce_zero_ablated > result.ce_clean
        (True, True, True)
    """
    options = {"dead_below": dead_below, "dense_above": dense_above, "losses": losses, "core": core}
    with shared_call() as parallel:
        with parallel.raise_together():
            ids, special = token_rows(model, tokens, ctx_len), special_ids(model, skip_special_tokens)
            sites = [clean_site(model, sae, hook, hook_out)]
        saes = [sae_digest(sae)] if parallel.size > 1 else []
        _check_same_call(parallel, model, ids, saes, (special, batch_size, options))
        return _evaluate(model, sites, ids, special, batch_size, progress, parallel, **options)[0]


def evaluate_many(
    model: nn.Module,
    saes: Sequence[Any] | Mapping[str, Any],
    tokens: Int[Tensor, "rows ctx"] | Sequence[str],
    *,
    folder: str | Path | None = None,
    at_once: int = 8,
    batch_size: int = 8,
    ctx_len: int = 128,
    skip_special_tokens: bool | Sequence[int] = True,
    dead_below: float = DEAD_BELOW,
    dense_above: float = DENSE_ABOVE,
    losses: bool = True,
    core: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Evaluate many SAEs on the same tokens, and tabulate the figures of `evaluate`, a row per SAE.

    `at_once` SAEs share the passes over the model: up to the hooks, clean, and with zeros or the mean at each point;
    each SAE adds one pass, with its own output. Several processes share the passes, as for `evaluate`; process 0 alone
    reads and writes `folder`.

    Args:
        model: as for `evaluate`.
        saes: SAEs; or what `load_sae` takes: a name or folder, or (release, id); in a list, or by name. Sources are
            loaded when their turn comes and released afterwards.
        tokens: as for `evaluate`.
        folder: store each result in a file there as soon as it is computed, and all of them in `evaluations.csv`;
            stored results of the same SAE, model (with what is attached to it or steers it), tokens and options, all
            by content, are not computed again; SAEs are loaded to compare them. None stores nothing.
        at_once: SAEs held in memory at a time.
        batch_size: as for `evaluate`.
        ctx_len: as for `evaluate`.
        skip_special_tokens: as for `evaluate`.
        dead_below: as for `evaluate`.
        dense_above: as for `evaluate`.
        losses: as for `evaluate`.
        core: as for `evaluate`.
        progress: show a progress bar.

    Returns:
        A row per SAE in the order of `saes`, indexed by name, a column for each field of Evaluation.

    Raises:
        ValueError: if two SAEs have one name, or there is none; as `evaluate`. Finished results are in `folder`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> random = saewb.SAE(saewb.SAEConfig(128, 256, activation="topk", k=16, hook=sae.cfg.hook))
        >>> texts = ["The river flows through the city."] * 8
        >>> table = saewb.evaluate_many(model, {"trained": sae, "random": random}, texts, ctx_len=16, losses=False)
        >>> bool(table.fvu["trained"] < table.fvu["random"])
        True
    """
    import pandas as pd

    if at_once < 1:
        raise ValueError(explain(f"evaluate_many got at_once={at_once}.", want="1 or more"))
    named = named_saes(saes, "evaluate_many(model, {'first': sae_a, 'second': sae_b}, tokens)")
    options = {"dead_below": dead_below, "dense_above": dense_above, "losses": losses, "core": core}
    with shared_call() as parallel:
        with parallel.raise_together():
            ids, special = token_rows(model, tokens, ctx_len), special_ids(model, skip_special_tokens)
            content = {} if folder is None else {"model": model_digest(model), "tokens": rows_digest(ids)}
        settings = (special, batch_size, options, at_once, str(folder), list(named))
        _check_same_call(parallel, model, ids, [], settings)
        with parallel.raise_together():
            store = EvaluationStore(folder if parallel.is_main else None, {"special": special, **options, **content})
        figures: dict[str, dict[str, Any]] = {}
        missing: dict[str, Site] = {}
        for n_left, name in zip(reversed(range(len(named))), named, strict=True):
            with parallel.raise_together():
                sae = _load(named[name])
                site = clean_site(model, sae, None, None)
                stored = store.read(name, sae)
            if (stored := parallel.broadcast_object(stored)) is not None:
                figures[name] = stored
            else:
                missing[name] = site
            if missing and (len(missing) == at_once or n_left == 0):
                sites = list(missing.values())
                digests = [sae_digest(site.sae) for site in sites] if parallel.size > 1 else []
                _check_same_call(parallel, model, ids, digests, settings)
                evaluations = _evaluate(model, sites, ids, special, batch_size, progress, parallel, **options)
                with parallel.raise_together():
                    for (missed, of), evaluation in zip(missing.items(), evaluations, strict=True):
                        figures[missed] = evaluation.figures()
                        store.write(missed, of.sae, figures[missed])
                missing.clear()
        table = pd.DataFrame([figures[name] for name in named], index=pd.Index(list(named), name="name"))
        with parallel.raise_together():
            store.write_table(table)
    return table


def _check_same_call(
    parallel: ParallelContext, model: nn.Module, ids: Tensor, saes: Sequence[str], settings: Any
) -> None:
    """Check that all processes of a launch evaluate the same."""
    if parallel.size > 1:
        weights = tensors_digest(model.state_dict(keep_vars=True), reuse=True)  # hooks cannot be compared
        of = {"model": weights, "text": (len(ids), rows_digest(ids)), "SAE": list(saes)}
        parallel.check_same(of | {"settings": settings})


# -- one evaluation --------------------------------------------------------------------------------------------------


def _evaluate(
    model: nn.Module,
    sites: Sequence[Site],
    ids: Tensor,
    special: Sequence[int],
    batch_size: int,
    progress: bool,
    parallel: ParallelContext,
    *,
    dead_below: float,
    dense_above: float,
    losses: bool,
    core: bool,
) -> list[Evaluation]:
    """Evaluate SAEs at these sites, with shared passes over the model."""
    batches = Batches(ids, special, batch_size, next(model.parameters()).device)
    hidden = not (progress and parallel.is_main)
    bar = tqdm(total=(1 + losses) * len(batches), desc="evaluate", unit="batch", leave=False, disable=hidden)
    with torch.no_grad(), eval_mode(model, *(site.sae for site in sites)), bar, sleep_while_contended():
        metrics = evaluate_at_hooks(model, sites, batches, bar, parallel)
        model_losses = [Losses(*[math.nan] * 7)] * len(sites)
        if losses:
            means = [at_hook.reconstruction.mean() for at_hook in metrics]
            model_losses = evaluate_in_model(model, sites, means, batches, bar, parallel)
        n_predictions = batches.n_predictions if losses else 0
        return [
            _evaluation(model, site, at_hook, in_model, n_predictions, dead_below, dense_above, core)
            for site, at_hook, in_model in zip(sites, metrics, model_losses, strict=True)
        ]


def _evaluation(
    model: nn.Module,
    site: Site,
    metrics: HookMetrics,
    losses: Losses,
    n_predictions: int,
    dead_below: float,
    dense_above: float,
    core: bool,
) -> Evaluation:
    firing = metrics.firing.result(dead_below, dense_above)
    latents = ("density", "mean_activation", "max_activation", "consistent_activation")
    ce, kl = losses.ce_with_sae, losses.kl
    weights = _weight_figures(site.sae, core)
    return Evaluation(
        **asdict(metrics.reconstruction.result()),
        **{name: getattr(firing, name) for name in ("l0", "l1", "dead_frac", "ultra_low_frac", "dense_frac")},
        **asdict(losses),
        **_frequent(firing.density),
        **{f"mean_{name}": _mean_or_none(weights[name]) for name in ("max_encoder_cosine", "max_decoder_cosine")},
        ce_recovered_zero=_recovered(losses.ce_zero_ablated, ce, losses.ce_clean),
        ce_recovered_mean=_recovered(losses.ce_mean_ablated, ce, losses.ce_clean),
        kl_recovered_zero=_recovered(losses.kl_zero_ablated, kl, 0.0),
        kl_recovered_mean=_recovered(losses.kl_mean_ablated, kl, 0.0),
        n_predictions=n_predictions,
        dead_below=dead_below,
        dense_above=dense_above,
        hook=site.hook_name,
        hook_out=site.hook_name_out,
        model=str(model.cfg.model_name),
        sae=repr(site.sae),
        latents=LatentFigures(**{name: getattr(firing, name).cpu() for name in latents}, **weights),
    )


def _mean_or_none(figure: Tensor) -> float | None:
    mean = float(figure.mean())
    return None if math.isnan(mean) else mean


def _frequent(density: Tensor) -> dict[str, float]:
    """Share of latents above a density, and of the firings that are theirs; 0 if none fires."""
    figures, total = {}, float(density.sum())
    for name, above in (("1_percent", density > 0.01), ("10_percent", density > 0.1)):
        figures[f"over_{name}_frac"] = float(float64(above).mean())
        figures[f"over_{name}_share"] = float(density[above].sum()) / total if total else 0.0
    return figures


def max_cosines(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Largest cosine of each row with another one; nan for a single row. 64 MiB at a time.

    Example:
        >>> max_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])).round(decimals=3)
        tensor([0.7070, 0.7070, 0.7070])
    """
    unit, n = nn.functional.normalize(rows, dim=1), len(rows)
    if n < 2:
        return torch.full((n,), math.nan)
    parts, step = [], max(1, _BLOCK // n)
    for start in range(0, n, step):
        block = unit[start : start + step] @ unit.T
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
        parts.append(block.amax(1))
    return torch.cat(parts)


def _weight_figures(sae: nn.Module, core: bool) -> dict[str, Tensor]:
    """Figures per latent that need no activations; nan where the architecture does not define them."""
    W_dec = float64(sae.W_dec.detach())
    none = torch.full((sae.cfg.d_sae,), math.nan, dtype=torch.float64)
    figures = dict.fromkeys(("encoder_norm", "encoder_bias", "encoder_decoder_cosine"), none)
    figures["decoder_norm"] = W_dec.norm(dim=1).cpu()
    figures |= dict.fromkeys(("max_encoder_cosine", "max_decoder_cosine"), none)
    if core:
        figures["max_decoder_cosine"] = float64(max_cosines(sae.W_dec.detach().float())).cpu()
        if isinstance(sae, SAE):
            figures["max_encoder_cosine"] = float64(max_cosines(sae.W_enc.detach().T.float())).cpu()
    if isinstance(sae, SAE):
        W_enc = float64(sae.W_enc.detach()).T
        figures |= {"encoder_norm": W_enc.norm(dim=1).cpu(), "encoder_bias": float64(sae.b_enc.detach()).cpu()}
        if not sae.cfg.is_transcoder:
            figures["encoder_decoder_cosine"] = nn.functional.cosine_similarity(W_enc, W_dec, dim=1).cpu()
    return figures


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else math.nan


# -- many ------------------------------------------------------------------------------------------------------------


def _load(sae: Any) -> nn.Module:
    if isinstance(sae, nn.Module):
        return sae
    from saewb.pretrained.load import load_sae

    return load_sae(*sae) if isinstance(sae, tuple) else load_sae(sae)
