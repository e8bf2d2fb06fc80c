"""SuperpositionPanel and CorrelationPanel in a real JupyterLab: driven as a person would, saved, read without a kernel.

What zooming a matrix of 4 billion entries takes is printed.
"""

import json
import os
import re
import textwrap
import time

import pytest
from helpers import jupyterlab

SETUP = "import saewb, torch\nfrom saewb_widgets import CorrelationPanel, SuperpositionPanel"
# A callback of an ipykernel that hears clicks beside a cell has to wait for the panel's lock.
BUSY = "with panel._lock:\n" + textwrap.indent(f"print('asleep')\n{jupyterlab.WAIT}", "    ")
SAES = [
    f"{SETUP}\npanel = SuperpositionPanel(saewb.load_sae('tiny'))\npanel",
    "print(panel.selected, panel.side, panel.closest_first)",
    "panel.selected = 99999",
    "exec(panel.code(), given := {'sae': saewb.load_sae('tiny')})\nprint(given['neighbors'] == panel.neighbors)",
    "big = SuperpositionPanel(torch.randn(5000, 16))\nbig",
    """from saewb.features import build_index
sae, texts = saewb.load_sae('tiny'), [d.text for d in saewb.tiny.held_out_texts()[:30]]
given = {'topk': sae, 'random': torch.randn(6000, 64), 'read': sae.W_enc.T.detach()}
index = {'topk': build_index(saewb.load_model('tiny', device='cpu'), sae, texts)}
several = SuperpositionPanel(given, index=index)
several""",
    """several.wait()
exec(several.code(), made := {'directions': given, 'index': index})
print(several.which, several.scatter, several.selected, [made['compared'].equals(several.compared),
    made['points'].equals(several.points), made['neighbors'] == several.neighbors])""",
    BUSY.replace("panel", "several"),
]
MATRICES = [
    f"""{SETUP}
from saewb.synthetic import best_matches, random_dictionary
model, sae = saewb.load_model('tiny', device='cpu'), saewb.load_sae('tiny')
texts = [d.text for d in saewb.tiny.held_out_texts()[:40]]
panel = CorrelationPanel(sae, model=model, tokens=texts, by='phi')
panel""",
    "print(panel.view, panel.pair, panel.order)",
    "panel.wait()\nexec(panel.code(), given := {'model': model, 'sae': sae, 'tokens': texts})\n"
    "print(torch.equal(given['values'].nan_to_num(9), panel.shown.values.nan_to_num(9)))",
    """dictionary = random_dictionary(120, 40)
learnt = dictionary.directions[torch.randperm(120)] + 0.02 * torch.randn(120, 40)
feature, _ = best_matches(learnt, dictionary.directions)
first, true = saewb.matrix_view(learnt, by='cosine'), saewb.matrix_view(dictionary.directions, by='cosine')
two = CorrelationPanel(first, against=true, matched=feature)
two""",
    "wide = CorrelationPanel(saewb.random_low_rank_correlation(65_536, 50, seed=1), order='index')\nwide",
    BUSY,
]


@pytest.fixture
def opened(browser, tmp_path):
    if "CI" not in os.environ:
        pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'saewb[lab]'")

    def notebook(cells):
        return jupyterlab.opened(browser, tmp_path, cells)

    return notebook


def in_cell(page, cell):
    return page.locator(f".jp-Notebook .jp-Cell >> nth={cell}").locator(".saewb")


def picture(panel, name):
    if where := os.environ.get("SAEWB_SCREENSHOTS"):
        panel.screenshot(path=f"{where}/{name}.png")


def pictured(name):
    where = os.environ.get("SAEWB_SCREENSHOTS")
    return (where, name) if where else None


def in_both_themes(book, **panels):
    for theme in ("Light", "Dark"):
        book.do("apputils:change-theme", theme=f"JupyterLab {theme}")
        book.page.locator(f".saewb[data-theme={theme.lower()}]").first.wait_for()
        book.page.wait_for_timeout(400)
        for name, panel in panels.items():
            picture(panel, f"{name}_{theme.lower()}")


