"""Attribution: effects of latents at positions on a metric of the logits, and edges between latents of two SAEs.

The error of an SAE is a node like its latents. Nothing is attached at their points: effects are about the model's own
activations there. The formulas are in `attribute`, the steps in `saewb.circuits.attribution_nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of
from saewb.circuits.attribution_nodes import (
    ERROR,
    AttributionRun,
    Metric,
    Nodes,
    SiteActivations,
    ablate_nodes,
    differentiate,
    integrate_gradients,
    prepare_attribution,
    split_into_nodes,
)
from saewb.errors import explain
from saewb.interventions.site import Site
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import eval_mode, stop_layer
from saewb.models.forward import run_to_layer
from saewb.models.tokenizer import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from saewb.features.index import FeatureIndex

Method = Literal["gradient", "integrated", "ablation"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Effects on a metric, of each active latent at each position and of each position's error. See `attribute`."""

    method: Method
    """How effects were computed."""
    metric: float
    """Metric of the clean model."""
    baselines: tuple[float, ...]
    """Per SAE, the metric with decode(0) at its write points; nan unless integrated."""
    tokens: tuple[str, ...]
    """The prompt, token by token."""
    saes: tuple[str, ...]
    """Where each SAE writes; of a cross-layer transcoder, where each of its layers does."""
    n_layers: tuple[int, ...]
    """Per SAE, how many of `saes` are its: 1, or the layers of a cross-layer transcoder."""
    sae: Int[Tensor, " nodes"]
    """Index of the node in `saes`."""
    position: Int[Tensor, " nodes"]
    """Index of the token, from 0."""
    latent: Int[Tensor, " nodes"]
    """Index of the latent; -1: the error."""
    activation: Float[Tensor, " nodes"]
    """Activation of the latent; norm of the error."""
    effect: Float[Tensor, " nodes"]
    """Effect on the metric, in its unit."""
    estimate: Float[Tensor, " nodes"]
    """Effect by the gradient."""

    def __len__(self) -> int:
        return len(self.effect)

    def to_frame(
        self, n: int | None = None, *, index: FeatureIndex | Mapping[str, FeatureIndex] | None = None
    ) -> pd.DataFrame:
        """The n strongest nodes, by |effect|; None means all. The error's latent is missing (`<NA>`).

        Args:
            n: number of nodes, at most.
            index: of the SAE, or of several by their names in `saes`: adds a column with the label of each latent.

        Raises:
            ValueError: for a latent that the index does not have.
        """
        import pandas as pd

        order = self.effect.abs().argsort(descending=True, stable=True)[:n]
        positions = self.position[order].tolist()
        columns = {
            "sae": [self.saes[i] for i in self.sae[order].tolist()],
            "position": positions,
            "token": [self.tokens[i] for i in positions],
            "latent": _latent_column(self.latent[order]),
            "activation": self.activation[order].numpy(),
            "effect": self.effect[order].numpy(),
        }
        if self.method != "gradient":
            columns["gradient_estimate"] = self.estimate[order].numpy()
        table = pd.DataFrame(columns)
        if index is not None:
            by_name = index if isinstance(index, Mapping) else dict.fromkeys(self.saes, index)
            nodes = zip(columns["sae"], self.latent[order].tolist(), strict=True)
            known = ((by_name.get(sae), latent) for sae, latent in nodes)
            table.insert(4, "label", ["" if x is None or i == ERROR else x.label(i) for x, i in known])
        return table

    def totals(self) -> pd.DataFrame:
        """Sums per SAE over latents and over errors, and the metric difference that integrated gradients sum to.

        A cross-layer transcoder has one row.
        """
        import pandas as pd

        is_error, ends = self.latent == ERROR, list(accumulate(self.n_layers, initial=0))
        masks = [(self.sae >= begin) & (self.sae < end) for begin, end in pairwise(ends)]
        names = [self.saes[begin:end] for begin, end in pairwise(ends)]
        columns = {
            "sae": [name[0] if len(name) == 1 else f"{name[0]} to {name[-1]}" for name in names],
            "latents": [float(self.effect[mask & ~is_error].sum()) for mask in masks],
            "errors": [float(self.effect[mask & is_error].sum()) for mask in masks],
            "metric_difference": [self.metric - baseline for baseline in self.baselines],
        }
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"Attribution({self.method}: {len(self)} nodes of {', '.join(self.saes)}; metric {self.metric:.4g})"

    def _repr_html_(self) -> str:
        return self.to_frame(20)._repr_html_()


