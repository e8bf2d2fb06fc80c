"""Steps of an attribution: gradients at the SAEs' write points and the effect of each latent there, for one prompt.

1. `prepare_attribution` resolves tokens, sites, a metric that gives one number, and the positions that have nodes.
2. `differentiate` runs the model once, with a tensor of zeros added at each write point, and differentiates by it.
3. `split_into_nodes` splits an activation into its active latents and the error, and weights each by a gradient.
4. `integrate_gradients` averages the gradient on the path from decode(0); `ablate_nodes` removes a node at a time.

A cross-layer transcoder has a site for each layer, and its latents write at their own site and all later ones; the
functions take the sites of one SAE together. Any other SAE has one site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._indices import index_of
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.interventions.site import Site, sites_of
from saewb.kernels.topk import TILE
from saewb.models import hook_points
from saewb.models.tokenizer import special_ids, special_mask, token_strings, tokenizer_of
from saewb.sae.base import SparseCoder
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.sae import SAE

Metric = Union[Callable[[Tensor], Tensor], str, int, tuple[Union[str, int], Union[str, int]]]

ERROR = -1
"""Index that stands for the error, the part that the SAE does not reconstruct, among those of latents."""
_ROWS = 1024
"""Latents of a cross-layer transcoder whose decoder directions are held at a time."""


@dataclass(frozen=True, eq=False)
class AttributionRun:
    """One prompt, the SAEs' sites, and the metric to attribute."""

    model: nn.Module
    tokens: Int[Tensor, "1 pos"]
    plain: Bool[Tensor, "1 pos"]
    """Positions that have nodes."""
    sites: tuple[tuple[Site, ...], ...]
    """Of each SAE: one, or one for each layer of a cross-layer transcoder."""
    metric: Callable[[Tensor], Tensor]

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Sites of all SAEs, in turn."""
        return tuple(site for sites in self.sites for site in sites)


@dataclass(frozen=True, eq=False)
class SiteActivations:
    """One site in the clean run: the SAE's input, the activation at the write point, and a gradient there."""

    site: Site
    index: int
    """Of the site among those of all SAEs."""
    x: Float[Tensor, "1 pos d_in"]
    target: Float[Tensor, "1 pos d_out"]
    gradient: Float[Tensor, "1 pos d_out"]

    def select(self, positions: slice) -> SiteActivations:
        """The same at some positions."""
        return replace(self, **{name: getattr(self, name)[:, positions] for name in ("x", "target", "gradient")})


