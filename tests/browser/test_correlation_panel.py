"""CorrelationPanel's front end in Chromium, over the real panel."""

import os
import threading
import time

import pytest
import torch
from helpers import chromium, panel_driver
from saewb_widgets import CorrelationPanel
from saewb_widgets.correlation import panel as panel_module

import saewb
from saewb.stats import _overview
from saewb.synthetic import random_dictionary


def drawn(page, panel, after=0):
    """Wait until the picture is of the view, newer than tile number `after`; its number."""
    page.wait_for_function(
        "([v, n]) => { const d = document.querySelector('canvas.map').dataset; return d.view === v && +d.seq > n; }",
        arg=[",".join(map(str, panel.shown.window)), after],
        timeout=30_000,
    )
    return int(page.get_attribute("canvas.map", "data-seq"))


def pixel(page, fx, fy):
    js = """([x, y]) => { const c = document.querySelector('canvas.map'), o = document.createElement('canvas');
      [o.width, o.height] = [1, 1];
      const to = o.getContext('2d', { willReadFrequently: true });
      to.drawImage(c, Math.floor(x * c.width), Math.floor(y * c.height), 1, 1, 0, 0, 1, 1);
      return [...to.getImageData(0, 0, 1, 1).data]; }"""
    return page.evaluate(js, [fx, fy])


def test_zooming_moving_and_the_pair(page):
    panel = CorrelationPanel(panel_driver.index())
    flush = chromium.mount(page, panel)
    seq = drawn(page, panel)
    box = page.locator("canvas.map").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
    page.mouse.wheel(0, -120)
    page.wait_for_function("() => document.querySelector('.caption').textContent.includes('rows')")
    page.wait_for_timeout(300)
    r0, r1, c0, c1 = panel.view
    assert (r1 - r0, c1 - c0) == (634, 634)
    assert r0 == pytest.approx(0.75 * (1024 - 634), abs=4)
    assert c0 == pytest.approx(0.25 * (1024 - 634), abs=4)
    seq = drawn(page, panel)
    page.get_by_role("button", name="Zoom in").click()
    seq = drawn(page, panel, seq)
    page.focus("canvas.map")
    before = panel.view
    page.keyboard.press("ArrowRight")
    drawn(page, panel, seq)
    assert panel.view[2] > before[2]
    assert panel.view[:2] == before[:2]
    page.keyboard.press("0")
    drawn(page, panel)
    assert panel.view == (0, 1024, 0, 1024)
    i, j, value, *_ = panel.figures["pairs"][0]
    page.locator(".rows button").first.click()
    page.locator(".pair h3", has_text=f"{i} and {j}").wait_for()
    assert panel.pair == (i, j)
    assert "together on" in page.inner_text(".pair h3")
    peaks = page.locator(".one .context .peak")
    assert peaks.first.inner_text().strip() == panel.index.latent(i).top[0].token.strip()
    order = panel.overview.rows.tolist()
    r, c = order.index(i), order.index(j)
    panel.view = (max(0, r - 5), max(0, r - 5) + 10, max(0, c - 5), max(0, c - 5) + 10)
    flush()
    drawn(page, panel)
    fx, fy = (c - panel.view[2] + 0.5) / 10, (r - panel.view[0] + 0.5) / 10
    warm = pixel(page, fx, fy)
    assert warm[0] > warm[2] + 60 if value > 0 else warm[2] > warm[0] + 60
    page.mouse.move(box["x"] + fx * box["width"], box["y"] + fy * box["height"])
    page.wait_for_timeout(300)
    page.mouse.move(box["x"] + fx * box["width"] + 2, box["y"] + fy * box["height"])
    text = page.inner_text(".tip")
    assert text.startswith(str(i))
    assert panel.index.latent(j).top[0].token.strip() in text
    assert "phi" in text
    page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(200)
    assert panel.pair == (i, j)
    page.select_option("select[aria-label=Order]", "density")
    page.wait_for_timeout(300)
    assert panel.order == "density"
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_sixty_five_thousand_features(page):
    """Opening and zooming a matrix of 4 billion entries: what it takes is printed."""
    n = 65_536
    low = saewb.random_low_rank_correlation(n, 50, seed=1)
    begun = time.perf_counter()
    panel = CorrelationPanel(low, order="index")
    flush = chromium.mount(page, panel)
    seq = drawn(page, panel)
    took = time.perf_counter() - begun
    print(f"\n65,536 x 65,536: first view {1000 * took:.0f} ms, {panel_driver.sent(panel) + 65_536:,} bytes")
    assert panel_driver.sent(panel) + 65_536 < 300_000
    for window in ((0, 30_000, 0, 30_000), (5000, 9000, 5000, 9000), (5000, 7000, 100, 2100), (5000, 5200, 100, 300)):
        panel.view = window
        begun = time.perf_counter()
        flush()
        seq = drawn(page, panel, seq)
        wall = time.perf_counter() - begun
        shown_ms = page.get_attribute("canvas.map", "data-ms")
        print(f"zoom to {window}: {1000 * wall:.0f} ms, of which kernel and drawing {shown_ms} ms; {panel.shown.cells}")
    page.get_by_role("button", name="Stop looking through the entries").click()
    page.locator(".saewb[aria-busy=false]").wait_for(timeout=60_000)
    assert panel.busy == ""
    assert panel.progress < 1


