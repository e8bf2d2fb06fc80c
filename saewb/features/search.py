"""Find latents by text, token or pattern, and those active in a prompt.

A search for a text first looks for tokens that may contain it: the first token of a match either contains all of the
text, or ends with its first k letters, and the next token continues from there. A context without such a token or pair
cannot have the text and is not decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.features.config import IndexInfo
from saewb.features.token_texts import TokenTexts
from saewb.interventions.site import flatten_heads
from saewb.models import hook_points
from saewb.models.active import check_unmodified, model_digest
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_mask, token_strings

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 2048  # latents searched at a time
_LETTERS = 60  # letters of the text that the prefilter uses: the bits of an int64
_EMPTY_ROW = {"contexts": 0, "firing": 0.0, "activation": 0.0, "logit": float("nan"), "example": "", "label": ""}


def search(
    info: IndexInfo,
    tensors: Mapping[str, Tensor],
    texts: TokenTexts,
    what: Any,
    n: int | None,
    labels: Mapping[int, str],
) -> pd.DataFrame:
    """Find latents by text, token id or pattern; see `FeatureIndex.search`."""
    import pandas as pd

    what = what if isinstance(what, (str, re.Pattern)) else index_of(what, "what")
    rows: dict[int, dict[str, Any]] = {}
    prefilter = TokenPairFilter(what, texts) if isinstance(what, str) else None
    for name in ("top", "sample"):
        for begin in range(0, info.d_sae, _ROWS):
            part = slice(begin, begin + _ROWS)
            ids, acts = tensors[f"{name}.tokens"][part], tensors[f"{name}.acts"][part]
            for latent, slot, positions in _matches(ids, texts, what, prefilter):
                row = rows.setdefault(begin + latent, {"latent": begin + latent, **_EMPTY_ROW})
                value = max((float(acts[latent, slot, p]) for p in positions), key=abs, default=0.0)
                row["contexts"] += 1
                row["firing"] += value != 0
                if not row["example"] or abs(value) > abs(row["activation"]):
                    row["activation"] = value
                    row["example"] = "".join(texts.decode([i for i in ids[latent, slot].tolist() if i >= 0]))
    _match_logits(tensors, texts, what, rows)
    for latent, label in labels.items() if not isinstance(what, int) else ():
        if _label_matches(label, what):
            rows.setdefault(latent, {"latent": latent, **_EMPTY_ROW})["label"] = label
    table = pd.DataFrame(list(rows.values()), columns=["latent", *_EMPTY_ROW])
    table["firing"] = table["firing"] / table["contexts"].clip(lower=1)
    hits = table["firing"] * table["contexts"]
    keys = {"_named": table["label"] != "", "_hits": hits, "_size": table["activation"].abs()}
    table = table.assign(**keys).sort_values([*keys, "latent"], ascending=[False, False, False, True], kind="stable")
    return table.drop(columns=list(keys)).head(n if n is not None else len(table)).set_index("latent")


def _label_matches(label: str, what: str | re.Pattern[str]) -> bool:
    """Whether a label has a pattern, or a text, or all words of it in any order."""
    if isinstance(what, re.Pattern):
        return what.search(label) is not None
    label, words = label.casefold(), what.casefold().split()
    return bool(words) and all(word in label for word in words)


class TokenPairFilter:
    """Prefilter for text search on token pairs; it may pass too many contexts, never too few.

    Bit k of two numbers per token says whether it ends with the first k letters, and whether it continues after them,
    so all pairs of all contexts cost two look-ups and an "and". Tokens that are not ASCII (other case folding, parts of
    characters), and unknown ones, always pass.

    Example:
        >>> texts = TokenTexts({1: " Par", 2: "is", 3: " in"})
        >>> TokenPairFilter("paris", texts).contexts(torch.tensor([[[3, 1, 2], [2, 1, 3]]]))
        tensor([[ True, False]])
    """

    def __init__(self, text: str, texts: TokenTexts) -> None:
        size = max(texts.strings, default=0) + 2  # the last entry is for all unknown tokens
        cuts = range(1, min(len(text), _LETTERS))
        any_cut = sum(1 << k for k in cuts)
        self.contains = torch.ones(size, dtype=torch.bool)
        self.ends, self.continues = torch.full((size,), any_cut), torch.full((size,), any_cut)
        query = text.lower()
        starts, rests = [query[:k] for k in cuts], [query[k:] for k in cuts]
        for token, string in texts.strings.items():
            lower = string.lower()
            if not string.isascii() or not lower or not text.isascii():
                continue
            self.contains[token] = query in lower
            self.ends[token] = sum(1 << k for k, s in zip(cuts, starts, strict=True) if lower.endswith(s))
            matching = (k for k, r in zip(cuts, rests, strict=True) if r.startswith(lower) or lower.startswith(r))
            self.continues[token] = sum(1 << k for k in matching)

    def contexts(self, ids: Int[Tensor, "latents slots window"]) -> Bool[Tensor, "latents slots"]:
        """Mask of contexts that may have the text; id -1 is no token."""
        is_token = ids >= 0
        token = ids.clamp(-1, len(self.contains) - 1).long().where(is_token, 0)
        whole = (self.contains[token] & is_token).any(2)
        pairs = (self.ends[token[..., :-1]] & self.continues[token[..., 1:]]) != 0
        return whole | (pairs & is_token[..., :-1] & is_token[..., 1:]).any(2)


def _matches(
    ids: Tensor, texts: TokenTexts, what: Any, prefilter: TokenPairFilter | None
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (latent, slot, positions) of contexts that match, `ids` being `[latents, slots, window]`."""
    if isinstance(what, int):
        equal = ids == what
        for latent, slot in equal.any(2).nonzero().tolist():
            yield latent, slot, equal[latent, slot].nonzero()[:, 0].tolist()
        return
    pattern = _pattern(what)
    candidates = prefilter.contexts(ids) if prefilter is not None else (ids >= 0).any(2)
    for (latent, slot), row in zip(candidates.nonzero().tolist(), ids[candidates].tolist(), strict=True):
        inside = [p for p, i in enumerate(row) if i >= 0]
        tokens = texts.decode([row[p] for p in inside])
        spans = [m.span() for m in pattern.finditer("".join(tokens)) if m.end() > m.start()]
        if spans:
            yield latent, slot, [inside[p] for p in _covered(tokens, spans)]