@torch.inference_mode(False)  # gradients are needed, wherever it is called
def attribute(
    model: nn.Module,
    prompt: str | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    metric: Metric,
    *,
    method: Method = "gradient",
    n_steps: int = 20,
    n_nodes: int = 200,
    batch_size: int = 16,
    skip_special_tokens: bool | Sequence[int] = True,
) -> Attribution:
    """Attribute a metric of the logits to each latent at each position, and to the error of each SAE.

    At an SAE's write point the activation is decode(0) + sum_i a_i d_i + error, with d_i the latent's decoder direction
    in the model's units. With G the gradient of the metric there, per position:

        gradient:    effect_i = a_i d_i . G       G at the activation itself; one forward, one backward pass
        integrated:  the same, with G averaged on the straight path from decode(0) to the activation
        ablation:    effect_i = metric - metric without a_i d_i      exact; a row of a forward pass per node

    The error's effect is computed like a latent's. A latent of a cross-layer transcoder writes at its layer and all
    later ones, so its effect is of all that it writes: a_i sum_j d_ij . G_j, or the metric without a_i d_ij at every j.
    Every layer has errors of its own, and the path is that of all its write points at once.

    Effects of several SAEs describe the same metric at several depths: they do not add up across SAEs. Integrated
    gradients are complete: per SAE, the effects of all latents and errors sum to `metric - metric with decode(0) at the
    SAE's points` (to a few per mille; `totals()` shows both).

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        saes: one or several SAEs, transcoders or cross-layer transcoders, each at the points its configuration names.
        metric: a function of the logits `[1, pos, d_vocab]` that gives one number; or a token (text or id): its log
            probability as the next token; or two: the logit of the first less that of the second.
        method: "gradient" is quick and local, "integrated" complete, "ablation" exact, one run per node.
        n_steps: points on the path, for "integrated".
        n_nodes: for "ablation", how many nodes of each SAE: those with the largest gradient estimates.
        batch_size: copies of the prompt run at a time, for "integrated" and "ablation".
        skip_special_tokens: leave these positions as they are, without nodes: True for the tokenizer's BOS, EOS, PAD
            and the like, False for none, or ids.

    Returns:
        An Attribution: `.to_frame(n)`, `.totals()`.

    Raises:
        ValueError: for a hook or SAE that does not fit, or one attached at its points; a prompt of several texts, a
            metric that is not one number or not differentiable, a text of several tokens.
        TypeError: for a metric or prompt of another kind; for a crosscoder, whose latents describe one stream at every
            layer.

    References:
        Gradient and integrated gradients over latents and errors: Marks et al. 2024, arXiv:2403.19647; Sundararajan et
        al. 2017, arXiv:1703.01365.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> attribution = saewb.attribute(model, "Paris is the capital of", sae, " France")
        >>> attribution.to_frame(5).columns.tolist()
        ['sae', 'position', 'token', 'latent', 'activation', 'effect']
    """
    if method not in get_args(Method):
        want = "one of " + ", ".join(map(repr, get_args(Method)))
        raise ValueError(explain(f"attribute got method={method!r}.", want=want))
    n_steps, n_nodes = index_of(n_steps, "n_steps"), index_of(n_nodes, "n_nodes")
    if min(n_steps, n_nodes, batch_size) < 1:
        what = f"attribute got n_steps={n_steps}, n_nodes={n_nodes}, batch_size={batch_size}."
        raise ValueError(explain(what, want="1 or more of each"))
    run = prepare_attribution(model, prompt, saes, metric, skip_special_tokens)
    nodes_of: list[Nodes] = []
    estimates, baselines = [], []
    with hook_points.lock(model), eval_mode(model, *(sites[0].sae for sites in run.sites)):
        _check_unmodified(run)
        value, clean = differentiate(run)
        for at_sites in clean:
            for at in at_sites:
                check_finite(f"activations at {at.site.hook_name!r}", at.x[run.plain])
            nodes, baseline = split_into_nodes(run, at_sites), math.nan
            estimate = nodes.effect
            if method == "integrated":
                baseline, averaged = integrate_gradients(run, at_sites, n_steps, batch_size)
                nodes = split_into_nodes(run, averaged)
            if method == "ablation":
                nodes = nodes.select(nodes.effect.abs().argsort(descending=True, stable=True)[:n_nodes])
                estimate = nodes.effect
                nodes = replace(nodes, effect=ablate_nodes(run, at_sites, nodes, value, batch_size))
            nodes_of.append(nodes)
            estimates.append(estimate)
            baselines.append(baseline)
    fields = {f.name: _joined([getattr(nodes, f.name) for nodes in nodes_of]) for f in dataclass_fields(Nodes)}
    fields["sae"] = fields.pop("site")
    return Attribution(
        method=method,
        metric=value,
        baselines=tuple(baselines),
        tokens=_token_texts(run),
        saes=tuple(site.hook_name_out for site in run.all_sites),
        n_layers=tuple(map(len, run.sites)),
        estimate=_joined(estimates),
        **fields,
    )


