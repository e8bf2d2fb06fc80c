"""Both Llama Scope layouts: factors for what is read and written, norms of the decoder, thresholds in two units."""

import json

import numpy as np
import pytest
import torch
from helpers.format_tensors import (
    D,
    F,
    O,
    assert_computes,
    gated,
    inputs,
    near_the_median,
    rounded,
    tensors,
    weights,
    wide,
)
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.llama_scope import LlamaScope, LlamaScopeR1

REPO, PATH = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x"
R1_REPO, R1_PATH = "fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L8R"
HYPER = {
    "device": "cuda",
    "seed": 42,
    "dtype": "torch.bfloat16",
    "hook_point_in": "blocks.8.hook_resid_post",
    "hook_point_out": "blocks.8.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 2.5,
    "d_model": D,
    "d_sae": F,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125},
    "decoder_exactly_fixed_norm": False,
    "sparsity_include_decoder_norm": True,
    "init_decoder_norm": 0.5,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.2021484375,
    "top_k": 50,
}
R1 = {"d_model": D, "expansion_factor": 2.5, "hook_point_in": "blocks.8.hook_resid_post"}


def made(d_out=None, unit=False, seed=0):
    w = weights(d_out=d_out, seed=seed)
    if unit:
        w["W_dec"] /= np.linalg.norm(w["W_dec"], axis=1, keepdims=True)
    return rounded(w, torch.bfloat16)


