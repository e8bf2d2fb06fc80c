"""CataloguePicker's front end in Chromium, over the real panel and the real catalogue; only the download is made up."""

import threading
import time

import pytest
from helpers import chromium, panel_driver
from saewb_widgets import CataloguePicker

import saewb

JB = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


@pytest.fixture
def steps(monkeypatch):
    """Each release of this lets a tenth of a download come."""
    come = threading.Semaphore(0)

    def load_sae(release, id, progress):
        for tenth in range(1, 11):
            assert come.acquire(timeout=60)
            progress(tenth * 15_109_632, 151_096_320)
        if id == "blocks.0.hook_resid_pre":
            raise ConnectionError(f"{panel_driver.HOSTILE}: the download broke off.\n  fix:  saewb.load_sae(...)")
        return f"an SAE of {release} {id}"

    monkeypatch.setattr(saewb, "load_sae", load_sae, raising=False)
    return come


def names(page):
    return page.locator(".row .name:nth-child(2)").all_inner_texts()


def test_filters_narrow_the_table_and_say_what_is_left(page, capsys):
    panel = CataloguePicker()
    begun = time.perf_counter()
    chromium.mount(page, panel)
    page.locator(".row .name").first.wait_for()
    first = time.perf_counter() - begun
    assert page.locator(".row").count() < 40
    assert page.inner_text(".total") == "13,857 SAEs, 38 models, 170 releases"
    page.get_by_label("model", exact=True).select_option("google/gemma-2-2b")
    page.locator(".total", has_text="1,731 of 13,857 SAEs").wait_for()
    options = page.get_by_label("site", exact=True).locator("option").all_inner_texts()
    assert options[0] == f"any site ({len(panel.left['site'])})"
    assert options[1:] == [f"{v}  ({n:,})" for v, n in panel.left["site"]]
    page.get_by_label("site", exact=True).select_option("resid_post")
    page.get_by_label("layer", exact=True).select_option("20")
    page.get_by_label("width", exact=True).select_option("16384")
    page.get_by_label("L0, least").fill("30")
    page.get_by_label("L0, most").fill("150")
    page.get_by_label("L0, most").press("Tab")
    page.get_by_role("button", name="Sort by L0").click()
    page.get_by_role("button", name="Sort by L0").click()
    page.locator(".columns", has_text="L0 \u2193").wait_for()
    table = saewb.catalogue(model="google/gemma-2-2b", site="resid_post", layer=20, width=16384, l0=(30, 150))
    table = table.sort_values("l0", ascending=False, kind="stable")
    assert names(page) == table.id.tolist()
    page.get_by_label("Search the catalogue").fill("canonical")
    page.locator(".total", has_text=f"{table.release.str.contains('canonical').sum()} of").wait_for()
    page.get_by_label("on Neuronpedia").check()
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()
    page.get_by_label("Search the catalogue").fill("no such thing")
    page.get_by_text("No published SAE matches.").wait_for()
    page.get_by_role("button", name="Remove all filters").click()
    page.locator(".total", has_text="13,857 SAEs, 38").wait_for()
    assert page.get_by_label("model", exact=True).input_value() == ""
    with capsys.disabled():
        print(f"\nCataloguePicker: first view {first:.2f} s, {panel_driver.sent(panel) / 1000:.0f} kB")
    assert page.raised == []


def test_scrolling_and_keys_reach_every_row(page):
    panel = CataloguePicker()
    chromium.mount(page, panel)
    page.locator(".row .name").first.wait_for()
    page.locator(".rows").evaluate("e => { e.scrollTop = 7000 * 26 }")
    page.locator(".row[aria-posinset='7005'] .name").first.wait_for()
    row = page.locator(".row[aria-posinset='7005']")
    assert row.locator(".name").all_inner_texts() == panel.table.loc[7004, ["release", "id"]].tolist()
    assert 6900 < panel.rows["offset"] < 7005
    row.click()
    page.locator(".head h2", has_text=panel.table.id[7004]).wait_for()
    page.keyboard.press("ArrowDown")
    page.locator(".row[aria-posinset='7006'][aria-selected='true']").wait_for()
    assert panel.selected == tuple(panel.table.loc[7005, ["release", "id"]])
    page.keyboard.press("End")
    page.locator(".row[aria-posinset='13857'][aria-selected='true'] .name").first.wait_for()
    assert panel.position == 13_856