@torch.inference_mode(False)
def attribute_edges(
    model: nn.Module,
    prompt: str | Tensor,
    sae_from: nn.Module,
    sae_to: nn.Module,
    *,
    metric: Metric | None = None,
    targets: Iterable[tuple[int, ...]] | None = None,
    n_targets: int = 10,
    skip_special_tokens: bool | Sequence[int] = True,
) -> pd.DataFrame:
    """Attribute activations of a later SAE's latents to the latents of an earlier one.

        effect = a_i d_i . grad(b_j)         latent i of `sae_from` at one position, latent j of `sae_to` at another

    One backward pass per target, through the clean model. Latent i of a cross-layer transcoder writes d_ik at several
    layers k, so its effect is the sum of a_i d_ik . grad(b_j) over those that come before latent j reads. Both SAEs may
    be one cross-layer transcoder: edges lead from its layers to later ones.

    Args:
        model: as for `attribute`.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        sae_from: the earlier SAE, whose write point comes first in the model; or a cross-layer transcoder.
        sae_to: the later SAE, whose read point depends on it; or a cross-layer transcoder.
        metric: as for `attribute`; adds the column metric_effect = effect * d metric / d b_j, and chooses targets.
        targets: (position, latent) pairs of `sae_to`, active there; (layer, position, latent) of a cross-layer
            transcoder, with the transformer block that it writes to. None means the `n_targets` with the largest
            gradient effect on the metric; or, without a metric, with the largest activations.
        n_targets: how many, if `targets` is None.
        skip_special_tokens: as for `attribute`.

    Returns:
        A row per edge, the strongest first: from_position, from_token, from_latent (missing: the error), to_position,
        to_token, to_latent, effect (in the unit of the later latent) and, given a metric, metric_effect. from_layer and
        to_layer (transformer blocks) of a cross-layer transcoder.

    Raises:
        ValueError: if `sae_to` does not read after `sae_from` writes; for targets that are not active, or to which no
            edge leads; as `attribute`.
        TypeError: as `attribute`.

    References:
        Marks et al. 2024, arXiv:2403.19647, section 3.1; Ge et al. 2024, arXiv:2405.13868.

    Example:
        >>> import saewb
        >>> from saewb.sae.sae import SAE, SAEConfig
        >>> model, later = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> earlier = SAE(SAEConfig(128, 256, activation="topk", k=8, hook="blocks.0.hook_resid_post"))
        >>> edges = attribute_edges(model, "Marie Curie was a physicist", earlier, later, n_targets=1)
        >>> edges[["from_position", "to_position"]].max().tolist(), edges.to_latent.nunique()
        ([9, 9], 1)
    """
    import pandas as pd

    metric_or_sum = metric if metric is not None else lambda logits: logits.sum()  # its value is not used
    run = prepare_attribution(model, prompt, [sae_from, sae_to], metric_or_sum, skip_special_tokens)
    early, late = run.sites
    with hook_points.lock(model), eval_mode(model, sae_from, sae_to):
        _check_unmodified(run)
        _, (start, end) = differentiate(run)
        reads = _record_reads(run)
        later = _select_targets(run, split_into_nodes(run, end), targets, n_targets, reads, metric is not None)
        edges = [_edges_to(run, start, slopes) for slopes in reads.slopes(later)]
    token_texts, frames = _token_texts(run), []
    for j, edge in enumerate(edges):
        positions, to = edge.position.tolist(), int(later.position[j])
        columns = {
            "from_layer": [run.all_sites[i].write.layer for i in edge.site.tolist()],
            "from_position": positions,
            "from_token": [token_texts[i] for i in positions],
            "from_latent": _latent_column(edge.latent.cpu()),
            "to_layer": run.all_sites[int(later.site[j])].write.layer,
            "to_position": to,
            "to_token": token_texts[to],
            "to_latent": int(later.latent[j]),
            "effect": _joined([edge.effect]).numpy(),
        }
        if metric is not None:
            columns["metric_effect"] = columns["effect"] * float(later.effect[j] / later.activation[j])
        one_layer = [name for name, sites in (("from_layer", early), ("to_layer", late)) if sites[0].clt_layer is None]
        frames.append(pd.DataFrame(columns).drop(columns=one_layer))
    key = "effect" if metric is None else "metric_effect"
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values(key, key=abs, ascending=False, kind="stable", ignore_index=True)


