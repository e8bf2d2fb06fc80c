"""Sparse probes: how well k latents classify texts, chosen on training texts, beside baselines without an SAE.

None            L1 logistic regression on the k latents of largest |mean difference|, C by validation AUC
"saebench"      SAEBench's sparse_probing: one against all, balanced at random, L2 with C = 1, accuracy
"sae-probes"    sae-probes: the last token, means over those of |active| values, C by validation AUC
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Union, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._indices import indices_of
from saewb.errors import explain, near
from saewb.interventions.site import Site
from saewb.probing.logistic import LogisticFit, Penalty, fit_logistic
from saewb.probing.pooling import Pool, Pooled, TokenizedTexts, check_pool, pool_latents
from saewb.probing.rank_statistics import auc_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Choose = Literal["mean_difference", "normalized_mean_difference"]
Like = Literal["saebench", "sae-probes"]
Baseline = Literal["residual", "residual_top_k", "token"]

BASELINES: tuple[Baseline, ...] = ("residual", "residual_top_k", "token")
_CS = np.logspace(5, -5, 10)


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are made."""

    ks: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """Numbers of latents."""
    pool: Pool = "mean"
    """How latents are pooled over the tokens of a text."""
    choose: Choose = "mean_difference"
    """|mean of positives - mean of negatives| on the training texts; or that of latents over their mean |value|."""
    penalty: Penalty = "l1"
    """Of the logistic regression."""
    C: float | None = None
    """Inverse strength of the penalty; None: of ten from 1e5 to 1e-5 the one of largest AUC in validation."""
    balanced: bool = False
    """As many negatives as positives, drawn anew for each class and k."""
    ctx_len: int | None = None
    """Tokens of a text at most."""
    cut: Literal["end", "start"] = "end"
    """Which part of a longer text is dropped."""


LIKE: dict[str | None, ProbeSettings] = {
    None: ProbeSettings(),
    "saebench": ProbeSettings((1, 2, 5), penalty="l2", C=1.0, balanced=True, ctx_len=128),
    "sae-probes": ProbeSettings(
        tuple(2**i for i in range(10)), "last", "normalized_mean_difference", ctx_len=1024, cut="start"
    ),
}


