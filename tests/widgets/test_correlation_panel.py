"""CorrelationPanel without a browser."""

import base64
import doctest
import re
import struct
import threading
import zlib
from dataclasses import replace

import pytest
import torch
from helpers import panel_driver
from saewb_widgets import CorrelationPanel
from saewb_widgets.correlation import panel as correlation

import saewb
from saewb.stats import _overview
from saewb.synthetic import best_matches, random_dictionary


def low(n=300):
    return saewb.random_low_rank_correlation(n, 5, scale=0.1, seed=1)


def press(panel, what, **how):
    sent = []
    panel.send = lambda content, buffers=None: sent.append((content, buffers))
    panel._on_message(panel, {"do": what, **how})
    return sent


def executed(panel, **given):
    exec(panel.code(), given)
    return given


def sources():
    dictionary = random_dictionary(20, 8)
    return {
        "low rank": ((low(),), "of"),
        "dense": ((low(40).dense(),), "of"),
        "sae": ((panel_driver.embedded()[1],), "of"),
        "index": ((panel_driver.index(),), "index"),
        "learnt and true": ((dictionary.directions[torch.randperm(20)], dictionary), "of"),
    }


@pytest.mark.parametrize("name", ["low rank", "dense", "sae", "index", "learnt and true"])
def test_code_gives_what_is_shown(name):
    inputs, called = sources()[name]
    panel = CorrelationPanel(*inputs)
    names = {called: inputs[0], "other": inputs[-1]}
    n, m = panel.matrix.shape
    for view in ((0, n, 0, m), (3, 17, 0, 9), (0, n, 1, 5)):
        for cells in ("strongest", "mean"):
            panel.view, panel.cells, panel.pair = view, cells, (3, 5)
            namespace = executed(panel, **names)
            torch.testing.assert_close(namespace["values"], panel.shown.values, atol=1e-5, rtol=0, equal_nan=True)
            assert namespace["pair"].value == pytest.approx(panel.matrix.pair(3, 5).value, nan_ok=True)
    assert panel.busy == ""
    assert panel.progress == 1
    for i, j, value, *_ in panel.figures["pairs"][:5]:
        assert value == pytest.approx(panel.matrix.block([i], [j]).item(), rel=1e-3)


def test_tiles_are_bytes_of_the_entries_or_text_where_bytes_get_lost():
    panel = CorrelationPanel(low(), view=(10, 60, 100, 130))
    ((head, (levels,)),) = press(panel, "tile", seq=7)
    values = panel.shown.values
    assert (head["tile"], head["shape"], head["window"], head["step"]) == (7, [50, 30], [10, 60, 100, 130], 1)
    shown = (torch.tensor(list(levels)).view(50, 30).double() - 128) / 127 * head["scale"]
    inside = values.abs() <= head["scale"]
    assert (shown - values)[inside].abs().max() <= head["scale"] / 250
    order = panel.matrix.order("clusters")
    assert head["rows"] == order[10:60].tolist()
    assert head["cols"] == order[100:130].tolist()
    ((plain, buffers),) = press(panel, "tile", seq=8, plain=True)
    assert buffers is None
    assert [base64.b64decode(x) for x in plain["levels"]] == [levels]


def test_what_is_not_defined_has_a_level_of_its_own():
    holes = torch.eye(4)
    holes[1, 2] = holes[2, 1] = torch.nan
    panel = CorrelationPanel(holes, order="index")
    ((_, (levels,)),) = press(panel, "tile", seq=1)
    assert (levels[6], levels[0], levels[1]) == (0, 255, 128)
    assert panel.matrix.pair(1, 2).value != 0
    panel.pair = (1, 2)
    assert panel.page["value"] is None
    one = CorrelationPanel(torch.ones(1, 1))
    assert one.figures == {"figures": [], "pairs": []}
    assert one.shown.values.tolist() == [[1.0]]
    assert "<img" in one.static_html()


@pytest.mark.parametrize(
    ("trait", "wrong", "says"),
    [
        ("view", (0, 301, 0, 5), "row1 <= 300"),
        ("view", (5, 5, 0, 5), "row0 < row1"),
        ("order", "clsters", "near: clusters"),
        ("cells", "max", "want: strongest, mean"),
        ("pair", (300, 0), "features below 300"),
    ],
)
def test_wrong_values_are_said_and_not_taken(trait, wrong, says):
    panel = CorrelationPanel(low())
    before = getattr(panel, trait)
    with pytest.raises(ValueError, match=says):
        setattr(panel, trait, wrong)
    assert says in panel.error_message
    assert getattr(panel, trait) == before
    panel.view = (0, 9, 0, 9)
    assert panel.error_message == ""


