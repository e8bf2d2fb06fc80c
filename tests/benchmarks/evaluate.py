"""What many SAEs in one pass cost: python -m tests.benchmarks.evaluate [--model smollm2-135m] [--n-saes 10]

Prints the time of `evaluate_many(..., losses=False)` over that of its parts: the model's own forward pass to the hooks,
and the encode and decode of the SAEs. Both are taken in turn, in the same run; medians.
"""

from __future__ import annotations

import torch

import saewb
from saewb.models.capture import capture

from .measure import Report, Table, arguments, medians


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n-saes", type=int, default=10)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--activation", choices=["topk", "relu"], default="topk")
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.rows, options.repeats = 512, 4, 1
    model = saewb.load_model(options.model, device=options.device)
    layers = [i * model.cfg.n_layers // options.n_saes for i in range(options.n_saes)]
    k = 32 if options.activation == "topk" else None
    saes = {
        f"{i}": saewb.SAE(
            saewb.SAEConfig(
                model.cfg.d_model, options.d_sae, options.activation, k=k, hook=f"blocks.{layer}.hook_resid_post"
            ),
            seed=i,
        ).to(options.device)
        for i, layer in enumerate(layers)
    }
    if options.model == "tiny":
        saes["embedded"] = saewb.load_sae("tiny").to(options.device)
    texts = [document.text for document in saewb.tiny.held_out_texts()]
    tokens = saewb.data.tokens.token_rows(model, texts, 128)[: options.rows]
    calls = {
        "forward + encode + decode": lambda: _parts(model, list(saes.values()), tokens.to(options.device)),
        "evaluate_many": lambda: saewb.evaluate_many(model, saes, tokens, at_once=64, losses=False),
    }
    with torch.no_grad():
        took = medians(calls, options.repeats, options.device)
    title = f"evaluate {len(saes)} {options.activation} SAEs on {tokens.numel():,} tokens in one pass, {options.model}"
    Report(options).add(Table.made(title, took, "forward + encode + decode"))


def _parts(model, saes, tokens) -> None:
    for batch in tokens.split(8):
        seen = capture(model, batch, {sae.cfg.hook for sae in saes})
        for sae in saes:
            x = seen[sae.cfg.hook]
            sae.decode(sae.encode_topk(x) if sae.cfg.k is not None else sae.encode(x))


if __name__ == "__main__":
    main()
