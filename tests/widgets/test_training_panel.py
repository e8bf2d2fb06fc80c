"""TrainingPanel without a browser."""

import base64
import doctest
import inspect
import json
import re
import shutil
import threading
import time

import pytest
import torch
from helpers import tiny_models
from helpers.gated_stream import Gated
from saewb_widgets import TrainingPanel
from saewb_widgets.training import panel as training
from saewb_widgets.training.charts import is_log
from traitlets import TraitError

import saewb
from saewb.data.stream import stream_draws

RESID = "blocks.1.hook_resid_post"
TOPK = saewb.TopK(d_sae=24, k=4)
HOW = {"n_tokens": 960, "batch_tokens": 40, "buffer_tokens": 200, "log_every_steps": 1, "pass_tokens": 28}
HOSTILE = "<img src=x onerror=alert(1)>"


def drawn(panel):
    """The charts of its static view, as SVG."""
    pictures = re.findall('data:image/svg[+]xml;base64,([^"]+)', panel.static_html())
    return b"".join(map(base64.b64decode, pictures)).decode()


def train(folder=None, saes=TOPK, **how):
    return saewb.train(
        tiny_models.bridge(), tiny_models.tokens(60, 7), saes, folder=folder, **{"hook": RESID, **HOW, **how}
    )


def endless(fails_at=None, **how):
    """A run that goes on until it is stopped, or fails."""
    drawn = []

    def draw(n, rng):
        drawn.append(n)
        if len(drawn) == fails_at:
            raise OSError(HOSTILE)
        return torch.randn(n, 8, generator=rng)

    draws = stream_draws(draw, seed=0, batch_tokens=40)
    return saewb.train(None, draws, TOPK, **{"n_tokens": 10**7, "batch_tokens": 40, "log_every_steps": 1, **how})


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def form(**how):
    inputs = {"hook": RESID, "objective": TOPK, **HOW, **how}
    return TrainingPanel(model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7), **inputs)


def executed(code):
    namespace = {
        "model": tiny_models.bridge(),
        "tokens": tiny_models.tokens(60, 7),
        "held_out": tiny_models.tokens(9, 7, seed=2),
    }
    exec(code, namespace)
    return namespace


def figures(run):
    return run.history.drop(columns="seconds")


# -- watching --------------------------------------------------------------------------------------------------------


def test_curves_are_the_history_thinned_out_and_code_starts_an_equal_run(tmp_path):
    run = train(tmp_path / "one", held_out=tiny_models.tokens(9, 7, seed=2), eval_every_tokens=400).wait()
    panel = TrainingPanel(run)
    assert repr(panel) == "TrainingPanel(one finished)"
    (series,) = panel.series
    for name in ("loss", "l0", "fvu", "dead_frac", "n_dense", "lr", "held_out/fvu"):
        k, values = series["lines"][name]
        known = run.history.dropna(subset=name)
        assert series["tokens"][k] == known["n_tokens"].tolist()
        assert values == pytest.approx(known[name].tolist(), rel=1e-3)
    report = panel.status[0]
    assert (report["state"], report["n_tokens"], report["frac"], panel.alive) == ("finished", 960, 1.0, False)
    again = executed(panel.code())["run"].wait()
    assert figures(again).equals(figures(run))
    assert torch.equal(again.sae.W_dec, run.sae.W_dec)


def test_of_a_long_history_every_curve_has_at_most_300_points_and_the_last_one():
    class Long:
        names = ("sae",)

        def __init__(self, n):
            self.rows = [{"n_tokens": i, "loss": float("nan") if i == 2 else float(i)} for i in range(1, n + 1)]

    for n in (0, 1, 2, 299, 300, 301, 599, 600, 601, 10_000):
        x, y = saewb.run_curves(Long(n))["sae"]["loss"]
        assert len(x) <= 300
        assert x[-1:] == ([] if n == 0 else [1] if n == 2 else [n])
        assert [float(i) for i in x] == y
        assert n > 300 or len(x) == n - (n >= 2)
        assert n <= 300 or len(x) >= 150
        assert set(saewb.run_curves(Long(2 * n), points=300)["sae"]["loss"][0][:-1]) <= {*range(1, 2 * n + 1)}
    with pytest.raises(ValueError, match="2 or more"):
        saewb.run_curves(Long(3), points=1)