def test_what_it_is_made_with_is_checked():
    for inputs, error, says in (
        ((torch.ones(3, 4),), ValueError, "shape"),
        (("a path",), TypeError, "got a str"),
        ((torch.tensor([[1.0, 0.2], [0.5, 1.0]]),), ValueError, "not symmetric"),
    ):
        with pytest.raises(error, match=says):
            CorrelationPanel(*inputs)
    with pytest.raises(TypeError, match="near: view"):
        CorrelationPanel(low(), veiw=(0, 1, 0, 1))
    with pytest.raises(ValueError, match="one of model and tokens"):
        CorrelationPanel(panel_driver.embedded()[1], model=panel_driver.embedded()[0])
    with pytest.raises(ValueError, match="index is of 1,024 features, the matrix has 300"):
        CorrelationPanel(low(), index=panel_driver.index())
    with pytest.raises(ValueError, match="asked to 'explode'"):
        press(CorrelationPanel(low()), "explode")


def test_a_pair_has_both_features():
    index = panel_driver.index()
    panel = CorrelationPanel(index)
    i, j, value, *names = panel.figures["pairs"][0]
    assert names == [index.label(i), index.label(j)]
    panel.pair = (i, j)
    page = panel.page
    assert page["value"] == value
    assert [s["feature"] for s in page["sides"]] == [i, j]
    assert page["together"] == panel.matrix.pair(i, j).together > 0
    for side, latent in zip(page["sides"], (index.latent(i), index.latent(j)), strict=True):
        assert side["page"]["density"] == pytest.approx(latent.density, rel=1e-3)
        assert len(side["page"]["top"]) == len(latent.top)
        assert side["near"][0][1] != 0
    ((text, _),) = press(panel, "peek", row=i, col=j)
    assert text == {"peek": [i, j], "tokens": [[c.token for c in index.latent(k).top[:6]] for k in (i, j)]}
    panel.pair = (-1, -1)
    assert panel.page == {}


def on_text(**more):
    model, sae = panel_driver.embedded()
    texts = [d.text for d in saewb.tiny.held_out_texts()[:10]]
    return CorrelationPanel(sae, model=model, tokens=texts, **more), {"model": model, "sae": sae, "tokens": texts}


@pytest.fixture
def held(monkeypatch):
    """The model's pass waits, before its matrix is there, until this is set."""
    go, real = threading.Event(), saewb.latent_matrix

    def slow(*args, progress=lambda seen: None, **kwargs):
        progress(4096)
        go.wait(30)
        return real(*args, progress=progress, **kwargs)

    monkeypatch.setattr(saewb, "latent_matrix", slow, raising=False)
    return go


@pytest.mark.parametrize("by", [None, "phi"])
def test_latents_on_text(by):
    panel, inputs = on_text(**({} if by is None else {"by": by}))
    panel.wait(60)
    namespace = executed(panel, **inputs)
    torch.testing.assert_close(namespace["values"], panel.shown.values, equal_nan=True)
    assert "density" in panel.facts["orders"]
    assert panel.facts["what"] == panel.matrix.what == (by or "correlation")


def test_the_model_runs_beside_the_notebook(held):
    panel, inputs = on_text(pair=(3, 5), order="density")
    assert panel.busy == "running the model"
    assert repr(panel) == "CorrelationPanel(correlation, 1024 x 1024, by density, rows 0:1024, columns 0:1024)"
    assert panel.static_html() == "<div>the model has not been run yet</div>"
    while not panel._n_read:
        pass
    press(panel, "progress")
    assert panel.busy == "running the model: 4,096 tokens"
    assert press(panel, "tile", seq=1) == [({"tile": 1, "none": True}, None)]
    with pytest.raises(ValueError, match="the model is running"):
        _ = panel.shown
    panel.order = "index"
    with pytest.raises(ValueError, match="near: index"):
        panel.order = "indx"
    held.set()
    panel.wait(60)
    torch.testing.assert_close(executed(panel, **inputs)["values"], panel.shown.values, equal_nan=True)
    assert (panel.busy, panel.order, panel.progress) == ("", "index", 1)
    assert panel.page["sides"][1]["feature"] == 5
    assert len(panel.figures["pairs"]) == 100


def test_the_model_can_be_stopped_and_run_again(held):
    panel, _ = on_text()
    press(panel, "stop")
    held.set()
    panel.wait(60)
    assert (panel.matrix, panel.busy) == (None, "")
    assert re.match(r"Stopped after [\d,]+ tokens", panel.notice)
    press(panel, "again")
    panel.wait(60)
    assert panel.matrix.shape == (1024, 1024)


