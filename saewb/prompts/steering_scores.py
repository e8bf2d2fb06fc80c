"""Which latents steer: output score, input score and confidence of each, from one token of a neutral prompt.

1. The words of a direction are the tokens whose logits it raises most, through the final norm and the unembedding.
2. The prompt without its last token is read once; its keys and values are repeated for a batch of latents.
3. In each row of the batch one latent is amplified at the last token: a pass over one token for each latent.
4. Random directions of the same norms go through the same steps: what a latent has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of, indices_of
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.explanations.figures import wilson
from saewb.features.logit_effects import TILE, project_to_residual
from saewb.features.top_contexts import EMPTY
from saewb.interventions.site import Site
from saewb.interventions.steering import LatentChange, steer_rows
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capturing, eval_mode
from saewb.models.forward import KVCachedText
from saewb.models.tokenizer import single_texts
from saewb.models.unembed import unembedding

if TYPE_CHECKING:
    import pandas as pd

    from saewb.features import FeatureIndex

N_WORDS = 20
"""Words of a direction: tokens whose logits it raises most."""
_MIN_CONTEXTS, _MAX_CONTEXTS = 10, 100


@torch.no_grad()
def steering_scores(
    model: nn.Module,
    sae: nn.Module,
    latents: Any = None,
    prompt: str | Sequence[int] | Tensor = "From my experience,",
    index: FeatureIndex | None = None,
    *,
    factor: float = 10.0,
    strength: float | None = None,
    k: int = 10,
    n_random: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score how well each latent steers, from the next token of a neutral prompt, beside random directions.

    Latent i is amplified at the last token by s = factor * (largest activation there), the SAE's error kept. T_i are
    the 20 tokens that W_dec[i] raises most (final norm and unembedding), p and rank (from 0) those of the next token:

        output_score      (1 - min rank of T_i / d_vocab) * max p(T_i)              Arad et al. 2025
        delta_confidence  C_k(amplified) - C_k(clean),  C_k = -(1 / k) sum over the k likeliest tokens of log p
        input_score       share of the top contexts whose strongest token is in T_i  Arad et al. 2025; with an index

    A latent with a high output score changes what the model says; one with a high input score only reads it. The
    random directions have norms of decoder directions drawn from `latents`, and words of their own; each figure has
    theirs beside it. The paper's code gets a context's token by encoding its text anew; here it is the token itself.
    The default of k is saewb's own, as published descriptions of C_k leave it open.

    The prompt is run once, then one token for each latent: 4,608 latents of a model of 135M parameters take a minute on
    two cores. Memory: two times `batch_size * d_vocab` logits, and d_model * d_vocab numbers.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x), without steering on it.
        sae: an SAE or transcoder, or directions (`saewb.directions`).
        latents: indices, or a mask of all; None means all.
        prompt: a neutral one: a text, or token ids.
        index: a FeatureIndex of the SAE, for input scores: of up to 100 top contexts, nan below 10 of them.
        factor: amplification, in units of the largest activation at the last token.
        strength: s itself, instead of `factor`; needed where no latent fires there, and better for directions, whose
            activations have other units.
        k: tokens of the confidence.
        n_random: random directions.
        batch_size: latents in a pass.
        seed: of the random directions.
        progress: whether to show a progress bar.

    Returns:
        A DataFrame, a row per latent: latent, output_score, above_random (share of random directions with a lower one),
        rank, probability, word (of T_i, the likeliest), delta_confidence, kl (amplified to clean, nats), strength; with
        an index input_score, input_low, input_high (Wilson's 95 % interval), n_contexts; and for the controls
        output_score_random, output_score_random_95 (quantile), delta_confidence_random, kl_random,
        input_score_random, n_random. Means over the random directions.

    Raises:
        ValueError: for latents that do not exist, a prompt of no tokens or too many; a point that does not add to the
            residual stream, so that its directions have no words; if no latent fires at the last token; if the model is
            steered, or an SAE is attached at these points; for an index of another SAE.

    References:
        Arad et al. 2025, arXiv:2505.20063; Wang et al. 2025, arXiv:2510.03659.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> scores = saewb.steering_scores(model, sae, [748, 972, 4], n_random=8, progress=False)
        >>> scores.latent.tolist(), int(scores.n_random[0])
        ([748, 972, 4], 8)
        >>> bool((scores.output_score > scores.output_score_random).any())
        True
    """
    import pandas as pd
    from tqdm.auto import tqdm

    site = Site.of(model, sae)
    which = indices_of(range(sae.cfg.d_sae) if latents is None else latents, "latents", sae.cfg.d_sae, of=sae)
    sizes = {"k": k, "n_random": n_random, "batch_size": batch_size}
    if wrong := [name for name, n in sizes.items() if index_of(n, name) < 1]:
        raise ValueError(explain(f"steering_scores got {wrong[0]}={sizes[wrong[0]]}.", want="1 or more"))
    if not len(which):
        raise ValueError(explain("steering_scores got no latents.", want="at least one"))
    if index is not None:
        index.check_sae(sae)
    check_unmodified(model, site.points)
    ids = prompt_ids(model, prompt)
    directions = sae.W_dec[which.to(sae.W_dec.device)].detach()
    random = random_directions(directions, n_random, seed)
    words = direction_words(model, site, torch.cat([directions, random]), N_WORDS)

    with hook_points.lock(model), eval_mode(model, sae):
        with capturing(model, [site.hook_name]) as activations:
            clean = model(ids)[0, -1].float()
        check_finite("logits", clean)
        s = strength
        if s is None:
            s = factor * float(site.encode(site.read_input(activations[site.hook_name]))[0, -1].max())
            if not s > 0:
                what = f"the largest activation at the last token of {prompt!r} is {s / factor:g}."
                raise ValueError(explain(what, want="another prompt, or a strength", fix="strength=20.0"))
        text = KVCachedText(model, ids[:, :-1])
        if ids.shape[1] > 1:
            text.logits()
    clean_log_p = clean.log_softmax(-1)
    confidence = _confidence(clean_log_p, k)
    columns: dict[str, list[Tensor]] = {}
    everything = torch.cat([directions, random])
    last = ids.shape[1] - 1
    bar = tqdm(total=len(everything), desc="steering scores", unit="latent", leave=False, disable=not progress)
    with bar:
        for rows in torch.arange(len(everything)).split(batch_size):
            part = everything[rows.to(everything.device)]
            with hook_points.lock(model), eval_mode(model, sae):
                texts = text.repeat(len(part))
                texts.append(ids[0, -1])
                change = _one_per_row(site, part, s)
                with steer_rows(model, change, positions=[last]):
                    logits = texts.logits().float()
            check_finite("logits", logits)
            figures = _figures(logits, words[rows.to(words.device)].to(logits.device), clean_log_p, confidence, k)
            for name, values in figures.items():
                columns.setdefault(name, []).append(values.cpu())
            bar.update(len(part))
    values = {name: torch.cat(parts) for name, parts in columns.items()}
    own, control = (
        {name: v[: len(which)] for name, v in values.items()},
        {n: v[len(which) :] for n, v in values.items()},
    )
    sorted_control = control["output_score"].sort().values
    above = torch.searchsorted(sorted_control, own["output_score"].contiguous(), right=False) / n_random
    texts_of = _word_texts(model, own.pop("word"))
    table = pd.DataFrame({"latent": which.numpy(), "output_score": own.pop("output_score").numpy()})
    table["above_random"] = above.numpy()
    table["rank"], table["probability"], table["word"] = own["rank"].numpy(), own["probability"].numpy(), texts_of
    table["delta_confidence"], table["kl"], table["strength"] = own["delta_confidence"].numpy(), own["kl"].numpy(), s
    if index is not None:
        for name, column in _input_scores(index, which, words, n_random).items():
            table[name] = column
    table["output_score_random"] = float(control["output_score"].mean())
    table["output_score_random_95"] = float(control["output_score"].quantile(0.95))
    table["delta_confidence_random"] = float(control["delta_confidence"].mean())
    table["kl_random"], table["n_random"] = float(control["kl"].mean()), n_random
    return table


