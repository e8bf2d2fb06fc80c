"""PromptExplorer without a browser: what is shown is what saewb says, and what its code gives."""

import collections
import doctest
import json
import re
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import panel_driver, tiny_models
from sae import test_cross_layer as cross
from saewb_widgets import PromptExplorer
from saewb_widgets.prompt_explorer import panel as prompt_explorer

import saewb

TEXT = "Marie Curie was a Polish physicist.\nShe won the Nobel Prize"
RESID = "blocks.1.hook_resid_post"
WORDS = "w3 w9 w20 w4 w11 w7"


@pytest.fixture
def index():
    return panel_driver.index()


def explorer(index=None, **traits):
    return PromptExplorer(*panel_driver.embedded(), index, **{"prompt": TEXT, **traits})


def changed(panel, **traits):
    for name, value in traits.items():
        setattr(panel, name, value)
    panel.wait(60)


def executed(panel, **names):
    model, sae = panel.inputs.model, panel.inputs.saes
    created = {"model": model, "sae": sae[0], "saes": list(sae)} | {
        "index": panel.inputs.index,
        "indexes": panel.inputs.index,
    }
    exec(panel.code(), created | names, result := {})
    return result


def check_code(panel):
    namespace = executed(panel)
    assert namespace["latents"].equals(panel.latents)
    assert namespace["words"].equals(panel.next_tokens.to_frame(panel.words["at"]))
    if panel.selected >= 0:
        begin = panel.window["offset"]
        part = namespace["activations"][begin : begin + len(panel.trace["acts"])].tolist()
        assert panel.trace["acts"] == pytest.approx(part, rel=1e-3)
    listed = [(panel.facts["saes"][r["sae"]], r["latent"], r["position"]) for r in panel.listing["rows"]]
    frame = namespace["latents"].head(panel.n_rows)
    assert listed == list(zip(frame.sae, frame.latent, frame.position, strict=True))


VIEWS = {
    "activation": {},
    "share": {"rank": "of_max"},
    "logit": {"rank": "logit_effect"},
    "logit of a word": {"rank": "logit_effect", "target": " of", "position": 3},
    "logit of an id": {"rank": "logit_effect", "target": "id:300"},
    "attribution": {"rank": "attribution", "position": -2},
    "attribution of a word": {"rank": "attribution", "target": " physicist", "position": 5, "method": "integrated"},
    "everywhere": {"everywhere": True},
    "everywhere by effect": {"everywhere": True, "rank": "logit_effect"},
    "special": {"special_tokens": True, "position": 0},
    "not dense": {"max_density": 0.02},
    "a latent": {"selected": 748},
    "all": {"everywhere": True, "rank": "attribution", "max_density": 0.1, "special_tokens": True, "selected": 3},
}


@pytest.mark.parametrize("name", VIEWS)
def test_code_gives_what_is_shown(index, name):
    panel = explorer(index)
    changed(panel, **VIEWS[name])
    check_code(panel)
    at_once = explorer(index, **VIEWS[name])
    assert at_once.latents.to_dict("list") == panel.latents.to_dict("list")
    changed(panel, rank="activation", target="")  # effects stay where they are known, and the code says so
    check_code(panel)


def test_it_opens_on_the_last_token_and_says_what_fires_there(index):
    model, sae = panel_driver.embedded()
    panel = explorer(index)
    reading = saewb.read_prompt(model, TEXT, sae)
    assert tuple(panel.window["tokens"]) == reading.tokens
    assert panel.window["special"][:2] == [1, 0]
    assert panel.window["active"] == reading.position.bincount(minlength=len(reading.tokens)).tolist()
    assert panel.words["at"] == len(reading.tokens) - 1
    frame = reading.to_frame(-1)
    assert [r["latent"] for r in panel.listing["rows"]] == frame.latent.tolist()
    assert panel.selected == frame.latent[0] == panel.page["latent"]
    assert panel.trace["acts"] == pytest.approx(reading.activations(0, panel.selected).tolist(), rel=1e-3)
    first = panel.listing["rows"][0]
    assert first["of_max"] == pytest.approx(frame.activation[0] / index.latent(panel.selected).max, rel=1e-3)
    assert first["hint"]["word"] == index.latent(panel.selected).logits_top[0].token
    words = saewb.next_tokens(model, TEXT, sae).to_frame()
    assert [w for w, *_ in panel.words["words"]] == words.token.tolist()
    assert [p for *_, p, _ in panel.words["words"]] == pytest.approx(words.probability.tolist(), rel=1e-3)
    assert (panel.error, panel.error_message, panel.busy) == (None, "", "")


