"""Settings of an index: its source, and the sizes of its contexts and samples."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from saewb.errors import FormatError, explain
from saewb.features.top_contexts import BLOCK, PENDING
from saewb.fingerprint import check_same, joined_rows

VERSION = 1
PARTS = ("SAE", "model", "tokens")
"""Parts of an index's digests: what it is of, by content."""
MAX_ACTIVE = 128  # active latents recorded per sampled token
WEIGHT_TENSORS = ("logits", "jacobian", "nearest", "decoder_norm")
"""Groups of an index's tensors that follow from the weights alone, or from a lens."""
N_COACTIVE = 10  # coactive latents per latent
PAIRS = 2**18  # pairs of coactive latents sorted at a time (2 MiB in int64, up to 32 times over)
PENDING_TOKENS = 2**13  # sampled tokens collected before they are merged
CANDIDATES = 2**13  # candidates whose windows are read at a time


@dataclass(frozen=True)
class IndexConfig:
    """Sizes of the accumulators of a pass over text."""

    d_sae: int
    """Latents."""
    ctx_len: int
    """Tokens in a row of text."""
    n_top: int
    """Top contexts per latent."""
    n_sample: int
    """Sampled contexts per latent."""
    before: int
    """Tokens of a context before its peak token."""
    after: int
    """Tokens of a context after its peak token."""
    coactive_tokens: int
    """Sampled tokens, whose active latents are recorded."""
    active: int
    """Active latents recorded per sampled token, the strongest ones."""
    l0_most: int
    """Latents that can be active on one token."""
    seed: int
    """Seed of both samples."""

    @property
    def window(self) -> int:
        """Tokens in a context."""
        return self.before + 1 + self.after

    @property
    def drops_active(self) -> bool:
        """Whether more latents may be active on a token than are recorded."""
        return self.active < min(self.d_sae, self.l0_most)

    @property
    def nbytes(self) -> int:
        """Peak memory of a pass in bytes, without the model's forward pass and the latents of a batch.

        The state, plus the larger of two: pending candidates and their merge, or the count of coactive latents.
        """
        longest = 8 * self.window
        contexts = self.d_sae * (self.n_top + self.n_sample) * (longest + 32)
        counts = self.d_sae * (64 * 8 + 8 * (self.ctx_len.bit_length() + 1) + 20 + N_COACTIVE * 12 + 4)
        token = 4 * self.active + 16
        candidate = longest + 100  # with its sort keys
        merged = 3 * BLOCK * max(self.n_top, self.n_sample) * candidate + CANDIDATES * (5 * longest + 100)
        pending = 4 * (PENDING + CANDIDATES) * candidate + 2 * self.coactive_tokens * token + 3 * PENDING_TOKENS * token
        coactive = self.coactive_tokens * self.active * 40 + 32 * 8 * PAIRS
        return contexts + counts + self.coactive_tokens * token + max(merged + pending, coactive)


