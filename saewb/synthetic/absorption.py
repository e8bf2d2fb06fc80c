"""Absorption where the hierarchy is known: no probe and no model, so that the right answer is.

An SAE absorbs a parent feature into a child where the parent's latent is silent under the child and the child's latent
writes the parent's direction as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import normalize

from saewb._display import html_table, text_table
from saewb.errors import explain
from saewb.metrics import float64
from saewb.sae.base import SparseCoder
from saewb.sae.random_sae import random_sae
from saewb.stats.intervals import mean_and_error, normal_interval, wilson_interval
from saewb.synthetic.data import Sample, SyntheticData
from saewb.synthetic.recovery import best_matches

if TYPE_CHECKING:
    import pandas as pd

ALIGNED = 0.1
"""|cosine| from which on a child's latent writes the parent's direction, as in SAEBench."""


@dataclass(frozen=True, eq=False, repr=False)
class HierarchyAbsorption:
    """Result of `synthetic.absorption`: `to_frame()` has a row per parent and child, `summary()` one per SAE."""

    table: pd.DataFrame
    """The rows of `to_frame`."""
    n_samples: int
    """Samples drawn."""

    def to_frame(self) -> pd.DataFrame:
        """A row per SAE ("sae", and "random", the control), parent and child.

        Columns: sae, parent, child, parent_latent, child_latent (nearest by |cosine|), parent_cosine, child_cosine,
        leak (cosine of the child's latent with the parent's direction), n (samples on which both fire), rate (share of
        them that are absorbed) with low and high (95 %), fraction (mean share of the parent's magnitude that the
        child's latent writes), n_alone (samples on which the parent fires and no child of it), off_alone (share of
        those on which the parent's latent is silent: what absorption does not explain).
        """
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """A row per SAE: means over pairs that occurred, with standard errors and intervals of 95 %, and their number.

        Columns: rate, rate_se, rate_low, rate_high, fraction, fraction_se, off_alone, leak, n_pairs, n.
        """
        import pandas as pd

        rows = {}
        for name, part in self.table.groupby("sae", sort=False):
            rate, rate_se, n_pairs = mean_and_error(part.rate.to_numpy())
            low, high = normal_interval(rate, rate_se, 0.0, 1.0)
            fraction, fraction_se, _ = mean_and_error(part.fraction.to_numpy())
            rows[name] = {
                "rate": rate,
                "rate_se": rate_se,
                "rate_low": low,
                "rate_high": high,
                "fraction": fraction,
                "fraction_se": fraction_se,
                "off_alone": mean_and_error(part.off_alone.to_numpy())[0],
                "leak": mean_and_error(part.leak.to_numpy())[0],
                "n_pairs": n_pairs,
                "n": int(part.n.sum()),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sae")

    def __repr__(self) -> str:
        of = self.summary()
        return (
            f"HierarchyAbsorption({of.n_pairs.iloc[0]} pairs, rate {of.rate.iloc[0]:.3g}, {self.n_samples:,} samples)"
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        of = self.summary()
        values = {name: " / ".join(f"{value:.3g}" for value in of[name]) for name in of}
        return [(name, values[name], "", meaning) for name, meaning in _MEANINGS.items()]

    def __str__(self) -> str:
        return text_table(f"{self!r}: SAE / random SAE", self._rows())

    def _repr_html_(self) -> str:
        return html_table(f"{self!r}: SAE / random SAE", self._rows())


_MEANINGS = {
    "rate": "samples with parent and child on which the parent is absorbed; mean over pairs",
    "rate_se": "standard error over pairs",
    "fraction": "of the parent's magnitude that the child's latent writes",
    "off_alone": "samples with the parent alone on which its latent is silent: no absorption",
    "leak": "cosine of the child's latent with the parent's direction",
    "n_pairs": "pairs that occurred",
    "n": "samples with both",
}


@torch.no_grad()
def absorption(
    data: SyntheticData,
    sae: SparseCoder,
    n_samples: int = 20_000,
    *,
    batch_size: int = 2048,
    seed: int = 0,
) -> HierarchyAbsorption:
    """Measure how far an SAE absorbs parents into their children: 0 for the true dictionary, 1 if it absorbs all.

    For each parent p and child c with unit directions d_p, d_c and the latents whose rows are nearest by |cosine|,
    over samples on which both fire:

        rate      share on which p's latent is 0, c's latent is not, and |cos(W_dec[c], d_p)| >= 0.1
        fraction  mean of A / (A + max(M, 0)),  M = a_p W_dec[p] . d_p,  A = clip(min(a_c W_dec[c] . d_p, P - M), 0)

    with P the parent's true magnitude, and A = 0 where that |cosine| is below 0.1. Both are 0 for the true dictionary
    and 1 for the SAE with child rows d_c + d_p and parents that are silent under them; the rate is linear in the share
    of samples or pairs that are absorbed, the fraction also in t of child rows d_c + t d_p. Where both have one latent,
    nothing is absorbed. A random SAE with the L0 of `sae` stands beside it; `off_alone` says how often the parent's
    latent is silent anyway.

    Args:
        data: with a hierarchy.
        sae: of any architecture, which writes where it reads.
        n_samples: fresh samples.
        batch_size: samples at a time; memory is `batch_size * (3 features + 2 d_sae)` numbers.
        seed: of the samples, and of the random SAE.

    Returns:
        A HierarchyAbsorption: `summary()` has a row for the SAE and one for the random one.

    Raises:
        ValueError: without a hierarchy with children, for another width, or numbers below 1.

    References:
        Chanin et al. 2024, arXiv:2409.14507 (absorption).

    Example:
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> from saewb.synthetic import Hierarchy, Node, SyntheticData, matched_sae, random_dictionary
        >>> tree = Hierarchy([Node(0, (Node(1), Node(2)))])
        >>> data = SyntheticData(random_dictionary(8, 8), torch.tensor([0.5, 0.2, 0.2] + 5 * [0.1]), hierarchy=tree)
        >>> result = absorption(data, matched_sae(SAE(SAEConfig(8, 8)), data.dictionary), 2000)
        >>> result.summary().loc["sae", ["rate", "fraction"]].astype(float).round(3).tolist()
        [0.0, 0.0]
    """
    import pandas as pd

    pairs = [] if data.hierarchy is None else data.hierarchy.pairs
    if not pairs:
        raise ValueError(explain(f"{data!r} has no parents and children.", want="SyntheticData(..., hierarchy=...)"))
    if sae.cfg.d_out != data.dictionary.d:
        what = f"{sae!r} writes {sae.cfg.d_out} dimensions, the features have {data.dictionary.d}."
        raise ValueError(explain(what, want="the same"))
    if n_samples < 1 or batch_size < 1:
        raise ValueError(explain(f"absorption got n_samples={n_samples}, batch_size={batch_size}.", want="1 or more"))
    first = data.sample(min(batch_size, n_samples), torch.Generator(data.probability.device).manual_seed(seed))
    x = first.activations.to(sae.device)
    control = random_sae(sae, float((sae.encode(x) != 0).sum(1).float().mean()), x.mean(0), seed=seed)
    streams = {"sae": _PairStream(sae, data, pairs), "random": _PairStream(control, data, pairs)}
    rng = torch.Generator(data.probability.device).manual_seed(seed)
    for start in range(0, n_samples, batch_size):
        sample = data.sample(min(batch_size, n_samples - start), rng)
        for stream in streams.values():
            stream.update(sample)
    tables = [stream.result().assign(sae=name) for name, stream in streams.items()]
    table = pd.concat(tables, ignore_index=True)
    return HierarchyAbsorption(table[["sae", *table.columns[:-1]]], n_samples)


class _PairStream:
    """Sums over samples for each parent and child of one SAE."""

    def __init__(self, sae: SparseCoder, data: SyntheticData, pairs: list[tuple[int, int]]) -> None:
        self.sae, self.device = sae, sae.device
        self.parent, self.child = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        directions = normalize(data.dictionary.directions.to(sae.W_dec), dim=1)
        self.length = data.dictionary.directions.to(sae.W_dec).norm(dim=1)[self.parent]
        features = torch.cat([self.parent, self.child]).unique()
        nearest, cosine = best_matches(directions[features], sae.W_dec.detach())
        place = torch.searchsorted(features, torch.stack([self.parent, self.child]))
        self.parent_latent, self.child_latent = nearest[place]
        self.parent_cosine, self.child_cosine = cosine[place]
        d_p = directions[self.parent]
        rows_p, rows_c = sae.W_dec.detach()[self.parent_latent], sae.W_dec.detach()[self.child_latent]
        self.main, self.leaked = (rows_p * d_p).sum(1), (rows_c * d_p).sum(1)
        self.leak = (normalize(rows_c, dim=1) * d_p).sum(1)
        self.writes = (self.parent_latent != self.child_latent) & (self.leak.abs() >= ALIGNED)
        self.sums = torch.zeros(5, len(self.parent), dtype=torch.float64)  # n, absorbed, fraction, n_alone, off_alone

    def update(self, sample: Sample) -> None:
        """Add a batch of samples."""
        x, magnitude = sample.activations.to(self.device), sample.firings.dense().to(self.device)
        acts, fires = self.sae.encode(x), magnitude > 0
        acts_p, acts_c = acts[:, self.parent_latent], acts[:, self.child_latent]
        both = fires[:, self.parent] & fires[:, self.child]
        silent = acts_p == 0
        has_child = torch.zeros_like(magnitude).index_add_(1, self.parent, fires[:, self.child].to(magnitude)) > 0
        alone = (fires & ~has_child)[:, self.parent]
        main = acts_p * self.main
        rest = magnitude[:, self.parent] * self.length - main
        other = torch.minimum(acts_c * self.leaked, rest).clamp_min(0) * self.writes
        whole = other + main.clamp_min(0)
        fraction = torch.where(whole > 0, other / torch.where(whole > 0, whole, 1), 0)
        parts = (both, both & silent & (acts_c != 0) & self.writes, fraction * both, alone, alone & silent)
        self.sums += torch.stack([float64(part).sum(0).cpu() for part in parts])

    def result(self) -> pd.DataFrame:
        """A row per pair."""
        import pandas as pd

        n, absorbed, fraction, n_alone, off = self.sums.numpy()
        low, high = wilson_interval(absorbed, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = {"rate": absorbed / n, "low": low, "high": high, "fraction": fraction / n}
            off_alone = off / n_alone
        names = ("parent", "child", "parent_latent", "child_latent", "parent_cosine", "child_cosine", "leak")
        columns = {name: getattr(self, name).cpu().numpy() for name in names}
        counts = {"n": n.astype(int), **shares, "n_alone": n_alone.astype(int), "off_alone": off_alone}
        return pd.DataFrame(columns | counts)
