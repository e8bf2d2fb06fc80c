"""SuperpositionPanel: cosines between the directions of one or several SAEs, and the nearest neighbors of each."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, on_change, report_errors, source
from saewb_widgets.serialize import short
from saewb_widgets.superposition import serialize
from saewb_widgets.superposition.inputs import SIDES, Inputs

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 4096  # directions; above, work runs on a thread
_LISTED = 200  # directions in the table
_NORMS = {"decoder": "the length of its decoder row", "encoder": "the length of its encoder column"}


class SuperpositionPanel(Panel):
    """Cosines between all pairs of directions: their distribution, the closest pairs, and the neighbors of one.

    The panel shows `panel.result`, the result of `saewb.superposition`. Above 4,096 directions it is computed in the
    background (`busy`, `wait()`). With several SAEs the panel shows one (`which`) and then computes the others one by
    one: `panel.compared` holds their statistics, and their histograms are outlined in the one shown.

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

    which = t.Unicode("", help="name of the set shown, if there are several").tag(sync=True)
    selected = t.Int(0, help="the direction whose neighbors are shown").tag(sync=True)
    side = t.Unicode("decoder", help="decoder (what latents write) or encoder (what they read), for an SAE").tag(
        sync=True
    )
    scatter = t.Unicode(
        "norm", help="x axis of the scatter plot of the largest |cos|: norm, or with an index density"
    ).tag(sync=True)
    closest_first = t.Bool(True, help="sort the table by decreasing largest |cos|; False: increasing").tag(sync=True)
    rows = t.Dict(help="the table: direction, its largest |cos|, nearest neighbor, cosine with it").tag(sync=True)
    page = t.Dict(help="the neighbors of the selected direction").tag(sync=True)
    figures = t.Dict(help="statistics and histograms of all pairs").tag(sync=True)
    beside = t.Dict(help="statistics and histograms of all sets, for comparison").tag(sync=True)
    dots = t.Dict(help="the scatter plot").tag(sync=True)
    facts = t.Dict(help="constants for the front end: names, sides, scatter axes").tag(sync=True)

    def __init__(self, directions: Any, *, index: Any = None, neighbors: int = 12, **traits: Any) -> None:
        """Compute the cosines and show them.

        Args:
            directions: an SAE, or a tensor `[n, d]` with one direction per row, of any norm; or several of them, as a
                dict by name, or as a list, with the names "0", "1", ...; n and d may differ between them.
            index: feature index of the SAE, for the density of its latents; for several SAEs a dict by name, or a list
                of the same length.
            neighbors: number of nearest neighbors to show.
            traits: `which`, `selected`, `side`, `scatter` (default density if there is an index), `closest_first`.

        Raises:
            TypeError: for any other type, or an unknown trait.
            ValueError: for fewer than two directions, a direction or side that does not exist, an empty list, a
                duplicate name, or an index of another SAE.
        """
        self.check_names(traits)
        self.directions, self.index = directions, index
        self.inputs, self._neighbors = Inputs.from_arguments(directions, index), neighbors
        self.result: Any = None  # of saewb.superposition, for the side shown
        self.points: pd.DataFrame | None = None  # largest |cos| of each direction, and its norm or density
        self._results: dict[tuple[str, str], tuple[Any, pd.DataFrame]] = {}
        self._failed: dict[tuple[str, str], Exception] = {}
        self._pending: tuple[str, str] | None = None  # what is being computed: name and side
        self._is_auto_select = False  # whether the panel, not the reader, is changing `selected`
        traits.setdefault("which", self.inputs.names[0])
        if traits["which"] in self.inputs.directions:
            self.inputs.matrix(traits["which"], traits.get("side", "decoder"))  # raises if there is no encoder
            traits.setdefault("scatter", self.inputs.scatters(traits["which"])[0])
        super().__init__(**traits)
        self._selected_by_name = {self.which: self.selected} if "selected" in traits else {}  # by the reader
        self._ready = True
        self._reset_view()
        self._compute()

    @property
    def neighbors(self) -> list[tuple[int, float]]:
        """Nearest neighbors of the selected direction and their cosines, nearest first."""
        if self.result is None:
            return []
        i = self.selected
        return list(zip(self.result.nearest[i].tolist(), self.result.nearest_cos[i].tolist(), strict=True))

    @property
    def compared(self) -> pd.DataFrame:
        """Statistics of each set computed so far, one row per set."""
        import pandas as pd

        results = self._results_of_side()
        return pd.DataFrame({name: results[name][0].figures() for name in self.inputs.names if name in results}).T

    def summary(self) -> str:
        """See Panel."""
        size = "" if self.result is None else f", {self._size()}"
        of = f"{self.which!r} of {len(self.inputs.names)}, " if self.inputs.form != "one" else ""
        side = self.side if self.inputs.is_sae(self.which) else "tensor"
        return f"{of}direction {self.selected}, {side}{size}"

    def code(self) -> str:
        """Python code that computes `result`, `table`, `neighbors` and `points` from `sae` (or `directions`, a tensor).

        With several sets it starts from `saes` (or `directions`, if one is a tensor), and also computes `results` and
        `compared`.
        """
        order = f"sort_values('max_abs_cos', ascending={not self.closest_first}, kind='stable')"
        i = self.selected
        lines = [
            *(["import pandas as pd"] if self.inputs.form != "one" else []),
            "import saewb",
            "",
            *self.inputs.code(self.which, self.side, self.scatter, self._neighbors),
            f"table = result.to_frame().{order}",
            f"neighbors = list(zip(result.nearest[{i}].tolist(), result.nearest_cos[{i}].tolist()))",
        ]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        if self.result is None:
            return "<div>not computed yet</div>"
        near = [(f"{j} {name}".strip(), f"{cos:+.3f}") for j, cos, name in self._named_neighbors()]
        selected, rows = f"{self.selected} {self.page['label']}".strip(), self.rows["rows"][:12]
        closest = [(f"{i} {a}".strip(), f"{j} {b}".strip(), f"{cos:+.3f}") for i, _, j, cos, a, b in rows]
        return (
            self.result._repr_html_()
            + serialize.static_html(self.beside, self.which, self.dots, self.figures["cosines"])
            + grid(("direction", "nearest", "cosine"), closest)
            + f"<div style='margin-top:8px'><b>Neighbors of {html.escape(selected)}</b></div>"
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
        name, value = proposal["trait"].name, proposal["value"]
        choices = {"which": self.inputs.names, "side": SIDES}.get(name)
        with report_errors():
            if choices and value not in choices:
                near = errors.near(value, choices)
                raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want=", ".join(choices)))
            if name == "which":
                self.inputs.matrix(value, self.side)
            elif name == "side":
                self.inputs.matrix(self.which, value)
            elif name == "scatter":
                if value not in (scatters := self.inputs.scatters(self.which)):
                    fix = "SuperpositionPanel(sae, index=index)" if value == "density" else ""
                    raise ValueError(errors.explain(f"scatter is {value!r}.", want=", ".join(scatters), fix=fix))
            elif not (n := len(self.inputs.matrix(self.which, self.side))) > value >= 0:
                raise ValueError(errors.explain(f"direction {value} of {n}.", want=f"0 to {n - 1}"))
        return value

    @on_change("which")
    def _on_which(self) -> None:
        self._reset_view()
        self._compute()

    @on_change("side", "closest_first")
    def _on_order(self) -> None:
        self._compute()

    @on_change("scatter")
    def _on_scatter(self) -> None:
        if self.result is not None:
            self._draw_scatter()
            self._send_page()

    @on_change("selected")
    def _on_selected(self) -> None:
        if not self._is_auto_select:
            self._selected_by_name[self.which] = self.selected
            if self._results.get((self.which, self.side), (None,))[0] is self.result:
                self._send_page()

    # -- computing, one set after the other ---------------------------------------------------------------------------

    def _compute(self) -> None:
        """Show the current set as soon as its result exists, then compute the others."""
        self._failed.clear()
        if (self.which, self.side) in self._results:
            self._show_result()
        else:
            self._clear_result()
        self._compute_next()

    def _compute_next(self) -> None:
        """Compute the next missing result, that of the current set first."""
        names = [self.which, *self.inputs.names]
        keys = [(name, self.side) for name in names if self.inputs.has(name, self.side)]
        pending = next((key for key in keys if key not in self._results and key not in self._failed), None)
        if "cosines" in self._jobs and self._pending == pending:
            return
        self.discard_work("cosines")
        self._pending = pending
        if pending is None:
            return
        inputs, neighbors = self.inputs, self._neighbors
        matrix = inputs.matrix(*pending)

        def work() -> Any:
            try:
                result = saewb.superposition(matrix, neighbors=neighbors)
                return result, result.to_frame().assign(**inputs.scatter_values(*pending))
            except Exception as error:  # raised in `_on_result`, once the next set is under way
                return error

        def then(result: Any) -> None:
            self._on_result(pending, result)

        if sum(len(inputs.matrix(*key)) for key in keys[1:]) > _AT_ONCE:
            of = f" of {pending[0]}" if inputs.form != "one" else ""
            self.start_work("cosines", f"cosines between {len(matrix):,} directions{of}", work, then)
        else:
            then(work())

    def _on_result(self, key: tuple[str, str], result: Any) -> None:
        """Store a result or its exception, and compute the next set in either case."""
        is_error = isinstance(result, Exception)
        (self._failed if is_error else self._results)[key] = result
        if not is_error and key == (self.which, self.side):
            self._show_result()
        else:
            self._send_comparison()
        self._compute_next()
        if is_error:
            raise result

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _reset_view(self) -> None:
        """Switch to another set, at the direction that was selected there before."""
        self.result = self.points = None
        names, scatters = self.inputs.names if self.inputs.form != "one" else [], self.inputs.scatters(self.which)
        self.facts = {"names": names, "sides": self.inputs.sides(self.which), "scatters": scatters}
        if self.scatter not in scatters:
            self.scatter = scatters[0]
        self._auto_select(self._selected_by_name.get(self.which, 0))

    def _auto_select(self, i: int) -> None:
        self._is_auto_select = True
        try:
            self.selected = i
        finally:
            self._is_auto_select = False

    def _results_of_side(self) -> dict[str, tuple[Any, pd.DataFrame]]:
        return {name: result for (name, side), result in self._results.items() if side == self.side}

    def _clear_result(self) -> None:
        self.result = self.points = None
        self.title, self.about = self._title(), ""
        self.figures, self.rows, self.dots = {}, {}, {}
        self._send_comparison()
        self._send_page()

    def _title(self) -> str:
        what = f"{self.side} directions" if self.inputs.is_sae(self.which) else "directions"
        of = f" of {self.which}" if self.inputs.form != "one" else ""
        return f"Superposition of {what}{of}"

    def _show_result(self) -> None:
        self.result, frame = self._results[self.which, self.side]
        self.title, self.about = self._title(), self._size()
        if self.inputs.is_sae(self.which):
            self.about += f". {self.inputs.directions[self.which]!r}"
        self.figures = serialize.figures(self.which, self.result, frame)
        table = frame.sort_values("max_abs_cos", ascending=not self.closest_first, kind="stable")
        listed = table.head(_LISTED).reset_index()[["feature", "max_abs_cos", "nearest", "nearest_cos"]]
        names = (self._labels([int(i) for i in listed[column]]) for column in ("feature", "nearest"))
        pairs = zip(listed.values, *names, strict=True)
        self.rows = {"rows": [[int(i), short(m), int(j), short(c), a, b] for (i, m, j, c), a, b in pairs]}
        if self.which not in self._selected_by_name:
            self._auto_select(int(table.index[0]))
        self._send_comparison()
        self._draw_scatter()
        self._send_page()

    def _send_comparison(self) -> None:
        reasons = {name: "no encoder" for name in self.inputs.names if not self.inputs.has(name, self.side)}
        reasons.update({name: str(error).splitlines()[0] for (name, _), error in self._failed.items()})
        self.beside = serialize.comparison(self.inputs.names, self._results_of_side(), reasons)

    def _draw_scatter(self) -> None:
        self.points = self._results[self.which, self.side][1][["max_abs_cos", self.scatter]]
        norm = _NORMS[self.side] if self.inputs.is_sae(self.which) else "its length"
        label = norm if self.scatter == "norm" else "the fraction of tokens it fires on"
        self.dots = serialize.dots(self.points, self.scatter, label)

    def _size(self) -> str:
        return f"{self.result.n_features:,} directions in {self.result.d:,} dimensions"

    def _labels(self, directions: Sequence[int]) -> list[str]:
        """Labels of latents, from the index of the set shown; "" without one."""
        index = self.inputs.index.get(self.which)
        return [""] * len(directions) if index is None else index.label_texts(directions)

    def _named_neighbors(self) -> list[list[Any]]:
        """Nearest neighbors of the selected direction, their cosines and labels."""
        near = self.neighbors
        names = self._labels([j for j, _ in near])
        return [[j, short(cos), name] for (j, cos), name in zip(near, names, strict=True)]

    def _send_page(self) -> None:
        near = self._named_neighbors()
        page = {"direction": self.selected, "label": self._labels([self.selected])[0], "neighbors": near}
        if self.points is not None:
            x, y = self.points[[self.scatter, "max_abs_cos"]].iloc[self.selected]
            page["at"] = [short(x), short(y)]
        self.page = page
