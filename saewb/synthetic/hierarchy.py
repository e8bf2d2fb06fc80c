"""Features that fire only where their parent fires; siblings that never fire together.

Level by level, from the roots: a child whose parent does not fire is silenced; then, among children of one node that
exclude each other, one of those that fire is kept, each with the same chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.sae.sparse import SparseLatents


@dataclass(frozen=True)
class Node:
    """A feature and what depends on it; or, without a feature, a group of features."""

    feature: int | None
    """The feature; None only groups the children, and counts as firing where its own parent does."""
    children: tuple[Node, ...] = ()
    """Nodes that fire only where this one does."""
    exclusive: bool = False
    """Whether at most one of the children fires."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Node:
        """From nested dictionaries: {"feature": 0, "exclusive": True, "children": [{"feature": 1}, ...]}.

        Raises:
            ValueError: for another key.
        """
        if wrong := set(tree) - {"feature", "children", "exclusive"}:
            raise ValueError(explain(f"a node has {sorted(wrong)}.", want="feature, children, exclusive"))
        children = tuple(cls.of(child) for child in tree.get("children", ()))
        return cls(tree.get("feature"), children, bool(tree.get("exclusive", False)))

    def to_dict(self) -> dict[str, Any]:
        """The dictionaries that `Node.of` reads."""
        tree: dict[str, Any] = {"feature": self.feature}
        if self.children:
            tree |= {"exclusive": self.exclusive, "children": [child.to_dict() for child in self.children]}
        return tree


