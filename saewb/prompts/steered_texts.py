"""Texts under steering and what they cost: generation in batches, KL, fluency, repetition.

Every figure compares a steered row of a batch with the clean model run on the same row of an equal batch, so that a
change of 0 gives a KL and a fluency of exactly 0: rounding depends on the shape of a batch and the place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb.data.tokens import prompt_ids
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.forward import KVCachedText
from saewb.models.tokenizer import end_ids, token_strings

Intervene = Callable[[], AbstractContextManager[Any]]
_TILE = 2**22  # log probabilities compared at a time (16 MiB in float32)


@dataclass(frozen=True)
class TextFigures:
    """What steering did to one text: the result of `saewb.steered_text`."""

    kl: float
    """KL(steered || clean) of the next token in nats, mean over the prompt's end and the clean continuation."""
    fluency: float
    """Nats per token by which the clean model finds the steered continuation less likely than its own."""
    repetition: float
    """1 - distinct trigrams / trigrams of the steered continuation; nan below three tokens."""
    repetition_clean: float
    """The same of the clean continuation."""
    n_tokens: int
    """Tokens of the steered continuation."""

    def __repr__(self) -> str:
        figures = f"KL {self.kl:.3g}, fluency {self.fluency:+.3g} nats, repetition {self.repetition:.2g}"
        return f"TextFigures({figures} (clean {self.repetition_clean:.2g}), {self.n_tokens} tokens)"


@torch.no_grad()
def steered_text(
    model: nn.Module,
    prompt: Any,
    clean: Sequence[int] | Int[Tensor, " pos"],
    steered: Sequence[int] | Int[Tensor, " pos"],
    intervene: Intervene,
) -> TextFigures:
    """Measure a steered continuation of a prompt beside the clean one.

        kl          mean over positions of sum_v p log(p / q),  p steered, q clean, on the prompt and the clean text
        fluency     mean NLL of the steered text - mean NLL of the clean text,  both by the clean model
        repetition  1 - distinct trigrams / trigrams

    Fluency alone rewards no steering, and a text that repeats itself: look at all three. Three passes.

    Args:
        model: a TransformerBridge or HookedTransformer.
        prompt: a text, token ids, or messages.
        clean: token ids that the clean model wrote, at least one.
        steered: token ids that the steered model wrote, at least one.
        intervene: applies the intervention, `lambda: saewb.steer(model, sae, {12: 8.0})`.

    Returns:
        A TextFigures: kl, fluency, repetition, repetition_clean, n_tokens.

    Raises:
        ValueError: for a prompt of no tokens or of more than the model's context; what `intervene` raises.
        FloatingPointError: if the logits are not finite.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> steer = lambda: saewb.steer(model, sae, {972: 16.0}, positions=slice(1, None))
        >>> write = lambda *how: [t.token_id for t in saewb.generate_tokens(model, "It is a", *how, max_new_tokens=12)]
        >>> figures = steered_text(model, "It is a", write(), write(steer), steer)
        >>> figures.kl > 0, figures.fluency > 0, figures.n_tokens
        (True, True, 12)
    """
    ids = prompt_ids(model, prompt)
    texts = [[int(i) for i in steered]]
    own = [int(i) for i in clean]
    kl, clean_nll, steered_nll = compare_rows(model, ids, own, texts, intervene)
    return TextFigures(
        float(kl[0]), float(steered_nll[0] - clean_nll[0]), repetition(texts[0]), repetition(own), len(texts[0])
    )


