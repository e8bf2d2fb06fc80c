"""GraphPanel's front end in Chromium, over the real panel."""

import pytest
from helpers import chromium, graphs, panel_driver
from saewb_widgets import GraphPanel

import saewb

HAND = {
    "kinds": ["latent", "latent", "error", "token", "target"],
    "layers": [0, 1, 0, None, None],
    "edges": {(0, 3): 2.0, (1, 0): -1.5, (1, 2): 3.0, (4, 1): 1.0},
    "weights": {4: 0.5},
}


def by_hand(**options):
    return GraphPanel(graphs.by_hand(**HAND), **{"nodes": 1.0, "edges": 1.0, **options})


def node(page, i):
    return page.locator(f'circle[data-i="{i}"]')


def test_five_hundred_nodes_are_drawn_quickly(page):
    panel = GraphPanel(graphs.large(570), nodes=1.0, edges=1.0)
    chromium.mount(page, panel)
    svg = page.locator("svg.attribution")
    assert page.locator("circle.node").count() == len(panel.pruned) >= 500
    times = []
    for i in range(5):  # a busy machine slows some of them
        page.set_viewport_size({"width": 1000 + 10 * i, "height": 800})
        page.wait_for_timeout(60)
        times.append(float(svg.get_attribute("data-milliseconds")))
    print(f"{len(panel.pruned)} nodes, {svg.get_attribute('data-lines')} lines drawn in {min(times):.0f} ms")
    assert min(times) < 300


def test_a_click_lists_the_effects_and_keys_move(page):
    panel = by_hand()
    chromium.mount(page, panel)
    ids = panel.graph.nodes["id"].tolist()
    node(page, 1).hover()
    assert "influence" in page.locator(".tip").inner_text()
    node(page, 1).click()
    assert panel.selected == ids[1]
    side = page.locator(".effects")
    assert side.locator(".effect").all_inner_texts() == ["3.00", "-1.50", "1.00"]
    widths = page.locator(".strong path").evaluate_all("l => l.map((e) => e.getAttribute('stroke-width'))")
    assert widths == ["4.50", "2.50", "1.83"]
    assert "error" in node(page, 2).get_attribute("class")
    assert node(page, 2).evaluate("e => getComputedStyle(e).fill") == "rgb(255, 255, 255)"
    side.locator("li button").nth(1).click()  # on to latent 0
    assert panel.selected == ids[0]
    node(page, 0).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("p")
    page.keyboard.press("Enter")
    assert (panel.selected, panel.pins) == (ids[1], [ids[1]])
    assert "pinned" in node(page, 1).get_attribute("class")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert panel.selected == ids[4]
    page.keyboard.press("Escape")
    assert panel.selected == ""
    assert "Click a node" in side.inner_text()


def test_sliders_prune_in_the_kernel(page):
    panel = GraphPanel(graphs.large(200), nodes=0.9)
    chromium.mount(page, panel)
    page.get_by_label("nodes' influence").evaluate("e => { e.value = 0.5; e.dispatchEvent(new Event('change')); }")
    page.wait_for_timeout(100)
    assert panel.nodes == 0.5
    assert page.locator("circle.node").count() == len(panel.graph.pruned(0.5))
    assert f"{len(panel.pruned)} of 200 nodes" in page.locator(".line").first.inner_text()
    page.get_by_role("button", name="Show the Python code for this").click()
    page.locator(".notice pre").wait_for()
    assert page.inner_text(".notice pre").strip() == panel.code().strip()


