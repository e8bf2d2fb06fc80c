"""Ctrl-C at every moment of attach, steer, and whatever runs the model: it is clean again, and its lock is free."""

import os
import threading
import time

import pytest
import torch
from helpers import interrupts, tiny_models, writers
from helpers.writers import WRITERS, Download, serve_download

import saewb
from saewb.models import hook_points
from saewb.training.run_folder import RunFolder

AT = "blocks.1.hook_resid_post"
PARTS = ("interventions", "models")
TRIES = int(os.environ.get("SAEWB_ATTACK_TRIES", 200))


LONG = ("build_index", "evaluate", "attribute", "attribute_edges", "generate", "coactivation", "latent_matrix")
LONG += ("search", "superposition", "read_prompt")


@pytest.fixture(scope="module")
def models():
    """A model, an SAE and a transcoder of its points, and what the model computes by itself."""
    model, ids = tiny_models.new_bridge(), tiny_models.tokens()
    sae = tiny_models.sae(AT, "topk", k=4)
    transcoder = tiny_models.sae("blocks.0.mlp.hook_in", hook_out="blocks.0.hook_mlp_out")
    work = {
        "attach": lambda: attach(model, sae, transcoder, ids),
        "steer": lambda: steer(model, sae, transcoder, ids),
        "capture": lambda: saewb.models.capture.capture(model, ids, [AT]),
        "evaluate": lambda: saewb.evaluate(model, sae, ids),
        "read_prompt": lambda: saewb.read_prompt(model, ids[:1], sae),
    }
    for call in work.values():
        call()
    with torch.no_grad():
        return model, ids, work, tiny_models.snapshot(model), _hooks(model), model(ids)


def attach(model, sae, transcoder, ids):
    with saewb.attach(model, [sae, transcoder], error_term=True), saewb.attach(model, sae), torch.no_grad():
        model(ids)


def steer(model, sae, transcoder, ids):
    with saewb.steer(model, {sae: {3: 8.0}, transcoder: {1: 2.0}}, how="clamp"), torch.no_grad():
        model(ids)


def _hooks(model):
    modules = [*model.modules(), *model.original_model.modules()]
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules]


def _check_clean(models, where):
    model, ids, _, before, hooks, logits = models
    torch.set_grad_enabled(True)  # torch's own no_grad may have been interrupted
    saewb.detach_all(model)
    assert saewb.attachments(model) == [], where
    assert _hooks(model) == hooks, where
    assert tiny_models.snapshot(model) == before, where
    assert not any(module.training for module in model.modules()), where
    with torch.no_grad():
        assert torch.equal(model(ids), logits), where
    assert interrupts.other_thread_can_take(hook_points.lock(model)), where


def _attack(models, name, stride, opcodes=False, start=0):
    call, n = models[2][name], start
    while interrupts.interrupted_at(n, call, PARTS, opcodes):
        _check_clean(models, f"{name}, event {n}")
        n += stride
    assert n > start
    return -(-(n - start) // stride)


@pytest.mark.parametrize("name", ["attach", "steer", "capture"])
def test_an_interrupt_leaves_the_model_clean(models, name):
    _attack(models, name, stride=23, start=7)


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture", "evaluate", "read_prompt"])
def test_an_interrupt_at_every_line_leaves_the_model_clean(models, name):
    print(name, _attack(models, name, stride=1), "interrupts")


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture"])
def test_an_interrupt_at_every_bytecode_leaves_the_model_clean(models, name):
    print(name, _attack(models, name, stride=1, opcodes=True), "interrupts")


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture", "evaluate", "read_prompt"])
def test_signals_at_random_moments_leave_the_model_clean(models, name):
    n = 0
    for was_interrupted in interrupts.signals(models[2][name], TRIES, longest=_seconds(models[2][name])):
        n += was_interrupted
        _check_clean(models, f"{name}, signal {n}")
    print(name, n, "interrupts in", TRIES, "tries")
    assert n


# -- long calls ------------------------------------------------------------------------------------------------------


def long_calls(model, ids):
    """What takes long, without a folder, by name: functions whose results are to be the same after an interrupt."""
    sae, other = tiny_models.sae(AT, "topk", k=4), tiny_models.sae("blocks.0.hook_resid_post")
    index = saewb.build_index(model, sae, ids, n_top=2, per_quantile=1)
    acts, target = torch.randn(64, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)), (4, 5)
    return {
        "build_index": lambda: index_whole(model, sae, ids).n_tokens,
        "evaluate": lambda: saewb.evaluate(model, sae, ids).ce_with_sae,
        "attribute": lambda: saewb.attribute(model, ids[0], sae, target).to_frame().to_csv(),
        "attribute_edges": lambda: saewb.attribute_edges(model, ids[0], other, sae, n_targets=3).to_csv(),
        "generate": lambda: [new.token_id for new in generate(model, sae)],
        "coactivation": lambda: saewb.coactivation(map(sae.encode, acts.split(8))).phi(range(5), range(5)).tolist(),
        "latent_matrix": lambda: saewb.latent_matrix(model, sae, ids, min_fires=1).partners(0),
        "search": lambda: [index.search(text, 3) for text in ("w1", "w2", 5)],
        "superposition": lambda: saewb.superposition(sae),
        "read_prompt": lambda: saewb.read_prompt(model, ids[:1], [sae, other]).to_frame().to_csv(),
    }


