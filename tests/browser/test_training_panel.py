"""TrainingPanel's front end in Chromium, over the real panel."""

import os
import time

import pytest
import torch
from helpers import chromium, panel_driver
from helpers.gated_stream import Gated
from saewb_widgets import TrainingPanel

import saewb
from saewb.data.stream import stream_draws

HOOK = "blocks.2.hook_resid_post"


def draws(seed=0):
    """Activations without end."""
    return stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=seed, batch_tokens=40)


def endless(saes=None, **how):
    how = {"n_tokens": 10**7, "batch_tokens": 40, "log_every_steps": 1, **how}
    return saewb.train(None, draws(), saes or saewb.TopK(d_sae=24, k=4), **how)


def short(**how):
    return endless(n_tokens=2_000, **how).wait()


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def live():
    run = endless()
    yield run
    run.stop()


def test_a_run_is_watched_paused_and_stopped(page, live):
    until(lambda: len(live.rows) > 2)
    panel = TrainingPanel({"mine": live})
    chromium.mount(page, panel)
    card = page.locator(".run")
    assert "running" in card.inner_text()
    assert page.locator(".card").count() == 7
    before = panel.status[0]["n_tokens"]
    page.wait_for_function(
        "n => +document.querySelector('.where').textContent.split(' of ')[0].replace(/,/g, '') > n", arg=before
    )
    page.get_by_role("button", name="Pause mine").click()
    page.locator(".run[data-state=paused]").wait_for()
    assert live.state == "paused"
    resume = page.get_by_role("button", name="Resume mine")
    resume.focus()
    page.keyboard.press("Enter")
    page.locator(".run[data-state=running]").wait_for()
    page.locator(".card[data-figure=l0] svg .hit").hover()
    assert page.inner_text(".tip").startswith("4 at ")
    page.get_by_label("Scale of loss, L0 and FVU").select_option("log")
    page.locator(".card[data-figure=loss][data-scale=log]").wait_for()
    page.get_by_role("button", name="Stop mine").click()
    page.locator(".run[data-state=stopped]").wait_for()
    assert (live.state, panel.alive, panel.scale) == ("stopped", False, "log")
    counts = saewb.run_densities(live)["sae"].counts
    page.locator(".card[data-figure=density] svg .hit").nth(0).hover()
    assert page.inner_text(".tip") == f"active on less than 1e-7 of tokens, or never\n{counts[0]} of 24 latents"
    notes = page.locator(".card svg text").all_text_contents()
    assert "NaN" not in "".join(notes)
    for card in page.locator(".card").all():
        ends = card.locator("svg text[text-anchor=end][x='39']").all_text_contents()
        assert len(set(ends)) == len(ends) > 1, ends
    most = max(range(1, 30), key=counts.__getitem__)
    page.locator(".card[data-figure=density] svg .hit").nth(most).hover()
    assert page.inner_text(".tip").endswith(f"of tokens\n{counts[most]} of 24 latents")
    assert page.get_by_role("button", name="Pause mine").count() == 0
    page.get_by_role("button", name="a run equal to mine").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code("mine").strip()


def test_a_buffer_that_fills_is_seen_to_fill_until_the_run_begins(page):
    gated = Gated()
    gated.let()
    how = {"n_tokens": 400, "batch_tokens": 40, "estimate_tokens": 80}
    run = saewb.train(None, gated.stream(), saewb.TopK(d_sae=24, k=4), **how)
    gated.until_asked(2)
    chromium.mount(page, TrainingPanel({"mine": run}))
    where, fill = page.locator(".run.before .where"), page.locator(".run.before .bar i")
    assert where.inner_text() == "filling the buffer, 40 of 200 tokens"
    assert fill.get_attribute("style") == "width: 20%;"
    gated.let(2)
    page.locator(".where", has_text="filling the buffer, 120 of 200 tokens").wait_for()
    bar = page.get_by_role("progressbar", name="Progress of mine")
    assert bar.get_attribute("aria-valuetext") == "filling the buffer, 120 of 200 tokens"
    if folder := os.environ.get("SAEWB_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/filling.png")
    gated.let(100)
    page.locator(".run[data-state=finished]:not(.before)").wait_for()
    assert page.locator(".where").inner_text().startswith("400 of 400 tokens")


