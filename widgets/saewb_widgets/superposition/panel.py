"""SuperpositionPanel: how the directions of SAEs crowd one another, and which are next to which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, on_change, report_errors, source
from saewb_widgets.serialize import short
from saewb_widgets.superposition import serialize
from saewb_widgets.superposition.inputs import SIDES, Given

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 4096  # directions up to which it takes no thread
_LISTED = 200  # directions in the table
_NORMS = {"decoder": "the length of its decoder row", "encoder": "the length of its encoder column"}


class SuperpositionPanel(Panel):
    """Look at the cosines between all pairs of directions: spread, closest pairs, and the neighbors of one.

    What is shown is `saewb.superposition`, whose result is `panel.result`; above 4,096 directions it is computed beside
    the notebook (`busy`, `wait()`). Of several SAEs one is looked at (`which`), then the others are computed, one after
    the other: `panel.compared` holds their figures, and their histograms are outlined in that of the one looked at.

    Example:
        >>> import saewb
        >>> panel = SuperpositionPanel(saewb.load_sae("tiny"))
        >>> panel
        SuperpositionPanel(direction 648, decoder, 1,024 directions in 128 dimensions)
        >>> [(latent, round(cos, 2)) for latent, cos in panel.neighbors[:2]]
        [(775, -0.9), (916, -0.26)]
        >>> sae = saewb.load_sae("tiny")
        >>> two = SuperpositionPanel({"decoder": sae, "encoder": sae.W_enc.T}, which="encoder")
        >>> two.compared.mean_max_abs_cos.round(2).to_dict()
        {'decoder': 0.37, 'encoder': 0.36}
    """

    _esm = source("shared/frame.js", "superposition/superposition.js")
    _css = source("shared/frame.css", "superposition/superposition.css")

    which = t.Unicode("", help="of several: the name of the one looked at").tag(sync=True)
    selected = t.Int(0, help="the direction whose neighbors are shown").tag(sync=True)
    side = t.Unicode("decoder", help="decoder (what latents write) or encoder (what they read); of an SAE").tag(
        sync=True
    )
    scatter = t.Unicode("norm", help="what the largest |cos| is drawn against: norm, or with an index density").tag(
        sync=True
    )
    closest_first = t.Bool(True, help="False: those with the most room first").tag(sync=True)
    rows = t.Dict(help="the table: direction, its largest |cos|, nearest other, cosine with it").tag(sync=True)
    page = t.Dict(help="the neighbors of the selected direction").tag(sync=True)
    figures = t.Dict(help="what all pairs amount to, and the histograms").tag(sync=True)
    beside = t.Dict(help="the figures and histograms of all").tag(sync=True)
    dots = t.Dict(help="the scatter").tag(sync=True)
    facts = t.Dict(help="what can be chosen").tag(sync=True)

    def __init__(self, directions: Any, *, index: Any = None, neighbors: int = 12, **traits: Any) -> None:
        """Compute and show.

        Args:
            directions: an SAE, or a tensor `[n, d]` with one direction per row, of any length; or several of them, a
                dict by name, or a list, whose names are "0", "1", ...; n and d may differ.
            index: of the SAE, for the density of latents; of several SAEs a dict by name, or a list as long.
            neighbors: how many to show of each.
            traits: `which`, `selected`, `side`, `scatter` (density where there is an index), `closest_first`.

        Raises:
            TypeError: for anything else, or an unknown trait.
            ValueError: for fewer than two directions, a direction or a side that is not there, an empty list, two of
                one name, or an index of another SAE.
        """
        self.check_names(traits)
        self.directions, self.index = directions, index
        self.given, self._neighbors = Given.read(directions, index), neighbors
        self.result: Any = None  # of saewb.superposition, of the side shown
        self.points: pd.DataFrame | None = None  # of each direction its largest |cos|, and its length or density
        self._results: dict[tuple[str, str], tuple[Any, pd.DataFrame]] = {}
        self._failed: dict[tuple[str, str], Exception] = {}
        self._due: tuple[str, str] | None = None  # what is being computed
        self._choosing = False  # a direction unasked
        traits.setdefault("which", self.given.names[0])
        if traits["which"] in self.given.of:
            self.given.matrix(traits["which"], traits.get("side", "decoder"))  # says if there is none
            traits.setdefault("scatter", self.given.scatters(traits["which"])[0])
        super().__init__(**traits)
        self._picked = {self.which: self.selected} if "selected" in traits else {}  # by the reader, of each
        self._ready = True
        self._turn_to()
        self._compute()

    @property
    def neighbors(self) -> list[tuple[int, float]]:
        """The nearest others of the selected direction and the cosines with them, the nearest first."""
        if self.result is None:
            return []
        i = self.selected
        return list(zip(self.result.nearest[i].tolist(), self.result.nearest_cos[i].tolist(), strict=True))

    @property
    def compared(self) -> pd.DataFrame:
        """The figures of each that has been computed, one a row."""
        import pandas as pd

        made = self._made()
        return pd.DataFrame({name: made[name][0].figures() for name in self.given.names if name in made}).T

    def summary(self) -> str:
        """See Panel."""
        size = "" if self.result is None else f", {self._size()}"
        of = f"{self.which!r} of {len(self.given.of)}, " if self.given.form != "one" else ""
        return f"{of}direction {self.selected}, {self._what()}{size}"

    def code(self) -> str:
        """Python that makes `found`, `table`, `neighbors` and `points` of `sae` (or of `directions`, if a tensor).

        Of several it is `saes` (or `directions`, if one is a tensor), and also makes `every` and `compared`.
        """
        several = self.given.form != "one"
        order = f"sort_values('max_abs_cos', ascending={not self.closest_first}, kind='stable')"
        i = self.selected
        lines = [
            *(["import pandas as pd"] if several else []),
            "import saewb",
            "",
            *self.given.code(self.which, self.side, self.scatter, self._neighbors),
            f"table = found.to_frame().{order}",
            f"neighbors = list(zip(found.nearest[{i}].tolist(), found.nearest_cos[{i}].tolist()))",
        ]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        if self.result is None:
            return "<div>not computed yet</div>"
        near = [(j, f"{cos:+.3f}") for j, cos in self.neighbors]
        closest = [(i, j, f"{cos:+.3f}") for i, _, j, cos in self.rows["rows"][:12]]
        return (
            self.result._repr_html_()
            + serialize.still(self.beside, self.which, self.dots, self.figures["cosines"])
            + grid(("direction", "nearest", "cosine"), closest)
            + f"<div style='margin-top:8px'><b>Neighbors of {self.selected}</b></div>"
            + grid(("direction", "cosine"), near)
        )

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what != "code":
            raise ValueError(errors.explain(f"SuperpositionPanel was asked to {what!r}."))
        self.notice = self.code()

    @t.validate("which", "selected", "side", "scatter")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, got = proposal["trait"].name, proposal["value"]
        known = {"which": self.given.names, "side": SIDES}
        with report_errors():
            if name in known and got not in known[name]:
                near = errors.near(got, known[name])
                raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want=", ".join(known[name])))
            if name == "which":
                self.given.matrix(got, self.side)
            elif name == "side":
                self.given.matrix(self.which, got)
            elif name == "scatter":
                if got not in (want := self.given.scatters(self.which)):
                    fix = "SuperpositionPanel(sae, index=index)" if got == "density" else ""
                    raise ValueError(errors.explain(f"scatter is {got!r}.", want=", ".join(want), fix=fix))
            elif not (n := len(self.given.matrix(self.which, self.side))) > got >= 0:
                raise ValueError(errors.explain(f"direction {got} of {n}.", want=f"0 to {n - 1}"))
        return got

    @on_change("which")
    def _another(self) -> None:
        self._turn_to()
        self._compute()

    @on_change("side", "closest_first")
    def _asked_anew(self) -> None:
        self._compute()

    @on_change("scatter")
    def _drawn_anew(self) -> None:
        if self.result is not None:
            self._draw()
            self._turn()

    @on_change("selected")
    def _selected_anew(self) -> None:
        if not self._choosing:
            self._picked[self.which] = self.selected
            if self._results.get((self.which, self.side), (None,))[0] is self.result:
                self._turn()

    # -- computing, one after the other -------------------------------------------------------------------------------

    def _compute(self) -> None:
        """Show what is looked at, at once if it is there; then have the others."""
        self._failed.clear()
        if (self.which, self.side) in self._results:
            self._arrive()
        else:
            self._leave()
        self._go_on()

    def _go_on(self) -> None:
        """Have the next that is not there, what is looked at before the others."""
        names = [self.which, *self.given.names]
        asked = [(name, self.side) for name in names if self.given.has(name, self.side)]
        due = next((one for one in asked if one not in self._results and one not in self._failed), None)
        if "cosines" in self._jobs and self._due == due:
            return
        self.discard_work("cosines")
        self._due = due
        if due is None:
            return
        given, neighbors, several = self.given, self._neighbors, self.given.form != "one"
        matrix = given.matrix(*due)

        def work() -> Any:
            try:
                found = saewb.superposition(matrix, neighbors=neighbors)
                return found, found.to_frame().assign(**given.across(*due))
            except Exception as error:  # raised in `_have`, once the next is under way
                return error

        def then(made: Any) -> None:
            self._have(due, made)

        if sum(len(self.given.matrix(*one)) for one in asked[1:]) > _AT_ONCE:
            of = f" of {due[0]}" if several else ""
            self.start_work("cosines", f"cosines between {len(matrix):,} directions{of}", work, then)
        else:
            then(work())

    def _have(self, due: tuple[str, str], made: Any) -> None:
        """Take what was computed; others go on also where it failed."""
        failed = isinstance(made, Exception)
        if failed:
            self._failed[due] = made
        else:
            self._results[due] = made
        if not failed and due == (self.which, self.side):
            self._arrive()
        else:
            self._compare()
        self._go_on()
        if failed:
            raise made

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _turn_to(self) -> None:
        """Look at another one: at the direction chosen there before, if one was."""
        which, given, self.result, self.points = self.which, self.given, None, None
        names, scatters = given.names if given.form != "one" else [], given.scatters(which)
        self.facts = {"names": names, "sides": given.sides(which), "scatters": scatters}
        if self.scatter not in scatters:
            self.scatter = scatters[0]
        self._choose(self._picked.get(which, 0))

    def _choose(self, i: int) -> None:
        """Select a direction, unasked."""
        self._choosing = True
        try:
            self.selected = i
        finally:
            self._choosing = False

    def _what(self) -> str:
        return self.side if self.given.is_sae(self.which) else "tensor"

    def _made(self) -> dict[str, tuple[Any, pd.DataFrame]]:
        """The results on this side, by name."""
        return {name: made for (name, side), made in self._results.items() if side == self.side}

    def _leave(self) -> None:
        """Nothing of what was looked at before is shown for another one."""
        self.result = self.points = None
        self.title, self.about = self._title(), ""
        self.figures, self.rows, self.dots = {}, {}, {}
        self._compare()
        self._turn()

    def _title(self) -> str:
        what = f"{self.side} directions" if self.given.is_sae(self.which) else "directions"
        of = f" of {self.which}" if self.given.form != "one" else ""
        return f"Superposition of {what}{of}"

    def _arrive(self) -> None:
        """Show the result of this side."""
        self.result, frame = self._results[self.which, self.side]
        self.title = self._title()
        is_sae = self.given.is_sae(self.which)
        self.about = f"{self._size()}. {self.given.of[self.which]!r}" if is_sae else self._size()
        self.figures = serialize.figures(self.which, self.result, frame)
        table = frame.sort_values("max_abs_cos", ascending=not self.closest_first, kind="stable")
        listed = table.head(_LISTED).reset_index()[["feature", "max_abs_cos", "nearest", "nearest_cos"]]
        self.rows = {"rows": [[int(i), short(m), int(j), short(c)] for i, m, j, c in listed.values]}
        if self.which not in self._picked:
            self._choose(int(table.index[0]))
        self._compare()
        self._draw()
        self._turn()

    def _compare(self) -> None:
        """All of them beside each other."""
        has = self.given.has
        why = {name: "no encoder" for name in self.given.names if not has(name, self.side)}
        why.update({name: str(error).splitlines()[0] for (name, _), error in self._failed.items()})
        self.beside = serialize.compared(self.given.names, self._made(), why)

    def _draw(self) -> None:
        """The scatter."""
        self.points = self._results[self.which, self.side][1][["max_abs_cos", self.scatter]]
        norm = _NORMS[self.side] if self.given.is_sae(self.which) else "its length"
        what = norm if self.scatter == "norm" else "the fraction of tokens it fires on"
        self.dots = serialize.dots(self.points, self.scatter, what)

    def _size(self) -> str:
        return f"{self.result.n_features:,} directions in {self.result.d:,} dimensions"

    def _turn(self) -> None:
        near = [[j, short(cos)] for j, cos in self.neighbors]
        page = {"direction": self.selected, "neighbors": near}
        if self.points is not None:
            x, y = self.points[[self.scatter, "max_abs_cos"]].iloc[self.selected]
            page["at"] = [short(x), short(y)]
        self.page = page
