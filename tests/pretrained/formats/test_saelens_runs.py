"""What SAELens' training leaves behind: checkpoints with all their files, and runs of several SAEs."""

import json

import numpy as np
import pytest
import torch
from helpers.format_tensors import D, F, assert_computes, gated, inputs, tensors, weights, wide
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.saelens import SAELens
from saewb.pretrained.load import load_sae

RUNNER = {
    "sae": {"architecture": "batchtopk", "d_in": D, "d_sae": F, "k": 4},
    "logger": {"log_to_wandb": False},
    "hook_name": "blocks.4.hook_resid_post",
    "model_name": "gpt2",
    "training_tokens": 4096,
}
CFG = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cuda:3",
    "apply_b_dec_to_input": True,
    "normalize_activations": "expected_average_only_in",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "model_name": "gpt2",
        "hook_name": "blocks.4.hook_resid_post",
        "training_architecture": "batchtopk",
        "training_architecture_details": {"k": 4},
    },
    "decoder_init_norm": 0.1,
    "k": 4,
    "use_sparse_activations": False,
    "aux_loss_coefficient": 1.0,
    "rescale_acts_by_decoder_norm": True,
    "topk_threshold_lr": 0.01,
    "architecture": "batchtopk",
}


class Run:
    def __reduce__(self):
        return (open, ("ran", "w"))


def checkpoint(folder, w, architecture="batchtopk", factor=0.4, threshold=1.5):
    folder.mkdir(parents=True)
    matryoshka = {"matryoshka_widths": [8, F], "use_matryoshka_aux_loss": False}
    cfg = CFG | {"architecture": architecture} | (matryoshka if "matryoshka" in architecture else {})
    (folder / "cfg.json").write_text(json.dumps(cfg))
    scalar = {"topk_threshold": torch.tensor(threshold, dtype=torch.float64)}
    save_file({**tensors(w), **scalar}, folder / "sae_weights.safetensors")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor, "has_whitening": False}))
    save_file({"n_dataset_processed": torch.tensor(7)}, folder / "activations_store_state.safetensors")
    save_file({"sparsity": torch.linspace(-10, 0, F)}, folder / "sparsity.safetensors")
    torch.save({"optimizer": Run()}, folder / "trainer_state.pt")
    (folder / "runner_cfg.json").write_text(json.dumps(RUNNER))
    return folder


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_with_all_its_files(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    w, x = weights(), inputs(scale=2.5)
    sae = read(checkpoint(tmp_path / "checkpoints" / "4096", w, architecture))
    n, z = wide(w), 0.4 * x.astype(np.float64)
    norm = np.linalg.norm(n["W_dec"], axis=1)
    latents = gated(((z - n["b_dec"]) @ n["W_enc"] + n["b_enc"]) * norm, 1.5)
    # As in the run's final export, decoder rows have unit norm in the model's units, and latents are in those.
    assert_computes(sae, x, latents / 0.4, (latents / norm @ n["W_dec"] + n["b_dec"]) / 0.4)
    assert (sae.cfg.activation, sae.cfg.hook, sae.dtype) == ("jumprelu", "blocks.4.hook_resid_post", torch.float32)
    assert not (tmp_path / "ran").exists()  # the optimizer's state is not opened


@pytest.mark.parametrize("damage", ['{"scaling_factor": "much"}', "[1]", "{"])
def test_a_damaged_scaler_is_refused(damage, tmp_path):
    folder = checkpoint(tmp_path / "c", weights())
    (folder / "activation_scaler.json").write_text(damage)
    with pytest.raises(FormatError, match="scal"):
        read(folder)


def test_a_run_of_several_saes_names_them(tmp_path):
    for name in ("k4", "k8"):
        checkpoint(tmp_path / "output" / name, weights())
    (tmp_path / "output" / "runner_cfg.json").write_text(json.dumps(RUNNER))
    with pytest.raises(FormatError, match=r"k4/, k8/, runner_cfg\.json[\s\S]*fix: .*output', 'k4'\)"):
        detect(tmp_path / "output")
    assert type(detect(tmp_path / "output" / "k8")) is SAELens
    assert load_sae(tmp_path / "output", "k8").cfg.d_sae == F


def test_overrides_of_a_catalogue(tmp_path):
    folder = checkpoint(tmp_path / "c", weights())
    kwargs = {"center_writing_weights": True, "fold_ln": False}
    cfg = read(folder, Provenance(overrides={"dataset_path": "mine", "model_from_pretrained_kwargs": kwargs})).cfg
    assert cfg.metadata["dataset_path"] == "mine"
    assert cfg.metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}
    assert cfg.normalization == "centered"  # what the other one means
    normed = read(folder, Provenance(overrides={"normalize_activations": "constant_norm_rescale"}))
    assert normed.cfg.normalization == "constant_norm"


def test_the_files_word_comes_before_the_callers(tmp_path):
    folder = checkpoint(tmp_path / "c", weights())
    assert read(folder, Provenance(model="other", hook="elsewhere")).cfg.hook == "blocks.4.hook_resid_post"
    bare = {key: value for key, value in CFG.items() if key != "metadata"} | {"metadata": {"sae_lens_version": "6.1"}}
    (folder / "cfg.json").write_text(json.dumps(bare))
    sae = read(folder, Provenance(model="other", hook="elsewhere", hook_out="nowhere"))
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.hook_out) == ("other", "elsewhere", None)


def test_files():
    assert "a/b/cfg.json" in SAELens().patterns("a/b")
    assert all("trainer_state" not in name for name in SAELens().patterns("a/b"))
    assert SAELens().patterns("a[1]")[0] == "a[[]1]/cfg.json"


def test_a_temporal_file_that_says_a_billion_layers_is_refused(tmp_path):
    cfg = {"d_in": D, "d_sae": F, "architecture": "temporal", "n_attn_layers": 10**9, "n_heads": 2}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"bottleneck_factor": 1}))
    save_file({"W_dec": torch.ones(F, D), "b_dec": torch.ones(D)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FormatError, match="n_attn_layers is 1000000000"):
        read(tmp_path)
