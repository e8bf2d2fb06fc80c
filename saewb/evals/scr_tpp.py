"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR): does ablating few latents remove a concept?

1. Texts, cut to 128 tokens; the activation and the latents, averaged over the tokens of each.
2. Linear probes of the averaged activation.
3. The effect of a latent on a probe: how much more active it is on the class, times W_dec . probe.
4. Ablate the n latents of largest effect, the error kept: x' = x - sum a_i W_dec[i]; what the probes still tell.

Averages are linear: nothing is encoded or decoded anew for an ablation.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._indices import indices_of
from saewb.errors import explain, near
from saewb.evals.result import named_saes
from saewb.interventions.site import Site
from saewb.probing.logistic import LogisticFit, balancing_weights, fit_logistic
from saewb.probing.pooling import Pooled, TokenizedTexts, active_per_token, pool_latents
from saewb.probing.probes import adam_probe, balanced_texts, check_split, classes_of, split_texts
from saewb.sae.base import SparseCoder
from saewb.sae.random_sae import random_sae
from saewb.stats.intervals import normal_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Like = Literal["saebench"]

NS = (2, 5, 10, 20, 50, 100, 500)
CTX_LEN = 128
MIN_GAP = 0.001
"""Difference of accuracy below which there is no spurious correlation to remove: the score is 0."""
_SAEBENCH = {"lr": 1e-3, "epochs": 20, "batch": 16, "patience": 20, "l1": 1e-3}


