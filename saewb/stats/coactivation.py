"""Co-activation counts of latents over a stream of activations: exact, in memory known in advance.

1. Each batch is reduced to its active latents: (token, latent, activation).
2. Tokens of about equally many active latents are taken together, so that their pairs make full rectangles.
3. Pairs are added to a table of half of n * n counts (and sums of products).

Time goes with the pairs that fire, L0² per token, not with n². The tables are not sparse: over millions of tokens most
pairs of an SAE's latents meet at least once, and 12 bytes each is less than any sparse form takes that also has to name
the pair. `Coactivation`, the result, computes phi, Jaccard, correlation and partners of any block of pairs on demand.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saewb._files import atomic_write, refuse_damage
from saewb._indices import Indices, indices_of
from saewb.errors import FormatError, explain, near
from saewb.metrics import has_float64
from saewb.sae.sparse import SparseLatents
from saewb.stats.correlation import CorrelationStats

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "saewb coactivation 1"
MAX_BYTES = 2 * 10**9
_PAIRS = 2**19  # pairs added, or computed, at a time
_DENSE = 2**21  # activations scanned at a time
_WORK = _PAIRS * 96 + _DENSE * 48  # bytes that steps 1 to 3 take, whatever the batch


def coactivation(
    batches: Iterable[Float[Tensor, "_ d_sae"] | SparseLatents], *, products: bool = True, max_bytes: int = MAX_BYTES
) -> Coactivation:
    """Count on how many tokens each two latents of an SAE fire together, over all batches.

    Args:
        batches: activations from `sae.encode` or `sae.encode_topk`; any number of tokens each.
        products: whether to sum products of activations as well, for `Coactivation.correlation`.
        max_bytes: of memory, beyond the batch: 4 bytes per pair of latents, 12 with products, and 0.2 GB.
            The default is enough for 16,384 latents with products and 28,000 without.

    Returns:
        Counts of all pairs, exactly, with phi, Jaccard and correlation; for two SAEs see `CoactivationStream`.

    Raises:
        TypeError: for batches of something else.
        ValueError: if there are no tokens, or the tables do not fit into `max_bytes`.

    Example:
        >>> counts = coactivation([torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])])
        >>> counts.counts([0, 1, 2], [0, 1, 2]).tolist()
        [[2, 2, 0], [2, 3, 0], [0, 0, 0]]
    """
    stream = None
    for batch in batches:
        if not isinstance(batch, (Tensor, SparseLatents)):
            what = f"coactivation got a {type(batch).__name__} for a batch."
            raise TypeError(explain(what, want="activations [tokens, d_sae]", fix="coactivation([sae.encode(x)])"))
        if stream is None:
            how = {"products": products, "max_bytes": max_bytes, "device": batch.device}
            stream = CoactivationStream(batch.shape[-1], **how)
        stream.update(batch)
    if stream is None:
        raise ValueError(explain("coactivation got no batches.", want="at least one token"))
    return stream.result()


class CoactivationStream:
    """Accumulator of joint firing counts over batches of tokens, within one SAE or between two.

    Counts are exact, whatever the batches; sums of products are in float64. An activation other than 0 counts as
    firing, whatever its sign. Each batch waits for its device once or twice, since how many latents fire decides
    how much memory the next step takes.

    Args:
        d_sae: latents.
        d_sae_b: latents of the second SAE; None counts pairs within the first.
        products: whether to sum products of activations as well, for `Coactivation.correlation`.
        max_bytes: of memory, beyond the batch.
        device: of the tables.

    Raises:
        ValueError: if the tables do not fit into `max_bytes`.

    Example:
        >>> stream = CoactivationStream(2, 3)
        >>> stream.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0, 5.0]]))
        >>> stream.result().counts([0, 1], [0, 1, 2]).tolist()
        [[0, 1, 1], [0, 0, 0]]
    """

    def __init__(
        self,
        d_sae: int,
        d_sae_b: int | None = None,
        *,
        products: bool = True,
        max_bytes: int = MAX_BYTES,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_fits(d_sae, d_sae_b, products, max_bytes)
        device = device if has_float64(torch.device(device)) else "cpu"
        self.n_tokens = 0
        self._a = Side.empty(d_sae, device)
        self._b = self._a if d_sae_b is None else Side.empty(d_sae_b, device)
        n = n_pairs(d_sae, d_sae_b)
        # The last place is not a pair: padding of a rectangle is added there.
        self._together: Tensor | None = torch.zeros(n + 1, dtype=torch.int32, device=device)
        self._products = torch.zeros(n + 1, dtype=torch.float64, device=device) if products else None

    @torch.no_grad()
    def update(
        self,
        latents: Float[Tensor, "tokens d_sae"] | SparseLatents,
        latents_b: Float[Tensor, "tokens d_sae_b"] | SparseLatents | None = None,
    ) -> None:
        """Add a batch of tokens, which may be empty.

        Args:
            latents: of the first SAE.
            latents_b: of the second, on the same tokens, if there is one.

        Raises:
            ValueError: if the shapes do not fit, if a second SAE's latents are missing or too many, if `result` has
                been called, or after 2**31 tokens, past which counts would not fit.
        """
        self._check(latents, latents_b)
        sides = [(self._a, latents)] + ([] if latents_b is None else [(self._b, latents_b)])
        step = max(1, _DENSE // max(_width(acts) for _, acts in sides))
        for start in range(0, latents.shape[0], step):
            active = [_active(acts, slice(start, start + step), self._together.device) for _, acts in sides]
            for (side, _), acts in zip(sides, active, strict=True):
                side.add(acts.latent, acts.act)
            self._add_pairs(active[0], active[-1])
            self.n_tokens += active[0].n_tokens

    def merge(self, other: CoactivationStream) -> None:
        """Add the tokens of `other`, which is not changed.

        Raises:
            ValueError: if it counts other pairs, or the result of either has been taken.
        """
        self._check_open()
        other._check_open()
        mine, others = self._shape(), other._shape()
        if mine != others:
            raise ValueError(explain(f"a stream of {others} cannot go into one of {mine}.", want="the same of both"))
        self._check_countable(other.n_tokens)
        self._together += other._together.to(self._together.device)
        if self._products is not None:
            self._products += other._products.to(self._products.device)
        self._a.merge(other._a)
        if self._b is not self._a:
            self._b.merge(other._b)
        self.n_tokens += other.n_tokens

    def result(self) -> Coactivation:
        """Counts of all tokens so far. The tables are not copied: the stream accepts no tokens afterwards.

        Raises:
            ValueError: if there were no tokens, or it has been called before.
        """
        self._check_open()
        if self.n_tokens == 0:
            raise ValueError(explain("no tokens to measure.", want="at least one row"))
        together, products = self._together, self._products
        self._together = self._products = None
        second = None if self._b is self._a else self._b
        return Coactivation(self.n_tokens, self._a, second, together[:-1], None if products is None else products[:-1])

    def _add_pairs(self, a: SparseLatents, b: SparseLatents) -> None:
        n_a = torch.bincount(a.token, minlength=a.n_tokens)
        n_b = n_a if b is a else torch.bincount(b.token, minlength=b.n_tokens)
        for tokens, width_a, width_b in _rectangles(n_a, n_b):
            latent_a, act_a, mask_a = _pad(a, n_a, tokens, width_a)
            latent_b, act_b, mask_b = (latent_a, act_a, mask_a) if b is a else _pad(b, n_b, tokens, width_b)
            for i, j in _slots(width_a, width_b, a is b, _PAIRS // len(tokens), a.device):
                first, second = latent_a[:, i], latent_b[:, j]
                pair = triangle(first, second, a.d_sae) if b is a else first * b.d_sae + second
                pair = torch.where(mask_a[:, i] & mask_b[:, j], pair, len(self._together) - 1).flatten()
                self._together.scatter_add_(0, pair, pair.new_ones((), dtype=torch.int32).expand(len(pair)))
                if self._products is not None:
                    self._products.scatter_add_(0, pair, (act_a[:, i] * act_b[:, j]).flatten())

    def _shape(self) -> str:
        second = "" if self._b is self._a else f" x {len(self._b.fired):,}"
        return f"{len(self._a.fired):,}{second} latents {'with' if self._products is not None else 'without'} products"

    def _check_open(self) -> None:
        if self._together is None:
            fix = "CoactivationStream(...), one per result; merge() adds streams"
            raise ValueError(explain("the result of this stream has been taken, and its tables with it.", fix=fix))

    def _check_countable(self, more: int) -> None:
        if self.n_tokens + more >= 2**31:
            raise ValueError(explain(f"{self.n_tokens + more:,} tokens are too many to count.", want="under 2**31"))

    def _check(self, latents: Tensor | SparseLatents, latents_b: Tensor | SparseLatents | None) -> None:
        self._check_open()
        two = self._b is not self._a
        if two != (latents_b is not None):
            got, want = ("one SAE", "two") if two else ("two SAEs", "one")
            raise ValueError(explain(f"update got the latents of {got}.", want=f"those of {want}, as at the start"))
        d, n = len(self._a.fired), latents.shape[0]
        shapes = [tuple(latents.shape)] + ([tuple(latents_b.shape)] if two else [])
        if shapes != [(n, d)] + ([(n, len(self._b.fired))] if two else []):
            want = f"[tokens, {d}]" + (f" and [tokens, {len(self._b.fired)}], the same tokens" if two else "")
            raise ValueError(explain(f"update got latents of shape {', '.join(map(str, shapes))}.", want=want))
        self._check_countable(n)


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

    def counts(self, rows: Indices, cols: Indices) -> Int[Tensor, "rows cols"]:
        """Tokens on which both latents fire; on the diagonal of one SAE, tokens on which the latent fires.

        Args:
            rows: latents.
            cols: latents, of the second SAE if there is one.

        Raises:
            ValueError: for an index out of range; likewise in the methods below.
        """
        return self._block(self.together, self.a.fired, *self._indices(rows, cols)).long()

    def phi(self, rows: Indices, cols: Indices) -> Float[Tensor, "rows cols"]:
        """Correlation of firing: 1 always together, 0 as by chance, -1 each exactly where the other does not fire.

        (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))
        """
        n, (i, j) = self.n_tokens, self._indices(rows, cols)
        fired_i, fired_j = self.a.fired[i].double(), self._second.fired[j].double()
        both = self._block(self.together, self.a.fired, i, j).double()
        spread_i, spread_j = (fired * (n - fired) for fired in (fired_i, fired_j))
        return _ratio(n * both - fired_i[:, None] * fired_j, spread_i.sqrt()[:, None] * spread_j.sqrt())

    def jaccard(self, rows: Indices, cols: Indices) -> Float[Tensor, "rows cols"]:
        """Fraction of the tokens on which either fires on which both fire: 1 always, 0 never together.

        n_ij / (n_i + n_j - n_ij)
        """
        i, j = self._indices(rows, cols)
        both = self._block(self.together, self.a.fired, i, j).double()
        return _ratio(both, self.a.fired[i].double()[:, None] + self._second.fired[j].double() - both)

    def correlation(self, rows: Indices, cols: Indices) -> Float[Tensor, "rows cols"]:
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
        self, latents: Indices, k: int = 10, *, by: str = "phi", min_together: int = 1
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
        sides = {"a": self.a} | ({} if self.b is None else {"b": self.b})
        tensors = {f"{name}.{key}": tensor for name, side in sides.items() for key, tensor in vars(side).items()}
        tensors |= {"together": self.together} | ({} if self.products is None else {"products": self.products})
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write(path, lambda fresh: save_file(tensors, fresh, metadata=metadata))
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
                with refuse_damage(str(path), _FORMAT):
                    facts = json.loads(metadata["json"])
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except FormatError:
            raise
        except (SafetensorError, ValueError) as error:
            raise FormatError(explain(f"{path} is not a safetensors file of ours: {error}.", want=_FORMAT)) from error
        with refuse_damage(str(path), _FORMAT):
            return cls._from_tensors(path, facts, tensors)

    @classmethod
    def _from_tensors(cls, path: str | Path, facts: dict, tensors: dict[str, Tensor]) -> Coactivation:
        n_tokens, latents = facts["n_tokens"], facts["latents"]
        if any(type(value) is not int or value < 0 for value in (n_tokens, *latents)) or len(latents) != 2:
            what = f"{path} is of {reprlib.repr(n_tokens)} tokens and {reprlib.repr(latents)} latents."
            raise FormatError(explain(what, want=_FORMAT))
        n, m = latents
        widths = {"a": n} | ({"b": m} if facts["two"] else {})
        want = {f"{side}.{name}": (d,) for side, d in widths.items() for name in ("fired", "total", "square")}
        pairs = (n_pairs(n, widths.get("b")),)
        want |= {name: pairs for name in ("together", "products") if name == "together" or name in tensors}
        if {name: tuple(t.shape) for name, t in tensors.items()} != want:
            what = f"{path} holds {', '.join(sorted(tensors)) or 'nothing'} of sizes that do not fit {n} latents."
            raise FormatError(explain(what, want=", ".join(want)))
        sides = {side: Side(*(tensors[f"{side}.{name}"] for name in ("fired", "total", "square"))) for side in widths}
        return cls(n_tokens, sides["a"], sides.get("b"), tensors["together"], tensors.get("products"))

    def __repr__(self) -> str:
        n, m = self.shape
        what = f"{n:,} latents" if self.b is None else f"{n:,} x {m:,} latents"
        never = int((self.a.fired == 0).sum())
        return f"Coactivation({what}, {self.n_tokens:,} tokens, {never:,} never fire)"

    @property
    def _second(self) -> Side:
        return self.a if self.b is None else self.b

    def _indices(self, rows: Indices, cols: Indices) -> tuple[Tensor, Tensor]:
        return self._index(rows, 0), self._index(cols, 1)

    def _index(self, latents: Indices, axis: int) -> Int[Tensor, " n"]:
        return indices_of(latents, "latents", self.shape[axis], repeats=True, of=self).to(self.together.device)

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
        for part in rows.split(max(1, _PAIRS // self.shape[1])) if len(rows) else ():
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


# -- pairs ---------------------------------------------------------------------------------------------------------


def n_pairs(d_sae: int, d_sae_b: int | None = None) -> int:
    """Number of pairs of different latents of one SAE, or of latents of one SAE with those of another."""
    return d_sae * (d_sae - 1) // 2 if d_sae_b is None else d_sae * d_sae_b


def needed_bytes(d_sae: int, d_sae_b: int | None = None, products: bool = True) -> int:
    """Bytes that a CoactivationStream takes at most, beyond the batch.

    Example:
        >>> needed_bytes(16_384) < 2 * 10**9, needed_bytes(32_768, products=False) < 2.4 * 10**9
        (True, True)
    """
    return n_pairs(d_sae, d_sae_b) * (12 if products else 4) + 24 * (d_sae + (d_sae_b or 0)) + _WORK


def _active(latents: Tensor | SparseLatents, tokens: slice, device: torch.device) -> SparseLatents:
    """Active latents of some tokens, in float64 on `device`."""
    if isinstance(latents, Tensor):
        latents = SparseLatents.from_dense(latents[tokens])
    elif tokens.stop - tokens.start < latents.n_tokens:
        latents = latents.select(torch.arange(latents.n_tokens, device=latents.device)[tokens])
    return SparseLatents(latents.token, latents.latent.long(), latents.act, latents.shape).to(device).to(torch.float64)


def _pad(
    latents: SparseLatents, n_active: Tensor, tokens: Int[Tensor, " some"], width: int
) -> tuple[Int[Tensor, "some width"], Float[Tensor, "some width"], Tensor]:
    """Latents and activations of some tokens side by side, and a mask of those that are active."""
    slot = torch.arange(width, device=tokens.device)
    mask = slot < n_active[tokens][:, None]
    index = torch.where(mask, latents.starts[tokens][:, None] + slot, 0)
    return latents.latent[index], latents.act[index], mask


def _width(latents: Tensor | SparseLatents) -> int:
    is_topk = isinstance(latents, SparseLatents) and latents.topk is not None
    return latents.topk.values.shape[1] if is_topk else latents.shape[1]


def _rectangles(a: Int[Tensor, " tokens"], b: Int[Tensor, " tokens"]) -> Iterator[tuple[Tensor, int, int]]:
    """Group tokens of similar L0, with the largest L0 on each side: little padding, and at most `_PAIRS` pairs."""
    order = a.argsort(descending=True)
    counts_a, max_b = a[order].tolist(), max(b.tolist(), default=0)
    start = 0
    while start < len(counts_a) and counts_a[start] and max_b:
        width_a, width_b = counts_a[start], counts_a[start] if a is b else max_b
        n = max(1, _PAIRS // (width_a * width_b))
        yield order[start : start + n], width_a, width_b
        start += n


def _slots(
    width_a: int, width_b: int, square: bool, limit: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of slots, i before j if both are of one SAE, about `limit` at a time."""
    step = max(1, limit // width_b)
    for start in range(0, width_a, step):
        rows = torch.arange(start, min(start + step, width_a), device=device)
        i, j = rows.repeat_interleave(width_b), torch.arange(width_b, device=device).repeat(len(rows))
        mask = j > i if square else slice(None)
        yield i[mask], j[mask]


def _check_fits(d_sae: int, d_sae_b: int | None, products: bool, max_bytes: int) -> None:
    if d_sae < 1 or (d_sae_b is not None and d_sae_b < 1):
        raise ValueError(explain(f"CoactivationStream got d_sae={d_sae}, d_sae_b={d_sae_b}.", want="at least 1"))
    needed = needed_bytes(d_sae, d_sae_b, products)
    if needed > max_bytes:
        second = "" if d_sae_b is None else f" x {d_sae_b:,}"
        what = f"pairs of {d_sae:,}{second} latents take {needed:,} bytes, and max_bytes is {max_bytes:,}."
        want = "more memory, no products (a third), or latents[:, chosen] of the ones you ask about"
        raise ValueError(explain(what, want=want, fix=f"max_bytes={needed}" + (", products=False" * products)))


def triangle(i: Int[Tensor, "..."], j: Int[Tensor, "..."], n: int) -> Int[Tensor, "..."]:
    """Index of the pair {i, j} in a table of all pairs below `n`: row by row, the larger index running."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return low * (2 * n - low - 1) // 2 + high - low - 1


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient; nan where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)
