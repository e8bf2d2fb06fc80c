"""Feature absorption and splitting: classes of words, a probe of the activation, and the latents that say the same.

1. Words, each in a prompt; the activation at the word's last token; four fifths of the words to train on.
2. A linear probe of the activation for each class: the direction that an SAE should have latents for.
3. The k latents of largest weight in an L1 probe of all latents, and a logistic regression on them, k = 1..max_k: the
   class is split over as many as still raise F1 by 0.03.
4. Test words that the probe gets right: how much of the activation's projection on the probe's direction these main
   latents write, and how much others do instead.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from saewb.errors import explain, near
from saewb.evals.linear_probe import LinearProbe, train_probe
from saewb.evals.result import named_saes
from saewb.evals.spelling import SPELLING, Labels, at_the_word, check_template, label_function, prompts, vocabulary
from saewb.interventions.site import Site
from saewb.probing.logistic import balancing_weights, fit_logistic
from saewb.probing.pooling import Pooled, TokenizedTexts, pool_latents
from saewb.probing.probes import grouped_split
from saewb.sae.activation_functions import denormalized
from saewb.sae.base import SparseCoder
from saewb.sae.random_sae import random_sae
from saewb.stats.intervals import mean_and_error, normal_interval, wilson_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import scipy.sparse

Like = Literal["saebench"]
RANDOM = "random"
MIN_WORDS = 5
"""A class of fewer words is left out."""


@dataclass(frozen=True)
class AbsorptionSettings:
    """How absorption is measured; the defaults are SAEBench's."""

    max_k: int = 10
    """Latents of a k-sparse probe, at most."""
    min_f1: float = 0.6
    """F1 that the probe of the residual stream must exceed for a class to count."""
    f1_jump: float = 0.03
    """By which one more latent must raise F1, for it to be a main latent."""
    absorber_cosine: float = 0.1
    """Cosine with the probe from which on a latent may absorb."""
    full_cosine: float = 0.025
    """The same for full absorption."""
    proportion: float = 0.4
    """Share of the projection that absorbers must write."""
    n_absorbers: int = 3
    """Latents that together may absorb."""
    train: float = 0.8
    """Share of the words to train on."""
    probe_batch: int = 64
    """Words per step of the probe of the residual stream."""
    latent_batch: int = 256
    """Words per step of the L1 probe."""
    zero_start: bool = True
    """Whether the L1 probe starts from zeros."""
    scaled: bool = True
    """Whether q counts the length of the decoder row, and P leaves out what is written without latents."""
    grouped: bool = True
    """Whether forms of a word that differ in case or a space are on one side of the split."""
    fresh_prompts: bool = False
    """Whether the last step reads the words in new prompts."""


LIKE: dict[str | None, AbsorptionSettings] = {
    None: AbsorptionSettings(),
    "saebench": AbsorptionSettings(
        latent_batch=4096, zero_start=False, scaled=False, grouped=False, fresh_prompts=True
    ),
}


