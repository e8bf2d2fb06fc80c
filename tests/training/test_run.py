"""Runs: in the background, controlled, kept on the disk whatever happens, resumed bit for bit."""

import ast
import errno
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb._files import load_state, save_state
from saewb.data.stream import stream_draws, stream_iterable
from saewb.training import run_folder

RESID, MLP = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
TOPK = saewb.TopK(d_sae=24, k=4)
RUN_0_1_0 = Path(__file__).parents[1] / "fixtures" / "v0_1_0" / "run"
HOW = {"n_tokens": 960, "batch_tokens": 40, "buffer_tokens": 200, "log_every_steps": 1, "pass_tokens": 28}


def train(folder=None, saes=TOPK, tokens=None, **how):
    tokens = tiny_models.tokens(60, 7) if tokens is None else tokens
    return saewb.train(tiny_models.bridge(), tokens, saes, folder=folder, **{"hook": RESID, **HOW, **how})


def endless(n_tokens=10**7, **how):
    """A run that does not end by itself."""
    draws = stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=0, batch_tokens=40)
    return saewb.train(None, draws, TOPK, n_tokens=n_tokens, batch_tokens=40, **how)


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def equal(a, b):
    return a.cfg.d_sae == b.cfg.d_sae and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def figures(run):
    return run.history.drop(columns="seconds")


# -- what comes out --------------------------------------------------------------------------------------------------


def test_a_run_is_the_training_it_says(tmp_path):
    run = train(tmp_path / "run", held_out=tiny_models.tokens(9, 7, seed=2), eval_every_tokens=400).wait()
    stream = saewb.stream_activations(
        tiny_models.bridge(),
        tiny_models.tokens(60, 7),
        RESID,
        batch_tokens=40,
        buffer_tokens=200,
        pass_tokens=28,
        repeat=True,
    )
    config = saewb.TrainConfig(n_tokens=960, batch_tokens=40, eval_every_tokens=400)
    training = saewb.Training(stream, TOPK, config)
    losses = [float(step.only.loss) for step in training]
    assert run.history["loss"].tolist() == pytest.approx(losses, rel=1e-6)
    assert equal(run.sae, training.saes["sae"])
    assert run.sae.cfg.hook == RESID
    assert run.sae.cfg.model == tiny_models.bridge().cfg.model_name
    assert run.history["n_tokens"].tolist() == list(range(40, 961, 40))
    measured = run.history.dropna(subset="held_out/fvu")
    assert measured["n_tokens"].tolist() == [400, 800, 960]
    assert repr(run) == f"Run(finished, 960 of 960 tokens, {RESID})"
    assert run.state == "finished"
    assert run.error is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert lines == list(run.rows)
    assert equal(saewb.load_sae(tmp_path / "run" / "saes" / "sae"), run.sae)


def test_many_saes_several_hooks_transcoders_and_heads_from_one_stream():
    z = "blocks.0.attn.hook_z"
    saes = {
        "a": TOPK,
        "b": saewb.Trainee(saewb.Standard(d_sae=20, l1=0.1), read=MLP),
        "transcoder": saewb.Trainee(saewb.TopK(d_sae=16, k=3, skip=True), read=MLP, write=RESID),
        "heads": saewb.Trainee(saewb.TopK(d_sae=12, k=3), read=z),
        "head": saewb.Trainee(saewb.TopK(d_sae=12, k=3), read=f"{z}[1]"),
    }
    run = train(saes=saes).wait()
    assert list(run.saes) == list(saes)
    with pytest.raises(ValueError, match="trains 5 SAEs"):
        run.sae  # noqa: B018
    assert {"a/loss", "transcoder/l0", "head/fvu"} <= set(run.history.columns)
    result = run.saes
    assert (result["transcoder"].cfg.hook, result["transcoder"].cfg.hook_out) == (MLP, RESID)
    assert (result["head"].cfg.hook, result["head"].cfg.head, result["head"].cfg.d_in) == (z, 1, 4)
    assert result["heads"].cfg.head is None
    for sae in result.values():  # each fits the model where it says it belongs
        with saewb.attach(tiny_models.bridge(), sae):
            tiny_models.bridge()(tiny_models.tokens())
    both = saewb.train(tiny_models.bridge(), tiny_models.tokens(60, 7), TOPK, hook=MLP, hook_out=RESID, **HOW).wait()
    assert both.sae.cfg.is_transcoder


