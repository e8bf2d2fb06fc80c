"""What statistics cost: `python tests/benchmarks/stats.py [--quick]`.

Superposition against the bare product of all directions with one another, correlation statistics against reading the
matrix once, sampling and random matrices; and all of it against sae-lens, in the same run, where that is installed.
Prints medians and ratios; passes or fails nothing.
"""

import argparse
import importlib.util
import resource
import statistics
import time
import warnings
from types import SimpleNamespace

import torch

from saewb.stats.coactivation import CoactivationStream
from saewb.stats.correlation import correlation_stats, random_correlation, random_low_rank_correlation
from saewb.stats.sampling import CorrelatedNormals
from saewb.stats.superposition import superposition

THEIRS = importlib.util.find_spec("sae_lens") is not None


def medians(calls, rounds):
    """Median seconds of each call, the calls taken in turn so that a busy machine troubles all alike."""
    times = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            if n == 0 and name.startswith("sae-lens") and rounds == 1:
                continue  # a minute: not for warming up
            start = time.perf_counter()
            call()
            if n:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title, found, limit):
    """A line per call, with how many times saewb's time and the limit's it takes."""
    print(f"\n{title}")
    ours = next(value for name, value in found.items() if name.startswith("saewb"))
    for name, seconds in found.items():
        ratios = f"{seconds / ours:7.2f} x saewb   {seconds / found[limit]:7.2f} x {limit}"
        print(f"  {name:<22} {seconds * 1e3:11.2f} ms   {ratios}")


def superposition_of(n, d, rounds):
    directions = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    product = torch.empty(256, n)

    def bare():
        for start in range(0, n, 256):
            torch.mm(directions[start : start + 256], directions.T, out=product[: min(256, n - start)])

    calls = {"bare product": bare, "saewb": lambda: superposition(directions)}
    if THEIRS:
        from sae_lens.synthetic.stats import compute_superposition_stats

        calls["sae-lens"] = lambda: compute_superposition_stats(SimpleNamespace(feature_vectors=directions))
    show(f"superposition, {n:,} directions in {d} dimensions", medians(calls, rounds), "bare product")


def dense_statistics(n, rounds):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).mul_(0.05).fill_diagonal_(1.0)
    calls = {"read once": matrix.sum, "saewb": lambda: correlation_stats(matrix)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    correlation_stats(matrix)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if THEIRS:
        from sae_lens.synthetic.stats import compute_correlation_matrix_stats

        calls["sae-lens"] = lambda: compute_correlation_matrix_stats(matrix)
    show(f"statistics of a dense matrix, {n:,}; {took // 1024} MB more memory", medians(calls, rounds), "read once")


def low_rank_statistics(n, rank, rounds):
    low = random_low_rank_correlation(n, rank, scale=0.05)
    calls = {"F^T F": lambda: low.factor.T @ low.factor, "saewb": lambda: correlation_stats(low)}
    if THEIRS:
        from sae_lens.synthetic.correlation import LowRankCorrelationMatrix
        from sae_lens.synthetic.stats import compute_low_rank_correlation_matrix_stats

        theirs = LowRankCorrelationMatrix(low.factor, low.diag)
        calls["sae-lens"] = lambda: compute_low_rank_correlation_matrix_stats(theirs)
    show(f"statistics of a low-rank matrix, {n:,}, rank {rank}", medians(calls, rounds), "F^T F")


def dense_sampling(n, samples, rounds):
    matrix = random_low_rank_correlation(n, 64, scale=0.06).dense()
    normals, p, rng = CorrelatedNormals(matrix), torch.full((n,), 0.005), torch.Generator().manual_seed(0)
    draw = torch.randn(samples, n)
    calls = {"product": lambda: draw @ normals._factor.T, "saewb": lambda: normals.fires(samples, p, rng).nonzero()}
    if THEIRS:
        from sae_lens.synthetic.activation_generator import ActivationGenerator

        generator = ActivationGenerator(n, p, correlation_matrix=matrix)
        calls["sae-lens"] = lambda: generator.sample(samples)
    show(f"{samples:,} samples with a dense matrix, {n:,}", medians(calls, rounds), "product")


def random_matrices(n, rounds):
    weak = {"min_strength": 0.0, "max_strength": 0.01}
    calls = {"torch.rand": lambda: torch.rand(n, n), "saewb": lambda: random_correlation(n, **weak)}
    low = {"torch.randn": lambda: torch.randn(n, 50), "saewb": lambda: random_low_rank_correlation(n, 50)}
    if THEIRS:
        from sae_lens.synthetic import correlation

        theirs = {f"{name}_correlation_strength": value for name, value in (("min", 0.0), ("max", 0.01))}
        calls["sae-lens"] = lambda: correlation.generate_random_correlation_matrix(n, seed=0, **theirs)
        low["sae-lens"] = lambda: correlation.generate_random_low_rank_correlation_matrix(n, 50, seed=0)
    show(f"a random dense matrix, {n:,}", medians(calls, rounds), "torch.rand")
    show(f"a random low-rank matrix, {n:,}, rank 50", medians(low, rounds), "torch.randn")


def coactivations(d_sae, l0, tokens):
    rng = torch.Generator().manual_seed(0)
    batch = torch.zeros(tokens, d_sae)
    batch.scatter_(1, torch.rand(tokens, d_sae, generator=rng).topk(l0).indices, 1.0)
    stream = CoactivationStream(d_sae)
    stream.update(batch)
    start = time.perf_counter()
    stream.update(batch)
    took = (time.perf_counter() - start) / tokens
    print(f"\nco-activation, {d_sae:,} latents, {l0} per token: {took * 1e6:.1f} microseconds per token")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, sae-lens {'yes' if THEIRS else 'not installed'}"
    )
    for n, rounds in [(1024, 1)] if quick else [(2048, 3), (8192, 3), (16_384, 1)]:
        superposition_of(n, 64 if quick else 576, rounds)
    for n in [1024] if quick else [4096, 16_384]:
        dense_statistics(n, 3)
    low_rank_statistics(4096 if quick else 65_536, 50, 5)
    dense_sampling(256 if quick else 4096, 1024, 1)
    for n in [256] if quick else [1024, 4096]:
        random_matrices(n, 1 if n > 2000 else 3)
    coactivations(1024 if quick else 16_384, 16 if quick else 50, 256 if quick else 1024)


if __name__ == "__main__":
    main()
