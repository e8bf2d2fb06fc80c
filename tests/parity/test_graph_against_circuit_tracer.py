"""circuit-tracer as the oracle of attribution graphs: edges, masks, scores and files, on the same weights.

Its interpreter, with circuit-tracer 0.5, is named by SAEWB_CIRCUIT_TRACER: it needs an environment of its own, with
transformers 4.57.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.families import HOOKED, family
from helpers.graphs import IDS, cross_layer
from helpers.transformer_lens_3 import has_hooked_transformer
from safetensors.torch import load_file, save_file

import saewb
from saewb.errors import FormatError

PEER = os.environ.get("SAEWB_CIRCUIT_TRACER")
pytestmark = pytest.mark.skipif(
    not (PEER and has_hooked_transformer()), reason="SAEWB_CIRCUIT_TRACER names no interpreter, or no HookedTransformer"
)
READ = "ln2.hook_normalized"
CASES = {
    "llama": ("hooked-llama", {"activation": "relu"}, 10_000),
    "gemma2": ("hooked-gemma2", {"activation": "jumprelu"}, 10_000),
    "qwen3_skip": ("hooked-qwen3", {"activation": "relu", "skip": True}, 10_000),
    "llama_ranked": ("hooked-llama", {"activation": "relu"}, 60),
    "llama_clt": ("hooked-llama", None, 10_000),
}


def coders_of(kind):
    if kind is None:
        return cross_layer(READ, widths=(12, 12, 12))
    return [
        tiny_models.sae(f"blocks.{i}.{READ}", hook_out=f"blocks.{i}.hook_mlp_out", seed=i, **kind) for i in range(3)
    ]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Graphs of both: one process for all cases, since its start takes longest."""
    root, ours = tmp_path_factory.mktemp("circuit-tracer"), {}
    for name, (model_name, kind, max_latents) in CASES.items():
        folder, model, coders = root / name, family(model_name), coders_of(kind)
        folder.mkdir()
        graph = saewb.attribution_graph(
            model, IDS, coders, max_targets=5, max_latents=max_latents, batch_size=16, progress=False
        )
        ours[name] = graph
        shape = model_name.partition("-")[2]
        sizes = {"n_layers": 3, "d_model": 16, "n_ctx": 64, "d_head": 4, "n_heads": 4, "d_mlp": 24}
        cfg = {**sizes, "d_vocab": tiny_models.VOCAB, "model_name": shape, "device": "cpu", **HOOKED[shape]}
        settings = {
            "cfg": cfg,
            "n_layers": 3,
            "read": READ,
            "write": "hook_mlp_out",
            "tokens": IDS[0].tolist(),
            "max_latents": max_latents,
            "kind": "clt" if kind is None else "per layer",
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        save_file(weights, folder / "model.safetensors")
        if kind is None:
            tensors = {f"{i}.{k}": t.detach().clone() for k, of in coders.tensors().items() for i, t in enumerate(of)}
        else:
            tensors = {f"{i}.{k}": t.detach().clone() for i, c in enumerate(coders) for k, t in c.tensors().items()}
        save_file(tensors, folder / "transcoders.safetensors")
        graph.pruned().to_json(folder / "ours.json")
    script = Path(__file__).with_name("circuit_tracer_peer.py")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
    done = subprocess.run(
        [PEER, script, *(root / name for name in CASES)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (ours[name], root / name) for name in CASES}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_edges_masks_and_scores_are_those_of_circuit_tracer(cases, name):
    graph, folder = cases[name]
    theirs = load_file(folder / "theirs.safetensors")
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    got = list(zip(latents["layer"], latents["position"], latents["latent"], strict=True))
    assert got == [tuple(row) for row in theirs["features"].tolist()]
    assert graph.nodes.loc[graph.nodes["kind"] == "target", "latent"].tolist() == theirs["logits"].tolist()
    scale = float(theirs["edges"].abs().max())
    torch.testing.assert_close(graph.edges, theirs["edges"], rtol=1e-4, atol=1e-5 * scale)
    assert [graph.replacement_score, graph.completeness] == pytest.approx(theirs["scores"].tolist(), rel=1e-4)
    node_mask, edge_mask = graph.masks(0.8, 0.98)
    assert torch.equal(node_mask, theirs["node_mask"])
    assert torch.equal(edge_mask, theirs["edge_mask"] & (theirs["edges"] != 0))
    cumulative = torch.tensor(graph.nodes["cumulative"].to_numpy()).float()
    inner = ~graph.is_kind("target")
    reached = torch.tensor(graph.nodes["influence"].to_numpy()) > 1e-6
    torch.testing.assert_close(cumulative[inner & reached], theirs["cumulative"][inner & reached], rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_each_reads_what_the_other_wrote(cases, name):
    graph, folder = cases[name]
    accepted, ours = (json.loads((folder / f"{file}.json").read_text()) for file in ("accepted", "ours"))
    assert accepted["nodes"] == ours["nodes"]
    assert accepted["links"] == ours["links"]
    ids = [node["node_id"] for node in json.loads((folder / "theirs.json").read_text())["nodes"]]
    if len(set(ids)) < len(ids):  # an error and a latent of layer 0
        with pytest.raises(FormatError, match="one id"):
            saewb.load_graph(folder / "theirs.json")
        return
    theirs = saewb.load_graph(folder / "theirs.json")
    pruned = graph.pruned()
    connected = (pruned.edges != 0).any(0) | (pruned.edges != 0).any(1) | pruned.is_kind("token", "target")
    assert set(theirs.nodes["id"]) == set(pruned.nodes["id"][connected.numpy()])
    ids = theirs.nodes["id"].tolist()
    index = [pruned.index(node) for node in ids]
    torch.testing.assert_close(theirs.edges, pruned.edges[index][:, index], rtol=1e-3, atol=1e-4)