def test_a_model_that_fails_says_so():
    model, sae = panel_driver.embedded()
    panel = CorrelationPanel(sae, model=model, tokens=[""])
    with pytest.raises(ValueError, match="tokens"):
        panel.wait(60)
    assert panel.error_message.startswith("ValueError: ")
    assert panel.busy == ""
    with pytest.raises(TypeError, match="want: an SAE"):
        CorrelationPanel(low(), model=model, tokens=["a"])


def learnt_and_true():
    """Latents of which the last stands for no feature, and two for the same one."""
    dictionary = random_dictionary(20, 12)
    feature = [*range(19, -1, -1), 4, -1]
    learnt = torch.cat([dictionary.directions[feature[:-1]], torch.randn(1, 12)])
    true = saewb.random_low_rank_correlation(20, 3, scale=0.3, seed=5)
    return saewb.matrix_view(learnt, by="cosine"), true, feature, dictionary, learnt


def test_a_true_matrix_beside_a_learnt_one():
    first, true, feature, dictionary, learnt = learnt_and_true()
    result, _ = best_matches(learnt, dictionary.directions)
    assert result[:-1].tolist() == feature[:-1]
    panel = CorrelationPanel(first, against=true, matched=feature)
    full = true.dense()
    for view in ((0, 22, 0, 22), (3, 17, 0, 9)):
        panel.view, panel.pair = view, (0, 20)
        namespace = executed(panel, matrix=first, against=true, matched=feature)
        torch.testing.assert_close(namespace["values"], panel.shown.values, equal_nan=True)
        torch.testing.assert_close(namespace["beside"], panel.beside.values, equal_nan=True)
        for a, i in enumerate(namespace["rows"].tolist()):
            for b, j in enumerate(namespace["columns"].tolist()):
                want = full[feature[i], feature[j]] if min(feature[i], feature[j]) >= 0 else torch.tensor(torch.nan)
                torch.testing.assert_close(namespace["beside"][a, b], want, equal_nan=True, atol=1e-5, rtol=0)
    assert panel.page["second"] == pytest.approx(full[19, 4].item(), rel=1e-3)
    ((head, levels),) = press(panel, "tile", seq=3)
    assert (head["n"], [len(x) for x in levels]) == (2, [14 * 9] * 2)
    apart = (namespace["values"] - namespace["beside"]).double()
    apart = apart[~apart.isnan()].square().mean().sqrt().item()
    assert f"the two differ by {apart:.4g}"[:26] in head["caption"]
    assert panel.static_html().count("<img") == 2


def test_a_second_matrix_has_to_fit():
    for more, says in (
        ({"against": low(20)}, "300 x 300 and 20 x 20"),
        ({"against": low(20), "matched": [0] * 299}, "300 x 300 and 299 x 299"),
        ({"against": low(20), "matched": [20] * 300}, "no features"),
        ({"matched": [0] * 300}, "without against="),
    ):
        with pytest.raises(ValueError, match=says):
            CorrelationPanel(low(), **more)
    same = CorrelationPanel(low(), against=low())
    assert same.shown.differs(same.beside) == 0


def test_two_large_matrices(monkeypatch):
    monkeypatch.setattr(correlation, "AT_ONCE", 10)
    monkeypatch.setattr(_overview, "INTERACTIVE_COST", 1000.0)
    panel = CorrelationPanel(low(2000), against=low(2000), matched=[*range(1999), -1], order="index")
    assert panel.beside is None  # means of it take a pass, which has not been made
    assert "beside" not in executed(panel, of=low(2000), against=low(2000), matched=[*range(1999), -1])
    panel.wait(60)
    assert panel.beside.values[:-1, :-1].equal(panel.shown.values[:-1, :-1])


def test_a_part_in_view_is_made_finer(monkeypatch):
    monkeypatch.setattr(correlation, "AT_ONCE", 10)
    monkeypatch.setattr(correlation, "PIXELS", 100)
    monkeypatch.setattr(_overview, "INTERACTIVE_COST", 1000.0)
    monkeypatch.setattr(_overview, "MAX_CELLS", 500)
    panel = CorrelationPanel(low(2000), order="index")
    press(panel, "stop")
    panel.wait(60)
    for view in ((0, 50, 0, 50), (100, 1300, 0, 1200)):  # fine as it is; as good as looking through all of it
        panel.view = view
        press(panel, "refine")
        assert panel.busy == ""
    assert (panel.shown.cells, panel.shown.is_final) == ("mean", False)
    panel.view = (100, 420, 0, 320)
    assert (panel.shown.cells, panel.shown.is_final) == ("mean", False)
    before = panel.version
    press(panel, "refine")
    assert panel.busy == "making the picture finer"
    panel.wait(60)
    assert panel.version == before + 1
    assert (panel.shown.cells, panel.shown.is_final, panel.shown.step) == ("strongest", True, 4)
    torch.testing.assert_close(executed(panel, of=low(2000))["values"], panel.shown.values, atol=1e-5, rtol=0)
    panel.cells = "mean"
    assert panel.shown.cells == "mean"
    panel.view, panel.cells = (100, 424, 0, 320), "strongest"
    assert not panel.shown.is_final


