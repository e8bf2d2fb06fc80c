"""The work behind a PromptExplorer: what is computed on its thread, as a table and as code, and how to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import saewb
from saewb import errors

if TYPE_CHECKING:
    import pandas as pd

ALL = -1  # stands where the number of one SAE would
RANKS = {  # what latents are sorted by: what the panel calls it
    "activation": "activation",
    "of_max": "share of their largest",
    "logit_effect": "direct effect on logit",
    "attribution": "attribution",
}
WEIGHED = ("logit_effect", "attribution")  # those that need a word
METHODS = ("gradient", "integrated")


@dataclass(frozen=True)
class Asked:
    """What is to be found out about a prompt."""

    prompt: str
    special: bool  # special tokens too
    shown: int  # of the parts; ALL for all
    rank: str  # of RANKS
    target: str  # a token; id:NUMBER; "" for the likeliest one
    position: int  # from the end if negative
    method: str  # of METHODS

    @property
    def skip(self) -> bool:
        """For `skip_special_tokens`."""
        return not self.special

    def word(self) -> str | int:
        """The target as saewb takes it."""
        number = self.target.removeprefix("id:")
        return int(number) if self.target.startswith("id:") and number.strip().isdigit() else self.target


@dataclass(frozen=True, eq=False)
class Found:
    """What was found out."""

    asked: Asked
    reading: saewb.PromptReading
    alone: saewb.NextTokens  # of the model
    words: saewb.NextTokens  # with the SAEs in place, once that is known
    comparable: bool  # whether they can be put in place together
    method: str = ""  # of the attribution in `reading`
    weighed: str | None = None  # the target that the reading's is, as it was asked for

    @property
    def compared(self) -> bool:
        """Whether `words` has the SAEs in place."""
        return self.words is not self.alone

    @property
    def at(self) -> int:
        """The position asked about, from the beginning."""
        return self.asked.position % len(self.reading.tokens)

    @property
    def likeliest(self) -> int:
        """Id of the model's next token at the position."""
        return int(self.words.ids[self.at, 0])

    def is_about(self, asked: Asked) -> bool:
        """Whether its words answer this too."""
        mine = self.asked
        return (mine.prompt, mine.special, mine.shown) == (asked.prompt, asked.special, asked.shown)

    @property
    def is_whole(self) -> bool:
        """Whether the reading has what the order asked for needs."""
        asked, r = self.asked, self.reading
        if asked.rank not in WEIGHED:
            return True
        right = self.weighed == asked.target if asked.target else r.target == self.likeliest
        if getattr(r, asked.rank) is None or not right:
            return False
        return asked.rank == "logit_effect" or (r.at == self.at and self.method == asked.method)


def together(saes: Sequence[Any]) -> bool:
    """Whether they write to different points, so that the model can run on all of them at once."""
    points: list[str] = []
    for sae in saes:
        several = getattr(sae.cfg, "hooks_out", None)
        points += several if several is not None else [sae.cfg.hook_out or sae.cfg.hook]
    return len(set(points)) == len(points)


def met(asked: Asked, before: Found | None) -> Found | None:
    """What was found before, if it answers this too."""
    if before is None or not before.is_about(asked):
        return None
    n, now = len(before.reading.tokens), replace(before, asked=asked)
    return now if -n <= asked.position < n and now.is_whole else None


Comparing = Callable[[], saewb.NextTokens]  # runs the model with the SAEs in place


def find(model: Any, saes: Sequence[Any], asked: Asked, before: Found | None) -> tuple[Found, Comparing | None]:
    """Find it out, with what is known already; the next words with the SAEs in place, if not known, come later."""
    same = before is not None and (before.asked.prompt, before.asked.special) == (asked.prompt, asked.special)
    if same and before.is_about(asked):
        found, later = replace(before, asked=asked), None
    elif same:
        those = _those(saes, before.reading, asked)
        found = replace(before, asked=asked, words=before.alone, comparable=together(those))
        later = comparing(model, saes, found)
    else:
        found, later = _read(model, saes, asked)
    found.words.to_frame(asked.position)  # says what is wrong with the position
    return _weighed(found), later


