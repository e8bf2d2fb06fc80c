"""SteeringPanel: text generated with and without steering, and the change of the next-token probabilities."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, model_line, report_errors, source
from saewb_widgets.serialize import short
from saewb_widgets.steering.settings import (
    HOW,
    MOVERS,
    POSITIONS,
    Settings,
    Texts,
    attempt,
    check_fits,
    check_latents,
    indexes,
    key,
    small_sweep,
    start_texts,
    visible,
)

if TYPE_CHECKING:
    import pandas as pd

_AT_ONCE = 4096  # latents; above, a search runs on a thread
_HITS = 12  # latents listed by a search
_WORDS = 4  # tokens in a label
_SPANS = 400  # tokens of a chat that are shown
_SWEPT = ("factor", "kl", "fluency", "repetition")
_BLANK = {"label": "", "raises": "", "max": 0.0}  # card of a latent without an index


class SteeringPanel(Panel):
    """Steer with latents: clean and steered text side by side, and the change of the next-token probabilities.

    The panel shows `saewb.generate_tokens` and `saewb.next_token_changes` under `saewb.steer`, one `steer` for each
    kind of change (first those that add, then scale, then clamp). It runs
    `saewb.models.shared_copy.shared_copy(model)`: the same weights without hooks, so cells can use the model at the
    same time and find it clean, and hooks that they add have no effect here. The table is updated with every change of
    a setting; texts are generated on request (`generate()` or a button), or with every change if `live=True`. Under the
    steered text stands what it costs (`saewb.steered_text`: KL, fluency, repetition); `sweep()` writes it at several
    multiples of the values. With a chat model, `chat=True` writes the prompt in the model's template, a message for
    each line that begins with "system:", "user:" or "assistant:", and positions may be those of a role.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> panel = SteeringPanel(model, sae, latents={972: 16.0}, prompt="The scientist", max_new_tokens=8)
        >>> panel.generate()
        >>> panel.wait()
        >>> panel
        SteeringPanel(add 972: 16, 'The scientist', not the first, tiny)
        >>> exec(panel.code(), shown := {"model": model, "sae": sae})
        >>> (shown["clean"], shown["steered"]) == (panel.clean, panel.steered)
        True
        >>> shown["figures"] == panel.text_figures
        True
    """

    _esm = source("shared/frame.js", "steering/steering.js")
    _css = source("shared/frame.css", "steering/steering.css")

    latents = t.List(t.Dict(), help="changed latents: {latent, value, how: add|scale|clamp, sae: 0}; see add()").tag(
        sync=True
    )
    prompt = t.Unicode("The", help="text that both generations continue").tag(sync=True)
    positions = t.Unicode("not the first", help="all, not the first (usually BOS), or in a chat those of a role").tag(
        sync=True
    )
    chat = t.Bool(False, help="whether the prompt is a chat, in the model's template").tag(sync=True)
    temperature = t.Float(0.0, help="sampling temperature; 0 takes the most likely token").tag(sync=True)
    seed = t.Int(0, help="sampling seed, if temperature is not 0; the same for both texts").tag(sync=True)
    max_new_tokens = t.Int(30, help="length of each text in tokens").tag(sync=True)
    live = t.Bool(False, help="whether every change generates the texts again").tag(sync=True)
    query = t.Unicode("", help="search for latents to add: a number or, with an index, a text").tag(sync=True)
    # Written by the panel for the front end; setting them has no other effect.
    clean = t.Unicode("", help="text of the model without steering").tag(sync=True)
    steered = t.Unicode("", help="text of the steered model").tag(sync=True)
    begun_with = t.Unicode("", help="prompt of these texts").tag(sync=True)
    figures = t.Dict(help="KL, fluency and repetition of the steered text; empty before it is written").tag(sync=True)
    swept = t.List(t.Dict(), help="rows of `sweep()`: factor, kl, fluency, repetition, text").tag(sync=True)
    spans = t.List(help="tokens of a chat prompt with their roles").tag(sync=True)
    running = t.Bool(False, help="whether the texts are being generated").tag(sync=True)
    stale = t.Bool(False, help="whether settings have changed since the texts were started").tag(sync=True)
    movers = t.List(help="next tokens: id, text, probability clean, steered, change").tag(sync=True)
    cards = t.List(help="label and largest activation of each of `latents`").tag(sync=True)
    results = t.Dict(help="results of `query`: latents with their labels").tag(sync=True)
    facts = t.Dict(help="constants for the front end").tag(sync=True)

    def __init__(
        self, model: Any, saes: Any, index: Any = None, *, latents: Mapping[int, float] | None = None, **traits: Any
    ) -> None:
        """Show the panel; no text is generated before `generate()`.

        Args:
            model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
            saes: an SAE of the model, or a list of them.
            index: a FeatureIndex of the SAE, for labels and search; a list of them (or None), one for each SAE.
            latents: `{latent: value}` of the first SAE, to add; for others see `add()`.
            traits: e.g. `prompt="Once"`, `positions="all"`, `temperature=0.8`.

        Raises:
            TypeError: for an unknown trait, or something that is not an SAE.
            ValueError: for an SAE that does not fit the model, an index of another size, or an invalid latent, mode or
                value.
        """
        self.check_names(traits, ["latents"])
        self.model, self._model_copy = model, saewb.models.shared_copy.shared_copy(model)
        self._several = isinstance(saes, Sequence)
        self.saes = list(saes) if self._several else [saes]
        self._indexes = indexes(self.saes, index)
        check_fits(self._model_copy, self.saes)
        self.changes: pd.DataFrame | None = None  # result of saewb.next_token_changes
        self._sweep_settings: Settings | None = None  # of the rows in `swept`
        self._texts: Texts | None = None
        self._text_settings: Settings | None = None  # of the current texts
        self._is_outdated = self._ready = self._stopped = False
        self._lengths = (0, 0)  # tokens of the texts shown, clean and steered
        super().__init__(**traits)
        name = getattr(model.cfg, "model_name", type(model).__name__)
        self.title = f"Steering {name}"
        self._name = name
        self.facts = {
            "saes": [sae.cfg.hook or f"SAE {i}" for i, sae in enumerate(self.saes)],
            "can_search": any(x is not None for x in self._indexes),
            "how": list(HOW),
            "positions": list(POSITIONS),
            "roles": list(saewb.data.chats.ROLES),
            "can_chat": getattr(getattr(model, "tokenizer", None), "chat_template", None) is not None,
            "context": int(model.cfg.n_ctx),
        }
        self.latents = [{"sae": 0, "latent": i, "value": v, "how": "add"} for i, v in (latents or {}).items()]
        self._ready = True
        if (error := self._update_cards()) is not None:
            raise error
        self._update_chat()
        self._update_table()

    # What a user does

    @property
    def text_figures(self) -> saewb.TextFigures | None:
        """What steering did to the text: the result of `saewb.steered_text`; None before the texts are done."""
        return None if self._texts is None else self._texts.figures

    def sweep(self) -> None:
        """Write the steered text at several multiples of the values; `wait()` waits for the result, `swept`."""
        settings = self._settings()
        if not settings.latents:
            raise ValueError(errors.explain("there is no latent to sweep.", fix="panel.add(12, 8.0)"))
        model, saes = self._model_copy, self.saes

        def then(result: Any) -> None:
            rows, error = result
            if error is not None:
                raise error
            self.swept = [{"text": row["text"], **{name: _number(row[name]) for name in _SWEPT}} for row in rows]
            self._sweep_settings = settings

        self.swept = []
        self.start_work("sweep", "sweeping", lambda: attempt(partial(small_sweep, model, saes, settings)), then)

    def add(self, latent: int, value: float = 8.0, how: str = "add", sae: int = 0) -> None:
        """Change a latent; replaces an earlier change of it.

        Args:
            latent: its number.
            value: the amount to add, the new activation (clamp), or the factor (scale).
            how: add, scale or clamp, as in `saewb.steer`.
            sae: number of the SAE in the user's list.
        """
        new = {"sae": sae, "latent": latent, "value": value, "how": how}
        if any(key(one) == (sae, latent) for one in self.latents):
            self.latents = [new if key(one) == (sae, latent) else one for one in self.latents]
        else:
            self.latents = [*self.latents, new]

    def remove(self, latent: int, sae: int = 0) -> None:
        """Undo the change of a latent."""
        self.latents = [one for one in self.latents if key(one) != (sae, latent)]

    def generate(self) -> None:
        """Start both texts again, and stop the current ones; `wait()` waits for their end."""
        settings = self._settings()
        texts = start_texts(self._model_copy, self.saes, settings)
        self.about = model_line(self.saes, self.model)
        self._close()
        self._texts, self._text_settings, self._stopped = texts, settings, False
        self.clean, self.steered, self.begun_with, self.figures = "", "", self.prompt, {}
        self.stale, self.running = False, True

        def then(error: Exception | None) -> None:
            self._show_texts()
            self.running = False
            self._show_figures()
            if error is not None:
                self._text_settings, self.stale = None, True
                raise error

        self.start_work("texts", "writing", lambda: attempt(texts.run)[1], then)

    def stop(self) -> None:
        """Stop generating; the text so far stays."""
        if self.running:
            self._close()
            self._show_texts()
            self.discard_work("texts")
            self.running, self._stopped = False, True

    def summary(self) -> str:
        """See Panel."""
        of = [f"{one['sae']}/" if len(self.saes) > 1 else "" for one in self.latents]
        changes = [
            f"{one['how']} {sae}{one['latent']}: {one['value']:g}" for sae, one in zip(of, self.latents, strict=True)
        ]
        prompt = self.prompt if len(self.prompt) <= 40 else self.prompt[:39] + "…"
        return ", ".join([*(changes or ["no latents"]), repr(prompt), self.positions, self._name])

    def code(self) -> str:
        """Python code that computes `clean`, `steered` and `changes` from `model` and `sae` (or `saes`), as set now."""
        cut = self._stopped and not self.stale
        return self._settings().code(self.model, self.saes, self._several, self._lengths if cut else None)

    def static_html(self) -> str:
        """See Panel."""
        cell = "style='vertical-align:top;padding:2px 18px 2px 0;width:50%;white-space:pre-wrap;text-align:left'"
        prompt = f"<span style='opacity:.65'>{html.escape(self.begun_with or self.prompt)}</span>"
        texts = "".join(
            f"<td {cell}><b>{name}</b><br>{prompt}{html.escape(text)}</td>"
            for name, text in (("Clean", self.clean), ("Steered", self.steered))
        )
        changes = [
            (one["latent"], one["how"], f"{one['value']:g}", card["label"])
            for one, card in zip(self.latents, self.cards, strict=True)
        ]
        swept = [
            (*("" if row[name] is None else f"{row[name]:.3g}" for name in _SWEPT), row["text"][:200])
            for row in self.swept
        ]
        moved = [
            (visible(token), f"{100 * p:.3g} %", f"{100 * q:.3g} %", f"{100 * d:+.3g}")
            for _, token, p, q, d in self.movers[:12]
        ]
        return (
            grid(("latent", "how", "value", "on"), changes)
            + f"<table style='width:100%;margin:8px 0'><tr>{texts}</tr></table>"
            + (f"<p>{html.escape(repr(self.text_figures))}</p>" if self.figures else "")
            + (grid(("times", "KL", "fluency", "repetition", "text"), swept) if swept else "")
            + grid(("next token", "clean", "steered", "change"), moved)
        )

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "generate":
            self.generate()
        elif what == "sweep":
            self.sweep()
        elif what == "stop":
            self.stop()
        elif what == "add":
            self.add(**how)
        elif what == "remove":
            self.remove(**how)
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"SteeringPanel was asked to {what!r}."))

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        if isinstance(content, dict) and content.get("do") == "collect":
            with self._lock:
                self._show_texts()
        super()._on_message(_, content, buffers)

    # Validation, before anything changes

    @t.validate("latents", "positions", "temperature", "seed", "max_new_tokens", "chat")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "latents":
                return check_latents(value, self.saes)
            if name == "positions" and value not in (allowed := [*POSITIONS, *saewb.data.chats.ROLES]):
                near = errors.near(value, allowed)
                raise ValueError(errors.explain(f"positions is {value!r}.", near=near, want=", ".join(allowed)))
            if name == "chat" and value and getattr(self.model.tokenizer, "chat_template", None) is None:
                what = f"{self.model.cfg.model_name} has no chat template."
                raise ValueError(errors.explain(what, want="a chat model", fix="chat=False"))
            if name == "temperature" and not (math.isfinite(value) and value >= 0):
                raise ValueError(errors.explain(f"temperature is {value}.", want="a number >= 0"))
            if name == "seed" and not 0 <= value < 2**63:
                raise ValueError(errors.explain(f"seed is {value}.", want="0 or more, below 2**63"))
            if name == "max_new_tokens" and value < 1:
                raise ValueError(errors.explain(f"max_new_tokens is {value}.", want="at least 1"))
        return value

    @t.observe("latents", "prompt", "positions", "temperature", "seed", "max_new_tokens", "live", "chat")
    @catch_errors
    def _on_setting(self, change: dict) -> None:
        if not self._ready:
            return
        error = self._update_cards() if change["name"] == "latents" else None
        if change["name"] in ("prompt", "chat"):
            self._update_chat()
        if not self.chat and self.positions in saewb.data.chats.ROLES:
            self.positions = "not the first"
        self.stale = self._texts is not None and self._text_settings != self._settings()
        if self.swept and self._sweep_settings != self._settings():
            self.swept = []
        if change["name"] in ("latents", "prompt", "positions", "chat"):
            self._update_table()
        if self.live:
            self.generate()
        if error is not None:
            raise error

    @t.observe("query")
    @catch_errors
    def _on_query(self, _: Any = None) -> None:
        query = self.query.strip()
        if not query:
            self.discard_work("search")
            self.results = {}
        elif query.isdigit():
            self._show_hits([(k, int(query)) for k, sae in enumerate(self.saes) if int(query) < sae.cfg.d_sae])
        elif not self.facts["can_search"]:
            what = f"SteeringPanel has no index to search for {query!r}."
            raise ValueError(errors.explain(what, want="a latent's number", fix="SteeringPanel(model, sae, index)"))
        else:
            self._search(query)

    def _search(self, query: str) -> None:
        indexes = [(k, index) for k, index in enumerate(self._indexes) if index is not None]

        def work() -> list[tuple[int, int]]:
            return [(k, int(i)) for k, index in indexes for i in index.search(query, _HITS).index]

        if sum(len(index) for _, index in indexes) > _AT_ONCE:
            self.start_work("search", "searching", work, self._show_hits)
        else:
            self._show_hits(work())

    def _show_hits(self, latents: list[tuple[int, int]]) -> None:
        self.results = {"query": self.query, "rows": [[k, i, self._card(k, i)] for k, i in latents]}

    def _settings(self) -> Settings:
        latents = tuple((one["sae"], one["latent"], one["value"], one["how"]) for one in self.latents)
        how = (self.prompt, self.positions, self.temperature, self.seed, self.max_new_tokens, self.chat)
        return Settings(latents, *how)

    def _update_chat(self) -> None:
        """Show the tokens of a chat with their roles."""
        if not self.chat:
            self.spans = []
            return
        chat = saewb.chat_prompt(self._model_copy, self._settings().prompt_argument())
        self.spans = [[text, role] for text, role in zip(chat.tokens[:_SPANS], chat.roles, strict=False)]

    def _show_figures(self) -> None:
        if (figures := self.text_figures) is not None:
            self.figures = {name: _number(value) for name, value in vars(figures).items()}

    def _update_cards(self) -> Exception | None:
        """Update the cards, blank where the index cannot be read, and return the exception of that."""
        cards = [attempt(partial(self._card, *key(change))) for change in self.latents]
        self.cards = [_BLANK if card is None else card for card, _ in cards]
        return next((error for _, error in cards if error is not None), None)

    def _card(self, sae: int, latent: int) -> dict[str, Any]:
        """The card of a latent: the tokens it fires on and promotes most, and its largest activation."""
        if (index := self._indexes[sae]) is None:
            return _BLANK
        page = index.latent(latent)
        tokens = dict.fromkeys(visible(c.tokens[c.at]) for c in page.top)
        raised = [visible(word.token) for word in page.logits_top[:_WORDS]]
        label = page.label if page.is_explained else ", ".join(list(tokens)[:_WORDS])
        return {"label": label, "raises": ", ".join(raised), "max": short(page.max)}

    def _update_table(self) -> None:
        """Update the table in the background, one job at a time; the last settings win."""
        if "changes" in self._jobs:
            self._is_outdated = True
            return
        self._is_outdated, self.about = False, model_line(self.saes, self.model)
        if not self.latents:
            self.changes, self.movers = None, []
            return
        model, saes, settings = self._model_copy, self.saes, self._settings()

        def work() -> Any:
            return saewb.next_token_changes(
                model, settings.prompt_argument(), lambda: settings.intervene(model, saes), n=MOVERS
            )

        self.start_work("changes", "next tokens", lambda: attempt(work), lambda result: self._on_changes(*result))

    def _on_changes(self, table: Any, error: Exception | None) -> None:
        self.changes = table
        columns = ["token_id", "token", "clean", "changed", "change"]
        rows = [] if table is None else table[columns].values.tolist()
        self.movers = [[i, token, *map(short, odds)] for i, token, *odds in rows]
        if self._is_outdated:
            self._update_table()
        elif error is not None:
            raise error

    def _show_texts(self) -> None:
        """Show the text generated so far."""
        if self._texts is not None and self.running:
            (n, self.clean), (m, self.steered) = self._texts.so_far("clean"), self._texts.so_far("steered")
            self._lengths = (n, m)

    def _close(self) -> None:
        if self._texts is not None:
            self._texts.stop.set()


def _number(value: float) -> float | None:
    """Four significant digits; None for nan, which JSON does not have."""
    return None if math.isnan(value) else short(value)
