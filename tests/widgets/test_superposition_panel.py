"""SuperpositionPanel without a browser."""

import doctest
import threading

import panels
import pytest
import torch
from saewb_widgets import SuperpositionPanel, superposition

import saewb


@pytest.fixture
def sae():
    return panels.embedded()[1]


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
    panel = SuperpositionPanel(sae, neighbours=5, side=side, closest_first=closest_first)
    cos = cosines((sae.W_dec if side == "decoder" else sae.W_enc.T).detach())
    largest = cos.abs().amax(1)
    shown = [i for i, *_ in panel.rows["rows"]]
    assert [m for _, m, *_ in panel.rows["rows"]] == pytest.approx(largest[shown].tolist(), abs=1e-4)
    assert largest[shown].tolist() == pytest.approx(
        largest.sort(descending=closest_first).values[:200].tolist(), abs=1e-5
    )
    assert panel.selected == shown[0]
    panel.selected = 77
    found = dict(panel.neighbours)
    assert set(found) == set(cos[77].abs().topk(5).indices.tolist())
    assert all(cos[77, j].item() == pytest.approx(c, abs=1e-5) for j, c in found.items())
    made = executed(panel, sae=sae)
    assert made["neighbours"] == panel.neighbours
    assert made["table"].index[:200].tolist() == shown
    assert made["found"].histogram.tolist() == panel.figures["cosines"]
    assert sum(panel.figures["cosines"]) == 1024 * 1023 // 2
    assert sum(panel.figures["largest"]) == 1024
    assert dict((n, v) for n, v, _ in panel.figures["figures"])["effective dimensions"] == pytest.approx(
        made["found"].effective_dim, rel=1e-3
    )


def test_a_tensor(directions):
    directions[7] = 0
    panel = SuperpositionPanel(directions)
    assert repr(panel).endswith("tensor, 60 directions in 9 dimensions)")
    assert panel.facts["sides"] == []
    assert executed(panel, directions=directions)["neighbours"] == panel.neighbours
    assert ["of length 0", 1, "directions"] in panel.figures["figures"]
    with pytest.raises(ValueError, match="a tensor has no encoder"):
        panel.side = "encoder"
    assert "no encoder" in panel.complaint
    panel.selected = 59
    assert panel.complaint == ""
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
        assert says in panel.complaint
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
    assert "explode" in panel.complaint


def test_many_directions_take_a_thread(monkeypatch, sae):
    monkeypatch.setattr(superposition, "_AT_ONCE", 10)
    go, real = threading.Event(), saewb.superposition
    monkeypatch.setattr(saewb, "superposition", lambda *a, **k: (go.wait(30), real(*a, **k))[1], raising=False)
    panel = SuperpositionPanel(sae)
    assert panel.busy == "cosines between 1,024 directions"
    assert panel.static_html() == "<div>not computed yet</div>"
    assert panel.neighbours == []
    panel.selected = 5  # chosen before there is anything
    go.set()
    panel.wait(60)
    assert (panel.busy, panel.selected, panel.page["direction"]) == ("", 5, 5)
    panel.side = "encoder"
    panel.side = "decoder"  # before the encoder is there, which is not shown then
    panel.wait(60)
    assert panel.result.nearest[5].tolist() == real(sae, neighbours=12).nearest[5].tolist()
    assert "decoder" in panel.title


def test_directions_that_cannot_be_compared_say_so_and_leave_the_panel(monkeypatch, directions):
    monkeypatch.setattr(superposition, "_AT_ONCE", 10)
    directions[3, 4] = torch.nan
    panel = SuperpositionPanel(directions)
    with pytest.raises(ValueError, match="not finite"):
        panel.wait(60)
    assert panel.complaint.startswith("ValueError: ")
    assert (panel.busy, panel.neighbours, panel.static_html()) == ("", [], "<div>not computed yet</div>")
    directions[3, 4] = 1.0
    panel.closest_first = False  # asks anew
    panel.wait(60)
    assert panel.complaint == ""
    assert executed(panel, directions=directions)["neighbours"] == panel.neighbours


def test_two_directions():
    panel = SuperpositionPanel(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert panel.neighbours == [(1, pytest.approx(0.6))]
    assert executed(panel, directions=panel.directions)["neighbours"] == panel.neighbours
    assert "+0.600" in panel.static_html()


def test_a_saved_notebook_shows_figures(sae):
    said = SuperpositionPanel(sae)._repr_mimebundle_()[0]["text/html"]
    assert "mean_max_abs_cos" in said
    assert "Neighbours of" in said
    assert "<script" not in said


def test_examples_run():
    found = doctest.testmod(superposition)
    assert found.attempted > 3
    assert found.failed == 0
