"""SteeringPanel without a browser."""

import doctest
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import panel_driver, tiny_models
from saewb_widgets import SteeringPanel
from saewb_widgets.steering import panel as steering

import saewb

RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def made():
    model, sae = panel_driver.embedded()
    return SteeringPanel(
        model, sae, panel_driver.index(), latents={972: 16.0}, prompt="The scientist", max_new_tokens=6
    )


def executed(panel, **given):
    exec(panel.code(), given)
    return given


def same(panel, shown):
    assert (shown["clean"], shown["steered"]) == (panel.clean, panel.steered)
    assert shown["changes"].equals(panel.changes)


def say(panel, what, **how):
    panel._on_message(panel, {"do": what, **how})


class Gate:
    """Generations that wait for leave before each token; what was closed is noted."""

    def __init__(self, monkeypatch):
        self.go, self.closed, self.begun = threading.Semaphore(0), [], 0
        self.real = saewb.generate_tokens
        monkeypatch.setattr(saewb, "generate_tokens", self.held, raising=False)

    def held(self, *args, **kwargs):
        return self.steps(self.real(*args, **kwargs))

    def steps(self, tokens):
        self.begun += 1
        me = self.begun
        try:
            for token in tokens:
                assert self.go.acquire(timeout=60)
                yield token
        finally:
            tokens.close()
            self.closed.append(me)

    def let(self, n):
        for _ in range(n):
            self.go.release()


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("positions", ["all", "not the first"])
@pytest.mark.parametrize("how", ["add", "scale", "clamp"])
def test_code_gives_what_is_shown(made, positions, how):
    made.positions = positions
    made.add(972, 16.0 if how != "scale" else 4.0, how)
    made.add(713, 3.0)
    made.temperature, made.seed = 0.8, 6
    made.generate()
    made.wait()
    assert (made.running, made.stale, made.busy) == (False, False, "")
    assert made.changes.change.abs().max() > 1e-3
    assert (made.clean != made.steered) == (how != "scale")  # 713 alone is too weak to change these few words
    assert len(made.movers) == 20
    assert made.movers[0][4] == pytest.approx(made.movers[0][3] - made.movers[0][2], abs=2e-4)
    same(made, executed(made, model=made.model, sae=made.saes[0]))


def test_it_is_what_generate_writes(made):
    made.generate()
    made.wait()
    model, sae = panel_driver.embedded()
    args = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
    with torch.no_grad():
        assert model.generate("The scientist", **args).endswith("The scientist" + made.clean)
        with saewb.steer(model, sae, {972: 16.0}, positions=slice(1, None)):
            assert model.generate("The scientist", **args).endswith("The scientist" + made.steered)


def test_several_saes():
    model, sae = panel_driver.embedded()
    saes = [sae.__class__(sae.cfg), sae]
    saes[0].load_state_dict({k: v.roll(1, 0) if k == "W_dec" else v for k, v in sae.state_dict().items()})
    with pytest.raises(ValueError, match=r"is of another SAE \(by content"):
        SteeringPanel(model, saes, [panel_driver.index()])
    panel = SteeringPanel(model, saes, [None, panel_driver.index()], latents={5: 9.0}, max_new_tokens=3)
    panel.add(7, 12.0, sae=1)
    panel.add(8, 2.0, "clamp", sae=1)
    assert repr(panel) == "SteeringPanel(add 0/5: 9, add 1/7: 12, clamp 1/8: 2, 'The', not the first, tiny)"
    assert panel.cards[0]["label"] == ""
    assert panel.cards[1]["label"] != ""
    panel.generate()
    panel.wait()
    same(panel, executed(panel, model=model, saes=saes))
    with pytest.raises(ValueError, match="SAE 2 of 2"):
        panel.add(1, sae=2)


def test_tokens_come_one_by_one_and_stop_keeps_them(made, monkeypatch):
    made.wait()
    gate = Gate(monkeypatch)
    made.max_new_tokens = 40
    say(made, "generate")
    assert made.running
    assert "writing" in made.busy
    gate.let(3)
    until(lambda: len(made._texts.prefixes["clean"]) == 2)
    assert made.clean == ""  # a thread touches no trait
    say(made, "collect")
    assert made.clean
    assert made.steered
    say(made, "stop")
    saved = made.clean, made.steered
    gate.let(1)
    until(lambda: sorted(gate.closed) == [1, 2])
    say(made, "collect")
    assert (made.clean, made.steered, made.running, made.busy) == (*saved, False, "")
    monkeypatch.undo()
    same(made, executed(made, model=made.model, sae=made.saes[0]))
    say(made, "stop")  # nothing to stop: no harm


def test_a_new_generation_closes_the_one_under_way(made, monkeypatch):
    made.wait()
    gate = Gate(monkeypatch)
    made.generate()
    old = made._texts
    gate.let(2)
    until(lambda: len(old.prefixes["steered"]) == 1)
    made.prompt = "In the year"
    made.generate()
    gate.let(1)
    gate.let(30)
    made.wait()
    until(lambda: {1, 2} <= set(gate.closed))
    assert len(old.prefixes["clean"]) < 6
    monkeypatch.undo()
    same(made, executed(made, model=made.model, sae=made.saes[0]))


