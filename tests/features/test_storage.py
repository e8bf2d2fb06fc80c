"""Folders that older versions of saewb wrote."""

import shutil
from pathlib import Path

import pytest
from helpers import tiny_models

import saewb

V0_1_0 = Path(__file__).parents[1] / "fixtures" / "v0_1_0" / "index"


def test_an_index_of_0_1_0_opens():
    index = saewb.load_index(V0_1_0)
    assert repr(index) == "FeatureIndex(6 latents on 20 tokens, blocks.1.hook_resid_post of small)"
    assert index.density.tolist() == pytest.approx([0.25, 0.25, 0.3, 0.75, 0.4, 1.0])
    latent = index.latent(0)
    assert (latent.n_active, latent.max, latent.mean) == (5, pytest.approx(2.4958978), pytest.approx(1.4442964))
    assert latent.top[0].loss_effects is not None
    assert latent.top[0].text.split()[-1][0] == "w"
    assert latent.decoder_norm == pytest.approx(1.0429238)
    assert list(index.table().index) == list(range(6))


def test_an_index_of_0_1_0_saves_and_is_not_gone_on_with(tmp_path):
    """It does not say of which SAE, model and text it is."""
    index = saewb.load_index(V0_1_0)
    sae = tiny_models.sae("blocks.1.hook_resid_post", d_sae=6)
    how = {"n_top": 2, "window": (2, 1), "n_quantiles": 2, "per_quantile": 1, "coactive_tokens": 8, "first_row": 4}
    second = saewb.build_index(tiny_models.bridge(), sae, tiny_models.tokens(4, 6, seed=1), **how)
    says = r"is of saewb 0\.1\.0, which did not write down of which SAE and model it is(.|\n)*fix:  saewb\.build_index"
    for a, b in ((index, second), (second, index), (index, index)):
        with pytest.raises(ValueError, match=says):
            a.merge(b)
    with pytest.raises(ValueError, match=says):
        saewb.build_index(tiny_models.bridge(), sae, tiny_models.tokens(4, 6, seed=1), extend=index)
    shutil.copytree(V0_1_0, tmp_path / "old")
    with pytest.raises(ValueError, match=says):
        saewb.build_index(tiny_models.bridge(), sae, tiny_models.tokens(4, 6), folder=tmp_path / "old", **how)
    again = saewb.load_index(index.save(tmp_path / "i"))
    assert again.latent(0) == index.latent(0)
    assert again.info == index.info
    assert len(index.find(tiny_models.bridge(), sae, [1, 5, 6])) > 0  # as ever: its neighbors are those of this SAE