def test_from_streams_and_caches_without_a_model(tmp_path):
    cache = saewb.cache_activations(tiny_models.bridge(), tiny_models.tokens(60, 20), RESID, tmp_path / "c", 1000)
    a = saewb.train(None, cache, TOPK, **HOW).wait()
    b = saewb.train(None, cache, TOPK, **HOW).wait()
    assert equal(a.sae, b.sae)
    assert a.sae.cfg.hook == RESID
    assert a.progress.n_layers is None


def test_seeds_tell_the_result():
    one, two, other = train().wait(), train().wait(), train(seed=1).wait()
    assert equal(one.sae, two.sae)
    assert figures(one).equals(figures(two))
    assert not equal(one.sae, other.sae)


def test_goes_on_from_an_sae(tmp_path):
    first = train().wait().sae
    run = train(tmp_path / "r", saes=saewb.Trainee(TOPK, init=first), lr=1e-12, checkpoint_every_tokens=400).wait()
    torch.testing.assert_close(run.sae.W_dec, first.W_dec, atol=1e-5, rtol=0)


# -- control ---------------------------------------------------------------------------------------------------------


def test_pause_rests_resume_goes_on_stop_ends():
    run = endless()
    until(lambda: run.progress.step > 3)
    run.pause()
    assert run.state == "paused"
    at = run.progress.step
    one, two = run.sae, run.sae
    assert equal(one, two)
    time.sleep(0.05)
    assert run.progress.step == at
    run.resume()
    until(lambda: run.progress.step > at + 3)
    assert run.state == "running"
    assert run.wait(timeout=0.01) is run
    run.stop()
    at = run.progress.step
    assert run.state == "stopped"
    assert repr(run).startswith("Run(stopped, ")
    assert run.stop().progress.step == at
    assert run.sae.cfg.d_sae == 24
    with pytest.raises(RuntimeError, match="has ended"):
        run.resume()
    assert not [t for t in threading.enumerate() if t.name.startswith("saewb")]


def test_a_paused_run_stops_too():
    run = endless().pause()
    assert run.stop().state == "stopped"


def test_two_runs_at_once_on_one_model_while_cells_use_it():
    tiny_models.bridge()
    alone = [train(seed=0).wait(), train(seed=1).wait()]
    together = [train(seed=0), train(seed=1)]
    clean = tiny_models.bridge()(tiny_models.tokens())
    while any(run.state == "running" for run in together):
        with saewb.attach(
            tiny_models.bridge(), saewb.SAE(saewb.SAEConfig(16, 8, hook=RESID))
        ):  # what they read is clean
            tiny_models.bridge()(tiny_models.tokens())
        assert torch.equal(tiny_models.bridge()(tiny_models.tokens()), clean)
    for a, b in zip(alone, together, strict=True):
        assert equal(a.sae, b.wait().sae)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started with SIGINT ignored, as shells start background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_waiting_stops_cleanly_and_elsewhere_does_nothing(tmp_path):
    run = endless(folder=tmp_path / "r")
    until(lambda: run.progress.step > 2)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):  # another cell
        time.sleep(20)
    assert run.state == "running"
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.state == "stopped"
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_steps"] == run.progress.step


# -- what fails ------------------------------------------------------------------------------------------------------


def failing(after):
    rng = torch.Generator().manual_seed(0)
    for i in range(100):
        if i == after:
            raise OSError("the stream is gone")
        yield torch.randn(40, 8, generator=rng)


def test_a_stream_that_fails_leaves_a_checkpoint_from_which_it_goes_on(tmp_path):
    how = {"n_tokens": 400, "batch_tokens": 40, "log_every_steps": 1, "estimate_tokens": 80}
    whole = saewb.train(None, stream_iterable(failing(50), batch_tokens=40), TOPK, **how).wait()
    run = saewb.train(None, stream_iterable(failing(6), batch_tokens=40), TOPK, folder=tmp_path / "r", **how)
    with pytest.raises(OSError, match="the stream is gone"):
        run.wait()
    assert run.state == "failed"
    assert str(run.error) == "the stream is gone"
    assert "the stream is gone" in run._repr_html_()
    assert run.sae.cfg.d_sae == 24
    again = saewb.resume_run(tmp_path / "r", tokens=stream_iterable(failing(50), batch_tokens=40)).wait()
    assert equal(again.sae, whole.sae)
    assert figures(again).equals(figures(whole))


def test_a_step_that_fails_loses_no_batch_and_memory_is_explained(tmp_path, monkeypatch):
    whole = train().wait()
    real = saewb.TopK.losses
    calls = []

    def losses(self, *args):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return real(self, *args)

    monkeypatch.setattr(saewb.TopK, "losses", losses)
    run = train(tmp_path / "r")
    with pytest.raises(
        MemoryError, match=r"(?s)out of memory at step 9: .*batch_tokens=40.*weights.*fix:  batch_tokens=20"
    ):
        run.wait()
    assert run.progress.step == 8
    again = saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7)).wait()
    assert equal(again.sae, whole.sae)


