"""SuperpositionPanel without a browser."""

import doctest
import threading

import ipywidgets
import pytest
import torch
from helpers import panel_driver
from saewb_widgets import SuperpositionPanel
from saewb_widgets.superposition import panel as superposition

import saewb


@pytest.fixture
def sae():
    return panel_driver.embedded()[1]


@pytest.fixture
def directions():
    return torch.randn(60, 9, generator=torch.Generator().manual_seed(0))


def cosines(rows):
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(0)


def executed(panel, **given):
    exec(panel.code(), given)
    return given


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@pytest.mark.parametrize("closest_first", [True, False])
def test_what_is_shown_is_what_brute_force_finds_and_code_gives(sae, side, closest_first):
    panel = SuperpositionPanel(sae, neighbors=5, side=side, closest_first=closest_first)
    cos = cosines((sae.W_dec if side == "decoder" else sae.W_enc.T).detach())
    largest = cos.abs().amax(1)
    shown = [i for i, *_ in panel.rows["rows"]]
    assert [m for _, m, *_ in panel.rows["rows"]] == pytest.approx(largest[shown].tolist(), abs=1e-4)
    assert largest[shown].tolist() == pytest.approx(
        largest.sort(descending=closest_first).values[:200].tolist(), abs=1e-5
    )
    assert panel.selected == shown[0]
    panel.selected = 77
    result = dict(panel.neighbors)
    assert set(result) == set(cos[77].abs().topk(5).indices.tolist())
    assert all(cos[77, j].item() == pytest.approx(c, abs=1e-5) for j, c in result.items())
    namespace = executed(panel, sae=sae)
    assert namespace["neighbors"] == panel.neighbors
    assert namespace["table"].index[:200].tolist() == shown
    assert namespace["result"].histogram.tolist() == panel.figures["cosines"]
    assert sum(panel.figures["cosines"]) == 1024 * 1023 // 2
    assert sum(panel.figures["largest"]) == 1024
    assert dict((n, v) for n, v, _ in panel.figures["figures"])["effective dimensions"] == pytest.approx(
        namespace["result"].effective_dim, rel=1e-3
    )


def test_a_tensor(directions):
    directions[7] = 0
    panel = SuperpositionPanel(directions)
    assert repr(panel).endswith("tensor, 60 directions in 9 dimensions)")
    assert panel.facts["sides"] == []
    assert executed(panel, directions=directions)["neighbors"] == panel.neighbors
    assert ["of length 0", 1, "directions"] in panel.figures["figures"]
    with pytest.raises(ValueError, match="a tensor has no encoder"):
        panel.side = "encoder"
    assert "no encoder" in panel.error_message
    panel.selected = 59
    assert panel.error_message == ""
    assert panel.page["direction"] == 59


def test_wrong_values(sae, directions):
    panel = SuperpositionPanel(sae)
    for trait, wrong, says in (
        ("selected", 1024, "0 to 1023"),
        ("selected", -1, "0 to 1023"),
        ("side", "decodr", "decoder"),
    ):
        with pytest.raises(ValueError, match=says):
            setattr(panel, trait, wrong)
        assert says in panel.error_message
    with pytest.raises(TypeError, match="near: selected"):
        SuperpositionPanel(directions, selcted=3)
    with pytest.raises(TypeError, match="want: an SAE or a tensor"):
        SuperpositionPanel("a path")
    with pytest.raises(ValueError, match="at least 2"):
        SuperpositionPanel(directions[:1])
    with pytest.raises(ValueError, match="not finite"):
        SuperpositionPanel(directions / 0)
    with pytest.raises(ValueError, match="asked to 'explode'"):
        panel._on_message(panel, {"do": "explode"})
    assert "explode" in panel.error_message


def test_many_directions_take_a_thread(monkeypatch, sae):
    monkeypatch.setattr(superposition, "_AT_ONCE", 10)
    go, real = threading.Event(), saewb.superposition
    monkeypatch.setattr(saewb, "superposition", lambda *a, **k: (go.wait(30), real(*a, **k))[1], raising=False)
    panel = SuperpositionPanel(sae)
    assert panel.busy == "cosines between 1,024 directions"
    assert panel.static_html() == "<div>not computed yet</div>"
    assert panel.neighbors == []
    panel.selected = 5  # chosen before there is anything
    go.set()
    panel.wait(60)
    assert (panel.busy, panel.selected, panel.page["direction"]) == ("", 5, 5)
    panel.side = "encoder"
    panel.side = "decoder"  # before the encoder is there, which is not shown then
    panel.wait(60)
    assert panel.result.nearest[5].tolist() == real(sae, neighbors=12).nearest[5].tolist()
    assert "decoder" in panel.title


