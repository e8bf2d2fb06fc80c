"""Order features by correlation clusters, for any number of features.

1. Subspace iteration gives each feature coordinates along the leading eigenvectors of the matrix.
2. k-means by angle splits the features, recursively, into groups of at most 1,024; groups are ordered by a
   hierarchical clustering of their centers.
3. Within a group, features are ordered by average linkage of 1 - r, exactly.

Up to 1,024 features only step 3 is needed. Features without defined entries come last.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.stats._entries import Entries

_GROUP = 1024  # most features ordered exactly
_DIMENSIONS = 32
_ITERATIONS = 3  # of the subspace
_ROUNDS = 10  # of k-means
_SPLIT = 16  # clusters of one k-means


def by_clusters(entries: Entries, seed: int) -> Int[Tensor, " n"]:
    """Order the features of a symmetric matrix."""
    n = entries.shape[0]
    every = torch.arange(n, device=entries.device)
    defined = ~torch.cat([entries.block(part, part).diagonal().isnan() for part in every.split(256)])
    inside, outside = every[defined], every[~defined]
    if len(inside) <= _GROUP:
        return torch.cat([_link_group(entries, inside), outside]).cpu()
    rng = torch.Generator().manual_seed(seed)
    coordinates = leading(entries, min(_DIMENSIONS, n), rng)
    return torch.cat([*_split(entries, coordinates, inside, rng), outside]).cpu()


def leading(entries: Entries, k: int, rng: torch.Generator) -> Float[Tensor, "n k"]:
    """Coordinates along the k leading eigenvectors, scaled so that dot products approximate entries."""
    start = torch.randn(entries.shape[1], k, generator=rng).to(entries.device)
    basis = torch.linalg.qr(entries.matmul(start)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(entries.matmul(basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ entries.matmul(basis))
    return basis @ vectors * values.clamp(min=0).sqrt()


def _split(entries: Entries, coordinates: Tensor, group: Tensor, rng: torch.Generator) -> list[Tensor]:
    if len(group) <= _GROUP:
        return [_link_group(entries, group)]
    x = torch.nn.functional.normalize(coordinates[group], dim=1)
    label, centers = _k_means(x, min(_SPLIT, -(-len(group) // (_GROUP // 2))), rng)
    parts = [group[label == i] for i in _leaf_order(centers @ centers.T, optimal=True).tolist()]
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:  # all alike: any order will do
        parts = list(group[x[:, -1].argsort(stable=True)].split(_GROUP))
    return [group for part in parts for group in _split(entries, coordinates, part, rng)]


def _k_means(x: Float[Tensor, "n d"], k: int, rng: torch.Generator) -> tuple[Int[Tensor, " n"], Float[Tensor, "k d"]]:
    """Cluster labels and centers by angle, of rows of length 1."""
    centers = x[torch.randperm(len(x), generator=rng)[:k].to(x.device)]
    for _ in range(_ROUNDS):
        label = (x @ centers.T).argmax(1)
        centers = torch.nn.functional.normalize(torch.zeros_like(centers).index_add_(0, label, x), dim=1)
    return label, centers


def _link_group(entries: Entries, group: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
    return group[_leaf_order(entries.block(group, group)).to(group.device)]


def _leaf_order(similarity: Float[Tensor, "n n"], optimal: bool = False) -> Int[Tensor, " n"]:
    """Order by average linkage of distances 1 - r; undefined entries count as r = 0."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return torch.arange(len(similarity))
    r = similarity.cpu().double().nan_to_num(0).clamp(-1, 1)
    distance = squareform((1 - (r + r.T) / 2).fill_diagonal_(0).numpy(), checks=False)
    tree = linkage(distance, "average")
    return torch.from_numpy(leaves_list(optimal_leaf_ordering(tree, distance) if optimal else tree)).long()