def test_tokens_that_end_early_are_told():
    run = train(tokens=iter([tiny_models.tokens(1, 7)[0]] * 20), ctx_len=16)
    with pytest.raises(ValueError, match="the stream ended after"):
        run.wait()


def test_divergence_is_a_failure_and_keeps_the_checkpoint_before(tmp_path):
    def chunks():
        yield from (torch.randn(40, 8, generator=torch.Generator().manual_seed(i)) for i in range(6))
        yield torch.full((40, 8), 1e30)

    how = {
        "n_tokens": 400,
        "batch_tokens": 40,
        "checkpoint_every_tokens": 40,
        "log_every_steps": 1,
        "estimate_tokens": 80,
    }
    run = saewb.train(None, stream_iterable(chunks(), batch_tokens=40), TOPK, folder=tmp_path / "r", **how)
    with pytest.raises(FloatingPointError, match="diverged(.|\n)*lr="):
        run.wait()
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_steps"] == 6


def test_activations_that_are_not_finite_from_the_first_are_said_to_be():
    chunks = [torch.full((40, 8), torch.inf)] * 10
    run = saewb.train(None, stream_iterable(chunks, batch_tokens=40), TOPK, n_tokens=400, batch_tokens=40)
    with pytest.raises(FloatingPointError, match="activations at 'activations' are not finite"):
        run.wait()


def test_loggers_hear_everything_and_one_that_fails_does_no_harm():
    heard = []

    def broken(event):
        raise ConnectionError("no network")

    run = train(loggers=[broken, heard.append]).wait()
    assert [e.kind for e in heard] == ["begin", *["step"] * 24, "end"]
    assert heard[-1].state == "finished"
    assert heard[1].row["n_tokens"] == heard[1].n_tokens == 40
    assert len([note for note in run.notes if "no network" in note]) == 3


def test_a_logger_may_stop_the_run():
    run = []
    run.append(
        endless(loggers=[lambda event: run[0].stop() if event.kind == "step" and event.step >= 20 and run else None])
    )
    run[0]._join(20)
    assert run[0].state == "stopped"


# -- on the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["none", "centered"])  # the second holds batches back for its estimate
@pytest.mark.parametrize("at", [2, 11])
def test_resumed_after_stop_it_is_bit_for_bit_the_whole_run(tmp_path, at, normalization):
    how = {"normalization": normalization, "b_dec": "mean" if normalization == "centered" else "zeros"}
    whole = train(**how).wait()
    run = []
    stop = lambda event: run[0].stop() if event.kind == "step" and event.step == at else None  # noqa: E731
    activation = threading.Event()
    run.append(
        train(
            tmp_path / "r", loggers=[lambda event: activation.wait(5) if event.kind == "begin" else None, stop], **how
        )
    )
    activation.set()
    run[0].wait()
    assert (run[0].state, run[0].progress.step) == ("stopped", at)
    again = saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7)).wait()
    assert equal(again.sae, whole.sae)
    assert figures(again).equals(figures(whole))
    longer = saewb.resume_run(
        tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7), n_tokens=1200
    ).wait()
    assert longer.progress.n_tokens == 1200
    assert (saewb.read_run(tmp_path / "r").frac, "n_tokens=1200" in longer.code) == (1.0, True)


SCRIPT = """
    import os, signal, sys, torch
    torch.set_num_threads(1)
    import saewb
    from helpers import tiny_models
    from training import test_run
    {before}
    run = test_run.train(sys.argv[1], checkpoint_every_tokens=200, loggers=[sink], n_tokens={n_tokens})
    {after}
"""


def script(folder, before, after="run.wait()", n_tokens=960):
    code = textwrap.dedent(SCRIPT).format(before=textwrap.dedent(before), after=after, n_tokens=n_tokens)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, "tests"]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=env, timeout=120
    )


def test_resumed_after_kill_9_it_is_bit_for_bit_the_whole_run(tmp_path):
    kill = "sink = lambda event: os.kill(os.getpid(), 9) if event.kind == 'step' and event.step == 14 else None"
    done = script(tmp_path / "r", kill)
    assert done.returncode == -9, done.stderr
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_tokens"] == 400
    assert len((tmp_path / "r" / "history.jsonl").read_text().splitlines()) == 14
    assert saewb.read_run(tmp_path / "r").state == "interrupted"
    whole = train().wait()
    again = saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7)).wait()
    assert equal(again.sae, whole.sae)
    assert figures(again).equals(figures(whole))
    assert saewb.run_densities(again) == saewb.run_densities(whole)
    assert saewb.read_run(tmp_path / "r").state == "finished"


