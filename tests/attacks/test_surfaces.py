"""Hostile tokens, names, labels and paths in everything that shows HTML or gives code: nothing of them runs.

A few with the other tests; all: `pytest -m "attack or not attack" tests/attacks/test_surfaces.py`.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from helpers import tiny_models
from saewb_widgets import (
    CataloguePicker,
    FeatureBrowser,
    PromptExplorer,
    SteeringPanel,
    SuperpositionPanel,
    TrainingPanel,
)

import saewb
from saewb._files import finish_replacing
from saewb.features import neuronpedia
from saewb.features.token_texts import TokenTexts
from saewb.pretrained.share import model_card
from saewb.sae.sae import SAE, SAEConfig
from saewb.training.code_export import train_code
from saewb.training.config import RunSpec

AT = "blocks.1.hook_resid_post"
HOSTILE = (
    "</script><script>evil()</script>",
    "\"'><img src=x onerror=evil()>",
    "x\nevil()\r\n'; __import__('os').system('x'); '```{{ evil() }}",
    "\"'><svg onload=evil()>",
    "x\nevil()",
    "x\r\nevil()\n#",
    "x\u2028evil()\x85evil()\x0cevil()",
    "'''\nevil()\n'''",
    '"""\nevil()\n"""',
    "\\' + evil() + '",
    "{{ evil() }} {% for x in evil() %}",
    "${evil()} `evil()`",
    "```\nevil()\n```",
    "'; __import__('os').system('x'); '",
    "javascript:evil()",
    "<!--<script>",
    "]]></style><style>*{background:url(//evil)}",
    "\x00\x1b[31m\ufffd",
)


_FEW = 3  # with the other tests
TEXTS = [pytest.param(text, marks=[pytest.mark.attack] * (i >= _FEW), id=str(i)) for i, text in enumerate(HOSTILE)]


class _Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def check_html(text: str, plain: str) -> None:
    """The page has the kinds of elements and as many scripts as that of plain texts, and nothing that reacts."""
    page, usual = _Page(text), _Page(plain)
    assert len(page.scripts) == len(usual.scripts)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in usual.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "formaction", "srcdoc"):
            assert "javascript:" not in (attributes.get(name) or "").lower(), (tag, attributes)


def check_code(code: str, *literals: str) -> None:
    """The code parses, calls nothing hostile, and has these texts as they are."""
    tree = ast.parse(code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"evil", "__import__"}, code
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for literal in literals:
        assert literal in texts, code


@pytest.fixture(scope="module")
def index():
    tokens = tiny_models.tokens(8, 12)
    return saewb.build_index(tiny_models.bridge(), tiny_models.sae(AT), tokens, n_top=3)


def hostile_index(index, text):
    strings = {i: f"{text}{i}" for i in range(tiny_models.VOCAB)}
    info = replace(index.info, model=text, hook=text, hook_out=text, sae=text)
    return replace(index, info=info, token_texts=TokenTexts(strings))


@pytest.mark.parametrize("text", TEXTS)
def test_the_page_of_an_index(text, index, tmp_path):
    plain = index.save_html(tmp_path / "plain.html", [0, 1, 2]).read_text()
    page = hostile_index(index, text).save_html(tmp_path / "page.html", [0, 1, 2], title=text).read_text()
    check_html(page, plain)
    data = [json.loads(script) for script in _Page(page).scripts if script.lstrip().startswith("{")]
    assert any(text in word for word in data[0]["words"])  # they reach the page as they are, as data
    assert "evil()</script" not in page


@pytest.mark.parametrize("text", TEXTS)
def test_a_feature_browser(text, index, tmp_path):
    panel, plain = FeatureBrowser(hostile_index(index, text)), FeatureBrowser(index)
    panel.query = text
    panel.note(3, text)
    plain.note(3, "plain")
    check_html(panel.static_html(), plain.static_html())
    check_html(panel._repr_html_() if hasattr(panel, "_repr_html_") else "", plain.static_html())
    check_code(panel.code(), text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_training(text):
    spec = RunSpec.from_options(
        {"a": saewb.Trainee(saewb.TopK(16, k=2), read=text, write=text + "2")},
        n_tokens=8192,
        compile=text,
        positions=slice(1, None),
        autocast=torch.bfloat16,
    )
    check_code(train_code(replace(spec, model=text), folder=text, held_out=True), text, text + "2")
    check_code(saewb.training_code(saewb.TopK(16, k=2), n_tokens=8192, hook=text, folder=text), text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_run(text, tmp_path):
    x = {text: torch.randn(64, 8)}
    run = saewb.train(
        None, saewb.stream_tensors(x, batch_tokens=32), saewb.TopK(16, k=2), n_tokens=64, batch_tokens=32
    ).wait()
    run.notes.append(text)
    plain = {"x": x[text]}
    other = saewb.train(
        None, saewb.stream_tensors(plain, batch_tokens=32), saewb.TopK(16, k=2), n_tokens=64, batch_tokens=32
    ).wait()
    other.notes.append("plain")
    check_html(run._repr_html_(), other._repr_html_())
    check_code(run.code, text)
    panel = TrainingPanel(run)
    check_html(panel.static_html(), TrainingPanel(other).static_html())
    check_code(panel.code(), text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_model_card(text):
    sae = SAE(SAEConfig(4, 8, hook=text, model=text, metadata={"dataset_path": text, "training_tokens": text}))
    lines = model_card({"a": sae}, "me/x", {"a": {text: 1.0}}).split("\n")
    body = lines[lines.index("---", 1) + 1 :]
    assert "\n".join(body).count("```") == 4  # two blocks of code, which nothing inside of them closes
    fences = [i for i, line in enumerate(body) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        check_code("\n".join(body[begin + 1 : end]))
    assert "secret" not in "\n".join(
        model_card({"a": sae.with_config(model="/home/alice/secret/m", metadata={})}, "me/x", {}).splitlines()
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_catalogue_picker(text):
    panel = CataloguePicker()
    panel.query = text
    check_code(panel.code())
    check_html(panel.static_html(), CataloguePicker().static_html())


@pytest.mark.parametrize("text", TEXTS)
def test_a_superposition_panel(text):
    directions = {text: torch.eye(5), "b": torch.eye(5)}
    panel = SuperpositionPanel(directions)
    check_code(panel.code())
    check_html(panel.static_html(), SuperpositionPanel({"a": torch.eye(5), "b": torch.eye(5)}).static_html())


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_and_steering(text, index):
    model, sae = tiny_models.bridge(), tiny_models.sae(AT)
    panel = SteeringPanel(model, sae, index=hostile_index(index, text))
    panel.prompt = text
    check_code(panel.code(), text)
    check_html(panel.static_html(), SteeringPanel(model, sae, index=index).static_html())
    explorer = PromptExplorer(model, sae, index=hostile_index(index, text))
    check_html(explorer.static_html(), PromptExplorer(model, sae, index=index).static_html())
    panel.close(), explorer.close()


@pytest.mark.parametrize("text", TEXTS)
def test_tables_and_pages(text):
    sae = tiny_models.sae(AT).with_config(model=text, metadata={})
    figures = saewb.evaluate(tiny_models.bridge(), sae, tiny_models.tokens(4, 8))
    plain = saewb.evaluate(tiny_models.bridge(), tiny_models.sae(AT), tiny_models.tokens(4, 8))
    check_html(replace(figures, model=text, sae=text, hook=text)._repr_html_(), plain._repr_html_())
    with pytest.raises(ValueError, match="no source of Neuronpedia"):
        neuronpedia.page(None, 1, source=f"a/{text}")
    shown = neuronpedia.page(None, 1, source="a/b", site=text)._repr_html_()
    assert {tag for tag, _ in _Page(shown).elements} == {"iframe", "div", "a"}


@pytest.mark.parametrize("names", [("../victim", ".x.0000.new"), ("inside/victim", ".x.0123abcd-1-89abcdef.new")])
def test_a_record_of_renames_that_leads_elsewhere(names, tmp_path):
    """A stranger's folder may hold one: neither ".." nor a link takes a rename out of the folder."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir(), victim.mkdir()
    (victim / "victim").write_text("mine")
    (run / "inside").symlink_to(victim)
    (run / names[1]).write_text("theirs")
    (run / ".checkpoint.pt.replacing").write_text(json.dumps(dict([names])))
    with pytest.raises(saewb.FormatError, match="files inside its folder"):
        finish_replacing(run / "checkpoint.pt")
    assert (victim / "victim").read_text() == "mine"
