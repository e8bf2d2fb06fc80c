"""CorrelationPanel: a correlation matrix of any size as a map, its strongest pairs, and both features of one."""

from __future__ import annotations

import base64
import threading
from typing import Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets import _packing, _png, _static
from saewb_widgets._panel import Panel, guarded, refused, source

_AT_ONCE = 2048  # features up to which it takes no thread
PIXELS = 384  # cells a side that are sent, at most
_WORDS = 6  # contexts of a feature in a tip
CELLS = ("strongest", "mean")


class CorrelationPanel(Panel):
    """Look at a correlation, cosine or co-activation matrix: zoom from all of it to single entries, click for a pair.

    What is shown is `panel.matrix`, a `saewb.MatrixView`: cells of the part in view, never the whole. Above 2,048
    features, order and strongest entries are found beside the notebook (`busy`, `wait()`); until then cells show means.

    Example:
        >>> import saewb
        >>> panel = CorrelationPanel(saewb.random_low_rank_correlation(300, 5))
        >>> panel
        CorrelationPanel(correlation, 300 x 300, by clusters, rows 0:300, columns 0:300)
        >>> panel.view = (0, 20, 40, 60)
        >>> tuple(panel.shown.values.shape), panel.shown.cells
        ((20, 20), 'exact')
    """

    _esm = source("frame.js", "correlation.js")
    _css = source("frame.css", "correlation.css")

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
        **traits: Any,
    ) -> None:
        """Show a matrix.

        Args:
            of: a matrix `[n, n]`, a LowRankCorrelation, a Coactivation, a FeatureIndex, a MatrixView, or an SAE (its
                directions' cosines, or with `model` and `tokens` its latents' correlation on them).
            other: true directions or another SAE: cosines of `of` with these, matched.
            model: with `tokens`.
            tokens: ids or texts.
            index: of the features of the rows, for what they fire on.
            by: see `saewb.matrix_view` and `saewb.latent_matrix`.
            traits: e.g. `order="density"`, `view=(0, 100, 0, 100)`.
        Raises:
            TypeError: for anything else, or an unknown trait.
            ValueError: for a matrix that is not square, an order or a window that is not there.
        """
        self.check_names(traits)
        if (model is None) != (tokens is None):
            fix = "CorrelationPanel(sae, model=model, tokens=texts)"
            raise ValueError(errors.explain("CorrelationPanel got one of model and tokens.", want="both", fix=fix))
        self._made_with = _recipe(of, other, model, by)
        self.index = of if isinstance(of, saewb.FeatureIndex) else index
        self.matrix = _matrix(of, other, model, tokens, by)
        self.overview: Any = None
        self._stop, self._given_up = threading.Event(), False
        self._ready = False
        n, m = self.matrix.shape
        if self.index is not None and len(self.index) != n:
            what = f"the index is of {len(self.index):,} features, the matrix has {n:,}."
            raise ValueError(errors.explain(what, want="the same"))
        traits.setdefault("order", self.matrix.orders[0])
        traits.setdefault("view", (0, n, 0, m))
        super().__init__(**traits)
        self.title = {"cosine": "Cosines", "phi": "Firing together", "jaccard": "Firing together"}.get(
            self.matrix.what, "Correlation"
        )
        self.about = f"{self.matrix.what} of {n:,} x {m:,} features"
        self.facts = {"shape": [n, m], "orders": list(self.matrix.orders), "what": self.matrix.what, "pixels": PIXELS}
        self._ready = True
        self._arrange()
        self._turn()

    @property
    def shown(self) -> Any:
        """The cells in view: `values`, `window`, `step`, `cells`."""
        return self._overview().view(self.view, PIXELS, self.cells)

    def summary(self) -> str:
        """See Panel."""
        (n, m), (r0, r1, c0, c1) = self.matrix.shape, self.view
        return f"{self.matrix.what}, {n} x {m}, by {self.order}, rows {r0}:{r1}, columns {c0}:{c1}"

    def code(self) -> str:
        """Python that makes `matrix`, `rows`, `columns` and `values`, the cells in view, of what was given."""
        shown = self.shown
        r0, r1, c0, c1 = shown.window
        columns = "order" if self.matrix.same else f"range({self.matrix.shape[1]})"
        lines = ["import saewb", "", *self._made_with, f"order = matrix.order({self.order!r})"]
        lines += [f"rows, columns = order[{r0}:{r1}], {columns}[{c0}:{c1}]"]
        cells = self.cells if shown.cells == "exact" else shown.cells
        lines += [f"values = matrix.pooled(rows, columns, {shown.step}, {cells!r})"]
        if self.pair[0] >= 0:
            lines += [f"pair = matrix.pair({self.pair[0]}, {self.pair[1]})"]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel. The picture is a PNG in a data URI, written by zlib."""
        shown = self.shown
        high, wide = shown.values.shape
        uri = _png.data_uri(shown.levels(shown.scale), wide, high)
        said = f"{self._said(shown)}; blue {-shown.scale:g}, orange {shown.scale:+g}, grey not defined"
        picture = f"<img alt='{self.matrix.what} matrix' width=360 src='{uri}' style='image-rendering:pixelated'>"
        rows = [(i, j, f"{v:+.3f}") for i, j, v in self.figures.get("pairs", [])[:12]]
        return f"{picture}<div>{said}</div>" + _static.grid(("feature", "and", self.matrix.what), rows)

    def asked(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "tile":
            self._send_tile(**how)
        elif what == "peek":
            i, j = int(how["row"]), int(how["col"])
            self.send({"peek": [i, j], "said": [self._words(i, 0), self._words(j, 1)]})
        elif what == "progress":
            self.progress = 1.0 if self._overview_done() else getattr(self.overview, "done_frac", 0.0)
        elif what == "stop":
            self._stop.set()
            self._given_up = True  # also where the looking has not begun
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"CorrelationPanel was asked to {what!r}."))

    @t.validate("view", "order", "cells", "pair")
    @guarded
    def _check(self, proposal: dict) -> Any:
        name, got, (n, m) = proposal["trait"].name, proposal["value"], self.matrix.shape
        with refused():
            if name == "view":
                self._window(got)
            if name == "pair" and got != (-1, -1) and not (0 <= got[0] < n and 0 <= got[1] < m):
                raise ValueError(errors.explain(f"pair is {got}.", want=f"features below {n} and {m}"))
            known = {"order": self.matrix.orders, "cells": CELLS}.get(name)
            if known and got not in known:
                near = errors.near(got, known)
                raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want=", ".join(known)))
        return got

    def _window(self, got: tuple) -> tuple:
        n, m = self.matrix.shape
        if len(got) != 4 or not (0 <= got[0] < got[1] <= n and 0 <= got[2] < got[3] <= m):
            raise ValueError(errors.explain(f"view is {got}.", want=f"row0 < row1 <= {n}, col0 < col1 <= {m}"))
        return got

    @t.observe("order")
    @guarded
    def _ordered_anew(self, _: Any = None) -> None:
        if self._ready:
            self._arrange()

    @t.observe("cells")
    @guarded
    def _cells_anew(self, _: Any = None) -> None:
        if self._ready:
            self.version += 1

    @t.observe("pair")
    @guarded
    def _paired_anew(self, _: Any = None) -> None:
        if self._ready:
            self._turn()

    def _overview(self) -> Any:
        if self.overview is None:
            self.overview = self.matrix.overview()
        return self.overview

    def _overview_done(self) -> bool:
        return self.overview is not None and self.overview.done_frac == 1

    def _arrange(self) -> None:
        """Have the order, then look through all entries."""
        self._stop.set()
        self._given_up, self.progress = False, 0.0
        matrix, by = self.matrix, self.order
        self.dropped("scan")

        def work() -> Any:
            return matrix.overview(matrix.order(by))

        if max(matrix.shape) > _AT_ONCE:
            self.started("order", f"ordering {matrix.shape[0]:,} features by {by}", work, self._arranged)
        else:
            self.dropped("order")
            self._arranged(work())

    def _arranged(self, overview: Any) -> None:
        self.overview, stop = overview, threading.Event()
        self._stop = stop
        self.version += 1
        if self._given_up:
            return

        def work() -> Any:
            for _ in overview.scan():
                if stop.is_set():
                    break
            return overview

        if max(self.matrix.shape) > _AT_ONCE:
            self.started("scan", "looking for the strongest entries", work, self._scanned)
        else:
            self._scanned(work())

    def _scanned(self, overview: Any) -> None:
        if overview is not self.overview:
            return
        found = overview.stats
        self.progress = overview.done_frac
        pairs = [[p.row, p.col, _packing.short(p.value)] for p in overview.pairs]
        stats = (
            []
            if found is None
            else [["root mean square", _packing.short(found.rms)], ["mean", _packing.short(found.mean)]]
        )
        strongest = [["strongest", pairs[0][2]]] if pairs else []
        self.figures = {"figures": [*stats, *strongest], "pairs": pairs}
        self.version += 1

    def _send_tile(self, seq: int, view: Any = None, plain: bool = False) -> None:
        """Of a view that the front end names, since its messages may overtake its traits."""
        window = self.view if view is None else self._window(tuple(view))
        shown = self._overview().view(window, PIXELS, self.cells)
        levels, (high, wide) = shown.levels(shown.scale), shown.values.shape
        head = {"tile": seq, "window": list(shown.window), "shape": [high, wide], "scale": shown.scale}
        head |= {"step": shown.step, "said": self._said(shown)}
        if shown.step == 1:
            r0, r1, c0, c1 = shown.window
            head |= {"rows": self.overview.rows[r0:r1].tolist(), "cols": self.overview.cols[c0:c1].tolist()}
        if plain:  # where binary buffers get lost
            self.send({**head, "levels": base64.b64encode(levels).decode()})
        else:
            self.send(head, [levels])

    def _said(self, shown: Any) -> str:
        if shown.cells == "exact":
            return "single entries"
        kind = "strongest entry" if shown.cells == "strongest" else "mean"
        return f"{kind} of {shown.step} x {shown.step}" + ("" if shown.is_final else ", for now")

    def _latent(self, i: int, axis: int) -> Any:
        return self.index.latent(i) if self.index is not None and (axis == 0 or self.matrix.same) else None

    def _words(self, i: int, axis: int) -> list[str]:
        latent = self._latent(i, axis)
        return [] if latent is None else [c.token for c in latent.top[:_WORDS]]

    def _turn(self) -> None:
        """Turn to the pair."""
        i, j = self.pair
        if i < 0:
            self.page = {}
            return
        found = self.matrix.pair(i, j)
        value = None if found.value != found.value else _packing.short(found.value)
        sides = [self._side(i, 0, found.fires_row), self._side(j, 1, found.fires_col)]
        self.page = {"value": value, "together": found.together, "n_tokens": found.n_tokens, "sides": sides}

    def _side(self, i: int, axis: int, fires: int | None) -> dict[str, Any]:
        latent = self._latent(i, axis)
        near = [[p.col if axis == 0 else p.row, _packing.short(p.value)] for p in self.matrix.partners(i, 8, axis)]
        made: dict[str, Any] = {"feature": i, "fires": fires, "near": near}
        if latent is not None:
            special = frozenset(self.index.facts.special)
            made["page"] = _packing.page(latent, special, None)
            made["page"] = {k: made["page"][k] for k in ("density", "max", "scale", "words", "top", "histogram")}
        return made


def _matrix(of: Any, other: Any, model: Any, tokens: Any, by: str | None) -> Any:
    if isinstance(of, saewb.MatrixView):
        return of
    if isinstance(of, saewb.FeatureIndex):
        return of.matrix()
    if model is not None:
        return saewb.latent_matrix(model, of, tokens, **({} if by is None else {"by": by}))
    return saewb.matrix_view(of, other, by=by)


def _recipe(of: Any, other: Any, model: Any, by: str | None) -> list[str]:
    """Lines that make `matrix`."""
    asked = "" if by is None else f", by={by!r}"
    if isinstance(of, saewb.MatrixView):
        return ["# matrix: the MatrixView that the panel was made with"]
    if isinstance(of, saewb.FeatureIndex):
        return ["# index: what the panel was made with", "matrix = index.matrix()"]
    if model is not None:
        return ["# model, sae, tokens: as given", f"matrix = saewb.latent_matrix(model, sae, tokens{asked})"]
    second = "" if other is None else ", other"
    return [f"# of{second}: what the panel was made with", f"matrix = saewb.matrix_view(of{second}{asked})"]