@overload
def sparse_probe(
    model: nn.Module, saes: nn.Module, texts: Any, labels: Sequence[Hashable], **how: object
) -> Probes: ...
@overload
def sparse_probe(
    model: nn.Module, saes: Sequence[nn.Module], texts: Any, labels: Sequence[Hashable], **how: object
) -> list[Probes]: ...
def sparse_probe(
    model: nn.Module,
    saes: nn.Module | Sequence[nn.Module],
    texts: Any,
    labels: Sequence[Hashable],
    *,
    like: Like | None = None,
    ks: Sequence[int] | None = None,
    pool: Pool | None = None,
    choose: Choose | None = None,
    penalty: Penalty | None = None,
    C: float | None = None,
    groups: Sequence[Hashable] | None = None,
    train: Any = None,
    seed: int = 42,
    baselines: Sequence[Baseline] = BASELINES,
    hook: str | None = None,
    ctx_len: int | None = None,
    progress: bool = True,
) -> Probes | list[Probes]:
    """Classify texts by k latents of an SAE, and by what needs no SAE: the residual stream, its dimensions, tokens.

    Latents are pooled over the tokens of a text, special tokens left out; the k that separate the classes best on the
    training texts go into a logistic regression, which is scored on the others. The baselines are in the same table:
    logistic regression on the whole pooled residual stream ("residual"), on its k best dimensions ("residual_top_k"),
    on the presence of the k best tokens ("token"). An SAE whose k latents do not beat k tokens has found words.

    With more than two classes there is a probe for each against all others. Equal texts are on one side of the split.

    `like="saebench"` and `like="sae-probes"` compute what these libraries do, to their random numbers, where the pooled
    values are the same: see `ProbeSettings` for what differs, and two remarks. SAEBench's residual baseline is a linear
    probe trained by AdamW, of whose epochs the best on the *test* texts counts. sae-probes stops its solver (saga)
    after 1,000 steps, often before it converges; here it converges.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        saes: an SAE of any architecture, or several.
        texts: texts, chats or token ids.
        labels: class of each text, of any hashable kind; of two, the larger one (`sorted`) is positive.
        like: settings of another library, where the arguments below are None.
        ks: numbers of latents.
        pool: "max", "mean", "last", "any" or "sum".
        choose: "mean_difference", or "normalized_mean_difference".
        penalty: "l1" or "l2".
        C: inverse strength of the penalty; None: by validation on the training texts, unless `like` has one.
        groups: texts of one group are on one side of the split, e.g. sentences of one document.
        train: training texts: a fraction, a number, indices in the order to train in, or a mask. None: 0.8; for
            "sae-probes" 1,024, or all but 100, half of each class, as it draws them.
        seed: of the split and of validation.
        baselines: which of "residual", "residual_top_k" and "token".
        hook: hook point the SAE reads, instead of `sae.cfg.hook`.
        ctx_len: tokens of a text at most; longer ones are cut.
        progress: whether to show a progress bar.

    Returns:
        Probes; a list of them for a list of SAEs.

    Raises:
        ValueError: for as many labels as there are no texts, one class, a class missing in training or test, an unknown
            setting.

    References:
        Gurnee et al. 2023, arXiv:2305.01610 (sparse probing); Karvonen et al. 2025, arXiv:2503.09532 (SAEBench);
        Kantamneni et al. 2025, arXiv:2502.16681 (sae-probes).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> documents = saewb.tiny.held_out_texts()[:80]
        >>> texts, labels = [d.text for d in documents], [d.topic.startswith("Biology") for d in documents]
        >>> probes = sparse_probe(model, sae, texts, labels, ks=[1, 5], baselines=["token"], progress=False)
        >>> probes.to_frame()[["features", "k", "n_train", "n_test"]].values.tolist()
        [['latents', 1, 64, 16], ['latents', 5, 64, 16], ['token', 1, 64, 16], ['token', 5, 64, 16]]
    """
    settings = _settings(like, ks=ks, pool=pool, choose=choose, penalty=penalty, C=C, ctx_len=ctx_len)
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise ValueError(
            explain(f"got baselines {unknown}.", near=near(str(unknown[0]), BASELINES), want=str(BASELINES))
        )
    several = isinstance(saes, (list, tuple))
    sites = [Site.of(model, sae, hook, writable=False) for sae in (saes if several else [saes])]
    tokenized = TokenizedTexts.of(model, texts, ctx_len=settings.ctx_len, cut=settings.cut)
    y, classes = classes_of(labels, len(tokenized))
    split = split_texts(y, tokenized, groups, train, like, seed)
    check_split(y, classes, split)
    pooled = pool_latents(model, sites, tokenized, settings.pool, progress=progress)
    presence = tokenized.presence(model.cfg.d_vocab) if "token" in baselines else None
    probes = []
    for site, one in zip(sites, pooled, strict=True):
        features = _features(one, presence, baselines)
        table = probe_table(features, y, classes, *split, settings, seed=seed)
        probes.append(Probes(table, settings, site.hook_name, site.sae))
    return probes if several else probes[0]