def test_empty_tiny_and_undefined_matrices():
    with pytest.raises(ValueError, match="want: at least 1"):
        CorrelationPanel(torch.ones(0, 0))
    for matrix in (torch.full((1, 1), torch.nan), torch.full((3, 3), torch.nan), torch.ones(1, 1), torch.eye(2)):
        panel = CorrelationPanel(matrix)
        n = len(matrix)
        panel.pair = (0, n - 1)
        assert panel.figures["pairs"] == []
        assert panel.page["value"] == (None if matrix.isnan().any() else float(matrix[0, n - 1]))
        ((_, (levels,)),) = press(panel, "tile", seq=1)
        assert len(levels) == n * n
        torch.testing.assert_close(executed(panel, of=matrix)["values"], panel.shown.values, equal_nan=True)
        assert "<img" in panel.static_html()


def test_an_index_deleted_under_the_panel():
    index = panel_driver.index()
    tensors = panel_driver.Gone(index.tensors)
    panel = CorrelationPanel(replace(index, tensors=tensors))
    tensors.there = False
    with pytest.raises(OSError, match="stale file handle"):
        panel.pair = (3, 5)
    assert panel.error_message == "OSError: stale file handle"
    panel.view = (0, 50, 0, 50)  # the matrix is in memory
    assert panel.shown.cells == "exact"
    tensors.there = True
    panel.pair = (3, 6)
    assert (panel.error_message, panel.page["sides"][1]["feature"]) == ("", 6)


def test_large_ones_are_looked_through_beside_the_notebook(monkeypatch):
    monkeypatch.setattr(correlation, "AT_ONCE", 10)
    monkeypatch.setattr(_overview, "INTERACTIVE_COST", 1000.0)
    go, real = threading.Event(), _overview.Overview.scan
    monkeypatch.setattr(_overview.Overview, "scan", lambda self: (go.wait(30), (yield from real(self)))[1])
    panel = CorrelationPanel(low(2000))
    assert panel.busy == "ordering 2,000 features by clusters"
    assert panel.shown.cells == "mean"
    while "order" in panel._jobs:
        panel._jobs["order"][1].exception(60)
        panel.collect()
    assert panel.busy == "looking for the strongest entries"
    assert (panel.shown.cells, panel.shown.is_final) == ("mean", False)
    namespace = executed(panel, of=low(2000))
    torch.testing.assert_close(namespace["values"], panel.shown.values, atol=1e-5, rtol=0)
    before = panel.version
    go.set()
    panel.wait(60)
    assert (panel.busy, panel.progress, panel.shown.cells, panel.shown.is_final) == ("", 1, "strongest", True)
    assert panel.version > before
    assert len(panel.figures["pairs"]) == 100
    panel.order = "index"
    press(panel, "stop")
    panel.wait(60)
    assert (panel.busy, panel.progress < 1) == ("", True)


def test_a_saved_notebook_shows_a_picture():
    panel = CorrelationPanel(low())
    text = panel._repr_mimebundle_()[0]["text/html"]
    assert "<script" not in text
    raw = base64.b64decode(re.search(r"base64,([^']+)'", text)[1])
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert [height, width] == list(panel.shown.values.shape)
    begin = raw.index(b"IDAT") + 4
    (size,) = struct.unpack(">I", raw[begin - 8 : begin - 4])
    lines = zlib.decompress(raw[begin : begin + size])
    levels = panel.shown.levels(panel.shown.scale)
    assert lines == b"".join(b"\0" + levels[i * width : (i + 1) * width] for i in range(height))
    assert panel_driver.sent(panel) < 300_000


def test_65_thousand_features_send_little():
    panel = CorrelationPanel(low(65_536), order="index")
    ((head, (levels,)),) = press(panel, "tile", seq=1)
    assert head["shape"] == [256, 256]
    assert panel_driver.sent(panel) + len(levels) < 300_000
    press(panel, "stop")
    panel.wait(120)


def test_examples_run():
    outcome = doctest.testmod(correlation)
    assert outcome.attempted > 3
    assert outcome.failed == 0