def test_loading_shows_how_far_it_is_can_be_cancelled_and_ends_in_the_panel(page, steps):
    panel = CataloguePicker(release="gpt2-small-res-jb")
    chromium.mount(page, panel)
    page.get_by_text("Choose an SAE").wait_for()
    page.locator(".row", has_text="blocks.8.hook_resid_pre").click()
    for text in ("jbloom/GPT2-Small-SAEs-Reformatted", "60, measured by its authors", "24,576, of 768 dimensions"):
        page.locator("dd", has_text=text).wait_for()
    assert page.locator("a.out").first.get_attribute("href").endswith("neuronpedia.org/gpt2-small/8-res-jb")
    load = page.get_by_role("button", name="Load gpt2-small-res-jb, blocks.8.hook_resid_pre")
    assert load.inner_text() == "Load 151 MB"
    load.click()
    page.get_by_text("asking the hub").wait_for()
    for _ in range(4):
        steps.release()
    page.get_by_text("60.4 of 151 MB").wait_for()
    assert page.locator("progress").evaluate("e => e.value / e.max") == 0.4
    assert page.get_by_label("Stop loading").evaluate("e => document.activeElement === e")  # where Load was
    page.locator(".row", has_text="blocks.3.hook_resid_pre").click()  # the panel can be used meanwhile
    page.locator(".which", has_text="blocks.8.hook_resid_pre").wait_for()
    page.get_by_label("Stop loading").click()
    page.locator(".notice", has_text="cancelled: gpt2-small-res-jb, blocks.8.hook_resid_pre").wait_for()
    steps.release()  # on which its thread ends
    assert page.locator("progress").count() == 0
    assert (panel.sae, panel.busy, panel.progress) == (None, "", {})
    end = time.monotonic() + 30
    while any(t.name == "saewb load" for t in threading.enumerate()):
        assert time.monotonic() < end
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Load gpt2-small-res-jb, blocks.3.hook_resid_pre").click()
    for _ in range(10):
        steps.release()
    page.locator(".loaded", has_text="panel.sae is gpt2-small-res-jb, blocks.3.hook_resid_pre").wait_for()
    assert panel.sae is not None
    assert "\nsae = saewb.load_sae('gpt2-small-res-jb', 'blocks.3.hook_resid_pre')" in panel.code()


def test_a_download_that_fails_is_shown_and_the_next_one_works(page, steps):
    panel = CataloguePicker(release="gpt2-small-res-jb", selected=("gpt2-small-res-jb", "blocks.0.hook_resid_pre"))
    chromium.mount(page, panel)
    page.get_by_role("button", name="Load gpt2-small-res-jb").click()
    for _ in range(10):
        steps.release()
    page.locator(".error_message", has_text="the download broke off").wait_for()
    assert page.locator(".error_message img").count() == 0
    assert page.locator("progress").count() == 0
    assert isinstance(panel.error, ConnectionError)
    page.get_by_role("button", name="Dismiss").click()
    page.locator(".error_message").wait_for(state="hidden")
    page.locator(".row", has_text="blocks.8.hook_resid_pre").click()
    page.get_by_role("button", name="Load gpt2-small-res-jb, blocks.8").click()
    for _ in range(10):
        steps.release()
    page.locator(".loaded", has_text="panel.sae is gpt2-small-res-jb, blocks.8.hook_resid_pre").wait_for()


@pytest.mark.parametrize("width", [420, 1100])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_in_both_themes(page, theme, width, steps):
    page.set_viewport_size({"width": width, "height": 900})
    page.add_style_tag(content=f"body {{ background: {'white' if theme == 'light' else '#111'} !important }}")
    chromium.mount(page, CataloguePicker(selected=JB))
    page.locator(f".saewb[data-theme='{theme}'] .row .name").first.wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0