def comparing(model: Any, saes: Sequence[Any], found: Found) -> Comparing | None:
    """What is left to do for the next words with the SAEs in place."""
    if not found.comparable:
        return None
    those = _those(saes, found.reading, found.asked)
    return lambda: saewb.next_tokens(model, found.asked.prompt, those, skip_special_tokens=found.asked.skip)


def _read(model: Any, saes: Sequence[Any], asked: Asked) -> tuple[Found, Comparing | None]:
    those = list(saes) if asked.shown == ALL else [_of(saes, asked.shown)]
    comparable = together(those)
    given = those if comparable else None
    steps = saewb.read_in_turn(model, asked.prompt, saes, given, skip_special_tokens=asked.skip)
    reading, words = next(steps)
    return Found(asked, reading, words, words, comparable), (lambda: next(steps)[1]) if comparable else None


def _those(saes: Sequence[Any], reading: saewb.PromptReading, asked: Asked) -> list[Any]:
    """The SAEs that are to be put in place."""
    return list(saes) if asked.shown == ALL else [saes[reading.owner[asked.shown]]]


def _of(saes: Sequence[Any], part: int) -> Any:
    """The SAE that a part is of, before anything is read."""
    owners = [sae for sae in saes for _ in getattr(sae.cfg, "hooks", [None])]
    return owners[part]


