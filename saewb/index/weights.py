"""What the weights alone say about latents: effects on logits, neighbours, norms; and which are active together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb import hooks

N_LOGIT_BINS = 40
_TILE = 2**23  # numbers of [latents, d_vocab] or [latents, d_sae] held at a time (32 MiB in float32)


def written(
    model: nn.Module, rows: Float[Tensor, "n d_out"], hook_out: str, head: int | None = None
) -> Float[Tensor, "n d_model"] | None:
    """What directions at a point add to the residual stream; None where the point does not write into it.

    The directions themselves where the point is as wide as the model; through `W_O` at `hook_z` (that of one head, if
    `head` says so), through `W_out` at `mlp.hook_post`. A norm between there and the residual stream (Gemma) is left
    out.
    """
    point, rows = hooks.resolve(model, hook_out), rows.detach()
    endings = {name.rpartition(".")[2] for name in point.names}
    if "hook_z" in endings:
        w_o = model.blocks[point.layer].attn.W_O.detach().to(rows)
        return rows @ (w_o.flatten(0, 1) if head is None else w_o[head])
    if any(name.endswith("mlp.hook_post") for name in point.names):
        return rows @ model.blocks[point.layer].mlp.W_out.detach().to(rows)
    inside = endings & {"hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_pre", "hook_pattern"}
    return rows if rows.shape[1] == model.cfg.d_model and not inside else None


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
    gain, centred = _final_norm(model)
    w = w_u * gain[:, None]
    w = w - w.mean(0) if centred else w
    return w - w.mean(1, keepdim=True)


def word_direction(model: nn.Module, token: int) -> Float[Tensor, " d_model"]:
    """One column of `unembedding`, without a copy of the others."""
    w_u = model.W_U.detach()
    gain, centred = _final_norm(model)
    w = (w_u[:, token].float() - w_u.mean(1, dtype=torch.float32)) * gain
    return w - w.mean() if centred else w


def final_length(model: nn.Module, final: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos"]:
    """What the final norm divides the final residual stream by: its RMS, after centring where the norm centres."""
    final = final.float()
    if getattr(model, "ln_final", None) is None:
        return torch.ones_like(final[..., 0])
    centred = final - final.mean(-1, keepdim=True) if _final_norm(model)[1] else final
    return centred.square().mean(-1).sqrt()


def _final_norm(model: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    like = model.W_U[:, 0].detach().to(next(model.parameters()).dtype)
    gain, centred = norm_gain(getattr(model, "ln_final", None), like)
    return gain.float(), centred


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