@torch.no_grad()
def steered_rows(
    model: nn.Module, prompt: Any, n_rows: int, intervene: Intervene, **sampling: Any
) -> list[tuple[str, TextFigures]]:
    """Write and measure several steered texts in one batch, the first row of which is not steered.

    Args:
        model: a TransformerBridge or HookedTransformer.
        prompt: a text, token ids, or messages.
        n_rows: rows of the batch.
        intervene: steers them, e.g. `lambda: saewb.steer(model, sae, {12: [None, 4.0, 8.0]})`.
        sampling: max_new_tokens, temperature, seed and use_past_kv_cache, as for `saewb.generate_tokens`.

    Returns:
        Text and figures of each row.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> steer = lambda: saewb.steer(model, sae, {972: [None, 0.0, 40.0]}, positions=slice(1, None))
        >>> rows = steered_rows(model, "It is a", 3, steer, max_new_tokens=6)
        >>> rows[0] == rows[1], rows[1][1].kl, rows[2][1].kl > 0.1
        (True, 0.0, True)
    """
    ids = prompt_ids(model, prompt)
    texts = write_rows(model, ids, n_rows, intervene, **sampling)
    kl, clean_nll, nll = compare_rows(model, ids, texts[0], texts, intervene)
    fluency, own = (nll - clean_nll).tolist(), repetition(texts[0])
    strings = ["".join(token_strings(model, text)) for text in texts]
    figures = [
        TextFigures(k, f, repetition(text), own, len(text))
        for k, f, text in zip(kl.tolist(), fluency, texts, strict=True)
    ]
    return list(zip(strings, figures, strict=True))


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """`1 - distinct n-grams / n-grams`; nan if there is none.

    Example:
        >>> repetition([1, 2, 3, 1, 2, 3]), repetition([1, 2, 3, 4]), repetition([1, 2])
        (0.25, 0.0, nan)
    """
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def write_rows(
    model: nn.Module,
    ids: Int[Tensor, "1 pos"],
    n_rows: int,
    intervene: Intervene | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    use_past_kv_cache: bool = True,
) -> list[list[int]]:
    """Continue one prompt in every row of a batch; rows differ by what `intervene` does to each.

    A row ends with a token that ends a text. At a temperature all rows draw with the same random numbers (by the
    inverse of the distribution function), so that equal rows write equal texts, and similar ones stay close.
    """
    text = KVCachedText(model, ids.expand(n_rows, -1), use_past_kv_cache)
    ends = torch.tensor(end_ids(model), dtype=torch.long) if getattr(model, "tokenizer", None) is not None else None
    rng = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    is_open = torch.ones(n_rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        with hook_points.lock(model), eval_mode(model), (intervene or nullcontext)():
            logits = text.logits().float()
        check_finite("logits", logits)
        tokens = _choose(logits, temperature, rng).cpu()
        for row in is_open.nonzero()[:, 0].tolist():
            rows[row].append(int(tokens[row]))
        if ends is not None:
            is_open &= ~torch.isin(tokens, ends)
        if not is_open.any() or step == max_new_tokens - 1:
            break
        text.append(tokens)
    return rows


def _choose(logits: Float[Tensor, "rows d_vocab"], temperature: float, rng: torch.Generator) -> Int[Tensor, " rows"]:
    if temperature == 0:
        return logits.argmax(-1)
    u = float(torch.rand((), generator=rng, dtype=torch.float64))
    cdf = (logits.cpu().double() / temperature).softmax(-1).cumsum(-1)
    draws = u * cdf[:, -1:]
    return torch.searchsorted(cdf, draws, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def compare_rows(
    model: nn.Module,
    ids: Int[Tensor, "1 pos"],
    clean: Sequence[int],
    texts: Sequence[Sequence[int]],
    intervene: Intervene,
    on_texts: Callable[[], AbstractContextManager[Any]] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """KL of each row on the clean text, and the mean NLL of the clean text and of each row's own.

    Args:
        model: run in three passes.
        ids: of the prompt.
        clean: continuation of the clean model.
        texts: continuation of each row.
        intervene: steers row r of a batch of as many rows.
        on_texts: entered around the clean pass over `texts`, e.g. to capture activations.

    Returns:
        On the CPU, float64: `kl`, NLL of `clean` as read in each row, NLL of each row's text.
    """
    n, longest = len(texts), max(len(clean), *map(len, texts))
    own, others = _padded(ids, [clean] * n, longest), _padded(ids, texts, longest)
    first, last = ids.shape[1] - 1, ids.shape[1] - 1 + len(clean)
    with hook_points.lock(model), eval_mode(model):
        reference = model(own)
        with intervene():
            changed = model(own)
        check_finite("logits", changed)
        kl = _kl(changed[:, first : last + 1], reference[:, first : last + 1])
        del changed
        clean_nll = _mean_nll(reference, own, first, [len(clean)] * n)
        del reference
        with (on_texts or nullcontext)():
            text_nll = _mean_nll(model(others), others, first, [len(text) for text in texts])
    return kl, clean_nll, text_nll


def _padded(ids: Tensor, texts: Sequence[Sequence[int]], longest: int) -> Int[Tensor, "rows pos"]:
    """Prompt and continuations; the last token repeats to the end, which no token before it sees."""
    rows = [list(text) + [text[-1]] * (longest - len(text)) for text in texts]
    tail = torch.tensor(rows, dtype=ids.dtype, device=ids.device)
    return torch.cat([ids.expand(len(rows), -1), tail], 1)


def _kl(changed: Tensor, clean: Tensor) -> Float[Tensor, " rows"]:
    """Mean over positions of KL(changed || clean); some positions at a time."""
    shape, d_vocab = changed.shape[:2], changed.shape[-1]
    flat = (changed.reshape(-1, d_vocab), clean.reshape(-1, d_vocab))
    parts = []
    for p, q in zip(*(x.split(max(1, _TILE // d_vocab)) for x in flat), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).view(shape).cpu().double().mean(1).clamp_min(0)


def _mean_nll(logits: Tensor, ids: Tensor, first: int, lengths: Sequence[int]) -> Float[Tensor, " rows"]:
    """Mean negative log likelihood of the tokens after position `first`, as many of each row as it has."""
    parts = []
    for row, n in enumerate(lengths):
        log_p = logits[row, first : first + n].float().log_softmax(-1)
        parts.append(-log_p.gather(1, ids[row, first + 1 : first + 1 + n, None])[:, 0])
    each = torch.cat(parts).cpu().double().split(list(lengths))
    return torch.stack([nll.mean() for nll in each])
