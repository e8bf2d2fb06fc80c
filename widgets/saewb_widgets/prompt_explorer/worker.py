"""Background work of a PromptExplorer: questions about a prompt, answers with tables and code, and how to stop work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import saewb
from saewb import errors

if TYPE_CHECKING:
    import pandas as pd

ALL = -1  # stands for all SAEs where the number of one is expected
RANKS = {  # sort keys of the table, and their names in the panel
    "activation": "activation",
    "of_max": "share of their largest",
    "logit_effect": "direct effect on logit",
    "attribution": "attribution",
}
TARGETED = ("logit_effect", "attribution")  # ranks that need a target token
METHODS = ("gradient", "integrated")


@dataclass(frozen=True)
class Question:
    """What to compute for a prompt: the traits of the panel that need the model."""

    prompt: str
    """The text."""
    special: bool
    """Whether to read special tokens too."""
    shown: int
    """Number of the part (an SAE, or one layer of a cross-layer transcoder), or `ALL`."""
    rank: str
    """Sort key, one of `RANKS`."""
    target: str
    """Target token of effects: its text, `id:NUMBER`, or "" for the most likely one."""
    position: int
    """Token index; negative counts from the end."""
    method: str
    """Attribution method, one of `METHODS`."""
    chat: bool = False
    """Whether the prompt is a chat, see `saewb.data.chats.messages_of`."""

    @property
    def text(self) -> tuple[str, bool]:
        """The prompt, and whether it is a chat."""
        return self.prompt, self.chat

    def prompt_argument(self) -> str | list[dict[str, str]]:
        """The prompt as saewb takes it."""
        return saewb.data.chats.messages_of(self.prompt) if self.chat else self.prompt

    @property
    def skip(self) -> bool:
        """The argument `skip_special_tokens`."""
        return not self.special

    def target_argument(self) -> str | int:
        """The target as saewb takes it: a text or a token id."""
        number = self.target.removeprefix("id:")
        return int(number) if self.target.startswith("id:") and number.strip().isdigit() else self.target

    def has_same_reading(self, other: Question) -> bool:
        """Whether both need the same run of the model with the same SAEs."""
        return (self.text, self.special, self.shown) == (other.text, other.special, other.shown)


@dataclass(frozen=True, eq=False)
class Answer:
    """The result for a `Question`."""

    question: Question
    """What was computed."""
    reading: saewb.PromptReading
    """Active latents, with effects on a target if the rank needs them."""
    alone: saewb.NextTokens
    """Next tokens of the model alone."""
    words: saewb.NextTokens
    """Next tokens with the SAEs attached, once they are computed; until then `alone`."""
    comparable: bool
    """Whether the SAEs can be attached at the same time."""
    method: str = ""
    """Attribution method of `reading`."""
    target: str | None = None
    """Target of the effects in `reading`, as in the question."""
    roles: tuple[str, ...] = ()
    """Role of each token of a chat; empty for a text."""

    @property
    def compared(self) -> bool:
        """Whether `words` has the SAEs attached."""
        return self.words is not self.alone

    @property
    def at(self) -> int:
        """The position in question, counted from the beginning."""
        return self.question.position % len(self.reading.tokens)

    @property
    def likeliest(self) -> int:
        """Id of the most likely next token at the position."""
        return int(self.words.ids[self.at, 0])

    @property
    def is_complete(self) -> bool:
        """Whether the reading has the effects that the rank needs."""
        question, reading = self.question, self.reading
        if question.rank not in TARGETED:
            return True
        is_target = self.target == question.target if question.target else reading.target == self.likeliest
        if getattr(reading, question.rank) is None or not is_target:
            return False
        return question.rank == "logit_effect" or (reading.at == self.at and self.method == question.method)


def can_attach_together(saes: Sequence[Any]) -> bool:
    """Whether the SAEs write to different hook points, so that the model can run with all of them at once."""
    hook_names: list[str] = []
    for sae in saes:
        hooks_out = getattr(sae.cfg, "hooks_out", None)
        hook_names += hooks_out if hooks_out is not None else [sae.cfg.hook_out or sae.cfg.hook]
    return len(set(hook_names)) == len(hook_names)


def reuse(question: Question, previous: Answer | None) -> Answer | None:
    """The previous answer, if it answers this question too."""
    if previous is None or not previous.question.has_same_reading(question):
        return None
    n, answer = len(previous.reading.tokens), replace(previous, question=question)
    return answer if -n <= question.position < n and answer.is_complete else None


Comparison = Callable[[], saewb.NextTokens]  # runs the model with the SAEs attached


def compute(
    model: Any, saes: Sequence[Any], question: Question, previous: Answer | None
) -> tuple[Answer, Comparison | None]:
    """Answer a question, reusing the previous answer; the run with the SAEs attached is returned, to do later."""
    old, later = None if previous is None else previous.question, None
    if old is not None and old.has_same_reading(question):
        answer = replace(previous, question=question)
    elif old is not None and (old.text, old.special) == (question.text, question.special):
        comparable = can_attach_together(_shown_saes(saes, previous.reading, question))
        answer = replace(previous, question=question, words=previous.alone, comparable=comparable)
        later = comparison(model, saes, answer)
    else:
        parts = [sae for sae in saes for _ in getattr(sae.cfg, "hooks", [None])]
        chosen = list(saes) if question.shown == ALL else [parts[question.shown]]
        comparable = can_attach_together(chosen)
        attached = chosen if comparable else None
        prompt = question.prompt_argument()
        roles = saewb.chat_prompt(model, prompt).roles if question.chat else ()
        steps = saewb.read_in_turn(model, prompt, saes, attached, skip_special_tokens=question.skip)
        reading, words = next(steps)
        answer = Answer(question, reading, words, words, comparable, roles=roles)
        later = (lambda: next(steps)[1]) if comparable else None
    answer.words.to_frame(question.position)  # raises for a position that does not exist
    return _with_effects(answer), later


def comparison(model: Any, saes: Sequence[Any], answer: Answer) -> Comparison | None:
    """The run of the model with the SAEs attached that is left to do, if there is one."""
    if not answer.comparable:
        return None
    question, chosen = answer.question, _shown_saes(saes, answer.reading, answer.question)
    return lambda: saewb.next_tokens(model, question.prompt_argument(), chosen, skip_special_tokens=question.skip)


def _shown_saes(saes: Sequence[Any], reading: saewb.PromptReading, question: Question) -> list[Any]:
    return list(saes) if question.shown == ALL else [saes[reading.owner[question.shown]]]


def _with_effects(answer: Answer) -> Answer:
    """Add the effects on the target that the rank needs."""
    if answer.is_complete:
        return answer
    question, reading = answer.question, answer.reading
    target = question.target_argument() if question.target else answer.likeliest
    reading = reading.toward(target)
    if question.rank == "attribution":
        reading = reading.attributed(target, answer.at, question.method)
    reading.to_frame(n=0, by=question.rank)  # raises if there are no effects
    return replace(answer, reading=reading, method=question.method, target=question.target)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which rows of an answer are listed."""

    answer: Answer
    """What was computed."""
    everywhere: bool
    """Whether to list each latent of the prompt once, at its largest activation."""
    index: Any
    """Feature index of the SAE, a list of them, or None."""
    max_density: float
    """Omit latents that fire on more than this fraction of tokens."""

    def to_frame(self) -> pd.DataFrame:
        """The rows, sorted."""
        question = self.answer.question
        return self.answer.reading.to_frame(
            None if self.everywhere else self.answer.at,
            None if question.shown == ALL else question.shown,
            by=question.rank,
            once=self.everywhere,
            index=self.index,
            max_density=self.max_density,
        )

    def code(self, run: tuple[str, list[str]], sae: str, index: str, selected: tuple[int, int]) -> str:
        """Python code that computes `latents` (as `to_frame`), `words` and `activations`.

        Args:
            run: variable that holds the model to run, and the lines that define it.
            sae: variable that holds the SAE, or the list of them.
            index: variable that holds the index, or the list of them.
            selected: part and latent.
        """
        question, reading = self.answer.question, self.answer.reading
        skip = [] if question.skip else ["skip_special_tokens=False"]
        effects = []
        if reading.logit_effect is not None:
            effects.append(f"target={reading.target}")
        if reading.attribution is not None:
            effects += [f"at={reading.at}", f"attribution={self.answer.method!r}"]
        table = [] if self.everywhere else [f"position={self.answer.at}"]
        table += [] if question.shown == ALL else [f"sae={question.shown}"]
        table += [f"by={question.rank!r}"]
        table += ["once=True"] if self.everywhere else []
        table += [] if self.index is None else [f"index={index}"]
        table += [] if self.max_density == 1 else [f"max_density={self.max_density!r}"]
        attached = f", {sae}" if question.shown == ALL or sae == "sae" else f", {sae}[{reading.owner[question.shown]}]"
        note = []
        if not self.answer.comparable:
            attached, note = "", ["# two of the SAEs write to the same hook point, so they are not attached here"]
        lines = [
            "import saewb",
            "",
            f"# model, {sae}{'' if self.index is None else ', ' + index}: what the panel was made with",
            *run[1],
            f"prompt = {question.prompt_argument()!r}",
            f"reading = saewb.read_prompt({', '.join([f'{run[0]}, prompt, {sae}', *effects, *skip])})"
            + (f"  # {reading.target_token!r}" if effects and reading.target_token is not None else ""),
            f"latents = reading.to_frame({', '.join(table)})",
            *note,
            f"next_tokens = saewb.next_tokens({', '.join([f'{run[0]}, prompt{attached}', *skip])})",
            f"words = next_tokens.to_frame({self.answer.at})",
        ]
        if selected[1] >= 0:
            lines.append(f"activations = reading.activations{selected}")
        return "\n".join(lines) + "\n"


