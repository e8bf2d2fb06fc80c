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
from saewb.stats.correlation import CorrelationStats

if TYPE_CHECKING:
    import pandas as pd


_FORMAT = "saewb coactivation 1"
_TILE = 2**19  # pairs looked at together


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
        """Before the first token."""
        return cls(*(torch.zeros(d_sae, dtype=t, device=device) for t in (torch.long, torch.float64, torch.float64)))

    def add(self, latent: Int[Tensor, " fired"], value: Float[Tensor, " fired"]) -> None:
        """These activations, of any tokens."""
        self.fired.scatter_add_(0, latent, torch.ones_like(latent))
        self.total.scatter_add_(0, latent, value)
        self.square.scatter_add_(0, latent, value.square())

    def merge(self, other: Side) -> None:
        """And those of `other`."""
        for mine, others in zip(self._tensors(), other._tensors(), strict=True):
            mine += others.to(mine.device)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.fired, self.total, self.square


@dataclass(frozen=True, eq=False, repr=False)
class Coactivation:
    """On how many tokens each two latents fire together; within one SAE, or between the latents of two.

    Any block of pairs is computed when asked for. nan stands where a figure is not defined: phi and correlation of a
    latent that never fires or never changes, Jaccard of two that never fire.
    """

    n_tokens: int
    """Tokens counted."""
    a: Side
    """Counts and sums of each latent of the first SAE."""
    b: Side | None
    """The same of the second SAE; None if pairs are within one."""
    together: Int[Tensor, " pairs"]
    """Tokens on which both fire; each pair of one SAE's latents once."""
    products: Float[Tensor, " pairs"] | None
    """Sums of products of activations, float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """Latents, by latents of the second SAE or of the same."""
        return len(self.a.fired), len(self._second.fired)

    def counts(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Int[Tensor, "rows cols"]:
        """Tokens on which both fire; on the diagonal, of one SAE, on which the latent fires.

        Args:
            rows: latents.
            cols: latents, of the second SAE if there is one.

        Raises:
            ValueError: for a latent that is not there. So for the methods below.
        """
        return self._block(self.together, self.a.fired, *self._indices(rows, cols)).long()

    def phi(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Float[Tensor, "rows cols"]:
        """Correlation of firing: 1 always together, 0 as often as by chance, -1 each exactly where the other does not.

        (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))
        """
        n, (i, j) = self.n_tokens, self._indices(rows, cols)
        fired_i, fired_j = self.a.fired[i].double(), self._second.fired[j].double()
        both = self._block(self.together, self.a.fired, i, j).double()
        spread_i, spread_j = (fired * (n - fired) for fired in (fired_i, fired_j))
        return _ratio(n * both - fired_i[:, None] * fired_j, spread_i.sqrt()[:, None] * spread_j.sqrt())

    def jaccard(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> Float[Tensor, "rows cols"]:
        """Of the tokens on which one or the other fires, the fraction on which both do: 1 always, 0 never together.

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
            what = "correlation needs sums of products, which were not kept."
            raise ValueError(explain(what, fix="coactivation(batches, products=True)"))
        n, (i, j) = self.n_tokens, self._indices(rows, cols)
        a, b = self.a, self._second
        both = self._block(self.products, a.square, i, j)
        spread_a, spread_b = ((n * s.square[x] - s.total[x].square()).clamp(min=0) for s, x in ((a, i), (b, j)))
        return _ratio(n * both - a.total[i][:, None] * b.total[j], spread_a.sqrt()[:, None] * spread_b.sqrt())

    def partners(
        self, latents: Sequence[int] | Tensor, k: int = 10, *, by: str = "phi", min_together: int = 1
    ) -> tuple[Int[Tensor, "latents k"], Float[Tensor, "latents k"]]:
        """The latents that go with each of these most.

        Args:
            latents: of the first SAE.
            k: how many; all others if there are not as many.
            by: "phi", "jaccard" or "correlation".
            min_together: leave out those that fire together on fewer tokens, whose figures are chance.

        Returns:
            Their indices, the most first, and their figures; -1 and nan where fewer are left.
        """
        figure, cols = self._figure(by), torch.arange(self.shape[1], device=self.together.device)
        tiles = [self._top(figure, rows, cols, k, min_together) for rows in self._tiles(self._index(latents, 0))]
        if not tiles:
            return cols.new_empty(0, 0), self.a.total.new_empty(0, 0)
        return torch.cat([index for index, _ in tiles]), torch.cat([value for _, value in tiles])

    def top_pairs(self, k: int = 20, *, by: str = "phi", min_together: int = 10) -> pd.DataFrame:
        """The pairs of latents with the largest figure, each once: latent, partner, counts, phi, Jaccard, correlation.

        Args:
            k: how many pairs.
            by: "phi", "jaccard" or "correlation".
            min_together: leave out pairs that fire together on fewer tokens.
        """
        latent, partner, value = self._top_pairs(k, by, min_together)
        return self._frame(latent[value.isfinite()], partner[value.isfinite()])

    def stats(self, by: str = "phi") -> CorrelationStats:
        """Root mean square and mean of a figure over all pairs of different latents for which it is defined."""
        figure, cols = self._figure(by), torch.arange(self.shape[1], device=self.together.device)
        sums = torch.zeros(3, dtype=torch.float64, device=cols.device)
        for rows in self._tiles(torch.arange(self.shape[0], device=cols.device)):
            block = self._mask_diagonal(figure(rows, cols), rows, cols)
            values = block[block.isfinite()]
            sums += torch.stack([values.square().sum(), values.sum(), sums.new_tensor(len(values))])
        square, total, n = sums.tolist()
        if n == 0:
            raise ValueError(explain(f"{by} is defined for no pair of latents.", want="two latents that fire"))
        return CorrelationStats(math.sqrt(square / n), total / n, int((self.a.fired > 0).sum()))

    def save(self, path: str | Path) -> Path:
        """Write it into one safetensors file, all of it or nothing; `Coactivation.load(path)` reads it back."""
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
            FormatError: if it is something else, or its parts do not fit one another.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(Path(path).expanduser()), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise FormatError(explain(f"{path} is not a coactivation file.", want=_FORMAT))
                facts = json.loads(metadata["json"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise FormatError(explain(f"{path} is not a safetensors file: {error}.", want=_FORMAT)) from error
        return _from_tensors(cls, path, facts, tensors)

    def __repr__(self) -> str:
        n, m = self.shape
        what = f"{n:,} latents" if self.b is None else f"{n:,} x {m:,} latents"
        never = int((self.a.fired == 0).sum())
        return f"Coactivation({what}, {self.n_tokens:,} tokens, {never:,} never fire)"

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _second(self) -> Side:
        return self.a if self.b is None else self.b

    def _indices(self, rows: Sequence[int] | Tensor, cols: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self._index(rows, 0), self._index(cols, 1)

    def _index(self, latents: Sequence[int] | Tensor, axis: int) -> Int[Tensor, " n"]:
        chosen = torch.as_tensor(latents, device=self.together.device).long().reshape(-1)
        n = self.shape[axis]
        if bool(((chosen < 0) | (chosen >= n)).any()):
            bad = chosen[(chosen < 0) | (chosen >= n)][:5].tolist()
            raise ValueError(explain(f"no latents {bad}.", want=f"0..{n - 1}"))
        return chosen

    def _block(self, table: Tensor, diagonal: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """These rows and columns of a table of pairs."""
        if self.b is not None:
            return table[i[:, None] * self.shape[1] + j]
        own = diagonal[i][:, None].to(table.dtype)
        if len(table) == 0:  # a single latent
            return own.expand(-1, len(j))
        same = i[:, None] == j
        return torch.where(same, own, table[torch.where(same, 0, triangle(i[:, None], j, self.shape[0]))])

    def _figure(self, by: str) -> Callable[[Tensor, Tensor], Tensor]:
        figures = {"phi": self.phi, "jaccard": self.jaccard, "correlation": self.correlation}
        if by not in figures:
            raise ValueError(explain(f"no figure {by!r}.", near=near(by, figures), want=", ".join(figures)))
        return figures[by]

    def _tiles(self, rows: Int[Tensor, " rows"]) -> Iterator[Tensor]:
        return iter(rows.split(max(1, _TILE // self.shape[1]))) if len(rows) else iter(())

    def _mask_diagonal(self, block: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return block if self.b is not None else block.masked_fill(rows[:, None] == cols, math.nan)

    def _figures(self, figure: Callable, rows: Tensor, cols: Tensor, min_together: int) -> Tensor:
        """Figures, -inf where there is none or too little to go by."""
        block = self._mask_diagonal(figure(rows, cols), rows, cols)
        return block.masked_fill(block.isnan() | (self.counts(rows, cols) < min_together), -math.inf)

    def _top(self, figure: Callable, rows: Tensor, cols: Tensor, k: int, least: int) -> tuple[Tensor, Tensor]:
        value, index = self._figures(figure, rows, cols, least).sort(dim=1, descending=True, stable=True)
        value, index = value[:, :k], index[:, :k]
        return index.masked_fill(value.isinf(), -1), value.masked_fill(value.isinf(), math.nan)

    def _top_pairs(self, k: int, by: str, least: int) -> tuple[Tensor, Tensor, Tensor]:
        figure, cols = self._figure(by), torch.arange(self.shape[1], device=self.together.device)
        value, place = self.a.total.new_empty(0), cols.new_empty(0)
        for rows in self._tiles(torch.arange(self.shape[0], device=cols.device)):
            block = self._figures(figure, rows, cols, least)
            if self.b is None:
                block = block.masked_fill(cols <= rows[:, None], -math.inf)
            largest, index = block.flatten().topk(min(k, block.numel()))
            value, place = torch.cat([value, largest]), torch.cat([place, index + rows[0] * self.shape[1]])
            value, best = value.topk(min(k, len(value)))
            place = place[best]
        return place // self.shape[1], place % self.shape[1], value

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
    """Where the pair {i, j} is in a table of all pairs below `n`: row by row, the larger index running."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return low * (2 * n - low - 1) // 2 + high - low - 1


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """nan where there is nothing to divide by."""
    return torch.where(below > 0, above / below, math.nan)


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