def test_a_token_a_latent_and_back():
    panel = explorer()
    panel.position = 3
    assert panel.busy == ""  # known already
    assert panel.words["at"] == 3
    assert {r["position"] for r in panel.listing["rows"]} == {3}
    assert panel.selected == panel.listing["rows"][0]["latent"]  # follows, as long as none is chosen
    panel.selected = 748
    panel.position = 5
    assert panel.selected == 748
    panel.selected = -1
    assert panel.trace == {}
    press(panel, "move", by=1)
    press(panel, "move", by=-1000)
    assert panel.words["at"] == 0
    assert panel.listing["rows"] == []  # the BOS, left out
    press(panel, "move", by=1000)
    assert panel.words["at"] == panel.window["total"] - 1


def press(panel, what, **how):
    panel._on_message(panel, {"do": what, **how})


def test_the_likeliest_token_is_another_at_each_position():
    panel = explorer(rank="logit_effect")
    for position in (2, 9, 6):
        changed(panel, position=position)
        assert panel.words["target_id"] == int(panel.next_tokens.ids[position, 0])
    changed(panel, target=" of")
    assert panel.words["target"] == " of"
    panel.position = 4
    assert panel.busy == ""  # effects on a given word are known everywhere
    panel.rank = "activation"
    panel.target = " the"
    changed(panel, rank="logit_effect")
    assert panel.words["target"] == " the"


def test_pins_stay_at_hand(index):
    panel = explorer(index)
    panel.pin(748)
    panel.pin(3)
    press(panel, "pin", latent=748, sae=0)
    press(panel, "pin", latent=748, sae=0)
    assert panel.pins == [(0, 3), (0, 748)]
    at = panel.window["tokens"].index(" physicist")
    panel.position = at
    assert [p["latent"] for p in panel.pinned] == [3, 748]
    acts = panel.reading.activations(0, 748)
    assert panel.pinned[1]["activation"] == pytest.approx(float(acts[at]), rel=1e-3)
    panel.unpin(3)
    assert [p["latent"] for p in panel.pinned] == [748]
    with pytest.raises(ValueError, match="latent 5000"):
        panel.pin(5000)
    with pytest.raises(ValueError, match="SAE 2 of 1"):
        panel.pins = [(2, 0)]
    assert "SAE 2 of 1" in panel.error_message


def test_a_browser_follows(index):
    panel = explorer(index)
    panel.selected = 748
    browser = panel.browser()
    assert browser.selected == 748
    panel.selected = 3
    assert browser.selected == 3
    assert browser.page == panel.page
    with pytest.raises(ValueError, match="no index of blocks.2"):
        explorer().browser()


def test_dense_latents_are_hidden(index):
    panel = explorer(index, everywhere=True)
    n = len(panel.latents)
    panel.max_density = 0.01
    assert 0 < len(panel.latents) < n
    assert all(index.latent(i).density <= 0.01 for i in panel.latents.latent)


@pytest.fixture
def several():
    return [
        tiny_models.sae(RESID),
        tiny_models.sae(RESID, "topk", k=5, seed=3),
        tiny_models.sae("blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out", d_sae=30),
    ]


def test_several_saes(several):
    index = saewb.build_index(tiny_models.bridge(), several[1], tiny_models.tokens(8, 9))
    panel = PromptExplorer(tiny_models.bridge(), several, [None, index, None], prompt=WORDS)
    assert panel.facts["saes"] == [RESID, f"{RESID} (2)", "blocks.1.mlp.hook_in => blocks.1.hook_mlp_out"]
    assert set(panel.latents.sae) == set(panel.facts["saes"])
    assert not panel.words["compared"]  # two write to the same point
    check_code(panel)
    for k in range(3):
        changed(panel, shown=k, rank="logit_effect")
        assert set(panel.latents.sae) == {panel.facts["saes"][k]}
        assert panel.words["compared"]
        words = saewb.next_tokens(tiny_models.bridge(), WORDS, several[k]).to_frame()
        assert panel.next_tokens.to_frame().equals(words)
        assert all((r["hint"] is None) == (k != 1) for r in panel.listing["rows"])
        check_code(panel)
    changed(panel, shown=-1, rank="attribution", everywhere=True, max_density=0.2)
    check_code(panel)
    panel.selected_sae, panel.selected = 1, 7
    assert panel.page["latent"] == 7
    assert panel.browser().index is index
    panel.selected_sae = 0
    assert panel.page == {}
    with pytest.raises(ValueError, match="latent 35"):
        panel.selected_sae, panel.selected = 2, 35


