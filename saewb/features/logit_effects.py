"""What the weights alone say about latents: effects on logits (and in `nearest` neighbors)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.features.neighbors import nearest_bytes
from saewb.models import hook_points

N_LOGIT_BINS = 40
TILE = 2**24  # numbers of [latents, d_vocab] held at a time, at most (64 MiB in float32)
_IN_CACHE = 2**19  # of them whose bins are told at a time


def written(
    model: nn.Module, rows: Float[Tensor, "n d_out"], hook_out: str, head: int | None = None
) -> Float[Tensor, "n d_model"] | None:
    """What directions at a point add to the residual stream; None where the point does not write into it.

    The directions themselves where the point is as wide as the model; through `W_O` at `hook_z` (that of one head, if
    `head` says so), through `W_out` at `mlp.hook_post`. A norm between there and the residual stream (Gemma) is left
    out.
    """
    point, rows = hook_points.resolve(model, hook_out), rows.detach()
    endings = {name.rpartition(".")[2] for name in point.names}
    if "hook_z" in endings:
        w_o = model.blocks[point.layer].attn.W_O.detach().to(rows)
        return rows @ (w_o.flatten(0, 1) if head is None else w_o[head])
    if any(name.endswith("mlp.hook_post") for name in point.names):
        return rows @ model.blocks[point.layer].mlp.W_out.detach().to(rows)
    inside = endings & {"hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_pre", "hook_pattern"}
    return rows if rows.shape[1] == model.cfg.d_model and not inside else None


def logit_effects(
    directions: Float[Tensor, "d_sae d_model"], w: Float[Tensor, "d_model d_vocab"], n: int
) -> dict[str, Tensor]:
    """Per latent the `n` words its direction raises and lowers most, and a histogram of its effect on all words."""
    n, step, device = min(n, w.shape[1]), max(1, TILE // w.shape[1]), w.device
    # All memory is taken before the loop: new memory for each product, with what is kept of it in between, is given
    # back to the system only at the end, and all products of a wide SAE are tens of gigabytes.
    buffer = w.new_empty(min(step, len(directions)), w.shape[1])
    made = {f"{end}_ids": torch.empty(len(directions), n, dtype=torch.int32, device=device) for end in _ENDS}
    made |= {end: w.new_empty(len(directions), n) for end in _ENDS}
    made["counts"] = torch.zeros(len(directions), N_LOGIT_BINS, dtype=torch.int32, device=device)
    histogram = _Histogram(w)
    for begin in range(0, len(directions), step):
        at = slice(begin, begin + step)
        part = directions[at].to(w.dtype)
        effects = torch.mm(part, w, out=buffer[: len(part)])
        for end in _ENDS:
            found = effects.topk(n, dim=1, largest=end == "top")
            made[end][at], made[f"{end}_ids"][at] = found.values, found.indices.int()
        histogram.count(effects, made["bottom"][at, :1], made["top"][at, :1], made["counts"][at])
    made["range"] = torch.cat([made["bottom"][:, :1], made["top"][:, :1]], 1)
    return {f"logits.{name}": t for name, t in made.items()}


_ENDS = ("top", "bottom")


class _Histogram:
    """Counts in bins of equal width from the smallest to the largest of each row; few rows at a time, in the cache."""

    def __init__(self, like: Float[Tensor, "any d_vocab"]) -> None:
        self.rows = max(1, _IN_CACHE // like.shape[1])
        self.scratch = like.new_empty(self.rows, like.shape[1])
        self.bins = torch.empty_like(self.scratch, dtype=torch.int64)
        self.ones = torch.ones_like(self.scratch, dtype=torch.int32)

    def count(self, values: Tensor, low: Tensor, high: Tensor, counts: Tensor) -> None:
        width = (high - low).clamp_min(1e-30)
        for part, a, w, into in zip(*(t.split(self.rows) for t in (values, low, width, counts)), strict=True):
            n = len(part)
            torch.sub(part, a, out=self.scratch[:n]).div_(w).mul_(N_LOGIT_BINS)
            bins = self.bins[:n].copy_(self.scratch[:n]).clamp_(0, N_LOGIT_BINS - 1)
            into.scatter_add_(1, bins, self.ones[:n])


def weights_bytes(d_sae: int, d_model: int, d_vocab: int, n_logits: int = 10, n_nearest: int = 8) -> int:
    """What the weights' figures take at most while they are made, in bytes, with what is kept of them.

    The larger of logit effects (the folded unembedding, and a block of effects) and of neighbors (one matrix of the
    SAE in float32 and bf16, and a block of cosines).
    """
    kept = d_sae * (2 * 8 * n_logits + 4 * N_LOGIT_BINS + 8 + 2 * 8 * n_nearest + 4)
    logits = 4 * (d_model * d_vocab + max(TILE, d_vocab)) + 20 * max(_IN_CACHE, d_vocab)
    return kept + max(logits if n_logits else 0, nearest_bytes(d_sae, d_model) if n_nearest else 0)
