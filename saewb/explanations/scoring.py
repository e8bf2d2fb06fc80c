"""Score explanations: let a judge predict from the words alone where a latent is active.

1. For each explanation and score a `Trial`: requests, and how their answers become figures.
2. With `control`, the same trial with the explanation of another latent: what chance and the judge's habits give.
3. Answers that cannot be read are counted as unanswered and are in no rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor, nn

from saewb import errors
from saewb.data.tokens import token_rows
from saewb.explanations.explaining import announce, check_index
from saewb.explanations.figures import (
    area_figures,
    auc,
    classification_figures,
    correlation_figures,
    plain,
    share_figures,
)
from saewb.explanations.instructions import (
    classification_request,
    embedding_request,
    intruder_request,
    listing_request,
    output_request,
    read_choice,
    read_numbers,
    simulation_request,
)
from saewb.explanations.judge import Answer, Judge, Request
from saewb.explanations.windows import (
    IndexWindows,
    ScoringWindows,
    TextWindows,
    index_sha,
    marked_text,
    marks_of,
    plain_text,
    rng_of,
)
from saewb.features.index import FeatureIndex
from saewb.features.labels import Explanation, ExplanationFile, Explanations
from saewb.features.latent import Context

SCORES = ("detection", "detection_hard", "fuzz", "fuzz_inactive", "intruder", "simulation")
SCORES += ("saebench", "output", "embedding")
_N_INTRUDED = 4  # active windows around an intruder
_N_SIMULATED = 5  # windows of each kind that are simulated
_N_LISTED = 2, 2, 10  # windows of "saebench": the strongest, others by their activation, inactive ones
_N_OUTPUTS = 5  # requests of "output" for each explanation
_N_SETS = 3  # sets of tokens in each
_N_DECILES = 10


@dataclass(frozen=True)
class Trial:
    """Requests of one score of one explanation, and how their answers become figures."""

    requests: tuple[Request, ...]
    """To ask."""
    figures: Callable[[Sequence[Answer]], dict[str, Any]]
    """Figures of the answers, in the order of the requests."""


@dataclass(frozen=True)
class Item:
    """A text that a judge classifies."""

    text: str
    """As it is shown."""
    is_true: bool
    """Whether 1 is the right answer."""
    decile: int = -1
    """Of the activation, 0 for the weakest tenth of the active windows; -1 for a text that is not active."""


def score(
    index: FeatureIndex,
    explanations: Explanations,
    judge: Judge,
    by: Sequence[str] = ("detection", "fuzz"),
    *,
    control: bool = True,
    model: nn.Module | None = None,
    sae: Any = None,
    texts: Any = None,
    n_active: int = 20,
    n_inactive: int = 20,
    window: int = 32,
    per_request: int = 5,
    logprobs: bool = False,
    batch_size: int = 8,
    file: str | Path | None = None,
    budget_tokens: int | None = None,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Explanations:
    """Score explanations: how well a language model predicts from the words alone where the latent is active.

    Windows of text come from held-out `texts`, read once for all latents; without them from the index, if that knows
    every activation (all of its tokens were sampled: up to `coactive_tokens`, 65,536). None of them is in a row of text
    that the judge saw when it explained the latent. Active windows are stratified by activation; in inactive ones the
    latent's activation was computed to be 0 on every token.

    ============== =================================================== ===========================================
    score          question                                            value
    ============== =================================================== ===========================================
    detection      is it active in this text? active against random    balanced accuracy (TPR + TNR) / 2
    detection_hard the same against texts where neighbors are active   the same
    fuzz           are the right tokens marked? in active texts        the same
    fuzz_inactive  the same, wrong marks being in inactive texts       the same
    intruder       which of five texts is not active? no explanation   accuracy; chance is .2
    simulation     the activation, 0 to 10, on each token              Pearson correlation over all tokens
    saebench       in which of 14 texts is it active? 4 are active     share of texts that are right
    output         which of three sets of tokens does it make likelier accuracy; chance is 1/3
    embedding      none: cosine of explanation and text                area under the ROC curve, active or not
    ============== =================================================== ===========================================

    "saebench" has the 2 strongest of the active windows, 2 others drawn by their activation and 10 inactive ones: to
    call none active is right for 10 of 14, its `chance`. "output" needs no text, but the logit effects of the index:
    the tokens that the latent makes likelier, among those of two other latents, 5 times. "embedding" needs a judge with
    embeddings, `saewb.Chat(..., embedding_model=)`, and no answers.

    With log probabilities detection and fuzz have an `auc`, and simulation uses expected values. Detection favors
    broad explanations and fuzz narrow ones: look at both. `control` is the same score with the explanation of another
    latent, the honest zero. Never compare scores of two judges.

    Args:
        index: that the explanations are of.
        explanations: to score; those without a text are passed through.
        judge: the language model, from `saewb.Chat` or `saewb.LocalChat`.
        by: names of scores.
        control: whether to score each text with another latent's explanation too; it doubles the cost.
        model: with `texts`: the model the index is of.
        sae: with `texts`: the SAE the index is of.
        texts: held-out text, whatever `saewb.build_index` takes.
        n_active: active windows of each latent, at most.
        n_inactive: inactive windows of each latent, at most.
        window: tokens in a window of `texts`.
        per_request: texts in a request for detection and fuzz.
        logprobs: ask the endpoint for log probabilities; not all have them.
        batch_size: rows of `texts` run at a time.
        file: JSON lines; each explanation is appended once it is scored. Those that are there with the same scores,
            judge and settings are not asked for again.
        budget_tokens: the run does not start if it may take more tokens, and stops once the judge counts more.
        dry_run: send nothing; print what the run would cost.
        seed: of the windows, their order, wrong marks and the control's explanations.
        progress: whether to show the cost, and progress bars.

    Returns:
        The explanations, each with its `scores`: see `Explanations.to_frame()` and `.summary()`. A score has value,
        low and high (95 % interval: Wilson's, and for a correlation the bootstrap over windows), n, unanswered, and
        control; detection and fuzz also tp, fn, tn, fp, balanced_accuracy, precision, recall, f1 and, for each tenth of
        the active windows by activation, how many of how many were called active.

    Raises:
        ValueError: for an unknown score, "output" for an index without logit effects, "embedding" by a judge without
            embeddings; if only some of model, sae and texts are given; without them, if the index
            does not know every activation; for explanations of another index; for a budget that is too small.
        ConnectionError: if the endpoint refuses or cannot be reached. What is scored so far is in `file`.
        RuntimeError: if `budget_tokens` are used up.

    References:
        Paulo et al. (2024), arXiv:2410.13928 (detection, fuzzing, intruder); Bills et al. (2023), "Language models can
        explain neurons in language models" (simulation); Karvonen et al. (2025), "SAEBench" (arXiv:2503.09532);
        Gur-Arieh et al. (2025), "Enhancing Automated Interpretability with Output-Centric Feature Descriptions"
        (arXiv:2501.08319) (output).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:40]])
        >>> explained = saewb.Explanations.from_labels({748: "people of science", 619: "Latin names"})
        >>> yes = saewb.explanations.Scripted(lambda request: str([1] * request.prompt.count("Text ")))
        >>> scored = score(index, explained, yes, by=["detection"])
        >>> scored.to_frame()[["latent", "balanced_accuracy", "control"]].values.tolist()
        [[748.0, 0.5, 0.5], [619.0, 0.5, 0.5]]
    """
    by = _check(by, {"n_active": n_active, "n_inactive": n_inactive, "window": window, "per_request": per_request})
    _check_able(by, index, judge)
    sha = index_sha(index)
    check_index(explanations, sha, index)
    record_file = None if file is None else ExplanationFile(file)
    ids = _held_out(index, model, sae, texts)
    text_sha = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    setup = _setup_sha(sha, judge.name, control, text_sha, n_active, n_inactive, window, per_request, logprobs, seed)
    named = [record for record in explanations if record.text]
    for record in named:
        index.label(record.latent)  # raises for a latent that does not exist
    scored = _merge_known(named, record_file, setup)
    todo = [n for n, r in enumerate(scored) if any(r.scores.get(name, {}).get("setup") != setup for name in by)]
    trials: dict[tuple[int, str, bool], Trial] = {}
    if todo:
        latents = list(dict.fromkeys(scored[n].latent for n in todo))
        how: dict[str, Any] = {"window": window, "batch_size": batch_size, "seed": seed, "progress": progress}
        source = None if set(by) <= {"output"} else _source(index, latents, model, sae, ids, **how)
        others = _deranged(scored, rng_of(seed, "control")) if control else {}
        for n in todo:
            record = scored[n]
            windows = source and source.windows(record.latent, record.rows, n_active, n_inactive)
            for name in by:
                for is_control in (False, True)[: 1 + (n in others and name != "intruder")]:
                    text = scored[others[n]].text if is_control else record.text
                    rng = rng_of(seed, name, record.latent)  # the same texts in the same order
                    trials[n, name, is_control] = (
                        _output(text, index, record.latent, rng)
                        if name == "output"
                        else _TRIALS[name](text, windows, rng, per_request, logprobs)
                    )
    requests = [request for trial in trials.values() for request in trial.requests]
    if announce(judge, requests, "score", budget_tokens, dry_run, progress):
        return explanations
    pending = {n: [key for key in trials if key[0] == n] for n in todo}
    owner = [key for key, trial in trials.items() for _ in trial.requests]
    answers = [Answer("")] * len(requests)
    first: dict[tuple[int, str, bool], int] = {}
    for position, key in enumerate(owner):
        first.setdefault(key, position)
    left = {n: sum(len(trials[key].requests) for key in keys) for n, keys in pending.items()}

    def finish(n: int) -> None:
        figures = {}
        for key in pending[n]:
            begin, trial = first.get(key, 0), trials[key]
            figures[key] = trial.figures(answers[begin : begin + len(trial.requests)])
        scores = {name: _with_control(figures, n, name, judge.name, setup) for name in by}
        scored[n] = replace(scored[n], scores={**scored[n].scores, **scores})
        if record_file is not None:
            record_file.add(scored[n])

    for n in [n for n in todo if not left[n]]:  # no windows at all
        finish(n)
    with closing(judge.ask(requests, budget_tokens=budget_tokens, progress=progress)) as stream:
        for position, answer in stream:
            answers[position] = answer
            n = owner[position][0]
            left[n] -= 1
            if not left[n]:
                finish(n)
    by_key = {record.key: record for record in scored}
    return Explanations(by_key.get(record.key, record) for record in explanations)


def _check(by: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    by = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    for name in by:
        if name not in SCORES:
            close, want = errors.near(str(name), SCORES), ", ".join(SCORES)
            raise ValueError(errors.explain(f"score got by={name!r}.", near=close, want=want))
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(errors.explain(f"score got {name}={size!r}.", want="a number of 1 or more"))
    return by


def _check_able(by: Sequence[str], index: FeatureIndex, judge: Judge) -> None:
    if "output" in by and ("logits.top" not in index.tensors or len(index) < _N_SETS):
        what = f'"output" needs the logit effects of {_N_SETS} latents or more, which {index!r} does not have.'
        raise ValueError(errors.explain(what, want="another score, or an index of an SAE on the residual stream"))
    if "embedding" in by and not judge.can_embed:
        fix = 'saewb.Chat(..., embedding_model="...")'
        raise ValueError(errors.explain(f'"embedding" needs embeddings, and {judge!r} has none.', fix=fix))


def _source(
    index: FeatureIndex, latents: Sequence[int], model: Any, sae: Any, ids: Tensor | None, *, seed: int, **how: Any
) -> IndexWindows | TextWindows:
    if ids is None:
        return IndexWindows(index, seed)
    return TextWindows(index, latents, model, sae, ids, seed=seed, **how)


def _setup_sha(*setup: Any) -> str:
    return hashlib.sha256(json.dumps(setup).encode()).hexdigest()[:12]


def _merge_known(records: Sequence[Explanation], file: ExplanationFile | None, setup: str) -> list[Explanation]:
    """Explanations with the scores that the file has of them."""
    known = {record.key: record.scores for record in file.records} if file is not None else {}
    merged = []
    for record in records:
        of_file = known.get(record.key, {})
        same = {name: figures for name, figures in of_file.items() if figures.get("setup") == setup}
        merged.append(replace(record, scores={**of_file, **record.scores, **same}))
    return merged


def _held_out(index: FeatureIndex, model: Any, sae: Any, texts: Any) -> Int[Tensor, "rows ctx"] | None:
    """Token ids of the held-out text; None if there is none."""
    given = [name for name, value in (("model", model), ("sae", sae), ("texts", texts)) if value is not None]
    if len(given) % 3:
        what = f"score got {' and '.join(given)} alone."
        raise ValueError(errors.explain(what, want="all of model, sae and texts, or none of them"))
    return token_rows(model, texts, index.info.ctx_len) if given else None


def _deranged(records: Sequence[Explanation], rng: random.Random) -> dict[int, int]:
    """For each explanation another one of another latent; none where there is no other latent."""
    order = list(range(len(records)))
    rng.shuffle(order)
    others = {}
    for place, n in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = next((m for m in following if records[m].latent != records[n].latent), None)
        if other is not None:
            others[n] = other
    return others


def _with_control(
    figures: Mapping[tuple[int, str, bool], dict[str, Any]], n: int, name: str, judge: str, setup: str
) -> dict[str, Any]:
    result, control = figures[n, name, False], figures.get((n, name, True))
    value = math.nan if control is None else control["value"]
    return plain({**result, "control": value, "control_figures": control or {}, "judge": judge, "setup": setup})


# -- trials ----------------------------------------------------------------------------------------------------------


def _decile(rank: int, n: int) -> int:
    return rank * _N_DECILES // n


def _detection(inactive: str) -> Callable[..., Trial]:
    def trial(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
        active, n = windows.active, len(windows.active)
        items = [Item(plain_text(c.tokens), True, _decile(rank, n)) for rank, c in enumerate(active)]
        items += [Item(plain_text(c.tokens), False) for c in getattr(windows, inactive)]
        return _classification(text, items, rng, per_request, logprobs, marked=False)

    return trial


def _fuzz(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """True marks in one half of the active windows; as many marks on silent tokens in the other half."""
    n, items, offset = len(windows.active), [], rng.randrange(2)
    ranked = list(enumerate(windows.active))
    usable = [(rank, c) for rank, c in ranked if len(_silent(c, windows.special)) >= sum(marks_of(c))]
    for place, (rank, context) in enumerate(usable):
        marks, is_true = marks_of(context), (place + offset) % 2 == 0
        if not is_true:
            marks = _random_marks(context, sum(marks), windows, rng)
        items.append(Item(marked_text(context.tokens, marks), is_true, _decile(rank, n) if is_true else -1))
    return _classification(text, items, rng, per_request, logprobs, marked=True)


def _fuzz_inactive(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """True marks in active windows; in inactive ones as many marks as those have on average, on any tokens."""
    n, counts = len(windows.active), [sum(marks_of(c)) for c in windows.active]
    items = [Item(marked_text(c.tokens, marks_of(c)), True, _decile(rank, n)) for rank, c in enumerate(windows.active)]
    mean = math.ceil(sum(counts) / max(1, n))
    items += [Item(marked_text(c.tokens, _random_marks(c, mean, windows, rng)), False) for c in windows.inactive if n]
    return _classification(text, items, rng, per_request, logprobs, marked=True)


def _silent(context: Context, special: frozenset[int]) -> list[int]:
    """Tokens on which the latent is silent, without special ones."""
    pairs = enumerate(zip(context.ids, context.acts, strict=True))
    return [j for j, (i, act) in pairs if act == 0 and i not in special]


def _random_marks(context: Context, n: int, windows: ScoringWindows, rng: random.Random) -> list[bool]:
    """`n` random tokens on which the latent is silent."""
    silent = _silent(context, windows.special)
    chosen = set(rng.sample(silent, min(n, len(silent))))
    return [j in chosen for j in range(len(context.acts))]


def _classification(
    text: str, items: Sequence[Item], rng: random.Random, per_request: int, logprobs: bool, *, marked: bool
) -> Trial:
    items = list(items)
    rng.shuffle(items)
    parts = [items[i : i + per_request] for i in range(0, len(items), per_request)]
    requests = [
        classification_request(text, [item.text for item in part], marked=marked, logprobs=logprobs) for part in parts
    ]

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        counts, unanswered = {(a, b): 0 for a in (True, False) for b in (0, 1)}, 0
        by_decile = [[0, 0] for _ in range(_N_DECILES)]
        probabilities: list[tuple[float, bool]] = []
        for part, answer in zip(parts, answers, strict=True):
            called = read_numbers(answer.text, len(part), 0, 1)
            if called is None:
                unanswered += len(part)
                continue
            expected = expected_numbers(answer, len(part), 0, 1)
            for item, value in zip(part, called, strict=True):
                counts[item.is_true, value] += 1
                if item.decile >= 0:
                    by_decile[item.decile][0] += value
                    by_decile[item.decile][1] += 1
            if expected is not None:
                probabilities += zip(expected, [item.is_true for item in part], strict=True)
        result = classification_figures(counts[True, 1], counts[True, 0], counts[False, 0], counts[False, 1])
        result |= {"unanswered": unanswered, "recall_by_decile": by_decile}
        return result | ({"auc": auc(*zip(*probabilities, strict=True))} if probabilities else {})

    return Trial(tuple(requests), figures)


def _intruder(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """Groups of active windows with their marks, and one inactive window with as many marks on any tokens."""
    active, inactive, groups = list(windows.active), list(windows.inactive), []
    rng.shuffle(active)
    for group in (active[i : i + _N_INTRUDED] for i in range(0, len(active), _N_INTRUDED)):
        if len(group) == _N_INTRUDED and inactive:
            marks = [marks_of(c) for c in group]
            odd, n = inactive.pop(), math.ceil(sum(map(sum, marks)) / _N_INTRUDED)
            shown = [marked_text(c.tokens, m) for c, m in zip(group, marks, strict=True)]
            place = rng.randrange(_N_INTRUDED + 1)
            shown.insert(place, marked_text(odd.tokens, _random_marks(odd, n, windows, rng)))
            groups.append((shown, place + 1))

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        read = [read_numbers(answer.text, 1, 1, _N_INTRUDED + 1) for answer in answers]
        pairs = [(got[0], place) for got, (_, place) in zip(read, groups, strict=True) if got is not None]
        right, n = sum(got == place for got, place in pairs), len(pairs)
        return share_figures(right, n, 1 / (_N_INTRUDED + 1)) | {"unanswered": len(read) - n}

    return Trial(tuple(intruder_request(shown) for shown, _ in groups), figures)


def _simulation(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """Active windows spread over the range of activations, and as many inactive ones."""
    n = min(_N_SIMULATED, len(windows.active))
    active = [windows.active[(2 * j + 1) * len(windows.active) // (2 * n)] for j in range(n)]
    shown = [*active, *windows.inactive[:_N_SIMULATED]] if n else []

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        true, predicted = [], []
        for context, answer in zip(shown, answers, strict=True):
            size = len(context.acts)
            values: Sequence[float] | None = read_numbers(answer.text, size, 0, 10)
            if values is not None:
                expected = expected_numbers(answer, size, 0, 10)
                true.append([abs(act) for act in context.acts])
                predicted.append(values if expected is None else expected)
        result = correlation_figures(true, predicted, seed=0)
        return result | {"unanswered": len(shown) - len(true)}

    return Trial(tuple(simulation_request(text, c.tokens, logprobs) for c in shown), figures)


def _saebench(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """The strongest windows, others drawn by their activation, and inactive ones, in one request."""
    n_top, n_drawn, n_inactive = _N_LISTED
    rest, active = list(windows.active[:-n_top]), list(windows.active[-n_top:])
    for _ in range(min(n_drawn, len(rest))):
        (j,) = rng.choices(range(len(rest)), [abs(context.value) for context in rest])
        active.append(rest.pop(j))
    inactive = windows.inactive[:n_inactive]
    items = [*((c, True) for c in active), *((c, False) for c in inactive)] if active and inactive else []
    rng.shuffle(items)
    requests = (listing_request(text, [plain_text(c.tokens) for c, _ in items]),) if items else ()

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        read = [read_choice(answer.text, len(items)) for answer in answers]
        called = next((set(numbers) for numbers in read if numbers is not None), None)
        right = 0 if called is None else sum((n in called) == is_true for n, (_, is_true) in enumerate(items, 1))
        n = 0 if called is None else len(items)
        chance = len(inactive) / len(items) if items else math.nan
        return share_figures(right, n, chance) | {"unanswered": len(items) - n}

    return Trial(requests, figures)


def _output(text: str, index: FeatureIndex, latent: int, rng: random.Random) -> Trial:
    """The tokens that a latent makes likelier, among those of other latents."""
    requests, places = [], []
    for _ in range(_N_OUTPUTS):
        others = rng.sample([i for i in range(len(index)) if i != latent], _N_SETS - 1)
        place = rng.randrange(_N_SETS)
        shown = [*others[:place], latent, *others[place:]]
        sets = [[logit.token for logit in index.latent(i).logits_top] for i in shown]
        requests.append(output_request(text, sets))
        places.append(place + 1)

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        read = [read_numbers(answer.text, 1, 1, _N_SETS) for answer in answers]
        pairs = [(got[0], place) for got, place in zip(read, places, strict=True) if got is not None]
        right, n = sum(got == place for got, place in pairs), len(pairs)
        return share_figures(right, n, 1 / _N_SETS) | {"unanswered": len(read) - n}

    return Trial(tuple(requests), figures)


def _embedding(text: str, windows: ScoringWindows, rng: random.Random, per_request: int, logprobs: bool) -> Trial:
    """All windows, and how near their vectors are to that of the explanation."""
    shown = [*windows.active, *windows.inactive]
    is_active = [True] * len(windows.active) + [False] * len(windows.inactive)
    requests = (embedding_request(text, [plain_text(c.tokens) for c in shown]),) if shown else ()

    def figures(answers: Sequence[Answer]) -> dict[str, Any]:
        vectors = next((np.asarray(a.vectors, dtype=float) for a in answers if len(a.vectors) == len(shown) + 1), None)
        if vectors is None:
            return area_figures([], []) | {"unanswered": len(shown)}
        norms = np.linalg.norm(vectors, axis=1)
        cosines = vectors[1:] @ vectors[0] / np.maximum(norms[1:] * norms[0], 1e-30)
        return area_figures(cosines.tolist(), is_active) | {"unanswered": 0}

    return Trial(requests, figures)


_TRIALS: dict[str, Callable[..., Trial]] = {
    "detection": _detection("inactive"),
    "detection_hard": _detection("hard"),
    "fuzz": _fuzz,
    "fuzz_inactive": _fuzz_inactive,
    "intruder": _intruder,
    "simulation": _simulation,
    "saebench": _saebench,
    "embedding": _embedding,
}


def expected_numbers(answer: Answer, n: int, low: int, high: int) -> list[float] | None:
    """Expected value of each number of the first list of an answer, by the log probabilities of its token.

        E = sum_v v p(v) / sum_v p(v),  over the likeliest tokens that are a number from `low` to `high`

    For 0 and 1 that is the probability of 1. None without log probabilities, or where a number is no token of its own.
    """
    match = re.search(r"\[.*?\]", answer.text, re.DOTALL)
    if match is None or "".join(token.text for token in answer.tokens) != answer.text:
        return None
    numbers = [m.span() for m in re.finditer(r"\d+", match[0])]
    ends, position, values = {}, 0, []
    for token in answer.tokens:
        begin = position + len(token.text) - len(token.text.lstrip(" [\n"))
        position += len(token.text)
        ends[begin, begin + len(token.text.strip(" [],\n"))] = token
    for begin, end in numbers:
        token = ends.get((begin + match.start(), end + match.start()))
        if token is None:
            return None
        mass = {}
        for text, logprob in token.top:
            if re.fullmatch(r"\d{1,2}", stripped := text.strip(" [],\n")) and low <= int(stripped) <= high:
                mass[int(stripped)] = mass.get(int(stripped), 0.0) + math.exp(logprob)
        if not sum(mass.values()):
            return None
        values.append(sum(v * p for v, p in mass.items()) / sum(mass.values()))
    return values if len(values) == n else None
