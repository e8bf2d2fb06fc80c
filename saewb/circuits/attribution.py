"""Attribution: effects of latents at positions on a metric of the logits, and edges between latents of two SAEs.

The error of an SAE is a node like its latents. Nothing is attached at their points: effects are about the model's own
activations there. The formulas are in `attribute`, the steps in `saewb.circuits.attribution_nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
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
    ablate_nodes,
    differentiate,
    integrate_gradients,
    prepare_attribution,
    split_into_nodes,
)
from saewb.errors import explain
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
    """Per SAE, the metric with decode(0) at its write point; nan unless integrated."""
    tokens: tuple[str, ...]
    """The prompt, token by token."""
    saes: tuple[str, ...]
    """Where each SAE writes."""
    sae: Int[Tensor, " nodes"]
    """Index of the node's SAE."""
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
        """Sums per SAE over latents and over errors, and the metric difference that integrated gradients sum to."""
        import pandas as pd

        is_error, masks = self.latent == ERROR, [self.sae == i for i in range(len(self.saes))]
        columns = {
            "sae": self.saes,
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

    The error's effect is computed like a latent's. Effects of several SAEs describe the same metric at several depths:
    they do not add up across SAEs. Integrated gradients are complete: per SAE, the effects of all latents and errors
    sum to `metric - metric with decode(0) at the SAE's point` (to a few per mille; `totals()` shows both).

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        saes: one or several SAEs or transcoders, each at the points its configuration names.
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
        TypeError: for a metric or prompt of another kind.

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
    with hook_points.lock(model), eval_mode(model, *(site.sae for site in run.sites)):
        _check_unmodified(run)
        value, clean = differentiate(run)
        for site, at_site in zip(run.sites, clean, strict=True):
            check_finite(f"activations at {site.hook_name!r}", at_site.x[run.plain])
            nodes, baseline = split_into_nodes(run, site, at_site), math.nan
            estimate = nodes.effect
            if method == "integrated":
                baseline, averaged = integrate_gradients(run, site, at_site, n_steps, batch_size)
                nodes = split_into_nodes(run, site, averaged)
            if method == "ablation":
                nodes = nodes.select(nodes.effect.abs().argsort(descending=True, stable=True)[:n_nodes])
                estimate = nodes.effect
                nodes = replace(nodes, effect=ablate_nodes(run, site, at_site, nodes, value, batch_size))
            nodes_of.append(nodes)
            estimates.append(estimate)
            baselines.append(baseline)
    fields = {f.name: _joined([getattr(nodes, f.name) for nodes in nodes_of]) for f in dataclass_fields(Nodes)}
    return Attribution(
        method=method,
        metric=value,
        baselines=tuple(baselines),
        tokens=_token_texts(run),
        saes=tuple(site.hook_name_out for site in run.sites),
        sae=torch.cat([torch.full((len(nodes.latent),), i) for i, nodes in enumerate(nodes_of)]),
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
    targets: Iterable[tuple[int, int]] | None = None,
    n_targets: int = 10,
    skip_special_tokens: bool | Sequence[int] = True,
) -> pd.DataFrame:
    """Attribute activations of a later SAE's latents to the latents of an earlier one.

        effect = a_i d_i . grad(b_j)         latent i of `sae_from` at one position, latent j of `sae_to` at another

    One backward pass per target, through the clean model.

    Args:
        model: as for `attribute`.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        sae_from: the earlier SAE, whose write point comes first in the model.
        sae_to: the later SAE, whose read point depends on it.
        metric: as for `attribute`; adds the column metric_effect = effect * d metric / d b_j, and chooses targets.
        targets: (position, latent) pairs of `sae_to`, active there; None means the `n_targets` with the largest
            gradient effect on the metric; or, without a metric, with the largest activations.
        n_targets: how many, if `targets` is None.
        skip_special_tokens: as for `attribute`.

    Returns:
        A row per edge, the strongest first: from_position, from_token, from_latent (missing: the error), to_position,
        to_token, to_latent, effect (in the unit of the later latent) and, given a metric, metric_effect.

    Raises:
        ValueError: if `sae_to` does not read after `sae_from` writes; for targets that are not active; as `attribute`.

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
    with hook_points.lock(model), eval_mode(model, sae_from, sae_to):
        _check_unmodified(run)
        _, (start, end) = differentiate(run)
        later = split_into_nodes(run, run.sites[1], end)
        later = _select_targets(run, later, targets, n_targets, by_effect=metric is not None)
        edges = [split_into_nodes(run, run.sites[0], replace(start, gradient=slope)) for slope in _slopes(run, later)]
    token_texts, frames = _token_texts(run), []
    for j, edge in enumerate(edges):
        positions, to = edge.position.tolist(), int(later.position[j])
        columns = {
            "from_position": positions,
            "from_token": [token_texts[i] for i in positions],
            "from_latent": _latent_column(edge.latent.cpu()),
            "to_position": to,
            "to_token": token_texts[to],
            "to_latent": int(later.latent[j]),
            "effect": _joined([edge.effect]).numpy(),
        }
        if metric is not None:
            columns["metric_effect"] = columns["effect"] * float(later.effect[j] / later.activation[j])
        frames.append(pd.DataFrame(columns))
    key = "effect" if metric is None else "metric_effect"
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values(key, key=abs, ascending=False, kind="stable", ignore_index=True)


def _check_unmodified(run: AttributionRun) -> None:
    """Check that no SAE is attached at the points: effects are about the model's own activations."""
    check_unmodified(run.model, [point for site in run.sites for point in site.points], steered=True)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated on the CPU; half precision, for which numpy has no type or few digits, as float32."""
    joined = torch.cat([part.detach().cpu() for part in parts])
    return joined.float() if joined.dtype in (torch.bfloat16, torch.float16) else joined


def _select_targets(
    run: AttributionRun, nodes: Nodes, targets: Iterable[tuple[int, int]] | None, n_targets: int, *, by_effect: bool
) -> Nodes:
    """The nodes of the later SAE that edges lead to."""
    nodes = nodes.select((nodes.latent != ERROR).nonzero()[:, 0])
    if targets is None:
        size = nodes.effect if by_effect else nodes.activation
        return nodes.select(size.abs().argsort(descending=True, stable=True)[:n_targets])
    indices = []
    for position, latent in targets:
        position = index_of(position, "position", run.tokens.shape[1], from_end=True)
        latent = index_of(latent, "latent", run.sites[1].d_sae)
        index = ((nodes.position == position) & (nodes.latent == latent)).nonzero()[:, 0]
        if len(index) == 0:
            active = nodes.latent[nodes.position == position].tolist()
            what = f"latent {latent} is not active at position {position} of {run.tokens.shape[1]}."
            want = f"one of {active[:12]}" if active else "a position with active latents"
            raise ValueError(explain(what, want=want))
        indices.append(index)
    if not indices:
        raise ValueError(explain("got no targets.", fix="targets=[(position, latent)]"))
    return nodes.select(torch.cat(indices))


def _slopes(run: AttributionRun, targets: Nodes) -> list[Tensor]:
    """For each target, the gradient of its activation where the earlier SAE writes: `[1, pos, d_out]` each."""
    early, late = run.sites
    tensors: dict[str, Tensor] = {}

    def add_leaf(activation: Tensor) -> Tensor:
        tensors["leaf"] = torch.zeros_like(activation, requires_grad=True)
        return activation + tensors["leaf"]

    def read(activation: Tensor) -> None:
        tensors["x"] = activation

    write_name, read_name = early.write.name, late.read.name
    if write_name == read_name:
        raise ValueError(_not_later(run))
    with torch.enable_grad():
        with hook_points.editing(run.model, {write_name: add_leaf, read_name: read}):
            stop = stop_layer(run.model, (write_name, read_name))
            run_to_layer(run.model, run.tokens, stop)
        latents, column = targets.latent.unique(return_inverse=True)
        acts = late.sae.encode(late.read_input(tensors["x"]), latents=latents)[0, targets.position, column]
        leaf = tensors["leaf"]
        slopes = [torch.autograd.grad(act, leaf, retain_graph=True, allow_unused=True)[0] for act in acts]
    if any(slope is None for slope in slopes):
        raise ValueError(_not_later(run))
    return [early.read_target(slope).to(early.sae.dtype) for slope in slopes]


def _not_later(run: AttributionRun) -> str:
    early, late = run.sites
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