# -- how it ended ----------------------------------------------------------------------------------------------------


def test_a_folder_tells_how_its_run_ended(tmp_path):
    assert saewb.read_run(train(tmp_path / "a").wait().folder).state == "finished"
    run = endless(folder=tmp_path / "b")
    until(lambda: run.progress.step > 2)
    assert saewb.read_run(tmp_path / "b").state == "running"
    run.pause()
    assert saewb.read_run(tmp_path / "b").state == "running"  # it holds its folder
    run.notes.append("a note")
    run.stop()
    past = saewb.read_run(tmp_path / "b")
    assert (past.state, past.error, past.notes) == ("stopped", "", ("a note",))
    draws = stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=0, batch_tokens=40)
    again = saewb.resume_run(tmp_path / "b", tokens=draws)
    assert saewb.read_run(tmp_path / "b").state == "running"  # what was said of the first session is gone
    again.stop()
    run = saewb.train(
        None, stream_iterable(failing(6), batch_tokens=40), TOPK, n_tokens=400, batch_tokens=40, folder=tmp_path / "c"
    )
    run._join(20)
    past = saewb.read_run(tmp_path / "c")
    assert (past.state, past.error) == ("failed", "OSError: the stream is gone")
    (tmp_path / "c" / "end.json").write_text('{"state": "fini')
    with pytest.raises(saewb.FormatError, match="end.json .*is not JSON"):
        saewb.read_run(tmp_path / "c")


def test_where_nobody_can_tell_whether_it_goes_on(tmp_path, monkeypatch):
    run = endless(folder=tmp_path / "r")
    monkeypatch.setattr(run_folder, "is_locked", lambda folder: None)  # as on Windows
    assert saewb.read_run(tmp_path / "r").state == "unfinished"
    run.stop()
    assert saewb.read_run(tmp_path / "r").state == "stopped"


def test_a_look_at_a_folder_keeps_no_run_from_beginning(tmp_path):
    """Whoever looks holds the lock for a moment."""
    fcntl = pytest.importorskip("fcntl", reason="folders are not locked here")
    (tmp_path / ".lock").touch()
    looked = (tmp_path / ".lock").open()
    fcntl.flock(looked, fcntl.LOCK_SH)
    threading.Timer(0.03, looked.close).start()
    taken = run_folder.RunFolder(tmp_path)
    with pytest.raises(RuntimeError, match="is going on in"):
        run_folder.RunFolder(tmp_path)
    taken.close()


def test_a_folder_that_is_deleted_while_its_run_goes_on(tmp_path):
    run = endless(folder=tmp_path / "r", checkpoint_every_tokens=400, n_tokens=10**6)
    until(lambda: run.progress.step > 12)
    until(lambda: shutil.rmtree(tmp_path / "r", ignore_errors=True) or not (tmp_path / "r").exists())  # as it writes
    at = run.progress.step
    until(lambda: run.progress.step > at + 12)
    assert any("is not there any more" in note for note in run.notes), (at, run.progress, run.notes)
    run.stop()
    with pytest.raises(FileNotFoundError, match=r"is not there any more.\n  want: (.|\n)*saewb.save_sae\(run.sae"):
        run.wait()
    assert (run.state, run.sae.cfg.d_sae) == ("failed", 24)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("keep_saes", [False, True])
