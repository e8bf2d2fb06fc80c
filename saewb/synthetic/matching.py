"""Which latents found which features, from directions alone."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.errors import explain

_BLOCK = 2**24  # cosines held at a time


def mean_correlation_coefficient(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """How well two sets of directions agree: 1 is the same directions in any order and sign, 0 all orthogonal.

        mean over matched pairs of |cos(a_i, b_j)|,    each row used once, matched so that the sum is largest

    Random directions score about sqrt(2 log n / d) for large n, not 0. Time grows with the cube of the smaller number.

    Args:
        a: one set, of any lengths; rows of 0 agree with nothing.
        b: the other. The smaller set is matched whole.

    Returns:
        A mean of |cosines|, 0..1; unchanged when rows are scaled.

    Raises:
        ValueError: if a set is empty, or the widths differ.

    References:
        Hungarian matching (scipy's linear_sum_assignment); "MCC" of arXiv:2505.20254.

    Example:
        >>> round(mean_correlation_coefficient(torch.eye(3), -2 * torch.eye(3)[[2, 0, 1]]), 6)
        1.0
    """
    from scipy.optimize import linear_sum_assignment

    if min(len(a), len(b)) == 0 or a.shape[1] != b.shape[1]:
        raise ValueError(explain(f"got directions {tuple(a.shape)} and {tuple(b.shape)}.", want="[n, d] and [m, d]"))
    cosines = _abs_cosines(a, b).cpu().double().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean())


def best_matches(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """For each direction of `a` the nearest one of `b`: its row, and their |cosine|, 0..1; block by block.

    Many may have the same nearest one. Random directions have one too, at about sqrt(2 log m / d): compare with that.

    Args:
        a: one set of directions, of any lengths.
        b: the other set.

    Returns:
        For each row of `a`, the row number in `b`, and |cosine| with it.

    Example:
        >>> row, cosine = best_matches(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.eye(2))
        >>> row.tolist(), cosine.tolist()
        ([0, 1], [1.0, 1.0])
    """
    found = [_abs_cosines(block, b).max(1) for block in a.split(max(1, _BLOCK // max(len(b), 1)))]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def uniqueness(latents: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> float:
    """Fraction of latents that are not doubles: 1 if each is nearest to another feature, 1/n if all to the same.

        #{argmax_j |cos(latent_i, feature_j)| : i} / n

    Args:
        latents: directions to judge, of any lengths.
        features: the true directions, of any lengths.

    Returns:
        A fraction, 1/n..1; unchanged when rows are scaled by positive factors.

    Raises:
        ValueError: if a set is empty, or the widths differ.

    References:
        The uniqueness of sae-lens' synthetic evaluation.

    Example:
        >>> uniqueness(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.eye(2))
        0.5
    """
    if len(latents) == 0:
        raise ValueError(explain("uniqueness of no latents.", want="one or more"))
    return len(best_matches(latents, features)[0].unique()) / len(latents)


def best_ordering(latents: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """The order of latents in which those of feature 0 come first, then of feature 1, ...; the clearest within each.

    `latents[order]` against `features` shows a recovered dictionary as a diagonal.

    Args:
        latents: directions, of any lengths.
        features: the true directions, of any lengths.

    Returns:
        Row numbers of `latents`, each once.

    Example:
        >>> best_ordering(torch.eye(3)[[2, 0, 1]], torch.eye(3)).tolist()
        [1, 2, 0]
    """
    feature, cosine = best_matches(latents, features)
    by_cosine = cosine.argsort(descending=True, stable=True)
    return by_cosine[feature[by_cosine].argsort(stable=True)]


def ordered_cosines(
    latents: Float[Tensor, "n d"], features: Float[Tensor, "m d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n m"]]:
    """Latents in their best ordering, and the cosine of each with each feature, with its sign: row by row of the order.

    Args:
        latents: directions, of any lengths.
        features: the true directions, of any lengths.

    Returns:
        The order, row numbers of `latents`; and cosines in -1..1, row k those of `latents[order[k]]`.

    Example:
        >>> order, cosines = ordered_cosines(-torch.eye(2)[[1, 0]], torch.eye(2))
        >>> order.tolist(), cosines.tolist()
        ([1, 0], [[-1.0, 0.0], [0.0, -1.0]])
    """
    order = best_ordering(latents, features)
    return order, _cosines(latents[order], features)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b.to(a), dim=1).T


def _abs_cosines(a: Tensor, b: Tensor) -> Tensor:
    return _cosines(a, b).abs()
