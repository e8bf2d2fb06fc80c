"""PromptExplorer and SteeringPanel in a real JupyterLab: a prompt typed, tokens clicked, texts steered as they come."""

import json
import os
import re
import time
from contextlib import contextmanager

import pytest
from helpers import jupyterlab, panel_driver

TEXT = "Marie Curie was a Polish physicist.\nShe won the Nobel Prize"
CELLS = [
    """import saewb
from saewb_widgets import PromptExplorer, SteeringPanel
model, sae, index = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny"), saewb.load_index("an.index")
panel = PromptExplorer(model, sae, index)
panel""",
    "browser = panel.browser()\nbrowser",
    "print(repr(panel.prompt), panel.position, panel.rank, panel.selected, browser.selected, panel.error)",
    """exec(panel.code(), made := {"model": model, "sae": sae, "index": index})
print(made["latents"].equals(panel.latents), made["words"].equals(panel.next_tokens.to_frame(panel.position)))""",
    jupyterlab.WAIT,
    """steering = SteeringPanel(model, sae, index, prompt="The scientist", max_new_tokens=60)
steering""",
    "import json; print(json.dumps([steering.latents, steering.clean, steering.steered]))",
    """exec(steering.code(), made := {"model": model, "sae": sae})
print((made["clean"], made["steered"]) == (steering.clean, steering.steered), made["changes"].equals(steering.changes))
""",
]
EXPLORER, BROWSER, STEERING = ".saewb.prompt", ".saewb.browser:not(.prompt)", ".saewb.steering"


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens the notebook."""
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")
    panel_driver.index().save(tmp_path / "an.index")

    @contextmanager
    def of():
        with jupyterlab.opened(browser, tmp_path, CELLS) as book:
            yield book
            assert book.page.complaints == []
            assert book.page.asked == []

    return of


@pytest.fixture(scope="module")
def reading():
    import saewb

    model, sae = panel_driver.embedded()
    return saewb.read_prompt(model, TEXT, sae)


class Watch:
    """Prints how long things take."""

    def __init__(self):
        self.since = time.perf_counter()

    def lap(self, what):
        now = time.perf_counter()
        print(f"{what}: {1000 * (now - self.since):.0f} ms")
        self.since = time.perf_counter()


@pytest.mark.long
def test_prompts_and_steering_in_jupyterlab(opened, browser, tmp_path, reading):
    with opened() as notebook:
        explore(notebook, reading)
        steer(notebook)
        pictures(notebook)
        texts = json.loads(notebook.output(6))[1:]
        notebook.stands_in(0, "logit effect")
        notebook.stands_in(5, texts[1].split()[-1])
        notebook.save()
    folder = os.environ.get("SAEWB_SCREENSHOTS")
    for where, cells in jupyterlab.without_a_kernel(browser, tmp_path, folder and (folder, "prompts")).items():
        assert "Error displaying" not in "".join(cells), where
        for message in ("Latents of tiny on a prompt", "physicist", "logit effect"):
            assert message in cells[0], (where, message)
        for text in texts:
            assert " ".join(text.split()) in " ".join(cells[5].split()), where


def explore(notebook, reading):
    page, tokens, watch = notebook.page, reading.tokens, Watch()
    notebook.run(0)
    box = page.locator(f"{EXPLORER} textarea")
    box.wait_for()
    watch.lap("PromptExplorer opened, model loaded")
    box.click()
    page.keyboard.type("dd jk ")  # keys that JupyterLab would take for its own
    box.fill(TEXT)
    page.keyboard.press("Enter")
    page.locator(f"{EXPLORER} .token").nth(len(tokens) - 1).wait_for()
    watch.lap("a prompt typed and read")
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)
    page.locator(f"{EXPLORER} .next .kl").wait_for()
    watch.lap("and run with the SAE in place")
    at = tokens.index(" physicist")
    page.locator(f"{EXPLORER} .token[data-position='{at}']").click()
    page.locator(f"{EXPLORER} .token[data-position='{at}'][aria-selected=true]").wait_for()
    listed = reading.to_frame(at).latent.tolist()
    rows = page.locator(f"{EXPLORER} .latents .row[role=option]")
    rows.first.and_(page.locator(f"[data-latent='{listed[0]}']")).wait_for()
    watch.lap("a token clicked")
    assert [int(rows.nth(k).get_attribute("data-latent")) for k in range(3)] == listed[:3]
    rows.nth(1).click()
    heading(page, EXPLORER, listed[1])
    watch.lap("a latent clicked")
    notebook.run(1)
    heading(page, BROWSER, listed[1])
    laid = page.evaluate("s => getComputedStyle(document.querySelector(s + ' .body')).display", EXPLORER)
    assert laid == "block"  # the styles of a panel that is displayed later do not reach this one
    rows.nth(2).click()
    heading(page, EXPLORER, listed[2])
    heading(page, BROWSER, listed[2])
    page.locator(f"{EXPLORER} .next .word").nth(1).click()
    page.locator(f"{EXPLORER} .next .word[aria-pressed=true]").wait_for()
    page.locator(f"{EXPLORER}[aria-busy=false]").wait_for()
    notebook.run(2)
    assert notebook.output(2).strip() == f"{TEXT!r} {at} logit_effect {listed[2]} {listed[2]} None"
    notebook.run(3)
    assert notebook.output(3).strip() == "True True"
    target = page.locator(f"{EXPLORER} .word-of input")
    target.click()
    target.fill("two words")
    target.press("Enter")
    page.locator(f"{EXPLORER} .error_message", has_text="of this model").wait_for()
    busy(notebook)


def busy(notebook):
    """While a cell runs: the panel says that it waits, or goes on beside it; and is right again afterwards."""
    page = notebook.page
    page.evaluate(
        "() => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = 4; nb.deselectAll();"
        " jupyterapp.commands.execute('notebook:run-cell'); }"
    )
    page.locator(".jp-Notebook .jp-Cell >> nth=4").locator(".jp-InputPrompt", has_text="[*]").wait_for()
    typed(page, "A cat sat")
    answered = page.locator(f"{EXPLORER} .token", has_text="sat")
    page.locator(f"{EXPLORER} .waiting", has_text="kernel").or_(answered).wait_for()
    jupyterlab.go_on(notebook)
    print("a cell runs:", page.inner_text(f"{EXPLORER} .waiting") or "the panel goes on beside it")
    answered.wait_for()
    typed(page, TEXT)
    page.locator(f"{EXPLORER} .token", has_text="physicist").wait_for()
    page.locator(f"{EXPLORER} .token", has_text="physicist").click()
    page.locator(f"{EXPLORER} .error_message").wait_for(state="hidden")


def typed(page, text):
    box = page.locator(f"{EXPLORER} textarea")
    box.click()
    box.fill(text)
    box.press("Enter")


def heading(page, panel, latent):
    page.locator(f"{panel} .top h2", has_text=re.compile(rf"^Latent {latent}$")).wait_for()


def steer(notebook):
    page, watch = notebook.page, Watch()
    notebook.run(5)
    find = page.locator(f"{STEERING} input[type=search]")
    find.wait_for()
    watch.lap("SteeringPanel opened")
    find.fill("Brazil")
    page.get_by_role("button", name="Add latent 385").click()
    slider = page.get_by_role("slider", name="Value of latent 385")
    slider.wait_for()
    watch.lap("a latent found and added")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.locator(f"{STEERING} .mover").first.wait_for()
    page.locator(f"{STEERING}[aria-busy=false]").wait_for()
    value = float(slider.input_value())
    watch.lap("a slider moved ten steps")
    page.get_by_role("button", name="Generate both texts").click()
    lengths = streamed(page)
    print(f"seen while it streams: {len(lengths)} lengths of text, up to {lengths[-1]} characters")
    watch.lap("both texts written, 60 tokens each")
    assert len(lengths) > 1
    shown = page.locator(f"{STEERING} .texts .text")
    notebook.run(6)
    clean, steered = (shown.nth(k).inner_text().removeprefix("The scientist") for k in (0, 1))
    latents = [{"sae": 0, "latent": 385, "value": value, "how": "add"}]
    assert json.loads(notebook.output(6)) == [latents, clean, steered]
    assert clean != steered
    notebook.run(7)
    assert notebook.output(7).strip() == "True True"


def streamed(page):
    """Lengths of the clean text that were seen until it was whole."""
    seen, end = [], time.monotonic() + 60
    while time.monotonic() < end:
        n, idle = page.evaluate(
            "s => [document.querySelector(s + ' .texts .text').textContent.length,"
            " !document.querySelector(s + ' .caret') && document.querySelector(s).ariaBusy === 'false']",
            STEERING,
        )
        if not seen or n > seen[-1]:
            seen.append(n)
        if idle and len(seen) > 1:
            return seen
        page.wait_for_timeout(30)
    raise AssertionError(f"the texts are not written in a minute: {seen}")


def pictures(notebook):
    page = notebook.page
    for theme in ("Light", "Dark"):
        notebook.do("apputils:change-theme", theme=f"JupyterLab {theme}")
        for name, panel in (("prompt_explorer", EXPLORER), ("steering", STEERING)):
            page.locator(f"{panel}[data-theme={theme.lower()}]").wait_for()
            if where := os.environ.get("SAEWB_SCREENSHOTS"):
                page.mouse.move(5, 5)
                page.locator(panel).screenshot(path=f"{where}/{name}_lab_{theme.lower()}.png")
