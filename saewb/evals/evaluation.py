"""How good SAEs are in the model they belong to: one, or many over the same tokens.

The passes over the model are in `saewb.evals.model_losses`, what comes out in `saewb.evals.result`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.data.tokens import token_rows
from saewb.errors import explain
from saewb.evals.eval_store import Store, source_name
from saewb.evals.model_losses import AtHook, Batches, Losses, Place, at_hooks, bar, in_model, place
from saewb.evals.result import Evaluation, LatentFigures
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import special_ids, special_mask
from saewb.sae.sae import SAE
from saewb.stats.firing import DEAD_BELOW, DENSE_ABOVE

if TYPE_CHECKING:
    import pandas as pd


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
    progress: bool = False,
) -> Evaluation:
    """How good an SAE is, by its reconstruction and by what the model does with it: CE recovered 1 is perfect.

        ce_recovered = (ce_ablated - ce_with_sae) / (ce_ablated - ce_clean)
        kl           = mean over tokens of KL(p_clean || p_with_sae)
        kl_recovered = (kl_ablated - kl) / kl_ablated

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
        losses: run the whole model too; without, the model runs to the hook only, once, and the figures of its
            predictions (ce_..., kl_...) are nan.
        progress: show a bar.

    Returns:
        An Evaluation; figures per latent are in its `.latents`. ce_recovered is nan where ablating does not change the
        loss.

    Raises:
        ValueError: if no tokens are left to evaluate, or rows have fewer than two; for a hook or SAE that does not fit,
            as `saewb.attach`; if another SAE writes to the same point; if the activation never varies.
        TypeError: if `tokens` are not integers.

    References:
        Figures: Gao et al. 2024, arXiv:2406.04093; Rajamanoharan et al. 2024, arXiv:2404.16014.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> found = saewb.evaluate(model, sae, ["The river flows through the city."] * 8, ctx_len=16)
        >>> found.n_tokens > 30, 0 < found.fvu < 1, found.ce_zero_ablated > found.ce_clean
        (True, True, True)
    """
    places, batches = _asked(model, [sae], tokens, [(hook, hook_out)], batch_size, ctx_len, skip_special_tokens)
    (found,) = _evaluated(places, batches, dead_below, dense_above, losses, progress)
    return found


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
    progress: bool = False,
) -> pd.DataFrame:
    """Many SAEs on the same tokens, as a table: the figures of `evaluate`, a row each.

    `at_once` SAEs share the passes over the model: to the hooks, as the model is, and with zeros or the mean at each
    point; each SAE adds one pass, with its own output.

    Args:
        model: as for `evaluate`.
        saes: SAEs; or what `load_sae` takes: a name or folder, or (release, id); in a list, or by name. What is named
            rather than given is loaded when its turn comes and let go afterwards.
        tokens: as for `evaluate`.
        folder: keep each result in a file there as soon as it is known, and all of them in `evaluations.csv`; what is
            there already, of the same SAE, tokens and options, is not computed again. None keeps nothing.
        at_once: how many SAEs are held at a time.
        batch_size: as for `evaluate`.
        ctx_len: as for `evaluate`.
        skip_special_tokens: as for `evaluate`.
        dead_below: as for `evaluate`.
        dense_above: as for `evaluate`.
        losses: as for `evaluate`.
        progress: show a bar.

    Returns:
        A row per SAE in the order given, by name (the index), a column for each field of Evaluation.

    Raises:
        ValueError: if two SAEs have one name, or none is given; as `evaluate`. What was finished is in `folder`.

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
    named = _named(saes)
    ids = token_rows(model, tokens, ctx_len)
    options = {
        "special": special_ids(model, skip_special_tokens),
        "dead_below": dead_below,
        "dense_above": dense_above,
        "losses": losses,
        "model": str(model.cfg.model_name),
        "tokens": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    store = Store(folder, options)
    found = {name: known for name, sae in named.items() if (known := store.read(name, sae)) is not None}
    missing = [name for name in named if name not in found]
    for names in (missing[i : i + at_once] for i in range(0, len(missing), at_once)):
        some = [_loaded(named[name]) for name in names]
        places, batches = _asked(
            model, some, ids, [(None, None)] * len(some), batch_size, ctx_len, list(options["special"])
        )
        new = _evaluated(places, batches, dead_below, dense_above, losses, progress)
        for name, evaluation in zip(names, new, strict=True):
            found[name] = evaluation.figures()
            store.write(name, named[name], found[name])
    table = pd.DataFrame([found[name] for name in named], index=pd.Index(list(named), name="name"))
    store.write_table(table)
    return table


# -- one evaluation --------------------------------------------------------------------------------------------------


def _asked(
    model: nn.Module,
    saes: Sequence[nn.Module],
    tokens: Tensor | Sequence[str],
    at: Sequence[tuple[str | None, str | None]],
    batch_size: int,
    ctx_len: int,
    skip_special_tokens: bool | Sequence[int],
) -> tuple[list[Place], Batches]:
    ids = token_rows(model, tokens, ctx_len)
    special = special_ids(model, skip_special_tokens)
    places = [place(model, sae, *where, special) for sae, where in zip(saes, at, strict=True)]
    return places, Batches(ids, ~special_mask(ids, special), batch_size, next(model.parameters()).device)


def _evaluated(
    places: list[Place], batches: Batches, dead_below: float, dense_above: float, losses: bool, progress: bool
) -> list[Evaluation]:
    saes = [where.sae for where in places]
    with torch.no_grad(), eval_mode(places[0].model, *saes), bar(progress, (1 + losses) * len(batches)) as tick:
        seen = at_hooks(places, tick(batches))
        whole = [_NO_LOSSES] * len(places)
        if losses:
            whole = in_model(places, [one.written.mean() for one in seen], batches, tick)
        return [
            _evaluation(where, one, loss, batches.n_predictions if losses else 0, dead_below, dense_above)
            for where, one, loss in zip(places, seen, whole, strict=True)
        ]


_NO_LOSSES = Losses(*[math.nan] * 7)


def _evaluation(
    where: Place, seen: AtHook, loss: Losses, n_predictions: int, dead_below: float, dense_above: float
) -> Evaluation:
    fired = seen.fired.result(dead_below, dense_above)
    return Evaluation(
        **asdict(seen.written.result()),
        l0=fired.l0,
        l1=fired.l1,
        dead_frac=fired.dead_frac,
        ultra_low_frac=fired.ultra_low_frac,
        dense_frac=fired.dense_frac,
        ce_clean=loss.clean,
        ce_with_sae=loss.with_sae,
        ce_zero_ablated=loss.zero,
        ce_mean_ablated=loss.mean,
        ce_recovered_zero=_recovered(loss.zero, loss.with_sae, loss.clean),
        ce_recovered_mean=_recovered(loss.mean, loss.with_sae, loss.clean),
        kl=loss.kl_with_sae,
        kl_zero_ablated=loss.kl_zero,
        kl_mean_ablated=loss.kl_mean,
        kl_recovered_zero=_recovered(loss.kl_zero, loss.kl_with_sae, 0.0),
        kl_recovered_mean=_recovered(loss.kl_mean, loss.kl_with_sae, 0.0),
        n_predictions=n_predictions,
        dead_below=dead_below,
        dense_above=dense_above,
        hook=where.read,
        hook_out=where.write,
        model=str(where.model.cfg.model_name),
        sae=repr(where.sae),
        latents=LatentFigures(
            density=fired.density.cpu(),
            mean_activation=fired.mean_activation.cpu(),
            max_activation=fired.max_activation.cpu(),
            consistent_activation=fired.consistent_activation.cpu(),
            **_of_weights(where.sae),
        ),
    )


def _of_weights(sae: nn.Module) -> dict[str, Tensor]:
    """Figures per latent that need no activations; nan where the architecture has no such thing."""
    W_dec = sae.W_dec.detach().double().cpu()
    none = torch.full((sae.cfg.d_sae,), math.nan, dtype=torch.float64)
    found = dict.fromkeys(("encoder_norm", "encoder_bias", "encoder_decoder_cosine"), none)
    found["decoder_norm"] = W_dec.norm(dim=1)
    if isinstance(sae, SAE):
        W_enc = sae.W_enc.detach().double().cpu().T
        found |= {"encoder_norm": W_enc.norm(dim=1), "encoder_bias": sae.b_enc.detach().double().cpu()}
        if not sae.cfg.is_transcoder:
            found["encoder_decoder_cosine"] = nn.functional.cosine_similarity(W_enc, W_dec, dim=1)
    return found


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else math.nan


# -- many ------------------------------------------------------------------------------------------------------------


def _named(saes: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for i, sae in enumerate([saes] if isinstance(saes, (str, nn.Module)) else saes):
            name = f"{i}: {sae!r}" if isinstance(sae, nn.Module) else source_name(sae)
            if name in named:
                fix = "evaluate_many(model, {'first': sae_a, 'second': sae_b}, tokens)"
                raise ValueError(explain(f"evaluate_many got {name!r} twice.", fix=fix))
            named[name] = sae
    if not named:
        raise ValueError(explain("evaluate_many got no SAE.", fix="evaluate_many(model, [sae], tokens)"))
    return named


def _loaded(sae: Any) -> nn.Module:
    if isinstance(sae, nn.Module):
        return sae
    from saewb.pretrained.load import load_sae

    return load_sae(*sae) if isinstance(sae, tuple) else load_sae(sae)