def test_a_folder_deleted_within_a_checkpoint_is_not_made_anew(tmp_path, keep_saes, monkeypatch):
    """Deleted by somebody else at each of the moments at which a file or folder of the checkpoint gets its name."""
    real, left = os.replace, []

    def deletes(*names):
        real(*names)
        left[0] -= 1
        if not left[0]:
            shutil.rmtree(tmp_path / "r")

    monkeypatch.setattr(os, "replace", deletes)
    monkeypatch.setattr(type(tmp_path), "rename", lambda old, new: deletes(old, new))
    saes = dict.fromkeys("ab", saewb.load_sae("tiny"))
    for at in (1, 2, 3):
        folder, left[:] = run_folder.RunFolder(tmp_path / "r"), [at]
        with pytest.raises(FileNotFoundError, match="is not there any more"):
            any(folder.write_checkpoint({}, 0.0, saes, 0 if keep_saes else None) for _ in itertools.count())
        folder.close()
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("how", [pytest.param("the script ends", marks=pytest.mark.long), "SIGTERM"])
def test_the_interpreters_exit_leaves_a_checkpoint(tmp_path, how):
    sink = "import threading\nreached = threading.Event()\n"
    sink += "sink = lambda event: reached.set() if event.kind == 'step' and event.step >= 3 else None"
    after = "reached.wait(60)"
    if how == "SIGTERM":
        after += (
            "; saewb.training.run.exit_on_sigterm(); os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(60)"
        )
        sink += "\nimport saewb.training.run"
    done = script(tmp_path / "r", sink, after, n_tokens=10**7)
    assert done.returncode == (143 if how == "SIGTERM" else 0), done.stderr
    assert done.stderr == ""
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_steps"] >= 3


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    real, full = torch.save, []

    def save(state, path):
        if full and "checkpoint" in str(path):
            with open(path, "wb") as file:  # what fits
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    fill = lambda event: full.append(1) if event.kind == "step" and event.step == 12 else None  # noqa: E731
    run = train(tmp_path / "r", checkpoint_every_tokens=400, loggers=[fill])
    with pytest.raises(OSError, match="No space left"):
        run.wait()
    assert run.progress.step == 24
    assert any("no checkpoint at 800 tokens" in note for note in run.notes)
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_tokens"] == 400
    assert not list((tmp_path / "r").glob("*.new"))
    assert run.sae.cfg.d_sae == 24
    monkeypatch.undo()
    again = saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7)).wait()
    assert equal(again.sae, train().wait().sae)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full_leaves_the_file_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    try:
        save_state(disk / "state", {"x": torch.arange(1000)})
        with pytest.raises(OSError, match="could not be written|No space left"):
            save_state(disk / "state", {"x": torch.arange(100_000)})
        assert torch.equal(load_state(disk / "state")["x"], torch.arange(1000))
        assert [p.name for p in disk.iterdir()] == ["state"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_saes_of_every_checkpoint_are_kept_if_asked(tmp_path):
    train(tmp_path / "r", checkpoint_every_tokens=400, keep_saes=True).wait()
    names = sorted(p.name for p in (tmp_path / "r" / "saes_at").iterdir())
    assert names == ["000000000400", "000000000800", "000000000960"]
    assert saewb.load_sae(tmp_path / "r" / "saes_at" / names[0] / "sae").cfg.metadata["n_training_tokens"] == 400


def test_folders_that_are_taken_or_no_run(tmp_path):
    run = endless(folder=tmp_path / "r")
    with pytest.raises(RuntimeError, match="a run is going on"):
        endless(folder=tmp_path / "r")
    run.stop()
    with pytest.raises(FileExistsError, match=r"saewb\.resume_run"):
        endless(folder=tmp_path / "r")
    with pytest.raises(FileNotFoundError, match="no run in"):
        saewb.resume_run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "r" / "run.json").write_text("{}")
    with pytest.raises(saewb.FormatError, match="not a run"):
        saewb.resume_run(tmp_path / "r")


def test_a_run_of_0_1_0_is_read_and_says_how_to_go_on(tmp_path):
    """Written by `train(normalisation="centred", checkpoint_every_tokens=200)` of that version."""
    past = saewb.read_run(RUN_0_1_0)
    assert (past.state, past.names, past.resumable, past.frac) == ("finished", ("sae",), False, 1.0)
    assert past.history["n_tokens"].tolist() == list(range(40, 401, 40))
    assert past.spec.saes["sae"].objective == TOPK
    assert past.spec.train == saewb.TrainConfig(n_tokens=400, batch_tokens=40, normalization="centered")
    assert past.spec.data == saewb.training.config.DataConfig(buffer_tokens=200, pass_tokens=28)
    assert "checkpoint_every_tokens=200" in past.code
    assert saewb.run_densities(past)["sae"].n_tokens == 400
    shutil.copytree(RUN_0_1_0, tmp_path / "r")
    with pytest.raises(
        saewb.FormatError, match=r"is of saewb 0\.1\.0, whose checkpoints(.|\n)*fix: .*init=saewb.load_sae\("
    ):
        saewb.resume_run(tmp_path / "r", model=tiny_models.bridge(), tokens=tiny_models.tokens(60, 7))