@dataclass(frozen=True, eq=False, repr=False)
class Probes:
    """Result of `sparse_probe`: `to_frame()` has a row per class, features and k; `plot()` draws them."""

    table: pd.DataFrame
    """Scores."""
    settings: ProbeSettings
    """How they were made."""
    hook: str
    """Where the SAE reads."""
    sae: nn.Module
    """The SAE."""

    def to_frame(self) -> pd.DataFrame:
        """A row per class, features ("latents" or a baseline) and k.

        Columns: class, features, k (None: all), auc, accuracy and f1 (weighted by class) on the test texts, val_auc
        (nan where C is given), C, n_train, n_test, indices (of the features, the best first).
        """
        return self.table.copy()

    def latents(self, k: int, of_class: Hashable = None) -> list[int]:
        """The k latents that were chosen, the best first.

        Args:
            k: one of `settings.ks`.
            of_class: which class; None where there is one.

        Raises:
            ValueError: for a k or class without a probe.
        """
        rows = self.table[(self.table.features == "latents") & (self.table.k == k)]
        rows = rows if of_class is None else rows[rows["class"] == of_class]
        if len(rows) != 1:
            what = f"{len(rows)} probes of latents have k={k!r}, of_class={of_class!r}."
            want = f"k of {list(self.settings.ks)}, a class of {sorted(set(self.table['class']), key=repr)}"
            raise ValueError(explain(what, want=want))
        return list(rows.iloc[0]["indices"])

    def plot(self, score: Literal["auc", "accuracy", "f1"] = "auc") -> go.Figure:
        """Score on the test texts against k, a line per kind of features, mean over classes.

        Args:
            score: which one.
        """
        import plotly.graph_objects as go

        figure, colors = go.Figure(), dict(zip(("latents", *BASELINES), _COLORS, strict=True))
        means = self.table.groupby(["features", "k"], dropna=False, sort=True)[score].mean().reset_index()
        ks = [min(self.settings.ks), max(self.settings.ks)]
        for name, part in means.groupby("features", sort=False):
            is_all = bool(part.k.isna().all())
            x, y = (ks, [part[score].iloc[0]] * 2) if is_all else (part.k.astype(int), part[score])
            line = {"color": colors[name], "dash": "dash" if is_all else "solid"}
            figure.add_scatter(
                x=list(x), y=list(y), name=str(name), mode="lines" if is_all else "lines+markers", line=line
            )
        titles = {"xaxis_title": "k", "yaxis_title": f"{score} on test texts"}
        layout = {"width": 700, "height": 400, "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
        return figure.update_layout(title=repr(self), **titles, **layout).update_xaxes(type="log")

    def __repr__(self) -> str:
        latents = self.table[self.table.features == "latents"]
        best = f"best AUC {latents.auc.max():.3f}" if len(latents) else "no latents"
        return f"Probes({latents['class'].nunique()} classes, k {list(self.settings.ks)}, {best}, {self.hook})"

    def __str__(self) -> str:
        columns = self.table.drop(columns="indices")
        return f"{self!r}\n{columns.to_string(index=False, float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        return self.table.drop(columns="indices").to_html(index=False, float_format="{:.3g}".format)


_COLORS = ("#d95f02", "#666666", "#1f78b4", "#1b9e77")


# -- settings, classes, split ------------------------------------------------------------------------------------------


def _settings(like: str | None, **values: Any) -> ProbeSettings:
    if like not in LIKE:
        names = [name for name in LIKE if name]
        raise ValueError(explain(f"got like={like!r}.", near=near(str(like), names), want=f"None, {', '.join(names)}"))
    given = {name: value for name, value in values.items() if value is not None}
    if "ks" in given:
        given["ks"] = tuple(indices_of(given["ks"], "ks", repeats=True).tolist())
    settings = replace(LIKE[like], **given)
    if not settings.ks or min(settings.ks) < 1:
        raise ValueError(explain(f"got ks={settings.ks}.", want="numbers of latents, at least 1"))
    if settings.choose not in ("mean_difference", "normalized_mean_difference"):
        names = ("mean_difference", "normalized_mean_difference")
        raise ValueError(
            explain(f"got choose={settings.choose!r}.", near=near(str(settings.choose), names), want=names[0])
        )
    check_pool(settings.pool)
    return settings


def classes_of(labels: Any, n: int) -> tuple[Int[np.ndarray, " texts"], list[Hashable]]:
    """Index of each text's class, and the classes: sorted if they are two, else as they come."""
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(labels) != n:
        raise ValueError(explain(f"got {len(labels)} labels for {n} texts.", want="one for each text"))
    classes = list(dict.fromkeys(labels))
    if len(classes) < 2:
        raise ValueError(explain(f"all texts have the label {classes[0]!r}.", want="two classes or more"))
    classes = sorted(classes) if len(classes) == 2 else classes
    number = {label: i for i, label in enumerate(classes)}
    return np.array([number[label] for label in labels]), classes


def split_texts(
    y: np.ndarray, texts: TokenizedTexts, groups: Any, train: Any, like: str | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test texts."""
    n, is_number = len(y), isinstance(train, (int, float)) and not isinstance(train, bool)
    if train is not None and not is_number:
        index = indices_of(train, "train", n).numpy()
        return index, np.setdiff1d(np.arange(n), index)
    if like == "sae-probes" and groups is None and y.max() == 1 and not isinstance(train, float):
        n_train = min(n - 100, 1024) if train is None else train
        return sae_probes_split(y, n_train, n - n_train - 1, seed=seed)
    share = 0.8 if train is None else train / n if isinstance(train, int) else train
    if not 0 < share < 1:
        raise ValueError(explain(f"got train={train}.", want=f"a fraction below 1, or a number below {n}"))
    return grouped_split(y, _components(texts.first_of_equals(), groups), share, seed)


def _components(first: Sequence[int], groups: Any) -> np.ndarray:
    """Number of the group of each text, where equal texts are of one group too."""
    import scipy.sparse
    from scipy.sparse.csgraph import connected_components

    n, links = len(first), [(i, j) for i, j in enumerate(first) if i != j]
    if groups is not None:
        groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)
        if len(groups) != n:
            raise ValueError(explain(f"got {len(groups)} groups for {n} texts.", want="one for each text"))
        leader: dict[Hashable, int] = {}
        links += [(i, leader.setdefault(group, i)) for i, group in enumerate(groups)]
    rows, columns = zip(*links, strict=True) if links else ((), ())
    graph = scipy.sparse.coo_array((np.ones(len(links)), (np.array(rows, int), np.array(columns, int))), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def grouped_split(y: np.ndarray, group: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole groups, at random, to training until it has its share of the texts of each class; in a random order."""
    rng = np.random.default_rng(seed)
    _, first, sizes = np.unique(group, return_index=True, return_counts=True)
    training = np.zeros(len(sizes), bool)
    for label in range(y.max() + 1):
        members = rng.permutation((y[first] == label).nonzero()[0])
        before = np.cumsum(sizes[members]) - sizes[members]
        training[members[before < round(share * sizes[members].sum())]] = True
    chosen = training[group]
    return rng.permutation(chosen.nonzero()[0]), (~chosen).nonzero()[0]


def sae_probes_split(
    y: Int[np.ndarray, " texts"], n_train: int, n_test: int, positive: float = 0.5, seed: int = 42
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """The split of sae-probes: `positive` of the training and test texts are of class 1, drawn as it draws them.

    Args:
        y: 0 or 1 per text.
        n_train: training texts.
        n_test: test texts.
        positive: fraction of class 1.
        seed: of numpy's RandomState.

    Raises:
        ValueError: if a class has too few texts.

    Example:
        >>> train, test = sae_probes_split(np.array([0, 1] * 10), 8, 6)
        >>> len(train), len(test), len({*train, *test})
        (8, 6, 14)
    """
    rng, train, test = np.random.RandomState(seed), [], []
    positive_train, positive_test = math.ceil(positive * n_train), math.ceil(positive * n_test)
    needed = {1: (positive_train, positive_test), 0: (n_train - positive_train, n_test - positive_test)}
    for label, (a, b) in needed.items():
        if n_train < 1 or n_test < 1 or (y == label).sum() < a + b:
            n = int((y == label).sum())
            what = f"sae-probes needs {a} training and {b} test texts of class {label}; there are {n}."
            raise ValueError(explain(what, want="more texts of it", fix="train=0.8, or the indices to train on"))
    for label, (a, _) in needed.items():
        train.append(rng.choice((y == label).nonzero()[0], size=a, replace=False))
    for (label, (_, b)), taken in zip(needed.items(), train, strict=True):
        test.append(rng.choice(np.setdiff1d((y == label).nonzero()[0], taken), size=b, replace=False))
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def check_split(y: np.ndarray, classes: list[Hashable], split: tuple[np.ndarray, np.ndarray]) -> None:
    """Raise a ValueError for a class without training or test texts."""
    for name, index in zip(("training", "test"), split, strict=True):
        counts = np.bincount(y[index], minlength=len(classes))
        if (counts == 0).any():
            missing = classes[int(counts.argmin())]
            what = f"no {name} text has the label {missing!r}."
            raise ValueError(explain(what, want="texts of each class on both sides", fix="train=0.5"))


# -- features and probes -----------------------------------------------------------------------------------------------

Columns = Any
"""Features of texts: a tensor `[texts, d]` or a `scipy.sparse.csr_array`."""


def _features(pooled: Pooled, presence: Any, baselines: Sequence[str]) -> dict[str, Columns]:
    """By name, in the order in which SAEBench draws random numbers for them."""
    residual = {name: pooled.residual for name in ("residual", "residual_top_k") if name in baselines}
    return residual | {"latents": pooled.latents} | ({} if presence is None else {"token": presence})


def probe_table(
    features: dict[str, Columns],
    y: Int[np.ndarray, " texts"],
    classes: Sequence[Hashable],
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    settings: ProbeSettings,
    *,
    seed: int = 42,
) -> pd.DataFrame:
    """Scores of the probes of `sparse_probe` for pooled values of any origin.

    Args:
        features: by name: "residual" takes all columns, any other name the best k.
        y: index of the class of each text.
        classes: names of the classes.
        train: indices of training texts, in their order.
        test: indices of test texts.
        settings: how to probe.
        seed: of validation, and of the balanced negatives.

    Returns:
        See `Probes.to_frame`: latents first.
    """
    import pandas as pd

    rng, rows = torch.Generator().manual_seed(seed), []
    positives = [len(classes) - 1] if len(classes) == 2 and not settings.balanced else range(len(classes))
    for name, columns in features.items():
        ks = (None,) if name == "residual" else settings.ks
        for k, positive in itertools.product(ks, positives):
            if settings.balanced:
                sides = [balanced_texts(y, index, positive, rng) for index in (train, test)]
            else:
                sides = [(index, y[index] == positive) for index in (train, test)]
            (fit, y_fit), (rest, y_rest) = sides
            if k is None and settings.balanced:
                scores = _adam_probe(columns[fit], y_fit, columns[rest], y_rest, rng)
            else:
                scores = _probe(columns, fit, y_fit, rest, y_rest, k, settings, seed)
            sizes = {"n_train": len(fit), "n_test": len(rest)}
            rows.append({"class": classes[positive], "features": name, "k": k} | scores | sizes)
    columns = ["class", "features", "k", "auc", "accuracy", "f1", "val_auc", "C", "n_train", "n_test", "indices"]
    table = pd.DataFrame(rows)[columns].astype({"k": "Int64"})
    order = table.features.map({"latents": 0}).fillna(1).argsort(kind="stable")
    return table.iloc[order].reset_index(drop=True)


def balanced_texts(
    y: np.ndarray, index: np.ndarray, positive: int, rng: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """All positives, and as many of the others at random, shuffled: the draws of SAEBench's `prepare_probe_data`."""
    label = y[index]
    positives, classes = index[label == positive], [c for c in dict.fromkeys(y.tolist()) if c != positive]
    each = math.ceil(len(positives) / len(classes))
    negatives = np.concatenate([_shuffled(index[label == c], rng)[:each] for c in classes])
    negatives = _shuffled(negatives, rng)[: len(positives)]
    if len(negatives) < len(positives):
        what = f"{len(positives)} texts of a class, and {len(negatives)} of others to balance them."
        raise ValueError(explain(what, want="classes of one size, as SAEBench has"))
    both = np.concatenate([positives, negatives])
    order = torch.randperm(len(both), generator=rng).numpy()
    return both[order], (np.arange(len(both)) < len(positives))[order]


def _shuffled(index: np.ndarray, rng: torch.Generator) -> np.ndarray:
    return index[torch.randperm(len(index), generator=rng).numpy()]


def _probe(
    columns: Columns,
    fit: np.ndarray,
    y_fit: np.ndarray,
    rest: np.ndarray,
    y_rest: np.ndarray,
    k: int | None,
    settings: ProbeSettings,
    seed: int,
) -> dict[str, Any]:
    """Scores of logistic regression on the best k columns, or on all of them with an L2 penalty."""
    training = columns[fit]
    chosen = None if k is None else best_columns(training, y_fit, settings.choose)[:k]
    x, x_rest = _dense(training, chosen), _dense(columns[rest], chosen)
    penalty: Penalty = "l2" if k is None else settings.penalty
    y = torch.from_numpy(y_fit)
    C, val_auc = (settings.C, float("nan")) if settings.C is not None else best_C(x, y, penalty, seed)
    fitted = fit_logistic(x, y, penalty=penalty, C=C)
    if settings.C is None and math.isnan(val_auc):  # too few texts to validate
        val_auc = auc_of(fitted.scores(x).numpy(), y_fit)
    indices = [] if chosen is None else chosen.tolist()
    return _scores(fitted.scores(x_rest).numpy(), y_rest) | {"val_auc": val_auc, "C": C, "indices": indices}


def _dense(columns: Columns, chosen: np.ndarray | None) -> Float[Tensor, "texts k"]:
    part = columns if chosen is None else columns[:, chosen]
    return (part if isinstance(part, Tensor) else torch.from_numpy(part.toarray())).double()


def best_columns(columns: Columns, y: np.ndarray, choose: Choose = "mean_difference") -> Int[np.ndarray, " columns"]:
    """Columns by |mean of positives - mean of negatives|, the largest first.

    Args:
        columns: features of the training texts.
        y: which texts are positive.
        choose: "normalized_mean_difference" divides each column by the mean of its |values| that are not 0.

    Example:
        >>> best_columns(torch.tensor([[1.0, 9.0], [0.0, 8.0]]), np.array([True, False]), "mean_difference").tolist()
        [0, 1]
        >>> best_columns(torch.tensor([[0.1, 9.0], [0.0, 8.0]]), np.array([True, False])).tolist()
        [1, 0]
    """
    matrix = columns.double().numpy() if isinstance(columns, Tensor) else columns.astype(np.float64)
    labels = np.stack([y / y.sum(), ~y / (~y).sum()])
    means = np.asarray(labels @ matrix)
    difference = np.abs(means[0] - means[1])
    if choose == "normalized_mean_difference":
        size = np.abs(matrix)
        count = np.asarray((matrix != 0).sum(0)).ravel()
        mean = np.asarray(size.sum(0)).ravel() / (count + 1e-6)
        difference = difference / (mean + 1e-6)
    return np.argsort(-difference, kind="stable")


def best_C(x: Float[Tensor, "texts k"], y: Tensor, penalty: Penalty, seed: int) -> tuple[float, float]:
    """The C of largest mean AUC in validation, of ten from 1e5 to 1e-5, the larger one of equals; and that AUC.

    At most 3 texts: C = 1, nan. Splits as in sae-probes, see `validation_splits`.
    """
    if len(x) <= 3:
        return 1.0, float("nan")
    scores, n = np.zeros(len(_CS)), 0
    for fit, rest in validation_splits(y.numpy(), seed):
        n += 1
        if len(set(y[fit].tolist())) < 2:
            scores += 0.5
            continue
        start: LogisticFit | None = None
        for i in reversed(range(len(_CS))):  # from the strongest penalty on, where most weights are 0
            start = fit_logistic(
                x[fit], y[fit], penalty=penalty, C=float(_CS[i]), start=start if penalty == "l1" else None
            )
            scores[i] += auc_of(start.scores(x[rest]).numpy(), y[rest].numpy())
    means = scores / max(1, n)
    best = int(means.argmax())
    return float(_CS[best]), float(means[best])


def validation_splits(y: np.ndarray, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training and validation texts as sae-probes splits them, where validation has both classes.

    All pairs of up to 12 texts; 6 stratified folds of fewer than 128 (those of scikit-learn); else the last 20 %, at
    most 100.

    Example:
        >>> [[len(part) for part in split] for split in validation_splits(np.arange(200) % 2 == 0, 42)]
        [[160, 40]]
    """
    n, y = len(y), y.astype(int)
    if n <= 12:
        held = [np.array(pair) for pair in itertools.combinations(range(n), 2)]
    elif n < 128:
        held = [(fold == i).nonzero()[0] for fold in [_stratified_folds(y, 6, seed)] for i in range(6)]
    else:
        held = [np.arange(n - min(int(0.2 * n), 100), n)]
    for index in held:
        if len(set(y[index])) == 2:
            yield torch.from_numpy(np.setdiff1d(np.arange(n), index)), torch.from_numpy(index)


def _stratified_folds(y: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Fold of each text: scikit-learn's `StratifiedKFold(n_folds, shuffle=True, random_state=seed)`."""
    rng = np.random.RandomState(seed)
    order = {label: i for i, label in enumerate(dict.fromkeys(y.tolist()))}  # classes by first appearance
    encoded = np.array([order[label] for label in y.tolist()])
    ordered = np.sort(encoded)
    counts = [np.bincount(ordered[i::n_folds], minlength=len(order)) for i in range(n_folds)]
    folds = np.empty(len(y), int)
    for label in range(len(order)):
        of_class = np.arange(n_folds).repeat([count[label] for count in counts])
        rng.shuffle(of_class)
        folds[encoded == label] = of_class
    return folds


def _scores(scores: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """AUC, accuracy, and F1 weighted by class."""
    predicted, f1 = scores > 0, 0.0
    for side in (True, False):
        both, either = (
            int(((predicted == side) & (y == side)).sum()),
            int((predicted == side).sum() + (y == side).sum()),
        )
        f1 += (2 * both / either if either else 0.0) * float((y == side).mean())
    return {"auc": auc_of(scores, y), "accuracy": float((predicted == y).mean()), "f1": f1}


def _adam_probe(
    x: Tensor, y: np.ndarray, x_test: Tensor, y_test: np.ndarray, rng: torch.Generator
) -> dict[str, Union[float, list[int]]]:
    """Test scores of `adam_probe`."""
    _, scores = adam_probe(x, y, x_test, y_test, rng)
    return scores | {"val_auc": float("nan"), "C": float("nan"), "indices": []}


@torch.enable_grad()
def adam_probe(
    x: Float[Tensor, "texts d"],
    y: np.ndarray,
    x_test: Float[Tensor, "test d"],
    y_test: np.ndarray,
    rng: torch.Generator,
    *,
    lr: float = 1e-2,
    epochs: int = 100,
    batch: int = 250,
    patience: int = 10,
    l1: float = 0.0,
) -> tuple[LogisticFit, dict[str, float]]:
    """SAEBench's `train_probe_gpu`, in float32: of AdamW's epochs the one of best accuracy on the *test* texts.

    Args:
        x: training texts.
        y: which are positive.
        x_test: test texts.
        y_test: which are positive.
        rng: for the start and the order.
        lr: learning rate.
        epochs: passes, at most.
        batch: texts per step.
        patience: epochs without a better accuracy after which it stops.
        l1: factor of ||weight||_1.

    Returns:
        The probe, and its scores on the test texts.
    """
    d, x, x_test = x.shape[1], x.float(), x_test.float()
    target, bound = torch.from_numpy(y).float(), 1 / math.sqrt(x.shape[1])
    probe = nn.Linear(d, 1, dtype=torch.float32, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        probe.weight.copy_(torch.empty(1, d).uniform_(-bound, bound, generator=rng))
        probe.bias.copy_(torch.empty(1).uniform_(-bound, bound, generator=rng))
    fit, result = LogisticFit(torch.zeros(d, dtype=torch.float64), 0.0, False), {"auc": 0.5, "accuracy": 0.0, "f1": 0.0}
    optimizer, best, since = torch.optim.AdamW(probe.parameters(), lr=lr), 0.0, 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=rng).split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(probe(x[rows])[:, 0], target[rows])
            if l1:
                loss = loss + l1 * probe.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = _scores(probe(x_test)[:, 0].detach().double().numpy(), y_test)
        since += 1
        if scores["accuracy"] > best:
            best, since, result = scores["accuracy"], 0, scores
            fit = LogisticFit(probe.weight.detach()[0].double(), float(probe.bias.detach()), False)
        if since >= patience:
            break
    return fit, result
