"""params.safetensors of Gemma Scope 2, with and without its config.json: SAEs, transcoders, one layer of a CLT."""

import json

import numpy as np
import pytest
import torch
from helpers.format_tensors import D, F, O, assert_computes, gated, inputs, near_the_median, tensors, weights, wide
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.gemma_scope_2 import GemmaScope2

REPO = "google/gemma-scope-2-4b-pt"
THEIRS = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
CONFIG = {
    "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output",
    "width": 16384,
    "model_name": "google/gemma-3-4b-pt",
    "architecture": "jump_relu",
    "l0": 150,
    "affine_connection": False,
    "type": "sae",
}
MLP = {
    "hf_hook_point_in": "model.layers.17.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output",
    "type": "transcoder",
}
PATHS = {
    "resid_post": "resid_post/layer_17_width_16k_l0_big",
    "transcoder": "transcoder/layer_17_width_16k_l0_small",
    "affine": "transcoder/layer_17_width_16k_l0_small_affine",
}


def made(**shape):
    w = weights(**shape)
    return {**w, "threshold": near_the_median(w, inputs())}


def written(folder, w=None, config=CONFIG, *, name="params.safetensors", **more):
    folder.mkdir(parents=True, exist_ok=True)
    affine = {"affine_skip_connection": "affine"} if "affine" in (w or {}) else {}
    save_file({**tensors(w or made(), **THEIRS, **affine), **more}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def expected(w, x):
    w, x = wide(w), x.astype(np.float64)
    latents = gated(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return latents, latents @ w["W_dec"] + w["b_dec"] + (x @ w["affine"] if "affine" in w else 0)


def test_an_sae(tmp_path):
    w, x = made(), inputs()
    folder = written(tmp_path / "anywhere", w)
    assert type(detect(folder)) is GemmaScope2
    sae = read(folder)
    assert_computes(sae, x, *expected(w, x))
    assert (sae.cfg.activation, sae.cfg.pre_bias, sae.cfg.is_transcoder) == ("jumprelu", "none", False)
    assert (sae.cfg.model, sae.cfg.hook) == ("google/gemma-3-4b-pt", "blocks.17.hook_resid_post")
    assert (sae.cfg.metadata["l0"], sae.cfg.metadata["hf_hook_name"]) == (150, "model.layers.17.output")
    assert read(folder / "params.safetensors").cfg == sae.cfg


@pytest.mark.parametrize("config", [CONFIG | MLP, None])
def test_a_transcoder_reads_behind_the_norm_and_its_gain(config, tmp_path):
    w, x = made(d_out=O), inputs()
    sae = read(written(tmp_path, w, config), Provenance(repo=REPO, path=PATHS["transcoder"]))
    assert (sae.cfg.hook, sae.cfg.hook_out) == ("blocks.17.mlp.hook_in", "blocks.17.hook_mlp_out")
    assert sae.cfg.skip is False
    assert_computes(sae, x, *expected(w, x))


@pytest.mark.parametrize("config", [CONFIG | MLP | {"affine_connection": True}, None])
def test_an_affine_transcoder_is_not_transposed(config, tmp_path):
    """sae-lens 6.33 had x @ A.T, which a square matrix hides."""
    for d_out in (O, D):
        w, x = made(d_out=d_out, affine=(D, d_out)), inputs()
        sae = read(written(tmp_path, w, config), Provenance(repo=REPO, path=PATHS["affine"]))
        assert sae.cfg.skip
        assert torch.equal(sae.W_skip, torch.from_numpy(w["affine"]))
        assert_computes(sae, x, *expected(w, x))


@pytest.mark.parametrize("inner", ["", "_all"])
@pytest.mark.parametrize(
    ("site", "hook", "hook_out"),
    [
        ("resid_post", "hook_resid_post", None),
        ("attn_out", "attn.hook_z", None),
        ("mlp_out", "hook_mlp_out", None),
        ("transcoder", "mlp.hook_in", "blocks.5.hook_mlp_out"),
    ],
)
@pytest.mark.parametrize("how", ["facts", "on disk"])
def test_without_config_the_names_say_it(site, hook, hook_out, inner, how, tmp_path):
    path = f"{site}{inner}/layer_5_width_16k_l0_small"
    if how == "facts":
        sae = read(written(tmp_path, config=None), Provenance(repo="google/gemma-scope-2-1b-it", path=path))
    else:
        sae = read(written(tmp_path / "clt" / "google/gemma-scope-2-1b-it" / path, config=None))
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.hook_out) == ("google/gemma-3-1b-it", f"blocks.5.{hook}", hook_out)


def test_attention_reads_all_heads_side_by_side(tmp_path):
    from saewb.interventions.site import flatten_heads

    config = CONFIG | dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.17.self_attn.o_proj.input")
    sae = read(written(tmp_path, config=config))
    assert sae.cfg.hook == "blocks.17.attn.hook_z"
    heads = torch.from_numpy(inputs()).view(5, 10, 4, D // 4)
    assert torch.equal(flatten_heads(sae, heads, D, "hook_z"), heads.flatten(-2))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("gemma-v3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-3-12b-it", "google/gemma-3-12b-it"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
    ],
)
def test_spellings_of_the_model(said, name, tmp_path):
    assert read(written(tmp_path, config=CONFIG | {"model_name": said})).cfg.model == name
    bare = {key: value for key, value in CONFIG.items() if key != "model_name"}
    repo = f"google/{said.split('/')[-1].replace('gemma-v3', 'gemma-scope-2').replace('gemma-3', 'gemma-scope-2')}"
    assert read(written(tmp_path, config=bare), Provenance(repo=repo, path=PATHS["resid_post"])).cfg.model == name


@pytest.mark.parametrize("with_suffix", [True, False])
@pytest.mark.parametrize("affine", [False, True])
def test_one_layer_of_a_cross_layer_transcoder(with_suffix, affine, tmp_path):
    n, skip = 3, {"affine": (D, O)} if affine else {}
    w, x = made(d_out=O, **skip), inputs()
    per_layer = np.random.default_rng(1).standard_normal((F, n, O)).astype(np.float32)
    config = CONFIG | {"type": "clt", "affine_connection": affine, "hf_hook_point_in": "model.layers.{all}.x"}
    stored = {**w, "W_dec": per_layer}
    folder = written(tmp_path / "clt" / "width_262k_l0_big", stored, config, name="params_layer_2.safetensors")
    place = folder / ("params_layer_2.safetensors" if with_suffix else "params_layer_2")
    assert type(detect(place)) is GemmaScope2
    sae = read(place, Provenance(repo=REPO, path="clt/width_262k_l0_big/params_layer_2"))
    assert (sae.cfg.hook, sae.cfg.hook_out) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    assert sae.cfg.metadata["summed_over_layers"] == n
    assert_computes(sae, x, *expected({**w, "W_dec": per_layer.sum(1)}, x))


def test_a_crosscoders_layer_alone_is_refused(tmp_path):
    path = "crosscoder/layer_5_9_13_17_width_16k_l0_big"
    folder = written(tmp_path / path, config=CONFIG | {"type": "crosscoder"}, name="params_layer_1.safetensors")
    with pytest.raises(FormatError, match="the whole folder"):
        read(folder / "params_layer_1.safetensors")
    with pytest.raises(FormatError, match="the whole folder"):
        read(folder / "params_layer_1.safetensors", Provenance(repo=REPO, path=f"{path}/params_layer_1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"type": "lens"}, "type 'lens'"),
        ({"type": ["sae"]}, "type"),
        ({"type": "clt"}, "axes"),
        ({"hf_hook_point_in": "model.layers.17.elsewhere"}, "elsewhere"),
        ({"hf_hook_point_in": 17}, "hf_hook_point_in=17"),
        ({"affine_connection": True}, "affine_skip_connection missing"),
    ],
)
def test_a_config_that_says_something_else_is_refused(changes, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(written(tmp_path, config=CONFIG | changes))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_config_is_refused(content, tmp_path):
    folder = written(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        read(folder)


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        ({"b_skip": torch.ones(D)}, (), "b_skip left over"),
        ({"affine_skip_connection": torch.ones(D, D)}, (), "affine_skip_connection left over"),
        ({}, ("threshold",), "threshold missing"),
        ({}, ("w_enc",), "w_enc"),
        ({"b_dec": torch.ones(D + 1)}, (), r"b_dec \(17,\) instead of \(16,\)"),
        ({"w_dec": torch.ones(F, O)}, (), "reads 16 numbers and writes 12"),
        ({"b_enc": torch.full((F,), float("inf"))}, (), "NaN or infinity in b_enc"),
    ],
)
def test_other_tensors_are_refused(more, without, message, tmp_path):
    stored = {**tensors(made(), **THEIRS), **more}
    save_file({name: t for name, t in stored.items() if name not in without}, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match=message):
        read(tmp_path)


def test_no_factor_applies(tmp_path):
    with pytest.raises(FormatError, match="scaling_factor=2"):
        read(written(tmp_path), Provenance(scaling_factor=2.0))


def test_examples_are_never_asked_for():
    assert GemmaScope2().patterns(PATHS["resid_post"]) == [
        f"{PATHS['resid_post']}/config.json",
        f"{PATHS['resid_post']}/params.safetensors",
    ]
    assert GemmaScope2().patterns("clt/width_262k_l0_big/params_layer_3") == [
        "clt/width_262k_l0_big/config.json",
        "clt/width_262k_l0_big/params_layer_3.safetensors",
    ]
    assert GemmaScope2().patterns("") == ["config.json", "params.safetensors"]