def scr_tpp(
    model: nn.Module,
    saes: Union[SparseCoder, Sequence[SparseCoder], Mapping[str, SparseCoder]],
    texts: Any,
    labels: Sequence[Hashable],
    *,
    spurious: Sequence[Hashable] | None = None,
    ns: Sequence[int] = NS,
    like: Like | None = None,
    groups: Sequence[Hashable] | None = None,
    train: Any = None,
    control: bool = True,
    hook: str | None = None,
    ctx_len: int = CTX_LEN,
    seed: int = 42,
    progress: bool = True,
) -> ScrTpp:
    """Ablate the n latents that a probe of the residual stream rests on, and see which probes still work.

    TPP, for three classes or more: a probe for each class against all others. With the latents of a class ablated,

        tpp(class) = drop of accuracy of its probe - mean drop of the other classes' probes,     mean over classes

    SCR, where `spurious` has a second label of two values: a biased probe, trained only on texts where both labels
    agree, is freed of the spurious one by ablating the latents of an unbiased probe of it:

        scr = (accuracy ablated - accuracy biased) / (accuracy of an unbiased probe - accuracy biased)

    on texts of all four kinds; in both directions, as either label may be the spurious one, and the score is that of
    the direction in which the biased probe is worse. 0 where nothing is to remove (a gap below 0.001).

    By default this differs from SAEBench, which `like="saebench"` follows, in: probes are logistic regressions to the
    optimum, with weights that make classes count alike; all texts are used, and accuracy is the mean over the classes,
    or the four kinds of text; nothing is drawn but the split; only latents with effects above 0 are ablated; padding
    has no part (SAEBench subtracts what the SAE makes of zeros there). SAEBench draws as many negatives as positives
    anew for every probe and score; the draws here are its own, for the first SAE after `torch.manual_seed(seed)`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: one SAE, several, or several by name; each writes where it reads, and does not normalize its input by
            tokens (their averages would not be linear).
        texts: texts, chats or token ids.
        labels: class of each text.
        spurious: another label of each text; then both are of two values, the larger (`sorted`) one positive.
        ns: numbers of latents to ablate.
        like: settings of SAEBench; classes of one size, as it has.
        groups: texts of one group are on one side of the split.
        train: training texts: a fraction, a number, indices or a mask; None is 0.8.
        control: add a random SAE of the width, L0 and hook of each SAE.
        hook: hook point that the SAEs read, instead of `sae.cfg.hook`.
        ctx_len: tokens of a text at most.
        seed: of the split, the draws and the random SAEs.
        progress: show a progress bar.

    Returns:
        A ScrTpp: `summary()` has a row per SAE and n.

    Raises:
        ValueError: for two classes without `spurious`, kinds of texts that do not occur, a transcoder, or an SAE that
            normalizes by tokens.

    References:
        Karvonen et al. 2025, arXiv:2503.09532 (SAEBench 0.6.0); Marks et al. 2024, arXiv:2403.19647 (SHIFT).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> documents = [d for d in saewb.tiny.texts() if d.topic in ("Geography", "Mathematics", "Arts")][:90]
        >>> topics = [d.topic for d in documents]
        >>> result = scr_tpp(model, {"tiny": sae}, [d.text for d in documents], topics, ns=[2, 20], progress=False)
        >>> result.summary()[["sae", "n"]].values.tolist()
        [['tiny', 2], ['tiny', 20], ['random (tiny)', 2], ['random (tiny)', 20]]
    """
    import pandas as pd

    if like not in (None, "saebench"):
        raise ValueError(explain(f"got like={like!r}.", near=near(str(like), ["saebench"]), want="None or 'saebench'"))
    ns = tuple(indices_of(ns, "ns", repeats=True).tolist())
    if not ns or min(ns) < 1:
        raise ValueError(explain(f"got ns={ns}.", want="numbers of latents, at least 1"))
    named = named_saes(saes, "scr_tpp(model, {'a': sae_a, 'b': sae_b}, texts, labels)")
    sites = [_site(model, sae, hook) for sae in named.values()]
    tokenized = TokenizedTexts.of(model, texts, ctx_len=ctx_len)
    y, classes = classes_of(labels, len(tokenized))
    s = None
    if spurious is not None:
        s, others = classes_of(spurious, len(tokenized))
        if len(classes) != 2 or len(others) != 2:
            what = f"labels have {len(classes)} values, spurious {len(others)}."
            raise ValueError(explain(what, want="two each"))
    elif len(classes) == 2:
        what = "with two classes, the probe of one is that of the other: nothing is targeted."
        raise ValueError(explain(what, want="three classes or more, or a second label", fix="spurious=[...]"))
    kinds = y if s is None else 2 * y + s
    split = split_texts(kinds, tokenized, groups, train, None, seed)
    check_split(kinds, classes if s is None else ["both negative", "spurious", "label", "both positive"], split)
    pooled = pool_latents(model, sites, tokenized, "mean", progress=progress)
    padding = (ctx_len - tokenized.n_tokens()) / tokenized.n_tokens()
    measured = []
    for (name, sae), one in zip(named.items(), pooled, strict=True):
        measured.append((name, sae, one))
    if control:
        measured += _controls(model, measured, sites, tokenized, seed, progress)
    tables = []
    for i, (name, sae, one) in enumerate(measured):
        texts_of = _Texts(one, sae, kinds, *split, padding if like else 0 * padding)
        rng = torch.Generator().manual_seed(seed)
        if s is None:
            table = (_tpp_saebench if like else _tpp)(texts_of, classes, ns, rng, i == 0)
        else:
            table = (_scr_saebench if like else _scr)(texts_of, ns, rng, seed)
        tables.append(table.assign(sae=name))
    table = pd.concat(tables, ignore_index=True)
    return ScrTpp(table[["sae", *(c for c in table if c != "sae")]], "tpp" if s is None else "scr", like)


# -- the formulas ------------------------------------------------------------------------------------------------------


def latent_effects(
    difference: Float[Tensor, " d_sae"],
    weight: Float[Tensor, " d"],
    W_dec: Float[Tensor, "d_sae d"],
    *,
    signed: bool,
) -> Float[Tensor, " d_sae"]:
    """Effect of each latent on a probe, for choosing which to ablate.

        max(difference, 0) * (W_dec . weight)   (signed, TPP)   or   |difference * (W_dec . weight)|   (SCR)

    Args:
        difference: mean activation on positive texts less that on negative ones.
        weight: of the probe.
        W_dec: decoder rows.
        signed: whether latents of the class alone count.
    """
    effect = (difference.clamp_min(0) if signed else difference) * (W_dec @ weight)
    return effect if signed else effect.abs()


