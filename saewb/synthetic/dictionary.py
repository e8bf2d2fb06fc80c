"""Feature dictionaries: a direction per feature, optionally nearly orthogonal, and SAEs that match one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.metrics import float64
from saewb.sae.sae import SAE
from saewb.sae.sparse import SparseLatents


@dataclass(frozen=True, eq=False, repr=False)
class FeatureDictionary:
    """Feature directions, and the bias that every activation contains.

        activation = sum_i f_i directions[i] + bias

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> dictionary = FeatureDictionary(torch.eye(3, 2), torch.zeros(2))
        >>> dictionary.embed(torch.tensor([[2.0, 3.0, 9.0]])), dictionary
        (tensor([[2., 3.]]), FeatureDictionary(3 features in 2 dimensions))
    """

    directions: Float[Tensor, "features d"]
    """Direction of each feature, a row; functions here make unit rows."""
    bias: Float[Tensor, " d"]
    """Activation where no feature fires."""

    def __post_init__(self) -> None:
        shapes = tuple(self.directions.shape), tuple(self.bias.shape)
        if self.directions.ndim != 2 or shapes[1] != shapes[0][1:]:
            what = f"directions have shape {shapes[0]}, the bias {shapes[1]}."
            raise ValueError(explain(what, want="[features, d] and [d]"))

    @property
    def n_features(self) -> int:
        """Number of features, rows of `directions`."""
        return self.directions.shape[0]

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.directions.shape[1]

    def embed(self, firings: SparseLatents | Float[Tensor, "samples features"]) -> Float[Tensor, "samples d"]:
        """Activations of firing features; sparse ones in time and memory of the firings."""
        if isinstance(firings, Tensor):
            return firings @ self.directions + self.bias
        return firings.to(self.directions.dtype) @ self.directions + self.bias

    def __repr__(self) -> str:
        return f"FeatureDictionary({self.n_features:,} features in {self.d} dimensions)"


def random_dictionary(
    n_features: int,
    d: int,
    *,
    orthogonal_rounds: int = 5,
    bias_scale: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FeatureDictionary:
    """Random dictionary of unit directions, made nearly orthogonal by `orthogonalized`.

    Args:
        n_features: number of directions; more than `d` are in superposition.
        d: width of an activation.
        orthogonal_rounds: rounds of `orthogonalized`; 0 leaves them random, with |cosines| of about 0.8 / sqrt(d).
        bias_scale: length of a random bias; 0 is none.
        seed: of the draw.
        device: of the tensors.

    Returns:
        A FeatureDictionary of unit directions.

    Raises:
        ValueError: if `n_features` or `d` is below 1.

    Example:
        >>> f = random_dictionary(64, 32).directions
        >>> round(((f @ f.T).square().sum() - 64).item()), 64 * (64 - 32) // 32
        (64, 64)
    """
    if n_features < 1 or d < 1:
        raise ValueError(explain(f"random_dictionary got n_features={n_features}, d={d}.", want="1 or more of each"))
    rng = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(n_features, d, generator=rng), dim=1).to(device)
    bias = nn.functional.normalize(torch.randn(d, generator=rng), dim=0).mul_(bias_scale).to(device)
    return FeatureDictionary(orthogonalized(directions, orthogonal_rounds), bias)


@torch.no_grad()
def orthogonalized(directions: Float[Tensor, "features d"], n_rounds: int = 5) -> Float[Tensor, "features d"]:
    """Make unit directions as orthogonal as their number allows.

    The result has the smallest sum of squared cosines: n (n - d) / d for n directions in d < n dimensions.

        repeat:  F <- F (F^T F)^(-1/2)   (a tight frame: F^T F a multiple of 1),  then each row to length 1

    Both are projections, and a tight frame of unit rows minimizes the sum of squares, so a few rounds reach what takes
    gradient descent hundreds of steps. A round is n d^2 + d^3 operations; nothing is n x n.

    Args:
        directions: start of the iteration.
        n_rounds: 5 reach the minimum to about 6 digits; 0 only sets lengths to 1. With at most d features the first
            round makes them orthogonal.

    Returns:
        New unit rows; `directions` is not changed.

    References:
        Alternating projections: Tropp et al. 2005, "Designing structured tight frames"; the bound: Benedetto and
        Fickus 2003. SAELens' `orthogonalize_embeddings` has the same minimum.

    Example:
        >>> f = orthogonalized(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> round(abs((f[0] @ f[1]).item()), 5), [round(length, 5) for length in f.norm(dim=1).tolist()]
        (0.0, [1.0, 1.0])
    """
    f = nn.functional.normalize(directions, dim=1)
    for _ in range(n_rounds):
        f = nn.functional.normalize(_tight(f), dim=1)
    return f


def _tight(f: Tensor) -> Tensor:
    """Nearest matrix with an orthonormal smaller side: the polar factor, from the smaller Gram matrix."""
    wide = len(f) <= f.shape[1]
    values, vectors = torch.linalg.eigh(float64(f @ f.T if wide else f.T @ f))
    floor = values[-1] * 1e-12  # directions outside the span of the rows are not amplified
    root = ((vectors * values.clamp(min=floor).rsqrt()) @ vectors.T).to(f)
    return root @ f if wide else f @ root


@torch.no_grad()
def matched_sae(
    sae: SAE,
    dictionary: FeatureDictionary,
    *,
    noise: float = 0.0,
    order: Int[Tensor, " d_sae"] | None = None,
    seed: int = 0,
) -> SAE:
    """An SAE with the configuration of `sae` and the dictionary's directions, as after perfect training.

        W_dec[i] = f_i + noise * N(0, 1) / sqrt(d),  at unit length;   W_enc = W_dec^T;   b_dec = bias

    Latent i has the direction of feature i. Encoder bias and thresholds stay. Latents beyond the features keep the
    directions of `sae`.

    Args:
        sae: a feed-forward SAE (no transcoder) of the dictionary's width.
        dictionary: the true features.
        noise: relative length of random errors; 0 is the exact directions.
        order: the feature of each latent; None is the first d_sae in order.
        seed: of the noise.

    Returns:
        A new SAE; `sae` is not changed.

    Raises:
        ValueError: if the widths differ, or `order` has a feature out of range.

    Example:
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> dictionary = random_dictionary(16, 8)
        >>> sae = matched_sae(SAE(SAEConfig(8, 16)), dictionary)
        >>> bool(torch.allclose(sae.W_dec, dictionary.directions))
        True
    """
    if sae.cfg.is_transcoder or sae.cfg.d_in != dictionary.d:
        raise ValueError(explain(f"{sae!r} cannot match {dictionary!r}.", want=f"an SAE of d_in={dictionary.d}"))
    order = torch.arange(min(sae.cfg.d_sae, dictionary.n_features)) if order is None else order
    if len(order) > sae.cfg.d_sae or int(order.max()) >= dictionary.n_features or int(order.min()) < 0:
        what = f"order has {len(order)} entries from {int(order.min())} to {int(order.max())}."
        raise ValueError(explain(what, want=f"up to {sae.cfg.d_sae} features of 0..{dictionary.n_features - 1}"))
    tensors = {name: p.detach().clone() for name, p in sae._parameters.items()}
    rows = dictionary.directions.to(tensors["W_dec"])[order]
    # Not the seed itself: a dictionary of the same seed was drawn with the same random numbers.
    rng = torch.Generator().manual_seed(seed ^ 0x6E6F697365)
    error = torch.randn(rows.shape, generator=rng).to(rows) * (noise / dictionary.d**0.5)
    tensors["W_dec"][: len(order)] = nn.functional.normalize(rows + error, dim=1)
    tensors["W_enc"] = tensors["W_dec"].T.contiguous()
    tensors["b_dec"] = dictionary.bias.to(tensors["b_dec"]).clone()
    return SAE.from_tensors(sae.cfg, tensors)