def test_several_runs_and_saes(tmp_path):
    two = train(tmp_path / "two", {"a": TOPK, "b": saewb.Trainee(saewb.Standard(24, l1=0.5), lr=1e-3, seed=3)}).wait()
    panel = TrainingPanel([train().wait(), two, tmp_path / "two"])
    assert list(panel.runs) == ["run 1", "two", "two (2)"]
    labels = ["run 1", "two / a", "two / b", "two (2) / a", "two (2) / b"]
    assert [s["label"] for s in panel.series] == labels
    assert panel.series[1]["lines"] == panel.series[3]["lines"]
    namespace = executed(panel.code())["runs"]
    assert figures(namespace["two"].wait()).equals(figures(two))
    assert list(namespace) == ["run 1", "two", "two (2)"]
    for run in namespace.values():
        run.wait()
    assert drawn(panel).count("<polyline") >= 5 * 4
    panel.add(two, HOSTILE)
    assert HOSTILE not in panel.snapshot().data
    assert "<script" not in panel.snapshot().data
    with pytest.raises(ValueError, match="there is a run"):
        panel.add(two, "two")
    json.dumps(panel.get_state(), default=str)


def test_a_run_is_paused_gone_on_with_and_stopped():
    run = endless()
    panel = TrainingPanel({"mine": run})
    until(lambda: len(run.rows) > 3)
    panel._on_message(panel, {"do": "look"})
    assert panel.alive
    seen = panel.looked
    panel._on_message(panel, {"do": "pause", "run": "mine"})
    assert panel.busy == "pausing mine"
    panel.wait(60)
    assert (run.state, panel.status[0]["state"], panel.busy) == ("paused", "paused", "")
    assert panel.alive
    assert panel.looked > seen
    panel.control("mine", "resume")
    panel.wait(60)
    assert panel.status[0]["state"] == "running"
    panel.control("mine", "stop")
    panel.wait(60)
    assert (run.state, panel.alive, panel.status[0].get("resume", "")) == ("stopped", False, "")
    panel.control("mine", "resume")
    with pytest.raises(RuntimeError, match="has ended"):
        panel.wait(60)
    assert "has ended" in panel.error_message
    panel.refresh()
    for run, what, says in (("other", "stop", "no run"), ("mine", "halt", "want: pause")):
        with pytest.raises((KeyError, ValueError), match=says):
            panel.control(run, what)


def test_a_run_whose_buffer_fills_does_not_look_dead(tmp_path):
    gated = Gated()
    gated.let()
    run = saewb.train(None, gated.stream(), TOPK, n_tokens=400, batch_tokens=40, folder=tmp_path / "r")
    gated.until_asked(2)
    panel = TrainingPanel({"mine": run, "elsewhere": tmp_path / "r"})
    mine, elsewhere = panel.status
    assert (mine["before"], mine["frac"]) == ("filling the buffer, 40 of 200 tokens", 0.2)
    assert (elsewhere["before"][:22], elsewhere["state"]) == ("before its first step:", "running")
    assert "filling the buffer, 40 of 200 tokens" in panel.static_html()
    gated.let(2)
    gated.until_asked(2)
    panel.refresh()
    assert panel.status[0]["before"] == "filling the buffer, 120 of 200 tokens"
    panel.control("mine", "stop")
    until(lambda: run._waiting)
    gated.let()
    panel.wait(60)
    mine, elsewhere = panel.status
    assert (mine["state"], mine["before"]) == ("stopped", "filling the buffer, 160 of 200 tokens")
    panel.refresh()
    elsewhere = panel.status[1]
    assert (elsewhere["state"], elsewhere["before"], elsewhere["resume"]) == ("stopped", "", "")


def test_news_takes_no_error_away():
    run = endless()
    panel = TrainingPanel({"mine": run})
    with pytest.raises(ValueError, match="explode"):
        panel._on_message(panel, {"do": "explode"})
    panel._on_message(panel, {"do": "look"})
    assert "explode" in panel.error_message
    run.stop()


def test_a_run_that_failed_says_why_and_how_to_go_on(tmp_path):
    run = endless(fails_at=30, folder=tmp_path / "r", checkpoint_every_tokens=400)
    until(lambda: run.state == "failed")
    panel = TrainingPanel(run)
    (report,) = panel.status
    assert report["error"] == f"OSError: {HOSTILE}"
    assert report["resume"] == f"saewb.resume_run({str(tmp_path / 'r')!r}, model=model, tokens=tokens)"
    assert not panel.alive
    assert HOSTILE not in panel.snapshot().data
    past = TrainingPanel(tmp_path / "r")
    (text,) = past.status
    assert (text["state"], text["error"], text["resume"], past.alive) == (
        "failed",
        report["error"],
        report["resume"],
        False,
    )
    assert past.series[0]["lines"] == panel.series[0]["lines"]
    with pytest.raises(ValueError, match="not of this kernel"):
        past.control("r", "stop")


