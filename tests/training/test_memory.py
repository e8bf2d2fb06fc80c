"""What is told of a training before it starts, and of a run by its folder alone."""

import inspect
import json

import pytest
import torch
from helpers import tiny_models

import saewb

RESID, MLP = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
TOPK = saewb.TopK(d_sae=24, k=4)
HOW = {"n_tokens": 400, "batch_tokens": 40, "buffer_tokens": 200, "log_every_steps": 1, "pass_tokens": 28}


def train(folder=None, saes=TOPK, **how):
    return saewb.train(
        tiny_models.bridge(), tiny_models.tokens(60, 7), saes, folder=folder, **{"hook": RESID, **HOW, **how}
    )


def executed(code, **more):
    namespace = {"model": tiny_models.bridge(), "tokens": tiny_models.tokens(60, 7), "torch": torch, **more}
    exec(code, namespace)
    return namespace["run"].wait()


def equal(a, b):
    assert a.rows[-1].keys() == b.rows[-1].keys()
    same = [{k: v for k, v in row.items() if k != "seconds"} for run in (a, b) for row in run.rows]
    return str(same[: len(a.rows)]) == str(same[len(a.rows) :])  # as text, where nan is nan


RUNS = {
    "one": (TOPK, {}),
    "transcoder": (TOPK, {"hook": MLP, "hook_out": RESID}),
    "options": (
        saewb.JumpReLU(24, l0=0.1, target_l0=5.0),
        {"betas": (0.8, 0.99), "schedule": "cosine", "clip": None, "positions": slice(1, None, 2), "seed": 3},
    ),
    "autocast": (TOPK, {"autocast": torch.bfloat16, "step": "plain"}),
    "special": (TOPK, {"skip_special_tokens": [1, 4]}),
    "several": (
        {
            "a": saewb.Trainee(saewb.Matryoshka(24, k=4, widths=(8,)), read=MLP, write=RESID, lr=1e-3, seed=3),
            "b": saewb.Gated(24),
        },
        {},
    ),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_code_starts_an_equal_run_and_the_folder_tells_the_same(name, tmp_path):
    saes, how = RUNS[name]
    run = train(tmp_path / "r", saes, **how).wait()
    past = saewb.read_run(tmp_path / "r")
    assert past.code == run.code
    assert equal(executed(run.code), run)
    assert str(past.rows) == str(run.rows)
    assert past.names == run.names == tuple(run.saes)
    assert past.history.equals(run.history)
    assert (past.frac, past.resumable) == (1.0, True)
    assert repr(past) == f"PastRun(r, finished, 400 tokens, {', '.join(run.names)})"
    assert saewb.run_curves(past) == saewb.run_curves(run)
    assert saewb.run_densities(past) == saewb.run_densities(run)
    for result in saewb.run_densities(run).values():
        assert (result.n_tokens, sum(result.counts), len(result.counts)) == (400, 24, len(result.edges) + 1)
    assert not [c for c in run.history if "density" in c and "held_out" not in c]
    assert all(run.history.dtypes.map(lambda kind: kind.kind in "if"))
    assert "folder" not in run.code


def test_code_of_a_plan_is_the_runs():
    code = saewb.training_code(TOPK, hook=RESID, **HOW)
    assert equal(executed(code), train().wait())
    assert train(held_out=tiny_models.tokens(9, 7, seed=2)).wait().code.count("held_out=held_out") == 1
    report = saewb.training_code(TOPK, hook=RESID, folder="runs/a", held_out=True, n_tokens=10_000)
    assert "folder='runs/a'" in report
    assert "held_out=held_out" in report
    with pytest.raises(TypeError, match="near: batch_tokens"):
        saewb.training_code(TOPK, n_tokens=10_000, batch_token=4)


def test_a_folder_that_is_cut_off_or_not_ours(tmp_path):
    run = train(tmp_path / "r").wait()
    history = tmp_path / "r" / "history.jsonl"
    with history.open("a") as file:
        file.write('{"step": 11, "n_tok')
    assert len(saewb.read_run(str(tmp_path / "r")).rows) == len(run.rows)
    history.write_text('{"step"\n' + history.read_text())
    with pytest.raises(saewb.FormatError, match="line 1 of"):
        saewb.read_run(tmp_path / "r")
    with pytest.raises(saewb.FormatError, match=r"line 1 of(.|\n)*sed -i 1d"):  # no row is lost without a word
        saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7))
    history.unlink()
    empty = saewb.read_run(tmp_path / "r")
    assert (empty.rows, empty.frac) == ((), 0.0)
    assert all(curve == ([], []) for curve in saewb.run_curves(empty)["sae"].values())
    (tmp_path / "r" / "run.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(saewb.FormatError, match="not a run"):
        saewb.read_run(tmp_path / "r")
    with pytest.raises(FileNotFoundError, match="no run in"):
        saewb.read_run(tmp_path / "nowhere")


def test_a_folder_is_read_while_its_run_goes_on(tmp_path):
    run = train(tmp_path / "r", n_tokens=400_000)
    while len(run.rows) < 3:
        pass
    past = saewb.read_run(tmp_path / "r")
    assert 0 < past.frac < 1
    assert not past.resumable
    assert past.state == "running"
    while len((later := past.again()).rows) == len(past.rows):
        pass
    assert len(later.rows) > len(past.rows)
    assert all(a is b for a, b in zip(past.rows, later.rows, strict=False))  # they are not read twice
    run.stop()
    ended = later.again()
    assert (ended.state, ended.resumable) == ("stopped", True)
    assert list(ended.rows) == list(run.rows)
    again = saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7)).stop()
    assert list(ended.again().rows) == list(again.rows)  # of a history that was written anew
    assert ended.again().again().rows == saewb.read_run(tmp_path / "r").rows


