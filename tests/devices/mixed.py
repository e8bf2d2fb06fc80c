"""A model on two devices, and SAEs on another device than the model: for a process with the second device."""

from __future__ import annotations

import copy

import torch
from devices.compare import differences
from devices.runs import EARLY, LATE, runs, saes
from helpers import tiny_models
from helpers.second_device import DEVICE

import saewb


def spread_model():
    """Embedding and first block on the CPU, the rest on the second device, by accelerate, as `device_map=` does it."""
    from accelerate import dispatch_model

    on_cpu = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    on_device = ("model.layers.1", "model.layers.2", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(on_cpu, "cpu"), **dict.fromkeys(on_device, str(DEVICE))}
    hf_model = dispatch_model(copy.deepcopy(tiny_models.hf_llama()), device_map=device_map, main_device="cpu")
    hf_model.config.name_or_path = "small"
    return saewb.load_model(hf_model, tokenizer=tiny_models.tokenizer())


def of_a_spread_model():
    """Lines that say what differs from the model on the CPU, and which SAE or activation is not at its hook point."""
    a, b = saes()
    model, expected = spread_model(), runs(tiny_models.new_bridge(), a, b)
    for name, run in runs(model, a, b.to(DEVICE)).items():
        try:
            result = run()
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"
            continue
        b.to("cpu")
        yield from differences(expected[name](), result, 1e-4, name)
        b.to(DEVICE)
        if name == "stream" and (result[EARLY].device.type, result[LATE].device) != ("cpu", DEVICE):
            yield f"{name}: {[value.device for value in result.values()]}"
        if name == "transcoder" and result.device.type != "cpu":  # of the point it reads
            yield f"{name}: trained on {result.device}"


def of_saes_elsewhere():
    """Lines that say what does not refuse an SAE on another device with the line to type."""
    model = tiny_models.new_bridge()
    model.to(DEVICE, print_details=False)
    elsewhere = {name: run for name, run in runs(model, *saes()).items() if name in NEEDS_SAES}
    fix = f"  fix:  sae.to('{DEVICE}')"
    for name, run in elsewhere.items():
        try:
            run()
            yield f"{name} takes SAEs on the CPU for a model on {DEVICE}"
        except ValueError as error:
            if fix not in str(error):
                yield f"{name}: {error}"
        except RuntimeError as error:
            yield f"{name}: RuntimeError: {error}"
    how = {"n_tokens": 96, "batch_tokens": 24, "ctx_len": 12, "device": "cpu"}
    sae = (
        saewb.train(model, ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11"] * 12, saewb.TopK(20, k=3), hook=LATE, **how)
        .wait()
        .sae
    )
    if sae.device != torch.device("cpu"):
        yield f"a training with device='cpu' gave an SAE on {sae.device}"


NEEDS_SAES = ("attach", "attach with error", "gradients", "steer", "evaluate", "index", "edges", "read_prompt")
NEEDS_SAES += (
    "attribute, gradient",
    "attribute, integrated",
    "attribute, ablation",
    "next_tokens",
    "matrix",
    "generate",
)