@dataclass(frozen=True, eq=False)
class Nodes:
    """Active latents, position by position, and one error per position and site."""

    site: Int[Tensor, " nodes"]
    """Index of the site that a latent is read at, or an error is of."""
    position: Int[Tensor, " nodes"]
    latent: Int[Tensor, " nodes"]
    """ERROR for the error."""
    activation: Float[Tensor, " nodes"]
    """Norm of the error, for the error."""
    effect: Float[Tensor, " nodes"]

    @classmethod
    def cat(cls, parts: Sequence[Nodes]) -> Nodes:
        """Nodes of several parts, in turn."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def select(self, index: Tensor) -> Nodes:
        """Nodes at these indices."""
        return Nodes(*(getattr(self, f.name)[index] for f in fields(self)))


# -- the run ---------------------------------------------------------------------------------------------------------


def prepare_attribution(
    model: nn.Module,
    prompt: str | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    metric: Metric,
    skip_special_tokens: bool | Sequence[int],
) -> AttributionRun:
    """Resolve prompt, sites and metric.

    Raises:
        ValueError, TypeError: as `saewb.attribute`.
    """
    special = special_ids(model, skip_special_tokens)
    tokens = prompt_ids(model, prompt)
    saes = tuple(saes) if isinstance(saes, (list, tuple)) else (saes,)
    if not saes:
        raise ValueError(explain("got no SAE.", fix="saewb.attribute(model, prompt, sae, metric)"))
    sites = tuple(_sites(model, sae) for sae in saes)
    return AttributionRun(model, tokens, ~special_mask(tokens, special), sites, _metric(model, metric))


def _sites(model: nn.Module, sae: nn.Module) -> tuple[Site, ...]:
    if isinstance(sae, CrossLayerTranscoder) and not sae.cfg.is_transcoder:
        what = f"{sae!r} is a crosscoder: its latents describe one stream at every layer, not what is added to it."
        raise TypeError(explain(what, want="SAEs, transcoders, or a cross-layer transcoder"))
    return tuple(sites_of(model, sae))


def _metric(model: nn.Module, metric: Metric) -> Callable[[Tensor], Tensor]:
    if callable(metric):
        return metric
    if isinstance(metric, (str, int)) or getattr(metric, "ndim", None) == 0:
        token = token_id(model, metric)
        return lambda logits: logits[0, -1].float().log_softmax(-1)[token]
    if hasattr(metric, "__len__") and not isinstance(metric, Mapping) and len(metric) == 2:
        a, b = (token_id(model, word) for word in metric)
        return lambda logits: logits[0, -1, a].float() - logits[0, -1, b].float()
    want = "a function of the logits [1, pos, d_vocab], a token, or a pair of tokens"
    raise TypeError(explain(f"got metric={metric!r}.", want=want, fix='metric=(" Paris", " Rome")'))


def token_id(model: nn.Module, word: str | int) -> int:
    """Resolve a token, as text or id, to its id.

    Raises:
        ValueError: for a text of several tokens, or none; for an id outside of the vocabulary.
        TypeError: for anything else.
    """
    if not isinstance(word, str):
        return index_of(word, "token", model.cfg.d_vocab)
    encode = partial(tokenizer_of(model), add_special_tokens=False)
    ids = encode(word)["input_ids"]
    if len(ids) != 1:
        # Sentencepiece writes a space before a text by itself: " was" is one token only inside of a text.
        before, inside = encode("a")["input_ids"], encode("a" + word)["input_ids"]
        if inside[:-1] == before and token_strings(model, inside[-1:]) == [word]:
            return inside[-1]
        pieces = token_strings(model, ids)
        spaced = f"{' ' + word!r}, with the space before it, if it stands inside a text; "
        spaced = "" if word.startswith(" ") else spaced
        what = f"{word!r} is {len(ids)} tokens of this model: {pieces}."
        raise ValueError(explain(what, want=f"{spaced}one token, or a function of the logits"))
    return ids[0]


def one_number(value: object) -> Tensor:
    """Check that a metric's value is one number, and return it as a scalar tensor.

    Raises:
        ValueError: if it is not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        want = "one number for logits [1, pos, d_vocab]"
        raise ValueError(explain(f"the metric gave {got}.", want=want, fix="lambda logits: logits[0, -1, token]"))
    return value.reshape(())


# -- gradients -------------------------------------------------------------------------------------------------------


def differentiate(run: AttributionRun) -> tuple[float, list[list[SiteActivations]]]:
    """Compute the metric, and the activations and its gradient at each site of each SAE, in one pass both ways."""
    activations: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    written = {site.write.name for site in run.all_sites}
    names = written | {site.read.name for site in run.all_sites}
    edits = {name: _recording(activations, leaves if name in written else None, name) for name in names}
    with torch.enable_grad():
        with hook_points.editing(run.model, edits):
            value = one_number(run.metric(run.model(run.tokens)))
        for name in names:
            if name not in activations:
                raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))
        if not value.requires_grad:
            what = "the metric does not depend on the logits in a way that can be differentiated."
            raise ValueError(explain(what, want="a function of torch operations, such as logits[0, -1, token]"))
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    at_sites = iter([_at_site(site, i, activations, gradients) for i, site in enumerate(run.all_sites)])
    return float(value.detach()), [[next(at_sites) for _ in sites] for sites in run.sites]


def _recording(activations: dict[str, Tensor], leaves: dict[str, Tensor] | None, name: str) -> hook_points.Edit:
    def edit(activation: Tensor) -> Tensor | None:
        activations[name] = activation.detach().clone()  # a user's hook may change it in place
        if leaves is None:
            return None
        leaves[name] = torch.zeros_like(activation, requires_grad=True)
        return activation + leaves[name]

    return edit