def stands_aside(page):
    """While the panel is there, what stands in for it is not seen."""
    stills = page.locator("[class^=saewb-snapshot]")
    stills.first.wait_for(state="attached")
    assert not any(still.is_visible() for still in stills.all())


def quiet(page):
    assert sorted(set(page.complaints)) == []
    assert page.asked == []


@pytest.mark.long
def test_superposition_panel_in_jupyterlab(browser, opened, tmp_path):
    with opened(SAES) as book:
        page = book.page
        book.run(0)
        panel = in_cell(page, 0)
        panel.locator("h3", has_text="Nearest to 648").wait_for()
        stands_aside(page)
        assert panel.locator(".figures > div").count() == 6
        wide = panel.locator(".figures").evaluate("e => [e.clientWidth, e.parentElement.clientWidth - 32]")
        assert wide[0] == pytest.approx(wide[1], abs=2)
        panel.locator(".lists .card >> nth=1").locator(".row button").first.click()
        panel.locator("h3", has_text="Nearest to 775").wait_for()
        panel.locator("svg rect.hit >> nth=60").hover()
        assert "pairs" in panel.locator(".tip").inner_text()
        panel.get_by_role("button", name="What latents read").click()
        panel.locator("header h2", has_text="encoder").wait_for()
        panel.get_by_role("button", name="Turn the order round").click()
        panel.locator("h3", has_text="With the most room").wait_for()
        for key in ("d", "d", "Enter"):  # d d would delete the cell, if JupyterLab heard it
            page.keyboard.press(key)
        panel.locator("h3", has_text="Closest to another").wait_for()
        assert page.locator(".jp-Notebook .jp-Cell").count() == len(SAES)
        book.run(1)
        assert book.output(1).strip() == "775 encoder True"
        book.run(2)
        assert "direction 99999 of 1024" in book.output(2)
        panel.locator(".error_message", has_text="want: 0 to 1023").wait_for()
        panel.get_by_role("button", name="Dismiss").click()
        panel.locator(".error_message").wait_for(state="hidden")
        book.run(3)
        assert book.output(3).strip() == "True"
        book.run(4)
        in_cell(page, 4).locator("h3", has_text="Nearest to").wait_for()
        several = compared(book)
        in_both_themes(book, superposition_lab=panel, superposition_several_lab=several)
        book.stands_in(0, "Neighbors of 775")
        outputs = book.save()["cells"][0]["outputs"]
        assert [sorted(o["data"]) for o in outputs] == [
            ["application/vnd.jupyter.widget-view+json", "text/plain"],
            ["text/html"],
        ]
        quiet(page)
    for where, cells in jupyterlab.without_a_kernel(browser, tmp_path, pictured("superposition")).items():
        assert "Error displaying" not in "".join(cells), where
        assert "Superposition of encoder directions" in cells[0], where
        assert "Neighbors of 775" in cells[0], where
        assert "not computed yet" not in cells[4], where
        assert re.search(r"5[,.]?000 directions in 16", cells[4]), where
        assert "Superposition of directions of random" in cells[5], where
        assert re.search(r"random\s+6,000\s+64", cells[5]), where
        assert "against its length" in cells[5], where


