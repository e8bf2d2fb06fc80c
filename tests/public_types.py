"""What an editor knows of saewb's public names, checked by pyright in .ci/run; never run."""

from typing import Any

from typing_extensions import assert_type

import saewb
from saewb.features.index import FeatureIndex
from saewb.interventions.attachment import Attachment
from saewb.sae.sae import SAE
from saewb.training.run import Run


def notebook(model: Any, texts: list[str]) -> None:
    """The cells of the README: a name that pyright cannot resolve is Unknown, and fails here."""
    sae = SAE(saewb.SAEConfig(d_in=8, d_sae=32, activation="topk", k=3))
    with saewb.attach(model, sae) as attached:
        assert_type(attached, Attachment)
    assert_type(saewb.evaluate(model, sae, texts), saewb.Evaluation)
    assert_type(saewb.read_prompt(model, "A cat", sae), saewb.PromptReading)
    assert_type(saewb.next_tokens(model, "A cat"), saewb.NextTokens)
    assert_type(saewb.build_index(model, sae, texts), FeatureIndex)
    assert_type(saewb.contrast(model, sae, texts, texts), saewb.Contrast)
    assert_type(saewb.contrast(model, [sae], texts, texts), list[saewb.Contrast])
    assert_type(saewb.sparse_probe(model, sae, texts, [0, 1]), saewb.Probes)
    assert_type(saewb.directions({"a": sae.W_dec[0]}, "hook_embed"), SAE)
    assert_type(saewb.load_index("my.index"), FeatureIndex)
    assert_type(saewb.train(model, texts, saewb.TopK(d_sae=32, k=3), hook="blocks.0.hook_resid_post", n_tokens=10), Run)