def test_cells_that_use_the_model_meanwhile_are_not_steered_nor_seen_in_the_texts(made):
    made.wait()
    model, sae = panel_driver.embedded()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        clean = model(ids)
    before = tiny_models.snapshot(model)
    made.max_new_tokens = 40
    made.generate()
    seen = []
    with torch.no_grad():
        while not made._jobs["texts"][1].done():
            seen.append(model(ids))  # takes no lock
            with saewb.steer(model, sae, {4: 30.0}):  # takes it
                model(ids)
                made.add(713, 1.0 + len(seen))  # of the thread that holds it
                made.remove(713)
    assert len(seen) > 1
    for one in seen:
        torch.testing.assert_close(one, clean)
    made.wait()
    assert tiny_models.snapshot(model) == before
    shown = executed(made, model=model, sae=sae)
    same(made, shown)


def test_a_cell_that_holds_the_model_does_not_hold_up_the_panel(made):
    with saewb.models.hook_points.lock(made.model):
        made.generate()
        made.wait(60)
    assert made.steered


def test_what_is_on_the_model_already_is_not_seen_here_and_the_code_says_so(made):
    made.generate()
    made.wait()
    model, sae = panel_driver.embedded()
    with saewb.attach(model, sae), saewb.steer(model, sae, {4: 30.0}):
        panel = SteeringPanel(model, sae, latents={972: 16.0}, prompt="The scientist", max_new_tokens=6)
        panel.generate()
        panel.wait()
        assert (panel.clean, panel.steered) == (made.clean, made.steered)
        assert panel.about.endswith("the model without what cells have put on it")
        assert "bare = saewb.models.shared_copy.shared_copy(model)" in panel.code()
        same(panel, executed(panel, model=model, sae=sae))
    panel.generate()
    panel.wait()
    assert panel.about == repr(sae)
    assert "twin" not in panel.code()


def test_an_sae_that_looks_back_has_the_whole_text_read():
    model = tiny_models.bridge()
    cfg = saewb.TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID)
    panel = SteeringPanel(model, saewb.TemporalSAE(cfg), latents={3: 4.0}, prompt="w3 w9", max_new_tokens=3)
    panel.generate()
    panel.wait()
    assert "use_past_kv_cache" not in panel.code()
    same(panel, executed(panel, model=model, sae=panel.saes[0]))
    panel.add(5, 0.0, "clamp")
    panel.generate()
    panel.wait()
    assert "use_past_kv_cache=False" in panel.code()
    same(panel, executed(panel, model=model, sae=panel.saes[0]))


def test_the_table_follows_and_texts_say_they_are_old(made):
    made.wait()
    first = made.changes
    made.generate()
    made.wait()
    for value in (3.0, 4.0, 5.0):
        made.add(972, value)
    assert made.stale
    made.add(972, 16.0)
    assert not made.stale
    made.add(972, 5.0)
    made.wait()
    model, sae = panel_driver.embedded()
    want = saewb.next_token_changes(
        model, made.prompt, lambda: saewb.steer(model, sae, {972: 5.0}, positions=slice(1, None)), n=20
    )
    assert made.changes.equals(want)
    assert not first.equals(want)
    made.live = True
    assert made.running
    made.seed = 3
    made.wait()
    assert not made.stale
    made.remove(972)
    made.wait()
    assert (made.latents, made.movers, made.changes) == ([], [], None)
    assert made.clean == made.steered != ""
    shown = executed(made, model=model, sae=sae)
    assert shown["steered"] == made.steered


def test_search(made):
    made.query = "713"
    assert [row[:2] for row in made.results["rows"]] == [[0, 713]]
    made.query = "Brazil"
    assert [i for _, i, _ in made.results["rows"]] == panel_driver.index().search("Brazil", 12).index.tolist()
    made.query = "9999"
    assert made.results["rows"] == []
    made.query = " "
    assert made.results == {}
    made.query = "zzzzqq"
    assert made.results["rows"] == []
    bare = SteeringPanel(*panel_driver.embedded())
    with pytest.raises(ValueError, match="no index to search"):
        bare.query = "Brazil"
    assert "no index" in bare.error_message
    bare.query = "3"
    assert bare.error_message == ""
    assert bare.results["rows"][0][:2] == [0, 3]


def test_a_search_among_many_takes_a_thread(made, monkeypatch):
    monkeypatch.setattr(steering, "_AT_ONCE", 10)
    made.wait()
    made.query = "Brazil"
    assert made.busy == "searching"
    made.wait()
    assert made.results["rows"]


def test_prompts_of_no_and_of_too_many_tokens(made):
    made.prompt = ""
    made.generate()
    made.wait()
    same(made, executed(made, model=made.model, sae=made.saes[0]))
    made.prompt = "word " * 2000
    with pytest.raises(ValueError, match="takes 512 at most"):
        made.wait()
    assert "a prompt of" in made.error_message
    assert (made.movers, made.changes, made.busy) == ([], None, "")
    with pytest.raises(ValueError, match="takes 512 at most"):
        say(made, "generate")
    assert "a prompt of" in made.error_message
    assert not made.running
    made.prompt = "The"
    say(made, "generate")
    made.wait()
    assert made.error_message == ""
    same(made, executed(made, model=made.model, sae=made.saes[0]))


