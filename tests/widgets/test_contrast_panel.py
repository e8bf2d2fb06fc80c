"""ContrastPanel from Python: comparing, choosing a latent, its code, its snapshot, what is refused."""

import pytest
from helpers import panel_driver
from saewb_widgets import ContrastPanel

import saewb

A = ["The bird is a small species.", "A family of birds.", "The species of fish lives in the sea."]
B = ["The city is in the north.", "A town of people.", "The river in the city.", "A large building."]


def compared(**options):
    panel = ContrastPanel(*panel_driver.embedded(), A, B, n_permutations=50, **options)
    panel.wait()
    return panel


def test_what_it_shows_is_what_contrast_computes():
    panel = compared()
    table = panel.result.to_frame()
    assert panel.table.equals(table)
    assert [row[0] for row in panel.rows["rows"]] == table.latent[:200].tolist()
    assert panel.selected == table.latent[0]
    assert panel.page["latent"] == panel.selected
    assert [one["value"] for one in panel.page["texts"]] == [pytest.approx(m.value, rel=1e-3) for m in panel.maxima]
    assert set(panel.dots["latents"]) == set(table.latent[table.q.notna()])
    assert panel.baselines[1][2] == f"presence of {panel.result.baselines.best_token!r}"
    assert "none is held out" in panel.about
    exec(panel.code(), shown := dict(zip(("model", "sae"), panel_driver.embedded(), strict=True)))
    assert shown["table"].equals(panel.table)
    assert shown["maxima"] == panel.maxima


def test_another_side_latent_or_text():
    panel = compared(selected=5, side="b")
    assert panel.selected == 5
    assert (panel.table.auc < 0.5).all()
    panel.side = "a"
    assert (panel.table.auc > 0.5).all()
    panel.selected = int(panel.table.latent[1])
    panel.wait()
    assert panel.maxima == panel.result.maxima(panel.model, panel.selected)
    first = panel.result
    panel.b = B[:2]
    assert panel.stale
    panel.on_request("compare")
    panel.wait()
    assert panel.result is not first
    assert not panel.stale
    assert panel.result.is_a.sum() == 3
    panel.pool = "mean"
    assert panel.stale
    assert "b = " + repr(B[:2]) in panel.code()
    assert "pool='max'" in panel.code()  # of what is shown


def test_labels_of_an_index_stand_beside_the_latents():
    model, sae = panel_driver.embedded()
    index = saewb.build_index(model, sae, [*A, *B] * 3, ctx_len=16)
    best = int(compared().table.latent[0])
    named = index.with_labels({best: "what <b>species</b> are"})
    panel = compared(index=named)
    assert panel.rows["labels"] == named.label_texts([row[0] for row in panel.rows["rows"]])
    assert panel.rows["labels"][0] == panel.page["label"] == "what <b>species</b> are"
    still = panel.static_html()
    assert still.count("what &lt;b&gt;species&lt;/b&gt; are") == 2
    assert compared().rows["labels"] == []
    small = saewb.SAE(saewb.SAEConfig(model.cfg.d_model, 40, hook=sae.cfg.hook), seed=0)
    with pytest.raises(ValueError, match="is not of this SAE"):
        ContrastPanel(model, small, index=index)


def test_it_shows_its_errors():
    panel = ContrastPanel(*panel_driver.embedded())
    assert repr(panel) == "ContrastPanel(0 + 0 texts, max)"
    assert "not compared yet" in panel.static_html()
    with pytest.raises(ValueError, match="set a has no texts"):
        panel.compare()
    assert panel.error_message.startswith("ValueError: set a has no texts")
    panel.a, panel.b = A, [*B, A[1]]
    panel.compare()
    with pytest.raises(ValueError, match=r"b\[4\] is the same text as a\[1\]"):
        panel.wait()
    assert panel.busy == ""
    for name, value in (("pool", "maximum"), ("side", "c"), ("selected", 5000)):
        with pytest.raises(ValueError, match=f"{value}"):
            setattr(panel, name, value)
    with pytest.raises(ValueError, match="asked to 'x'"):
        panel.on_request("x")
    with pytest.raises(TypeError, match="one string for b"):
        ContrastPanel(*panel_driver.embedded(), A, "text")
    with pytest.raises(TypeError, match="pol="):
        ContrastPanel(*panel_driver.embedded(), A, B, pol="max")


def test_the_snapshot_escapes_texts():
    panel = ContrastPanel(*panel_driver.embedded(), [panel_driver.HOSTILE + " a", "the b"], ["c d", "e f"])
    panel.wait()
    snapshot = panel.snapshot().data
    assert "Latent" in snapshot
    assert panel_driver.HOSTILE not in snapshot
