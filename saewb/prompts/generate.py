"""Text token by token, clean or under an intervention that is on the model for one forward pass at a time.

1. Take the model's lock, make the intervention, run what is new of the text, take both off again.
2. Choose the next token: the largest logit, or a draw from softmax(logits / temperature) by a generator of one's own.
3. Hand it out. Who stops asking (or closes the generator) has stopped the generation; the model is as before.

So between two tokens any other thread may use the model, and finds it clean. Keys and values of what was read are kept
here, not in the model: the first token costs a pass over the prompt, each further one a pass over a single token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.forward import KVCachedText

if TYPE_CHECKING:
    import pandas as pd

Intervene = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class NewToken:
    """One token of a generation, as `generate_tokens` gives it."""

    token_id: int
    """Of the vocabulary."""
    text: str
    """All that was generated so far, this token included."""
    probability: float
    """Of this token, at temperature 1, under the intervention."""


def generate_tokens(
    model: nn.Module,
    prompt: str | Tensor,
    intervene: Intervene | None = None,
    *,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    use_past_kv_cache: bool = True,
) -> Iterator[NewToken]:
    """The continuation of a prompt, one token at a time, as it is made; greedy, it is what `model.generate` writes.

    Ends after `max_new_tokens`, with the tokenizer's EOS token, or where the model's context is full.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        prompt: a text, or token ids `[pos]` or `[1, pos]`.
        intervene: makes the intervention, `lambda: saewb.steer(model, sae, {12: 8.0})`; None: clean.
        max_new_tokens: how many at most.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        seed: of the draws; the same seed gives the same text.
        use_past_kv_cache: read each token once and keep its keys and values, made under the intervention; False: read
            the whole text for every token, which gives the same text slowly, also with an SAE that looks at earlier
            tokens' activations (temporal).

    Returns:
        An iterator of NewToken; `close()` it, or ask for no more, to stop.

    Raises:
        ValueError: at once, for a prompt of no tokens or of more than the model's context, a temperature that is
            negative or not finite, or fewer than 1 token; later, what `intervene` raises.

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
    text, rng = KVCachedText(model, _ids(model, prompt), use_past_kv_cache), torch.Generator().manual_seed(seed)
    return _steps(model, text, intervene, max_new_tokens, temperature, rng)


def next_token_changes(model: nn.Module, prompt: str | Tensor, intervene: Intervene, n: int = 20) -> pd.DataFrame:
    """The `n` next tokens whose probability an intervention changes most.

        change = p(token | prompt, intervention) - p(token | prompt)      (softmax at temperature 1)

    Args:
        model: as for `generate_tokens`.
        prompt: as for `generate_tokens`.
        intervene: as for `generate_tokens`.
        n: rows, at most the vocabulary.

    Returns:
        A DataFrame, largest |change| first: token_id, token, clean, changed, change.

    Raises:
        ValueError: for a prompt of no tokens or of more than the model's context; what `intervene` raises.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> table = next_token_changes(model, "It is", lambda: saewb.steer(model, sae, {748: 8.0}), n=5)
        >>> list(table.columns)
        ['token_id', 'token', 'clean', 'changed', 'change']
    """
    import pandas as pd

    ids = _ids(model, prompt)
    clean, changed = (
        _next_logits(model, KVCachedText(model, ids, use_past_kv_cache=False), one).softmax(-1)
        for one in (None, intervene)
    )
    change = changed - clean
    top = change.abs().topk(min(n, change.numel())).indices
    tokens = [model.tokenizer.decode([i]) for i in top.tolist()]
    columns = {"token_id": top, "clean": clean[top], "changed": changed[top], "change": change[top]}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.insert(1, "token", tokens)
    return table


def _steps(
    model: nn.Module,
    text: KVCachedText,
    intervene: Intervene | None,
    n: int,
    temperature: float,
    rng: torch.Generator,
) -> Iterator[NewToken]:
    made = []
    for _ in range(n):
        logits = _next_logits(model, text, intervene)
        chosen = _choose(logits, temperature, rng)
        made.append(chosen)
        yield NewToken(chosen, model.tokenizer.decode(made), logits.softmax(-1)[chosen].item())
        if chosen == model.tokenizer.eos_token_id or text.ids.shape[1] == model.cfg.n_ctx:
            return
        text.append(chosen)


def _next_logits(model: nn.Module, text: KVCachedText, intervene: Intervene | None) -> Tensor:
    """`[d_vocab]`, float32 on the CPU."""
    with hook_points.lock(model), torch.no_grad(), intervene() if intervene is not None else contextlib.nullcontext():
        return text.logits().float().cpu()


def _choose(logits: Tensor, temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng))


def _ids(model: nn.Module, prompt: str | Tensor) -> Tensor:
    ids = model.to_tokens(prompt, truncate=False) if isinstance(prompt, str) else torch.atleast_2d(prompt)
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        what = f"the prompt has token ids of shape {tuple(ids.shape)}."
        raise ValueError(explain(what, want="one text of at least one token: [pos] or [1, pos]"))
    if (n := ids.shape[1]) > model.cfg.n_ctx:
        what = f"the prompt has {n:,} tokens, the model's context {model.cfg.n_ctx:,}."
        raise ValueError(explain(what, want=f"at most {model.cfg.n_ctx:,} tokens, the BOS token included"))
    return ids.to(next(model.parameters()).device)