def compared(book):
    """Several SAEs: dots clicked, another one looked at, and that while the kernel is busy."""
    page = book.page
    book.run(5)
    several = in_cell(page, 5)
    several.locator(".dots canvas[data-of]").wait_for()
    several.locator(".beside tr >> nth=3").locator("td >> nth=3").wait_for()  # the last one is there
    several.locator(".busy:not(.late)", has_text="cosines").wait_for(state="hidden")
    assert several.locator("svg.bars path.outline").count() == 4
    canvas, first = several.locator(".dots canvas"), several.locator(".dots canvas").get_attribute("data-at")
    several.locator(".near .row button").nth(2).click()
    several.locator(f".dots canvas:not([data-at='{first}'])").wait_for()
    canvas.scroll_into_view_if_needed()
    (x, y), box = map(float, first.split(",")), canvas.bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert several.locator(".tip").inner_text().startswith("648\nlargest |cos| 0.901\nfires on ")
    page.mouse.click(box["x"] + x, box["y"] + y)
    several.locator("h3", has_text="Nearest to 648").wait_for()
    book.run(6)
    assert book.output(6).strip() == "topk density 648 [True, True, True]"
    while_busy(book, 7, several, several.get_by_role("button", name="Look at random").click)
    several.locator("header h2", has_text="Superposition of directions of random").wait_for()
    book.run(6)
    assert re.fullmatch(r"random norm \d+ \[True, True, True\]", book.output(6).strip())
    return several


def while_busy(book, cell, panel, act):
    """What is done while a cell runs is said to wait for it; the caller looks whether it is answered then."""
    page = book.page
    page.evaluate(
        "i => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = i; nb.deselectAll();"
        " jupyterapp.commands.execute('notebook:run-cell'); }",
        cell,
    )
    page.locator(f".jp-Notebook .jp-Cell >> nth={cell}").locator(".jp-OutputArea", has_text="asleep").wait_for()
    began = time.perf_counter()
    act()
    panel.locator(".late:visible", has_text="waiting for the kernel, which is busy").wait_for()
    said = time.perf_counter() - began
    jupyterlab.go_on(book)
    panel.locator(".late").wait_for(state="hidden")
    took = time.perf_counter() - began
    print(f"\nclicked while a cell ran: said to wait after {said:.1f} s, answered after {took:.1f} s")


def drawn(panel, after=0):
    """Wait for a picture newer than tile number `after`; its number."""
    panel.locator("canvas.map[data-seq]").wait_for()
    handle = panel.locator("canvas.map").element_handle()
    panel.page.wait_for_function("([c, n]) => +c.dataset.seq > n", arg=[handle, after])
    return int(handle.get_attribute("data-seq"))


def zoomed(panel, deed):
    """Milliseconds from an event to the picture of what it asked for, as the page's own clock has it."""
    canvas = panel.locator("canvas.map").element_handle()
    canvas.evaluate(
        """c => { const before = c.dataset.view; c.__took = null;
          const begun = (e) => { c.__begun = performance.now(); };
          const how = { once: true, capture: true };
          for (const name of ["wheel", "pointerup", "keydown"]) c.addEventListener(name, begun, how);
          new MutationObserver((_, me) => { if (c.dataset.view !== before) { c.__took = performance.now() - c.__begun;
            me.disconnect(); } }).observe(c, { attributes: true, attributeFilter: ["data-view"] }); }"""
    )
    deed()
    panel.page.wait_for_function("c => c.__took !== null", arg=canvas)
    return canvas.evaluate("c => c.__took")


