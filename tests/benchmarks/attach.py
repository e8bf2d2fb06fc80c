"""What attaching costs: `python tests/benchmarks/attach.py [--model tiny|smollm2-135m]`.

Entering and leaving, with no forward pass, and the forward pass with ten top-k SAEs, against the bare forward pass of
the same run; and against sae-lens where it is installed. Prints medians and ratios; passes or fails
nothing.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings

import torch

import saewb


def medians(calls, rounds):
    """Median milliseconds of each call, the calls taken in turn so that a busy machine troubles all alike."""
    times = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if n:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def saes_for(model, n):
    """`n` random top-k SAEs, 8 times as wide as the model, spread over its layers."""
    d_in = model.cfg.d_model
    places = [f"blocks.{i}.{p}" for i in range(model.cfg.n_layers) for p in ("hook_resid_post", "hook_mlp_out")]
    chosen = [places[round(i * (len(places) - 1) / max(1, n - 1))] for i in range(n)]
    config = {"d_in": d_in, "d_sae": 8 * d_in, "gate": "topk", "k": 32}
    return [saewb.SAE(saewb.SAEConfig(hook=hook, **config), seed=i) for i, hook in enumerate(dict.fromkeys(chosen))]


def peer_saes(saes):
    """The same ones in sae-lens."""
    import sae_lens

    with tempfile.TemporaryDirectory() as folder:
        return [sae_lens.SAE.load_from_disk(saewb.save_sae(sae, f"{folder}/{i}")) for i, sae in enumerate(saes)]


def peer_model(name):
    """Another Bridge on the same weights, of the class that sae-lens attaches to."""
    import sae_lens

    model = saewb.load_model(name, device="cpu")
    model.__class__ = sae_lens.SAETransformerBridge  # as the peer's own boot_transformers does
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = saewb.load_model(options.model, device="cpu")
    tokens = torch.randint(5, 2000, (4, 128), generator=torch.Generator().manual_seed(0))
    ten = saes_for(model, 8 if options.model == "tiny" else 10)

    def enter_and_leave(saes):
        saewb.attach(model, saes).detach()

    def forward(**how):
        with torch.no_grad(), saewb.attach(model, ten, **how):
            model(tokens)

    def bare():
        with torch.no_grad():
            model(tokens)

    enter = {"saewb, 1 SAE": lambda: enter_and_leave(ten[:1]), f"saewb, {len(ten)} SAEs": lambda: enter_and_leave(ten)}
    passes = {"bare": bare, f"saewb, {len(ten)} SAEs": forward, "  with error term": lambda: forward(error_term=True)}
    if importlib.util.find_spec("sae_lens"):
        theirs, their_ten = peer_model(options.model), peer_saes(ten)

        def peer_enter(saes):
            with theirs.saes(saes=saes):
                pass

        def peer_forward(error_term):
            with torch.no_grad():
                theirs.run_with_saes(tokens, saes=their_ten, use_error_term=error_term)

        enter |= {
            "sae-lens, 1 SAE": lambda: peer_enter(their_ten[:1]),
            f"sae-lens, {len(ten)} SAEs": lambda: peer_enter(their_ten),
        }
        passes |= {
            f"sae-lens, {len(ten)} SAEs": lambda: peer_forward(False),
            "  sae-lens, error term": lambda: peer_forward(True),
        }

    print(f"{options.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\nentering and leaving, no forward pass")
    for name, ms in medians(enter, 200).items():
        print(f"  {name:<24} {ms:9.3f} ms")
    found = medians(passes, options.rounds)
    print("\none forward pass of 4 x 128 tokens")
    for name, ms in found.items():
        print(f"  {name:<24} {ms:9.1f} ms   {ms / found['bare']:.2f} x bare")


if __name__ == "__main__":
    main()
