"""Effects of latents on predictions: logit effects of decoder directions, loss effects of ablations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.features.config import IndexInfo
from saewb.features.neighbors import nearest_bytes
from saewb.features.top_contexts import EMPTY
from saewb.interventions.attachment import attach
from saewb.models import hook_points

N_LOGIT_BINS = 40
TILE = 2**24  # maximum of effects [latents, d_vocab] computed at a time (64 MiB in float32)
_IN_CACHE = 2**19  # effects binned at a time
_ENDS = ("top", "bottom")
_ADDED = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed"}
_ADDED |= {"hook_pos_embed"}  # points of the residual stream, or added to it
_ABLATED_ROWS = 8  # rows run at a time, one latent ablated in each


def project_to_residual(
    model: nn.Module, directions: Float[Tensor, "n d_out"], hook_name: str, head: int | None = None
) -> Float[Tensor, "n d_model"] | None:
    """Project directions at a hook point to the residual stream; None if the point does not add to it linearly.

    Unchanged at points of the stream (`hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`), and at those that are
    added to it as they are (`hook_attn_out`, `hook_mlp_out`, `hook_embed`, `hook_pos_embed`); times `W_O` at `hook_z`
    (of one head, if `head` is set), times `W_out` at `mlp.hook_post`, and times the factor with which a model adds them
    (Granite). None for everything else: what a norm or a sublayer reads, queries, keys, values; and where a norm
    follows, as that of Gemma 2 after attention and MLP, or those between the blocks of a post-norm model (OPT-350m).
    """
    point, directions = hook_points.resolve(model, hook_name), directions.detach()
    endings = {name.rpartition(".")[2] for name in point.names}
    config = getattr(getattr(model, "original_model", None), "config", None)
    is_last = point.layer == model.cfg.n_layers - 1 and "hook_resid_post" in endings
    if getattr(config, "do_layer_norm_before", True) is False and not is_last:
        return None
    if endings & _ADDED:
        return directions if directions.shape[1] == model.cfg.d_model else None
    block = None if point.layer is None else model.blocks[point.layer]
    if block is None or getattr(block, "ln1_post", None) is not None or getattr(block, "ln2_post", None) is not None:
        return None
    factor = getattr(config, "residual_multiplier", None) or 1.0
    if "hook_z" in endings:
        w_o = block.attn.W_O.detach().to(directions)
        return directions @ (w_o.flatten(0, 1) if head is None else w_o[head]) * factor
    w_out = getattr(block.mlp, "W_out", None) if any(n.endswith("mlp.hook_post") for n in point.names) else None
    if not isinstance(w_out, Tensor) or tuple(w_out.shape) != (directions.shape[1], model.cfg.d_model):
        return None
    return directions @ w_out.detach().to(directions) * factor


def logit_effects(
    directions: Float[Tensor, "d_sae d_model"], w: Float[Tensor, "d_model d_vocab"], n: int
) -> dict[str, Tensor]:
    """Compute the `n` largest and smallest logit effects of each direction, and their histogram.

    effects = directions @ w        [d_sae, d_vocab], a tile at a time
    """
    n, step, device = min(n, w.shape[1]), max(1, TILE // w.shape[1]), w.device
    # One buffer for all products: separate ones, with results allocated in between, would be freed only at the end, and
    # all products of a wide SAE are tens of gigabytes.
    buffer = w.new_empty(min(step, len(directions)), w.shape[1])
    result = {f"{end}_ids": torch.empty(len(directions), n, dtype=torch.int32, device=device) for end in _ENDS}
    result |= {end: w.new_empty(len(directions), n) for end in _ENDS}
    result["counts"] = torch.zeros(len(directions), N_LOGIT_BINS, dtype=torch.int32, device=device)
    histogram = _Histogram(w)
    for begin in range(0, len(directions), step):
        rows = slice(begin, begin + step)
        part = directions[rows].to(w.dtype)
        effects = torch.mm(part, w, out=buffer[: len(part)])
        for end in _ENDS:
            extreme = effects.topk(n, dim=1, largest=end == "top")
            result[end][rows], result[f"{end}_ids"][rows] = extreme.values, extreme.indices.int()
        histogram.count(effects, result["bottom"][rows, :1], result["top"][rows, :1], result["counts"][rows])
    result["range"] = torch.cat([result["bottom"][:, :1], result["top"][:, :1]], 1)
    return {f"logits.{name}": t for name, t in result.items()}


class _Histogram:
    """Histogram of each row, in equal bins from its minimum to its maximum; few rows at a time, for the cache."""

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
    """Peak memory in bytes of logit effects and nearest latents, with their results.

    The larger of logit effects (folded unembedding, tile of effects) and neighbors (one matrix of the SAE in float32
    and bf16, tile of cosines).
    """
    results = d_sae * (2 * 8 * n_logits + 4 * N_LOGIT_BINS + 8 + 2 * 8 * n_nearest + 4)
    logits = 4 * (d_model * d_vocab + max(TILE, d_vocab)) + 20 * max(_IN_CACHE, d_vocab)
    return results + max(logits if n_logits else 0, nearest_bytes(d_sae, d_model) if n_nearest else 0)


@torch.no_grad()
def loss_effects(
    model: nn.Module,
    sae: nn.Module,
    info: IndexInfo,
    tensors: Mapping[str, Tensor],
    row_of: Callable[[int], Tensor],
    n_tokens: int,
) -> Float[Tensor, "d_sae slots window"]:
    """Compute the loss at each token of top contexts with the latent ablated, minus that with it, in nats.

    The SAE is attached with its error term, so that without an ablation the model is unchanged. The loss at a token is
    that of predicting it from the tokens before it. Contexts that are not run have nan.

    Args:
        model: runs whole rows of text, with one latent ablated in each.
        sae: SAE of the latents.
        info: of the index.
        tensors: of the index.
        row_of: function from the number of a row of text to its ids.
        n_tokens: maximum of tokens to run with an ablation; as many are run without one.
    """
    order, position = tensors["top.order"], tensors["top.position"]
    slot, latent = (order != EMPTY).T.nonzero(as_tuple=True)  # strongest of each latent first
    n = min(len(slot), n_tokens // info.ctx_len)
    slots = int(slot[:n].max()) + 1 if n else 0
    effects = torch.full((info.d_sae, max(1, slots), info.config.window), torch.nan)
    for begin in range(0, n, _ABLATED_ROWS):
        end = min(n, begin + _ABLATED_ROWS)
        i, s = latent[begin:end], slot[begin:end]
        peak = position[i, s]
        ids = torch.stack([row_of(int(p) // info.ctx_len) for p in peak]).to(next(model.parameters()).device)
        by_token = _ablate(model, sae, info, ids, i).cpu()
        window = (peak % info.ctx_len)[:, None] + torch.arange(-info.before, info.after + 1)
        inside = (window >= 0) & (window < info.ctx_len)
        effects[i, s] = torch.where(inside, by_token.gather(1, window.clamp(0, info.ctx_len - 1)), 0)
    return effects


def _ablate(
    model: nn.Module, sae: nn.Module, info: IndexInfo, ids: Tensor, latent: Tensor
) -> Float[Tensor, "rows ctx"]:
    """Increase of the loss at each token when one latent of each row is set to 0."""
    rows = torch.arange(len(ids))

    def ablate(acts: Tensor, hook: object) -> Tensor:
        acts = acts.clone()
        acts[rows, :, latent] = 0
        return acts

    with hook_points.lock(model), attach(model, sae, info.hook, hook_out=info.hook_out, error_term=True):
        clean = _token_losses(model(ids), ids)
        with model.hooks(fwd_hooks=[(f"{info.hook_out}{hook_points.INNER}acts_post", ablate)]):
            return _token_losses(model(ids), ids) - clean


def _token_losses(logits: Tensor, ids: Tensor) -> Float[Tensor, "rows ctx"]:
    ids = ids.to(logits.device)
    losses = torch.zeros(ids.shape, device=ids.device)
    log_probs = logits[:, :-1].float().log_softmax(-1)
    losses[:, 1:] = -log_probs.gather(2, ids[:, 1:, None])[:, :, 0]
    return losses
