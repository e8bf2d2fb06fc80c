"""Training end to end, from texts to SAE: python -m tests.benchmarks.train [--model smollm2-135m] [--steps 40]

The same job (a language model's activations at one point, mixed, and a TopK SAE trained on them) by saewb's `Training`
over `stream_activations` with the model in float32 and bfloat16, and, where it is installed, by sae-lens' activations
store and trainer in float32. Each in a fresh process, after a warm-up of two batches over a full buffer; the stores mix
over the same number of tokens, and `steps` is a multiple of it, so that all pay for what they read ahead; latents are
dead after the same silence. Prints the time of a batch, and tokens per second by the clock and by processor time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

import saewb
from saewb.kernels.threads import sleep_while_contended

from .measure import Report, Table, arguments, busy_process, has

ROOT = Path(__file__).parents[2]
CANDIDATES = {"saewb, float32": torch.float32, "saewb, bfloat16 model": torch.bfloat16, "sae-lens": torch.float32}
SIZES = ("model", "hook", "d_sae", "k", "batch", "ctx_len", "buffer", "steps", "threads", "device")


def token_rows(model, options):
    """Rows of ids for all of it, the embedded texts again and again."""
    n = (options.steps + 2 + options.buffer) * options.batch // (options.ctx_len - 1) + 64
    texts = [document.text for document in saewb.tiny.texts()]
    return next(saewb.stream_tokens(texts, model.tokenizer, ctx_len=options.ctx_len, rows=n, repeat=True))


def ours(model, rows, options):
    """Batches of saewb: an iterator of finished steps."""
    buffer = options.buffer * options.batch
    how = {"batch_tokens": options.batch, "buffer_tokens": buffer, "repeat": True, "skip_special_tokens": False}
    stream = saewb.stream_activations(model, rows, options.hook, **how)
    total = (options.steps + 2) * options.batch
    window = 1000 * options.batch  # sae-lens' default: in so few steps neither has dead latents to revive
    config = saewb.TrainConfig(total, batch_tokens=options.batch, normalization="none", dead_after_tokens=window)
    return iter(saewb.Training(stream, saewb.TopK(options.d_sae, options.k), config))


def peers(model, rows, options):
    """Steps of sae-lens: its store feeds its trainer."""
    import datasets
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    d_in = model.cfg.d_model
    config = sae_lens.TopKTrainingSAEConfig(d_in=d_in, d_sae=options.d_sae, k=options.k)
    sae = sae_lens.TopKTrainingSAE(config)
    store = ActivationsStore(
        model=model,
        dataset=datasets.Dataset.from_dict({"tokens": rows.tolist()}),
        hook_name=options.hook,
        hook_head_index=None,
        streaming=False,
        context_size=options.ctx_len,
        d_in=d_in,
        n_batches_in_buffer=options.buffer * options.batch // options.ctx_len,  # counts rows
        total_training_tokens=10**9,
        store_batch_size_prompts=32,
        train_batch_size_tokens=options.batch,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device(options.device),
        dtype="float32",
    )
    how = {"total_training_samples": 10**9, "train_batch_size_samples": options.batch, "lr": 3e-4, "lr_end": 3e-5}
    batches = iter(store.get_data_loader()) if hasattr(store, "get_data_loader") else iter(store)
    trainer = SAETrainer(SAETrainerConfig(**how, device=options.device), sae, batches)

    def steps():
        while True:
            batch = next(batches)
            yield trainer.step(batch[:, 0] if batch.ndim == 3 else batch)
            trainer.n_training_steps += 1

    return steps()


def alone(options):
    """The fresh process's part: seconds by the clock and by all processors, for `steps` steps."""
    model = saewb.load_model(options.model, CANDIDATES[options.alone], device=options.device)
    rows = token_rows(model, options)
    steps = (peers if options.alone == "sae-lens" else ours)(model, rows, options)
    for _ in range(2):
        next(steps)
    with nullcontext() if options.alone == "sae-lens" else sleep_while_contended():  # as runs do
        start = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            next(steps)
    print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]))


def measured(name, options, busy=False):
    """(clock, processors) in seconds, by a fresh process, on its own or beside a busy one."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.train", "--alone", name]
    for key in SIZES:
        command += ["--" + key.replace("_", "-"), str(getattr(options, key))]
    with busy_process(busy):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="what saewb.load_model takes")
    parser.add_argument("--hook", default="blocks.10.hook_resid_post")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32, help="latents on per token")
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--ctx-len", type=int, default=128, help="tokens of a row")
    parser.add_argument("--buffer", type=int, default=8, help="batches that are mixed")
    parser.add_argument("--steps", type=int, default=16, help="measured, after two of warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--busy", action="store_true", help="beside one busy process too")
    parser.add_argument("--alone", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.model, options.hook, options.d_sae, options.k = "tiny", "blocks.2.hook_resid_post", 256, 8
        options.batch, options.buffer, options.steps = 256, 2, 4
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(options)
        return
    times = {name: measured(name, options) for name in CANDIDATES if name != "sae-lens" or has("sae_lens")}
    n = options.steps * options.batch
    notes = {name: f"{n / clock:,.0f} tokens/s, {n / cpu:,.0f} per CPU second" for name, (clock, cpu) in times.items()}
    if options.busy:
        for name in times:
            notes[name] += f"; beside one busy process {n / measured(name, options, busy=True)[0]:,.0f} tokens/s"
    title = (
        f"train from texts: {options.model} to {options.hook}, batches of {options.batch:,}, d_sae {options.d_sae:,}"
    )
    took = {name: clock / options.steps for name, (clock, _) in times.items()}
    of = "sae-lens" if "sae-lens" in times else "saewb, float32"
    Report(options).add(Table.made(f"{title}, k {options.k}: one batch", took, of, notes))


if __name__ == "__main__":
    main()
