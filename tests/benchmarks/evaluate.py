"""What many SAEs in one pass cost: python tests/benchmarks/evaluate.py [--model smollm2-135m] [--n-saes 10]

Prints the time of `evaluate_many(..., losses=False)` over that of its parts: the model's own forward pass to the hooks,
and the encode and decode of the SAEs. Both are taken in turn, in the same run; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import saewb
from saewb.activations import capture


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n-saes", type=int, default=10)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gate", choices=["topk", "relu"], default="topk")
    options = parser.parse_args()
    model = saewb.load_model(options.model)
    layers = [i * model.cfg.n_layers // options.n_saes for i in range(options.n_saes)]
    k = 32 if options.gate == "topk" else None
    saes = {
        f"{i}": saewb.SAE(
            saewb.SAEConfig(
                model.cfg.d_model, options.d_sae, options.gate, k=k, hook=f"blocks.{layer}.hook_resid_post"
            ),
            seed=i,
        )
        for i, layer in enumerate(layers)
    }
    if options.model == "tiny":
        saes["embedded"] = saewb.load_sae("tiny")
    texts = [document.text for document in saewb.embedded.held_out_texts()]
    tokens = saewb.tokens.token_rows(model, texts, 128)[: options.rows]
    whole, parts = [], []
    with torch.no_grad():
        for _ in range(options.repeats + 1):  # the first one warms up
            whole.append(_timed(lambda: saewb.evaluate_many(model, saes, tokens, at_once=64, losses=False)))
            parts.append(_timed(lambda: _parts(model, list(saes.values()), tokens)))
    ratio = statistics.median(w / p for w, p in zip(whole[1:], parts[1:], strict=True))
    threads = torch.get_num_threads()
    print(f"{len(saes)} {options.gate} SAEs, {options.model}, {tokens.numel()} tokens, {threads} threads")
    print(f"evaluate_many {statistics.median(whole[1:]):.2f} s, forward + encode + decode "
          f"{statistics.median(parts[1:]):.2f} s, ratio {ratio:.2f}")  # fmt: skip


def _parts(model, saes, tokens) -> None:
    for batch in tokens.split(8):
        seen = capture(model, batch, {sae.cfg.hook for sae in saes})
        for sae in saes:
            x = seen[sae.cfg.hook]
            sae.decode(sae.encode_topk(x) if sae.cfg.k is not None else sae.encode(x))


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
