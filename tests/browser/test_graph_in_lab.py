"""GraphPanel in a real JupyterLab: driven as a person would, and read again without a kernel."""

import os

import pytest
from helpers import jupyterlab

CELLS = [
    """import saewb
from saewb_widgets import GraphPanel
model, transcoders = saewb.load_model("tiny", device="cpu"), saewb.tiny.transcoders()
graph = saewb.attribution_graph(model, "Paris is the capital", transcoders, progress=False)
panel = GraphPanel(graph, model=model, transcoders=transcoders)
panel""",
    "print(panel.groups, panel.selected, len(panel.effect))",
    "exec(panel.code(), again := {'graph': graph, 'model': model, 'transcoders': transcoders})\n"
    "print(again['outgoing'].equals(panel.outgoing), again['effect'].equals(panel.effect))",
]


@pytest.mark.long
def test_graph_panel_in_jupyterlab(browser, tmp_path):
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")
    where = os.environ.get("SAEWB_SCREENSHOTS")
    with jupyterlab.opened(browser, tmp_path, CELLS) as book:
        page = book.page
        book.run(0)
        panel = page.locator(".jp-Notebook .jp-Cell >> nth=0").locator(".saewb")
        panel.locator("circle.node").first.wait_for()
        assert not any(still.is_visible() for still in page.locator("[class^=saewb-snapshot]").all())
        node = panel.locator("circle.latent").first
        name = f"{node.get_attribute('aria-label')}"
        node.focus()
        for key in ("d", "d", "p", "Enter"):  # d d would delete the cell, if JupyterLab heard it
            page.keyboard.press(key)
        panel.locator(".chip").wait_for()
        assert panel.locator(".effects h2").inner_text() in name
        assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)
        panel.get_by_label("Name of the group").fill("mine")
        page.keyboard.press("Enter")
        panel.locator("circle.group").wait_for()
        panel.get_by_role("button", name="Run the model with").click()
        panel.locator(".trial tr").nth(1).wait_for()
        book.run(1)
        assert book.output(1).strip().endswith("mine 3")
        book.run(2)
        assert book.output(2).strip() == "True True"
        for theme in ("Light", "Dark"):
            book.do("apputils:change-theme", theme=f"JupyterLab {theme}")
            page.locator(f".saewb[data-theme={theme.lower()}]").first.wait_for()
            if where:
                page.wait_for_timeout(400)
                panel.screenshot(path=f"{where}/graph_lab_{theme.lower()}.png")
        book.stands_in(0, "mine")
        book.save()
        assert sorted(set(page.complaints)) == []
        assert page.asked == []
    pictures = (where, "graph") if where else None
    for place, cells in jupyterlab.without_a_kernel(browser, tmp_path, pictures).items():
        assert "Error displaying" not in "".join(cells), place
        assert "replacement score" in cells[0], place
        assert "outgoing" in cells[0], place
