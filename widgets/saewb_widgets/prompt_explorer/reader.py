"""Prompts asked about: what is asked, the work it takes, one thing after the other, and what was found."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import traitlets as t

import saewb
from saewb_widgets.panel import Panel, catch_errors, model_line, report_errors
from saewb_widgets.prompt_explorer import serialize, worker
from saewb_widgets.prompt_explorer.inputs import Given
from saewb_widgets.prompt_explorer.worker import ALL, Asked, Found
from saewb_widgets.steering.settings import attempt

_STOPPED = "Stopped: this prompt is not read."
_ASKS = ("prompt", "special_tokens", "shown", "rank", "target", "position", "method")


class PromptReader(Panel):
    """A panel that reads a prompt, abstract.

    1. Whatever is asked goes to a thread (`reading`), and what it finds is drawn; the latest question wins.
    2. Then the model runs with the SAEs in place (`comparing`), for next words beside its own.
    """

    prompt = t.Unicode("", help="the text; the tokenizer adds its special tokens").tag(sync=True)
    position = t.Int(-1, help="the token whose latents are listed; from the end if negative").tag(sync=True)
    shown = t.Int(ALL, help="which SAE (or layer of a cross-layer transcoder); -1 for all").tag(sync=True)
    rank = t.Unicode("activation", help="activation, of_max, logit_effect or attribution").tag(sync=True)
    target = t.Unicode("", help="the next token that effects are on: its text, id:NUMBER, or '' for the likeliest").tag(
        sync=True
    )
    method = t.Unicode("gradient", help="of attribution: gradient or integrated").tag(sync=True)
    special_tokens = t.Bool(False, help="read BOS and the like too").tag(sync=True)
    words = t.Dict(help="what comes next, at the position").tag(sync=True)

    given: Given
    _found: Found | None = None
    _ready = False  # whether traits that change are questions

    @abstractmethod
    def _draw(self, fresh: bool) -> None:
        """Show `_found`; `fresh` if it is of another prompt than before."""

    @abstractmethod
    def _clear(self) -> None:
        """Show that nothing is known."""

    @property
    def reading(self) -> saewb.PromptReading | None:
        """What `saewb.read_prompt` found; None without a prompt."""
        return None if self._found is None else self._found.reading

    @property
    def next_tokens(self) -> saewb.NextTokens | None:
        """What `saewb.next_tokens` found; None without a prompt."""
        return None if self._found is None else self._found.words

    def stop(self) -> None:
        """End what the model is doing; what is known stays, and a prompt that is not read yet can be read again."""
        if self._jobs:
            self._end("reading", "comparing")
            self._stopped()
            self.notice = _STOPPED if self._found is None else self.notice

    @t.validate("shown", "rank", "method", "position")
    @catch_errors
    def _check_question(self, proposal: dict) -> Any:
        name, got = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name != "position":
                return worker.check(name, got, len(self.given.names), self.given.has_index)
            if self._found is not None and self._found.asked.prompt == self.prompt:
                self._found.words.to_frame(got)  # says what is wrong
        return got

    @t.observe("prompt")
    @catch_errors
    def _prompted(self, _: Any = None) -> None:
        if self._ready:
            self._set(position=-1)
            self._ask_anew()

    @t.observe("special_tokens", "shown", "rank", "target", "position", "method")
    @catch_errors
    def _asked_anew(self, _: Any = None) -> None:
        if self._ready:
            self._ask_anew()

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        if isinstance(content, dict) and content.get("do") == "collect":
            with self._lock:
                self._say_how_far()
        super()._on_message(_, content, buffers)

    def _ask_anew(self) -> None:
        asked, before, g = Asked(*(getattr(self, name) for name in _ASKS)), self._found, self.given
        self.about = model_line(g.saes, g.model)
        self.notice = "" if self.notice == _STOPPED else self.notice
        if before is not None and not before.is_about(asked):
            self._end("comparing")
        if not asked.prompt:
            self._end("reading")
            self._clear()
            return
        if (found := worker.met(asked, before)) is not None:
            self._end("reading")
            self._arrived((found, None))
            return

        def work() -> Any:
            try:
                return worker.find(g.runner.model, g.saes, asked, before)
            except Exception as error:  # raised where the result is asked for
                return asked, error

        self._run("reading", "running the model", work, self._arrived)

    def _run(self, key: str, what: str, work: Any, then: Any) -> None:
        self.start_work(key, what, self.given.runner.begun(key, what, work), then)

    def _end(self, *keys: str) -> None:
        for key in keys:
            self.given.runner.stop(key)
            self.discard_work(key)

    def _say_how_far(self) -> None:
        if self._jobs:
            self.busy = self.given.runner.said(next(iter(self._jobs)))

    def _stopped(self) -> None:
        """Show what is known of the prompt: all of it, as it was asked for before, or nothing."""
        if self._found is None or self._found.asked.prompt != self.prompt:
            self._clear()
        else:
            self._set(**dict(zip(_ASKS, vars(self._found.asked).values(), strict=True)))
            self._send_words()

    def _arrived(self, got: tuple[Found, Any] | tuple[Asked, Exception]) -> None:
        """Show what was found, and go on to compare; or take back what could not be found, and raise."""
        what, more = got
        if isinstance(more, Exception):
            self._stopped()
            raise more
        fresh = self._found is None or self._found.asked.prompt != what.asked.prompt
        if not fresh and not what.compared and self._found.compared and self._found.is_about(what.asked):
            what = replace(what, words=self._found.words)  # they have come meanwhile
        self._found = what
        self._compare(more)
        self._send_words()
        self._draw(fresh)

    def _compare_again(self) -> None:
        """What was stopped or has failed."""
        if self._found is not None:
            self._compare(worker.comparing(self.given.runner.model, self.given.saes, self._found))
            self._send_words()

    def _compare(self, work: Any) -> None:
        if work is not None:
            self._run("comparing", "running it with the SAEs", lambda: attempt(work), self._compared)

    def _compared(self, got: tuple[Any, Exception | None]) -> None:
        words, error = got
        if error is not None:
            self._send_words()
            raise error
        self._found = replace(self._found, words=words)
        self._send_words()

    def _send_words(self) -> None:
        self.words = {**serialize.words(self._found), "comparing": "comparing" in self._jobs}

    def _set(self, **traits: Any) -> None:
        """Set traits without asking anew."""
        self._ready = False
        try:
            for name, value in traits.items():
                setattr(self, name, value)
        finally:
            self._ready = True
