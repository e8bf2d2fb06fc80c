"""Explanations of latents as records in a file of JSON lines, and the label of a latent, which is shown everywhere.

The label of a latent is the text of its explanation; without one, the strongest token: the peak token of its strongest
context. `label_texts` is the one function that says so.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from saewb._display import html_table
from saewb._files import absolute, read_text, write_text
from saewb._indices import index_of
from saewb.errors import FormatError, explain
from saewb.features.config import IndexInfo
from saewb.features.token_texts import TokenTexts
from saewb.features.top_contexts import EMPTY

if TYPE_CHECKING:
    import pandas as pd

MAX_LABEL = 2000
"""Characters of a label, at most."""
_MAX_BYTES = 1 << 30  # of a file of records: a million of them have about 600 MB
_FIGURES = ("value", "low", "high", "control", "n", "unanswered")
_FIGURES += ("balanced_accuracy", "precision", "recall", "f1", "auc")


@dataclass(frozen=True)
class Explanation:
    """An explanation of a latent, by a language model, a site or a person; with its scores, if it was scored."""

    latent: int
    """Index of the latent."""
    text: str
    """Text of the explanation; "" if the judge's answer held none."""
    method: str = "note"
    """How it was written: a method of `saewb.explain`, "neuronpedia:" and the site's type, or "note"."""
    judge: str = ""
    """Language model that wrote it, "" for a person or if unknown."""
    rows: tuple[int, ...] = ()
    """Rows of the index's text that the judge saw; scores use other ones."""
    prompt_sha: str = ""
    """Start of the sha256 of the request."""
    index_sha: str = ""
    """Start of the sha256 of what the index is of; see `saewb.explanations.index_sha`."""
    time: str = ""
    """UTC time, ISO 8601."""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Figures of each score by its name; see `saewb.score`."""

    @property
    def key(self) -> tuple[int, str, str, str]:
        """What tells it from others: of two records with the same key, the later one replaces the earlier one."""
        return self.latent, self.method, self.judge, self.prompt_sha or self.text

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> Explanation:
        """The inverse of `to_json`.

        Raises:
            FormatError: if it is none.
        """
        want = '{"latent": 7, "text": "names of rivers", ...}'
        try:
            values = json.loads(line)
            line.encode()
        except (ValueError, RecursionError) as error:
            what = f"{reprlib.repr(line)} is no explanation: {error}."
            raise FormatError(explain(what, want=want)) from error
        names = {f.name: f.type for f in fields(Explanation)}
        is_record = isinstance(values, dict) and {"latent", "text"} <= set(values) <= set(names)
        if is_record:
            rows, scores = values.get("rows", []), values.get("scores", {})
            texts = [values.get(name, "") for name, kind in names.items() if kind == "str"]
            is_record = (
                _is_index(values["latent"])
                and all(isinstance(text, str) for text in texts)
                and isinstance(rows, list)
                and all(map(_is_index, rows))
                and isinstance(scores, dict)
                and all(isinstance(score, dict) for score in scores.values())
            )
        if not is_record:
            raise FormatError(explain(f"{reprlib.repr(line)} is no explanation.", want=want))
        return Explanation(**values | {"rows": tuple(rows), "scores": scores})


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


class Explanations(Sequence[Explanation]):
    """Explanations of latents, several for one if need be, in the order they were written.

    Example:
        >>> found = Explanations([Explanation(748, "who did it"), Explanation(9, "rivers"), Explanation(9, "waters")])
        >>> found, found.of(9)[0].text, found.labels()
        (Explanations(3 of 2 latents), 'rivers', {748: 'who did it', 9: 'waters'})
    """

    def __init__(self, records: Iterable[Explanation] = ()) -> None:
        """Collect records.

        Args:
            records: of those with the same `key` the last one counts.
        """
        self._records = tuple({record.key: record for record in records}.values())

    @overload
    def __getitem__(self, which: int) -> Explanation: ...
    @overload
    def __getitem__(self, which: slice) -> Explanations: ...
    def __getitem__(self, which: int | slice) -> Explanation | Explanations:
        return Explanations(self._records[which]) if isinstance(which, slice) else self._records[which]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Explanations) and self._records == other._records

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Explanations) -> Explanations:
        return Explanations((*self, *other))

    def __repr__(self) -> str:
        empty = len(self.unanswered)
        return f"Explanations({len(self)} of {len(self.latents)} latents{f', {empty} unanswered' * bool(empty)})"

    def _repr_html_(self) -> str:
        shown = self._records[:50]
        names = list(dict.fromkeys(name for r in shown for name in r.scores))
        rows = [
            (str(r.latent), r.text, r.method, r.judge, *(_shown_score(r.scores.get(name)) for name in names))
            for r in shown
        ]
        more = f", the first {len(rows)}" * (len(self) > len(rows))
        head = ("latent", "explanation", "method", "judge", *names)
        return html_table(f"{self!r}{more}", rows, head, ("right", "left", "left", "left", *["right"] * len(names)))

    @property
    def latents(self) -> list[int]:
        """Latents that have one, each once."""
        return list(dict.fromkeys(record.latent for record in self))

    @property
    def unanswered(self) -> list[int]:
        """Latents for which the judge's answer held no explanation."""
        return list(dict.fromkeys(record.latent for record in self if not record.text))

    def of(self, latent: int) -> tuple[Explanation, ...]:
        """Explanations of one latent, in their order; empty if there are none.

        Args:
            latent: index of the latent.
        """
        latent = index_of(latent, "latent")
        return tuple(record for record in self if record.latent == latent)

    def labels(self, by: str | None = None) -> dict[int, str]:
        """One text for each latent, for `FeatureIndex.with_labels`.

        Args:
            by: a score, such as "detection": of several explanations the one of the largest value counts; None takes
                the last one.

        Returns:
            Texts by latent; without latents that have none.
        """
        best: dict[int, Explanation] = {}
        for record in filter(lambda record: record.text, self):
            if record.latent not in best or by is None or _value(record, by) >= _value(best[record.latent], by):
                best[record.latent] = record
        return {latent: record.text for latent, record in best.items()}

    def to_frame(self) -> pd.DataFrame:
        """Table with one row for each explanation and score; one that was not scored has a row without figures.

        Columns: latent, text, method, judge, score, value (what the score is: balanced accuracy, accuracy or
        correlation), low, high (its 95 % interval), control (the same score of another latent's explanation), n,
        unanswered, balanced_accuracy, precision, recall, f1, auc.
        """
        import pandas as pd

        rows = [
            {"latent": r.latent, "text": r.text, "method": r.method, "judge": r.judge, "score": name, **figures}
            for r in self
            for name, figures in (r.scores.items() if r.scores else [("", {})])
        ]
        table = pd.DataFrame(rows, columns=["latent", "text", "method", "judge", "score", *_FIGURES])
        return table.astype(dict.fromkeys(_FIGURES, float))

    def search(self, words: str, n: int | None = 20) -> pd.DataFrame:
        """Explanations with these words, best first by Okapi BM25, in which rare words count more.

            sum over words of  ln(1 + (N - n_w + .5) / (n_w + .5)) * 2.5 f_w / (f_w + 1.5 (.25 + .75 l / mean l))

        of N explanations, n_w with the word; f_w times in this one, of l words.

        Args:
            words: of the explanation, in any order and case; not all of them have to be in it.
            n: maximum of rows.

        Returns:
            Table with one row for each explanation that has a word: latent, bm25, text, method, judge.

        Raises:
            ValueError: for a text without words.

        Example:
            >>> found = Explanations.from_labels({3: "names of rivers", 5: "rivers and lakes", 8: "verbs"})
            >>> found.search("lakes or rivers").latent.tolist()
            [5, 3]
        """
        import pandas as pd

        wanted = set(_words(words))
        if not wanted:
            raise ValueError(explain(f"search got {words!r}.", want="a word", fix='explanations.search("rivers")'))
        counts = [Counter(_words(record.text)) for record in self]
        length = sum(map(Counter.total, counts)) / max(1, len(counts))
        n_with = {word: sum(word in count for count in counts) for word in wanted}
        idf = {word: math.log(1 + (len(counts) - k + 0.5) / (k + 0.5)) for word, k in n_with.items()}
        rows = []
        for record, count in zip(self, counts, strict=True):
            if hits := wanted & count.keys():
                norm = 1.5 * (0.25 + 0.75 * count.total() / length)
                bm25 = sum(idf[word] * 2.5 * count[word] / (count[word] + norm) for word in hits)
                rows.append((record.latent, bm25, record.text, record.method, record.judge))
        table = pd.DataFrame(rows, columns=["latent", "bm25", "text", "method", "judge"])
        table = table.sort_values("bm25", ascending=False, kind="stable", ignore_index=True)
        return table.head(len(table) if n is None else n)

    def summary(self) -> pd.DataFrame:
        """Table with one row for each score: n, value, control and above_control, means over the explanations.

        `above_control` is the mean of value - control, where both are known, and `sem` its standard error.
        """
        table = self.to_frame()
        table = table[table.score != ""].assign(above_control=table.value - table.control)
        groups = table.groupby("score", sort=False)
        result = groups[["value", "control", "above_control"]].mean()
        result.insert(0, "n", groups.value.count())
        return result.assign(sem=groups.above_control.sem(), unanswered=groups.unanswered.sum())

    def save(self, path: str | Path) -> Path:
        """Write a file of JSON lines, atomically.

        Args:
            path: of the file.

        Returns:
            The absolute path.
        """
        target = absolute(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(record.to_json() + "\n" for record in self))
        return target

    @staticmethod
    def load(path: str | Path) -> Explanations:
        """Read a file that `save`, `saewb.explain` or `saewb.score` wrote; a last line that was cut off is left out.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: if there is none.
            FormatError: for a line that is no explanation.
        """
        file = absolute(path)
        if not file.exists():
            raise FileNotFoundError(explain(f"no file {str(file)!r}.", want="what Explanations.save(path) writes"))
        lines = read_text(file, _MAX_BYTES).split("\n")[:-1]
        return Explanations(Explanation.from_json(line) for line in lines if line.strip())

    @staticmethod
    def from_labels(labels: Mapping[int, str]) -> Explanations:
        """Records of a person's own texts, such as `index.labels`.

        Args:
            labels: texts by latent.
        """
        return Explanations(Explanation(latent, text) for latent, text in check_labels(labels).items())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _value(record: Explanation, score: str) -> float:
    value = record.scores.get(score, {}).get("value")
    return -math.inf if value is None or value != value else value


