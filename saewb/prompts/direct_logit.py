"""What active latents add to the logit of one word directly: through the final norm and the unembedding only.

    effect = d(decode(latents)) / d(latent i) * a_i  .  u / length          per position

with u the word's column of the folded, centered unembedding (`saewb.features.logit_effects`) and length what the final norm
divides the residual stream by at that position. Where the SAE has no scaling, the first factor is W_dec[i].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.features.logit_effects import project_to_residual
from saewb.models.unembed import final_length, word_direction
from saewb.prompts.attribution_nodes import slopes, tiles
from saewb.sae.cross_layer import CrossLayerTranscoder

_ROWS = 4096  # latents of a cross-layer transcoder whose decoder rows are held at a time


@dataclass(frozen=True, eq=False)
class Part:
    """What has one list of latents: an SAE, or one layer of a cross-layer transcoder."""

    sae: nn.Module
    owner: int  # which of those given it is, or is a layer of
    layer: int | None  # of a cross-layer transcoder, from 0
    name: str  # "point read" or "point read => point written"
    read: str  # the point it reads
    write: str  # the point it writes; of a layer, the first one

    @property
    def d_sae(self) -> int:
        """Its latents."""
        return self.sae.cfg.d_sae if self.layer is None else self.sae.cfg.d_sae[self.layer]

    def encode(self, x: Float[Tensor, "1 pos d_in"]) -> Float[Tensor, "1 pos d_sae"]:
        """Its latents at some positions."""
        return self.sae.encode(x) if self.layer is None else self.sae.encode_layer(x, self.layer)

    def tiles(self, n: int) -> Iterator[slice]:
        """Positions of a prompt of n, as many at a time as have 64 MiB of latents."""
        return tiles(n, self.d_sae, whole=getattr(self.sae, "looks_back", False))


@dataclass(frozen=True, eq=False)
class Rows:
    """Where latents of one part are active."""

    position: Int[Tensor, " rows"]  # ascending
    latent: Int[Tensor, " rows"]
    activation: Float[Tensor, " rows"]


@torch.no_grad()
def active_rows(part: Part, x: Float[Tensor, "1 pos d_in"], plain: Tensor) -> Rows:
    """Every latent that is not 0 at a position that counts; 64 MiB of dense latents at a time."""
    found: list[tuple[Tensor, ...]] = []
    for at in part.tiles(x.shape[1]):
        latents = part.encode(x[:, at])[0]
        position, latent = ((latents != 0) & plain[at, None]).nonzero(as_tuple=True)
        found.append((position + at.start, latent, latents[position, latent].float()))
    return Rows(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


@torch.no_grad()
def direct_effects(
    model: nn.Module, part: Part, x: Float[Tensor, "1 pos d_in"], rows: Rows, token: int, final: Tensor
) -> Float[Tensor, " rows"]:
    """What each active latent adds to the logit of `token` at its own position; nan where nothing direct is known.

    That is: where the SAE writes to a point that does not add to the residual stream (queries, keys, values), and for
    crosscoders, which write the same stream anew at every layer.

    Args:
        model: the clean one.
        part: whose latents.
        x: what it read.
        rows: from `active_rows`, with this `x`.
        token: the word's id.
        final: the final residual stream, `[pos, d_model]`.
    """
    word = word_direction(model, token)
    length = final_length(model, final).cpu()
    found = _of_layer(model, part, rows, word) if part.layer is not None else _of_sae(model, part, x, rows, word)
    return rows.activation.new_full((len(rows.latent),), torch.nan) if found is None else found / length[rows.position]


def _of_sae(model: nn.Module, part: Part, x: Tensor, rows: Rows, word: Tensor) -> Tensor | None:
    u = _toward(model, part.sae, part.write, part.sae.cfg.head, word)
    if u is None:
        return None
    found = [rows.activation[:0]]
    for at in part.tiles(x.shape[1]):
        some = x[:, at]
        latents, _, slope = slopes(part.sae, some, u.expand(1, some.shape[1], -1))
        begin, end = torch.searchsorted(rows.position, torch.tensor([at.start, at.stop])).tolist()
        here, latent = rows.position[begin:end] - at.start, rows.latent[begin:end]
        found.append((latents * slope)[0, here, latent].float().cpu())
    return torch.cat(found)


def _of_layer(model: nn.Module, part: Part, rows: Rows, word: Tensor) -> Tensor | None:
    clt: CrossLayerTranscoder = part.sae
    later = clt.cfg.hooks_out[part.layer :]
    towards = [_toward(model, clt, hook, None, word) for hook in later]
    if not clt.cfg.is_transcoder or any(u is None for u in towards):
        return None
    u = torch.stack(towards)
    latents, which = rows.latent.unique(return_inverse=True)
    decoder = clt.W_dec[part.layer]
    parts = [(decoder[some.to(decoder.device)].to(u) * u).sum((1, 2)).float().cpu() for some in latents.split(_ROWS)]
    return rows.activation * torch.cat([rows.activation[:0], *parts])[which]


def _toward(model: nn.Module, sae: nn.Module, hook: str, head: int | None, word: Tensor) -> Tensor | None:
    """The direction at a point which raises the word's logit."""
    eye = torch.eye(sae.cfg.d_out, device=sae.device)
    out = project_to_residual(model, eye, hook, head)
    return None if out is None else (out @ word.to(out)).to(sae.dtype)
