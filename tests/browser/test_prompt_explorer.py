"""PromptExplorer's front end in Chromium, over the real panel."""

import re
import threading
import time
from dataclasses import replace

import pytest
from helpers import chromium, panel_driver, tiny_models
from saewb_widgets import PromptExplorer

import saewb

TEXT = "Marie Curie was a Polish physicist.\nShe won the Nobel Prize"


def explorer(**traits):
    return PromptExplorer(*panel_driver.embedded(), panel_driver.index(), **{"prompt": TEXT, **traits})


def listed(page):
    rows = page.locator(".latents .row[role=option]")
    return [int(rows.nth(k).get_attribute("data-latent")) for k in range(rows.count())]


def at(page, position):
    page.locator(f".token[data-position='{position}'][aria-selected=true]").wait_for()


def test_a_prompt_is_typed_and_its_tokens_and_latents_clicked(page):
    panel = explorer(prompt="")
    start = time.perf_counter()
    chromium.mount(page, panel)
    page.locator(".saewb.prompt").wait_for()
    assert page.locator(".token").count() == 0
    page.fill("textarea", TEXT)
    page.keyboard.press("Enter")
    page.locator(".token").first.wait_for()
    print(f"typed and read in {time.perf_counter() - start:.2f} s, {panel_driver.sent(panel) // 1000} kB")
    tokens = panel.window["tokens"]
    assert page.locator(".token").count() == len(tokens)
    assert page.locator(".token.mark").inner_text() == "<|endoftext|>"
    text = page.locator(".token").all_inner_texts()
    assert "\u00b7physicist" in text
    assert "\u21b5" in "".join(text)  # the line break is seen
    at(page, len(tokens) - 1)
    assert listed(page) == panel.latents.latent.tolist()
    k = tokens.index(" physicist")
    start = time.perf_counter()
    page.locator(f".token[data-position='{k}']").click()
    at(page, k)
    print(f"a token in {(time.perf_counter() - start) * 1000:.0f} ms")
    assert panel.position == k
    assert listed(page) == panel.reading.to_frame(k).latent.tolist()
    target = listed(page)[2]
    page.locator(".latents .row[role=option]").nth(2).click()
    page.locator(".top h2", has_text=re.compile(f"^Latent {target}$")).wait_for()
    assert panel.selected == target
    acts = panel.reading.activations(0, target)
    assert page.locator(".token[style*=background]").count() == int((acts != 0).sum())
    page.locator(f".token[data-position='{k}']").hover()
    assert f"latent {target}: {acts[k]:.1f}"[:12] in page.inner_text(".tip")
    page.get_by_role("button", name="Latents of the whole prompt").click()
    page.locator(".latents h3", has_text="whole prompt").wait_for()
    assert listed(page) == panel.latents.latent[:40].tolist()
    page.get_by_role("button", name="More latents").click()
    page.wait_for_function("() => document.querySelectorAll('.latents .row[role=option]').length > 40")
    near = page.locator(".near button").first
    other = int(near.inner_text())
    near.click()
    page.locator(".top h2", has_text=re.compile(f"^Latent {other}$")).wait_for()
    assert page.raised == []


def test_effects_on_the_next_token_that_is_chosen(page):
    panel = explorer()
    chromium.mount(page, panel)
    words = panel.next_tokens.to_frame()
    page.locator(".next .word").nth(1).click()
    page.locator(".next .word[aria-pressed=true]").wait_for()
    page.locator(".saewb[aria-busy=false]").wait_for()
    assert panel.rank == "logit_effect"
    assert panel.words["target_id"] == int(words.id[1])
    assert listed(page) == panel.latents.latent.tolist()
    page.select_option("select[aria-label='Sort by']", "attribution")
    page.locator(".latents .sub .num", has_text="attribution").wait_for()
    assert panel.rank == "attribution"
    page.fill("input[aria-label='Next token that effects are on']", "two words")
    page.keyboard.press("Enter")
    page.locator(".error_message", has_text="of this model").wait_for()
    assert isinstance(panel.error, ValueError)
    page.get_by_role("button", name="Dismiss").first.click()
    page.get_by_role("button", name="The likeliest again").click()
    page.locator(".next .word").first.and_(page.locator("[aria-pressed=true]")).wait_for()
    page.locator(".saewb[aria-busy=false]").wait_for()
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_the_keyboard_is_enough(page):
    panel = explorer()
    chromium.mount(page, panel)
    last = panel.window["total"] - 1
    page.locator(".tokens").focus()
    for key, place in (("ArrowLeft", last - 1), ("Home", 0), ("ArrowRight", 1), ("End", last)):
        page.keyboard.press(key)
        at(page, place)
    page.locator(".latents .rows").focus()
    page.keyboard.press("ArrowDown")
    page.locator(".latents .row[role=option]").nth(1).and_(page.locator("[aria-selected=true]")).wait_for()
    assert panel.selected == panel.latents.latent[1]
    page.keyboard.press("p")
    page.locator(".latents .sub", has_text="Pinned").wait_for()
    assert panel.pins == [(0, panel.selected)]


def test_options_and_what_python_sets(page):
    panel = explorer(everywhere=True)
    flush = chromium.mount(page, panel)
    page.get_by_label("special tokens too").check()
    page.wait_for_function("() => document.querySelector('.token').style.boxShadow !== null")
    page.locator(".saewb[aria-busy=false]").wait_for()
    assert panel.special_tokens
    n = len(panel.latents)
    page.select_option("select[aria-label='Hide dense latents']", "0.01")
    page.wait_for_function(f"() => !document.querySelector('.more').textContent.includes('of {n}')")
    assert panel.max_density == 0.01
    panel.prompt = "A cat"
    panel.wait(60)
    flush()
    page.locator(".token", has_text="cat").wait_for()
    assert page.input_value("textarea") == "A cat"