def strongest(effects: Float[Tensor, " d_sae"], n: int, *, positive: bool = True) -> Int[Tensor, " n"]:
    """The n latents of largest effect, fewer if no more have one: above 0, or, as SAEBench, other than 0.

    Example:
        >>> strongest(torch.tensor([0.0, 3.0, 1.0, -1.0]), 3).tolist()
        [1, 2]
    """
    count = int((effects > 0).sum() if positive else (effects != 0).sum())
    return effects.topk(min(n, count)).indices


def tpp_scores(
    clean: Mapping[Hashable, float], ablated: Mapping[Hashable, Mapping[int, Mapping[Hashable, float]]]
) -> dict[tuple[Hashable, int], tuple[float, float, float]]:
    """TPP score, intended drop and mean unintended drop by (class, n).

    Args:
        clean: accuracy of each class's probe.
        ablated: by ablated class, n and class of the probe.

    Example:
        >>> clean = {"a": 0.9, "b": 0.8}
        >>> scores = tpp_scores(clean, {"a": {2: {"a": 0.5, "b": 0.8}}, "b": {2: {"a": 0.9, "b": 0.8}}})
        >>> [round(part, 2) for part in scores["a", 2]]
        [0.4, 0.4, 0.0]
    """
    scores = {}
    for name, by_n in ablated.items():
        for n, after in by_n.items():
            intended = clean[name] - after[name]
            drops = [clean[other] - after[other] for other in clean if other != name]
            unintended = sum(drops) / len(drops)
            scores[name, n] = (intended - unintended, intended, unintended)
    return scores


def scr_score(clean: float, biased: float, ablated: float) -> float:
    """Share of the gap between a biased probe and a clean one that ablation closes; 0 without a gap.

    Example:
        >>> round(scr_score(0.9, 0.5, 0.7), 6), scr_score(0.9, 0.9, 0.5)
        (0.5, 0.0)
    """
    return 0.0 if clean - biased < MIN_GAP else (ablated - biased) / (clean - biased)


# -- texts -------------------------------------------------------------------------------------------------------------


def _site(model: nn.Module, sae: SparseCoder, hook: str | None) -> Site:
    site = Site.of(model, sae, hook, writable=False)
    if not site.is_one_point:
        raise ValueError(explain(f"{sae!r} is a transcoder.", want="an SAE that writes where it reads"))
    if sae.cfg.normalization in ("layer_norm", "constant_norm"):
        what = f"{sae!r} normalizes each token, so that averages of its latents do not add up."
        raise ValueError(explain(what, want="normalization 'none' or 'centered'"))
    return site


def _controls(
    model: nn.Module,
    measured: list[tuple[str, SparseCoder, Pooled]],
    sites: list[Site],
    tokenized: TokenizedTexts,
    seed: int,
    progress: bool,
) -> list[tuple[str, SparseCoder, Pooled]]:
    """A random SAE for each, of its mean L0, run on the same texts."""
    few = tokenized.select(range(min(32, len(tokenized))))
    l0s = [active_per_token(model, site, few) for site in sites]
    saes = [
        random_sae(sae, l0, one.residual.mean(0), seed=seed) for (_, sae, one), l0 in zip(measured, l0s, strict=True)
    ]
    again = [Site.of(model, sae, site.hook_name, writable=False) for sae, site in zip(saes, sites, strict=True)]
    pooled = pool_latents(model, again, tokenized, "mean", progress=progress)
    names = [f"random ({name})" for name, _, _ in measured]
    return list(zip(names, saes, pooled, strict=True))


