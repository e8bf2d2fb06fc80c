"""Filter and sort the catalogue, count the remaining choices, and export the same as code."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saewb import errors

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {  # sort keys, and their names in the panel
    "release": "release",
    "id": "id",
    "model": "model",
    "site": "site",
    "layer": "layer",
    "d_sae": "width",
    "l0": "L0",
    "bytes": "size",
    "neuronpedia": "Neuronpedia",
}
CHOICES = ("model", "release", "site", "layer", "d_sae")  # columns whose values can be chosen
SEARCHED = ("release", "id", "model", "hook", "repo")  # columns that a query searches


@dataclass(frozen=True)
class Choice:
    """A filter and sort order; None and "" do not filter."""

    model: str = ""
    """Name of the model."""
    release: str = ""
    """Name of the release."""
    site: str = ""
    """Site in the model, such as `resid_post`."""
    layer: int | None = None
    """Layer that the SAE reads."""
    d_sae: int | None = None
    """Number of latents."""
    l0: tuple[float | None, float | None] = (None, None)
    """Range of active latents per token, both ends included."""
    neuronpedia: bool | None = None
    """With pages on Neuronpedia, without, or either (None)."""
    query: str = ""
    """Words, each of which must occur in one of `SEARCHED`."""
    sort: str = ""
    """One of `COLUMNS`; "" is the catalogue's own order."""
    descending: bool = False
    """Largest first."""

    def apply(self, catalogue: pd.DataFrame) -> pd.DataFrame:
        """The matching rows, sorted; the same as `code`."""
        table = catalogue[_all(catalogue, self._masks(catalogue).values())]
        if self.sort:
            table = table.sort_values(self.sort, ascending=not self.descending, kind="stable")
        return table.reset_index(drop=True)

    def remaining(self, catalogue: pd.DataFrame) -> dict[str, list[list[Any]]]:
        """For each column of `CHOICES`, the values that match the filters on the other columns, and their counts.

        Names are sorted by count, the largest first; numbers by value.
        """
        out, masks = {}, self._masks(catalogue)
        for name in CHOICES:
            others = _all(catalogue, (mask for key, mask in masks.items() if key != name))
            counts = catalogue.loc[others, name].dropna().value_counts()
            counts = counts.sort_index() if name in ("layer", "d_sae") else counts
            out[name] = [[_plain(value), int(n)] for value, n in counts.items()]
        return out

    def code(self) -> list[str]:
        """Lines of Python that compute `table`."""
        values = {k: getattr(self, k) for k in ("model", "release", "site") if getattr(self, k)}
        values |= {} if self.layer is None else {"layer": self.layer}
        values |= {} if self.d_sae is None else {"width": self.d_sae}
        arguments = [f"{name}={value!r}" for name, value in values.items()]
        if self.l0 != (None, None):
            low, high = self.l0
            arguments.append("l0=({!r}, {})".format(low or 0, "float('inf')" if high is None else repr(high)))
        if self.neuronpedia is not None:
            arguments.append(f"neuronpedia={self.neuronpedia}")
        lines = [f"table = saewb.catalogue({', '.join(arguments)})"]
        if words := self.query.split():
            lines.append(f"for word in {words}:")
            lines.append("    text = " + " + ' ' + ".join(f"table.{name}" for name in SEARCHED))
            lines.append("    table = table[text.str.contains(word, case=False, regex=False)]")
        if self.sort:
            lines.append(f"table = table.sort_values({self.sort!r}, ascending={not self.descending}, kind='stable')")
        return [*lines, "table = table.reset_index(drop=True)"] if len(lines) > 1 else lines

    def _masks(self, catalogue: pd.DataFrame) -> dict[str, pd.Series]:
        """Which rows match each filter, by name of the filter."""
        values = {name: getattr(self, name) for name in CHOICES}
        masks = {k: (catalogue[k] == v).fillna(False).astype(bool) for k, v in values.items() if v not in ("", None)}
        low, high = self.l0
        if (low, high) != (None, None):
            masks["l0"] = catalogue["l0"].between(low or 0, math.inf if high is None else high)
        if self.neuronpedia is not None:
            masks["neuronpedia"] = catalogue["neuronpedia"].notna() == self.neuronpedia
        if words := self.query.split():
            text = catalogue[SEARCHED[0]]
            for name in SEARCHED[1:]:
                text = text + " " + catalogue[name]
            masks["query"] = _all(catalogue, (text.str.contains(word, case=False, regex=False) for word in words))
        return masks


def _all(catalogue: pd.DataFrame, masks: Iterable[pd.Series]) -> pd.Series:
    matches = catalogue["release"].notna()  # true for all rows
    for mask in masks:
        matches &= mask
    return matches


def line(row: Any) -> list[Any]:
    """A table row: release, id, model, site, layer, latents, L0, source of the L0, bytes, Neuronpedia id."""
    names = ("release", "id", "model", "site", "layer", "d_sae", "l0", "l0_is", "bytes", "neuronpedia")
    return [_plain(getattr(row, name)) for name in names]


def page(row: Any, links: Iterable[tuple[str, str]], note: str) -> dict[str, Any]:
    """The page of one SAE, without missing values.

    Args:
        row: its row in the catalogue.
        links: names and addresses.
        note: the catalogue's note on it.
    """
    values = {name: _plain(getattr(row, name)) for name in row._fields}
    return {**{k: v for k, v in values.items() if v is not None}, "links": [list(x) for x in links], "note": note}


def page_rows(page: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a page, for static HTML."""
    names = ("repo", "path", "format", "hook", "hook_out", "d_in", "d_sae", "l0", "l0_is", "dtype", "neuronpedia")
    facts = [(name, str(page[name])) for name in names if name in page]
    return [*facts, ("size", size(page.get("bytes")) or "not known")]


def size(n_bytes: int | None) -> str:
    """Format a number of bytes in MB."""
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


def check(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is empty or one of the choices.

    Raises:
        ValueError: if not, with near names.
    """
    choices = list(choices)
    if value and value not in choices:
        near = errors.near(value, choices)
        some = ", ".join(choices[:9]) + (f" and {len(choices) - 9} more" if len(choices) > 9 else "")
        fix = f"panel.{name} = {near[0]!r}" if near else ""
        raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want="" if near else some, fix=fix))
    return value


def _plain(value: Any) -> Any:
    """Convert to JSON types: missing values become None, numpy numbers Python numbers."""
    if isinstance(value, str):
        return value
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    return value.item() if hasattr(value, "item") else value
