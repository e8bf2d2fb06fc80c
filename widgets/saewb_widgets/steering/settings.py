"""What a SteeringPanel is set to: the intervention it stands for, the texts of it, and the code that gives them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import saewb
from saewb import errors
from saewb_widgets.panel import model_code

HOW = ("add", "scale", "clamp")  # in this order, so that what is clamped is what later layers see
POSITIONS = {"all": None, "not the first": slice(1, None)}
_WHOLE = {"sae": 0, "latent": None, "value": 8.0, "how": "add"}  # a change with what may be left out
MOVERS = 20  # rows of next tokens


@dataclass(frozen=True)
class Settings:
    """Everything that the texts and the table follow from, beside the model and the SAEs."""

    latents: tuple[tuple[int, int, float, str], ...]  # number of the SAE, latent, value, how
    prompt: str
    positions: str  # a key of POSITIONS
    temperature: float  # 0 takes the likeliest
    seed: int
    max_new_tokens: int

    def wanted(self) -> dict[str, dict[int, dict[int, float]]]:
        """`{how: {number of the SAE: {latent: value}}}`, in the order in which it happens."""
        made: dict[str, dict[int, dict[int, float]]] = {}
        for how in HOW:
            for sae, latent, value, one in self.latents:
                if one == how:
                    made.setdefault(how, {}).setdefault(sae, {})[latent] = value
        return made

    @contextlib.contextmanager
    def intervene(self, model: Any, saes: Sequence[Any]) -> Iterator[None]:
        """The model steered, for a moment."""
        with contextlib.ExitStack() as stack:
            for how, by_sae in self.wanted().items():
                by = {saes[sae]: latents for sae, latents in by_sae.items()}
                stack.enter_context(saewb.steer(model, by, how=how, positions=POSITIONS[self.positions]))
            yield

    def sampling(self, saes: Sequence[Any]) -> dict[str, Any]:
        """Arguments of `saewb.generate_tokens`."""
        made = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        return made if self._reads_once(saes) else {**made, "use_past_kv_cache": False}

    def _reads_once(self, saes: Sequence[Any]) -> bool:
        """Whether what is new of a text is all that the SAEs need to see."""
        return not any(getattr(saes[k], "looks_back", False) and how != "add" for k, _, _, how in self.latents)

    def code(self, model: Any, saes: Sequence[Any], several: bool, stopped: tuple[int, int] | None) -> str:
        """Python that makes `clean`, `steered` and `changes` of `model` and `sae` (`saes`, if several).

        Args:
            model: the model the panel was made with.
            saes: the SAEs.
            several: whether they were given as a list.
            stopped: how many tokens the clean and the steered text have, if stopped before their end.
        """
        on, bare = model_code(model)
        lines = ["import contextlib", ""] if len(self.wanted()) > 1 else []
        lines += ["import saewb", "", f"# model, {'saes' if several else 'sae'}: what the panel was made with", *bare]
        lines += [f"prompt = {self.prompt!r}", *self._steer_code(on, several)]
        n_clean, n_steered = stopped or (self.max_new_tokens,) * 2
        how = "" if self._reads_once(saes) else ", use_past_kv_cache=False"
        lines += self._text_code("clean", f"{on}, prompt", n_clean, how)
        lines += self._text_code("steered", f"{on}, prompt{', steer' if self.latents else ''}", n_steered, how)
        if self.latents:
            lines.append(f"changes = saewb.next_token_changes({on}, prompt, steer, n={MOVERS})")
        return "\n".join(lines) + "\n"

    def _text_code(self, name: str, of: str, n: int, how: str) -> list[str]:
        if n == 0:
            return [f'{name} = ""']
        how = f"max_new_tokens={n}, temperature={self.temperature!r}, seed={self.seed}{how}"
        return [f"*_, last = saewb.generate_tokens({of}, {how})", f"{name} = last.text"]

    def _steer_code(self, on: str, several: bool) -> list[str]:
        calls = [self._call(on, how, by_sae, several) for how, by_sae in self.wanted().items()]
        if not calls:
            return []
        if len(calls) == 1:
            return ["", "", "def steer():", f"    return {calls[0]}", "", ""]
        head = ["", "", "@contextlib.contextmanager", "def steer():"]
        nested = [f"{'    ' * (i + 1)}with {call}:" for i, call in enumerate(calls)]
        return [*head, *nested, "    " * (len(calls) + 1) + "yield", "", ""]

    def _call(self, on: str, how: str, by_sae: dict[int, dict[int, float]], several: bool) -> str:
        given = ", ".join(f"saes[{sae}]: {latents!r}" for sae, latents in by_sae.items())
        given = "{" + given + "}" if several else f"sae, {by_sae[0]!r}"
        where = POSITIONS[self.positions]
        more = [f"how={how!r}"] if how != "add" else []
        more += [f"positions={where!r}"] if where is not None else []
        return f"saewb.steer({', '.join([on, given, *more])})"


@dataclass(eq=False)
class Texts:
    """The clean and the steered text, side by side, token by token; written by one thread, read by another."""

    clean: Iterator[Any]
    steered: Iterator[Any]
    heard: dict[str, list[str]] = field(default_factory=lambda: {"clean": [], "steered": []})  # the text so far, each
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Make both, until their end or until `stop` is set."""
        going = {"clean": self.clean, "steered": self.steered}
        try:
            while going and not self.stop.is_set():
                for name, tokens in list(going.items()):
                    token = None if self.stop.is_set() else next(tokens, None)
                    if token is None:
                        del going[name]
                    else:
                        self.heard[name].append(token.text)
        finally:
            self.clean.close()
            self.steered.close()

    def so_far(self, name: str) -> tuple[int, str]:
        """How many tokens there are, and the text of them."""
        n = len(heard := self.heard[name])  # at most: the other thread may add more meanwhile
        return n, heard[n - 1] if n else ""