def test_curves_of_several_runs_are_laid_over_one_another(page):
    two = {"a": saewb.TopK(24, k=4), "<b>": saewb.TopK(24, k=6)}
    panel = TrainingPanel({"<img src=x onerror=alert(1)>": short(), "b": short(saes={"a": two["a"], "c": two["<b>"]})})
    chromium.mount(page, panel)
    assert page.locator(".key").count() == 3
    l0 = page.locator(".card[data-figure=l0] svg polyline")
    assert l0.count() == 3
    page.get_by_role("button", name="Show or hide b / c").click()
    page.wait_for_function("() => document.querySelectorAll('.card[data-figure=l0] polyline').length === 2")
    assert panel.hidden == ["b / c"]
    assert page.evaluate("document.activeElement.dataset.key") == "b / c"
    assert page.locator("img").count() == 0
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0


def test_a_form_says_what_is_wrong_and_starts_a_run(page, tmp_path):
    model = panel_driver.embedded()[0]
    texts = [d.text for d in saewb.tiny.held_out_texts()]
    panel = TrainingPanel(
        model=model,
        tokens=texts,
        objective=saewb.TopK(256, k=8),
        hook=HOOK,
        n_tokens=4_096,
        batch_tokens=512,
        buffer_tokens=2_048,
    )
    chromium.mount(page, panel)
    page.locator(".estimate b", has_text="memory: about").wait_for()
    k = page.get_by_role("textbox", name="k", exact=True)
    k.fill("300")
    wrong = page.locator(".field[data-key='objective.k'] .wrong")
    page.wait_for_function("() => document.querySelector(\".field[data-key='objective.k'] .wrong\").textContent")
    assert "1 to d_sae=256" in wrong.inner_text()
    assert page.get_by_role("button", name="Start the training").is_disabled()
    k.fill("16")
    page.wait_for_function("() => !document.querySelector('button.start').disabled")
    assert k.input_value() == "16"
    page.get_by_role("combobox", name="Objective").select_option("BatchTopK")
    page.locator(".field[data-key='objective.threshold_rate']").wait_for()
    assert page.get_by_role("textbox", name="k", exact=True).input_value() == "16"
    page.get_by_role("textbox", name="folder").fill(str(tmp_path / "one"))
    page.locator(".estimate b").wait_for()
    page.get_by_role("button", name="Start the training").click()
    page.locator(".run").wait_for()
    page.locator(".run[data-state=finished]").wait_for(timeout=60_000)
    assert page.locator(".field").count() == 0
    assert panel.run.sae.cfg.activation == "jumprelu"
    assert panel.run.folder == tmp_path / "one"
    page.get_by_role("button", name="Show the form for a new run").click()
    page.locator(".field").first.wait_for()
    page.get_by_role("button", name="Start the training").click()
    page.locator(".error_message pre", has_text="holds a run already").wait_for()
    page.raised.clear()


def test_a_narrow_place_and_a_run_that_failed(page):
    page.set_viewport_size({"width": 420, "height": 900})

    run = saewb.train(None, _dying(), saewb.TopK(24, k=4), n_tokens=4_000, batch_tokens=40)
    until(lambda: run.state == "failed")
    panel = TrainingPanel(run)
    chromium.mount(page, panel)
    assert "the disk is gone" in page.inner_text(".run pre.bad")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def _dying():
    items = []

    def draw(n, rng):
        items.append(n)
        if len(items) > 20:
            raise OSError("<b>the disk is gone</b>")
        return torch.randn(n, 8, generator=rng)

    return stream_draws(draw, seed=0, batch_tokens=40)


def test_a_second_view_shows_the_same(page, browser):
    panel = TrainingPanel({"a": short(), "b": short()})
    chromium.mount(page, panel)
    page.get_by_role("button", name="Show or hide b").click()
    page.wait_for_function("() => document.querySelectorAll('.card[data-figure=l0] polyline').length === 1")
    page.get_by_label("Scale of loss, L0 and FVU").select_option("log")
    page.locator(".card[data-figure=loss][data-scale=log]").wait_for()
    other = browser.new_page()
    chromium.listen(other)
    other.set_content("<!doctype html><style>body { background: #111 }</style><body></body>")
    chromium.mount(other, panel)
    assert other.locator(".saewb").get_attribute("data-theme") == "dark"
    assert other.locator(".card[data-figure=l0] polyline").count() == 1
    assert other.get_by_role("button", name="Show or hide b").get_attribute("aria-pressed") == "false"
    assert other.get_by_label("Scale of loss, L0 and FVU").input_value() == "log"
    assert other.locator(".card[data-figure=loss][data-scale=log]").count() == 1
    assert other.complaints == []
    other.close()
