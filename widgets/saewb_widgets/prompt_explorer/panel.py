"""PromptExplorer: the latents active on each token of a prompt, and their effects on the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from saewb import errors
from saewb_widgets.feature_browser.panel import FeatureBrowser
from saewb_widgets.panel import LATENT_JS, catch_errors, model_code, on_change, report_errors, source
from saewb_widgets.prompt_explorer import serialize, worker
from saewb_widgets.prompt_explorer.inputs import Inputs
from saewb_widgets.prompt_explorer.reader import PromptReader
from saewb_widgets.prompt_explorer.worker import Choice

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 400  # tokens of the prompt sent at a time
ROWS = 40  # table rows sent at first and with each "more"


class PromptExplorer(PromptReader):
    """The latents of one or several SAEs on a prompt of your own, token by token.

    Latents are sorted by activation, by its share of the largest activation in the index, by their direct effect on the
    logit of a next token, or by their total effect on it (`saewb.attribute`). The panel also shows the model's next
    tokens, without and, a moment later, with the SAEs attached. Click a token to list its latents; click a latent to
    see its activations over the whole prompt and, with an index, its page. The panel runs
    `saewb.models.shared_copy.shared_copy(model)` in the background, so cells can use the model at the same time, and
    hooks that they add have no effect here. `busy` shows the progress, `wait()` waits for the work, `stop()` ends it.
    Prompts may be as long as the model's context; 400 tokens and 40 rows are sent at a time. With a chat model,
    `chat=True` writes the prompt in the model's template, a message for each line that begins with "system:", "user:"
    or "assistant:", and shows the role of every token.

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

    everywhere = t.Bool(False, help="list the latents of the whole prompt, each at its largest activation").tag(
        sync=True
    )
    max_density = t.Float(1.0, help="omit latents that fire on more than this fraction of tokens").tag(sync=True)
    selected_sae = t.Int(0, help="number of the SAE of the selected latent").tag(sync=True)
    selected = t.Int(-1, help="latent shown over the whole prompt; -1 for none").tag(sync=True)
    pins = t.List(t.Tuple(t.Int(), t.Int()), help="(SAE, latent), in the order they were pinned").tag(sync=True)
    # Written by the panel for the front end; setting them has no other effect.
    offset = t.Int(0, help="position of the first token sent").tag(sync=True)
    n_rows = t.Int(ROWS, help="number of rows sent").tag(sync=True)
    window = t.Dict(help="the tokens sent").tag(sync=True)
    trace = t.Dict(help="activations of the selected latent on them").tag(sync=True)
    listing = t.Dict(help="the rows sent, and the total number of rows").tag(sync=True)
    pinned = t.List(t.Dict(), help="activations of the pinned latents at the position").tag(sync=True)
    page = t.Dict(help="page of the selected latent, from the index").tag(sync=True)
    facts = t.Dict(help="constants for the front end: names, ranks, options").tag(sync=True)

    def __init__(self, model: Any, saes: Any, index: Any = None, **traits: Any) -> None:
        """Show the panel; if a prompt is passed, it is read before this returns.

        Args:
            model: a model of `saewb.load_model`, with a tokenizer.
            saes: SAEs, transcoders or cross-layer transcoders; one, or a list.
            index: a FeatureIndex, or the folder of one; for a list of SAEs a list, None where there is none.
            traits: e.g. `prompt="Paris is"`, `rank="attribution"`, `target=" the"`.

        Raises:
            TypeError: if something is not an SAE or not an index, or for an unknown trait.
            ValueError: for an SAE that does not fit the model, an index that does not fit its SAE, an invalid value.
        """
        self.check_names(traits)
        self.inputs = Inputs.from_arguments(model, saes, index)
        self._frame: pd.DataFrame | None = None
        self._is_selected = traits.get("selected", -1) >= 0
        self._browsers: list[tuple[int, FeatureBrowser]] = []
        super().__init__(**traits)
        self.title = f"Latents of {model.cfg.model_name} on a prompt"
        self.facts = worker.facts(self.inputs, n_rows=ROWS)
        self._ready = True
        self._submit()
        self.wait()

    # What a user does

    @property
    def latents(self) -> pd.DataFrame | None:
        """All rows of the table; None without a prompt."""
        return self._frame

    def pin(self, latent: int, sae: int = 0) -> None:
        """Pin a latent: show its activation at every token."""
        self.inputs.check_latent(sae, latent)
        self.pins = [*(p for p in self.pins if p != (sae, latent)), (sae, latent)]

    def unpin(self, latent: int, sae: int = 0) -> None:
        """Undo `pin`."""
        self.pins = [p for p in self.pins if p != (sae, latent)]

    def browser(self, sae: int | None = None) -> FeatureBrowser:
        """Create a FeatureBrowser that follows the latent selected here.

        Args:
            sae: number of the SAE; None: that of the selected latent.

        Raises:
            ValueError: if that SAE has no index.
        """
        part = self.selected_sae if sae is None else sae
        browser = self.inputs.browser(part, self.selected)
        self._browsers.append((part, browser))
        return browser

    def summary(self) -> str:
        """See Panel."""
        n = 0 if self._frame is None else len(self._frame)
        return serialize.summary(self.inputs, self._answer, n, self.everywhere)

    def code(self) -> str:
        """Python code that computes `latents` (the table), `words` (next tokens) and the latent's `activations`."""
        if self._answer is None:
            return "# no prompt yet\n"
        sae, index = ("sae", "index") if self.inputs.is_single else ("saes", "indexes")
        run = model_code(self.inputs.model)
        return self._choice().code(run, sae, index, (self.selected_sae, self.selected))

    def static_html(self) -> str:
        """See Panel."""
        traits = (self.window, self.trace, self.listing, self.words, self.page)
        return serialize.static_html(*traits, self.inputs.names)

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
            self._submit()
        elif what == "compare":
            self._compare_again()
        else:
            raise ValueError(errors.explain(f"PromptExplorer was asked to {what!r}."))

    def _move(self, by: int) -> None:
        if self._answer is not None:
            last = len(self._answer.reading.tokens) - 1
            self.everywhere = False
            self.position = max(0, min(last, self._answer.at + by))

    # Validation, before anything changes

    @t.validate("max_density", "selected", "selected_sae", "pins")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "pins":
                for sae, latent in value:
                    self.inputs.check_latent(sae, latent)
            elif name == "selected":
                if value != -1:
                    self.inputs.check_latent(self.selected_sae, value)
            elif name == "selected_sae":
                self.inputs.check_latent(value, 0)
            else:
                return worker.check(name, value, len(self.inputs.names), self.inputs.has_index)
        return value

    # Reactions to changes

    @on_change("everywhere", "max_density")
    def _on_filter(self) -> None:
        if self._answer is not None:
            self._list()

    @on_change("selected", "selected_sae")
    def _on_selected(self) -> None:
        self._is_selected = True
        self._send_page()

    @on_change("pins")
    def _on_pins(self) -> None:
        self._send_pins()

    @on_change("offset")
    def _on_offset(self) -> None:
        if self._answer is not None:
            self._send_window()

    @on_change("n_rows")
    def _on_n_rows(self) -> None:
        if self._answer is not None:
            self._send_rows()

    def _draw(self, fresh: bool) -> None:
        at = self._answer.at
        if fresh or not 0 <= at - self.offset < TOKENS:
            self._set(offset=at // TOKENS * TOKENS)
        self._send_window()
        self._list()

    def _clear(self) -> None:
        self._answer = self._frame = None
        self.window, self.trace, self.listing, self.words, self.pinned = {}, {}, {}, {}, []
        self._send_page()

    def _choice(self) -> Choice:
        return Choice(self._answer, self.everywhere, self.inputs.index, self.max_density)

    def _list(self) -> None:
        """Update the table; its first latent is selected until the user selects another."""
        self._frame = self._choice().to_frame()
        if not self._is_selected:
            first = next(self._frame.head(1).itertuples(), None)
            part = 0 if first is None else self.inputs.names.index(first.sae)
            self._set(selected=-1)
            self._set(selected_sae=part, selected=-1 if first is None else int(first.latent))
        self._set(n_rows=ROWS)
        self._send_rows()
        self._send_pins()
        self._send_page()

    def _send_rows(self) -> None:
        self.listing = serialize.rows(self._frame, self.inputs.names, self.n_rows, self.inputs.hint)

    def _send_pins(self) -> None:
        if self._answer is not None:
            answer = self._answer
            self.pinned = serialize.pins(answer.reading, answer.at, self.pins, self.inputs.hint)

    def _send_window(self) -> None:
        begin = max(0, min(self.offset, len(self._answer.reading.tokens) - 1))
        self.window = serialize.window(self._answer.reading, begin, TOKENS, self._answer.roles)
        self._send_trace()

    def _send_trace(self) -> None:
        if self._answer is None or self.selected < 0:
            self.trace = {}
            return
        acts = self._answer.reading.activations(self.selected_sae, self.selected)
        self.trace = serialize.trace(acts, self.window.get("offset", 0), TOKENS)

    def _send_page(self) -> None:
        """Show the selected latent: its activations, its page, and in the browsers that follow."""
        self._send_trace()
        self.page = self.inputs.page(self.selected_sae, self.selected)
        for part, browser in self._browsers:
            if part == self.selected_sae and self.selected >= 0:
                browser.selected = self.selected
