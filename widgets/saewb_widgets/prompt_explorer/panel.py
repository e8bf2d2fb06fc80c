"""PromptExplorer: type a prompt, see which latents are active on each of its tokens and what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from saewb import errors
from saewb_widgets.feature_browser.panel import FeatureBrowser
from saewb_widgets.panel import LATENT_JS, catch_errors, model_code, report_errors, source
from saewb_widgets.prompt_explorer import serialize, worker
from saewb_widgets.prompt_explorer.inputs import given
from saewb_widgets.prompt_explorer.reader import PromptReader
from saewb_widgets.prompt_explorer.worker import Choice

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 400  # of the prompt, sent at a time
ROWS = 40  # of the table, sent at first and with each "more"


class PromptExplorer(PromptReader):
    """See what latents of one or several SAEs do on a prompt of your own, token by token.

    Latents are listed by activation, by their share of the largest activation known (with an index), by what they add
    to the logit of a next token directly, or by what they do for it by every way (`saewb.attribute`); beside them are
    the model's next tokens, clean and, a moment later, with the SAEs in place. Click a token to list its latents, a
    latent to see it over the whole prompt and, with an index, to read its page. What runs, beside the notebook, is
    `saewb.models.shared_copy.shared_copy(model)`: cells may use the model meanwhile, and what they put on it is not
    seen here. `busy` says how far it is, `wait()` waits, `stop()` ends it. Prompts of up to the model's context; 400
    tokens and 40 rows are sent at a time.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> panel = PromptExplorer(model, sae, prompt="Marie Curie was a Polish physicist")
        >>> panel
        PromptExplorer(16 latents at 11 ' physicist', blocks.2.hook_resid_post of tiny)
        >>> panel.rank = "logit_effect"; panel.wait()
        >>> exec(panel.code(), shown := {"model": model, "sae": sae})
        >>> shown["latents"].equals(panel.latents), shown["words"].token[0] in (" and", ",")
        (True, True)
    """

    _esm = source("shared/frame.js", LATENT_JS, "shared/latent_page.js", "prompt_explorer/prompt_explorer.js")
    _css = source("shared/frame.css", "feature_browser/feature_browser.css", "prompt_explorer/prompt_explorer.css")

    everywhere = t.Bool(False, help="list latents of the whole prompt, each where it is largest").tag(sync=True)
    max_density = t.Float(1.0, help="leave out latents that fire on more than this fraction of tokens").tag(sync=True)
    selected_sae = t.Int(0, help="which SAE the selected latent is of").tag(sync=True)
    selected = t.Int(-1, help="the latent shown over the whole prompt; -1 for none").tag(sync=True)
    pins = t.List(t.Tuple(t.Int(), t.Int()), help="(SAE, latent), in the order they were pinned").tag(sync=True)
    # What the front end draws; made here, so setting them has no effect on anything else.
    offset = t.Int(0, help="the first token sent").tag(sync=True)
    n_rows = t.Int(ROWS, help="rows sent").tag(sync=True)
    window = t.Dict(help="the tokens sent").tag(sync=True)
    trace = t.Dict(help="the selected latent's activations on them").tag(sync=True)
    listing = t.Dict(help="the rows sent, and how many there are").tag(sync=True)
    pinned = t.List(t.Dict(), help="the pinned latents at the position").tag(sync=True)
    page = t.Dict(help="what the index knows of the selected latent").tag(sync=True)
    facts = t.Dict(help="what stays: names, orders, what can be done").tag(sync=True)

    def __init__(self, model: Any, saes: Any, index: Any = None, **traits: Any) -> None:
        """Show what SAEs see; given a prompt, it is read before this returns.

        Args:
            model: what `saewb.load_model` gave; with a tokenizer.
            saes: SAEs, transcoders or cross-layer transcoders; one, or a list.
            index: a FeatureIndex, or the folder of one; for a list of SAEs a list, None where there is none.
            traits: e.g. `prompt="Paris is"`, `rank="attribution"`, `target=" the"`.

        Raises:
            TypeError: for something that is no SAE or index, or an unknown trait.
            ValueError: for an SAE that does not fit the model, an index that does not fit its SAE, a wrong value.
        """
        self.check_names(traits)
        self.given = given(model, saes, index)
        self._frame: pd.DataFrame | None = None
        self._chosen = traits.get("selected", -1) >= 0
        self._browsers: list[tuple[int, FeatureBrowser]] = []
        super().__init__(**traits)
        self._open()

    def _open(self) -> None:
        g = self.given
        self.title = f"Latents of {g.model.cfg.model_name} on a prompt"
        self.facts = worker.facts(g, n_rows=ROWS)
        self._ready = True
        self._ask_anew()
        self.wait()

    # What a reader does

    @property
    def latents(self) -> pd.DataFrame | None:
        """The table, all its rows; None without a prompt."""
        return self._frame

    def pin(self, latent: int, sae: int = 0) -> None:
        """Keep a latent at hand, whatever token is looked at."""
        self.given.exists(sae, latent)
        self.pins = [*(p for p in self.pins if p != (sae, latent)), (sae, latent)]

    def unpin(self, latent: int, sae: int = 0) -> None:
        """Undo `pin`."""
        self.pins = [p for p in self.pins if p != (sae, latent)]

    def browser(self, sae: int | None = None) -> FeatureBrowser:
        """A FeatureBrowser of the selected latent, which follows what is selected here.

        Args:
            sae: which one; None: that of the selected latent.

        Raises:
            ValueError: if there is no index of it.
        """
        part = self.selected_sae if sae is None else sae
        made = self.given.browser(part, self.selected)
        self._browsers.append((part, made))
        return made

    def summary(self) -> str:
        """See Panel."""
        n = 0 if self._frame is None else len(self._frame)
        return serialize.summary(self.given, self._found, n, self.everywhere)

    def code(self) -> str:
        """Python that makes `latents`, the table; `words`, what comes next; `activations`, of the selected latent."""
        if self._found is None:
            return "# no prompt yet\n"
        sae, index = ("sae", "index") if self.given.one else ("saes", "indexes")
        on = model_code(self.given.model)
        return self._choice().code(on, sae, index, (self.selected_sae, self.selected))

    def static_html(self) -> str:
        """See Panel."""
        shown = (self.window, self.trace, self.listing, self.words, self.page)
        return serialize.static(*shown, self.given.names)

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "code":
            self.notice = self.code()
        elif what == "pin":
            latent, sae = how.get("latent", self.selected), how.get("sae", self.selected_sae)
            (self.unpin if (sae, latent) in self.pins else self.pin)(latent, sae)
        elif what == "move":
            self._move(**how)
        elif what == "stop":
            self.stop()
        elif what == "read":
            self._ask_anew()
        elif what == "compare":
            self._compare_again()
        else:
            raise ValueError(errors.explain(f"PromptExplorer was asked to {what!r}."))

    def _move(self, by: int) -> None:
        if self._found is not None:
            last = len(self._found.reading.tokens) - 1
            self.everywhere = False
            self.position = max(0, min(last, self._found.at + by))

    # What is asked for is checked before anything changes

    @t.validate("max_density", "selected", "selected_sae", "pins")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, got = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "pins":
                for sae, latent in got:
                    self.given.exists(sae, latent)
            elif name == "selected":
                if got != -1:
                    self.given.exists(self.selected_sae, got)
            elif name == "selected_sae":
                self.given.exists(got, 0)
            else:
                return worker.check(name, got, len(self.given.names), self.given.has_index)
        return got

    # What follows from it

    @t.observe("everywhere", "max_density")
    @catch_errors
    def _listed_anew(self, _: Any = None) -> None:
        if self._ready and self._found is not None:
            self._list()

    @t.observe("selected", "selected_sae")
    @catch_errors
    def _selected_anew(self, _: Any = None) -> None:
        if self._ready:
            self._chosen = True
            self._turn()

    @t.observe("pins")
    @catch_errors
    def _pinned_anew(self, _: Any = None) -> None:
        if self._ready:
            self._send_pins()

    @t.observe("offset", "n_rows")
    @catch_errors
    def _scrolled(self, change: dict) -> None:
        if self._ready and self._found is not None:
            (self._send_rows if change["name"] == "n_rows" else self._send_window)()

    def _draw(self, fresh: bool) -> None:
        at = self._found.at
        if fresh or not 0 <= at - self.offset < TOKENS:
            self._set(offset=at // TOKENS * TOKENS)
        self._send_window()
        self._list()

    def _clear(self) -> None:
        self._found = self._frame = None
        self.window, self.trace, self.listing, self.words, self.pinned = {}, {}, {}, {}, []
        self._turn()

    def _choice(self) -> Choice:
        return Choice(self._found, self.everywhere, self.given.index, self.max_density)

    def _list(self) -> None:
        """Arrange the table anew; the first of it is selected until somebody selects another."""
        self._frame = self._choice().arranged()
        if not self._chosen:
            first = next(self._frame.head(1).itertuples(), None)
            part = 0 if first is None else self.given.names.index(first.sae)
            self._set(selected=-1)
            self._set(selected_sae=part, selected=-1 if first is None else int(first.latent))
        self._set(n_rows=ROWS)
        self._send_rows()
        self._send_pins()
        self._turn()

    def _send_rows(self) -> None:
        self.listing = serialize.rows(self._frame, self.given.names, self.n_rows, self.given.hint)

    def _send_pins(self) -> None:
        if self._found is not None:
            f = self._found
            self.pinned = serialize.pins(f.reading, f.at, self.pins, self.given.hint)

    def _send_window(self) -> None:
        begin = max(0, min(self.offset, len(self._found.reading.tokens) - 1))
        self.window = serialize.window(self._found.reading, begin, TOKENS)
        self._send_trace()

    def _send_trace(self) -> None:
        if self._found is None or self.selected < 0:
            self.trace = {}
            return
        acts = self._found.reading.activations(self.selected_sae, self.selected)
        self.trace = serialize.trace(acts, self.window.get("offset", 0), TOKENS)

    def _turn(self) -> None:
        """Show the selected latent: over the prompt, its page, in browsers that follow."""
        self._send_trace()
        self.page = self.given.page(self.selected_sae, self.selected)
        for part, browser in self._browsers:
            if part == self.selected_sae and self.selected >= 0:
                browser.selected = self.selected