# -- before it starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"hook": "blocks.1.hook_resid_pots"}, ValueError, "near: .*hook_resid_post"),
        ({"hook": None}, ValueError, "no hook"),
        ({"learning_rate": 1.0}, TypeError, "no option 'learning_rate'"),
        ({"batch_token": 8}, TypeError, "near: batch_tokens"),
        ({"saes": {}}, ValueError, "no SAE"),
        ({"saes": {"../x": TOPK}}, ValueError, r"'\.\./x'"),
        ({"saes": "topk"}, TypeError, "got a str"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens=0"),
        ({"log_every_steps": 0}, ValueError, "log_every_steps=0"),
        ({"tokens": "text"}, TypeError, r"\[text\]"),
        ({"held_out": tiny_models.tokens(0, 7)}, ValueError, r"\(0, 7\)"),
    ],
)
def test_what_is_wrong_is_said_before_it_starts(how, error, says):
    threads = threading.active_count()
    with pytest.raises(error, match=says):
        train(**how)
    assert threading.active_count() == threads


def test_too_much_memory_is_said_before_it_starts(monkeypatch):
    import saewb.training.memory

    monkeypatch.setattr(
        saewb.training.memory, "available", lambda device: 16 * (24 * 33 + 16)
    )  # the weights, and nothing else
    with pytest.warns(UserWarning, match=r"(?s)GiB.*available.*fix:"):
        run = train()
    run.wait()
    assert run.memory.weights == 16 * (24 * 33 + 16)
    assert run.memory.buffer == (200 + 4 * 40) * 16 * 4


# -- shown and sent on -----------------------------------------------------------------------------------------------


def test_progress_and_page():
    run = train(saes={"a": TOPK, "b": TOPK}).wait()
    progress = run.progress
    assert str(progress) == "finished: 960 of 960 tokens (100%), 2 of 3 layers run"
    assert repr(run) == "Run(finished, 960 of 960 tokens, 2 SAEs)"
    page = run._repr_html_()
    assert page.count("<tr>") == 3
    assert "<progress" in page
    run = endless()
    until(lambda: run.progress.seconds_left is not None)  # it trains, what it reads first is read
    assert min(run.progress.seconds_left, run.progress.tokens_per_s) > 0
    assert "tokens/s" in str(run.progress)
    run.stop()


def test_wandb_gets_sae_lens_keys_and_weights_only_if_asked(tmp_path, monkeypatch):
    log, artifacts = [], []
    theirs = SimpleNamespace(
        log=lambda row, step: log.append((step, row)),
        log_artifact=artifacts.append,
        finish=lambda exit_code: log.append(exit_code),
    )
    opened = []

    class Artifact:
        def __init__(self, name, type, metadata):
            self.name, self.files = name, None

        def add_dir(self, path):
            self.files = sorted(os.listdir(path))

    fake = SimpleNamespace(init=lambda **how: opened.append(how) or theirs, Artifact=Artifact)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path / "a", loggers=[saewb.training.loggers.Wandb(project="p", mode="offline")]).wait()
    assert opened[0]["project"] == "p"
    assert opened[0]["config"]["train"]["batch_tokens"] == 40
    keys = set(log[0][1])
    assert {
        "losses/overall_loss",
        "losses/mse_loss",
        "losses/auxiliary_reconstruction_loss",
        "metrics/explained_variance",
        "metrics/l0",
        "sparsity/dead_features",
        "details/current_learning_rate",
        "details/n_training_samples",
    } <= keys
    assert [step for step, _ in log[:-1]] == list(range(1, 25))
    assert log[-1] == 0
    assert not artifacts
    train(tmp_path / "b", loggers=[saewb.training.loggers.Wandb(log_weights=True)]).wait()
    assert [a.files for a in artifacts] == [["cfg.json", "sae_weights.safetensors"]]


def test_importing_loggers_imports_none_of_them():
    late = {"wandb", "tensorboard", "torch.utils.tensorboard"}
    code = f"import sys, saewb.training.loggers; assert not {late} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- state files -----------------------------------------------------------------------------------------------------


def test_states_come_back_as_they_were(tmp_path):
    x = torch.randn(3, 5, dtype=torch.float64)
    state = {
        "a": [1, 2.5, None, True, "x\ny", {"t": x.T, "same": x}],
        "b": {"empty": [], "bf16": torch.ones(2, dtype=torch.bfloat16), "flag": torch.tensor(True), "": 1e-300},
        "rng": torch.Generator().get_state(),
        "tuple": (1, [2, ()]),
    }
    save_state(tmp_path / "s", state)
    got = load_state(tmp_path / "s")
    assert torch.equal(got["a"][5]["t"], x.T)
    assert got["a"][:5] == state["a"][:5]
    assert got["tuple"] == state["tuple"]
    assert got["b"]["bf16"].dtype == torch.bfloat16
    assert bool(got["b"]["flag"])
    assert got["b"][""] == 1e-300
    assert torch.equal(got["rng"], state["rng"])
    for bad in ({"x": object()}, {1: 2}):
        with pytest.raises(TypeError):
            save_state(tmp_path / "s", bad)
    assert load_state(tmp_path / "s")["b"][""] == 1e-300
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-10])
    with pytest.raises(saewb.FormatError, match="cannot be read"):
        load_state(tmp_path / "cut")


