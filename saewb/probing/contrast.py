"""Which latents tell two sets of texts apart, how well on other texts, and what does so without an SAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saewb._display import html_table, text_table
from saewb._indices import index_of
from saewb.errors import explain
from saewb.features.enrichment import q_values
from saewb.interventions.site import Site
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import token_strings
from saewb.probing.directions import mean_difference
from saewb.probing.logistic import fit_logistic
from saewb.probing.pooling import Pool, Pooled, Positions, TokenizedTexts, check_pool, pool_latents
from saewb.probing.rank_statistics import ColumnRanks, EffectSizes, auc_of, delong_interval
from saewb.sae.sae import SAE

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Side = Literal["a", "b"]

_LEAST_TO_SPLIT = 40
_MARKS = 5000
_SHOWN = 10


@overload
def contrast(model: nn.Module, saes: nn.Module, a: Any, b: Any, **how: object) -> Contrast: ...
@overload
def contrast(model: nn.Module, saes: Sequence[nn.Module], a: Any, b: Any, **how: object) -> list[Contrast]: ...
def contrast(
    model: nn.Module,
    saes: nn.Module | Sequence[nn.Module],
    a: Any,
    b: Any,
    *,
    pool: Pool = "max",
    positions: Positions = None,
    held_out: float = 0.5,
    n_permutations: int = 1000,
    min_texts: int = 3,
    seed: int = 0,
    hook: str | None = None,
    ctx_len: int | None = None,
    progress: bool = True,
) -> Contrast | list[Contrast]:
    """Find the latents that tell texts of set a from texts of set b.

    Latents are pooled over the tokens of a text, z, special tokens left out; half of the texts choose, the others test:

        auc             P(z_a > z_b) + P(z_a = z_b) / 2 on the half that chooses; 1: all texts of a above all of b
        p, q            Mann-Whitney with correction for ties; Benjamini-Hochberg over latents on >= min_texts texts
        p_family        share of permutations of the labels in which the best of all latents does as well: the chance of
                        one such latent anywhere if the sets did not differ
        auc_held_out    on the other half; ci_low, ci_high: 95 % by DeLong

    Beside the latents it measures what does without them: the number of tokens, the one token whose presence separates
    best, the difference of means of the residual stream, and logistic regression on it. A latent that does not beat the
    token detects that token. Exact duplicates within a set count once. With fewer than 40 texts all of them choose, and
    nothing is held out.

    One pass over the model, at most 4,096 tokens at a time; pooled latents take 8 bytes each where they are not 0:
    52 MB for 10,000 texts and 65,536 latents of which 1 % are active.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: an SAE of any architecture (also `saewb.neurons`), or several.
        a: texts, chats (lists of messages) or token ids.
        b: others; none of a.
        pool: "max" (AxBench), "mean" (SAEBench), "last" (sae-probes), "any" (fires at all), or "sum". "max" and "sum"
            grow with the length of a text: compare `length_auc`.
        positions: tokens that count: a slice of a text's positions, BOS included; a chat's role such as "assistant"; a
            function of token ids `[pos]` that returns a mask; None for all.
        held_out: fraction of texts of each set that are held out; 0 uses all of them to choose.
        n_permutations: of the labels.
        min_texts: latents that are not 0 on fewer texts are not tested.
        seed: of the split and the permutations.
        hook: hook point the SAE reads, instead of `sae.cfg.hook`.
        ctx_len: tokens of a text at most; longer ones are cut. None cuts none.
        progress: whether to show a progress bar.

    Returns:
        A Contrast; a list of them for a list of SAEs.

    Raises:
        TypeError: if a or b is one string.
        ValueError: for fewer than two different texts in a set, one that is in both, longer than the model's context,
            or without a token that counts; for a number out of its range.
        FloatingPointError: if activations are not finite.

    References:
        Mann & Whitney 1947; Westfall & Young 1993 (max-T); DeLong et al. 1988; Wu et al. 2025, arXiv:2501.17148
        (AxBench: max pooling, difference of means); Kantamneni et al. 2025, arXiv:2502.16681 (baselines).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> documents = saewb.tiny.held_out_texts()
        >>> a = [d.text for d in documents if d.topic.startswith("Biology")][:25]
        >>> b = [d.text for d in documents if not d.topic.startswith("Biology")][:25]
        >>> result = contrast(model, sae, a, b, n_permutations=200, progress=False)
        >>> result.to_frame().columns[:6].tolist()
        ['latent', 'auc', 'p', 'q', 'p_family', 'auc_held_out']
    """
    _check_numbers(held_out, n_permutations, min_texts)
    check_pool(pool)
    several = isinstance(saes, (list, tuple))
    sites = [Site.of(model, sae, hook, writable=False) for sae in (saes if several else [saes])]
    texts, is_a, source, n_duplicates = _two_sets(model, a, b, positions, ctx_len)
    choosing = _split(is_a, held_out, seed)
    pooled = pool_latents(model, sites, texts, pool, progress=progress)
    of_texts = _text_baselines(model, texts, is_a, choosing)
    results = []
    for site, one in zip(sites, pooled, strict=True):
        table = latent_statistics(one.latents, is_a, choosing, n_permutations, min_texts, seed)
        baselines = replace(of_texts, **_residual_baselines(one, is_a, choosing))
        sets = (is_a, choosing, source, texts, one)
        results.append(Contrast(table, baselines, *sets, site.hook_name, site.sae, pool, n_duplicates))
    return results if several else results[0]


def latent_statistics(
    matrix: Any,
    is_a: Bool[np.ndarray, " texts"],
    choosing: Bool[np.ndarray, " texts"] | None = None,
    n_permutations: int = 1000,
    min_texts: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """The statistics of `contrast` for pooled values of any origin.

    Args:
        matrix: sparse, `[texts, columns]`; what is not stored is 0.
        is_a: texts of set a; the others are set b.
        choosing: texts that choose; the others are held out. None: all.
        n_permutations: of the labels.
        min_texts: columns that are not 0 on fewer texts are not tested.
        seed: of the permutations.

    Returns:
        A row per column of the matrix, in its order.

    Example:
        >>> import scipy.sparse
        >>> z = scipy.sparse.csr_array(np.array([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        >>> latent_statistics(z, np.array([True, True, False, False]), n_permutations=9).auc.tolist()
        [1.0, 0.25]
    """
    import pandas as pd

    matrix = matrix.tocsr()
    choosing = np.ones(len(is_a), bool) if choosing is None else choosing
    chosen, labels = matrix[choosing], is_a[choosing]
    ranks, sizes = ColumnRanks.of(chosen), EffectSizes.of(chosen, labels)
    family = (sizes.n_texts >= min_texts).nonzero()[0]
    p, q, p_family = ranks.p_values(labels), np.full(matrix.shape[1], np.nan), np.full(matrix.shape[1], np.nan)
    q[family] = q_values(torch.from_numpy(p[family])).numpy()
    p_family[family] = ranks.family_p(labels, family, n_permutations, seed)
    held_out = np.full(matrix.shape[1], np.nan)
    low, high = held_out.copy(), held_out.copy()
    if not choosing.all():
        rest, rest_labels = matrix[~choosing], is_a[~choosing]
        held_out = ColumnRanks.of(rest).auc(rest_labels)
        if min(rest_labels.sum(), (~rest_labels).sum()) > 1:
            low, high = delong_interval(rest, rest_labels)
    return pd.DataFrame(
        {
            "latent": np.arange(matrix.shape[1]),
            "auc": ranks.auc(labels),
            "p": p,
            "q": q,
            "p_family": p_family,
            "auc_held_out": held_out,
            "ci_low": low,
            "ci_high": high,
            "freq_a": sizes.freq_a,
            "freq_b": sizes.freq_b,
            "mean_a": sizes.mean_a,
            "mean_b": sizes.mean_b,
            "difference": sizes.mean_a - sizes.mean_b,
            "log_odds": sizes.log_odds,
            "d": sizes.d,
            "separation": sizes.separation,
            "n_texts": sizes.n_texts,
        }
    )


@dataclass(frozen=True)
class TextActivations:
    """One latent on one of the given texts."""

    side: Side
    """Set of the text."""
    index: int
    """Its index in the set, as given."""
    value: float
    """The latent, pooled."""
    tokens: list[str]
    """Text of each token."""
    activations: list[float]
    """Activation of the latent at each token; 0 at tokens that do not count."""

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Baselines:
    """What tells the sets apart without latents; AUCs are of the held-out texts, if there are any."""

    length_auc: float
    """Of the number of tokens that count."""
    best_token_id: int
    """Token whose presence separates best on the texts that choose."""
    best_token: str
    """Its text."""
    token_auc: float
    """Of its presence, on the texts that choose."""
    token_auc_held_out: float
    """The same on the held-out texts; nan without any."""
    direction_auc: float = float("nan")
    """Of the residual stream along the difference of means of the texts that choose; nan without held-out ones."""
    residual_auc: float = float("nan")
    """Of logistic regression on the residual stream, fitted on the texts that choose; nan without held-out ones."""


@dataclass(frozen=True, eq=False, repr=False)
class Contrast:
    """Result of `contrast`: prints as a table, `to_frame()` has a row per latent, `plot()` draws a volcano."""

    table: pd.DataFrame
    """Statistics, a row per latent, in the order of the latents."""
    baselines: Baselines
    """What does without latents."""
    is_a: Bool[np.ndarray, " texts"]
    """Set of each different text."""
    choosing: Bool[np.ndarray, " texts"]
    """Texts that choose; the others are held out."""
    source: list[tuple[Side, int]]
    """Set and index in it of each different text."""
    texts: TokenizedTexts = field(repr=False)
    """The different texts, those of a first."""
    pooled: Pooled = field(repr=False)
    """Latents and residual of each text."""
    hook: str
    """Where the SAE reads."""
    sae: nn.Module = field(repr=False)
    """The SAE."""
    pool: Pool = "max"
    """How latents are pooled over the tokens of a text."""
    n_duplicates: int = 0
    """Texts that are copies of another one of their set, and do not count."""

    @property
    def has_held_out(self) -> bool:
        """Whether some texts are held out."""
        return not bool(self.choosing.all())

    def to_frame(self, side: Side | None = None) -> pd.DataFrame:
        """A row per latent, those that separate best first, by |auc - 0.5|; columns as in `contrast`.

        Beside these: freq_a, freq_b (share of texts with z > 0), mean_a, mean_b, difference, log_odds (of firing, with
        0.5 added to each count), d (Cohen), separation (share of a among the texts of largest z less that among texts
        of z = 0), n_texts (where z is not 0), all of them on the texts that choose; and best_token and token_auc, the
        same in each row.

        Args:
            side: only latents larger in set "a", or in set "b"; None: all.

        Raises:
            ValueError: for another side.
        """
        table = self.table.assign(best_token=self.baselines.best_token, token_auc=self.baselines.token_auc)
        if side not in (None, "a", "b"):
            raise ValueError(explain(f"to_frame got side={side!r}.", want="'a', 'b' or None"))
        if side is not None:
            table = table[table.auc > 0.5] if side == "a" else table[table.auc < 0.5]
        order = (0.5 - (table.auc - 0.5).abs()).round(12).argsort(kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def index_filter(self, side: Side | None = None, *, q: float = 0.05, n: int | None = None) -> list[int]:
        """Latents that tell the sets apart, best first: `FeatureBrowser(index, pins=..., show_only="pinned")`.

        Args:
            side: as for `to_frame`.
            q: largest false discovery rate.
            n: at most so many.
        """
        table = self.to_frame(side)
        return table[table.q <= q].latent.tolist()[:n]

    def direction(self) -> SAE:
        """The difference of the residual means of a and b, from the texts that choose, as a one-latent SAE.

        Steering with value 1 moves by the difference (`saewb.steer(model, direction, {0: 1.0})`).

        Raises:
            ValueError: if the means are equal.
        """
        residual, is_a = self.pooled.residual, torch.from_numpy(self.is_a)
        choosing = torch.from_numpy(self.choosing)
        means = [residual[choosing & side].mean(0) for side in (is_a, ~is_a)]
        sae = mean_difference(*means, self.hook, name="a - b", gate="linear", model=self.sae.cfg.model)
        head = getattr(self.sae.cfg, "head", None)
        return sae if head is None else sae.with_config(head=head)

    @torch.no_grad()
    def maxima(self, model: nn.Module, latent: int, n: int = 6, side: Side | None = None) -> list[TextActivations]:
        """The given texts on which a latent is largest, token by token; runs the model on these.

        Args:
            model: the model.
            latent: which one.
            n: texts.
            side: of one set only.

        Raises:
            ValueError: for a latent that the SAE does not have.
        """
        latent = index_of(latent, "latent", self.sae.cfg.d_sae, of=self.sae)
        values = self.pooled.latents[:, [latent]].toarray()[:, 0]
        allowed = np.ones(len(values), bool) if side is None else self.is_a == (side == "a")
        order = np.argsort(-values, kind="stable")
        order = order[allowed[order] & (values[order] != 0)][:n]
        site, device = Site.of(model, self.sae, self.hook, writable=False), next(model.parameters()).device
        result = []
        with eval_mode(model):
            for i in order.tolist():
                ids, mask = self.texts.ids[i], self.texts.masks[i]
                x = site.read_input(capture(model, ids[None].to(device), [self.hook])[self.hook])
                acts = self.sae.encode(x, latents=[latent])[0, :, 0].float().cpu() * mask
                strings = token_strings(model, ids)
                result.append(TextActivations(*self.source[i], float(values[i]), strings, acts.tolist()))
        return result

    def plot(self, q: float = 0.05) -> go.Figure:
        """Volcano: log odds of firing against -log10 q, a mark per tested latent (the 5,000 of smallest q).

        Args:
            q: false discovery rate of the dashed line.
        """
        from saewb.probing.volcano import volcano

        return volcano(self.to_frame(), repr(self), q, _MARKS)

    def _summary(self) -> list[tuple[str, str, str, str]]:
        n_a, n_b = int((self.is_a & self.choosing).sum()), int((~self.is_a & self.choosing).sum())
        rest = int((~self.choosing).sum())
        text = f"{rest} texts" if self.has_held_out else "none: AUCs are of the texts that chose, too good"
        best = self.baselines
        token_auc = best.token_auc_held_out if self.has_held_out else best.token_auc
        rows = [
            ("texts", f"{n_a} + {n_b}", "", "of a and b, that choose"),
            ("held out", text, "", ""),
            ("length_auc", f"{best.length_auc:.3f}", "", "number of tokens alone"),
            ("token_auc", f"{token_auc:.3f}", "", f"presence of {best.best_token!r}"),
            ("direction_auc", f"{best.direction_auc:.3f}", "", "difference of residual means"),
            ("residual_auc", f"{best.residual_auc:.3f}", "", "logistic regression on the residual"),
        ]
        return rows + [("duplicates", str(self.n_duplicates), "", "not counted")] * bool(self.n_duplicates)

    def _title(self) -> str:
        return f"Contrast by {self.sae!r}, {self.pool} over tokens"

    def __repr__(self) -> str:
        n = int((self.table.q <= 0.05).sum())
        return (
            f"Contrast({int(self.is_a.sum())} + {int((~self.is_a).sum())} texts, {n} latents of q <= 0.05, {self.hook})"
        )

    def __str__(self) -> str:
        columns = ["latent", "auc", "q", "p_family", "auc_held_out", "freq_a", "freq_b", "d"]
        best = self.to_frame()[columns].head(_SHOWN).to_string(index=False, float_format="{:.3g}".format)
        return f"{text_table(self._title(), self._summary())}\n\n{best}"

    def _repr_html_(self) -> str:
        best = self.to_frame().head(_SHOWN)[["latent", "auc", "q", "p_family", "auc_held_out", "freq_a", "freq_b", "d"]]
        rows = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in best.itertuples(index=False)]
        table = html_table("best latents", rows, head=list(best.columns), sides=["right"] * len(best.columns))
        return html_table(self._title(), self._summary()) + table


# -- sets and split ----------------------------------------------------------------------------------------------------


def _check_numbers(held_out: float, n_permutations: int, min_texts: int) -> None:
    if not 0 <= held_out <= 0.9:
        raise ValueError(explain(f"contrast got held_out={held_out}.", want="a fraction of the texts, 0 to 0.9"))
    if n_permutations < 1 or min_texts < 1:
        what = f"contrast got n_permutations={n_permutations}, min_texts={min_texts}."
        raise ValueError(explain(what, want="at least 1"))


def _two_sets(
    model: nn.Module, a: Any, b: Any, positions: Positions, ctx_len: int | None
) -> tuple[TokenizedTexts, np.ndarray, list[tuple[Side, int]], int]:
    """Different texts of both sets, which are of a, where each comes from, and the number of copies left out."""
    ids, masks, source, seen, n_given = [], [], [], {}, 0
    for side, texts in (("a", a), ("b", b)):
        tokenized = TokenizedTexts.of(model, texts, name=side, positions=positions, ctx_len=ctx_len)
        n_given += len(tokenized)
        for i, first in enumerate(tokenized.first_of_equals()):
            if first != i:
                continue
            key = (tokenized.ids[i].numpy().tobytes(), tokenized.masks[i].numpy().tobytes())
            if (other := seen.setdefault(key, (side, i))) != (side, i):
                what = f"{side}[{i}] is the same text as {other[0]}[{other[1]}]."
                raise ValueError(
                    explain(what, want="no text in both sets", fix="b = [t for t in b if t not in set(a)]")
                )
            ids.append(tokenized.ids[i])
            masks.append(tokenized.masks[i])
            source.append((side, i))
        if sum(s == side for s, _ in source) < 2:
            raise ValueError(explain(f"{side} has one text.", want="at least two different ones"))
    is_a = np.array([side == "a" for side, _ in source])
    return TokenizedTexts(ids, masks), is_a, source, n_given - len(ids)


def _split(is_a: Bool[np.ndarray, " texts"], held_out: float, seed: int) -> Bool[np.ndarray, " texts"]:
    """Texts that choose: all, or the same fraction of each set, at random."""
    choosing = np.ones(len(is_a), bool)
    if held_out and len(is_a) >= _LEAST_TO_SPLIT:
        rng = np.random.default_rng(seed)
        for side in (is_a, ~is_a):
            members = side.nonzero()[0]
            n_rest = min(max(2, round(held_out * len(members))), len(members) - 2)
            choosing[rng.permutation(members)[: max(0, n_rest)]] = False
    rest = ~choosing
    return choosing if rest[is_a].any() and rest[~is_a].any() else np.ones(len(is_a), bool)


# -- baselines ---------------------------------------------------------------------------------------------------------


def _text_baselines(model: nn.Module, texts: TokenizedTexts, is_a: np.ndarray, choosing: np.ndarray) -> Baselines:
    """Number of tokens, and the best single token."""
    rest = choosing if choosing.all() else ~choosing
    presence = texts.presence(model.cfg.d_vocab)
    share = [np.asarray(presence[choosing & side].mean(0)).ravel() for side in (is_a, ~is_a)]
    auc = 0.5 + (share[0] - share[1]) / 2  # of a classifier that is 0 or 1
    best = int(np.abs(auc - 0.5).argmax())
    held_out = auc_of(presence[rest][:, [best]].toarray()[:, 0], is_a[rest]) if not choosing.all() else float("nan")
    length_auc = auc_of(texts.n_tokens()[rest], is_a[rest])
    return Baselines(length_auc, best, token_strings(model, [best])[0], float(auc[best]), held_out)


def _residual_baselines(pooled: Pooled, is_a: np.ndarray, choosing: np.ndarray) -> dict[str, float]:
    """Difference of means and logistic regression, fitted where the latents are chosen."""
    if choosing.all():
        return {}
    x, labels = pooled.residual.double(), torch.from_numpy(is_a)
    fit = torch.from_numpy(choosing)
    direction = x[fit & labels].mean(0) - x[fit & ~labels].mean(0)
    scaled = standardized(x, fit)
    probe = fit_logistic(scaled[fit], labels[fit])
    scores = {"direction_auc": x @ direction, "residual_auc": probe.scores(scaled)}
    return {name: auc_of(score[~fit].numpy(), is_a[~choosing]) for name, score in scores.items()}


def standardized(x: Float[Tensor, "texts d"], fit: Bool[Tensor, " texts"]) -> Float[Tensor, "texts d"]:
    """Columns less the mean, over the standard deviation, of the texts to fit.

    Example:
        >>> standardized(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([True, True, False])).tolist()
        [[-1.0], [1.0], [3.0]]
    """
    mean, spread = x[fit].mean(0), x[fit].std(0, correction=0)
    return (x - mean) / torch.where(spread > 0, spread, 1.0)
