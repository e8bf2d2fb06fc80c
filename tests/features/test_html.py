"""The page to share, in a real browser without a network."""

import re
import shutil
from dataclasses import replace

import pytest
from helpers import tiny_models

import saewb
from saewb.features import build_index
from saewb.features.token_texts import TokenTexts

HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def tiny_index():
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    return build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:60]])


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        opened = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


def opened(browser, path, **how):
    """A page on the file, with what it complained of and what it asked of a network."""
    page = browser.new_page(viewport={"width": 1300, "height": 900}, **how)
    page.complaints, page.asked = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("dialog", lambda d: (page.complaints.append("a dialog"), d.dismiss()))
    page.on("request", lambda r: page.asked.append(r.url) if not r.url.startswith("file:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("main h2")
    return page


def test_it_shows_searches_and_moves(browser, tiny_index, tmp_path):
    page = opened(browser, tiny_index.save_html(tmp_path / "features.html"))
    first, second = tiny_index.ranking(2)
    assert page.inner_text("main h2") == f"Latent {first}"
    assert page.locator("#list li").count() == 500
    latent = tiny_index.latent(first)
    assert page.locator(".context").count() == len(latent.top) + sum(map(len, latent.quantiles))
    marked = page.locator(".context").first.locator(".t.peak")
    assert marked.inner_text().strip() == latent.top[0].token.strip()
    marked.hover()
    text = page.inner_text("#tip")
    assert f"activation {latent.top[0].value:.1f}" in text
    assert latent.logits_top[0].token.strip() in page.inner_text(".up")
    page.keyboard.press("j")
    assert page.inner_text("main h2") == f"Latent {second}"
    page.keyboard.press("k")
    assert page.inner_text("main h2") == f"Latent {first}"
    page.keyboard.press("/")
    page.keyboard.type("physicist")
    result = page.locator("#list li").count()
    assert 0 < result < 500
    assert f"{result} of 500" in page.inner_text("#count")
    assert "physicist" in re.sub(r"\s+", "", page.inner_text("main")).lower()
    assert page.locator(".t.hit").count() > 0
    page.fill("#search", str(second))
    assert page.inner_text("main h2") == f"Latent {second}"
    page.fill("#search", "surely nowhere in it")
    assert page.locator("#list li").count() == 0
    assert "Nothing here" in page.inner_text("main")
    page.fill("#search", "")
    assert page.locator("#list li").count() == 500
    page.keyboard.press("Escape")
    page.keyboard.press("w")
    assert page.locator(".contexts.plain").count() > 0
    page.locator(".near button:not(:disabled)").first.click()
    assert page.inner_text("main h2") != f"Latent {first}"
    assert page.url.split("#")[1] == page.inner_text("main h2").split()[1]
    assert page.complaints == []
    assert page.asked == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser, tiny_index, tmp_path, scheme):
    page = opened(browser, tiny_index.save_html(tmp_path / "f.html", [500, 748]), color_scheme=scheme)

    def brightness():
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    before = brightness()
    assert (before > 128) == (scheme == "light")
    page.click("#theme")
    assert (brightness() > 128) == (scheme == "dark")
    page.keyboard.press("t")
    assert brightness() == before
    assert page.complaints == []
    page.close()


def test_hostile_tokens_are_text(browser, tmp_path):
    model = tiny_models.bridge()
    index = build_index(model, tiny_models.sae("blocks.1.hook_resid_post", model=HOSTILE), tiny_models.tokens(8, 9))
    names = (HOSTILE, "</script><script>alert(1)</script>", "<!--", "\u2028", "\n", "&lt;", '"', "\\", "__proto__", "")
    strings = dict(zip(range(4, tiny_models.VOCAB), names * 3, strict=False))
    index = replace(index, token_texts=TokenTexts(strings))
    path = index.save_html(tmp_path / "f.html", range(40), title=HOSTILE)
    assert HOSTILE not in path.read_text()
    page = opened(browser, path)
    for _ in range(40):
        page.keyboard.press("j")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    shown = page.evaluate("document.body.textContent")
    assert HOSTILE in shown
    assert page.inner_text(".head h1") == HOSTILE
    words = page.evaluate("[...document.querySelectorAll('.t')].map((e) => e.textContent)")
    assert HOSTILE in words
    assert "</script><script>alert(1)</script>" in words
    assert page.complaints == []
    assert page.asked == []
    page.close()


def test_latents_that_never_fire_have_a_page(browser, tmp_path):
    model = tiny_models.bridge()
    sae = tiny_models.sae("blocks.1.attn.hook_q", d_in=4, head=1)
    sae.b_enc.data[3] = -1e6
    index = build_index(model, sae, tiny_models.tokens(8, 9), n_nearest=0)
    page = opened(browser, index.save_html(tmp_path / "f.html", [3]))
    assert "It never fired." in page.inner_text("main")
    assert page.complaints == []
    page.close()


def test_500_features_fit_in_10_mb(tiny_index, tmp_path):
    path = tiny_index.save_html(tmp_path / "features.html")
    assert path.stat().st_size < 10e6
    text = path.read_text()
    code = text.split('id="data">')[0] + text.rsplit("<script>", 1)[1]
    assert re.findall(r"https?:[^\s\"']*", code) == ["http://www.w3.org/2000/svg"]


def test_wrong_places_and_latents(tiny_index, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        tiny_index.save_html(tmp_path)
    with pytest.raises(ValueError, match="no latents"):
        tiny_index.save_html(tmp_path / "f.html", [])
    with pytest.raises(ValueError, match="latents .1024"):
        tiny_index.save_html(tmp_path / "f.html", [1024])
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_as_wide_as_its_words(tmp_path, monkeypatch):
    """More than 65,536 different words are packed in four bytes each."""
    index = build_index(tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(8, 9))
    import saewb.features.html as html

    table = html._ContextTable()
    for i in range(2**16):
        assert table.tokens[f"word {i}", i] == i
    monkeypatch.setattr(html, "_ContextTable", lambda: table)
    text = index.save_html(tmp_path / "f.html", [0]).read_text()
    assert '"wide":true' in text