def _shown_score(figures: Mapping[str, Any] | None) -> str:
    value = None if figures is None else figures.get("value")
    return "" if value is None else f"{value:.2f}"


class ExplanationFile:
    """A file of JSON lines to which records are added one by one; those before a kill are there afterwards."""

    def __init__(self, path: str | Path) -> None:
        self.path = absolute(path)
        self.records = Explanations()
        if self.path.exists():
            self.records = Explanations.load(self.path)
            with self.path.open("r+b") as file:  # a line that a kill cut off
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, record: Explanation) -> None:
        """Append a record, as one write."""
        with self.path.open("ab", buffering=0) as file:
            file.write((record.to_json() + "\n").encode())


# -- labels of an index ----------------------------------------------------------------------------------------------


def check_labels(
    labels: Explanations | Mapping[int, str], d_sae: int | None = None, of: object = None
) -> dict[int, str]:
    """Labels as a dictionary of texts on one line by latent; an empty text is none.

    Args:
        labels: Explanations, or texts by latent.
        d_sae: number of latents; None does not check the range.
        of: the index, for the error message.

    Raises:
        TypeError: if they are neither, or a text is none.
        ValueError: for a latent that does not exist, or a text of more than 2,000 characters.
    """
    if isinstance(labels, Explanations):
        labels = labels.labels()
    if not isinstance(labels, Mapping):
        what = f"got labels of type {type(labels).__name__}."
        raise TypeError(explain(what, want="Explanations, or texts by latent", fix="labels={748: 'who did it'}"))
    result = {}
    for latent, text in labels.items():
        if not isinstance(text, str):
            raise TypeError(explain(f"got {text!r} as the label of latent {latent}.", want="a text"))
        if len(text) > MAX_LABEL:
            what = f"got a label of {len(text):,} characters for latent {latent}."
            raise ValueError(explain(what, want=f"at most {MAX_LABEL:,}"))
        if line := " ".join(text.split()):
            result[index_of(latent, "latent", d_sae, of=of)] = line
    return result


