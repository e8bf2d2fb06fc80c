"""Run by the interpreter of circuit-tracer's own environment: its graph of a model and transcoders given as files."""

import json
import sys
from pathlib import Path

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.frontend.graph_models import Model
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.create_graph_files import build_model, create_nodes, create_used_nodes_and_edges
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig


def tokenizer():
    """Words w0 ... and <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>", "<pad>", *(f"w{i}" for i in range(28))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def per_layer(tensors, settings):
    coders = {}
    for i in range(settings["n_layers"]):
        own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
        d_sae, d = own["W_dec"].shape
        gate = JumpReLU(own["threshold"], 0.1) if "threshold" in own else torch.nn.functional.relu
        coder = SingleLayerTranscoder(d, d_sae, gate, i, skip_connection="W_skip" in own, dtype=torch.float32)
        with torch.no_grad():
            coder.W_enc.copy_(own["W_enc"].T)
            coder.W_dec.copy_(own["W_dec"])
            coder.b_enc.copy_(own["b_enc"])
            coder.b_dec.copy_(own["b_dec"])
            if "W_skip" in own:
                coder.W_skip.copy_(own["W_skip"].T)
        coders[i] = coder
    return TranscoderSet(coders, settings["read"], settings["write"], scan="saewb")


def cross_layer(tensors, settings):
    n = settings["n_layers"]
    d_sae, d = tensors["0.W_dec"].shape[0], tensors["0.W_dec"].shape[-1]
    coder = CrossLayerTranscoder(
        n,
        d_sae,
        d,
        feature_input_hook=settings["read"],
        feature_output_hook=settings["write"],
        lazy_decoder=False,
        dtype=torch.float32,
        scan="saewb",
    )
    with torch.no_grad():
        coder.W_enc.copy_(torch.stack([tensors[f"{i}.W_enc"].T for i in range(n)]))
        coder.b_enc.copy_(torch.stack([tensors[f"{i}.b_enc"] for i in range(n)]))
        coder.b_dec.copy_(torch.stack([tensors[f"{i}.b_dec"] for i in range(n)]))
        for i in range(n):
            coder.W_dec[i].copy_(tensors[f"{i}.W_dec"])
    return coder


def main(folder):
    settings = json.loads((folder / "settings.json").read_text())
    tensors = load_file(folder / "transcoders.safetensors")
    coders = (cross_layer if settings["kind"] == "clt" else per_layer)(tensors, settings)
    cfg = HookedTransformerConfig(**settings["cfg"])
    model = TransformerLensReplacementModel.from_config(cfg, coders)
    model.tokenizer = tokenizer()
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        name = name.replace(".mlp.", ".mlp.old_mlp.")
        weights["unembed.old_unembed." + name.removeprefix("unembed.") if name.startswith("unembed.") else name] = value
    missing, unexpected = model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters())
    assert not unexpected, unexpected
    assert not [name for name in missing if name in parameters and "transcoders" not in name], missing
    tokens = torch.tensor(settings["tokens"])
    graph = attribute(tokens, model, max_n_logits=5, max_feature_nodes=settings["max_latents"], batch_size=16)
    node_mask, edge_mask, cumulative = prune_graph(graph, 0.8, 0.98)
    replacement, completeness = compute_graph_scores(graph)
    save_file(
        {
            "edges": graph.adjacency_matrix.contiguous(),
            "features": graph.active_features[graph.selected_features].contiguous(),
            "node_mask": node_mask.contiguous(),
            "edge_mask": edge_mask.contiguous(),
            "cumulative": cumulative.contiguous(),
            "scores": torch.tensor([replacement, completeness], dtype=torch.float64),
            "logits": torch.tensor([target.vocab_idx for target in graph.logit_targets]),
        },
        folder / "theirs.safetensors",
    )
    nodes = create_nodes(graph, node_mask, model.tokenizer, cumulative)
    used, edges = create_used_nodes_and_edges(graph, nodes, edge_mask)
    theirs = build_model(graph, used, edges, "slug", "saewb", 0.8, model.tokenizer)
    (folder / "theirs.json").write_text(theirs.model_dump_json())
    read = Model.model_validate_json((folder / "ours.json").read_text())  # raises if it is not what it takes
    (folder / "accepted.json").write_text(read.model_dump_json())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