def random_directions(directions: Float[Tensor, "n d"], n: int, seed: int) -> Float[Tensor, "m d"]:
    """Directions from a normal distribution, with norms drawn from those of `directions`.

    Example:
        >>> rows = random_directions(torch.tensor([[3.0, 4.0]]), 7, seed=0)
        >>> rows.norm(dim=1).allclose(torch.tensor(5.0)), rows.shape
        (True, torch.Size([7, 2]))
    """
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, directions.shape[1], generator=rng, dtype=torch.float64)
    norms = directions.cpu().double().norm(dim=1)[torch.randint(len(directions), (n,), generator=rng)]
    return (rows / rows.norm(dim=1, keepdim=True) * norms[:, None]).to(directions)


def direction_words(
    model: nn.Module, site: Site, directions: Float[Tensor, "n d_out"], n: int = N_WORDS
) -> Int[Tensor, "n words"]:
    """The tokens whose logits each direction raises most, likeliest first: `directions @ unembedding(model)`.

    Raises:
        ValueError: where the site's point does not add to the residual stream.
    """
    projected = project_to_residual(model, directions, site.hook_name_out, site.head)
    if projected is None:
        what = f"directions at {site.hook_name_out!r} have no logit effects: the point does not add to the stream."
        raise ValueError(explain(what, want="an SAE on the residual stream, or one that writes to it"))
    w = unembedding(model)
    parts = projected.to(w).split(max(1, TILE // w.shape[1]))
    return torch.cat([(part @ w).topk(min(n, w.shape[1]), dim=1).indices for part in parts])


def _one_per_row(site: Site, directions: Float[Tensor, "rows d_out"], strength: float) -> LatentChange:
    """A change that adds direction r in row r of the batch only."""
    n = len(directions)
    values: list[float | list[float | None]] = [[strength if r == i else None for r in range(n)] for i in range(n)]
    return LatentChange(site, [0] * n, values, "add", directions)


def _confidence(log_p: Float[Tensor, "*rows d_vocab"], k: int) -> Float[Tensor, "*rows"]:
    """`-(1 / k) sum of the k largest log p`: large where one token has all the probability."""
    return -log_p.topk(min(k, log_p.shape[-1]), dim=-1).values.mean(-1)


def _figures(
    logits: Float[Tensor, "rows d_vocab"],
    words: Int[Tensor, "rows words"],
    clean_log_p: Float[Tensor, " d_vocab"],
    clean_confidence: Float[Tensor, ""],
    k: int,
) -> dict[str, Tensor]:
    of_words, place = logits.gather(1, words).max(1)
    rank = (logits > of_words[:, None]).sum(1)
    log_p = logits.log_softmax(-1)
    probability = log_p.gather(1, words).max(1).values.exp()
    return {
        "output_score": (1 - rank.to(probability) / logits.shape[1]) * probability,
        "rank": rank,
        "probability": probability,
        "word": words.gather(1, place[:, None])[:, 0],
        "delta_confidence": _confidence(log_p, k) - clean_confidence,
        "kl": (log_p.exp() * (log_p - clean_log_p)).sum(-1),
    }


def _word_texts(model: nn.Module, ids: Int[Tensor, " n"]) -> list[str]:
    tokenizer = getattr(model, "tokenizer", None)
    texts = {} if tokenizer is None else single_texts(tokenizer, ids.unique().tolist())
    return [texts.get(i, f"<{i}>") for i in ids.tolist()]


def _input_scores(
    index: FeatureIndex, which: Int[Tensor, " n"], words: Int[Tensor, "all words"], n_random: int
) -> dict[str, Any]:
    """Share of top contexts whose strongest token is a word of the latent, and of the random directions."""
    order = index.tensors["top.order"][which][:, :_MAX_CONTEXTS]
    peaks = index.tensors["top.tokens"][which][:, :_MAX_CONTEXTS, index.info.before].long()
    is_context = order != EMPTY
    words = words.to("cpu")
    n = is_context.sum(1)
    hits = ((peaks[..., None] == words[: len(which), None, :]).any(-1) & is_context).sum(1)
    top = int(max(words.max(), peaks.max())) + 1
    member = torch.zeros(top, n_random)
    member.index_put_((words[-n_random:], torch.arange(n_random)[:, None]), torch.ones(()))
    share = member.mean(1)[peaks.clamp_min(0)] * is_context
    is_enough = n >= _MIN_CONTEXTS
    ends = np.array([wilson(a, b) for a, b in zip(hits.tolist(), n.tolist(), strict=True)])
    nan = np.where(is_enough.numpy(), 1.0, np.nan)
    return {
        "input_score": (hits / n.clamp_min(1)).numpy() * nan,
        "input_low": ends[:, 0] * nan,
        "input_high": ends[:, 1] * nan,
        "n_contexts": n.numpy(),
        "input_score_random": (share.sum(1) / n.clamp_min(1)).numpy() * nan,
    }
