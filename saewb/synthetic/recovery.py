"""Recovery of true features by an SAE, judged by decoder directions and by firing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.metrics import ReconstructionStream, float64
from saewb.synthetic.data import Sample, SyntheticData

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 2**24  # cosines held at a time


@dataclass(frozen=True, eq=False)
class Recovery:
    """Recovery of true features by an SAE. The feature of a latent is the nearest to its decoder row by |cosine|."""

    mcc: float
    """Mean |cosine| of latents and features matched one to one; 1: the dictionary is recovered."""
    uniqueness: float
    """Fraction of latents that are no duplicates; 1: each latent has a different feature."""
    true_l0: float
    """Features firing per sample."""
    l0: float
    """Latents active per sample."""
    dead_frac: float
    """Fraction of latents that were never active."""
    l2_ratio: float
    """Length of reconstructions relative to activations; below 1: shrinkage."""
    explained_variance: float
    """Fraction; 1 is perfect, 0 no better than the mean."""
    precision: float
    """Fraction of the samples with an active latent on which its feature fires, mean over latents."""
    recall: float
    """Fraction of the samples with a firing feature on which its latent is active, mean over latents."""
    f1: float
    """Harmonic mean of precision and recall, mean over latents."""
    accuracy: float
    """Fraction of samples on which latent and feature are both on or both off, mean over latents."""
    n_samples: int
    """Number of samples."""
    feature: Int[Tensor, " d_sae"] = field(repr=False)
    """Feature of each latent."""
    cosine: Float[Tensor, " d_sae"] = field(repr=False)
    """|cosine| of each latent with its feature."""
    latent_precision: Float[Tensor, " d_sae"] = field(repr=False)
    """Precision of each latent; 0 where it was never active."""
    latent_recall: Float[Tensor, " d_sae"] = field(repr=False)
    """Recall of each latent; 0 where its feature never fired."""
    latent_f1: Float[Tensor, " d_sae"] = field(repr=False)
    """Harmonic mean of both."""

    def to_frame(self) -> pd.DataFrame:
        """One row of the scalar figures, for comparing SAEs."""
        import pandas as pd

        return pd.DataFrame([{f.name: v for f in fields(self) if not isinstance(v := getattr(self, f.name), Tensor)}])

    def latents(self) -> pd.DataFrame:
        """A row per latent: its feature, cosine, precision, recall, f1."""
        import pandas as pd

        names = ("feature", "cosine", "latent_precision", "latent_recall", "latent_f1")
        columns = {name.removeprefix("latent_"): getattr(self, name).numpy() for name in names}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.feature), name="latent"))


class RecoveryStream:
    """Accumulator of `Recovery` over batches of samples; keeps three numbers per latent.

    Args:
        sae: an SAE of any class that writes where it reads.
        directions: of the true features, `[features, d]`.
    """

    def __init__(self, sae: nn.Module, directions: Float[Tensor, "features d"]) -> None:
        if sae.cfg.d_out != directions.shape[1]:
            what = f"{sae!r} writes {sae.cfg.d_out} dimensions, the features have {directions.shape[1]}."
            raise ValueError(explain(what, want="the same"))
        self.sae, self.directions = sae, directions.to(sae.device)
        self.feature, self.cosine = best_matches(sae.W_dec.detach(), self.directions)
        self._active, self._true, self._both = (torch.zeros_like(self.feature) for _ in range(3))
        self._n_firings = 0
        self._recons = ReconstructionStream()

    @torch.no_grad()
    def update(self, sample: Sample) -> None:
        """Add a batch of samples."""
        x = sample.activations.to(self.sae.device)
        acts = self.sae.encode(x)
        self._recons.update(x, self.sae.decode(acts, x))
        active, fires = acts != 0, (sample.firings.dense() > 0).to(self.sae.device)
        self._active += active.sum(0)
        self._true += fires.sum(0)[self.feature]
        self._both += (active & fires[:, self.feature]).sum(0)
        self._n_firings += len(sample.firings)

    def result(self) -> Recovery:
        """Figures of all samples so far. ValueError if there were none."""
        recons, n = self._recons.result(), self._recons.n_tokens
        active, true, both = (float64(t) for t in (self._active, self._true, self._both))
        precision, recall = (torch.where(n_on > 0, both / n_on, 0.0) for n_on in (active, true))
        f1 = torch.where(active + true > 0, 2 * both / (active + true), 0.0)
        W_dec = self.sae.W_dec.detach()
        return Recovery(
            mcc=mean_correlation_coefficient(W_dec, self.directions),
            uniqueness=uniqueness(W_dec, self.directions),
            true_l0=self._n_firings / n,
            l0=float(active.sum()) / n,
            dead_frac=float((active == 0).double().mean()),
            l2_ratio=recons.l2_ratio,
            explained_variance=recons.explained_variance,
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            f1=float(f1.mean()),
            accuracy=float((1 - (active + true - 2 * both) / n).mean()),
            n_samples=n,
            feature=self.feature.cpu(),
            cosine=self.cosine.cpu(),
            latent_precision=precision.cpu(),
            latent_recall=recall.cpu(),
            latent_f1=f1.cpu(),
        )


def recovery(
    sae: nn.Module, data: SyntheticData, n_samples: int = 100_000, *, batch_size: int = 2048, seed: int = 0
) -> Recovery:
    """Measure how well an SAE recovers true features: mcc 1 is the whole dictionary, f1 1 every firing of a feature.

    Args:
        sae: an SAE of any class that writes where it reads.
        data: generator with known features.
        n_samples: fresh samples to judge it on.
        batch_size: samples at a time; memory is `batch_size * (features + 2 d_sae)` numbers.
        seed: of the samples; use one that training did not.

    Returns:
        A Recovery, whose fields are the figures.

    Raises:
        ValueError: if the widths differ, or numbers are below 1.

    References:
        The figures of SAELens' `eval_sae_on_synthetic_data`; MCC of arXiv:2505.20254.

    Example:
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> from saewb.synthetic import SyntheticData, constant, matched_sae, random_dictionary
        >>> data = SyntheticData(random_dictionary(32, 32), constant(32, 0.05))
        >>> result = recovery(matched_sae(SAE(SAEConfig(32, 32)), data.dictionary), data, 2000)
        >>> round(result.mcc, 4), round(result.explained_variance, 4)
        (1.0, 1.0)
    """
    if n_samples < 1 or batch_size < 1:
        raise ValueError(explain(f"recovery got n_samples={n_samples}, batch_size={batch_size}.", want="1 or more"))
    stream, rng = RecoveryStream(sae, data.dictionary.directions), torch.Generator(data.probability.device)
    rng.manual_seed(seed)
    for start in range(0, n_samples, batch_size):
        stream.update(data.sample(min(batch_size, n_samples - start), rng))
    return stream.result()


# -- directions -----------------------------------------------------------------------------------------------------


def mean_correlation_coefficient(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Agreement of two sets of directions: 1 is the same directions in any order and sign, 0 all orthogonal.

        mean over matched pairs of |cos(a_i, b_j)|,    each row used once, matched so that the sum is largest

    Random directions score about sqrt(2 log n / d) for large n, not 0. Time grows with the cube of the smaller number.

    Args:
        a: one set, of any lengths; zero rows have cosine 0.
        b: the other set. Every direction of the smaller set is matched.

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
    """Nearest direction of `b` for each direction of `a`: its row and the |cosine|, 0..1; block by block.

    Several may have the same nearest one. Between random directions the |cosine| is about sqrt(2 log m / d).

    Args:
        a: one set of directions, of any lengths.
        b: the other set.

    Returns:
        Row numbers in `b`, and |cosines|, for each row of `a`.

    Example:
        >>> row, cosine = best_matches(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.eye(2))
        >>> row.tolist(), cosine.tolist()
        ([0, 1], [1.0, 1.0])
    """
    maxima = [_abs_cosines(block, b).max(1) for block in a.split(max(1, _BLOCK // max(len(b), 1)))]
    return torch.cat([f.indices for f in maxima]), torch.cat([f.values for f in maxima])


def uniqueness(latents: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> float:
    """Fraction of latents that are no duplicates: 1 if all have different nearest features, 1/n if all the same.

        #{argmax_j |cos(latent_i, feature_j)| : i} / n

    Args:
        latents: directions to judge, of any lengths.
        features: the true directions, of any lengths.

    Returns:
        A fraction, 1/n..1; unchanged when rows are scaled by positive factors.

    Raises:
        ValueError: if a set is empty, or the widths differ.

    References:
        The uniqueness of SAELens' synthetic evaluation.

    Example:
        >>> uniqueness(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.eye(2))
        0.5
    """
    if len(latents) == 0:
        raise ValueError(explain("uniqueness of no latents.", want="one or more"))
    return len(best_matches(latents, features)[0].unique()) / len(latents)


def best_ordering(latents: Float[Tensor, "n d"], features: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """Order latents by their nearest feature, and by descending |cosine| for each feature.

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
    """Best ordering of latents, and their signed cosines with each feature, in that order.

    Args:
        latents: directions, of any lengths.
        features: the true directions, of any lengths.

    Returns:
        The order, row numbers of `latents`; and cosines in -1..1, in row k of `latents[order[k]]`.

    Example:
        >>> order, cosines = ordered_cosines(-torch.eye(2)[[1, 0]], torch.eye(2))
        >>> order.tolist(), cosines.tolist()
        ([1, 0], [[-1.0, 0.0], [0.0, -1.0]])
    """
    order = best_ordering(latents, features)
    return order, _cosines(latents[order], features)


@torch.no_grad()
def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b.to(a), dim=1).T


def _abs_cosines(a: Tensor, b: Tensor) -> Tensor:
    return _cosines(a, b).abs()
