"""A random SAE of the size and sparsity of another one: the control that an evaluation needs beside it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from saewb.errors import explain
from saewb.sae.base import SparseCoder
from saewb.sae.config import SAEConfig
from saewb.sae.sae import SAE


@torch.no_grad()
def random_sae(sae: SparseCoder, l0: float, center: Float[Tensor, " d_in"] | None = None, *, seed: int = 0) -> SAE:
    """An SAE of random directions with the width, the latents and the L0 of `sae`, at its hook point.

        acts = TopK_l0((x - center) @ W_enc),   W_enc = W_dec^T,   rows of W_dec uniform on the sphere

    Args:
        sae: one that writes where it reads.
        l0: active latents per token, rounded to a whole number, at least 1.
        center: b_dec, subtracted before encoding: the mean activation; None is 0.
        seed: of the directions.

    Raises:
        ValueError: for a transcoder.

    Example:
        >>> random_sae(SAE(SAEConfig(d_in=4, d_sae=9)), l0=2.3)
        SAE(topk k=2, 4 -> 9 latents, float32 on cpu)
    """
    if sae.cfg.is_transcoder:
        raise ValueError(explain(f"{sae!r} is a transcoder.", want="an SAE that writes where it reads"))
    k = min(max(1, round(l0)), sae.d_sae)
    names = {name: getattr(sae.cfg, name) for name in ("hook", "head", "model")}
    cfg = SAEConfig(sae.d_in, sae.d_sae, activation="topk", k=k, pre_bias="tied", **names)
    # Not the seed itself: an SAE under training or a dictionary may have been drawn with it.
    rng = torch.Generator().manual_seed(seed ^ 0x72616E64)
    rows = normalize(torch.randn(sae.d_sae, sae.d_in, generator=rng), dim=1).to(sae.b_dec)
    bias = torch.zeros_like(rows[0]) if center is None else center.to(rows)
    tensors = {"W_enc": rows.T.contiguous(), "b_enc": rows.new_zeros(sae.d_sae), "W_dec": rows, "b_dec": bias}
    return SAE.from_tensors(cfg, tensors)