def _weighed(found: Found) -> Found:
    """With the effects that the order asked for needs."""
    if found.is_whole:
        return found
    asked, reading = found.asked, found.reading
    target = asked.word() if asked.target else found.likeliest
    reading = reading.toward(target)
    if asked.rank == "attribution":
        reading = reading.attributed(target, found.at, asked.method)
    reading.to_frame(n=0, by=asked.rank)  # says if there are none
    return replace(found, reading=reading, method=asked.method, weighed=asked.target)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which rows of what was found are listed."""

    found: Found
    everywhere: bool  # each latent once, wherever it is largest
    index: Any  # None, of the SAE, or a list
    max_density: float

    def arranged(self) -> pd.DataFrame:
        """The rows, in order."""
        asked = self.found.asked
        return self.found.reading.to_frame(
            None if self.everywhere else self.found.at,
            None if asked.shown == ALL else asked.shown,
            by=asked.rank,
            once=self.everywhere,
            index=self.index,
            max_density=self.max_density,
        )

    def code(self, on: tuple[str, list[str]], sae: str, index: str, selected: tuple[int, int]) -> str:
        """Lines that make `latents` (what `arranged` gives), `words` and `activations`.

        Args:
            on: name of the variable that holds the model to run, and the lines that make it.
            sae: name of the variable that holds the SAE or the list of them.
            index: the same of the index.
            selected: part and latent.
        """
        asked, reading = self.found.asked, self.found.reading
        how = [] if asked.skip else ["skip_special_tokens=False"]
        weighed = []
        if reading.logit_effect is not None:
            weighed.append(f"target={reading.target}")
        if reading.attribution is not None:
            weighed += [f"at={reading.at}", f"attribution={self.found.method!r}"]
        table = [] if self.everywhere else [f"position={self.found.at}"]
        table += [] if asked.shown == ALL else [f"sae={asked.shown}"]
        table += [f"by={asked.rank!r}"]
        table += ["once=True"] if self.everywhere else []
        table += [] if self.index is None else [f"index={index}"]
        table += [] if self.max_density == 1 else [f"max_density={self.max_density!r}"]
        those = f", {sae}" if asked.shown == ALL or sae == "sae" else f", {sae}[{reading.owner[asked.shown]}]"
        given = [] if self.found.comparable else ["# two of the SAEs write to the same point, so none is in place here"]
        lines = [
            "import saewb",
            "",
            f"# model, {sae}{'' if self.index is None else ', ' + index}: what the panel was made with",
            *on[1],
            f"prompt = {asked.prompt!r}",
            f"reading = saewb.read_prompt({', '.join([f'{on[0]}, prompt, {sae}', *weighed, *how])})"
            + _comment(reading.target_token if weighed else None),
            f"latents = reading.to_frame({', '.join(table)})",
            *given,
            f"next_tokens = saewb.next_tokens({', '.join([f'{on[0]}, prompt' + (those if not given else ''), *how])})",
            f"words = next_tokens.to_frame({self.found.at})",
        ]
        if selected[1] >= 0:
            lines.append(f"activations = reading.activations{selected}")
        return "\n".join(lines) + "\n"


def _comment(token: str | None) -> str:
    return "" if token is None else f"  # {token!r}"


def facts(given: Any, **more: Any) -> dict[str, Any]:
    """What the front end needs to know once.

    Args:
        given: a `inputs.Given`.
        more: further facts.
    """
    return {
        "saes": list(given.names),
        "ranks": [[k, v] for k, v in RANKS.items() if k != "of_max" or given.has_index],
        "methods": list(METHODS),
        "weighed": list(WEIGHED),
        "has_index": given.has_index,
        **more,
    }


def check(name: str, got: Any, n_parts: int, has_index: bool) -> Any:
    """`got`, if it is a value of this name (rank, method, shown, max_density).

    Raises:
        ValueError: if not, with near names.
    """
    if name == "shown":
        if not ALL <= got < n_parts:
            raise ValueError(errors.explain(f"shown is {got}.", want=f"0 to {n_parts - 1}, or -1 for all"))
    elif name == "max_density":
        if not 0 < got <= 1:
            raise ValueError(errors.explain(f"max_density is {got}.", want="a fraction of tokens, in (0, 1]"))
        if got < 1 and not has_index:
            what = "how often latents fire is not known without an index."
            raise ValueError(errors.explain(what, fix="PromptExplorer(model, sae, index)"))
    elif got not in (known := RANKS if name == "rank" else METHODS):
        near = errors.near(got, known)
        raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want=", ".join(known)))
    elif got == "of_max" and not has_index:
        what = "the largest activations are not known without an index."
        raise ValueError(errors.explain(what, fix="PromptExplorer(model, sae, index)"))
    return got


class Stopped(Exception):
    """The work was stopped: nobody waits for its result."""


@dataclass(eq=False)
class Work:
    """One thread's work on the model."""

    what: str  # shown while it runs
    n_layers: int
    n_done: int = 0  # blocks, over all its passes
    stopped: bool = False

    def tick(self) -> None:
        """Another block is computed."""
        if self.stopped:
            raise Stopped(self.what)
        self.n_done += 1

    def said(self) -> str:
        """How far it is."""
        if not self.n_done:
            return self.what
        passes, layer = divmod(self.n_done - 1, self.n_layers)
        return f"{self.what}: layer {layer + 1} of {self.n_layers}" + (f", pass {passes + 1}" if passes else "")


class Runner:
    """A twin of a model and what is being done with it."""

    def __init__(self, model: Any) -> None:
        self.model = saewb.models.shared_copy.shared_copy(model)
        self._mine = threading.local()
        self._works: dict[str, Work] = {}
        n = model.cfg.n_layers
        for layer in range(n):
            saewb.models.hook_points.resolve(self.model, f"blocks.{layer}.hook_resid_post").add(self._tick)

    def begun(self, key: str, what: str, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work`, for a thread to do; earlier work of this key ends at its next block.

        Args:
            key: which kind of work it is.
            what: shown while it runs.
            work: runs the model.
        """
        self.stop(key)
        mine = self._works[key] = Work(what, self.model.cfg.n_layers)

        def run() -> Any:
            self._mine.work = mine
            return work()

        return run

    def said(self, key: str) -> str:
        """How far the work of this key is."""
        return self._works[key].said()

    def stop(self, key: str) -> None:
        """End what is being done of this key, at the next block."""
        if key in self._works:
            self._works[key].stopped = True

    def _tick(self, activation: Any) -> None:
        if (work := getattr(self._mine, "work", None)) is not None:
            work.tick()
