"""What comes next, according to the model, and according to it with SAEs in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.interventions.attachment import attach
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import token_strings

if TYPE_CHECKING:
    import pandas as pd

_TILE = 2**23  # log probabilities computed at a time (32 MiB in float32)


@dataclass(frozen=True, eq=False)
class NextTokens:
    """The likeliest next tokens at each position of a prompt. Made by `saewb.next_tokens`, which explains it."""

    tokens: tuple[str, ...]
    """The prompt, token by token."""
    ids: Int[Tensor, "pos words"]
    """The model's likeliest, likeliest first; then those with the SAEs in place."""
    log_prob: Float[Tensor, "pos words"]
    """Of the model, in nats."""
    log_prob_with_saes: Float[Tensor, "pos words"] | None
    """None if there are none."""
    kl: Float[Tensor, " pos"] | None
    """Divergence of the latter from the former, in nats."""
    words: Mapping[int, str]
    """The text of each id."""

    def to_frame(self, position: int = -1) -> pd.DataFrame:
        """At one position: token, id, probability, and with_saes, the likeliest (by either) first.

        Raises:
            ValueError: for a position that is not there.
        """
        import pandas as pd

        n = len(self.tokens)
        if not -n <= position < n:
            raise ValueError(explain(f"position {position} of a prompt of {n} tokens.", want=f"0 to {n - 1}"))
        ids = self.ids[position].tolist()
        columns = {
            "token": [self.words[i] for i in ids],
            "id": ids,
            "probability": self.log_prob[position].exp().numpy(),
        }
        by = self.log_prob[position]
        if self.log_prob_with_saes is not None:
            columns["with_saes"] = self.log_prob_with_saes[position].exp().numpy()
            by = torch.maximum(by, self.log_prob_with_saes[position])
        found = pd.DataFrame(columns).iloc[by.argsort(descending=True, stable=True).numpy()]
        return found.drop_duplicates("id").reset_index(drop=True)

    def __repr__(self) -> str:
        best, share = self.words[int(self.ids[-1, 0])], float(self.log_prob[-1, 0].exp())
        return f"NextTokens({len(self.tokens)} positions; after the last {best!r} ({share:.1%}))"

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
    """The n likeliest next tokens at every position: of the model, and of the model run on what SAEs make of it.

        kl = sum over words of p log(p / q)        p the model's, q with the SAEs in place

    One pass, and another one with the SAEs attached; the logits of both are held, as the model gives them.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or ids, `[pos]` or `[1, pos]`.
        saes: one or several that write to different points, attached together; None: the model alone.
        n: words of each, likeliest first.
        error_term: as for `saewb.attach`; the reconstruction error then stays in, and nothing changes.
        skip_special_tokens: as for `saewb.attach`, but True unless said otherwise.

    Returns:
        A NextTokens: `.to_frame(position)`.

    Raises:
        ValueError, TypeError: as `saewb.attach`; for a prompt of no token or more than the model's context; n < 1.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> found = saewb.next_tokens(model, "The United", sae, n=3)
        >>> found.to_frame().columns.tolist(), found.to_frame().token[0]
        (['token', 'id', 'probability', 'with_saes'], ' States')
    """
    if type(n) is not int or n < 1:
        raise ValueError(explain(f"next_tokens got n={n!r}.", want="a number of words, 1 or more"))
    with hook_points.lock(model):
        how = {"error_term": error_term, "skip_special_tokens": skip_special_tokens}
        *_, found = in_turn(model, prompt_ids(model, prompt), saes, n, alone=saes is None, **how)
    return found


def in_turn(
    model: nn.Module,
    ids: Int[Tensor, "1 pos"],
    saes: nn.Module | Sequence[nn.Module] | None,
    n: int,
    *,
    alone: bool = True,
    **how: Any,
) -> Iterator[NextTokens]:
    """What `next_tokens` gives of the model alone, after one pass; then with SAEs in place, after another one.

    Args:
        model: as for `next_tokens`; its lock is held for each pass, and not in between.
        ids: of the prompt.
        saes: as for `next_tokens`.
        n: words of each.
        alone: whether to give the first one.
        how: keywords of `saewb.attach`.
    """
    with hook_points.lock(model), eval_mode(model), torch.no_grad():
        clean = model(ids)[0]
    if alone:
        yield _found(model, ids, clean, None, n)
    if saes is not None:
        with hook_points.lock(model), eval_mode(model), torch.no_grad(), attach(model, saes, **how):
            changed = model(ids)[0]
        yield _found(model, ids, clean, changed, n)


def _found(model: nn.Module, ids: Tensor, clean: Tensor, changed: Tensor | None, n: int) -> NextTokens:
    step, found = max(1, _TILE // clean.shape[-1]), []
    for begin in range(0, len(clean), step):
        at = slice(begin, begin + step)
        found.append(_compared(clean[at], None if changed is None else changed[at], min(n, clean.shape[-1])))
    which, p, q, kl = (None if parts[0] is None else torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    listed = ids[0].tolist()
    has_tokenizer = getattr(model, "tokenizer", None) is not None
    words = {i: token_strings(model, [i])[0] if has_tokenizer else f"<{i}>" for i in which.unique().tolist()}
    texts = token_strings(model, listed) if has_tokenizer else [f"<{i}>" for i in listed]
    return NextTokens(tuple(texts), which, p, q, kl, words)


@torch.no_grad()
def _compared(clean: Tensor, changed: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Ids of the likeliest, their log probabilities by both, and the divergence, of some positions."""
    p = clean.float().log_softmax(-1)
    ids = p.topk(n, dim=-1).indices
    if changed is None:
        return ids, p.gather(1, ids), None, None
    q = changed.float().log_softmax(-1)
    ids = torch.cat([ids, q.topk(n, dim=-1).indices], 1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return ids, p.gather(1, ids), q.gather(1, ids), kl
