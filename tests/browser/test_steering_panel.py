"""SteeringPanel's front end in Chromium, over the real panel."""

import threading
import time

import pytest
from helpers import chromium, panel_driver
from saewb_widgets import SteeringPanel

import saewb


def made(**traits):
    model, sae = panel_driver.embedded()
    inputs = {"latents": {972: 16.0}, "prompt": "The scientist", "max_new_tokens": 6, **traits}
    panel = SteeringPanel(model, sae, panel_driver.index(), **inputs)
    panel.wait()
    return panel


def idle(page):
    page.locator(".saewb[aria-busy=false]").wait_for(timeout=60_000)


def test_latents_are_found_changed_and_steer_the_text(page):
    panel = made(latents={})
    begin = time.perf_counter()
    chromium.mount(page, panel)
    page.get_by_text("both texts will be the same").wait_for()
    print(f"first view: {1000 * (time.perf_counter() - begin):.0f} ms, {panel_driver.sent(panel):,} bytes")
    find = page.get_by_role("searchbox", name="Find latents to add")
    find.fill("972")
    page.get_by_role("button", name="Add latent 972").click()
    page.get_by_role("slider", name="Value of latent 972").wait_for()
    assert [(one["latent"], one["how"]) for one in panel.latents] == [(972, "add")]
    find.fill("Brazil")
    page.get_by_role("button", name="Add latent 385").wait_for()
    find.press("Enter")
    page.get_by_role("slider", name="Value of latent 385").wait_for()
    exact = page.get_by_label("Exact value of latent 972")
    exact.fill("16")
    exact.press("Tab")
    page.get_by_label("How latent 385 is changed").select_option("clamp")
    assert [one["how"] for one in panel.latents] == ["add", "clamp"]
    assert panel.latents[0]["value"] == 16.0
    page.get_by_role("button", name="Remove latent 385").click()
    page.get_by_role("slider", name="Value of latent 385").wait_for(state="detached")
    idle(page)
    assert page.locator(".mover").count() == 12
    assert page.locator(".mover .t").first.inner_text().strip() == panel.movers[0][1].strip()
    page.get_by_label("Prompt").fill("The scientist was born in")
    page.get_by_role("button", name="Generate both texts").click()
    page.locator(".texts mark").wait_for(timeout=60_000)
    idle(page)
    assert panel.prompt == "The scientist was born in"
    shown = page.locator(".texts .text")
    assert shown.nth(0).inner_text() == panel.prompt + panel.clean
    assert shown.nth(1).inner_text() == panel.prompt + panel.steered
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    exec(panel.code(), inputs := {"model": panel.model, "sae": panel.saes[0]})
    assert (inputs["clean"], inputs["steered"]) == (panel.clean, panel.steered)
    assert page.inner_text(".notice pre").strip() == panel.code().strip()
    assert page.raised == []


def test_a_slider_is_throttled_and_the_last_value_counts(page):
    panel = made()
    chromium.mount(page, panel)
    slider = page.get_by_role("slider", name="Value of latent 972")
    slider.focus()
    before = len(page.calls)
    for _ in range(20):
        slider.press("ArrowLeft")
    page.wait_for_timeout(400)
    value = float(slider.input_value())
    assert value < 16
    assert panel.latents[0]["value"] == value
    print(f"20 steps of a slider: {sum('latents' in c for c in page.calls[before:])} messages")
    idle(page)
    model, sae = panel_driver.embedded()
    want = saewb.next_token_changes(
        model, panel.prompt, lambda: saewb.steer(model, sae, {972: value}, positions=slice(1, None)), n=20
    )
    assert panel.changes.equals(want)


def test_it_streams_and_stops(page, monkeypatch):
    panel, go, real = made(max_new_tokens=40), threading.Semaphore(0), saewb.generate_tokens

    def held(*args, **kwargs):
        return (token for token in real(*args, **kwargs) if go.acquire(timeout=60))

    monkeypatch.setattr(saewb, "generate_tokens", held, raising=False)
    chromium.mount(page, panel)
    stop = page.get_by_role("button", name="Stop generating")
    assert stop.is_disabled()
    page.get_by_label("Prompt").press("Control+Enter")
    page.locator(".busy", has_text="writing").wait_for()
    for _ in range(4):
        go.release()
    page.wait_for_function("() => document.querySelectorAll('.texts .text')[1].textContent.length > 16")
    assert panel.running
    assert panel.clean
    stop.click()
    page.locator(".caret").first.wait_for(state="detached")
    assert not panel.running
    for _ in range(200):
        go.release()
    page.wait_for_timeout(300)
    assert page.locator(".texts .text").nth(0).inner_text() == panel.prompt + panel.clean
    seed = page.get_by_label("seed")
    seed.fill("3")
    seed.press("Tab")
    page.get_by_text("with earlier settings").first.wait_for()