def test_a_cross_layer_transcoder_is_read_layer_by_layer():
    clt = cross.made(read="blocks.{}.hook_resid_pre")
    panel = PromptExplorer(tiny_models.bridge(), [clt, tiny_models.sae(RESID)], prompt=WORDS, rank="logit_effect")
    assert len(panel.facts["saes"]) == 4
    check_code(panel)
    changed(panel, shown=2)
    check_code(panel)
    changed(panel, rank="attribution")
    check_code(panel)
    changed(panel, shown=3, position=2)
    assert panel.error_message == ""
    check_code(panel)
    panel.selected_sae, panel.selected = 2, 27
    with pytest.raises(ValueError, match="0 to 27"):
        panel.selected = 28


def test_an_sae_without_direct_effects_says_so():
    sae = tiny_models.sae("blocks.1.attn.hook_q", d_in=4, head=1)
    panel = PromptExplorer(tiny_models.bridge(), sae, prompt=WORDS)
    with pytest.raises(ValueError, match="no direct effects on logits are known"):
        changed(panel, rank="logit_effect")
    assert panel.rank == "activation"
    changed(panel, rank="attribution")
    check_code(panel)


def test_no_prompt_and_back():
    panel = explorer(prompt="")
    assert (panel.latents, panel.reading, panel.next_tokens) == (None, None, None)
    assert panel.window == panel.listing == panel.words == {}
    assert (panel.code(), panel.static_html()) == ("# no prompt yet\n", "<div>no prompt yet</div>")
    panel.position, panel.rank, panel.everywhere = 2, "logit_effect", True
    assert "no prompt" in repr(panel)
    changed(panel, prompt=TEXT)
    check_code(panel)
    changed(panel, prompt="")
    assert panel.window == panel.words == {}
    assert panel.error_message == ""


def test_a_long_prompt_is_sent_in_parts():
    text = "A cat sat. " * 100
    n = panel_driver.embedded()[0].to_tokens(text).shape[1]
    assert prompt_explorer.TOKENS < n <= 512
    panel = explorer(prompt=text, everywhere=True)
    assert (panel.window["total"], panel.window["offset"]) == (n, 400)  # where the last token is
    assert len(panel.window["tokens"]) == n - 400
    panel.offset = 0
    assert len(panel.window["tokens"]) == len(panel.trace["acts"]) == 400
    assert len(panel.listing["rows"]) == min(len(panel.latents), 40)
    panel.position = n - 1
    assert panel.window["offset"] == 400
    panel.position = 3
    assert panel.window["offset"] == 0
    assert panel_driver.sent(panel) < 100_000
    check_code(panel)


def test_a_prompt_of_2000_tokens_is_read_where_the_context_takes_it():
    model = tiny_models.new_bridge()
    model.cfg.n_ctx = 2048  # rotary: nothing else of it knows a limit
    panel = PromptExplorer(model, tiny_models.sae(RESID), prompt=" ".join(f"w{k % 20}" for k in range(1999)))
    assert panel.window["total"] == 2000
    assert len(panel.window["tokens"]) == 400
    assert panel_driver.sent(panel) < 150_000
    panel.everywhere = True
    assert panel.listing["total"] <= 40


def test_too_long_a_prompt_is_said_and_the_panel_goes_on():
    panel = explorer()
    with pytest.raises(ValueError, match="tokens; .* takes 512 at most"):
        changed(panel, prompt="A cat sat. " * 500)
    assert "takes 512 at most" in panel.error_message
    assert panel.window == panel.listing == {}
    assert (panel.latents, panel.busy) == (None, "")
    press(panel, "move", by=1)
    panel.position = 3
    with pytest.raises(ValueError, match="takes 512"):
        panel.wait(60)
    changed(panel, prompt="A cat")
    assert panel.error_message == ""
    check_code(panel)
    with pytest.raises(ValueError, match="takes 512"):
        explorer(prompt="A cat sat. " * 500)


