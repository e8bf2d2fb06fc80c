"""Which latents fire together, as a matrix to look at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saewb.errors import explain
from saewb.features.config import IndexFacts
from saewb.sae.sparse import SparseLatents
from saewb.stats._entries import Sparse
from saewb.stats.correlation_map import MatrixView


def firing_matrix(facts: IndexFacts, tensors: Mapping[str, Tensor], min_fires: int) -> MatrixView:
    """See `FeatureIndex.matrix`."""
    active = tensors["active.token_active"]
    if len(active) == 0:
        what = "this index has no sampled tokens, of which to tell which latents fire together."
        raise ValueError(explain(what, fix="saewb.build_index(..., coactive_tokens=65_536)"))
    token, rank = (active >= 0).nonzero(as_tuple=True)
    latent = active[token, rank].long()
    latents = SparseLatents(token, latent, torch.ones(len(token)), (len(active), facts.d_sae))
    entries = Sparse.of(latents, "phi", min_fires)
    return MatrixView(entries, tensors["counts.by_position"].sum(1) / max(1, facts.n_tokens))
