"""Synthetic activations: draw which features fire and how strongly, and sum their directions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._files import atomic_folder
from saewb.errors import FormatError, explain
from saewb.sae.sparse import SparseLatents
from saewb.stats.correlation import LowRankCorrelation
from saewb.stats.sampling import CorrelatedNormals
from saewb.synthetic.dictionary import FeatureDictionary
from saewb.synthetic.firing_patterns import Magnitudes, independent, normal_threshold
from saewb.synthetic.hierarchy import Hierarchy, Node

_BLOCK = 2**24  # normal numbers drawn at a time (64 MiB), for correlated features
VERSION = 1  # of the folder that `save` writes


@dataclass(frozen=True, eq=False)
class Sample:
    """Activations and the features that generated them."""

    activations: Float[Tensor, "samples d"]
    """Activations, with bias and noise."""
    firings: SparseLatents
    """Features that fired and their magnitudes, `[samples, features]`."""

    def __len__(self) -> int:
        return len(self.activations)


@dataclass(frozen=True, eq=False, repr=False)
class SyntheticData:
    """Generator of activations with known features.

        activation = sum over firing features of magnitude * direction + bias (+ noise)

    1. Features fire, each with its probability: independently, or jointly with `correlation` (Gaussian copula).
    2. Firings that `hierarchy` forbids are removed.
    3. Each firing has a magnitude; with a magnitude of 0 the feature does not fire.

    With a hierarchy and independent features, `probability` is the rate after step 2 (features are drawn more often in
    step 1, see `Hierarchy.compensated`), unless `compensate` is False. With a correlation as well, it is the rate of
    step 1.

    A call with a number of tokens and a generator returns activations, as a stream draws them:
    `saewb.train(None, saewb.stream_draws(data, seed=1), saewb.TopK(512, k=8), n_tokens=10**6, normalization="none")`.

    Raises:
        ValueError: if numbers of features differ, a probability is out of 0..1, or no rates compensate the hierarchy.

    Example:
        >>> from saewb.synthetic import random_dictionary, zipfian
        >>> data = SyntheticData(random_dictionary(64, 32), zipfian(64, highest=0.1, lowest=0.01))
        >>> sample = data.sample(1000, torch.Generator().manual_seed(0))
        >>> sample.activations.shape, data
        (torch.Size([1000, 32]), SyntheticData(64 features in 32 dimensions, 0.982 firing per sample))
    """

    dictionary: FeatureDictionary
    """Directions of the features, and the bias."""
    probability: Float[Tensor, " features"]
    """Fraction of samples on which each feature fires."""
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    """Distribution of a feature's activation where it fires."""
    correlation: Float[Tensor, "features features"] | LowRankCorrelation | None = None
    """Correlation of firing; None: features fire independently."""
    hierarchy: Hierarchy | None = None
    """Trees of features that fire only where their parent fires; None: no restriction."""
    compensate: bool = True
    """Whether features are drawn more often where the hierarchy removes firings."""
    noise: float = 0.0
    """Standard deviation of normal noise on each coordinate."""

    def __post_init__(self) -> None:
        n, device = self.dictionary.n_features, self.dictionary.directions.device
        p = torch.as_tensor(self.probability, dtype=torch.float32).to(device).expand(n).contiguous()
        object.__setattr__(self, "probability", p)
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError(explain("a firing probability is not in 0..1.", want="0..1, for each feature"))
        if self.noise < 0:
            raise ValueError(explain(f"SyntheticData got noise={self.noise}.", want="0 or more"))
        normals = None
        if self.correlation is not None:
            normals = CorrelatedNormals(self.correlation)
            if normals.n_features != n:
                what = f"the correlation is of {normals.n_features} features, the dictionary has {n}."
                raise ValueError(explain(what, want=f"{n} rows"))
        if self.hierarchy is not None and self.hierarchy.features and max(self.hierarchy.features) >= n:
            what = f"the hierarchy has feature {max(self.hierarchy.features)}, the dictionary {n} features."
            raise ValueError(explain(what, want=f"features 0..{n - 1}"))
        compensated = self.hierarchy is not None and self.compensate and normals is None
        object.__setattr__(self, "_normals", normals)
        object.__setattr__(self, "_draw_probability", self.hierarchy.compensated(p) if compensated else p)

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> Sample:
        """Draw samples and their features. The same generator state draws the same samples.

        Args:
            n_samples: how many. Memory is that of the firings, and 64 MiB; with a dense correlation, also the matrix.
            generator: on the dictionary's device; None is a new one, with seed 0.
        """
        rng = generator or torch.Generator(self.dictionary.directions.device).manual_seed(0)
        firings = self.fire(n_samples, rng)
        activations = self.dictionary.embed(firings)
        if self.noise:
            noise = torch.randn(activations.shape, generator=rng, device=activations.device, dtype=activations.dtype)
            activations = activations.add_(noise, alpha=self.noise)
        return Sample(activations, firings)

    def __call__(self, n_tokens: int, generator: torch.Generator) -> Float[Tensor, "tokens d"]:
        """`sample(...).activations`."""
        return self.sample(n_tokens, generator).activations

    @torch.no_grad()
    def fire(self, n_samples: int, generator: torch.Generator) -> SparseLatents:
        """Draw which features fire and how strongly, without computing activations."""
        sample, feature = self._draw(n_samples, generator)
        shape = (n_samples, self.dictionary.n_features)
        firings = SparseLatents(sample, feature, self.magnitudes.sample(feature, generator), shape)
        if self.hierarchy is not None:
            firings = self.hierarchy.apply(firings, generator)
        mask = firings.act > 0
        return SparseLatents(firings.token[mask], firings.latent[mask], firings.act[mask], shape)

    def _draw(self, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self._normals is None:
            return independent(self._draw_probability, n_samples, generator)
        threshold, parts = normal_threshold(self._draw_probability), []
        step = max(1, _BLOCK // self.dictionary.n_features)
        for start in range(0, n_samples, step):
            fires = self._normals.sample(min(step, n_samples - start), generator) > threshold
            samples, features = fires.nonzero(as_tuple=True)
            parts.append((samples + start, features))
        empty = torch.zeros(0, dtype=torch.long, device=threshold.device)
        samples, features = zip(*parts, strict=True) if parts else ((empty,), (empty,))
        return torch.cat(samples), torch.cat(features)

    def save(self, folder: str | Path) -> Path:
        """Write a new folder, atomically: `synthetic.json` and `synthetic.safetensors`.

        Raises:
            FileExistsError: if the folder exists and is not empty.
        """
        from safetensors.torch import save_file

        folder = Path(folder).expanduser().absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(explain(f"{folder} is there already.", want="a new or empty folder"))
        folder.parent.mkdir(parents=True, exist_ok=True)

        def fill(fresh: Path) -> None:
            save_file({name: t.contiguous().cpu() for name, t in self._tensors().items()}, fresh / _TENSORS)
            (fresh / _FACTS).write_text(json.dumps(self._facts(), indent=1), encoding="utf-8")

        return atomic_folder(folder, fill, ours=(_FACTS, _TENSORS), overwrite=False)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"directions": self.dictionary.directions, "bias": self.dictionary.bias}
        tensors["probability"] = self.probability
        if isinstance(self.correlation, LowRankCorrelation):
            tensors |= {"correlation_factor": self.correlation.factor, "correlation_diag": self.correlation.diag}
        elif self.correlation is not None:
            tensors["correlation"] = self.correlation
        for name in ("mean", "std"):
            if isinstance(value := getattr(self.magnitudes, name), Tensor):
                tensors[f"magnitude_{name}"] = value
        return tensors

    def _facts(self) -> dict[str, Any]:
        values = {name: getattr(self.magnitudes, name) for name in ("mean", "std")}
        scalars = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        hierarchy = self.hierarchy and {
            "scale_by_parent": self.hierarchy.scale_by_parent,
            "roots": [root.to_dict() for root in self.hierarchy.roots],
        }
        return {
            "version": VERSION,
            "magnitudes": {"shape": self.magnitudes.shape, **scalars},
            "hierarchy": hierarchy,
            "compensate": self.compensate,
            "noise": self.noise,
        }

    def __repr__(self) -> str:
        n, d, fires = self.dictionary.n_features, self.dictionary.d, float(self.probability.sum())
        extra = [f"correlated ({self.correlation!r})"] if isinstance(self.correlation, LowRankCorrelation) else []
        extra += ["correlated"] if isinstance(self.correlation, Tensor) else []
        extra += [repr(self.hierarchy)] if self.hierarchy is not None else []
        parts = [f"{n:,} features in {d} dimensions", f"{fires:.3g} firing per sample", *extra]
        return f"SyntheticData({', '.join(parts)})"


_FACTS, _TENSORS = "synthetic.json", "synthetic.safetensors"


def load_synthetic(folder: str | Path) -> SyntheticData:
    """Load data that `SyntheticData.save` wrote; it draws the same samples.

    Args:
        folder: path that it was saved to.

    Returns:
        Data equal to the saved one, on the CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        FormatError: if the files hold something else.

    Example:
        >>> load_synthetic("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: nowhere has no synthetic data.
          want: synthetic.json and synthetic.safetensors
    """
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    if not (folder / _FACTS).is_file() or not (folder / _TENSORS).is_file():
        raise FileNotFoundError(explain(f"{folder} has no synthetic data.", want=f"{_FACTS} and {_TENSORS}"))
    facts, tensors = json.loads((folder / _FACTS).read_text(encoding="utf-8")), load_file(folder / _TENSORS)
    if facts.get("version") != VERSION:
        what = f"{folder / _FACTS} is of version {facts.get('version')!r}."
        raise FormatError(explain(what, want=f"version {VERSION}", fix="pip install -U saewb"))
    try:
        correlation = tensors.pop("correlation", None)
        if "correlation_factor" in tensors:
            correlation = LowRankCorrelation(tensors.pop("correlation_factor"), tensors.pop("correlation_diag"))
        magnitudes = dict(facts["magnitudes"])
        for name in ("mean", "std"):
            if f"magnitude_{name}" in tensors:
                magnitudes[name] = tensors.pop(f"magnitude_{name}")
        trees = facts["hierarchy"]
        hierarchy = trees and Hierarchy([Node.of(root) for root in trees["roots"]], trees["scale_by_parent"])
        dictionary = FeatureDictionary(tensors.pop("directions"), tensors.pop("bias"))
        probability = tensors.pop("probability")
        compensate, noise = facts["compensate"], facts["noise"]
    except KeyError as missing:
        raise FormatError(
            explain(f"{folder} lacks {missing}.", want=f"what save wrote, version {VERSION}")
        ) from missing
    if tensors:
        raise FormatError(explain(f"{folder / _TENSORS} has {sorted(tensors)} left over.", want="what save wrote"))
    return SyntheticData(dictionary, probability, Magnitudes(**magnitudes), correlation, hierarchy, compensate, noise)
