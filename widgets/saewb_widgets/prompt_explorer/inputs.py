"""What a PromptExplorer is made with: a model, SAEs, perhaps an index of each; checked, and asked for latents."""

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

_KEPT = 4096  # hints remembered, 300 bytes each


@dataclass(frozen=True, eq=False)
class Given:
    """The model, the SAEs, their parts (an SAE, or one layer of a cross-layer transcoder) and indexes."""

    model: Any
    runner: Runner  # of its twin
    saes: tuple[Any, ...]
    indexes: tuple[saewb.FeatureIndex | None, ...]  # one for each SAE
    one: bool  # a single SAE was given, not a list
    names: tuple[str, ...]  # of the parts
    owner: tuple[int, ...]  # which SAE each part is of
    widths: tuple[int, ...]  # latents of each part

    @property
    def has_index(self) -> bool:
        """Whether there is an index of any."""
        return any(index is not None for index in self.indexes)

    @property
    def index(self) -> Any:
        """As `PromptReading.to_frame` takes it."""
        return None if not self.has_index else self.indexes[0] if self.one else list(self.indexes)

    def of(self, part: int) -> saewb.FeatureIndex | None:
        """The index of a part."""
        return self.indexes[self.owner[part]]

    def browser(self, part: int, latent: int) -> FeatureBrowser:
        """A panel of the index of a part, at a latent.

        Raises:
            ValueError: if there is no index of it.
        """
        if (index := self.of(part)) is None:
            what, fix = f"there is no index of {self.names[part]}.", "saewb.build_index(model, sae, texts)"
            raise ValueError(errors.explain(what, want="PromptExplorer(model, sae, index)", fix=fix))
        return FeatureBrowser(index, self.model, self.saes[self.owner[part]], selected=max(0, latent))

    def exists(self, part: int, latent: int) -> None:
        """Raise unless there is such a latent."""
        if not 0 <= part < len(self.names):
            what = f"SAE {part} of {len(self.names)}."
            raise ValueError(errors.explain(what, want=f"0 to {len(self.names) - 1}"))
        if not 0 <= latent < self.widths[part]:
            what = f"latent {latent} of {self.names[part]}."
            raise ValueError(errors.explain(what, want=f"0 to {self.widths[part] - 1}"))

    @functools.cached_property
    def hint(self) -> Any:
        """A function of part and latent: the row that FeatureBrowser's table has of it, or None."""
        return functools.lru_cache(_KEPT)(self._hint)

    def _hint(self, part: int, latent: int) -> dict[str, Any] | None:
        if (index := self.of(part)) is None:
            return None
        return latent_row(index.latent(latent), frozenset(index.info.special))

    def page(self, part: int, latent: int) -> dict[str, Any]:
        """Everything the index knows of a latent; nothing where there is none."""
        index = self.of(part)
        if index is None or latent < 0:
            return {}
        url = saewb.features.neuronpedia.page(index, latent).url if index.info.neuronpedia else None
        return latent_page(index.latent(latent), frozenset(index.info.special), url)


def given(model: Any, saes: Any, index: Any) -> Given:
    """Check what the panel was made with; the model reads one token for it.

    Raises:
        TypeError: for something that is no SAE or no index.
        ValueError: for an SAE that does not fit the model, an index that does not fit its SAE.
    """
    one = not isinstance(saes, (list, tuple))
    several = (saes,) if one else tuple(saes)
    indexes = _indexes(index, len(several), one)
    runner = Runner(model)
    glimpse = saewb.read_prompt(runner.model, [0], several, skip_special_tokens=False)
    made = Given(model, runner, several, indexes, one, glimpse.saes, glimpse.owner, glimpse.d_sae)
    glimpse.to_frame(index=made.index)  # says which does not fit
    return made


def _indexes(index: Any, n: int, one: bool) -> tuple[saewb.FeatureIndex | None, ...]:
    several: Sequence[Any] = list(index) if isinstance(index, (list, tuple)) else [index]
    if index is None:
        several = [None] * n
    if len(several) != n or (one and isinstance(index, (list, tuple))):
        got = f"{len(several)} indexes" if isinstance(index, (list, tuple)) else "one index"
        fix = "PromptExplorer(model, sae, index)" if one else "PromptExplorer(model, [sae, other], [index, None])"
        want = "one for each, in the same order; None where there is none"
        raise ValueError(errors.explain(f"PromptExplorer got {got} for {n} SAEs.", want=want, fix=fix))
    made = [saewb.load_index(Path(i).expanduser()) if isinstance(i, (str, Path)) else i for i in several]
    for found in made:
        if found is not None and not isinstance(found, saewb.FeatureIndex):
            what = f"PromptExplorer got a {type(found).__name__} as an index."
            fix = "saewb.build_index(model, sae, texts)"
            raise TypeError(errors.explain(what, want="a FeatureIndex or its folder", fix=fix))
    return tuple(made)