def test_bytes_that_get_lost_are_asked_for_as_text(page):
    panel = CorrelationPanel(torch.eye(30), order="index")
    flush = chromium.mount(page, panel)
    drawn(page, panel)
    saved = panel.send
    panel.send = lambda content, buffers=None: saved(content, [])
    panel.view = (0, 10, 0, 10)
    flush()
    drawn(page, panel)
    assert page.calls[-1] == {"do": "tile", "seq": 3, "view": [0, 10, 0, 10], "plain": True}


def test_learnt_against_true_is_a_diagonal(page):
    dictionary = random_dictionary(60, 40)
    learnt = dictionary.directions[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    panel = CorrelationPanel(learnt, dictionary)
    chromium.mount(page, panel)
    drawn(page, panel)
    assert panel.order == "matched"
    for k in (5, 30, 50):
        on, off = pixel(page, (k + 0.5) / 60, (k + 0.5) / 60), pixel(page, (k + 0.5) / 60, ((k + 7) % 60 + 0.5) / 60)
        assert on[0] - on[2] > 150
        assert abs(off[0] - off[2]) < 120


def test_two_matrices_side_by_side(page):
    true = saewb.random_low_rank_correlation(60, 4, scale=0.3, seed=2)
    feature = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    learnt = saewb.matrix_view(true).picked(feature).block(range(60), range(60))
    panel = CorrelationPanel(learnt, against=true, matched=feature)
    flush = chromium.mount(page, panel)
    drawn(page, panel)
    page.locator(".caption", has_text="the two differ by").wait_for()
    same = """() => { const [a, b] = ["canvas.map", "canvas.twin"].map((s) => document.querySelector(s))
        .map((c) => c.getContext("2d").getImageData(0, 0, c.width, c.height).data);
      return a.length === b.length && a.some((x) => x !== a[0]) && a.every((x, i) => x === b[i]); }"""
    assert page.evaluate(same)
    box = page.locator("canvas.twin").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.wheel(0, -120)
    page.wait_for_timeout(400)
    assert panel.view != (0, 60, 0, 60)
    page.mouse.move(box["x"] + 20, box["y"] + 30)
    page.mouse.move(box["x"] + 22, box["y"] + 30)
    one, two = page.inner_text(".tip").splitlines()[-1].removeprefix("correlation ").split(" and ")
    assert one == two
    page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(200)
    page.locator(".pair h3", has_text=f"{panel.pair[0]} and {panel.pair[1]}").wait_for()
    panel.view = (0, 60, 0, 60)
    flush()
    drawn(page, panel)
    page.mouse.move(1, 1)
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_the_model_is_stopped_and_run_again(page, monkeypatch):
    go, real = threading.Event(), saewb.latent_matrix

    def slow(*args, progress, **kwargs):
        progress(4096)
        go.wait(30)
        return real(*args, progress=progress, **kwargs)

    monkeypatch.setattr(saewb, "latent_matrix", slow, raising=False)
    model, sae = panel_driver.embedded()
    texts = [d.text for d in saewb.tiny.held_out_texts()[:10]]
    panel = CorrelationPanel(sae, model=model, tokens=texts)
    chromium.mount(page, panel)
    page.locator(".busy", has_text="running the model: 4,096 tokens").wait_for()
    page.get_by_role("button", name="Stop looking through the entries").click()
    go.set()
    page.locator(".notice", has_text="Stopped after").wait_for()
    page.get_by_role("button", name="Begin anew what was stopped").click()
    page.locator("canvas.map[data-seq]").wait_for()
    drawn(page, panel)
    assert panel.matrix.shape == (1024, 1024)


def test_a_part_in_view_becomes_finer(page, monkeypatch):
    monkeypatch.setattr(panel_module, "AT_ONCE", 10)
    monkeypatch.setattr(panel_module, "PIXELS", 100)
    monkeypatch.setattr(_overview, "INTERACTIVE_COST", 1000.0)
    monkeypatch.setattr(_overview, "MAX_CELLS", 500)
    low = saewb.random_low_rank_correlation(2000, 5, scale=0.1, seed=1)
    monkeypatch.setattr(_overview.Overview, "scan", lambda self: iter(()))
    panel = CorrelationPanel(low, order="index", view=(100, 420, 0, 320))
    panel.wait(60)
    chromium.mount(page, panel)
    page.locator(".caption", has_text="mean of").wait_for()
    page.locator(".caption", has_text="strongest entry of 4 x 4").wait_for()
    assert page.get_attribute("canvas.map", "data-final") == "true"


@pytest.mark.parametrize("matrix", [torch.ones(1, 1), torch.full((3, 3), torch.nan), torch.eye(2)])
def test_tiny_and_undefined_matrices(page, matrix):
    panel = CorrelationPanel(matrix)
    chromium.mount(page, panel)
    drawn(page, panel)
    page.focus("canvas.map")
    for key in ("+", "-", "ArrowUp", "0"):
        page.keyboard.press(key)
    box = page.locator("canvas.map").bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + 5)
    page.wait_for_timeout(300)
    i = int(panel.overview.rows[0])
    page.locator(".pair h3", has_text=f"{i} and {i}").wait_for()
    assert ("not defined" in page.inner_text(".pair h3")) == bool(matrix.isnan().any())
    assert panel.error_message == ""
    assert panel.view == (0, len(matrix), 0, len(matrix))


