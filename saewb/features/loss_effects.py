"""What the model's predictions lose when one latent is switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.features.config import IndexFacts
from saewb.features.top_contexts import EMPTY
from saewb.interventions.attachment import attach
from saewb.models import hook_points

_ROWS = 8  # rows run at a time


@torch.no_grad()
def loss_effects(
    model: nn.Module,
    sae: nn.Module,
    facts: IndexFacts,
    tensors: Mapping[str, Tensor],
    row_of: Callable[[int], Tensor],
    n_tokens: int,
) -> Float[Tensor, "d_sae slots window"]:
    """Loss of each token of top contexts with the latent at 0, less the loss with it, in nats; nan where not computed.

    The SAE is attached with its error term, so that with all latents on the model is as it is. At a token is the loss
    of predicting that token from those before it.

    Args:
        model: runs whole rows of text, one latent switched off in each.
        sae: whose latents.
        facts: of the index.
        tensors: of the index.
        row_of: ids of a row of text by its number.
        n_tokens: to be run at most, with a latent off; as many again without.
    """
    order, position = tensors["top.order"], tensors["top.position"]
    slot, latent = (order != EMPTY).T.nonzero(as_tuple=True)  # strongest of each latent first
    n = min(len(slot), n_tokens // facts.ctx_len)
    slots = int(slot[:n].max()) + 1 if n else 0
    made = torch.full((facts.d_sae, max(1, slots), facts.plan.window), torch.nan)
    for begin in range(0, n, _ROWS):
        i, s = latent[begin : min(n, begin + _ROWS)], slot[begin : min(n, begin + _ROWS)]
        where = position[i, s]
        ids = torch.stack([row_of(int(p) // facts.ctx_len) for p in where]).to(next(model.parameters()).device)
        effect = _effect(model, sae, facts, ids, i).cpu()
        places = (where % facts.ctx_len)[:, None] + torch.arange(-facts.before, facts.after + 1)
        inside = (places >= 0) & (places < facts.ctx_len)
        made[i, s] = torch.where(inside, effect.gather(1, places.clamp(0, facts.ctx_len - 1)), 0)
    return made


def _effect(model: nn.Module, sae: nn.Module, facts: IndexFacts, ids: Tensor, latent: Tensor) -> Tensor:
    which = torch.arange(len(ids)), latent

    def off(acts: Tensor, hook: object) -> Tensor:
        acts = acts.clone()
        acts[which[0], :, which[1]] = 0
        return acts

    with hook_points.lock(model), attach(model, sae, facts.hook, hook_out=facts.hook_out, error_term=True):
        clean = _losses(model(ids), ids)
        with model.hooks(fwd_hooks=[(f"{facts.hook_out}{hook_points.INNER}acts_post", off)]):
            return _losses(model(ids), ids) - clean


def _losses(logits: Tensor, ids: Tensor) -> Float[Tensor, "rows ctx"]:
    found = torch.zeros(ids.shape, device=ids.device)
    logp = logits[:, :-1].float().log_softmax(-1)
    found[:, 1:] = -logp.gather(2, ids[:, 1:, None])[:, :, 0]
    return found
