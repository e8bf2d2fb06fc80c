"""All latents of an index at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from saewb.features.config import IndexFacts
from saewb.features.ranking import about, commonest, readable
from saewb.features.token_texts import Words

if TYPE_CHECKING:
    import pandas as pd


def table(facts: IndexFacts, tensors: Mapping[str, Tensor], words: Words) -> pd.DataFrame:
    """One row per latent; see `FeatureIndex.table`."""
    import pandas as pd

    n_active = tensors["counts.by_position"].sum(1)
    token, share = commonest(about(facts, tensors))
    columns = {
        "latent": range(facts.d_sae),
        "density": (n_active.double() / max(1, facts.n_tokens)).numpy(),
        "n_active": n_active.numpy(),
        "max": tensors["top.value"][:, 0].clone().numpy(),
        "mean": (tensors["counts.total"] / n_active.clamp_min(1)).numpy(),
        "top_token": [words.of(t) if t >= 0 else "" for t in token.tolist()],
        "single_token_share": share.numpy(),
    }
    if "logits.top_ids" in tensors:
        columns["top_logit"] = [words.of(t) for t in tensors["logits.top_ids"][:, 0].tolist()]
        columns["top_logit_effect"] = tensors["logits.top"][:, 0].clone().numpy()
    if "decoder_norm" in tensors:
        columns["decoder_norm"] = tensors["decoder_norm"].clone().numpy()
    columns["contextual"] = readable(facts, tensors, words).numpy()
    return pd.DataFrame(columns).set_index("latent")
