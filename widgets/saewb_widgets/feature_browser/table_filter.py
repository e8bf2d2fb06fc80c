"""Filter and sort the table of latents, with pandas; and the same as code to paste."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saewb import errors

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("all", "firing", "silent", "pinned", "noted")
BEST = "best"  # the index's own order: of the search, else of its ranking
SORTS = {  # name: what the panel calls it
    BEST: "best first",
    "latent": "number",
    "density": "how often it fires",
    "max": "largest activation",
    "mean": "mean activation",
    "single_token_share": "about a single token",
    "top_logit_effect": "effect on logits",
    "decoder_norm": "decoder norm",
}


@dataclass(frozen=True)
class TableFilter:
    """Which latents the table lists, and in what order."""

    query: str = ""
    """A text, /pattern/, id:TOKEN, or the number of a latent."""
    sort: str = BEST
    """One of SORTS."""
    descending: bool = True
    """Largest first; ignored by BEST."""
    show: str = "all"
    """One of SHOWN."""
    density: tuple[float, float] = (0.0, 1.0)
    """Fractions of tokens, both ends included."""
    marked: tuple[int, ...] = ()
    """Latents that are pinned or noted, where `show` is one of these."""

    @property
    def number(self) -> int | None:
        """The latent that the query names, if it is a number."""
        return int(self.query) if re.fullmatch(r"\s*\d{1,9}\s*", self.query) else None

    def apply(self, table: pd.DataFrame, hits: pd.DataFrame | None) -> list[int]:
        """Latents of the table, in order.

        Args:
            table: `index.table()`.
            hits: `index.search(...)` of the query; None where there is none.
        """
        n_latents = len(table)
        if hits is not None:
            table = table.loc[hits.index]
        if self.show == "firing":
            table = table[table.n_active > 0]
        if self.show == "silent":
            table = table[table.n_active == 0]
        if self.show in ("pinned", "noted"):
            table = table[table.index.isin(self.marked)]
        if self.density != (0.0, 1.0):
            table = table[table.density.between(*self.density)]
        if self.sort == BEST and hits is None:
            table = table.sort_values("contextual", ascending=False, kind="stable")
        if self.sort == "latent":
            table = table.sort_index(ascending=not self.descending)
        elif self.sort != BEST:
            table = table.sort_values(self.sort, ascending=not self.descending, kind="stable")
        latents = table.index.tolist()
        if (n := self.number) is not None and n < n_latents:
            latents = [n, *(i for i in latents if i != n)]
        return latents

    def code(self) -> list[str]:
        """Lines of Python that make `latents` of `index`, as `apply` does."""
        lines = ["table = index.table()"]
        if self.query:
            lines += ["import re", ""] if isinstance(self.search_argument(), re.Pattern) else []
            lines += [f"matches = index.search({_literal(self.search_argument())})", "table = table.loc[matches.index]"]
        if self.show in ("firing", "silent"):
            lines.append(f"table = table[table.n_active {'>' if self.show == 'firing' else '=='} 0]")
        if self.show in ("pinned", "noted"):
            lines.append(f"table = table[table.index.isin({list(self.marked)})]    # {self.show}")
        if self.density != (0.0, 1.0):
            lines.append(f"table = table[table.density.between({self.density[0]!r}, {self.density[1]!r})]")
        if self.sort == "latent":
            lines.append(f"table = table.sort_index(ascending={not self.descending})")
        elif self.sort != BEST or not self.query:
            by, up = ("contextual", False) if self.sort == BEST else (self.sort, not self.descending)
            lines.append(f"table = table.sort_values({by!r}, ascending={up}, kind='stable')")
        lines.append("latents = table.index.tolist()")
        if (n := self.number) is not None:
            lines.append(f"latents = [i for i in [{n}] if i < len(index)] + [i for i in latents if i != {n}]")
        return lines

    def search_argument(self) -> Any:
        """The query as `index.search` takes it.

        Raises:
            ValueError: for a pattern that is none.
        """
        if match := re.fullmatch(r"id:\s*(\d{1,9})\s*", self.query):
            return int(match[1])
        if len(self.query) > 2 and self.query[0] == self.query[-1] == "/":
            try:
                return re.compile(self.query[1:-1], re.IGNORECASE)
            except re.error as error:
                want = "a text, or a pattern of Python's re between slashes"
                what = f"{self.query} is no pattern: {error}."
                raise ValueError(errors.explain(what, want=want, fix="query='/(19|20)\\\\d\\\\d/'")) from error
        return self.query


def _literal(what: Any) -> str:
    return f"re.compile({what.pattern!r}, re.IGNORECASE)" if isinstance(what, re.Pattern) else repr(what)


def check_trait(name: str, value: Any, sorts: Iterable[str]) -> Any:
    """Check a value of query, sort, show_only or density, and return it.

    Args:
        name: of the trait.
        value: its new value.
        sorts: the orders that the index has.

    Raises:
        ValueError: if the trait does not take it, with near names.
    """
    if name == "query":
        TableFilter(query=value).search_argument()
    elif name == "density":
        if not 0 <= value[0] <= value[1] <= 1:
            want = "(from, to), fractions of tokens in 0..1"
            raise ValueError(errors.explain(f"density is {value}.", want=want, fix="density=(1e-4, 0.01)"))
    elif value not in (choices := list(sorts) if name == "sort" else SHOWN):
        near = errors.near(value, choices)
        raise ValueError(errors.explain(f"{name} is {value!r}.", near=near, want=", ".join(choices)))
    return value