def test_errors_a_long_prompt_and_none(page):
    panel = explorer()
    chromium.mount(page, panel)
    page.fill("textarea", "A cat sat. " * 500)
    page.keyboard.press("Enter")
    page.locator(".error_message", has_text="takes 512 at most").wait_for()
    assert page.locator(".token").count() == 0
    page.fill("textarea", "A cat sat. " * 100)
    page.keyboard.press("Enter")
    page.locator(".pages").wait_for()
    assert page.locator(".error_message").is_hidden()
    n = panel.window["total"]
    assert page.locator(".token").count() == n - 400
    page.get_by_role("button", name="Earlier tokens").click()
    page.locator(".token[data-position='0']").wait_for()
    assert page.locator(".token").count() == 400
    page.fill("textarea", "")
    page.keyboard.press("Enter")
    page.locator(".token").first.wait_for(state="detached")
    assert panel.prompt == ""


def test_a_busy_kernel_is_said(page, monkeypatch):
    panel = explorer(prompt="A dog")
    flush = chromium.mount(page, panel)
    with monkeypatch.context() as patched:
        patched.setattr(panel, "set_state", lambda values: None)  # a cell is running: nobody answers
        page.fill("textarea", "A cat")
        page.keyboard.press("Enter")
        page.locator(".waiting", has_text="waiting for the kernel").wait_for()
    panel.set_state({"prompt": "A cat"})
    panel.wait(60)
    flush()
    page.locator(".token", has_text="cat").wait_for()
    assert page.inner_text(".waiting") == ""


def test_it_says_how_far_it_is_and_stops(page):
    panel, go = explorer(prompt="A dog"), threading.Semaphore(0)

    def slow(activation):
        assert go.acquire(timeout=60)

    held = saewb.models.hook_points.resolve(panel.inputs.runner.model, "blocks.1.hook_resid_post").add(slow)
    chromium.mount(page, panel)
    page.fill("textarea", "A cat")
    page.keyboard.press("Enter")
    page.locator(".busy", has_text="layer 2 of 4").wait_for()
    page.get_by_role("button", name="Stop the model").click()
    page.locator(".notice", has_text="not read").wait_for()
    page.wait_for_timeout(900)
    assert page.inner_text(".waiting") == ""  # the kernel is not to blame
    go.release()
    held.remove()
    page.get_by_role("button", name="Read the prompt").click()
    page.locator(".token", has_text="cat").wait_for()
    page.locator(".notice").wait_for(state="hidden")
    page.locator(".next .kl").wait_for()


def test_hostile_tokens_are_text(page):
    panel = PromptExplorer(
        tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post"), panel_driver.hostile(), prompt="w3 w9 w20 w4"
    )
    names = (*panel_driver.NAMES[:4], "\n")
    panel._answer = replace(panel._answer, reading=replace(panel.reading, tokens=names))
    panel._on_answer((panel._answer, None))
    chromium.mount(page, panel)
    assert page.locator("img").count() == page.locator("script").count() == 0
    assert page.locator(".token").nth(0).text_content().replace("\u00b7", " ") == panel_driver.HOSTILE
    panel.prompt = ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_several_saes_in_a_narrow_place_in_both_themes(page, theme):
    page.set_viewport_size({"width": 480, "height": 900})
    page.evaluate("c => { document.body.style.background = c; }", "#ffffff" if theme == "light" else "#111111")
    model, sae = panel_driver.embedded()
    panel = PromptExplorer(model, [sae, sae], [panel_driver.index(), None], prompt=TEXT)
    chromium.mount(page, panel)
    page.locator(f".saewb[data-theme={theme}]").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.select_option("select[aria-label='Which SAE']", "1")
    page.locator(".next .key.gray").wait_for()
    assert panel.shown == 1
    page.evaluate("() => __stop()")
    assert page.locator(".saewb").count() == 0
    assert page.evaluate("() => __heard()") == 0


def test_a_chat_shows_roles_and_goes_to_their_last_tokens(page):
    model, sae = panel_driver.embedded()
    model.tokenizer.chat_template = (
        "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    try:
        panel = explorer(prompt="system: Be brief.\nuser: Where?")
        assert "roles" not in panel.window or panel.window["roles"] == []
        chromium.mount(page, panel)
        page.get_by_label("chat", exact=True).check()
        page.locator(".turn button.role", has_text="system").wait_for(timeout=60_000)
        page.locator(".saewb[aria-busy=false]").wait_for(timeout=60_000)
        chat = saewb.chat_prompt(
            model, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
        )
        assert panel.window["roles"] == list(chat.roles)
        assert panel.reading.ids == tuple(chat.ids[0].tolist())
        page.get_by_role("button", name="Last token of this user part").click()
        at(page, chat.positions("user")[-1])
        exec(panel.code(), got := {"model": model, "sae": sae, "index": panel.inputs.index})
        assert got["latents"].equals(panel.latents)
        page.get_by_label("chat", exact=True).uncheck()
        page.locator(".turn").first.wait_for(state="detached", timeout=60_000)
        assert page.raised == []
    finally:
        model.tokenizer.chat_template = None
