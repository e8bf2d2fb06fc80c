"""What the weights alone say about latents: effects on logits, neighbours, norms; and which are active together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb import hooks

N_LOGIT_BINS = 40
_TILE = 2**23  # numbers of [latents, d_vocab] or [latents, d_sae] held at a time (32 MiB in float32)


def written(model: nn.Module, sae: nn.Module, hook_out: str) -> Float[Tensor, "d_sae d_model"] | None:
    """What each latent adds to the residual stream, per unit of activation; None where it does not write into it.

    A decoder row itself where the SAE writes at a point as wide as the model; through `W_O` at `hook_z`, through
    `W_out` at `mlp.hook_post`. A norm between there and the residual stream (Gemma) is left out.
    """
    point, decoder = hooks.resolve(model, hook_out), sae.W_dec.detach()
    endings = {name.rpartition(".")[2] for name in point.names}
    if "hook_z" in endings:
        w_o = model.blocks[point.layer].attn.W_O.detach().to(decoder)
        return decoder @ (w_o.flatten(0, 1) if sae.cfg.head is None else w_o[sae.cfg.head])
    if any(name.endswith("mlp.hook_post") for name in point.names):
        return decoder @ model.blocks[point.layer].mlp.W_out.detach().to(decoder)
    inside = endings & {"hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_pre", "hook_pattern"}
    return decoder if decoder.shape[1] == model.cfg.d_model and not inside else None


def norm_gain(
    norm: Callable[[Tensor], Tensor] | None, like: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " d_model"], bool]:
    """What the final norm multiplies each coordinate with once it has divided by the length, and if it centres first.

    Found by asking it, so that it is right for norms whose weight is stored as w, as 1 + w, or not at all (folded):
    for x of +-1000, `(norm(x) - norm(-x)) / 2 = gain * (x - mean) / rms`.
    """
    if norm is None:
        return torch.ones_like(like), False
    x = torch.full_like(like, 1000.0)
    x[::2] *= -1
    with torch.no_grad():
        there, back, moved = (norm(v.view(1, 1, -1))[0, 0].to(like.dtype) for v in (x, -x, x + 500))
    centred = bool(torch.allclose(there, moved, rtol=1e-2, atol=1e-2))
    v = x - x.mean() if centred else x
    return (there - back) / 2 * v.square().mean().sqrt() / v, centred


def unembedding(model: nn.Module) -> Float[Tensor, "d_model d_vocab"]:
    """From the residual stream to logits, for a final norm that divides by 1: TransformerLens' folded, centred W_U.

    W = gain * W_U;  W -= W.mean(over d_model)  where the norm centres;  W -= W.mean(over d_vocab)
    """
    w_u = model.W_U.detach().float()
    gain, centred = norm_gain(getattr(model, "ln_final", None), w_u[:, 0].to(next(model.parameters()).dtype))
    w = w_u * gain.float()[:, None]
    w = w - w.mean(0) if centred else w
    return w - w.mean(1, keepdim=True)


def logit_effects(
    directions: Float[Tensor, "d_sae d_model"], w: Float[Tensor, "d_model d_vocab"], n: int
) -> dict[str, Tensor]:
    """Per latent the `n` words its direction raises and lowers most, and a histogram of its effect on all words."""
    n = min(n, w.shape[1])
    rows: list[tuple[Tensor, ...]] = []
    for part in _tiles(directions, w.shape[1]):
        effects = part.to(w.dtype) @ w
        top, bottom = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
        low, high = bottom.values[:, :1], top.values[:, :1]
        bins = ((effects - low) / (high - low).clamp_min(1e-30) * N_LOGIT_BINS).long().clamp_(0, N_LOGIT_BINS - 1)
        counts = torch.zeros(len(part), N_LOGIT_BINS, dtype=torch.int32, device=w.device)
        counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))
        edges = torch.cat([low, high], 1)
        rows.append((top.indices.int(), top.values, bottom.indices.int(), bottom.values, counts, edges))
    names = ("top_ids", "top", "bottom_ids", "bottom", "counts", "range")
    return {f"logits.{name}": torch.cat(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def nearest(rows: Float[Tensor, "d_sae d"], n: int, name: str) -> dict[str, Tensor]:
    """Per latent the `n` others with the largest |cosine|; rows of norm 0 have cosine 0 with all."""
    unit = nn.functional.normalize(rows.detach().float(), dim=1)
    n, indices, cosines = min(n, len(unit) - 1), [], []
    at = 0
    for part in _tiles(unit, len(unit)):
        cosine = part @ unit.T
        own = torch.arange(len(part), device=unit.device)
        found = cosine.abs().index_put_((own, own + at), cosine.new_tensor(-1.0)).topk(n, dim=1).indices
        indices.append(found.int())
        cosines.append(cosine.gather(1, found))
        at += len(part)
    return {f"nearest.{name}": torch.cat(indices), f"nearest.{name}_cosine": torch.cat(cosines)}


def coactive(active: Int[Tensor, "tokens most"], d_sae: int, n: int) -> dict[str, Tensor]:
    """Per latent the `n` that fire on the same tokens, by the correlation phi of whether they fire.

        phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))

    Args:
        active: latents that fire on each of N tokens, -1 for none.
        d_sae: latents.
        n: kept; fewer than n that ever fire together leave -1.
    """
    token, rank = (active >= 0).nonzero(as_tuple=True)
    latent = active[token, rank].long()
    fired, total = torch.bincount(latent, minlength=d_sae), len(active)
    by_latent = latent.argsort(stable=True)
    latent, token = latent[by_latent], token[by_latent]
    made = {"latent": torch.full((d_sae, n), -1, dtype=torch.int32), "together": torch.zeros(d_sae, n).int()}
    made["phi"] = torch.zeros(d_sae, n)
    made = {name: t.to(active.device) for name, t in made.items()}
    step = max(1, _TILE // max(1, active.shape[1]))
    for part in _runs(latent, step):
        i, others = latent[part], active[token[part]].long()
        pair = (i[:, None] * d_sae + others)[(others >= 0) & (others != i[:, None])]
        pair, both = pair.unique(return_counts=True)
        i, j = pair // d_sae, pair % d_sae
        n_i, n_j, both_ = fired[i].double(), fired[j].double(), both.double()
        spread = (n_i * (total - n_i) * n_j * (total - n_j)).sqrt()
        phi = torch.where(spread > 0, (total * both_ - n_i * n_j) / spread.clamp_min(1e-30), 0)
        order = (-phi).argsort(stable=True)
        order = order[i[order].argsort(stable=True)]
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(i[order], i[order])
        order, place = order[place < n], place[place < n]
        for name, value in (("latent", j), ("together", both), ("phi", phi)):
            made[name][i[order], place] = value[order].to(made[name].dtype)
    return {f"coactive.{name}": t for name, t in made.items()} | {"coactive.fired": fired.int()}


def _tiles(rows: Tensor, width: int) -> Iterator[Tensor]:
    return iter(rows.split(max(1, _TILE // width)))


def _runs(sorted_key: Tensor, step: int) -> Iterator[slice]:
    """Slices of about `step`, never between equal keys."""
    begin, n = 0, len(sorted_key)
    while begin < n:
        end = n if begin + step >= n else int(torch.searchsorted(sorted_key, sorted_key[begin + step - 1], right=True))
        yield slice(begin, end)
        begin = end
