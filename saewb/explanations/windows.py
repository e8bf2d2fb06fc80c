"""Windows of text for explaining and scoring: which contexts a judge sees, and how they are written down.

- A latent's contexts in the index are split by row of text: those that explain it, and those left for scores.
- Windows for scores come from the index, where it knows every activation, or from held-out text, read once for all
  latents. A window counts as inactive only where the latent's activation was computed to be 0 on all of its tokens.
- Marking: a token is marked `<<like this>>` if its activation is above .3 of the largest in its window.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.features.index import FeatureIndex
from saewb.features.latent import Context, Latent
from saewb.features.token_texts import TokenTexts, collect_token_texts
from saewb.features.top_contexts import EMPTY
from saewb.interventions.site import Site
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_mask
from saewb.sae.base import SparseEncoder

MARK_SHARE = 0.3
"""Fraction of a window's largest activation above which a token is marked."""
_LINE = str.maketrans(
    {"\n": "↵", "\r": "↵", "\t": "⇥", "\v": "↵", "\f": "↵", "\x85": "↵", "\u2028": "↵", "\u2029": "↵"}
)
_N_CORE = 4  # tokens on each side of a peak by which a context is recognized in held-out text


def index_sha(index: FeatureIndex) -> str:
    """Start of the sha256 of what an index is of: model, SAE, settings and how much text.

    Args:
        index: of any SAE; its labels do not matter.

    Returns:
        12 hexadecimal digits.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, ["The river flows through the city."] * 20, ctx_len=16)
        >>> len(index_sha(index)), index_sha(index) == index_sha(index.with_labels({3: "three"}))
        (12, True)
    """
    values = {name: value for name, value in index.info.to_json().items() if name != "lens"}  # changes no context
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def rng_of(*parts: Any) -> random.Random:
    """A generator whose numbers depend on these plain values only, on any machine."""
    return random.Random(hashlib.sha256(json.dumps(parts).encode()).digest())


# -- writing windows down --------------------------------------------------------------------------------------------


def one_line(tokens: Sequence[str]) -> list[str]:
    """Texts of tokens for a prompt: each on one line, so that no text can pass for another line of the prompt."""
    return [text.translate(_LINE) for text in tokens]


