"""sparsify's own arithmetic, on every kind of cfg.json that was published, and what is wrong with a folder."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import SPARSIFY, D, F, K, assert_formula, save_config, sparsify

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.sparsify import Sparsify

PLACES = {
    "pythia": ("blocks.3.hook_resid_post", None),
    "mlp": ("blocks.3.hook_mlp_out", None),
    "llama": ("blocks.30.hook_resid_post", None),
    "embedding": ("hook_embed", None),
    "signed": ("blocks.0.hook_attn_out", None),
    "skip": ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
    "current": ("blocks.4.hook_mlp_out", None),
    "transcode": ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"),
    "groupmax": ("blocks.7.hook_resid_post", None),
}


@pytest.mark.parametrize("variant", SPARSIFY)
def test_arithmetic(variant, tmp_path):
    written = sparsify(tmp_path, variant)
    sae = read(written.place)
    assert_formula(sae, written)
    assert (sae.cfg.hook, sae.cfg.hook_out) == PLACES[variant]
    assert sae.cfg.k == K
    assert sae.cfg.pre_bias == ("none" if variant == "transcode" else "tied")
    assert torch.equal(sae.W_dec, written.stored["W_dec"])


def test_b_dec_is_subtracted_from_a_skip_transcoders_input_unless_it_says_transcode(tmp_path):
    """As sparsify does it; and a decoder that is normalized in training does not change that."""
    for says, subtracted in (({}, "tied"), ({"transcode": False}, "tied"), ({"transcode": True}, "none")):
        written = sparsify(tmp_path, "skip", **says)
        sae = read(written.place)
        assert sae.cfg.pre_bias == subtracted
        assert_formula(sae, written)
    assert read(sparsify(tmp_path, "pythia", normalize_decoder=False).place).cfg.pre_bias == "tied"


def test_the_run_says_which_model(tmp_path):
    run = {"model": "EleutherAI/pythia-70m", "dataset": "EleutherAI/SmolLM2-135M-10B", "ctx_len": 2048}
    cfg = read(sparsify(tmp_path, "pythia", run=run).place, Provenance(model="another")).cfg
    assert (cfg.model, cfg.metadata["context_size"]) == ("EleutherAI/pythia-70m", 2048)
    assert cfg.metadata["sparsify"]["k"] == K
    assert read(sparsify(tmp_path / "b", "pythia").place, Provenance(model="another")).cfg.model == "another"


def test_a_run_of_transcoders(tmp_path):
    cfg = read(sparsify(tmp_path, "mlp", run={"transcode": True}).place).cfg
    assert ((cfg.hook, cfg.hook_out) == PLACES["skip"][:1][0].replace("5", "3") and None) or (cfg.hook, cfg.hook_out)
    assert (cfg.hook, cfg.hook_out) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtypes(dtype, tmp_path):
    written = sparsify(tmp_path, "pythia", dtype)
    assert read(written.place).dtype == dtype
    assert_formula(read(written.place, dtype=torch.float32), written)


def test_places_that_names_do_not_say(tmp_path):
    written = sparsify(tmp_path, "pythia")
    moved = written.place.rename(tmp_path / "mine")
    assert read(moved).cfg.hook is None
    assert read(moved, Provenance(hook="blocks.1.hook_mlp_out")).cfg.hook == "blocks.1.hook_mlp_out"
    assert read(moved, Provenance(path="layers.2.mlp")).cfg.hook == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize("variant", ["pythia", "skip"])
def test_every_tensor_is_accounted_for(variant, tmp_path):
    written = sparsify(tmp_path, variant)
    for name in written.stored:
        written.save({n: t for n, t in written.stored.items() if n != name})
        with pytest.raises(FormatError, match=name):
            read(written.place)
        written.save({**written.stored, name: written.stored[name][1:].contiguous()})
        with pytest.raises(FormatError, match=name):
            read(written.place)
    written.save({**written.stored, "W_skip" if variant == "pythia" else "more": torch.ones(D, D)})
    with pytest.raises(FormatError, match="left over"):
        read(written.place)


def test_keys_of_other_versions_count_for_nothing_as_in_the_library(tmp_path):
    written = sparsify(tmp_path, "pythia")
    config = {**SPARSIFY["pythia"][1], "d_in": D, "naive_decoder": True, "skip_connection": None}
    save_config(written.place / "cfg.json", config)
    sae = read(written.place)
    assert_formula(sae, written)
    assert sae.cfg.metadata["sparsify"]["naive_decoder"] is True


def test_an_encoder_alone(tmp_path):
    written = sparsify(tmp_path, "pythia")
    written.save({n: t for n, t in written.stored.items() if n != "W_dec"})
    with pytest.raises(FormatError, match="an encoder and no W_dec"):
        read(written.place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"activation": "groupmax", "signed": True}, "signed=True"),
        ({"activation": "groupmax", "k": 7}, "a divisor of d_sae"),
        ({"k": 0}, "k=0"),
        ({"k": F + 1}, "k=41"),
        ({"k": "5"}, "k as int"),
        ({"num_latents": 10**14}, "instead of"),
        ({"num_latents": -3}, "instead of"),
        ({"d_in": 0}, "instead of"),
        ({"skip_connection": True}, "W_skip missing"),
    ],
)
def test_a_config_that_does_not_fit(change, message, tmp_path):
    written = sparsify(tmp_path, "pythia")
    save_config(written.place / "cfg.json", {**SPARSIFY["pythia"][1], "d_in": D, **change})
    with pytest.raises(FormatError, match=message):
        read(written.place)


@pytest.mark.parametrize("config", [[], {}, "text", {"d_in": {}}])
def test_another_config(config, tmp_path):
    written = sparsify(tmp_path, "pythia")
    save_config(written.place / "cfg.json", config)
    with pytest.raises(FormatError):
        read(written.place)


def test_recognized_by_its_two_files(tmp_path):
    written = sparsify(tmp_path, "pythia")
    assert type(detect(written.place)) is Sparsify
    assert Sparsify().patterns("layers.3") == ["layers.3/cfg.json", "layers.3/sae.safetensors", "config.json"]
    assert Sparsify().patterns("a/layers.3")[-1] == "a/config.json"
    (written.place / "cfg.json").unlink()
    assert not Sparsify().detect(written.place)
