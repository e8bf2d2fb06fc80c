"""Time and memory of an attribution graph: python -m tests.benchmarks.attribution_graph [--model smollm2-135m]

Random transcoders at every layer (JumpReLU, about `--l0` active latents per token), a prompt of `--tokens` tokens, all
defaults: 7,500 latents ranked by influence. Prints wall time, CPU time and the process's peak memory; beside it those
of circuit-tracer on the same weights and prompt, in an environment of its own: the interpreter `--peer-python` (else of
SAEWB_CIRCUIT_TRACER), which is made if there is none, and `--no-peer` for none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import saewb

from .dashboard import language_model
from .environments import ROOT, default_folder, python_for
from .llama_files import write_llama
from .measure import Report, Row, Table, arguments, peak_mb


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


def circuit_tracer(python: str, model_name: str, coders: list[saewb.SAE], tokens: list[int], options) -> dict:
    """What the peer measured: seconds, peak memory, both scores."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_llama(folder, language_model(model_name))
        tensors = {f"{i}.{k}": t.detach().contiguous() for i, c in enumerate(coders) for k, t in c.tensors().items()}
        save_file(tensors, folder / "transcoders.safetensors")
        job = {"n_layers": len(coders), "tokens": tokens, "max_latents": options.max_latents}
        job |= {"batch_size": 256, "threads": torch.get_num_threads()}
        (folder / "job.json").write_text(json.dumps(job))
        del tensors
        command = [python, "-W", "ignore", "-m", "tests.benchmarks.attribution_graph_arm", place]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(f"circuit-tracer failed:\n{done.stderr[-2000:]}")
        return json.loads((folder / "theirs.json").read_text())


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny", choices=["tiny", "smollm2-135m"])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--l0", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--max-latents", type=int, default=7500)
    parser.add_argument("--peer-python", default=os.environ.get("SAEWB_CIRCUIT_TRACER"))
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.tokens, options.max_latents = 512, 12, 200
    model = saewb.load_model(options.model, device=options.device)
    coders = transcoders(model, options.d_sae, options.l0)
    prompt = model.to_tokens(saewb.tiny.held_out_texts()[1].text)[:, : options.tokens]
    wall, cpu = time.perf_counter(), time.process_time()
    # Every position has latents and errors but the first, as in circuit-tracer.
    graph = saewb.attribution_graph(model, prompt, coders, max_latents=options.max_latents, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_mb()
    begin = time.perf_counter()
    small = graph.pruned()
    pruned = time.perf_counter() - begin
    rows = graph.nodes[graph.nodes["kind"].isin(["latent", "target"])]
    sums = graph.edges.double().sum(1).numpy()[rows.index] + rows["constant"] + rows["left_out"]
    worst = float(((sums - rows["value"]).abs() / rows["value"].abs().clip(lower=1e-2)).max())
    print(f"{graph!r}, of {graph.n_active:,} active; pruned: {small!r}")
    print(f"sum of effects and constant, less the value: relative {worst:.1e} at most; {peak / 1000:.2f} GB")
    scores = f"replacement {graph.replacement_score:.4f}, completeness {graph.completeness:.4f}"
    table = [Row("saewb", wall, f"{peak / 1000:.2f} GB; {cpu:.0f} s CPU; {scores}"), Row("saewb, pruned", pruned)]
    if options.device == "cpu" and not options.no_peer:
        python = options.peer_python or str(python_for("circuit-tracer", default_folder()))
        tokens = prompt[0].tolist()
        del model, graph, small  # the peer has the memory
        theirs = circuit_tracer(python, options.model, coders, tokens, options)
        note = f"{theirs['peak_mb'] / 1000:.2f} GB; {theirs['cpu']:.0f} s CPU; replacement {theirs['replacement']:.4f}"
        note += f", completeness {theirs['completeness']:.4f}, {theirs['n_active']:,} active"
        table.append(Row(f"circuit-tracer {theirs['version']}", theirs["seconds"], note))
    work = f"{options.tokens} tokens, {len(coders)} transcoders of {options.d_sae}, {options.model}"
    Report(options).add(Table(f"attribution graph of {work}", tuple(table), "saewb"))


if __name__ == "__main__":
    main()
