"""Which latents, at which positions, moved a figure of the model's output.

The error is a node like the latents. Nothing is attached, so each SAE's figures are about the model as it is. The
formulas are in `attribute`, the steps in `saewb.prompts.attribution_nodes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.errors import explain
from saewb.interventions import splice
from saewb.models import hook_points
from saewb.models.capture import eval_mode, stop_layer
from saewb.models.tokenizer import token_strings
from saewb.prompts.attribution_nodes import ERROR, Case, Metric, Nodes, ablated, case, gradients, integrated, nodes

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["gradient", "integrated", "ablation"]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Effects on a metric: one per latent that is active at a position, and per position's error. See `attribute`."""

    method: Method  # how effects were found
    metric: float  # of the model as it is
    baselines: tuple[float, ...]  # per SAE, the metric with decode(0) at its point; nan unless integrated
    tokens: tuple[str, ...]  # the prompt, token by token
    saes: tuple[str, ...]  # where each SAE writes
    sae: Int[Tensor, " nodes"]  # which of them the node belongs to
    position: Int[Tensor, " nodes"]  # of the token, from 0
    latent: Int[Tensor, " nodes"]  # -1: the error
    activation: Float[Tensor, " nodes"]  # of the latent; the error's length
    effect: Float[Tensor, " nodes"]  # on the metric, in its unit
    estimate: Float[Tensor, " nodes"]  # by gradient

    def __len__(self) -> int:
        return len(self.effect)

    def to_frame(self, n: int | None = None) -> pd.DataFrame:
        """The n strongest nodes, by |effect|; None means all. The error's latent is missing (`<NA>`)."""
        import pandas as pd

        order = self.effect.abs().argsort(descending=True, stable=True)[:n]
        positions = self.position[order].tolist()
        columns = {
            "sae": [self.saes[i] for i in self.sae[order].tolist()],
            "position": positions,
            "token": [self.tokens[i] for i in positions],
            "latent": _latents(self.latent[order]),
            "activation": self.activation[order].numpy(),
            "effect": self.effect[order].numpy(),
        }
        if self.method != "gradient":
            columns["gradient_estimate"] = self.estimate[order].numpy()
        return pd.DataFrame(columns)

    def totals(self) -> pd.DataFrame:
        """Per SAE: the sums over latents and over errors, and what integrated gradients have to sum to."""
        import pandas as pd

        is_error, owns = self.latent == ERROR, [self.sae == i for i in range(len(self.saes))]
        columns = {
            "sae": self.saes,
            "latents": [float(self.effect[own & ~is_error].sum()) for own in owns],
            "errors": [float(self.effect[own & is_error].sum()) for own in owns],
            "metric_difference": [self.metric - baseline for baseline in self.baselines],
        }
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"Attribution({self.method}: {len(self)} nodes of {', '.join(self.saes)}; metric {self.metric:.4g})"

    def _repr_html_(self) -> str:
        return self.to_frame(20)._repr_html_()


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
    """How much each latent at each position, and what each SAE leaves out, contributes to a figure of the logits.

    At the point an SAE writes to, the activation is decode(0) + sum_i a_i d_i + error: a latent's direction d_i is its
    decoder row, in the model's units. With G the gradient of the metric there, per position:

        gradient:    effect_i = a_i d_i . G       G at the activation itself; one forward, one backward pass
        integrated:  the same, with G averaged on the straight way from decode(0) to the activation
        ablation:    effect_i = metric - metric without a_i d_i      the truth; a row of a pass for each node

    The error's effect is computed like a latent's. Effects of several SAEs tell the same thing at several depths: they
    do not add up across SAEs. Integrated gradients are complete: per SAE, the effects of all latents and errors sum to
    `metric - metric with decode(0) at the SAE's point` (to a few per mille; `totals()` shows both).

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        saes: one or several SAEs or transcoders, each at the points its configuration names.
        metric: a function of the logits `[1, pos, d_vocab]` that gives one number; or a token (text or id): its log
            probability as the next token; or two: the logit of the first less that of the second.
        method: "gradient" is quick and local, "integrated" complete, "ablation" the truth, one run per node.
        n_steps: points of the way, for "integrated".
        n_nodes: for "ablation", how many nodes of each SAE: those with the largest gradient estimates.
        batch_size: copies of the prompt run at a time, for "integrated" and "ablation".
        skip_special_tokens: leave these positions as they are, without nodes: True for the tokenizer's BOS, EOS, PAD
            and the like, False for none, or ids.

    Returns:
        An Attribution: `.to_frame(n)`, `.totals()`.

    Raises:
        ValueError: for a hook or SAE that does not fit, a prompt of several texts, a metric that is not one number or
            not differentiable, a word of several tokens.
        TypeError: for a metric or prompt of another kind.

    References:
        Gradient and integrated gradients over latents and errors: Marks et al. 2024, arXiv:2403.19647; Sundararajan et
        al. 2017, arXiv:1703.01365.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
        >>> found = saewb.attribute(model, "Paris is the capital of", sae, " France")
        >>> found.to_frame(5).columns.tolist()
        ['sae', 'position', 'token', 'latent', 'activation', 'effect']
    """
    if method not in get_args(Method):
        want = "one of " + ", ".join(map(repr, get_args(Method)))
        raise ValueError(explain(f"attribute got method={method!r}.", want=want))
    if min(n_steps, n_nodes, batch_size) < 1:
        what = f"attribute got n_steps={n_steps}, n_nodes={n_nodes}, batch_size={batch_size}."
        raise ValueError(explain(what, want="1 or more of each"))
    asked = case(model, prompt, saes, metric, skip_special_tokens)
    parts: list[Nodes] = []
    estimates, baselines = [], []
    with hook_points.lock(model), eval_mode(model, *(site.sae for site in asked.sites)):
        value, seen = gradients(asked)
        for site, at in zip(asked.sites, seen, strict=True):
            found, baseline = nodes(asked, site, at), float("nan")
            estimate = found.effect
            if method == "integrated":
                baseline, averaged = integrated(asked, site, at, n_steps, batch_size)
                found = nodes(asked, site, averaged)
            if method == "ablation":
                found = found.at(found.effect.abs().argsort(descending=True, stable=True)[:n_nodes])
                estimate = found.effect
                found = replace(found, effect=ablated(asked, site, at, found, value, batch_size))
            parts.append(found)
            estimates.append(estimate)
            baselines.append(baseline)
    whole = {name: torch.cat([getattr(p, name) for p in parts]).cpu() for name in Nodes.__dataclass_fields__}
    which = torch.cat([torch.full((len(p.latent),), i) for i, p in enumerate(parts)])
    return Attribution(
        method=method,
        metric=value,
        baselines=tuple(baselines),
        tokens=_words(asked),
        saes=tuple(site.place for site in asked.sites),
        sae=which,
        estimate=torch.cat(estimates).cpu(),
        **whole,
    )


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
    """Paths from one SAE's latents to a later one's: what of a later activation each earlier latent accounts for.

        effect = a_i d_i . grad(b_j)         latent i of `sae_from` at one position, latent j of `sae_to` at another

    One backward pass for each target, through the model as it is.

    Args:
        model: as for `attribute`.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        sae_from: writes earlier in the model.
        sae_to: reads later.
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

    counted = metric if metric is not None else lambda logits: logits.sum()  # not looked at
    asked = case(model, prompt, [sae_from, sae_to], counted, skip_special_tokens)
    with hook_points.lock(model), eval_mode(model, sae_from, sae_to):
        _, (start, end) = gradients(asked)
        chosen = _targets(asked, nodes(asked, asked.sites[1], end), targets, n_targets, by_effect=metric is not None)
        slopes = _slopes(asked, chosen)
        edges = [nodes(asked, asked.sites[0], replace(start, gradient=slope)) for slope in slopes]
    words, frames = _words(asked), []
    for j, edge in enumerate(edges):
        positions, to = edge.position.tolist(), int(chosen.position[j])
        columns = {
            "from_position": positions,
            "from_token": [words[i] for i in positions],
            "from_latent": _latents(edge.latent.cpu()),
            "to_position": to,
            "to_token": words[to],
            "to_latent": int(chosen.latent[j]),
            "effect": edge.effect.cpu().numpy(),
        }
        if metric is not None:
            columns["metric_effect"] = columns["effect"] * float(chosen.effect[j] / chosen.activation[j])
        frames.append(pd.DataFrame(columns))
    whole = pd.concat(frames, ignore_index=True)
    key = "effect" if metric is None else "metric_effect"
    return whole.sort_values(key, key=abs, ascending=False, kind="stable", ignore_index=True)


def _targets(
    asked: Case, found: Nodes, targets: Iterable[tuple[int, int]] | None, n_targets: int, *, by_effect: bool
) -> Nodes:
    """The nodes of the later SAE that edges lead to."""
    found = found.at((found.latent != ERROR).nonzero()[:, 0])
    if targets is None:
        size = found.effect if by_effect else found.activation
        return found.at(size.abs().argsort(descending=True, stable=True)[:n_targets])
    rows = []
    for position, latent in targets:
        here = ((found.position == position) & (found.latent == latent)).nonzero()[:, 0]
        if len(here) == 0:
            active = found.latent[found.position == position].tolist()
            what = f"latent {latent} is not active at position {position} of {asked.tokens.shape[1]}."
            raise ValueError(
                explain(what, want=f"one of {active[:12]}" if active else "a position with active latents")
            )
        rows.append(here)
    if not rows:
        raise ValueError(explain("got no targets.", fix="targets=[(position, latent)]"))
    return found.at(torch.cat(rows))


def _slopes(asked: Case, chosen: Nodes) -> list[Tensor]:
    """For each target, the gradient of its activation where the earlier SAE writes: `[1, pos, d_out]` each."""
    early, late = asked.sites
    kept: dict[str, Tensor] = {}

    def plant(activation: Tensor) -> Tensor:
        kept["leaf"] = torch.zeros_like(activation, requires_grad=True)
        return activation + kept["leaf"]

    def keep(activation: Tensor) -> None:
        kept["x"] = activation

    if early.write == late.read:
        raise ValueError(_not_later(asked))
    with torch.enable_grad():
        with hook_points.editing(asked.model, {early.write: plant, late.read: keep}):
            asked.model(asked.tokens, return_type=None, stop_at_layer=stop_layer(asked.model, (early.write, late.read)))
        x = splice.flat(late.sae, kept["x"], late.sae.cfg.d_in, late.read)
        latents, column = chosen.latent.unique(return_inverse=True)
        active = late.sae.encode(x, latents=latents)[0, chosen.position, column]
        found = [torch.autograd.grad(a, kept["leaf"], retain_graph=True, allow_unused=True)[0] for a in active]
    if any(slope is None for slope in found):
        raise ValueError(_not_later(asked))
    width = early.sae.cfg.d_out
    return [splice.flat(early.sae, slope, width, early.write).to(early.sae.dtype) for slope in found]


def _not_later(asked: Case) -> str:
    early, late = asked.sites
    what = f"{late.read!r}, which {late.sae!r} reads, does not depend on {early.place!r}, which {early.sae!r} writes."
    return explain(what, want="sae_from earlier in the model than sae_to")


def _latents(latent: Tensor):
    import pandas as pd

    found = pd.array(latent.tolist(), dtype="Int64")
    found[(latent == ERROR).numpy()] = pd.NA
    return found


def _words(asked: Case) -> tuple[str, ...]:
    ids = asked.tokens[0].tolist()
    has_tokenizer = getattr(asked.model, "tokenizer", None) is not None
    return tuple(token_strings(asked.model, ids) if has_tokenizer else map(str, ids))
