"""Synthetic activations: draw which features fire and how strongly, and sum their directions."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._files import atomic_folder, read_json, refuse_damage
from saewb.errors import FormatError, explain
from saewb.hub import snapshot
from saewb.sae.sparse import SparseLatents
from saewb.stats.correlation import LowRankCorrelation
from saewb.stats.sampling import CorrelatedNormals
from saewb.synthetic.dictionary import FeatureDictionary
from saewb.synthetic.firing_patterns import Magnitudes, independent, normal_threshold
from saewb.synthetic.hierarchy import Hierarchy, Node

_BLOCK = 2**24  # normal numbers drawn at a time (64 MiB), for correlated features
VERSION = 2  # of the folder that `save` writes; version 1 scaled children by magnitude, or not at all


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
    2. Each firing has a magnitude; with a magnitude of 0 the feature does not fire.
    3. Firings that `hierarchy` forbids are removed, and magnitudes of children scaled.

    With a hierarchy and independent features, `probability` is the rate after step 3 where no magnitude is 0 (features
    are drawn more often in step 1, see `Hierarchy.compensated`), unless `compensate` is False. With a correlation as
    well, it is the rate of step 1.

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
        is_relative = self.hierarchy is not None and self.hierarchy.scale_by_parent == "relative"
        if is_relative and not bool((torch.as_tensor(self.magnitudes.mean) > 0).all()):
            raise ValueError(explain("scale_by_parent='relative' with a mean magnitude of 0.", want="above 0"))
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
        act = self.magnitudes.sample(feature, generator)
        mask = act > 0
        firings = SparseLatents(sample[mask], feature[mask], act[mask], shape)
        return firings if self.hierarchy is None else self.hierarchy.apply(firings, generator, self.magnitudes.mean)

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
_LENS_FACTS, _LENS_TENSORS, _LENS_TREES = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"


def load_synthetic(source: str | Path, path: str = "") -> SyntheticData:
    """Load data that `SyntheticData.save` wrote, which draws the same samples; or a synthetic model of SAELens.

    A model of SAELens, such as those of SynthSAEBench, has the same directions, bias, firing probabilities,
    correlation, hierarchy and magnitudes as there; its samples are others of the same distribution.

    Args:
        source: a folder, or "owner/name" of a model of SAELens on the hub.
        path: folder inside of `source`.

    Returns:
        The data, on the CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        FormatError: if the files hold something else.

    Example:
        >>> load_synthetic("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: nowhere has no synthetic data.
          want: synthetic.json and synthetic.safetensors, or synthetic_model_config.json and synthetic_model.safetensors
    """
    folder = Path(source).expanduser() / path
    if not folder.is_dir() and isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        folder = _download(source, path)
    for facts, tensors, read in ((_FACTS, _TENSORS, _read_saved), (_LENS_FACTS, _LENS_TENSORS, _read_saelens)):
        if (folder / facts).is_file() and (folder / tensors).is_file():
            with refuse_damage(str(folder), "synthetic data as saewb or SAELens wrote it"):
                try:
                    return read(folder, read_json(folder / facts), _read_tensors(folder / tensors))
                except KeyError as missing:
                    raise FormatError(explain(f"{folder} lacks {missing}.", want="what belongs in it")) from missing
                except ValueError as error:
                    raise FormatError(f"cannot read {folder}: {error}") from error
    want = f"{_FACTS} and {_TENSORS}, or {_LENS_FACTS} and {_LENS_TENSORS}"
    raise FileNotFoundError(explain(f"{folder} has no synthetic data.", want=want))


def _download(repo: str, path: str) -> Path:
    inside = PurePosixPath(path)
    files = [str(inside / name) for name in (_LENS_FACTS, _LENS_TENSORS, _LENS_TREES)]
    call = f"saewb.synthetic.load_synthetic({repo!r}{f', {path!r}' if path else ''})"
    return snapshot(repo, path, [escape(file) for file in files], call=call).root / path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FormatError(explain(f"{path.name} is no safetensors file: {error}.")) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise FormatError(
                explain(f"{path.name} has {name} as {tensor.dtype}, not all finite.", want="finite numbers")
            )
    return tensors


def _read_saved(folder: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> SyntheticData:
    if facts.get("version") not in (1, VERSION):
        what = f"{folder / _FACTS} is of version {reprlib.repr(facts.get('version'))}."
        raise FormatError(explain(what, want=f"version {VERSION}", fix="pip install -U saewb"))
    correlation = tensors.pop("correlation", None)
    if "correlation_factor" in tensors:
        correlation = LowRankCorrelation(tensors.pop("correlation_factor"), tensors.pop("correlation_diag"))
    magnitudes = dict(facts["magnitudes"])
    for name in ("mean", "std"):
        tensor = tensors.pop(f"magnitude_{name}", None)
        magnitudes[name] = float(magnitudes[name]) if tensor is None else tensor
    trees = facts["hierarchy"]
    scaling = trees and trees["scale_by_parent"]
    if facts["version"] == 1:
        scaling = "magnitude" if scaling else None
    hierarchy = trees and Hierarchy([Node.of(root) for root in trees["roots"]], scaling)
    dictionary = FeatureDictionary(tensors.pop("directions"), tensors.pop("bias"))
    probability = tensors.pop("probability")
    if tensors:
        raise FormatError(explain(f"{folder / _TENSORS} has {sorted(tensors)} left over.", want="what save wrote"))
    compensate, noise = bool(facts["compensate"]), float(facts["noise"])
    return SyntheticData(dictionary, probability, Magnitudes(**magnitudes), correlation, hierarchy, compensate, noise)


# -- synthetic models of SAELens -------------------------------------------------------------------------------------


def _read_saelens(folder: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> SyntheticData:
    """A `SyntheticModel` of sae-lens 6.54: its tensors, its trees, and magnitudes by its configuration.

    The stored probabilities are those of the draw, already compensated for the hierarchy.
    """
    n, seed = facts["num_features"], facts.get("seed")
    dictionary = FeatureDictionary(tensors.pop("feature_vectors"), tensors.pop("bias"))
    probability = tensors.pop("firing_probabilities")
    shapes = dictionary.n_features, dictionary.d, tuple(probability.shape)
    if shapes != (n, facts["hidden_dim"], (n,)):
        what = f"{_LENS_FACTS} has {n} features of {facts['hidden_dim']}, {_LENS_TENSORS} {shapes}."
        raise FormatError(explain(what, want="the same"))
    correlation = None
    if "correlation_factor" in tensors:
        correlation = LowRankCorrelation(tensors.pop("correlation_factor"), tensors.pop("correlation_diag"))
    if tensors or (correlation is None) != (facts.get("correlation") is None):
        what = f"{_LENS_TENSORS} has {sorted(tensors) or 'no more tensors'}; correlation is {facts.get('correlation')}."
        raise FormatError(explain(what, want="tensors that belong to the configuration"))
    std, mean = (
        _saelens_magnitudes(facts.get(f"{name}_firing_magnitudes", default), n, None if seed is None else seed + offset)
        for name, default, offset in (("std", 0.0, 1), ("mean", 1.0, 2))
    )
    hierarchy = _saelens_hierarchy(read_json(folder / _LENS_TREES)) if (folder / _LENS_TREES).is_file() else None
    if hierarchy is None and facts.get("hierarchy") is not None:
        raise FormatError(explain(f"{_LENS_FACTS} has a hierarchy, and there is no {_LENS_TREES}.", want="both"))
    magnitudes = Magnitudes("rectified_normal", mean, std)
    return SyntheticData(dictionary, probability, magnitudes, correlation, hierarchy, compensate=False)


def _saelens_magnitudes(config: Any, n: int, seed: int | None) -> float | Tensor:
    """Magnitudes by their configuration; random ones are those that sae-lens draws with the same seed."""
    if not isinstance(config, Mapping):
        return float(config)
    kind = config["generator_name"]
    if kind == "constant":
        return float(config["value"])
    if kind in ("linear", "exponential"):
        start, end = float(config["start"]), float(config["end"])
        steps = torch.linspace(0, 1, n)
        return torch.linspace(start, end, n) if kind == "linear" else start * (end / start) ** steps
    if kind != "folded_normal":
        what = f"magnitudes of kind {reprlib.repr(kind)}."
        raise FormatError(explain(what, want="constant, linear, exponential or folded_normal"))
    if seed is None:
        what = f"the magnitudes are drawn at random, and {_LENS_FACTS} has no seed: each load would draw others."
        raise FormatError(explain(what, want="a seed"))
    drawn = config["mean"] + torch.randn(n, generator=torch.Generator().manual_seed(seed)) * config["std"]
    low, high = config.get("min_value"), config.get("max_value")
    return drawn.abs() if low is None and high is None else drawn.abs().clamp(low, high)


def _saelens_hierarchy(trees: Any) -> Hierarchy | None:
    def convert(node: Mapping[str, Any]) -> dict[str, Any]:
        children = [convert(child) for child in node.get("children", [])]
        exclusive = bool(node.get("mutually_exclusive_children", False))
        scales = bool(node.get("scale_children_by_parent", False))
        return {"feature": node.get("feature_index"), "children": children, "exclusive": exclusive, "scales": scales}

    roots = [Node.of(convert(root)) for root in trees["roots"]]
    return Hierarchy(roots, "relative") if roots else None
