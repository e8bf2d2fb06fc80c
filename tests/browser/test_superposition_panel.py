"""SuperpositionPanel's front end in Chromium, over the real panel."""

import torch
from helpers import chromium, panel_driver
from saewb_widgets import SuperpositionPanel


def test_neighbors_lead_on_and_sides_change(page):
    panel = SuperpositionPanel(panel_driver.embedded()[1])
    chromium.mount(page, panel)
    first = panel.selected
    page.locator("h3", has_text=f"Nearest to {first}").wait_for()
    assert page.locator(".rows .row").count() == 200
    near = [j for j, _ in panel.neighbors]
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
    page.get_by_role("button", name="Show the Python code for this").click()
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
    panel = SuperpositionPanel(panel_driver.embedded()[1])
    chromium.mount(page, panel)
    focused = (
        "() => { const e = document.activeElement; return !!e.closest('.saewb') && e.dataset.lmSuppressShortcuts; }"
    )
    for name in ("Turn the order round", "What latents read", None):
        name = name or f"Neighbors of {panel.neighbors[0][0]}"
        page.get_by_role("button", name=name, exact=True).last.click()
        page.wait_for_timeout(150)
        assert page.evaluate(focused) == "true", name
    row = page.locator(".rows .row button").nth(6)
    row.click()
    page.locator(".row[aria-current=true]").wait_for()
    assert row.evaluate("e => e === document.activeElement")


def three(**how):
    sae = panel_driver.embedded()[1]
    rng = torch.Generator().manual_seed(0)
    inputs = {"topk": sae, "<b>random</b>": torch.randn(300, 20, generator=rng), "read": sae.W_enc.T.detach()}
    return SuperpositionPanel(inputs, index={"topk": panel_driver.index()}, **how)


def test_several_are_beside_each_other(page):
    panel = three(side="encoder")
    chromium.mount(page, panel)
    names = page.get_by_role("group", name="Which is looked at").locator("button")
    assert names.all_inner_texts() == ["topk", "<b>random</b>", "read"]
    rows = page.locator(".beside tr")
    assert rows.nth(2).inner_text().split("\t") == ["<b>random</b>", "no encoder"]
    names.nth(1).click()  # it has decoder directions only, so these are looked at
    page.locator("header h2", has_text="Superposition of directions of <b>random</b>").wait_for()
    assert (panel.which, panel.side) == ("<b>random</b>", "decoder")
    page.locator(".beside tr[aria-current=true] th", has_text="random").wait_for()
    assert rows.nth(2).locator("td").all_inner_texts()[:3] == [
        "300",
        "20",
        f"{panel.beside['rows'][1]['figures'][0]:.3f}",
    ]
    assert page.locator(".figures").is_hidden()
    assert page.get_by_role("button", name="decoder").count() == 0  # a tensor has no sides
    for chart in page.locator(".hists svg.bars").all():
        assert chart.locator("path.outline").count() == 2
        looks = chart.locator("path.outline").evaluate_all(
            "all => all.map((e) => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray])"
        )
        assert looks[0][0] != looks[1][0]
        assert looks[0][1] != looks[1][1]
        box = chart.locator("path.outline").first.evaluate(
            "e => { const b = e.getBBox(); return [b.y, b.y + b.height] }"
        )
        assert -1e-6 <= box[0] < box[1] <= 1 + 1e-6
    assert page.locator(".legend .key").all_inner_texts() == ["<b>random</b>", "topk", "read"]
    assert page.evaluate("() => document.activeElement.textContent") == "<b>random</b>"
    names.nth(0).click()
    page.locator("h3", has_text="Nearest to 648").wait_for()
    assert page.locator(".legend .key").first.inner_text() == "topk"


def test_dots_are_hovered_and_clicked(page):
    panel = SuperpositionPanel(panel_driver.embedded()[1], index=panel_driver.index())
    chromium.mount(page, panel)
    canvas = page.locator(".dots canvas")
    page.locator(".dots canvas[data-of='648']").wait_for()
    assert canvas.get_attribute("data-dots") == "1024"
    ink = "e => e.getContext('2d').getImageData(0, 0, e.width, e.height).data.filter((v, k) => k % 4 === 3 && v).length"
    assert canvas.evaluate(ink) > 2000
    before = [float(v) for v in canvas.get_attribute("data-at").split(",")]
    page.locator(".near .row button").nth(3).click()
    page.wait_for_function("() => document.querySelector('.dots canvas').dataset.of !== '648'")
    assert panel.selected != 648
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + before[0], box["y"] + before[1])
    density = panel.points.density[648]
    text = page.inner_text(".tip").splitlines()
    assert text[:2] == ["648", f"largest |cos| {panel.points.max_abs_cos[648]:.3f}"]
    assert text[2].startswith(f"fires on {100 * density:.0f} ")
    page.mouse.click(box["x"] + before[0], box["y"] + before[1])
    page.locator("h3", has_text="Nearest to 648").wait_for()
    assert panel.selected == 648
    page.get_by_role("button", name="Against the length").click()
    page.locator(".dots h3", has_text="the length of its decoder row").wait_for()
    assert panel.scatter == "norm"
    assert page.evaluate("() => document.activeElement.textContent") == "length"
    x, y = (float(v) for v in canvas.get_attribute("data-at").split(","))
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert "length 1" in page.inner_text(".tip")  # all are: they stand above one another
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0


def test_several_in_a_narrow_place(page):
    page.set_viewport_size({"width": 420, "height": 900})
    chromium.mount(page, three())
    page.locator(".dots canvas[data-of]").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_complaint_that_is_dismissed_leaves_the_focus_in_the_panel(page):
    """In JupyterLab the next d d would delete the cell."""
    panel = SuperpositionPanel(torch.eye(3))
    flush = chromium.mount(page, panel)
    panel._on_message(panel, {"do": "code"})
    flush()
    page.get_by_role("button", name="Dismiss").focus()
    page.keyboard.press("Enter")
    page.locator(".notice").wait_for(state="hidden")
    focused = "() => [document.activeElement.className, document.activeElement.dataset.lmSuppressShortcuts]"
    assert page.evaluate(focused) == ["saewb crowd", "true"]
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "code"  # and goes on from there
    assert page.locator(".saewb[tabindex]").count() == 0


def test_an_exception_is_shown_and_goes_away(page):
    panel = SuperpositionPanel(panel_driver.embedded()[1])
    flush = chromium.mount(page, panel)
    try:
        panel.selected = 5000
    except ValueError:
        flush()
    page.locator(".error_message", has_text="want: 0 to 1023").wait_for()
    page.get_by_role("button", name="Dismiss").click()
    page.locator(".error_message").wait_for(state="hidden")
    page.locator(".rows .row button").nth(4).click()
    page.locator("h3", has_text=f"Nearest to {panel.rows['rows'][2][0]}").wait_for()
