"""Labels of latents in every panel: an explanation where there is one, else the strongest token."""

import torch
from helpers import panel_driver
from saewb_widgets import CorrelationPanel, FeatureBrowser, PromptExplorer, SteeringPanel, SuperpositionPanel

import saewb

NAME = "people <of> science"


def named():
    return panel_driver.index().with_labels({748: NAME})


def test_notes_are_labels(tmp_path):
    index = panel_driver.index().with_labels({9: "given"})
    panel = FeatureBrowser(index, notes_file=tmp_path / "notes.json", selected=748)
    assert (panel.page["label"], panel.page["explained"]) == (index.label(748), False)
    panel.note(748, NAME)
    assert (panel.page["label"], panel.page["explained"]) == (NAME, True)
    assert panel.index.labels == {748: NAME, 9: "given"}
    panel.query = "of> science"
    assert panel.latents[0] == 748
    assert panel.rows["rows"][0]["label"] == NAME
    assert "people &lt;of&gt; science" in panel.static_html()
    assert NAME.replace("<", "\\u003c") in panel.save_html(tmp_path / "page.html").read_text()
    again = FeatureBrowser(index, notes_file=tmp_path / "notes.json")
    assert again.index.label(748) == NAME
    panel.query = ""
    panel.notes = {9: "mine"}
    assert panel.index.labels == {9: "mine"}
    panel.note(9, "")
    assert panel.index.labels == {9: "given"}
    assert "label" not in panel._rows(748)
    assert index.labels == {9: "given"}


def test_each_latent_of_a_tried_prompt_has_its_label():
    panel = FeatureBrowser(named(), *panel_driver.embedded(), prompt="Marie Curie was a Polish physicist")
    assert set(panel.tried["labels"]) == {str(i) for i, _ in panel.tried["latents"]}
    for latent, label in panel.tried["labels"].items():
        assert label == panel.index.label(int(latent))


def test_pairs_of_a_correlation_have_labels():
    index = named()
    panel = CorrelationPanel(index)
    panel.pair = (748, 9)
    row, column = panel.page["sides"]
    assert (row["label"], column["label"]) == (NAME, index.label(9))
    assert all(name == index.label(j) for j, _, name in row["near"])
    assert all((a, b) == (index.label(i), index.label(j)) for i, j, _, a, b in panel.figures["pairs"])
    assert index.label(panel.figures["pairs"][0][0]) in panel.static_html()
    bare = CorrelationPanel(saewb.random_low_rank_correlation(30, 5))
    assert {(a, b) for *_, a, b in bare.figures["pairs"]} == {("", "")}


def test_directions_have_labels_where_there_is_an_index():
    index, sae = named(), panel_driver.embedded()[1]
    panel = SuperpositionPanel(sae, index=index, selected=748)
    assert panel.page["label"] == NAME
    assert all(name == index.label(j) for j, _, name in panel.page["neighbors"])
    assert all((a, b) == (index.label(i), index.label(j)) for i, _, j, _, a, b in panel.rows["rows"])
    assert "Neighbors of 748 people &lt;of&gt; science" in panel.static_html()
    bare = SuperpositionPanel(torch.eye(4))
    assert bare.page["label"] == ""
    assert {name for *_, name in bare.page["neighbors"]} == {""}


def test_steered_latents_have_labels():
    panel = SteeringPanel(*panel_driver.embedded(), named(), latents={748: 8.0, 9: 8.0})
    assert panel.cards[0]["label"] == NAME
    assert panel.cards[1]["label"].split(", ")[0] == named().label(9)
    assert "people &lt;of&gt; science" in panel.static_html()
    panel.query = "science people"
    assert panel.results["rows"][0][1] == 748
    panel.stop()


def test_latents_of_a_prompt_have_labels():
    panel = PromptExplorer(*panel_driver.embedded(), named(), prompt="Marie Curie was a Polish physicist")
    hints = {row["latent"]: row["hint"] for row in panel.listing["rows"]}
    assert hints
    assert all(("label" in hint) == (latent == 748) for latent, hint in hints.items())
    panel.selected = 748
    assert panel.page["label"] == NAME
    panel.stop()