def test_wrong_values(index):
    panel = explorer()
    for trait, wrong, says in (
        ("rank", "activaton", "near: activation"),
        ("rank", "of_max", "without an index"),
        ("max_density", 0.1, "without an index"),
        ("max_density", 0.0, "in \\(0, 1\\]"),
        ("method", "ablation", "want: gradient, integrated"),
        ("shown", 1, "-1 for all"),
        ("position", 99, "position 99"),
        ("selected", 1024, "0 to 1023"),
        ("selected_sae", 1, "SAE 1 of 1"),
    ):
        before = getattr(panel, trait)
        with pytest.raises(ValueError, match=says):
            setattr(panel, trait, wrong)
        assert getattr(panel, trait) == before
        assert re.search(says, panel.error_message)
    panel.rank = "logit_effect"
    panel.wait(60)
    with pytest.raises(ValueError, match="of this model"):
        changed(panel, target="two words")
    assert panel.target == ""
    check_code(panel)
    with pytest.raises(ValueError, match="no token 999999"):
        changed(panel, target="id:999999")
    with pytest.raises(ValueError, match="asked to 'explode'"):
        press(panel, "explode")
    press(panel, "code")
    assert panel.notice == panel.code()


def test_what_it_is_made_with_is_checked(index):
    model, sae = panel_driver.embedded()
    for result, error, says in (
        (lambda: PromptExplorer(model, sae, promt="x"), TypeError, "near: prompt"),
        (lambda: PromptExplorer(model, "sae"), TypeError, "got str as an SAE"),
        (lambda: PromptExplorer(model, []), ValueError, "got no SAE"),
        (lambda: PromptExplorer(model, tiny_models.sae("blocks.9.hook_resid_post")), ValueError, "no hook named"),
        (lambda: PromptExplorer(model, tiny_models.sae(RESID)), ValueError, "do not fit"),
        (lambda: PromptExplorer(model, sae, panel_driver.silent()), ValueError, "which has 1,024 latents"),
        (lambda: PromptExplorer(model, sae, 3), TypeError, "got a int as an index"),
        (lambda: PromptExplorer(model, [sae, sae], index), ValueError, "one index for 2 SAEs"),
        (lambda: PromptExplorer(model, sae, [index]), ValueError, "fix:  PromptExplorer\\(model, sae, index\\)"),
        (lambda: PromptExplorer(model, sae, "nowhere"), FileNotFoundError, "no index at"),
        (lambda: explorer(position=40), ValueError, "position 40"),
    ):
        with pytest.raises(error, match=says):
            result()


def test_an_index_from_its_folder(index, tmp_path):
    panel = PromptExplorer(*panel_driver.embedded(), index.save(tmp_path / "an.index"), prompt=TEXT)
    assert panel.latents.equals(explorer(index).latents)


# Work beside the notebook


class Gate:
    """Readings that wait for leave, by prompt; each step of them."""

    def __init__(self, monkeypatch):
        self.real, self.open = saewb.read_in_turn, collections.defaultdict(lambda: threading.Semaphore(0))
        monkeypatch.setattr(saewb, "read_in_turn", self.held, raising=False)

    def held(self, model, prompt, *args, **how):
        steps = self.real(model, prompt, *args, **how)
        while True:
            assert self.open[prompt].acquire(timeout=60)
            try:
                yield next(steps)
            except StopIteration:
                return

    def let(self, prompt, n=1):
        for _ in range(n):
            self.open[prompt].release()


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_newest_prompt_is_shown(monkeypatch):
    panel, gate = explorer(prompt="A cat"), Gate(monkeypatch)
    panel.prompt = "slow"
    assert panel.busy == "running the model"
    assert "".join(panel.window["tokens"]).endswith("A cat")  # until there is another one
    press(panel, "collect")
    panel.prompt = "quick"
    gate.let("quick", 9)
    panel.wait(60)
    gate.let("slow", 9)
    press(panel, "collect")
    assert "".join(panel.window["tokens"]).endswith("quick")
    assert (panel.busy, panel.words["prompt"]) == ("", "quick")
    panel.prompt = "other"
    panel.prompt = ""
    assert (panel.busy, panel.window) == ("", {})
    gate.let("other", 9)


