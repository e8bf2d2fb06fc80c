"""Loading SAEs from disk: saewb's readers against the bare safetensors map, and sae-lens where it is installed.

Run:  python -m tests.benchmarks.loading [--quick]
Target: at most 10 ms beyond the map, and no copy: the process grows by less than a tenth of the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saewb.pretrained.formats import Provenance, read
from saewb.sae.sae import SAE, SAEConfig

from .measure import Report, Table, arguments, has, peak_mb, reset_peak, seconds

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
    return SAE.from_tensors(SAEConfig(d_in=d_in, d_sae=d_sae, activation="jumprelu"), tensors)


def timed(call: Callable[[], object], times: int) -> tuple[float, float]:
    """Median seconds of a call, and by how many MB the process' peak grew."""
    call()  # imports, and the file into the system's cache
    held, took = reset_peak(), []
    for _ in range(times):
        took.append(seconds(call))
    return median(took), peak_mb() - held


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    """What reads the folder, by name."""
    calls: dict[str, Callable[[], object]] = {
        "safetensors map": lambda: bare(folder),
        "saewb, SAELens layout": lambda: read(folder / "saelens"),
        "saewb, Gemma Scope 2 layout": lambda: read(folder / "gemma", Provenance()),
    }
    if has("sae_lens"):
        import sae_lens

        calls["sae-lens"] = lambda: sae_lens.SAE.load_from_disk(folder / "saelens")
    return calls


def main() -> None:
    """A table for each width."""
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    report, times = Report(options), 2 if options.quick else options.times
    for name, d_sae in [("1k", 1024)] if options.quick else WIDTHS.items():
        with tempfile.TemporaryDirectory() as place:
            calls = readers(write(Path(place) / "sae", d_sae))
            result = {reader: timed(call, times) for reader, call in calls.items()}
        title = f"load an SAE of {name} latents, {D_IN} wide, float32, from disk"
        notes = {reader: f"peak +{grew:.0f} MB" for reader, (_, grew) in result.items()}
        took = {reader: took for reader, (took, _) in result.items()}
        report.add(Table.made(title, took, "saewb, SAELens layout", notes))


if __name__ == "__main__":
    main()