def test_errors_are_shown_and_hostile_text_is_text(page):
    panel = made()
    flush = chromium.mount(page, panel)
    prompt = page.get_by_label("Prompt")
    prompt.fill("word " * 2000)
    page.get_by_role("button", name="Generate both texts").click()
    page.locator(".error_message pre", has_text="takes 512 at most").wait_for(timeout=60_000)
    prompt.fill(panel_driver.HOSTILE)
    page.get_by_role("button", name="Generate both texts").click()
    page.locator(".error_message").wait_for(state="hidden", timeout=60_000)
    idle(page)
    assert page.locator(".texts .given").first.inner_text() == panel_driver.HOSTILE
    panel.movers = [[1, panel_driver.HOSTILE, 0.1, 0.2, 0.1]]
    flush()
    page.locator(".mover .t", has_text=panel_driver.HOSTILE).wait_for()
    assert page.locator("img").count() == 0
    prompt.fill("another")
    page.get_by_text("with earlier settings").first.wait_for()
    assert page.locator(".texts .given").first.inner_text() == panel_driver.HOSTILE
    find = page.get_by_role("searchbox", name="Find latents to add")
    find.fill("99999")
    page.get_by_text("Nothing found").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_as_light_or_dark_as_what_is_around_it(page, theme):
    page.evaluate("c => { document.body.style.background = c }", "white" if theme == "light" else "#111")
    panel = made()
    panel.generate()
    panel.wait()
    chromium.mount(page, panel)
    assert page.locator(f".saewb[data-theme={theme}]").count() == 1
    ink = page.evaluate(
        "() => getComputedStyle(document.querySelector('.texts .text')).color.match(/\\d+/g).map(Number)"
    )
    assert (sum(ink) < 300) == (theme == "light")


def test_a_narrow_place_and_nothing_left_behind(page):
    page.set_viewport_size({"width": 420, "height": 900})
    chromium.mount(page, made())
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0


TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def test_it_shows_what_the_text_costs_and_sweeps(page):
    panel = made(max_new_tokens=12)
    chromium.mount(page, panel)
    page.get_by_role("button", name="Generate both texts").click()
    page.locator(".costs b").nth(3).wait_for(timeout=60_000)
    shown = page.locator(".costs").nth(1).inner_text()
    figures = panel.text_figures
    assert "KL" in shown
    assert "fluency" in shown
    assert f"{figures.kl:.2f}" in shown
    page.get_by_role("button", name="Write the steered text at several strengths").click()
    page.locator(".strength").nth(7).wait_for(timeout=60_000)
    idle(page)
    assert [row["factor"] for row in panel.swept] == [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    assert panel.swept[0]["text"] == panel.clean
    assert panel.swept[4]["text"] == panel.steered
    assert panel.swept[4]["kl"] == pytest.approx(figures.kl, rel=1e-2)
    page.get_by_role("button", name="Steer 0.5 times as much").click()
    page.wait_for_function("() => document.querySelectorAll('.strength').length === 0")
    assert panel.latents[0]["value"] == 8.0
    assert page.raised == []


def test_a_chat_has_roles_and_positions_of_them(page):
    model, sae = panel_driver.embedded()
    model.tokenizer.chat_template = TEMPLATE
    try:
        panel = SteeringPanel(model, sae, latents={972: 16.0}, prompt="Where is it?", max_new_tokens=4)
        chromium.mount(page, panel)
        page.get_by_label("chat").check()
        page.locator(".turn", has_text="Where is it?").wait_for()
        page.get_by_label("Prompt").fill("system: Be brief.\nuser: Who?")
        page.locator(".turn", has_text="Be brief.").wait_for()
        assert page.locator(".turn .role").all_inner_texts() == ["system", "user", "assistant"]
        page.get_by_label("positions").select_option("user")
        page.locator(".turn.steers", has_text="Who?").wait_for()
        page.get_by_role("button", name="Generate both texts").click()
        page.locator(".costs b").nth(3).wait_for(timeout=60_000)
        exec(panel.code(), inputs := {"model": model, "sae": sae})
        assert inputs["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
        assert (inputs["clean"], inputs["steered"]) == (panel.clean, panel.steered)
        page.get_by_label("chat").uncheck()
        page.locator(".turn").first.wait_for(state="detached")
        assert panel.positions == "not the first"
    finally:
        model.tokenizer.chat_template = None