def test_a_prompt_of_2000_tokens_is_gone_on_from_where_the_context_takes_it():
    model = tiny_models.new_bridge()
    model.cfg.n_ctx = 2048  # rotary: nothing else of it knows a limit
    prompt = " ".join(f"w{k % 20}" for k in range(1999))
    panel = SteeringPanel(model, tiny_models.sae(RESID), latents={3: 4.0}, prompt=prompt, max_new_tokens=2)
    panel.generate()
    panel.wait()
    assert panel.steered
    assert len(repr(panel)) < 110
    assert panel_driver.sent(panel) < 80_000
    same(panel, executed(panel, model=model, sae=panel.saes[0]))


def test_an_exception_half_way_is_shown_and_the_panel_goes_on(made, monkeypatch):
    made.wait()
    real = saewb.steer
    monkeypatch.setattr(saewb, "steer", lambda *a, **k: 1 / 0, raising=False)
    made.generate()
    with pytest.raises(ZeroDivisionError):
        made.wait()
    assert made.error_message.startswith("ZeroDivisionError")
    assert (made.running, made.busy, made.stale) == (False, "", True)
    monkeypatch.setattr(saewb, "steer", real)
    made.generate()
    made.wait()
    assert made.error_message == ""
    assert made.steered


def test_an_index_deleted_under_it(made):
    index = panel_driver.index()
    gone = panel_driver.Gone(index.tensors)
    panel = SteeringPanel(*panel_driver.embedded(), replace(index, tensors=gone), latents={972: 16.0}, max_new_tokens=2)
    label = panel.cards[0]
    gone.there = False
    with pytest.raises(OSError, match="stale file handle"):
        panel.add(713, 4.0)
    assert "stale file handle" in panel.error_message
    assert [card["label"] for card in panel.cards] == ["", ""]
    panel.generate()
    panel.wait()
    same(panel, executed(panel, model=panel.model, sae=panel.saes[0]))
    gone.there = True
    panel.remove(713)
    assert (panel.error_message, panel.cards) == ("", [label])


def test_wrong_values(made):
    made.wait()
    one = {"latent": 3, "value": 1.0}
    for trait, wrong, says in (
        ("positions", "al", "near: all"),
        ("temperature", -1.0, "a number >= 0"),
        ("temperature", float("nan"), "a number >= 0"),
        ("seed", -1, "0 or more"),
        ("max_new_tokens", 0, "at least 1"),
        ("latents", [{"latent": 1024}], "0 to 1023"),
        ("latents", [{"latent": "x"}], "whole numbers"),
        ("latents", [{}], "whole numbers"),
        ("latents", [{**one, "how": "clmp"}], "near: clamp"),
        ("latents", [{**one, "value": float("inf")}], "a finite number"),
        ("latents", [{**one, "valeu": 2}], "near: value"),
        ("latents", [one, one], "there twice"),
    ):
        before = getattr(made, trait)
        with pytest.raises(ValueError, match=says):
            setattr(made, trait, wrong)
        assert says in made.error_message
        assert getattr(made, trait) == before
    with pytest.raises(ValueError, match="asked to 'explode'"):
        say(made, "explode")
    model, sae = panel_driver.embedded()
    with pytest.raises(TypeError, match="near: prompt"):
        SteeringPanel(model, sae, promt="x")
    with pytest.raises(TypeError, match="got a str as an SAE"):
        SteeringPanel(model, "sae")
    with pytest.raises(ValueError, match="d_in|do not fit"):
        SteeringPanel(model, tiny_models.sae(RESID))
    with pytest.raises(ValueError, match="no hook named"):
        SteeringPanel(model, tiny_models.sae("blocks.9.hook_resid_post"))
    with pytest.raises(ValueError, match="FeatureIndex.24 latents.* is not of this SAE, which has 1,024"):
        SteeringPanel(model, sae, panel_driver.many(24))
    with pytest.raises(ValueError, match="1 SAEs and 2 indexes"):
        SteeringPanel(model, sae, [None, None])


def test_hostile_tokens_are_escaped(made):
    made.wait()
    made.prompt = panel_driver.HOSTILE
    made.generate()
    made.wait()
    made.movers = [[1, panel_driver.HOSTILE, 0.1, 0.2, 0.1]]
    made.cards = [{**made.cards[0], "label": panel_driver.HOSTILE}]
    text = made.snapshot().data
    assert "<img" not in text
    assert text.count("&lt;img") == 4  # the prompt beside both texts, the token, the label
    same_text = executed(made, model=made.model, sae=made.saes[0])
    assert same_text["clean"] == made.clean


def test_a_first_view_is_small(made):
    made.wait()
    assert panel_driver.sent(made) < 60_000
    assert "latent" in made._repr_mimebundle_()[0]["text/html"]


def test_examples_run():
    outcome = doctest.testmod(steering)
    assert outcome.attempted > 3
    assert outcome.failed == 0