def marked_text(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """A window as one line with the marked tokens in `<<` and `>>`, adjacent ones together.

    Brackets that the text itself has are written `< <` and `> >`.

    Example:
        >>> marked_text(["a", " big", " cat", " <<", "b"], [False, True, True, False, False])
        'a<< big cat>> < <b'
    """
    out, last, inside = [], "", False
    for text, mark in zip([*one_line(tokens), ""], [*map(bool, marks), False], strict=True):
        for piece in (["<<" if mark else ">>"] if mark != inside else []) + list(text):
            out.append(" " if piece[0] == last and last in "<>" else "")  # of the text: two would read as a mark
            out.append(piece)
            last = piece[0]
        inside = mark
    return "".join(out)


def plain_text(tokens: Sequence[str]) -> str:
    """A window as one line, without marks."""
    return marked_text(tokens, [False] * len(tokens))


def marks_of(context: Context) -> list[bool]:
    """Which tokens of a window are marked: |activation| above .3 of the largest."""
    largest = max(map(abs, context.acts), default=0.0)
    return [abs(act) > MARK_SHARE * largest for act in context.acts]


def levels_of(acts: Sequence[float], largest: float) -> list[int]:
    """Activations as whole numbers 0 to 10: ceil(10 |a| / largest), at most 10."""
    if largest <= 0:
        return [0] * len(acts)
    return [min(10, math.ceil(10 * abs(act) / largest - 1e-9)) for act in acts]


# -- contexts that explain -------------------------------------------------------------------------------------------


def explaining_contexts(latent: Latent, n: int) -> list[Context]:
    """Contexts that explain a latent: at most `n`, the strongest first, then from all groups of sampled ones.

    Of the top contexts and of each group every other one, so that as many are left for scores; and no row of text that
    another one of the others is in.
    """
    seen: dict[tuple[int, ...], Context] = {}
    for context in latent.top[::2][: math.ceil(n / 2)]:
        seen.setdefault(context.ids, context)
    groups = [group[::-1][::2] for group in latent.quantiles[::-1]]
    for depth in range(max(map(len, groups), default=0)):
        for group in groups:
            if depth < len(group) and len(seen) < n:
                seen.setdefault(group[depth].ids, group[depth])
    return sorted(seen.values(), key=lambda context: -abs(context.value))


def contexts_in_rows(latent: Latent, rows: Sequence[int]) -> list[Context]:
    """All contexts of a latent that are in these rows of text."""
    among = set(rows)
    return [c for c in (*latent.top, *(c for group in latent.quantiles for c in group)) if c.row in among]


# -- windows that score ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoringWindows:
    """Windows of text that score explanations of one latent; the judge that explained it has seen none of them."""

    active: tuple[Context, ...]
    """Windows in which it is active, weakest first."""
    inactive: tuple[Context, ...]
    """Windows in which its activation was computed to be 0 everywhere, drawn at random."""
    hard: tuple[Context, ...]
    """Such windows in which its nearest neighbors by decoder, or its most coactive latents, are active."""
    special: frozenset[int] = frozenset()
    """Ids of special tokens, on which no latent is active."""


def draw_active(contexts: Sequence[Context], n: int, rng: random.Random) -> tuple[Context, ...]:
    """Draw windows stratified by activation: one of each of `n` groups of equal size, weakest first."""
    ordered = sorted(contexts, key=lambda c: (abs(c.value), c.row, c.position))
    cuts = [round(j * len(ordered) / n) for j in range(n + 1)]
    return tuple(ordered[rng.randrange(a, b)] for a, b in pairwise(cuts) if b > a)


def draw(items: Sequence[Any], n: int, rng: random.Random) -> list[Any]:
    """Draw at most `n` of these."""
    return rng.sample(list(items), min(n, len(items)))


def neighbors_of(index: FeatureIndex, latent: int) -> list[int]:
    """Latents that are nearest by decoder or most coactive, each once."""
    tensors = index.tensors
    names = [name for name in ("nearest.decoder", "coactive.latent") if name in tensors]
    near = [i for name in names for i in tensors[name][latent].tolist() if i >= 0 and i != latent]
    return list(dict.fromkeys(near))


class IndexWindows:
    """Windows of an index that knows every activation: all of its tokens were sampled, with all active latents.

    Active windows are sampled contexts of the latent, inactive ones contexts of other latents.

    Raises:
        ValueError: for an index that knows some activations only.
    """

    def __init__(self, index: FeatureIndex, seed: int) -> None:
        token, active = index.tensors["active.token_position"], index.tensors["active.token_active"]
        if index.info.config.drops_active or len(token) < index.n_tokens:
            what = f"{index!r} knows the activations of a sample of its tokens only, so no window is surely inactive."
            fix = "saewb.score(index, explanations, judge, model=model, sae=sae, texts=held_out_texts)"
            raise ValueError(explain(what, want="held-out text, on which they are computed", fix=fix))
        self._index, self._seed = index, seed
        where, rank = (active >= 0).nonzero(as_tuple=True)
        latent, at = active[where, rank].long(), token[where]
        order = latent.argsort(stable=True)
        self._at = at[order]  # numbers of active tokens, by latent
        counts = torch.bincount(latent, minlength=len(index))
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _active_tokens(self, latent: int) -> Tensor:
        return self._at[self._starts[latent] : self._starts[latent + 1]].sort().values

    def _is_inactive(self, latent: int, positions: Tensor) -> Tensor:
        """Mask of the windows around these tokens that have no active token of the latent."""
        info, at = self._index.info, self._active_tokens(latent)
        column = positions % info.ctx_len
        begin = positions - torch.minimum(column, torch.tensor(info.before))
        end = positions + torch.minimum(info.ctx_len - 1 - column, torch.tensor(info.after))
        return torch.searchsorted(at, begin) == torch.searchsorted(at, end, right=True)

    def windows(self, latent: int, seen: Sequence[int], n_active: int, n_inactive: int) -> ScoringWindows:
        """Draw windows of a latent that are not in the rows `seen`."""
        index, rng = self._index, rng_of(self._seed, "index", latent)
        page, rows = index.latent(latent), set(seen)
        sampled = {c.ids: c for group in page.quantiles for c in group if c.row not in rows}
        others = rng.sample(range(len(index)), min(len(index), 8 * n_inactive))
        inactive = self._quiet(latent, others, rows, n_inactive, rng)
        hard = self._quiet(latent, neighbors_of(index, latent), rows, n_inactive, rng)
        active = draw_active(list(sampled.values()), n_active, rng)
        return ScoringWindows(active, inactive, hard, frozenset(index.info.special))

    def _quiet(
        self, latent: int, others: Sequence[int], seen: set[int], n: int, rng: random.Random
    ) -> tuple[Context, ...]:
        """At most `n` contexts of other latents in which this one is inactive, with its activations: all 0."""
        others = [i for i in others if i != latent]
        if not others:
            return ()
        tensors, info = self._index.tensors, self._index.info
        which, slots = torch.tensor(others), {}
        for name in ("sample", "top"):
            position, order = tensors[f"{name}.position"][which], tensors[f"{name}.order"][which]
            quiet = (order != EMPTY) & self._is_inactive(latent, position)
            for i, slot in quiet.nonzero().tolist():
                number = int(position[i, slot])
                if number // info.ctx_len not in seen:
                    slots.setdefault(number, (name, others[i], slot))
        drawn = draw(sorted(slots), n, rng)
        return tuple(self._context(number, *slots[number]) for number in drawn)

    def _context(self, number: int, name: str, latent: int, slot: int) -> Context:
        info = self._index.info
        row = self._index.tensors[f"{name}.tokens"][latent, slot].tolist()
        ids = tuple(i for i in row if i >= 0)
        at = info.before - next(j for j, i in enumerate(row) if i >= 0)
        tokens = tuple(self._index.token_texts.decode(ids))
        return Context(tokens, ids, (0.0,) * len(ids), at, number // info.ctx_len, number % info.ctx_len)


class TextWindows:
    """Windows of held-out text, in one pass of the model for all latents.

    The text is cut into windows of `window` tokens. Memory: 8 bytes for each token of the text, and 20 for each active
    token of the latents that are scored and their neighbors.
    """

    def __init__(
        self,
        index: FeatureIndex,
        latents: Sequence[int],
        model: nn.Module,
        sae: Any,
        ids: Int[Tensor, "rows ctx"],
        *,
        window: int,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> None:
        if sae.cfg.d_sae != len(index):
            what = f"{index!r} is of {len(index)} latents, {sae!r} has {sae.cfg.d_sae}."
            raise ValueError(explain(what, want=index.info.sae))
        self._index, self._seed, self._window = index, seed, window
        info = index.info
        self._ids = ids
        if self._ids.shape[1] < window:
            raise ValueError(explain(f"rows of {self._ids.shape[1]} tokens.", want=f"{window} or more, as window="))
        self._mask = ~special_mask(self._ids, info.special)
        wanted = torch.zeros(len(index), dtype=torch.bool)
        wanted[list(latents)] = True
        wanted[[i for latent in latents for i in neighbors_of(index, latent)]] = True
        self._token, latent, self._act = self._read(model, sae, wanted, batch_size, progress)
        counts = torch.bincount(latent, minlength=len(index))
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        per_row = self._ids.shape[1] // window  # what is left at the end of a row is not used
        starts = torch.arange(len(self._ids))[:, None] * self._ids.shape[1] + torch.arange(per_row) * window
        usable = self._mask[:, : per_row * window].reshape(-1, window).float().mean(1) > 0.5
        self._windows = starts.flatten()[usable]
        self._texts: TokenTexts = collect_token_texts(getattr(model, "tokenizer", None), [self._ids], [])

    @torch.no_grad()
    def _read(
        self, model: nn.Module, sae: Any, wanted: Tensor, batch_size: int, progress: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token, latent and activation of what is active, by latent, then token."""
        from tqdm.auto import tqdm

        site = Site.of(model, sae, self._index.info.hook, self._index.info.hook_out, writable=False)
        encoder, hook, device = SparseEncoder(sae), self._index.info.hook, next(model.parameters()).device
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with (
            eval_mode(model),
            tqdm(total=len(self._ids), desc="windows", unit="row", leave=False, disable=not progress) as bar,
        ):
            for begin in range(0, len(self._ids), batch_size):
                ids, mask = (t[begin : begin + batch_size].to(device) for t in (self._ids, self._mask))
                x = site.read_input(capture(model, ids, [hook])[hook])
                chosen = wanted.to(x.device)
                for part, latents in encoder.tiles(x, mask.to(x.device)):
                    first = (begin + (part.start or 0)) * ids.shape[1]
                    which = chosen[latents.latent]
                    triple = (latents.token[which] + first, latents.latent[which], latents.act[which].float())
                    parts.append(tuple(t.cpu() for t in triple))  # type: ignore[arg-type]
                bar.update(len(ids))
        token, latent, act = (torch.cat(column) for column in zip(*parts, strict=True))
        order = latent.argsort(stable=True)
        return token[order], latent[order], act[order]

    def _part(self, latent: int) -> slice:
        return slice(int(self._starts[latent]), int(self._starts[latent + 1]))

    def _window_numbers(self, latent: int) -> Tensor:
        """Numbers of the windows in which a latent is active, ascending, each once."""
        token = self._token[self._part(latent)]
        number = torch.searchsorted(self._windows, token, right=True) - 1
        inside = (number >= 0) & (token < self._windows[number.clamp_min(0)] + self._window)
        return number[inside].unique()

    def windows(self, latent: int, seen: Sequence[int], n_active: int, n_inactive: int) -> ScoringWindows:
        """Draw windows of a latent, without text that is in the rows `seen` of the index."""
        rng = rng_of(self._seed, "text", latent)
        active = self._window_numbers(latent)
        is_active = torch.zeros(len(self._windows), dtype=torch.bool)
        is_active[active] = True
        hard = torch.zeros_like(is_active)
        for i in neighbors_of(self._index, latent):
            hard[self._window_numbers(i)] = True
        cores = {_core(context) for context in contexts_in_rows(self._index.latent(latent), seen)}
        pool = [self._context(n, latent) for n in draw(active.tolist(), 10 * n_active, rng)]
        pool = [c for c in {c.ids: c for c in pool}.values() if not self._has_any(c.row, cores)]
        quiet = draw((~is_active).nonzero()[:, 0].tolist(), n_inactive, rng)
        near = draw((hard & ~is_active).nonzero()[:, 0].tolist(), n_inactive, rng)
        return ScoringWindows(
            draw_active(pool, n_active, rng),
            tuple(self._context(n, latent) for n in quiet),
            tuple(self._context(n, latent) for n in near),
            frozenset(self._index.info.special),
        )

    def _context(self, number: int, latent: int) -> Context:
        ctx, begin = self._ids.shape[1], int(self._windows[number])
        ids = tuple(self._ids.flatten()[begin : begin + self._window].tolist())
        part = self._part(latent)
        token = self._token[part]
        a, b = torch.searchsorted(token, torch.tensor([begin, begin + self._window])).tolist()
        acts = np.zeros(self._window, dtype=np.float64)
        acts[(token[a:b] - begin).numpy()] = self._act[part][a:b].numpy()
        at = int(np.abs(acts).argmax())
        tokens = tuple(self._texts.decode(ids))
        return Context(tokens, ids, tuple(acts.tolist()), at, begin // ctx, begin % ctx + at)

    def _has_any(self, row: int, cores: set[tuple[int, ...]]) -> bool:
        """Whether a row of the text has any of these runs of tokens."""
        text = self._ids[row].to(torch.int64).numpy()
        return any(_contains(text, np.array(core)) for core in cores)


def _core(context: Context) -> tuple[int, ...]:
    """The tokens around the peak of a context, by which it is recognized."""
    return context.ids[max(0, context.at - _N_CORE) : context.at + _N_CORE + 1]


def _contains(text: np.ndarray, run: np.ndarray) -> bool:
    if len(run) == 0 or len(run) > len(text):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(text, len(run)) == run).all(1).any())
