"""Explanations as records and in files, and the label of a latent: its explanation, else its strongest token."""

import json
import os
import re

import numpy as np
import pytest
from helpers import tiny_models

import saewb
from saewb.features import build_index
from saewb.features.labels import Explanation, ExplanationFile, Explanations


@pytest.fixture(scope="module")
def index():
    return build_index(tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(8, 8))


SCORED = Explanation(
    3, "ünique\nwords", "examples", "judge", (1, 2), "ab", "cd", "2026-01-01", {"fuzz": {"value": 0.5}}
)


def test_a_file_gives_back_its_records(tmp_path):
    records = Explanations([SCORED, Explanation(3, "", "examples", "judge", prompt_sha="x"), Explanation(9, "seas")])
    path = records.save(tmp_path / "new" / "explanations.jsonl")
    assert len(path.read_text().splitlines()) == 3
    assert Explanations.load(path) == records
    assert records.unanswered == [3]
    assert records.labels() == {3: "ünique\nwords", 9: "seas"}
    assert records[:1] + records[1:] == records
    assert "unanswered" in repr(records)
    assert "ünique" in records._repr_html_()
    assert "<td" in Explanations([Explanation(1, "<script>")])._repr_html_()
    assert "<script>" not in Explanations([Explanation(1, "<script>")])._repr_html_()


def test_a_line_that_a_kill_cut_off_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "explanations.jsonl"
    file = ExplanationFile(path)
    file.add(Explanation(1, "first"))
    file.add(SCORED)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert [record.latent for record in Explanations.load(path)] == [1]
    again = ExplanationFile(path)
    assert [record.latent for record in again.records] == [1]
    again.add(SCORED)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"latent": 1}',
        '{"latent": -1, "text": ""}',
        '{"latent": true, "text": ""}',
        '{"latent": 1, "text": 3}',
        '{"latent": 1, "text": "", "rows": [1.5]}',
        '{"latent": 1, "text": "", "scores": {"fuzz": 3}}',
        '{"latent": 1, "text": "", "more": 3}',
        "[" * 10_000,
    ],
)
def test_a_line_that_is_no_explanation(line, tmp_path):
    path = tmp_path / "explanations.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(saewb.FormatError, match="is no explanation"):
        Explanations.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        Explanations.load(tmp_path / "x.jsonl")


def test_of_several_explanations_the_last_or_the_best_is_the_label():
    def scored(text, value):
        return Explanation(1, text, scores={"detection": {"value": value}})

    found = Explanations([scored("good", 0.9), scored("bad", 0.6), scored("unknown", float("nan"))])
    assert found.labels() == {1: "unknown"}
    assert found.labels(by="detection") == {1: "good"}
    table = found.to_frame()
    assert table.score.tolist() == ["detection"] * 3
    assert table.value.tolist()[:2] == [0.9, 0.6]
    assert Explanations([Explanation(1, "x")]).to_frame().value.isna().all()


def test_a_later_record_replaces_an_earlier_one_of_the_same_request():
    rescored = Explanation(**{**SCORED.__dict__, "scores": {}})
    assert list(Explanations([SCORED, Explanation(4, "x"), rescored])) == [rescored, Explanation(4, "x")]


def test_without_an_explanation_the_label_is_the_strongest_token(index):
    for latent in index:
        if latent.top:
            assert index.label(latent.index) == latent.label == latent.top[0].token.strip()
            assert not latent.is_explained
        else:
            assert index.label(latent.index) == ""
    assert index.label_texts([3, 3, 1]) == [index.label(3), index.label(3), index.label(1)]
    assert index.table().label.tolist() == [latent.label for latent in index]


def test_labels_are_everywhere_and_saved_with_the_index(index, tmp_path):
    named = index.with_labels(Explanations([Explanation(2, " who\ndid  it ")]))
    assert (named.label(2), named.latent(2).label, named.latent(2).is_explained) == ("who did it",) * 2 + (True,)
    assert index.label(2) != "who did it"
    neighbors = [
        x for latent in named for x in (*latent.nearest_by_decoder, *latent.nearest_by_encoder, *latent.coactive)
    ]
    assert neighbors
    assert all(x.label == named.label(x.latent) for x in neighbors)
    assert "who did it" in {x.label for x in neighbors}
    again = saewb.load_index(named.save(tmp_path / "i"))
    assert again.labels == {2: "who did it"}
    assert again.latent(2) == named.latent(2)
    assert "who did it" in named.save_html(tmp_path / "page.html").read_text()
    assert "labels" not in json.loads((index.save(tmp_path / "j") / "index.json").read_text())
    assert again.with_labels({2: "", 3: "other"}).labels == {3: "other"}
    assert Explanations.from_labels(again.labels).labels() == {2: "who did it"}


def test_search_by_label_comes_first(index):
    named = index.with_labels({7: "names of Rivers", 5: "river banks"})
    assert named.search("river").index.tolist()[:2] == [5, 7]
    assert named.search("rivers names").index.tolist() == [7]
    assert named.search(re.compile("^river")).index.tolist() == [5]
    assert named.search("river").label.tolist() == ["river banks", "names of Rivers"]
    assert (named.search(5).label == "").all()


def test_an_extended_or_merged_index_keeps_its_labels(index):
    model, sae = tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post")
    named = index.with_labels({2: "two"})
    more = tiny_models.tokens(4, 8, seed=5)
    assert saewb.build_index(model, sae, more, extend=named).labels == {2: "two"}
    second = saewb.build_index(model, sae, more, first_row=8).with_labels({2: "other", 3: "three"})
    assert named.merge(second).labels == {2: "two", 3: "three"}


def test_labels_that_are_none(index, tmp_path):
    for wrong, error in (({99: "x"}, ValueError), ({1: 3}, TypeError), ("x", TypeError), ({1: "x" * 2001}, ValueError)):
        with pytest.raises(error, match="label|latent"):
            index.with_labels(wrong)
    folder = index.with_labels({2: "two"}).save(tmp_path / "i")
    file = folder / "index.json"
    for damage in ('{"2": 3}', '{"x": "y"}', '{"99": "x"}', "[3]"):
        os.chmod(file, 0o644)
        file.write_text(file.read_text().replace('{"2": "two"}', damage))
        with pytest.raises(saewb.FormatError, match="index.json"):
            saewb.load_index(folder)
        file.write_text(file.read_text().replace(damage, '{"2": "two"}'))


def test_search_by_bm25():
    """The published formula, with k1 = 1.5 and b = .75, in numpy."""
    texts = ["names of rivers", "rivers, rivers and lakes of the north", "verbs", ""]
    found = Explanations(Explanation(i, text) for i, text in enumerate(texts))
    table = found.search("Rivers of NORTH or south")
    words = [text.replace(",", "").split() for text in texts]
    mean, expected = np.mean([len(w) for w in words]), {}
    for i, w in enumerate(words):
        score = 0.0
        for term in ("rivers", "of", "north", "or", "south"):
            n, f = sum(term in other for other in words), w.count(term)
            idf = np.log(1 + (4 - n + 0.5) / (n + 0.5))
            score += idf * f * 2.5 / (f + 1.5 * (1 - 0.75 + 0.75 * len(w) / mean)) if w else 0
        expected[i] = score
    assert table.latent.tolist() == sorted((0, 1), key=lambda i: -expected[i])
    np.testing.assert_allclose(table.bm25, [expected[i] for i in table.latent], rtol=1e-12)
    assert len(found.search("rivers", n=1)) == 1
    assert found.search("nothing").empty
    with pytest.raises(ValueError, match="a word"):
        found.search(" ,")
