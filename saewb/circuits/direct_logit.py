"""Direct logit attribution: effect of active latents on one token's logit through final norm and unembedding only.

    effect = d(decode(latents)) / d(latent i) * a_i  .  u / length          per position

with u the token's column of the folded, centered unembedding (`saewb.features.logit_effects`) and length the scale of
the final norm at that position. Where the SAE does not normalize, the first factor is W_dec[i].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saewb.circuits.attribution_nodes import slopes, tiles
from saewb.features.logit_effects import project_to_residual
from saewb.interventions.site import Site
from saewb.models.unembed import final_norm_scale, unembedding_column
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.sparse import SparseLatents

_ROWS = 4096
"""Latents of a cross-layer transcoder whose decoder directions are held at a time."""


@torch.no_grad()
def active_latents(site: Site, x: Float[Tensor, "1 pos d_in"], plain: Bool[Tensor, " pos"]) -> SparseLatents:
    """Encode the active latents at plain positions, float32 on the CPU; 64 MiB of dense ones at a time."""
    plain = plain.to(x.device)
    tiles = (torch.where(plain[tile, None], site.encode(x[:, tile])[0], 0) for tile in _tiles(site, x.shape[1]))
    latents = SparseLatents.cat([SparseLatents.from_dense(tile) for tile in tiles])
    return SparseLatents(latents.token.cpu(), latents.latent.cpu(), latents.act.float().cpu(), latents.shape)


@torch.no_grad()
def direct_effects(
    model: nn.Module, site: Site, x: Float[Tensor, "1 pos d_in"], latents: SparseLatents, token: int, final: Tensor
) -> Float[Tensor, " active"]:
    """Direct effect of each active latent on the logit of `token` at its own position; nan without a direct path.

    There is none where the SAE writes to a point that does not add to the residual stream (queries, keys, values), and
    for crosscoders, which rewrite the same stream at every layer.

    Args:
        model: the clean model.
        site: the SAE and its write point.
        x: input of the SAE.
        latents: `active_latents` of `x`.
        token: token id.
        final: final residual stream, `[pos, d_model]`.
    """
    unembedding = unembedding_column(model, token)
    length = final_norm_scale(model, final).cpu()
    if site.clt_layer is None:
        effects = _effects_of_sae(model, site, x, latents, unembedding)
    else:
        effects = _effects_of_layer(model, site, latents, unembedding)
    if effects is None:
        return torch.full_like(latents.act, torch.nan)
    return effects / length[latents.token]


def _effects_of_sae(
    model: nn.Module, site: Site, x: Tensor, latents: SparseLatents, unembedding: Tensor
) -> Tensor | None:
    u = _direction_at(model, site.sae, site.hook_name_out, site.head, unembedding)
    if u is None:
        return None
    effects = [latents.act[:0]]
    for tile in _tiles(site, x.shape[1]):
        acts, _, slope = slopes(site.sae, x[:, tile], u.expand(1, tile.stop - tile.start, -1))
        begin, end = torch.searchsorted(latents.token, torch.tensor([tile.start, tile.stop])).tolist()
        position, latent = latents.token[begin:end] - tile.start, latents.latent[begin:end]
        effects.append((acts * slope)[0, position, latent].float().cpu())
    return torch.cat(effects)


def _effects_of_layer(model: nn.Module, site: Site, latents: SparseLatents, unembedding: Tensor) -> Tensor | None:
    clt: CrossLayerTranscoder = site.sae
    hooks_out = clt.cfg.hooks_out[site.clt_layer :]
    directions = [_direction_at(model, clt, hook, None, unembedding) for hook in hooks_out]
    if not clt.cfg.is_transcoder or any(u is None for u in directions):
        return None
    u = torch.stack(directions)
    unique, index = latents.latent.unique(return_inverse=True)
    W_dec = clt.W_dec[site.clt_layer]
    parts = [(W_dec[some.to(W_dec.device)].to(u) * u).sum((1, 2)).float().cpu() for some in unique.split(_ROWS)]
    return latents.act * torch.cat([latents.act[:0], *parts])[index]


def _tiles(site: Site, n: int) -> Iterator[slice]:
    return tiles(n, site.d_sae, whole=site.sae.looks_back)


def _direction_at(model: nn.Module, sae: nn.Module, hook: str, head: int | None, unembedding: Tensor) -> Tensor | None:
    """Direction at a hook point that raises the token's logit; None if the point does not add to the stream."""
    eye = torch.eye(sae.cfg.d_out, device=sae.device)
    out = project_to_residual(model, eye, hook, head)
    return None if out is None else (out @ unembedding.to(out)).to(sae.dtype)
