"""Layouts that are one .pt file: attention SAEs with a configuration beside it, and Goodfire's."""

import json

import numpy as np
import pytest
import torch
from helpers.format_tensors import D, F, assert_computes, gated, inputs, rounded, tensors, weights, wide

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.attention_hook_z import AttentionHookZ
from saewb.pretrained.formats.linear_pt import Goodfire

HOOK_Z = "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt"
GOODFIRE = "Llama-3.1-8B-Instruct-SAE-l19.pth"
GOODFIRE_REPO = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"


def written_hook_z(folder, w=None, cfg=None, **more):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors(w or weights()), **more}, folder / HOOK_Z)
    text = {"seed": 49, "lr": 0.0012, "act_size": D, "dict_size": F, "act_name": "blocks.0.attn.hook_z"}
    (folder / HOOK_Z.replace(".pt", "_cfg.json")).write_text(json.dumps(text | (cfg or {})))
    return folder / HOOK_Z


def written_goodfire(folder, w, dtype=torch.bfloat16, name=GOODFIRE, **more):
    folder.mkdir(parents=True, exist_ok=True)
    linear = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    linear |= {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]}
    torch.save({**tensors(linear, dtype), **more}, folder / name)
    return folder / name


def test_hook_z_subtracts_its_bias_first(tmp_path):
    w, x = weights(), inputs()
    place = written_hook_z(tmp_path, w)
    assert type(detect(place)) is AttentionHookZ
    sae = read(place)
    n, x64 = wide(w), x.astype(np.float64)
    latents = gated((x64 - n["b_dec"]) @ n["W_enc"] + n["b_enc"])
    assert_computes(sae, x, latents, latents @ n["W_dec"] + n["b_dec"])
    assert (sae.cfg.hook, sae.cfg.model, sae.cfg.pre_bias) == ("blocks.0.attn.hook_z", "gpt2-small", "tied")
    assert (sae.cfg.metadata["context_size"], sae.cfg.metadata["dataset_path"]) == (128, "Skylion007/openwebtext")
    assert read(place, Provenance(overrides={"model_name": "mine"})).cfg.model == "mine"


def test_hook_z_reads_heads(tmp_path):
    from saewb.interventions.site import flatten_heads

    sae = read(written_hook_z(tmp_path))
    heads = torch.from_numpy(inputs()).view(5, 10, 4, D // 4)
    assert torch.equal(flatten_heads(sae, heads, D, "hook_z"), heads.flatten(-2))


def test_hook_z_files_are_named_before_the_first_pt():
    config = HOOK_Z.replace(".pt", "_cfg.json")
    assert AttentionHookZ().patterns(HOOK_Z) == [config, HOOK_Z]
    assert AttentionHookZ().patterns("a.pt/b.pt") == ["a.pt/b_cfg.json", "a.pt/b.pt"]
    assert AttentionHookZ().patterns("folder") == []
    assert Goodfire().patterns(GOODFIRE) == [GOODFIRE]
    assert Goodfire().patterns("") == []


@pytest.mark.parametrize(
    ("cfg", "more", "message"),
    [
        ({"act_size": D + 1}, {}, "instead of"),
        ({"dict_size": None}, {}, "dict_size=None"),
        ({"act_name": 3}, {}, "act_name=3"),
        ({}, {"step": torch.ones(1)}, "step left over"),
        ({}, {"b_enc": torch.ones(F + 1)}, "b_enc"),
        ({}, {"b_enc": torch.full((F,), float("nan"))}, "NaN or infinity in b_enc"),
        ({}, {"W_enc": torch.ones(F, D)}, "W_enc"),
    ],
)
def test_another_hook_z_is_refused(cfg, more, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(written_hook_z(tmp_path, None, cfg, **more))


def test_hook_z_without_a_tensor_is_refused(tmp_path):
    for name in weights():
        with pytest.raises(FormatError, match=f"{name} missing"):
            read(written_hook_z(tmp_path, {n: a for n, a in weights().items() if n != name}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_goodfire_subtracts_nothing(dtype, tmp_path):
    w, x = rounded(weights(), dtype), inputs()
    place = written_goodfire(tmp_path, w, dtype)
    assert type(detect(place)) is Goodfire
    sae = read(place, Provenance(repo=GOODFIRE_REPO, path=GOODFIRE), dtype=torch.float32)
    n, x64 = wide(w), x.astype(np.float64)
    latents = gated(x64 @ n["W_enc"] + n["b_enc"])
    assert_computes(sae, x, latents, latents @ n["W_dec"] + n["b_dec"])
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.19.hook_resid_post", "meta-llama/Llama-3.1-8B-Instruct")
    assert sae.cfg.pre_bias == "none"
    assert read(place).dtype == dtype
    assert read(place).W_dec.is_contiguous()


def test_goodfire_by_its_file_name_alone(tmp_path):
    sae = read(written_goodfire(tmp_path, weights(), name="Llama-3.3-70B-Instruct-SAE-l50.pt"))
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.50.hook_resid_post", "meta-llama/Llama-3.3-70B-Instruct")
    renamed = read(written_goodfire(tmp_path, weights(), name="sae.pt"), Provenance(model="m", layer=3))
    assert (renamed.cfg.hook, renamed.cfg.model) == ("blocks.3.hook_resid_post", "m")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"k": torch.tensor(3)}, "k left over"),
        ({"decoder_linear.weight": torch.ones(F, D)}, "decoder_linear.weight"),
        ({"encoder_linear.weight": torch.ones(F)}, "encoder_linear.weight"),
        ({"decoder_linear.bias": torch.full((D,), float("inf"))}, "NaN or infinity in decoder_linear.bias"),
    ],
)
def test_another_goodfire_is_refused(more, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(written_goodfire(tmp_path, weights(), **more))


def test_a_file_of_neither_is_refused(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(FormatError, match=r"no layout that saewb knows: the file .*other\.pt"):
        detect(tmp_path / "other.pt")


class Run:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("write", [written_hook_z, written_goodfire])
def test_nothing_in_a_file_is_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = write(tmp_path / "sae", weights(), code=Run())
    with pytest.raises(FormatError):
        read(place)
    assert not (tmp_path / "ran").exists()
