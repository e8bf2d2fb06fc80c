"""Entries of the catalogue over files of their layout: both say the same of where an SAE belongs. No network."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import deepseek_r1, dictionary_learning, mntss, mwhanna, qwen_scope
from helpers.format_tensors import weights
from pretrained.formats import (
    test_gemma_scope,
    test_gemma_scope_2,
    test_llama_scope,
    test_single_files,
    test_temporal_conf,
)

from saewb.hub import Snapshot
from saewb.pretrained import catalogue, load


def _gemma_2(place):
    test_gemma_scope.written(place)


def _gemma_3(place):
    test_gemma_scope_2.written(place, config=None)


PUBLISHED = {  # (release, id): writes small files of that layout where the entry's path says
    ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"): _gemma_2,
    ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_21"): _gemma_2,
    ("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonical"): _gemma_2,
    ("gemma-scope-9b-pt-att", "layer_7/width_16k/average_l0_{}"): _gemma_2,
    ("gemma-scope-2b-pt-mlp-canonical", "layer_7/width_16k/canonical"): _gemma_2,
    ("gemma-scope-2b-pt-transcoders", "layer_4/width_16k/average_l0_88"): _gemma_2,
    ("gemma-scope-2-4b-pt-res", "layer_17_width_16k_l0_big"): _gemma_3,
    ("gemma-scope-2-270m-pt-att-all", "layer_3_width_16k_l0_big"): _gemma_3,
    ("gemma-scope-2-1b-it-mlp-all", "layer_3_width_16k_l0_big"): _gemma_3,
    ("gemma-scope-2-1b-it-transcoders-all", "layer_3_width_16k_l0_big"): _gemma_3,
    ("gemma-scope-2-4b-pt-transcoders", "transcoder/layer_17_width_16k_l0_small"): _gemma_3,
    ("qwen-scope-3-1.7b-base-w32k-l50", "layer9"): lambda place: qwen_scope(place.parent),
    ("mwhanna-qwen3-4b-transcoders", "layer_12"): lambda place: mwhanna(place.parent),
    ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_1"): lambda place: mntss(place.parent),
    ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post"): lambda place: deepseek_r1(place.parent),
    ("goodfire-llama-3.1-8b-instruct", "layer_19"): lambda place: test_single_files.written_goodfire(
        place.parent, weights(), name=place.name
    ),
    ("gpt2-small-hook-z-kk", "blocks.0.hook_z"): lambda place: test_single_files.written_hook_z(place.parent),
    ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_3_trainer_1"): lambda place: dictionary_learning(
        place, "BatchTopKSAE"
    ),
    ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post"): lambda place: test_temporal_conf.written(
        place, test_temporal_conf.weights()
    ),
    ("llama_scope_r1_distill", "l8r_800m_slimpajama"): lambda place: test_llama_scope.written_r1(
        place, test_llama_scope.made_r1(0.5)
    ),
}


@pytest.mark.parametrize(("release", "id"), PUBLISHED)
def test_files_and_catalogue_agree(release, id, tmp_path, monkeypatch):
    write = PUBLISHED[release, id]
    if id.endswith("{}"):  # any of them
        id = next(one for one in catalogue.ids(release) if one.startswith(id[:-2]))
    entry = catalogue.find(release, id)
    place = tmp_path / entry.path
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place)
    monkeypatch.setattr(load, "snapshot", lambda *_, **__: Snapshot(tmp_path, "", {entry.path: None}, ()))
    sae = load.load_sae(release, id, dtype=torch.float32)
    assert sae.cfg.hook == entry.hook
    assert sae.cfg.hook_out == entry.hook_out
    assert sae.cfg.model == entry.model
    assert sae.cfg.metadata["source"]["release"] == release
    assert sae.cfg.metadata.get("neuronpedia_id") == entry.neuronpedia
    activation = "relu" if entry.architecture == "gated" else entry.architecture
    assert (
        type(sae).__name__ == "TemporalSAE"
        or sae.cfg.activation == activation
        or entry.format == "mntss_clt_layer_transcoder"
    )