def absorption(
    model: nn.Module,
    saes: Union[SparseCoder, Sequence[SparseCoder], Mapping[str, SparseCoder]],
    words: Sequence[str] | None = None,
    *,
    labels: Labels = "first_letter",
    like: Like | None = None,
    max_k: int = 10,
    template: str | None = None,
    n_examples: int | None = None,
    max_words: int | None = None,
    control: bool = True,
    hook: str | None = None,
    seed: int = 42,
    progress: bool = True,
) -> Absorption:
    """Measure absorption and splitting of classes of words by SAEs, beside a random SAE, in one table.

    For a class with probe direction u (unit), main latents M and a test word that the probe gets right, with activation
    x and latents a:

        q_i  = a_i W_dec[i] . u        P = x . u        m = sum over M of q_i
        A    = sum of the 3 largest q_i > 0 outside of M whose cos(W_dec[i], u) >= 0.1
        fraction = 0                                 if m >= P or A < 0.4 P
                   1                                 if m <= 0
                   min(A, P - m) / (min(A, P - m) + m)    otherwise
        full     = a_i = 0 for all of M, and the latent j of largest q has cos >= 0.025 and q_j >= 0.4 P

    A random SAE has no latents for the class; where it happens to write 0.4 P with others, it "absorbs". So the figures
    mean something for an SAE whose k-sparse F1 is well above the random one's. Classes whose probe has a test F1 up to
    0.6 are in the table and not in the means (`counted`): the model may not know them. The
    first letter is known to models of about a billion parameters; for smaller ones choose other labels.

    By default this differs from SAEBench, which `like="saebench"` follows, in: q counts the length of W_dec[i], which
    SAEBench reads as 1 (and a normalization of the input); P leaves out what the SAE writes without latents, the
    decoder bias; forms of one word are on one side of the split; the L1 probe starts from zeros, in batches of 256, on
    latents that fire; of latents with negative activations the |weight| chooses; the same prompts serve all steps;
    words and prompts are drawn by `seed`. SAEBench draws its prompts by `random`, unseeded, from words in no fixed
    order; on the same words, prompts and random numbers its figures are these (its solver stops at scikit-learn's
    tolerance, the one here at the optimum).

    Memory: the words' activations, their active latents, and 256 words' dense latents (4,096 with `like`) at a time.
    RAVEL, unlearning and MDL of SAEBench are left out: they need models of 2 billion parameters and more.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: one SAE, several, or several by name; each writes where it reads.
        words: to classify; None: the tokens of the vocabulary that fit the labels, or the keys of a dictionary.
        labels: "first_letter"; {word: class}; or a function of a word. None as class leaves a word out; so
            does a class of fewer than 5 words.
        like: settings of SAEBench.
        max_k: latents of a k-sparse probe, at most.
        template: the prompt, with {word}; None is SAEBench's for "first_letter", and the word alone else.
        n_examples: lines of other words with their answers before it; None is 10 for "first_letter", else 0.
        max_words: of more, as many are drawn; None is 4,000, or all with `like`.
        control: add a random SAE of the width, L0 and hook of each SAE.
        hook: hook point that the SAEs read, instead of `sae.cfg.hook`.
        seed: of words, prompts, split, probes and random SAEs.
        progress: show progress bars.

    Returns:
        An Absorption: `summary()` has a row per SAE, `to_frame()` one per SAE and class.

    Raises:
        ValueError: for fewer than two classes, a class with a single word, a transcoder, or an unknown setting.

    References:
        Chanin et al. 2024, arXiv:2409.14507; Karvonen et al. 2025, arXiv:2503.09532 (SAEBench 0.6.0).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> capital = lambda word: "capital" if word.strip()[0].isupper() else "small"
        >>> result = absorption(model, {"tiny": sae}, labels=capital, max_words=400, max_k=3, progress=False)
        >>> summary = result.summary()
        >>> summary.index.tolist(), bool(summary.f1_1["tiny"] > summary.f1_1["random (tiny)"])
        (['tiny', 'random (tiny)'], True)
    """
    if like not in LIKE:
        raise ValueError(explain(f"got like={like!r}.", near=near(str(like), ["saebench"]), want="None or 'saebench'"))
    if type(max_k) is not int or max_k < 1:
        raise ValueError(explain(f"got max_k={max_k!r}.", want="a number of latents, at least 1"))
    settings, named = replace(LIKE[like], max_k=max_k), named_saes(saes, "absorption(model, {'a': sae_a, 'b': sae_b})")
    sites = {name: _site(model, sae, hook) for name, sae in named.items()}
    spelling = isinstance(labels, str)
    template = (SPELLING if spelling else "{word}") if template is None else template
    check_template(template)
    n_examples = (10 if spelling else 0) if n_examples is None else n_examples
    rng = random.Random(seed)
    chosen = _choose(model, words, labels, 4000 if max_words is None and like is None else max_words, rng)
    sides = _split(chosen, settings, rng, seed)
    answer = (lambda word: chosen.of[word].upper()) if spelling else (lambda word: str(chosen.of[word]))
    texts = [
        prompt
        for side in sides
        for prompt in prompts(side, side, answer, template, min(n_examples, len(side) - 1), rng)
    ]
    pooled = pool_latents(model, list(sites.values()), at_the_word(model, texts), "last", progress=progress)
    y = torch.tensor([chosen.classes.index(chosen.of[word]) for side in sides for word in side])
    data = _WordData([*sides[0], *sides[1]], y, chosen.classes, len(sides[0]))
    points = [(site.read.name, site.head) for site in sites.values()]
    measured = _measured(list(zip(sites, named.values(), pooled, points, strict=True)), data, settings, control, seed)
    fresh: list[Pooled] | None = None
    if settings.fresh_prompts:
        drawn = _fresh_prompts(model, measured[: len(sites)], data, answer, template, n_examples, rng)
        fresh = [
            pool_latents(model, [site], tokens, "last", progress=progress)[0]
            for site, tokens in zip(sites.values(), drawn, strict=True)
        ]
    return _result(measured, data, settings, like, fresh)


