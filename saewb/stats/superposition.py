"""How far directions crowd one another: cosines between all pairs of them, exactly, in bounded memory.

1. Directions are brought to length 1, once.
2. A tile of rows at a time is multiplied with all of them: the cosines of a few directions with every other.
3. Of each row the lowest order statistic that was asked for is selected and what is above it sorted, the nearest are
   looked up, and its cosines with later rows are counted, each pair once. Then the tile is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.stats._crowding import Superposition
from saewb.stats._tiles import Asked, Found, tiles

MAX_BYTES = 2**28


@torch.no_grad()
def superposition(
    directions: Float[Tensor, "n d"] | nn.Module,
    percentiles: Sequence[float | int] = (95, 99),
    *,
    neighbors: int = 5,
    bins: int = 200,
    max_bytes: int = MAX_BYTES,
) -> Superposition:
    """How much directions overlap, from the cosine of every pair: max 0 is orthogonal, 1 is one direction twice.

        cos[i, j] = u_i . u_j,    u = directions / ||directions||      (a direction of length 0 has cosine 0)

    Per direction over all others: the largest |cos|, percentiles of |cos| (interpolated linearly, as numpy does), the
    nearest others. Over all pairs, each once: mean |cos|, root mean square, histogram. Exact: no pair is left out or
    sampled, and products are in float32 (float64 if the directions are). In d dimensions the root mean square cannot
    be below sqrt((n - d) / (d (n - 1))), the Welch bound, which random directions nearly reach.

    Memory beyond the directions, a copy of them of length 1 and the result is at most `max_bytes`, whatever n: 262,144
    directions never take n * n. Time grows with n * n * d: for 16,384 directions in 576 dimensions it is about what
    `directions @ directions.T` takes on a CPU.

    Args:
        directions: one per row, of any length; or an SAE, of which the decoder's (`sae.W_dec`) are taken. The encoder's
            are `sae.W_enc.T`.
        percentiles: 0..100, of |cos| between a direction and all others.
        neighbors: how many nearest directions to report for each; fewer if there are not as many.
        bins: of the histogram over -1..1, equally wide; at most 1,000.
        max_bytes: of working memory.

    Returns:
        A Superposition, on the CPU: prints as a table, `to_frame()` for pandas.

    Raises:
        ValueError: for fewer than two directions, values that are not finite, or an argument out of its range.

    References:
        Elhage et al. 2022, "Toy models of superposition". Welch 1974 (bound).

    Example:
        >>> found = superposition(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]))
        >>> found.max_abs_cos.tolist(), found.nearest[:, 0].tolist(), round(found.mean_abs_cos, 6)
        ([1.0, 0.0, 1.0], [2, 0, 0], 0.333333)
    """
    unit = _unit(_matrix(directions))
    n = len(unit)
    asked = Asked(n, tuple(percentiles), min(neighbors, n - 1), bins)
    _check(asked, neighbors)
    found = Found.join(tiles(unit, asked, max_bytes), asked)
    return Superposition.of(found, asked, unit)


def _matrix(directions: Tensor | nn.Module) -> Tensor:
    found = getattr(directions, "W_dec", None) if isinstance(directions, nn.Module) else directions
    if not isinstance(found, Tensor):
        what = f"superposition got a {type(directions).__name__}."
        raise TypeError(explain(what, want="a tensor [n, d] or an SAE", fix="superposition(sae.W_dec)"))
    if found.ndim != 2 or found.shape[1] == 0:
        raise ValueError(explain(f"directions have shape {tuple(found.shape)}.", want="[n, d], one direction per row"))
    if len(found) < 2:
        # sae-lens' sentence, which code may look for
        what = f"Need at least 2 features to compute superposition stats, got {len(found)}."
        raise ValueError(explain(what, want="directions [n, d] with n >= 2"))
    return found.detach()


def _unit(directions: Tensor) -> Tensor:
    """Rows of length 1, or 0. Each is divided by its largest entry first, so that no length overflows or vanishes."""
    x = directions if directions.dtype == torch.float64 else directions.float()
    largest = x.abs().amax(1, keepdim=True)
    if not bool(largest.isfinite().all()):
        bad = (~largest[:, 0].isfinite()).nonzero()[:, 0].tolist()
        what = f"{len(bad)} of {len(x)} directions are not finite: {', '.join(map(str, bad[:5]))}."
        raise ValueError(explain(what, want="numbers"))
    x = x / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1))


def _check(asked: Asked, neighbors: int) -> None:
    if not all(0 <= p <= 100 for p in asked.percentiles):
        raise ValueError(explain(f"superposition got percentiles={asked.percentiles}.", want="numbers in 0..100"))
    if neighbors < 1:
        raise ValueError(explain(f"superposition got neighbors={neighbors}.", want="at least 1"))
    if not 1 <= asked.bins <= 1000:
        raise ValueError(explain(f"superposition got bins={asked.bins}.", want="1..1000"))
