"""SAEs that version 0.1.0 saved load, and compute what they computed there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saewb.pretrained.load import load_config, load_sae

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"
FOLDERS = sorted(path.name for path in FIXTURES.glob("sae_*") if path.is_dir())


@pytest.mark.parametrize("name", FOLDERS)
def test_it_loads(name):
    sae = load_sae(FIXTURES / name)
    assert sae.cfg == load_config(FIXTURES / name)
    assert sae.cfg.normalization == ("centered" if name in ("sae_relu_centred", "sae_pursuit_centred") else "none") or (
        name == "sae_topk_layer_norm"
    )


@pytest.mark.parametrize("name", [name for name in FOLDERS if (FIXTURES / f"{name}.pt").exists()])
def test_its_latents_are_those_of_then(name):
    expected = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    with torch.no_grad():
        acts = load_sae(FIXTURES / name).encode(expected["x"])
    torch.testing.assert_close(acts, expected["acts"])


def test_names_of_then_in_metadata():
    metadata = load_sae(FIXTURES / "sae_trained_centred").cfg.metadata
    assert metadata["normalization"] == "centered"
    assert "normalisation" not in metadata