def start_texts(model: Any, saes: Sequence[Any], settings: Settings) -> Texts:
    """Both texts of these settings, not begun.

    Raises:
        ValueError: as `saewb.generate_tokens` does at once.
    """
    sampling = settings.sampling(saes)
    clean = saewb.generate_tokens(model, settings.prompt, **sampling)
    steered = saewb.generate_tokens(model, settings.prompt, lambda: settings.intervene(model, saes), **sampling)
    return Texts(clean, steered)


def check_fits(model: Any, saes: Sequence[Any]) -> None:
    """Raise unless each SAE can change the model: a word is read for each.

    Raises:
        ValueError: for a point that is not there, or another width.
    """
    for sae in saes:
        saewb.next_token_changes(model, "a", partial(saewb.steer, model, sae, {0: 1.0}), n=1)


def check_latents(latents: Sequence[dict[str, Any]], saes: Sequence[Any]) -> list[dict[str, Any]]:
    """Changes of latents with nothing left out, if all of them can be made.

    Raises:
        ValueError: if not, or if a latent is there twice.
    """
    made: dict[tuple[int, int], dict[str, Any]] = {}
    for given in latents:
        one = _one(given)
        if not 0 <= one["sae"] < len(saes):
            raise ValueError(errors.explain(f"SAE {one['sae']} of {len(saes)}.", want=f"0 to {len(saes) - 1}"))
        if not 0 <= one["latent"] < (n := saes[one["sae"]].cfg.d_sae):
            raise ValueError(errors.explain(f"latent {one['latent']} of {n:,}.", want=f"0 to {n - 1}"))
        if key(one) in made:
            raise ValueError(errors.explain(f"latent {one['latent']} is there twice.", want="each once"))
        made[key(one)] = one
    return list(made.values())


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result, or None and the exception: to be raised where it is shown."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def indexes(saes: Sequence[Any], index: Any) -> list[Any]:
    """An index, or None, for each SAE."""
    if wrong := [sae for sae in saes if not hasattr(sae, "W_dec")]:
        what = f"SteeringPanel got a {type(wrong[0]).__name__} as an SAE."
        raise TypeError(errors.explain(what, want="an SAE or a list of them", fix="SteeringPanel(model, sae)"))
    given = list(index) if isinstance(index, (list, tuple)) else [index]
    if not saes or len(given) > len(saes):
        raise ValueError(errors.explain(f"SteeringPanel got {len(saes)} SAEs and {len(given)} indexes."))
    for sae, one in zip(saes, given, strict=False):
        if one is not None and len(one) != sae.cfg.d_sae:
            what = f"the index is of {len(one):,} latents, the SAE has {sae.cfg.d_sae:,}."
            raise ValueError(errors.explain(what, fix="index = saewb.build_index(model, sae, texts)"))
    return given + [None] * (len(saes) - len(given))


def _one(given: dict[str, Any]) -> dict[str, Any]:
    """A change of a latent, checked as far as it can be alone."""
    if unknown := sorted(set(given) - set(_WHOLE)):
        near = errors.near(str(unknown[0]), list(_WHOLE))
        raise ValueError(errors.explain(f"a latent has {unknown[0]!r}.", near=near, want=", ".join(_WHOLE)))
    one = {**_WHOLE, **given}
    if one["how"] not in HOW:
        near = errors.near(str(one["how"]), list(HOW))
        raise ValueError(errors.explain(f"how is {one['how']!r}.", near=near, want=", ".join(HOW)))
    if not isinstance(one["value"], (int, float)) or not math.isfinite(one["value"]):
        what = f"the value of latent {one['latent']} is {one['value']!r}."
        raise ValueError(errors.explain(what, want="a finite number"))
    if not all(isinstance(one[name], int) for name in ("latent", "sae")):
        what = f"latent {one['latent']!r} of SAE {one['sae']!r}."
        raise ValueError(errors.explain(what, want="whole numbers", fix="panel.add(12, 8.0)"))
    return {**one, "value": float(one["value"])}


def key(one: dict[str, Any]) -> tuple[int, int]:
    """The SAE's number and the latent's."""
    return one["sae"], one["latent"]


def visible(text: str) -> str:
    """A token as a label shows it."""
    return text.strip() or text.replace("\n", "↵").replace("\t", "⇥")
