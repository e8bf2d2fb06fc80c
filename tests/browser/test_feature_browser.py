"""FeatureBrowser's front end in Chromium, over the real panel."""

import re
from dataclasses import replace

import pytest
from helpers import chromium, panel_driver
from saewb_widgets import FeatureBrowser
from saewb_widgets.feature_browser import panel as feature_browser

import saewb


@pytest.fixture
def panel():
    return FeatureBrowser(panel_driver.index())


def heading(page, latent):
    page.locator(".top h2", has_text=re.compile(rf"^Latent {latent}$")).wait_for()


def listed(page):
    rows = page.locator(".row")
    return [int(rows.nth(k).get_attribute("data-latent") or -1) for k in range(rows.count())]


def test_table_and_page_are_drawn(page, panel):
    chromium.mount(page, panel)
    heading(page, panel.selected)
    assert page.inner_text("header h2") == panel.title
    n = len(listed(page))
    assert 8 < n < feature_browser.WINDOW
    assert listed(page) == panel.latents[:n]
    assert page.get_attribute(".row[aria-selected=true]", "data-latent") == str(panel.selected)
    assert page.locator(".context").count() == sum(len(g) for g in [panel.page["top"], *panel.page["groups"]])
    first = panel.index.latent(panel.selected).top[0]
    peak = page.locator(".context .t.peak").first
    assert peak.inner_text().strip() == first.token.strip()
    peak.hover()
    text = page.inner_text(".tip")
    assert f"token {first.ids[first.at]}, position {first.position} of text {first.row}" in text
    assert f"activation {first.value:.1f}" in text
    assert page.locator("svg[role=img]").count() == 4
    assert page.locator(".up .word").count() == 8
    page.locator(".card svg rect.hit").nth(3).hover()
    assert "tokens" in page.inner_text(".tip")


def test_clicks_lead_on(page, panel):
    chromium.mount(page, panel)
    page.locator(".row").nth(4).click()
    heading(page, panel.latents[4])
    assert panel.selected == panel.latents[4]
    near = page.locator(".near button").first
    target = int(near.inner_text())
    near.click()
    heading(page, target)
    assert panel.selected == target
    page.get_by_role("button", name="Pin this latent").click()
    page.locator(".top button[aria-pressed=true]", has_text="pinned").wait_for()
    assert panel.pins == [target]
    page.fill(".note", "who </script> did it")
    page.keyboard.press("Tab")
    page.wait_for_function("() => true")
    assert panel.notes == {target: "who </script> did it"}
    page.get_by_role("button", name="Show whole contexts").click()
    assert page.locator(".contexts.plain").count() > 0
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_typing_searches_and_sorts(page, panel):
    chromium.mount(page, panel)
    page.fill("input[type=search]", "physicist")
    page.locator(".total", has_text=" of 1,024").wait_for()
    assert panel.latents == panel_driver.index().search("physicist").index.tolist()
    assert listed(page) == panel.latents[: len(listed(page))]
    page.fill("input[type=search]", "surely nowhere in it")
    page.locator(".rows .none").wait_for()
    page.press("input[type=search]", "Escape")
    page.locator(".total", has_text=re.compile("^1,024 latents")).wait_for()
    page.get_by_role("button", name="Sort by largest").click()
    page.locator(".columns button[aria-current=true]", has_text="largest").wait_for()
    assert panel.sort == "max"
    assert listed(page)[0] == panel.latents[0] == int(panel_driver.index().table()["max"].idxmax())
    page.select_option("select[aria-label='Which latents']", "silent")
    page.locator(".total", has_text=" of 1,024").wait_for()
    assert panel.show_only == "silent"
    assert listed(page) == panel.latents[: len(listed(page))]


def test_density_is_chosen_by_dragging(page, panel):
    chromium.mount(page, panel)
    box = page.locator(".density svg").bounding_box()
    x = lambda k: box["x"] + (k + 0.5) / 24 * box["width"]  # noqa: E731
    y = box["y"] + 10
    page.mouse.move(x(12), y)
    page.mouse.down()
    page.mouse.move(x(15), y)
    page.mouse.up()
    page.locator(".total", has_text=" of 1,024").wait_for()
    assert panel.density == pytest.approx((10**-3, 10**-2))
    assert page.locator(".density rect.on").count() == 4
    page.mouse.click(x(3), y)
    page.locator(".total", has_text=re.compile("^1,024 latents")).wait_for()
    assert panel.density == (0.0, 1.0)


def test_the_keyboard_is_enough(page, panel):
    chromium.mount(page, panel)
    heading(page, panel.latents[0])
    page.locator(".rows").focus()
    for key, place in (("ArrowDown", 1), ("j", 2), ("k", 1), ("PageDown", 11), ("End", 1023), ("Home", 0)):
        page.keyboard.press(key)
        heading(page, panel.latents[place])
        page.locator(f".row[aria-selected=true][data-latent='{panel.latents[place]}']").wait_for()
    page.keyboard.press("p")
    page.locator(".row .marks").first.wait_for()
    assert panel.pins == [panel.latents[0]]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"


