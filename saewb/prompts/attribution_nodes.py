"""What attribution is made of: one prompt, the points SAEs write to, gradients there, and what each latent is worth.

1. `case` settles what is asked: tokens, places, a metric that gives one number, positions that count.
2. `gradients` runs the model once, with a tensor of zeros added at each write point, and differentiates by it.
3. `nodes` splits an activation into its active latents and the error, and weighs each with a direction.
4. `integrated` averages the gradient on the way from decode(0); `ablated` takes one node away at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.interventions import splice
from saewb.interventions.site import places, points
from saewb.kernels.topk import TILE
from saewb.models import hook_points
from saewb.models.tokenizer import special_ids, special_mask
from saewb.sae.sae import SAE

Metric = Union[Callable[[Tensor], Tensor], str, int, tuple[Union[str, int], Union[str, int]]]

ERROR = -1  # stands where a latent's number would: what the SAE leaves out


@dataclass(frozen=True, eq=False)
class Site:
    """An SAE and the points it reads and writes, by the model's own names."""

    sae: nn.Module
    read: str
    write: str
    place: str  # where it writes, as the user named it


@dataclass(frozen=True, eq=False)
class Case:
    """What is asked about one prompt."""

    model: nn.Module
    tokens: Int[Tensor, "1 pos"]
    plain: Bool[Tensor, "1 pos"]  # positions that have nodes
    sites: tuple[Site, ...]
    metric: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Seen:
    """One site in the clean run: the input, what stands at the write point, and a direction there."""

    x: Float[Tensor, "1 pos d_in"]
    target: Float[Tensor, "1 pos d_out"]
    gradient: Float[Tensor, "1 pos d_out"]


@dataclass(frozen=True, eq=False)
class Nodes:
    """Latents that are active, position by position, and one error for each position."""

    position: Int[Tensor, " nodes"]
    latent: Int[Tensor, " nodes"]  # ERROR for the error
    activation: Float[Tensor, " nodes"]  # the error's length
    effect: Float[Tensor, " nodes"]

    def at(self, index: Tensor) -> Nodes:
        """Some of them."""
        return Nodes(self.position[index], self.latent[index], self.activation[index], self.effect[index])


# -- what is asked ---------------------------------------------------------------------------------------------------


def case(
    model: nn.Module,
    prompt: str | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    metric: Metric,
    skip_special_tokens: bool | Sequence[int],
) -> Case:
    """Settle what is asked; whatever does not fit is said here."""
    special = special_ids(model, skip_special_tokens)
    tokens = prompt_ids(model, prompt)
    several = tuple(saes) if isinstance(saes, (list, tuple)) else (saes,)
    if not several:
        raise ValueError(explain("got no SAE.", fix="saewb.attribute(model, prompt, sae, metric)"))
    plain = ~special_mask(tokens, special)
    return Case(model, tokens, plain, tuple(_site(model, sae) for sae in several), _metric(model, metric))


def _site(model: nn.Module, sae: nn.Module) -> Site:
    if not (isinstance(sae, nn.Module) and hasattr(sae, "encode") and hasattr(sae, "cfg")):
        raise TypeError(explain(f"got {type(sae).__name__} as an SAE.", fix="sae = saewb.load_sae(...)"))
    source, target = places(sae, None, None)
    return Site(sae, *(point.name for point in points(model, source, target)), target)


def _metric(model: nn.Module, metric: Metric) -> Callable[[Tensor], Tensor]:
    if callable(metric):
        return metric
    if isinstance(metric, (str, int)):
        token = token_id(model, metric)
        return lambda logits: logits[0, -1].float().log_softmax(-1)[token]
    if isinstance(metric, (tuple, list)) and len(metric) == 2:
        a, b = (token_id(model, word) for word in metric)
        return lambda logits: logits[0, -1, a].float() - logits[0, -1, b].float()
    want = "a function of the logits [1, pos, d_vocab], a token, or a pair of tokens"
    raise TypeError(explain(f"got metric={metric!r}.", want=want, fix='metric=(" Paris", " Rome")'))


def token_id(model: nn.Module, word: str | int) -> int:
    """The id of a word that is one token.

    Raises:
        ValueError: if it is several, or none; or an id outside of the vocabulary.
    """
    if isinstance(word, int):
        if not 0 <= word < model.cfg.d_vocab:
            raise ValueError(explain(f"token {word} is not in the vocabulary.", want=f"0 to {model.cfg.d_vocab - 1}"))
        return word
    ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        spaced = (
            "" if word.startswith(" ") else f"{' ' + word!r}, with the space before it, if it stands inside a text; "
        )
        what = f"{word!r} is {len(ids)} tokens of this model: {pieces}."
        raise ValueError(explain(what, want=f"{spaced}one token, or a function of the logits"))
    return ids[0]