def test_latents_come_first_and_words_with_the_saes_follow(monkeypatch):
    panel, gate = explorer(prompt="A cat"), Gate(monkeypatch)
    panel.prompt = TEXT
    gate.let(TEXT)
    until(lambda: panel._jobs["reading"][1].done())
    press(panel, "collect")
    alone = saewb.next_tokens(panel.inputs.model, TEXT).to_frame()
    assert [w for w, *_ in panel.words["words"]] == alone.token.tolist()
    assert all(q is None for *_, q in panel.words["words"])
    assert (panel.words["compared"], panel.words["comparing"]) == (False, True)
    assert panel.listing["rows"]
    changed_meanwhile = panel.words["at"] - 2
    panel.position = changed_meanwhile
    panel.rank = "logit_effect"  # another question about the same prompt
    until(lambda: panel._jobs["reading"][1].done())
    press(panel, "collect")
    assert panel.words["comparing"]
    gate.let(TEXT)
    panel.wait(60)
    assert (panel.words["compared"], panel.words["comparing"], panel.words["at"]) == (True, False, changed_meanwhile)
    monkeypatch.undo()
    check_code(panel)


def test_it_says_how_far_it_is_and_stops(monkeypatch):
    panel = explorer(prompt="A cat")
    twin, go, passed = panel.inputs.runner.model, threading.Semaphore(0), []

    def slow(activation):
        passed.append(1)
        assert go.acquire(timeout=60)

    held = saewb.models.hook_points.resolve(twin, "blocks.1.hook_resid_post").add(slow)
    panel.prompt = TEXT
    until(lambda: passed)
    press(panel, "collect")
    assert panel.busy == "running the model: layer 2 of 4"
    press(panel, "stop")
    assert (panel.busy, panel.prompt, panel.window, panel.error_message) == ("", TEXT, {}, "")
    assert panel.notice.startswith("Stopped")  # and not: waiting for the kernel
    go.release()
    held.remove()
    press(panel, "read")
    panel.wait(60)
    assert len(passed) == 1  # the first one went no further
    assert panel.notice == ""
    check_code(panel)
    before = panel.latents
    held = saewb.models.hook_points.resolve(twin, "blocks.1.hook_resid_post").add(slow)
    panel.rank, panel.target = "attribution", " the"
    until(lambda: len(passed) > 1)
    panel.stop()
    assert (panel.rank, panel.target, panel.busy) == ("activation", "", "")  # what is shown
    assert panel.latents is before
    for _ in range(9):
        go.release()
    held.remove()
    panel.stop()  # nothing to stop: no harm


def test_a_comparison_that_was_stopped_can_be_asked_for_again(monkeypatch):
    panel, gate = explorer(prompt="A cat"), Gate(monkeypatch)
    panel.prompt = TEXT
    gate.let(TEXT)
    until(lambda: panel._jobs["reading"][1].done())
    press(panel, "collect")
    press(panel, "stop")
    assert (panel.words["compared"], panel.words["comparing"], panel.words["comparable"]) == (False, False, True)
    assert panel.listing["rows"]
    gate.let(TEXT, 3)
    press(panel, "compare")
    panel.wait(60)
    assert panel.words["compared"]
    check_code(panel)


