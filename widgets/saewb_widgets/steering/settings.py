"""Settings of a SteeringPanel: the intervention they define, the texts, and the code that does the same."""

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

HOW = ("add", "scale", "clamp")  # order of application: clamping last, so that later layers see the clamped values
POSITIONS = {"all": None, "not the first": slice(1, None)}
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of a small sweep, times the values that are set
_DEFAULTS = {"sae": 0, "latent": None, "value": 8.0, "how": "add"}
MOVERS = 20  # rows in the table of next tokens


@dataclass(frozen=True)
class Settings:
    """Everything besides the model and the SAEs that determines the texts and the table."""

    latents: tuple[tuple[int, int, float, str], ...]
    """Number of the SAE, latent, value and how, for each changed latent."""
    prompt: str
    """Text that both generations continue."""
    positions: str
    """A key of `POSITIONS`."""
    temperature: float
    """Sampling temperature; 0 takes the most likely token."""
    seed: int
    """Seed of the sampling."""
    max_new_tokens: int
    """Length of each text in tokens."""
    chat: bool = False
    """Whether the prompt is a chat, see `saewb.data.chats.messages_of`."""

    def prompt_argument(self) -> str | list[dict[str, str]]:
        """The prompt as saewb takes it."""
        return saewb.data.chats.messages_of(self.prompt) if self.chat else self.prompt

    def positions_argument(self, model: Any) -> Any:
        """The argument `positions` of `saewb.steer`: for a role, a list of positions."""
        if self.positions in POSITIONS:
            return POSITIONS[self.positions]
        return saewb.chat_prompt(model, self.prompt_argument()).positions(self.positions)

    def by_how(self) -> dict[str, dict[int, dict[int, float]]]:
        """The changes as `{how: {number of the SAE: {latent: value}}}`, in order of application."""
        changes: dict[str, dict[int, dict[int, float]]] = {}
        for sae, latent, value, how in sorted(self.latents, key=lambda change: HOW.index(change[3])):
            changes.setdefault(how, {}).setdefault(sae, {})[latent] = value
        return changes

    @contextlib.contextmanager
    def intervene(self, model: Any, saes: Sequence[Any], factors: Sequence[float | None] = ()) -> Iterator[None]:
        """Steer the model inside a `with` block.

        Args:
            model: to steer.
            saes: the user's SAEs.
            factors: with some, row r of the batch is steered as much as `factors[r]` says, and not at all by None: by
                values times the factor; where latents are scaled, by 1 + factor * (value - 1).
        """
        positions = self.positions_argument(model)
        with contextlib.ExitStack() as stack:
            for how, by_sae in self.by_how().items():
                by = {
                    saes[sae]: {i: _rows(value, how, factors) if factors else value for i, value in latents.items()}
                    for sae, latents in by_sae.items()
                }
                stack.enter_context(saewb.steer(model, by, how=how, positions=positions))
            yield

    def sampling(self, saes: Sequence[Any]) -> dict[str, Any]:
        """Arguments of `saewb.generate_tokens`."""
        options = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        return options if self._can_use_cache(saes) else {**options, "use_past_kv_cache": False}

    def _can_use_cache(self, saes: Sequence[Any]) -> bool:
        """Whether the SAEs need to see only the new token."""
        return not any(getattr(saes[k], "looks_back", False) and how != "add" for k, _, _, how in self.latents)

    def code(self, model: Any, saes: Sequence[Any], several: bool, stopped: tuple[int, int] | None) -> str:
        """Python code that computes `clean`, `steered` and `changes` from `model` and `sae` (`saes`, if several).

        Args:
            model: the user's model.
            saes: the SAEs.
            several: whether the user passed a list of SAEs.
            stopped: number of tokens of the clean and the steered text, if stopped before their end.
        """
        variable, bare = model_code(model)
        lines = ["import contextlib", ""] if len(self.by_how()) > 1 else []
        lines += ["import saewb", "", f"# model, {'saes' if several else 'sae'}: what the panel was made with", *bare]
        lines += [f"prompt = {self.prompt_argument()!r}"]
        if self.positions not in POSITIONS:
            lines.append(f"positions = saewb.chat_prompt({variable}, prompt).positions({self.positions!r})")
        lines += self._steer_code(variable, several)
        n_clean, n_steered = stopped or (self.max_new_tokens,) * 2
        cache = "" if self._can_use_cache(saes) else ", use_past_kv_cache=False"
        lines += self._text_code("clean", f"{variable}, prompt", n_clean, cache)
        lines += self._text_code("steered", f"{variable}, prompt{', steer' if self.latents else ''}", n_steered, cache)
        if self.latents:
            lines.append(f"changes = saewb.next_token_changes({variable}, prompt, steer, n={MOVERS})")
            if n_clean and n_steered:
                lines.append(f"figures = saewb.steered_text({variable}, prompt, clean_ids, steered_ids, steer)")
        return "\n".join(lines) + "\n"

    def _text_code(self, name: str, arguments: str, n: int, cache: str) -> list[str]:
        if n == 0:
            return [f'{name} = ""']
        options = f"max_new_tokens={n}, temperature={self.temperature!r}, seed={self.seed}{cache}"
        return [
            f"tokens = list(saewb.generate_tokens({arguments}, {options}))",
            f"{name}, {name}_ids = tokens[-1].text, [token.token_id for token in tokens]",
        ]

    def _steer_code(self, model: str, several: bool) -> list[str]:
        calls = [self._call(model, how, by_sae, several) for how, by_sae in self.by_how().items()]
        if not calls:
            return []
        if len(calls) == 1:
            return ["", "", "def steer():", f"    return {calls[0]}", "", ""]
        head = ["", "", "@contextlib.contextmanager", "def steer():"]
        nested = [f"{'    ' * (i + 1)}with {call}:" for i, call in enumerate(calls)]
        return [*head, *nested, "    " * (len(calls) + 1) + "yield", "", ""]

    def _call(self, model: str, how: str, by_sae: dict[int, dict[int, float]], several: bool) -> str:
        latents = ", ".join(f"saes[{sae}]: {values!r}" for sae, values in by_sae.items())
        latents = "{" + latents + "}" if several else f"sae, {by_sae[0]!r}"
        positions = repr(POSITIONS[self.positions]) if self.positions in POSITIONS else "positions"
        options = [f"how={how!r}"] if how != "add" else []
        options += [f"positions={positions}"] if positions != "None" else []
        return f"saewb.steer({', '.join([model, latents, *options])})"


