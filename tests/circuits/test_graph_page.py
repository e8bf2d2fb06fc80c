"""The page of a graph in Chromium: everything drawn quickly, effects listed, hostile texts harmless, one small file."""

import pytest
from helpers import chromium, tiny_models
from helpers.graphs import IDS, by_hand, large, transcoders

import saewb

HOSTILE = '</script><img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def browser():
    chromium.need_chromium()
    with chromium.launched() as opened:
        yield opened


def opened(browser, path):
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    chromium.listen(page, (path.as_uri(),))
    page.goto(path.as_uri())
    page.wait_for_selector("#graph[data-drawn]")
    return page


def test_five_hundred_nodes(browser, tmp_path):
    graph = large()
    path = graph.save_html(tmp_path / "graph.html", title="Five hundred")
    assert path.stat().st_size < 3_000_000
    page = opened(browser, path)
    assert page.locator("circle.node").count() == 500
    # A busy machine slows some of them.
    times = page.evaluate("Array.from({ length: 6 }, () => { draw(); return Number(svg.dataset.milliseconds); })")
    print(f"500 nodes drawn in {min(times):.0f} ms; {path.stat().st_size / 1e6:.2f} MB")
    assert min(times) < 300
    page.locator("#nodes").evaluate("e => { e.value = 0.5; e.dispatchEvent(new Event('input')); }")
    kept = int((graph.nodes["cumulative"].le(0.5) | graph.nodes["kind"].isin(["token", "target"])).sum())
    assert page.locator("circle.node").count() == kept < 500
    assert page.complaints == []
    assert page.asked == []
    page.close()


def test_a_click_lists_the_effects(browser, tmp_path):
    graph = by_hand(
        ["latent", "latent", "error", "token", "target"],
        [0, 1, 0, None, None],
        {(0, 3): 2.0, (1, 0): -1.5, (1, 2): 3.0, (4, 1): 1.0},
        {4: 0.5},
    ).with_labels({(1, 1): HOSTILE})
    page = opened(browser, graph.save_html(tmp_path / "deep" / "graph.html", title=HOSTILE))
    page.locator('circle[data-i="1"]').click()
    assert page.locator("#side h2").inner_text() == HOSTILE
    assert [h.split(" (")[1] for h in page.locator("#side h3").all_inner_texts()] == ["2)", "1)"]
    assert page.locator("#side .effect").all_inner_texts() == ["3.00", "-1.50", "1.00"]
    assert page.locator(".strong path").count() == 3
    page.locator("#side button").nth(1).click()  # on to latent 0
    assert "layer 0, latent 0" in page.locator("#side h2").inner_text()
    page.locator('circle[data-i="3"]').hover()
    assert "influence" in page.locator("#tip").inner_text()
    page.locator('circle[data-i="4"]').focus()
    page.keyboard.press("Enter")
    assert "Incoming (1)" in page.locator("#side").inner_text()
    page.keyboard.press("Escape")
    assert "Click a node" in page.locator("#side").inner_text()
    assert page.locator("img").count() == 0
    assert page.complaints == []
    page.close()


def test_too_many_nodes_and_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("saewb.circuits.graph_page.MAX_NODES", 3)
    graph = by_hand(["latent", "token", "token", "target"], [0, None, None, None], {(3, 0): 1.0}, {3: 1.0})
    with pytest.raises(ValueError, match="at most 3"):
        graph.save_html(tmp_path / "graph.html")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        graph.save_html(tmp_path)


def test_the_tip_of_a_latent_is_its_card(browser, tmp_path):
    """From an index: what the latent raises, and where it is strongest."""
    model, coders = tiny_models.bridge(), transcoders()
    graph = saewb.attribution_graph(model, IDS, coders, targets=[5], progress=False).pruned(0.95)
    first = graph.nodes[(graph.nodes["kind"] == "latent") & (graph.nodes["layer"] == 1)].iloc[0]
    index = saewb.build_index(model, coders[1], tiny_models.tokens(8, 9), batch_size=8, n_nearest=0)
    index = index.with_labels({int(first["latent"]): HOSTILE})
    page = opened(browser, graph.save_html(tmp_path / "cards.html", index=index))
    latent, at = index.latent(int(first["latent"])), graph.index(first["id"])
    page.locator(f'circle[data-i="{at}"]').hover()
    tip = page.locator("#tip").inner_text()
    assert HOSTILE in tip
    assert f"largest {latent.max:.3g}" in tip
    assert repr(latent.logits_top[0].token) in tip
    page.locator(f'circle[data-i="{at}"]').click()
    assert "strongest in" in page.locator("#side").inner_text()
    assert page.complaints == []
    page.close()
