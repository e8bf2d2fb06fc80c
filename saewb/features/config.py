"""What an index is about, without its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from saewb.errors import FormatError, explain
from saewb.features.accumulate import Plan

VERSION = 1
ACTIVE = 128  # active latents noted of a sampled token, at most


@dataclass(frozen=True)
class IndexFacts:
    """What an index is about and how it was made."""

    d_sae: int  # latents
    ctx_len: int  # tokens in a row of text
    n_top: int  # strongest contexts kept of each latent
    n_quantiles: int  # groups of sampled contexts
    per_quantile: int  # contexts in each
    before: int  # tokens of a context before the one it is about
    after: int  # tokens of a context after it
    coactive_tokens: int  # sampled tokens that say which latents fire together, at most
    l0_most: int  # latents that can fire on one token: k of a top-k SAE, else all
    seed: int  # of the samples
    special: tuple[int, ...]  # token ids that were left out
    rows: tuple[tuple[int, int], ...]  # rows of text seen, as [first, last + 1)
    n_tokens: int  # tokens seen, special ones left out
    sae: str  # one line on the SAE
    model: str  # name of the language model
    hook: str  # point the SAE reads
    hook_out: str  # point it writes
    n_planned: int | None = None  # rows it was to see; None once it has seen them
    neuronpedia: str | None = None  # "model/source" of its page there, e.g. "gpt2-small/6-res-jb"

    @property
    def plan(self) -> Plan:
        """What a pass that adds to it gathers."""
        n_sample = self.n_quantiles * self.per_quantile
        sizes = (self.d_sae, self.ctx_len, self.n_top, n_sample, self.before, self.after)
        return Plan(*sizes, self.coactive_tokens, min(ACTIVE, self.l0_most), self.l0_most, self.seed)

    @property
    def n_rows(self) -> int:
        """Rows of text seen."""
        return sum(b - a for a, b in self.rows)

    @property
    def next_row(self) -> int:
        """The number for the first row of further text."""
        return max((b for _, b in self.rows), default=0)

    def check_same(self, other: IndexFacts, what: str) -> None:
        """Raise unless what both gather is the same and no row of text is in both."""
        mine, theirs = asdict(self), asdict(other)
        free = {"rows", "n_tokens", "n_planned", "neuronpedia"}
        if differ := [name for name in mine if name not in free and mine[name] != theirs[name]]:
            got = ", ".join(f"{name} {mine[name]!r} and {theirs[name]!r}" for name in differ)
            raise ValueError(explain(f"{what}: two indexes differ in {got}.", want="the same model, SAE and settings"))
        for a, b in self.rows:
            if any(a < d and c < b for c, d in other.rows):
                fix = f"saewb.build_index(..., first_row={self.next_row})    # for the second part"
                raise ValueError(explain(f"{what}: both have row {max(a, other.rows[0][0])} of the text.", fix=fix))

    def with_rows(self, rows: Sequence[tuple[int, int]], n_tokens: int, **changes: Any) -> IndexFacts:
        """The same with further rows and tokens seen; adjoining ones are joined."""
        found: list[tuple[int, int]] = []
        for a, b in sorted((*self.rows, *rows)):
            found[-1:] = [(found[-1][0], b)] if found and found[-1][1] == a else [*found[-1:], (a, b)]
        return replace(self, rows=tuple(found), n_tokens=self.n_tokens + n_tokens, **changes)

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(read: dict[str, Any]) -> IndexFacts:
        """What `to_json` gave.

        Raises:
            FormatError: for another version, or unknown or missing names.
        """
        read = dict(read)
        if (version := read.pop("version", None)) != VERSION:
            got = f"an index of version {version!r}."
            raise FormatError(explain(got, want=f"version {VERSION}", fix="pip install -U saewb"))
        known = {f.name for f in fields(IndexFacts)}
        if set(read) - known or {"d_sae", "ctx_len", "rows"} - set(read):
            wrong = sorted((set(read) - known) | ({"d_sae", "ctx_len", "rows"} - set(read)))
            raise FormatError(explain(f"index.json has unknown or missing {wrong}.", want=", ".join(sorted(known))))
        read["special"], read["rows"] = tuple(read["special"]), tuple((a, b) for a, b in read["rows"])
        return IndexFacts(**read)