# -- on the command line ---------------------------------------------------------------------------------------------

FILE = """
model: tiny
tokens: {embedded: true}
held_out: {embedded: true}
saes:
  wide: {objective: TopK, d_sae: 64, k: 4, hook: blocks.0.hook_resid_post}
  levels: {objective: Matryoshka, d_sae: 64, k: 4, widths: [8, 16], hook: blocks.0.hook_resid_post}
n_tokens: 1024
batch_tokens: 256
buffer_tokens: 512
held_out_tokens: 512
lr: 3e-4
folder: FOLDER
"""


def test_the_command_line_trains_from_a_file_and_goes_on(tmp_path, capsys, monkeypatch):
    from saewb import cli
    from saewb.training import run

    monkeypatch.setattr(run, "exit_on_sigterm", lambda: None)  # this process is pytest's
    (tmp_path / "a.yaml").write_text(FILE.replace("FOLDER", str(tmp_path / "r")))
    assert cli.main(["train", str(tmp_path / "a.yaml")]) == 0
    out = capsys.readouterr().out
    assert "finished: 1,024 of 1,024 tokens (100%), 1 of 4 layers run" in out
    assert saewb.load_sae(tmp_path / "r" / "saes" / "levels").cfg.d_sae == 64
    (tmp_path / "a.yaml").write_text(FILE.replace("FOLDER", str(tmp_path / "r")).replace("1024", "1536"))
    assert cli.main(["train", str(tmp_path / "a.yaml")]) == 0
    assert "1,536 of 1,536 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("TopK", "TopQ", "near: TopK"),
        ("lr:", "learning_rate:", "no option 'learning_rate'"),
        ("n_tokens: 1024", "", "no 'n_tokens'"),
        ("embedded: true", "embeded: true", "one of files, embedded, cache"),
        ("saes:", "saes: [", "not YAML"),
    ],
)
def test_files_that_are_wrong(tmp_path, capsys, monkeypatch, old, new, says):
    from saewb import cli
    from saewb.training import run

    monkeypatch.setattr(run, "exit_on_sigterm", lambda: None)
    (tmp_path / "a.yaml").write_text(FILE.replace("FOLDER", str(tmp_path / "r")).replace(old, new))
    assert cli.main(["train", str(tmp_path / "a.yaml")]) == 1
    assert says in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "missing.yaml")]) == 1


def test_a_run_folder_of_a_stranger_writes_nowhere_else_and_gives_no_code(tmp_path):
    folder = train(tmp_path / "a").wait().folder
    spec = json.loads((folder / "run.json").read_text())
    draws = stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=0, batch_tokens=40)

    def written(**changes):
        (folder / "run.json").write_text(json.dumps(spec | changes))

    for name in ("../../x", "/x", "", "a/b", ".", "x\n"):
        written(saes={name: next(iter(spec["saes"].values()))})
        for use in (saewb.read_run, lambda f: saewb.resume_run(f, tokens=draws)):
            with pytest.raises(saewb.FormatError, match="got an SAE named"):
                use(folder)
    written(model="tiny\n    *[__import__('os')][:0],\r\x85\u2028x")
    code = saewb.read_run(folder).code
    assert [line for line in code.splitlines() if "__import__" in line] == [
        "    model,  # tiny     *[__import__('os')][:0],   x"
    ]
    call = ast.parse(code).body[-1].value
    assert [type(argument) for argument in call.args] == [ast.Name, ast.Name, ast.Call]
    written(data=spec["data"] | {"positions": ["__import__('os')", None, None]})
    with pytest.raises(saewb.FormatError, match=r"run\.json"):
        saewb.read_run(folder)
    written(train=spec["train"] | {"lr": 1e999})
    with pytest.raises(saewb.FormatError, match="lr"):
        saewb.read_run(folder)
    written(data=spec["data"] | {"pass_tokens": 29})  # valid, and another training
    with pytest.raises(saewb.FormatError, match="not what it was at the checkpoint: data differ"):
        saewb.resume_run(folder, tokens=draws)
    written()
    (tmp_path / "mine").mkdir()
    shutil.move(folder / "saes", tmp_path / "mine" / "saes")
    (folder / "saes").symlink_to(tmp_path / "mine" / "saes")
    with pytest.raises(saewb.FormatError, match="saes is a symbolic link"):
        saewb.resume_run(folder, tokens=draws)


