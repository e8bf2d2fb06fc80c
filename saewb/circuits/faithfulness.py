"""Faithfulness of a set of nodes: how much of a metric is left where all other latents and errors are at their means.

1. The mean of each latent, and of each SAE's error, over reference texts.
2. The nodes of the prompt, in the order of an attribution, a graph or a list.
3. For sets of the first 1, 2, 5, ... of them: a pass with all nodes outside of the set at their means, and one with
   those inside. A row of a forward pass each; nodes that are not ablated take the values they then have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of
from saewb.circuits.attribution import Attribution
from saewb.circuits.attribution_nodes import ERROR, AttributionRun, Metric, prepare_attribution, run_rows
from saewb.circuits.graph import AttributionGraph
from saewb.data.tokens import PASS_TOKENS, token_rows
from saewb.errors import explain
from saewb.interventions.site import Site
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_ids, special_mask

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RankedNodes = Union[Attribution, AttributionGraph, "Sequence[tuple[int, int, int | None]]"]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of all nodes: sizes of the sets of MIB, without the set of all."""
_PASS_BYTES = 2**29
"""Dense latents of one SAE in the rows of a pass, with and without ablation, about."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Metric with sets of nodes alone, and without them, against their sizes: the result of `saewb.faithfulness`."""

    sizes: Int[Tensor, " sets"]
    """Nodes in each set: 0 first, all last."""
    metrics: Float[Tensor, " sets"]
    """Metric where all nodes outside of the set are at their means."""
    complement_metrics: Float[Tensor, " sets"]
    """Metric where the nodes of the set are at their means."""

    @property
    def metric(self) -> float:
        """Metric of the clean model."""
        return float(self.metrics[-1])

    @property
    def metric_ablated(self) -> float:
        """Metric where all nodes are at their means."""
        return float(self.metrics[0])

    @property
    def shares(self) -> Float[Tensor, " sets"]:
        """Sizes over the number of nodes."""
        return self.sizes.double() / int(self.sizes[-1])

    @property
    def faithfulness(self) -> Float[Tensor, " sets"]:
        """(metric - metric_ablated) / (metric of the clean model - metric_ablated): 0 for no node, 1 for all."""
        return self._share(self.metrics)

    @property
    def complement_faithfulness(self) -> Float[Tensor, " sets"]:
        """The same of all nodes outside of the set: 0 where the set is complete."""
        return self._share(self.complement_metrics)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under `faithfulness` against `shares`, by trapezoids."""
        return float(torch.trapezoid(self.faithfulness, self.shares))

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between `faithfulness` and 1, |1 - faithfulness|, by trapezoids."""
        return float(torch.trapezoid((1 - self.faithfulness).abs(), self.shares))

    def _share(self, metrics: Tensor) -> Tensor:
        return (metrics - self.metric_ablated) / (self.metric - self.metric_ablated)

    def __len__(self) -> int:
        return len(self.sizes)

    def to_frame(self) -> pd.DataFrame:
        """A row per set: size, share, metric, faithfulness, complement_metric, complement_faithfulness."""
        import pandas as pd

        return pd.DataFrame(
            {
                "size": self.sizes.numpy(),
                "share": self.shares.numpy(),
                "metric": self.metrics.numpy(),
                "faithfulness": self.faithfulness.numpy(),
                "complement_metric": self.complement_metrics.numpy(),
                "complement_faithfulness": self.complement_faithfulness.numpy(),
            }
        )

    def plot(self) -> go.Figure:
        """Faithfulness of the sets, and of all nodes outside of them, against the number of nodes."""
        import plotly.graph_objects as go

        frame, figure = self.to_frame(), go.Figure()
        lines = {"the nodes alone": ("faithfulness", "#1f78b4"), "without them": ("complement_faithfulness", "#d95f02")}
        for name, (column, color) in lines.items():
            figure.add_scatter(
                x=[str(size) for size in frame["size"]],
                y=frame[column],
                name=name,
                mode="lines+markers",
                line={"color": color},
                customdata=frame[["share", column.replace("faithfulness", "metric")]],
                hovertemplate="%{x} nodes (%{customdata[0]:.1%}): %{y:.3f}"
                "<br>metric %{customdata[1]:.4g}<extra></extra>",
            )
        for level in (0, 1):
            figure.add_hline(y=level, line={"dash": "dash", "width": 1, "color": "#999999"})
        titles = {"xaxis_title": "nodes", "yaxis_title": "faithfulness"}
        layout = {"width": 700, "height": 400, "margin": {"l": 60, "r": 10, "t": 40, "b": 50}}
        return figure.update_layout(title=repr(self), **titles, **layout).update_xaxes(type="category")

    def __repr__(self) -> str:
        areas = f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"
        metrics = f"metric {self.metric:.4g}, ablated {self.metric_ablated:.4g}"
        return f"Faithfulness({len(self)} sets of {int(self.sizes[-1])} nodes: {areas}; {metrics})"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.to_frame()._repr_html_()}"


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    prompt: str | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    metric: Metric,
    nodes: RankedNodes,
    reference: Any,
    *,
    sizes: Iterable[int] | None = None,
    signed: bool = False,
    ctx_len: int = 128,
    batch_size: int = 16,
    skip_special_tokens: bool | Sequence[int] = True,
) -> Faithfulness:
    """Judge sets of nodes by ablating all others to their means: faithfulness, completeness, and their areas.

    Nodes are the latents of the SAEs at each position, and their errors. For a set C of them, with m the metric:

        faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none))     m(C): every node outside of C at its mean

    so it is 0 for no node and 1 for all, and may be more, or negative. `complement_faithfulness` is that of all nodes
    but C: what C lacks. It is 0 where C is complete. At each write point the activation becomes

        decode(latents of C as they are, means of others) + (the error as it is, or its mean)

    where "as they are" is in that pass: nodes respond to what is ablated before them. Means are over all tokens of the
    reference that are not special. The sets are the first 1, 2, 5, ... of the nodes in their order. All is the number
    of latents that are active in the clean run, plus the errors; inactive latents are in no set but that of all.

    Areas are over the share of nodes: CPR = integral of faithfulness, CMD = integral of |1 - faithfulness|. Where the
    nodes that are ranked are not all, the last set is joined to (1, 1) by a line.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        saes: as for `saewb.attribute`: one or several, or a cross-layer transcoder.
        metric: as for `saewb.attribute`.
        nodes: an Attribution of the same prompt and SAEs: by |effect|. Or an AttributionGraph of the same transcoders:
            its latents and errors that have influence, by it. Or (layer, position, latent) tuples, the most important
            first, with the transformer block that is written to, and None for the error.
        reference: texts, or token ids `[rows, pos]`, that means are taken over; as for `saewb.evaluate`.
        sizes: of the sets; None means those of MIB: shares of 0.001, 0.002, 0.005, 0.01, ..., 0.5 of all nodes, and
            the number of `nodes`.
        signed: rank an Attribution by its effects, those that raise the metric first, as MIB does for CPR.
        ctx_len: tokens per row of the reference, if it is texts.
        batch_size: sets per forward pass, at most.
        skip_special_tokens: as for `saewb.attribute`; these positions are not ablated.

    Returns:
        A Faithfulness: `.to_frame()`, `.plot()`, `.cpr`, `.cmd`.

    Raises:
        ValueError: for nodes of other SAEs, twice the same or none; a size beyond the number of nodes; a metric that
            does not change when all is ablated; as `saewb.attribute`.
        TypeError: for nodes of another kind; as `saewb.attribute`.

    References:
        Faithfulness and completeness: Marks et al. 2024, arXiv:2403.19647, section 3.2. CPR and CMD: Mueller et al.
        2025, arXiv:2504.13151, section 3.2.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> prompt, metric = "Paris is the capital of", " France"
        >>> nodes = saewb.attribute(model, prompt, sae, metric)
        >>> texts = [document.text for document in saewb.tiny.held_out_texts()[:4]]
        >>> curve = saewb.faithfulness(model, prompt, sae, metric, nodes, texts, sizes=[5, 50])
        >>> curve.to_frame().faithfulness.iloc[[0, -1]].tolist(), curve.sizes[:3].tolist()
        ([0.0, 1.0], [0, 5, 50])
    """
    if index_of(batch_size, "batch_size") < 1:
        raise ValueError(explain(f"faithfulness got batch_size={batch_size}.", want="1 or more"))
    run = prepare_attribution(model, prompt, saes, metric, skip_special_tokens)
    names = [site.write.name for site in run.all_sites]
    if twice := [site for site in run.all_sites if names.count(site.write.name) > 1]:
        what = f"{twice[0].sae!r} and {twice[1].sae!r} write at one point, {twice[0].hook_name_out!r}."
        raise ValueError(explain(what, want="one SAE per point"))
    rows = token_rows(model, reference, ctx_len)
    with hook_points.lock(model), eval_mode(model, *(sites[0].sae for sites in run.sites)):
        check_unmodified(model, [point for site in run.all_sites for point in site.points], steered=True)
        means = _means(model, run.sites, rows, special_ids(model, skip_special_tokens))
        ranked = _ranked(run, nodes, signed)
        n_nodes = _n_nodes(run)
        counts = _sizes(sizes, len(ranked), n_nodes)
        sets = [(size, inside) for size in counts for inside in (True, False)]
        widest = max(sum(site.d_sae for site in sites) for sites in run.sites)
        step = max(1, min(batch_size, _PASS_BYTES // (8 * widest * run.tokens.shape[1])))
        values: list[Tensor] = []
        for start in range(0, len(sets), step):
            some = sets[start : start + step]
            values += run_rows(run, _Ablation(run, means, ranked, some).edits(), len(some))
        (clean,) = run_rows(run, {}, 1)
        (ablated,) = run_rows(run, _Ablation(run, means, ranked, [(0, True)]).edits(), 1)
    table = torch.stack([value.cpu().double() for value in values]).reshape(-1, 2) if values else torch.zeros(0, 2)
    clean, ablated = float(clean), float(ablated)
    if not abs(clean - ablated) > 1e-6 * max(abs(clean), abs(ablated)):
        what = f"the metric is {clean:.6g}, and {ablated:.6g} with every node at its mean."
        raise ValueError(explain(what, want="a metric that depends on the prompt, at the points of the SAEs"))
    return Faithfulness(
        torch.tensor([0, *counts, n_nodes]),
        torch.tensor([ablated, *table[:, 0].tolist(), clean], dtype=torch.float64),
        torch.tensor([clean, *table[:, 1].tolist(), ablated], dtype=torch.float64),
    )


# -- means -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Means:
    """Mean activation of each latent of a site, and mean error."""

    latents: Float[Tensor, " d_sae"]
    error: Float[Tensor, " d_out"]


def _means(
    model: nn.Module, saes: Sequence[Sequence[Site]], rows: Int[Tensor, "rows pos"], special: Sequence[int]
) -> list[_Means]:
    """Means over the tokens of the reference that are not special, by site."""
    sites = [site for of_sae in saes for site in of_sae]
    device = next(model.parameters()).device
    latents = [torch.zeros(site.d_sae, dtype=torch.float64) for site in sites]
    errors = [torch.zeros(site.d_out, dtype=torch.float64) for site in sites]
    names, count = {point.name for site in sites for point in site.points}, 0
    for ids in rows.split(max(1, PASS_TOKENS // rows.shape[1])):
        plain = ~special_mask(ids, special)
        activations = capture(model, ids.to(device), names)
        count += int(plain.sum())
        i = 0
        for of_sae in saes:
            xs = [_read(site, activations) for site in of_sae]
            dense = [site.encode(x) for site, x in zip(of_sae, xs, strict=True)]
            for site, acts, recons in zip(of_sae, dense, _decode(of_sae, dense, xs), strict=True):
                target = site.read_target(activations[site.write.name]).to(recons.dtype)
                mask = plain.to(acts.device)
                check_finite(f"activations at {site.hook_name_out!r}", target[mask])
                latents[i] += acts[mask].sum(0, dtype=torch.float32).cpu().double()
                errors[i] += (target - recons)[mask].sum(0, dtype=torch.float32).cpu().double()
                i += 1
    if not count:
        raise ValueError(explain("the reference has no tokens but special ones.", want="texts"))
    means = zip(sites, latents, errors, strict=True)
    return [
        _Means((a / count).to(s.sae.dtype).to(s.sae.device), (e / count).to(s.sae.dtype).to(s.sae.device))
        for s, a, e in means
    ]


def _read(site: Site, activations: Mapping[str, Tensor]) -> Tensor:
    return site.read_input(activations[site.read.name]).to(site.sae.dtype)


def _decode(sites: Sequence[Site], dense: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of one SAE at its sites."""
    sae = sites[0].sae
    return [sae.decode(dense[0], xs[0])] if sites[0].clt_layer is None else sae.decode(dense, xs)


# -- sets ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Nodes in their order."""

    site: Int[Tensor, " nodes"]
    position: Int[Tensor, " nodes"]
    latent: Int[Tensor, " nodes"]
    """ERROR for the error."""

    def __len__(self) -> int:
        return len(self.site)


def _ranked(run: AttributionRun, nodes: RankedNodes, signed: bool) -> _Ranked:
    """Nodes in their order, each once."""
    sites = run.all_sites
    if isinstance(nodes, Attribution):
        names = tuple(site.hook_name_out for site in sites)
        if nodes.saes != names or len(nodes.tokens) != run.tokens.shape[1]:
            what = f"the attribution is of {', '.join(nodes.saes)} and {len(nodes.tokens)} tokens."
            raise ValueError(explain(what, want=f"one of {', '.join(names)} and {run.tokens.shape[1]} tokens"))
        effect = nodes.effect if signed else nodes.effect.abs()
        order = effect.argsort(descending=True, stable=True)
        return _Ranked(nodes.sae[order], nodes.position[order], nodes.latent[order])
    layers: dict[Any, list[int]] = {}
    for i, site in enumerate(sites):
        layers.setdefault(site.write.layer, []).append(i)
    if isinstance(nodes, AttributionGraph):
        if len(nodes.tokens) != run.tokens.shape[1]:
            what = f"the graph is of {len(nodes.tokens)} tokens, the prompt of {run.tokens.shape[1]}."
            raise ValueError(explain(what, want="the graph of this prompt"))
        frame = nodes.nodes[nodes.nodes["kind"].isin(["latent", "error"]) & (nodes.nodes["influence"] > 0)]
        frame = frame.sort_values("influence", ascending=False, kind="stable")
        # An MLP without a transcoder is an error of the graph, but no node here; nor are special positions.
        plain = run.plain[0].tolist()
        keep = frame["layer"].isin([layer for layer in layers if layer is not None]) & frame["position"].map(
            lambda position: plain[position]
        )
        frame = frame[keep]
        nodes = list(zip(frame["layer"], frame["position"], frame["latent"].fillna(ERROR), strict=True))
    elif isinstance(nodes, (str, bytes, Mapping)) or not isinstance(nodes, Iterable):
        want = "an Attribution, an AttributionGraph, or (layer, position, latent) tuples"
        raise TypeError(explain(f"got nodes={nodes!r}.", want=want))
    return _of_tuples(run, list(nodes), layers)


def _of_tuples(run: AttributionRun, nodes: Sequence[Any], layers: Mapping[Any, Sequence[int]]) -> _Ranked:
    rows: list[tuple[int, int, int]] = []
    for node in nodes:
        if not isinstance(node, (tuple, list)) or len(node) != 3:
            want = "(layer, position, latent), with None for the error"
            raise ValueError(explain(f"got {node!r} as a node.", want=want, fix="[(2, -1, 57), (2, -1, None)]"))
        layer, position, latent = node
        if len(layers.get(layer, ())) != 1:
            among = [i for i in layers if i is not None and len(layers[i]) == 1]
            raise ValueError(
                explain(f"{len(layers.get(layer, ()))} SAEs write at layer {layer!r}.", want=f"one of {among}")
            )
        (site,) = layers[layer]
        position = index_of(position, "position", run.tokens.shape[1], from_end=True)
        if not run.plain[0, position]:
            what = f"position {position} is a special token, where nothing is ablated."
            raise ValueError(explain(what, want="other positions", fix="skip_special_tokens=False"))
        is_error = latent is None or latent == ERROR
        latent = ERROR if is_error else index_of(latent, "latent", run.all_sites[site].d_sae)
        rows.append((site, position, latent))
    if not rows:
        raise ValueError(explain("got no nodes.", fix="nodes=saewb.attribute(model, prompt, saes, metric)"))
    if len(set(rows)) < len(rows):
        twice = nodes[next(i for i, row in enumerate(rows) if row in rows[:i])]
        raise ValueError(explain(f"the node {twice!r} is there twice.", want="each node once"))
    return _Ranked(*torch.tensor(rows).T)


def _n_nodes(run: AttributionRun) -> int:
    """Number of latents that are active in the clean run, and of errors, at positions that are not special."""
    names = {site.read.name for site in run.all_sites}
    activations = capture(run.model, run.tokens, names)
    n_plain = int(run.plain.sum())
    active = (site.encode(_read(site, activations))[0][run.plain[0]].count_nonzero() for site in run.all_sites)
    return sum(int(n) + n_plain for n in active)


def _sizes(sizes: Iterable[int] | None, n_ranked: int, n_nodes: int) -> list[int]:
    """Sizes of the sets between none and all."""
    if sizes is None:
        wanted = [*np.ceil(np.array(SHARES) * n_nodes - 1e-9).astype(int).tolist(), n_ranked]
        return sorted({size for size in wanted if 0 < size <= n_ranked and size < n_nodes})
    wanted = [index_of(size, "size") for size in sizes]
    if bad := [size for size in wanted if not 0 <= size <= n_ranked]:
        raise ValueError(
            explain(f"got the size {bad[0]}.", want=f"0 to {n_ranked}, the number of nodes that are ranked")
        )
    return sorted({size for size in wanted if 0 < size < n_nodes})


# -- ablation --------------------------------------------------------------------------------------------------------


class _Ablation:
    """Edits of a pass in which each row has another set of nodes, or all but these, and the rest at their means."""

    def __init__(
        self, run: AttributionRun, means: Sequence[_Means], ranked: _Ranked, sets: Sequence[tuple[int, bool]]
    ) -> None:
        """Prepare; a set is the number of the first nodes, and whether they are inside or all others are."""
        self.run, self.means, self.ranked, self.sets = run, means, ranked, sets

    def edits(self) -> dict[str, hook_points.Edit]:
        """By write and read points; an SAE reads an activation before it writes it, another one reads it after."""
        steps: dict[str, list[tuple[int, hook_points.Edit]]] = {}
        i = 0
        for sites in self.run.sites:
            state = _SAEPass(sites, [None] * len(sites), [None] * len(sites), [None] * len(sites))
            for k, site in enumerate(sites):
                steps.setdefault(site.read.name, []).append((0 if site.is_one_point else 2, self._reading(state, k, i)))
                steps.setdefault(site.write.name, []).append((1, self._writing(state, k, i)))
                i += 1
        return {name: hook_points.in_order(edits) for name, edits in steps.items()}

    def _reading(self, state: _SAEPass, k: int, i: int) -> hook_points.Edit:
        site = state.sites[k]

        def edit(activation: Tensor) -> None:
            x = site.read_input(activation).to(site.sae.dtype)
            state.xs[k], state.dense[k] = x, site.encode(x)
            kept = self._kept(i, site.d_sae, x.device)
            state.ablated[k] = torch.where(kept, state.dense[k], self.means[i].latents)

        return edit

    def _writing(self, state: _SAEPass, k: int, i: int) -> hook_points.Edit:
        site = state.sites[k]

        def edit(activation: Tensor) -> Tensor:
            target = site.read_target(activation)
            recons, ablated = state.decode(state.dense, k), state.decode(state.ablated, k)
            kept = self._kept_errors(i, target.device)[..., None]
            error = torch.where(kept, target - recons, self.means[i].error.to(recons.dtype))
            plain = self.run.plain[0].to(target.device)[None, :, None]
            return site.write_output(torch.where(plain, (ablated + error).to(target.dtype), target), activation)

        return edit

    def _kept(self, i: int, d_sae: int, device: torch.device) -> Tensor:
        """Mask of the latents of a site that are not ablated, `[rows, pos, d_sae]`."""
        inside = torch.tensor([is_inside for _, is_inside in self.sets])
        kept = (~inside)[:, None, None].expand(-1, self.run.tokens.shape[1], d_sae).clone()
        for row, (size, is_inside) in enumerate(self.sets):
            here = ((self.ranked.site[:size] == i) & (self.ranked.latent[:size] != ERROR)).nonzero()[:, 0]
            kept[row, self.ranked.position[here], self.ranked.latent[here]] = is_inside
        return kept.to(device)

    def _kept_errors(self, i: int, device: torch.device) -> Tensor:
        """Mask of the positions at which a site's error is not ablated, `[rows, pos]`."""
        inside = torch.tensor([is_inside for _, is_inside in self.sets])
        kept = (~inside)[:, None].expand(-1, self.run.tokens.shape[1]).clone()
        for row, (size, is_inside) in enumerate(self.sets):
            here = ((self.ranked.site[:size] == i) & (self.ranked.latent[:size] == ERROR)).nonzero()[:, 0]
            kept[row, self.ranked.position[here]] = is_inside
        return kept.to(device)


@dataclass(frozen=True, eq=False)
class _SAEPass:
    """Latents of one SAE in a pass, by site, as far as the pass has come."""

    sites: Sequence[Site]
    xs: list[Tensor | None]
    dense: list[Tensor | None]
    ablated: list[Tensor | None]

    def decode(self, dense: Sequence[Tensor | None], k: int) -> Tensor:
        """Output at one site."""
        site = self.sites[k]
        if site.clt_layer is None:
            return site.sae.decode(dense[k], self.xs[k])
        return site.sae.decode_layer(dense[: k + 1], k, self.xs[k])
