"""Content hashes of SAEs and models: python -m tests.benchmarks.fingerprint [--quick] [--device cuda].

No target: the time is that of sha256 on this machine, on as many threads as torch has, and of copies from a GPU.
"""

from __future__ import annotations

import hashlib
import statistics

import torch

import saewb
from saewb.fingerprint import sae_digest, tensors_digest
from saewb.models.active import model_digest
from saewb.sae.sae import SAE, SAEConfig

from .measure import Report, Table, arguments, in_turn


def weights(device: str, d_in: int, d_sae: int) -> Table:
    """An SAE of random weights: hashed, looked at again, and the bare hash of one thread."""
    sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, hook="blocks.0.hook_resid_post")).to(device)
    tensors = sae.state_dict(keep_vars=True)
    raw = [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for t in tensors.values()]
    calls = {
        "saewb": lambda: sae_digest(sae),
        "saewb, looked at again": lambda: tensors_digest(tensors, reuse=True),
        "sha256 of the bytes": lambda: [hashlib.sha256(part).digest() for part in raw],
    }
    took = {name: statistics.median(times) for name, times in in_turn(calls, 3, device).items()}
    n_bytes = sum(part.nbytes for part in raw)
    notes = {name: f"{n_bytes / seconds / 1e9:.2f} GB/s" for name, seconds in took.items()}
    threads = f"{torch.get_num_threads()} threads"
    return Table.made(f"an SAE of {n_bytes / 1e6:,.0f} MB on {device}, {threads}", took, "saewb", notes)


def share_of_an_index(device: str) -> Table:
    """Both hashes of `build_index` beside the whole of it, on the bundled model."""
    model, sae = saewb.load_model("tiny", device=device), saewb.load_sae("tiny").to(device)
    texts = [document.text for document in saewb.tiny.held_out_texts()]
    calls = {
        "build_index": lambda: saewb.build_index(model, sae, texts[:100]),
        "hashes of model and SAE": lambda: (model_digest(model), sae_digest(sae)),
    }
    took = {name: statistics.median(times) for name, times in in_turn(calls, 3, device).items()}
    return Table.made("an index of the bundled SAE on 100 texts", took, "build_index")


def main() -> None:
    """Measure."""
    options = arguments(__doc__).parse_args()
    report = Report(options)
    report.add(weights(options.device, 512 if options.quick else 2304, 2048 if options.quick else 16384))
    report.add(share_of_an_index(options.device))


if __name__ == "__main__":
    main()
