"""circuit-tracer's per-layer transcoders: thresholds and skip matrices count, configurations may be missing."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import MWHANNA_CONFIG, D, F, O, assert_formula, mwhanna, wandb_config

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.circuit_tracer import CircuitTracerTranscoder

VARIANTS = {
    "published": {},
    "threshold": {"threshold": "activation_function.threshold"},
    "skip": {"skip": True},
    "both": {"threshold": "threshold", "skip": True},
    "misspelt": {"typo": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_arithmetic(variant, tmp_path):
    written = mwhanna(tmp_path, **VARIANTS[variant])
    sae = read(written.place, dtype=torch.float32)
    assert_formula(sae, written)
    assert (sae.cfg.hook, sae.cfg.hook_out) == ("blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out")
    assert sae.cfg.model == "Qwen/Qwen3-4B"
    assert sae.cfg.metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}
    assert read(written.place).dtype == torch.bfloat16


@pytest.mark.parametrize("skip", [True, False])
def test_another_width_of_output(skip, tmp_path):
    written = mwhanna(tmp_path, d_out=O, skip=skip)
    sae = read(written.place, dtype=torch.float32)
    assert sae.cfg.d_out == O
    assert_formula(sae, written)


def test_hooks_come_from_the_configuration(tmp_path):
    config = MWHANNA_CONFIG.replace("mlp.hook_in", "ln2.hook_normalized")
    assert read(mwhanna(tmp_path, config=config).place).cfg.hook == "blocks.12.ln2.hook_normalized"


def test_without_the_configuration_the_repository_says_the_model(tmp_path):
    place = mwhanna(tmp_path, config=None).place
    assert read(place).cfg.model is None
    assert read(place, Provenance(repo="mwhanna/qwen3-14b-transcoders-lowl0")).cfg.model == "Qwen/Qwen3-14B"
    assert read(place, Provenance(model="mine")).cfg.model == "mine"


def test_a_k_counts_for_nothing_beside_a_threshold(tmp_path):
    written = mwhanna(tmp_path, threshold="threshold")
    written.save({**written.stored, "k": torch.tensor(7)})
    assert_formula(read(written.place, dtype=torch.float32), written)
    written = mwhanna(tmp_path)
    written.save({**written.stored, "k": torch.tensor(7)})
    with pytest.raises(FormatError, match="k left over"):
        read(written.place)


def test_every_tensor_is_accounted_for(tmp_path):
    written = mwhanna(tmp_path, skip=True, threshold="threshold")
    for name in written.stored:
        if name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            written.save({n: t for n, t in written.stored.items() if n != name})
            with pytest.raises(FormatError, match=name):
                read(written.place)
        written.save({**written.stored, name: written.stored[name][1:].contiguous()})
        with pytest.raises(FormatError, match="instead of"):
            read(written.place)
    written.save({**written.stored, "more": torch.ones(2)})
    with pytest.raises(FormatError, match="more left over"):
        read(written.place)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wandb-config.yaml", wandb_config(d_model=D + 1)),
        ("wandb-config.yaml", wandb_config(d_feature=10**15)),
        ("wandb-config.yaml", "d_model: 3"),
        ("wandb-config.yaml", "- 1"),
        ("wandb-config.yaml", "d_model: {value: !!python/object/apply:os.system [echo]}"),
        ("config.yaml", "model_name: [1]"),
        ("config.yaml", "feature_input_hook: 3"),
        ("config.yaml", "a: &a [x, x]\nmodel_name: [*a, *a]"),
        ("config.yaml", "{" * 400),
        ("config.yaml", "\x00"),
    ],
)
def test_a_configuration_that_does_not_fit(name, text, tmp_path):
    place = mwhanna(tmp_path).place
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError):
        read(place)


def test_recognized_by_name_and_tensors(tmp_path):
    written = mwhanna(tmp_path)
    assert type(detect(written.place)) is CircuitTracerTranscoder
    assert CircuitTracerTranscoder().patterns("layer_3.safetensors") == [
        *("config.yaml", "layer_3.safetensors", "wandb-config.yaml", "wanb-config.yaml")
    ]
    assert CircuitTracerTranscoder().patterns("") == CircuitTracerTranscoder().patterns("layer_3") == []
    written.save({"W": torch.ones(F)})
    assert not CircuitTracerTranscoder().detect(written.place)
    written.place.write_bytes(b"no safetensors")
    assert not CircuitTracerTranscoder().detect(written.place)
