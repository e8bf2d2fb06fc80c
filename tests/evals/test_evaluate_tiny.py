"""`evaluate` on the embedded SAE finds the figures its cfg.json was given by plain torch code that never saw it."""

import pytest
from helpers.transformer_lens_3 import tiny_bridge

import saewb


@pytest.mark.long
def test_the_held_out_figures_of_the_embedded_sae():
    sae = saewb.load_sae("tiny")
    texts = [document.text for document in saewb.tiny.held_out_texts()]
    evaluation = saewb.evaluate(tiny_bridge(), sae, texts, batch_size=32)
    expected = sae.cfg.metadata["held_out"]
    for name in sorted(set(expected) & set(evaluation.to_frame())):
        assert getattr(evaluation, name) == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert {"fvu", "l0", "ce_with_sae", "ce_mean_ablated", "ce_recovered_zero"} <= set(expected) & set(
        evaluation.to_frame()
    )
