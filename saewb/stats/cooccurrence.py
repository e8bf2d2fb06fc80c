"""Co-occurrence of latents: phi, Jaccard, correlation and partners, from counts of tokens on which both fire."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb._files import atomic_write
from saewb.errors import FormatError, explain, near
from saewb.metrics import has_float64
from saewb.stats.correlation import CorrelationStats

if TYPE_CHECKING:
    import pandas as pd


_FORMAT = "saewb coactivation 1"
_TILE = 2**19  # pairs computed at a time


@dataclass(frozen=True, eq=False)
class Side:
    """Counts and sums of each latent of one SAE; updated in place while counting."""

    fired: Int[Tensor, " d_sae"]
    """Tokens on which each latent is active."""
    total: Float[Tensor, " d_sae"]
    """Sum of its activations, float64."""
    square: Float[Tensor, " d_sae"]
    """Sum of their squares, float64."""

    @classmethod
    def empty(cls, d_sae: int, device: torch.device | str) -> Side:
        """Zeros, before the first token."""
        return cls(*(torch.zeros(d_sae, dtype=t, device=device) for t in (torch.long, torch.float64, torch.float64)))

    def add(self, latent: Int[Tensor, " fired"], value: Float[Tensor, " fired"]) -> None:
        """Add activations of any tokens."""
        self.fired.scatter_add_(0, latent, torch.ones_like(latent))
        self.total.scatter_add_(0, latent, value)
        self.square.scatter_add_(0, latent, value.square())

    def merge(self, other: Side) -> None:
        """Add the counts and sums of `other`."""
        for mine, others in zip(vars(self).values(), vars(other).values(), strict=True):
            mine += others.to(mine.device)


@dataclass(frozen=True, eq=False, repr=False)
class Coactivation:
    """Counts of tokens on which two latents fire together, for pairs within one SAE or between two SAEs.

    Any block of pairs is computed on demand. Undefined figures are nan: phi and correlation of a latent that never
    fires or never changes, Jaccard of two that never fire.
    """

    n_tokens: int
    """Tokens counted."""
    a: Side
    """Counts and sums of each latent of the first SAE."""
    b: Side | None
    """The same of the second SAE; None if pairs are within one."""
    together: Int[Tensor, " pairs"]
    """Tokens on which both latents fire, per pair; each pair of one SAE's latents once."""
    products: Float[Tensor, " pairs"] | None
    """Sum of the products of both activations, per pair, float64; None if not summed."""

    @property
    def shape(self) -> tuple[int, int]:
        """Latents of the first SAE, latents of the second (or of the same) SAE."""
        return len(self.a.fired), len(self._second.fired)

    def counts(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Int[Tensor, "rows cols"]:
        """Tokens on which both latents fire; on the diagonal of one SAE, tokens on which the latent fires.

        Args:
            rows: latents.
            cols: latents, of the second SAE if there is one.

        Raises:
            ValueError: for an index out of range; likewise in the methods below.
        """
        return self._block(self.together, self.a.fired, *self._indices(rows, cols)).long()

    def phi(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Float[Tensor, "rows cols"]:
        """Correlation of firing: 1 always together, 0 as by chance, -1 each exactly where the other does not fire.

        (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))
        """
        n, (i, j) = self.n_tokens, self._indices(rows, cols)
        fired_i, fired_j = self.a.fired[i].double(), self._second.fired[j].double()
        both = self._block(self.together, self.a.fired, i, j).double()
        spread_i, spread_j = (fired * (n - fired) for fired in (fired_i, fired_j))
        return _ratio(n * both - fired_i[:, None] * fired_j, spread_i.sqrt()[:, None] * spread_j.sqrt())

    def jaccard(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Float[Tensor, "rows cols"]:
        """Fraction of the tokens on which either fires on which both fire: 1 always, 0 never together.

        n_ij / (n_i + n_j - n_ij)
        """
        i, j = self._indices(rows, cols)
        both = self._block(self.together, self.a.fired, i, j).double()
        return _ratio(both, self.a.fired[i].double()[:, None] + self._second.fired[j].double() - both)

    def correlation(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Float[Tensor, "rows cols"]:
        """Pearson correlation of activations over all tokens, zeros included: -1..1.

            (N sum a_i a_j - sum a_i sum a_j) / sqrt((N sum a_i² - (sum a_i)²) (N sum a_j² - (sum a_j)²))

        Raises:
            ValueError: if products were not summed.
        """
        if self.products is None:
            what = "correlation needs sums of products, which were not computed."
            raise ValueError(explain(what, fix="coactivation(batches, products=True)"))
        n, (i, j) = self.n_tokens, self._indices(rows, cols)
        a, b = self.a, self._second
        both = self._block(self.products, a.square, i, j)
        spread_a, spread_b = ((n * s.square[x] - s.total[x].square()).clamp(min=0) for s, x in ((a, i), (b, j)))
        return _ratio(n * both - a.total[i][:, None] * b.total[j], spread_a.sqrt()[:, None] * spread_b.sqrt())

    def partners(
        self, latents: Sequence[int] | Tensor, k: int = 10, *, by: str = "phi", min_together: int = 1
    ) -> tuple[Int[Tensor, "latents k"], Float[Tensor, "latents k"]]:
        """The k latents with the largest figure for each of some latents.

        Args:
            latents: of the first SAE.
            k: how many; all others if there are not as many.
            by: "phi", "jaccard" or "correlation".
            min_together: leave out partners that fire together on fewer tokens, whose figures are chance.

        Returns:
            Their indices, in descending order of the figure, and the figures; -1 and nan where fewer are left.
        """
        tops = []
        for _, block in self._blocks(by, self._index(latents, 0), min_together):
            value, index = block.nan_to_num(-math.inf).sort(dim=1, descending=True, stable=True)
            value, index = value[:, :k], index[:, :k]
            tops.append((index.masked_fill(value.isinf(), -1), value.masked_fill(value.isinf(), math.nan)))
        if not tops:
            return self.a.fired.new_empty(0, 0), self.a.total.new_empty(0, 0)
        return tuple(torch.cat(parts) for parts in zip(*tops, strict=True))

    def top_pairs(self, k: int = 20, *, by: str = "phi", min_together: int = 10) -> pd.DataFrame:
        """Pairs of latents with the largest figure, each once: latent, partner, counts, phi, Jaccard, correlation.

        Args:
            k: how many pairs.
            by: "phi", "jaccard" or "correlation".
            min_together: leave out pairs that fire together on fewer tokens.
        """
        n_cols = self.shape[1]
        value, place = self.a.total.new_empty(0), self.a.fired.new_empty(0)
        for rows, block in self._blocks(by, min_together=min_together):
            block = block.nan_to_num(-math.inf)
            if self.b is None:
                block.masked_fill_(torch.arange(n_cols, device=block.device) <= rows[:, None], -math.inf)
            largest, index = block.flatten().topk(min(k, block.numel()))
            value, place = torch.cat([value, largest]), torch.cat([place, index + rows[0] * n_cols])
            value, best = value.topk(min(k, len(value)))
            place = place[best]
        place = place[value.isfinite()]
        return self._frame(place // n_cols, place % n_cols)

    def stats(self, by: str = "phi") -> CorrelationStats:
        """Root mean square and mean of a figure over all pairs of different latents for which it is defined."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.together.device)
        for _, block in self._blocks(by):
            values = block[block.isfinite()]
            sums += torch.stack([values.square().sum(), values.sum(), sums.new_tensor(len(values))])
        square, total, n = sums.tolist()
        if n == 0:
            raise ValueError(explain(f"{by} is defined for no pair of latents.", want="two latents that fire"))
        return CorrelationStats(math.sqrt(square / n), total / n, int((self.a.fired > 0).sum()))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; `Coactivation.load(path)` reads it back."""
        from safetensors.torch import save_file

        path = Path(path).expanduser()
        facts = {"n_tokens": self.n_tokens, "latents": list(self.shape), "two": self.b is not None}
        metadata = {"format": _FORMAT, "json": json.dumps(facts)}
        atomic_write(path, lambda fresh: save_file(self._tensors(), fresh, metadata=metadata))
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Coactivation:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            FormatError: if the file is something else, or its tensors do not fit one another.
        """
        from safetensors import SafetensorError, safe_open

        device = device if has_float64(torch.device(device)) else "cpu"
        try:
            with safe_open(str(Path(path).expanduser()), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise FormatError(explain(f"{path} is not a coactivation file.", want=_FORMAT))
                facts = json.loads(metadata["json"])
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise FormatError(explain(f"{path} is not a safetensors file: {error}.", want=_FORMAT)) from error
        return _from_tensors(cls, path, facts, tensors)

    def __repr__(self) -> str:
        n, m = self.shape
        what = f"{n:,} latents" if self.b is None else f"{n:,} x {m:,} latents"
        never = int((self.a.fired == 0).sum())
        return f"Coactivation({what}, {self.n_tokens:,} tokens, {never:,} never fire)"

    @property
    def _second(self) -> Side:
        return self.a if self.b is None else self.b

    def _indices(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self._index(rows, 0), self._index(cols, 1)

    def _index(self, latents: Sequence[int] | Tensor, axis: int) -> Int[Tensor, " n"]:
        index, n = torch.as_tensor(latents, device=self.together.device).long().reshape(-1), self.shape[axis]
        if bool((bad := (index < 0) | (index >= n)).any()):
            raise ValueError(explain(f"no latents {index[bad][:5].tolist()}.", want=f"0..{n - 1}"))
        return index

    def _block(self, table: Tensor, diagonal: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Rows and columns of a table of pairs, with `diagonal` for a latent and itself."""
        if self.b is not None:
            return table[i[:, None] * self.shape[1] + j]
        on_diagonal = diagonal[i][:, None].to(table.dtype)
        if len(table) == 0:  # a single latent
            return on_diagonal.expand(-1, len(j))
        same = i[:, None] == j
        return torch.where(same, on_diagonal, table[torch.where(same, 0, triangle(i[:, None], j, self.shape[0]))])

    def _blocks(
        self, by: str, rows: Int[Tensor, " rows"] | None = None, min_together: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time and their figures with all columns; nan for a latent and itself and for rare pairs."""
        figures = {"phi": self.phi, "jaccard": self.jaccard, "correlation": self.correlation}
        if by not in figures:
            raise ValueError(explain(f"no figure {by!r}.", near=near(by, figures), want=", ".join(figures)))
        every, cols = (torch.arange(n, device=self.together.device) for n in self.shape)
        rows = every if rows is None else rows
        for part in rows.split(max(1, _TILE // self.shape[1])) if len(rows) else ():
            block = figures[by](part, cols)
            if self.b is None:
                block = block.masked_fill(part[:, None] == cols, math.nan)
            yield (
                part,
                block.masked_fill(self.counts(part, cols) < min_together, math.nan) if min_together > 0 else block,
            )

    def _frame(self, latent: Tensor, partner: Tensor) -> pd.DataFrame:
        import pandas as pd

        def each(figure: Callable) -> list:
            pairs = zip(latent, partner, strict=True)
            return [figure(i, j).item() for i, j in pairs]

        columns = {"latent": latent.tolist(), "partner": partner.tolist(), "together": each(self.counts)}
        columns |= {"fires": self.a.fired[latent].tolist(), "partner fires": self._second.fired[partner].tolist()}
        columns |= {"phi": each(self.phi), "jaccard": each(self.jaccard)}
        return pd.DataFrame(columns | ({} if self.products is None else {"correlation": each(self.correlation)}))

    def _tensors(self) -> dict[str, Tensor]:
        sides = {"a": self.a} | ({} if self.b is None else {"b": self.b})
        named = {f"{s}.{k}": t for s, side in sides.items() for k, t in vars(side).items()}
        named |= {"together": self.together} | ({} if self.products is None else {"products": self.products})
        return {name: t.contiguous() for name, t in named.items()}


def triangle(i: Int[Tensor, "..."], j: Int[Tensor, "..."], n: int) -> Int[Tensor, "..."]:
    """Index of the pair {i, j} in a table of all pairs below `n`: row by row, the larger index running."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return low * (2 * n - low - 1) // 2 + high - low - 1


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient; nan where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)


def _from_tensors(cls: type[Coactivation], path: str | Path, facts: dict, tensors: dict[str, Tensor]) -> Coactivation:
    n, m = facts["latents"]
    widths = {"a": n} | ({"b": m} if facts["two"] else {})
    pairs = n * m if facts["two"] else n * (n - 1) // 2
    want = {f"{side}.{name}": d for side, d in widths.items() for name in ("fired", "total", "square")}
    want |= {name: pairs for name in ("together", "products") if name == "together" or name in tensors}
    if {name: tuple(t.shape) for name, t in tensors.items()} != {name: (d,) for name, d in want.items()}:
        what = f"{path} holds {', '.join(sorted(tensors)) or 'nothing'} of sizes that do not fit {n} latents."
        raise FormatError(explain(what, want=", ".join(want)))
    sides = {side: Side(*(tensors[f"{side}.{name}"] for name in ("fired", "total", "square"))) for side in widths}
    return cls(facts["n_tokens"], sides["a"], sides.get("b"), tensors["together"], tensors.get("products"))
