"""circuit-tracer's per-layer transcoders: thresholds and skip matrices count, configurations may be missing."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import MWHANNA_CONFIG, D, F, K, O, assert_formula, inputs, mwhanna, wandb_config

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.circuit_tracer import CircuitTracerTranscoder
from saewb.pretrained.load import load_sae, save_sae

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


def with_top_k(config=MWHANNA_CONFIG, **more):
    return config + "".join(f"\n{name}: {value}" for name, value in more.items()) + "\n"


@pytest.mark.parametrize("shift", [0.0, -9.0])  # with -9 fewer than k pre-activations are above 0
def test_top_k_keeps_the_k_largest_of_either_sign(shift, tmp_path):
    written = mwhanna(tmp_path, config=with_top_k(activation="topk", k=K))
    stored = {name: t.float() for name, t in written.stored.items()}
    written.save({**stored, "b_enc": stored["b_enc"] + shift})
    sae = read(written.place)
    x = torch.from_numpy(inputs(7)).float()
    pre = x @ stored["W_enc"].T + stored["b_enc"] + shift
    top = pre.topk(K)
    z = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    assert bool((z < 0).any()) == (shift < 0)
    for acts in (sae.encode(x), sae.encode_topk(x).dense(), sae.encode_sparse(x).dense()):
        torch.testing.assert_close(acts, z)
    torch.testing.assert_close(sae(x), z @ stored["W_dec"] + stored["b_dec"], rtol=1e-5, atol=1e-5)
    again = load_sae(save_sae(sae, tmp_path / "saved"))
    assert (again.cfg.activation, again.cfg.k) == ("lineartopk", K)
    torch.testing.assert_close(again.encode(x), z)


def test_k_comes_from_the_configuration_the_weights_or_the_library(tmp_path):
    written = mwhanna(tmp_path, config=with_top_k(activation="topk", k="null"))
    with pytest.raises(FormatError, match="'topk' with k not said"):
        read(written.place)
    written.save({**written.stored, "k": torch.tensor(K)})  # as the library's own to_safetensors writes it
    assert read(written.place).cfg.k == K
    with pytest.raises(FormatError, match="'topk' with k "):
        read(written.place, Provenance(repo="facebook/crv-8b-instruct-transcoders"))
    (tmp_path / "config.yaml").write_text(with_top_k(activation="topk", k=K + 1))
    with pytest.raises(FormatError, match=f"config.yaml': {K + 1}"):
        read(written.place)


@pytest.mark.parametrize(
    ("threshold", "config", "match"),
    [
        (None, with_top_k(activation="gelu"), "activation 'gelu'"),
        (None, with_top_k(activation="jumprelu"), "no thresholds"),
        ("threshold", with_top_k(activation="relu"), "there are thresholds"),
        ("threshold", with_top_k(activation="topk", k=K), "there are thresholds"),
        (None, MWHANNA_CONFIG.replace("transcoder_set", "cross_layer_transcoder"), "model_kind"),
    ],
)
def test_a_stated_activation_that_the_weights_do_not_have(threshold, config, match, tmp_path):
    with pytest.raises(FormatError, match=match):
        read(mwhanna(tmp_path, threshold=threshold, config=config).place)


def test_null_is_as_a_missing_key(tmp_path):
    nulls = (
        "model_name: null\nmodel_kind: null\nfeature_input_hook: null\nfeature_output_hook: null\nactivation: null\n"
    )
    written = mwhanna(tmp_path, config=nulls + "k: null\n")
    sae = read(written.place, Provenance(model="mine"), dtype=torch.float32)
    assert_formula(sae, written)
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.hook_out) == (
        "mine",
        "blocks.12.mlp.hook_in",
        "blocks.12.hook_mlp_out",
    )


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
