"""Time and memory of an attribution graph: python -m tests.benchmarks.attribution_graph [--model smollm2-135m]

Random transcoders at every layer (JumpReLU, about `--l0` active latents per token), a prompt of `--tokens` tokens, all
defaults: 7,500 latents ranked by influence. Prints wall time, CPU time, and the process's peak memory.
"""

from __future__ import annotations

import time

import torch

import saewb

from .measure import Report, Table, arguments, peak_mb


def transcoders(model, d_sae: int, l0: int) -> list[saewb.SAE]:
    """Random ones, with thresholds at which about `l0` latents of each are active per token."""
    d, result = model.cfg.d_model, []
    tokens = model.to_tokens(saewb.tiny.held_out_texts()[0].text)[:, :64]
    for i in range(model.cfg.n_layers):
        cfg = saewb.SAEConfig(d, d_sae, "jumprelu", hook=f"blocks.{i}.mlp.hook_in", hook_out=f"blocks.{i}.hook_mlp_out")
        sae = saewb.SAE(cfg, seed=i)
        with torch.no_grad():
            x = saewb.models.capture.capture(model, tokens, [cfg.hook])[cfg.hook][0, 1:]
            pre = x.float() @ sae.W_enc + sae.b_enc
            sae.threshold.fill_(float(pre.flatten().topk(l0 * len(x)).values[-1]))
            sae.W_dec.mul_(0.1)
        result.append(sae.to(next(model.parameters()).device))
    return result


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--l0", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--max-latents", type=int, default=7500)
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.tokens, options.max_latents = 512, 12, 200
    model = saewb.load_model(options.model, device=options.device)
    coders = transcoders(model, options.d_sae, options.l0)
    prompt = model.to_tokens(saewb.tiny.held_out_texts()[1].text)[:, : options.tokens]
    wall, cpu = time.perf_counter(), time.process_time()
    graph = saewb.attribution_graph(model, prompt, coders, max_latents=options.max_latents, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    begin = time.perf_counter()
    small = graph.pruned()
    pruned = time.perf_counter() - begin
    rows = graph.nodes[graph.nodes["kind"].isin(["latent", "target"])]
    sums = graph.edges.double().sum(1).numpy()[rows.index] + rows["constant"] + rows["left_out"]
    worst = float(((sums - rows["value"]).abs() / rows["value"].abs().clip(lower=1e-2)).max())
    print(f"{graph!r}, of {graph.n_active:,} active; pruned: {small!r}")
    print(f"sum of effects and constant, less the value: relative {worst:.1e} at most; {peak_mb() / 1000:.2f} GB")
    work = f"{options.tokens} tokens, {len(coders)} transcoders of {options.d_sae}, {options.model}"
    took = {"attribution_graph, wall": wall, "attribution_graph, CPU": cpu, "pruned": pruned}
    notes = {"attribution_graph, wall": f"{peak_mb() / 1000:.2f} GB"}
    Report(options).add(Table.made(f"attribution graph of {work}", took, "attribution_graph, wall", notes))


if __name__ == "__main__":
    main()