def _at_site(site: Site, i: int, activations: dict[str, Tensor], gradients: dict[str, Tensor]) -> SiteActivations:
    x = site.read_input(activations[site.read.name])
    target = site.read_target(activations[site.write.name])
    gradient = site.read_target(gradients[site.write.name])
    return SiteActivations(site, i, *(t.to(site.sae.dtype) for t in (x, target, gradient)))


# -- nodes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def split_into_nodes(run: AttributionRun, at_sites: Sequence[SiteActivations]) -> Nodes:
    """Split the activations of one SAE into active latents and errors, each with its effect by `gradient`.

    Dense latents are held for a tile of positions only (64 MiB), for SAEs that do not look back.
    """
    parts = []
    for tile in _tiles([at.site for at in at_sites], run.tokens.shape[1]):
        here = [at.select(tile) for at in at_sites]
        plain = run.plain[0, tile].to(here[0].x.device)
        nodes, recons = _latents_of_layers(here, plain) if _is_cross_layer(at_sites) else _latents(here[0], plain)
        parts += [replace(nodes, position=nodes.position + tile.start)]
        position = plain.nonzero()[:, 0]
        for at, output in zip(here, recons, strict=True):
            error = (at.target - output)[0, position]
            effect = (error * at.gradient[0, position]).sum(-1)
            site, latent = torch.full_like(position, at.index), torch.full_like(position, ERROR)
            parts.append(Nodes(site, position + tile.start, latent, error.norm(dim=-1), effect))
    nodes = Nodes.cat(parts)
    wide = torch.promote_types(nodes.effect.dtype, torch.float32)  # tables have no bfloat16
    return replace(nodes, activation=nodes.activation.to(wide), effect=nodes.effect.to(wide))


def _latents(at: SiteActivations, plain: Bool[Tensor, " pos"]) -> tuple[Nodes, list[Tensor]]:
    """Active latents of an SAE with one site, and its output."""
    acts, recons, slope = slopes(at.site.sae, at.x, at.gradient)
    position, latent = (acts[0] * plain[:, None]).nonzero(as_tuple=True)
    effect = (acts * slope)[0, position, latent]
    return Nodes(torch.full_like(position, at.index), position, latent, acts[0, position, latent], effect), [recons]


def _latents_of_layers(at_layers: Sequence[SiteActivations], plain: Bool[Tensor, " pos"]) -> tuple[Nodes, list[Tensor]]:
    """Active latents of all layers of a cross-layer transcoder, and its outputs.

    The effect of a latent is the sum over the layers that it writes to: a_i sum_j W_dec[i -> j] . gradient_j.
    """
    clt: CrossLayerTranscoder = at_layers[0].site.sae
    dense = clt.encode([at.x for at in at_layers])
    recons = clt.decode(dense, [at.x for at in at_layers])
    gradients = torch.cat([at.gradient for at in at_layers])  # [layer, pos, d_out]
    parts = []
    for i, (at, acts) in enumerate(zip(at_layers, dense, strict=True)):
        position, latent = (acts[0] * plain[:, None]).nonzero(as_tuple=True)
        activation, effect = acts[0, position, latent], torch.zeros_like(acts[0, position, latent])
        unique, row = latent.unique(return_inverse=True)
        for start in range(0, len(unique), _ROWS):
            here = (row >= start) & (row < start + _ROWS)
            W_dec = clt.W_dec[i][unique[start : start + _ROWS].to(clt.W_dec[i].device)].to(gradients)
            slope = torch.einsum("utd,tpd->pu", W_dec, gradients[i:])
            effect[here] = activation[here] * slope[position[here], row[here] - start]
        parts.append(Nodes(torch.full_like(position, at.index), position, latent, activation, effect))
    return Nodes.cat(parts), recons


