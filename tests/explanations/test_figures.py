"""The arithmetic of scores: intervals, areas, correlations; and how windows are written down and answers read."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saewb.explanations.figures import (
    area_figures,
    auc,
    classification_figures,
    correlation_figures,
    plain,
    share_figures,
    wilson,
)
from saewb.explanations.instructions import read_choice, read_explanation, read_numbers
from saewb.explanations.windows import levels_of, marked_text, marks_of, plain_text
from saewb.features.latent import Context


@given(k=st.integers(0, 60), more=st.integers(0, 60))
def test_wilsons_interval_holds_the_rates_that_the_test_does_not_refuse(k, more):
    n = k + more
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    if n == 0:
        return
    for p in (low, high):  # its ends are where (p_hat - p) / sqrt(p (1 - p) / n) is 1.96
        if 0 < p < 1:
            assert abs(k / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(1.959964, abs=1e-5)


def test_a_published_interval():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), table I


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30))
def test_the_area_is_the_share_of_pairs_in_order(items):
    p, truth = [a / 9 for a, _ in items], [t for _, t in items]
    pairs = [(a > b) + (a == b) / 2 for a, x in zip(p, truth) if x for b, y in zip(p, truth) if not y]  # noqa: B905
    value = auc(p, truth)
    assert value == pytest.approx(sum(pairs) / len(pairs)) if pairs else math.isnan(value)


def test_without_both_kinds_there_is_no_accuracy():
    for confusion in ((3, 1, 0, 0), (0, 0, 3, 1), (0, 0, 0, 0)):
        figures = classification_figures(*confusion)
        assert math.isnan(figures["value"])
    assert plain({"a": math.nan, "b": {"c": math.nan, "d": 1}}) == {"a": None, "b": {"c": None, "d": 1}}


def test_the_interval_of_an_accuracy_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        tp, tn = rng.binomial(20, 0.9), rng.binomial(20, 0.6)
        figures = classification_figures(int(tp), 20 - int(tp), int(tn), 20 - int(tn))
        hits += figures["low"] <= 0.75 <= figures["high"]
    assert 0.93 < hits / 2000 < 0.985


def test_correlations_that_are_known():
    rng = np.random.default_rng(0)
    x = rng.random((5, 9))
    assert correlation_figures(x, 3 * x + 2, 0)["value"] == pytest.approx(1)
    assert correlation_figures(x, -x, 0)["value"] == pytest.approx(-1)
    assert math.isnan(correlation_figures(x, np.full((5, 9), 0.1), 0)["value"])
    assert math.isnan(correlation_figures([], [], 0)["value"])
    y = rng.random((5, 9))
    assert correlation_figures(x, y, 0)["value"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert correlation_figures(x, y, 0) == correlation_figures(x, y, 0)


TEXTS = st.lists(st.text(st.sampled_from("ab <>\n\u2028\x85\t"), max_size=5), min_size=1, max_size=8)


@given(TEXTS, st.randoms())
def test_marks_are_those_that_are_meant_and_all_is_one_line(tokens, rng):
    marks = [rng.random() < 0.5 for _ in tokens]
    text = marked_text(tokens, marks)
    assert len(text.splitlines()) <= 1
    n_runs = sum(mark and not (j and marks[j - 1]) for j, mark in enumerate(marks))
    assert text.count("<<") == text.count(">>") == n_runs
    assert "<<<" not in text
    assert ">>>" not in text
    assert "<<" not in plain_text(tokens)
    inside = "".join(part.partition(">>")[0] for part in text.split("<<")[1:])
    meant = "".join(token for token, mark in zip(tokens, marks, strict=True) if mark)
    assert "".join(inside.split()).replace("\u21b5", "").replace("\u21e5", "") == "".join(meant.split())


def test_levels_and_marks_of_activations():
    assert levels_of([0, 0.001, 1, 9.99, 10, -5], 10) == [0, 1, 1, 10, 10, 5]
    assert levels_of([0.3, 0.1 + 0.2], 1) == [3, 3]
    assert levels_of([0, 0], 0) == [0, 0]
    context = Context(("a", "b", "c", "d"), (1, 2, 3, 4), (10.0, 3.0, 3.1, 0.0), 0, 0, 0)
    assert marks_of(context) == [True, False, True, False]
    assert marks_of(Context(("a",), (1,), (0.0,), 0, 0, 0)) == [False]


@given(st.text())
def test_any_answer_is_read_or_not(answer):
    assert isinstance(read_explanation(answer), str)
    for n in (1, 3):
        numbers = read_numbers(answer, n, 0, 1)
        assert numbers is None or (len(numbers) == n and set(numbers) <= {0, 1})


@given(st.lists(st.integers(0, 10), max_size=9), st.text(st.characters(exclude_characters="["), max_size=20))
def test_a_list_is_read_whatever_stands_around_it(numbers, around):
    assert read_numbers(around + json.dumps(numbers) + around, len(numbers), 0, 10) == numbers


def test_interval_of_an_area():
    """The published example of Hanley and McNeil (1982): A = .893 of 51 abnormal and 58 normal, se = .032."""
    scores = [1] * 33 + [2] * 6 + [3] * 6 + [4] * 11 + [5] * 2, [1] * 3 + [2] * 2 + [3] * 2 + [4] * 11 + [5] * 33
    figures = area_figures([*scores[0], *scores[1]], [False] * 58 + [True] * 51)
    assert figures["value"] == pytest.approx(0.893, abs=5e-4)
    assert (figures["high"] - figures["low"]) / (2 * 1.96) == pytest.approx(0.032, abs=1e-3)
    perfect = area_figures([1, 2, 3], [False, True, True])
    assert (perfect["low"], perfect["value"], perfect["high"]) == (1, 1, 1)
    assert all(math.isnan(area_figures([1.0], [True])[name]) for name in ("value", "low", "high"))


def test_share_of_right_answers():
    figures = share_figures(8, 10, 0.2)
    assert (figures["value"], figures["n"], figures["chance"]) == (0.8, 10, 0.2)
    assert (figures["low"], figures["high"]) == wilson(8, 10)
    assert math.isnan(share_figures(0, 0, 0.2)["value"])


@pytest.mark.parametrize(
    ("answer", "want"),
    [("[2, 3]", [2, 3]), ("[]", []), ("so [ ]", []), ("[2, 2]", None), ("[0]", None), ("[5]", None), ("[1.0]", None)],
)
def test_a_choice_is_of_different_numbers(answer, want):
    assert read_choice(answer, 4) == want
