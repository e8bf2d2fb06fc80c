"""Features that fire only where their parent fires; siblings that never fire together.

Level by level, from the roots: a child whose parent does not fire is silenced; then, among children of one node that
exclude each other, one of those that fire is kept, each with the same chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb.errors import explain
from saewb.synthetic.firing_patterns import Firings


@dataclass(frozen=True)
class Node:
    """A feature and what depends on it; or, without a feature, a group of features."""

    feature: int | None
    """None: only groups its children, and counts as firing where its own parent does."""
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
        found: dict[str, Any] = {"feature": self.feature}
        if self.children:
            found |= {"exclusive": self.exclusive, "children": [child.to_dict() for child in self.children]}
        return found


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
        >>> both = Firings.of(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
        >>> trees.apply(both, torch.Generator().manual_seed(0)).dense().sum(1).tolist()
        [2.0, 0.0]
    """

    roots: Sequence[Node]
    scale_by_parent: bool = False
    features: tuple[int, ...] = field(init=False)  # all that stand in it, roots first

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(self.roots))
        places = list(self._places())
        object.__setattr__(self, "features", tuple(place.feature for place in places))
        seen: set[int] = set()
        for feature in self.features:
            if feature in seen or feature < 0:
                what = f"feature {feature} stands in two places." if feature in seen else f"a feature is {feature}."
                raise ValueError(explain(what, want="each feature once, 0 or more: a feature has one parent"))
            seen.add(feature)
        object.__setattr__(self, "_levels", _levels(places))

    def _places(self) -> Iterator[_Place]:
        """Every feature, level by level, with its nearest ancestor that is one."""
        group, row = 0, [(root, -1, 0, -1) for root in self.roots]
        while row:
            below = []
            for node, parent, depth, own_group in row:
                if node.feature is not None:
                    yield _Place(node.feature, parent, depth, own_group)
                _check_exclusive(node)
                group += node.exclusive
                known = node.feature is not None
                for child in node.children:
                    below.append(
                        (child, node.feature if known else parent, depth + known, group if node.exclusive else -1)
                    )
            row = below

    @torch.no_grad()
    def apply(self, firings: Firings, generator: torch.Generator) -> Firings:
        """These firings, without those that the trees do not allow.

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
        kept = torch.ones_like(firings.samples, dtype=torch.bool)
        values, key = firings.values.clone(), firings.samples * n_features + firings.features
        for level in self._levels:
            parent, group = (table.to(key.device) for table in level.tables(n_features))
            mine = (parent[firings.features] != _ELSEWHERE).nonzero()[:, 0]
            above = parent[firings.features[mine]]
            gated = mine[above >= 0]
            at = torch.searchsorted(key, firings.samples[gated] * n_features + parent[firings.features[gated]])
            at = at.clamp_max(max(len(key) - 1, 0))
            there = (key[at] == firings.samples[gated] * n_features + parent[firings.features[gated]]) & kept[at]
            kept[gated] = there
            if self.scale_by_parent:
                values[gated] = torch.where(there, values[gated] * values[at], values[gated])
            _one_of_each(kept, mine, firings, group, generator)
        return firings.where(kept, values)

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
            for place in level.places:
                above = 1.0 if place.parent < 0 else p[place.parent]
                share = p[place.feature] / above if above > 0 else float(p[place.feature] > 0) * 2
                if share > 1 + 1e-6:
                    what = f"feature {place.feature} shall fire on {p[place.feature]:.4g} of samples, "
                    what += f"its parent {place.parent} on {above:.4g}."
                    raise ValueError(explain(what, want="a child that fires less often than its parent"))
                drawn[place.feature] = min(share, 1.0)
                if place.group >= 0:
                    siblings.setdefault(place.group, []).append(place.feature)
            for features in siblings.values():
                drawn[features] = _before_exclusion(drawn[features], features)
        return torch.from_numpy(drawn).to(probability)

    def __repr__(self) -> str:
        exclusive = sum(place.group >= 0 for level in self._levels for place in level.places)
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
class _Place:
    feature: int
    parent: int  # nearest ancestor that is a feature; -1: none
    depth: int  # features above it
    group: int  # of siblings that exclude one another; -1: none


@dataclass(frozen=True)
class _Level:
    places: tuple[_Place, ...]

    def tables(self, n_features: int) -> tuple[Int[Tensor, " features"], Int[Tensor, " features"]]:
        """Parent and group by feature."""
        parent = torch.full((n_features,), _ELSEWHERE)
        group = torch.full((n_features,), -1)
        features = torch.tensor([place.feature for place in self.places])
        parent[features] = torch.tensor([place.parent for place in self.places])
        group[features] = torch.tensor([place.group for place in self.places])
        return parent, group


def _levels(places: Sequence[_Place]) -> tuple[_Level, ...]:
    by_depth: dict[int, list[_Place]] = {}
    for place in places:
        by_depth.setdefault(place.depth, []).append(place)
    return tuple(_Level(tuple(by_depth[depth])) for depth in sorted(by_depth))


def _check_exclusive(node: Node) -> None:
    if node.exclusive and (len(node.children) < 2 or any(child.feature is None for child in node.children)):
        what = f"the children of {f'feature {node.feature}' if node.feature is not None else 'a group'} are exclusive: "
        raise ValueError(explain(what + f"{len(node.children)}.", want="two children or more, each with a feature"))


def _one_of_each(kept: Tensor, mine: Tensor, firings: Firings, group: Tensor, generator: torch.Generator) -> None:
    """Of the firings at `mine` that are kept, one at random for each sample and group."""
    some = mine[kept[mine] & (group[firings.features[mine]] >= 0)]
    if len(some) == 0:
        return
    place = firings.samples[some] * (int(group.max()) + 1) + group[firings.features[some]]
    # In random order, then by place: the first of each place is one of its firings at random.
    shuffled = torch.randperm(len(some), generator=generator, device=some.device)
    order = shuffled[place[shuffled].argsort(stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = place[order][1:] != place[order][:-1]
    kept[some[order[~first]]] = False


def _before_exclusion(wanted: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Probabilities b with b_i E[1 / (1 + K_i)] = wanted_i, K_i of the others firing, each with its b.

    E[1 / (1 + K)] = integral over t from 0 to 1 of prod_{j != i} (1 - b_j + b_j t): a polynomial, so that quadrature
    with half as many points as siblings is exact. Solved by fixed-point iteration, which rises to the answer.
    """
    if wanted.sum() > 1 + 1e-9:
        what = (
            f"exclusive siblings {list(features)} shall fire on {wanted.sum():.4g} of their parent's samples together."
        )
        raise ValueError(explain(what, want="1 at most"))
    points, weights = np.polynomial.legendre.leggauss(len(wanted) // 2 + 1)
    t, b = (points + 1) / 2, wanted.copy()
    for _ in range(10_000):
        factors = 1 - b[:, None] * (1 - t)
        others = np.stack([np.delete(factors, i, axis=0).prod(0) for i in range(len(b))])
        new = np.minimum(wanted / (others @ (weights / 2)), 1.0)
        if np.abs(new - b).max() < 1e-12:
            break
        b = new
    missing = np.abs(b * (others @ (weights / 2)) - wanted).max()
    if missing > 1e-6:
        what = f"no independent probabilities make exclusive siblings {list(features)} fire as often as asked "
        what += f"({wanted.sum():.4g} of their parent's samples together; off by {missing:.2g})."
        raise ValueError(explain(what, want="less together"))
    return b