def test_pinned_nodes_become_a_group(page):
    panel = by_hand()
    chromium.mount(page, panel)
    ids = panel.graph.nodes["id"].tolist()
    for i in (0, 1):
        node(page, i).click()
        page.get_by_role("button", name="Pin this node").click()
    assert panel.pins == ids[:2]
    assert page.locator(".chip").count() == 2
    page.get_by_label("Name of the group").fill("both")
    page.get_by_label("Name of the group").press("Enter")
    page.locator("circle.group").wait_for()
    assert (panel.groups, panel.selected, panel.pins) == ({"both": ids[:2]}, "both", [])
    assert page.locator("circle.node").count() == 4
    assert page.locator(".effects h2").inner_text() == "both"
    assert page.locator(".effects .effect").all_inner_texts() == ["3.00", "2.00", "1.00"]
    page.locator("circle.group").hover()
    assert "layer 0, latent 0" in page.locator(".tip").inner_text()
    page.get_by_role("button", name="Take the group both apart").click()
    page.wait_for_timeout(100)
    assert panel.groups == {}
    assert page.locator("circle.node").count() == 5


def test_latents_are_turned_off(page):
    model, transcoders = panel_driver.embedded()[0], saewb.tiny.transcoders()
    graph = saewb.attribution_graph(model, "Paris is the capital", transcoders, progress=False)
    panel = GraphPanel(graph, model=model, transcoders=transcoders, nodes=0.5)
    panel.selected = panel.pruned.nodes["id"][0]
    chromium.mount(page, panel)
    page.get_by_role("spinbutton", name="Factor").fill("0.5")
    page.get_by_role("button", name="Run the model with").click()
    page.locator(".trial tr").nth(1).wait_for()
    assert panel.factor == 0.5
    assert page.locator(".trial tr").count() == 1 + len(panel.effect)
    last = page.locator(".trial tr").nth(1).locator("td").last.inner_text().replace("\u2212", "-")
    assert float(last) == pytest.approx(panel.effect["measured"][0], abs=0.02)


def test_without_a_model_it_says_what_to_pass(page):
    panel = by_hand()
    chromium.mount(page, panel)
    node(page, 0).click()
    page.get_by_role("button", name="Run the model with").click()
    assert "GraphPanel(graph, model=model, transcoders=transcoders)" in page.inner_text(".error_message pre")
    assert isinstance(panel.error, ValueError)


def test_hostile_labels_are_text(page):
    graph = graphs.by_hand(**HAND).with_labels({(1, 1): panel_driver.HOSTILE})
    panel = GraphPanel(graph, nodes=1.0, edges=1.0, selected=graph.nodes["id"][1], pins=[graph.nodes["id"][1]])
    chromium.mount(page, panel)
    assert page.locator(".effects h2").inner_text() == panel_driver.HOSTILE
    assert page.locator("img").count() == 0


def test_it_is_dark_where_the_notebook_is(page):
    page.evaluate("document.body.style.background = '#111'")
    chromium.mount(page, by_hand())
    page.wait_for_function("document.querySelector('.saewb').dataset.theme === 'dark'")
    assert node(page, 0).evaluate("e => getComputedStyle(e).fill") == "rgb(127, 168, 214)"
    assert node(page, 3).evaluate("e => getComputedStyle(e).fill") == "rgb(228, 225, 218)"
    table = page.locator(".trial table").evaluate("e => getComputedStyle(e).color")  # without a doctype, too
    assert table == "rgb(228, 225, 218)"


def test_the_still_picture_is_one(page):
    panel = by_hand(selected="")
    panel.group("both", panel.graph.nodes["id"].tolist()[:2])
    page.evaluate("html => { document.body.innerHTML = html; }", panel.snapshot().data)
    page.wait_for_function("document.querySelector('img')?.naturalWidth > 0")
    page.evaluate("document.body.style.background = '#111'")  # without a color of its own: black text
    cell = page.locator("td").first.evaluate("e => getComputedStyle(e).color")
    assert (cell, page.locator("b").first.evaluate("e => getComputedStyle(e).color")) == ("rgb(34, 34, 34)",) * 2
    paper = page.locator("body > div").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert page.locator("td").count() == 9


@pytest.mark.parametrize("width", [400, 900])
def test_it_fits_and_stops(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    chromium.mount(page, GraphPanel(graphs.large(100), pins=["E_90_5"] if width == 400 else []))
    assert page.locator("circle.node").count() > 10
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("() => __stop()")
    assert page.evaluate("() => __heard()") == 0
