"""Training end to end, from texts to SAE: `python tests/benchmarks/train.py [--model smollm2-135m] [--steps 40]`.

Tokens per second of the same job (a language model's activations at one point, mixed, and a TopK SAE trained on them)
by saewb's `Training` over `stream_activations` with the model in float32 and in bfloat16, and, where it is installed,
by sae-lens' activations store and trainer in float32. Each candidate in a fresh process, after a warm-up of two batches
over a full buffer; the stores mix over the same number of tokens. Prints a markdown table: tokens per second, by the
clock and by processor time, and how many times sae-lens' rate. Passes or fails nothing.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings

import torch

import saewb

CANDIDATES = {"saewb, float32": torch.float32, "saewb, bfloat16 model": torch.bfloat16, "sae-lens": torch.float32}


def token_rows(model, options):
    """Rows of ids for all of it, the embedded texts again and again."""
    n = (options.steps + 2 + options.buffer) * options.batch // (options.ctx_len - 1) + 64
    texts = [document.text for document in saewb.embedded.texts()]
    return next(saewb.stream_tokens(texts, model.tokenizer, ctx_len=options.ctx_len, rows=n, repeat=True))


def ours(model, rows, options):
    """Batches of saewb: an iterator of finished steps."""
    buffer = options.buffer * options.batch
    how = {"batch_tokens": options.batch, "buffer_tokens": buffer, "repeat": True, "skip_special_tokens": False}
    stream = saewb.stream_activations(model, rows, options.hook, **how)
    total = (options.steps + 2) * options.batch
    config = saewb.TrainConfig(n_tokens=total, batch_tokens=options.batch)
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
        device=torch.device("cpu"),
        dtype="float32",
    )
    how = {"total_training_samples": 10**9, "train_batch_size_samples": options.batch, "lr": 3e-4, "lr_end": 3e-5}
    batches = iter(store.get_data_loader()) if hasattr(store, "get_data_loader") else iter(store)
    trainer = SAETrainer(SAETrainerConfig(**how, device="cpu"), sae, batches)

    def steps():
        while True:
            batch = next(batches)
            yield trainer.step(batch[:, 0] if batch.ndim == 3 else batch)
            trainer.n_training_steps += 1

    return steps()


def alone(options):
    """The fresh process's part: seconds by the clock and by all processors, for `steps` steps."""
    model = saewb.load_model(options.model, CANDIDATES[options.alone])
    rows = token_rows(model, options)
    steps = (peers if options.alone == "sae-lens" else ours)(model, rows, options)
    for _ in range(2):
        next(steps)
    start = time.perf_counter(), time.process_time()
    for _ in range(options.steps):
        next(steps)
    print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]))


def measured(name, options):
    """(clock, processors) in seconds, by a fresh process."""
    command = [sys.executable, __file__, "--alone", name]
    for key in ("model", "hook", "d_sae", "k", "batch", "ctx_len", "buffer", "steps", "threads"):
        command += ["--" + key.replace("_", "-"), str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what saewb.load_model takes")
    parser.add_argument("--hook", default="blocks.10.hook_resid_post")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32, help="latents on per token")
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--ctx-len", type=int, default=128, help="tokens of a row")
    parser.add_argument("--buffer", type=int, default=8, help="batches that are mixed")
    parser.add_argument("--steps", type=int, default=20, help="measured, after two of warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(options)
        return
    names = [name for name in CANDIDATES if name != "sae-lens" or importlib.util.find_spec("sae_lens")]
    print(
        f"{options.model} at {options.hook}, {options.steps} batches of {options.batch} tokens, context "
        f"{options.ctx_len}, d_sae {options.d_sae}, k {options.k}, {options.threads} threads, torch {torch.__version__}"
        "\n"
    )
    print("| training | tokens/s | tokens per CPU second | x sae-lens | x by CPU |\n|--|--|--|--|--|")
    times = {name: measured(name, options) for name in names}
    base, n = times.get("sae-lens", [float("nan")] * 2), options.steps * options.batch
    for name, (clock, processors) in times.items():
        row = f"| {name} | {n / clock:,.0f} | {n / processors:,.0f} "
        print(row + f"| {base[0] / clock:.1f} | {base[1] / processors:.1f} |", flush=True)


if __name__ == "__main__":
    main()