# -- the formulas ------------------------------------------------------------------------------------------------------


def absorption_scores(
    acts: Float[Tensor, "words d_sae"],
    share: Float[Tensor, " d_sae"],
    cosines: Float[Tensor, " d_sae"],
    projection: Float[Tensor, " words"],
    main: Sequence[int],
    settings: AbsorptionSettings = LIKE["saebench"],
) -> tuple[Float[Tensor, " words"], Bool[Tensor, " words"]]:
    """Absorption fraction, and whether absorption is full, of words with these latents.

    Args:
        acts: activations of all latents.
        share: what a unit of each latent adds to the projection: its cosine, or W_dec . u.
        cosines: of the decoder rows with the probe.
        projection: of the activation on the probe's direction.
        main: the main latents.
        settings: thresholds.

    Returns:
        Fraction in 0..1, float64, and whether it is full.
    """
    main_index, P = torch.as_tensor(list(main), dtype=torch.long), projection.double()
    q = acts * share
    written = q[:, main_index].sum(1).double()
    may_absorb = cosines >= settings.absorber_cosine
    may_absorb[main_index] = False
    others = torch.where(may_absorb & (q > 0), q, 0.0)
    A = others.topk(min(settings.n_absorbers, q.shape[1]), 1).values.sum(1).double()
    enough = torch.where(P > 0, A / torch.where(P > 0, P, 1.0) >= settings.proportion, False) & (written < P)
    taken = torch.minimum(A, P - written)
    whole = torch.where(enough, taken + written, 1.0)
    partly = (taken / torch.where(whole == 0, 1.0, whole)).clamp(0, 1)
    fraction = torch.where(enough, torch.where(written <= 0, 1.0, partly), 0.0)
    top = q.argmax(1)
    top_q = acts.gather(1, top[:, None])[:, 0].double() * share[top].double()
    of_main = acts[:, main_index]
    silent = ((of_main.abs() if settings.scaled else of_main) < 1e-8).all(1)
    full = silent & (cosines[top] >= settings.full_cosine) & (P > 0)
    full &= torch.where(P > 0, top_q / torch.where(P > 0, P, 1.0) >= settings.proportion, False)
    return fraction, full


def main_latents(f1: Sequence[float], ranked: Sequence[int], jump: float) -> list[int]:
    """The first latents of `ranked`, as many as raise the F1 of a k-sparse probe by more than `jump` each.

    Example:
        >>> main_latents([0.5, 0.6, 0.61, 0.9], [7, 2, 5, 1], jump=0.03)
        [7, 2]
    """
    best, k = -100.0, 0
    while k < len(f1) and f1[k] > best + jump:
        best, k = f1[k], k + 1
    return list(ranked[:k])


def f1_of(scores: Float[Tensor, " words"], y: Bool[Tensor, " words"]) -> float:
    """F1 of the positive class where scores > 0; 0 if there are neither true nor predicted positives."""
    predicted = scores > 0
    either = int(predicted.sum()) + int(y.sum())
    return 2 * int((predicted & y).sum()) / either if either else 0.0


# -- words -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chosen:
    words: list[str]
    of: dict[str, Hashable]
    """Class of each word."""
    classes: list[Hashable]


@dataclass(frozen=True, eq=False)
class _WordData:
    words: list[str]
    """Training words, then test words."""
    y: Int[Tensor, " words"]
    classes: list[Hashable]
    n_train: int


