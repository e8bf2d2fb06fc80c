"""TrainingPanel and CataloguePicker in a real JupyterLab: driven as a person would, and read again without a kernel."""

import os
import re
import time

import pytest
from helpers import fake_hub, jupyterlab
from helpers.architecture_registry import feed_forward

import saewb
from saewb.pretrained.load import save_sae

HOOK = "blocks.2.hook_resid_post"
JB = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
TRAINING = [
    f"""import saewb, shutil, time
from saewb_widgets import TrainingPanel
model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.texts()[:200]]
how = dict(hook={HOOK!r}, batch_tokens=512, buffer_tokens=4_096, log_every_steps=1, lr=3e-3)
panel = TrainingPanel(model=model, tokens=texts, objective=saewb.TopK(512, k=8), n_tokens=10_000, **how)
panel""",
    "panel",
    "print(panel.run.state, panel.run.folder, len(panel.run.rows) > 0, panel.run.names)",
    f"print('asleep', flush=True)\n{jupyterlab.WAIT}",
    "panel.control('two', 'stop')",
    """import torch
def broken():
    yield from torch.randn(6, 512, 8)
    raise OSError('<b>the disk is gone</b>')
stream = saewb.stream_iterable(broken(), batch_tokens=512)
how_it_ran = {'n_tokens': 9_999, 'batch_tokens': 512, 'estimate_tokens': 512, 'log_every_steps': 1}
crashed = saewb.train(None, stream, saewb.TopK(32, k=4), **how_it_ran)
panel.add(crashed, 'crashing')""",
    """two = {'narrow': saewb.TopK(256, k=8), 'wide': saewb.BatchTopK(1_024, k=8)}
panel.add(saewb.train(model, texts, two, n_tokens=20_480, **how).wait(), 'two')
exec(panel.code('two'), again := {'model': model, 'tokens': texts})
print(saewb.run_curves(again['run'].wait()) == saewb.run_curves(panel.runs['two']))""",
    "shutil.rmtree('runs/one')\npanel.refresh()",
]
CATALOGUE = [
    """from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2_000  # bytes that it writes at once
from saewb_widgets import CataloguePicker
panel = CataloguePicker()
panel""",
    "print(panel, panel.sae, panel.busy)",
    "exec(panel.code(), made := {})\nprint(made['table'].equals(panel.table), repr(made['sae']) == repr(panel.sae))",
    "panel.release = 'gpt2-small-res-jp'",
]


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a notebook of these cells; at its end it must not have complained, nor asked for anything outside."""
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")

    def of(cells):
        return jupyterlab.opened(browser, tmp_path, cells)

    return of


def pictured(page, name):
    """A screenshot in both themes, if they are wanted."""
    for theme in ("Light", "Dark"):
        page.evaluate("t => jupyterapp.commands.execute('apputils:change-theme', { theme: t })", f"JupyterLab {theme}")
        page.locator(f".saewb[data-theme={theme.lower()}]").first.wait_for()
        if where := os.environ.get("SAEWB_SCREENSHOTS"):
            page.mouse.move(0, 0)
            page.wait_for_timeout(300)
            page.screenshot(path=f"{where}/{name}_{theme.lower()}.png")


def view(page, cell):
    return page.locator(f".jp-Notebook .jp-Cell >> nth={cell}").locator(".saewb")


def tokens(panel):
    return int(panel.locator(".where").first.inner_text().split(" of ")[0].replace(",", ""))


def moves(panel):
    """Wait until the run shown first has gone on."""
    before, end = tokens(panel), time.monotonic() + 120
    while tokens(panel) <= before:
        assert time.monotonic() < end, "it stands still"
        time.sleep(0.1)


@pytest.mark.long
def test_training_panel_in_jupyterlab(opened, browser, tmp_path, capsys):
    with opened(TRAINING) as notebook:
        page = notebook.page
        begun = time.perf_counter()
        notebook.run(0)
        panel, second = view(page, 0), view(page, 1)
        panel.locator(".field").first.wait_for()
        opening, begun = time.perf_counter() - begun, time.perf_counter()
        start_a_run_with_the_form(panel)
        filling = time.perf_counter() - begun
        moves(panel)
        notebook.run(2)
        assert notebook.output(2).strip().endswith("/runs/one True ('sae',)")
        lines = panel.locator(".card[data-figure=loss] polyline")
        drawn = lines.get_attribute("points")
        pause_and_go_on(notebook, panel, second)
        moves(second)
        assert lines.get_attribute("points") != drawn
        notebook.save()
        page.reload()
        notebook.ready()
        moves(panel)  # the kernel, its run and its panel have stayed
        moves(second)
        the_kernel_is_busy(notebook, panel)
        panel.get_by_role("button", name="Stop one").click()
        panel.locator(".run[data-state=stopped]").wait_for()
        panel.locator("pre.code", has_text=re.compile(r"saewb\.resume_run\('[^']*runs/one'")).wait_for()
        what_goes_wrong_is_said(notebook, panel)
        pictured(page, "training")
        notebook.run(1)  # displayed anew: since the page was reloaded, what stands in for a panel follows it no more
        notebook.stands_in(1, "20,480 of 20,480")
        notebook.save()
        assert notebook.complaints == []
        assert page.asked == []
    with capsys.disabled():
        print(f"\nTrainingPanel in JupyterLab: model and form {opening:.1f} s, filled and started {filling:.1f} s")
    pictures = os.environ.get("SAEWB_SCREENSHOTS")
    result = jupyterlab.without_a_kernel(browser, tmp_path, pictures and (pictures, "training"))
    for where, texts in result.items():
        for text in ("stopped", "crashing", "OSError: <b>the disk is gone</b>", "density", "FVU", "20,480 of 20,480"):
            assert text in texts[1], (where, text, texts[1])


def start_a_run_with_the_form(panel):
    def says(key, text):
        panel.locator(f".field[data-key='{key}'] .wrong", has_text=text).wait_for()

    panel.locator(".estimate b", has_text="memory: about").wait_for()
    fields = {name: panel.get_by_role("textbox", name=name, exact=True) for name in ("k", "n_tokens", "folder")}
    fields["k"].fill("600")
    says("objective.k", "1 to d_sae=512")
    fields["n_tokens"].fill("many")
    says("n_tokens", "many")
    assert panel.get_by_role("button", name="Start the training").is_disabled()
    fields["k"].fill("16")
    fields["n_tokens"].fill("400_000_000")
    fields["folder"].fill("runs/one")
    panel.locator("button.start:enabled").wait_for()
    panel.locator(".estimate b", has_text="memory: about").wait_for()
    panel.get_by_role("button", name="Start the training").click()
    panel.locator(".run[data-state=running]").wait_for()
    panel.locator(".card[data-figure=density] polyline").nth(1).wait_for()


def pause_and_go_on(notebook, panel, second):
    """In a second view; the first shows it too."""
    panel.get_by_role("button", name="Pause one").click()
    panel.locator(".run[data-state=paused]").wait_for()
    notebook.run(2)
    assert notebook.output(2).startswith("paused")
    at = tokens(panel)
    notebook.run(1)
    second.locator(".run[data-state=paused]").wait_for()
    assert tokens(second) == tokens(panel) == at
    second.get_by_role("button", name="Resume one").click()
    panel.locator(".run[data-state=running]").wait_for()


def the_kernel_is_busy(notebook, panel):
    """A cell runs for a while: the run goes on, and the click is not lost.

    ipykernel hears it at once, beside the cell, or after the cell, and then the panel says that it waits.
    """
    before = tokens(panel)
    notebook.page.evaluate(
        "i => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = i; nb.deselectAll();"
        " jupyterapp.commands.execute('notebook:run-cell'); }",
        3,
    )
    notebook.page.locator(".jp-Notebook .jp-Cell >> nth=3").locator(".jp-OutputArea", has_text="asleep").wait_for()
    panel.get_by_role("button", name="Pause one").click()
    panel.locator(".late:visible, .run[data-state=paused]").first.wait_for()
    jupyterlab.go_on(notebook)
    panel.locator(".run[data-state=paused]").wait_for()
    panel.locator(".late").wait_for(state="hidden")
    assert tokens(panel) > before
    panel.get_by_role("button", name="Resume one").click()
    panel.locator(".run[data-state=running]").wait_for()


def what_goes_wrong_is_said(notebook, panel):
    notebook.run(4)  # an exception: there is no such run yet
    assert "no run 'two' here" in notebook.output(4)
    panel.locator(".error_message", has_text="no run 'two' here").wait_for()
    panel.get_by_role("button", name="Dismiss").click()
    panel.locator(".error_message").wait_for(state="hidden")
    notebook.run(5)  # a run that crashes
    crashing = panel.get_by_label("Run crashing")
    crashing.locator("pre.bad", has_text="OSError: <b>the disk is gone</b>").wait_for()
    assert crashing.get_attribute("data-state") == "failed"
    notebook.run(6)  # it can go on with others; and its code starts an equal one
    assert notebook.output(6).strip() == "True"
    panel.get_by_label("Run two").locator(".state", has_text="finished").wait_for()
    assert panel.locator(".card[data-figure=l0] polyline").count() == 4
    notebook.run(7)  # a folder that is deleted
    panel.get_by_label("Run one").locator("pre.bad", has_text="runs/one' is not there any more").wait_for()
    panel.get_by_role("button", name="Show or hide two / wide").click()
    notebook.page.wait_for_function(
        "() => document.querySelector('.saewb').querySelectorAll('.card[data-figure=l0] polyline').length === 3"
    )


@pytest.mark.long
def test_catalogue_picker_in_jupyterlab(opened, browser, tmp_path, monkeypatch, capsys):
    entry = saewb.pretrained.catalogue.find(*JB)
    sae = feed_forward(2, d_in=64, d_sae=128, hook=entry.hook, model="gpt2-small")
    files = {f"{entry.path}/{f.name}": f.read_bytes() for f in save_sae(sae, tmp_path / "published").iterdir()}
    slow = {"sae_weights.safetensors": [(1_000, 0.2), (4_000, 0.1)]}
    with fake_hub.hub({entry.repo: files}, faults=slow) as (address, log):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**settings, "NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": "hf_of_the_stand_in"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with opened(CATALOGUE) as notebook:
            page = notebook.page
            begun = time.perf_counter()
            notebook.run(0)
            panel = view(page, 0)
            panel.locator(".row .name").first.wait_for()
            opening = time.perf_counter() - begun
            choose(panel)
            load_cancel_and_load(notebook, panel, log)
            notebook.run(2)
            assert notebook.output(2).strip().endswith("True True")  # after huggingface_hub's bars
            notebook.run(3)
            assert "near: gpt2-small-res-jb" in notebook.output(3)
            panel.locator(".error_message", has_text="near: gpt2-small-res-jb").wait_for()
            panel.get_by_role("button", name="Dismiss").click()
            panel.locator(".error_message").wait_for(state="hidden")
            pictured(page, "catalogue")
            notebook.stands_in(0, entry.repo)
            notebook.save()
            assert notebook.complaints == []
            assert page.asked == []
    with capsys.disabled():
        print(f"\nCataloguePicker in JupyterLab: import and first view {opening:.1f} s")
    pictures = os.environ.get("SAEWB_SCREENSHOTS")
    result = jupyterlab.without_a_kernel(browser, tmp_path, pictures and (pictures, "catalogue"))
    for where, texts in result.items():
        for text in ("Published SAEs", *JB, "24,576", "151 MB", entry.repo):
            assert text in texts[0], (where, text, texts[0])


def choose(panel):
    panel.locator(".total", has_text=re.compile(r"^13,857 SAEs, 38 models, 170 releases$")).wait_for()
    panel.get_by_label("model", exact=True).select_option("gpt2")
    panel.get_by_label("site", exact=True).select_option("resid_pre")
    panel.get_by_label("Search the catalogue").press_sequentially("res-jb", delay=30)
    panel.locator(".total", has_text=re.compile(r"^\d\d of 13,857 SAEs$")).wait_for()
    panel.get_by_role("button", name="Sort by layer").click()
    panel.get_by_label("Search the catalogue").press("ArrowDown")
    row = panel.locator(".row", has_text=JB[1])
    row.first.click()
    panel.locator("dd", has_text="24,576, of 768 dimensions").wait_for()


def load_cancel_and_load(notebook, panel, log):
    load = panel.get_by_role("button", name=f"Load {JB[0]}, {JB[1]}")
    load.click()
    panel.locator(".came", has_text=re.compile(r"^0\.\d of 0\.1 MB$")).wait_for()
    assert 0 < panel.locator("progress").evaluate("e => e.value / e.max") < 1
    panel.get_by_label("Stop loading").click()
    panel.locator(".notice", has_text=f"cancelled: {JB[0]}, {JB[1]}").wait_for()
    notebook.run(1)
    assert notebook.output(1).strip().endswith(f"{JB[0]} {JB[1]}) None")
    load.click()
    panel.locator("progress").wait_for()
    panel.locator(".loaded", has_text=f"panel.sae is {JB[0]}, {JB[1]}").wait_for()
    assert log.count("slowly") == 2
    notebook.run(1)
    assert "SAE(relu, 64 -> 128 latents" in notebook.output(1)