def label_texts(
    labels: Mapping[int, str],
    info: IndexInfo,
    tensors: Mapping[str, Tensor],
    texts: TokenTexts,
    latents: Sequence[int],
) -> list[str]:
    """The label of each latent: its explanation, else its strongest token; "" for one that is never active."""
    missing = [i for i in dict.fromkeys(latents) if i not in labels]
    if missing:
        rows = torch.tensor(missing)
        is_active = (tensors["top.order"][rows, 0] != EMPTY).tolist()
        peaks = zip(missing, is_active, tensors["top.tokens"][rows, 0].tolist(), strict=True)
        labels = {**labels, **{i: _peak_text(texts, ids, info.before) for i, active, ids in peaks if active}}
    return [labels.get(i, "") for i in latents]


def _peak_text(texts: TokenTexts, ids: list[int], at: int) -> str:
    """Text of the peak token of a context, without the spaces around it, or what stands for them."""
    text = texts.decode_token(ids[at])
    if "\ufffd" in text:  # part of a character, whose text the tokens beside it decide
        first = next(j for j, token in enumerate(ids) if token >= 0)
        text = texts.decode([i for i in ids if i >= 0])[at - first] or text
    return text.strip() or re.sub(r"\s", lambda space: _SPACES.get(space[0], "␣"), text) or "∅"


_SPACES = {"\n": "↵", "\r": "↵", "\t": "⇥"}