@torch.no_grad()
def slopes(
    sae: SparseCoder, x: Float[Tensor, "1 pos d_in"], direction: Float[Tensor, "1 pos d_out"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, reconstruction, and the derivative of `(reconstruction * direction).sum()` by each latent.

    By differentiating `decode`, so that it is right under any normalization: `W_dec[i] . direction` without one.
    """
    acts = sae.encode(x)
    with torch.enable_grad():
        leaf = acts.detach().requires_grad_()
        recons = sae.decode(leaf, x)
        (slope,) = torch.autograd.grad((recons * direction).sum(), leaf)
    return acts, recons.detach(), slope


def tiles(n: int, d_sae: int, *, whole: bool) -> Iterator[slice]:
    """Slices of n positions that have 64 MiB of latents each; one slice if `whole`."""
    step = n if whole else max(1, TILE // d_sae)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _tiles(sites: Sequence[Site], n: int) -> Iterator[slice]:
    return tiles(n, sum(site.d_sae for site in sites), whole=sites[0].sae.looks_back)


def _is_cross_layer(at_sites: Sequence[SiteActivations]) -> bool:
    return at_sites[0].site.clt_layer is not None


# -- integrated gradients and ablation -------------------------------------------------------------------------------


def integrate_gradients(
    run: AttributionRun, at_sites: Sequence[SiteActivations], n_steps: int, batch_size: int
) -> tuple[float, list[SiteActivations]]:
    """Metric at decode(0), and gradient averaged on the path to the activations (Gauss-Legendre quadrature).

    The outputs of all layers of a cross-layer transcoder are on the path at once.
    """
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    # alpha = t^2 puts more points near decode(0), where the model's norms make gradients steep. The start has weight 0:
    # it is there for its metric.
    t = (points + 1) / 2
    alphas, weights = (torch.tensor([0.0, *v]).to(at_sites[0].target) for v in (t**2, weights * t))
    plain = run.plain.to(at_sites[0].x.device)[..., None]
    zeros = _decode_zero(at_sites)
    bases = [torch.where(plain, zero, at.target) for zero, at in zip(zeros, at_sites, strict=True)]
    means, baseline = [torch.zeros_like(at.gradient) for at in at_sites], float("nan")
    for alpha, weight in zip(alphas.split(batch_size), weights.split(batch_size), strict=True):
        ys = [base + alpha[:, None, None] * (at.target - base) for base, at in zip(bases, at_sites, strict=True)]
        values, gradients = _gradients_at(run, at_sites, ys)
        for mean, gradient in zip(means, gradients, strict=True):
            mean += (weight[:, None, None] * gradient).sum(0, keepdim=True)
        baseline = float(values[0]) if alpha[0] == 0 else baseline
    return baseline, [replace(at, gradient=mean) for at, mean in zip(at_sites, means, strict=True)]


@torch.no_grad()
def _decode_zero(at_sites: Sequence[SiteActivations]) -> list[Float[Tensor, "1 pos d_out"]]:
    """Output of each site where no latent is active."""
    sae, xs = at_sites[0].site.sae, [at.x for at in at_sites]
    parts = []
    for tile in _tiles([at.site for at in at_sites], xs[0].shape[1]):
        here = [x[:, tile] for x in xs]
        zeros = [x.new_zeros(*x.shape[:-1], at.site.d_sae) for x, at in zip(here, at_sites, strict=True)]
        parts.append(sae.decode(zeros, here) if _is_cross_layer(at_sites) else [sae.decode(zeros[0], here[0])])
    return [torch.cat(outputs, dim=1) for outputs in zip(*parts, strict=True)]


def _gradients_at(
    run: AttributionRun, at_sites: Sequence[SiteActivations], ys: Sequence[Float[Tensor, "rows pos d_out"]]
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Metric and its gradients at the write points, with each row of `ys` as the activations there."""
    leaves = [torch.zeros_like(y, requires_grad=True) for y in ys]

    def edit_of(site: Site, y: Tensor, leaf: Tensor) -> hook_points.Edit:
        return lambda activation: site.write_output((y + leaf).to(activation.dtype), activation)

    edits = {at.site.write.name: edit_of(at.site, y, leaf) for at, y, leaf in zip(at_sites, ys, leaves, strict=True)}
    with torch.enable_grad():
        values = run_rows(run, edits, len(ys[0]))
        gradients = torch.autograd.grad(sum(values), leaves)
    return [value.detach() for value in values], gradients


def run_rows(run: AttributionRun, edits: Mapping[str, hook_points.Edit], n: int) -> list[Tensor]:
    """Metric of n copies of the prompt, with edits.

    Raises:
        ValueError: if it is not one number.
    """
    with hook_points.editing(run.model, edits):
        logits = run.model(run.tokens.expand(n, -1))
    return [one_number(run.metric(logits[i : i + 1])) for i in range(n)]


@torch.no_grad()
def ablate_nodes(
    run: AttributionRun, at_sites: Sequence[SiteActivations], nodes: Nodes, value: float, batch_size: int
) -> Float[Tensor, " nodes"]:
    """Effect of each node by ablation: metric - metric without it, a row of a forward pass per node."""
    effects = []
    for index in torch.arange(len(nodes.latent), device=nodes.latent.device).split(batch_size):
        batch = nodes.select(index)
        without = _contributions_of_layers if _is_cross_layer(at_sites) else _contributions
        edits = {
            at.site.write.name: _subtracting(at.site, batch.position, contributions)
            for at, contributions in zip(at_sites, without(at_sites, batch), strict=True)
        }
        effects += [value - float(without) for without in run_rows(run, edits, len(index))]
    return torch.tensor(effects, dtype=nodes.effect.dtype, device=nodes.effect.device)


def _subtracting(site: Site, position: Tensor, contributions: Float[Tensor, "nodes d_out"]) -> hook_points.Edit:
    """The edit that subtracts from row i the contribution of node i, at its position."""

    def edit(activation: Tensor) -> Tensor:
        y = site.read_target(activation).clone()
        y[torch.arange(len(y), device=y.device), position] -= contributions.to(y.dtype)
        return site.write_output(y, activation)

    return edit


def _contributions(at_sites: Sequence[SiteActivations], nodes: Nodes) -> list[Float[Tensor, "nodes d_out"]]:
    """Contribution of each node of an SAE with one site to the activation at its position."""
    (at,) = at_sites
    sae, x = at.site.sae, at.x[0, nodes.position][:, None]
    is_error, latent = nodes.latent == ERROR, nodes.latent.clamp_min(0)
    if isinstance(sae, SAE) and sae.cfg.normalization == "none":
        contributions = nodes.activation[:, None] * sae.W_dec[latent]
    else:
        acts = x.new_zeros(*x.shape[:-1], sae.cfg.d_sae)
        acts[torch.arange(len(x), device=x.device), 0, latent] = nodes.activation
        contributions = (sae.decode(acts, x) - sae.decode(torch.zeros_like(acts), x))[:, 0]
    if not is_error.any():
        return [contributions]
    errors = (at.target - sae(at.x))[0, nodes.position]
    return [torch.where(is_error[:, None], errors, contributions)]


def _contributions_of_layers(at_layers: Sequence[SiteActivations], nodes: Nodes) -> list[Float[Tensor, "nodes d_out"]]:
    """Contribution of each node of a cross-layer transcoder to what is written at each layer."""
    clt: CrossLayerTranscoder = at_layers[0].site.sae
    result = [at.target.new_zeros(len(nodes.latent), clt.cfg.d_out) for at in at_layers]
    layer = nodes.site - at_layers[0].index
    is_error = nodes.latent == ERROR
    for i in layer[~is_error].unique().tolist():
        mine = ((layer == i) & ~is_error).nonzero()[:, 0]
        W_dec = clt.W_dec[i][nodes.latent[mine].to(clt.W_dec[i].device)].to(result[i])
        written = nodes.activation[mine, None, None].to(result[i]) * W_dec
        for j in range(i, len(result)):
            result[j][mine] = written[:, j - i]
    if is_error.any():
        xs = [at.x for at in at_layers]
        recons = clt.decode(clt.encode(xs), xs)
        for j, (at, output) in enumerate(zip(at_layers, recons, strict=True)):
            mine = (is_error & (layer == j)).nonzero()[:, 0]
            result[j][mine] = (at.target - output)[0, nodes.position[mine]]
    return result