def stored(w, dtype=torch.bfloat16):
    theirs = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    return tensors({**theirs, "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}, dtype)


def written(folder, w, hyper=HYPER, **more):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(hyper))
    save_file({**stored(w), **more}, folder / "checkpoints" / "final.safetensors")
    return folder


def native(w, x, hyper):
    """lm_saes: biases and decoder out of the normalized space, norms into the encoder, then the gate, in raw units."""
    w, x = wide(w), x.astype(np.float64)
    norms = hyper["dataset_average_activation_norm"]
    f_in = np.sqrt(w["W_enc"].shape[0]) / norms["in"]
    f_out = np.sqrt(w["W_dec"].shape[1]) / norms["out"]
    b_enc, b_dec, W_dec = w["b_enc"] / f_in, w["b_dec"] / f_out, w["W_dec"] * f_in / f_out
    n = np.linalg.norm(W_dec, axis=1) if hyper["sparsity_include_decoder_norm"] else 1.0
    latents = gated((x @ w["W_enc"] + b_enc) * n, hyper["jump_relu_threshold"])
    unit = f_out if hyper["sparsity_include_decoder_norm"] else f_in  # from there to the normalized space
    return latents * unit, latents / n @ W_dec + b_dec


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("norms", [(6.3125, 6.3125), (64.0, 3.390625), (0.5, 29.125)])
def test_saes_and_transcoders(unit, with_norms, norms, tmp_path):
    transcoder = norms[0] != norms[1]
    w, x = made(d_out=O if transcoder else None, unit=unit), inputs(scale=norms[0] / 4)
    hyper = HYPER | {
        "sparsity_include_decoder_norm": with_norms,
        "dataset_average_activation_norm": dict(zip(("in", "out"), norms, strict=True)),
        "jump_relu_threshold": 0.2 * norms[1] if with_norms else 0.2 * norms[0],
    }
    if transcoder:
        hyper |= {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    folder = written(tmp_path / "anywhere", w, hyper)
    assert type(detect(folder)) is LlamaScope
    sae = read(folder, Provenance(repo=REPO, path=PATH), dtype=torch.float32)
    assert_computes(sae, x, *native(w, x, hyper))
    assert sae.cfg.is_transcoder is transcoder
    assert sae.cfg.hook == hyper["hook_point_in"]
    assert sae.cfg.hook_out == (hyper["hook_point_out"] if transcoder else None)
    assert (sae.cfg.model, sae.cfg.pre_bias) == ("meta-llama/Llama-3.1-8B", "none")


def test_the_threshold_of_a_published_one():
    """L0A-32x: 0.00946044921875 in units of the model, of mean norm 0.5703125 and width 4096."""
    f = 4096**0.5 / 0.5703125
    assert 0.00946044921875 * f == pytest.approx(1.0616438356164384, rel=1e-15)


def test_the_threshold_is_in_the_normalized_space(tmp_path):
    hyper = HYPER | {"dataset_average_activation_norm": {"in": 0.5703125, "out": 0.5703125}}
    sae = read(written(tmp_path, made(), hyper | {"jump_relu_threshold": 0.00946044921875}), dtype=torch.float32)
    assert sae.threshold[0].item() == pytest.approx(0.00946044921875 * 4 / 0.5703125, rel=1e-6)
    assert bool((sae.threshold == sae.threshold[0]).all())


def test_as_stored_is_bfloat16_and_rows_are_rows(tmp_path):
    sae = read(written(tmp_path, made()))
    assert sae.dtype == torch.bfloat16
    assert sae.W_dec.is_contiguous()
    torch.testing.assert_close(sae.W_dec.float().norm(dim=1), torch.full((F,), 6.3125 / 4), rtol=0.01, atol=0)


def test_a_latent_whose_decoder_is_zero_is_off(tmp_path):
    w = made()
    w["W_dec"][5] = 0
    sae = read(written(tmp_path, w), dtype=torch.float32)
    x = torch.from_numpy(inputs(scale=9.0))
    assert sae(x).isfinite().all()
    assert not sae.encode(x)[:, 5].any()


def test_a_file_folded_already(tmp_path):
    w, x = made(), inputs()
    sae = read(written(tmp_path, w, HYPER | {"norm_activation": "inference"}), dtype=torch.float32)
    ones = HYPER | {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    assert_computes(sae, x, *native(w, x, ones))


def test_a_factor_is_checked_against_the_files(tmp_path):
    folder = written(tmp_path, made())
    read(folder, Provenance(scaling_factor=4 / 6.3125))
    with pytest.raises(FormatError, match="scaling_factor=1"):
        read(folder, Provenance(scaling_factor=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "topk"}, "act_fn='topk'"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 0}}, "positive number"),
        ({"dataset_average_activation_norm": {"out": 2.0}}, "positive number"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold"),
        ({"jump_relu_threshold": "0.2"}, "jump_relu_threshold"),
        ({"d_sae": F + 1}, "d_sae is 41"),
        ({"d_model": D + 1}, "d_model is 17"),
        ({"expansion_factor": 8}, "expansion_factor"),
        ({"hook_point_in": 8}, "hook 8"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(written(tmp_path, made(), HYPER | changes))


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        ({"encoder_glu.weight": torch.ones(F, D)}, None, "encoder_glu.weight left over"),
        ({}, "decoder.bias", "decoder.bias missing"),
        ({}, "encoder.weight", "encoder.weight missing"),
        ({"encoder.bias": torch.ones(D)}, None, r"encoder.bias \(16,\) instead of \(40,\)"),
        ({"decoder.weight": torch.ones(F, D)}, None, "decoder.weight"),
        ({"encoder.bias": torch.full((F,), float("nan"))}, None, "NaN or infinity in encoder.bias"),
    ],
)
def test_other_tensors_are_refused(more, without, message, tmp_path):
    folder = written(tmp_path, made(), **more)
    saved = {name: t for name, t in {**stored(made()), **more}.items() if name != without}
    save_file(saved, folder / "checkpoints" / "final.safetensors")
    with pytest.raises(FormatError, match=message):
        read(folder)


# --- R1: a threshold per latent, in the normalized space


def written_r1(folder, w, config=R1, dtype=torch.float32, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    log = {"log_jumprelu_threshold": torch.from_numpy(np.log(w["threshold"])).to(dtype)}
    bare = {name: array for name, array in w.items() if name != "threshold"}
    save_file({**stored(bare, dtype), **log, **more}, folder / "sae_weights.safetensors")
    return folder


def made_r1(f):
    w = weights()
    return {**w, "threshold": near_the_median({**w, "W_enc": w["W_enc"] * f}, inputs()) * norms_of(w)}


def norms_of(w):
    return np.linalg.norm(w["W_dec"], axis=1)


def native_r1(w, x, f):
    w = wide(w)
    n = norms_of(w)
    latents = gated((f * x.astype(np.float64) @ w["W_enc"] + w["b_enc"]) * n, w["threshold"])
    return latents, (latents / n @ w["W_dec"] + w["b_dec"]) / f


@pytest.mark.parametrize("where", ["catalogue", "config", "tensors"])
def test_r1_factor_from_wherever_it_is(where, tmp_path):
    f = 53.52995401997436 / 16
    w, x = made_r1(f), inputs()
    norms = {"in": D**0.5 / f, "out": D**0.5 / f}
    config = R1 | {"dataset_average_activation_norm": norms} if where == "config" else R1
    more = {}
    if where == "tensors":
        more = {f"dataset_average_activation_norm.{end}": torch.tensor(norm) for end, norm in norms.items()}
    folder = written_r1(tmp_path / "anywhere", w, config, **more)
    assert type(detect(folder)) is LlamaScopeR1
    sae = read(folder, Provenance(repo=R1_REPO, path=R1_PATH, scaling_factor=f if where == "catalogue" else None))
    assert_computes(sae, x, *native_r1(w, x, f))
    assert (sae.cfg.model, sae.cfg.hook) == ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "blocks.8.hook_resid_post")
    torch.testing.assert_close(sae.threshold.detach(), torch.from_numpy(w["threshold"]))  # not rescaled


def test_r1_model_is_the_catalogues(tmp_path):
    folder = written_r1(tmp_path, made_r1(1.0))
    assert read(folder, Provenance(model="mine", scaling_factor=1.0)).cfg.model == "mine"
    assert read(folder, Provenance(repo="a/b", scaling_factor=1.0)).cfg.model is None


@pytest.mark.parametrize(
    ("config", "factor", "message"),
    [
        (R1, None, "the factor is not in the folder"),
        (R1, -1.0, "positive number"),
        (R1 | {"dataset_average_activation_norm": {"in": float("inf")}}, None, "positive number"),
        (R1 | {"act_fn": "topk"}, 1.0, "act_fn"),
        (R1 | {"d_model": 4}, 1.0, "d_model is 4"),
    ],
)
def test_r1_without_what_it_needs_is_refused(config, factor, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(written_r1(tmp_path, made_r1(1.0), config), Provenance(scaling_factor=factor))


def test_r1_other_tensors_are_refused(tmp_path):
    with pytest.raises(FormatError, match="extra left over"):
        read(written_r1(tmp_path, made_r1(1.0), extra=torch.ones(F)), Provenance(scaling_factor=1.0))
    folder = written_r1(tmp_path, made_r1(1.0), **{"encoder.bias": torch.ones(3)})
    with pytest.raises(FormatError, match="encoder.bias"):
        read(folder, Provenance(scaling_factor=1.0))


def test_r1_is_told_from_saelens_by_its_tensors(tmp_path):
    w = made_r1(1.0)
    folder = written_r1(tmp_path / "r1", w)
    save_file(tensors({name: a for name, a in w.items() if name != "threshold"}), folder / "sae_weights.safetensors")
    with pytest.raises(FormatError, match="no layout that saewb knows"):
        detect(folder)


def test_files():
    assert LlamaScope().patterns(PATH) == [f"{PATH}/hyperparams.json", f"{PATH}/checkpoints/final.safetensors"]
    assert LlamaScopeR1().patterns(R1_PATH) == [f"{R1_PATH}/config.json", f"{R1_PATH}/sae_weights.safetensors"]