class _Texts:
    """Averaged activation and latents of texts, of one SAE; which are for training."""

    def __init__(
        self, pooled: Pooled, sae: SparseCoder, y: np.ndarray, train: np.ndarray, test: np.ndarray, padding: np.ndarray
    ) -> None:
        self.x, self.latents, self.y, self.train, self.test = pooled.residual.float(), pooled.latents, y, train, test
        self.W_dec = sae.W_dec.detach().float().cpu()
        self.padding = padding
        self.on_zeros = sae.encode(torch.zeros(1, sae.d_in, device=sae.device)).detach().float().cpu()[0]

    def mean_latents(self, index: np.ndarray) -> Float[Tensor, " d_sae"]:
        """Mean over some texts."""
        return torch.from_numpy(np.asarray(self.latents[index].mean(axis=0)).ravel())

    def difference(self, index: np.ndarray, positive: np.ndarray) -> Float[Tensor, " d_sae"]:
        """Mean on positive texts less that on negative ones."""
        return self.mean_latents(index[positive]) - self.mean_latents(index[~positive])

    def scores(
        self, fit: LogisticFit, index: np.ndarray, ablated: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " texts"]:
        """Log odds of texts, with latents ablated."""
        scores = fit.scores(self.x[index])
        if ablated is None or not len(ablated):
            return scores
        acts = torch.from_numpy(self.latents[index][:, ablated.numpy()].toarray()).double()
        acts += torch.from_numpy(self.padding[index])[:, None] * self.on_zeros[ablated].double()
        return scores - acts @ (self.W_dec[ablated].double() @ fit.weight)


def _balanced_accuracy(right: Bool[Tensor, " texts"], weights: Float[Tensor, " texts"]) -> float:
    return float((right * weights).sum())


def _text_weights(groups: np.ndarray) -> Float[Tensor, " texts"]:
    """Weights that add up to 1, and to the same for each group."""
    weights = balancing_weights(torch.from_numpy(groups))
    return weights / weights.sum()


# -- TPP ---------------------------------------------------------------------------------------------------------------


def _tpp(texts: _Texts, classes: Sequence[Hashable], ns: Sequence[int], rng: Any, first: bool) -> pd.DataFrame:
    fits, weights, right, y_test = [], [], [], texts.y[texts.test]
    for c in range(len(classes)):
        y = texts.y[texts.train] == c
        balance = balancing_weights(torch.from_numpy(y))
        fits.append(fit_logistic(texts.x[texts.train], torch.from_numpy(y), weights=balance))
        weights.append(_text_weights(y_test == c))
        right.append((texts.scores(fits[c], texts.test) > 0) == torch.from_numpy(y_test == c))
    clean = {name: _balanced_accuracy(right[c], weights[c]) for c, name in enumerate(classes)}
    ablated: dict[Hashable, dict[int, dict[Hashable, float]]] = {name: {} for name in classes}
    per_text: dict[tuple[Hashable, int], Tensor] = {}
    for c, name in enumerate(classes):
        difference = texts.difference(texts.train, texts.y[texts.train] == c)
        effects = latent_effects(difference, fits[c].weight.float(), texts.W_dec, signed=True)
        for n in ns:
            chosen, drops, accuracy = strongest(effects, n), [], {}
            for o, other in enumerate(classes):
                now = (texts.scores(fits[o], texts.test, chosen) > 0) == torch.from_numpy(y_test == o)
                accuracy[other] = _balanced_accuracy(now, weights[o])
                drops.append((right[o].double() - now.double()) * weights[o])
            ablated[name][n] = accuracy
            others = [drops[o] for o in range(len(classes)) if o != c]
            per_text[name, n] = drops[c] - sum(others) / len(others)
    errors = {key: _error(terms) for key, terms in per_text.items()}
    overall = {n: _error(sum(per_text[name, n] for name in classes) / len(classes)) for n in ns}
    return _tpp_table(clean, ablated, errors, overall, len(texts.test))


def _error(terms: Tensor) -> float:
    """Standard error of a sum of one term per text."""
    return float(terms.std() * len(terms) ** 0.5) if len(terms) > 1 else float("nan")


def _tpp_table(
    clean: dict[Hashable, float],
    ablated: dict[Hashable, dict[int, dict[Hashable, float]]],
    errors: dict[tuple[Hashable, int], float],
    overall: dict[int, float],
    n_test: int,
) -> pd.DataFrame:
    import pandas as pd

    scores, rows = tpp_scores(clean, ablated), []
    for (name, n), (score, intended, unintended) in scores.items():
        rows.append(_row(name, n, score, errors[name, n], n_test, intended=intended, unintended=unintended))
        rows[-1]["clean_accuracy"] = clean[name]
    for n, error in overall.items():
        mean = {name: float(np.mean([row[name] for row in rows if row["n"] == n])) for name in ("score", *_DROPS)}
        rows.append(_row(None, n, mean["score"], error, n_test, intended=mean["intended"]))
        rows[-1] |= {"unintended": mean["unintended"], "clean_accuracy": float(np.mean(list(clean.values())))}
    return pd.DataFrame(rows)


