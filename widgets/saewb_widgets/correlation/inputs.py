"""Inputs of a CorrelationPanel: the arguments that define its matrix or matrices, and the code that reproduces them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import saewb
from saewb import errors

LATENTS = ("clusters", "density", "index")  # orders of a matrix of latents on text
_TITLES = {"cosine": "Cosines", "phi": "Firing together", "jaccard": "Firing together"}


@final
@dataclass(frozen=True, eq=False)
class Inputs:
    """Validated arguments of a CorrelationPanel."""

    of: Any
    """A matrix, a MatrixView, a FeatureIndex or an SAE."""
    other: Any
    """True directions or another SAE, for cosines with those of `of`; or None."""
    model: Any
    """With `tokens`: the model whose activations the latents of the SAE are computed on."""
    tokens: Any
    """Token ids or texts."""
    by: str | None
    """The statistic, as `saewb.matrix_view` and `saewb.latent_matrix` take it; None for their default."""
    against: Any
    """A second matrix for comparison, or None."""
    matched: Any
    """For each feature of `of` its feature in `against`, -1 for none; None if they have the same features."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.tokens is None):
            fix = "CorrelationPanel(sae, model=model, tokens=texts)"
            raise ValueError(errors.explain("CorrelationPanel got one of model and tokens.", want="both", fix=fix))
        if self.model is not None and not hasattr(getattr(self.of, "cfg", None), "d_sae"):
            what = f"CorrelationPanel got a {type(self.of).__name__} with model and tokens."
            raise TypeError(errors.explain(what, want="an SAE"))
        if self.matched is not None and self.against is None:
            fix = "CorrelationPanel(learnt, against=true, matched=features)"
            raise ValueError(errors.explain("CorrelationPanel got matched= without against=.", fix=fix))

    @property
    def needs_model(self) -> bool:
        """Whether the matrix takes a pass of the model."""
        return self.model is not None

    def matrix(self, progress: Callable[[int], Any] | None = None) -> Any:
        """The MatrixView; for latents on text, `progress` is called with the number of tokens read, and may raise."""
        if isinstance(self.of, saewb.MatrixView):
            return self.of
        if isinstance(self.of, saewb.FeatureIndex):
            return self.of.matrix()
        if self.needs_model:
            options = {} if self.by is None else {"by": self.by}
            return saewb.latent_matrix(self.model, self.of, self.tokens, progress=progress, **options)
        return saewb.matrix_view(self.of, self.other, by=self.by)

    def second(self, matrix: Any) -> Any:
        """The MatrixView of `against`, with its features in the order of the first matrix; None without `against`.

        Raises:
            ValueError: if the two do not have the same features.
        """
        if self.against is None:
            return None
        second = self.against if isinstance(self.against, saewb.MatrixView) else saewb.matrix_view(self.against)
        second = second if self.matched is None else second.picked(self.matched)
        if not matrix.same or second.shape != matrix.shape:
            sizes = [" x ".join(f"{n:,}" for n in m.shape) for m in (matrix, second)]
            fix = "CorrelationPanel(learnt, against=true, matched=features)  # of each latent its feature, -1 for none"
            what = f"the matrices are {sizes[0]} and {sizes[1]}."
            raise ValueError(errors.explain(what, want="two of the same features", fix=fix))
        return second

    def heading(self, shape: tuple[int, int], what: str) -> tuple[str, str]:
        """The panel's title, and the line under it."""
        title, about = _TITLES.get(what, "Correlation"), f"{what} of {shape[0]:,} x {shape[1]:,} features"
        if self.against is None:
            return title, about
        return (
            f"{title}, two matrices",
            f"{about}; left the first, right the second, the same features in the same places",
        )

    def check_index(self, index: Any, n: int) -> None:
        """Raise a ValueError if the index is not of the SAE of the matrix, or does not have its `n` features."""
        if index is not None and isinstance(self.of, saewb.SparseCoder):
            index.check_sae(self.of)
        if index is not None and len(index) != n:
            what = f"the index is of {len(index):,} features, the matrix has {n:,}."
            raise ValueError(errors.explain(what, want="the same"))

    def code(self) -> list[str]:
        """Lines of Python that define `matrix`, and `second` if there is one."""
        by = "" if self.by is None else f", by={self.by!r}"
        if isinstance(self.of, saewb.MatrixView):
            lines = ["# matrix: the MatrixView that the panel was made with"]
        elif isinstance(self.of, saewb.FeatureIndex):
            lines = ["# index: what the panel was made with", "matrix = index.matrix()"]
        elif self.needs_model:
            names = "model, sae, tokens"
            lines = [f"# {names}: what the panel was made with", f"matrix = saewb.latent_matrix({names}{by})"]
        else:
            names = "of" if self.other is None else "of, other"
            lines = [f"# {names}: what the panel was made with", f"matrix = saewb.matrix_view({names}{by})"]
        if self.against is None:
            return lines
        view = "against" if isinstance(self.against, saewb.MatrixView) else "saewb.matrix_view(against)"
        names, picked = ("against", "") if self.matched is None else ("against, matched", ".picked(matched)")
        return [*lines, f"# {names}: what the panel was made with", f"second = {view}{picked}"]
