"""Explain latents of an index with a language model."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from saewb import errors
from saewb._indices import indices_of
from saewb.explanations.instructions import METHODS, explaining_request, read_explanation
from saewb.explanations.judge import Judge, Request
from saewb.explanations.windows import IndexWindows, explaining_contexts, index_sha
from saewb.features.index import FeatureIndex
from saewb.features.labels import Explanation, ExplanationFile, Explanations

_N_LATENTS = 50  # explained by default
_N_SILENT = 5  # of "contrastive"


def explain(
    index: FeatureIndex,
    judge: Judge,
    latents: Sequence[int] | Tensor | None = None,
    method: str = "max_act_logits",
    *,
    n_examples: int = 20,
    reasoning: bool = False,
    file: str | Path | None = None,
    budget_tokens: int | None = None,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Explanations:
    """Let a language model explain latents, by one request for each.

    The judge sees every other context of a latent; `saewb.score` tests the explanation on other rows of text. It does
    not matter in what order answers come, or how often the run is interrupted: answers are cached by the judge, and
    each explanation is appended to `file` as it comes.

    Methods: "max_act_logits" (the strongest tokens, the tokens after them, the likelier tokens and five contexts; 1 to
    6 words); "general" (the same; 5 to 20 words); "examples" (contexts from all parts of the latent's range, marked,
    with activations 0 to 10); "contrastive" (the strongest contexts, and contexts of its neighbors in which it is
    silent; for an index that knows every activation).

    Args:
        index: whose latents are to be explained.
        judge: the language model, from `saewb.Chat` or `saewb.LocalChat`.
        latents: indices, or a mask of all; None means the first 50 of `index.ranking()`.
        method: one of the above.
        n_examples: contexts that the judge sees, at most.
        reasoning: let the judge reason before it answers: dearer, sometimes better.
        file: JSON lines; explanations of the same index and requests in it are not asked for again.
        budget_tokens: the run does not start if it may take more tokens, and stops once the judge counts more.
        dry_run: send nothing; print what the run would cost.
        seed: of the contexts in which it is silent.
        progress: whether to show the cost, and a progress bar.

    Returns:
        Explanations, with a text of "" for each latent of which the judge's answer held none (`unanswered`); all of
        `file`, and the new ones.

    Raises:
        ValueError: for an unknown method, a latent that does not exist or is never active, a budget that is too small;
            if `file` has explanations of another index.
        ConnectionError: if the endpoint refuses or cannot be reached. Explanations so far are in `file`.
        RuntimeError: if `budget_tokens` are used up.

    References:
        Paulo et al. (2024), "Automatically Interpreting Millions of Features in Large Language Models"
        (arXiv:2410.13928), for "examples" and "contrastive"; Neuronpedia's np_max-act-logits for the others.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:20]])
        >>> judge = saewb.explanations.Scripted(lambda request: "[EXPLANATION]: people of science")
        >>> explained = explain(index, judge, [748])
        >>> explained.labels(), index.with_labels(explained).label(748)
        ({748: 'people of science'}, 'people of science')
    """
    if method not in METHODS:
        close, want = errors.near(method, METHODS), ", ".join(METHODS)
        raise ValueError(errors.explain(f"explain got method={method!r}.", near=close, want=want))
    if type(n_examples) is not int or n_examples < 1:
        raise ValueError(errors.explain(f"explain got n_examples={n_examples!r}.", want="a number of 1 or more"))
    some = index.ranking(_N_LATENTS) if latents is None else latents
    chosen = indices_of(some, "latents", len(index), of=index).tolist()
    sha, record_file = index_sha(index), None if file is None else ExplanationFile(file)
    known = Explanations() if record_file is None else record_file.records
    check_index(known, sha, index)
    others = IndexWindows(index, seed) if method == "contrastive" else None
    planned = [_plan(index, latent, method, n_examples, reasoning, others) for latent in chosen]
    blank = [
        Explanation(latent, "", method, judge.name, rows, request.sha, sha)
        for latent, (request, rows) in zip(chosen, planned, strict=True)
    ]
    done = {record.key for record in known}
    new = [position for position, record in enumerate(blank) if record.key not in done]
    requests = [planned[position][0] for position in new]
    if announce(judge, requests, "explain", budget_tokens, dry_run, progress):
        return known
    records: list[Explanation] = []
    with closing(judge.ask(requests, budget_tokens=budget_tokens, progress=progress)) as answers:
        for position, answer in answers:
            values = vars(blank[new[position]]) | {"text": read_explanation(answer.text), "time": now()}
            records.append(Explanation(**values))
            if record_file is not None:
                record_file.add(records[-1])
    place = {latent: n for n, latent in enumerate(chosen)}
    return known + Explanations(sorted(records, key=lambda record: place[record.latent]))


def _plan(
    index: FeatureIndex, latent: int, method: str, n: int, reasoning: bool, others: IndexWindows | None
) -> tuple[Request, tuple[int, ...]]:
    """The request about a latent, and the rows of text that are in it."""
    page = index.latent(latent)
    if not page.top:
        raise ValueError(
            errors.explain(
                f"{index!r} has no text in which latent {latent} is active.",
                want="latents that are",
                fix="latents=index.table().query('n_active > 0').index",
            )
        )
    contexts = explaining_contexts(page, n)
    silent = () if others is None else others.windows(latent, (), 1, _N_SILENT).hard
    rows = sorted({context.row for context in (*contexts, *silent)})
    return explaining_request(page, contexts, silent, method, reasoning), tuple(rows)


def check_index(explanations: Explanations, sha: str, index: FeatureIndex) -> None:
    """Raise a ValueError if one of these is of another index."""
    if others := [record.latent for record in explanations if record.index_sha not in ("", sha)]:
        what = f"there are explanations of another index than {index!r}: of latents {others[:5]}."
        raise ValueError(errors.explain(what, want="those of this index, or another file"))


def announce(
    judge: Judge, requests: Sequence[Request], what: str, budget_tokens: int | None, dry_run: bool, progress: bool
) -> bool:
    """Print what a run costs, if it is to, and check the budget; whether that is all."""
    if budget_tokens is not None or dry_run or progress:
        cost = judge.cost(requests)
        if dry_run or progress:
            print(f"{what}, {judge!r}: {cost!r}")
        if not dry_run:
            cost.check_budget(budget_tokens, what)
    return dry_run


def now() -> str:
    """UTC time, ISO 8601, in seconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
