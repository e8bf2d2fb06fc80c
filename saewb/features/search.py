"""Finding latents by text, by token, by pattern, and by what fires in a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saewb.errors import explain
from saewb.features.config import IndexFacts
from saewb.features.likely import Likely
from saewb.features.token_texts import Words
from saewb.interventions.site import flatten_heads
from saewb.models.capture import capture
from saewb.models.tokenizer import special_mask, token_strings

if TYPE_CHECKING:
    import pandas as pd

_SHELVES = ("top", "sample")
_ROWS = 2048  # latents looked through at a time


def search(facts: IndexFacts, tensors: Mapping[str, Tensor], words: Words, what: Any, n: int | None) -> pd.DataFrame:
    """See `FeatureIndex.search`."""
    import pandas as pd

    rows: dict[int, dict[str, Any]] = {}
    likely = Likely(what, words) if isinstance(what, str) else None
    for shelf in _SHELVES:
        for begin in range(0, facts.d_sae, _ROWS):
            part = slice(begin, begin + _ROWS)
            ids, acts = tensors[f"{shelf}.tokens"][part], tensors[f"{shelf}.acts"][part]
            for latent, slot, places in _matches(ids, words, what, likely):
                found = rows.setdefault(begin + latent, _nothing(begin + latent))
                value = max((float(acts[latent, slot, p]) for p in places), key=abs, default=0.0)
                found["contexts"] += 1
                found["firing"] += value != 0
                if not found["example"] or abs(value) > abs(found["activation"]):
                    found["activation"] = value
                    found["example"] = "".join(words.spelled(_inside(ids[latent, slot])))
    _logits(tensors, words, what, rows)
    made = pd.DataFrame(list(rows.values()), columns=list(_nothing(0)))
    made["firing"] = made["firing"] / made["contexts"].clip(lower=1)
    hits = made["firing"] * made["contexts"]
    made = made.assign(_hits=hits, _size=made["activation"].abs()).sort_values(
        ["_hits", "_size", "latent"], ascending=[False, False, True], kind="stable"
    )
    return made.drop(columns=["_hits", "_size"]).head(n if n is not None else len(made)).set_index("latent")


def _nothing(latent: int) -> dict[str, Any]:
    return {
        "latent": latent,
        "contexts": 0,
        "firing": 0.0,
        "activation": 0.0,
        "logit": float("nan"),
        "example": "",
    }


def _inside(ids: Tensor) -> list[int]:
    return [i for i in ids.tolist() if i >= 0]


def _matches(ids: Tensor, words: Words, what: Any, likely: Likely | None):
    """(latent, slot, places) of contexts that have it, `ids` being `[latents, slots, window]`."""
    if isinstance(what, int) and not isinstance(what, bool):
        found = ids == what
        for latent, slot in found.any(2).nonzero().tolist():
            yield latent, slot, found[latent, slot].nonzero()[:, 0].tolist()
        return
    pattern = _pattern(what)
    worth = likely.contexts(ids) if likely is not None else (ids >= 0).any(2)
    for (latent, slot), row in zip(worth.nonzero().tolist(), ids[worth].tolist(), strict=True):
        inside = [p for p, i in enumerate(row) if i >= 0]
        spelled = words.spelled([row[p] for p in inside])
        text = "".join(spelled)
        spans = [match.span() for match in pattern.finditer(text) if match.end() > match.start()]
        if spans:
            yield latent, slot, [inside[p] for p in _covered(spelled, spans)]


def _covered(spelled: list[str], spans: list[tuple[int, int]]) -> list[int]:
    """The tokens that share a character with a span."""
    places, begin = [], 0
    for place, text in enumerate(spelled):
        end = begin + len(text)
        if any(a < end and begin < b for a, b in spans):
            places.append(place)
        begin = end
    return places


def _pattern(what: Any) -> re.Pattern[str]:
    if isinstance(what, re.Pattern):
        return what
    if not isinstance(what, str):
        want = "a text, a token id, or re.compile(...)"
        raise TypeError(explain(f"search got a {type(what).__name__}.", want=want, fix="index.search('Paris')"))
    if not what:
        raise ValueError(explain("search got an empty text.", fix="index.search('Paris')"))
    return re.compile(re.escape(what), re.IGNORECASE)


def _logits(tensors: Mapping[str, Tensor], words: Words, what: Any, rows: dict[int, dict[str, Any]]) -> None:
    for end in ("top", "bottom") if "logits.top" in tensors else ():
        ids = tensors[f"logits.{end}_ids"]
        if isinstance(what, int):
            wanted = torch.tensor([what])
        else:
            pattern = _pattern(what)
            wanted = torch.tensor([i for i in ids.unique().tolist() if pattern.search(words.of(i))] or [-1])
        for latent, place in torch.isin(ids, wanted.to(ids.dtype)).nonzero().tolist():
            found = rows.setdefault(latent, _nothing(latent))
            effect = float(tensors[f"logits.{end}"][latent, place])
            if not abs(found["logit"]) >= abs(effect):  # nan at first
                found["logit"] = effect


def find(
    facts: IndexFacts,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    sae: nn.Module,
    prompt: str | Sequence[int] | Tensor,
) -> pd.DataFrame:
    """See `FeatureIndex.find`."""
    import pandas as pd

    if sae.cfg.d_sae != facts.d_sae:
        what = f"this index is of {facts.d_sae} latents, {sae!r} has {sae.cfg.d_sae}."
        raise ValueError(explain(what, want=facts.sae))
    device = next(model.parameters()).device
    ids = model.to_tokens(prompt) if isinstance(prompt, str) else torch.as_tensor(prompt).reshape(1, -1)
    ids = ids.to(device)
    with torch.no_grad():
        x = flatten_heads(sae, capture(model, ids, [facts.hook])[facts.hook], sae.cfg.d_in, facts.hook)
        latents = sae.encode(x)[0].float().cpu()
    latents[special_mask(ids[0].cpu(), facts.special)] = 0
    place, latent = latents.nonzero(as_tuple=True)
    value, largest = latents[place, latent], tensors["top.value"][latent, 0].abs()
    tokenizer = getattr(model, "tokenizer", None)
    spelled = token_strings(model, ids[0]) if tokenizer is not None else [f"<{i}>" for i in ids[0].tolist()]
    found = pd.DataFrame(
        {
            "position": place.numpy(),
            "token": [spelled[p] for p in place.tolist()],
            "latent": latent.numpy(),
            "activation": value.numpy(),
            "of_max": (value.abs() / torch.where(largest > 0, largest, torch.nan)).numpy(),
        }
    )
    size = found["activation"].abs()
    return found.assign(_size=size).sort_values("_size", ascending=False, kind="stable").drop(columns="_size")