def test_hostile_tokens_are_text_and_errors_are_shown(page):
    panel = CorrelationPanel(panel_driver.hostile().matrix(min_fires=1), index=panel_driver.hostile(), order="index")
    flush = chromium.mount(page, panel)
    drawn(page, panel)
    for i in range(12):
        panel.pair = (i, i + 20)
        flush()
    box = page.locator("canvas.map").bounding_box()
    for k in range(8):
        page.mouse.move(box["x"] + 20 + 40 * k, box["y"] + 30 + 50 * k)
        page.wait_for_timeout(160)
    page.mouse.move(box["x"] + 303, box["y"] + 383)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 0
    with pytest.raises(ValueError, match="near: density"):
        panel.order = "densty"
    flush()
    page.locator(".error_message", has_text="order is 'densty'").wait_for()
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark(page, theme):
    page.evaluate("c => { document.body.style.background = c; }", "#ffffff" if theme == "light" else "#111111")
    panel = CorrelationPanel(panel_driver.index())
    panel.pair = tuple(panel.figures["pairs"][0][:2])
    chromium.mount(page, panel)
    page.locator(f".saewb[data-theme={theme}]").wait_for()
    drawn(page, panel)
    page.wait_for_timeout(200)
    assert (sum(pixel(page, 0.98, 0.02)[:3]) > 384) == (theme == "light")
    if where := os.environ.get("SAEWB_SCREENSHOTS"):
        page.screenshot(path=f"{where}/correlation_{theme}.png", full_page=True)
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
