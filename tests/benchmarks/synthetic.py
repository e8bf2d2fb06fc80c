"""Synthetic data against sae-lens: python -m tests.benchmarks.synthetic [--quick].

Orthogonalizing a dictionary (with the |cosines| both reach), and sampling sparse independent features.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from saewb.synthetic import FeatureDictionary, Magnitudes, SyntheticData, orthogonalized

from .measure import Report, Table, arguments, has, medians, seconds


def orthogonalizing(n: int, d: int) -> Table:
    """Once each: the peer takes a minute."""
    start = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    calls = {"saewb": lambda: orthogonalized(start)}
    if has("sae_lens"):
        from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings

        calls["sae-lens"] = lambda: orthogonalize_embeddings(start.clone())
    took, notes = {}, {}
    for name, call in calls.items():
        made = []
        took[name] = seconds(lambda: made.append(call()))  # noqa: B023 (called in this turn of the loop)
        mean, largest = _cosines(made[0])
        notes[name] = f"mean abs. cosine {mean:.5f}, mean of the largest {largest:.4f}"
    return Table.made(f"orthogonalize {n:,} directions in {d} dimensions", took, "saewb", notes)


def sampling(n: int) -> Table:
    """1,024 samples of sparse features, as activations."""
    p = torch.full((n,), 0.005)
    directions = normalize(torch.randn(n, 576, generator=torch.Generator().manual_seed(0)), dim=1)
    data = SyntheticData(FeatureDictionary(directions, torch.zeros(576)), p, Magnitudes("rectified_normal", 1.0, 0.2))
    rng = torch.Generator().manual_seed(0)
    calls = {"saewb": lambda: data(1024, rng)}
    if has("sae_lens"):
        from sae_lens.synthetic.activation_generator import ActivationGenerator

        peer = ActivationGenerator(n, p, std_firing_magnitudes=0.2)
        calls["sae-lens"] = lambda: peer.sample(1024) @ directions
    return Table.made(f"1,024 samples of {n:,} independent features", medians(calls, 3), "saewb")


def _cosines(f) -> tuple[float, float]:
    cosines = (f @ f.T).abs().fill_diagonal_(0)
    return float(cosines.sum() / (len(f) * (len(f) - 1))), float(cosines.max(1).values.mean())


def main() -> None:
    """Measure."""
    options = arguments(__doc__).parse_args()
    report = Report(options)
    report.add(orthogonalizing(*((256, 64) if options.quick else (1024, 256))))
    for n in (1024,) if options.quick else (16_384, 65_536):
        report.add(sampling(n))


if __name__ == "__main__":
    main()
