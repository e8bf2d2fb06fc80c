"""A meta-SAE: how far few directions explain the decoder of an SAE, beside a random matrix with rows of its lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from saewb.data.stream import stream_tensors
from saewb.errors import explain, near
from saewb.metrics import float64
from saewb.sae.base import SparseCoder
from saewb.sae.sae import SAE
from saewb.stats.intervals import normal_interval
from saewb.training.objectives.topk import BatchTopK
from saewb.training.train import train

if TYPE_CHECKING:
    import pandas as pd

Like = Literal["saebench"]
HELD_OUT = 0.1
"""Share of the rows that a meta-SAE is not trained on, by default."""


@dataclass(frozen=True, eq=False, repr=False)
class MetaSAE:
    """Result of `meta_sae`: `to_frame()` has a row for the decoder and one for the control."""

    sae: SAE
    """The meta-SAE of the decoder: its rows are meta-latents."""
    table: pd.DataFrame
    """The rows of `to_frame`."""

    def to_frame(self) -> pd.DataFrame:
        """A row for "decoder" and "random", the control: a matrix of random directions with rows of the same lengths.

        Columns: explained_variance (on rows that were not trained on), se, low, high (95 %), n (of those rows),
        explained_variance_train, n_train, l0 (meta-latents per row), width, k.
        """
        return self.table.copy()

    def __repr__(self) -> str:
        of, random = self.table.explained_variance["decoder"], self.table.explained_variance["random"]
        width = self.table.width["decoder"]
        return f"MetaSAE({width} meta-latents, explained variance {of:.3g}, of a random matrix {random:.3g})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.table.to_string(float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3g}".format)


def meta_sae(
    sae: SparseCoder,
    width: int | None = None,
    k: int = 4,
    *,
    like: Like | None = None,
    held_out: float = HELD_OUT,
    n_steps: int = 1500,
    batch: int = 1024,
    lr: float = 5e-4,
    seed: int = 42,
) -> MetaSAE:
    """Train a BatchTopK SAE on the decoder rows of an SAE, and measure the variance that it explains.

        explained_variance = 1 - sum ||row - meta(row)||^2 / sum ||row - mean||^2

    High where latents share a few directions. By itself the number says little: with as many meta-latents as a quarter
    of the rows, random ones are explained in part too, above all those trained on. So the rows of another tenth count,
    and a random matrix with rows of the same lengths goes the same way.

    `like="saebench"` trains and measures on all rows, as SAEBench does with SAELens' trainer; the trainer here is
    saewb's.

    Args:
        sae: of any architecture; W_dec as it is, no row scaled.
        width: meta-latents; None is d_sae / 4.
        k: of them per row, on average.
        like: settings of SAEBench.
        held_out: share of the rows not to train on.
        n_steps: of the training.
        batch: rows per step.
        lr: learning rate.
        seed: of the start, the order, the draw of rows and the random matrix.

    Returns:
        A MetaSAE.

    Raises:
        ValueError: for an argument out of its range, or fewer than 8 latents.

    References:
        Leask et al. 2025, arXiv:2502.04878 (meta-SAEs); `meta_structure` of SAEBench 0.6.0.

    Example:
        >>> import saewb
        >>> meta_sae(saewb.load_sae("tiny"), n_steps=20).to_frame().n.tolist()
        [102, 102]
    """
    import pandas as pd

    rows = sae.W_dec.detach().float()
    n = len(rows)
    if like not in (None, "saebench"):
        raise ValueError(explain(f"got like={like!r}.", near=near(str(like), ["saebench"]), want="None or 'saebench'"))
    width = max(math.ceil(n / 4), k) if width is None else width
    if n < 8 or not (0 < held_out < 1 and 1 <= k <= width and n_steps >= 1 and batch >= 1):
        what = f"meta_sae got {n} rows, width={width}, k={k}, held_out={held_out}, n_steps={n_steps}, batch={batch}."
        raise ValueError(explain(what, want="8 rows or more, 0 < held_out < 1, 1 <= k <= width, steps and rows >= 1"))
    rng = torch.Generator().manual_seed(seed ^ 0x6D657461)
    random = normalize(torch.randn(rows.shape, generator=rng), dim=1).to(rows) * rows.norm(dim=1, keepdim=True)
    order = torch.randperm(n, generator=rng).to(rows.device)
    n_rest = 0 if like else max(2, round(held_out * n))
    fit, rest = order[n_rest:], order[:n_rest] if n_rest else order
    result, metas = {}, {}
    for name, matrix in (("decoder", rows), ("random", random)):
        meta = metas[name] = _trained(matrix[fit], width, k, n_steps, batch, lr, seed)
        variance, error = _explained(meta, matrix[rest])
        low, high = normal_interval(variance, error)
        result[name] = {
            "explained_variance": variance,
            "se": error,
            "low": low,
            "high": high,
            "n": len(rest),
            "explained_variance_train": _explained(meta, matrix[fit])[0],
            "n_train": len(fit),
            "l0": float((meta.encode(matrix[rest]) != 0).sum(1).float().mean()),
            "width": width,
            "k": k,
        }
    return MetaSAE(metas["decoder"], pd.DataFrame.from_dict(result, orient="index").rename_axis("of"))


def _trained(rows: Tensor, width: int, k: int, n_steps: int, batch: int, lr: float, seed: int) -> SAE:
    stream = stream_tensors(rows, batch_tokens=batch, repeat=True, shuffle_seed=seed)
    how = {"batch_tokens": batch, "lr": lr, "normalization": "none", "seed": seed}
    run = train(None, stream, BatchTopK(width, k), n_tokens=n_steps * batch, device=rows.device, **how)
    run.wait()
    return run.sae


@torch.no_grad()
def _explained(meta: SAE, rows: Float[Tensor, "rows d"]) -> tuple[float, float]:
    """Explained variance, and its standard error over rows: that of a ratio of sums."""
    x = float64(rows)
    residual = (x - float64(meta(rows))).square().sum(1)
    spread = (x - x.mean(0)).square().sum(1)
    unexplained = float(residual.sum() / spread.sum())
    terms = (residual - unexplained * spread) / spread.mean()
    return 1 - unexplained, float(terms.std() / len(terms) ** 0.5)
