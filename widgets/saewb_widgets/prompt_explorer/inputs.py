"""Inputs of a PromptExplorer: a model, one or several SAEs, and an optional feature index of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saewb
from saewb import errors
from saewb_widgets.feature_browser.panel import FeatureBrowser
from saewb_widgets.prompt_explorer.worker import Runner
from saewb_widgets.serialize import latent_page, latent_row

_CACHED_HINTS = 4096  # of 300 bytes each


@dataclass(frozen=True, eq=False)
class Inputs:
    """Validated inputs. A part is an SAE, or one layer of a cross-layer transcoder."""

    model: Any
    """The user's model."""
    runner: Runner
    """Runs a copy of the model that shares its weights."""
    saes: tuple[Any, ...]
    """The SAEs."""
    indexes: tuple[saewb.FeatureIndex | None, ...]
    """One for each SAE, None where there is none."""
    is_single: bool
    """Whether the caller passed an SAE rather than a list."""
    names: tuple[str, ...]
    """Name of each part."""
    owner: tuple[int, ...]
    """Number of the SAE that each part belongs to."""
    widths: tuple[int, ...]
    """Number of latents of each part."""

    @classmethod
    def from_arguments(cls, model: Any, saes: Any, index: Any) -> Inputs:
        """Validate the panel's arguments; this runs the model on one token.

        Raises:
            TypeError: if something is not an SAE or not an index.
            ValueError: for an SAE that does not fit the model, or an index that does not fit its SAE.
        """
        is_single = not isinstance(saes, (list, tuple))
        saes = (saes,) if is_single else tuple(saes)
        indexes = _indexes(index, len(saes), is_single)
        runner = Runner(model)
        reading = saewb.read_prompt(runner.model, [0], saes, skip_special_tokens=False)
        inputs = cls(model, runner, saes, indexes, is_single, reading.saes, reading.owner, reading.d_sae)
        reading.to_frame(index=inputs.index)  # raises for an index that does not fit
        return inputs

    @property
    def has_index(self) -> bool:
        """Whether any SAE has an index."""
        return any(index is not None for index in self.indexes)

    @property
    def index(self) -> Any:
        """The argument `index` of `PromptReading.to_frame`."""
        return None if not self.has_index else self.indexes[0] if self.is_single else list(self.indexes)

    def index_of(self, part: int) -> saewb.FeatureIndex | None:
        """The index of a part, or None."""
        return self.indexes[self.owner[part]]

    def browser(self, part: int, latent: int) -> FeatureBrowser:
        """A FeatureBrowser of a part, with a latent selected.

        Raises:
            ValueError: if the part has no index.
        """
        if (index := self.index_of(part)) is None:
            what, fix = f"there is no index of {self.names[part]}.", "saewb.build_index(model, sae, texts)"
            raise ValueError(errors.explain(what, want="PromptExplorer(model, sae, index)", fix=fix))
        return FeatureBrowser(index, self.model, self.saes[self.owner[part]], selected=max(0, latent))

    def check_latent(self, part: int, latent: int) -> None:
        """Raise a ValueError unless the part has this latent."""
        if not 0 <= part < len(self.names):
            what = f"SAE {part} of {len(self.names)}."
            raise ValueError(errors.explain(what, want=f"0 to {len(self.names) - 1}"))
        if not 0 <= latent < self.widths[part]:
            what = f"latent {latent} of {self.names[part]}."
            raise ValueError(errors.explain(what, want=f"0 to {self.widths[part] - 1}"))

    @functools.cached_property
    def hint(self) -> Any:
        """Cached function of part and latent that returns a FeatureBrowser table row, or None without an index."""
        return functools.lru_cache(_CACHED_HINTS)(self._hint)

    def _hint(self, part: int, latent: int) -> dict[str, Any] | None:
        if (index := self.index_of(part)) is None:
            return None
        return latent_row(index.latent(latent), frozenset(index.info.special))

    def page(self, part: int, latent: int) -> dict[str, Any]:
        """Everything the index has about a latent; empty without an index."""
        index = self.index_of(part)
        if index is None or latent < 0:
            return {}
        url = saewb.features.neuronpedia.page(index, latent).url if index.info.neuronpedia else None
        return latent_page(index.latent(latent), frozenset(index.info.special), url)


def _indexes(index: Any, n: int, is_single: bool) -> tuple[saewb.FeatureIndex | None, ...]:
    is_list = isinstance(index, (list, tuple))
    items: Sequence[Any] = [None] * n if index is None else list(index) if is_list else [index]
    if len(items) != n or (is_single and is_list):
        count = f"{len(items)} indexes" if is_list else "one index"
        fix = "PromptExplorer(model, sae, index)" if is_single else "PromptExplorer(model, [sae, other], [index, None])"
        want = "one for each, in the same order; None where there is none"
        raise ValueError(errors.explain(f"PromptExplorer got {count} for {n} SAEs.", want=want, fix=fix))
    indexes = [saewb.load_index(Path(i).expanduser()) if isinstance(i, (str, Path)) else i for i in items]
    for item in indexes:
        if item is not None and not isinstance(item, saewb.FeatureIndex):
            what = f"PromptExplorer got a {type(item).__name__} as an index."
            fix = "saewb.build_index(model, sae, texts)"
            raise TypeError(errors.explain(what, want="a FeatureIndex or its folder", fix=fix))
    return tuple(indexes)
