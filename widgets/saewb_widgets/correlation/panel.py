"""CorrelationPanel: a correlation matrix of any size as a map, its strongest pairs, and both features of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.correlation import serialize
from saewb_widgets.correlation.inputs import LATENTS, Given
from saewb_widgets.panel import Panel, catch_errors, report_errors, source

CELLS = ("strongest", "mean")
PIXELS = 384  # cells per side that are sent, at most
AT_ONCE = 2048  # features up to which no thread is needed
_CALM = 0.4  # seconds without a request before a scan goes on, so that zooming stays quick


class _Stopped(Exception):
    """The reader wants no more of it."""


class CorrelationPanel(Panel):
    """Look at a correlation, cosine or co-activation matrix: zoom from all of it to single entries, click for a pair.

    What is shown is `panel.matrix`, a `saewb.MatrixView`: cells of the part in view, never the whole. Above 2,048
    features, order and strongest entries are found beside the notebook (`busy`, `wait()`); until then cells show means,
    and a part in view that stays in view is made finer. So is a matrix of latents on text, which needs the model.
    With `against`, a second matrix is beside it, the same features in the same places: true against learnt ones.

    Example:
        >>> import saewb
        >>> panel = CorrelationPanel(saewb.random_low_rank_correlation(300, 5))
        >>> panel
        CorrelationPanel(correlation, 300 x 300, by clusters, rows 0:300, columns 0:300)
        >>> panel.view = (0, 20, 40, 60)
        >>> tuple(panel.shown.values.shape), panel.shown.cells
        ((20, 20), 'exact')
    """

    _esm = source("shared/frame.js", "correlation/correlation.js")
    _css = source("shared/frame.css", "correlation/correlation.css")

    view = t.Tuple(t.Int(), t.Int(), t.Int(), t.Int(), help="row0, row1, col0, col1: places in the order").tag(
        sync=True
    )
    order = t.Unicode("", help="clusters, density, index; matched for two sets").tag(sync=True)
    cells = t.Unicode("strongest", help="of a cell of many entries: strongest or mean").tag(sync=True)
    pair = t.Tuple(t.Int(), t.Int(), default_value=(-1, -1), help="row's and column's feature; -1: none").tag(sync=True)
    version = t.Int(0, help="counts what changes the picture").tag(sync=True)
    progress = t.Float(0.0, help="fraction of all entries looked through").tag(sync=True)
    page = t.Dict(help="both features of the pair").tag(sync=True)
    figures = t.Dict(help="statistics and the strongest pairs").tag(sync=True)
    facts = t.Dict(help="what stays").tag(sync=True)

    def __init__(
        self,
        of: Any,
        other: Any = None,
        *,
        model: Any = None,
        tokens: Any = None,
        index: Any = None,
        by: str | None = None,
        against: Any = None,
        matched: Any = None,
        **traits: Any,
    ) -> None:
        """Show a matrix.

        Args:
            of: a matrix `[n, n]`, a LowRankCorrelation, a Coactivation, a FeatureIndex, a MatrixView, or an SAE (its
                directions' cosines, or with `model` and `tokens` its latents' correlation on them).
            other: true directions or another SAE: cosines of `of` with these, matched.
            model: with `tokens`: the model is run beside the notebook, and `matrix` is None until it has been.
            tokens: ids or texts.
            index: of the features of the rows, for what they fire on.
            by: see `saewb.matrix_view` and `saewb.latent_matrix`.
            against: a second matrix, to be compared: anything that `of` may be except an SAE with text or an index.
            matched: of each feature of `of` its feature in `against`, -1 for none; e.g. the first of what
                `saewb.synthetic.best_matches` gives. None: the two have the same features.
            traits: e.g. `order="density"`, `view=(0, 100, 0, 100)`.

        Raises:
            TypeError: for anything else, or an unknown trait.
            ValueError: for a matrix that is not square, an order or a window that is not there, an index or a second
                matrix of another number of features.
        """
        self.check_names(traits)
        self.given = Given(of, other, model, tokens, by, against, matched)
        self.index = of if isinstance(of, saewb.FeatureIndex) else index
        self.matrix: Any = None if self.given.takes_long else self.given.matrix()
        self.second: Any = None if self.matrix is None else self.given.second(self.matrix)
        self.overview: Any = None
        self._beside: Any = None  # overview of the second
        self._fine: Any = None  # what was made finer: (overview, window, cells), views
        self._stop, self._given_up, self._asked_at, self._seen = threading.Event(), False, 0.0, 0
        self._ready = False
        matrix = self.matrix
        self._shape = (of.cfg.d_sae,) * 2 if matrix is None else matrix.shape
        self._orders = LATENTS if matrix is None else matrix.orders
        n, m = self._shape
        self.given.fits(self.index, n)
        traits.setdefault("order", self._orders[0])
        traits.setdefault("view", (0, n, 0, m))
        super().__init__(**traits)
        self._ready = True
        self._describe((by or "correlation") if matrix is None else matrix.what)
        self._read() if matrix is None else self._arrange()
        self._turn()

    @property
    def shown(self) -> Any:
        """The cells in view: `values`, `window`, `step`, `cells`.

        Raises:
            ValueError: while the model is still running.
        """
        return self._views(self.view)[0]

    @property
    def beside(self) -> Any:
        """The same cells of the second matrix; None if there is none, or not yet."""
        return next(iter(self._views(self.view)[1:]), None)

    def summary(self) -> str:
        """See Panel."""
        (n, m), (r0, r1, c0, c1) = self._shape, self.view
        return f"{self.facts['what']}, {n} x {m}, by {self.order}, rows {r0}:{r1}, columns {c0}:{c1}"

    def code(self) -> str:
        """Python that makes `matrix`, `rows`, `columns` and `values`, the cells in view, of what was given.

        With a second matrix also `second` and `beside`, its cells; with a pair, `pair`.
        """
        lines = ["import saewb", "", *self.given.code()]
        if self.matrix is not None:
            shown, (r0, r1, c0, c1) = self.shown, self.shown.window
            columns = "order" if self.matrix.same else f"range({self.matrix.shape[1]})"
            cells = self.cells if shown.cells == "exact" else shown.cells
            lines += [f"order = matrix.order({self.order!r})"]
            lines += [f"rows, columns = order[{r0}:{r1}], {columns}[{c0}:{c1}]"]
            lines += [f"values = matrix.pooled(rows, columns, {shown.step}, {cells!r})"]
            if self.beside is not None:
                lines += [f"beside = second.pooled(rows, columns, {shown.step}, {cells!r})"]
            if self.pair[0] >= 0:
                lines += [f"pair = matrix.pair({self.pair[0]}, {self.pair[1]})"]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        if self.matrix is None:
            return "<div>the model has not been run yet</div>"
        return serialize.still(self.matrix, self._views(self.view), self.figures.get("pairs", []))

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "tile":
            self._send_tile(**how)
        elif what == "peek":
            i, j = int(how["row"]), int(how["col"])
            said = [serialize.words(self.matrix, self.index, k, axis) for axis, k in enumerate((i, j))]
            self.send({"peek": [i, j], "said": said})
        elif what == "progress":
            self._say_progress()
        elif what == "refine":
            self._refine()
        elif what == "stop":
            self._stop.set()
            self._given_up = True  # also where the looking has not begun
        elif what == "again":
            self._read() if self.matrix is None else self._arrange()
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"CorrelationPanel was asked to {what!r}."))

    @t.validate("view", "order", "cells", "pair")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, got, (n, m) = proposal["trait"].name, proposal["value"], self._shape
        with report_errors():
            if name == "view":
                self._window(got)
            if name == "pair" and got != (-1, -1) and not (0 <= got[0] < n and 0 <= got[1] < m):
                raise ValueError(errors.explain(f"pair is {got}.", want=f"features below {n} and {m}"))
            known = {"order": self._orders, "cells": CELLS}.get(name)
            if known and got not in known:
                near = errors.near(got, known)
                raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want=", ".join(known)))
        return got

    def _window(self, got: tuple) -> tuple:
        n, m = self._shape
        if len(got) != 4 or not (0 <= got[0] < got[1] <= n and 0 <= got[2] < got[3] <= m):
            raise ValueError(errors.explain(f"view is {got}.", want=f"row0 < row1 <= {n}, col0 < col1 <= {m}"))
        return got

    @t.observe("order")
    @catch_errors
    def _ordered_anew(self, _: Any = None) -> None:
        if self._ready and self.matrix is not None:
            self._arrange()

    @t.observe("cells")
    @catch_errors
    def _cells_anew(self, _: Any = None) -> None:
        if self._ready:
            self.version += 1

    @t.observe("pair")
    @catch_errors
    def _paired_anew(self, _: Any = None) -> None:
        if self._ready:
            self._turn()

    def _describe(self, what: str) -> None:
        self.title, self.about = self.given.said(self._shape, what)
        two = self.given.against is not None
        self.facts = {"shape": list(self._shape), "orders": list(self._orders), "what": what, "two": two}

    # -- the matrix --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Run the model beside the notebook."""
        stop, self._given_up, self._seen = threading.Event(), False, 0
        self._stop = stop

        def progress(seen: int) -> None:
            self._seen = seen
            if stop.is_set():
                raise _Stopped

        def work() -> Any:
            try:
                matrix = self.given.matrix(progress)
                return matrix, self.given.second(matrix)
            except _Stopped:
                return None

        self.start_work("matrix", "running the model", work, self._have)

    def _have(self, got: Any) -> None:
        """Take the matrix, if it was not stopped."""
        if got is None:
            self.notice = f"Stopped after {self._seen:,} tokens."
            return
        self.matrix, self.second = got
        self._orders, self._seen = self.matrix.orders, 0
        self._describe(self.matrix.what)
        self._arrange()
        self._turn()

    def _say_progress(self) -> None:
        if "matrix" in self._jobs:
            self.busy = f"running the model: {self._seen:,} tokens"
        elif self.overview is not None:
            self.progress = self.overview.done_frac

    def _overviews(self) -> list[Any]:
        """Of the matrix, and of the second."""
        if self.matrix is None:
            what = "the matrix is not there yet" + (": the model is running." if self.busy else ".")
            raise ValueError(errors.explain(what, fix="panel.wait()"))
        if self.overview is None:
            self.overview = self.matrix.overview()
        if self.second is None:
            return [self.overview]
        if self._beside is None or self._beside.rows is not self.overview.rows:
            self._beside = self.second.overview(self.overview.rows)
        return [self.overview, self._beside]

    def _arrange(self) -> None:
        """Have the order, then look through all entries."""
        self._stop.set()
        self._given_up, self.progress = False, 0.0
        matrix, by = self.matrix, self.order
        self.discard_work("scan")
        what = f"ordering {self._shape[0]:,} features by {by}"
        self._soon("order", what, lambda: matrix.overview(matrix.order(by)), self._arranged)

    def _soon(self, key: str, what: str, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """At once, or of a large matrix beside the notebook."""
        if max(self._shape) > AT_ONCE:
            self.start_work(key, what, work, then)
        else:
            self.discard_work(key)
            then(work())

    def _arranged(self, overview: Any) -> None:
        self.overview, stop = overview, threading.Event()
        self._stop = stop
        self.version += 1
        if self._given_up:
            return
        seen = self._overviews()

        def work() -> Any:
            _scan(seen[::-1], stop, lambda: self._asked_at)
            return overview

        self._soon("scan", "looking for the strongest entries", work, self._scanned)

    def _scanned(self, overview: Any) -> None:
        if overview is self.overview:
            self.progress = overview.done_frac
            self.figures = serialize.figures(overview)
            self.version += 1

    # -- what is in view ---------------------------------------------------------------------------------------------

    def _views(self, window: tuple) -> list[Any]:
        """Of the matrix, and of the second in the same cells."""
        seen = self._overviews()
        if self._fine is not None and self._fine[0] == (seen[0], tuple(window), self.cells):
            return self._fine[1]
        return _view(seen, window, self.cells)

    def _refine(self) -> None:
        """Make the part in view of all its entries, beside the notebook, unless the scan will have it soon."""
        window, cells, seen = self.view, self.cells, self._overviews()
        if "refine" in self._jobs or not _is_refinable(seen, window):
            return
        if all(view.is_final for view in self._views(window)):
            return

        def work() -> Any:
            return (seen[0], window, cells), _refine(seen, window, cells)

        self.start_work("refine", "making the picture finer", work, self._refined)

    def _refined(self, got: Any) -> None:
        self._fine = got
        self.version += 1

    def _send_tile(self, seq: int, view: Any = None, plain: bool = False) -> None:
        """Of a view that the front end names, since its messages may overtake its traits."""
        self._asked_at = time.monotonic()
        if self.matrix is None:
            self.send({"tile": seq, "none": True})
            return
        window = self.view if view is None else self._window(tuple(view))
        head, levels = serialize.tile(self.overview, self._views(window), plain)
        self.send({"tile": seq, **head}, levels or None)

    def _turn(self) -> None:
        """Turn to the pair."""
        made = self.pair[0] >= 0 and self.matrix is not None
        self.page = serialize.pair(self.matrix, self.second, self.index, *self.pair) if made else {}


# -- overviews ---------------------------------------------------------------------------------------------------------


def _view(overviews: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """A view of each overview, in the same cells; only of the first while the second has no such cells."""
    views = [overview.view(window, PIXELS, cells) for overview in overviews]
    if len({(view.step, view.cells) for view in views}) == 1:
        return views
    return _refine(overviews, window, cells) if _span(window) <= AT_ONCE else views[:1]


def _refine(overviews: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """The same from all entries of the window."""
    return [overview.refined(window, PIXELS, cells) for overview in overviews]


def _is_refinable(overviews: Sequence[Any], window: tuple) -> bool:
    """Whether a window can be refined in seconds; larger ones wait for the scan."""
    return _span(window) <= PIXELS * max(overview.step for overview in overviews)


def _scan(overviews: Sequence[Any], stop: threading.Event, requested_at: Callable[[], float]) -> None:
    """Scan all, band by band, until `stop` is set; pauses while requests come, by `time.monotonic`."""
    for overview in overviews:
        for _ in overview.scan():
            while time.monotonic() - requested_at() < _CALM and not stop.is_set():
                time.sleep(0.05)
            if stop.is_set():
                return


def _span(window: tuple) -> int:
    return max(window[1] - window[0], window[3] - window[2])