def _rows(value: float, how: str, factors: Sequence[float | None]) -> list[float | None]:
    """Values of a latent for each row of a batch."""
    return [None if f is None else 1 + f * (value - 1) if how == "scale" else f * value for f in factors]


@dataclass(eq=False)
class Texts:
    """The clean and the steered text, generated in parallel on one thread and read from another."""

    clean: Iterator[Any]
    """Tokens of the clean text."""
    steered: Iterator[Any]
    """Tokens of the steered text."""
    measure: Callable[[list[int], list[int]], saewb.TextFigures | None]
    """Figures of the token ids of both texts, once they are done."""
    prefixes: dict[str, list[str]] = field(default_factory=lambda: {"clean": [], "steered": []})
    """The text after each token, by name."""
    ids: dict[str, list[int]] = field(default_factory=lambda: {"clean": [], "steered": []})
    """Token ids, by name."""
    figures: saewb.TextFigures | None = None
    """What steering did to the text; None before the end, and without steering."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to stop after the current token."""

    def run(self) -> None:
        """Generate both texts, until their end or until `stop` is set."""
        unfinished = {"clean": self.clean, "steered": self.steered}
        try:
            while unfinished and not self.stop.is_set():
                for name, tokens in list(unfinished.items()):
                    token = None if self.stop.is_set() else next(tokens, None)
                    if token is None:
                        del unfinished[name]
                    else:
                        self.prefixes[name].append(token.text)
                        self.ids[name].append(token.token_id)
            if not self.stop.is_set():
                self.figures = self.measure(self.ids["clean"], self.ids["steered"])
        finally:
            self.clean.close()
            self.steered.close()

    def so_far(self, name: str) -> tuple[int, str]:
        """Number of tokens generated so far, and their text."""
        n = len(prefixes := self.prefixes[name])  # read once: the other thread may append meanwhile
        return n, prefixes[n - 1] if n else ""


def start_texts(model: Any, saes: Sequence[Any], settings: Settings) -> Texts:
    """Prepare both texts of these settings; nothing is generated yet.

    Raises:
        ValueError: for arguments that `saewb.generate_tokens` rejects.
    """
    sampling, prompt = settings.sampling(saes), settings.prompt_argument()

    def intervene() -> contextlib.AbstractContextManager[None]:
        return settings.intervene(model, saes)

    def measure(clean: list[int], steered: list[int]) -> saewb.TextFigures | None:
        return saewb.steered_text(model, prompt, clean, steered, intervene) if settings.latents else None

    clean = saewb.generate_tokens(model, prompt, **sampling)
    return Texts(clean, saewb.generate_tokens(model, prompt, intervene, **sampling), measure)


