"""ContrastPanel's front end in Chromium, over the real panel."""

import pytest
from helpers import chromium, panel_driver
from saewb_widgets import ContrastPanel

A = ["The bird is a small species.", "A family of birds.", "The species of fish lives in the sea."]
B = ["The city is in the north.", "A town of people.", "The river in the city.", "A large building."]


def test_texts_are_typed_and_compared(page):
    panel = ContrastPanel(*panel_driver.embedded(), n_permutations=50)
    chromium.mount(page, panel)
    assert page.locator(".card").first.is_hidden()
    page.get_by_label("Texts of set a").fill("\n".join(A))
    page.get_by_label("Texts of set b").fill("\n\n".join([*B[:3], "A large\nbuilding."]))
    page.get_by_role("button", name="Compare the two sets of texts").click()
    page.locator("tr[aria-current=true]").wait_for()
    assert panel.a == A
    assert panel.b == [*B[:3], "A large\nbuilding."]
    assert int(page.locator("canvas").get_attribute("data-marks")) == len(panel.dots["x"]) > 5
    page.locator(".page .text").first.wait_for()
    assert page.locator(".page h3").inner_text() == f"Latent {panel.selected}"
    text = page.locator(".page .text .words").first.inner_text()
    assert text.replace("\xa0", " ").strip() == panel.maxima[0].text.strip()


def test_a_click_shows_a_latent_and_sides_change(page):
    panel = ContrastPanel(*panel_driver.embedded(), A, B, n_permutations=50)
    panel.wait()
    chromium.mount(page, panel)
    second = page.locator(".rows tr").nth(2)
    latent = int(second.get_attribute("data-latent"))
    second.get_by_role("button").click()
    page.locator(".page h3", has_text=f"Latent {latent}").wait_for()
    assert panel.selected == latent
    # a mark of the plot: where another latent is drawn, if none is nearer
    x, y = (float(v) for v in page.locator("canvas").get_attribute("data-at").split(","))
    page.get_by_role("button", name=f"Latent {panel.rows['rows'][0][0]} on").click()
    page.locator("canvas").click(position={"x": x, "y": y})
    page.wait_for_timeout(200)
    k = panel.dots["latents"].index(panel.selected)
    j = panel.dots["latents"].index(latent)
    assert (panel.dots["x"][k], panel.dots["y"][k]) == (panel.dots["x"][j], panel.dots["y"][j])
    page.get_by_role("button", name="larger in b").click()
    page.wait_for_timeout(200)
    assert panel.side == "b"
    assert page.locator(".rows tr").nth(1).get_attribute("data-latent") == str(panel.table.latent[0])
    page.get_by_role("button", name="mean", exact=True).click()
    page.get_by_text("texts have changed").wait_for()
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_hostile_texts_are_text(page):
    panel = ContrastPanel(*panel_driver.embedded(), [panel_driver.HOSTILE + " a", "the b"], ["c d", "e\n\nf"])
    panel.wait()
    chromium.mount(page, panel)
    page.locator(".page .text").first.wait_for()
    assert page.locator("img").count() == 0
    assert page.get_by_label("Texts of set b").evaluate("e => e.readOnly")  # could not be told apart again


@pytest.mark.parametrize("width", [400, 900])
def test_it_fits_and_stops(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    panel = ContrastPanel(*panel_driver.embedded(), A, B, n_permutations=50)
    panel.wait()
    chromium.mount(page, panel)
    page.locator(".page .text").first.wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0