def one_number(found: object) -> Tensor:
    """The metric's value.

    Raises:
        ValueError: if it is not one number.
    """
    if not isinstance(found, Tensor) or found.numel() != 1:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        want = "one number for logits [1, pos, d_vocab]"
        raise ValueError(explain(f"the metric gave {got}.", want=want, fix="lambda logits: logits[0, -1, token]"))
    return found.reshape(())


# -- gradients -------------------------------------------------------------------------------------------------------


def gradients(asked: Case) -> tuple[float, list[Seen]]:
    """The metric, and per site what stood there with the metric's gradient: one forward, one backward pass."""
    values: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    writes = {site.write for site in asked.sites}
    names = writes | {site.read for site in asked.sites}
    edits = {name: _seeing(values, leaves if name in writes else None, name) for name in names}
    with torch.enable_grad():
        with hook_points.editing(asked.model, edits):
            value = one_number(asked.metric(asked.model(asked.tokens)))
        for name in names:
            if name not in values:
                raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))
        if not value.requires_grad:
            what = "the metric does not depend on the logits in a way that can be differentiated."
            raise ValueError(explain(what, want="a function of torch operations, such as logits[0, -1, token]"))
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    slopes = {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)}
    return float(value.detach()), [_seen(site, values, slopes) for site in asked.sites]


def _seeing(values: dict[str, Tensor], leaves: dict[str, Tensor] | None, name: str) -> hook_points.Edit:
    def edit(activation: Tensor) -> Tensor | None:
        values[name] = activation.detach().clone()  # a hook of the user's may change it in place
        if leaves is None:
            return None
        leaves[name] = torch.zeros_like(activation, requires_grad=True)
        return activation + leaves[name]

    return edit


def _seen(site: Site, values: dict[str, Tensor], slopes: dict[str, Tensor]) -> Seen:
    cfg = site.sae.cfg
    x = splice.flat(site.sae, values[site.read], cfg.d_in, site.read)
    target = splice.flat(site.sae, values[site.write], cfg.d_out, site.write)
    gradient = splice.flat(site.sae, slopes[site.write], cfg.d_out, site.write)
    return Seen(x.to(site.sae.dtype), target.to(site.sae.dtype), gradient.to(site.sae.dtype))


# -- what each latent is worth ---------------------------------------------------------------------------------------


@torch.no_grad()
def nodes(asked: Case, site: Site, seen: Seen) -> Nodes:
    """Every latent that is active at a position that counts, and the errors there, weighed with `seen.gradient`.

    Dense latents are held for a tile of positions only (64 MiB), for SAEs that do not look back.
    """
    parts = []
    for at in _tiles(site.sae, asked.tokens.shape[1]):
        x, target, g = (t[:, at] for t in (seen.x, seen.target, seen.gradient))
        latents, recon, slope = slopes(site.sae, x, g)
        plain = asked.plain[0, at]
        position, latent = (latents[0] * plain[:, None]).nonzero(as_tuple=True)
        where = plain.nonzero()[:, 0]
        error = (target - recon)[0, where]
        a, effect = latents[0, position, latent], (latents * slope)[0, position, latent]
        offset = at.start
        parts.append(Nodes(position + offset, latent, a, effect))
        effect = (error * g[0, where]).sum(-1)
        parts.append(Nodes(where + offset, torch.full_like(where, ERROR), error.norm(dim=-1), effect))
    return Nodes(*(torch.cat([getattr(part, name) for part in parts]) for name in Nodes.__dataclass_fields__))


