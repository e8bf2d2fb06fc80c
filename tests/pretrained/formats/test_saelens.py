"""Every generation of cfg.json, every trap of the layout, and that a folder is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.architecture_registry import ARCHITECTURES, activations, feed_forward, with_metadata
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.errors import FormatError
from saewb.pretrained.formats import detect, saelens
from saewb.pretrained.formats.saelens import SAELens
from saewb.pretrained.formats.saelens.config import describe
from saewb.pretrained.load import load_sae, save_sae

D, F, O = 8, 12, 6  # noqa: E741  (the letters of the layout's description)
V6 = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post"}
HEAD = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
REST = {"normalize_activations": "none", "reshape_activations": "none", "metadata": {**V6, "model_name": "gpt2"}}
TIED = {**HEAD, "apply_b_dec_to_input": True, **REST}
ACROSS = {**HEAD, "apply_b_dec_to_input": False, **REST, "d_out": O}

# cfg.json as sae-lens 6.54.12 writes it, and the tensors beside it.
PLAIN = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
OUTWARD = {"W_enc": (D, F), "W_dec": (F, O), "b_enc": (F,), "b_dec": (O,)}
GATED = {"W_enc": (D, F), "W_dec": (F, D), "b_gate": (F,), "b_mag": (F,), "r_mag": (F,), "b_dec": (D,)}
ATTENTION = {f"attn_layers.0.{n}.weight": (32, 32) for n in ("c_proj", "k_ctx", "q_target", "v_ctx")} | {
    f"attn_layers.0.{n}.bias": (32,) for n in ("c_proj", "k_ctx", "q_target", "v_ctx")
}
TEMPORAL = {
    "n_heads": 2,
    "n_attn_layers": 1,
    "bottleneck_factor": 1,
    "sae_diff_type": "topk",
    "kval_topk": 3,
    "tied_weights": True,
    "activation_normalization_factor": 1.0,
}
PURSUIT = {"residual_threshold": 0.01, "max_iterations": None, "stop_on_duplicate_support": True}
SAVED = {
    "standard": ({**TIED, "architecture": "standard"}, PLAIN),
    "gated": ({**TIED, "architecture": "gated"}, GATED),
    "topk": ({**TIED, "k": 3, "rescale_acts_by_decoder_norm": False, "architecture": "topk"}, PLAIN),
    "abstopk": ({**TIED, "k": 3, "rescale_acts_by_decoder_norm": False, "architecture": "abstopk"}, PLAIN),
    "jumprelu": ({**TIED, "architecture": "jumprelu"}, {**PLAIN, "threshold": (F,)}),
    "transcoder": ({**ACROSS, "architecture": "transcoder"}, OUTWARD),
    "skip_transcoder": ({**ACROSS, "architecture": "skip_transcoder"}, {**OUTWARD, "W_skip": (O, D)}),
    "jumprelu_transcoder": ({**ACROSS, "architecture": "jumprelu_transcoder"}, {**OUTWARD, "threshold": (F,)}),
    "jumprelu_skip_transcoder": (
        {**ACROSS, "architecture": "jumprelu_skip_transcoder"},
        {**OUTWARD, "W_skip": (O, D), "threshold": (F,)},
    ),
    "temporal": (
        {**TIED, "d_sae": 32, **TEMPORAL, "architecture": "temporal"},
        {"W_dec": (32, D), "b_dec": (D,), **ATTENTION},
    ),
    "matching_pursuit": ({**TIED, **PURSUIT, "architecture": "matching_pursuit"}, {"W_dec": (F, D), "b_dec": (D,)}),
}


def drawn(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    result = {name: torch.randn(shape, generator=rng) * 0.4 for name, shape in shapes.items()}
    return result | {name: t.abs() for name, t in result.items() if name == "threshold"}


def written(folder, cfg, tensors, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def numbers(tensors):
    return {name: t.double().numpy() for name, t in tensors.items()}


# --- generations


@pytest.mark.parametrize("architecture", SAVED)
def test_what_sae_lens_6_saved(architecture, tmp_path):
    cfg, shapes = SAVED[architecture]
    tensors = drawn(shapes)
    sae = load_sae(written(tmp_path / "sae", cfg, tensors))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out) == (D, cfg["d_sae"], cfg.get("d_out", D))
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.0.hook_resid_post", "gpt2")
    assert sae.cfg.metadata == {"sae_lens_training_version": "6.54.12"}
    x = activations(1, 4)
    assert sae(x).isfinite().all()
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    if "W_skip" in tensors:
        assert torch.equal(sae.W_skip, tensors["W_skip"].T)


@pytest.mark.parametrize("architecture", SAVED)
@pytest.mark.parametrize("change", ["missing", "left over", "misshapen"])
def test_every_tensor_is_accounted_for(architecture, change, tmp_path):
    cfg, shapes = SAVED[architecture]
    for name in shapes:
        tensors = drawn(shapes)
        if change == "missing":
            del tensors[name]
        elif change == "left over":
            tensors[f"{name}_too"] = torch.ones(2)
        else:
            tensors[name] = torch.ones(*shapes[name], 2)
        with pytest.raises(FormatError, match=name):
            load_sae(written(tmp_path / name, cfg, tensors))


LEGACY = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.0.hook_resid_pre",
    "hook_point_layer": 0,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "d_in": D,
    "total_training_tokens": 300000000,
    "device": "mps",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 32,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "use_ghost_grads": False,
    "d_sae": F,
    "run_name": "24576-L1-8e-05-LR-0.0004-Tokens-3.000e+08",
}


@pytest.mark.parametrize("ones", [False, True])
def test_version_2_and_before(ones, tmp_path):
    tensors = drawn(PLAIN)
    beside = {"scaling_factor": torch.ones(F)} if ones else {}
    sae = load_sae(written(tmp_path / "sae", LEGACY, {**tensors, **beside}))
    assert (sae.cfg.activation, sae.cfg.pre_bias, sae.cfg.normalization) == ("relu", "tied", "none")
    assert (sae.cfg.hook, sae.cfg.head, sae.cfg.model) == ("blocks.0.hook_resid_pre", None, "gpt2-small")
    assert sae.device.type == "cpu"
    saved = sae.cfg.metadata
    assert saved["prepend_bos"] is True
    assert (saved["dataset_path"], saved["context_size"], saved["seed"]) == ("Skylion007/openwebtext", 128, 42)
    assert "device" not in saved
    w, x = numbers(tensors), activations(5).double().numpy()
    want = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae(activations(5)).detach().numpy(), want, atol=1e-5)
    again = load_sae(save_sae(sae, tmp_path / "again"))
    assert again.cfg == sae.cfg


def test_version_5_with_a_gate_and_layer_norm(tmp_path):
    cfg = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "d_in": D,
        "d_sae": F,
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "prepend_bos": False,
        "context_size": 64,
        "dtype": "torch.float32",
        "hook_name": "blocks.3.hook_resid_mid",
        "hook_layer": 7,  # wrong on purpose: the hook's name counts
        "hook_head_index": None,
        "model_name": "gpt2-small",
        "sae_lens_training_version": "3.2.0",
    }
    sae = load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN)))
    assert (sae.cfg.activation, sae.cfg.k, sae.cfg.normalization) == ("topk", 4, "layer_norm")
    assert sae.cfg.hook == "blocks.3.hook_resid_mid"
    assert sae.cfg.metadata["prepend_bos"] is False
    assert sae.cfg.metadata["sae_lens_training_version"] == "3.2.0"
    assert load_sae(save_sae(sae, tmp_path / "again")).cfg == sae.cfg


def test_version_5_at_its_shortest(tmp_path):
    cfg = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "model_name": "pythia-70m-deduped",
        "hook_name": "blocks.0.hook_attn_out",
        "hook_layer": 0,
        "hook_head_index": None,
    }
    sae = load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN)))
    assert (sae.cfg.activation, sae.cfg.pre_bias, sae.cfg.normalization) == ("relu", "tied", "none")


@pytest.mark.parametrize(
    ("version", "where", "modern"),
    [("6.0.0-rc.0", "top", True), ("6.33.0", "metadata", True), ("5.9.1", "top", False), (None, "top", False)],
)
def test_the_version_decides_how_the_file_is_read(version, where, modern):
    cfg = {**HEAD, "architecture": "standard", "metadata": {}, "some_training_setting": 3}
    if where == "top":
        cfg["sae_lens_version"] = version
    else:
        cfg["metadata"] = {"sae_lens_version": version}
    if modern:
        with pytest.raises(FormatError, match="some_training_setting"):
            describe(cfg)
    else:
        assert describe(cfg).metadata["some_training_setting"] == 3


def test_overrides_at_the_top_of_a_version_6_file_reach_the_metadata(tmp_path):
    cfg = {
        **SAVED["standard"][0],
        "neuronpedia_id": "gpt2-small/0-x",
        "model_from_pretrained_kwargs": {"fold_ln": False},
    }
    metadata = load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN))).cfg.metadata
    assert metadata["neuronpedia_id"] == "gpt2-small/0-x"
    assert metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}


def test_training_settings_of_a_checkpoint_are_kept_apart(tmp_path):
    cfg = {**SAVED["standard"][0], "l1_coefficient": 5.0, "lp_norm": 1.0, "decoder_init_norm": 0.1}
    sae = load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN)))
    assert sae.cfg.metadata["training_architecture"] == "standard"
    assert sae.cfg.metadata["training_architecture_details"]["l1_coefficient"] == 5.0


def test_metadata_survives_and_cannot_change_the_result(tmp_path):
    sae = with_metadata(feed_forward(), k=3, architecture="gated", d_out=5, note=[1, {"a": None}], l0=40.5)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    assert again.cfg == sae.cfg
    assert load_sae(save_sae(again, tmp_path / "again")).cfg == sae.cfg


def test_where_and_what_wrote_it_stands_in_the_file(tmp_path):
    sae = ARCHITECTURES["skip_transcoder"]()
    cfg = json.loads((save_sae(sae, tmp_path / "sae") / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == sae.cfg.hook
    assert cfg["metadata"]["hook_name_out"] == sae.cfg.hook_out
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    assert cfg["metadata"]["saewb_version"]
    assert cfg["apply_b_dec_to_input"] is False


@pytest.mark.parametrize(("reshape", "kept"), [("hook_z", {}), ("none", {"reshape_activations": "none"})])
def test_reshaping_is_remembered_where_the_hook_does_not_say_it(reshape, kept, tmp_path):
    cfg = {
        **SAVED["standard"][0],
        "reshape_activations": reshape,
        "metadata": {**V6, "hook_name": "blocks.0.attn.hook_z"},
    }
    sae = load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN)))
    assert {key: v for key, v in sae.cfg.metadata.items() if key == "reshape_activations"} == kept
    folder = save_sae(sae, tmp_path / "again")
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == reshape
    assert load_sae(folder).cfg == sae.cfg


# --- traps: what others load silently, or not at all


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "jumprelux"}, "near: jumprelu"),
        ({"architecture": None}, "unknown architecture"),
        ({"normalize_activations": "layernorm"}, "near: layer_norm"),
        ({"normalize_activations": "constant_scalar_rescale"}, "temporal"),
        ({"reshape_activations": "hook_q"}, "hook_z"),
        ({"apply_sigmoid": True}, "apply_sigmoid"),
        ({"d_sae": None}, "d_sae=None"),
        ({"d_sae": True}, "d_sae=True"),
        ({"apply_b_dec_to_input": "false"}, "'false'"),
        ({"metadata": {**V6, "hook_name": 3}}, "hook_name=3"),
        ({"metadata": {**V6, "sae_lens_version": "six"}}, "six"),
    ],
)
def test_a_version_6_file_with_something_unknown_is_refused(changes, message, tmp_path):
    folder = written(tmp_path / "sae", {**SAVED["standard"][0], **changes}, drawn(PLAIN))
    with pytest.raises(FormatError, match=message):
        load_sae(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"activation_fn": "topk"}, "no k"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {}}, "no k"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 3, "beta": 2}}, "beta"),
        ({"activation_fn": "relu", "activation_fn_kwargs": {"slope": 2}}, "slope"),
        ({"architecture": "topk"}, "no k"),
        ({"finetuning_scaling_factor": True}, "scaling_factor"),
    ],
)
def test_an_older_file_that_others_load_wrongly_is_refused(changes, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        load_sae(written(tmp_path / "sae", {**LEGACY, **changes}, drawn(PLAIN)))


def test_a_k_that_does_not_fit_is_refused(tmp_path):
    cfg = {**SAVED["topk"][0], "k": 100}  # the default, which sae-lens writes down for 12 latents too
    with pytest.raises(FormatError, match="k=100"):
        load_sae(written(tmp_path / "sae", cfg, drawn(PLAIN)))


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("changes", [{"apply_b_dec_to_input": True}, {"normalize_activations": "layer_norm"}])
def test_transcoders_subtract_no_bias_and_scale_nothing(architecture, changes, tmp_path):
    cfg, shapes = SAVED[architecture]
    with pytest.raises(FormatError, match=next(iter(changes))):
        load_sae(written(tmp_path / "sae", {**cfg, **changes}, drawn(shapes)))


def test_a_scaling_factor_per_latent_is_folded(tmp_path):
    tensors, factor = drawn(PLAIN), torch.linspace(0.5, 2, F)
    cfg = {**LEGACY, "finetuning_scaling_factor": True}
    sae = load_sae(written(tmp_path / "sae", cfg, {**tensors, "scaling_factor": factor}))
    plain = load_sae(written(tmp_path / "plain", LEGACY, tensors))
    x = activations(5)
    assert torch.equal(sae.encode(x), plain.encode(x))
    torch.testing.assert_close(sae(x), plain.decode(plain.encode(x) * factor))
    with pytest.raises(FormatError, match="not all ones"):
        load_sae(written(tmp_path / "unsaid", LEGACY, {**tensors, "scaling_factor": factor}))


def test_log_threshold_is_exponentiated(tmp_path):
    cfg, shapes = SAVED["jumprelu"]
    tensors = drawn(shapes)
    threshold = tensors.pop("threshold")
    sae = load_sae(written(tmp_path / "sae", cfg, {**tensors, "log_threshold": threshold.log()}))
    torch.testing.assert_close(sae.threshold.detach(), threshold)


def test_gated_by_hand(tmp_path):
    cfg, shapes = SAVED["gated"]
    tensors = drawn(shapes)
    sae = load_sae(written(tmp_path / "sae", cfg, tensors))
    assert sae.cfg.activation == "jumprelu"
    w, x = numbers(tensors), activations(50).double().numpy()
    s = x - w["b_dec"]
    on = s @ w["W_enc"] + w["b_gate"] > 0
    magnitude = np.maximum(s @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    assert 0.1 < on.mean() < 0.9
    assert ((magnitude > 0) != on).any()  # the two gates disagree somewhere
    np.testing.assert_allclose(sae.encode(activations(50)).detach().numpy(), on * magnitude, atol=1e-5)


@pytest.mark.parametrize(
    ("rescale", "version", "rescales"),
    [(True, None, True), (False, None, False), (None, None, True), (None, "6.14.0", True), (None, "6.13.1", False)],
)
def test_a_batchtopk_checkpoint_by_hand(rescale, version, rescales, tmp_path):
    """A training before sae-lens 6.14 had no such option, and did not rescale."""
    tensors = {**drawn(PLAIN), "topk_threshold": torch.tensor(0.5, dtype=torch.float64)}
    cfg = {**TIED, "architecture": "batchtopk", "k": 3.0, "topk_threshold_lr": 0.01, "aux_loss_coefficient": 1.0}
    if rescale is not None:
        cfg["rescale_acts_by_decoder_norm"] = rescale
    if version is not None:
        cfg["metadata"] = {**cfg["metadata"], "sae_lens_version": version}
    sae = load_sae(written(tmp_path / "sae", cfg, tensors))
    w, x = numbers(tensors), activations(50).double().numpy()
    p = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    norm = np.linalg.norm(w["W_dec"], axis=1) if rescales else 1.0
    latents = np.where(p * norm > 0.5, p * norm, 0)
    np.testing.assert_allclose(sae.encode(activations(50)).detach().numpy(), latents, atol=1e-5)
    out = (latents / norm) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(sae(activations(50)).detach().numpy(), out, atol=1e-5)
    assert sae.dtype == torch.float32  # the scalar is float64 in the file


def test_rescaling_with_a_dead_decoder_row(tmp_path):
    tensors = drawn(PLAIN)
    tensors["W_dec"][5] = 0
    cfg = {**SAVED["topk"][0], "rescale_acts_by_decoder_norm": True}
    sae = load_sae(written(tmp_path / "sae", cfg, tensors))
    assert sae(activations(9)).isfinite().all()
    assert not sae.encode(activations(9))[:, 5].any()


# --- scaling of the input


def _averaged(tmp_path, **files):
    cfg = {**SAVED["jumprelu"][0], "normalize_activations": "expected_average_only_in"}
    return written(tmp_path / "averaged", cfg, drawn(SAVED["jumprelu"][1]), **files)


def test_a_file_that_needs_a_factor_and_has_none_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"fix: .*load_sae\(.*averaged', scaling_factor=\.\.\.\)"):
        load_sae(_averaged(tmp_path))


@pytest.mark.parametrize("older", [True, 1.0, "expected_average_only_in"])
def test_the_spellings_of_average_scaling(older):
    cfg = {**LEGACY, "normalize_activations": older}
    if older == 1.0 and older is not True:
        with pytest.raises(FormatError, match=r"1\.0"):
            describe(cfg)
    else:
        assert describe(cfg).normalize == "expected_average_only_in"
    assert describe({**LEGACY, "normalize_activations": False}).normalize == "none"
    assert describe({**LEGACY, "normalize_activations": None}).normalize == "none"


def test_a_factor_is_folded_by_hand(tmp_path):
    w, x = numbers(drawn(SAVED["jumprelu"][1])), activations(20).double().numpy()
    p = (0.3 * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = np.where(p > w["threshold"], p, 0)
    out = (latents @ w["W_dec"] + w["b_dec"]) / 0.3
    for sae in (
        load_sae(_averaged(tmp_path), scaling_factor=0.3),
        load_sae(_averaged(tmp_path / "checkpoint", activation_scaler={"scaling_factor": 0.3})),
        load_sae(_averaged(tmp_path / "both", activation_scaler={"scaling_factor": 9.0}), scaling_factor=0.3),
    ):
        np.testing.assert_allclose(sae.encode(activations(20)).detach().numpy(), latents, atol=1e-5)
        np.testing.assert_allclose(sae(activations(20)).detach().numpy(), out, atol=1e-5)
        again = load_sae(save_sae(sae, tmp_path / "again", overwrite=True))  # folded for good
        assert torch.equal(again(activations(20)), sae(activations(20)))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_must_be_positive(factor, tmp_path):
    with pytest.raises(FormatError, match="positive"):
        load_sae(_averaged(tmp_path), scaling_factor=factor)


def test_a_factor_that_no_one_asked_for_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"scaling_factor=0\.5 was given"):
        load_sae(written(tmp_path / "sae", *SAVED["standard"][:1], drawn(PLAIN)), scaling_factor=0.5)


def test_a_temporal_sae_multiplies_by_its_factor(tmp_path):
    cfg, shapes = SAVED["temporal"]
    folder = written(tmp_path / "sae", {**cfg, "normalize_activations": "expected_average_only_in"}, drawn(shapes))
    sae = load_sae(folder, scaling_factor=0.5)
    plain = load_sae(written(tmp_path / "plain", cfg, drawn(shapes)))
    torch.testing.assert_close(sae(activations(1, 5)), plain(0.5 * activations(1, 5)) / 0.5)


def test_whitening_by_hand_and_without_its_file(tmp_path):
    rng = torch.Generator().manual_seed(4)
    matrix = torch.randn(D, D, generator=rng, dtype=torch.float64) + 3 * torch.eye(D, dtype=torch.float64)
    white = {
        "mean": torch.linspace(-1, 1, D, dtype=torch.float64),
        "matrix": matrix,
        "inverse_matrix": matrix.inverse().contiguous(),
    }
    tensors, x = drawn(PLAIN), activations(20).double().numpy()
    w, m = numbers(tensors), numbers(white)
    for tied in (True, False):
        cfg = {**SAVED["standard"][0], "normalize_activations": "covariance_whitening", "apply_b_dec_to_input": tied}
        folder = written(tmp_path / f"tied {tied}", cfg, tensors)
        with pytest.raises(FormatError, match=r"activation_whitening\.safetensors"):
            load_sae(folder)
        safetensors.torch.save_file(white, folder / "activation_whitening.safetensors")
        z = (x - m["mean"]) @ m["matrix"]
        latents = np.maximum((z - tied * w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
        out = (latents @ w["W_dec"] + w["b_dec"]) @ m["inverse_matrix"] + m["mean"]
        sae = load_sae(folder, dtype=torch.float64)
        np.testing.assert_allclose(sae.encode(activations(20)).detach().numpy(), latents, atol=1e-10)
        np.testing.assert_allclose(sae(activations(20)).detach().numpy(), out, atol=1e-10)
    for architecture in ("matching_pursuit", "temporal"):
        cfg, shapes = SAVED[architecture]
        folder = written(
            tmp_path / architecture, {**cfg, "normalize_activations": "covariance_whitening"}, drawn(shapes)
        )
        with pytest.raises(FormatError, match="cannot be folded"):
            load_sae(folder)


# --- files


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(stored, tmp_path):
    folder = save_sae(feed_forward(activation="jumprelu").to(stored), tmp_path / "sae")
    assert load_sae(folder).dtype == stored
    sae = load_sae(folder, dtype=torch.float32, device="meta")
    assert (sae.dtype, sae.device.type) == (torch.float32, "meta")


def test_a_dtype_that_cannot_be_computed_with_is_refused(tmp_path):
    with pytest.raises(FormatError, match="int8"):
        load_sae(
            written(tmp_path / "sae", SAVED["standard"][0], {n: t.to(torch.int8) for n, t in drawn(PLAIN).items()})
        )


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux which files are mapped")
def test_weights_are_mapped_not_copied(tmp_path):
    cfg = {**SAVED["standard"][0], "d_in": 512, "d_sae": 4096}
    shapes = {"W_enc": (512, 4096), "W_dec": (4096, 512), "b_enc": (4096,), "b_dec": (512,)}
    folder = written(tmp_path / "sae", cfg, {name: torch.ones(shape) for name, shape in shapes.items()})
    sae = load_sae(folder)
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(folder / "sae_weights.safetensors") in line]
    starts_ends = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert any(start <= sae.W_enc.data_ptr() < end for start, end in starts_ends)
    with torch.no_grad():
        sae.W_enc.zero_()  # the mapping is private: the file does not change
    assert load_sae(folder).W_enc.sum() == 512 * 4096


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_a_damaged_cfg_is_refused(content, tmp_path):
    folder = written(tmp_path / "sae", SAVED["standard"][0], drawn(PLAIN))
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"cfg\.json"):
        load_sae(folder)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_damaged_weights_are_refused(keep, tmp_path):
    folder = written(tmp_path / "sae", SAVED["standard"][0], drawn(PLAIN))
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors is damaged"):
        load_sae(folder)


def test_log_sparsity(tmp_path):
    folder = save_sae(feed_forward(), tmp_path / "sae")
    with pytest.raises(FileNotFoundError, match="sparsity"):
        saelens.read_log_sparsity(folder)
    safetensors.torch.save_file({"sparsity": torch.linspace(-10, 0, 24)}, folder / "sparsity.safetensors")
    assert torch.equal(saelens.read_log_sparsity(folder), torch.linspace(-10, 0, 24))


def test_recognize(tmp_path):
    assert type(detect(save_sae(feed_forward(), tmp_path / "a" / "sae"))) is SAELens
    with pytest.raises(FormatError, match=r"a has sae/[\s\S]*one of its 1 SAEs: sae\n[\s\S]*'sae'\)"):
        detect(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(FormatError, match="no files"):
        detect(tmp_path / "b")


# --- writing: all or nothing


def _everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_target_that_is_there_is_replaced_only_when_asked(tmp_path):
    target = save_sae(feed_forward(), tmp_path / "sae")
    before = _everything(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_sae(feed_forward(seed=9), target)
    assert _everything(tmp_path) == before
    save_sae(feed_forward(seed=9), target, overwrite=True)
    assert torch.equal(load_sae(target).W_dec, feed_forward(seed=9).W_dec)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae"]


def test_an_sae_can_be_written_over_the_folder_it_is_mapped_from(tmp_path):
    target = save_sae(feed_forward(), tmp_path / "sae")
    sae = load_sae(target)
    save_sae(sae, target, overwrite=True)
    assert torch.equal(sae.W_dec, feed_forward().W_dec)
    assert torch.equal(load_sae(target).W_dec, feed_forward().W_dec)


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    target = save_sae(feed_forward(), tmp_path / "sae")
    (target / "notes.txt").write_text("mine")
    before = _everything(tmp_path)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_sae(feed_forward(seed=9), target, overwrite=True)
    with pytest.raises(FileExistsError, match="file or a link"):
        save_sae(feed_forward(seed=9), target / "notes.txt", overwrite=True)
    assert _everything(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "sae").mkdir()
    assert load_sae(save_sae(feed_forward(), tmp_path / "sae")).cfg == feed_forward().cfg


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("where", ["save_file", "fsync", "rename"])
def test_a_failing_write_leaves_nothing_and_loses_nothing(there, where, tmp_path, monkeypatch):
    target = tmp_path / "deep" / "sae"
    if there:
        save_sae(feed_forward(), target)
    else:
        target.parent.mkdir()
    before, calls = _everything(tmp_path), []

    def fail(*arguments):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    if where == "save_file":

        def half(tensors, path):
            path.write_bytes(b"half")
            fail()

        monkeypatch.setattr("saewb.pretrained.formats.saelens.save_file", half)
    elif where == "fsync":
        monkeypatch.setattr("os.fsync", fail)
    else:
        rename = type(target).rename
        monkeypatch.setattr(
            type(target), "rename", lambda self, to: fail() if self.name.endswith(".new") else rename(self, to)
        )
        replace = os.replace
        monkeypatch.setattr("os.replace", lambda a, b: fail() if str(a).endswith(".new") else replace(a, b))
    with pytest.raises(OSError, match="No space left"):
        save_sae(feed_forward(seed=9), target, overwrite=True)
    assert calls
    assert _everything(tmp_path) == before
    assert [entry.name for entry in target.parent.iterdir()] == (["sae"] if there else [])


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    sae = with_metadata(feed_forward(), figure=torch.ones(1))
    with pytest.raises(TypeError, match=r"cfg\.metadata"):
        save_sae(sae, tmp_path / "sae")
    assert not list(tmp_path.iterdir())


def test_what_the_layout_cannot_express_is_refused(tmp_path):
    with pytest.raises(ValueError, match="skip"):
        save_sae(feed_forward(skip=True, normalization="layer_norm"), tmp_path / "sae")
    assert not list(tmp_path.iterdir())


def test_parameters_that_share_memory_are_written(tmp_path):
    sae = feed_forward()
    shared = sae.W_dec.detach()[:8, :].contiguous()
    small = feed_forward(d_sae=8)
    twin = type(small).from_tensors(small.cfg, {**small.state_dict(), "W_enc": shared, "W_dec": shared})
    again = load_sae(save_sae(twin, tmp_path / "sae"))
    assert torch.equal(again.W_enc, shared)
    assert torch.equal(again.W_dec, shared)


@examples(60)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [
                *("architecture", "d_in", "normalize_activations", "metadata", "hook_point", "hook_name"),
                *(
                    "activation_fn",
                    "activation_fn_kwargs",
                    "apply_b_dec_to_input",
                    "sae_lens_version",
                    "residual_threshold",
                ),
            ]
        ),
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=2),
        max_size=3,
    ),
    older=st.booleans(),
)
def test_any_cfg_is_understood_or_refused_with_a_format_error(changes, older):
    with contextlib.suppress(FormatError):  # any other error fails
        described = describe({**(LEGACY if older else SAVED["topk"][0]), **changes})
        assert described.architecture in SAVED
        assert type(described.d_in) is int
        assert isinstance(described.metadata, dict)


def test_a_bit_that_flipped_in_the_weights_is_noticed(tmp_path):
    target = save_sae(feed_forward(), tmp_path / "sae")
    weights, config = target / "sae_weights.safetensors", target / "cfg.json"
    assert "weights_sha256" not in load_sae(target).cfg.metadata
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(FormatError, match=r"sae_weights.safetensors is damaged[\s\S]*remove 'weights_sha256'"):
        load_sae(target)
    said = json.loads(config.read_text())
    del said["metadata"]["weights_sha256"]
    config.write_text(json.dumps(said))
    assert load_sae(target).cfg == feed_forward().cfg
