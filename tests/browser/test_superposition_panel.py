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


def test_the_focus_stays_where_keys_are_heard(page):
    """What is drawn anew takes the focus along: in JupyterLab the next d d would delete the cell."""
    panel = SuperpositionPanel(panels.embedded()[1])
    chromium.mount(page, panel)
    focused = (
        "() => { const e = document.activeElement; return !!e.closest('.saewb') && e.dataset.lmSuppressShortcuts; }"
    )
    for name in ("Turn the order round", "What latents read", None):
        name = name or f"Neighbours of {panel.neighbours[0][0]}"
        page.get_by_role("button", name=name, exact=True).last.click()
        page.wait_for_timeout(150)
        assert page.evaluate(focused) == "true", name
    row = page.locator(".rows .row button").nth(6)
    row.click()
    page.locator(".row[aria-current=true]").wait_for()
    assert row.evaluate("e => e === document.activeElement")


def test_an_exception_is_shown_and_goes_away(page):
    panel = SuperpositionPanel(panels.embedded()[1])
    flush = chromium.mount(page, panel)
    try:
        panel.selected = 5000
    except ValueError:
        flush()
    page.locator(".complaint", has_text="want: 0 to 1023").wait_for()
    page.get_by_role("button", name="Dismiss").click()
    page.locator(".complaint").wait_for(state="hidden")
    page.locator(".rows .row button").nth(4).click()
    page.locator("h3", has_text=f"Nearest to {panel.rows['rows'][2][0]}").wait_for()