def small_sweep(model: Any, saes: Sequence[Any], settings: Settings) -> list[dict[str, Any]]:
    """Texts at several factors of the values that are set, with their figures, the unsteered one first.

    All are rows of one batch: a text may differ from that of a pass of its own where two tokens are as likely.
    """
    factors: list[float | None] = [None, *FACTORS]

    def intervene() -> contextlib.AbstractContextManager[None]:
        return settings.intervene(model, saes, factors)

    prompt, sampling = settings.prompt_argument(), settings.sampling(saes)
    rows = saewb.prompts.steered_texts.steered_rows(model, prompt, len(factors), intervene, **sampling)
    return [
        {"factor": f or 0.0, "text": text, **vars(figures)} for f, (text, figures) in zip(factors, rows, strict=True)
    ]


def check_fits(model: Any, saes: Sequence[Any]) -> None:
    """Check that each SAE can steer the model, with one short forward pass each.

    Raises:
        ValueError: for a hook point that does not exist, or another width.
    """
    for sae in saes:
        saewb.next_token_changes(model, "a", partial(saewb.steer, model, sae, {0: 1.0}), n=1)


def check_latents(latents: Sequence[dict[str, Any]], saes: Sequence[Any]) -> list[dict[str, Any]]:
    """Validate changes of latents, and fill in their defaults.

    Raises:
        ValueError: for an invalid change, or a latent that is there twice.
    """
    changes: dict[tuple[int, int], dict[str, Any]] = {}
    for item in latents:
        change = _complete(item)
        if not 0 <= change["sae"] < len(saes):
            raise ValueError(errors.explain(f"SAE {change['sae']} of {len(saes)}.", want=f"0 to {len(saes) - 1}"))
        if not 0 <= change["latent"] < (n := saes[change["sae"]].cfg.d_sae):
            raise ValueError(errors.explain(f"latent {change['latent']} of {n:,}.", want=f"0 to {n - 1}"))
        if key(change) in changes:
            raise ValueError(errors.explain(f"latent {change['latent']} is there twice.", want="each once"))
        changes[key(change)] = change
    return list(changes.values())


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Run `work` on a thread: its result, or None and the exception, to raise on the main thread."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def indexes(saes: Sequence[Any], index: Any) -> list[Any]:
    """The feature index of each SAE, or None."""
    if wrong := [sae for sae in saes if not isinstance(sae, saewb.SparseCoder)]:
        what = f"SteeringPanel got a {type(wrong[0]).__name__} as an SAE."
        raise TypeError(errors.explain(what, want="an SAE or a list of them", fix="SteeringPanel(model, sae)"))
    items = list(index) if isinstance(index, (list, tuple)) else [index]
    if not saes or len(items) > len(saes):
        raise ValueError(errors.explain(f"SteeringPanel got {len(saes)} SAEs and {len(items)} indexes."))
    for sae, item in zip(saes, items, strict=False):
        if item is not None:
            item.check_sae(sae)
    return items + [None] * (len(saes) - len(items))


def _complete(item: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a change, and check its fields."""
    if unknown := sorted(set(item) - set(_DEFAULTS)):
        near = errors.near(str(unknown[0]), list(_DEFAULTS))
        raise ValueError(errors.explain(f"a latent has {unknown[0]!r}.", near=near, want=", ".join(_DEFAULTS)))
    change = {**_DEFAULTS, **item}
    if change["how"] not in HOW:
        near = errors.near(str(change["how"]), list(HOW))
        raise ValueError(errors.explain(f"how is {change['how']!r}.", near=near, want=", ".join(HOW)))
    if not isinstance(change["value"], (int, float)) or not math.isfinite(change["value"]):
        what = f"the value of latent {change['latent']} is {change['value']!r}."
        raise ValueError(errors.explain(what, want="a finite number"))
    if not all(isinstance(change[name], int) for name in ("latent", "sae")):
        what = f"latent {change['latent']!r} of SAE {change['sae']!r}."
        raise ValueError(errors.explain(what, want="whole numbers", fix="panel.add(12, 8.0)"))
    return {**change, "value": float(change["value"])}


def key(change: dict[str, Any]) -> tuple[int, int]:
    """Number of the SAE, and the latent."""
    return change["sae"], change["latent"]


def visible(text: str) -> str:
    """A token as shown in a label, with visible whitespace."""
    return text.strip() or text.replace("\n", "↵").replace("\t", "⇥")
