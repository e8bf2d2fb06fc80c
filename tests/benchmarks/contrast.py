"""What contrasting two sets of texts costs: python -m tests.benchmarks.contrast [--model smollm2-135m] [--texts 500]

Prints the time of `saewb.contrast` over that of the model's own forward pass to the hook, on the same batches, taken in
turn in the same run; and time and memory of the statistics alone, of 10,000 texts and 65,536 latents of which 1 % are
not 0.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch

import saewb
from saewb.models.capture import capture
from saewb.probing.contrast import latent_statistics
from saewb.probing.pooling import TokenizedTexts

from .measure import Report, Row, Table, arguments, medians, peak_mb, reset_peak, seconds


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--texts", type=int, default=500, help="of each set")
    parser.add_argument("--d-sae", type=int, default=18432)
    parser.add_argument("--ctx-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    n, d = 10_000, 65_536
    if options.quick:
        options.texts, options.d_sae, options.repeats, n, d = 30, 1024, 1, 500, 2048
    report = Report(options)
    report.add(_of_texts(options))
    report.add(_of_statistics(n, d))


def _of_texts(options) -> Table:
    model = saewb.load_model(options.model, device=options.device)
    layer = model.cfg.n_layers // 2
    hook = f"blocks.{layer}.hook_resid_post"
    cfg = saewb.SAEConfig(model.cfg.d_model, options.d_sae, "topk", k=32, hook=hook)
    sae = saewb.SAE(cfg).to(options.device)
    documents = [document.text for document in (*saewb.tiny.texts(), *saewb.tiny.held_out_texts())]
    parts = [part for text in documents for part in _pieces(text)]
    a, b = parts[: options.texts], parts[options.texts : 2 * options.texts]
    texts = TokenizedTexts.of(model, a + b, ctx_len=options.ctx_len)

    @torch.no_grad()
    def forward() -> None:
        for _, ids, _ in texts.batches():
            capture(model, ids.to(options.device), [hook])

    calls = {
        "forward pass to the hook": forward,
        "contrast": lambda: saewb.contrast(model, sae, a, b, ctx_len=options.ctx_len, progress=False),
    }
    took = medians(calls, options.repeats, options.device)
    n_tokens = sum(map(len, texts.ids))
    title = f"contrast of 2 x {len(a)} texts, {n_tokens:,} tokens, {options.d_sae:,} latents, {options.model}"
    return Table.made(title, took, "forward pass to the hook")


def _pieces(text: str, words: int = 80) -> list[str]:
    """Texts of 80 words."""
    all_words = text.split()
    return [" ".join(all_words[i : i + words]) for i in range(0, len(all_words) - words // 2, words)]


def _of_statistics(n: int, d: int) -> Table:
    rng = np.random.default_rng(0)
    size = n * d // 100
    where = rng.integers(0, n, size, dtype=np.int32), rng.integers(0, d, size, dtype=np.int32)
    matrix = scipy.sparse.coo_array((rng.exponential(1, size).astype(np.float32), where), shape=(n, d)).tocsr()
    is_a, choosing = np.arange(n) % 3 == 0, np.arange(n) % 2 == 0
    before = reset_peak()
    took = seconds(lambda: latent_statistics(matrix, is_a, choosing))
    more = peak_mb() - before
    row = Row("1,000 permutations", took, f"{more:.0f} MB more than before")
    return Table(f"statistics of {n:,} texts, {d:,} latents, 1 % not 0", (row,), row.name)


if __name__ == "__main__":
    main()
