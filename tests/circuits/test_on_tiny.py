"""Graphs of the bundled model with its transcoders: sums, interventions, and how good the transcoders are."""

import pytest
import torch
from helpers.graphs import check_sums
from helpers.transformer_lens_3 import has_hooked_transformer, tiny_bridge, tiny_hooked

import saewb

PROMPT = "Paris is the capital of"


@pytest.fixture(scope="module", params=["bridge", *["hooked"] * has_hooked_transformer()])
def model(request):
    return tiny_bridge() if request.param == "bridge" else tiny_hooked()


def test_effects_sum_and_interventions_are_predicted(model):
    coders = saewb.tiny.transcoders()
    graph = saewb.attribution_graph(model, PROMPT, coders, progress=False)
    check_sums(graph, 1e-4)
    assert graph.is_exact
    assert 0.1 < graph.replacement_score < 1
    assert 0.3 < graph.completeness < 1
    small = graph.pruned()
    assert 5 < len(small) < len(graph) / 2
    latents = graph.nodes[(graph.nodes["kind"] == "latent") & (graph.nodes["layer"] == 0)]
    row = latents.loc[latents["influence"].idxmax()]
    change = (0, int(row["position"]), int(row["latent"]), 0.0)
    result = saewb.intervene(model, PROMPT, coders, [change], direct=True)
    column = graph.edges[:, graph.index(row["id"])]
    targets = graph.nodes[graph.nodes["kind"] == "target"]
    measured = (result.logits - result.clean_logits)[targets["latent"].tolist()]
    torch.testing.assert_close(measured, -column[targets.index.tolist()], rtol=1e-3, atol=1e-4)


def test_transcoders_are_small_and_good():
    folder = saewb.tiny.folder("transcoders")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 2_000_000
    coders = saewb.tiny.transcoders()
    assert [sae.cfg.hook_out for sae in coders] == [f"blocks.{i}.hook_mlp_out" for i in range(4)]
    for sae in coders:
        assert sae.cfg.metadata["held_out"]["fvu"] < 0.8
        assert sae.dtype == torch.float32