def test_a_stream_of_other_batches_is_refused_at_once():
    stream = stream_draws(lambda n, rng: torch.zeros(n, 8), seed=0)
    with pytest.raises(ValueError, match=r"batches have 4096 tokens[\s\S]*fix: .*train\(..., batch_tokens=4096\)"):
        saewb.train(None, stream, TOPK, n_tokens=8192, batch_tokens=1000)


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
def test_files_of_a_run_have_the_mode_of_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        folder = train(tmp_path / "a").wait().folder
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


# -- of what it is ---------------------------------------------------------------------------------------------------


def test_it_is_resumed_with_the_same_model_and_tokens_only(tmp_path):
    tokens, held_out = tiny_models.tokens(60, 7), tiny_models.tokens(9, 7, seed=3)
    train(tmp_path / "r", n_tokens=400, tokens=tokens, held_out=held_out).wait()
    other = tokens.clone()
    other[59, 6] = 4 if other[59, 6] != 4 else 5
    model = tiny_models.new_bridge()
    how = {"model": tiny_models.bridge(), "tokens": tokens, "held_out": held_out}
    weights = model.blocks[0].mlp.out.weight
    with torch.no_grad():
        weights[0, 0] += 1
    for wrong, says in (
        ({"tokens": other}, r"is of other tokens \(by content: tokens"),
        ({"model": model}, r"is of another model \(by content: model"),
        ({"held_out": held_out + (held_out == 5)}, "other held-out tokens"),
        ({"tokens": tokens[:59]}, "other tokens"),
    ):
        with pytest.raises(ValueError, match=says + r"(.|\n)*want: .*started with(.|\n)*fix: "):
            saewb.resume_run(tmp_path / "r", **{**how, **wrong})
    assert saewb.resume_run(tmp_path / "r", **how, n_tokens=480).wait().progress.n_tokens == 480
    del how["held_out"]
    assert saewb.resume_run(tmp_path / "r", **how, n_tokens=520).wait().progress.n_tokens == 520


def test_a_run_on_activations_is_of_their_content(tmp_path):
    values = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))

    def stream(x=values):
        return saewb.stream_tensors(x, batch_tokens=40, repeat=True)

    saewb.train(None, stream(), TOPK, n_tokens=400, batch_tokens=40, folder=tmp_path / "r").wait()
    other = values.clone()
    other[-1, -1] += 1e-3
    with pytest.raises(ValueError, match="is of other tokens"):
        saewb.resume_run(tmp_path / "r", tokens=stream(other))
    assert saewb.resume_run(tmp_path / "r", tokens=stream(), n_tokens=480).wait().progress.n_tokens == 480


def test_a_file_whose_settings_changed_does_not_go_on_silently(tmp_path):
    from saewb.training.train import train_file

    file, text = tmp_path / "run.yaml", tmp_path / "a.txt"
    text.write_text("\n\n".join(["The river flows through the city.", "A cat sat on the mat."] * 60))
    settings = {
        "model": "tiny",
        "tokens": f"{{files: [{text}]}}",
        "saes": "{a: {objective: TopK, d_sae: 32, k: 4, hook: blocks.0.hook_resid_post}}",
        "n_tokens": 256,
        "batch_tokens": 64,
        "ctx_len": 16,
        "buffer_tokens": 64,
        "folder": tmp_path / "r",
        "lr": "1e-3",
    }

    def run(**changes):
        file.write_text("".join(f"{name}: {value}\n" for name, value in {**settings, **changes}.items()))
        return train_file(file)

    run().wait()
    for change, says in (
        ({"lr": "2e-3"}, "lr=0.001, not 0.002"),
        ({"ctx_len": 32}, "ctx_len=16, not 32"),
        ({"checkpoint_every_s": 9.0}, r"checkpoint_every_s=600.0, not 9.0"),
        ({"saes": settings["saes"].replace("k: 4", "k: 5")}, "SAE 'a' .*'k': 4.* not .*'k': 5"),
        ({"saes": settings["saes"].replace("{a:", "{b:")}, r"SAEs \['a'\], not \['b'\]"),
    ):
        with pytest.raises(ValueError, match=f"other settings than .*{says}"):
            run(**change)
    assert run(n_tokens=320).wait().progress.n_tokens == 320
    text.write_text(text.read_text().replace("cat", "dog"))
    with pytest.raises(ValueError, match="is of other tokens"):
        run(n_tokens=384)