def _covered(tokens: list[str], spans: list[tuple[int, int]]) -> list[int]:
    """Positions of the tokens that share a character with a span."""
    positions, begin = [], 0
    for position, text in enumerate(tokens):
        end = begin + len(text)
        if any(a < end and begin < b for a, b in spans):
            positions.append(position)
        begin = end
    return positions


def _pattern(what: Any) -> re.Pattern[str]:
    if isinstance(what, re.Pattern):
        return what
    if not what:
        raise ValueError(explain("search got an empty text.", fix="index.search('Paris')"))
    return re.compile(re.escape(what), re.IGNORECASE)


def _match_logits(tensors: Mapping[str, Tensor], texts: TokenTexts, what: Any, rows: dict[int, dict[str, Any]]) -> None:
    for end in ("top", "bottom") if "logits.top" in tensors else ():
        ids = tensors[f"logits.{end}_ids"]
        if isinstance(what, int):
            matching = torch.tensor([what])
        else:
            pattern = _pattern(what)
            matching = torch.tensor([i for i in ids.unique().tolist() if pattern.search(texts.decode_token(i))] or [-1])
        for latent, rank in torch.isin(ids, matching.to(ids.dtype)).nonzero().tolist():
            row = rows.setdefault(latent, {"latent": latent, **_EMPTY_ROW})
            effect = float(tensors[f"logits.{end}"][latent, rank])
            if not abs(row["logit"]) >= abs(effect):  # nan at first
                row["logit"] = effect


def find(
    info: IndexInfo,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    sae: nn.Module,
    prompt: str | Sequence[int] | Tensor,
) -> pd.DataFrame:
    """Active latents of a prompt; see `FeatureIndex.find`, which checks the SAE."""
    import pandas as pd

    check_unmodified(model, [info.hook, info.hook_out])  # said before the digest, which is another one too
    info.check_content("this index", model=model_digest(model, reuse=True))
    ids = prompt_ids(model, prompt)
    with hook_points.lock(model), torch.no_grad(), eval_mode(model, sae):
        check_unmodified(model, [info.hook, info.hook_out])
        x = flatten_heads(sae, capture(model, ids, [info.hook])[info.hook], sae.cfg.d_in, info.hook)
        check_finite(f"activations at {info.hook!r}", x[0, ~special_mask(ids[0], info.special)])
        acts = sae.encode(x)[0].float().cpu()
    acts[special_mask(ids[0].cpu(), info.special)] = 0
    position, latent = acts.nonzero(as_tuple=True)
    act, largest = acts[position, latent], tensors["top.value"][latent, 0].abs()
    tokenizer = getattr(model, "tokenizer", None)
    tokens = token_strings(model, ids[0]) if tokenizer is not None else [f"<{i}>" for i in ids[0].tolist()]
    table = pd.DataFrame(
        {
            "position": position.numpy(),
            "token": [tokens[p] for p in position.tolist()],
            "latent": latent.numpy(),
            "activation": act.numpy(),
            "of_max": (act.abs() / torch.where(largest > 0, largest, torch.nan)).numpy(),
        }
    )
    size = table["activation"].abs()
    return table.assign(_size=size).sort_values("_size", ascending=False, kind="stable").drop(columns="_size")
