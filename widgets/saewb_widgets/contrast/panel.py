"""ContrastPanel: the latents that tell two lists of texts apart."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.contrast import serialize
from saewb_widgets.html import grid, token
from saewb_widgets.panel import LATENT_JS, Panel, catch_errors, model_code, model_line, on_change, report_errors, source

if TYPE_CHECKING:
    import pandas as pd

POOLS = ("max", "mean", "last", "any", "sum")
SIDES = {"": "both", "a": "larger in a", "b": "larger in b"}
_LIMIT = 0.05  # false discovery rate
_MAXIMA = 6


class ContrastPanel(Panel):
    """Two lists of texts, and the latents of an SAE that tell them apart: a table, a volcano plot, a latent's texts.

    `panel.result` is what `saewb.contrast` gave, `panel.maxima` the texts on which the selected latent is largest. Both
    are computed in the background (`busy`, `wait()`).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> a = ["The bird is a small species.", "A family of birds.", "The species of fish."]
        >>> b = ["The city is in the north.", "A town of people.", "The river in the city."]
        >>> panel = ContrastPanel(model, sae, a, b, n_permutations=50)
        >>> panel.wait()
        >>> panel
        ContrastPanel(3 + 3 texts, max, latent 67)
        >>> exec(panel.code(), shown := {"model": model, "sae": sae})
        >>> shown["table"].equals(panel.table), shown["maxima"] == panel.maxima
        (True, True)
    """

    _esm = source("shared/frame.js", LATENT_JS, "contrast/contrast.js")
    _css = source("shared/frame.css", "contrast/contrast.css")

    a = t.List(t.Unicode(), help="texts of set a").tag(sync=True)
    b = t.List(t.Unicode(), help="texts of set b").tag(sync=True)
    pool = t.Unicode("max", help="how latents are pooled over a text: max, mean, last, any or sum").tag(sync=True)
    side = t.Unicode("", help="which latents are listed: a (larger in a), b, or '' for both").tag(sync=True)
    selected = t.Int(-1, help="the latent whose texts are shown; -1 for none").tag(sync=True)
    # Written by the panel for the front end; setting them has no other effect.
    stale = t.Bool(False, help="whether texts or pooling have changed since the result").tag(sync=True)
    rows = t.Dict(help="the table: latents, best first").tag(sync=True)
    dots = t.Dict(help="the volcano plot").tag(sync=True)
    baselines = t.List(help="name, AUC and note of what tells the sets apart without latents").tag(sync=True)
    page = t.Dict(help="the selected latent on the given texts").tag(sync=True)
    facts = t.Dict(help="constants for the front end").tag(sync=True)

    def __init__(
        self,
        model: Any,
        sae: Any,
        a: Sequence[str] = (),
        b: Sequence[str] = (),
        *,
        index: Any = None,
        n_permutations: int = 1000,
        ctx_len: int | None = None,
        **traits: Any,
    ) -> None:
        """Show the panel, and compare the texts if there are any.

        Args:
            model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
            sae: an SAE of the model.
            a: texts.
            b: other texts.
            index: feature index of the SAE, whose labels stand beside the latents.
            n_permutations: as for `saewb.contrast`.
            ctx_len: tokens of a text at most; longer ones are cut. None takes the model's context.
            traits: `pool`, `side`, `selected`.

        Raises:
            TypeError: for an unknown trait, one string for texts.
            ValueError: for a pooling or side that does not exist, an SAE that does not fit the model, an index of
                another SAE.
        """
        self.check_names(traits)
        for name, texts in (("a", a), ("b", b)):
            if isinstance(texts, str):
                what = f"ContrastPanel got one string for {name}."
                raise TypeError(
                    errors.explain(what, want="a list of texts", fix=f"ContrastPanel(model, sae, {name}=[...])")
                )
        if index is not None:
            index.check_sae(sae)
        self.model, self._model_copy, self.sae = model, saewb.models.shared_copy.shared_copy(model), sae
        self.index = index
        self._n_permutations, self._ctx_len = n_permutations, ctx_len or int(model.cfg.n_ctx)
        self.result: saewb.Contrast | None = None
        self.table: pd.DataFrame | None = None  # of the side that is listed
        self.maxima: list[Any] = []
        self._compared: tuple[list[str], list[str], str] | None = None  # texts and pooling of the result
        super().__init__(a=list(a), b=list(b), **traits)
        self.title, self.about = "Contrast of two sets of texts", model_line([sae], model)
        self.facts = {"pools": list(POOLS), "sides": SIDES, "columns": list(serialize.COLUMNS), "limit": _LIMIT}
        self._ready = True
        if self.a and self.b:
            self.compare()

    # What a user does

    @catch_errors
    def compare(self) -> None:
        """Compare the texts, in the background.

        Raises:
            ValueError: if a list is empty.
        """
        for name, texts in (("a", self.a), ("b", self.b)):
            if not texts:
                raise ValueError(
                    errors.explain(f"set {name} has no texts.", want="at least two", fix=f"panel.{name} = [...]")
                )
        a, b, pool, model, sae = list(self.a), list(self.b), self.pool, self._model_copy, self.sae
        options = {"n_permutations": self._n_permutations, "ctx_len": self._ctx_len, "progress": False}

        def work() -> Any:
            return saewb.contrast(model, sae, a, b, pool=pool, **options)

        def then(result: Any) -> None:
            self._compared = (a, b, pool)
            self._show_result(result)

        self.discard_work("maxima")
        self.start_work("contrast", f"comparing {len(a):,} and {len(b):,} texts", work, then)

    # What a panel has

    def summary(self) -> str:
        """See Panel."""
        latent = f", latent {self.selected}" if self.selected >= 0 else ""
        return f"{len(self.a)} + {len(self.b)} texts, {self.pool}{latent}"

    def code(self) -> str:
        """Python code that computes `result`, `table` and `maxima` from `model` and `sae`."""
        model, lines = model_code(self.model)
        a, b, pool = self._compared or (list(self.a), list(self.b), self.pool)
        options = f"pool={pool!r}, n_permutations={self._n_permutations}, ctx_len={self._ctx_len}"
        maxima = [f"maxima = result.maxima({model}, {self.selected}, {_MAXIMA})"] if self.selected >= 0 else []
        code = [
            "import saewb",
            "",
            *lines,
            f"a = {a!r}",
            f"b = {b!r}",
            f"result = saewb.contrast({model}, sae, a, b, {options})",
            f"table = result.to_frame({self.side or None!r})",
            *maxima,
        ]
        return "\n".join(code) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        if self.result is None:
            return f"<div>{len(self.a)} + {len(self.b)} texts, not compared yet</div>"
        names = self.rows["labels"]
        head = ("latent", *serialize.COLUMNS, *["label"] * bool(names))
        body = [["" if value is None else value for value in row] for row in self.rows["rows"][:12]]
        body = [[*row, *names[n : n + 1]] for n, row in enumerate(body)]
        texts = "".join(f"<div>{one.side} {one.value:.3g}: {_tokens(one)}</div>" for one in self.maxima[:_MAXIMA])
        name = f"Latent {self.selected} {html.escape(self.page.get('label', ''))}".strip()
        title = f"<div style='margin-top:8px'><b>{name}</b></div>" if self.selected >= 0 else ""
        return grid(("without latents", "AUC", ""), self.baselines) + grid(head, body) + title + texts

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "compare":
            self.compare()
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"ContrastPanel was asked to {what!r}."))

    @t.validate("pool", "side", "selected")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "selected":
                if not -1 <= value < (n := self.sae.cfg.d_sae):
                    raise ValueError(errors.explain(f"latent {value} of {n}.", want=f"0 to {n - 1}, or -1 for none"))
            elif value not in (choices := {"pool": POOLS, "side": tuple(SIDES)}[name]):
                near = errors.near(value, choices)
                raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want=", ".join(map(repr, choices))))
        return value

    @on_change("a", "b", "pool")
    def _on_input(self) -> None:
        self.stale = self._compared is not None and self._compared != (list(self.a), list(self.b), self.pool)

    @on_change("side")
    def _on_side(self) -> None:
        if self.result is not None:
            self._show_table()

    @on_change("selected")
    def _on_selected(self) -> None:
        self._show_latent()

    def _show_result(self, result: Any) -> None:
        self.result = result
        self.dots = serialize.volcano(result.to_frame(), _LIMIT)
        self.baselines = serialize.baselines(result)
        self._on_input_of_result()
        self._show_table()
        best = int(self.table.latent[0]) if len(self.table) else -1
        if self.selected < 0 and best >= 0:
            self.selected = best
        else:
            self._show_latent()

    def _on_input_of_result(self) -> None:
        self.stale = self._compared != (list(self.a), list(self.b), self.pool)
        n_rest = int((~self.result.choosing).sum())
        held = f"{n_rest} texts held out" if n_rest else "fewer than 40 texts: none is held out"
        self.about = f"{model_line([self.sae], self.model)}. {held}"

    def _show_table(self) -> None:
        self.table = self.result.to_frame(self.side or None)
        rows = serialize.rows(self.table)
        self.rows = {"rows": rows, "n": len(self.table), "labels": self._labels([row[0] for row in rows])}

    def _labels(self, latents: Sequence[int]) -> list[str]:
        """Labels of latents; none without an index."""
        return [] if self.index is None else self.index.label_texts(latents)

    def _show_latent(self) -> None:
        self.maxima = []
        if self.result is None or self.selected < 0:
            self.page = {}
            return
        result, latent, model = self.result, self.selected, self._model_copy
        row = result.table.iloc[latent]
        label = "".join(self._labels([latent]))
        self.page = serialize.latent_page(row, None, label)

        def work() -> Any:
            return result.maxima(model, latent, _MAXIMA)

        def then(maxima: Any) -> None:
            self.maxima = maxima
            self.page = serialize.latent_page(row, maxima, label)

        self.start_work("maxima", f"latent {latent} on the texts", work, then)


def _tokens(one: Any) -> str:
    shares = serialize.text(one)["shares"]
    return "".join(token(text, share, False, False) for text, share in zip(one.tokens, shares, strict=True))
