"""Steps of an attribution: gradients at the SAEs' write points and the effect of each latent there, for one prompt.

1. `prepare_attribution` resolves tokens, sites, a metric that gives one number, and the positions that have nodes.
2. `differentiate` runs the model once, with a tensor of zeros added at each write point, and differentiates by it.
3. `split_into_nodes` splits an activation into its active latents and the error, and weights each by a gradient.
4. `integrate_gradients` averages the gradient on the path from decode(0); `ablate_nodes` removes a node at a time.
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
from saewb.interventions.site import Site
from saewb.kernels.topk import TILE
from saewb.models import hook_points
from saewb.models.tokenizer import special_ids, special_mask, token_strings, tokenizer_of
from saewb.sae.base import SparseCoder
from saewb.sae.sae import SAE

Metric = Union[Callable[[Tensor], Tensor], str, int, tuple[Union[str, int], Union[str, int]]]

ERROR = -1
"""Index that stands for the error, the part that the SAE does not reconstruct, among those of latents."""


@dataclass(frozen=True, eq=False)
class AttributionRun:
    """One prompt, the SAEs' sites, and the metric to attribute."""

    model: nn.Module
    tokens: Int[Tensor, "1 pos"]
    plain: Bool[Tensor, "1 pos"]
    """Positions that have nodes."""
    sites: tuple[Site, ...]
    metric: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SiteActivations:
    """One site in the clean run: the SAE's input, the activation at the write point, and a gradient there."""

    x: Float[Tensor, "1 pos d_in"]
    target: Float[Tensor, "1 pos d_out"]
    gradient: Float[Tensor, "1 pos d_out"]


@dataclass(frozen=True, eq=False)
class Nodes:
    """Active latents, position by position, and one error per position."""

    position: Int[Tensor, " nodes"]
    latent: Int[Tensor, " nodes"]
    """ERROR for the error."""
    activation: Float[Tensor, " nodes"]
    """Norm of the error, for the error."""
    effect: Float[Tensor, " nodes"]

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
    sites = tuple(Site.of(model, sae) for sae in saes)
    return AttributionRun(model, tokens, ~special_mask(tokens, special), sites, _metric(model, metric))


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


def differentiate(run: AttributionRun) -> tuple[float, list[SiteActivations]]:
    """Compute the metric, and the activations and its gradient at each site: one forward, one backward pass."""
    activations: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    written = {site.write.name for site in run.sites}
    names = written | {site.read.name for site in run.sites}
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
    return float(value.detach()), [_at_site(site, activations, gradients) for site in run.sites]


def _recording(activations: dict[str, Tensor], leaves: dict[str, Tensor] | None, name: str) -> hook_points.Edit:
    def edit(activation: Tensor) -> Tensor | None:
        activations[name] = activation.detach().clone()  # a user's hook may change it in place
        if leaves is None:
            return None
        leaves[name] = torch.zeros_like(activation, requires_grad=True)
        return activation + leaves[name]

    return edit


def _at_site(site: Site, activations: dict[str, Tensor], gradients: dict[str, Tensor]) -> SiteActivations:
    x = site.read_input(activations[site.read.name])
    target = site.read_target(activations[site.write.name])
    gradient = site.read_target(gradients[site.write.name])
    return SiteActivations(*(t.to(site.sae.dtype) for t in (x, target, gradient)))


# -- nodes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def split_into_nodes(run: AttributionRun, site: Site, at_site: SiteActivations) -> Nodes:
    """Split activations into active latents and errors, each with its effect by `at_site.gradient`.

    Dense latents are held for a tile of positions only (64 MiB), for SAEs that do not look back.
    """
    parts = []
    for tile in _tiles(site.sae, run.tokens.shape[1]):
        x, target, gradient = (t[:, tile] for t in (at_site.x, at_site.target, at_site.gradient))
        acts, recons, slope = slopes(site.sae, x, gradient)
        plain = run.plain[0, tile].to(acts.device)
        position, latent = (acts[0] * plain[:, None]).nonzero(as_tuple=True)
        effect = (acts * slope)[0, position, latent]
        parts.append(Nodes(position + tile.start, latent, acts[0, position, latent], effect))
        position = plain.nonzero()[:, 0]
        error = (target - recons)[0, position]
        effect = (error * gradient[0, position]).sum(-1)
        parts.append(Nodes(position + tile.start, torch.full_like(position, ERROR), error.norm(dim=-1), effect))
    nodes = Nodes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Nodes)))
    wide = torch.promote_types(nodes.effect.dtype, torch.float32)  # tables have no bfloat16
    return replace(nodes, activation=nodes.activation.to(wide), effect=nodes.effect.to(wide))


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