def facts(inputs: Any, **more: Any) -> dict[str, Any]:
    """Constants for the front end.

    Args:
        inputs: the panel's `inputs.Inputs`.
        more: further constants.
    """
    return {
        "saes": list(inputs.names),
        "ranks": [[k, v] for k, v in RANKS.items() if k != "of_max" or inputs.has_index],
        "methods": list(METHODS),
        "targeted": list(TARGETED),
        "has_index": inputs.has_index,
        "can_chat": getattr(inputs.model.tokenizer, "chat_template", None) is not None,
        **more,
    }


def check(name: str, value: Any, n_parts: int, has_index: bool) -> Any:
    """Check a value of rank, method, shown or max_density, and return it.

    Raises:
        ValueError: if it is not allowed, with near names.
    """
    if name == "shown":
        if not ALL <= value < n_parts:
            raise ValueError(errors.explain(f"shown is {value}.", want=f"0 to {n_parts - 1}, or -1 for all"))
    elif name == "max_density":
        if not 0 < value <= 1:
            raise ValueError(errors.explain(f"max_density is {value}.", want="a fraction of tokens, in (0, 1]"))
        if value < 1 and not has_index:
            what = "how often latents fire is not known without an index."
            raise ValueError(errors.explain(what, fix="PromptExplorer(model, sae, index)"))
    elif value not in (choices := RANKS if name == "rank" else METHODS):
        near = errors.near(value, choices)
        raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want=", ".join(choices)))
    elif value == "of_max" and not has_index:
        what = "the largest activations are not known without an index."
        raise ValueError(errors.explain(what, fix="PromptExplorer(model, sae, index)"))
    return value


