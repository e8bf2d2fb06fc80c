"""What statistics cost: `python -m tests.benchmarks.stats [--quick]`.

Superposition against the bare product of all directions with one another (torch's, and the quicker one saewb uses),
correlation statistics against reading the matrix once, sampling and random matrices; and all of it against sae-lens, in
the same run, where that is installed.
Prints medians and ratios; passes or fails nothing.
"""

import resource
import warnings
from types import SimpleNamespace

import torch

from saewb.kernels.precision import multiply_into
from saewb.sae.sparse import SparseLatents
from saewb.stats._entries import Sparse
from saewb.stats.coactivation import CoactivationStream
from saewb.stats.correlation import correlation_stats, random_correlation, random_low_rank_correlation
from saewb.stats.correlation_map import MatrixView, matrix_view
from saewb.stats.sampling import CorrelatedNormals
from saewb.stats.superposition import superposition

from .measure import Report, Row, Table, arguments, has, medians, seconds

THEIRS = has("sae_lens")


def table(title, calls, rounds):
    """Medians; a call of a minute is not warmed up."""
    took = medians(calls, rounds, warm=lambda name: rounds > 1 or not name.startswith("sae-lens"))
    return Table.made(title, took, "saewb")


def superposition_of(n, d, rounds):
    directions = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    product = torch.empty(256, n)

    def bare():
        for start in range(0, n, 256):
            torch.mm(directions[start : start + 256], directions.T, out=product[: min(256, n - start)])

    def quick():
        for start in range(0, n, 256):
            multiply_into(product[: min(256, n - start)], directions[start : start + 256], directions)

    calls = {"bare product": bare, "the one saewb uses": quick, "saewb": lambda: superposition(directions)}
    if THEIRS:
        from sae_lens.synthetic.stats import compute_superposition_stats

        calls["sae-lens"] = lambda: compute_superposition_stats(SimpleNamespace(feature_vectors=directions))
    return table(f"superposition, {n:,} directions in {d} dimensions", calls, rounds)