def _check_unmodified(run: AttributionRun) -> None:
    """Check that no SAE is attached at the points: effects are about the model's own activations."""
    check_unmodified(run.model, [point for site in run.all_sites for point in site.points], steered=True)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated on the CPU; half precision, for which numpy has no type or few digits, as float32."""
    joined = torch.cat([part.detach().cpu() for part in parts])
    return joined.float() if joined.dtype in (torch.bfloat16, torch.float16) else joined


@dataclass(frozen=True, eq=False)
class _Reads:
    """What the later SAE reads in a pass, as a function of zeros that were added where the earlier one writes."""

    run: AttributionRun
    leaves: dict[str, Tensor]
    """By write point of the earlier SAE."""
    read: dict[str, Tensor]
    """By read point of the later SAE."""

    @cached_property
    def is_reached(self) -> list[bool]:
        """Whether what each site of the later SAE reads depends on what the earlier one writes."""
        sums = (self.read[site.read.name].sum() for site in self.run.sites[1])
        return [any(slope is not None for slope in self._slopes(total)) for total in sums]

    def slopes(self, targets: Nodes) -> Iterator[list[Tensor | None]]:
        """For each target, the gradient of its activation where each site of the earlier SAE writes; None for none."""
        acts: dict[int, Tensor] = {}
        with torch.enable_grad():
            for i in targets.site.unique().tolist():
                site, here = self.run.all_sites[i], (targets.site == i).nonzero()[:, 0]
                latents, column = targets.latent[here].unique(return_inverse=True)
                some = site.encode(site.read_input(self.read[site.read.name]), latents=latents)
                acts |= dict(zip(here.tolist(), some[0, targets.position[here], column], strict=True))
        for _, act in sorted(acts.items()):
            yield self._slopes(act)

    def _slopes(self, value: Tensor) -> list[Tensor | None]:
        if not value.requires_grad:
            return [None] * len(self.run.sites[0])
        leaves = [self.leaves[site.write.name] for site in self.run.sites[0]]
        return list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))


def _record_reads(run: AttributionRun) -> _Reads:
    """Run the clean model to the last point that the later SAE reads.

    Raises:
        ValueError: if nothing that it reads depends on what the earlier one writes.
    """
    early, late = run.sites
    reads = _Reads(run, {}, {})

    def edit_of(name: str, written: bool) -> hook_points.Edit:
        def edit(activation: Tensor) -> Tensor | None:
            if written:
                reads.leaves[name] = torch.zeros_like(activation, requires_grad=True)
                activation = activation + reads.leaves[name]
            reads.read[name] = activation
            return activation if written else None

        return edit

    written, read = {site.write.name for site in early}, {site.read.name for site in late}
    if len(early) == len(late) == 1 and written == read:
        raise ValueError(_not_later(run))
    edits = {name: edit_of(name, name in written) for name in written | read}
    with torch.enable_grad(), hook_points.editing(run.model, edits):
        run_to_layer(run.model, run.tokens, stop_layer(run.model, (*written, *read)))
    if not any(reads.is_reached):
        raise ValueError(_not_later(run))
    return reads


def _edges_to(run: AttributionRun, start: Sequence[SiteActivations], slopes: Sequence[Tensor | None]) -> Nodes:
    """Nodes of the earlier SAE with their effects on a target, given its slopes; those that write before it only."""
    last = max(i for i, slope in enumerate(slopes) if slope is not None)
    at_sites = [
        replace(at, gradient=torch.zeros_like(at.gradient) if slope is None else _as_target(at.site, slope))
        for at, slope in zip(start, slopes, strict=True)
    ]
    nodes = split_into_nodes(run, at_sites)
    return nodes.select((nodes.site <= start[last].index).nonzero()[:, 0])


def _as_target(site: Site, slope: Tensor) -> Tensor:
    return site.read_target(slope).to(site.sae.dtype)


def _select_targets(
    run: AttributionRun,
    nodes: Nodes,
    targets: Iterable[tuple[int, ...]] | None,
    n_targets: int,
    reads: _Reads,
    by_effect: bool,
) -> Nodes:
    """The nodes of the later SAE that edges lead to."""
    first, late = len(run.sites[0]), run.sites[1]
    reached = torch.tensor(reads.is_reached, device=nodes.site.device)
    if targets is None:
        nodes = nodes.select(((nodes.latent != ERROR) & reached[nodes.site - first]).nonzero()[:, 0])
        size = nodes.effect if by_effect else nodes.activation
        return nodes.select(size.abs().argsort(descending=True, stable=True)[:n_targets])
    by_layer = {site.write.layer: i for i, site in enumerate(late)}
    indices = []
    for target in targets:
        layer = 0
        if late[0].clt_layer is not None:
            if len(target) != 3 or target[0] not in by_layer:
                want = f"(layer, position, latent) triples, with a layer of {sorted(by_layer)}"
                raise ValueError(explain(f"got the target {target!r} of {late[0].sae!r}.", want=want))
            layer = by_layer[target[0]]
        *_, position, latent = target
        position = index_of(position, "position", run.tokens.shape[1], from_end=True)
        latent = index_of(latent, "latent", late[layer].d_sae)
        if not reached[layer]:
            raise ValueError(_not_later(run, late[layer]))
        here = (nodes.site == first + layer) & (nodes.position == position) & (nodes.latent != ERROR)
        index = (here & (nodes.latent == latent)).nonzero()[:, 0]
        if len(index) == 0:
            active = nodes.latent[here].tolist()
            what = f"latent {latent} is not active at position {position} of {run.tokens.shape[1]}."
            want = f"one of {active[:12]}" if active else "a position with active latents"
            raise ValueError(explain(what, want=want))
        indices.append(index)
    if not indices:
        raise ValueError(explain("got no targets.", fix="targets=[(position, latent)]"))
    return nodes.select(torch.cat(indices))


def _not_later(run: AttributionRun, late: Site | None = None) -> str:
    early, late = run.sites[0][0], late or run.sites[1][0]
    written = f"{early.hook_name_out!r}, which {early.sae!r} writes"
    what = f"{late.read.name!r}, which {late.sae!r} reads, does not depend on {written}."
    return explain(what, want="sae_from earlier in the model than sae_to")


def _latent_column(latent: Tensor):
    import pandas as pd

    column = pd.array(latent.tolist(), dtype="Int64")
    column[(latent == ERROR).numpy()] = pd.NA
    return column


def _token_texts(run: AttributionRun) -> tuple[str, ...]:
    ids = run.tokens[0].tolist()
    has_tokenizer = getattr(run.model, "tokenizer", None) is not None
    return tuple(token_strings(run.model, ids) if has_tokenizer else map(str, ids))
