"""Panels in a real JupyterLab: the front end people use, its kernel, its themes, its saved notebooks."""

import os
import re
import time

import pytest
from helpers import jupyterlab, panel_driver

CELLS = [
    "from saewb_widgets import FeatureBrowser\npanel = FeatureBrowser('an.index')\npanel",
    "panel.query, panel.selected = 'physicist', 748",
    "print(panel.selected, panel.pins, len(panel.latents))",
    "panel.selected = 99999",
]


@pytest.fixture
def notebook(browser, tmp_path):
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")
    panel_driver.index().save(tmp_path / "an.index")
    with jupyterlab.opened(browser, tmp_path, CELLS) as book:
        yield book
        assert book.page.complaints == []
        assert book.page.asked == []


@pytest.mark.long
def test_feature_browser_in_jupyterlab(notebook):
    page, index = notebook.page, panel_driver.index()
    notebook.run(0)
    order = index.ranking()

    def heading(latent):
        page.locator(".saewb .top h2", has_text=re.compile(rf"^Latent {latent}$")).wait_for()

    heading(order[0])
    page.locator(".saewb[data-theme=light]").wait_for()
    page.locator(".saewb .row").nth(3).click()
    heading(order[3])
    for key in ("d", "d", "j", "p"):  # d d would delete the cell, if JupyterLab heard it
        page.keyboard.press(key)
    heading(order[4])
    page.locator(".saewb .top button[aria-pressed=true]", has_text="pinned").wait_for()
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)
    page.fill(".saewb input[type=search]", "/(/")
    page.locator(".saewb .error_message", has_text="is no pattern").wait_for()
    notebook.run(1)
    heading(748)
    page.locator(".saewb .error_message").wait_for(state="hidden")
    notebook.run(2)
    hits = index.search("physicist")
    assert notebook.output(2).strip() == f"748 [{order[4]}] {len(hits)}"
    page.locator(".saewb .total", has_text=f"{len(hits)} of 1,024").wait_for()
    notebook.run(3)
    assert "latent 99999" in notebook.output(3)
    assert "traitlets" not in notebook.output(3)
    page.locator(".saewb .error_message", has_text="want: 0 to 1023").wait_for()
    notebook.do("apputils:change-theme", theme="JupyterLab Dark")
    page.locator(".saewb[data-theme=dark]").wait_for()
    if where := os.environ.get("SAEWB_SCREENSHOTS"):
        page.screenshot(path=f"{where}/lab.png")
    until = time.monotonic() + 30
    while "Latent 748" not in stands_in(notebook) and time.monotonic() < until:
        page.wait_for_timeout(100)
    assert "Latent 748" in stands_in(notebook)
    check_it_is_readable_without_a_kernel(notebook.path, 748)


def stands_in(notebook):
    """What stands in for the panel without a kernel, which follows what is shown after a moment."""
    _, still = notebook.save()["cells"][0]["outputs"]
    return "".join(still["data"]["text/html"])


def check_it_is_readable_without_a_kernel(path, latent):
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="basic").from_filename(str(path))
    assert f"Latent {latent}" in page
    assert "rgba(240,148,40" in page