@dataclass(frozen=True)
class IndexInfo:
    """Source of an index, and the settings it was built with."""

    d_sae: int
    """Latents."""
    ctx_len: int
    """Tokens in a row of text."""
    n_top: int
    """Top contexts per latent."""
    n_quantiles: int
    """Groups of sampled contexts."""
    per_quantile: int
    """Contexts in each group."""
    before: int
    """Tokens of a context before its peak token."""
    after: int
    """Tokens of a context after its peak token."""
    coactive_tokens: int
    """Maximum of sampled tokens, on which coactivation is counted."""
    l0_most: int
    """Latents that can be active on one token: k of a top-k SAE, else all."""
    seed: int
    """Seed of the samples."""
    special: tuple[int, ...]
    """Ids of special tokens, which are left out."""
    rows: tuple[tuple[int, int], ...]
    """Rows of text read so far, as [first, last + 1)."""
    n_tokens: int
    """Tokens read, without special ones."""
    sae: str
    """One-line description of the SAE."""
    model: str
    """Name of the language model."""
    hook: str
    """Hook point the SAE reads."""
    hook_out: str
    """Hook point the SAE writes."""
    n_planned: int | None = None
    """Rows to read in all; None once all are read."""
    neuronpedia: str | None = None
    """"model/source" of its pages on Neuronpedia, e.g. "gpt2-small/6-res-jb"."""
    digests: Mapping[str, str] | None = None
    """By content: "SAE", "model", and "tokens" of the rows read so far; None in an index of saewb 0.1.0."""
    lens: str | None = None
    """One-line description of the Jacobian lens of its words through later layers; None without one."""

    @property
    def config(self) -> IndexConfig:
        """Sizes of a pass that adds to this index."""
        n_sample = self.n_quantiles * self.per_quantile
        sizes = (self.d_sae, self.ctx_len, self.n_top, n_sample, self.before, self.after)
        return IndexConfig(*sizes, self.coactive_tokens, min(MAX_ACTIVE, self.l0_most), self.l0_most, self.seed)

    @property
    def n_rows(self) -> int:
        """Rows of text read so far."""
        return sum(b - a for a, b in self.rows)

    @property
    def next_row(self) -> int:
        """Number of the first row of further text."""
        return max((b for _, b in self.rows), default=0)

    def check_mergeable(self, other: IndexInfo, what: str) -> None:
        """Raise unless both are of the same SAE and model, with the same settings, and no row of text in common."""
        fix = "saewb.build_index(model, sae, tokens)    # anew"
        for written, now in ((self.digests, {}), (other.digests, self.digests or {})):
            parts = PARTS[:2] if written is None or now else ()
            check_same(f"{what}: one index", written, now, parts=parts, fix=fix)
        values, others = asdict(self), asdict(other)
        for name in ("rows", "n_tokens", "n_planned", "neuronpedia", "lens", "digests", "sae", "model"):
            del values[name]
        if got := ", ".join(f"{name} {v!r} and {others[name]!r}" for name, v in values.items() if v != others[name]):
            raise ValueError(explain(f"{what}: two indexes differ in settings: {got}.", want="the same settings"))
        for a, b in self.rows:
            if any(a < d and c < b for c, d in other.rows):
                fix = f"saewb.build_index(..., first_row={self.next_row})    # for the second part"
                raise ValueError(explain(f"{what}: both have row {max(a, other.rows[0][0])} of the text.", fix=fix))

    def check_content(self, what: str, **now: str) -> None:
        """Raise unless the index is of the SAE or the model with this digest; one of 0.1.0 does not know.

        Args:
            what: the index, for the message.
            now: `SAE=` and `model=`.
        """
        if self.digests is not None:
            fix = "index = saewb.build_index(model, sae, tokens)"
            check_same(what, self.digests, now, fix=fix, want=f"that of the index: {self.sae}, {self.model}")

    def with_rows(
        self, rows: Sequence[tuple[int, int]], n_tokens: int, tokens: str | None = None, **changes: Any
    ) -> IndexInfo:
        """Add rows and tokens, and the digest of the rows; adjacent ranges of rows are joined."""
        if tokens is not None:
            digests = dict(self.digests or {})
            changes["digests"] = digests | {"tokens": joined_rows(digests.get("tokens", "0"), tokens)}
        ranges: list[tuple[int, int]] = []
        for a, b in sorted((*self.rows, *rows)):
            ranges[-1:] = [(ranges[-1][0], b)] if ranges and ranges[-1][1] == a else [*ranges[-1:], (a, b)]
        return replace(self, rows=tuple(ranges), n_tokens=self.n_tokens + n_tokens, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the version of the format."""
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> IndexInfo:
        """The inverse of `to_json`.

        Raises:
            FormatError: for another version, or unknown or missing names.
        """
        values = dict(values)
        if (version := values.pop("version", None)) != VERSION:
            got = f"an index of version {version!r}."
            raise FormatError(explain(got, want=f"version {VERSION}", fix="pip install -U saewb"))
        names = {f.name for f in fields(IndexInfo)}
        required = {"d_sae", "ctx_len", "rows"}
        if wrong := sorted((set(values) - names) | (required - set(values))):
            raise FormatError(explain(f"index.json has unknown or missing {wrong}.", want=", ".join(sorted(names))))
        special, rows = values.get("special"), values["rows"]
        if not isinstance(special, list) or not isinstance(rows, list) or any(len(pair) != 2 for pair in rows):
            what = f"index.json has special={reprlib.repr(special)}, rows={reprlib.repr(rows)}."
            raise FormatError(explain(what, want="a list of ids, and a list of first and last row"))
        values["special"], values["rows"] = tuple(special), tuple((a, b) for a, b in rows)
        try:
            info = IndexInfo(**values)
        except TypeError as error:
            raise FormatError(
                explain(f"index.json does not say all: {error}.", want=", ".join(sorted(names)))
            ) from error
        _check_info(info)
        return info


def _check_info(info: IndexInfo) -> None:
    """Check types and ranges of what index.json says.

    Raises:
        FormatError: for the first wrong value.
    """
    counts = [name for name, f in IndexInfo.__dataclass_fields__.items() if f.type == "int" and name != "seed"]
    for name in counts:
        value = getattr(info, name)
        if type(value) is not int or not (name in ("d_sae", "ctx_len")) <= value < 2**62:
            raise FormatError(explain(f"index.json has {name}={reprlib.repr(value)}.", want="a number of 0 or more"))
    texts = {name: f.type for name, f in IndexInfo.__dataclass_fields__.items() if f.type in ("str", "str | None")}
    for name, kind in texts.items():
        value = getattr(info, name)
        if not isinstance(value, str) and not (kind == "str | None" and value is None):
            raise FormatError(explain(f"index.json has {name}={reprlib.repr(value)}.", want="text"))
    planned = info.n_planned is None or (type(info.n_planned) is int and info.n_planned >= 0)
    numbers = (*info.special, *(n for pair in info.rows for n in pair), info.seed)
    if not planned or any(type(n) is not int or abs(n) >= 2**62 for n in numbers):
        what = f"index.json has special={reprlib.repr(info.special)}, rows={reprlib.repr(info.rows)}, "
        what += f"seed={reprlib.repr(info.seed)}, n_planned={reprlib.repr(info.n_planned)}."
        raise FormatError(explain(what, want="integers"))
    digests = info.digests
    if digests is not None and not (
        isinstance(digests, dict) and all(isinstance(digests.get(part), str) for part in PARTS)
    ):
        what = f"index.json has digests={reprlib.repr(digests)}."
        raise FormatError(explain(what, want=f"texts for {', '.join(PARTS)}"))
    if any(not 0 <= a <= b for a, b in info.rows) or min(info.n_quantiles, info.config.window) < 1:
        what = f"index.json has rows={reprlib.repr(info.rows)} and n_quantiles={info.n_quantiles}."
        raise FormatError(explain(what, want="rows from first to last, one quantile or more"))