class Stopped(Exception):
    """Raised in background work that was stopped."""


@dataclass(eq=False)
class Work:
    """Progress of one thread's work on the model."""

    what: str
    """Text shown while it runs."""
    n_layers: int
    """Blocks per forward pass."""
    n_done: int = 0
    """Blocks computed so far, over all forward passes."""
    stopped: bool = False
    """Whether to stop at the next block."""

    def tick(self) -> None:
        """Count a computed block; raise if the work was stopped."""
        if self.stopped:
            raise Stopped(self.what)
        self.n_done += 1

    def progress(self) -> str:
        """Text with the current layer and forward pass."""
        if not self.n_done:
            return self.what
        passes, layer = divmod(self.n_done - 1, self.n_layers)
        return f"{self.what}: layer {layer + 1} of {self.n_layers}" + (f", pass {passes + 1}" if passes else "")


class Runner:
    """A copy of a model that shares its weights, with progress and cancellation of the work that runs it."""

    def __init__(self, model: Any) -> None:
        self.model = saewb.models.shared_copy.shared_copy(model)
        self._local = threading.local()
        self._works: dict[str, Work] = {}
        n = model.cfg.n_layers
        for layer in range(n):
            saewb.models.hook_points.resolve(self.model, f"blocks.{layer}.hook_resid_post").add(self._tick)

    def track(self, key: str, what: str, work: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap `work` for a thread; earlier work of this key stops at its next block.

        Args:
            key: kind of work.
            what: text shown while it runs.
            work: function that runs the model.
        """
        self.stop(key)
        tracked = self._works[key] = Work(what, self.model.cfg.n_layers)

        def run() -> Any:
            self._local.work = tracked
            return work()

        return run

    def progress(self, key: str) -> str:
        """Progress text of the work of this key."""
        return self._works[key].progress()

    def stop(self, key: str) -> None:
        """Stop the work of this key at its next block."""
        if key in self._works:
            self._works[key].stopped = True

    def _tick(self, activation: Any) -> None:
        if (work := getattr(self._local, "work", None)) is not None:
            work.tick()
