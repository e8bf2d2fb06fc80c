"""What a CorrelationPanel is made with: its matrix, made at once or beside the notebook, and the lines that make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import saewb
from saewb import errors

LATENTS = ("clusters", "density", "index")  # orders of latents on text
_TITLES = {"cosine": "Cosines", "phi": "Firing together", "jaccard": "Firing together"}


@final
@dataclass(frozen=True, eq=False)
class Given:
    """Arguments of a CorrelationPanel, checked."""

    of: Any
    other: Any
    model: Any
    tokens: Any
    by: str | None
    against: Any  # a second matrix, or None
    matched: Any  # its feature for each of the first's

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
    def takes_long(self) -> bool:
        """Whether the model has to be run."""
        return self.model is not None

    def matrix(self, progress: Callable[[int], Any] | None = None) -> Any:
        """The MatrixView; for latents on text, `progress` hears of the tokens read, and may raise."""
        if isinstance(self.of, saewb.MatrixView):
            return self.of
        if isinstance(self.of, saewb.FeatureIndex):
            return self.of.matrix()
        if self.takes_long:
            asked = {} if self.by is None else {"by": self.by}
            return saewb.latent_matrix(self.model, self.of, self.tokens, progress=progress, **asked)
        return saewb.matrix_view(self.of, self.other, by=self.by)

    def second(self, matrix: Any) -> Any:
        """The MatrixView to lay beside the first, features in the first's places; None if there is none.

        Raises:
            ValueError: if it has not a feature for each.
        """
        if self.against is None:
            return None
        found = self.against if isinstance(self.against, saewb.MatrixView) else saewb.matrix_view(self.against)
        found = found if self.matched is None else found.picked(self.matched)
        if not matrix.same or found.shape != matrix.shape:
            what = f"the matrices are {_size(matrix)} and {_size(found)}."
            fix = "CorrelationPanel(learnt, against=true, matched=features)  # of each latent its feature, -1 for none"
            raise ValueError(errors.explain(what, want="two of the same features", fix=fix))
        return found

    def said(self, shape: tuple[int, int], what: str) -> tuple[str, str]:
        """Title, and the line under it."""
        about = f"{what} of {shape[0]:,} x {shape[1]:,} features"
        title = _TITLES.get(what, "Correlation")
        if self.against is None:
            return title, about
        return (
            f"{title}, two matrices",
            f"{about}; left the first, right the second, the same features in the same places",
        )

    def fits(self, index: Any, n: int) -> None:
        """Raise a ValueError if the index is of other features than the matrix' `n`."""
        if index is not None and len(index) != n:
            what = f"the index is of {len(index):,} features, the matrix has {n:,}."
            raise ValueError(errors.explain(what, want="the same"))

    def code(self) -> list[str]:
        """Lines that make `matrix`, and `second` if there is one."""
        asked = "" if self.by is None else f", by={self.by!r}"
        if isinstance(self.of, saewb.MatrixView):
            made = ["# matrix: the MatrixView that the panel was made with"]
        elif isinstance(self.of, saewb.FeatureIndex):
            made = ["# index: what the panel was made with", "matrix = index.matrix()"]
        elif self.takes_long:
            made = ["# model, sae, tokens: as given", f"matrix = saewb.latent_matrix(model, sae, tokens{asked})"]
        else:
            names = "of" if self.other is None else "of, other"
            made = [f"# {names}: what the panel was made with", f"matrix = saewb.matrix_view({names}{asked})"]
        if self.against is None:
            return made
        view = "against" if isinstance(self.against, saewb.MatrixView) else "saewb.matrix_view(against)"
        names, picked = ("against", "") if self.matched is None else ("against, matched", ".picked(matched)")
        return [*made, f"# {names}: likewise", f"second = {view}{picked}"]


def _size(matrix: Any) -> str:
    return " x ".join(f"{n:,}" for n in matrix.shape)
