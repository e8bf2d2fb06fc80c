"""Files of published layouts, written as the real ones are but small, each with its arithmetic by numpy.

All dimensions differ, no bias is zero, decoder rows differ in norm, thresholds lie among the pre-activations. Keys,
their order, dtypes and file names are those of real files; values too, but for the dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, F, O, K = 16, 40, 12, 5  # noqa: E741  (the letters of the layouts' descriptions)


@dataclass
class Written:
    """A layout's files, and what they mean."""

    place: Path  # what to read
    stored: dict[str, torch.Tensor]  # as in the file
    save: Callable[[dict], None]  # writes other tensors in their place
    expected: Callable  # x, float64 -> latents, output


def inputs(*shape, d=D, seed=7):
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.5, (*(shape or (6,)), d))


def drawn(shapes, dtype=torch.float32, seed=0, std=0.4):
    """Random tensors; thresholds are positive and about as large as pre-activations are."""
    rng = torch.Generator().manual_seed(seed)
    result = {name: (torch.randn(shape, generator=rng) * std).to(dtype) for name, shape in shapes.items()}
    return result | {name: (t.abs() * 3 + 0.1).to(dtype) for name, t in result.items() if "threshold" in name}


def numbers(tensors):
    return {n: t.double().numpy() for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def relu(p, threshold=0.0):
    return np.where((p > threshold) & (p > 0), p, 0)


def largest(p, k, by=lambda p: p):
    """The k largest of each row by `by`, the rest 0."""
    saved = np.zeros_like(p)
    for row, out in zip(p.reshape(-1, p.shape[-1]), saved.reshape(-1, p.shape[-1]), strict=True):
        chosen = np.argsort(-by(row), kind="stable")[:k]
        out[chosen] = row[chosen]
    return saved


def save_config(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def assert_formula(sae, written, x=None):
    """encode, decode and forward are what the layout's own arithmetic gives, within 1e-5."""
    x = inputs(2, 5) if x is None else x
    z, y = written.expected(x)
    arguments = torch.from_numpy(x).float()
    active = (z != 0).mean()
    assert 0.02 < active < 0.9, f"{active:.0%} of the latents are active: the fixture checks too little"
    with torch.no_grad():
        got = sae.encode(arguments)
        np.testing.assert_allclose(got, z, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(sae.decode(got, arguments), y, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(sae(arguments), y, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(sae.encode(arguments, latents=[3, 1]), z[..., [3, 1]], atol=1e-5, rtol=1e-5)


def assert_layers_formula(clt, written, n=3):
    """The same of a CrossLayerTranscoder."""
    xs = [inputs(2, 5, seed=seed) for seed in range(n)]
    zs, ys = written.expected(xs)
    arguments = [torch.from_numpy(x).float() for x in xs]
    with torch.no_grad():
        latents = clt.encode(arguments)
        for got, want in zip(
            [*latents, *clt.decode(latents, arguments), *clt(arguments)], [*zs, *ys, *ys], strict=True
        ):
            np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-5)
    assert all(0.02 < (z != 0).mean() < 0.9 for z in zs)


# --- dictionary_learning

_RUN = {
    "lr": 5e-05,
    "warmup_steps": 1000,
    "steps": 244140,
    "seed": 0,
    "activation_dim": D,
    "dict_size": F,
    "device": "cuda:0",
    "layer": 3,
    "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
    "wandb_name": "a-run",
    "submodule_name": "resid_post_layer_3",
}
_BUFFER = {"d_submodule": D, "io": "out", "n_ctxs": 122, "ctx_len": 1024, "refresh_batch_size": 24}
_LINEAR = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
_PLAIN = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
DICT_CLASSES = {
    "AutoEncoder": {"bias": (D,), **_LINEAR},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": (D,)},
    "GatedAutoEncoder": {
        **{"decoder_bias": (D,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)},
        **{"encoder.weight": (F, D), "decoder.weight": (D, F)},
    },
    "AutoEncoderTopK": {"b_dec": (D,), **_LINEAR},
    "BatchTopKSAE": {"b_dec": (D,), **_LINEAR},
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": (F,)},
}
TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


def dictionary_learning(folder, kind, *, threshold=1.5, wrap=False, extras=True, trainer=(), buffer=None):
    stored, run = drawn(DICT_CLASSES[kind]), {"trainer_class": TRAINERS[kind], "dict_class": kind, **_RUN}
    if "TopK" in kind:
        run["k"] = K
        if extras or kind != "AutoEncoderTopK":
            stored |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if kind == "MatryoshkaBatchTopKSAE":
        stored["group_sizes"] = torch.tensor([8, 12, 20])
    config = {"trainer": {**run, **dict(trainer)}, "buffer": _BUFFER if buffer is None else buffer}
    save_config(folder / "config.json", config)

    def save(tensors):
        whole = {"step": 7, "ae": tensors, "optimizer": {}, "config": run, "norm_factor": 0.3} if wrap else tensors
        torch.save(whole, folder / "ae.pt")

    save(stored)
    w = numbers(stored)
    bias = next((w[n] for n in ("bias", "decoder.bias", "decoder_bias", "b_dec") if n in w), None)
    enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T

    def expected(x):
        h = (x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - bias) @ enc
        if kind == "GatedAutoEncoder":
            z = (h + w["gate_bias"] > 0) * relu(h * np.exp(w["r_mag"]) + w["mag_bias"])
        else:
            p = h + w.get("encoder.bias", w.get("b_enc"))
            z = relu(largest(p, K)) if kind == "AutoEncoderTopK" else relu(p, w.get("threshold", 0.0))
        return z, z @ dec + bias

    return Written(folder, stored, save, expected)


# --- DeepSeek R1, OpenAI, Qwen Scope: one .pt file


def _pt(place, stored, expected):
    place.parent.mkdir(parents=True, exist_ok=True)
    written = Written(place, stored, lambda tensors: torch.save(tensors, place), expected)
    written.save(stored)
    return written


def deepseek_r1(folder, name="DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"):
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    stored = drawn(shapes, torch.bfloat16)
    w = numbers(stored)

    def expected(x):
        z = relu(x @ w["encoder.weight"].T + w["encoder.bias"])
        return z, z @ w["decoder.weight"].T + w["decoder.bias"]

    return _pt(folder / name, stored, expected)


def openai(folder, activation="TopK", site="resid_post_mlp_v5_32k", layer=6):
    shapes = {"pre_bias": (D,), "latent_bias": (F,), "encoder.weight": (F, D), "decoder.weight": (D, F)}
    stored = {
        **drawn(shapes),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.ones(F),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    w = numbers(stored)

    def expected(x):
        mean, std = 0.0, 1.0
        if activation == "TopK":
            mean = x.mean(-1, keepdims=True)
            std = x.std(-1, ddof=1, keepdims=True)
            x = (x - mean) / (std + 1e-5)
        p = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        z = relu(largest(p, K)) if activation == "TopK" else relu(p)
        return z, (z @ w["decoder.weight"].T + w["pre_bias"]) * std + mean

    return _pt(folder / f"gpt2-small/{site}/autoencoders/{layer}.pt", stored, expected)


QWEN = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": F, "k": K}
QWEN |= {"num_layers": 28, "hook_point": "resid_post", "dtype": "float32"}


def qwen_scope(folder, layer=9, config=QWEN):
    stored = drawn({"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)})
    w = numbers(stored)
    if config is not None:
        save_config(folder / "config.json", config)

    def expected(x):
        z = relu(largest(x @ w["W_enc"].T + w["b_enc"], K))
        return z, z @ w["W_dec"].T + w["b_dec"]

    return _pt(folder / f"layer{layer}.sae.pt", stored, expected)


# --- sparsify

SPARSIFY = {  # folder, and cfg.json but for its dimensions
    "pythia": (
        "layers.3",
        {"expansion_factor": 2, "normalize_decoder": True, "num_latents": F, "k": K, "signed": False},
    ),
    "mlp": (
        "layers.3.mlp",
        {"expansion_factor": 2, "normalize_decoder": True, "num_latents": F, "k": K, "signed": False},
    ),
    "llama": ("layers.30", {"expansion_factor": 3, "normalize_decoder": True, "k": K, "signed": False}),
    "embedding": ("embed_tokens", {"expansion_factor": 3, "normalize_decoder": True, "k": K, "signed": False}),
    "signed": ("layers.0.attention", {"expansion_factor": 3, "normalize_decoder": False, "k": K, "signed": True}),
    "skip": (
        "layers.5.mlp",
        {
            **{"expansion_factor": 2, "normalize_decoder": True, "num_latents": F, "k": K},
            **{"multi_topk": False, "skip_connection": True},
        },
    ),
    "current": (
        "h.4.mlp",
        {
            **{"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K},
            **{"multi_topk": True, "skip_connection": False, "transcode": False},
        },
    ),
    "transcode": (
        "gpt_neox.layers.2.mlp",
        {
            **{"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K},
            **{"multi_topk": False, "skip_connection": True, "transcode": True},
        },
    ),
    "groupmax": (
        "model.layers.7",
        {
            **{"activation": "groupmax", "expansion_factor": 3, "normalize_decoder": True, "num_latents": F, "k": K},
            **{"multi_topk": False, "skip_connection": False, "transcode": False},
        },
    ),
}


def sparsify(root, variant, dtype=torch.float32, run=None, **changes):
    name, cfg = SPARSIFY[variant]
    folder, cfg = root / name, {**cfg, "d_in": D, **changes}
    f = cfg.get("num_latents") or D * cfg["expansion_factor"]
    shapes = {"W_dec": (f, D), "b_dec": (D,), "encoder.bias": (f,), "encoder.weight": (f, D)}
    if cfg.get("skip_connection"):
        shapes["W_skip"] = (D, D)
    stored = drawn(shapes, dtype)
    save_config(folder / "cfg.json", cfg)
    if run is not None:
        save_config(root / "config.json", run)
    w = numbers(stored)

    def expected(x):
        p = (x if cfg.get("transcode") else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
        if cfg.get("signed"):
            z = largest(p, K, np.abs)
        elif cfg.get("activation") == "groupmax":
            groups = relu(p).reshape(*p.shape[:-1], K, f // K)
            z = np.where(groups == groups.max(-1, keepdims=True), groups, 0).reshape(p.shape)
        else:
            z = largest(relu(p), K)
        y = z @ w["W_dec"] + w["b_dec"]
        return z, y + x @ w["W_skip"].T if "W_skip" in w else y

    def save(tensors):
        save_file(tensors, folder / "sae.safetensors")

    save(stored)
    return Written(folder, stored, save, expected)


# --- circuit-tracer's transcoders and cross-layer transcoders

MWHANNA_CONFIG = """model_name: "Qwen/Qwen3-4B"
model_kind: "transcoder_set"
feature_input_hook: "mlp.hook_in"
feature_output_hook: "hook_mlp_out"
scan: "qwen3-4b-transcoders"
"""


def wandb_config(d_model=D, d_feature=F):
    return f"""_wandb:
    value:
        cli_version: 0.19.8
batch_size:
    desc: null
    value: 8192
d_feature:
    desc: null
    value: {d_feature}
d_model:
    desc: null
    value: {d_model}
"""


def mwhanna(folder, *, threshold=None, skip=False, d_out=D, config=MWHANNA_CONFIG, typo=False, layer=12):
    shapes = {"W_dec": (F, d_out), "W_enc": (F, D), "b_dec": (d_out,), "b_enc": (F,)}
    shapes |= {"W_skip": (d_out, D)} if skip else {}
    shapes |= {threshold: (F,)} if threshold else {}
    stored = drawn(shapes, torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("wanb-config.yaml" if typo else "wandb-config.yaml")).write_text(wandb_config())
    if config is not None:
        (folder / "config.yaml").write_text(config)
    w, place = numbers(stored), folder / f"layer_{layer}.safetensors"

    def expected(x):
        z = relu(x @ w["W_enc"].T + w["b_enc"], w[threshold] if threshold else 0.0)
        y = z @ w["W_dec"] + w["b_dec"]
        return z, y + x @ w["W_skip"].T if skip else y

    written = Written(place, stored, lambda tensors: save_file(tensors, place), expected)
    written.save(stored)
    return written


MNTSS_CONFIG = """model_name: "google/gemma-2-2b"
model_kind: "cross_layer_transcoder"
feature_input_hook: "hook_resid_mid"
feature_output_hook: "hook_mlp_out"
scan: "gemma-2-2b-clt"
"""


def mntss(folder, *, n=3, threshold=True, skip=False, d_in=D, d_out=O, f=F, config=MNTSS_CONFIG, seed=0):
    """`expected` takes and gives lists, one entry for each layer."""
    files = {}
    for i in range(n):
        enc = {f"W_enc_{i}": (f, d_in), f"b_dec_{i}": (d_out,), f"b_enc_{i}": (f,)}
        enc |= {f"threshold_{i}": (f,)} if threshold else {}
        enc |= {f"W_skip_{i}": (d_in, d_out)} if skip else {}
        files[f"W_enc_{i}"] = drawn(enc, torch.bfloat16, seed + 2 * i)
        files[f"W_dec_{i}"] = drawn({f"W_dec_{i}": (f, n - i, d_out)}, torch.bfloat16, seed + 2 * i + 1)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)

    def save(of_files):
        for name, tensors in of_files.items():
            save_file(tensors, folder / f"{name}.safetensors")

    save(files)
    w = {name: t for tensors in files.values() for name, t in numbers(tensors).items()}

    def expected(xs):
        zs, ys = [], []
        for i, x in enumerate(xs):
            zs.append(relu(x @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"], w.get(f"threshold_{i}", 0.0)))
            y = w[f"b_dec_{i}"] + sum(zs[source] @ w[f"W_dec_{source}"][:, i - source] for source in range(i + 1))
            ys.append(y + x @ w[f"W_skip_{i}"] if skip else y)
        return zs, ys

    return Written(folder, files, save, expected)


GEMMA = {
    "clt": {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        "width": 3 * F,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "type": "clt",
    },
    "crosscoder": {
        "hf_hook_point_in": "model.layers.{5,9,12}.output",
        "hf_hook_point_out": "model.layers.{5,9,12}.output",
        "width": 3 * F,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "type": "crosscoder",
    },
}
GEMMA_FOLDERS = {"clt": "clt/width_262k_l0_big", "crosscoder": "crosscoder/layer_5_9_12_width_1m_l0_big"}


def gemma(root, kind="clt", *, n=3, affine=False, config=True, d_out=None, **changes):
    """`expected` takes and gives lists, one entry for each layer."""
    folder = root / (GEMMA_FOLDERS[kind] + ("_affine" if affine else ""))
    d_out = d_out or (O if kind == "clt" else D)
    files = {}
    for i in range(n):
        shapes = {"b_dec": (d_out,), "b_enc": (F,), "threshold": (F,), "w_dec": (F, n, d_out), "w_enc": (D, F)}
        shapes |= {"affine_skip_connection": (D, d_out)} if affine else {}
        files[f"params_layer_{i}"] = drawn(shapes, seed=i)
        files[f"params_layer_{i}"]["w_dec"][:, :i] = 0
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        save_config(folder / "config.json", {**GEMMA[kind], "affine_connection": affine, **changes})

    def save(of_files):
        for name, tensors in of_files.items():
            save_file(tensors, folder / f"{name}.safetensors")

    save(files)
    ws = [numbers(files[f"params_layer_{i}"]) for i in range(n)]

    def expected(xs):
        zs = [relu(x @ w["w_enc"] + w["b_enc"], w["threshold"]) for x, w in zip(xs, ws, strict=True)]
        ys = [ws[j]["b_dec"] + sum(zs[i] @ ws[i]["w_dec"][:, j] for i in range(n)) for j in range(n)]
        if affine:
            ys = [y + x @ w["affine_skip_connection"] for x, y, w in zip(xs, ys, ws, strict=True)]
        return zs, ys

    return Written(folder, files, save, expected)