def test_a_folder_is_read_again_as_it_grows_and_its_end_is_told(tmp_path):
    run = endless(folder=tmp_path / "r")
    until(lambda: len(run.rows) > 3)
    panel = TrainingPanel(tmp_path / "r")
    before = panel.status[0]["n_tokens"]
    assert (panel.status[0]["state"], panel.alive) == ("running", True)
    until(lambda: (panel.refresh(), panel.status[0]["n_tokens"] > before)[1])
    run.stop()
    panel._on_message(panel, {"do": "look"})
    assert (panel.status[0]["state"], panel.alive) == ("stopped", False)
    assert panel.series[0]["lines"] == TrainingPanel(run).series[0]["lines"]
    (tmp_path / "r").rename(tmp_path / "moved")
    panel._on_message(panel, {"do": "refresh"})
    assert (panel.status[0]["state"], panel.alive) == ("gone", False)
    assert "not there any more" in panel.status[0]["error"]
    assert panel.series  # what was read stays
    moved = TrainingPanel(tmp_path / "moved")
    assert (moved.status[0]["state"], bool(moved.status[0]["resume"])) == ("stopped", True)
    (tmp_path / "moved" / "end.json").unlink()  # as after kill -9
    moved.refresh()
    assert (moved.status[0]["state"], moved.alive) == ("interrupted", False)
    assert "without a word" in moved.status[0]["error"]
    assert moved.status[0]["resume"]


def test_a_folder_deleted_under_the_panel_of_a_run_that_goes_on(tmp_path):
    run = endless(folder=tmp_path / "r")
    until(lambda: len(run.rows) > 3)
    panel = TrainingPanel(run)
    shutil.rmtree(tmp_path / "r")
    panel._on_message(panel, {"do": "look"})
    assert (panel.status[0]["state"], panel.alive, panel.error_message) == ("running", True, "")
    assert "is not there any more; its SAEs are in run.saes" in panel.status[0]["error"]
    panel.control("r", "stop")
    panel.wait(60)
    assert (panel.status[0]["state"], panel.status[0]["resume"], panel.error_message) == ("failed", "", "")
    assert "is not there any more" in panel.status[0]["error"]
    assert panel.series
    assert run.sae.cfg.d_sae == 24


def test_how_frequent_the_latents_are(tmp_path):
    run = train(tmp_path / "r", {"a": TOPK, "b": saewb.Standard(12, l1=0.5)}).wait()
    for panel in (TrainingPanel(run), TrainingPanel(tmp_path / "r")):
        for series, (name, result) in zip(panel.series, saewb.run_densities(run).items(), strict=True):
            assert series["sae"] == name
            assert series["density"] == {"at": 960, "edges": list(result.edges), "counts": list(result.counts)}
        assert sum(panel.series[0]["density"]["counts"]) == 24
        assert "number of latents by density: r / a" in panel.static_html()


@pytest.mark.parametrize("what", ["folder", "stopped"])
def test_code_of_a_run_that_has_ended_draws_the_same_curves(what, tmp_path):
    if what == "folder":
        train(tmp_path / "r").wait()
        panel = TrainingPanel(tmp_path / "r")
    else:
        stop = lambda event: runs[0].stop() if event.kind == "step" and event.step >= 5 and runs else None  # noqa: E731
        runs = []
        runs.append(train(loggers=[stop]))
        runs[0]._join(60)
        panel = TrainingPanel(runs[0])
        assert panel.status[0]["state"] == "stopped"
    again = TrainingPanel(executed(panel.code())["run"].wait())
    for figure, (k, values) in panel.series[0]["lines"].items():
        tokens = panel.series[0]["tokens"][k]
        j, longer = again.series[0]["lines"][figure]
        assert longer[: len(values)] == values
        assert again.series[0]["tokens"][j][: len(tokens)] == tokens
    if what == "folder":
        assert again.series[0]["density"] == panel.series[0]["density"]


def test_a_wide_span_is_drawn_on_a_log_scale_unless_it_is_said():
    assert is_log([1.0, 31.0], "auto")
    assert not is_log([1.0, 29.0], "auto")
    assert not is_log([0.0, 1.0, 900.0], "auto")
    assert not is_log([1.0, 900.0], "linear")
    assert is_log([1.0, 2.0], "log")
    run = train().wait()
    panel = TrainingPanel(run)
    panel.scale = "log"
    assert ", log scale" in drawn(panel)
    with pytest.raises(TraitError):
        panel.scale = "logarithmic"


# -- the form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "Matryoshka", "JumpReLU", "Standard", "Gated", "AbsTopK"])
def test_fields_of_each_objective(kind):
    panel = form()
    panel.kind = kind
    if kind == "Matryoshka":
        assert "widths" in panel.problems["objective.widths"]
        panel.typed = {**panel.typed, "objective.widths": "(8, 16)"}
    assert panel.problems == {}
    fields = {f["key"]: f for group in panel.form["groups"] for f in group["fields"]}
    own = {k.removeprefix("objective."): f for k, f in fields.items() if k.startswith("objective.")}
    assert set(own) == set(inspect.signature(getattr(saewb, kind)).parameters)
    assert all(f["note"] for k, f in fields.items() if k not in ("objective.sparsity",))
    namespace = executed(panel.code())["run"].wait()
    assert namespace.spec.to_dict()["saes"]["sae"]["objective"] == kind
    panel.wait(60)
    assert panel.estimate["fits"]


