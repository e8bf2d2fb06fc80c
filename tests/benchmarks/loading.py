"""Loading SAEs from disk: saewb's readers against the bare safetensors map, and sae-lens where it is installed.

Run:  python tests/benchmarks/loading.py [--small]
Target: at most 10 ms beyond the map, and no copy: the process grows by less than a tenth of the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saewb.formats import Facts, read
from saewb.sae import SAE, SAEConfig

D_IN = 2304
WIDTHS = {"4k": 4096, "16k": 16384, "65k": 65536}


def write(folder: Path, d_sae: int) -> Path:
    """A JumpReLU SAE of random weights as SAELens has it, and as Gemma Scope 2 has it."""
    rng = torch.Generator().manual_seed(0)
    w = {"W_enc": torch.randn(D_IN, d_sae, generator=rng), "W_dec": torch.randn(d_sae, D_IN, generator=rng)}
    w |= {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(D_IN), "threshold": torch.ones(d_sae)}
    theirs, gemma = folder / "saelens", folder / "gemma"
    theirs.mkdir(parents=True)
    gemma.mkdir()
    cfg = {"d_in": D_IN, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
    cfg |= {"normalize_activations": "none", "reshape_activations": "none", "architecture": "jumprelu"}
    cfg |= {"metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.20.hook_resid_post"}}
    (theirs / "cfg.json").write_text(json.dumps(cfg))
    save_file(w, theirs / "sae_weights.safetensors")
    save_file({name.lower(): tensor for name, tensor in w.items()}, gemma / "params.safetensors")
    return folder


def bare(folder: Path) -> SAE:
    """The least there is to do: map the tensors, and call them an SAE."""
    with safe_open(folder / "saelens" / "sae_weights.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    d_in, d_sae = tensors["W_enc"].shape
    return SAE.from_tensors(SAEConfig(d_in=d_in, d_sae=d_sae, gate="jumprelu"), tensors)


def timed(call: Callable[[], object], times: int) -> tuple[float, float]:
    """Median milliseconds of a call, and by how many MB the process' peak grew."""
    call()  # imports, and the file into the system's cache
    before, took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(times):
        start = time.perf_counter()
        made = call()
        took.append((time.perf_counter() - start) * 1000)
        del made
    return median(took), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="4k latents only")
    parser.add_argument("--times", type=int, default=7)
    chosen = parser.parse_args()
    print(f"{'':6} {'reader':24} {'ms':>9} {'beyond the map':>15} {'peak grew, MB':>14}   (file {D_IN} wide, float32)")
    for name, d_sae in WIDTHS.items() if not chosen.small else [("4k", 4096)]:
        with tempfile.TemporaryDirectory() as place:
            folder = write(Path(place) / "sae", d_sae)
            calls = {
                "safetensors map": lambda: bare(folder),  # noqa: B023 (called in this turn of the loop)
                "saewb, SAELens": lambda: read(folder / "saelens"),  # noqa: B023
                "saewb, Gemma Scope 2": lambda: read(folder / "gemma", Facts()),  # noqa: B023
            }
            try:
                import sae_lens

                calls["sae-lens"] = lambda: sae_lens.SAE.load_from_disk(folder / "saelens")  # noqa: B023
            except ImportError:
                print("sae-lens is not installed here", file=sys.stderr)
            base = None
            for reader, call in calls.items():
                took, grew = timed(call, chosen.times)
                base = took if base is None else base
                print(f"{name:6} {reader:24} {took:9.2f} {took - base:15.2f} {grew:14.0f}")


if __name__ == "__main__":
    main()
