"""Each process of tests/training/test_distributed.py: `torchrun distributed_worker.py what folder`."""

import json
import os
import sys
import time
from pathlib import Path

import torch

import saewb
from helpers import tiny_models
from saewb.distributed import ParallelContext
from saewb.training import TrainConfig, Training

RESID = "blocks.1.hook_resid_post"
B = 48
# Everything that looks at a whole batch, by the hand-written step and by autograd.
OBJECTIVES = {
    "topk": saewb.TopK(24, k=4),
    "batchtopk": saewb.BatchTopK(24, k=3.5),
    "matryoshka": saewb.Matryoshka(24, k=4.0, widths=(5, 12), rows="free", init_norm=0.3),
    "jumprelu": saewb.JumpReLU(24, l0=0.05, bandwidth=0.3, target_l0=4.0),
    "standard": saewb.Standard(24, l1=0.3, warmup_tokens=200),
    "gated": saewb.Gated(24, l1=0.3),
}
# Matching pursuit knows autograd only.
PLAIN = OBJECTIVES | {"pursuit": saewb.MatchingPursuit(24, max_iterations=4)}
HOW = {
    "batch_tokens": B,
    "lr": 3e-3,
    "normalization": "centered",
    "b_dec": "mean",
    "estimate_tokens": 2 * B,
    "dead_after_tokens": B // 2,  # whoever is silent for a batch
    "density_tokens": 10 * B,
    "control_tokens": 5 * B,
    "seed": 3,
}
STEPS, HALF = 25, 11


def train(folder, step="sparse", n_steps=STEPS, saes=None, **more):
    """From the model: passes are shared, the buffer mixes."""
    how = {"buffer_tokens": 200, "pass_tokens": 28, "log_every_steps": 1, "n_tokens": n_steps * B, **HOW, **more}
    how |= {"held_out": tiny_models.tokens(9, 7, seed=2)}
    saes = saes or (PLAIN if step == "plain" else OBJECTIVES)
    return saewb.train(
        tiny_models.bridge(), tiny_models.tokens(61, 7), saes, hook=RESID, folder=folder, step=step, **how
    )


def resumed(folder, n_steps=STEPS):
    how = {
        "model": tiny_models.bridge(),
        "tokens": tiny_models.tokens(61, 7),
        "held_out": tiny_models.tokens(9, 7, seed=2),
    }
    return saewb.resume_run(folder, n_tokens=n_steps * B, **how)


def from_tensors(parallel):
    """A Training over activations in memory."""
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1
    stream = saewb.stream_tensors({"x": x}, batch_tokens=B, repeat=True, shuffle_seed=0)
    return Training(stream, PLAIN, TrainConfig(n_tokens=STEPS * B, step="auto", **HOW), parallel=parallel)


def numbers(training):
    rows = [{n: f.numbers() for n, f in step.saes.items()} for step in training]
    return rows, {n: sae.state_dict() for n, sae in training.saes.items()}


def main(what, folder):
    parallel, folder = ParallelContext.from_environment(), Path(folder)
    if what == "all":
        run = train(folder / "plain", "plain").wait()
        run = train(folder / "sparse").wait()
        torch.save({n: s.state_dict() for n, s in run.saes.items()}, folder / f"saes_{parallel.rank}.pt")
        torch.save(numbers(from_tensors(parallel)), folder / f"tensors_{parallel.rank}.pt")
        resumed(folder / "alone_first").wait()
        train(folder / "together_first", n_steps=HALF).wait()
        saved = folder / "together_first" / "checkpoint.pt"
        (folder / f"{parallel.rank}_folder.json").write_text(
            json.dumps([str(run.folder), saved.exists(), len(run.history)])
        )
        run = train(folder / "stopped", n_steps=10**6)
        while run.progress.step < 5:
            time.sleep(0.01)
        if parallel.rank == 1:
            run.stop()
        run.wait()
        (folder / f"{parallel.rank}.json").write_text(json.dumps([run.state, run.progress.step]))
        try:
            train(folder / "odd", batch_tokens=47)
        except ValueError as error:
            (folder / f"error_{parallel.rank}").write_text(str(error))
        try:
            train(folder / "stopped")
        except (FileExistsError, RuntimeError) as error:
            (folder / f"exists_{parallel.rank}").write_text(f"{type(error).__name__}: {error}")
    elif what == "fail":
        run = train(folder / "failed", n_steps=10**6)
        while run.progress.step < 5:
            time.sleep(0.01)
        if parallel.rank == 1:
            run._training._trainers["topk"]._gradients = None  # the next step fails
        try:
            run.wait()
        finally:
            (folder / f"{parallel.rank}.half").write_text(json.dumps([run.state, str(run.error)]))
            (folder / f"{parallel.rank}.half").rename(folder / f"{parallel.rank}.json")
            end, other = time.monotonic() + 60, folder / f"{1 - parallel.rank}.json"
            while not other.exists() and time.monotonic() < end:  # for the launcher ends the other when one ends
                time.sleep(0.05)
            (folder / f"{parallel.rank}.saw").write_text(str(other.exists()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)