def _tiles(sae: SparseCoder, n: int) -> Iterator[slice]:
    return tiles(n, sae.cfg.d_sae, whole=sae.looks_back)


# -- integrated gradients and ablation -------------------------------------------------------------------------------


def integrate_gradients(
    run: AttributionRun, site: Site, at_site: SiteActivations, n_steps: int, batch_size: int
) -> tuple[float, SiteActivations]:
    """Metric at decode(0), and gradient averaged on the path to the activation (Gauss-Legendre quadrature)."""
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    # alpha = t^2 puts more points near decode(0), where the model's norms make gradients steep. The start has weight 0:
    # it is there for its metric.
    t = (points + 1) / 2
    alphas, weights = (torch.tensor([0.0, *v]).to(at_site.target) for v in (t**2, weights * t))
    plain = run.plain.to(at_site.x.device)
    base = torch.where(plain[..., None], _decode_zero(site, at_site.x), at_site.target)
    mean, baseline = torch.zeros_like(at_site.gradient), float("nan")
    for alpha, weight in zip(alphas.split(batch_size), weights.split(batch_size), strict=True):
        values, gradients = _gradients_at(run, site, base + alpha[:, None, None] * (at_site.target - base))
        mean += (weight[:, None, None] * gradients).sum(0, keepdim=True)
        baseline = float(values[0]) if alpha[0] == 0 else baseline
    return baseline, replace(at_site, gradient=mean)


@torch.no_grad()
def _decode_zero(site: Site, x: Tensor) -> Float[Tensor, "1 pos d_out"]:
    parts = (x[:, tile] for tile in _tiles(site.sae, x.shape[1]))
    return torch.cat([site.sae.decode(t.new_zeros(*t.shape[:-1], site.sae.cfg.d_sae), t) for t in parts], dim=1)


def _gradients_at(run: AttributionRun, site: Site, y: Float[Tensor, "rows pos d_out"]) -> tuple[list[Tensor], Tensor]:
    """Metric and its gradient at the write point, with each row of `y` as the activation there."""
    leaf = torch.zeros_like(y, requires_grad=True)

    def edit(activation: Tensor) -> Tensor:
        return site.write_output((y + leaf).to(activation.dtype), activation)

    with torch.enable_grad():
        values = _run_rows(run, site, edit, len(y))
        (gradients,) = torch.autograd.grad(sum(values), leaf)
    return [value.detach() for value in values], gradients


def _run_rows(run: AttributionRun, site: Site, edit: hook_points.Edit, n: int) -> list[Tensor]:
    """Metric of n copies of the prompt, with an edit at the write point."""
    with hook_points.editing(run.model, {site.write.name: edit}):
        logits = run.model(run.tokens.expand(n, -1))
    return [one_number(run.metric(logits[i : i + 1])) for i in range(n)]


@torch.no_grad()
def ablate_nodes(
    run: AttributionRun, site: Site, at_site: SiteActivations, nodes: Nodes, value: float, batch_size: int
) -> Float[Tensor, " nodes"]:
    """Effect of each node by ablation: metric - metric without it, a row of a forward pass per node."""
    effects = []
    for index in torch.arange(len(nodes.latent), device=nodes.latent.device).split(batch_size):
        batch = nodes.select(index)
        contributions = _contributions(site, at_site, batch)

        def edit(activation: Tensor, batch: Nodes = batch, contributions: Tensor = contributions) -> Tensor:
            y = site.read_target(activation).clone()
            y[torch.arange(len(y), device=y.device), batch.position] -= contributions.to(y.dtype)
            return site.write_output(y, activation)

        effects += [value - float(without) for without in _run_rows(run, site, edit, len(index))]
    return torch.tensor(effects, dtype=nodes.effect.dtype, device=nodes.effect.device)


def _contributions(site: Site, at_site: SiteActivations, nodes: Nodes) -> Float[Tensor, "nodes d_out"]:
    """Contribution of each node to the activation at its position."""
    sae, x = site.sae, at_site.x[0, nodes.position][:, None]
    is_error, latent = nodes.latent == ERROR, nodes.latent.clamp_min(0)
    if isinstance(sae, SAE) and sae.cfg.normalization == "none":
        contributions = nodes.activation[:, None] * sae.W_dec[latent]
    else:
        acts = x.new_zeros(*x.shape[:-1], sae.cfg.d_sae)
        acts[torch.arange(len(x), device=x.device), 0, latent] = nodes.activation
        contributions = (sae.decode(acts, x) - sae.decode(torch.zeros_like(acts), x))[:, 0]
    if not is_error.any():
        return contributions
    errors = (at_site.target - sae(at_site.x))[0, nodes.position]
    return torch.where(is_error[:, None], errors, contributions)