_DROPS = ("intended", "unintended")


def _row(name: Hashable, n: int, score: float, error: float, n_test: int, **more: float) -> dict[str, Any]:
    low, high = normal_interval(score, error)
    interval = {"se": error, "low": low, "high": high}
    return {"class": name, "n": n, "score": score, **interval, "n_test": n_test, **more}


def _tpp_saebench(
    texts: _Texts, classes: Sequence[Hashable], ns: Sequence[int], rng: torch.Generator, first: bool
) -> pd.DataFrame:
    """As SAEBench: every probe and every accuracy on positives and as many negatives, drawn anew."""
    n_classes, sides = len(classes), (_by_class(texts.train, texts.y), _by_class(texts.test, texts.y))

    def draw(side: int, c: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        return balanced_texts(texts.y, sides[side], c, generator)

    start, fits = torch.Generator().manual_seed(int(rng.initial_seed())), []
    for c in range(n_classes):
        fit, y_fit = draw(0, c, start)
        rest, y_rest = draw(1, c, start)
        fits.append(adam_probe(texts.x[fit], y_fit, texts.x[rest], y_rest, start, **_SAEBENCH)[0])

    def accuracies(ablated: Tensor | None, generator: torch.Generator) -> dict[Hashable, tuple[float, int]]:
        result = {}
        for c, name in enumerate(classes):
            index, label = draw(1, c, generator)
            right = (texts.scores(fits[c], index, ablated) > 0) == torch.from_numpy(label)
            result[name] = float(right.double().mean()), len(index)
        return result

    clean = accuracies(None, start)
    rng = start if first else rng  # SAEBench reads the probes of the first SAE from disk for the others
    effects = []
    for c in range(n_classes):
        index, label = draw(0, c, rng)
        effects.append(latent_effects(texts.difference(index, label), fits[c].weight.float(), texts.W_dec, signed=True))
    ablated: dict[Hashable, dict[int, dict[Hashable, float]]] = {name: {} for name in classes}
    errors, overall = {}, dict.fromkeys(ns, 0.0)
    for c, name in enumerate(classes):
        for n in ns:
            after = accuracies(strongest(effects[c], n, positive=False), rng)
            ablated[name][n] = {other: value for other, (value, _) in after.items()}
            variance = sum(
                (_variance(*clean[other]) + _variance(*after[other])) / (1 if other == name else (n_classes - 1) ** 2)
                for other in classes
            )
            errors[name, n] = variance**0.5
            overall[n] += variance / n_classes**2
    n_test = next(iter(clean.values()))[1]
    accuracy = {name: value for name, (value, _) in clean.items()}
    return _tpp_table(accuracy, ablated, errors, {n: v**0.5 for n, v in overall.items()}, n_test)


def _variance(accuracy: float, n: int) -> float:
    return accuracy * (1 - accuracy) / n


def _by_class(index: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Texts of one class after another, as SAEBench keeps them."""
    return index[np.argsort(y[index], kind="stable")]


# -- SCR ---------------------------------------------------------------------------------------------------------------


def _scr(texts: _Texts, ns: Sequence[int], rng: Any, seed: int) -> pd.DataFrame:
    """`y` is 2 label + spurious."""
    train, test, kind = texts.train, texts.test, texts.y
    sides = {"label": kind // 2 == 1, "spurious": kind % 2 == 1}
    agree = train[sides["label"][train] == sides["spurious"][train]]

    def fit(index: np.ndarray, positive: np.ndarray) -> LogisticFit:
        weights = balancing_weights(torch.from_numpy(kind[index]))
        return fit_logistic(texts.x[index], torch.from_numpy(positive[index]), weights=weights)

    fits = {name: fit(train, positive) for name, positive in sides.items()}
    biased, weights = fit(agree, sides["label"]), _text_weights(kind[test])
    rows = []
    for target, other in (("label", "spurious"), ("spurious", "label")):
        truth = torch.from_numpy(sides[target][test])
        right = (texts.scores(biased, test) > 0) == truth
        clean = _balanced_accuracy((texts.scores(fits[target], test) > 0) == truth, weights)
        before = _balanced_accuracy(right, weights)
        # The four kinds count alike, or the latents of the label would be those of what goes with it.
        difference = sum(
            texts.difference(part, sides[other][part]) / 2
            for part in (train[sides[target][train]], train[~sides[target][train]])
        )
        effects = latent_effects(difference, fits[other].weight.float(), texts.W_dec, signed=False)
        for n in ns:
            now = (texts.scores(biased, test, strongest(effects, n)) > 0) == truth
            after, gap = _balanced_accuracy(now, weights), clean - before
            error = _error((now.double() - right.double()) * weights) / gap if gap >= MIN_GAP else float("nan")
            rows.append(_scr_row(target, n, clean, before, after, error, len(test)))
    return _scr_table(rows)


def _scr_row(
    target: str, n: int, clean: float, biased: float, ablated: float, error: float, n_test: int
) -> dict[str, Any]:
    accuracies = {"clean_accuracy": clean, "biased_accuracy": biased, "ablated_accuracy": ablated}
    return _row(target, n, scr_score(clean, biased, ablated), error, n_test, **accuracies)


def _scr_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Both directions, and as class None that in which the biased probe is worse."""
    import pandas as pd

    biased = {row["class"]: row["biased_accuracy"] for row in rows}
    worse = min(biased, key=lambda name: biased[name])  # of equals the label
    return pd.DataFrame([*rows, *({**row, "class": None} for row in rows if row["class"] == worse)])


def _scr_saebench(texts: _Texts, ns: Sequence[int], rng: torch.Generator, seed: int) -> pd.DataFrame:
    """As SAEBench: three pairs of sets of one size, drawn anew for every probe and every accuracy."""
    sets = _paired_sets(texts.train, texts.y, seed), _paired_sets(texts.test, texts.y, seed)
    names = ("spurious", "label", "biased")

    def draw(side: int, positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        negatives = negative[torch.randperm(len(negative), generator=rng).numpy()][: len(positive)]
        both, n = np.concatenate([positive, negatives]), len(positive)
        order = torch.randperm(len(both), generator=rng).numpy()
        return both[order], (np.arange(len(both)) < n)[order]

    fits: dict[str, LogisticFit] = {}
    for name, is_flipped in itertools.product(names, (False, True)):
        (fit, y_fit), (rest, y_rest) = (
            draw(i, *(pair[::-1] if is_flipped else pair)) for i, pair in _pairs(sets, name)
        )
        probe, _ = adam_probe(texts.x[fit], y_fit, texts.x[rest], y_rest, rng, **_SAEBENCH)
        if not is_flipped:
            fits[name] = probe

    def accuracies(ablated: Tensor | None) -> dict[tuple[str, str], tuple[float, int]]:
        """By (probe, data)."""
        result = {}
        for data in names:
            result[data, data] = _drawn_accuracy(texts, fits[data], *draw(1, *sets[1][data]), ablated)
        for data in names:
            index, label = draw(1, *sets[1][data])
            for probe in names:
                if probe != data:
                    result[probe, data] = _drawn_accuracy(texts, fits[probe], index, label, ablated)
        return result

    clean = accuracies(None)
    effects = {}
    for name in names:
        index, label = draw(0, *sets[0][name])
        difference = texts.difference(index, label)
        effects[name] = latent_effects(difference, fits[name].weight.float(), texts.W_dec, signed=False)
    rows: dict[str, list[dict[str, Any]]] = {}
    for other, target in (("spurious", "label"), ("label", "spurious")):
        (accuracy, n_test), (before, n_before) = clean[target, target], clean["biased", target]
        for n in ns:
            after, n_after = accuracies(strongest(effects[other], n, positive=False))["biased", target]
            gap = accuracy - before
            error = (_variance(before, n_before) + _variance(after, n_after)) ** 0.5
            row = _scr_row(target, n, accuracy, before, after, error / gap if gap >= MIN_GAP else float("nan"), n_test)
            rows.setdefault(target, []).append(row)
    return _scr_table([*rows["label"], *rows["spurious"]])


def _pairs(sets: tuple[dict[str, Any], dict[str, Any]], name: str) -> list[tuple[int, Any]]:
    return [(i, side[name]) for i, side in enumerate(sets)]


def _drawn_accuracy(
    texts: _Texts, fit: LogisticFit, index: np.ndarray, label: np.ndarray, ablated: Tensor | None
) -> tuple[float, int]:
    right = (texts.scores(fit, index, ablated) > 0) == torch.from_numpy(label)
    return float(right.double().mean()), len(index)


def _paired_sets(index: np.ndarray, kind: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Positive and negative texts of the label, of the spurious one, and of the two together; as SAEBench draws them.

    Raises:
        ValueError: if texts on which both agree are not twice as many as those of the rarest kind.
    """
    of = {(label, other): index[kind[index] == 2 * label + other] for label in (0, 1) for other in (0, 1)}
    m = min(*(len(part) for part in of.values()), len(of[1, 1]) // 2, len(of[0, 0]) // 2)
    if not m:
        raise ValueError(explain("too few texts of a kind.", want="texts of all four kinds, and of two twice as many"))
    pp, nn, pn, np_ = of[1, 1], of[0, 0], of[1, 0], of[0, 1]
    parts = [
        np.concatenate([pp[:m], np_[:m]]),
        np.concatenate([pn[:m], nn[:m]]),
        np.concatenate([pp[:m], pn[:m]]),
        np.concatenate([np_[:m], nn[:m]]),
        pp[: 2 * m].copy(),
        nn[: 2 * m].copy(),
    ]
    rng = np.random.default_rng(seed)
    for part in parts:
        rng.shuffle(part)
    return {"spurious": (parts[0], parts[1]), "label": (parts[2], parts[3]), "biased": (parts[4], parts[5])}


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class ScrTpp:
    """Result of `scr_tpp`: `summary()` has a row per SAE and n, `to_frame()` one per class as well."""

    table: pd.DataFrame
    """The rows of `to_frame`."""
    metric: Literal["tpp", "scr"]
    """Which one it is."""
    like: str | None
    """Whose settings they are."""

    def to_frame(self) -> pd.DataFrame:
        """A row per SAE, n and class (TPP), or direction (SCR: the label that the biased probe is to tell).

        Columns: sae, class (None: the headline), n, score, se, low, high (95 %), n_test (texts), clean_accuracy; for
        TPP intended and unintended (drops of accuracy), for SCR biased_accuracy and ablated_accuracy. Errors are over
        test texts, the probes as they are.
        """
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """The headline rows of `to_frame`: the mean over classes, or the better defined direction."""
        rows = self.table[self.table["class"].isna()]
        return rows.drop(columns="class").reset_index(drop=True)

    def plot(self) -> go.Figure:
        """The score against n, a line per SAE with its interval; random SAEs in gray."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for name, part in self.summary().groupby("sae", sort=False):
            color = {"color": "#b0b0b0"} if str(name).startswith("random") else {}
            error = {"array": part.high - part.score, "arrayminus": part.score - part.low, "thickness": 1}
            figure.add_scatter(x=part.n, y=part.score, error_y=error, name=str(name), line=color, mode="lines+markers")
        layout = {"width": 700, "height": 400, "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
        titles = {"xaxis_title": "latents ablated", "yaxis_title": self.metric.upper()}
        return figure.update_layout(title=repr(self), **titles, **layout).update_xaxes(type="log")

    def __repr__(self) -> str:
        first = self.summary()
        first = first[first.sae == first.sae.iloc[0]]
        best = first.loc[first.score.idxmax()]
        return f"ScrTpp({self.metric} {best.score:.3g} with {int(best.n)} latents, {int(best.n_test):,} test texts)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.summary().to_string(index=False, float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        return self.summary().to_html(index=False, float_format="{:.3g}".format)
