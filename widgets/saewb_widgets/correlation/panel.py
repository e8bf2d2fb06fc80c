"""CorrelationPanel: a zoomable map of a correlation matrix, its strongest pairs, and both features of a pair."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.correlation import serialize
from saewb_widgets.correlation.inputs import LATENTS, Inputs
from saewb_widgets.panel import Panel, catch_errors, on_change, report_errors, source

CELLS = ("strongest", "mean")
PIXELS = 384  # cells per side of the picture sent, at most
AT_ONCE = 2048  # features; above, work runs on a thread
_IDLE = 0.4  # seconds without a request before a scan continues, so that zooming stays fast


class _Stopped(Exception):
    """Raised in the model's pass after the user stopped it."""


class CorrelationPanel(Panel):
    """A correlation, cosine or coactivation matrix: zoom from all of it to single entries, click a cell for its pair.

    The panel shows `panel.matrix`, a `saewb.MatrixView`, of which only the cells in view are computed. Above 2,048
    features, the order and the strongest entries are computed in the background (`busy`, `wait()`); until then cells
    show means, and the window in view is refined once it stays unchanged. A matrix of latents on text, which takes a
    pass of the model, is computed in the background too. With `against`, a second matrix is shown next to the first,
    with the same features in the same places, for instance true against learned ones.

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

    view = t.Tuple(
        t.Int(), t.Int(), t.Int(), t.Int(), help="window: row0, row1, col0, col1, as positions in the order"
    ).tag(sync=True)
    order = t.Unicode("", help="order of the features: clusters, density, index; matched for two sets").tag(sync=True)
    cells = t.Unicode("strongest", help="what a cell of many entries shows: strongest or mean").tag(sync=True)
    pair = t.Tuple(t.Int(), t.Int(), default_value=(-1, -1), help="features of the row and the column; -1: none").tag(
        sync=True
    )
    version = t.Int(0, help="incremented with every change of the picture").tag(sync=True)
    progress = t.Float(0.0, help="fraction of all entries scanned").tag(sync=True)
    page = t.Dict(help="both features of the pair").tag(sync=True)
    figures = t.Dict(help="statistics and strongest pairs").tag(sync=True)
    facts = t.Dict(help="constants for the front end: shape, orders, statistic").tag(sync=True)

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
            of: a matrix `[n, n]`, a LowRankCorrelation, a Coactivation, a FeatureIndex, a MatrixView, or an SAE
                (cosines of its directions, or with `model` and `tokens` the correlation of its latents on them).
            other: true directions or another SAE: shows the cosines of `of` with these, matched.
            model: with `tokens`: the model is run in the background, and `matrix` is None until it has finished.
            tokens: token ids or texts.
            index: feature index of the rows' features, for the tokens they fire on.
            by: see `saewb.matrix_view` and `saewb.latent_matrix`.
            against: a second matrix for comparison: anything that `of` may be except an SAE with text or an index.
            matched: for each feature of `of` its feature in `against`, -1 for none; e.g. the first result of
                `saewb.synthetic.best_matches`. None: both have the same features.
            traits: e.g. `order="density"`, `view=(0, 100, 0, 100)`.

        Raises:
            TypeError: for any other type, or an unknown trait.
            ValueError: for a matrix that is not square, an order or window that does not exist, an index or a second
                matrix with another number of features.
        """
        self.check_names(traits)
        self.inputs = Inputs(of, other, model, tokens, by, against, matched)
        self.index = of if isinstance(of, saewb.FeatureIndex) else index
        self.matrix: Any = None if self.inputs.needs_model else self.inputs.matrix()
        self.second: Any = None if self.matrix is None else self.inputs.second(self.matrix)
        self.overview: Any = None
        self._second_overview: Any = None
        self._refined: Any = None  # (overview, window, cells) and the refined views of it
        self._stop, self._is_stopped, self._requested_at, self._n_read = threading.Event(), False, 0.0, 0
        self._ready = False
        matrix = self.matrix
        self._shape = (of.cfg.d_sae,) * 2 if matrix is None else matrix.shape
        self._orders = LATENTS if matrix is None else matrix.orders
        n, m = self._shape
        self.inputs.check_index(self.index, n)
        traits.setdefault("order", self._orders[0])
        traits.setdefault("view", (0, n, 0, m))
        super().__init__(**traits)
        self._ready = True
        self._describe((by or "correlation") if matrix is None else matrix.what)
        self._compute()
        self._send_page()

    @property
    def shown(self) -> Any:
        """The view of the cells shown, with `values`, `window`, `step` and `cells`.

        Raises:
            ValueError: while the model is still running.
        """
        return self._views(self.view)[0]

    @property
    def beside(self) -> Any:
        """The same cells of the second matrix; None if there is no second matrix, or its cells are not computed yet."""
        return next(iter(self._views(self.view)[1:]), None)

    def summary(self) -> str:
        """See Panel."""
        (n, m), (r0, r1, c0, c1) = self._shape, self.view
        return f"{self.facts['what']}, {n} x {m}, by {self.order}, rows {r0}:{r1}, columns {c0}:{c1}"

    def code(self) -> str:
        """Python code that computes `matrix`, `rows`, `columns` and `values`, the cells in view, from the inputs.

        With a second matrix also `second` and its cells `beside`; with a selected pair also `pair`.
        """
        lines = ["import saewb", "", *self.inputs.code()]
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
        return serialize.static_html(self.matrix, self._views(self.view), self.figures.get("pairs", []))

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "tile":
            self._send_tile(**how)
        elif what == "peek":
            i, j = int(how["row"]), int(how["col"])
            tokens = [serialize.top_tokens(self.matrix, self.index, k, axis) for axis, k in enumerate((i, j))]
            self.send({"peek": [i, j], "tokens": tokens})
        elif what == "progress":
            if "matrix" in self._jobs:
                self.busy = f"running the model: {self._n_read:,} tokens"
            elif self.overview is not None:
                self.progress = self.overview.done_frac
        elif what == "refine":
            self._refine()
        elif what == "stop":
            self._stop.set()
            self._is_stopped = True  # also if the scan has not started yet
        elif what == "again":
            self._compute()
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"CorrelationPanel was asked to {what!r}."))

    @t.validate("view", "order", "cells", "pair")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value, (n, m) = proposal["trait"].name, proposal["value"], self._shape
        choices = {"order": self._orders, "cells": CELLS}.get(name)
        with report_errors():
            if name == "view":
                self._check_window(value)
            if name == "pair" and value != (-1, -1) and not (0 <= value[0] < n and 0 <= value[1] < m):
                raise ValueError(errors.explain(f"pair is {value}.", want=f"features below {n} and {m}"))
            if choices and value not in choices:
                near = errors.near(value, choices)
                raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want=", ".join(choices)))
        return value

    def _check_window(self, window: tuple) -> tuple:
        n, m = self._shape
        if len(window) != 4 or not (0 <= window[0] < window[1] <= n and 0 <= window[2] < window[3] <= m):
            raise ValueError(errors.explain(f"view is {window}.", want=f"row0 < row1 <= {n}, col0 < col1 <= {m}"))
        return window

    @on_change("order")
    def _on_order(self) -> None:
        if self.matrix is not None:
            self._arrange()

    @on_change("cells")
    def _on_cells(self) -> None:
        self.version += 1

    @on_change("pair")
    def _on_pair(self) -> None:
        self._send_page()

    def _describe(self, what: str) -> None:
        self.title, self.about = self.inputs.heading(self._shape, what)
        two = self.inputs.against is not None
        self.facts = {"shape": list(self._shape), "orders": list(self._orders), "what": what, "two": two}

    # -- the matrix --------------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        """Order and scan the matrix; if it takes the model, run that in the background first."""
        if self.matrix is not None:
            self._arrange()
            return
        stop, self._is_stopped, self._n_read = threading.Event(), False, 0
        self._stop = stop

        def progress(n_read: int) -> None:
            self._n_read = n_read
            if stop.is_set():
                raise _Stopped

        def work() -> Any:
            try:
                matrix = self.inputs.matrix(progress)
                return matrix, self.inputs.second(matrix)
            except _Stopped:
                return None

        self.start_work("matrix", "running the model", work, self._on_matrix)

    def _on_matrix(self, matrices: Any) -> None:
        """Show the matrices; None if the model was stopped."""
        if matrices is None:
            self.notice = f"Stopped after {self._n_read:,} tokens."
            return
        self.matrix, self.second = matrices
        self._orders, self._n_read = self.matrix.orders, 0
        self._describe(self.matrix.what)
        self._arrange()
        self._send_page()

    def _overviews(self) -> list[Any]:
        """Overviews of the matrix and, if there is one, of the second."""
        if self.matrix is None:
            what = "the matrix is not there yet" + (": the model is running." if self.busy else ".")
            raise ValueError(errors.explain(what, fix="panel.wait()"))
        if self.overview is None:
            self.overview = self.matrix.overview()
        if self.second is None:
            return [self.overview]
        if self._second_overview is None or self._second_overview.rows is not self.overview.rows:
            self._second_overview = self.second.overview(self.overview.rows)
        return [self.overview, self._second_overview]

    def _arrange(self) -> None:
        """Compute the order, then scan all entries."""
        self._stop.set()
        self._is_stopped, self.progress = False, 0.0
        matrix, by = self.matrix, self.order
        self.discard_work("scan")
        what = f"ordering {self._shape[0]:,} features by {by}"
        self._run("order", what, lambda: matrix.overview(matrix.order(by)), self._on_overview)

    def _run(self, key: str, what: str, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run work at once, or for a large matrix in the background."""
        if max(self._shape) > AT_ONCE:
            self.start_work(key, what, work, then)
        else:
            self.discard_work(key)
            then(work())

    def _on_overview(self, overview: Any) -> None:
        self.overview, stop = overview, threading.Event()
        self._stop = stop
        self.version += 1
        if self._is_stopped:
            return
        overviews = self._overviews()

        def work() -> Any:
            _scan(overviews[::-1], stop, lambda: self._requested_at)
            return overview

        self._run("scan", "looking for the strongest entries", work, self._on_scan)

    def _on_scan(self, overview: Any) -> None:
        if overview is self.overview:
            self.progress = overview.done_frac
            self.figures = serialize.figures(overview, self.matrix, self.index)
            self.version += 1

    # -- the window in view ------------------------------------------------------------------------------------------

    def _views(self, window: tuple) -> list[Any]:
        """The window of the matrix and, in the same cells, of the second."""
        overviews = self._overviews()
        if self._refined is not None and self._refined[0] == (overviews[0], tuple(window), self.cells):
            return self._refined[1]
        return _view(overviews, window, self.cells)

    def _refine(self) -> None:
        """Recompute the window in view from all its entries in the background, unless the scan will reach it soon."""
        window, cells, overviews = self.view, self.cells, self._overviews()
        if "refine" in self._jobs or not _is_refinable(overviews, window):
            return
        if all(view.is_final for view in self._views(window)):
            return

        def work() -> Any:
            return (overviews[0], window, cells), _refine(overviews, window, cells)

        self.start_work("refine", "making the picture finer", work, self._on_refined)

    def _on_refined(self, refined: Any) -> None:
        self._refined = refined
        self.version += 1

    def _send_tile(self, seq: int, view: Any = None, plain: bool = False) -> None:
        """Send cells; the front end names the view, since its messages may overtake its traits."""
        self._requested_at = time.monotonic()
        if self.matrix is None:
            self.send({"tile": seq, "none": True})
            return
        window = self.view if view is None else self._check_window(tuple(view))
        head, levels = serialize.tile(self.overview, self._views(window), plain)
        self.send({"tile": seq, **head}, levels or None)

    def _send_page(self) -> None:
        has_pair = self.pair[0] >= 0 and self.matrix is not None
        self.page = serialize.pair(self.matrix, self.second, self.index, *self.pair) if has_pair else {}


# -- overviews ---------------------------------------------------------------------------------------------------------


def _view(overviews: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """Views of all overviews in the same cells; only of the first while the second lacks such cells."""
    views = [overview.view(window, PIXELS, cells) for overview in overviews]
    if len({(view.step, view.cells) for view in views}) == 1:
        return views
    return _refine(overviews, window, cells) if _span(window) <= AT_ONCE else views[:1]


def _refine(overviews: Sequence[Any], window: tuple, cells: str) -> list[Any]:
    """Views computed from all entries of the window."""
    return [overview.refined(window, PIXELS, cells) for overview in overviews]


def _is_refinable(overviews: Sequence[Any], window: tuple) -> bool:
    """Whether a window can be refined in seconds; larger ones wait for the scan."""
    return _span(window) <= PIXELS * max(overview.step for overview in overviews)


def _scan(overviews: Sequence[Any], stop: threading.Event, requested_at: Callable[[], float]) -> None:
    """Scan all overviews, band by band, until `stop` is set; pause while the front end sends requests."""
    for overview in overviews:
        for _ in overview.scan():
            while time.monotonic() - requested_at() < _IDLE and not stop.is_set():
                time.sleep(0.05)
            if stop.is_set():
                return


def _span(window: tuple) -> int:
    return max(window[1] - window[0], window[3] - window[2])
