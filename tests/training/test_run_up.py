"""Before a run's first step: the buffer that fills, the estimates; told at any time, paused, stopped."""

import threading

import pytest
import torch
from helpers.gated_stream import PATIENCE, Gated

import saewb
from saewb._files import load_state
from saewb.training.step_metrics import RunUp

TOPK = saewb.TopK(d_sae=24, k=4)
HOW = {"n_tokens": 400, "batch_tokens": 40, "log_every_steps": 1, "estimate_tokens": 120}


def started(gated, **how):
    """A run that has been given one chunk, at which its widths were seen, and asks for the second."""
    gated.let()
    run = saewb.train(None, gated.stream(), TOPK, **HOW, **how)
    gated.until_asked(2)
    return run


def within_a_pass(run, control, gated):
    """What was asked of a run while a chunk was computed, after that chunk."""
    thread = threading.Thread(target=control)
    thread.start()
    while not run._waiting:
        assert thread.is_alive()
    gated.let()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def ended(run, gated):
    gated.let(100)
    return run.wait(PATIENCE)


def test_it_says_what_it_reads_before_the_first_step():
    gated = Gated()
    run = started(gated)
    assert repr(run) == "Run(running, filling the buffer, 40 of 200 tokens, activations)"
    gated.let(2)
    gated.until_asked(2)
    progress = run.progress
    assert progress.run_up == RunUp("filling the buffer", 120, 200)
    assert str(progress).startswith("running: filling the buffer, 120 of 200 tokens, ")
    assert str(progress).endswith(" tokens/s")
    assert (progress.tokens_per_s > 0, progress.seconds_left, progress.n_tokens) == (True, None, 0)
    assert "filling the buffer, 120 of 200 tokens" in run._repr_html_()
    assert '<progress value="0.6000"' in run._repr_html_()
    gated.let(2)
    gated.until_asked(2)  # the buffer is full; the first batch puts a chunk in its place
    assert repr(run) == "Run(running, estimating the normalization, 0 of 120 tokens, activations)"
    ended(run, gated)
    assert run.progress.run_up is None
    assert repr(run) == "Run(finished, 400 of 400 tokens, activations)"
    assert len(run.rows) == 10


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"normalization": "none"}, "reading the first batch, 0 of 80 tokens"),
        ({"normalization": "none", "b_dec": "mean"}, "estimating on the first tokens, 0 of 160 tokens"),
        ({"normalization": "whitened"}, "estimating the normalization, 0 of 160 tokens"),
    ],
)
def test_without_a_buffer_it_says_what_else_it_reads(how, says):
    gated = Gated()
    gated.let()
    stream = gated.stream(batch_tokens=80, buffer_tokens=0, prefetch=0)
    run = saewb.train(None, stream, TOPK, **{**HOW, "batch_tokens": 80}, **how)
    gated.until_asked(2)
    assert str(run.progress) == f"running: {says}"
    ended(run, gated)


def test_stopped_while_the_buffer_fills_it_ends_after_that_pass(tmp_path):
    gated, before = Gated(), threading.enumerate()
    run = started(gated, folder=tmp_path / "r")
    assert repr(saewb.read_run(tmp_path / "r")) == "PastRun(r, running, before its first step, sae)"
    within_a_pass(run, run.stop, gated)
    assert not gated.wanted
    assert repr(run) == "Run(stopped, filling the buffer, 80 of 200 tokens, activations)"
    with pytest.raises(RuntimeError, match=r"Run\(stopped, .*has no SAE.\n  want: a run that came to its first step"):
        run.sae  # noqa: B018
    past = saewb.read_run(tmp_path / "r")
    assert (past.state, past.resumable, repr(past)) == ("stopped", False, "PastRun(r, stopped, 0 tokens, sae)")
    assert run._training is None
    assert not [t for t in threading.enumerate() if t.name.startswith("saewb") and t not in before]


def test_paused_while_the_buffer_fills_it_rests_and_goes_on_to_the_same_end():
    gated, free = Gated(), Gated()
    free.let(100)
    whole = saewb.train(None, free.stream(), TOPK, **HOW).wait(PATIENCE)
    run = started(gated)
    within_a_pass(run, run.pause, gated)
    assert not gated.wanted
    assert repr(run) == "Run(paused, filling the buffer, 80 of 200 tokens, activations)"
    run.resume()
    gated.until_asked()
    ended(run, gated)
    assert all(torch.equal(a, b) for a, b in zip(run.sae.parameters(), whole.sae.parameters(), strict=True))


def test_a_buffer_is_as_large_as_the_text_where_that_runs_out():
    gated = Gated(4)
    gated.let(4)
    run = saewb.train(None, gated.stream(), TOPK, **HOW)
    with pytest.raises(ValueError, match="the stream ended after 160 tokens, of n_tokens=400"):
        run.wait(PATIENCE)
    assert run.sae.cfg.metadata["n_training_tokens"] == 160
    none = Gated(0)
    with pytest.raises(ValueError, match="the stream is empty"):
        saewb.train(None, none.stream(), TOPK, **HOW)


def test_resumed_within_the_estimate_it_fills_its_buffer_again_and_may_be_stopped(tmp_path):
    free = Gated()
    free.let(100)
    whole = saewb.train(None, free.stream(), TOPK, **HOW).wait(PATIENCE)
    free, run = Gated(), []
    free.let(100)
    stop = lambda event: run[0].stop() if event.kind == "step" and event.step == 2 else None  # noqa: E731
    begun = threading.Event()
    hold = lambda event: begun.wait(PATIENCE) if event.kind == "begin" else None  # noqa: E731
    run.append(saewb.train(None, free.stream(), TOPK, folder=tmp_path / "r", loggers=[hold, stop], **HOW))
    begun.set()
    assert run[0].wait(PATIENCE).progress.step == 2  # of 3 batches that were read for the estimate
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    gated = Gated()
    gated.let()  # what the first run had looked at
    again = saewb.resume_run(tmp_path / "r", tokens=gated.stream())
    gated.until_asked(2)
    assert repr(again) == "Run(running, filling the buffer, 40 of 200 tokens, activations)"
    within_a_pass(again, again.stop, gated)
    assert (again.state, again.progress.n_tokens, again.sae.cfg.d_sae) == ("stopped", 80, 24)
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    gated = Gated()
    gated.let(5)
    again = saewb.resume_run(tmp_path / "r", tokens=gated.stream())
    gated.until_asked(6)
    assert repr(again) == "Run(running, going back to its place, 0 of 80 tokens, activations)"
    ended(again, gated)
    assert all(torch.equal(a, b) for a, b in zip(again.sae.parameters(), whole.sae.parameters(), strict=True))
    assert load_state(tmp_path / "r" / "checkpoint.pt")["training"]["n_steps"] == 10
