"""Synthetic data against sae-lens: python tests/benchmarks/synthetic.py [--quick], in the environment that has it.

Prints, from one run: orthogonalising a dictionary (with the |cosines| both reach), and samples per second of sparse
independent features; medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import normalize

from saewb.synthetic import FeatureDictionary, Magnitudes, SyntheticData, orthogonalized


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    from sae_lens.synthetic.activation_generator import ActivationGenerator
    from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings

    n, d = (256, 64) if options.quick else (1024, 256)
    start = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    ours, took = _timed(lambda: orthogonalized(start))
    theirs, their_time = _timed(lambda: orthogonalize_embeddings(start.clone()))
    print(f"orthogonalise {n} x {d}: saewb {took:.3f} s, sae-lens {their_time:.2f} s, ratio {their_time / took:.0f}")
    for name, found in (("saewb", ours), ("sae-lens", theirs)):
        mean, largest = _cosines(found)
        print(f"  {name}: mean |cos| {mean:.5f}, mean of largest |cos| {largest:.4f}")

    for n in (1024,) if options.quick else (16384, 65536):
        p = torch.full((n,), 0.005)
        directions = normalize(torch.randn(n, 576, generator=torch.Generator().manual_seed(0)), dim=1)
        dictionary = FeatureDictionary(directions, torch.zeros(576))
        data = SyntheticData(dictionary, p, Magnitudes("rectified_normal", 1.0, 0.2))
        peer = ActivationGenerator(n, p, std_firing_magnitudes=0.2)
        rng = torch.Generator().manual_seed(0)
        pairs = [
            (_timed(lambda: data(1024, rng))[1], _timed(lambda: peer.sample(1024) @ directions)[1])  # noqa: B023
            for _ in range(4)
        ][1:]
        ratio = statistics.median(b / a for a, b in pairs)
        mine, other = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
        print(f"1024 samples of {n} features: saewb {mine:.0f} ms, sae-lens {other:.0f} ms, ratio {ratio:.1f}")


def _cosines(f) -> tuple[float, float]:
    cosines = (f @ f.T).abs().fill_diagonal_(0)
    return float(cosines.sum() / (len(f) * (len(f) - 1))), float(cosines.max(1).values.mean())


def _timed(work):
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


if __name__ == "__main__":
    main()
