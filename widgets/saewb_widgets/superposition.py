"""SuperpositionPanel: how the directions of an SAE crowd one another, and which are next to which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets import _packing, _static
from saewb_widgets._panel import Panel, guarded, refused, source

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 4096  # directions up to which it takes no thread
_LISTED = 200  # directions in the table
_BINS = 50  # of |cos| with the nearest other, 0..1
SIDES = ("decoder", "encoder")


class SuperpositionPanel(Panel):
    """Look at the cosines between all pairs of directions: spread, closest pairs, and the neighbours of one.

    What is shown is `saewb.superposition`, whose result is `panel.result`; above 4,096 directions it is computed beside
    the notebook (`busy`, `wait()`).

    Example:
        >>> import saewb
        >>> panel = SuperpositionPanel(saewb.load_sae("tiny"))
        >>> panel
        SuperpositionPanel(direction 648, decoder, 1,024 directions in 128 dimensions)
        >>> [(latent, round(cos, 2)) for latent, cos in panel.neighbours[:2]]
        [(775, -0.9), (916, -0.26)]
    """

    _esm = source("frame.js", "superposition.js")
    _css = source("frame.css", "superposition.css")

    selected = t.Int(0, help="the direction whose neighbours are shown").tag(sync=True)
    side = t.Unicode("decoder", help="decoder (what latents write) or encoder (what they read); of an SAE").tag(
        sync=True
    )
    closest_first = t.Bool(True, help="False: those with the most room first").tag(sync=True)
    rows = t.Dict(help="the table: direction, its largest |cos|, nearest other, cosine with it").tag(sync=True)
    page = t.Dict(help="the neighbours of the selected direction").tag(sync=True)
    figures = t.Dict(help="what all pairs amount to, and the histograms").tag(sync=True)
    facts = t.Dict(help="what stays").tag(sync=True)

    def __init__(self, directions: Any, *, neighbours: int = 12, **traits: Any) -> None:
        """Compute and show.

        Args:
            directions: an SAE, or a tensor `[n, d]` with one direction per row, of any length.
            neighbours: how many to show of each.
            traits: `selected`, `side`, `closest_first`.
        Raises:
            TypeError: for anything else, or an unknown trait.
            ValueError: for fewer than two directions, a direction or a side that is not there.
        """
        self.check_names(traits)
        self.directions, self._neighbours = directions, neighbours
        self.result: Any = None  # of saewb.superposition, of the side shown
        self._results: dict[str, tuple[Any, pd.DataFrame]] = {}
        self._of_sae = hasattr(directions, "W_dec")
        if not self._of_sae and not hasattr(directions, "ndim"):
            what = f"SuperpositionPanel got a {type(directions).__name__}."
            raise TypeError(errors.explain(what, want="an SAE or a tensor [n, d]", fix="SuperpositionPanel(sae)"))
        self._chosen, self._ready = "selected" in traits, False
        if traits.get("side") == "encoder":
            self._matrix("encoder")  # says if there is none
        super().__init__(**traits)
        has = [s for s in SIDES if self._of_sae and (s == "decoder" or hasattr(directions, "W_enc"))]
        self.facts = {"sides": has, "listed": _LISTED}
        self._ready = True
        self._compute()

    @property
    def neighbours(self) -> list[tuple[int, float]]:
        """The nearest others of the selected direction and the cosines with them, the nearest first."""
        if self.result is None:
            return []
        i = self.selected
        return list(zip(self.result.nearest[i].tolist(), self.result.nearest_cos[i].tolist(), strict=True))

    def summary(self) -> str:
        """See Panel."""
        size = "" if self.result is None else f", {self._size()}"
        return f"direction {self.selected}, {self.side if self._of_sae else 'tensor'}{size}"

    def code(self) -> str:
        """Python that makes `found`, `table` and `neighbours` of `sae` (or of `directions`, if given a tensor)."""
        name = "sae" if self._of_sae else "directions"
        given = {"encoder": "sae.W_enc.T"}.get(self.side, "sae") if self._of_sae else name
        table = (
            f"table = found.to_frame().sort_values('max_abs_cos', ascending={not self.closest_first}, kind='stable')"
        )
        i = self.selected
        return "\n".join(
            [
                "import saewb",
                "",
                f"# {name}: what the panel was made with",
                f"found = saewb.superposition({given}, neighbours={self._neighbours})",
                table,
                f"neighbours = list(zip(found.nearest[{i}].tolist(), found.nearest_cos[{i}].tolist()))",
                "",
            ]
        )

    def static_html(self) -> str:
        """See Panel."""
        if self.result is None:
            return "<div>not computed yet</div>"
        near = [(j, f"{cos:+.3f}") for j, cos in self.neighbours]
        closest = [(i, j, f"{cos:+.3f}") for i, _, j, cos in self.rows["rows"][:12]]
        return (
            self.result._repr_html_()
            + _static.grid(("direction", "nearest", "cosine"), closest)
            + f"<div style='margin-top:8px'><b>Neighbours of {self.selected}</b></div>"
            + _static.grid(("direction", "cosine"), near)
        )

    def asked(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what != "code":
            raise ValueError(errors.explain(f"SuperpositionPanel was asked to {what!r}."))
        self.notice = self.code()

    @t.validate("selected", "side")
    @guarded
    def _check(self, proposal: dict) -> Any:
        name, got = proposal["trait"].name, proposal["value"]
        with refused():
            if name == "side":
                if got not in SIDES:
                    near = errors.near(got, SIDES)
                    raise ValueError(errors.explain(f"side is {got!r}.", near=near, want=", ".join(SIDES)))
                self._matrix(got)
            elif not (n := len(self._matrix(self.side))) > got >= 0:
                raise ValueError(errors.explain(f"direction {got} of {n}.", want=f"0 to {n - 1}"))
        return got

    @t.observe("side", "closest_first")
    @guarded
    def _asked_anew(self, _: Any = None) -> None:
        if self._ready:
            self._compute()

    @t.observe("selected")
    @guarded
    def _selected_anew(self, _: Any = None) -> None:
        if self._ready:
            self._chosen = True
            self._turn()

    def _matrix(self, side: str) -> Any:
        if not self._of_sae:
            if side == "encoder":
                raise ValueError(
                    errors.explain("a tensor has no encoder.", want="an SAE", fix="SuperpositionPanel(sae)")
                )
            return self.directions
        if side == "encoder" and not hasattr(self.directions, "W_enc"):
            raise ValueError(errors.explain(f"{self.directions!r} has no W_enc.", want="decoder", fix="side='decoder'"))
        return self.directions.W_enc.T if side == "encoder" else self.directions.W_dec

    def _compute(self) -> None:
        side = self.side
        if side in self._results:
            self.dropped("cosines")
            self._arrive()
            return
        matrix, neighbours = self._matrix(side), self._neighbours

        def work() -> Any:
            found = saewb.superposition(matrix, neighbours=neighbours)
            return found, found.to_frame()

        def then(made: Any) -> None:
            self._results[side] = made
            self._arrive()

        if len(matrix) > _AT_ONCE:
            self.title = "Superposition"
            self.started("cosines", f"cosines between {len(matrix):,} directions", work, then)
        else:
            then(work())

    def _arrive(self) -> None:
        """Show the result of this side."""
        self.result, frame = self._results[self.side]
        what = f"{self.side} directions" if self._of_sae else "directions"
        self.title = f"Superposition of {what}"
        self.about = f"{self._size()}. {self.directions!r}" if self._of_sae else self._size()
        self.figures = _packing.crowding(self.result, frame, _BINS)
        table = frame.sort_values("max_abs_cos", ascending=not self.closest_first, kind="stable")
        listed = table.head(_LISTED).reset_index()[["feature", "max_abs_cos", "nearest", "nearest_cos"]]
        self.rows = {"rows": [[int(i), _packing.short(m), int(j), _packing.short(c)] for i, m, j, c in listed.values]}
        if not self._chosen:
            self.selected = int(table.index[0])
            self._chosen = False
        self._turn()

    def _size(self) -> str:
        return f"{self.result.n_features:,} directions in {self.result.d:,} dimensions"

    def _turn(self) -> None:
        near = [[j, _packing.short(cos)] for j, cos in self.neighbours]
        self.page = {"direction": self.selected, "neighbours": near}
