"""Which SAEs of the catalogue the table lists, what else there is to choose, and the same as code to paste."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saewb import errors

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {  # what may be sorted by: how the panel calls it
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
CHOICES = ("model", "release", "site", "layer", "d_sae")  # columns of which the panel shows what is left, and counts
SEARCHED = ("release", "id", "model", "hook", "repo")  # where the words of a query may stand


@dataclass(frozen=True)
class Choice:
    """What is asked of the catalogue; None and "" ask nothing."""

    model: str = ""
    release: str = ""
    site: str = ""
    layer: int | None = None
    d_sae: int | None = None  # number of latents
    l0: tuple[float | None, float | None] = (None, None)  # active latents per token, both ends included
    neuronpedia: bool | None = None  # with its pages, without, or either
    query: str = ""  # words, each of which stands somewhere in SEARCHED
    sort: str = ""  # of COLUMNS; "" is the catalogue's own order
    descending: bool = False

    def found(self, catalogue: pd.DataFrame) -> pd.DataFrame:
        """The rows that fit, in order: what `code` makes."""
        table = catalogue[_all(catalogue, self._masks(catalogue).values())]
        if self.sort:
            table = table.sort_values(self.sort, ascending=not self.descending, kind="stable")
        return table.reset_index(drop=True)

    def left(self, catalogue: pd.DataFrame) -> dict[str, list[list[Any]]]:
        """Of each column of CHOICES, the values that fit all that is asked of the others, and how many SAEs have each.

        Names by their count, the largest first; numbers in their order.
        """
        out, masks = {}, self._masks(catalogue)
        for name in CHOICES:
            others = _all(catalogue, (mask for key, mask in masks.items() if key != name))
            counts = catalogue.loc[others, name].dropna().value_counts()
            counts = counts.sort_index() if name in ("layer", "d_sae") else counts
            out[name] = [[_plain(value), int(n)] for value, n in counts.items()]
        return out

    def code(self) -> list[str]:
        """Lines that make `table`."""
        given = {k: getattr(self, k) for k in ("model", "release", "site") if getattr(self, k)}
        given |= {} if self.layer is None else {"layer": self.layer}
        given |= {} if self.d_sae is None else {"width": self.d_sae}
        asked = [f"{name}={value!r}" for name, value in given.items()]
        if self.l0 != (None, None):
            low, high = self.l0
            asked.append("l0=({!r}, {})".format(low or 0, "float('inf')" if high is None else repr(high)))
        if self.neuronpedia is not None:
            asked.append(f"neuronpedia={self.neuronpedia}")
        lines = [f"table = saewb.catalogue({', '.join(asked)})"]
        if words := self.query.split():
            lines.append(f"for word in {words}:")
            lines.append("    said = " + " + ' ' + ".join(f"table.{name}" for name in SEARCHED))
            lines.append("    table = table[said.str.contains(word, case=False, regex=False)]")
        if self.sort:
            lines.append(f"table = table.sort_values({self.sort!r}, ascending={not self.descending}, kind='stable')")
        return [*lines, "table = table.reset_index(drop=True)"] if len(lines) > 1 else lines

    def _masks(self, catalogue: pd.DataFrame) -> dict[str, pd.Series]:
        """Which rows fit each of the things asked, by its name."""
        asked = {name: getattr(self, name) for name in CHOICES}
        masks = {k: (catalogue[k] == v).fillna(False).astype(bool) for k, v in asked.items() if v not in ("", None)}
        low, high = self.l0
        if (low, high) != (None, None):
            masks["l0"] = catalogue["l0"].between(low or 0, math.inf if high is None else high)
        if self.neuronpedia is not None:
            masks["neuronpedia"] = catalogue["neuronpedia"].notna() == self.neuronpedia
        if words := self.query.split():
            whole = _said(catalogue)
            masks["query"] = _all(catalogue, (whole.str.contains(word, case=False, regex=False) for word in words))
        return masks


def _all(catalogue: pd.DataFrame, masks: Iterable[pd.Series]) -> pd.Series:
    fits = catalogue["release"].notna()  # true of all
    for mask in masks:
        fits &= mask
    return fits


def _said(table: pd.DataFrame) -> pd.Series:
    """What the words of a query are looked for in."""
    whole = table[SEARCHED[0]]
    for name in SEARCHED[1:]:
        whole = whole + " " + table[name]
    return whole


def line(row: Any) -> list[Any]:
    """A row as the front end lists it: release, id, model, site, layer, latents, L0, how L0 is known, bytes, pages."""
    names = ("release", "id", "model", "site", "layer", "d_sae", "l0", "l0_is", "bytes", "neuronpedia")
    return [_plain(getattr(row, name)) for name in names]


def about(row: Any, links: Iterable[tuple[str, str]], note: str) -> dict[str, Any]:
    """All that is known of one, as the front end shows it: what is not known is left out.

    Args:
        row: of the catalogue.
        links: names and addresses.
        note: of the catalogue's.
    """
    known = {name: _plain(getattr(row, name)) for name in row._fields}
    return {**{k: v for k, v in known.items() if v is not None}, "links": [list(x) for x in links], "note": note}


def told(page: dict[str, Any]) -> list[tuple[str, str]]:
    """A page's facts as names and values, for a view without a kernel."""
    names = ("repo", "path", "format", "hook", "hook_out", "d_in", "d_sae", "l0", "l0_is", "dtype", "neuronpedia")
    facts = [(name, str(page[name])) for name in names if name in page]
    return [*facts, ("size", size(page.get("bytes")) or "not known")]


def size(n_bytes: int | None) -> str:
    """A number of bytes for people, in MB."""
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


def checked(name: str, got: str, known: Iterable[str]) -> str:
    """`got`, if it is one of these or empty.

    Raises:
        ValueError: if not, with near names.
    """
    known = list(known)
    if got and got not in known:
        near = errors.near(got, known)
        some = ", ".join(known[:9]) + (f" and {len(known) - 9} more" if len(known) > 9 else "")
        fix = f"panel.{name} = {near[0]!r}" if near else ""
        raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want="" if near else some, fix=fix))
    return got


def _plain(value: Any) -> Any:
    """As JSON has it: what is missing is None, numpy's numbers are Python's."""
    if isinstance(value, str):
        return value
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    return value.item() if hasattr(value, "item") else value
