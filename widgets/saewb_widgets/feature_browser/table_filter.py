"""Which latents the table lists, and in what order: pandas on the index's own table, and the same as code to paste."""

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
class Listing:
    """What is asked of the table."""

    query: str = ""  # a text; /pattern/; id:TOKEN; or the number of a latent
    sort: str = BEST  # of SORTS
    descending: bool = True  # ignored by BEST
    show: str = "all"  # of SHOWN
    density: tuple[float, float] = (0.0, 1.0)  # fractions of tokens, both ends included
    marked: tuple[int, ...] = ()  # the latents that are pinned or noted, where `show` asks for them

    @property
    def number(self) -> int | None:
        """The latent that the query names, if it is a number."""
        return int(self.query) if re.fullmatch(r"\s*\d{1,9}\s*", self.query) else None

    @property
    def needs_table(self) -> bool:
        """False if every latent is listed by number, which can be shown before the table is there."""
        plain = not self.query and self.show == "all" and self.density == (0.0, 1.0)
        return not (plain and self.sort == "latent")

    def arranged(self, table: pd.DataFrame, found: pd.DataFrame | None) -> list[int]:
        """The latents, in order.

        Args:
            table: `index.table()`.
            found: `index.search(...)` of the query; None where there is none.
        """
        of = len(table)
        if found is not None:
            table = table.loc[found.index]
        if self.show == "firing":
            table = table[table.n_active > 0]
        if self.show == "silent":
            table = table[table.n_active == 0]
        if self.show in ("pinned", "noted"):
            table = table[table.index.isin(self.marked)]
        if self.density != (0.0, 1.0):
            table = table[table.density.between(*self.density)]
        if self.sort == BEST and found is None:
            table = table.sort_values("contextual", ascending=False, kind="stable")
        if self.sort == "latent":
            table = table.sort_index(ascending=not self.descending)
        elif self.sort != BEST:
            table = table.sort_values(self.sort, ascending=not self.descending, kind="stable")
        latents = table.index.tolist()
        if (n := self.number) is not None and n < of:
            latents = [n, *(i for i in latents if i != n)]
        return latents

    def code(self) -> list[str]:
        """Lines that make `latents` of `index`: what `arranged` does."""
        lines = ["table = index.table()"]
        if self.query:
            lines += ["import re", ""] if isinstance(self.wanted(), re.Pattern) else []
            lines += [f"found = index.search({_spelled(self.wanted())})", "table = table.loc[found.index]"]
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

    def wanted(self) -> Any:
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


def _spelled(wanted: Any) -> str:
    return f"re.compile({wanted.pattern!r}, re.IGNORECASE)" if isinstance(wanted, re.Pattern) else repr(wanted)


def check(name: str, got: Any, sorts: Iterable[str]) -> Any:
    """`got`, if it is a value of this name (query, sort, show_only, density).

    Args:
        name: of what.
        got: the value.
        sorts: the orders that the index has.

    Raises:
        ValueError: if not, with near names.
    """
    if name == "query":
        Listing(query=got).wanted()
    elif name == "density":
        if not 0 <= got[0] <= got[1] <= 1:
            want = "(from, to), fractions of tokens in 0..1"
            raise ValueError(errors.explain(f"density is {got}.", want=want, fix="density=(1e-4, 0.01)"))
    elif got not in (known := list(sorts) if name == "sort" else SHOWN):
        near = errors.near(got, known)
        raise ValueError(errors.explain(f"{name} is {got!r}.", near=near, want=", ".join(known)))
    return got