def test_a_model_that_fails_is_said_and_can_be_tried_again(monkeypatch):
    panel = explorer(prompt="A cat")
    with monkeypatch.context() as patched:
        patched.setattr(saewb, "read_in_turn", lambda *a, **k: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            changed(panel, prompt=TEXT)
    assert panel.error_message.startswith("ZeroDivisionError")
    assert (panel.prompt, panel.window, panel.busy) == (TEXT, {}, "")
    press(panel, "read")
    panel.wait(60)
    assert panel.error_message == ""
    check_code(panel)
    with monkeypatch.context() as patched:
        patched.setattr(saewb, "next_tokens", lambda *a, **k: 1 / 0, raising=False)
        panel.shown = 0
        with pytest.raises(ZeroDivisionError):
            panel.wait(60)
    assert (panel.words["compared"], panel.words["comparing"]) == (False, False)
    press(panel, "compare")
    panel.wait(60)
    assert panel.words["compared"]
    check_code(panel)


def test_cells_that_use_the_model_meanwhile_are_not_seen_here():
    panel = explorer(prompt="A cat")
    model, sae = panel_driver.embedded()
    ids = model.to_tokens(TEXT)
    with torch.no_grad():
        clean = model(ids)
    before, seen = tiny_models.snapshot(model), []
    panel.rank = "attribution"
    panel.prompt = TEXT
    with torch.no_grad():
        while not seen or panel._jobs:
            press(panel, "collect")
            seen.append(model(ids))  # takes no lock
            with saewb.attach(model, sae), saewb.steer(model, sae, {4: 30.0}):  # takes it
                model(ids)
    for one in seen:
        torch.testing.assert_close(one, clean)
    assert tiny_models.snapshot(model) == before
    check_code(panel)


def test_a_cell_that_holds_the_model_does_not_hold_up_the_panel():
    panel = explorer(prompt="A cat")
    model, sae = panel_driver.embedded()
    with saewb.attach(model, sae, error_term=True):
        changed(panel, prompt="A dog")
    assert "".join(panel.window["tokens"]).endswith("A dog")


@pytest.mark.parametrize("kind", tiny_models.kinds())
def test_what_is_on_the_model_already_is_not_seen_here_and_the_code_says_so(kind):
    model = tiny_models.bridge() if kind == "bridge" else tiny_models.hooked()
    sae = tiny_models.sae("blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out")
    want = PromptExplorer(model, sae, prompt=WORDS)
    assert want.about == repr(sae)
    with saewb.attach(model, sae), saewb.steer(model, tiny_models.sae(RESID), {3: 9.0}):
        panel = PromptExplorer(model, sae, prompt=WORDS)
        assert panel.latents.equals(want.latents)
        assert panel.words == want.words
        assert panel.about.endswith("the model without what cells have put on it")
        assert "bare = saewb.models.shared_copy.shared_copy(model)" in panel.code()
        check_code(panel)
    changed(panel, prompt="w3 w9")
    assert panel.about == repr(sae)
    assert "twin" not in panel.code()


def test_an_index_that_is_gone_is_said(index):
    tensors = panel_driver.Gone(index.tensors)
    panel = explorer(replace(index, tensors=tensors))
    tensors.there = False
    with pytest.raises(OSError, match="stale"):
        panel.selected = 700
    assert "OSError: stale file handle" in panel.error_message
    with pytest.raises(OSError, match="stale"):
        changed(panel, prompt="A cat and a dog")
    tensors.there = True
    changed(panel, position=3)
    assert panel.error_message == ""
    check_code(panel)


def test_a_front_end_that_sets_several_things():
    panel = explorer()
    panel.set_state({"selected_sae": 0, "selected": 5})
    assert panel.trace["active"] == 0
    panel.set_state({"everywhere": False, "position": 2})
    panel.set_state({"pins": [[0, 5]]})
    assert panel.pins == [(0, 5)]
    with pytest.raises(ValueError, match="latent 5000"):
        panel.set_state({"selected_sae": 0, "selected": 5000})
    assert panel.selected == 5
    assert "latent 5000" in panel.error_message


# Where no kernel runs


def test_hostile_tokens_are_text():
    strings = {f"w{k}": name for k, name in enumerate(panel_driver.NAMES)}
    panel = PromptExplorer(tiny_models.bridge(), tiny_models.sae(RESID), panel_driver.hostile(), prompt=WORDS)
    panel._answer = replace(
        panel._answer,
        reading=replace(
            panel.reading, tokens=tuple(strings.get(w, panel_driver.HOSTILE) for w in panel.reading.tokens)
        ),
    )
    panel._send_window()
    panel._list()
    text = panel._repr_mimebundle_()[0]["text/html"]
    assert not re.search(r"<img|<script|<!--", text)
    assert "&lt;img src=x" in text
    json.dumps(panel.get_state(), default=str)


def test_a_saved_notebook_shows_a_view(index):
    panel = explorer(index, rank="logit_effect")
    bundle = panel._repr_mimebundle_()[0]
    assert bundle["text/plain"] == repr(panel)
    assert f"Latent {panel.selected}" in bundle["text/html"]
    assert "physicist" in bundle["text/html"]
    assert "logit effect" in bundle["text/html"]
    assert not re.search(r"<script|<style|http", bundle["text/html"])
    assert repr(panel) == repr(explorer(index, rank="logit_effect"))
    assert len(repr(panel)) < 110


def test_examples_run():
    outcome = doctest.testmod(prompt_explorer)
    assert outcome.attempted > 5
    assert outcome.failed == 0
