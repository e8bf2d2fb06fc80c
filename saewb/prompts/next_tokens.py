"""Likeliest next tokens at each position of a prompt, of the model alone and with SAEs attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.interventions.attachment import attach
from saewb.interventions.site import sites_of
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import token_strings

if TYPE_CHECKING:
    import pandas as pd

_TILE = 2**23
"""Log probabilities computed at a time (32 MiB in float32)."""


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Likeliest next tokens at each position of a prompt: the result of `saewb.next_tokens`."""

    tokens: tuple[str, ...]
    """The prompt, token by token."""
    ids: Int[Tensor, "pos words"]
    """Token ids: the model's n likeliest, likeliest first; then the n likeliest with SAEs."""
    log_prob: Float[Tensor, "pos words"]
    """Log probability of each under the model, in nats."""
    log_prob_with_saes: Float[Tensor, "pos words"] | None
    """Log probability of each with SAEs attached, in nats; None without SAEs."""
    kl: Float[Tensor, " pos"] | None
    """KL(model || with SAEs), in nats; None without SAEs."""
    words: Mapping[int, str]
    """Text of each id."""

    def to_frame(self, position: int = -1) -> pd.DataFrame:
        """Table of one position: token, id, probability, with_saes; sorted by the larger probability.

        Raises:
            ValueError: for a position outside of the prompt.
        """
        import pandas as pd

        position = index_of(position, "position", len(self.tokens), from_end=True)
        ids = self.ids[position].tolist()
        columns = {
            "token": [self.words[i] for i in ids],
            "id": ids,
            "probability": self.log_prob[position].exp().numpy(),
        }
        log_prob = self.log_prob[position]
        if self.log_prob_with_saes is not None:
            columns["with_saes"] = self.log_prob_with_saes[position].exp().numpy()
            log_prob = torch.maximum(log_prob, self.log_prob_with_saes[position])
        table = pd.DataFrame(columns).iloc[log_prob.argsort(descending=True, stable=True).numpy()]
        return table.drop_duplicates("id").reset_index(drop=True)

    def __repr__(self) -> str:
        likeliest, probability = self.words[int(self.ids[-1, 0])], float(self.log_prob[-1, 0].exp())
        return f"NextTokens({len(self.tokens)} positions; after the last {likeliest!r} ({probability:.1%}))"

    def _repr_html_(self) -> str:
        return self.to_frame()._repr_html_()


def next_tokens(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    saes: nn.Module | Sequence[nn.Module] | None = None,
    *,
    n: int = 10,
    error_term: bool = False,
    skip_special_tokens: bool | Sequence[int] = True,
) -> NextTokens:
    """List the n likeliest next tokens at every position, of the model alone and with SAEs attached.

        kl = sum over tokens of p log(p / q)        p of the model, q with SAEs attached

    Runs one pass, and a second one with the SAEs attached; the logits of both are held, in the model's dtype.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or ids, `[pos]` or `[1, pos]`.
        saes: one SAE or several that write to different points, attached together; None for the model alone.
        n: next tokens listed of each.
        error_term: as for `saewb.attach`: add the reconstruction error, which restores the model's own predictions.
        skip_special_tokens: as for `saewb.attach`, but True by default.

    Returns:
        A NextTokens: `.to_frame(position)`.

    Raises:
        ValueError, TypeError: as `saewb.attach`; if an SAE is attached at the points of these; for a prompt of no token
            or more than the model's context; n < 1.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> table = saewb.next_tokens(model, "The United", sae, n=3).to_frame()
        >>> table.columns.tolist(), table.token[0]
        (['token', 'id', 'probability', 'with_saes'], ' States')
    """
    if (n := index_of(n, "n")) < 1:
        raise ValueError(explain(f"next_tokens got n={n!r}.", want="a number of words, 1 or more"))
    with hook_points.lock(model):
        options = {"error_term": error_term, "skip_special_tokens": skip_special_tokens}
        *_, result = next_tokens_in_turn(model, prompt_ids(model, prompt), saes, n, alone=saes is None, **options)
    return result


def next_tokens_in_turn(
    model: nn.Module,
    ids: Int[Tensor, "1 pos"],
    saes: nn.Module | Sequence[nn.Module] | None,
    n: int,
    *,
    alone: bool = True,
    **options: Any,
) -> Iterator[NextTokens]:
    """Yield the next tokens of the model alone after one pass, then those with SAEs after a second one.

    Args:
        model: as for `next_tokens`; its lock is held for each pass, and not in between.
        ids: token ids of the prompt.
        saes: as for `next_tokens`.
        n: as for `next_tokens`.
        alone: whether to yield the first result.
        options: keywords of `saewb.attach`.
    """
    compared = [] if saes is None else saes if isinstance(saes, (list, tuple)) else [saes]
    points = [point for sae in compared for site in sites_of(model, sae) for point in site.points]
    with hook_points.lock(model), eval_mode(model), torch.no_grad():
        check_unmodified(model, points, steered=True)
        clean = model(ids)[0]
    if alone:
        yield _likeliest(model, ids, clean, None, n)
    if saes is not None:
        with hook_points.lock(model), eval_mode(model), torch.no_grad(), attach(model, saes, **options):
            spliced = model(ids)[0]
        yield _likeliest(model, ids, clean, spliced, n)


def prompt_strings(model: nn.Module, ids: Sequence[int]) -> list[str]:
    """Decode each token of a prompt; "<id>" where the model has no tokenizer."""
    return token_strings(model, ids) if getattr(model, "tokenizer", None) is not None else [f"<{i}>" for i in ids]


def _likeliest(model: nn.Module, ids: Tensor, clean: Tensor, spliced: Tensor | None, n: int) -> NextTokens:
    """Collect the likeliest next tokens from logits `[pos, d_vocab]`, some positions at a time."""
    for logits in (clean, *([] if spliced is None else [spliced])):
        check_finite("logits", logits)
    n_positions, n = max(1, _TILE // clean.shape[-1]), min(n, clean.shape[-1])
    clean_tiles = clean.split(n_positions)
    tiles = zip(clean_tiles, [None] * len(clean_tiles) if spliced is None else spliced.split(n_positions), strict=True)
    columns = zip(*(_compare(*tile, n) for tile in tiles), strict=True)
    next_ids, p, q, kl = (None if parts[0] is None else torch.cat(parts).cpu() for parts in columns)
    words = {i: prompt_strings(model, [i])[0] for i in next_ids.unique().tolist()}
    return NextTokens(tuple(prompt_strings(model, ids[0].tolist())), next_ids, p, q, kl, words)


@torch.no_grad()
def _compare(clean: Tensor, spliced: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Ids of the likeliest next tokens, their log probabilities under both, and the KL divergence per position."""
    p = clean.float().log_softmax(-1)
    ids = p.topk(n, dim=-1).indices
    if spliced is None:
        return ids, p.gather(1, ids), None, None
    q = spliced.float().log_softmax(-1)
    ids = torch.cat([ids, q.topk(n, dim=-1).indices], 1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return ids, p.gather(1, ids), q.gather(1, ids), kl
