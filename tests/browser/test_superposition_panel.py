"""SuperpositionPanel's front end in Chromium, over the real panel."""

import chromium
import panels
import torch
from saewb_widgets import SuperpositionPanel


def test_neighbours_lead_on_and_sides_change(page):
    panel = SuperpositionPanel(panels.embedded()[1])
    chromium.mount(page, panel)
    first = panel.selected
    page.locator("h3", has_text=f"Nearest to {first}").wait_for()
    assert page.locator(".rows .row").count() == 200
    near = [j for j, _ in panel.neighbours]
    last = page.locator(".lists .card").nth(1).locator(".row button").last
    assert int(last.inner_text()) == near[-1]
    last.click()
    page.locator("h3", has_text=f"Nearest to {near[-1]}").wait_for()
    assert panel.selected == near[-1]
    page.get_by_role("button", name="What latents read").click()
    page.locator("header h2", has_text="encoder").wait_for()
    assert panel.side == "encoder"
    page.get_by_role("button", name="Turn the order round").click()
    page.locator("h3", has_text="With the most room").wait_for()
    assert int(page.locator(".rows .row button").first.inner_text()) == panel.rows["rows"][0][0]
    page.locator(".hists svg rect.hit").nth(100).hover()
    assert "pairs" in page.inner_text(".tip")
    page.get_by_role("button", name="The Python that gives this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_few_directions_in_a_narrow_place(page):
    page.set_viewport_size({"width": 420, "height": 900})
    panel = SuperpositionPanel(torch.eye(3))
    chromium.mount(page, panel)
    assert page.locator(".rows .row").count() == 3
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0
