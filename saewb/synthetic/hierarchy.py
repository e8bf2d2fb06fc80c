"""Feature hierarchies: features that fire only where their parent fires, and mutually exclusive siblings.

Level by level, from the roots: firings of children whose parent does not fire are removed; then, among the exclusive
children of a node, one of the firing ones remains, each with equal probability.
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.sae.sparse import SparseLatents

Scaling = Literal["relative", "magnitude"]


@dataclass(frozen=True)
class Node:
    """Node of a feature tree: a feature and its children, or a group of children without a feature."""

    feature: int | None
    """The feature; None groups the children, and counts as firing where its parent fires."""
    children: tuple[Node, ...] = ()
    """Nodes that fire only where this one does."""
    exclusive: bool = False
    """Whether at most one of the children fires."""
    scales: bool = True
    """Whether the hierarchy's `scale_by_parent` applies to the children."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Node:
        """Build a tree from nested dictionaries: {"feature": 0, "exclusive": True, "children": [{"feature": 1}, ...]}.

        Raises:
            ValueError: for an unknown key.
        """
        if wrong := set(tree) - {"feature", "children", "exclusive", "scales"}:
            raise ValueError(explain(f"a node has {sorted(wrong)}.", want="feature, children, exclusive, scales"))
        feature = tree.get("feature")
        if feature is not None and type(feature) is not int:
            raise ValueError(explain(f"a node has feature={reprlib.repr(feature)}.", want="an index, or None"))
        children = tuple(cls.of(child) for child in tree.get("children", ()))
        return cls(feature, children, bool(tree.get("exclusive", False)), bool(tree.get("scales", True)))

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested dictionaries, which `Node.of` reads."""
        tree: dict[str, Any] = {"feature": self.feature}
        if self.children:
            tree |= {"exclusive": self.exclusive, "children": [child.to_dict() for child in self.children]}
        return tree if self.scales else tree | {"scales": False}


@dataclass(frozen=True, eq=False, repr=False)
class Hierarchy:
    """Trees of features: a feature fires only where its parent fires.

    Raises:
        ValueError: if a feature is in two places, an index is below 0, or exclusive children are fewer than two or have
            no features.

    Example:
        >>> trees = Hierarchy([Node(0, (Node(1), Node(2)), exclusive=True)])
        >>> both = SparseLatents.from_dense(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
        >>> trees.apply(both, torch.Generator().manual_seed(0)).dense().sum(1).tolist()
        [2.0, 0.0]
    """

    roots: Sequence[Node]
    """Roots of the trees. Features in no tree are unrestricted."""
    scale_by_parent: Scaling | None = None
    """Factor of the magnitude of each child: "relative" is its parent's magnitude divided by the parent's mean, as in
    SAELens; "magnitude" is its parent's magnitude; None is 1."""
    features: tuple[int, ...] = field(init=False)
    """All features of the trees, roots first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(self.roots))
        if self.scale_by_parent not in (None, *get_args(Scaling)):
            what = f"Hierarchy got scale_by_parent={self.scale_by_parent!r}."
            raise ValueError(explain(what, want="'relative', 'magnitude' or None", fix="scale_by_parent='relative'"))
        levels = _levels(self.roots)
        object.__setattr__(self, "features", tuple(feature for level in levels for feature in level.feature))
        earlier: set[int] = set()
        for feature in self.features:
            if feature in earlier or feature < 0:
                what = f"feature {feature} stands in two places." if feature in earlier else f"a feature is {feature}."
                raise ValueError(explain(what, want="each feature once, 0 or more: a feature has one parent"))
            earlier.add(feature)
        object.__setattr__(self, "_levels", levels)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(parent, child) for every feature that has a parent, the upper levels first.

        Example:
            >>> Hierarchy([Node(0, (Node(1), Node(None, (Node(2),))))]).pairs
            [(0, 1), (0, 2)]
        """
        levels = (zip(level.parent, level.feature, strict=True) for level in self._levels)
        return [(parent, child) for level in levels for parent, child in level if parent >= 0]

    @torch.no_grad()
    def apply(
        self,
        firings: SparseLatents,
        generator: torch.Generator,
        mean: float | Float[Tensor, " features"] | None = None,
    ) -> SparseLatents:
        """Remove the firings that the trees forbid.

        Args:
            firings: drawn without regard to the trees.
            generator: for the choice among siblings; on the device of `firings`.
            mean: mean magnitude of all features or of each, for `scale_by_parent="relative"`.

        Raises:
            ValueError: if the trees have features that `firings` lacks, or there is no `mean` to scale by.
        """
        if self.scale_by_parent == "relative" and mean is None:
            raise ValueError(
                explain("scale_by_parent='relative' without a mean.", fix="hierarchy.apply(..., mean=1.0)")
            )
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
            if self.scale_by_parent is not None:
                scales = fires & level.scales_of(n_features).to(key.device)[feature[child]]
                factor = act[parent]
                if self.scale_by_parent == "relative":
                    means = torch.as_tensor(mean, dtype=act.dtype, device=act.device).expand(n_features)
                    factor = factor / means[feature[parent]]
                act[child] = torch.where(scales, act[child] * factor, act[child])
            _exclude_siblings(mask, in_level, token, group_of[feature], generator)
        return SparseLatents(token[mask], feature[mask], act[mask], firings.shape)

    @torch.no_grad()
    def compensated(self, probability: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
        """Probabilities of independent draws with which features fire with `probability` after `apply`.

            free of siblings:    b_i = p_i / p_parent
            exclusive siblings:  b_i E[1 / (1 + others firing)] = p_i / p_parent,    solved for all of them together

        Args:
            probability: fraction of all samples on which each feature fires after `apply`.

        Raises:
            ValueError: if a child would fire more often than its parent, or exclusive siblings together more often.
        """
        p = probability.double().cpu().numpy()
        compensated = p.copy()
        for level in self._levels:
            siblings: dict[int, list[int]] = {}
            for feature, parent, group in zip(level.feature, level.parent, level.group, strict=True):
                p_parent = 1.0 if parent < 0 else p[parent]
                share = p[feature] / p_parent if p_parent > 0 else float(p[feature] > 0) * 2
                if share > 1 + 1e-6:
                    what = f"feature {feature} shall fire on {p[feature]:.4g} of samples, "
                    what += f"its parent {parent} on {p_parent:.4g}."
                    raise ValueError(explain(what, want="a child that fires less often than its parent"))
                compensated[feature] = min(share, 1.0)
                if group >= 0:
                    siblings.setdefault(group, []).append(feature)
            for features in siblings.values():
                compensated[features] = _before_exclusion(compensated[features], features)
        return torch.from_numpy(compensated).to(probability)

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
    scale_by_parent: Scaling | None = None,
    seed: int = 0,
) -> Hierarchy:
    """Random trees over features 0, 1, ...: all roots, then level by level, until no features are left.

    Args:
        n_features: how many there are; those in no tree are unrestricted.
        n_roots: number of trees.
        branching: fewest and most children of a node.
        depth: levels below the roots.
        exclusive_frac: fraction of nodes with two or more children whose children are exclusive, 0..1.
        scale_by_parent: as for Hierarchy.
        seed: of the draw.

    Returns:
        A Hierarchy.

    Raises:
        ValueError: for an argument out of its range.

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
    exclusive = {parent: len(below) > 1 and rng.random() < exclusive_frac for parent, below in children.items()}

    def node(feature: int) -> Node:
        below = tuple(map(node, children.get(feature, ())))
        return Node(feature, below, exclusive.get(feature, False))

    return Hierarchy(list(map(node, range(n_roots))), scale_by_parent)


# -- one level -------------------------------------------------------------------------------------------------------

_ELSEWHERE = -2  # as parent: the feature is not on this level


@dataclass(frozen=True)
class _Level:
    """Features of equal depth in the trees."""

    feature: list[int] = field(default_factory=list)
    """Features of the level."""
    parent: list[int] = field(default_factory=list)
    """Nearest ancestor that is a feature; -1: none."""
    group: list[int] = field(default_factory=list)
    """Index of the group of exclusive siblings; -1: none."""
    scaled: list[bool] = field(default_factory=list)
    """Whether the parent scales it."""

    def tables(self, n_features: int) -> tuple[Int[Tensor, " features"], Int[Tensor, " features"]]:
        """Parent and group by feature."""
        parent, group = torch.full((n_features,), _ELSEWHERE), torch.full((n_features,), -1)
        parent[self.feature], group[self.feature] = torch.tensor(self.parent), torch.tensor(self.group)
        return parent, group

    def scales_of(self, n_features: int) -> Bool[Tensor, " features"]:
        """Whether the parent scales it, by feature."""
        scaled = torch.zeros(n_features, dtype=torch.bool)
        scaled[self.feature] = torch.tensor(self.scaled, dtype=torch.bool)
        return scaled


def _levels(roots: Sequence[Node]) -> tuple[_Level, ...]:
    """Levels of the trees, roots first; within a level breadth first."""
    levels: dict[int, _Level] = defaultdict(_Level)
    n_groups, row = 0, [(root, -1, 0, -1, False) for root in roots]
    while row:
        below = []
        for node, parent, depth, group, scaled in row:
            _check_exclusive(node)
            if node.feature is not None:
                level = levels[depth]
                for values, value in zip(vars(level).values(), (node.feature, parent, group, scaled), strict=True):
                    values.append(value)
                parent, depth = node.feature, depth + 1
            n_groups += node.exclusive
            group = n_groups if node.exclusive else -1
            below += [(child, parent, depth, group, node.scales) for child in node.children]
        row = below
    return tuple(levels[depth] for depth in sorted(levels))


def _check_exclusive(node: Node) -> None:
    if node.exclusive and (len(node.children) < 2 or any(child.feature is None for child in node.children)):
        what = f"the children of {f'feature {node.feature}' if node.feature is not None else 'a group'} are exclusive: "
        raise ValueError(explain(what + f"{len(node.children)}.", want="two children or more, each with a feature"))


def _exclude_siblings(mask: Tensor, in_level: Tensor, token: Tensor, group: Tensor, generator: torch.Generator) -> None:
    """Keep one random firing of each token and group of exclusive siblings."""
    firing = in_level[mask[in_level] & (group[in_level] >= 0)]
    if len(firing) == 0:
        return
    family = token[firing] * (int(group.max()) + 1) + group[firing]
    # In random order, then by family: the first of each family is one of its firings at random.
    shuffled = torch.randperm(len(firing), generator=generator, device=firing.device)
    order = shuffled[family[shuffled].argsort(stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = family[order][1:] != family[order][:-1]
    mask[firing[order[~first]]] = False


def _before_exclusion(target: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Probabilities b with b_i E[1 / (1 + K_i)] = target_i, where K_i others fire, each with its b.

    E[1 / (1 + K)] = integral over t from 0 to 1 of prod_{j != i} (1 - b_j + b_j t): a polynomial, so that quadrature
    with half as many points as siblings is exact. Fixed-point iteration rises monotonically to the solution.
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
