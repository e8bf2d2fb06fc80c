"""SAEs side by side: one table of figures from several sources, and which of them are on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from saewb.errors import explain, near
from saewb.evals.absorption import Absorption
from saewb.evals.meta_sae import MetaSAE
from saewb.evals.result import Evaluation
from saewb.evals.scr_tpp import ScrTpp

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BETTER: dict[str, bool] = {
    **dict.fromkeys(("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"), True),
    **dict.fromkeys(("explained_variance", "cosine", "mcc", "f1", "uniqueness"), True),
    **dict.fromkeys(("fvu", "mse", "kl", "ce_with_sae", "dead_frac", "absorption_fraction", "absorption_full"), False),
    **dict.fromkeys(("mean_max_decoder_cosine", "absorption_rate"), False),
}
"""Whether more is better, of figures that have a better side; `scr_20` and the like: more."""
OWN = "own"


def compare(*results: Any) -> Comparison:
    """Join results of SAEs into one table, a row per SAE, to compare them against L0.

    Args:
        results: tables of `evaluate_many`, `read_saebench` or `synthetic.score`; an Absorption or ScrTpp; and
            {name: result} of an Evaluation or MetaSAE, which have no names. Rows of one name are joined; random SAEs
            that are controls keep theirs.

    Returns:
        A Comparison: `to_frame()`, `plot()`, `pareto(figure)`.

    Raises:
        TypeError: for anything else.
        ValueError: if two results have one figure of one SAE.

    Example:
        >>> import pandas as pd
        >>> own = pd.DataFrame({"l0": [20.0], "fvu": [0.2]}, index=["mine"])
        >>> published = pd.DataFrame({"l0": [20.0, 50.0], "fvu": [0.3, 0.1], "source": "SAEBench"}, index=["a", "b"])
        >>> compare(own, published).pareto("fvu")
        ['mine', 'b']
    """
    if not results:
        raise ValueError(explain("compare got nothing.", want="results", fix="saewb.compare(table, absorption)"))
    rows: dict[str, dict[str, Any]] = {}
    for table in (table for result in results for table in _tables(result)):
        for name, row in table.iterrows():
            joined = rows.setdefault(str(name), {})
            for figure, value in row.items():
                if _is_missing(value):
                    continue
                if figure in joined and joined[figure] != value and figure not in _DESCRIPTION:
                    what = f"two results have {figure!r} of {str(name)!r}: {joined[figure]} and {value}."
                    raise ValueError(explain(what, want="another name for one of them"))
                joined.setdefault(figure, value)
    for row in rows.values():
        row.setdefault("source", OWN)
    import pandas as pd

    return Comparison(pd.DataFrame.from_dict(rows, orient="index").rename_axis("name"))


_DESCRIPTION = ("source", "release", "id", "model", "hook", "architecture", "d_sae", "sae", "hook_out", "n_tokens")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _tables(result: Any) -> list[pd.DataFrame]:
    """Tables indexed by the names of SAEs."""
    import pandas as pd

    if isinstance(result, pd.DataFrame):
        return [result]
    if isinstance(result, Absorption):
        names = {"fraction": "absorption_fraction", "full": "absorption_full"}
        return [result.summary()[["f1_1", "fraction", "full", "n_split"]].rename(columns=names)]
    if isinstance(result, ScrTpp):
        wide = result.summary().pivot(index="sae", columns="n", values="score")
        return [wide.rename(columns=lambda n: f"{result.metric}_{n}")]
    if isinstance(result, Mapping):
        return [_one(name, value) for name, value in result.items()]
    what = f"compare got a {type(result).__name__}."
    fix = "saewb.compare({'mine': evaluation})" if isinstance(result, (Evaluation, MetaSAE)) else ""
    raise TypeError(explain(what, want="a table, an Absorption, a ScrTpp, or {name: result}", fix=fix))


def _one(name: str, value: Any) -> pd.DataFrame:
    import pandas as pd

    if isinstance(value, Evaluation):
        figures: dict[str, Any] = value.figures()
    elif isinstance(value, MetaSAE):
        figures = {"meta_explained_variance": float(value.table.explained_variance["decoder"])}
    else:
        want = "an Evaluation or a MetaSAE; Absorption and ScrTpp have names themselves"
        raise TypeError(explain(f"compare got a {type(value).__name__} named {name!r}.", want=want))
    return pd.DataFrame([figures], index=[name])


def is_pareto(cost: Float[np.ndarray, " rows"], gain: Float[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    """Rows than which no other has at most the cost and at least the gain, and one of them better; never nan.

    Example:
        >>> is_pareto(np.array([1.0, 2.0, 2.0]), np.array([1.0, 0.5, 3.0])).tolist()
        [True, False, True]
    """
    valid = ~(np.isnan(cost) | np.isnan(gain))
    order = np.lexsort((-gain, cost))
    order = order[valid[order]]
    front, best, at = np.zeros(len(cost), bool), -np.inf, np.nan
    for i in order:
        if gain[i] > best or (gain[i] == best and cost[i] == at):
            front[i], best, at = True, gain[i], cost[i]
    return front


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Result of `compare`: `to_frame()` has a row per SAE; `plot()` draws figures against L0, with Pareto fronts."""

    table: pd.DataFrame
    """The rows of `to_frame`."""

    def to_frame(self) -> pd.DataFrame:
        """A row per SAE and a column per figure, nan where it was not measured; `source` is "own" or "SAEBench"."""
        return self.table.copy()

    def figures(self) -> list[str]:
        """Figures that have a better side and were measured of one SAE at least."""
        return [name for name in self.table if self._better(name) is not None and self.table[name].notna().any()]

    def pareto(self, figure: str, against: str = "l0") -> list[str]:
        """Names of the SAEs on the front: no other is as good in both and better in one. By the second figure.

        Args:
            figure: one of `figures()`.
            against: a figure of which less is better.

        Raises:
            ValueError: for a figure that is not there, or has no better side.
        """
        front = self._front(figure, against)
        part = self.table[front]
        return [str(name) for name in part.sort_values(against, kind="stable").index]

    def plot(self, figures: Sequence[str] | None = None, against: str = "l0") -> go.Figure:
        """Figures against L0, a panel each: an SAE is a point, one's own in color, published ones gray; with fronts.

        Args:
            figures: which; None draws the first six of `figures()`.
            against: the x axis, logarithmic where all values are above 0.
        """
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        names = list(figures) if figures is not None else [n for n in self.figures() if n != against][:6]
        if not names:
            what = "nothing to draw: no SAE has a figure with a better side."
            raise ValueError(explain(what, want=f"some of {', '.join(BETTER)}"))
        columns = min(3, len(names))
        figure = make_subplots(rows=-(-len(names) // columns), cols=columns, subplot_titles=names)
        for i, name in enumerate(names):
            place = {"row": i // columns + 1, "col": i % columns + 1}
            front = self.table[self._front(name, against)].sort_values(against)
            line = {"color": "#222222", "width": 1, "shape": "hv"}
            figure.add_scatter(
                x=front[against], y=front[name], mode="lines", line=line, name="Pareto front", hoverinfo="skip",
                showlegend=i == 0, legendgroup="front", **place,
            )  # fmt: skip
            for source, part in self.table.groupby("source", sort=False):
                style = _STYLE.get(str(source), _STYLE[OWN])
                figure.add_scatter(
                    x=part[against], y=part[name], mode="markers", marker=style, name=str(source),
                    text=[str(n) for n in part.index], showlegend=i == 0, legendgroup=str(source), **place,
                )  # fmt: skip
            figure.update_xaxes(title_text=against, **place)
        if bool((self.table[against].dropna() > 0).all()):
            figure.update_xaxes(type="log")
        height = 320 * -(-len(names) // columns) + 40
        assert isinstance(figure, go.Figure)
        return figure.update_layout(width=330 * columns + 120, height=height, title=repr(self))

    def _better(self, figure: str) -> bool | None:
        if str(figure).split("_")[0] in ("scr", "tpp") and str(figure).split("_")[-1].isdigit():
            return True
        return BETTER.get(figure)

    def _front(self, figure: str, against: str) -> Bool[np.ndarray, " rows"]:
        for name in (figure, against):
            if name not in self.table:
                columns = [str(column) for column in self.table]
                what = f"there is no figure {name!r}."
                raise ValueError(explain(what, near=near(name, columns), want=", ".join(self.figures())))
        better = self._better(figure)
        if better is None:
            raise ValueError(explain(f"{figure!r} has no better side.", want=", ".join(self.figures())))
        gain = self.table[figure].to_numpy(float) * (1 if better else -1)
        return is_pareto(self.table[against].to_numpy(float), gain)

    def __repr__(self) -> str:
        counts = self.table.source.value_counts(sort=False)
        parts = [f"{n} {'own' if name == OWN else name}" for name, n in counts.items()]
        return f"Comparison({len(self.table)} SAEs: {', '.join(parts)}; {len(self.figures())} figures)"

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3g}".format)


_STYLE = {OWN: {"size": 10, "color": "#d95f02", "symbol": "diamond"}, "SAEBench": {"size": 6, "color": "#9a9a9a"}}
