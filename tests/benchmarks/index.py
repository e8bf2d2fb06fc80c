"""What indexing costs: `python tests/benchmarks/index.py [--model tiny|smollm2-135m] [--d-sae 4608] [--rows 64]`.

The pass of an index (model, encoding, gathering) against the model's own forward to the same layer in the same run,
how long a page of one latent takes to open, and what is kept; against sae-dashboard where it is installed. Prints
medians and ratios; passes or fails nothing. The first rows fill the index and cost most, so more rows give a lower
ratio: 64 of 128 tokens are the least to go by.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings

import torch

import saewb
from saewb.activations import capture
from saewb.index.build import _Build, _pass
from saewb.index.facts import IndexFacts
from saewb.index.gather import Gathering
from saewb.index.text import Text


def median_seconds(calls, rounds):
    """Of each call, the calls taken in turn so that a busy machine troubles all alike."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def dashboards(model, sae, ids):
    """sae-dashboard over the same features and tokens; needs an environment of its own."""
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    with tempfile.TemporaryDirectory() as folder:
        import sae_lens

        theirs = sae_lens.SAE.load_from_disk(saewb.save_sae(sae, f"{folder}/sae"))
    config = SaeVisConfig(hook_point=sae.cfg.hook, features=list(range(sae.cfg.d_sae)), minibatch_size_tokens=8)
    SaeVisRunner(config).run(encoder=theirs, model=model, tokens=ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--d-sae", type=int, default=0, help="of a random top-k SAE; 0: the embedded one, for tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = saewb.load_model(options.model, device="cpu")
    if options.model == "tiny" and not options.d_sae:
        sae = saewb.load_sae("tiny")
    else:
        d_in, layer = model.cfg.d_model, model.cfg.n_layers // 2
        cfg = saewb.SAEConfig(d_in, options.d_sae or 4608, gate="topk", k=32, hook=f"blocks.{layer}.hook_resid_post")
        sae = saewb.SAE(cfg)
    texts = [document.text for document in saewb.embedded.texts()]
    ids = saewb.pack(texts, model.tokenizer, 128)[: options.rows]

    def forward():
        with torch.no_grad():
            for part in ids.split(options.batch):
                capture(model, part, [sae.cfg.hook])

    def with_encoding():
        with torch.no_grad():
            for part in ids.split(options.batch):
                sae.encode_topk(capture(model, part, [sae.cfg.hook])[sae.cfg.hook])

    def gathering():
        facts = IndexFacts(
            sae.cfg.d_sae, 128, 20, 5, 4, 20, 10, 2**16, sae.cfg.k, 0, (0,), (), 0, "", "", sae.cfg.hook, ""
        )
        build = _Build(sae, facts, Gathering(facts.plan), None)
        _pass(model, [build], Text(ids, (0,), 0, options.batch, "cpu"), False, float("inf"))
        build.gathering.tensors()

    calls = {"forward to the layer": forward, "  and encode_topk": with_encoding, "the index's pass": gathering}
    if importlib.util.find_spec("sae_dashboard"):
        calls["sae-dashboard"] = lambda: dashboards(model, sae, ids)
    found = median_seconds(calls, options.rounds)
    n = ids.numel()
    print(f"{options.model}, {sae.cfg.d_sae} latents, {n:,} tokens, {torch.get_num_threads()} threads")
    for name, seconds in found.items():
        ratio = seconds / found["forward to the layer"]
        print(f"  {name:<24} {seconds:8.2f} s  {n / seconds:8.0f} tokens/s  {ratio:.2f} x forward")
    start = time.perf_counter()
    index = saewb.build_index(model, sae, ids)
    print(f"  {'whole, with weights':<24} {time.perf_counter() - start:8.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        start = time.perf_counter()
        opened = saewb.load_index(folder)
        print(f"  {'opening it':<24} {(time.perf_counter() - start) * 1e3:8.2f} ms")
        pages = median_seconds({str(i): lambda i=i: opened.latent(i) for i in range(0, len(opened), 97)}, 1)
        print(f"  {'a page':<24} {statistics.median(pages.values()) * 1e3:8.2f} ms (median of {len(pages)})")
    kept = sum(tensor.nbytes for tensor in index.tensors.values())
    print(f"  {'kept':<24} {kept / 2**20:8.1f} MiB (at most {index.facts.plan.nbytes / 2**20:.1f} gathered)")


if __name__ == "__main__":
    main()