def _choose(model: nn.Module, words: Any, labels: Labels, max_words: int | None, rng: random.Random) -> _Chosen:
    """Words with a class, drawn if there are too many."""
    if isinstance(words, str):
        raise TypeError(explain("got one string for words.", want="a list of words", fix="words=[' river', ...]"))
    label = label_function(labels)
    listed = vocabulary(model, labels) if words is None else list(dict.fromkeys(words))
    of = {word: value for word in listed if (value := label(word)) is not None}
    chosen = list(of)
    if max_words is not None and len(chosen) > max_words:
        chosen = [chosen[i] for i in sorted(rng.sample(range(len(chosen)), max_words))]
    n_words = Counter(of[word] for word in chosen)
    classes = sorted((c for c in n_words if n_words[c] >= MIN_WORDS), key=lambda value: (str(type(value)), value))
    chosen = [word for word in chosen if n_words[of[word]] >= MIN_WORDS]
    if len(classes) < 2:
        what = f"{len(listed):,} words have {len(classes)} classes of {MIN_WORDS} words or more."
        raise ValueError(
            explain(what, want="words of two classes or more", fix="absorption(..., labels={word: class})")
        )
    return _Chosen(chosen, of, classes)


def _split(chosen: _Chosen, settings: AbsorptionSettings, rng: random.Random, seed: int) -> tuple[list[str], list[str]]:
    """Training and test words."""
    if not settings.grouped:
        words = rng.sample(chosen.words, len(chosen.words))
        n = int(len(words) * settings.train)
        sides = words[:n], words[n:]
    else:
        number: dict[str, int] = {}
        group = np.array([number.setdefault(word.strip().lower(), len(number)) for word in chosen.words])
        y = np.array([chosen.classes.index(chosen.of[word]) for word in chosen.words])
        train, test = grouped_split(y, group, settings.train, seed)
        sides = [chosen.words[i] for i in train], [chosen.words[i] for i in test]
    for name, side in zip(("training", "test"), sides, strict=True):
        if missing := set(chosen.classes) - {chosen.of[word] for word in side}:
            what = f"no {name} word has the class {min(missing, key=str)!r}."
            raise ValueError(explain(what, want="several words of each class"))
    return sides


# -- probes and latents ------------------------------------------------------------------------------------------------


def _site(model: nn.Module, sae: SparseCoder, hook: str | None) -> Site:
    site = Site.of(model, sae, hook, writable=False)
    if not site.is_one_point:
        raise ValueError(explain(f"{sae!r} is a transcoder.", want="an SAE that writes where it reads"))
    return site


def _measured(
    saes: list[tuple[str, SparseCoder, Pooled, Hashable]],
    data: _WordData,
    settings: AbsorptionSettings,
    control: bool,
    seed: int,
) -> list[_Measured]:
    """SAEs by name with their pooled values and points, and their controls: one probe per point, latents chosen."""
    probes: dict[Hashable, LinearProbe] = {}
    measured = []
    for name, sae, pooled, point in saes:
        if point not in probes:
            probes[point] = _probe(pooled.residual, data, settings, seed)
        measured.append(_Measured(name, sae, pooled, probes[point], None))
    measured += _controls(measured, data, seed) if control else []
    for one in measured:
        one.choose_latents(data, settings, seed)
    return measured


def _result(
    measured: list[_Measured],
    data: _WordData,
    settings: AbsorptionSettings,
    like: str | None,
    fresh: list[Pooled] | None = None,
) -> Absorption:
    """Measure them all, on the test words or on other activations of those that each probe gets right."""
    import pandas as pd

    names, parts = [one.name for one in measured], []
    for i, one in enumerate(measured):
        again = None
        if fresh is not None:
            of = i if one.control_of is None else names.index(one.control_of)
            again = fresh[of] if one.control_of is None else one.encode(fresh[of].residual)
        parts.append(one.measure(data, settings, again))
    tables, by_word = zip(*parts, strict=True)
    return Absorption(pd.concat(tables, ignore_index=True), pd.concat(by_word, ignore_index=True), settings, like)


def _one_hot(y: Tensor, n: int) -> Bool[Tensor, "words classes"]:
    return nn.functional.one_hot(y, n).bool()


