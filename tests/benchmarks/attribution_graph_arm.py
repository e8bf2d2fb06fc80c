"""The peer's part of `attribution_graph`: circuit-tracer on the same weights, transcoders and prompt.

Reads what `attribution_graph.compare` wrote into a folder, in an environment of its own:
python -m tests.benchmarks.attribution_graph_arm FOLDER
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from .llama_files import llama
from .measure import peak_mb


def transcoders(tensors: dict[str, torch.Tensor], n_layers: int):
    """JumpReLU transcoders of every layer."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    coders = {}
    for i in range(n_layers):
        own = {name: tensors[f"{i}.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        d_sae, d = own["W_dec"].shape
        coder = SingleLayerTranscoder(d, d_sae, JumpReLU(own["threshold"], 0.1), i, dtype=torch.float32)
        with torch.no_grad():
            coder.W_enc.copy_(own["W_enc"].T)
            for name in ("W_dec", "b_enc", "b_dec"):
                getattr(coder, name).copy_(own[name])
        coders[i] = coder
    return TranscoderSet(coders, "mlp.hook_in", "mlp.hook_out", scan="saewb")


def hooked(folder: Path, coders, n_tokens: int):
    """The model with its transcoders; nothing folded or centered."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    theirs, cfg = llama(folder, n_ctx=max(64, n_tokens))
    model = TransformerLensReplacementModel.from_config(cfg, coders)
    weights = {}
    for name, value in convert_llama_weights(theirs, cfg).items():
        if name.startswith("unembed."):
            name = f"unembed.old_{name}"
        weights[name.replace(".mlp.", ".mlp.old_mlp.")] = value
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name in dict(model.named_parameters()) and "transcoders" not in name]
    assert not unexpected + missing, unexpected + missing
    return model.eval()


def tokenizer(first: int):
    """One that knows the prompt's first token, which is special, and no other."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<bos>": first}, unk_token="<bos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>", unk_token="<bos>"
    )


def main(folder: Path) -> None:
    """Measure."""
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.graph import compute_graph_scores

    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    model = hooked(
        folder, transcoders(load_file(folder / "transcoders.safetensors"), job["n_layers"]), len(job["tokens"])
    )
    model.tokenizer = tokenizer(job["tokens"][0])
    wall, cpu = time.perf_counter(), time.process_time()
    graph = attribute(
        torch.tensor(job["tokens"]), model, batch_size=job["batch_size"], max_feature_nodes=job["max_latents"]
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    replacement, completeness = compute_graph_scores(graph)
    result = {"seconds": wall, "cpu": cpu, "peak_mb": peak_mb(), "replacement": replacement}
    result |= {"completeness": completeness, "n_active": len(graph.active_features)}
    result["version"] = importlib.metadata.version("circuit-tracer")
    (folder / "theirs.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