def test_what_is_started_is_what_the_form_and_its_code_say():
    panel = form(lr=1e-3, betas=(0.8, 0.99), schedule="cosine")
    code = panel.code()
    panel.wait(60)
    panel._on_message(panel, {"do": "start"})
    panel.wait(60)
    run = panel.run.wait()
    panel.refresh()
    assert (panel.form_open, panel.alive, repr(panel)) == (False, False, "TrainingPanel(run 1 finished)")
    assert figures(executed(code)["run"].wait()).equals(figures(run))
    assert panel.code() == run.code == code.replace("model,", f"model,  # {tiny_models.bridge().cfg.model_name}", 1)
    same = train(lr=1e-3, betas=(0.8, 0.99), schedule="cosine").wait()
    assert figures(same).equals(figures(run))
    panel.form_open = True
    panel.typed = {**panel.typed, "seed": "5"}
    assert "seed=5" in panel.code()


def test_what_is_wrong_is_said_beside_the_field():
    panel = form()
    panel.wait(60)
    wrong = {
        "lr": "-1",
        "objective.k": "25",
        "batch_tokens": "2_000",
        "prefetch": "-1",
        "schedule": "cosin",
        "eps": "'x'",
        "log_every_steps": "0",
        "betas": "(",
        "n_tokens": "960",
    }
    panel.typed = {**panel.typed, **wrong, "hook": ""}
    assert set(panel.problems) == {*wrong, "hook"} - {"n_tokens"}
    assert "near: cosine" in panel.problems["schedule"]
    assert "1 to d_sae=24" in panel.problems["objective.k"]
    assert panel.estimate == {}
    for call in (panel.code, panel.start):
        with pytest.raises(ValueError, match="the form is not right"):
            call()
    assert "not right" in panel.error_message
    assert panel.run is None
    panel.typed = {
        "hook": "blocks.1.hook_resid_pots",
        "n_tokens": "960",
        "batch_tokens": "40",
        "objective.d_sae": "24",
        "objective.k": "4",
    }
    assert panel.problems == {}
    panel.wait(60)
    assert "near: blocks.1.hook_resid_post" in panel.problems["hook"]
    assert "near" in panel.estimate["error"]
    with pytest.raises(ValueError, match="kind is 'TopL'"):
        panel.kind = "TopL"
    panel.typed = {**panel.typed, "hook": RESID}
    panel.wait(60)
    assert panel.problems == {}


def test_a_start_that_fails_leaves_the_form(tmp_path):
    train(tmp_path / "r").wait()
    panel = form(folder=tmp_path / "r")
    panel.wait(60)
    panel.start()
    with pytest.raises(FileExistsError):
        panel.wait(60)
    assert "holds a run already" in panel.error_message
    assert panel.form_open
    panel.typed = {**panel.typed, "folder": str(tmp_path / "s")}
    panel.wait(60)
    panel.start()
    panel.wait(60)
    panel.run.wait()
    assert panel.run.folder == tmp_path / "s"


def test_two_starts_at_once_are_one(monkeypatch):
    go, real = threading.Event(), saewb.train
    monkeypatch.setattr(saewb, "train", lambda *a, **k: (go.wait(30), real(*a, **k))[1], raising=False)
    panel = form()
    panel.start()
    with pytest.raises(ValueError, match="being started"):
        panel.start()
    go.set()
    panel.wait(60)
    assert len(panel.runs) == 1
    panel.run.wait()


def test_wrong_arguments(tmp_path):
    for inputs, error, says in (
        ({}, ValueError, "nothing to train"),
        ({"runs": 3}, TypeError, "got a int"),
        ({"runs": tmp_path / "nowhere"}, FileNotFoundError, "no run in"),
        ({"model": tiny_models.bridge(), "tokens": tiny_models.tokens(), "objective": 3}, TypeError, "want: TopK"),
        ({"model": tiny_models.bridge(), "tokens": tiny_models.tokens(), "lrr": 3}, TypeError, "near: lr"),
        ({"model": tiny_models.bridge()}, ValueError, "nothing to train"),
    ):
        with pytest.raises(error, match=says):
            TrainingPanel(**inputs)


def test_examples_run():
    outcome = doctest.testmod(training)
    assert outcome.attempted > 3
    assert outcome.failed == 0