@pytest.mark.long
def test_correlation_panel_in_jupyterlab(browser, opened, tmp_path):
    with opened(MATRICES) as book:
        page = book.page
        began = time.perf_counter()
        book.run(0)
        panel = in_cell(page, 0)
        panel.locator(".busy", has_text="running the model").wait_for()
        picture(panel, "correlation_lab_busy")
        drawn(panel)
        print(f"\nlatents on text: {time.perf_counter() - began:.1f} s to the first picture, the kernel free meanwhile")
        stands_aside(page)
        panel.locator(".rows button").first.click()
        panel.locator(".pair h3", has_text="together on").wait_for()
        canvas = panel.locator("canvas.map")
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
        seq = drawn(panel)
        page.mouse.wheel(0, -120)
        seq = drawn(panel, seq)
        canvas.focus()
        for key in ("+", "+", "ArrowRight", "d", "d"):  # d d would delete the cell, if JupyterLab heard it
            page.keyboard.press(key)
        panel.locator(".caption", has_text="single entries").wait_for()
        page.wait_for_timeout(500)
        page.mouse.move(box["x"] + 100, box["y"] + 120)
        page.mouse.move(box["x"] + 103, box["y"] + 120)
        assert "phi" in panel.locator(".tip").inner_text()
        page.mouse.down()
        page.mouse.up()
        page.wait_for_timeout(500)
        seq = drawn(panel)
        panel.locator("select[aria-label=Order]").select_option("density")
        drawn(panel, seq)  # the kernel has heard of it
        book.run(1)
        text = book.output(1).strip()
        r0, r1, c0, c1 = json.loads("[" + text[1 : text.index(")")] + "]")
        assert text.endswith("density")
        assert 100 < r1 - r0 < 250
        assert c1 - c0 == r1 - r0
        assert page.locator(".jp-Notebook .jp-Cell").count() == len(MATRICES)
        book.run(2)
        assert book.output(2).strip() == "True"
        book.run(3)
        two = in_cell(page, 3)
        drawn(two)
        assert two.locator("canvas").count() == 3
        two.locator(".caption", has_text="the two differ by").wait_for()
        two.locator(".rows button").first.click()
        two.locator(".pair h3", has_text="and").wait_for()
        twin = two.locator("canvas.twin").bounding_box()
        page.mouse.move(twin["x"] + 40, twin["y"] + 40)
        page.mouse.move(twin["x"] + 42, twin["y"] + 40)
        assert " and " in two.locator(".tip").inner_text().splitlines()[-1]
        while_busy(book, 5, panel, lambda: panel.locator("select[aria-label=Order]").select_option("index"))
        book.run(1)
        assert book.output(1).strip().endswith("index")
        in_both_themes(book, correlation_lab=panel, two_matrices_lab=two)
        zooming(book)
        book.stands_in(0, "Firing together")
        book.stands_in(3, "two matrices")
        book.stands_in(4, "65,536 x 65,536")
        book.save()
        quiet(page)
    for where, cells in jupyterlab.without_a_kernel(browser, tmp_path, pictured("correlation")).items():
        assert "Error displaying" not in "".join(cells), where
        assert "Firing together" in cells[0], where
        assert "not been run" not in cells[0], where
        assert "two matrices" in cells[3], where
        assert "65,536 x 65,536" in cells[4], where


def zooming(book):
    """Zooms of the widest matrix, while it is being looked through and after; printed."""
    page, got = book.page, []
    listening = page.context.new_cdp_session(page)
    listening.on("Network.webSocketFrameReceived", lambda e: got.append(len(e["response"]["payloadData"])))
    listening.send("Network.enable")
    began = time.perf_counter()
    book.run(4)
    wide = in_cell(page, 4)
    drawn(wide)
    page.wait_for_timeout(50)
    took = 1000 * (time.perf_counter() - began)
    print(f"65,536 x 65,536: {took:.0f} ms from running the cell to the picture, {sum(got) / 1e3:.0f} kB sent")
    canvas = wide.locator("canvas.map")
    for state in ("while it is looked through", "stopped"):
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6)
        page.wait_for_timeout(500)
        got.clear()
        took = [zoomed(wide, lambda: page.mouse.wheel(0, -120)) for _ in range(10)]
        canvas.focus()
        took += [zoomed(wide, lambda: page.keyboard.press("ArrowDown")) for _ in range(3)]
        took.append(zoomed(wide, lambda: page.keyboard.press("0")))
        ordered, n = sorted(took), sum(got)
        print(
            f"zooms {state}: median {ordered[7]:.0f} ms, slowest {ordered[-1]:.0f} ms, {n / len(took) / 1e3:.0f} kB: "
            + " ".join(f"{x:.0f}" for x in took)
        )
        stop = wide.get_by_role("button", name="Stop looking through the entries")
        if stop.is_visible():
            stop.click()
            wide.page.wait_for_timeout(1500)