@pytest.mark.parametrize("saes", [TOPK, {"a": TOPK, "b": saewb.Trainee(saewb.Standard(64), read=MLP)}], ids=str)
def test_memory_is_what_the_run_estimates(saes):
    memory = saewb.training_memory(tiny_models.bridge(), saes, hook=RESID, **HOW)
    run = train(saes=saes)
    for what in ("weights", "step", "buffer", "checkpoint", "forward", "total"):
        assert getattr(memory, what) == getattr(run.memory, what)
    run.wait()


def test_memory_of_a_cache_and_what_is_wrong(tmp_path):
    cache = saewb.cache_activations(tiny_models.bridge(), tiny_models.tokens(60, 20), RESID, tmp_path / "c", 1000)
    memory = saewb.training_memory(None, TOPK, tokens=cache, n_tokens=400, batch_tokens=40)
    run = saewb.train(None, cache, TOPK, n_tokens=400, batch_tokens=40)
    assert memory.weights == run.memory.weights == 16 * (24 * (16 + 16 + 1) + 16)
    assert memory.buffer == run.memory.buffer
    run.wait()
    for inputs, error, says in (
        ({"hook": "blocks.1.hook_resid_pots"}, ValueError, f"near: {RESID}"),
        ({}, ValueError, "got no hook"),
        ({"model": None}, ValueError, "got no model"),
        ({"hook": RESID, "batch_tokens": 0}, ValueError, "got batch_tokens=0"),
        ({"hook": RESID, "prefetch": -1}, ValueError, "got prefetch=-1"),
        ({"hook": RESID, "lrr": 1}, TypeError, "near: lr"),
    ):
        with pytest.raises(error, match=says):
            saewb.training_memory(**{"model": tiny_models.bridge(), "saes": TOPK, "n_tokens": 10_000, **inputs})


def test_options_are_the_dataclasses_fields_with_their_notes():
    options = {option.name: option for option in saewb.training_options()}
    assert set(inspect.signature(saewb.TrainConfig).parameters) <= set(options)
    assert "positions" not in options
    assert all(option.note for option in options.values())
    assert options["n_tokens"].required
    assert options["lr"].default == saewb.TrainConfig(10_000).lr
    assert options["lr"].note == "Peak learning rate."
    assert options["schedule"].choices == ("constant", "linear", "cosine", "restarts")
    of_topk = saewb.training_options(TOPK)
    assert [o.name for o in of_topk] == list(inspect.signature(saewb.TopK).parameters)
    with pytest.raises(TypeError, match="want: an objective"):
        saewb.training_options(3)


def test_what_is_typed():
    options = {option.name: option for option in saewb.training_options()}
    for name, text, value in (
        ("lr", " 3e-4 ", 3e-4),
        ("betas", "(0.9, 0.99)", (0.9, 0.99)),
        ("clip", "None", None),
        ("schedule", "cosine", "cosine"),
        ("schedule", "'cosine'", "cosine"),
        ("autocast", "torch.bfloat16", torch.bfloat16),
        ("skip_special_tokens", "[1, 2]", [1, 2]),
    ):
        assert options[name].value(text) == value
    for name, text in (
        ("lr", "fast"),
        ("lr", "__import__('os')"),
        ("autocast", "torch.nn"),
        ("lr", ""),
        ("lr", "(" * 9999),
    ):
        with pytest.raises(ValueError, match=f"got {name}="):
            options[name].value(text)
    with pytest.raises(ValueError, match="near: cosine"):
        options["schedule"].value("cosin")