@torch.no_grad()
def slopes(
    sae: nn.Module, x: Float[Tensor, "1 pos d_in"], direction: Float[Tensor, "1 pos d_out"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, reconstruction, and the derivative of `(reconstruction * direction).sum()` by each latent.

    By differentiating `decode`, so that it is right whatever the scaling: `W_dec[i] . direction` where there is none.
    """
    latents = sae.encode(x)
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        recon = sae.decode(leaf, x)
        (slope,) = torch.autograd.grad((recon * direction).sum(), leaf)
    return latents, recon.detach(), slope


def tiles(n: int, d_sae: int, *, whole: bool) -> Iterator[slice]:
    """Positions of a prompt of n, as many at a time as have 64 MiB of latents; or all of them, if `whole`."""
    step = n if whole else max(1, TILE // d_sae)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _tiles(sae: nn.Module, n: int) -> Iterator[slice]:
    return tiles(n, sae.cfg.d_sae, whole=getattr(sae, "looks_back", False))


# -- on the way from decode(0), and without a node -------------------------------------------------------------------


def integrated(asked: Case, site: Site, seen: Seen, n_steps: int, batch_size: int) -> tuple[float, Seen]:
    """The metric at decode(0), and the gradient averaged from there to the activation, by Gauss-Legendre quadrature."""
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    # alpha = t^2 puts more points near decode(0), where the model's norms make gradients steep; the start itself comes
    # along with weight 0, for the metric there.
    t = (points + 1) / 2
    alphas, weights = (torch.tensor([0.0, *v]).to(seen.target) for v in (t**2, weights * t))
    base = torch.where(asked.plain[..., None], _empty(site, seen.x), seen.target)
    mean, first = torch.zeros_like(seen.gradient), float("nan")
    for some, share in zip(alphas.split(batch_size), weights.split(batch_size), strict=True):
        y = base + some[:, None, None] * (seen.target - base)
        values, slopes = _slopes(asked, site, y)
        mean += (share[:, None, None] * slopes).sum(0, keepdim=True)
        first = float(values[0]) if some[0] == 0 else first
    return first, replace(seen, gradient=mean)


@torch.no_grad()
def _empty(site: Site, x: Tensor) -> Tensor:
    """`decode(0)`, `[1, pos, d_out]`."""
    parts = (x[:, at] for at in _tiles(site.sae, x.shape[1]))
    return torch.cat([site.sae.decode(t.new_zeros(*t.shape[:-1], site.sae.cfg.d_sae), t) for t in parts], dim=1)


def _slopes(asked: Case, site: Site, y: Float[Tensor, "rows pos d_out"]) -> tuple[list[Tensor], Tensor]:
    """With each of `y` at the write point: the metric, and its gradient there."""
    leaf = torch.zeros_like(y, requires_grad=True)

    def edit(activation: Tensor) -> Tensor:
        return splice.unflat(site.sae, (y + leaf).to(activation.dtype), activation)

    with torch.enable_grad():
        values = _rows(asked, site, edit, len(y))
        (slopes,) = torch.autograd.grad(sum(values), leaf)
    return [value.detach() for value in values], slopes


def _rows(asked: Case, site: Site, edit: hook_points.Edit, n: int) -> list[Tensor]:
    """The metric of n copies of the prompt, with an edit at the write point."""
    with hook_points.editing(asked.model, {site.write: edit}):
        logits = asked.model(asked.tokens.expand(n, -1))
    return [one_number(asked.metric(logits[i : i + 1])) for i in range(n)]


@torch.no_grad()
def ablated(asked: Case, site: Site, seen: Seen, found: Nodes, value: float, batch_size: int) -> Tensor:
    """For each node, the metric less the metric without it: `[nodes]`, one row of a forward pass each."""
    effects = []
    for part in torch.arange(len(found.latent), device=found.latent.device).split(batch_size):
        some = found.at(part)
        gone = _contributions(site, seen, some)

        def edit(activation: Tensor, some: Nodes = some, gone: Tensor = gone) -> Tensor:
            y = splice.flat(site.sae, activation, site.sae.cfg.d_out, site.write).clone()
            y[torch.arange(len(y), device=y.device), some.position] -= gone.to(y.dtype)
            return splice.unflat(site.sae, y, activation)

        effects += [value - float(v) for v in _rows(asked, site, edit, len(part))]
    return torch.tensor(effects, dtype=found.effect.dtype, device=found.effect.device)


def _contributions(site: Site, seen: Seen, some: Nodes) -> Float[Tensor, "nodes d_out"]:
    """What each node adds to the activation at its position."""
    sae, x = site.sae, seen.x[0, some.position][:, None]
    is_error = some.latent == ERROR
    if isinstance(sae, SAE) and sae.cfg.normalization == "none":
        own = some.activation[:, None] * sae.W_dec[some.latent.clamp_min(0)]
    else:
        one = x.new_zeros(*x.shape[:-1], sae.cfg.d_sae)
        one[torch.arange(len(x), device=x.device), 0, some.latent.clamp_min(0)] = some.activation
        own = (sae.decode(one, x) - sae.decode(torch.zeros_like(one), x))[:, 0]
    if not is_error.any():
        return own
    errors = (seen.target - sae(seen.x))[0, some.position]
    return torch.where(is_error[:, None], errors, own)