def index_whole(model, sae, ids):
    index = saewb.build_index(model, sae, ids, n_top=2, per_quantile=1, batch_size=1)
    if not index.is_complete:  # Ctrl-C stops the pass
        raise KeyboardInterrupt
    return index


def generate(model, sae):
    return saewb.generate_tokens(model, "w1 w2", lambda: saewb.steer(model, sae, {3: 4.0}), max_new_tokens=6)


def _seconds(call):
    """How long a call takes, after a first one."""
    call()
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.mark.attack
@pytest.mark.parametrize("name", LONG)
def test_a_long_call_is_interrupted_at_random_moments(models, name):
    call = long_calls(models[0], models[1])[name]
    expected, n = repr(call()), 0
    for was_interrupted in interrupts.signals(call, TRIES, longest=_seconds(call)):
        n += was_interrupted
        _check_clean(models, f"{name}, signal {n}")
    assert repr(call()) == expected
    print(name, n, "interrupts in", TRIES, "tries")


@pytest.mark.attack
@pytest.mark.parametrize("writer", [*WRITERS, Download], ids=lambda writer: writer.__name__)
def test_what_writes_is_interrupted_at_random_moments(models, writer, tmp_path, monkeypatch):
    """The folder opens after each interrupt, and called again it comes to the same result."""
    monkeypatch.setattr(writers, "MODEL", lambda: models[0])
    with serve_download(_new(tmp_path / "hub")):
        print(writer.__name__, _interrupt_writer(models, writer, tmp_path, TRIES), "interrupts in", TRIES, "tries")


@pytest.mark.parametrize("writer", [writers.Index, writers.Training], ids=lambda writer: writer.__name__)
def test_an_interrupt_leaves_a_folder_that_opens(models, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MODEL", lambda: models[0])
    _interrupt_writer(models, writer, tmp_path, 3)


def test_an_index_interrupted_while_its_thread_starts_counts_nothing_twice(models, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MODEL", lambda: models[0])
    expected, start = writers.Index.work(_new(tmp_path / "whole")), threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name.startswith("ThreadPoolExecutor"):  # the executor does not know of it yet
            monkeypatch.setattr(threading.Thread, "start", start)
            raise KeyboardInterrupt

    (folder := tmp_path / "interrupted").mkdir()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writers.Index.work(folder)
    assert torch.equal(writers.Index.work(folder), expected)


def test_a_run_interrupted_while_its_thread_starts_is_stopped(tmp_path, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "saewb-train":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writers.Training.work(tmp_path)
    assert not any(thread.name == "saewb-train" for thread in threading.enumerate())
    RunFolder(tmp_path / "run").close()  # nobody has it


def test_a_run_whose_end_cannot_be_written_leaves_its_folder(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writers.Training.work(tmp_path)
    RunFolder(tmp_path / "run").close()
    writers.Training.work(tmp_path)


def _interrupt_writer(models, writer, tmp_path, tries):
    writer.prepare(whole := _new(tmp_path / "whole"))
    expected, folders, n = writer.work(whole), [], 0

    def work():
        folders.append(tmp_path / f"{len(folders)}")
        writer.prepare(_new(folders[-1]))
        writer.work(folders[-1])

    for was_interrupted in interrupts.signals(work, tries, longest=_seconds(work)):
        n += was_interrupted
        _check_clean(models, f"{writer.__name__}, signal {n}")
        if was_interrupted and (folder := folders[-1]).is_dir():
            if not (writer is writers.Save and not any(folder.iterdir())):
                writer.look(folder)
            assert torch.equal(writer.work(folder), expected), f"signal {n}"
    return n


def _new(folder):
    folder.mkdir()
    return folder
