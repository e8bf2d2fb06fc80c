"""Compare two models, or two points of one, by the latents of a crosscoder: whose each latent is, and whether truly.

Decoder norms alone overstate what is of one model only: an L1 penalty shrinks a weak block to 0 though the feature is
in both ("complete shrinkage"), and a feature of both may be split into one latent of each ("decoupling"). Latent
scaling tells them apart: a latent is fitted to what its crosscoder leaves out of, or says about, the other model.

    beta^m = argmin_beta  sum over tokens of |Y^m - beta f d|^2  =  (d^T Y^mT f) / (|f|^2 |d|^2)

with f the activations of latent i and d its block in the model that it belongs to. For the error Y^m = x^m - x_hat^m +
f d^m, for the reconstruction Y^m = x_hat^m; nu is beta of the other model over beta of its own. High `nu_error`: the
other model has the feature, and the latent's block there was shrunk. High `nu_rec`: other latents write it there.

References:
    Minder et al. 2025, arXiv:2504.02922 (latent scaling, the two artefacts); Lindsey et al. 2024,
    transformer-circuits.pub/2024/crosscoders (relative norms).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saewb.data.stream import ActivationStream
from saewb.errors import explain, near
from saewb.metrics import Reconstruction, ReconstructionStream, float64
from saewb.models.capture import Activations
from saewb.sae.crosscoder import CrossCoderSAE
from saewb.sae.sparse import SparseLatents
from saewb.stats.firing import FiringStream

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_COLORS = ("#d95f02", "#7570b3", "#1f78b4", "#999999")  # of one, of both, of the other, between
_ONLY, _SHARED = 0.1, (0.4, 0.6)


@dataclass(frozen=True, eq=False)
class ModelDiff:
    """Latents of a crosscoder by the model they belong to: a table with a row per latent, and its plot.

    Columns are also items and attributes: `diff["delta_norm"]`, `diff.density`.
    """

    table: pd.DataFrame = field(repr=False)
    """A row per latent, see `diff`."""
    points: tuple[str, str]
    """The two that are compared."""
    n_tokens: int
    """Tokens of the statistics."""
    reconstruction: Mapping[str, Reconstruction]
    """How well each point is reconstructed, in the models' units."""

    def to_frame(self) -> pd.DataFrame:
        """The table, copied."""
        return self.table.copy()

    def __getitem__(self, column: Any) -> Any:
        return self.table[column]

    def __getattr__(self, name: str) -> pd.Series:
        table = self.__dict__.get("table")
        if table is None or name.startswith("_") or name not in table.columns:
            raise AttributeError(f"ModelDiff has no {name!r}")
        return table[name]

    def __len__(self) -> int:
        return len(self.table)

    def counts(self) -> dict[str, int]:
        """Number of latents that fire, by class."""
        return self.table[self.table.density > 0]["class"].value_counts().to_dict()

    def plot(self) -> go.Figure:
        """Delta norms of all latents that fire, and nu of those that latent scaling was computed for."""
        from plotly.subplots import make_subplots

        a, b = self.points
        names = (f"{a} only", "shared", f"{b} only", "between")
        titles = ("norms of the decoder blocks", "latent scaling")
        figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
        fires = self.table[self.table.density > 0]
        for name, color in zip(names, _COLORS, strict=True):
            part = fires[fires["class"] == name]
            bins = {"xbins": {"start": 0, "end": 1.02, "size": 0.02}, "marker": {"color": color}}
            figure.add_histogram(x=part.delta_norm, name=name, legendgroup=name, **bins, row=1, col=1)
            scaled = part[part.nu_error.notna() & part.nu_rec.notna()]
            figure.add_scatter(
                x=scaled.nu_error,
                y=scaled.nu_rec,
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"color": color, "size": 6, "opacity": 0.8},
                customdata=scaled[["delta_norm", "density", "cosine"]].assign(latent=scaled.index).to_numpy(),
                hovertemplate="latent %{customdata[3]:.0f}<br>delta norm %{customdata[0]:.3f}<br>"
                "density %{customdata[1]:.2%}<br>cosine %{customdata[2]:.2f}<extra></extra>",
                row=1,
                col=2,
            )
        figure.update_xaxes(title=f"delta norm (0: {a} only, 1: {b} only)", range=[-0.02, 1.04], row=1, col=1)
        figure.update_yaxes(title="latents", type="log", row=1, col=1)
        figure.update_xaxes(title="nu of the error (1: shrunk)", row=1, col=2)
        figure.update_yaxes(title="nu of the reconstruction (1: decoupled)", row=1, col=2)
        title = f"{a} and {b}: {len(fires):,} of {len(self):,} latents fire on {self.n_tokens:,} tokens"
        return figure.update_layout(barmode="stack", title=title, width=900, height=420, bargap=0.02)

    def __str__(self) -> str:
        lines = [f"{n:,} {name}" for name, n in self.counts().items()]
        fvu = [f"{point} {one.fvu:.3f}" for point, one in self.reconstruction.items()]
        return f"ModelDiff({', '.join(lines)}; fvu {', '.join(fvu)}; {self.n_tokens:,} tokens)"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        shown = self.table.sort_values("delta_norm")
        return f"<div>{html.escape(str(self))}</div>{shown._repr_html_()}"


