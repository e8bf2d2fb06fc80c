"""ContrastPanel and labels in a real JupyterLab: driven as a person would, in both themes, wide and narrow."""

import os

import pytest
from helpers import jupyterlab

CELLS = [
    """import saewb
from saewb_widgets import ContrastPanel, FeatureBrowser
model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
documents = saewb.tiny.held_out_texts()
a = [d.text for d in documents if d.topic.startswith("Biology")][:20]
b = [d.text for d in documents if not d.topic.startswith("Biology")][:20]
rows = saewb.data.tokens.token_rows(model, a + b, 64)
lens = saewb.fit_jacobian_lens(model, rows, sae.cfg.hook, n_prompts=1, batch_size=32)
index = saewb.build_index(model, sae, rows[:16], logits=lens)
named = index.with_labels({i: f"a name of latent {i}, as a person might write it" for i in index.ranking(20)})
panel = ContrastPanel(model, sae, a, b, index=named, n_permutations=100)
panel""",
    "panel.wait()\nprint(panel.selected, panel.side, len(panel.maxima) > 0)",
    "exec(panel.code(), again := {'model': model, 'sae': sae})\n"
    "print(again['table'].equals(panel.table), again['maxima'] == panel.maxima)",
    "FeatureBrowser(named)",
]


@pytest.mark.long
def test_contrast_panel_in_jupyterlab(browser, tmp_path):
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")
    where = os.environ.get("SAEWB_SCREENSHOTS")
    with jupyterlab.opened(browser, tmp_path, CELLS) as book:
        page = book.page
        page.set_default_timeout(120_000)
        book.run(0)
        panel = page.locator(".jp-Notebook .jp-Cell >> nth=0").locator(".saewb")
        panel.locator(".page .text").first.wait_for()
        assert not any(still.is_visible() for still in page.locator("[class^=saewb-snapshot]").all())
        row = panel.locator(".rows tr").nth(2)
        latent = row.get_attribute("data-latent")
        row.get_by_role("button").focus()
        for key in ("d", "d", "Enter"):  # d d would delete the cell, if JupyterLab heard it
            page.keyboard.press(key)
        panel.locator(".page h3", has_text=f"Latent {latent}").wait_for()
        assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)
        panel.get_by_role("button", name="larger in b").click()
        book.run(1)
        assert book.output(1).strip() == f"{latent} b True"
        book.run(2)
        assert book.output(2).strip().endswith("True True")
        book.run(3)
        browsing = page.locator(".jp-Notebook .jp-Cell >> nth=3").locator(".saewb")
        browsing.get_by_text("Through later layers").wait_for()
        assert browsing.locator(".label.explained").count() > 3
        for width in (1400, 700):
            page.set_viewport_size({"width": width, "height": 1500})
            for theme in ("Light", "Dark"):
                book.do("apputils:change-theme", theme=f"JupyterLab {theme}")
                page.locator(f".saewb[data-theme={theme.lower()}]").first.wait_for()
                page.wait_for_timeout(400)
                for name, one in {"contrast": panel, "browser": browsing}.items():
                    one.scroll_into_view_if_needed()
                    assert one.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), (name, width)
                    if where:
                        one.screenshot(path=f"{where}/{name}_lab_{theme.lower()}_{width}.png")
        book.save()
        assert sorted(set(page.complaints)) == []
        assert page.asked == []