def _probe(x: Tensor, data: _WordData, settings: AbsorptionSettings, seed: int) -> LinearProbe:
    """The probe of the residual stream."""
    rng, n = torch.Generator().manual_seed(seed), len(data.classes)
    train = x[: data.n_train].float()
    y = _one_hot(data.y[: data.n_train], n)
    return train_probe(train.__getitem__, y, x.shape[1], rng, batch=settings.probe_batch, weight_decay=1e-4)


def _controls(measured: list[_Measured], data: _WordData, seed: int) -> list[_Measured]:
    """A random SAE for each, with its width, hook and mean L0 on the training words."""
    controls = []
    for one in list(measured):
        x = one.pooled.residual
        l0 = one.pooled.latents[: data.n_train].nnz / data.n_train
        sae = random_sae(one.sae, l0, x[: data.n_train].mean(0), seed=seed)
        name = RANDOM if len(measured) == 1 and one.name.startswith("0: ") else f"{RANDOM} ({one.name})"
        random_one = _Measured(name, sae, Pooled(one.pooled.latents[:0], x), one.probe, one.name)
        random_one.pooled = random_one.encode(x)
        controls.append(random_one)
    return controls


class _Measured:
    """One SAE: its latents on the words, and what is chosen and measured of them."""

    def __init__(self, name: str, sae: SparseCoder, pooled: Pooled, probe: LinearProbe, control_of: str | None) -> None:
        self.name, self.sae, self.pooled, self.probe, self.control_of = name, sae, pooled, probe, control_of
        self.ranked: list[list[int]] = []
        self.f1: list[list[float]] = []

    def right(self, data: _WordData) -> list[Int[Tensor, " words"]]:
        """For each class, the test words of it that the probe gets right."""
        scores = self.probe.scores(self.pooled.residual[data.n_train :].float())
        y_test = data.y[data.n_train :]
        return [((y_test == i) & (scores[:, i] > 0)).nonzero()[:, 0] for i in range(len(data.classes))]

    def encode(self, x: Tensor) -> Pooled:
        """Latents of an SAE that needs no context: a control."""
        return Pooled(self.sae.encode_sparse(x.to(self.sae.device)).to("cpu").to_scipy(), x)

    def choose_latents(self, data: _WordData, settings: AbsorptionSettings, seed: int) -> None:
        """The best latents of each class, and the test F1 of the best k."""
        n, latents = data.n_train, self.pooled.latents
        y = _one_hot(data.y, len(data.classes))
        weight = self._l1_weights(latents[:n], y[:n], settings, seed)
        k = min(settings.max_k, weight.shape[1])
        for i in range(len(data.classes)):
            ranked = weight[i].topk(k).indices.tolist()
            columns = torch.from_numpy(latents[:, ranked].toarray())
            f1 = []
            for size in range(1, k + 1):
                fit = fit_logistic(columns[:n, :size], y[:n, i], weights=balancing_weights(y[:n, i]))
                scores = columns[n:, :size].float() @ fit.weight.float() + torch.tensor(fit.bias).float()
                f1.append(f1_of(scores, y[n:, i]))
            self.ranked.append(ranked)
            self.f1.append(f1)

    def _l1_weights(
        self, latents: scipy.sparse.csr_array, y: Tensor, settings: AbsorptionSettings, seed: int
    ) -> Float[Tensor, "classes d_sae"]:
        rng, d_sae = torch.Generator().manual_seed(seed), latents.shape[1]
        columns = np.unique(latents.indices) if settings.zero_start else np.arange(d_sae)
        if not len(columns):
            raise ValueError(explain(f"no latent of {self.name!r} fires on a word.", want="an SAE of this model"))
        part = latents[:, columns] if len(columns) < d_sae else latents

        def rows(index: Tensor) -> Tensor:
            return torch.from_numpy(part[index.numpy()].toarray())

        how = {"batch": settings.latent_batch, "weight_decay": 1e-6, "l1": 0.01, "zero_start": settings.zero_start}
        probe = train_probe(rows, y, len(columns), rng, **how)
        weight = torch.full((y.shape[1], d_sae), -torch.inf)
        signed = settings.zero_start and bool((latents.data < 0).any())
        weight[:, torch.from_numpy(columns)] = probe.weight.abs() if signed else probe.weight
        return weight

    def measure(
        self, data: _WordData, settings: AbsorptionSettings, fresh: Pooled | None
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows of the classes, and of the test words that the probe gets right."""
        import pandas as pd

        x_test = self.pooled.residual[data.n_train :].float()
        y_test = data.y[data.n_train :]
        scores, rows, words, position = self.probe.scores(x_test), [], [], 0
        right_of = self.right(data)
        W_dec = self.sae.W_dec.detach().float().cpu()
        for i, name in enumerate(data.classes):
            right = right_of[i]
            main = main_latents(self.f1[i], self.ranked[i], settings.f1_jump)
            if fresh is None:
                x, latents = x_test[right], self.pooled.latents[(right + data.n_train).numpy()]
            else:
                chosen = slice(position, position + len(right))
                x, latents = fresh.residual[chosen].float(), fresh.latents[chosen]
                position += len(right)
            u = self.probe.weight[i] / self.probe.weight[i].norm()
            cosines = cosine_similarity(u, W_dec, dim=-1)
            acts, per_unit = torch.from_numpy(latents.toarray()).float(), cosines
            P = x @ u
            if settings.scaled:
                acts, per_unit = acts * _input_scale(self.sae, x), W_dec @ u
                P = P - _constant_output(self.sae, x) @ u
            fraction, full = absorption_scores(acts, per_unit, cosines, P, main, settings)
            probe_f1 = f1_of(scores[:, i], y_test == i)
            rows.append(
                {
                    "sae": self.name,
                    "class": name,
                    "counted": probe_f1 > settings.min_f1 and len(right) > 0,
                    "n_train": int((data.y[: data.n_train] == i).sum()),
                    "n_test": int((y_test == i).sum()),
                    "probe_f1": probe_f1,
                    **{f"f1_{k}": value for k, value in enumerate(self.f1[i], 1)},
                    "n_split": len(main),
                    "latents": main,
                    **_share_columns(fraction, full),
                }
            )
            test_words = data.words[data.n_train :]
            words.append(
                pd.DataFrame(
                    {
                        "sae": self.name,
                        "class": name,
                        "word": [test_words[j] for j in right.tolist()],
                        "projection": P.numpy(),
                        "fraction": fraction.numpy(),
                        "full": full.numpy(),
                    }
                )
            )
        return pd.DataFrame(rows), pd.concat(words, ignore_index=True)


def _input_scale(sae: SparseCoder, x: Tensor) -> Tensor:
    """What a unit of decoder output is in the model's units, per word, where the SAE normalizes its input."""
    ones = torch.ones_like(x)
    return (denormalized(ones, x, sae.cfg.normalization) - denormalized(0 * ones, x, sae.cfg.normalization))[:, :1]


def _constant_output(sae: SparseCoder, x: Tensor) -> Tensor:
    """What the SAE writes without latents, per word, in the model's units."""
    bias = sae.b_dec.detach().float().cpu().expand_as(x)
    return denormalized(bias, x, sae.cfg.normalization)


def _share_columns(fraction: Tensor, full: Tensor) -> dict[str, float]:
    mean, error, n = mean_and_error(fraction.numpy())
    count = float(full.sum())
    (low,), (high,) = wilson_interval(np.array([count]), np.array([float(n)]))
    fraction_low, fraction_high = normal_interval(mean, error, 0.0, 1.0)
    return {
        "n": n,
        "fraction": mean,
        "fraction_se": error,
        "fraction_low": fraction_low,
        "fraction_high": fraction_high,
        "n_full": int(count),
        "full": count / n if n else float("nan"),
        "full_low": float(low),
        "full_high": float(high),
    }


def _fresh_prompts(
    model: nn.Module,
    measured: list[_Measured],
    data: _WordData,
    answer: Any,
    template: str,
    n_examples: int,
    rng: random.Random,
) -> list[TokenizedTexts]:
    """For each SAE, the words that its probe gets right, class by class, in new prompts; one draw for each probe."""
    tokens: dict[int, TokenizedTexts] = {}
    for one in measured:
        if id(one.probe) in tokens:
            continue
        right = [data.words[data.n_train + j] for of_class in one.right(data) for j in of_class.tolist()]
        if not right:
            raise ValueError(explain("the probe gets no test word right.", want="labels that the model knows"))
        texts = prompts(right, data.words, answer, template, min(n_examples, len(data.words) - 1), rng)
        tokens[id(one.probe)] = at_the_word(model, texts)
    return [tokens[id(one.probe)] for one in measured]


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Absorption:
    """Result of `absorption`: `summary()` has a row per SAE, `to_frame()` one per SAE and class."""

    table: pd.DataFrame
    """The rows of `to_frame`."""
    by_word: pd.DataFrame
    """A row per SAE and test word that the probe gets right: class, word, projection, fraction, full."""
    settings: AbsorptionSettings
    """How they were measured."""
    like: str | None
    """Whose settings they are."""

    def to_frame(self) -> pd.DataFrame:
        """A row per SAE and class.

        Columns: sae, class, counted (its probe's F1 exceeds `settings.min_f1`), n_train, n_test (words of the class),
        probe_f1 (residual stream), f1_1, f1_2, ... (of k latents), n_split (main latents), latents (which), n (test
        words that the probe gets right), fraction with fraction_se, fraction_low and fraction_high (95 %), n_full, full
        with full_low and full_high (95 %, Wilson).
        """
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """A row per SAE: means over the classes that count, with standard errors over classes and intervals of 95 %.

        Columns: n_classes, n (words), probe_f1, f1_1 and, with as many latents, f1_5, fraction, fraction_se,
        fraction_low, fraction_high, full, full_se, full_low, full_high, n_split, n_split_se. A random SAE stands under
        each. SAEBench reports none of it with fewer than 20 letters.
        """
        import pandas as pd

        rows = {}
        for name, part in self.table.groupby("sae", sort=False):
            counted = part[part.counted]
            row: dict[str, float] = {"n_classes": len(counted), "n": int(counted.n.sum())}
            for figure in ("probe_f1", "f1_1", "f1_5", "fraction", "full", "n_split"):
                if figure not in counted:
                    continue
                mean, error, _ = mean_and_error(counted[figure].to_numpy(float))
                row[figure] = mean
                if figure in ("fraction", "full", "n_split"):
                    row[f"{figure}_se"] = error
                if figure in ("fraction", "full"):
                    row[f"{figure}_low"], row[f"{figure}_high"] = normal_interval(mean, error, 0.0, 1.0)
            rows[name] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sae")

    def plot(self, figure: Literal["fraction", "full", "f1_1", "n_split"] = "fraction") -> go.Figure:
        """A figure of each class that counts, a color per SAE, random SAEs in gray, with intervals where there are any.

        Args:
            figure: a column of `to_frame`.
        """
        import plotly.graph_objects as go

        drawn = go.Figure()
        for name, part in self.table[self.table.counted].groupby("sae", sort=False):
            bars: dict[str, Any] = {"x": part["class"].astype(str), "y": part[figure], "name": str(name)}
            if f"{figure}_low" in part:
                above, below = part[f"{figure}_high"] - part[figure], part[figure] - part[f"{figure}_low"]
                bars["error_y"] = {"array": above, "arrayminus": below, "thickness": 1}
            if str(name).startswith(RANDOM):
                bars["marker_color"] = "#b0b0b0"
            drawn.add_bar(**bars)
        layout = {"width": 800, "height": 400, "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
        return drawn.update_layout(title=repr(self), xaxis_title="class", yaxis_title=figure, **layout)

    def __repr__(self) -> str:
        of = self.summary().iloc[0]
        parts = [f"{int(of.n_classes)} of {self.table['class'].nunique()} classes", f"fraction {of.fraction:.3g}"]
        parts += [f"full {of.full:.3g}", f"k-sparse F1 {of.f1_1:.3g}", f"{int(of.n):,} words"]
        return f"Absorption({', '.join(parts)}{f', as {self.like}' if self.like else ''})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.summary().to_string(float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="{:.3g}".format)