def test_scrolling_asks_for_few_rows(page):
    index = panel_driver.many()
    panel = FeatureBrowser(index, sort="latent", descending=False)
    panel.wait(120)
    chromium.mount(page, panel)
    heading(page, panel.selected)
    page.calls.clear()
    for share in (0.2, 0.5, 0.9, 0.5):
        page.evaluate("s => { const b = document.querySelector('.rows'); b.scrollTop = s * b.scrollHeight; }", share)
    page.wait_for_function("() => +document.querySelector('.row[data-latent]')?.dataset.latent > 30000")
    assert len([c for c in page.calls if "offset" in c]) <= 5
    at = listed(page)
    assert at == list(range(at[0], at[0] + len(at)))
    page.evaluate("() => { const b = document.querySelector('.rows'); b.scrollTop = b.scrollHeight; }")
    page.locator(".row[data-latent='65535']").wait_for()
    assert page.locator(".row").count() < 40


def test_what_python_sets_is_shown(page, panel):
    flush = chromium.mount(page, panel)
    panel.selected, panel.query = 748, "physicist"
    flush()
    heading(page, 748)
    assert page.input_value("input[type=search]") == "physicist"
    assert listed(page) == panel.latents[: len(listed(page))]


def test_busy_is_said_until_it_is_done(page, monkeypatch):
    import threading

    monkeypatch.setattr(feature_browser, "_AT_ONCE", 10)
    go, real = threading.Event(), saewb.FeatureIndex.table
    monkeypatch.setattr(saewb.FeatureIndex, "table", lambda self: (go.wait(30), real(self))[1])
    panel = FeatureBrowser(panel_driver.index())
    chromium.mount(page, panel)
    assert page.inner_text(".busy") == "ranking 1,024 latents…"
    assert page.get_attribute(".saewb", "aria-busy") == "true"
    heading(page, 0)
    go.set()
    page.locator(".saewb[aria-busy=false]").wait_for()
    heading(page, panel_driver.index().ranking(1)[0])
    assert page.inner_text(".busy") == ""


def test_an_error_is_shown_and_the_panel_goes_on(page):
    index = panel_driver.index()
    tensors = panel_driver.Gone(index.tensors)
    panel = FeatureBrowser(replace(index, tensors=tensors))
    chromium.mount(page, panel)
    before = panel.selected
    tensors.there = False
    page.locator(".row").nth(3).click()
    page.locator(".error_message", has_text="OSError: stale file handle").wait_for()
    assert [type(e) for e in page.raised] == [OSError]
    heading(page, before)
    page.fill("input[type=search]", "/(/")
    page.locator(".error_message", has_text="is no pattern").wait_for()
    page.get_by_role("button", name="Dismiss").first.click()
    page.locator(".error_message").wait_for(state="hidden")
    tensors.there = True
    page.locator(".row").nth(5).click()
    heading(page, panel.latents[5])
    assert page.locator(".error_message").is_hidden()


def test_hostile_tokens_are_text(page):
    panel = FeatureBrowser(panel_driver.hostile(), notes={3: panel_driver.HOSTILE})
    flush = chromium.mount(page, panel)
    for i in range(40):
        panel.selected = i
        flush()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 0
    assert page.inner_text("header h2").startswith(f"Features of {panel_driver.HOSTILE}")
    words = set(page.evaluate("[...document.querySelectorAll('.t')].map((e) => e.textContent)"))
    assert {panel_driver.HOSTILE, "</script><script>alert(1)</script>", "__proto__"} <= words
    panel.query = panel_driver.HOSTILE
    flush()
    assert page.input_value("input[type=search]") == panel_driver.HOSTILE


def test_a_text_of_ones_own(page):
    panel = FeatureBrowser(panel_driver.index(), *panel_driver.embedded())
    chromium.mount(page, panel)
    page.fill(".try input", "Marie Curie was a Polish physicist.")
    page.keyboard.press("Enter")
    page.locator(".tried").wait_for()
    assert page.inner_text(".tried").endswith("Marie Curie was a Polish physicist.")
    best = panel.tried["latents"][0][0]
    page.locator(".who button").first.click()
    heading(page, best)
    assert page.locator(".tried .t[style*=background]").count() == len(panel.tried["latents"][0][1])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_as_light_or_dark_as_what_is_around_it(page, panel, theme):
    chromium.mount(page, panel)
    page.evaluate("c => { document.body.style.background = c; }", "#ffffff" if theme == "light" else "#111111")
    page.locator(f".saewb[data-theme={theme}]").wait_for()
    ink, paper = page.evaluate(
        "() => { const s = getComputedStyle(document.querySelector('.saewb .frame'));"
        " return [s.color, s.backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)); }"
    )
    assert (ink < paper) == (theme == "light")
    assert abs(ink - paper) > 400


def test_it_takes_the_colors_of_jupyterlab(page, panel):
    page.evaluate("() => document.body.style.setProperty('--jp-layout-color1', 'rgb(1, 2, 3)')")
    chromium.mount(page, panel)
    evaluation = page.evaluate("() => getComputedStyle(document.querySelector('.saewb .frame')).backgroundColor")
    assert evaluation == "rgb(1, 2, 3)"


def test_it_fits_a_narrow_place_and_leaves_nothing_behind(page, panel):
    page.set_viewport_size({"width": 480, "height": 900})
    chromium.mount(page, panel)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    side, main = (page.locator(s).bounding_box() for s in (".side", ".main"))
    assert main["y"] >= side["y"] + side["height"] - 2
    page.evaluate("() => __stop()")
    assert page.locator(".saewb").count() == 0
    assert page.evaluate("() => __heard()") == 0


def test_a_latent_that_never_fires_has_a_page(page):
    chromium.mount(page, FeatureBrowser(panel_driver.silent(), selected=3))
    heading(page, 3)
    assert "It never fired." in page.inner_text(".main")
