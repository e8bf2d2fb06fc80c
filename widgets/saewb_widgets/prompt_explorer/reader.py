"""Abstract panel that reads a prompt: turns trait changes into questions and runs them in the background."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import traitlets as t

import saewb
from saewb_widgets.panel import Panel, catch_errors, model_line, on_change, report_errors
from saewb_widgets.prompt_explorer import serialize, worker
from saewb_widgets.prompt_explorer.inputs import Inputs
from saewb_widgets.prompt_explorer.worker import ALL, Answer, Question
from saewb_widgets.steering.settings import attempt

_STOPPED = "Stopped: this prompt is not read."
_QUESTION_TRAITS = ("prompt", "special_tokens", "shown", "rank", "target", "position", "method", "chat")


class PromptReader(Panel):
    """Abstract panel that reads a prompt.

    1. A thread answers each question (`reading`), then the panel shows the answer; a newer question replaces an older.
    2. Then the model runs with the SAEs attached (`comparing`), for its next tokens with them.
    """

    prompt = t.Unicode("", help="text to read; the tokenizer adds its special tokens").tag(sync=True)
    position = t.Int(-1, help="index of the token whose latents are listed; negative counts from the end").tag(
        sync=True
    )
    shown = t.Int(ALL, help="number of the SAE (or layer of a cross-layer transcoder) shown; -1 for all").tag(sync=True)
    rank = t.Unicode("activation", help="sort key: activation, of_max, logit_effect or attribution").tag(sync=True)
    target = t.Unicode(
        "", help="next token that effects are computed for: its text, id:NUMBER, or '' for the most likely"
    ).tag(sync=True)
    method = t.Unicode("gradient", help="attribution method: gradient or integrated").tag(sync=True)
    chat = t.Bool(False, help="whether the prompt is a chat, in the model's template").tag(sync=True)
    special_tokens = t.Bool(False, help="whether to read special tokens such as BOS too").tag(sync=True)
    words = t.Dict(help="next tokens at the position").tag(sync=True)

    inputs: Inputs
    _answer: Answer | None = None
    _ready = False  # whether trait changes are new questions

    @abstractmethod
    def _draw(self, fresh: bool) -> None:
        """Show `_answer`; `fresh` if its prompt is a new one."""

    @abstractmethod
    def _clear(self) -> None:
        """Show an empty view."""

    @property
    def reading(self) -> saewb.PromptReading | None:
        """The result of `saewb.read_prompt`; None without a prompt."""
        return None if self._answer is None else self._answer.reading

    @property
    def next_tokens(self) -> saewb.NextTokens | None:
        """The result of `saewb.next_tokens`; None without a prompt."""
        return None if self._answer is None else self._answer.words

    def stop(self) -> None:
        """Stop the background work; results stay, and a prompt that was not read yet can be read again."""
        if self._jobs:
            self._end("reading", "comparing")
            self._restore()
            self.notice = _STOPPED if self._answer is None else self.notice

    @t.validate("shown", "rank", "method", "position")
    @catch_errors
    def _check_question(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name != "position":
                return worker.check(name, value, len(self.inputs.names), self.inputs.has_index)
            if self._answer is not None and self._answer.question.text == (self.prompt, self.chat):
                self._answer.words.to_frame(value)  # raises for a position that does not exist
        return value

    @on_change("prompt", "chat")
    def _on_prompt(self) -> None:
        self._set(position=-1)
        self._submit()

    @on_change(*_QUESTION_TRAITS[1:-1])
    def _on_question(self) -> None:
        self._submit()

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        if isinstance(content, dict) and content.get("do") == "collect":
            with self._lock:
                if self._jobs:
                    self.busy = self.inputs.runner.progress(next(iter(self._jobs)))
        super()._on_message(_, content, buffers)

    def _submit(self) -> None:
        """Answer the question that the traits pose now."""
        question, previous = Question(*(getattr(self, name) for name in _QUESTION_TRAITS)), self._answer
        model, saes = self.inputs.runner.model, self.inputs.saes
        self.about = model_line(saes, self.inputs.model)
        self.notice = "" if self.notice == _STOPPED else self.notice
        if previous is not None and not previous.question.has_same_reading(question):
            self._end("comparing")
        if not question.prompt:
            self._end("reading")
            self._clear()
            return
        if (answer := worker.reuse(question, previous)) is not None:
            self._end("reading")
            self._on_answer((answer, None))
            return

        def work() -> Any:
            try:
                return worker.compute(model, saes, question, previous)
            except Exception as error:  # raised in `_on_answer`
                return question, error

        self._run("reading", "running the model", work, self._on_answer)

    def _run(self, key: str, what: str, work: Any, then: Any) -> None:
        self.start_work(key, what, self.inputs.runner.track(key, what, work), then)

    def _end(self, *keys: str) -> None:
        for key in keys:
            self.inputs.runner.stop(key)
            self.discard_work(key)

    def _restore(self) -> None:
        """Show the last answer and its question again, or nothing if it is of another prompt."""
        if self._answer is None or self._answer.question.text != (self.prompt, self.chat):
            self._clear()
        else:
            self._set(**dict(zip(_QUESTION_TRAITS, vars(self._answer.question).values(), strict=True)))
            self._send_words()

    def _on_answer(self, result: tuple[Answer, Any] | tuple[Question, Exception]) -> None:
        """Show an answer and run its comparison; or restore the last answer and raise the exception."""
        answer, later = result
        if isinstance(later, Exception):
            self._restore()
            raise later
        old = self._answer
        fresh = old is None or old.question.text != answer.question.text
        if not fresh and not answer.compared and old.compared and old.question.has_same_reading(answer.question):
            answer = replace(answer, words=old.words)  # the comparison finished meanwhile
        self._answer = answer
        self._compare(later)
        self._send_words()
        self._draw(fresh)

    def _compare_again(self) -> None:
        """Run a comparison again that was stopped or failed."""
        if self._answer is not None:
            self._compare(worker.comparison(self.inputs.runner.model, self.inputs.saes, self._answer))
            self._send_words()

    def _compare(self, work: Any) -> None:
        if work is not None:
            self._run("comparing", "running it with the SAEs", lambda: attempt(work), self._on_comparison)

    def _on_comparison(self, result: tuple[Any, Exception | None]) -> None:
        words, error = result
        if error is None:
            self._answer = replace(self._answer, words=words)
        self._send_words()
        if error is not None:
            raise error

    def _send_words(self) -> None:
        self.words = {**serialize.words(self._answer), "comparing": "comparing" in self._jobs}

    def _set(self, **traits: Any) -> None:
        """Set traits without posing a question."""
        self._ready = False
        try:
            for name, value in traits.items():
                setattr(self, name, value)
        finally:
            self._ready = True
