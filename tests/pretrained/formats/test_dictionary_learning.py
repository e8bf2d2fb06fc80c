"""Every dict_class of dictionary_learning, and what is wrong with a folder."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import DICT_CLASSES, D, F, K, assert_formula, dictionary_learning, save_config

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.dictionary_learning import DictionaryLearning
from saewb.pretrained.load import load_sae

GATES = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk"}


@pytest.mark.parametrize("kind", DICT_CLASSES)
def test_arithmetic(kind, tmp_path):
    written = dictionary_learning(tmp_path, kind)
    sae = read(written.place)
    assert_formula(sae, written)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.activation) == (D, F, GATES.get(kind, "jumprelu"))
    assert sae.cfg.k == (K if kind == "AutoEncoderTopK" else None)
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.3.hook_resid_post", "Llama-3.1-8B-Instruct")
    assert sae.cfg.metadata["context_size"] == 1024
    assert sae.W_dec.is_contiguous()
    assert repr(load_sae(written.place)) == repr(sae)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_is_not_estimated_yet_is_relu(kind, tmp_path):
    written = dictionary_learning(tmp_path, kind, threshold=-1.0)
    assert_formula(read(written.place), written)


def test_groups_keep_their_order(tmp_path):
    written = dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE")
    sae = read(written.place)
    assert sae.cfg.metadata["group_sizes"] == [8, 12, 20]
    assert torch.equal(sae.W_dec, written.stored["W_dec"])


def test_top_k_without_what_newer_files_have(tmp_path):
    written = dictionary_learning(tmp_path, "AutoEncoderTopK", extras=False)
    assert_formula(read(written.place), written)


@pytest.mark.parametrize("kind", DICT_CLASSES)
def test_inside_what_goes_on_with_training(kind, tmp_path):
    written = dictionary_learning(tmp_path, kind, wrap=True)
    assert_formula(read(written.place), written)


def test_other_dtypes(tmp_path):
    written = dictionary_learning(tmp_path, "BatchTopKSAE")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in written.stored.items()}
    written.save(half)
    assert read(written.place).dtype == torch.bfloat16
    assert read(written.place, dtype=torch.float64).W_enc.dtype == torch.float64


@pytest.mark.parametrize(
    ("part", "io", "hook"),
    [
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        ("attention_out_layer_3", "out", "blocks.3.hook_attn_out"),
        ("mlp_out_layer_3", "out", "blocks.3.hook_mlp_out"),
        ("something_else", "out", "by.the.caller"),
        ("resid_post_layer_3", "in", "by.the.caller"),
    ],
)
def test_hooks_come_from_the_name_of_the_part(part, io, hook, tmp_path):
    dictionary_learning(tmp_path, "AutoEncoder", trainer={"submodule_name": part}, buffer={"io": io})
    assert read(tmp_path, Provenance(hook="by.the.caller")).cfg.hook == hook


def test_what_a_catalogue_says_comes_first(tmp_path):
    dictionary_learning(tmp_path, "AutoEncoder")
    facts = Provenance(overrides={"hook_name": "blocks.1.hook_mlp_out", "dataset_path": "other"})
    cfg = read(tmp_path, facts).cfg
    assert cfg.hook == "blocks.1.hook_mlp_out"
    assert cfg.metadata["dataset_path"] == "other"


@pytest.mark.parametrize("kind", DICT_CLASSES)
def test_every_tensor_is_accounted_for(kind, tmp_path):
    written = dictionary_learning(tmp_path, kind)
    optional = ("k", "group_sizes") + ("threshold",) * (kind == "AutoEncoderTopK")
    for name in written.stored:
        if name not in optional:
            written.save({n: t for n, t in written.stored.items() if n != name})
            with pytest.raises(FormatError, match=f"{name} missing"):
                read(tmp_path)
        written.save({**written.stored, name: torch.ones(3, 2, 2)})
        with pytest.raises(FormatError):
            read(tmp_path)
    written.save({**written.stored, "more": torch.ones(2)})
    with pytest.raises(FormatError, match="more left over"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict_class": "AutoEncoderTopL"}, "unknown dict_class 'AutoEncoderTopL'"),
        ({"activation_dim": D + 1}, "instead of"),
        ({"dict_size": 10**12}, "instead of"),
        ({"dict_size": "many"}, "dict_size as int"),
        ({"layer": None}, "layer as int"),
        ({"lm_name": 3}, "lm_name as str"),
        ({"k": K + 1}, "want: one integer"),
        ({"k": True}, "want: one integer"),
    ],
)
def test_a_trainer_that_does_not_fit(change, message, tmp_path):
    dictionary_learning(tmp_path, "AutoEncoderTopK", trainer=change)
    with pytest.raises(FormatError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("config", [[], {}, {"trainer": []}, {"trainer": {}}, 3])
def test_another_config(config, tmp_path):
    dictionary_learning(tmp_path, "AutoEncoder")
    save_config(tmp_path / "config.json", config)
    with pytest.raises(FormatError, match="config.json|trainer"):
        read(tmp_path)


@pytest.mark.parametrize("trainer", [{"submodule_name": None}, {"submodule_name": None, "lm_name": None, "k": None}])
def test_null_is_as_a_missing_key(trainer, tmp_path):
    written = dictionary_learning(tmp_path, "AutoEncoder", trainer=trainer, buffer={"io": None, "ctx_len": None})
    sae = read(written.place, Provenance(model="mine/gpt2"))
    assert_formula(sae, written)
    assert sae.cfg.hook == "blocks.3.hook_resid_post"
    assert sae.cfg.model == ("gpt2" if "lm_name" in trainer else "Llama-3.1-8B-Instruct")


def test_recognized_by_its_two_files(tmp_path):
    dictionary_learning(tmp_path, "AutoEncoder")
    assert type(detect(tmp_path)) is DictionaryLearning
    assert DictionaryLearning().patterns("a/b [1]") == ["a/b [[]1]/config.json", "a/b [[]1]/ae.pt"]
    (tmp_path / "ae.pt").unlink()
    assert not DictionaryLearning().detect(tmp_path)
    with pytest.raises(FormatError, match="dictionary_learning"):
        detect(tmp_path)