def test_directions_that_cannot_be_compared_say_so_and_leave_the_panel(monkeypatch, directions):
    monkeypatch.setattr(superposition, "_AT_ONCE", 10)
    directions[3, 4] = torch.nan
    panel = SuperpositionPanel(directions)
    with pytest.raises(ValueError, match="not finite"):
        panel.wait(60)
    assert panel.error_message.startswith("ValueError: ")
    assert (panel.busy, panel.neighbors, panel.static_html()) == ("", [], "<div>not computed yet</div>")
    directions[3, 4] = 1.0
    panel.closest_first = False  # asks anew
    panel.wait(60)
    assert panel.error_message == ""
    assert executed(panel, directions=directions)["neighbors"] == panel.neighbors


def test_two_directions():
    panel = SuperpositionPanel(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert panel.neighbors == [(1, pytest.approx(0.6))]
    assert executed(panel, directions=panel.directions)["neighbors"] == panel.neighbors
    assert "+0.600" in panel.static_html()


def test_a_saved_notebook_shows_figures(sae):
    text = SuperpositionPanel(sae)._repr_mimebundle_()[0]["text/html"]
    assert "mean_max_abs_cos" in text
    assert "Neighbors of" in text
    assert "<script" not in text


def test_examples_run():
    outcome = doctest.testmod(superposition)
    assert outcome.attempted > 3
    assert outcome.failed == 0


# -- several ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def other():
    return torch.randn(300, 20, generator=torch.Generator().manual_seed(1))


def test_several_are_beside_each_other_and_code_gives_them(sae, other):
    inputs = {"topk": sae, "other": other}
    panel = SuperpositionPanel(inputs, neighbors=3, which="other")
    assert repr(panel) == (
        f"SuperpositionPanel('other' of 2, direction {panel.selected}, tensor, 300 directions in 20 dimensions)"
    )
    for which, rows in (("other", other), ("topk", sae.W_dec.detach())):
        panel.which = which
        cos = cosines(rows)
        closest = int(cos.abs().amax(1).argmax())
        assert panel.selected in (closest, int(cos[closest].abs().argmax()))
        namespace = executed(panel, directions=inputs)
        assert namespace["neighbors"] == panel.neighbors
        assert namespace["compared"].equals(panel.compared)
        assert namespace["points"].equals(panel.points)
        assert namespace["points"].norm.tolist() == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-5)
        assert namespace["result"].histogram.tolist() == panel.figures["cosines"]
        row = next(r for r in panel.beside["rows"] if r["name"] == which)
        n, d = rows.shape
        assert (row["n"], row["d"]) == (n, d)
        largest, p95, p99, rms, welch, dims = row["figures"]
        off = cos[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)
        assert largest == pytest.approx(cos.abs().amax(1).mean().item(), rel=1e-3)
        by_p = off.abs().quantile(torch.tensor([0.95, 0.99], dtype=torch.float64), dim=1).mean(1)
        assert [p95, p99] == pytest.approx(by_p.tolist(), rel=1e-3)
        assert rms == pytest.approx(off.square().mean().sqrt().item(), rel=1e-3)
        assert welch == pytest.approx(((n - d) / (d * (n - 1))) ** 0.5, rel=1e-3)
        assert dims == pytest.approx(panel.result.effective_dim, rel=1e-3)
        assert [sum(o["cosines"]) for o in panel.beside["outlines"].values()] == [1024 * 1023 // 2, 300 * 299 // 2]
    assert "Welch bound" in panel.beside["note"]  # they differ in d
    text = panel._repr_mimebundle_()[0]["text/html"]
    assert text.count("<svg") == 2
    assert ">other<" in text
    assert "Welch bound" in text


def test_a_list_goes_by_place_and_each_keeps_its_selection(sae, other):
    panel = SuperpositionPanel([other, sae], neighbors=3)
    assert panel.facts["names"] == ["0", "1"]
    panel.which = "1"
    panel.selected = 1000
    panel.which = "0"
    assert panel.selected < 300
    panel.which = "1"
    assert panel.selected == 1000
    assert executed(panel, directions=[other, sae])["compared"].equals(panel.compared)
    both = SuperpositionPanel([sae, sae], side="encoder")
    namespace = executed(both, saes=[sae, sae])
    assert namespace["compared"].equals(both.compared)
    assert namespace["neighbors"] == both.neighbors
    assert namespace["points"].equals(both.points)
    assert both.beside["note"] == ""


def test_an_encoder_that_not_all_have(sae, other):
    panel = SuperpositionPanel({"topk": sae, "other": other}, side="encoder")
    assert panel.beside["rows"][1] == {"name": "other", "why": "no encoder"}
    assert executed(panel, directions={"topk": sae, "other": other})["compared"].equals(panel.compared)
    with pytest.raises(ValueError, match="a tensor has no encoder"):
        panel.which = "other"
    assert panel.which == "topk"
    panel.set_state({"which": "other", "side": "decoder"})  # what the front end sends
    assert (panel.which, panel.side, panel.error_message) == ("other", "decoder", "")
    assert panel.facts["sides"] == []
    assert len(panel.neighbors) == 12


def test_wrong_ones_of_several(sae, other):
    for wrong, error, says in (
        ([], ValueError, "an empty list"),
        ({}, ValueError, "an empty dict"),
        ({1: sae, "1": sae}, ValueError, "2 of the name '1'"),
        ({"a": sae, "b": "a path"}, TypeError, "got a str"),
    ):
        with pytest.raises(error, match=says):
            SuperpositionPanel(wrong)
    with pytest.raises(ValueError, match="which is 'tpok'.\n  near: topk"):
        SuperpositionPanel({"topk": sae}, which="tpok")
    panel = SuperpositionPanel({"topk": sae, "other": other})
    with pytest.raises(ValueError, match="near: other"):
        panel.which = "othr"
    with pytest.raises(ValueError, match="direction 300 of 300"):
        panel.set_state({"which": "other", "selected": 300})
    assert "0 to 299" in panel.error_message
    panel.which = "other"
    panel.set_state({"selected": 900, "which": "topk"})
    assert (panel.selected, panel.page["direction"], panel.error_message) == (900, 900, "")


def test_several_are_computed_one_after_the_other(monkeypatch, sae, other):
    monkeypatch.setattr(superposition, "_AT_ONCE", 10)
    go, real, order = threading.Semaphore(0), saewb.superposition, []

    def held(rows, **how):
        order.append(len(rows))
        go.acquire(timeout=30)
        return real(rows, **how)

    monkeypatch.setattr(saewb, "superposition", held, raising=False)
    bad = torch.full((50, 4), torch.nan)
    panel = SuperpositionPanel({"topk": sae, "bad": bad, "other": other}, which="other")
    assert panel.busy == "cosines between 300 directions of other"
    assert [r["why"] for r in panel.beside["rows"]] == ["not computed yet"] * 3
    go.release()
    while panel.result is None:
        panel.collect()
    assert panel.busy == "cosines between 1,024 directions of topk"
    assert panel.compared.index.tolist() == ["other"]
    go.release(2)
    with pytest.raises(ValueError, match="not finite"):
        panel.wait(60)
    panel.wait(60)
    assert order == [300, 1024, 50]
    assert panel.compared.index.tolist() == ["topk", "other"]
    assert "not finite" in panel.beside["rows"][1]["why"]
    panel.which = "topk"
    assert panel.result.n_features == 1024
    assert panel.busy == "cosines between 50 directions of bad"  # once more
    go.release()


# -- the scatter ------------------------------------------------------------------------------------------------------


def test_density_is_the_indexs_and_code_gives_it(sae):
    index = panel_driver.index()
    panel = SuperpositionPanel(sae, index=index)
    assert panel.scatter == "density"
    for scatter in ("density", "norm"):
        panel.scatter = scatter
        namespace = executed(panel, sae=sae, index=index)
        assert namespace["points"].equals(panel.points)
        assert panel.dots["latents"] == list(range(1024))
        assert panel.dots["x"] == pytest.approx(panel.points[scatter].tolist(), rel=1e-3)
        assert panel.dots["y"] == pytest.approx(cosines(sae.W_dec.detach()).abs().amax(1).tolist(), rel=1e-3)
        assert panel.page["at"] == [panel.dots["x"][panel.selected], panel.dots["y"][panel.selected]]
    assert panel.points.norm.tolist() == pytest.approx(sae.W_dec.norm(dim=1).tolist())
    panel.scatter = "density"
    assert panel.points.density.tolist() == index.table().density.tolist()
    assert "fraction of tokens" in panel.static_html()


def test_many_dots_are_a_choice_that_keeps_the_extremes():
    panel = SuperpositionPanel(torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    panel.wait()
    points, dots = panel.points, panel.dots
    assert 3500 < len(dots["latents"]) <= 4000
    assert len(set(dots["latents"])) == len(dots["latents"])
    assert f"{len(dots['latents']):,} of 20,000" in dots["caption"]
    shown = set(dots["latents"])
    for name in ("norm", "max_abs_cos"):
        assert {points[name].idxmax(), points[name].idxmin()} <= shown
        assert points[name].nlargest(250).min() >= points[name].loc[sorted(shown)].nlargest(250).min()
    assert panel_driver.sent(panel) < 300_000


def test_latents_that_never_fire_have_a_place(sae):
    index = panel_driver.silent()
    rows = torch.randn(len(index), 7, generator=torch.Generator().manual_seed(0))
    panel = SuperpositionPanel(rows, index=index)
    assert panel.dots["x"][3] == 0
    assert ">never<" in panel.static_html()


def test_an_index_of_another_sae_is_refused(sae, other):
    index = panel_driver.index()
    with pytest.raises(ValueError, match=r"not of this SAE, which has 300 latents\.\n  want: .*\n  fix: "):
        SuperpositionPanel(other, index=index)
    turned = sae.W_dec.detach().flip(0)
    with pytest.raises(ValueError, match="is of another SAE: latents .* here"):
        SuperpositionPanel(turned, index=index)
    SuperpositionPanel(sae.W_dec.detach().half() * 3, index=index)  # its own, folded and rounded
    with pytest.raises(ValueError, match="not of this SAE, which has 300 latents"):
        SuperpositionPanel({"topk": sae, "other": other}, index={"other": index})
    with pytest.raises(ValueError, match="'tpok', which is none of the SAEs.\n  near: topk"):
        SuperpositionPanel({"topk": sae, "other": other}, index={"tpok": index})
    with pytest.raises(TypeError, match="several SAEs and a FeatureIndex"):
        SuperpositionPanel({"topk": sae, "other": other}, index=index)
    with pytest.raises(ValueError, match="1 indexes of 2 SAEs"):
        SuperpositionPanel([sae, other], index=[index])
    with pytest.raises(TypeError, match="want: a FeatureIndex"):
        SuperpositionPanel(sae, index="a path")
    panel = SuperpositionPanel(sae)
    with pytest.raises(ValueError, match=r"scatter is 'density'.\n  want: norm\n  fix:  Superpos.*index="):
        panel.scatter = "density"


def test_only_some_have_an_index(sae, other):
    index = panel_driver.index()
    for inputs, indexes, names in (
        ({"other": other, "topk": sae}, {"topk": index}, ("other", "topk")),
        ([other, sae], [None, index], ("0", "1")),
    ):
        panel = SuperpositionPanel(inputs, index=indexes, which=names[1])
        assert panel.scatter == "density"
        assert executed(panel, directions=inputs, index=indexes)["points"].equals(panel.points)
        panel.which = names[0]
        assert (panel.scatter, panel.facts["scatters"]) == ("norm", ["norm"])
        assert executed(panel, directions=inputs, index=indexes)["points"].equals(panel.points)


def test_closed_it_leaves_nothing_behind():
    """Not even its layout, which ipywidgets keeps; one that was passed stays for others."""
    layout, widgets = ipywidgets.Layout(width="50%"), ipywidgets.widgets.widget._instances
    before = set(widgets)
    for traits in ({}, {"layout": {"width": "50%"}}, {"layout": layout}):
        panel = SuperpositionPanel(torch.eye(3), **traits)
        panel.close()
        panel.close()
        assert set(widgets) == before
    assert layout.comm is not None