@dataclass(frozen=True, eq=False, repr=False)
class Hierarchy:
    """Trees of features: one fires only where its parent does.

    Args:
        roots: the trees. Features in none of them are free.
        scale_by_parent: multiply the value of each child with that of its parent.

    Raises:
        ValueError: if a feature stands in two places, an index is below 0, or exclusive children are fewer than two or
            have no features.

    Example:
        >>> trees = Hierarchy([Node(0, (Node(1), Node(2)), exclusive=True)])
        >>> both = SparseLatents.from_dense(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
        >>> trees.apply(both, torch.Generator().manual_seed(0)).dense().sum(1).tolist()
        [2.0, 0.0]
    """

    roots: Sequence[Node]
    scale_by_parent: bool = False
    features: tuple[int, ...] = field(init=False)
    """All features of the trees, roots first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(self.roots))
        levels = _levels(self.roots)
        object.__setattr__(self, "features", tuple(feature for level in levels for feature in level.feature))
        earlier: set[int] = set()
        for feature in self.features:
            if feature in earlier or feature < 0:
                what = f"feature {feature} stands in two places." if feature in earlier else f"a feature is {feature}."
                raise ValueError(explain(what, want="each feature once, 0 or more: a feature has one parent"))
            earlier.add(feature)
        object.__setattr__(self, "_levels", levels)

    @torch.no_grad()
    def apply(self, firings: SparseLatents, generator: torch.Generator) -> SparseLatents:
        """Remove the firings that the trees do not allow.

        Args:
            firings: drawn as if there were no trees.
            generator: for the choice among siblings; on their device.

        Raises:
            ValueError: if the trees have features that `firings` has not.
        """
        n_features = firings.shape[1]
        if self.features and max(self.features) >= n_features:
            what = f"the hierarchy has feature {max(self.features)}, the data {n_features} features."
            raise ValueError(explain(what, want=f"features 0..{n_features - 1}"))
        token, feature, act = firings.token, firings.latent, firings.act.clone()
        mask, key = torch.ones_like(token, dtype=torch.bool), token * n_features + feature
        for level in self._levels:
            parent_of, group_of = (table.to(key.device) for table in level.tables(n_features))
            in_level = (parent_of[feature] != _ELSEWHERE).nonzero()[:, 0]
            child = in_level[parent_of[feature[in_level]] >= 0]
            parent_key = token[child] * n_features + parent_of[feature[child]]
            parent = torch.searchsorted(key, parent_key).clamp_max(max(len(key) - 1, 0))
            fires = (key[parent] == parent_key) & mask[parent]
            mask[child] = fires
            if self.scale_by_parent:
                act[child] = torch.where(fires, act[child] * act[parent], act[child])
            _exclude_siblings(mask, in_level, token, group_of[feature], generator)
        return SparseLatents(token[mask], feature[mask], act[mask], firings.shape)

    @torch.no_grad()
    def compensated(self, probability: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
        """What to draw each feature with, independently, so that after `apply` it fires with `probability`.

            free of siblings:    b_i = p_i / p_parent
            exclusive siblings:  b_i E[1 / (1 + others firing)] = p_i / p_parent,    solved for all of them together

        Args:
            probability: how often each feature shall fire, over all samples.

        Raises:
            ValueError: if a child shall fire more often than its parent, or exclusive siblings together more often.
        """
        p = probability.double().cpu().numpy()
        drawn = p.copy()
        for level in self._levels:
            siblings: dict[int, list[int]] = {}
            for feature, parent, group in zip(level.feature, level.parent, level.group, strict=True):
                p_parent = 1.0 if parent < 0 else p[parent]
                share = p[feature] / p_parent if p_parent > 0 else float(p[feature] > 0) * 2
                if share > 1 + 1e-6:
                    what = f"feature {feature} shall fire on {p[feature]:.4g} of samples, "
                    what += f"its parent {parent} on {p_parent:.4g}."
                    raise ValueError(explain(what, want="a child that fires less often than its parent"))
                drawn[feature] = min(share, 1.0)
                if group >= 0:
                    siblings.setdefault(group, []).append(feature)
            for features in siblings.values():
                drawn[features] = _before_exclusion(drawn[features], features)
        return torch.from_numpy(drawn).to(probability)

    def __repr__(self) -> str:
        exclusive = sum(group >= 0 for level in self._levels for group in level.group)
        return f"Hierarchy({len(self.features)} features in {len(self.roots)} trees, {exclusive} of them exclusive)"


def random_hierarchy(
    n_features: int,
    n_roots: int,
    *,
    branching: tuple[int, int] = (2, 4),
    depth: int = 2,
    exclusive_frac: float = 0.5,
    scale_by_parent: bool = False,
    seed: int = 0,
) -> Hierarchy:
    """Random trees over features 0, 1, ...: roots first, then their children, then theirs, until features run out.

    Args:
        n_features: how many there are; those left over stay free.
        n_roots: number of trees.
        branching: fewest and most children of a node.
        depth: levels below the roots.
        exclusive_frac: of nodes with two children or more, how many have exclusive ones, 0..1.
        scale_by_parent: as for Hierarchy.
        seed: of the draw.

    Returns:
        A Hierarchy.

    Raises:
        ValueError: for arguments that make no trees.

    Example:
        >>> random_hierarchy(100, 5, branching=(3, 3), exclusive_frac=1.0)
        Hierarchy(65 features in 5 trees, 60 of them exclusive)
    """
    low, high = branching
    if not (1 <= n_roots <= n_features and 1 <= low <= high and depth >= 0 and 0 <= exclusive_frac <= 1):
        what = f"random_hierarchy got {n_features} features, {n_roots} roots, branching {branching}, depth {depth}."
        raise ValueError(explain(what, want="1 <= roots <= features, 1 <= fewest <= most, depth and fractions >= 0"))
    rng = np.random.default_rng(seed)
    children: dict[int, list[int]] = {}
    row, free = list(range(n_roots)), n_roots
    for _ in range(depth):
        below = []
        for parent in row:
            n = int(rng.integers(low, high + 1))
            if free + n > n_features:
                break
            children[parent] = list(range(free, free + n))
            below += children[parent]
            free += n
        row = below
    exclusive = {parent: len(some) > 1 and rng.random() < exclusive_frac for parent, some in children.items()}

    def node(feature: int) -> Node:
        below = tuple(map(node, children.get(feature, ())))
        return Node(feature, below, exclusive.get(feature, False))

    return Hierarchy(list(map(node, range(n_roots))), scale_by_parent)


# -- one level -------------------------------------------------------------------------------------------------------

_ELSEWHERE = -2  # as parent: the feature is not on this level


@dataclass(frozen=True)
class _Level:
    """Features with equally many features above them."""

    feature: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    """Nearest ancestor that is a feature; -1: none."""
    group: list[int] = field(default_factory=list)
    """Number of the group of siblings that exclude one another; -1: none."""

    def tables(self, n_features: int) -> tuple[Int[Tensor, " features"], Int[Tensor, " features"]]:
        """Parent and group by feature."""
        parent, group = torch.full((n_features,), _ELSEWHERE), torch.full((n_features,), -1)
        parent[self.feature], group[self.feature] = torch.tensor(self.parent), torch.tensor(self.group)
        return parent, group


def _levels(roots: Sequence[Node]) -> tuple[_Level, ...]:
    """Levels of the trees, roots first; within a level breadth first."""
    levels: dict[int, _Level] = {}
    n_groups, row = 0, [(root, -1, 0, -1) for root in roots]
    while row:
        below = []
        for node, parent, depth, group in row:
            _check_exclusive(node)
            if node.feature is not None:
                level = levels.setdefault(depth, _Level())
                for values, value in zip(vars(level).values(), (node.feature, parent, group), strict=True):
                    values.append(value)
                parent, depth = node.feature, depth + 1
            n_groups += node.exclusive
            below += [(child, parent, depth, n_groups if node.exclusive else -1) for child in node.children]
        row = below
    return tuple(levels[depth] for depth in sorted(levels))


def _check_exclusive(node: Node) -> None:
    if node.exclusive and (len(node.children) < 2 or any(child.feature is None for child in node.children)):
        what = f"the children of {f'feature {node.feature}' if node.feature is not None else 'a group'} are exclusive: "
        raise ValueError(explain(what + f"{len(node.children)}.", want="two children or more, each with a feature"))


def _exclude_siblings(mask: Tensor, in_level: Tensor, token: Tensor, group: Tensor, generator: torch.Generator) -> None:
    """Keep one random firing of each token and group of exclusive siblings."""
    some = in_level[mask[in_level] & (group[in_level] >= 0)]
    if len(some) == 0:
        return
    family = token[some] * (int(group.max()) + 1) + group[some]
    # In random order, then by family: the first of each family is one of its firings at random.
    shuffled = torch.randperm(len(some), generator=generator, device=some.device)
    order = shuffled[family[shuffled].argsort(stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = family[order][1:] != family[order][:-1]
    mask[some[order[~first]]] = False


def _before_exclusion(target: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Probabilities b with b_i E[1 / (1 + K_i)] = target_i, K_i of the others firing, each with its b.

    E[1 / (1 + K)] = integral over t from 0 to 1 of prod_{j != i} (1 - b_j + b_j t): a polynomial, so that quadrature
    with half as many points as siblings is exact. Solved by fixed-point iteration, which rises to the answer.
    """
    if target.sum() > 1 + 1e-9:
        what = (
            f"exclusive siblings {list(features)} shall fire on {target.sum():.4g} of their parent's samples together."
        )
        raise ValueError(explain(what, want="1 at most"))
    points, weights = np.polynomial.legendre.leggauss(len(target) // 2 + 1)
    t, b = (points + 1) / 2, target.copy()
    for _ in range(10_000):
        factors = 1 - b[:, None] * (1 - t)
        others = np.stack([np.delete(factors, i, axis=0).prod(0) for i in range(len(b))])
        new = np.minimum(target / (others @ (weights / 2)), 1.0)
        if np.abs(new - b).max() < 1e-12:
            break
        b = new
    missing = np.abs(b * (others @ (weights / 2)) - target).max()
    if missing > 1e-6:
        what = f"no independent probabilities make exclusive siblings {list(features)} fire as often as asked "
        what += f"({target.sum():.4g} of their parent's samples together; off by {missing:.2g})."
        raise ValueError(explain(what, want="less together"))
    return b