@torch.no_grad()
def diff(
    crosscoder: CrossCoderSAE,
    activations: Mapping[str, Tensor] | Activations | ActivationStream,
    *,
    points: tuple[str, str] | None = None,
    n_tokens: int = 1_000_000,
    n_scaled: int = 1000,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> ModelDiff:
    """Which latents of a crosscoder belong to one model alone, and which of those truly; a row per latent.

    Columns:

        norm_a, norm_b       length of what the latent writes in each, in the crosscoder's normalized units
        delta_norm           ((norm_b - norm_a) / max(norm_a, norm_b) + 1) / 2: 0 only a, .5 shared, 1 only b
        class                "a only" below .1, "shared" .4 to .6, "b only" above .9, else "between"
        cosine               between its two directions; NaN where their widths differ
        density              fraction of tokens on which it fires; n_active of them, mean_activation there
        nu_error, nu_rec     latent scaling, see `saewb.evals.diffing`: near 0 for a latent of one model alone;
                             NaN for latents for which it is not computed, or that do not fire
        beta_error_a, ...    the fits, with r2_error_a, ...: 1 - |Y - beta f d|^2 / |Y|^2 on tokens where it fires

    Latent scaling is computed for the `n_scaled` latents whose delta norm is farthest from .5. Memory: 4 n_scaled d
    numbers of float64, and one batch.

    Args:
        crosscoder: of two points or more.
        activations: held-out activations by point, `[tokens, d]`; or a stream of them, of which tokens are taken.
        points: the two to compare; None means the first two of the crosscoder.
        n_tokens: tokens at most.
        n_scaled: latents for which latent scaling is computed.
        batch_tokens: tokens at a time; of a stream its own batches.
        progress: show a progress bar.

    Returns:
        A ModelDiff: `.table` and `.plot()`; columns are items and attributes of it.

    Raises:
        TypeError: for an SAE of another kind.
        ValueError: for a point that the crosscoder or the activations do not have, or without a token.

    Example:
        >>> import saewb
        >>> cfg = saewb.CrossCoderConfig(points=("a", "b"), widths=(2, 2), d_sae=3)
        >>> tensors = {"W_enc": torch.eye(4)[:, :3], "W_dec": torch.eye(4)[:3], "b_enc": torch.zeros(3)}
        >>> tensors |= {"b_dec": torch.zeros(4), "mean": torch.zeros(4), "scale": torch.ones(4)}
        >>> cross = CrossCoderSAE.from_tensors(cfg, tensors)
        >>> result = diff(cross, {"a": torch.eye(2) + 1, "b": torch.eye(2) + 1})
        >>> result.delta_norm.tolist(), result["class"].tolist(), result.density.tolist()
        ([0.0, 0.0, 1.0], ['a only', 'a only', 'b only'], [1.0, 1.0, 1.0])
    """
    import pandas as pd

    pair = _pair(crosscoder, points)
    spans = crosscoder.cfg.spans
    a, b = (float64(crosscoder.W_dec[:, spans[point]]) for point in pair)
    norms = torch.stack([a.norm(dim=1), b.norm(dim=1)])
    largest = norms.amax(0)
    delta = torch.where(largest > 0, ((norms[1] - norms[0]) / largest + 1) / 2, torch.nan)
    same_width = a.shape[1] == b.shape[1]
    far = (delta - 0.5).abs().nan_to_num(-1).argsort(descending=True, stable=True)
    candidates = far[: n_scaled if same_width else 0].sort().values.to(crosscoder.device)
    scaling = _LatentScaling(crosscoder, pair, candidates)
    firing, streams = FiringStream(), {point: ReconstructionStream() for point in crosscoder.cfg.points}
    n_done = 0
    with tqdm(total=n_tokens, disable=not progress, unit="token") as bar:
        for batch in _batches(crosscoder, activations, n_tokens, batch_tokens):
            z = crosscoder.encode_sparse(batch)
            firing.update(z)
            scaling.update(batch, z)
            recons = crosscoder.decode(z)
            for point, span in spans.items():
                streams[point].update(batch[:, span], recons[:, span])
            n_done += len(batch)
            bar.update(len(batch))
    if not n_done:
        raise ValueError(explain("diff got no token.", want="activations by point, [tokens, d]"))
    fired = firing.result()
    counts = (fired.density * n_done).round().long()
    columns: dict[str, Any] = {f"norm_{point}": norm.cpu().numpy() for point, norm in zip(pair, norms, strict=True)}
    columns |= {"delta_norm": delta.cpu().numpy(), "class": _classes(delta, pair)}
    cosine = (a * b).sum(1) / norms.prod(0) if same_width else torch.full_like(delta, torch.nan)
    columns |= {"cosine": cosine.cpu().numpy(), "density": fired.density.cpu().numpy()}
    columns |= {"n_active": counts.cpu().numpy(), "mean_activation": fired.mean_activation.cpu().numpy()}
    for name, values in scaling.result().items():
        column = torch.full((crosscoder.d_sae,), torch.nan, dtype=torch.float64)
        column[candidates.cpu()] = values.cpu().double()
        columns[name] = column.numpy()
    table = pd.DataFrame(columns, index=pd.RangeIndex(crosscoder.d_sae, name="latent"))
    return ModelDiff(table, pair, n_done, {point: stream.result() for point, stream in streams.items()})


class _LatentScaling:
    """Sums from which the fits of some latents to errors and reconstructions follow, in normalized units."""

    def __init__(self, crosscoder: CrossCoderSAE, pair: tuple[str, str], latents: Int[Tensor, " some"]) -> None:
        self._cross, self._pair, self._latents = crosscoder, pair, latents
        self._spans = {point: crosscoder.cfg.spans[point] for point in pair}
        self._column = torch.full((crosscoder.d_sae,), -1, dtype=torch.long, device=latents.device)
        self._column[latents] = torch.arange(len(latents), device=latents.device)
        n, zeros = len(latents), float64(torch.zeros((), device=latents.device))
        self._square = zeros.new_zeros(n)  # |f|^2
        self._products = {key: zeros.new_zeros(n, s.stop - s.start) for key, s in self._keys()}  # f^T Y
        self._sizes = {key: zeros.new_zeros(n) for key, _ in self._keys()}  # |Y|^2 where f > 0

    def _keys(self) -> Iterator[tuple[tuple[str, str], slice]]:
        return (((target, point), span) for target in ("error", "rec") for point, span in self._spans.items())

    def update(self, x: Float[Tensor, "tokens d_in"], z: SparseLatents) -> None:
        """Add the tokens of a batch."""
        if not len(self._latents):
            return
        column = self._column[z.latent]
        inside = column >= 0
        f = torch.zeros(len(x), len(self._latents), dtype=z.act.dtype, device=x.device)
        f[z.token[inside], column[inside]] = z.act[inside]
        recons = z @ self._cross.W_dec + self._cross.b_dec
        values = {"error": self._cross.normalize_input(x) - recons, "rec": recons}
        self._square += float64(f.square().sum(0))
        active = (f != 0).to(f.dtype)
        for key, span in self._keys():
            y = values[key[0]][:, span]
            self._products[key] += float64(f.T @ y)
            self._sizes[key] += float64(active.T @ y.square().sum(1))

    def result(self) -> dict[str, Tensor]:
        """`nu`, `beta` and `r2` of each latent, by column; empty if there are no latents."""
        if not len(self._latents):
            return {name: self._square for name in ("nu_error", "nu_rec")}
        square = self._square
        blocks = {point: float64(self._cross.W_dec[self._latents, span]) for point, span in self._spans.items()}
        norms = torch.stack([block.norm(dim=1) for block in blocks.values()])
        of_b = norms[1] > norms[0]
        own = torch.where(of_b[:, None], *reversed(blocks.values()))
        columns, length = {}, own.square().sum(1)
        betas: dict[str, list[Tensor]] = {"error": [], "rec": []}
        for (target, point), _ in self._keys():
            product = (self._products[target, point] * own).sum(1)
            size = self._sizes[target, point]
            if target == "error":  # with what the latent itself writes there put back
                block = blocks[point]
                size = size + 2 * (self._products[target, point] * block).sum(1) + square * block.square().sum(1)
                product = product + square * (block * own).sum(1)
            beta = product / (square * length)
            betas[target].append(beta)
            columns[f"beta_{target}_{point}"] = beta
            columns[f"r2_{target}_{point}"] = product.square() / (square * length * size)
        for target, (beta_a, beta_b) in betas.items():
            columns[f"nu_{target}"] = torch.where(of_b, beta_a / beta_b, beta_b / beta_a)
        return {name: columns[name] for name in ("nu_error", "nu_rec", *(c for c in columns if c[:2] != "nu"))}


def _pair(crosscoder: CrossCoderSAE, points: tuple[str, str] | None) -> tuple[str, str]:
    if not isinstance(crosscoder, CrossCoderSAE):
        what = f"diff got a {type(crosscoder).__name__}."
        fix = "cross = saewb.train(None, stream, saewb.CrossCoder(d_sae=4096, k=32), n_tokens=...).wait().sae"
        raise TypeError(explain(what, want="a crosscoder", fix=fix))
    pair = crosscoder.cfg.points[:2] if points is None else tuple(points)
    for point in pair:
        if point not in crosscoder.cfg.points:
            what, known = f"{crosscoder!r} has no point {point!r}.", crosscoder.cfg.points
            raise ValueError(explain(what, near=near(point, known), want=", ".join(known)))
    if len(set(pair)) != 2:
        raise ValueError(explain(f"diff got points={pair}.", want="two different ones"))
    return pair[0], pair[1]


def _batches(
    crosscoder: CrossCoderSAE,
    activations: Mapping[str, Tensor] | Activations | ActivationStream,
    n_tokens: int,
    batch_tokens: int,
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """Activations of all points side by side, on the crosscoder's device, `n_tokens` of them at most."""
    if isinstance(activations, ActivationStream):
        batches: Iterator[Mapping[str, Tensor]] = (batch.values for batch in activations)
    else:
        values = activations.values if isinstance(activations, Activations) else activations
        rows = Activations({point: values[point] for point in crosscoder.cfg.points if point in values} or dict(values))
        starts = range(0, len(rows), batch_tokens)
        batches = (rows.rows(slice(start, start + batch_tokens)).values for start in starts)
    n_done = 0
    while n_done < n_tokens and (batch := next(batches, None)) is not None:
        part = {point: x[: n_tokens - n_done].to(crosscoder.device) for point, x in batch.items()}
        joined = crosscoder.join(part)
        n_done += len(joined)
        yield joined


def _classes(delta: Tensor, pair: tuple[str, str]) -> list[str]:
    named = []
    for value in delta.tolist():
        shared = _SHARED[0] <= value <= _SHARED[1]
        one_only = pair[0] if value < _ONLY else pair[1] if value > 1 - _ONLY else None
        named.append(f"{one_only} only" if one_only else "shared" if shared else "between")
    return named