def dense_statistics(n, rounds):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).mul_(0.05).fill_diagonal_(1.0)
    calls = {"read once": matrix.sum, "saewb": lambda: correlation_stats(matrix)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    correlation_stats(matrix)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if THEIRS:
        from sae_lens.synthetic.stats import compute_correlation_matrix_stats

        calls["sae-lens"] = lambda: compute_correlation_matrix_stats(matrix)
    return table(f"statistics of a dense matrix, {n:,}; {took // 1024} MB more memory", calls, rounds)


def low_rank_statistics(n, rank, rounds):
    low = random_low_rank_correlation(n, rank, scale=0.05)
    calls = {"F^T F": lambda: low.factor.T @ low.factor, "saewb": lambda: correlation_stats(low)}
    if THEIRS:
        from sae_lens.synthetic.correlation import LowRankCorrelationMatrix
        from sae_lens.synthetic.stats import compute_low_rank_correlation_matrix_stats

        theirs = LowRankCorrelationMatrix(low.factor, low.diag)
        calls["sae-lens"] = lambda: compute_low_rank_correlation_matrix_stats(theirs)
    return table(f"statistics of a low-rank matrix, {n:,}, rank {rank}", calls, rounds)


def dense_sampling(n, samples, rounds):
    matrix = random_low_rank_correlation(n, 64, scale=0.06).dense()
    normals, p, rng = CorrelatedNormals(matrix), torch.full((n,), 0.005), torch.Generator().manual_seed(0)
    draw = torch.randn(samples, n)
    calls = {"product": lambda: draw @ normals._factor.T, "saewb": lambda: normals.fires(samples, p, rng).nonzero()}
    if THEIRS:
        from sae_lens.synthetic.activation_generator import ActivationGenerator

        generator = ActivationGenerator(n, p, correlation_matrix=matrix)
        calls["sae-lens"] = lambda: generator.sample(samples)
    return table(f"{samples:,} samples with a dense matrix, {n:,}", calls, rounds)


def random_matrices(n, rounds):
    weak = {"min_strength": 0.0, "max_strength": 0.01}
    calls = {"torch.rand": lambda: torch.rand(n, n), "saewb": lambda: random_correlation(n, **weak)}
    low = {"torch.randn": lambda: torch.randn(n, 50), "saewb": lambda: random_low_rank_correlation(n, 50)}
    if THEIRS:
        from sae_lens.synthetic import correlation

        theirs = {f"{name}_correlation_strength": value for name, value in (("min", 0.0), ("max", 0.01))}
        calls["sae-lens"] = lambda: correlation.generate_random_correlation_matrix(n, seed=0, **theirs)
        low["sae-lens"] = lambda: correlation.generate_random_low_rank_correlation_matrix(n, 50, seed=0)
    yield table(f"a random dense correlation matrix, {n:,}", calls, rounds)
    yield table(f"a random low-rank correlation matrix, {n:,}, rank 50", low, rounds)


def coactivations(d_sae, l0, tokens):
    rng = torch.Generator().manual_seed(0)
    batch = torch.zeros(tokens, d_sae)
    batch.scatter_(1, torch.rand(tokens, d_sae, generator=rng).topk(l0).indices, 1.0)
    stream = CoactivationStream(d_sae)
    stream.update(batch)
    took = seconds(lambda: stream.update(batch))
    title = f"co-activation, {d_sae:,} latents, {l0} on per token, {tokens:,} tokens"
    return Table(title, (Row("saewb", took, f"{took / tokens * 1e6:.1f} microseconds per token"),), "saewb")


def matrix_views(n, d, tokens, l0, rounds):
    """A window of a correlation map: exact entries, pooled cells, and the whole matrix as means."""
    rng = torch.Generator().manual_seed(0)
    acts = torch.rand(tokens, l0, generator=rng) + 0.1
    latents = torch.rand(tokens, n, generator=rng).topk(l0).indices
    views = {
        "low rank": matrix_view(random_low_rank_correlation(n, d, scale=0.05)),
        "sparse": MatrixView(Sparse.of(SparseLatents.from_topk(acts, latents, (tokens, n)), "correlation", 10)),
    }
    for name, view in views.items():
        order = torch.randperm(n, generator=rng)
        overview, side = view.overview(order), min(n, 384)
        calls = {
            f"{side} x {side} entries": lambda v=view, o=order, k=side: v.block(o[:k], o[-k:]),
            "a window of cells": lambda o=overview: o.view((0, n // 8, 0, n // 8), 384),
            "the whole as means": lambda o=overview: o.view((0, n, 0, n), 384, "mean"),
        }
        took = medians(calls, rounds)
        yield Table.made(f"correlation map, {name}, {n:,} features", took, "a window of cells")


def main() -> None:
    """Measure."""
    options = arguments(__doc__).parse_args()
    quick, report = options.quick, Report(options)
    warnings.simplefilter("ignore")
    for n, rounds in [(1024, 1)] if quick else [(2048, 3), (8192, 3), (16_384, 1)]:
        report.add(superposition_of(n, 64 if quick else 576, rounds))
    for n in [1024] if quick else [4096, 16_384]:
        report.add(dense_statistics(n, 3))
    report.add(low_rank_statistics(4096 if quick else 65_536, 50, 5))
    report.add(dense_sampling(256 if quick else 4096, 1024, 1))
    for n in [256] if quick else [1024, 4096]:
        for result in random_matrices(n, 1 if n > 2000 else 3):
            report.add(result)
    for result in matrix_views(*((1024, 16, 512, 8) if quick else (16_384, 64, 4096, 32)), 3):
        report.add(result)
    report.add(coactivations(1024 if quick else 16_384, 16 if quick else 50, 256 if quick else 1024))


if __name__ == "__main__":
    main()
