"""Generate text token by token, with or without an intervention.

1. Take the model's lock, apply the intervention, run the new tokens of the text, remove the intervention.
2. Choose the next token: the largest logit, or a draw from softmax(logits / temperature) by a separate generator.
3. Yield it. Closing the iterator, or not advancing it, ends the generation; the model is as before.

Between two tokens other threads can use the model, without the intervention. The KV cache is held here, not in the
model: the first token costs a pass over the prompt, each further one a pass over a single token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.forward import KVCachedText
from saewb.models.tokenizer import end_ids, token_strings

if TYPE_CHECKING:
    import pandas as pd

Intervene = Callable[[], AbstractContextManager[Any]]
"""Applies an intervention, e.g. `lambda: saewb.steer(model, sae, {12: 8.0})`."""


@dataclass(frozen=True)
class NewToken:
    """A generated token, as `generate_tokens` yields it."""

    token_id: int
    """Id in the vocabulary."""
    text: str
    """Text generated so far, this token included."""
    probability: float
    """Probability of this token at temperature 1, under the intervention."""


def generate_tokens(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    intervene: Intervene | None = None,
    *,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    use_past_kv_cache: bool = True,
) -> Iterator[NewToken]:
    """Generate the continuation of a prompt one token at a time; at temperature 0 it equals that of `model.generate`.

    Ends after `max_new_tokens`, after a token that ends a text (the tokenizer's EOS, and others that the model's
    generation config names), or when the model's context is full.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        prompt: a text, or token ids `[pos]` or `[1, pos]`.
        intervene: applies the intervention, `lambda: saewb.steer(model, sae, {12: 8.0})`; None for none.
        max_new_tokens: number of tokens to generate at most.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        seed: seed of the draws; the same seed gives the same text.
        use_past_kv_cache: run each token once and cache its keys and values, computed under the intervention; False:
            run the whole text for every token, which gives the same text slowly, also with an SAE that looks at earlier
            tokens' activations (temporal).

    Returns:
        An iterator of NewToken; to stop, `close()` it or do not advance it.

    Raises:
        ValueError: at once, for a prompt of no tokens or of more than the model's context, a temperature that is
            negative or not finite, or `max_new_tokens` below 1; during iteration, what `intervene` raises.
        TypeError: for a prompt of another kind.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> steered = generate_tokens(model, "It is", lambda: saewb.steer(model, sae, {748: 8.0}), max_new_tokens=3)
        >>> len([token.token_id for token in steered])
        3
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(explain(f"generate_tokens got temperature={temperature!r}.", want="a number >= 0", fix="0.0"))
    if max_new_tokens < 1:
        raise ValueError(explain(f"generate_tokens got max_new_tokens={max_new_tokens!r}.", want="at least 1"))
    text = KVCachedText(model, prompt_ids(model, prompt), use_past_kv_cache)
    return _generate(model, text, intervene, max_new_tokens, temperature, torch.Generator().manual_seed(seed))


def next_token_changes(
    model: nn.Module, prompt: str | Sequence[int] | Tensor, intervene: Intervene, n: int = 20
) -> pd.DataFrame:
    """List the `n` next tokens whose probability an intervention changes most.

        change = p(token | prompt, intervention) - p(token | prompt)      (softmax at temperature 1)

    Args:
        model: as for `generate_tokens`.
        prompt: as for `generate_tokens`.
        intervene: as for `generate_tokens`.
        n: number of rows, at most that of the vocabulary.

    Returns:
        A DataFrame, largest |change| first: token_id, token, clean, changed, change.

    Raises:
        ValueError: for a prompt of no tokens or of more than the model's context; what `intervene` raises.
        TypeError: for a prompt of another kind.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> table = next_token_changes(model, "It is", lambda: saewb.steer(model, sae, {748: 8.0}), n=5)
        >>> list(table.columns)
        ['token_id', 'token', 'clean', 'changed', 'change']
    """
    import pandas as pd

    ids = prompt_ids(model, prompt)
    clean, changed = (
        _next_logits(model, KVCachedText(model, ids, use_past_kv_cache=False), f).softmax(-1) for f in (None, intervene)
    )
    change = changed - clean
    top = change.abs().topk(min(n, change.numel())).indices
    tokens = [token_strings(model, [i])[0] for i in top.tolist()]
    columns = {"token_id": top, "clean": clean[top], "changed": changed[top], "change": change[top]}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.insert(1, "token", tokens)
    return table


def _generate(
    model: nn.Module,
    text: KVCachedText,
    intervene: Intervene | None,
    n: int,
    temperature: float,
    rng: torch.Generator,
) -> Iterator[NewToken]:
    new_ids, ends = [], end_ids(model)
    for _ in range(n):
        logits = _next_logits(model, text, intervene)
        token = _choose(logits, temperature, rng)
        new_ids.append(token)
        yield NewToken(token, "".join(token_strings(model, new_ids)), logits.softmax(-1)[token].item())
        if token in ends or text.ids.shape[1] == model.cfg.n_ctx:
            return
        text.append(token)


def _next_logits(model: nn.Module, text: KVCachedText, intervene: Intervene | None) -> Tensor:
    """Logits of the next token, `[d_vocab]`, float32 on the CPU."""
    with hook_points.lock(model), eval_mode(model), torch.no_grad(), (intervene or contextlib.nullcontext)():
        logits = text.logits()[0].float().cpu()
    check_finite("logits", logits)
    return logits


def _choose(logits: Tensor, temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng))
